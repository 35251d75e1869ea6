//! What passes is tried again after a pause that holds nobody up, and what doesn't isn't.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use simulator::Simulator;
use tests::client::{Client, PATIENCE, at_once};
use tests::database::Db;
use tests::script::{Script, Step, answer, steps};
use tests::system::{Cli, System};
use tests::{BUSY, both, eventually, once};
use tokio::net::TcpSocket;

both!(
    a_passing_failure_is_tried_again_after_a_growing_pause,
    pauses_are_not_all_alike,
    a_job_that_waits_for_another_attempt_holds_no_slot,
    what_does_not_pass_fails_at_once_and_says_what_to_do,
    a_usage_limit_is_met_once_and_waited_for,
    a_worker_at_its_limit_leaves_the_jobs_to_others,
);
once!(
    the_real_cli_waits_in_the_queue_until_the_api_can_be_reached,
    the_real_cli_waits_as_long_as_the_api_says,
    the_real_cli_meets_a_usage_limit_once,
);

fn api_error(status: impl Into<Option<u16>>, error: &str, text: &str) -> Step {
    Step::ApiError {
        status: status.into(),
        error: error.to_owned(),
        text: text.to_owned(),
    }
}

fn overloaded() -> Step {
    api_error(529, "server_error", "API Error: Repeated 529 Overloaded errors.")
}

fn refused() -> Step {
    api_error(
        401,
        "authentication_failed",
        "Invalid API key · Fix external API key",
    )
}

/// Fails like this so many times, then is done.
fn at_last(failure: &Step, times: usize) -> Script {
    let mut runs = vec![steps([failure.clone()]); times];
    runs.push(answer("at last"));
    Script {
        runs,
        ..Script::default()
    }
}

/// The delays that a job's `retry` events tell, in milliseconds.
async fn delays(client: &Client, id: &str) -> Vec<(u64, Value)> {
    client
        .all_events(id)
        .await
        .into_iter()
        .filter(|event| event["type"] == "retry")
        .map(|event| {
            let data = &event["data"];
            (data["delay_ms"].as_u64().unwrap(), data["error_code"].clone())
        })
        .collect()
}

/// Seconds since the epoch.
fn epoch_seconds() -> i64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

/// How the service is, as soon as it can tell: a database that hesitates for two seconds counts as one that isn't there.
async fn health(client: &Client) -> Value {
    eventually(PATIENCE, "a health that is known", async || {
        let health = client.get("/api/v1/health").await.json;
        (health["checks"]["database"] == "ok").then_some(health)
    })
    .await
}

async fn a_passing_failure_is_tried_again_after_a_growing_pause(db: Db) {
    let system = System::builder()
        .database(db)
        .env("CLAUDE_RETRY_BASE_DELAY", "0.5")
        .env("CLAUDE_RETRY_BACKOFF_FACTOR", "3")
        .env("CLAUDE_RETRY_MAX_DELAY", "1.2")
        .start()
        .await;
    let client = system.client();
    let failures = [
        ("overloaded", overloaded()),
        (
            "api_unavailable",
            api_error(503, "server_error", "API Error: 503 Service unavailable"),
        ),
        (
            "api_unavailable",
            api_error(None, "server_error", "Unable to connect to API (ECONNREFUSED)"),
        ),
        (
            "rate_limited",
            api_error(429, "rate_limit", "API Error: Request rejected (429) · slow down"),
        ),
    ];

    at_once(failures.iter().map(async |(code, failure)| {
        let id = client.play(&at_last(failure, 2)).await;
        let job = client.finished(&id).await;

        assert_eq!(job["result"]["content"], "at last", "{job:#}");
        assert_eq!(job["attempt"], 3);
        let told = delays(&client, &id).await;
        assert!(told.iter().all(|(_, told)| told == code), "{told:?}");
        // Half a second, then three times as much but no more than 1.2 s; a fifth more or less. Storing the end of the run
        // takes a part of the pause.
        let [(first, _), (second, _)] = told[..] else {
            panic!("{told:?}")
        };
        assert!(
            (200..=600).contains(&first) && (700..=1440).contains(&second),
            "{told:?}"
        );
        // They were waited for, and not much longer.
        let paused = "select cast((next.started_at - attempt.ended_at) / 1000 as bigint) from attempt
                      join attempt as next on next.job_id = attempt.job_id and next.attempt = attempt.attempt + 1
                      where attempt.attempt =";
        for (attempt, delay) in [(1, first), (2, second)] {
            let sql = format!("{paused} {attempt} and attempt.job_id = '{id}'");
            let paused = u64::try_from(system.database().number(&sql).await).unwrap();
            assert!(
                (delay..delay + 10_000).contains(&paused),
                "{paused} ms instead of {delay}"
            );
        }
    }))
    .await;
    let failures = "select cast(sum(failures) as bigint) from job";
    assert_eq!(system.database().number(failures).await, 8);
}

