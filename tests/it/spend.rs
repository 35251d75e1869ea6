//! Only the gateway is believed about money and models: whatever a run does, it is paid for, and no more than its cap
//! and one answer.

use reqwest::Method;
use serde_json::{Value, json};
use simulator::{Scenario, Step as Turn, Tool, Usage};
use tests::both;
use tests::client::Client;
use tests::database::Db;
use tests::script::{REQUESTS, Script, Step, answer, steps};
use tests::system::{Cli, KEYS, System};

both!(
    requests_past_the_cli_are_paid_for_and_stop_at_the_cap,
    many_requests_at_once_stop_at_the_cap,
    a_forged_result_of_a_killed_run_costs_what_was_metered,
    a_result_of_a_million_dollars_takes_nothing_from_others,
    a_key_may_use_its_models_only_wherever_they_are_asked_for,
    the_attempts_of_a_job_share_its_cap,
    an_answer_that_is_cut_is_paid_for_as_far_as_it_came,
);

/// Dollars as they are stored.
#[expect(clippy::cast_possible_truncation, reason = "small amounts")]
fn micros(dollars: f64) -> i64 {
    (dollars * 1e6).round() as i64
}

/// Job, ledger and simulator say the same about what a job has cost; gives it in micro-dollars.
async fn the_same_everywhere(system: &System, job: &Value) -> i64 {
    let spent = micros(system.simulator().spent());
    let ledger = system
        .database()
        .number("select cast(coalesce(sum(cost), 0) as bigint) from ledger")
        .await;
    assert_eq!(micros(job["cost"].as_f64().unwrap()), spent, "{job:#}");
    assert_eq!(ledger, spent);
    spent
}

async fn capped(client: &Client, script: &Script, dollars: f64) -> String {
    client
        .accepted_body(&json!({ "message": script.prompt(), "max_cost_usd": dollars, "model": "haiku" }))
        .await
}

fn requests(model: &str, tokens: (u64, u64), count: usize, at_once: usize) -> Step {
    Step::Direct {
        model: model.to_owned(),
        tokens,
        count,
        at_once,
    }
}

/// What came back of the requests that a run made past its CLI.
fn came_back(system: &System, job: &str) -> Vec<String> {
    let lines = std::fs::read_to_string(system.workspace(job).join(REQUESTS)).unwrap();
    lines.lines().map(str::to_owned).collect()
}

async fn requests_past_the_cli_are_paid_for_and_stop_at_the_cap(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    // A cent each.
    let script = steps([requests("claude-opus-5-5", (0, 500), 20, 1)]);

    let id = capped(&client, &script, 0.05).await;
    let job = client.finished(&id).await;

    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("max_cost")),
        "{job:#}"
    );
    assert_eq!(the_same_everywhere(&system, &job).await, 50_000);
    let lines = came_back(&system, &id);
    assert_eq!(lines.iter().filter(|line| *line == "200").count(), 5, "{lines:?}");
    assert_eq!(
        lines.iter().filter(|line| line.starts_with("402 ")).count(),
        15,
        "{lines:?}"
    );
    assert_eq!(job["result"]["model_usage"]["claude-opus-5-5"]["cost"], 0.05);
}

async fn many_requests_at_once_stop_at_the_cap(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let script = steps([requests("claude-opus-5-5", (0, 700), 200, 16)]);

    let id = capped(&client, &script, 0.1).await;
    let job = client.finished(&id).await;

    assert_eq!(job["error_code"], "max_cost", "{job:#}");
    let spent = the_same_everywhere(&system, &job).await;
    assert!((100_000..=114_000).contains(&spent), "{spent}");
    // However many were refused, the log has one line for the reason, with their number.
    let refused = came_back(&system, &id)
        .iter()
        .filter(|line| line.starts_with("402 "))
        .count();
    let line = system.writes("the gateway refused requests of the run").await;
    assert_eq!(
        line.matches("the gateway refused requests of the run").count(),
        1,
        "{line}"
    );
    assert!(refused > 100, "{refused}");
}

async fn a_forged_result_of_a_killed_run_costs_what_was_metered(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let forged = json!({ "type": "result", "subtype": "success", "is_error": false, "result": "forged", "num_turns": 1 });
    let script = steps([
        requests("claude-opus-5-5", (0, 50_000), 1, 1),
        Step::Raw(forged.to_string()),
        Step::Die(9),
    ]);

    let id = capped(&client, &script, 2.0).await;
    let job = client.finished(&id).await;

    assert_eq!(
        (&job["status"], &job["result"]["content"]),
        (&json!("done"), &json!("forged")),
        "{job:#}"
    );
    assert_eq!(the_same_everywhere(&system, &job).await, 1_000_000);
}

