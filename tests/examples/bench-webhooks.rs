//! `make bench`: how many deliveries a second one process sends, how long after the end of a job its receiver knows of it,
//! and what a receiver that never answers does to another one.

#![expect(clippy::print_stdout, reason = "the table is the point")]
#![expect(clippy::unwrap_used, reason = "a benchmark that can't measure stops")]

use chrono::{DateTime, Utc};
use serde_json::json;
use shared::id::DeliveryId;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tests::client::{Client, PATIENCE};
use tests::database::Db;
use tests::receiver::{Reaction, Received, Receiver};
use tests::system::System;

/// Deliveries that wait when the process starts.
const WAITING: usize = 10_000;
/// Jobs that end, one after the other.
const JOBS: usize = 200;
/// Deliveries to a receiver that never answers.
const DEAD: usize = 1_000;

#[tokio::main]
async fn main() {
    println!("\n# Webhooks: one process that delivers to receivers on this machine\n");
    println!("| figure | SQLite | PostgreSQL |");
    println!("|---|---|---|");
    let (sqlite, postgres) = (measured(Db::Sqlite).await, measured(Db::Postgres).await);
    for ((name, sqlite), (_, postgres)) in sqlite.iter().zip(&postgres) {
        println!("| {name} | {sqlite} | {postgres} |");
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("\nThe load was {load}");
}

async fn measured(db: Db) -> Vec<(&'static str, String)> {
    let delays: Arc<Mutex<Vec<f64>>> = Arc::default();
    let noted = delays.clone();
    let note = move |_: usize, request: &Received| {
        if request.path == "/timed" {
            let ended = request.json()["job"]["completed_at"].as_str().unwrap().to_owned();
            let ended: DateTime<Utc> = ended.parse().unwrap();
            let delay = (Utc::now() - ended).as_seconds_f64() * 1_000.0;
            noted.lock().unwrap().push(delay);
        }
        Reaction::Status(200)
    };
    let builder = System::builder().database(db).workers(0).sandbox(false);
    let builder = builder
        .env("LOG_LEVEL", "warn")
        .env("WEBHOOK_ALLOW_HTTP", "true")
        .env("WEBHOOK_ALLOWED_SUBNETS", "127.0.0.0/8");
    let (mut system, receiver, dead) = tokio::join!(
        builder.start(),
        Receiver::with(note),
        Receiver::with(|_, _| Reaction::Silent)
    );
    let client = system.client();
    let job = end(&client, &receiver.url("/first")).await;
    fill(&system, &job, &receiver.url("/many"), WAITING).await;

    let worker = system.add_worker_with(&[("WORKER_QUEUES", "webhooks")]).await;
    receiver.wait(1, PATIENCE).await;
    let (began, before) = (Instant::now(), receiver.count());
    while receiver.count() < WAITING {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let sent = u32::try_from(receiver.count() - before).unwrap();
    let rate = f64::from(sent) / began.elapsed().as_secs_f64();

    let alone = timed(&client, &receiver, &delays).await;
    fill(&system, &job, &dead.url("/"), DEAD).await;
    // The process hears of them with the next commit.
    end(&client, &receiver.url("/first")).await;
    dead.wait(10, PATIENCE).await;
    let beside = timed(&client, &receiver, &delays).await;
    system.worker(worker).kill();
    vec![
        ("deliveries a second", format!("{rate:.0}")),
        (
            "end of a job to its receiver, p50 ms",
            format!("{:.1}", alone[JOBS / 2]),
        ),
        ("the same, p99 ms", format!("{:.1}", alone[JOBS * 99 / 100])),
        (
            "beside 1,000 to a dead receiver, p50 ms",
            format!("{:.1}", beside[JOBS / 2]),
        ),
        ("the same, p99 ms", format!("{:.1}", beside[JOBS * 99 / 100])),
    ]
}

/// A job that ends without a run.
async fn end(client: &Client, url: &str) -> String {
    let later = Utc::now() + chrono::Duration::hours(1);
    let body = json!({ "message": "later", "webhook_url": url, "run_after": later.to_rfc3339() });
    let job = client.accepted_body(&body).await;
    assert_eq!(client.cancel(&job).await.status, 200);
    job
}

/// How long after each of some ends the receiver knew, in milliseconds, sorted.
async fn timed(client: &Client, receiver: &Receiver, delays: &Mutex<Vec<f64>>) -> Vec<f64> {
    delays.lock().unwrap().clear();
    for number in 0..JOBS {
        end(client, &receiver.url("/timed")).await;
        while delays.lock().unwrap().len() <= number {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let mut delays = delays.lock().unwrap().clone();
    delays.sort_by(f64::total_cmp);
    delays
}

/// Deliveries about a job that wait, as if nobody had been there to send them.
async fn fill(system: &System, job: &str, url: &str, count: usize) {
    let host = url.trim_start_matches("http://").split('/').next().unwrap();
    for from in (0..count).step_by(500) {
        let rows: Vec<_> = (from..count.min(from + 500))
            .map(|_| {
                let id = DeliveryId::new();
                format!("('{id}', (select key_id from job where job_id = '{job}'), '{job}', 'job.cancelled', '{url}', '{host}', 1, 1)")
            })
            .collect();
        let insert = format!(
            "insert into delivery (delivery_id, key_id, job_id, event_type, url, host, due_at, created_at) values {}",
            rows.join(", ")
        );
        system.database().execute(&insert).await;
    }
}