async fn pauses_are_not_all_alike(db: Db) {
    let system = System::builder()
        .database(db)
        .sandbox(false)
        .env("CLAUDE_RETRY_BASE_DELAY", "60")
        .start()
        .await;
    let client = system.client();
    let script = at_last(&overloaded(), 1);

    let mut told: Vec<u64> = at_once((0..12).map(async |_| {
        let id = client.play(&script).await;
        let job = client.until(&id, |job| job["hold"] == "delay").await;
        assert_eq!(
            (&job["status"], &job["attempt"]),
            (&json!("queued"), &json!(1)),
            "{job:#}"
        );
        assert!(job["run_after"].is_string(), "{job:#}");
        delays(&client, &id).await[0].0
    }))
    .await;

    told.sort_unstable();
    assert!(told[0] >= 48_000 && told[11] <= 72_000, "{told:?}");
    assert!(
        told[11] - told[0] > 1_000,
        "they would all come back at once: {told:?}"
    );
}

async fn a_job_that_waits_for_another_attempt_holds_no_slot(db: Db) {
    let system = System::builder()
        .database(db)
        .stepped_clock()
        .env("WORKER_CONCURRENCY", "1")
        .env("CLAUDE_RETRY_BASE_DELAY", "60")
        .start()
        .await;
    let client = system.client();
    let waits = client.play(&at_last(&overloaded(), 1)).await;
    client.until(&waits, |job| job["hold"] == "delay").await;

    let other = client.play(&answer("meanwhile")).await;

    assert_eq!(client.finished(&other).await["status"], "done");
    assert_eq!(client.job(&waits).await.data(200)["hold"], "delay");
    system.step_clock(75);
    assert_eq!(client.finished(&waits).await["result"]["content"], "at last");
}

async fn what_does_not_pass_fails_at_once_and_says_what_to_do(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let cases = [
        ("auth_error", refused(), "ANTHROPIC_API_KEY"),
        (
            "auth_error",
            api_error(
                403,
                "authentication_failed",
                "Failed to authenticate: OAuth token revoked",
            ),
            "claude auth login",
        ),
        (
            "auth_error",
            api_error(None, "authentication_failed", "Not logged in · Please run /login"),
            "CLAUDE_CODE_OAUTH_TOKEN",
        ),
        (
            "billing_error",
            api_error(400, "billing_error", "Credit balance is too low"),
            "Add credit",
        ),
        (
            "billing_error",
            api_error(402, "unknown", "API Error: 402 Payment required"),
            "billing",
        ),
        (
            "model_not_found",
            api_error(404, "model_not_found", "There's an issue with the selected model"),
            "`model`",
        ),
        (
            "invalid_request",
            api_error(
                400,
                "unknown",
                "API Error: 400 messages: text content blocks must be non-empty",
            ),
            "Change the job's message or settings",
        ),
        (
            "request_too_large",
            api_error(413, "invalid_request", "Request too large"),
            "Leave out large images",
        ),
    ];

    for (code, failure, advice) in &cases {
        // It would be done the second time, if there were one.
        let id = client.play(&at_last(failure, 1)).await;
        let job = client.finished(&id).await;

        assert_eq!(
            (&job["status"], &job["error_code"], &job["attempt"]),
            (&json!("failed"), &json!(code), &json!(1)),
            "{job:#}"
        );
        let said = job["error"].as_str().unwrap();
        assert!(said.contains(advice) && said.ends_with('.'), "{said}");
        assert_eq!(delays(&client, &id).await, []);
    }
}

