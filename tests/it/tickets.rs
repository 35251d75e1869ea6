//! Tickets only wake a slot: lost, damaged and superfluous ones cost a moment at most.

use std::time::{Duration, Instant};

use serde_json::json;
use tests::client::at_once;
use tests::database::{Database, Db};
use tests::script::{Step, answer, steps};
use tests::system::System;
use tests::{both, eventually};

both!(
    lost_tickets_cost_no_job,
    damaged_tickets_cost_no_job,
    tickets_without_jobs_harm_nothing,
    tickets_are_bounded_and_cleared_away,
);

/// The queue library's own table.
fn table(database: &Database) -> &'static str {
    match database.db() {
        Db::Sqlite => "Jobs",
        Db::Postgres => "apalis.jobs",
    }
}

async fn lost_tickets_cost_no_job(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let ids = at_once([1, 2, 3].map(|number| {
        let client = client.clone();
        async move { client.play(&answer(&format!("{number}"))).await }
    }))
    .await;
    let database = system.database();
    assert_eq!(
        database
            .execute(&format!("delete from {}", table(database)))
            .await,
        3
    );
    system.add_worker().await;
    let begin = Instant::now();

    at_once(ids.iter().map(|id| client.finished(id))).await;
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());

    // While a worker is idle too: whatever it was told is gone when it looks.
    let delete = format!("delete from {}", table(system.database()));
    for number in 0..5 {
        let id = client.play(&answer(&format!("{number}"))).await;
        system.database().execute(&delete).await;
        assert_eq!(client.finished(&id).await["status"], "done");
    }
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

async fn damaged_tickets_cost_no_job(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let first = client.play(&answer("first")).await;
    let second = client.play(&answer("second")).await;
    let garbage = match db {
        Db::Sqlite => "update Jobs set job = x'00ff7b'",
        Db::Postgres => "update apalis.jobs set job = '\\x00ff7b'::bytea",
    };
    assert_eq!(system.database().execute(garbage).await, 2);

    system.add_worker().await;

    assert_eq!(client.finished(&first).await["result"]["content"], "first");
    assert_eq!(client.finished(&second).await["result"]["content"], "second");
}

async fn tickets_without_jobs_harm_nothing(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    for _ in 0..10 {
        let id = client.accepted("never").await;
        client.cancel(&id).await.data(200);
    }

    system.add_worker().await;

    let id = client.play(&answer("the only one")).await;
    assert_eq!(client.finished(&id).await["result"]["content"], "the only one");
    assert_eq!(system.database().number("select count(*) from attempt").await, 1);
}

async fn tickets_are_bounded_and_cleared_away(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let (mut ids, body) = (Vec::new(), json!({ "message": "never" }));
    for _ in 0..11 {
        ids.extend(at_once((0..100).map(|_| client.accepted_body(&body))).await);
    }
    let tickets = format!("select count(*) from {}", table(system.database()));
    let waiting = system.database().number(&tickets).await;
    assert!(
        (900..=1_064).contains(&waiting),
        "{waiting} tickets wait for 1,100 jobs"
    );
    for chunk in ids.chunks(100) {
        at_once(chunk.iter().map(|id| client.cancel(id))).await;
    }

    system.add_worker().await;
    let id = client.play(&steps([Step::Sleep(10)])).await;
    client.finished(&id).await;

    eventually(
        Duration::from_secs(30),
        "few rows in the queue's table",
        async || (system.database().number(&tickets).await < 50).then_some(()),
    )
    .await;
}
