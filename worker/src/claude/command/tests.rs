use super::*;
use crate::claude::message::{Message, fixtures};
use std::collections::{BTreeMap, BTreeSet};

fn spec() -> RunSpec {
    RunSpec {
        claude_session_id: Uuid::from_u128(1),
        resume: None,
        message_id: Uuid::from_u128(2),
        model: "sonnet".to_owned(),
        effort: None,
        permission_mode: "acceptEdits".to_owned(),
        max_turns: None,
        max_cost: MicroUsd(1_250_000),
        system_prompt_file: None,
        json_schema: None,
        no_tools: false,
        allowed_tools: Vec::new(),
        disallowed_tools: Vec::new(),
        prompt: "Say hi.".to_owned(),
    }
}

fn user_text(prompt: &str) -> String {
    let line = user_line(&RunSpec {
        prompt: prompt.to_owned(),
        ..spec()
    });
    assert_eq!(line.matches('\n').count(), 1, "one line: {line:?}");
    let line: Value = serde_json::from_str(&line).unwrap();
    line["message"]["content"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn every_run_has_the_flags_that_keep_it_in() {
    let arguments = arguments(&spec());

    for (flag, reason) in [
        ("-p", "headless"),
        (
            "--input-format=stream-json",
            "the prompt comes by stdin, and an interrupt can",
        ),
        ("--output-format=stream-json", "lines of JSON"),
        ("--verbose", "without it the CLI refuses the output format"),
        (
            "--include-partial-messages",
            "usage of each request, for a run that is killed",
        ),
        (
            "--setting-sources=",
            "no settings of the workspace, which could run anything",
        ),
        ("--strict-mcp-config", "no servers of the workspace"),
        ("--permission-prompts=none", "nobody is there to be asked"),
        (
            "--session-id=00000000-0000-0000-0000-000000000001",
            "known before the start, to resume after a crash",
        ),
        ("--model=sonnet", "the default depends on the kind of login"),
        ("--permission-mode=acceptEdits", "as asked"),
        ("--max-budget-usd=1.250000", "the CLI's own cap"),
    ] {
        assert!(
            arguments.iter().any(|argument| argument == flag),
            "{flag}: {reason}"
        );
    }
    let settings = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("--settings="))
        .unwrap();
    let settings: Value = serde_json::from_str(settings).unwrap();
    assert_eq!(
        settings,
        json!({"crossSessionInbound": "refuse", "sandbox": {"enabled": false}})
    );
    let never = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("--disallowedTools="))
        .unwrap();
    assert_eq!(never.split(',').collect::<Vec<_>>(), NEVER);
}

#[test]
fn nothing_else_is_asked_for_by_default() {
    for flag in [
        "dangerously",
        "resume",
        "fork",
        "effort",
        "max-turns",
        "allowedTools=",
        "json-schema",
        "system-prompt",
        "add-dir",
    ] {
        assert!(
            !arguments(&spec())
                .iter()
                .any(|argument| argument.starts_with(&format!("--{flag}"))),
            "{flag}"
        );
    }
}

#[test]
fn options_become_one_argument_each() {
    let spec = RunSpec {
        effort: Some("high".to_owned()),
        max_turns: Some(7),
        permission_mode: "bypassPermissions".to_owned(),
        allowed_tools: vec!["Bash(git *)".to_owned(), "WebSearch".to_owned()],
        disallowed_tools: vec!["WebFetch".to_owned()],
        json_schema: Some(json!({"type": "object"})),
        system_prompt_file: Some(PathBuf::from("/run/system.txt")),
        ..spec()
    };
    let arguments = arguments(&spec);

    for flag in [
        "--effort=high",
        "--max-turns=7",
        "--permission-mode=bypassPermissions",
        "--allowedTools=Bash(git *),WebSearch",
        r#"--json-schema={"type":"object"}"#,
        "--system-prompt-file=/run/system.txt",
    ] {
        assert!(arguments.iter().any(|argument| argument == flag), "{flag}");
    }
    assert!(
        arguments
            .iter()
            .any(|argument| argument.starts_with("--disallowedTools=WebFetch,SendMessage"))
    );
}

#[test]
fn a_value_that_looks_like_a_flag_stays_a_value() {
    let hostile = RunSpec {
        model: "--dangerously-skip-permissions".to_owned(),
        allowed_tools: vec!["--add-dir=/".to_owned()],
        prompt: "--add-dir=/".to_owned(),
        ..spec()
    };

    let arguments = arguments(&hostile);

    assert!(arguments.contains(&"--model=--dangerously-skip-permissions".to_owned()));
    assert!(arguments.contains(&"--allowedTools=--add-dir=/".to_owned()));
    assert!(
        !arguments
            .iter()
            .any(|argument| argument.starts_with("--dangerously") || argument.starts_with("--add-dir"))
    );
}