async fn a_result_of_a_million_dollars_takes_nothing_from_others(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let admin = client.with_key(KEYS[2]);
    let budget = admin.request(Method::PUT, "/api/v1/budgets/global/global");
    let set = admin.send(budget.json(&json!({ "limit_usd": 400 }))).await;
    assert!(matches!(set.status, 200 | 201), "{set:?}");
    let forged = json!({
        "type": "result", "subtype": "success", "is_error": false, "result": "dear", "total_cost_usd": 1_000_000,
        "modelUsage": { "claude-opus-5-5": { "costUSD": 1_000_000 } },
        "model_usage_since_last_result": { "claude-opus-5-5": { "costUSD": 1_000_000 } },
    });
    let script = steps([Step::Spend(0.01), Step::Raw(forged.to_string())]);

    let id = capped(&client, &script, 1.0).await;
    let job = client.finished(&id).await;

    assert_eq!(job["status"], "done", "{job:#}");
    let spent = the_same_everywhere(&system, &job).await;
    assert!(spent < 20_000, "{spent}");
    let reported = "select cast(reported_cost as text) from attempt";
    let reported: i64 = system.database().texts(reported).await[0].parse().unwrap();
    assert!(reported >= 1_000_000_000_000, "{reported}");
    system.writes("but the CLI reports $1000000").await;
    let attempts = format!("/api/v1/jobs/{id}/attempts");
    let shown = client.get(&attempts).await;
    let shown = &shown.data(200)[0];
    assert!(shown["reported_cost"].as_f64().unwrap() >= 1e6, "{shown:#}");
    assert_eq!(
        (
            &shown["attempt"],
            &shown["ending"],
            &shown["cost"],
            &shown["worker_id"]
        ),
        (&json!(1), &json!("done"), &job["cost"], &Value::Null),
        "{shown:#}"
    );
    let to_admin = admin.get(&attempts).await;
    assert!(
        to_admin.data(200)[0]["worker_id"].is_string(),
        "{}",
        to_admin.text
    );
    let other = client.with_key(KEYS[1]);
    let id = other.play(&answer("as ever")).await;
    assert_eq!(other.finished(&id).await["status"], "done");
}

async fn a_key_may_use_its_models_only_wherever_they_are_asked_for(db: Db) {
    let system = System::start(db).await;
    let admin = system.client().with_key(KEYS[2]);
    let made = admin
        .post(
            "/api/v1/keys",
            &json!({ "name": "haiku only", "allowed_models": ["haiku"] }),
        )
        .await;
    let secret = made.data(201)["key"].as_str().unwrap().to_owned();
    let client = system.client().with_key(&secret);

    for model in [
        "claude-opus-5-5",
        "opus",
        "claude-opus-5-5[1m]",
        "us.anthropic.claude-opus-5-5",
        "unheard-of",
    ] {
        system.simulator().reset();
        let id = client.play(&steps([requests(model, (0, 1_000), 1, 1)])).await;
        let job = client.finished(&id).await;
        // The CLI's own request came after it, and was for haiku.
        assert_eq!(job["status"], "done", "{job:#}");
        let lines = came_back(&system, &id);
        assert!(
            lines[0].starts_with("403 ") && lines[0].contains(model),
            "{lines:?}"
        );
        let asked = system.simulator().requests();
        assert!(
            asked.iter().all(|request| request.model == "claude-haiku-5-5"),
            "{asked:#?}"
        );
    }
    let id = client
        .play(&steps([requests("claude-haiku-5-5[1m]", (0, 1_000), 1, 1)]))
        .await;
    client.finished(&id).await;
    assert_eq!(came_back(&system, &id), ["200"]);
}

async fn the_attempts_of_a_job_share_its_cap(db: Db) {
    let system = System::builder()
        .database(db)
        .env("CLAUDE_RETRY_BASE_DELAY", "0.01")
        .start()
        .await;
    let client = system.client();
    let script = Script {
        runs: vec![
            steps([requests("claude-opus-5-5", (0, 1_500), 1, 1), Step::Die(9)]),
            steps([requests("claude-opus-5-5", (0, 1_000), 5, 1), Step::Die(9)]),
            answer("too late"),
        ],
        ..Script::default()
    };

    let id = capped(&client, &script, 0.05).await;
    let job = client.finished(&id).await;

    assert_eq!(job["error_code"], "max_cost", "{job:#}");
    let reserved = "select cast(reserved as text) from attempt order by attempt";
    assert_eq!(system.database().texts(reserved).await, ["50000", "20000"]);
    assert_eq!(the_same_everywhere(&system, &job).await, 50_000);
}

async fn an_answer_that_is_cut_is_paid_for_as_far_as_it_came(db: Db) {
    let system = System::builder().database(db).cli(Cli::Real).start().await;
    let client = system.client();

    let id = client.accepted("[[scenario:endless]] Count.").await;
    client.until(&id, |job| job["cost"].as_f64().unwrap() > 0.0).await;
    client.cancel(&id).await;
    let job = client.finished(&id).await;

    assert_eq!(job["status"], "cancelled", "{job:#}");
    let (cost, spent) = (
        micros(job["cost"].as_f64().unwrap()),
        micros(system.simulator().spent()),
    );
    // Two bytes of text count as a token, and the simulator counts a word as one.
    assert!(cost >= spent / 2 && spent > 0, "metered {cost}, sent {spent}");
    let estimated = "select count(*) from ledger where estimated";
    assert_eq!(system.database().number(estimated).await, 1);
}