async fn a_usage_limit_is_met_once_and_waited_for(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .stepped_clock()
        .env("WORKER_CONCURRENCY", "2")
        .start()
        .await;
    let client = system.client();
    let limited = at_last(&Step::Request("usage-limit".to_owned()), 1);
    let limited = at_once([client.play(&limited), client.play(&limited)]).await;
    let quick = answer("quick").prompt();
    for _ in 0..4 {
        at_once((0..50).map(|_| client.accepted(&quick))).await;
    }

    // Two hundred jobs wait, and the first answer concerns them all.
    system.add_worker().await;
    let first = eventually(PATIENCE, "a parked job", async || {
        let jobs = client.jobs("status=queued&order=asc&limit=2&view=full").await;
        let jobs = jobs.data(200).as_array().unwrap().clone();
        jobs.into_iter().find(|job| job["hold"] == "usage_limit")
    })
    .await;
    let health = health(&client).await;

    let parked =
        "select count(*) from job where hold = 'usage_limit' and failures = 0 and run_after is not null";
    assert!(system.database().number(parked).await >= 1);
    let reason = first["hold_reason"].as_str().unwrap();
    assert!(reason.contains("used up what its plan allows"), "{reason}");
    assert_eq!(health["status"], "degraded", "{health:#}");
    assert_eq!(health["checks"]["workers"], "paused", "{health:#}");
    assert!(health["workers"][0]["paused_until"].is_string(), "{health:#}");
    let reason = health["workers"][0]["pause_reason"].as_str().unwrap();
    assert!(reason.contains("limit"), "{reason}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let starts = "select count(*) from attempt";
    let starts = system.database().number(starts).await;
    assert!((1..=2).contains(&starts), "{starts} starts");

    system.step_clock(3_610);
    for id in &limited {
        let job = client.finished(id).await;
        assert_eq!(job["result"]["content"], "at last", "{job:#}");
    }
    eventually(PATIENCE, "thirty jobs done", async || {
        let done = "select count(*) from job where status = 'done'";
        (system.database().number(done).await >= 30).then_some(())
    })
    .await;
    assert_eq!(
        system
            .database()
            .number("select count(*) from job where failures > 0")
            .await,
        0
    );
}

async fn a_worker_at_its_limit_leaves_the_jobs_to_others(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(2)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let limited = client
        .play(&steps([Step::Request("usage-limit".to_owned())]))
        .await;
    client.until(&limited, |job| job["hold"] == "usage_limit").await;
    let health = health(&client).await;
    assert_eq!(
        (&health["status"], &health["checks"]["workers"]),
        (&json!("ok"), &json!("ok")),
        "{health:#}"
    );
    let pauses = |worker: &&Value| worker["paused_until"].is_string();
    let workers = health["workers"].as_array().unwrap();
    assert_eq!((workers.len(), workers.iter().filter(pauses).count()), (2, 1));

    for _ in 0..10 {
        let begin = Instant::now();
        let id = client.play(&answer("the other one")).await;
        client.finished(&id).await;
        assert!(begin.elapsed() < BUSY, "{:?}", begin.elapsed());
    }

    let workers = system
        .database()
        .texts("select distinct worker_id from attempt order by worker_id")
        .await;
    assert_eq!(workers.len(), 2);
    let runs = "select count(*) from attempt group by worker_id order by count(*) limit 1";
    assert_eq!(system.database().number(runs).await, 1);
}

async fn the_real_cli_waits_in_the_queue_until_the_api_can_be_reached() {
    // A port that nobody else can have, and where nobody listens yet.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let address = socket.local_addr().unwrap();
    let system = System::builder()
        .cli(Cli::Real)
        .env("ANTHROPIC_BASE_URL", &format!("http://{address}"))
        .env("CLAUDE_RETRY_BASE_DELAY", "1")
        .start()
        .await;
    let client = system.client();

    let id = client.accepted("[[scenario:default]] Is anybody there?").await;
    let retry = client.event(&id, "retry").await;
    assert_eq!(retry["data"]["error_code"], "api_unavailable");
    let _api = Simulator::on(socket.listen(100).unwrap()).unwrap();

    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done", "{job:#}");
}

async fn the_real_cli_waits_as_long_as_the_api_says() {
    let system = System::builder().cli(Cli::Real).start().await;
    let client = system.client();
    let begin = epoch_seconds();

    let id = client.accepted("[[scenario:e429-long]] Now?").await;

    let job = client.until(&id, |job| job["hold"] == "upstream").await;
    assert_eq!(job["attempt"], 1, "{job:#}");
    assert_eq!(delays(&client, &id).await[0].1, "rate_limited");
    let due = "select run_after / 1000000 from job";
    let due = system.database().number(due).await - begin;
    assert!((3_600..3_690).contains(&due), "in {due} s");
    assert_eq!(system.run_processes(), []);
}

async fn the_real_cli_meets_a_usage_limit_once() {
    let system = System::builder()
        .cli(Cli::Real)
        // A subscription; keys of the API have no such limit.
        .env("ANTHROPIC_API_KEY", "")
        .env("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-kit")
        .start()
        .await;
    let client = system.client();
    let begin = epoch_seconds();
    let id = client.accepted("[[scenario:usage-limit]] First.").await;
    for _ in 0..20 {
        client.accepted("[[scenario:usage-limit]] Me too.").await;
    }

    let job = client.until(&id, |job| job["hold"] == "usage_limit").await;

    let asked = system.simulator().requests().len();
    let due = "select run_after / 1000000 from job where hold = 'usage_limit'";
    let due = system.database().number(due).await - begin;
    assert!((3_598..3_690).contains(&due), "in {due} s");
    assert_eq!(
        health(&client).await["workers"][0]["paused_until"],
        job["run_after"]
    );
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(system.simulator().requests().len(), asked);
    assert_eq!(system.database().number("select count(*) from attempt").await, 1);
    assert_eq!(
        system
            .database()
            .number("select cast(sum(failures) as bigint) from job")
            .await,
        0
    );
}
