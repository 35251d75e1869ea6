use super::*;
use crate::claude::message::fixtures::{self, Fixture};
use crate::gateway::failure::{NO_CREDENTIAL, UNREACHABLE};
use Kind::{Done, Failed, Retry, Waits};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// 2026-11-24T12:00:00Z
const NOW: Timestamp = Timestamp(1_795_521_600_000_000);

/// A verdict without its words and times.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Done,
    Failed(ErrorCode),
    /// After the usual pause, counted.
    Retry(ErrorCode),
    /// Until the API serves runs again, not counted.
    Waits(ErrorCode),
}

fn kind(verdict: &Verdict) -> Kind {
    match verdict {
        Verdict::Done => Done,
        Verdict::Failed { code, .. } => Failed(*code),
        Verdict::Retry {
            code,
            when: When::Backoff { .. },
            counts: true,
            ..
        } => Retry(*code),
        Verdict::Retry {
            code,
            when: When::At(_) | When::Upstream { .. },
            counts: false,
            ..
        } => Waits(*code),
        other => panic!("not the verdict on a run that ended by itself: {other:?}"),
    }
}

fn message(verdict: &Verdict) -> &str {
    match verdict {
        Verdict::Failed { message, .. } | Verdict::Retry { message, .. } => message,
        _ => "",
    }
}

fn ended(fixture: &Fixture) -> Ended {
    let mut ended = Ended::new(fixture.schema, NOW);
    fixture
        .messages()
        .iter()
        .for_each(|message| ended.observe(message));
    Ended {
        exit: fixture.exit,
        signal: fixture.signal,
        stderr_tail: fixture.stderr.clone(),
        ..ended
    }
}

/// A run that ended with this result line.
fn with_result(line: &Value) -> Ended {
    let mut ended = Ended::new(false, NOW);
    ended.observe(&Message::parse(line.to_string().as_bytes()));
    assert!(ended.result.is_some());
    ended
}

/// A run that an error of the API ended, with what the CLI says in that case.
fn with_api_error(status: Option<u16>, text: &str) -> Ended {
    with_result(
        &json!({"type": "result", "subtype": "success", "is_error": true, "terminal_reason": "api_error",
        "api_error_status": status, "result": text}),
    )
}

fn failure(status: u16, error_type: &str, message: &str) -> ApiFailure {
    ApiFailure::own(status, error_type, message)
}