fn agent_that_asks_for_opus() -> Scenario {
    let agent = Tool {
        name: "Agent".to_owned(),
        input: json!({ "description": "d", "prompt": "Say hello.", "subagent_type": "general-purpose", "model": "opus" }),
        raw_input: None,
    };
    Scenario {
        steps: vec![
            Turn {
                tools: vec![agent],
                ..Turn::default()
            },
            Turn::default(),
        ],
        ..Scenario::default()
    }
}

#[test]
fn a_subagent_that_names_a_dear_model_runs_on_the_keys_own() {
    tests::run(async {
        let system = System::builder().cli(Cli::Real).start().await;
        system
            .simulator()
            .put_scenario("dear-agent", agent_that_asks_for_opus());
        let admin = system.client().with_key(KEYS[2]);
        let made = admin
            .post(
                "/api/v1/keys",
                &json!({ "name": "haiku only", "allowed_models": ["haiku"] }),
            )
            .await;
        let client = system.client().with_key(made.data(201)["key"].as_str().unwrap());

        let id = client.accepted("[[scenario:dear-agent]] Ask somebody.").await;
        let job = client.finished(&id).await;

        assert_eq!(job["status"], "done", "{job:#}");
        let mut requests = system.simulator().requests();
        // The worker's own question names no model.
        requests.retain(|request| request.path != "/v1/models");
        assert!(requests.len() >= 3, "{requests:#?}");
        assert!(
            requests.iter().all(|request| request.model == "claude-haiku-5-5"),
            "{requests:#?}"
        );
        the_same_everywhere(&system, &job).await;
    });
}

#[test]
fn the_real_cli_ends_at_once_when_its_agent_has_spent_everything() {
    tests::run(async {
        let system = System::builder().cli(Cli::Real).start().await;
        let spend = "t=$(tr '\\0' '\\n' < /proc/$PPID/environ | sed -n 's/^ANTHROPIC_API_KEY=//p'); \
            curl -s --unix-socket \"$ANTHROPIC_UNIX_SOCKET\" -H \"x-api-key: $t\" -H 'content-type: application/json' \
            -d '{\"model\":\"claude-opus-5-5\",\"max_tokens\":9,\"messages\":[{\"role\":\"user\",\"content\":\"[[tokens:0:60000]]\"}]}' \
            http://gateway/v1/messages";
        let bash = Tool {
            name: "Bash".to_owned(),
            input: json!({ "command": spend, "description": "Spend." }),
            raw_input: None,
        };
        let scenario = Scenario {
            steps: vec![
                Turn {
                    tools: vec![bash],
                    ..Turn::default()
                },
                Turn::default(),
            ],
            ..Scenario::default()
        };
        system.simulator().put_scenario("spend", scenario);
        let client = system.client();
        let body = json!({ "message": "[[scenario:spend]] Go.", "max_cost_usd": 1.0 });

        let id = client.accepted_body(&body).await;
        let job = client.finished(&id).await;

        assert_eq!(
            (&job["status"], &job["error_code"]),
            (&json!("failed"), &json!("max_cost")),
            "{job:#}"
        );
        assert!(the_same_everywhere(&system, &job).await >= 1_200_000);
        // The partial result is kept, and the CLI has not asked again.
        assert!(!job["result"].is_null(), "{job:#}");
        let mut requests = system.simulator().requests();
        requests.retain(|request| request.path != "/v1/models");
        assert_eq!(requests.len(), 2, "{requests:#?}");
    });
}

#[test]
fn the_gateway_meters_what_the_cli_reports() {
    tests::run(async {
        let system = System::builder().cli(Cli::Real).start().await;
        let client = system.client();
        let long = Turn {
            usage: Usage {
                input_tokens: 40_001,
                cache_creation_input_tokens: 30_000,
                cache_read_input_tokens: 30_003,
                output_tokens: 777,
                ..Usage::default()
            },
            ..Turn::default()
        };
        let scenario = Scenario {
            steps: vec![long],
            ..Scenario::default()
        };
        system.simulator().put_scenario("long", scenario);
        for (scenario, model) in [
            ("default", "sonnet"),
            ("write", "opus"),
            ("bash", "haiku"),
            ("long", "haiku"),
            ("long", "fable"),
            ("long", "claude-opus-4-8"),
            ("thinking", "claude-sonnet-4-5"),
            ("subagent", "sonnet"),
            ("parallel", "claude-haiku-4-5"),
            ("e500-once", "sonnet"),
        ] {
            let body = json!({ "message": format!("[[scenario:{scenario}]] Go."), "model": model });
            let id = client.accepted_body(&body).await;
            let job = client.finished(&id).await;
            assert_eq!(job["status"], "done", "{scenario}: {job:#}");
            let reported = format!("select cast(reported_cost as text) from attempt where job_id = '{id}'");
            let reported: i64 = system.database().texts(&reported).await[0].parse().unwrap();
            assert_eq!(
                micros(job["cost"].as_f64().unwrap()),
                reported,
                "{scenario} on {model}"
            );
        }
        let estimated = "select count(*) from ledger where estimated";
        assert_eq!(system.database().number(estimated).await, 0);
    });
}