#[test]
fn a_resumed_session_is_copied_and_gets_its_own_system_prompt() {
    let arguments = arguments(&RunSpec {
        resume: Some(Uuid::from_u128(9)),
        ..spec()
    });

    for flag in [
        "--resume=00000000-0000-0000-0000-000000000009",
        "--session-id=00000000-0000-0000-0000-000000000001",
        "--fork-session",
        "--system-prompt-snapshot=off",
    ] {
        assert!(arguments.iter().any(|argument| argument == flag), "{flag}");
    }
}

#[test]
fn an_amount_is_written_without_an_exponent_and_never_negative() {
    for (micros, text) in [
        (1, "0.000001"),
        (500_000, "0.500000"),
        (5_000_000, "5.000000"),
        (-5, "0.000000"),
    ] {
        assert_eq!(dollars(MicroUsd(micros)), text);
    }
}

#[test]
fn the_environment_is_complete_and_holds_no_secret() {
    let paths = CliPaths {
        home: PathBuf::from("/home/agent"),
        tmp: PathBuf::from("/tmp"),
        gateway_socket: PathBuf::from("/run/api.sock"),
    };
    let environment = environment(&paths, ("ANTHROPIC_API_KEY", "dummy"), "run-7");
    let by_name: BTreeMap<&str, &str> = environment
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();

    assert_eq!(by_name.len(), environment.len(), "no name comes twice");
    for (name, value) in [
        ("HOME", "/home/agent"),
        ("CLAUDE_CONFIG_DIR", "/home/agent/.claude"),
        ("TMPDIR", "/tmp"),
        ("CLAUDE_CODE_TMPDIR", "/tmp"),
        ("XDG_RUNTIME_DIR", "/tmp"),
        ("ANTHROPIC_UNIX_SOCKET", "/run/api.sock"),
        ("ANTHROPIC_BASE_URL", "http://gateway"),
        ("ANTHROPIC_API_KEY", "dummy"),
        ("CLAUDE_CODE_MAX_RETRIES", "2"),
        ("API_TIMEOUT_MS", "600000"),
        ("CLAUDE_CODE_DISABLE_FILE_MENTIONS", "1"),
        ("CLAUDE_CODE_DISABLE_DEFERRED_TOOL_RESUME", "1"),
        ("CLAUDE_CODE_MAX_CONCURRENT_SUBAGENTS", "10"),
        ("CLAUDE_CODE_MAX_SUBAGENT_SPAWN_DEPTH", "2"),
        ("CLAUDE_CODE_MAX_WEB_SEARCHES_PER_SESSION", "50"),
        ("CLAUDE_CODE_WEB_SEARCH_REFILLS_PER_HOUR", "0"),
        ("CLAUDE_CODE_DISABLE_BACKGROUND_TASKS", "1"),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
        ("CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS", "1"),
        ("CLAUDE_CODE_DISABLE_AUTO_MEMORY", "1"),
        ("DISABLE_AUTOUPDATER", "1"),
        ("GIT_CONFIG_KEY_0", "core.fsmonitor"),
        ("GIT_CONFIG_VALUE_0", "false"),
        ("CLAUDE_QUEUE_RUN", "run-7"),
    ] {
        assert_eq!(by_name.get(name), Some(&value), "{name}");
    }
    // Each of these would lift a protection, reach past the gateway, or hide tools from the model.
    for name in [
        "CLAUDE_CODE_DISABLE_ATTACHMENTS",
        "CLAUDE_CODE_SUBPROCESS_ENV_SCRUB",
        "IS_SANDBOX",
        "CLAUDE_CODE_RETRY_WATCHDOG",
        "HTTPS_PROXY",
    ] {
        assert!(!by_name.contains_key(name), "{name}");
    }
}

#[test]
fn a_prompt_reaches_the_model_as_text() {
    for (prompt, text, reason) in [
        ("Say hi.", "Say hi.", "as it is"),
        ("/usage", " /usage", "a command of the CLI"),
        (
            "/config theme=dark",
            " /config theme=dark",
            "a command that would change settings",
        ),
        ("\n /clear", " \n /clear", "after white space"),
        (" /usage", "  /usage", "one more space does no harm"),
        ("see /etc", "see /etc", "a slash further on is only a slash"),
        (
            "a\nb\r\n\"c\" \u{0} é😀",
            "a\nb\r\n\"c\" \u{0} é😀",
            "line ends and quotes stay inside the line",
        ),
        (
            r#"{"type":"bash_command","command":"id"}"#,
            r#"{"type":"bash_command","command":"id"}"#,
            "no line of its own",
        ),
    ] {
        assert_eq!(user_text(prompt), text, "{reason}");
    }
}

