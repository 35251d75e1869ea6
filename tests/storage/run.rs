//! The holder of a lease: the fence, cancels, retries, hand-backs, lost workers.

use super::{NOW, World, again, at, failed, job, report, spend};
use serde_json::json;
use shared::event::{Event, EventType, NewEvent};
use shared::job::{
    CancelReason, Ending, Hold, Job, JobStatus, Lease, NewJob, OnWorkerLost, Report, Resume, Spend,
};
use shared::money::MicroUsd;
use shared::storage::{CancelOutcome, Finish, RunDirective};
use tests::database::Db;

tests::both!(
    a_run_that_lost_its_lease_writes_nothing,
    a_waiting_job_is_cancelled_at_once_and_only_once,
    a_running_job_is_asked_to_end,
    a_cancelled_run_keeps_its_cost_and_its_partial_result,
    a_job_nobody_wants_any_more_gets_no_other_attempt,
    a_failure_that_may_pass_is_tried_again_later,
    failures_that_do_not_pass_end_the_job,
    a_usage_limit_holds_the_job_and_counts_no_failure,
    a_job_released_is_queued_again_and_counts_no_failure,
    a_lease_is_taken_only_when_it_stood_still,
    a_job_that_loses_its_worker_every_time_ends,
    a_job_may_ask_to_fail_with_its_worker,
    a_lost_job_that_was_to_be_cancelled_is_cancelled,
    what_a_lost_run_had_spent_is_settled_as_an_estimate,
    a_lost_run_pays_the_rest_of_its_cost_once,
    events_are_stored_once_when_the_first_try_still_commits,
    left_out_events_use_up_their_numbers,
    thousands_of_events_are_stored_at_once_and_read_page_by_page,
    the_end_of_a_run_rings_only_where_its_lane_was_full
);

fn event() -> NewEvent {
    NewEvent::new(EventType::Assistant, json!({ "content": "Hello." }))
}

