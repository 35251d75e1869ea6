//! What a run can end as: done, failed with a word for programs and a sentence for people, or tried again.

use serde_json::{Value, json};
use tests::client::Client;
use tests::database::{Database, Db};
use tests::script::{Script, Step, answer, steps};
use tests::system::System;
use tests::{both, once};

both!(
    a_failed_run_says_how,
    what_was_done_before_a_failure_is_kept,
    a_schema_is_filled_or_the_job_fails,
    a_passing_failure_is_tried_again,
    a_failure_that_does_not_pass_is_tried_so_often,
    a_lasting_failure_is_not_tried_again,
    an_end_that_the_database_refuses_is_an_end_all_the_same,
    an_end_that_seemed_to_fail_and_was_stored_is_no_lost_lease,
    a_cli_that_ends_slowly_under_a_short_lease_is_done,
    what_the_cli_complained_about_is_kept,
);
once!(
    noise_on_the_output_harms_nothing,
    a_result_that_cant_be_used_ends_the_run_at_once,
    a_turn_that_ends_in_a_tool_call_is_incomplete,
    an_unknown_question_of_the_cli_is_answered_at_once,
    absurd_names_and_numbers_harm_nothing,
    a_run_that_takes_too_much_memory_says_so,
    a_cli_that_talks_without_end_harms_nothing,
    another_version_of_the_cli_runs_with_a_warning,
    the_end_of_a_run_is_one_line_of_numbers_and_its_code,
);

async fn failed(client: &Client, script: &Script, more: Value) -> Value {
    let mut body = json!({ "message": script.prompt(), "max_attempts": 1 });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let job = client.finished(&client.accepted_body(&body).await).await;
    assert_eq!(job["status"], "failed", "{job:#}");
    assert!(job["error"].as_str().unwrap().ends_with('.'), "{}", job["error"]);
    job
}

fn api_error(status: impl Into<Option<u16>>, error: &str, text: &str) -> Step {
    Step::ApiError {
        status: status.into(),
        error: error.to_owned(),
        text: text.to_owned(),
    }
}

async fn a_failed_run_says_how(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let cases = [
        ("claude_error", steps([Step::Exit(3)])),
        // An exit with 0 is no success without a result.
        ("claude_error", steps([Step::Exit(0)])),
        ("claude_killed", steps([Step::Die(9)])),
        (
            "auth_error",
            steps([api_error(
                401,
                "authentication_failed",
                "Invalid API key · Fix external API key",
            )]),
        ),
        (
            "model_not_found",
            steps([api_error(
                404,
                "model_not_found",
                "There's an issue with the selected model",
            )]),
        ),
        (
            "rate_limited",
            steps([api_error(
                429,
                "rate_limit",
                "API Error: Request rejected (429) · slow down",
            )]),
        ),
        (
            "overloaded",
            steps([api_error(
                529,
                "server_error",
                "API Error: Repeated 529 Overloaded errors.",
            )]),
        ),
        (
            "api_unavailable",
            steps([api_error(
                500,
                "server_error",
                "API Error: 500 Internal server error",
            )]),
        ),
        (
            "api_unavailable",
            steps([api_error(
                None,
                "server_error",
                "Unable to connect to API (ECONNREFUSED)",
            )]),
        ),
        (
            "billing_error",
            steps([api_error(400, "billing_error", "Credit balance is too low")]),
        ),
        (
            "max_output_tokens",
            steps([api_error(
                None,
                "max_output_tokens",
                "API Error: the response exceeded the maximum",
            )]),
        ),
    ];

    for (code, script) in cases {
        let job = failed(&client, &script, json!({})).await;

        assert_eq!(job["error_code"], code, "{script:?}: {job:#}");
        let id = job["id"].as_str().unwrap();
        let last = client.all_events(id).await.pop().unwrap();
        assert_eq!(
            (&last["type"], &last["data"]["code"]),
            (&json!("error"), &json!(code))
        );
        assert_eq!(last["data"]["error"], job["error"]);
    }
    let turns = steps((0..5).map(|_| Step::Shell("true".to_owned())));
    assert_eq!(
        failed(&client, &turns, json!({ "max_turns": 2 })).await["error_code"],
        "max_turns"
    );
    let dear = steps([Step::Spend(0.5), Step::Spend(0.5)]);
    assert_eq!(
        failed(&client, &dear, json!({ "max_cost_usd": 0.4 })).await["error_code"],
        "max_cost"
    );
}