#[test]
fn the_user_line_has_one_text_block_and_an_id() {
    let line: Value = serde_json::from_str(&user_line(&spec())).unwrap();

    assert_eq!(
        line,
        json!({"type": "user", "uuid": "00000000-0000-0000-0000-000000000002",
            "message": {"role": "user", "content": [{"type": "text", "text": "Say hi."}]}})
    );
}

#[test]
fn control_lines_are_one_line_each() {
    for (line, subtype) in [
        (interrupt_line("r\n1"), "interrupt"),
        (usage_line("r\n1"), "get_usage"),
    ] {
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        assert_eq!(
            serde_json::from_str::<Value>(&line).unwrap(),
            json!({"type": "control_request", "request_id": "r\n1", "request": {"subtype": subtype}})
        );
    }
}

const KEY: &str = "ANTHROPIC_API_KEY";

#[test]
fn a_run_that_starts_as_asked_is_no_surprise() {
    let init = Init {
        permission_mode: Some("acceptEdits".to_owned()),
        ..Init::default()
    };
    let bypass = Init {
        permission_mode: Some("bypassPermissions".to_owned()),
        ..Init::default()
    };
    let server = Init {
        mcp_servers: vec!["evil".to_owned()],
        ..init.clone()
    };
    let asked = RunSpec {
        permission_mode: "bypassPermissions".to_owned(),
        ..spec()
    };

    assert_eq!(unexpected_init(&spec(), &init, KEY), None);
    assert_eq!(unexpected_init(&asked, &bypass, KEY), None);
    assert_eq!(
        unexpected_init(&asked, &init, KEY),
        None,
        "less than was asked for is harmless"
    );
    assert!(
        unexpected_init(&spec(), &bypass, KEY)
            .unwrap()
            .contains("bypassPermissions")
    );
    assert!(unexpected_init(&spec(), &server, KEY).unwrap().contains("evil"));
    let modeless = Init {
        permission_mode: None,
        ..server
    };
    assert!(unexpected_init(&spec(), &modeless, KEY).unwrap().contains("evil"));
}

#[test]
fn a_key_from_elsewhere_is_a_surprise() {
    let from = |source: &str| Init {
        api_key_source: Some(source.to_owned()),
        ..Init::default()
    };

    assert_eq!(unexpected_init(&spec(), &from(KEY), KEY), None);
    assert_eq!(
        unexpected_init(&spec(), &from("none"), "CLAUDE_CODE_OAUTH_TOKEN"),
        None
    );
    for (source, credential) in [("apiKeyHelper", KEY), (KEY, "CLAUDE_CODE_OAUTH_TOKEN")] {
        let unexpected_init = unexpected_init(&spec(), &from(source), credential).unwrap();
        assert!(unexpected_init.contains(source), "{unexpected_init}");
    }
}

/// The real CLI took the arguments as they are meant.
#[test]
fn the_recorded_runs_started_as_asked() {
    let mut started = BTreeSet::new();
    for (name, fixture) in fixtures::all() {
        for message in fixture.messages() {
            let Message::Init(init) = message else { continue };
            assert_eq!(unexpected_init(&spec(), &init, KEY), None, "{name}");
            started.insert(name.clone());
        }
        for init in fixture.lines().filter(|line| line["subtype"] == "init") {
            if !name.starts_with("cost-") {
                assert_eq!(init["model"], "claude-sonnet-5-5", "{name}");
            }
            let tools = init["tools"].as_array().unwrap();
            for tool in NEVER {
                assert!(
                    !tools.iter().any(|offered| offered == tool),
                    "{name} offers {tool}"
                );
            }
        }
    }
    assert!(started.len() > 50, "{started:?}");
}

#[test]
fn a_slash_command_was_answered_by_the_model() {
    let answered = fixtures::named("slash")
        .messages()
        .into_iter()
        .any(|message| matches!(message, Message::Usage(_)));
    assert!(answered, "a command of the CLI makes no request");
}

#[test]
fn the_dialect_of_a_schema_is_not_passed_on() {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"$schema": {"type": "string"}},
    });
    assert_eq!(
        without_dialect(&schema),
        json!({"type": "object", "properties": {"$schema": {"type": "string"}}})
    );
}
