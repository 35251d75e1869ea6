use super::*;
use crate::claude::line::OutputLine;
use crate::claude::message::fixtures::{self, Fixture};
use crate::spend::MAX_COUNT;
use proptest::prelude::*;
use serde_json::json;
use shared::money::MicroUsd;

fn result_of(fixture: &Fixture) -> ResultLine {
    let mut results = fixture
        .messages()
        .into_iter()
        .filter_map(|message| match message {
            Message::Result(result) => Some(*result),
            _ => None,
        });
    results.next_back().unwrap()
}

#[test]
fn a_run_with_a_tool_is_told_in_order() {
    let mut story = Vec::new();
    let mut call = String::new();
    for message in fixtures::named("write").messages() {
        match message {
            Message::Init(init) => {
                assert_eq!(init.permission_mode.as_deref(), Some("acceptEdits"));
                assert_eq!(init.api_key_source.as_deref(), Some("ANTHROPIC_API_KEY"));
                story.push("init".to_owned());
            }
            Message::Assistant(answer) => {
                assert_eq!((&answer.error, &answer.parent), (&None, &None));
                for block in answer.blocks {
                    story.push(match block {
                        Block::Text(text) => text,
                        Block::ToolUse { id, name, input } => {
                            call = id;
                            format!("{name} {}", input["file_path"])
                        }
                    });
                }
            }
            Message::User(user) => {
                let [result] = &user.tool_results[..] else {
                    panic!("{user:?}")
                };
                assert_eq!((&result.tool_use_id, result.is_error), (&call, false));
                assert!(
                    result.content.contains("/workspace/out.txt"),
                    "{}",
                    result.content
                );
                story.push("tool result".to_owned());
            }
            Message::Result(result) => story.push(format!("result: {}", result.text.unwrap())),
            _ => {}
        }
    }

    assert_eq!(
        story,
        [
            "init",
            "I will write it.",
            r#"Write "/workspace/out.txt""#,
            "tool result",
            "It is written.",
            "result: It is written."
        ]
    );
}

#[test]
fn the_final_usage_of_a_request_comes_with_its_id() {
    let usages: Vec<RequestUsage> = fixtures::named("max-cost-text")
        .messages()
        .into_iter()
        .filter_map(|message| {
            if let Message::Usage(usage) = message {
                Some(usage)
            } else {
                None
            }
        })
        .collect();

    let [start, end] = &usages[..] else {
        panic!("{usages:?}")
    };
    assert!(start.message_id.is_some());
    assert_eq!(start.message_id, end.message_id);
    assert_eq!(
        (start.model.as_deref(), start.usage.output),
        (Some("claude-sonnet-5-5"), 1)
    );
    assert_eq!(
        end.usage,
        Usage {
            input: 100_000,
            output: 10_000,
            cache_read: 50_000,
            cache_write_5m: 20_000,
            ..Usage::default()
        }
    );
}

#[test]
fn a_result_holds_what_a_client_may_see() {
    let result = result_of(&fixtures::named("structured"));

    assert!(!result.is_error && result.is_verdict());
    assert_eq!(
        (result.subtype.as_str(), result.stop_reason.as_deref()),
        ("success", Some("tool_use"))
    );
    assert_eq!(result.structured_output, Some(json!({"answer": 42})));
    assert_eq!(result.terminal_reason.as_deref(), Some("completed"));
    let since = result.model_usage_since_last_result.unwrap();
    assert_eq!(since["claude-sonnet-5-5"].cost, result.total_cost);
}

#[test]
fn a_denied_tool_is_named_in_the_result() {
    let result = result_of(&fixtures::named("write-outside"));

    assert!(!result.is_error, "the run goes on without the tool");
    assert_eq!(result.permission_denials[0]["tool_name"], "Write");
}

#[test]
fn an_error_of_the_api_is_told_three_times() {
    let fixture = fixtures::named("e529");
    let messages = fixture.messages();

    let retries: Vec<_> = messages
        .iter()
        .filter(|message| matches!(message, Message::ApiRetry(_)))
        .collect();
    let retry = ApiRetry {
        status: Some(529),
        error: Some("overloaded".to_owned()),
    };
    assert_eq!(retries[0], &Message::ApiRetry(retry));
    assert!(messages.iter().any(|message| match message {
        Message::Assistant(answer) => answer.error.as_deref() == Some("server_error"),
        _ => false,
    }));
    let result = result_of(&fixture);
    assert_eq!((result.is_error, result.api_error_status), (true, Some(529)));
    assert_eq!(result.api_error_type.as_deref(), Some("overloaded_error"));
}