#[test]
fn each_recorded_run_gets_its_verdict() {
    use ErrorCode::{
        ApiUnavailable, AuthError, BillingError, ClaudeError, ClaudeKilled, InvalidRequest, MaxCost,
        MaxOutputTokens, MaxTurns, ModelNotFound, Overloaded, PromptTooLong, RateLimited, Refusal,
        RequestTooLarge, SchemaMismatch, SessionNotFound, UsageLimit,
    };
    let table = [
        ("text", Done, "an answer"),
        ("thinking", Done, "an answer after thinking"),
        ("write", Done, "a tool was used"),
        (
            "write-outside",
            Done,
            "a denied tool isn't a failure; the result names it",
        ),
        ("bash", Done, "a command ran"),
        ("bash-denied", Done, "a denied command isn't a failure"),
        (
            "bash-fails",
            Done,
            "what the model does about a failed command is its answer",
        ),
        ("parallel", Done, "two tools at once"),
        ("subagent", Done, "a subagent's work"),
        ("slash", Done, "a slash is text for the model"),
        ("resume", Done, "a resumed session"),
        (
            "e400",
            Failed(InvalidRequest),
            "the same request would be refused again",
        ),
        (
            "e400-credit",
            Failed(BillingError),
            "known by its text; the status is 400",
        ),
        (
            "e400-organization",
            Failed(AuthError),
            "known by its text; another credential is needed",
        ),
        (
            "e400-too-long",
            Failed(PromptTooLong),
            "it won't get shorter by itself",
        ),
        ("e401", Failed(AuthError), "a wrong key stays wrong"),
        ("e401-token", Failed(AuthError), "a wrong token too"),
        ("e402", Failed(BillingError), "somebody must pay"),
        ("e403", Failed(AuthError), "no permission"),
        ("e403-revoked", Failed(AuthError), "a revoked login"),
        ("e404", Failed(ModelNotFound), "no such model"),
        ("e408", Retry(ApiUnavailable), "a timeout at the API"),
        ("e409", Retry(ApiUnavailable), "a conflict at the API passes"),
        ("e413", Failed(RequestTooLarge), "it won't get smaller by itself"),
        ("e429", Retry(RateLimited), "limited for seconds"),
        (
            "e429-long",
            Retry(RateLimited),
            "limited for an hour, which only the gateway knows",
        ),
        ("e429-once", Done, "the CLI got over it"),
        (
            "e429-plain",
            Retry(RateLimited),
            "limited, nobody says for how long",
        ),
        (
            "e429-token",
            Retry(RateLimited),
            "rejected without a reset time: not the account's usage limit",
        ),
        ("usage-limit", Retry(UsageLimit), "the five-hour limit"),
        ("usage-limit-week", Retry(UsageLimit), "the weekly limit"),
        ("usage-warning", Done, "a warning is no rejection"),
        ("e500", Retry(ApiUnavailable), "a server error passes"),
        ("e500-final", Retry(ApiUnavailable), "not at once, but later"),
        ("e500-once", Done, "the CLI got over it"),
        ("e502", Retry(ApiUnavailable), "a proxy's error page"),
        ("e503", Retry(ApiUnavailable), "unavailable"),
        ("e504", Retry(ApiUnavailable), "a gateway timeout"),
        ("e529", Retry(Overloaded), "overloaded"),
        ("e529-twice", Done, "the CLI got over it"),
        (
            "html",
            Failed(ClaudeError),
            "200 with a web page: a wrong address doesn't pass",
        ),
        ("stream-error", Done, "the CLI asked again without a stream"),
        ("reset-once", Done, "the CLI got over it"),
        ("reset", Retry(ApiUnavailable), "connections break"),
        ("refused", Retry(ApiUnavailable), "the network comes back"),
        (
            "no-socket",
            Retry(ApiUnavailable),
            "the gateway comes back with the next run",
        ),
        ("no-answer", Retry(ApiUnavailable), "a mute server"),
        ("no-login", Failed(AuthError), "no credential appears by itself"),
        ("refusal", Failed(Refusal), "the model would refuse again"),
        (
            "max-tokens",
            Failed(MaxOutputTokens),
            "the answer would be as long again",
        ),
        ("max-turns", Failed(MaxTurns), "as asked"),
        ("max-cost", Failed(MaxCost), "as asked"),
        (
            "max-cost-text",
            Failed(MaxCost),
            "the answer was whole, but it isn't in the result",
        ),
        ("structured", Done, "the schema is filled"),
        ("structured-bad", Failed(SchemaMismatch), "five attempts failed"),
        (
            "structured-never",
            Failed(SchemaMismatch),
            "the CLI calls it a success",
        ),
        (
            "structured-invalid",
            Failed(InvalidRequest),
            "no result line; stderr names the flag",
        ),
        (
            "resume-unknown",
            Retry(SessionNotFound),
            "the next attempt starts anew",
        ),
        (
            "interrupt-streaming",
            Retry(ClaudeKilled),
            "nobody here asked for it",
        ),
        ("interrupt-tool", Retry(ClaudeKilled), "nobody here asked for it"),
        (
            "sigint-streaming",
            Retry(ClaudeKilled),
            "exit code 0 is no success",
        ),
        (
            "sigterm-streaming",
            Retry(ClaudeKilled),
            "no result line; exit code 143",
        ),
        (
            "sigterm-tool",
            Retry(ClaudeKilled),
            "no result line; exit code 143",
        ),
        ("sigkill-streaming", Retry(ClaudeKilled), "no result line"),
        ("sigkill-tool", Retry(ClaudeKilled), "no result line"),
        (
            "empty",
            Failed(ClaudeError),
            "exit code 0 without a result is no success",
        ),
        ("garbage-in", Failed(ClaudeError), "exit code 1, stderr only"),
    ];
    let mut fixtures = fixtures::all();

    for (name, expected, reason) in table {
        let fixture = fixtures
            .remove(name)
            .unwrap_or_else(|| panic!("there is no transcript {name}"));
        let verdict = judge(&ended(&fixture));
        assert_eq!(kind(&verdict), expected, "{name}: {reason}\n{verdict:?}");
        let message = message(&verdict);
        assert!(expected == Done || message.ends_with('.'), "{name}: {message}");
    }
    // Those that show what runs cost.
    fixtures.retain(|name, fixture| {
        let is_cost = name.starts_with("cost-");
        assert!(!is_cost || kind(&judge(&ended(fixture))) == Done, "{name}");
        !is_cost
    });
    assert_eq!(
        fixtures.into_keys().collect::<Vec<_>>(),
        Vec::<String>::new(),
        "transcripts without a line in the table"
    );
}

