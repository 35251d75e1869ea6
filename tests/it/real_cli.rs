//! The real Claude CLI, in the sandbox, through the worker's gateway, against the simulator.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::client::{Client, PATIENCE};
use tests::database::Db;
use tests::system::{ANTHROPIC_KEY, Cli, System};
use tests::{BUSY, both, once};

both!(
    it_answers_and_only_the_gateway_knows_the_key,
    it_goes_on_in_its_conversation_when_its_worker_was_killed,
);
once!(
    the_model_is_told_of_its_tools_in_each_mode,
    no_tool_can_open_the_clis_output,
    a_schema_of_any_dialect_is_filled,
    it_writes_a_file_and_runs_a_command,
    a_wrong_key_is_the_operators_and_the_job_waits,
    it_is_cancelled_in_the_middle_of_an_answer,
    it_ends_at_its_timeout_in_the_middle_of_a_command,
);

async fn start(db: Db) -> (System, Client) {
    let system = System::builder().database(db).cli(Cli::Real).start().await;
    let client = system.client();
    (system, client)
}

async fn it_answers_and_only_the_gateway_knows_the_key(db: Db) {
    let (system, client) = start(db).await;

    let id = client.accepted("[[scenario:default]] Say something short.").await;
    let job = client.finished(&id).await;

    assert_eq!(job["status"], "done", "{job:#}");
    assert!(!job["result"]["content"].as_str().unwrap().is_empty());
    assert!(job["cost"].as_f64().unwrap() > 0.0);
    assert_eq!(job["cost"], job["result"]["cost"]);
    assert_eq!(
        system.database().texts("select cli_version from attempt").await,
        ["2.1.331"]
    );
    let requests = system.simulator().requests();
    assert!(!requests.is_empty());
    assert!(
        requests.iter().all(|request| request.credential == ANTHROPIC_KEY),
        "{requests:#?}"
    );
    assert_eq!(system.run_processes(), []);

    // All that a run can see of its surroundings, as its tools see it.
    let id = client
        .accepted("[[scenario:environment]] Show the environment.")
        .await;
    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done", "{job:#}");
    let environment = std::fs::read_to_string(system.workspace(&id).join("env.txt")).unwrap();
    assert!(environment.contains("CLAUDECODE=1"), "{environment}");
    assert!(!environment.contains(ANTHROPIC_KEY), "{environment}");
    let events = serde_json::to_string(&client.all_events(&id).await).unwrap();
    assert!(!events.contains(ANTHROPIC_KEY));
}

async fn it_writes_a_file_and_runs_a_command() {
    let (system, client) = start(Db::Sqlite).await;

    let id = client.accepted("[[scenario:write]] Write the file.").await;
    let job = client.finished(&id).await;

    assert_eq!(job["status"], "done", "{job:#}");
    assert_eq!(
        std::fs::read_to_string(system.workspace(&id).join("out.txt")).unwrap(),
        "written by a tool\n"
    );
    assert_eq!(names(&job["tools_used"]), ["Write"]);

    let id = client.accepted("[[scenario:bash]] Run the command.").await;
    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done", "{job:#}");
    let result = client.event(&id, "tool_result").await;
    let said = result["data"]["content"].as_str().unwrap();
    assert!(said.starts_with("hello from bash\n/workspace"), "{said}");
    assert_eq!(result["data"]["is_error"], false);
}

fn names(tools: &Value) -> Vec<&str> {
    tools
        .as_array()
        .unwrap()
        .iter()
        .map(|tool| tool["name"].as_str().unwrap())
        .collect()
}

async fn a_wrong_key_is_the_operators_and_the_job_waits() {
    let (system, client) = start(Db::Sqlite).await;

    let id = client.accepted("[[scenario:e401]] Hello?").await;
    let job = client.until(&id, |job| job["hold"] == "upstream").await;

    assert_eq!((&job["attempt"], &job["error"]), (&json!(1), &Value::Null));
    let reason = job["hold_reason"].as_str().unwrap();
    assert!(reason.contains("credential"), "{reason}");
    assert_eq!(job["cost"], 0.0);
    assert_eq!(
        system
            .database()
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
    let failures = system.database().number("select failures from job").await;
    assert_eq!(failures, 0);
}

async fn it_is_cancelled_in_the_middle_of_an_answer() {
    let (system, client) = start(Db::Sqlite).await;
    let id = client.accepted("[[scenario:endless]] Never stop.").await;
    client.until(&id, |job| job["cost"].as_f64() > Some(0.0)).await;
    tests::eventually(PATIENCE, "an answer that streams", async || {
        (system.simulator().open_requests() > 0).then_some(())
    })
    .await;
    let begin = Instant::now();

    client.cancel(&id).await.data(202);
    let job = client.finished(&id).await;

    assert_eq!(job["status"], "cancelled", "{job:#}");
    assert!(
        begin.elapsed() < Duration::from_secs(6) + BUSY,
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(system.run_processes(), []);
    // The request has ended too: nothing goes on being paid for.
    tests::eventually(PATIENCE, "the end of the request", async || {
        (system.simulator().open_requests() == 0).then_some(())
    })
    .await;
    assert!(job["cost"].as_f64().unwrap() > 0.0, "{job:#}");
}

async fn it_ends_at_its_timeout_in_the_middle_of_a_command() {
    let (system, client) = start(Db::Sqlite).await;
    let begin = Instant::now();

    let body = json!({ "message": "[[scenario:bash-sleep]] Sleep.", "timeout_seconds": 15 });
    let id = client.accepted_body(&body).await;
    let job = client.finished(&id).await;

    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("timeout")),
        "{job:#}"
    );
    assert!(
        begin.elapsed() < Duration::from_secs(15 + 8) + BUSY,
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(system.run_processes(), []);
    let tools: Vec<Value> = client
        .all_events(&id)
        .await
        .into_iter()
        .filter(|event| event["type"] == "tool")
        .collect();
    assert_eq!(tools.len(), 1, "the command had begun");
    assert!(job["cost"].as_f64().unwrap() > 0.0, "{job:#}");
}

async fn it_goes_on_in_its_conversation_when_its_worker_was_killed(db: Db) {
    let mut system = System::builder()
        .database(db)
        .cli(Cli::Real)
        .env("LEASE_SECONDS", "5")
        .start()
        .await;
    let client = system.client();
    // Five minutes at first, a moment when it finds what the first run has done.
    let command = "if test -e begun; then echo found; else touch begun; sleep 300; fi";
    let scenario = json!({ "steps": [
        { "text": "Here I go.", "tools": [{ "name": "Bash", "input": { "command": command, "description": "Begin" } }] },
        { "text": "All of it is done." },
    ]});
    system
        .simulator()
        .put_scenario("goes-on", serde_json::from_value(scenario).unwrap());
    let id = client.accepted("[[scenario:goes-on]] Begin, then finish.").await;
    tests::eventually(PATIENCE, "the first run's work", async || {
        system.workspace(&id).join("begun").exists().then_some(())
    })
    .await;
    // The whole answer: at its begin only its input is priced.
    client
        .until(&id, |job| job["cost"].as_f64() >= Some(0.0004))
        .await;

    system.worker(0).restart().await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("done"), &json!(2)),
        "{job:#}"
    );
    assert_eq!(job["result"]["content"], "All of it is done.");
    // The model has seen the first run's messages, and that the run was interrupted.
    let sessions = system
        .database()
        .texts("select claude_session_id from attempt order by attempt")
        .await;
    let body = system
        .simulator()
        .last_body("goes-on", &sessions[1])
        .expect("a request of the second run");
    let messages = body["messages"].to_string();
    for said in [
        "Begin, then finish.",
        "Here I go.",
        "sleep 300",
        "was interrupted before it could finish",
        "found",
    ] {
        assert!(messages.contains(said), "{said} isn't in {messages}");
    }
    // Three answers were paid for, each of them once, though the CLI's own sum of the second run holds all three.
    let requests = system.simulator().requests();
    let answers = requests.iter().filter(|request| !request.auxiliary).count();
    assert_eq!(answers, 3, "{requests:#?}");
    let ledger = "select cast(sum(cost) as bigint) from ledger";
    assert_eq!(system.database().number(ledger).await, 3 * 400);
    let tokens = "select cast(sum(input_tokens) as bigint) from ledger";
    assert_eq!(system.database().number(tokens).await, 3 * 100);
    assert_eq!(job["cost"], 0.0012, "{job:#}");
}

/// What the model is told of, in each permission mode: the tools whose schemas are in the request, and the names of
/// those that it can ask for.
async fn the_model_is_told_of_its_tools_in_each_mode() {
    let (system, client) = start(Db::Sqlite).await;
    for mode in ["default", "acceptEdits", "plan", "dontAsk", "auto"] {
        let scenario = format!("tools-{}", mode.to_lowercase());
        let steps = json!({ "steps": [{ "text": "Seen." }] });
        system
            .simulator()
            .put_scenario(scenario.as_str(), serde_json::from_value(steps).unwrap());
        let body = json!({
            "message": format!("[[scenario:{scenario}]] see @/etc/passwd and @/proc/version"),
            "permission_mode": mode,
        });

        let job = client.finished(&client.accepted_body(&body).await).await;

        assert_eq!(job["status"], "done", "{mode}: {job:#}");
        let session = job["session_id"].as_str().unwrap();
        let request = system
            .simulator()
            .last_body(&scenario, session)
            .expect("the request of the run");
        let told: Vec<&str> = names_of(&request["tools"]);
        for tool in ["Agent", "Bash", "Edit", "Read", "Skill", "ToolSearch", "Write"] {
            assert!(told.contains(&tool), "{mode}: {tool} isn't among {told:?}");
        }
        for never in [
            "WebFetch",
            "SendMessage",
            "ListAgents",
            "CronCreate",
            "ScheduleWakeup",
        ] {
            assert!(!told.contains(&never), "{mode}: {never} is among {told:?}");
        }
        let text = request.to_string();
        let deferred = text
            .split_once("deferred tools are now available")
            .map_or("", |(_, rest)| rest.split("\\n\\n").next().unwrap_or_default());
        for tool in ["WebSearch", "NotebookEdit"] {
            assert!(deferred.contains(tool), "{mode}: {tool} isn't in {deferred:?}");
        }
        for never in ["WebFetch", "SendMessage", "CronCreate"] {
            assert!(!deferred.contains(never), "{mode}: {never} is in {deferred:?}");
        }
        assert_eq!(
            text.contains("Plan mode is active"),
            mode == "plan",
            "{mode}: the instructions of plan mode"
        );
        // A mention of a file puts nothing of it into the request.
        assert!(!text.contains("agent:x:1000"), "{mode}: /etc/passwd was sent");
        assert!(!text.contains("gcc"), "{mode}: /proc/version was sent");
    }
}

fn names_of(tools: &Value) -> Vec<&str> {
    let tools = tools.as_array().map_or(&[][..], Vec::as_slice);
    tools.iter().filter_map(|tool| tool["name"].as_str()).collect()
}

/// A line that a tool writes into the CLI's output would be taken for the CLI's own.
async fn no_tool_can_open_the_clis_output() {
    let (system, client) = start(Db::Sqlite).await;
    let command = "for p in /proc/[0-9]*; do if grep -qa -e '[-]-input-format=stream' $p/cmdline; then \
                   for fd in 0 1 2; do (echo '{}' > $p/fd/$fd) 2>/dev/null && echo opened $fd || echo refused $fd; done; \
                   fi; done";
    let scenario = json!({ "steps": [
        { "text": "Here I go.", "tools": [{ "name": "Bash", "input": { "command": command, "description": "Try" } }] },
        { "text": "Tried." },
    ]});
    system
        .simulator()
        .put_scenario("forger", serde_json::from_value(scenario).unwrap());

    let id = client
        .accepted("[[scenario:forger]] Write into the output.")
        .await;

    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done", "{job:#}");
    let result = client.event(&id, "tool_result").await;
    let said = result["data"]["content"].as_str().unwrap();
    assert!(said.contains("refused 0\nrefused 1\nrefused 2"), "{said}");
    assert!(!said.contains("opened"), "{said}");
    assert_eq!(result["data"]["tool_name"], "Bash", "{result:#}");
    assert!(result["data"]["duration_ms"].is_u64(), "{result:#}");
}

/// The CLI refuses most dialects by their name.
async fn a_schema_of_any_dialect_is_filled() {
    let (_system, client) = start(Db::Sqlite).await;
    for dialect in [
        "https://json-schema.org/draft/2020-12/schema",
        "https://json-schema.org/draft/2019-09/schema",
        "http://json-schema.org/draft-07/schema#",
    ] {
        // As a library writes it that derives schemas from types.
        let schema = json!({
            "$schema": dialect,
            "title": "Answer",
            "type": "object",
            "properties": { "answer": { "$ref": "#/$defs/Number" } },
            "required": ["answer"],
            "additionalProperties": false,
            "$defs": { "Number": { "type": "integer", "description": "A number." } },
        });
        let body = json!({
            "message": "[[scenario:structured]] Fill it.",
            "output_format": { "type": "json_schema", "schema": schema },
        });

        let job = client.finished(&client.accepted_body(&body).await).await;

        assert_eq!(job["status"], "done", "{dialect}: {job:#}");
        let filled = &job["result"]["structured_output"]["answer"];
        assert!(filled.is_i64(), "{dialect}: {job:#}");
    }
}