#[test]
fn a_usage_limit_says_when_it_ends() {
    let limit = fixtures::named("usage-limit")
        .messages()
        .into_iter()
        .find_map(|message| match message {
            Message::RateLimit(limit) => Some(limit),
            _ => None,
        });

    let limit = limit.unwrap();
    assert!(limit.is_rejected());
    assert_eq!(limit.resets_at, Some(1_900_000_000));
}

#[test]
fn the_cost_so_far_is_the_answer_to_a_control_request() {
    let answers: Vec<ControlResponse> = fixtures::named("interrupt-tool")
        .messages()
        .into_iter()
        .filter_map(|message| {
            if let Message::ControlResponse(answer) = message {
                Some(answer)
            } else {
                None
            }
        })
        .collect();

    let [usage, interrupt] = &answers[..] else {
        panic!("{answers:?}")
    };
    assert_eq!(
        usage.model_usage().unwrap()["claude-sonnet-5-5"].cost,
        Some(MicroUsd(400))
    );
    assert_eq!(interrupt.model_usage(), None);
}

#[test]
fn a_subagent_speaks_below_its_tool_call() {
    let parents = fixtures::named("subagent")
        .messages()
        .into_iter()
        .filter_map(|message| match message {
            Message::Assistant(answer) => Some(answer.parent.is_some()),
            _ => None,
        });

    assert!(
        parents
            .collect::<Vec<_>>()
            .windows(2)
            .any(|pair| pair == [true, false])
    );
}