async fn a_run_that_lost_its_lease_writes_nothing(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let old = world.claim_job(&stored).await;
    assert!(world.store.take_lost(&old.job, 1, 0, NOW).await.unwrap());
    let new = world.claim_job(&stored).await;
    assert_eq!((new.job.attempt, new.job.failures), (2, 1));
    let everything = async || {
        let job = world.job(stored.job_id).await;
        let counts =
            ["event", "ledger", "result", "attempt"].map(|table| format!("select count(*) from {table}"));
        let mut seen = vec![format!("{job:?}")];
        for sql in counts {
            seen.push(world.number(&sql).await.to_string());
        }
        seen
    };
    let before = everything().await;

    let signal = world
        .store
        .record(&old, &[event()], Some(&spend(1)), NOW)
        .await
        .unwrap();
    assert_eq!(signal, RunDirective::Lost);
    assert_eq!(world.store.signal(&old).await.unwrap(), RunDirective::Lost);
    assert_eq!(
        world.store.record_gap(&old, 3, NOW).await.unwrap(),
        RunDirective::Lost
    );
    for ending in [
        Ending::Done,
        failed(),
        Ending::Cancelled,
        Ending::Released,
        again(NOW),
    ] {
        assert_eq!(world.finish(&old, ending).await, Finish::Lost);
    }
    assert!(!world.store.take_lost(&old.job, 1, 0, NOW).await.unwrap());
    assert_eq!(everything().await, before);

    assert_eq!(
        world.finish(&new, Ending::Done).await,
        Finish::Became(JobStatus::Done)
    );
    assert_eq!(world.finish(&new, Ending::Done).await, Finish::Lost, "once");
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_waiting_job_is_cancelled_at_once_and_only_once(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let other = world.submit(job(&key)).await;

    assert_eq!(world.cancel(&stored).await, CancelOutcome::Cancelled);
    let first = world.job(stored.job_id).await;
    assert_eq!(
        world.cancel(&stored).await,
        CancelOutcome::AlreadyFinal(JobStatus::Cancelled)
    );

    let cancelled = world.job(stored.job_id).await;
    assert_eq!(cancelled.version, first.version);
    assert_eq!(
        (cancelled.status, cancelled.cancel_reason, cancelled.cost),
        (JobStatus::Cancelled, Some(CancelReason::User), MicroUsd::ZERO)
    );
    assert_eq!(world.events(&stored).await, ["status", "cancelled"]);
    world.claim_job(&other).await;
    assert!(world.claim().await.is_none(), "a cancelled job is never claimed");
    let nobody = shared::id::JobId::new();
    let outcome = world
        .store
        .cancel_job(nobody, CancelReason::User, NOW)
        .await
        .unwrap();
    assert_eq!(outcome, CancelOutcome::NoSuchJob);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_running_job_is_asked_to_end(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    assert_eq!(world.store.signal(&lease).await.unwrap(), RunDirective::Continue);

    assert_eq!(world.cancel(&stored).await, CancelOutcome::Requested);
    assert_eq!(world.cancel(&stored).await, CancelOutcome::AlreadyRequested);

    let asked = RunDirective::Cancel(CancelReason::User);
    assert_eq!(world.store.signal(&lease).await.unwrap(), asked);
    assert_eq!(world.store.record(&lease, &[], None, NOW).await.unwrap(), asked);
    let running = world.job(stored.job_id).await;
    assert_eq!(
        (running.status, running.cancel_requested_at),
        (JobStatus::Running, Some(NOW))
    );
    assert_eq!(world.events(&stored).await, ["status", "status", "cancelling"]);
    assert_eq!(
        world.finish(&lease, Ending::Done).await,
        Finish::Became(JobStatus::Done),
        "it was quicker"
    );
    assert_eq!(
        world.cancel(&stored).await,
        CancelOutcome::AlreadyFinal(JobStatus::Done)
    );
}

async fn a_cancelled_run_keeps_its_cost_and_its_partial_result(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    world
        .store
        .cancel_job(stored.job_id, CancelReason::Deadline, NOW)
        .await
        .unwrap();

    assert_eq!(
        world.finish(&lease, Ending::Cancelled).await,
        Finish::Became(JobStatus::Cancelled)
    );

    let cancelled = world.job(stored.job_id).await;
    assert_eq!(
        (cancelled.cost, cancelled.cancel_reason),
        (MicroUsd(120_000), Some(CancelReason::Deadline))
    );
    assert!(world.details(stored.job_id).await.result.is_some());
    let last = world.store.events_after(stored.job_id, 3, 10).await.unwrap();
    assert_eq!(
        last[0].data,
        json!({ "reason": "deadline", "result": { "result": "Hello." } }).to_string()
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_job_nobody_wants_any_more_gets_no_other_attempt(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    for ending in [again(at(60)), Ending::Released] {
        let stored = world.submit(job(&key)).await;
        let lease = world.claim_job(&stored).await;
        world.cancel(&stored).await;

        assert_eq!(
            world.finish(&lease, ending).await,
            Finish::Became(JobStatus::Cancelled)
        );
        assert_eq!(world.status(&stored).await, JobStatus::Cancelled);
    }
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_failure_that_may_pass_is_tried_again_later(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;

    assert_eq!(
        world.finish(&lease, again(at(8))).await,
        Finish::Became(JobStatus::Queued)
    );

    let queued = world.job(stored.job_id).await;
    assert_eq!(
        (
            queued.hold.as_str(),
            queued.run_after,
            queued.failures,
            queued.attempt
        ),
        ("delay", Some(at(8)), 1, 1)
    );
    assert_eq!((queued.error, queued.error_code), (None, None));
    assert_eq!(
        world.events(&stored).await,
        ["status", "status", "retry", "status"]
    );
    let retry = &world.store.events_after(stored.job_id, 2, 1).await.unwrap()[0];
    assert_eq!(
        retry.data,
        json!({ "attempt": 2, "delay_ms": 8000, "error_code": "overloaded" }).to_string()
    );
    assert!(world.claim_at(at(7)).await.is_none());
    world.store.sweep(at(8)).await.unwrap();
    let second = world.claim_at(at(8)).await.unwrap();
    assert_eq!(second.job.attempt, 2);
    assert_eq!(
        second.resume,
        [Resume {
            claude_session_id: lease.job.claude_session_id.unwrap(),
            interrupted: Some(1)
        }]
    );
    assert_eq!(
        world.job(stored.job_id).await.cost,
        MicroUsd(120_000),
        "the first attempt's cost is kept"
    );
    world.finish(&second, Ending::Done).await;
    let done = world.job(stored.job_id).await;
    assert_eq!((done.cost, done.duration_ms), (MicroUsd(240_000), 3000));
    assert_eq!(world.number("select count(*) from ledger").await, 2);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn failures_that_do_not_pass_end_the_job(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world
        .submit(NewJob {
            max_attempts: 2,
            ..job(&key)
        })
        .await;
    let lease = world.claim_job(&stored).await;
    // Not later than now: at once.
    assert_eq!(
        world.finish(&lease, again(NOW)).await,
        Finish::Became(JobStatus::Queued)
    );

    let lease = world.claim_job(&stored).await;
    assert_eq!(
        world.finish(&lease, again(at(9))).await,
        Finish::Became(JobStatus::Failed)
    );

    let failed = world.job(stored.job_id).await;
    assert_eq!(
        (failed.failures, failed.error_code.as_deref()),
        (2, Some("overloaded"))
    );
    assert_eq!(failed.error.as_deref(), Some("The API was overloaded."));
    assert!(world.details(stored.job_id).await.result.is_some());
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_usage_limit_holds_the_job_and_counts_no_failure(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world
        .submit(NewJob {
            max_attempts: 1,
            ..job(&key)
        })
        .await;
    for _ in 0..3 {
        let lease = world.claim_job(&stored).await;
        let ending = Ending::Retry {
            code: "usage_limit".to_owned(),
            message: "The account has met its limit.".to_owned(),
            run_after: at(3600),
            hold: Hold::UsageLimit,
            counts: false,
        };
        assert_eq!(
            world.finish(&lease, ending).await,
            Finish::Became(JobStatus::Queued)
        );
        let held = world.job(stored.job_id).await;
        assert_eq!((held.hold.as_str(), held.failures), ("usage_limit", 0));

        assert_eq!(world.store.sweep(at(3599)).await.unwrap().due, 0);
        assert_eq!(world.store.sweep(at(3600)).await.unwrap().due, 1);
    }
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_job_released_is_queued_again_and_counts_no_failure(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world
        .submit(NewJob {
            max_attempts: 1,
            ..job(&key)
        })
        .await;
    let later = world.submit(job(&key)).await;
    for attempt in 1..=3 {
        let lease = world.claim_job(&stored).await;
        assert_eq!((lease.job.attempt, lease.job.failures), (attempt, 0));
        let tickets = world.tickets().await;

        assert_eq!(
            world.finish(&lease, Ending::Released).await,
            Finish::Became(JobStatus::Queued)
        );

        assert!(world.tickets().await > tickets, "whoever is free goes on with it");
    }
    assert_eq!(
        world
            .number("select count(*) from attempt where ending = 'released'")
            .await,
        3
    );
    // It keeps its place before jobs that came after it.
    let lease = world.claim_job(&stored).await;
    world.finish(&lease, Ending::Done).await;
    world.claim_job(&later).await;
    assert_eq!(world.faults().await, [""; 0]);
}

/// A sweeper's look at the one lease there is.
async fn renewals(world: &World) -> i64 {
    let leases = world.store.running_leases().await.unwrap();
    assert_eq!(leases.len(), 1);
    leases[0].renewals
}

async fn a_lease_is_taken_only_when_it_stood_still(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    let seen = renewals(&world).await;
    world.store.record(&lease, &[], None, NOW).await.unwrap();

    assert!(
        !world.store.take_lost(&lease.job, 1, seen, NOW).await.unwrap(),
        "it was renewed"
    );
    assert_eq!(world.status(&stored).await, JobStatus::Running);

    let seen = renewals(&world).await;
    assert!(world.store.take_lost(&lease.job, 1, seen, NOW).await.unwrap());
    let queued = world.job(stored.job_id).await;
    assert_eq!(
        (queued.status, queued.failures, queued.hold.as_str()),
        (JobStatus::Queued, 1, "")
    );
    assert_eq!(
        world
            .number("select count(*) from attempt where ending = 'lost'")
            .await,
        1
    );
    let second = world.claim_job(&stored).await;
    assert_eq!(renewals(&world).await, 0);
    assert!(
        !world.store.take_lost(&lease.job, 1, 0, NOW).await.unwrap(),
        "that was the first attempt's"
    );
    world.finish(&second, Ending::Done).await;
    assert!(
        !world.store.take_lost(&lease.job, 2, 0, NOW).await.unwrap(),
        "it has ended"
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn lose(world: &World, lease: &Lease) -> Job {
    let taken = world
        .store
        .take_lost(&lease.job, lease.job.attempt, renewals(world).await, NOW)
        .await
        .unwrap();
    assert!(taken);
    world.job(lease.job.job_id).await
}

async fn a_job_that_loses_its_worker_every_time_ends(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    for failures in 1..3 {
        let lease = world.claim_job(&stored).await;
        let job = lose(&world, &lease).await;
        assert_eq!((job.status, job.failures), (JobStatus::Queued, failures));
    }

    let lease = world.claim_job(&stored).await;
    let job = lose(&world, &lease).await;

    assert_eq!((job.status, job.failures), (JobStatus::Failed, 3));
    assert_eq!(job.error_code.as_deref(), Some("worker_lost"));
    assert!(world.claim().await.is_none());
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_job_may_ask_to_fail_with_its_worker(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world
        .submit(NewJob {
            on_worker_lost: OnWorkerLost::Fail,
            ..job(&key)
        })
        .await;
    let lease = world.claim_job(&stored).await;

    let job = lose(&world, &lease).await;

    assert_eq!(
        (job.status, job.error_code.as_deref()),
        (JobStatus::Failed, Some("worker_lost"))
    );
    assert_eq!(world.events(&stored).await, ["status", "status", "error"]);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_lost_job_that_was_to_be_cancelled_is_cancelled(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 2).await;
    for on_worker_lost in [OnWorkerLost::Fail, OnWorkerLost::Resume] {
        let stored = world
            .submit(NewJob {
                on_worker_lost,
                ..job(&key)
            })
            .await;
        let lease = world.claim_job(&stored).await;
        world.cancel(&stored).await;

        let job = lose(&world, &lease).await;

        assert_eq!(
            (job.status, job.cancel_reason),
            (JobStatus::Cancelled, Some(CancelReason::User))
        );
    }
    assert_eq!(world.faults().await, [""; 0]);
}

async fn what_a_lost_run_had_spent_is_settled_as_an_estimate(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    world.budget(Some(&key), 10_000_000, "total", "reject").await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    world
        .store
        .record(&lease, &[event()], Some(&spend(70_000)), NOW)
        .await
        .unwrap();
    world.store.record(&lease, &[event()], None, NOW).await.unwrap();

    let job = lose(&world, &lease).await;

    assert_eq!(job.cost, MicroUsd(70_000));
    assert_eq!(
        world.number("select cost from ledger where estimated").await,
        70_000
    );
    assert_eq!(
        world
            .number("select spent from budget_period where reserved = 0")
            .await,
        70_000
    );
    // Twice the same model in one report is one line; budget, job and ledger agree.
    let second = world.claim_job(&stored).await;
    let twice = Spend {
        models: [spend(30_000).models, spend(30_000).models].concat(),
        ..spend(0)
    };
    let report = Report {
        spend: twice,
        ..report(Ending::Done)
    };
    world.store.finish(&second, &report, NOW).await.unwrap();
    assert_eq!(world.job(stored.job_id).await.cost, MicroUsd(100_000));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn events_are_stored_once_when_the_first_try_still_commits(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    let before = world.events(&stored).await.len();
    let other = world.other().await;
    let events = [event()];
    // Nobody waits for this one any more; its commit is on its way.
    let mut first = world.store.begin().await.unwrap();
    let signal = first.record(&lease, None, &events, None, NOW).await.unwrap();
    assert_eq!(signal, Some(RunDirective::Continue));

    let second = other.record_again(&lease, 0, &events, None, NOW);
    let (second, ()) = tokio::join!(second, async {
        tokio::task::yield_now().await;
        first.commit().await.unwrap();
    });

    assert_eq!(second.unwrap(), None);
    assert_eq!(other.renewals(&lease).await.unwrap(), Some(1));
    assert_eq!(world.events(&stored).await.len(), before + 1);
    let next = other.record_again(&lease, 1, &events, None, NOW).await.unwrap();
    assert_eq!(next, Some(RunDirective::Continue));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn left_out_events_use_up_their_numbers(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;

    world.store.record_gap(&lease, 5, NOW).await.unwrap();
    world.store.record(&lease, &[event()], None, NOW).await.unwrap();

    let events = world.store.events_after(stored.job_id, 2, 10).await.unwrap();
    assert_eq!((events[0].seq, events[0].event_type), (8, EventType::Gap));
    assert_eq!(events[0].data, json!({ "from": 3, "to": 7 }).to_string());
    assert_eq!((events[1].seq, events[1].event_type), (9, EventType::Assistant));
    world.finish(&lease, Ending::Done).await;
    assert_eq!(world.job(stored.job_id).await.last_event_seq, 10);
}

async fn the_end_of_a_run_rings_only_where_its_lane_was_full(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 2).await;
    for _ in 0..4 {
        world.submit(job(&key)).await;
    }
    let first = world.claim().await.unwrap();
    let tickets = world.tickets().await;

    world.finish(&first, Ending::Done).await;
    assert_eq!(
        world.tickets().await,
        tickets,
        "whoever was told before may begin as before"
    );

    let first = world.claim().await.unwrap();
    world.claim().await.unwrap();
    world.finish(&first, Ending::Done).await;
    assert_eq!(
        world.tickets().await,
        tickets + 1,
        "there was no room, and now there is"
    );
}

async fn thousands_of_events_are_stored_at_once_and_read_page_by_page(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;

    let events: Vec<_> = (0..7001)
        .map(|number| NewEvent::new(EventType::Tool, json!({ "number": number })))
        .collect();
    world.store.record(&lease, &events, None, NOW).await.unwrap();

    let mut seen = Vec::new();
    loop {
        let after = seen.last().map_or(2, |event: &Event| event.seq);
        let page = world
            .store
            .events_after(stored.job_id, after, 3000)
            .await
            .unwrap();
        if page.is_empty() {
            break;
        }
        seen.extend(page);
    }
    assert_eq!(seen.len(), 7001);
    for (number, event) in seen.iter().enumerate() {
        assert_eq!(event.data, json!({ "number": number }).to_string());
    }
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_lost_run_pays_the_rest_of_its_cost_once(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    world.budget(Some(&key), 1_000_000, "total", "reject").await;
    let stored = world.submit(job(&key)).await;
    let lost = world.claim_job(&stored).await;
    world
        .store
        .record(&lost, &[], Some(&spend(30)), NOW)
        .await
        .unwrap();
    assert!(world.store.take_lost(&lost.job, 1, 1, NOW).await.unwrap());

    for rest in [70, 0] {
        let booked = world.store.book_late(&lost, &spend(100), NOW).await.unwrap();
        assert_eq!(booked, MicroUsd(rest));
    }
    let next = world.claim_job(&stored).await;
    world.finish(&next, Ending::Done).await;

    let ledger = "select cast(sum(cost) as bigint) from ledger where attempt = 1";
    assert_eq!(world.number(ledger).await, 100);
    let (ledger, spent) = (
        "select cast(sum(cost) as bigint) from ledger",
        "select cast(sum(spent) as bigint) from budget_period",
    );
    assert_eq!(world.number(ledger).await, world.number(spent).await);
    assert_eq!(world.faults().await, [""; 0]);
}
