//! A process that is told to stop: no new work, time for the old, and what doesn't finish is handed back unharmed.
//! (The API's part, open polls and streams, is in `gate.rs`.)

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::client::{Client, PATIENCE, at_once};
use tests::database::Db;
use tests::script::{Deaf, Script, Step, answer, steps, until_told};
use tests::system::System;
use tests::trace::assert_one_at_a_time;
use tests::{BUSY, both};

both!(
    a_draining_worker_takes_nothing_new,
    a_second_signal_hands_back_at_once,
    all_runs_of_a_worker_are_released,
    one_process_for_all_hands_back_too,
);

/// Runs for a minute at first and is quick the second time.
fn twice() -> Script {
    let first = steps([Step::Spend(0.1), Step::Sleep(60_000)]).traced("first");
    let second = answer("the second time").costing(0.1).traced("second");
    Script {
        runs: vec![first, second],
        ..Script::default()
    }
}

/// Begins it, and waits until its cost is known.
async fn begin(client: &Client) -> String {
    let id = client.play(&twice()).await;
    client.until(&id, |job| job["cost"] == 0.1).await;
    id
}

/// Handed back: it waits as if nothing had happened, but for what it has cost.
async fn assert_released(system: &System, client: &Client, id: &str) {
    let job = client.job(id).await.data(200).clone();
    assert_eq!(
        (&job["status"], &job["attempt"], &job["hold"], &job["cost"]),
        (&json!("queued"), &json!(1), &Value::Null, &json!(0.1)),
        "{job:#}"
    );
    let failures = format!("select failures from job where job_id = '{id}'");
    assert_eq!(system.database().number(&failures).await, 0);
    let endings = format!("select ending from attempt where job_id = '{id}'");
    assert_eq!(system.database().texts(&endings).await, ["released"]);
    let events = client.all_events(id).await;
    let last = &events.last().unwrap()["data"];
    assert_eq!(
        (&last["status"], &last["reason"]),
        (&json!("queued"), &json!("shutdown")),
        "{events:#?}"
    );
}

/// Another worker goes on where it was: the message of the second run isn't the script, it's in the transcript alone.
async fn assert_goes_on(system: &System, client: &Client, id: &str) {
    let job = client.finished(id).await;
    assert_eq!(
        (&job["status"], &job["attempt"], &job["cost"]),
        (&json!("done"), &json!(2), &json!(0.2)),
        "{job:#}"
    );
    assert_eq!(job["result"]["content"], "the second time");
    assert_one_at_a_time(&system.runs(id));
}

async fn a_draining_worker_takes_nothing_new(db: Db) {
    let mut system = System::builder()
        .database(db)
        .sandbox(false)
        .env("WORKER_CONCURRENCY", "2")
        .start()
        .await;
    let client = system.client();
    let running = client
        .play(&steps([Step::Say("begun".to_owned()), until_told()]).answering("finished"))
        .await;
    client.event(&running, "assistant").await;

    system.worker(0).signal(Signal::TERM);
    system.writes("the worker drains").await;
    // One of its slots is free.
    let waiting = at_once((0..3).map(|number| {
        let client = client.clone();
        async move { client.play(&answer(&number.to_string())).await }
    }))
    .await;
    system.tell_to_go_on(&running);

    assert_eq!(system.worker(0).ended(PATIENCE).await.code(), Some(0));
    let job = client.job(&running).await.data(200).clone();
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("done"), &json!(1)),
        "{job:#}"
    );
    assert_eq!(system.database().number("select count(*) from attempt").await, 1);
    system.worker(0).start().await;
    for job in at_once(waiting.iter().map(|id| client.finished(id))).await {
        assert_eq!(
            (&job["status"], &job["attempt"]),
            (&json!("done"), &json!(1)),
            "{job:#}"
        );
    }
}

async fn a_second_signal_hands_back_at_once(db: Db) {
    let mut system = System::builder()
        .database(db)
        .env("DRAIN_SECONDS", "60")
        .start()
        .await;
    let client = system.client();
    let id = begin(&client).await;

    system.worker(0).signal(Signal::TERM);
    system.writes("the worker drains").await;
    assert_eq!(client.job(&id).await.data(200)["status"], "running");
    system.worker(0).signal(Signal::TERM);

    // Long before the drain would be over.
    assert_eq!(system.worker(0).ended(BUSY).await.code(), Some(0));
    assert_eq!(system.run_processes(), []);
    assert_released(&system, &client, &id).await;
    system.worker(0).start().await;
    assert_goes_on(&system, &client, &id).await;
}

async fn all_runs_of_a_worker_are_released(db: Db) {
    let mut system = System::builder()
        .database(db)
        .sandbox(false)
        .env("DRAIN_SECONDS", "1")
        .start()
        .await;
    let client = system.client();
    let stubborn = Script {
        runs: twice()
            .runs
            .into_iter()
            .map(|run| run.deaf_to(Deaf::Interrupt).deaf_to(Deaf::Signals))
            .collect(),
        ..Script::default()
    };
    let ids = at_once((0..4).map(|number| {
        let (client, script) = (
            client.clone(),
            if number < 2 { twice() } else { stubborn.clone() },
        );
        async move {
            let id = client.play(&script).await;
            client.until(&id, |job| job["cost"] == 0.1).await;
            id
        }
    }))
    .await;

    assert_eq!(system.worker(0).stop(PATIENCE).await, Some(0));

    assert_eq!(system.run_processes(), []);
    for id in &ids {
        assert_released(&system, &client, id).await;
    }
    system.add_worker().await;
    for id in &ids {
        assert_goes_on(&system, &client, id).await;
    }
}

async fn one_process_for_all_hands_back_too(db: Db) {
    let mut system = System::builder()
        .database(db)
        .up()
        .env("DRAIN_SECONDS", "1")
        .start()
        .await;
    let client = system.client();
    let id = begin(&client).await;

    assert_eq!(system.api(0).stop(PATIENCE).await, Some(0));

    assert_eq!(system.run_processes(), []);
    system.api(0).start().await;
    let client = system.client();
    assert_goes_on(&system, &client, &id).await;
    assert_eq!(system.database().number("select failures from job").await, 0);
}
