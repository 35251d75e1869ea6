//! The Messages API is out, refuses the credential, or has a limit: jobs wait, none fails, and only what the gateway
//! saw counts. `OUTAGE_SECONDS=60` plays longer outages than the suite has time for.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use simulator::{HttpError, Step as Answer};
use tests::client::{Client, PATIENCE, at_once};
use tests::database::Db;
use tests::script::{Script, Step, answer, steps};
use tests::system::{Cli, KEYS, System, run};
use tests::{both, eventually, once};

both!(
    thirty_jobs_outlive_an_overload,
    thirty_jobs_outlive_a_failing_api,
    thirty_jobs_outlive_a_refused_connection,
    thirty_jobs_outlive_a_rate_limit,
    thirty_jobs_outlive_a_refused_credential,
    what_a_run_prints_concerns_no_other_job,
    a_wrong_address_is_the_operators_problem,
    a_person_lifts_the_pauses_of_all_workers,
    cancelling_the_job_that_met_a_limit_lifts_nothing,
    a_job_waits_for_the_api_no_longer_than_it_may,
);
once!(
    the_address_may_end_like_the_apis_own_paths,
    the_real_cli_outlives_an_overload,
);

/// How long the API is out: 8 s, or `OUTAGE_SECONDS`.
fn out_for() -> Duration {
    let seconds = std::env::var("OUTAGE_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|seconds| seconds.parse().ok()).unwrap_or(8))
}

/// A run that needs the API and then is done.
fn asks() -> Script {
    steps([Step::Request("default".to_owned())]).answering("served")
}

fn error(status: u16, kind: &str, message: &str) -> Answer {
    Answer {
        http_error: Some(HttpError {
            status,
            kind: kind.to_owned(),
            message: message.to_owned(),
            html: None,
        }),
        ..Answer::default()
    }
}

fn micros() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_micros()).unwrap()
}

async fn health(client: &Client) -> Value {
    client.get("/api/v1/health").await.json
}

async fn paused(client: &Client) -> Value {
    eventually(PATIENCE, "a pause", async || {
        let health = health(client).await;
        (health["checks"]["workers"] == "paused").then_some(health)
    })
    .await
}

async fn well(client: &Client) {
    eventually(PATIENCE, "workers without a pause", async || {
        let health = health(client).await;
        (health["checks"]["workers"] == "ok").then_some(())
    })
    .await;
}

async fn start(db: Db) -> System {
    System::builder().database(db).sandbox(false).start().await
}

/// Thirty jobs are submitted while the API is out; all are done afterwards.
async fn outlive(mut system: System, outage: Option<Answer>, code: &str) {
    let client = system.client();
    let mut address = None;
    if outage.is_some() {
        system.simulator().set_outage(outage);
    } else {
        address = Some(system.stop_simulator());
    }
    let prompt = asks().prompt();
    let ids = at_once((0..30).map(|_| client.accepted(&prompt))).await;
    let paused = paused(&client).await;
    let reason = paused["workers"][0]["pause_reason"].as_str().unwrap().to_owned();
    assert!(reason.ends_with('.'), "{reason}");
    let held = eventually(PATIENCE, "a job that waits", async || {
        let jobs = client.jobs("status=queued&limit=30&view=full").await;
        let jobs = jobs.data(200).as_array().unwrap().clone();
        jobs.into_iter().find(|job| job["hold"] == "upstream")
    })
    .await;
    assert!(held["hold_reason"].is_string(), "{held:#}");
    tokio::time::sleep(out_for()).await;

    let returned = micros();
    if let Some(address) = address {
        system.restart_simulator(&address).await;
    } else {
        system.simulator().set_outage(None);
    }

    for id in &ids {
        let job = client.finished(id).await;
        assert_eq!(
            (&job["status"], &job["result"]["content"]),
            (&json!("done"), &json!("served")),
            "{job:#}"
        );
    }
    let database = system.database();
    let first = "select min(started_at) from attempt where ending = 'done'";
    let first = database.number(first).await - returned;
    // Within two seconds on a machine that isn't busy with other cases.
    assert!(
        first <= 10_000_000,
        "the first run began {first} µs after the API's return"
    );
    assert_eq!(
        database
            .number("select count(*) from job where failures > 0 or wait_since is not null")
            .await,
        0
    );
    let codes = database
        .texts("select distinct error_code from attempt where error_code is not null")
        .await;
    assert_eq!(codes, [code]);
    // One at a time, so few are tried in vain.
    let tries = database
        .number("select count(*) from attempt where ending <> 'done'")
        .await;
    assert!((1..=16).contains(&tries), "{tries}");
    said(&format!(
        "{code}: {:?} out, 30 jobs done, none failed, {tries} tried in vain, the first run began {} ms after the return",
        out_for(),
        first / 1_000
    ));
    well(&client).await;
}

