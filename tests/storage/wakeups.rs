//! A commit of one process wakes another.

use super::{NOW, World, job, open};
use serde_json::json;
use shared::event::{EventType, NewEvent};
use shared::job::{Ending, Lease};
use shared::storage::{JobWakeup, Store, Wakeups};
use std::time::{Duration, Instant};
use tests::database::Db;
use tests::proxy::Proxy;
use tokio_util::sync::CancellationToken;

tests::both!(
    a_commit_wakes_who_waits_in_another_process,
    who_waits_for_another_job_is_not_woken,
    listening_outlives_its_connection
);
tests::once!(a_listener_whose_connection_fell_silent_makes_another);

/// Longer than a wake-up ever takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn listen(store: &Store) -> Wakeups {
    Wakeups::listen(store, Duration::from_millis(10), CancellationToken::new())
}

async fn say(world: &World, lease: &Lease) {
    let event = NewEvent::new(EventType::Assistant, json!({ "content": "Hello." }));
    world.store.record(lease, &[event], None, NOW).await.unwrap();
}

/// By what was committed, and not by polling.
async fn woken(wakeup: &mut JobWakeup) -> bool {
    wakeup.changed_within(PATIENCE).await
}

/// Says something again and again until the listener hears it.
async fn until_heard(world: &World, lease: &Lease, wakeup: &mut JobWakeup) {
    let begin = Instant::now();
    loop {
        say(world, lease).await;
        if wakeup.changed_within(Duration::from_millis(100)).await {
            return;
        }
        assert!(begin.elapsed() < Duration::from_mins(1), "nothing was heard");
    }
}

async fn a_commit_wakes_who_waits_in_another_process(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    let wakeups = listen(&world.other().await);
    let mut wakeup = wakeups.job(stored.job_id);
    until_heard(&world, &lease, &mut wakeup).await;

    // Registered before, so that what is committed before the wait wakes it all the same.
    let mut wakeup = wakeups.job(stored.job_id);
    say(&world, &lease).await;
    assert!(woken(&mut wakeup).await, "an event");

    let mut wakeup = wakeups.job(stored.job_id);
    world.cancel(&stored).await;
    assert!(woken(&mut wakeup).await, "a cancel");

    let mut wakeup = wakeups.job(stored.job_id);
    world.finish(&lease, Ending::Cancelled).await;
    assert!(woken(&mut wakeup).await, "the end");

    let mut slots = wakeups.slots();
    slots.mark_unchanged();
    world.submit(job(&key)).await;
    let rung = tokio::time::timeout(PATIENCE, slots.changed()).await;
    assert!(rung.is_ok(), "a ticket");
}

async fn who_waits_for_another_job_is_not_woken(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = world.submit(job(&key)).await;
    let other = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    let wakeups = listen(&world.other().await);
    let (mut own, mut others) = (wakeups.job(stored.job_id), wakeups.job(other.job_id));
    until_heard(&world, &lease, &mut own).await;
    // The beginning of the listening wakes everybody once.
    let _ = others.changed_within(Duration::from_millis(1)).await;

    let mut own = wakeups.job(stored.job_id);
    say(&world, &lease).await;
    assert!(woken(&mut own).await);

    let quiet = others.changed_within(Duration::from_millis(50)).await;
    assert!(!quiet);
}

async fn listening_outlives_its_connection(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    let wakeups = listen(&world.other().await);
    let mut wakeup = wakeups.job(stored.job_id);
    until_heard(&world, &lease, &mut wakeup).await;
    if db == Db::Postgres {
        let ended = world
            .number(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity
                 where datname = current_database() and query like 'LISTEN%'",
            )
            .await;
        assert_eq!(ended, 1);
    }

    let mut wakeup = wakeups.job(stored.job_id);
    until_heard(&world, &lease, &mut wakeup).await;
    let mut wakeup = wakeups.job(stored.job_id);
    say(&world, &lease).await;
    assert!(woken(&mut wakeup).await);
    let mut slots = wakeups.slots();
    slots.mark_unchanged();
    world.submit(job(&key)).await;
    assert!(tokio::time::timeout(PATIENCE, slots.changed()).await.is_ok());
}

async fn a_listener_whose_connection_fell_silent_makes_another() {
    let world = World::new(Db::Postgres).await;
    let key = world.key("a", 9).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    let proxy = Proxy::before(&world.database).await;
    let wakeups = listen(&open(proxy.url()).await);
    let mut wakeup = wakeups.job(stored.job_id);
    until_heard(&world, &lease, &mut wakeup).await;

    proxy.swallow();

    until_heard(&world, &lease, &mut wakeup).await;
    until_heard(&world, &lease, &mut wakeup).await;
}