#[test]
fn a_message_says_what_was_wrong_and_what_to_do() {
    for (name, words) in [
        (
            "e401",
            vec!["credential", "ANTHROPIC_API_KEY", "claude auth login"],
        ),
        ("no-login", vec!["credential", "ANTHROPIC_API_KEY"]),
        (
            "e400-credit",
            vec!["can't pay", "Credit balance is too low", "Add credit"],
        ),
        ("e404", vec!["model", "claude-sonnet-5-5", "`model`"]),
        ("e400", vec!["messages: bad request", "Change the job's message"]),
        ("max-turns", vec!["(2)", "`max_turns`"]),
        ("max-cost", vec!["$0.5", "`max_cost_usd`"]),
        ("structured-never", vec!["schema"]),
        (
            "refused",
            vec!["can't be reached", "ECONNREFUSED", "ANTHROPIC_BASE_URL"],
        ),
        ("html", vec!["ANTHROPIC_BASE_URL", "isn't the Messages API"]),
        ("empty", vec!["exit code 0", "without a result"]),
        ("garbage-in", vec!["exit code 1", "SyntaxError"]),
        ("sigkill-tool", vec!["signal 9"]),
        ("sigterm-tool", vec!["signal 15"]),
        ("usage-limit", vec!["5-hour limit"]),
    ] {
        let verdict = judge(&ended(&fixtures::named(name)));
        for word in words {
            assert!(
                message(&verdict).contains(word),
                "{name} doesn't say {word}: {}",
                message(&verdict)
            );
        }
    }
}

#[test]
fn only_the_gateway_makes_a_job_wait_for_a_usage_limit() {
    for name in ["usage-limit", "usage-limit-week"] {
        let reset = NOW.plus(Duration::from_hours(3));
        let seen = ApiFailure {
            usage_reset: Some(reset),
            ..failure(
                429,
                "rate_limit_error",
                "This request would exceed your account's rate limit.",
            )
        };

        let told = judge(&ended(&fixtures::named(name)));
        let met = judge(&Ended {
            observed: Some(seen),
            ..ended(&fixtures::named(name))
        });

        assert_eq!(
            kind(&told),
            Retry(ErrorCode::UsageLimit),
            "the agent can write that"
        );
        let Verdict::Retry { when, counts, .. } = met else {
            panic!("{met:?}")
        };
        assert_eq!((when, counts), (When::At(reset), false));
    }
}

#[test]
fn what_the_gateway_saw_comes_first() {
    let plain = || with_api_error(Some(429), "API Error: Request rejected (429) · slow down");
    let retry_after = |seconds| {
        Some(ApiFailure {
            retry_after: Some(Duration::from_secs(seconds)),
            ..failure(429, "rate_limit_error", "slow down")
        })
    };
    for (observed, not_before, reason) in [
        (
            Some(failure(429, "rate_limit_error", "slow down")),
            None,
            "no time named",
        ),
        (
            retry_after(3_600),
            Some(NOW.plus(Duration::from_hours(1))),
            "the CLI doesn't tell the header",
        ),
    ] {
        let Verdict::Retry { when, .. } = judge(&Ended { observed, ..plain() }) else {
            panic!("{reason}")
        };
        assert_eq!(when, When::Upstream { not_before }, "{reason}");
    }
}