#[expect(clippy::print_stderr, reason = "the figures of a long outage are its result")]
fn said(what: &str) {
    eprintln!("{what}");
}

async fn thirty_jobs_outlive_an_overload(db: Db) {
    let overloaded = Some(error(529, "overloaded_error", "Overloaded"));
    outlive(start(db).await, overloaded, "overloaded").await;
}

async fn thirty_jobs_outlive_a_failing_api(db: Db) {
    let failing = Some(error(503, "api_error", "Service unavailable"));
    outlive(start(db).await, failing, "api_unavailable").await;
}

async fn thirty_jobs_outlive_a_refused_connection(db: Db) {
    outlive(start(db).await, None, "api_unavailable").await;
}

async fn thirty_jobs_outlive_a_rate_limit(db: Db) {
    let limited = Some(error(429, "rate_limit_error", "Too many requests."));
    outlive(start(db).await, limited, "rate_limited").await;
}

async fn thirty_jobs_outlive_a_refused_credential(db: Db) {
    let refused = Some(error(401, "authentication_error", "invalid x-api-key"));
    outlive(start(db).await, refused, "auth_error").await;
}

async fn what_a_run_prints_concerns_no_other_job(db: Db) {
    let system = start(db).await;
    let client = system.client();
    let limit = micros() / 1_000_000 + 8 * 86_400;
    let refused = Step::ApiError {
        status: Some(401),
        error: "authentication_failed".to_owned(),
        text: "Invalid API key · Fix external API key".to_owned(),
    };
    let once = |step: Step| json!({ "message": steps([step]).prompt(), "max_attempts": 1 });

    let forged = client.accepted_body(&once(Step::UsageLimit(limit))).await;
    let job = client.finished(&forged).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("usage_limit")),
        "its own end, and no wait of eight days"
    );
    for _ in 0..3 {
        let id = client.accepted_body(&once(refused.clone())).await;
        assert_eq!(client.finished(&id).await["error_code"], "auth_error");
    }

    let health = health(&client).await;
    assert_eq!(health["checks"]["workers"], "ok", "{health:#}");
    assert_eq!(health["workers"][0]["paused_until"], Value::Null, "{health:#}");
    let next = client.play(&asks()).await;
    let job = client.finished(&next).await;
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("done"), &json!(1)),
        "{job:#}"
    );
}

async fn a_wrong_address_is_the_operators_problem(db: Db) {
    let mut system = System::builder()
        .database(db)
        .sandbox(false)
        .workers(0)
        .start()
        .await;
    let client = system.client();
    let url = format!("{}/wrong", system.simulator().url());
    let index = system.add_worker_with(&[("ANTHROPIC_BASE_URL", &url)]).await;
    system.writes("didn't answer a first question well").await;
    let first = eventually(PATIENCE, "what came back", async || {
        let health = health(&client).await;
        health["workers"][0]["upstream"].as_str().map(str::to_owned)
    })
    .await;
    assert!(
        first.contains("404") && first.contains("ANTHROPIC_BASE_URL"),
        "{first}"
    );

    let id = client.play(&asks()).await;

    let job = client.until(&id, |job| job["hold"] == "upstream").await;
    assert_eq!(job["error"], Value::Null);
    let reason = job["hold_reason"].as_str().unwrap();
    assert!(reason.contains("isn't the Messages API"), "{reason}");
    assert_eq!(
        paused(&client).await["workers"][0]["pause_reason"],
        reason,
        "the same in health"
    );

    // A model that there isn't is the submitter's.
    system.worker(index).kill();
    system.add_worker().await;
    let model = steps([Step::Request("e404".to_owned())]);
    let job = client.finished(&client.play(&model).await).await;
    assert_eq!(job["error_code"], "model_not_found", "{job:#}");
    assert_eq!(client.finished(&id).await["status"], "done");
    well(&client).await;
}