#[test]
fn lines_of_other_kinds_and_broken_ones_are_other() {
    for (line, reason) in [
        ("", "empty"),
        ("Warning: something", "no JSON"),
        ("[1, 2]", "no object"),
        ("{}", "no type"),
        (r#"{"type": 5}"#, "a type that is no text"),
        (r#"{"type": "of a later release"}"#, "an unknown type"),
        (
            r#"{"type": "system", "subtype": "of a later release"}"#,
            "an unknown subtype",
        ),
        (
            r#"{"type": "stream_event", "event": {"type": "content_block_stop"}}"#,
            "nothing to tell",
        ),
        (
            r#"{"type": "stream_event", "event": {"type": "content_block_delta", "delta": {"partial_json": "{"}}}"#,
            "no text",
        ),
    ] {
        assert_eq!(Message::parse(line.as_bytes()), Message::Other, "{reason}");
    }
}

#[test]
fn members_of_the_wrong_type_are_as_good_as_missing() {
    let line = json!({"type": "result", "is_error": "yes", "subtype": 1, "num_turns": -3, "total_cost_usd": "free",
        "usage": [], "modelUsage": 7, "permission_denials": {}, "errors": [1, "two"], "api_error_status": 70000});

    let Message::Result(result) = Message::parse(line.to_string().as_bytes()) else {
        panic!()
    };

    assert_eq!(
        *result,
        ResultLine {
            errors: vec!["two".to_owned()],
            ..ResultLine::default()
        }
    );
}

/// Anything may come out of a run, and no database takes it all.
#[test]
fn names_and_numbers_are_made_so_that_they_can_be_stored() {
    let usage = json!({"inputTokens": u64::MAX, "outputTokens": 1e300, "costUSD": 1e9});
    let line = json!({"type": "result", "total_cost_usd": -0.5, "modelUsage": {
        "a\u{0}b\n": usage, "c": {"costUSD": -1.0}, "x".repeat(1000): {},
    }});

    let Message::Result(result) = Message::parse(line.to_string().as_bytes()) else {
        panic!()
    };

    let names: Vec<usize> = result
        .model_usage
        .keys()
        .map(|name| name.chars().count())
        .collect();
    assert_eq!(names, [4, 1, 200]);
    let large = result.model_usage["a\u{fffd}b\u{fffd}"];
    assert_eq!((large.usage.input, large.usage.output), (MAX_COUNT, MAX_COUNT));
    assert_eq!(large.cost, Some(MicroUsd(1_000_000_000_000)));
    assert_eq!((result.total_cost, result.model_usage["c"].cost), (None, None));
    let start =
        json!({"type": "stream_event", "event": {"type": "message_start", "message": {"model": "\u{0}"}}});
    let Message::Usage(usage) = Message::parse(start.to_string().as_bytes()) else {
        panic!()
    };
    assert_eq!(usage.model.as_deref(), Some("\u{fffd}"));
}

#[test]
fn a_tool_may_answer_with_blocks() {
    let line = json!({"type": "user", "message": {"content": [{"type": "tool_result", "tool_use_id": "t", "is_error": true,
        "content": [{"type": "text", "text": "one"}, {"type": "image", "source": {}}, {"type": "text", "text": "two"}]}]}});

    let Message::User(user) = Message::parse(line.to_string().as_bytes()) else {
        panic!()
    };

    assert_eq!(
        user.tool_results,
        [ToolResult {
            tool_use_id: "t".to_owned(),
            is_error: true,
            content: "one\n[image]\ntwo".to_owned()
        }]
    );
}

#[test]
fn a_tool_result_that_was_cut_inside_a_character_is_kept() {
    let line = br#"{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t","content":"cut \ud83d"}]}}"#;

    let Message::User(user) = Message::parse(line) else {
        panic!()
    };

    assert_eq!(user.tool_results[0].content, "cut \u{fffd}");
}

fn invalid(line: &str) -> Option<InvalidResult> {
    let Message::Result(result) = Message::parse(line.as_bytes()) else {
        panic!("not a result: {}", &line[..100.min(line.len())])
    };
    assert!(result.is_verdict());
    result.invalid
}

#[test]
fn a_result_that_nests_too_deep_is_invalid_and_the_rest_of_it_is_known() {
    for (levels, why) in [
        (100, None),
        (125, Some(InvalidResult::TooDeep)),
        (100_000, Some(InvalidResult::TooDeep)),
    ] {
        let deep = format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        let line = format!(
            r#"{{"num_turns":3,"structured_output":{deep},"type":"result","subtype":"success","total_cost_usd":0.5}}"#
        );

        assert_eq!(invalid(&line), why, "{levels}");
        let Message::Result(result) = Message::parse(line.as_bytes()) else {
            panic!()
        };
        assert_eq!(
            (result.num_turns, result.total_cost),
            (3, Some(MicroUsd(500_000)))
        );
    }
}

#[test]
fn a_deep_member_that_nobody_needs_makes_no_result_invalid() {
    let denied = format!("{}1{}", r#"{"a":"#.repeat(300), "}".repeat(300));
    let line = format!(
        r#"{{"type":"result","subtype":"success","result":"all","permission_denials":[{{"tool_input":{denied}}}]}}"#
    );

    assert_eq!(invalid(&line), None);
}

#[test]
fn a_result_that_isnt_json_is_invalid_and_no_other_line() {
    for line in [
        r#"{"type":"result","total_cost_usd":NaN}"#,
        r#"{"total_cost_usd":-Infinity,"type":"result"}"#,
        r#"{"type":"result","a":1"#,
    ] {
        assert_eq!(invalid(line), Some(InvalidResult::NotJson), "{line}");
    }
    assert_eq!(
        invalid("\u{feff}{\"type\":\"result\"}"),
        None,
        "a byte order mark is no fault"
    );
    for (line, message) in [
        (r#"{"type":"user","a":NaN}"#, Message::Unreadable),
        ("{", Message::Unreadable),
        ("some text", Message::Other),
    ] {
        assert_eq!(Message::parse(line.as_bytes()), message, "{line}");
    }
}

#[test]
fn a_line_that_was_too_long_to_keep_is_the_result_or_is_not() {
    let read = |may_be_result| Message::read(&OutputLine::TooLong { may_be_result });
    let Message::Result(result) = read(true) else {
        panic!()
    };
    assert_eq!(result.invalid, Some(InvalidResult::TooLong));
    assert_eq!(read(false), Message::Unreadable);
}

#[test]
fn a_question_of_the_cli_is_known_by_its_id() {
    let line = br#"{"type":"control_request","request_id":"r1","request":{"subtype":"something_new","x":1}}"#;
    let Message::ControlRequest(request) = Message::parse(line) else {
        panic!()
    };
    assert_eq!(
        (request.request_id, request.subtype.as_deref()),
        ("r1".into(), Some("something_new"))
    );
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Message::parse(&bytes);
    }

    /// Bytes that look like a line are more dangerous than noise.
    #[test]
    fn no_damage_to_a_line_makes_it_panic(
        name in prop::sample::select(vec!["write", "subagent", "e529", "usage-limit", "interrupt-tool"]),
        line in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        damage in prop::collection::vec(prop::sample::select(&b"\\\"u{}[]:,d8\xff\0-1e"[..]), 0..8),
        cut in any::<bool>(),
    ) {
        let stdout = fixtures::named(name).stdout;
        let lines: Vec<&[u8]> = stdout.split(|byte| *byte == b'\n').collect();
        let mut line = lines[line.index(lines.len())].to_vec();
        let at = at.index(line.len() + 1);
        if cut {
            line.truncate(at);
        }
        line.splice(at..at, damage);

        let _ = Message::parse(&line);
    }
}