async fn what_was_done_before_a_failure_is_kept(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let work = [
        Step::Say("I begin.".to_owned()),
        Step::Spend(0.5),
        Step::Shell("echo kept > kept.txt".to_owned()),
    ];

    let job = failed(&client, &steps(work.clone()), json!({ "max_turns": 1 })).await;
    assert_eq!(job["error_code"], "max_turns");
    assert_eq!(job["cost"], 0.5008);
    assert_eq!(job["result"]["is_error"], true);
    assert_eq!(job["result"]["subtype"], "error_max_turns");
    let workspace = system.workspace(job["id"].as_str().unwrap());
    assert_eq!(
        std::fs::read_to_string(workspace.join("kept.txt")).unwrap(),
        "kept\n"
    );

    // Without a result line the cost is the same: the gateway metered it.
    let job = failed(&client, &steps(work).then(Step::Exit(1)), json!({})).await;
    assert_eq!(job["cost"], 0.5008);
    assert_eq!(
        system
            .database()
            .number("select count(*) from ledger where estimated")
            .await,
        0
    );
}

async fn a_schema_is_filled_or_the_job_fails(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let schema = json!({ "type": "object", "properties": { "answer": { "type": "integer" } } });
    let format = json!({ "output_format": { "type": "json_schema", "schema": schema } });
    let mut filled = answer("not used");
    filled.structured = Some(json!({ "answer": 42 }));
    let mut body = json!({ "message": filled.prompt() });
    body.as_object_mut()
        .unwrap()
        .extend(format.as_object().unwrap().clone());

    let job = client.finished(&client.accepted_body(&body).await).await;
    assert_eq!(
        job["result"]["structured_output"],
        json!({ "answer": 42 }),
        "{job:#}"
    );

    let job = failed(&client, &answer("I would rather not."), format).await;
    assert_eq!(job["error_code"], "schema_mismatch");
    assert_eq!(job["result"]["content"], "I would rather not.");
}

/// A script whose first runs fail like this; the last one is done.
fn at_last(failures: impl IntoIterator<Item = Step>) -> Script {
    let failures = failures
        .into_iter()
        .map(|failure| steps([Step::Spend(0.1), failure]));
    Script {
        runs: failures.chain([answer("at last").costing(0.1)]).collect(),
        ..Script::default()
    }
}

async fn a_passing_failure_is_tried_again(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let failures = [
        api_error(529, "server_error", "API Error: Repeated 529 Overloaded errors."),
        Step::Die(9),
    ];

    let id = client.play(&at_last(failures)).await;

    let job = client.finished(&id).await;
    assert_eq!(job["result"]["content"], "at last", "{job:#}");
    assert_eq!(job["attempt"], 3);
    assert_eq!(job["cost"], 0.3);
    let retries: Vec<Value> = client
        .all_events(&id)
        .await
        .into_iter()
        .filter(|event| event["type"] == "retry")
        .collect();
    let told: Vec<&Value> = retries.iter().map(|event| &event["data"]["error_code"]).collect();
    assert_eq!(told, ["overloaded", "claude_killed"]);
    let paused = "select count(*) from attempt where ending = 'retry'";
    assert_eq!(system.database().number(paused).await, 2);
    assert_eq!(
        system
            .database()
            .number("select cast(sum(cost) as bigint) from ledger")
            .await,
        300_000
    );
}

async fn a_failure_that_does_not_pass_is_tried_so_often(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let script = steps([api_error(
        500,
        "server_error",
        "API Error: 500 Internal server error",
    )]);

    let id = client
        .accepted_body(&json!({ "message": script.prompt(), "max_attempts": 2 }))
        .await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"], &job["attempt"]),
        (&json!("failed"), &json!("api_unavailable"), &json!(2))
    );
}