#[test]
fn causes_without_a_transcript() {
    use ErrorCode::{
        ApiUnavailable, AuthError, BillingError, ClaudeError, InvalidRequest, ModelNotFound, Overloaded,
        RateLimited, Refusal,
    };
    let seen = |status, error_type, message| Some(failure(status, error_type, message));
    for (ended, expected, reason) in [
        (
            Ended {
                observed: seen(529, "overloaded_error", "Overloaded"),
                ..with_api_error(None, "API Error")
            },
            Waits(Overloaded),
            "the CLI left out the status",
        ),
        (
            with_api_error(
                None,
                "API Error: Repeated 529 Overloaded errors. The API is at capacity",
            ),
            Retry(Overloaded),
            "an older CLI, and no gateway",
        ),
        (
            Ended {
                observed: seen(502, UNREACHABLE, "connection refused"),
                ..with_api_error(Some(502), "API Error: 502")
            },
            Waits(ApiUnavailable),
            "the gateway reached nothing",
        ),
        (
            Ended {
                observed: seen(401, NO_CREDENTIAL, "no login"),
                ..with_api_error(Some(401), "Not logged in")
            },
            Waits(AuthError),
            "the gateway has no credential",
        ),
        (
            Ended {
                observed: seen(404, "not_found_error", "Not Found"),
                ..with_api_error(Some(404), "There's an issue with the selected model")
            },
            Waits(ApiUnavailable),
            "the address is wrong, not the model",
        ),
        (
            Ended {
                observed: seen(404, "not_found_error", "model: claude-x"),
                ..with_api_error(Some(404), "There's an issue with the selected model")
            },
            Failed(ModelNotFound),
            "the model is wrong",
        ),
        (
            Ended {
                observed: seen(529, "overloaded_error", "Overloaded"),
                ..with_api_error(Some(404), "no model")
            },
            Failed(ModelNotFound),
            "an older failure that the CLI got over",
        ),
        (
            Ended {
                observed: seen(529, "overloaded_error", "Overloaded"),
                ..with_result(
                    &json!({"type": "result", "subtype": "success", "is_error": true, "stop_reason": "refusal"}),
                )
            },
            Failed(Refusal),
            "an older failure before a refusal",
        ),
        (
            Ended {
                observed: seen(
                    400,
                    "invalid_request_error",
                    "Your credit balance is too low to access the API.",
                ),
                ..with_api_error(Some(400), "API Error: 400")
            },
            Waits(BillingError),
            "known by the API's own text alone",
        ),
        (
            with_api_error(Some(422), "API Error: 422"),
            Failed(InvalidRequest),
            "another 4xx",
        ),
        (
            with_api_error(Some(520), "API Error: 520"),
            Retry(ApiUnavailable),
            "another 5xx",
        ),
        (
            with_api_error(None, "Something new"),
            Failed(ClaudeError),
            "nothing known about it",
        ),
        (
            Ended {
                last_assistant_error: Some("rate_limit".to_owned()),
                ..with_api_error(None, "")
            },
            Retry(RateLimited),
            "only the assistant line says what it was",
        ),
        (
            Ended {
                last_assistant_error: Some("oauth_org_not_allowed".to_owned()),
                ..with_api_error(None, "")
            },
            Failed(AuthError),
            "the organization may not",
        ),
        (
            with_result(
                &json!({"type": "result", "subtype": "success", "is_error": false, "terminal_reason": "tool_deferred"}),
            ),
            Failed(ClaudeError),
            "a hook put a tool call off: not finished",
        ),
        (
            with_result(&json!({"type": "result", "subtype": "error_of_a_later_release", "is_error": true})),
            Failed(ClaudeError),
            "an unknown subtype",
        ),
        (
            Ended {
                stderr_tail: "Session ID 1 is already in use.\n".to_owned(),
                exit: Some(1),
                ..Ended::new(false, NOW)
            },
            Retry(ClaudeError),
            "the next attempt has another id",
        ),
        (
            Ended::new(false, NOW),
            Failed(ClaudeError),
            "nothing is known at all",
        ),
    ] {
        let verdict = judge(&ended);
        assert_eq!(kind(&verdict), expected, "{reason}\n{verdict:?}");
    }
}

