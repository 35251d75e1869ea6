//! Jobs that wait for the Messages API.

use super::{NOW, World, again, at, job};
use serde_json::json;
use shared::clock::Timestamp;
use shared::job::{Ending, Hold, Job, JobStatus};
use shared::storage::AuditEntry;
use std::time::Duration;
use tests::database::Db;

tests::both!(
    a_wait_begins_once_and_ends_with_an_attempt_that_gets_past_it,
    jobs_that_wait_for_the_api_are_ready_when_it_answers,
    a_person_lifts_usage_limits_too_and_it_is_noted,
    a_wait_that_lasts_too_long_fails_the_job_with_its_reason,
);

const DAY: Duration = Duration::from_hours(24);

fn waits(code: &str, hold: Hold, run_after: Timestamp) -> Ending {
    Ending::Retry {
        code: code.to_owned(),
        message: "The API is overloaded.".to_owned(),
        run_after,
        hold,
        counts: false,
    }
}

/// Runs the job, which then waits like this.
async fn wait(world: &World, stored: &Job, ending: Ending) -> Job {
    let lease = world.claim_job(stored).await;
    world.finish(&lease, ending).await;
    world.job(stored.job_id).await
}

fn entry() -> AuditEntry {
    AuditEntry {
        at: NOW,
        actor: "key_admin".to_owned(),
        action: "queue.resume",
        object_id: String::new(),
        address: String::new(),
        request_id: String::new(),
        detail: json!({}),
    }
}

async fn a_wait_begins_once_and_ends_with_an_attempt_that_gets_past_it(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = world.submit(job(&key)).await;

    let held = wait(&world, &stored, waits("overloaded", Hold::Upstream, at(60))).await;
    assert_eq!(
        (held.hold.as_str(), held.failures, held.wait_since),
        ("upstream", 0, Some(NOW))
    );
    assert_eq!(held.wait_reason.as_deref(), Some("The API is overloaded."));
    world
        .database
        .execute("update job set wait_since = wait_since - 7")
        .await;
    assert_eq!(world.store.sweep(at(60)).await.unwrap().due, 1);
    let held = wait(&world, &stored, waits("usage_limit", Hold::UsageLimit, at(60))).await;
    assert_eq!(
        held.wait_since,
        Some(Timestamp(NOW.0 - 7)),
        "the first one counts"
    );

    world.store.sweep(at(60)).await.unwrap();
    let failed = wait(&world, &stored, again(at(60))).await;
    assert_eq!((failed.failures, failed.wait_since), (1, None));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn jobs_that_wait_for_the_api_are_ready_when_it_answers(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    let limited = world.submit(job(&a)).await;
    wait(&world, &limited, waits("usage_limit", Hold::UsageLimit, at(3600))).await;
    for key in [&a, &b, &a] {
        let stored = world.submit(job(key)).await;
        wait(&world, &stored, waits("overloaded", Hold::Upstream, at(3600))).await;
    }
    assert!(world.claim().await.is_none());

    assert_eq!(world.store.release_upstream().await.unwrap(), 3);
    assert_eq!(world.store.release_upstream().await.unwrap(), 0);

    assert_eq!(world.job(limited.job_id).await.hold, "usage_limit");
    for _ in 0..3 {
        assert!(world.claim().await.is_some());
    }
    assert!(world.claim().await.is_none());
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_person_lifts_usage_limits_too_and_it_is_noted(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1000).await;
    let delayed = world.submit(job(&key)).await;
    wait(&world, &delayed, again(at(3600))).await;
    for _ in 0..120 {
        let stored = world.submit(job(&key)).await;
        wait(&world, &stored, waits("usage_limit", Hold::UsageLimit, at(3600))).await;
    }
    assert_eq!(world.store.resumes().await.unwrap(), 0);

    assert_eq!(world.store.resume_queue(&entry()).await.unwrap(), 120);

    assert_eq!(world.store.resumes().await.unwrap(), 1);
    assert_eq!(
        world.job(delayed.job_id).await.hold,
        "delay",
        "the pause of a failure"
    );
    assert_eq!(
        world.store.audit_entries("", 0, 9).await.unwrap()[0].action,
        "queue.resume"
    );
    assert!(world.claim().await.is_some());
}

async fn a_wait_that_lasts_too_long_fails_the_job_with_its_reason(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = world.submit(job(&key)).await;
    wait(&world, &stored, waits("overloaded", Hold::Upstream, at(60))).await;
    let other = world.submit(job(&key)).await;
    let ends = NOW.plus(DAY);

    assert!(
        world
            .store
            .waited_since(Timestamp(NOW.0 - 1))
            .await
            .unwrap()
            .is_empty()
    );
    world
        .store
        .fail_waited(stored.job_id, DAY, Timestamp(ends.0 - 1))
        .await
        .unwrap();
    assert_eq!(world.status(&stored).await, JobStatus::Queued, "not yet");

    assert_eq!(
        world.store.waited_since(ends.before(DAY)).await.unwrap(),
        [stored.job_id]
    );
    for job_id in [stored.job_id, other.job_id] {
        world.store.fail_waited(job_id, DAY, ends).await.unwrap();
    }

    let failed = world.job(stored.job_id).await;
    assert_eq!(
        (failed.status, failed.error_code.as_deref()),
        (JobStatus::Failed, Some("overloaded"))
    );
    let error = failed.error.unwrap();
    assert!(
        error.contains("24 h") && error.ends_with("The API is overloaded."),
        "{error}"
    );
    assert_eq!(world.status(&other).await, JobStatus::Queued);
    assert_eq!(world.faults().await, [""; 0]);
}