async fn a_lasting_failure_is_not_tried_again(db: Db) {
    let system = System::start(db).await;
    let client = system.client();

    for (code, failure) in [
        (
            "auth_error",
            api_error(
                401,
                "authentication_failed",
                "Invalid API key · Fix external API key",
            ),
        ),
        (
            "billing_error",
            api_error(400, "billing_error", "Credit balance is too low"),
        ),
        (
            "model_not_found",
            api_error(404, "model_not_found", "There's an issue with the selected model"),
        ),
    ] {
        let job = client.finished(&client.play(&at_last([failure])).await).await;

        assert_eq!(
            (&job["error_code"], &job["attempt"]),
            (&json!(code), &json!(1)),
            "{job:#}"
        );
    }
}

async fn noise_on_the_output_harms_nothing() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    let noise = [
        "not json",
        "{\"type\":",
        "[]",
        "{}",
        "",
        "null",
        "{\"type\":\"assistant\",\"message\":5}",
        "\u{0}\u{1}",
    ];
    let script = steps(noise.map(|line| Step::Raw(line.to_owned())))
        .then(Step::Flood {
            lines: 1,
            bytes: 20_000_000,
        })
        .then(Step::Say("still here".to_owned()));

    let id = client.play(&script.answering("done all the same")).await;

    let job = client.finished(&id).await;
    assert_eq!(job["result"]["content"], "done all the same", "{job:#}");
    let said = client.all_events(&id).await;
    assert!(said.iter().any(|event| event["data"]["content"] == "still here"));
}

async fn a_result_that_cant_be_used_ends_the_run_at_once() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    let structured = format!(
        r#"{{"num_turns":7,"result":"deep","structured_output":{deep},"type":"result","subtype":"success","is_error":false}}"#
    );
    let not_json = r#"{"duration_ms":1,"total_cost_usd":NaN,"type":"result","subtype":"success"}"#.to_owned();
    for (line, content) in [(structured, "deep"), (not_json, "a part of it")] {
        // It writes nothing more, and doesn't end: only the time-out would end a run that didn't know its result.
        let script = steps([
            Step::Say("a part of it".to_owned()),
            Step::Spend(0.01),
            Step::Raw(line),
            Step::Hang,
        ]);

        let job = failed(&client, &script, json!({ "timeout_seconds": 120 })).await;

        assert_eq!(job["error_code"], "invalid_output", "{job:#}");
        assert!(job["duration_ms"].as_u64().unwrap() < 60_000, "{job:#}");
        assert!(
            job["result"]["content"].as_str().unwrap().contains(content),
            "{job:#}"
        );
        assert_eq!(job["result"]["is_error"], true, "{job:#}");
        assert_eq!(job["result"]["structured_output"], Value::Null, "{job:#}");
        assert!(job["cost"].as_f64() > Some(0.0), "{job:#}");
    }
    system.writes("the CLI's result can't be used").await;
}

async fn a_turn_that_ends_in_a_tool_call_is_incomplete() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    let line =
        r#"{"type":"result","subtype":"success","is_error":false,"stop_reason":"tool_use","result":""}"#;

    let job = failed(&client, &steps([Step::Raw(line.to_owned())]), json!({})).await;

    assert_eq!(job["error_code"], "incomplete", "{job:#}");
}

async fn an_unknown_question_of_the_cli_is_answered_at_once() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    let script = steps([Step::Ask("something_new".to_owned())]);

    let id = client.play(&script).await;

    assert_eq!(client.finished(&id).await["status"], "done");
    let said = client.all_events(&id).await;
    let answer = said
        .iter()
        .filter_map(|event| event["data"]["content"].as_str())
        .find(|content| content.contains("something_new"));
    assert!(
        answer.is_some_and(|answer| answer.starts_with("error to ask: ")),
        "{said:#?}"
    );
}