#[test]
fn a_run_broken_off_while_the_api_could_not_serve_it_waits() {
    let seen = || Some(failure(401, "authentication_error", "invalid x-api-key"));
    let timeout = Stopped::Timeout {
        deadline: Deadline::Total,
        after: Duration::from_mins(5),
    };

    let ended_early = judge(&Ended {
        observed: seen(),
        ..ended(&fixtures::named("interrupt-streaming"))
    });
    let without_result = judge(&Ended {
        observed: seen(),
        exit: Some(1),
        ..Ended::new(false, NOW)
    });
    let too_long = judge(&Ended {
        observed: seen(),
        stopped: Some(timeout),
        ..Ended::new(false, NOW)
    });
    let killed = judge(&Ended {
        observed: seen(),
        signal: Some(9),
        ..Ended::new(false, NOW)
    });
    let told_by_the_cli = judge(&Ended {
        last_api_retry: Some(ApiRetry {
            status: Some(401),
            error: None,
        }),
        exit: Some(1),
        ..Ended::new(false, NOW)
    });

    for verdict in [ended_early, without_result, too_long] {
        assert_eq!(kind(&verdict), Waits(ErrorCode::AuthError));
    }
    assert_eq!(kind(&killed), Retry(ErrorCode::ClaudeKilled));
    assert_eq!(kind(&told_by_the_cli), Failed(ErrorCode::ClaudeError));
}

#[test]
fn an_answer_forgets_the_failures_before_it() {
    let mut ended = ended(&fixtures::named("e429-once"));
    assert_eq!(ended.last_api_retry, None);

    ended.observe(&Message::ApiRetry(ApiRetry {
        status: Some(401),
        ..ApiRetry::default()
    }));
    assert!(ended.last_api_retry.is_some());
}

#[test]
fn only_the_first_result_without_an_origin_counts() {
    let mut ended = Ended::new(false, NOW);
    for line in [
        json!({"type": "result", "subtype": "error_max_turns", "is_error": true, "origin": {"kind": "peer"}}),
        json!({"type": "result", "subtype": "success", "is_error": false, "result": "first"}),
        json!({"type": "result", "subtype": "error_max_turns", "is_error": true}),
    ] {
        ended.observe(&Message::parse(line.to_string().as_bytes()));
    }

    assert_eq!(ended.result.as_ref().unwrap().text.as_deref(), Some("first"));
    assert_eq!(judge(&ended), Verdict::Done);
}

#[test]
fn the_worker_knows_best_why_it_ended_a_run() {
    let timeout = Stopped::Timeout {
        deadline: Deadline::Total,
        after: Duration::from_mins(5),
    };
    let interrupted = || ended(&fixtures::named("interrupt-tool"));
    let complete = || ended(&fixtures::named("text"));
    let without_result = || ended(&fixtures::named("sigkill-streaming"));
    let stopped = |stopped, ended| {
        judge(&Ended {
            stopped: Some(stopped),
            ..ended
        })
    };

    for run in [interrupted(), without_result()] {
        assert_eq!(stopped(Stopped::Cancelled, run.clone()), Verdict::Cancelled);
        assert_eq!(stopped(Stopped::Shutdown, run.clone()), Verdict::Released);
        assert_eq!(stopped(Stopped::LeaseLost, run.clone()), Verdict::Lost);
        assert_eq!(kind(&stopped(timeout, run.clone())), Failed(ErrorCode::Timeout));
        assert_eq!(
            kind(&stopped(Stopped::OutOfMemory, run.clone())),
            Failed(ErrorCode::OutOfMemory)
        );
        assert_eq!(
            kind(&stopped(Stopped::GuardLost, run)),
            Retry(ErrorCode::ClaudeKilled)
        );
    }
    for reason in [
        Stopped::Cancelled,
        Stopped::Shutdown,
        timeout,
        Stopped::DiskFull(DiskLimit::Floor),
        Stopped::OutOfMemory,
        Stopped::GuardLost,
    ] {
        assert_eq!(
            stopped(reason, complete()),
            Verdict::Done,
            "the whole result came in the same moment"
        );
    }
    assert_eq!(
        stopped(Stopped::LeaseLost, complete()),
        Verdict::Lost,
        "another worker may hold the job by now"
    );
}

