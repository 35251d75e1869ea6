//! From submission to the end, and what a transaction holds together.

use super::{NOW, World, at, job, report, spend};
use serde_json::json;
use shared::event::{EventType, NewEvent};
use shared::id::JobId;
use shared::job::{Ending, JobStatus, NewJob, RunOptions, TokenUsage};
use shared::money::MicroUsd;
use shared::storage::{Finish, Queue, Result, RunDirective};
use tests::client::at_once;
use tests::database::Db;

tests::both!(
    a_job_is_accepted_claimed_recorded_and_done,
    a_submission_is_all_or_nothing,
    submissions_at_once_are_stored_together_and_fail_alone,
    waiting_tickets_beyond_64_are_not_pushed,
    a_million_characters_come_back
);

async fn a_job_is_accepted_claimed_recorded_and_done(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 2).await;
    let wanted = NewJob {
        options: RunOptions {
            system: Some("Be brief.".to_owned()),
            ..RunOptions::default()
        },
        metadata: json!({ "ticket": "42" }),
        ..job(&key)
    };

    let stored = world.submit(wanted.clone()).await;
    assert_eq!(stored.status, JobStatus::Queued);
    assert_eq!(
        (stored.hold.as_str(), stored.attempt, stored.last_event_seq),
        ("", 0, 1)
    );
    assert_eq!(world.tickets().await, 1);

    let lease = world.claim_job(&stored).await;
    assert_eq!((lease.job.status, lease.job.attempt), (JobStatus::Running, 1));
    assert_eq!(lease.message, wanted.message);
    assert_eq!(lease.options, wanted.options);
    assert_eq!(lease.reserved, wanted.max_cost);
    assert_eq!(lease.resume, []);
    assert!(world.claim().await.is_none(), "it was claimed already");

    let said = NewEvent::new(EventType::Assistant, json!({ "content": "Hel\u{0}lo" }));
    let signal = world
        .store
        .record(&lease, &[said], Some(&spend(70_000)), at(1))
        .await
        .unwrap();
    assert_eq!(signal, RunDirective::Continue);
    let running = world.job(stored.job_id).await;
    assert_eq!(running.cost, MicroUsd(70_000));
    assert!(running.version > lease.job.version);

    let finish = world
        .store
        .finish(&lease, &report(Ending::Done), at(2))
        .await
        .unwrap();
    assert_eq!(finish, Finish::Became(JobStatus::Done));
    let done = world.job(stored.job_id).await;
    assert_eq!(
        (done.status, done.cost, done.duration_ms),
        (JobStatus::Done, MicroUsd(120_000), 1500)
    );
    assert_eq!(done.completed_at, Some(at(2)));
    let started_at = done.started_at.unwrap();
    // A claim adds the time that it waited for its locks.
    assert!((NOW..at(20)).contains(&started_at), "{started_at}");
    let usage: TokenUsage = serde_json::from_str(&done.usage.unwrap()).unwrap();
    assert_eq!((usage.input_tokens, usage.output_tokens), (10, 3));
    let result = world.details(stored.job_id).await.result.unwrap();
    assert_eq!(result, json!({ "result": "Hello." }).to_string());
    assert_eq!(world.details(stored.job_id).await.message, wanted.message);
    assert_eq!(
        world.events(&stored).await,
        ["status", "status", "assistant", "done"]
    );
    assert_eq!(
        world
            .number("select count(*) from ledger where cost = 120000 and attempt = 1")
            .await,
        1
    );
    assert_eq!(
        world
            .number("select count(*) from attempt where ending = 'done' and turns = 2")
            .await,
        1
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_submission_is_all_or_nothing(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let tables = async || {
        let tables = ["job", "prompt", "event"].map(|table| format!("select count(*) from {table}"));
        let mut counts = vec![world.tickets().await];
        for sql in tables {
            counts.push(world.number(&sql).await);
        }
        counts.push(world.number("select top_priority from lane").await + 1);
        counts
    };
    let before = tables().await;

    let mut tx = world.store.begin().await.unwrap();
    tx.insert_job(&job(&key)).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(tables().await, before);

    let mut tx = world.store.begin().await.unwrap();
    tx.insert_job(&job(&key)).await.unwrap();
    drop(tx);
    // A writer after it: on SQLite the dropped transaction has ended by then.
    world.store.begin().await.unwrap().commit().await.unwrap();
    assert_eq!(tables().await, before);

    // The second insert of the same id fails, and takes the first with it.
    let mut tx = world.store.begin().await.unwrap();
    let twice = job(&key);
    tx.insert_job(&twice).await.unwrap();
    let error = tx.insert_job(&twice).await.unwrap_err();
    assert!(!error.is_unavailable(), "{error:?}");
    drop(tx);
    world.store.begin().await.unwrap().commit().await.unwrap();
    assert_eq!(tables().await, before);

    world.submit(job(&key)).await;
    assert_eq!(tables().await, [1, 1, 1, 1, 1]);
}

/// On SQLite those that wait for the one writer are committed together.
async fn submissions_at_once_are_stored_together_and_fail_alone(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let store = &world.store;
    let begin = async || {
        let mut tx = store.begin_submission(&key).await.unwrap();
        tx.insert_job(&job(&key)).await.unwrap();
        tx
    };
    let submit = async |new: NewJob| -> Result<()> {
        let mut tx = store.begin_submission(&key).await?;
        tx.insert_job(&new).await?;
        tx.commit().await
    };
    let (first, before) = (job(&key), store.work().transactions);
    let writer = store.begin().await.unwrap();

    let (one, refused, (), (), rest, ()) = tokio::join!(
        submit(first.clone()),
        submit(first.clone()),
        async { begin().await.rollback().await.unwrap() },
        async { drop(begin().await) },
        at_once((0..20).map(|_| submit(job(&key)))),
        // All others wait by now.
        async { writer.rollback().await.unwrap() },
    );

    let failed = [one, refused].into_iter().filter_map(Result::err);
    let failed: Vec<_> = failed.chain(rest.into_iter().filter_map(Result::err)).collect();
    assert_eq!(failed.len(), 1, "one job was stored twice: {failed:?}");
    assert!(!failed[0].is_unavailable(), "{failed:?}");
    for table in ["job", "prompt", "event"] {
        assert_eq!(
            world.number(&format!("select count(*) from {table}")).await,
            21,
            "{table}"
        );
    }
    if db == Db::Sqlite {
        let transactions = store.work().transactions - before;
        assert!(transactions <= 4, "{transactions} transactions for 21 jobs");
    }
    for _ in 0..9 {
        world.claim().await.expect("a job to claim");
    }
    assert_eq!(world.faults().await, [""; 0]);

    // Nobody who goes away leaves a transaction open, for which all others would wait.
    drop(begin().await);
    let mut tx = store.begin().await.unwrap();
    tx.insert_job(&job(&key)).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.number("select count(*) from job").await, 22);
}

async fn waiting_tickets_beyond_64_are_not_pushed(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let mut tx = world.store.begin().await.unwrap();
    tx.push_tickets(Queue::Jobs, 1000).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.tickets().await, 64);

    let stored = world.submit(job(&key)).await;

    assert_eq!(world.tickets().await, 64);
    world.claim_job(&stored).await;
}

async fn a_million_characters_come_back(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let message = "ü€😀x".repeat(250_000);

    let stored = world
        .submit(NewJob {
            job_id: JobId::new(),
            message: message.clone(),
            ..job(&key)
        })
        .await;

    let lease = world.claim_job(&stored).await;
    assert!(lease.message == message);
}