async fn a_person_lifts_the_pauses_of_all_workers(db: Db) {
    let mut system = System::builder()
        .database(db)
        .sandbox(false)
        .workers(2)
        .start()
        .await;
    let client = system.client();
    let limited = || steps([Step::Request("usage-limit".to_owned())]);
    let mut held = Vec::new();
    // A worker that has met the limit takes no other job.
    for _ in 0..2 {
        let id = client.play(&limited()).await;
        client.until(&id, |job| job["hold"] == "usage_limit").await;
        held.push(id);
    }
    paused(&client).await;
    let waits = client.play(&asks()).await;
    // What they wait for is over.
    system
        .simulator()
        .put_scenario("usage-limit", simulator::builtin()["default"].clone());

    let refused = client.post("/api/v1/queue/resume", &json!({})).await;
    refused.assert_problem(403, "insufficient-scope");
    let admin = client.with_key(KEYS[2]);
    let resumed = admin.post("/api/v1/queue/resume", &json!({})).await;

    assert_eq!(
        resumed.data(200)["released_jobs"].as_u64(),
        Some(held.len() as u64),
        "{}",
        resumed.text
    );
    for id in held.iter().chain([&waits]) {
        assert_eq!(client.finished(id).await["status"], "done");
    }
    well(&client).await;
    let audit = admin.get("/api/v1/audit?kind=admin").await;
    assert_eq!(audit.data(200)[0]["action"], "queue.resume");

    // The same from the command line.
    system
        .simulator()
        .put_scenario("usage-limit", simulator::builtin()["usage-limit"].clone());
    system.worker(1).kill();
    let id = client.play(&limited()).await;
    client.until(&id, |job| job["hold"] == "usage_limit").await;
    system
        .simulator()
        .put_scenario("usage-limit", simulator::builtin()["default"].clone());
    let env = [
        ("CLAUDE_QUEUE_URL", client.base()),
        ("CLAUDE_QUEUE_API_KEY", KEYS[2]),
    ];
    let said = run("claude-queue", &["resume"], &env).await;
    assert_eq!(
        (said.code, said.stdout.as_str()),
        (Some(0), "resumed; 1 waiting jobs were released\n"),
        "{said:#?}"
    );
    assert_eq!(client.finished(&id).await["status"], "done");
}

async fn cancelling_the_job_that_met_a_limit_lifts_nothing(db: Db) {
    let system = start(db).await;
    let client = system.client();
    let id = client
        .play(&steps([Step::Request("usage-limit".to_owned())]))
        .await;
    client.until(&id, |job| job["hold"] == "usage_limit").await;
    paused(&client).await;

    client.cancel(&id).await.data(200);
    let next = client.play(&answer("next")).await;

    let workers = paused(&client).await;
    let reason = workers["workers"][0]["pause_reason"].as_str().unwrap();
    assert!(reason.contains("limit is reset"), "{reason}");
    assert_eq!(client.job(&next).await.data(200)["attempt"], 0);
}

async fn a_job_waits_for_the_api_no_longer_than_it_may(db: Db) {
    let system = System::builder()
        .database(db)
        .sandbox(false)
        .stepped_clock()
        .env("JOB_WAIT_MAX_HOURS", "5")
        .start()
        .await;
    let client = system.client();
    let id = client
        .play(&steps([Step::Request("usage-limit-week".to_owned())]))
        .await;
    client.until(&id, |job| job["hold"] == "usage_limit").await;
    let never_tried = client.play(&answer("later")).await;

    system.step_clock(5 * 3600 + 60);

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"], &job["attempt"]),
        (&json!("failed"), &json!("usage_limit"), &json!(1)),
        "{job:#}"
    );
    let error = job["error"].as_str().unwrap();
    assert!(error.contains("waited 5 h"), "{error}");
    assert_eq!(client.job(&never_tried).await.data(200)["status"], "queued");
}

async fn the_address_may_end_like_the_apis_own_paths() {
    for end in ["/", "/v1", "/v1/", "/v1/messages", "/v1/messages//"] {
        let mut system = System::builder().sandbox(false).workers(0).start().await;
        let url = format!("{}{end}", system.simulator().url());
        system.add_worker_with(&[("ANTHROPIC_BASE_URL", &url)]).await;
        let client = system.client();

        let job = client.finished(&client.play(&asks()).await).await;

        assert_eq!(job["status"], "done", "{end}: {job:#}");
    }
}

async fn the_real_cli_outlives_an_overload() {
    let system = System::builder().cli(Cli::Real).start().await;
    let client = system.client();
    system
        .simulator()
        .set_outage(Some(error(529, "overloaded_error", "Overloaded")));
    let ids =
        at_once((0..3).map(|number| client.accepted(format!("[[scenario:default]] {number}").leak()))).await;
    paused(&client).await;
    let asked = || {
        let requests = system.simulator().requests();
        requests
            .iter()
            .filter(|request| request.path == "/v1/models")
            .count()
    };
    let before = asked();
    eventually(PATIENCE, "five questions", async || {
        (asked() >= before + 5).then_some(())
    })
    .await;

    let returned = micros();
    system.simulator().set_outage(None);

    for id in &ids {
        assert_eq!(client.finished(id).await["status"], "done");
    }
    let first = "select min(started_at) from attempt where ending = 'done'";
    let first = system.database().number(first).await - returned;
    assert!(first <= 10_000_000, "{first} µs");
}