async fn a_cli_that_talks_without_end_harms_nothing() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    // Beyond the number of events that are kept, and beyond their size.
    let many = Step::Flood {
        lines: 10_500,
        bytes: 50,
    };
    let large = Step::Flood {
        lines: 40,
        bytes: 500_000,
    };

    for flood in [many, large] {
        let id = client.play(&steps([flood]).answering("out of breath")).await;

        let job = client.finished(&id).await;
        assert_eq!(job["result"]["content"], "out of breath", "{job:#}");
        let events = client.all_events(&id).await;
        assert!(events.len() <= 10_050, "{} events are stored", events.len());
        assert!(
            events.iter().any(|event| event["type"] == "gap"),
            "what was cut is told"
        );
        assert_eq!(events.last().unwrap()["type"], "done");
        let stored: usize = events.iter().map(|event| event["data"].to_string().len()).sum();
        assert!(stored < 17 * 1024 * 1024, "{stored} bytes of events are stored");
    }
}

async fn what_the_cli_complained_about_is_kept(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let script = steps([
        Step::Stderr("x".repeat(100_000)),
        Step::Stderr("the last words".to_owned()),
        Step::Exit(7),
    ]);

    failed(&client, &script, json!({})).await;

    let tail = system
        .database()
        .texts("select stderr_tail from attempt")
        .await
        .remove(0);
    assert!(
        tail.len() <= 4_096 && tail.trim_end().ends_with("the last words"),
        "{} bytes",
        tail.len()
    );
}

async fn absurd_names_and_numbers_harm_nothing() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    let usage = json!({ "inputTokens": u64::MAX, "outputTokens": i64::MAX, "costUSD": -1.0 });
    let result = json!({
        "type": "result", "subtype": "success", "is_error": false, "result": "absurd", "num_turns": u64::MAX,
        "duration_ms": u64::MAX, "model_usage_since_last_result": { "a\u{0}b": usage, "c": usage },
    });

    let id = client.play(&steps([Step::Raw(result.to_string())])).await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["result"]["content"]),
        (&json!("done"), &json!("absurd")),
        "{job:#}"
    );
    let negative = "select count(*) from ledger where cost < 0 or input_tokens < 0";
    assert_eq!(system.database().number(negative).await, 0);
}

/// Has the database refuse a kind of statement from now on.
async fn refuse(database: &Database, statement: &str) {
    match database.db() {
        Db::Sqlite => {
            let trigger =
                format!("create trigger refuse before {statement} begin select raise(abort, 'no'); end");
            database.execute(&trigger).await;
        }
        Db::Postgres => {
            let function =
                "create function refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$";
            database.execute(function).await;
            let trigger =
                format!("create trigger refuse before {statement} for each row execute function refuse()");
            database.execute(&trigger).await;
        }
    }
}

async fn an_end_that_the_database_refuses_is_an_end_all_the_same(db: Db) {
    let system = System::start(db).await;
    let (client, database) = (system.client(), system.database());
    refuse(database, "insert on result").await;

    let id = client.play(&answer("unwelcome").costing(0.25)).await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("internal")),
        "{job:#}"
    );
    assert_eq!((&job["cost"], &job["result"]), (&json!(0.25), &Value::Null));
}

async fn an_end_that_seemed_to_fail_and_was_stored_is_no_lost_lease(db: Db) {
    let system = System::start(db).await;
    let (client, database) = (system.client(), system.database());
    refuse(database, "update of ended_at on attempt").await;
    let id = client.play(&answer("stored")).await;
    system.writes("could not store the end of the run").await;

    // As if the connection had been lost after a commit.
    let stored = "update job set status = 'done', completed_at = 1, lease_owner = null";
    database.execute(stored).await;

    system.writes(&format!("job {id} is done")).await;
    assert!(
        !system.written().contains("the lease was lost"),
        "{}",
        system.written()
    );
}

async fn a_cli_that_ends_slowly_under_a_short_lease_is_done(db: Db) {
    let result = json!({ "type": "result", "subtype": "success", "is_error": false, "result": "slow" });
    // Its output is over between two renewals, its process more than a lease after the first of them.
    let script = format!(
        "case $1 in --version) echo '2.1.331 (Claude Code)'; exit ;; esac\nread -r line\nsleep 3\necho '{result}'\n\
         exec >&- 2>&-\nsleep 4.5"
    );
    let cli = tests::paths::program("slow", &script);
    let system = System::builder()
        .database(db)
        .sandbox(false)
        .env("CLAUDE_CLI_PATH", cli.to_str().unwrap())
        .env("LEASE_SECONDS", "5")
        .start()
        .await;
    let client = system.client();

    let id = client.accepted("take your time").await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["result"]["content"], &job["attempt"]),
        (&json!("done"), &json!("slow"), &json!(1)),
        "{job:#}"
    );
}

