//! One machine's clock is wrong: it decides nothing for the others.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};
use tests::client::PATIENCE;
use tests::database::Db;
use tests::script::answer;
use tests::system::{System, command};
use tests::{both, eventually, paths};

both!(
    a_worker_whose_clock_is_ahead_removes_and_starts_nothing,
    an_api_whose_clock_is_ahead_stores_the_databases_time
);

const AHEAD: i64 = 40 * 86_400;

async fn a_worker_whose_clock_is_ahead_removes_and_starts_nothing(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    let mut ended = Vec::new();
    for _ in 0..3 {
        let id = client.play(&answer("kept")).await;
        client.finished(&id).await;
        ended.push(id);
    }
    let tomorrow = (chrono::Utc::now() + Duration::from_hours(24)).to_rfc3339();
    let tomorrow = json!({ "message": "later", "run_after": tomorrow });
    let delayed = client.accepted_body(&tomorrow).await;

    let folder = paths::folder('w');
    let clock = folder.join("clock");
    fs::write(&clock, AHEAD.to_string()).unwrap();
    let (data, fake) = (system.folder().join("data"), paths::binary("fake-claude"));
    let url = system.database().url().to_owned();
    let env = [
        ("DATABASE_URL", url.as_str()),
        ("DATA_DIR", data.to_str().unwrap()),
        ("SANDBOX_ENABLED", "false"),
        ("ANTHROPIC_API_KEY", "sk-x"),
        ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
        ("CLAUDE_QUEUE_CLOCK_OFFSET_FILE", clock.to_str().unwrap()),
    ];
    let mut wrong = command("claude-queue-worker", &[], &env).spawn().unwrap();
    let seen = async || {
        let health = client.get("/api/v1/health").await.json;
        let workers = health["workers"].as_array().unwrap().clone();
        let worker: Option<Value> = workers
            .into_iter()
            .find(|worker| worker["clock_ahead_seconds"].as_i64() > Some(AHEAD - 60));
        worker.map(|worker| (health["status"].clone(), worker["last_seen_at"].clone()))
    };
    let (status, first) = eventually(PATIENCE, "the worker in the health", &seen).await;
    assert_eq!(status, "degraded");
    // It has swept twice, and looked for old data at least once.
    eventually(PATIENCE, "two more signs of life", async || {
        let (_, at) = seen().await?;
        let later = |seconds: f64| {
            let parse = |at: &Value| chrono_seconds(at.as_str().unwrap());
            parse(&at) - parse(&first) >= seconds
        };
        later(9.0).then_some(())
    })
    .await;
    wrong.kill().await.unwrap();

    for id in &ended {
        assert_eq!(client.job(id).await.data(200)["result"]["content"], "kept");
    }
    assert_eq!(client.job(&delayed).await.data(200)["status"], "queued");
}

/// The seconds of the day in an RFC 3339 time.
fn chrono_seconds(text: &str) -> f64 {
    let time = shared::clock::Timestamp::parse(text).unwrap();
    #[expect(clippy::cast_precision_loss, reason = "seconds are enough")]
    let seconds = time.0 as f64 / 1e6;
    seconds
}

async fn an_api_whose_clock_is_ahead_stores_the_databases_time(db: Db) {
    let folder = paths::folder('w');
    let clock = folder.join("clock");
    fs::write(&clock, AHEAD.to_string()).unwrap();
    let system = System::builder()
        .database(db)
        .env("CLAUDE_QUEUE_CLOCK_OFFSET_FILE", clock.to_str().unwrap())
        .workers(0)
        .start()
        .await;
    let client = system.client();

    let id = client.accepted("hello").await;

    let created = client.job(&id).await.data(200)["created_at"].clone();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let age = now.unwrap_or(Duration::ZERO).as_secs_f64() - chrono_seconds(created.as_str().unwrap());
    assert!(age.abs() < 60.0, "{created}");
    let health = client.get("/api/v1/health").await.json;
    assert!(
        health["clock_ahead_seconds"].as_i64() > Some(AHEAD - 60),
        "{health:#}"
    );
}
