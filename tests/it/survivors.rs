//! A run that does everything to live on: deaf to interrupts, signals and its input, frozen, with a daemon that left
//! its session and takes no SIGTERM. On every path that ends a run none of its processes is left a few seconds later,
//! and what it has cost is kept.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::client::{Client, PATIENCE};
use tests::database::Db;
use tests::processes::{self, Found};
use tests::script::{Deaf, Step, daemon, steps};
use tests::system::System;
use tests::{BUSY, both, eventually};

both!(
    a_cancel_a_deadline_and_a_killed_guard_leave_nothing,
    a_killed_worker_leaves_nothing,
    a_stopped_worker_leaves_nothing,
    a_worker_that_drains_leaves_nothing,
    what_a_worker_and_its_guards_left_ends_at_the_next_start,
);

/// Five seconds are the grace of a run that is asked to stop; the rest is for a machine that runs other tests.
const LIMIT: Duration = BUSY;

/// Short, and longer than a busy machine hesitates.
const LEASE: Duration = Duration::from_secs(4);

/// A system whose leases are short.
async fn start(db: Db, sandbox: bool) -> System {
    System::builder()
        .database(db)
        .sandbox(sandbox)
        .env("LEASE_SECONDS", &LEASE.as_secs().to_string())
        .start()
        .await
}

/// Submits the stubborn run, with more members of the job, and waits until its daemon is there and its cost is known.
async fn begin(client: &Client, members: Value) -> String {
    let script = steps([daemon(), Step::Spend(0.2496), Step::Freeze])
        .deaf_to(Deaf::Interrupt)
        .deaf_to(Deaf::Signals)
        .deaf_to(Deaf::Stdin)
        .deaf_to(Deaf::End);
    let mut body = members;
    body["message"] = json!(script.prompt());
    let id = client.accepted_body(&body).await;
    client.until(&id, |job| job["cost"] == 0.25).await;
    id
}

/// The processes of one job's runs, by the mark that they carry.
fn of_job(system: &System, id: &str) -> Vec<Found> {
    let marked = |found: &Found| {
        let environment = std::fs::read(format!("/proc/{}/environ", found.pid)).unwrap_or_default();
        environment
            .windows(id.len())
            .any(|window| window == id.as_bytes())
    };
    system.run_processes().into_iter().filter(marked).collect()
}

/// Waits for the end of all processes of a job, which must come within the limit from `since` on.
async fn gone(system: &System, id: &str, since: Instant, limit: Duration) {
    let mut left = of_job(system, id);
    while !left.is_empty() {
        assert!(since.elapsed() < limit, "after {limit:?} these live: {left:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
        left = of_job(system, id);
    }
}

fn assert_ended(job: &Value, status: &str, code: Option<&str>) {
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!(status), &json!(code)),
        "{job:#}"
    );
    assert_eq!(job["cost"], 0.25, "{job:#}");
}

async fn a_cancel_a_deadline_and_a_killed_guard_leave_nothing(db: Db) {
    tokio::join!(end_three_ways(db, true), end_three_ways(db, false));
}

/// Long enough for six runs to have begun and spent.
const TIMEOUT: Duration = Duration::from_secs(10);

async fn end_three_ways(db: Db, sandbox: bool) {
    let system = System::builder().database(db).sandbox(sandbox).start().await;
    let client = system.client();
    let (cancelled, timed_out, unguarded) = tokio::join!(
        begin(&client, json!({})),
        begin(&client, json!({ "timeout_seconds": TIMEOUT.as_secs() })),
        begin(&client, json!({ "max_attempts": 1 })),
    );
    for id in [&cancelled, &unguarded] {
        // The guard, the CLI, the daemon; the sandbox's own ones.
        assert!(of_job(&system, id).len() >= 3, "{:#?}", of_job(&system, id));
    }
    let guard = of_job(&system, &unguarded)
        .into_iter()
        .find(|found| found.command.starts_with("claude-queue-guard"))
        .expect("the guard of the run");

    let since = Instant::now();
    processes::signal(guard.pid, Signal::KILL);
    client.cancel(&cancelled).await.data(202);

    gone(&system, &unguarded, since, LIMIT).await;
    gone(&system, &cancelled, since, LIMIT).await;
    assert_ended(&client.finished(&cancelled).await, "cancelled", None);
    assert_ended(
        &client.finished(&unguarded).await,
        "failed",
        Some("claude_killed"),
    );
    let job = client.finished(&timed_out).await;
    gone(&system, &timed_out, since, TIMEOUT + LIMIT).await;
    assert_ended(&job, "failed", Some("timeout"));
    assert_eq!(system.run_processes(), []);
}