#[test]
fn a_timeout_says_how_long_and_what_the_api_did() {
    for (deadline, words) in [
        (Deadline::FirstOutput, "wrote nothing in its first 120 s"),
        (Deadline::Idle, "made no progress for 120 s"),
        (Deadline::Total, "took longer than 120 s"),
    ] {
        let verdict = judge(&Ended {
            stopped: Some(Stopped::Timeout {
                deadline,
                after: Duration::from_mins(2),
            }),
            observed: Some(failure(400, "invalid_request_error", "Overlong")),
            ..Ended::new(false, NOW)
        });
        let message = message(&verdict);
        assert!(
            message.contains(words) && message.contains("failed with 400: Overlong"),
            "{message}"
        );
    }
}

#[test]
fn a_turn_that_ends_with_a_tool_call_and_no_answer_is_incomplete() {
    let line = |stop_reason: &str, text: &str| {
        json!({"type": "result", "subtype": "success", "is_error": false, "terminal_reason": "completed",
            "stop_reason": stop_reason, "result": text})
    };
    for (line, expected, reason) in [
        (line("tool_use", ""), Failed(ErrorCode::Incomplete), "no answer"),
        (
            line("tool_use", " \n"),
            Failed(ErrorCode::Incomplete),
            "a blank one",
        ),
        (line("tool_use", "That's it."), Done, "an answer beside the call"),
        (line("end_turn", ""), Done, "the model had nothing to say"),
    ] {
        assert_eq!(kind(&judge(&with_result(&line))), expected, "{reason}");
    }
    let mut filled = line("tool_use", "");
    filled["structured_output"] = json!({"a": 1});
    let filled = Ended {
        schema_wanted: true,
        ..with_result(&filled)
    };
    assert_eq!(kind(&judge(&filled)), Done, "the call that fills a schema");
}

#[test]
fn a_result_that_cant_be_used_fails_the_run_at_once() {
    let deep = format!("{}{}", "[".repeat(130), "]".repeat(130));
    for line in [
        format!(r#"{{"type":"result","subtype":"success","structured_output":{deep}}}"#),
        r#"{"type":"result","subtype":"success","total_cost_usd":NaN}"#.to_owned(),
    ] {
        let mut ended = Ended::new(true, NOW);
        ended.observe(&Message::parse(line.as_bytes()));

        let verdict = judge(&ended);

        assert_eq!(kind(&verdict), Failed(ErrorCode::InvalidOutput), "{line}");
        assert!(message(&verdict).ends_with('.'), "{}", message(&verdict));
    }
}

#[test]
fn storage_gets_the_later_of_pause_and_wish() {
    let pause_ends = NOW.plus(Duration::from_secs(10));
    let again = |when| Verdict::Retry {
        code: ErrorCode::RateLimited,
        message: "m".to_owned(),
        when,
        counts: true,
    };
    let later = NOW.plus(Duration::from_mins(1));
    for (when, due, waits_for, reason) in [
        (
            When::Backoff { not_before: None },
            pause_ends,
            Hold::Delay,
            "only the pause",
        ),
        (
            When::Backoff {
                not_before: Some(NOW),
            },
            pause_ends,
            Hold::Delay,
            "the pause is longer",
        ),
        (
            When::Backoff {
                not_before: Some(later),
            },
            later,
            Hold::Delay,
            "the API asks for a longer wait",
        ),
        (
            When::Upstream {
                not_before: Some(later),
            },
            later,
            Hold::Upstream,
            "what the API asked for, as a wait for it",
        ),
        (When::At(NOW), NOW, Hold::UsageLimit, "a reset is exact"),
    ] {
        let Some(Ending::Retry {
            run_after,
            hold,
            counts,
            code,
            ..
        }) = again(when).into_ending(pause_ends)
        else {
            panic!("{reason}")
        };
        assert_eq!(
            (run_after, hold, counts, code.as_str()),
            (due, waits_for, true, "rate_limited"),
            "{reason}"
        );
    }
    assert_eq!(Verdict::Lost.into_ending(NOW), None);
    assert_eq!(Verdict::Released.into_ending(NOW), Some(Ending::Released));
}

#[test]
fn no_two_codes_share_a_word() {
    let words: BTreeSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(words.len(), ErrorCode::ALL.len());
    assert!(
        words
            .iter()
            .all(|word| word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'))
    );
}
