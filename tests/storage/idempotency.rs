//! A request that is made twice makes one job.

use super::{NOW, World, at, job};
use shared::clock::Timestamp;
use shared::id::KeyId;
use shared::storage::{IdempotencyOutcome, IdempotencyRecord, Store};
use tests::database::Db;

tests::both!(
    the_second_request_gets_the_answer_of_the_first,
    two_requests_at_once_make_one_job,
    a_request_that_was_rolled_back_was_never_made,
    an_expired_key_is_free_again
);

fn record(key_id: &KeyId, name: &str, created_at: Timestamp) -> IdempotencyRecord {
    IdempotencyRecord {
        key_id: key_id.clone(),
        route: "POST /api/v1/jobs".to_owned(),
        idempotency_key: name.to_owned(),
        fingerprint: "f00d".to_owned(),
        job_id: None,
        status: 202,
        body: "{}".to_owned(),
        created_at,
    }
}

/// What a submission does: gives whether it was the first.
async fn submit(store: &Store, record: &IdempotencyRecord, expired_before: Timestamp) -> bool {
    let wanted = job(&record.key_id);
    let record = IdempotencyRecord {
        job_id: Some(wanted.job_id),
        ..record.clone()
    };
    let mut tx = store.begin().await.unwrap();
    tx.insert_job(&wanted).await.unwrap();
    let first = tx.remember(&record, expired_before).await.unwrap() == IdempotencyOutcome::New;
    if first {
        tx.commit().await.unwrap();
    } else {
        tx.rollback().await.unwrap();
    }
    first
}

async fn the_second_request_gets_the_answer_of_the_first(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 1).await);
    let first = record(&a, "once", NOW);

    assert!(submit(&world.store, &first, at(0)).await);
    assert!(!submit(&world.store, &first, at(0)).await);
    assert!(
        submit(&world.store, &record(&b, "once", NOW), at(0)).await,
        "another owner's"
    );
    assert!(
        submit(&world.store, &record(&a, "twice", NOW), at(0)).await,
        "another key"
    );

    assert_eq!(world.number("select count(*) from job").await, 3);
    let kept = world
        .store
        .remembered(&a, &first.route, "once", NOW)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((kept.body, kept.status), ("{}".to_owned(), 202));
    assert!(world.store.job(kept.job_id.unwrap()).await.unwrap().is_some());
    let mut tx = world.store.begin().await.unwrap();
    let IdempotencyOutcome::Replay(before) = tx.remember(&first, at(0)).await.unwrap() else {
        panic!("it was remembered");
    };
    assert_eq!(before.job_id, kept.job_id);
}

async fn two_requests_at_once_make_one_job(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let other = world.other().await;
    for round in 0..10 {
        let tries: Vec<_> = [&world.store, &other, &world.store, &other]
            .into_iter()
            .map(|store| {
                let (store, record) = (store.clone(), record(&key, &format!("round {round}"), NOW));
                tokio::spawn(async move { submit(&store, &record, at(0)).await })
            })
            .collect();
        let mut first = 0;
        for tried in tries {
            first += i32::from(tried.await.unwrap());
        }
        assert_eq!(first, 1);
    }
    assert_eq!(world.number("select count(*) from job").await, 10);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_request_that_was_rolled_back_was_never_made(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let wanted = record(&key, "once", NOW);
    let mut tx = world.store.begin().await.unwrap();
    tx.remember(&wanted, at(0)).await.unwrap();
    tx.rollback().await.unwrap();

    assert_eq!(
        world
            .store
            .remembered(&key, &wanted.route, "once", NOW)
            .await
            .unwrap(),
        None
    );
    assert!(submit(&world.store, &wanted, at(0)).await);
}

async fn an_expired_key_is_free_again(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    assert!(submit(&world.store, &record(&key, "once", NOW), at(0)).await);

    let again = record(&key, "once", at(100));
    assert!(!submit(&world.store, &again, NOW).await, "as old as may be");
    assert_eq!(
        world
            .store
            .remembered(&key, &again.route, "once", at(1))
            .await
            .unwrap(),
        None
    );
    assert!(submit(&world.store, &again, at(1)).await);

    assert_eq!(world.store.forget_idempotency(at(100)).await.unwrap(), 0);
    assert_eq!(world.store.forget_idempotency(at(101)).await.unwrap(), 1);
    assert_eq!(world.number("select count(*) from job").await, 2);
}