async fn a_run_that_takes_too_much_memory_says_so() {
    let system = System::builder()
        .database(Db::Sqlite)
        .env("RUN_MEMORY_MB", "256")
        .start()
        .await;
    let client = system.client();
    // tail keeps what has no line feed: 400 MB.
    let hungry = "(head -c 400000000 /dev/zero; sleep 1000) | tail";

    let job = failed(&client, &steps([Step::Shell(hungry.to_owned())]), json!({})).await;

    assert_eq!(job["error_code"], "out_of_memory", "{job:#}");
    assert_eq!(system.run_processes(), []);
}

async fn another_version_of_the_cli_runs_with_a_warning() {
    let fake = tests::paths::binary("fake-claude");
    let script = format!(
        "case $1 in --version) echo '9.8.7 (Claude Code)' ;; *) exec {} \"$@\" ;; esac",
        fake.display()
    );
    let cli = tests::paths::program("claude", &script);
    let system = System::builder()
        .database(Db::Sqlite)
        .sandbox(false)
        .env("CLAUDE_CLI_PATH", cli.to_str().unwrap())
        .start()
        .await;
    let client = system.client();

    let id = client.play(&answer("old or new")).await;

    assert_eq!(client.finished(&id).await["result"]["content"], "old or new");
    assert_eq!(
        system.database().texts("select cli_version from attempt").await,
        ["9.8.7"]
    );
    let warned = system
        .written()
        .lines()
        .any(|line| line.contains("9.8.7") && line.contains("2.1.331"));
    assert!(warned, "{}", system.written());
}

#[tokio::test]
async fn a_cli_that_is_too_old_is_no_worker() {
    let cli = tests::paths::program("claude", "echo '1.0.17 (Claude Code)'");
    let folder = tests::paths::folder('d');
    let url = format!("sqlite://{}", folder.join("x.db").display());
    let finished = tests::system::run(
        "claude-queue-worker",
        &[],
        &[
            ("DATABASE_URL", url.as_str()),
            ("DATA_DIR", folder.to_str().unwrap()),
            ("ANTHROPIC_API_KEY", "sk-x"),
            ("CLAUDE_CLI_PATH", cli.to_str().unwrap()),
        ],
    )
    .await;

    assert_eq!(finished.code, Some(2), "{finished:?}");
    for words in ["CLAUDE_CLI_PATH", "1.0.17", "too old", "or later"] {
        assert!(
            format!("{}{}", finished.stdout, finished.stderr).contains(words),
            "{words}: {finished:?}"
        );
    }
}

async fn the_end_of_a_run_is_one_line_of_numbers_and_its_code() {
    let system = System::builder()
        .database(Db::Sqlite)
        .env("LOG_FORMAT", "json")
        .start()
        .await;
    let client = system.client();
    let done = client.finished(&client.play(&answer("hi")).await).await;
    let refused = failed(&client, &steps([Step::Exit(3)]), json!({})).await;
    let own = failed(
        &client,
        &answer("hi"),
        json!({ "output_format": { "type": "json_schema", "schema": { "type": "object" } } }),
    )
    .await;
    assert_eq!(own["error_code"], "schema_mismatch", "{own:#}");

    for (job, level, code) in [
        (&done, "INFO", Value::Null),
        (&refused, "WARN", json!("claude_error")),
        (&own, "INFO", json!("schema_mismatch")),
    ] {
        let words = format!("job {} is ", job["id"].as_str().unwrap());
        let written = system.writes(&words).await;
        let lines: Vec<Value> = written
            .lines()
            .filter(|line| line.contains(&words))
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 1, "{written}");
        let line = &lines[0];
        assert_eq!(line["level"], level, "{line:#}");
        assert_eq!(line["error_code"], code, "{line:#}");
        assert_eq!(line["job.status"], job["status"], "{line:#}");
        assert!(line["duration_ms"].is_u64(), "{line:#}");
        assert!(line["cost_usd"].is_f64(), "{line:#}");
    }
}