async fn a_killed_worker_leaves_nothing(db: Db) {
    tokio::join!(lose_the_worker(db, true), lose_the_worker(db, false));
}

async fn lose_the_worker(db: Db, sandbox: bool) {
    let mut system = start(db, sandbox).await;
    let client = system.client();
    let id = begin(&client, json!({ "on_worker_lost": "fail" })).await;

    let since = Instant::now();
    system.worker(0).kill();

    gone(&system, &id, since, LIMIT).await;
    system.worker(0).start().await;
    assert_ended(&client.finished(&id).await, "failed", Some("worker_lost"));
}

async fn a_stopped_worker_leaves_nothing(db: Db) {
    tokio::join!(stop_the_worker(db, true), stop_the_worker(db, false));
}

async fn stop_the_worker(db: Db, sandbox: bool) {
    let mut system = start(db, sandbox).await;
    let client = system.client();
    let id = begin(&client, json!({ "on_worker_lost": "fail" })).await;

    let since = Instant::now();
    system.pause_worker(0).await;

    // Nobody but the guard can do it, when the lease has run out.
    gone(&system, &id, since, LEASE + LIMIT).await;
    let took = since.elapsed();
    // The last renewal may be a third of a lease old when the worker stops, and more when the machine is busy.
    assert!(
        took > Duration::from_secs(1),
        "ended under a lease that was held: {took:?}"
    );
    system.add_worker().await;
    let job = client.finished(&id).await;
    assert_ended(&job, "failed", Some("worker_lost"));
    system.worker(0).resume();
    // It has nothing more to say about the job.
    let later = client.play(&steps([])).await;
    client.finished(&later).await;
    assert_eq!(client.job(&id).await.data(200), &job);
}

async fn a_worker_that_drains_leaves_nothing(db: Db) {
    tokio::join!(drain_the_worker(db, true), drain_the_worker(db, false));
}

async fn drain_the_worker(db: Db, sandbox: bool) {
    let mut system = System::builder()
        .database(db)
        .sandbox(sandbox)
        .env("DRAIN_SECONDS", "1")
        .start()
        .await;
    let client = system.client();
    let id = begin(&client, json!({})).await;

    let since = Instant::now();
    system.worker(0).signal(Signal::TERM);

    gone(&system, &id, since, Duration::from_secs(1) + LIMIT).await;
    // Then the database hears of it.
    assert_eq!(system.worker(0).ended(PATIENCE).await.code(), Some(0));
    let job = client.job(&id).await.data(200).clone();
    assert_ended(&job, "queued", None);
    assert_eq!(system.database().number("select failures from job").await, 0);
    client.cancel(&id).await.data(200);
}

async fn what_a_worker_and_its_guards_left_ends_at_the_next_start(db: Db) {
    // In a sandbox the kernel ends everything with the guard.
    let mut system = start(db, false).await;
    let client = system.client();
    let id = begin(&client, json!({ "on_worker_lost": "fail" })).await;
    let guards: Vec<i32> = of_job(&system, &id)
        .into_iter()
        .filter(|found| found.command.starts_with("claude-queue-guard"))
        .map(|found| found.pid)
        .collect();
    assert_eq!(guards.len(), 1);

    // (A worker of another test that starts just now may be the one who ends it.)
    // Stopped first, so that neither notices the end of the other.
    processes::signal(guards[0], Signal::STOP);
    system.worker(0).pause();
    processes::signal(guards[0], Signal::KILL);
    system.worker(0).kill();
    eventually(LIMIT, "the end of the guard", async || {
        (!processes::is_alive(guards[0])).then_some(())
    })
    .await;

    system.worker(0).start().await;

    assert_eq!(of_job(&system, &id), []);
    assert_ended(&client.finished(&id).await, "failed", Some("worker_lost"));
}
