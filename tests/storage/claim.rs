//! Which job is next: priority, then keys in turn, then age; caps; delays; deadlines.

use super::{NOW, World, at, claimant, failed, grouped, job, report};
use shared::job::{CancelReason, Ending, JobStatus, NewJob};
use shared::storage::{Claim, Finish};
use std::time::Duration;
use tests::database::Db;

tests::both!(
    a_higher_priority_goes_first_and_within_it_the_older,
    keys_take_turns,
    a_key_never_runs_more_than_its_cap,
    a_delayed_job_waits_until_it_is_due,
    a_job_whose_deadline_has_passed_is_cancelled_by_the_claim,
    an_overdue_job_lets_its_group_go_on,
    a_paused_queue_gives_nothing,
    a_hint_that_is_too_high_costs_one_empty_try,
    a_hint_that_is_too_high_lets_no_lower_job_go_first,
    what_a_job_does_not_say_is_decided_by_its_first_claim,
    a_claim_without_an_answer_is_released,
    a_raised_cap_wakes_a_slot,
    jobs_behind_many_wrong_hints_are_seen,
    claims_at_once_take_different_jobs
);

async fn a_higher_priority_goes_first_and_within_it_the_older(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 10).await, world.key("b", 10).await);
    let with = |key, priority| NewJob { priority, ..job(key) };
    let low = world.submit(with(&a, -5)).await;
    let first = world.submit(with(&a, 0)).await;
    let second = world.submit(with(&a, 0)).await;
    let high = world.submit(with(&b, 5)).await;
    let higher = world.submit(with(&a, 7)).await;

    for job in [&higher, &high, &first, &second, &low] {
        world.claim_job(job).await;
    }
    assert!(world.claim().await.is_none());
    assert_eq!(
        world
            .number("select count(*) from lane where top_priority is not null")
            .await,
        0
    );
}

async fn keys_take_turns(db: Db) {
    let world = World::new(db).await;
    let (a, b, c) = (
        world.key("a", 2000).await,
        world.key("b", 9).await,
        world.key("c", 9).await,
    );
    let mut tx = world.store.begin().await.unwrap();
    for _ in 0..1000 {
        tx.insert_job(&job(&a)).await.unwrap();
    }
    tx.commit().await.unwrap();
    let owner = async || world.claim().await.unwrap().job.key_id.to_string();
    assert_eq!([owner().await, owner().await], ["a", "a"]);

    world.submit(job(&b)).await;
    assert_eq!(
        owner().await,
        "b",
        "B's first job is next, whatever A has waiting"
    );

    for key in [&b, &b, &c] {
        world.submit(job(key)).await;
    }
    let mut turns = String::new();
    for _ in 0..6 {
        turns += &owner().await;
    }
    // Who waited longest for a turn: C never had one, and A's last was before B's.
    assert_eq!(turns, "cababa");
}

async fn a_key_never_runs_more_than_its_cap(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 2).await, world.key("b", 1).await);
    for _ in 0..5 {
        world.submit(job(&a)).await;
        world.submit(job(&b)).await;
    }
    let mut leases = Vec::new();
    while let Some(lease) = world.claim().await {
        leases.push(lease);
    }
    assert_eq!(leases.len(), 3, "two of A and one of B");

    world.finish(&leases[0], Ending::Done).await;
    let next = world.claim().await.unwrap();
    assert_eq!(next.job.key_id, leases[0].job.key_id);
    assert!(world.claim().await.is_none());

    // A lower cap ends nothing, but nothing begins until there is room.
    world.store.put_lane(&a, 1).await.unwrap();
    let mut of_a = leases
        .iter()
        .skip(1)
        .chain([&next])
        .filter(|lease| lease.job.key_id == a);
    world.finish(of_a.next_back().unwrap(), Ending::Done).await;
    assert!(world.claim().await.is_none_or(|lease| lease.job.key_id == b));
    assert_eq!(world.faults().await, [""; 0]);
    world.store.put_lane(&a, 5).await.unwrap();
    assert_eq!(world.claim().await.unwrap().job.key_id, a);
}

async fn a_delayed_job_waits_until_it_is_due(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 5).await;
    let delayed = world
        .submit(NewJob {
            run_after: Some(at(60)),
            ..job(&key)
        })
        .await;
    assert_eq!(delayed.hold, "delay");
    assert_eq!(world.tickets().await, 0, "there is nothing to do yet");
    let past = world
        .submit(NewJob {
            run_after: Some(NOW),
            ..job(&key)
        })
        .await;
    world.claim_job(&past).await;

    assert_eq!(world.store.sweep(at(59)).await.unwrap().due, 0);
    assert!(world.claim_at(at(59)).await.is_none());

    let tickets = world.tickets().await;
    assert_eq!(world.store.sweep(at(60)).await.unwrap().due, 1);
    assert!(world.tickets().await > tickets);
    world.claim_job(&delayed).await;
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_job_whose_deadline_has_passed_is_cancelled_by_the_claim(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let late = world
        .submit(NewJob {
            deadline_at: Some(at(10)),
            ..job(&key)
        })
        .await;
    let other = world.submit(job(&key)).await;
    assert_eq!(world.store.overdue_jobs(at(9)).await.unwrap(), []);
    assert_eq!(world.store.overdue_jobs(at(10)).await.unwrap(), [late.job_id]);

    let lease = world.claim_at(at(11)).await.unwrap();

    assert_eq!(lease.job.job_id, other.job_id);
    let late = world.job(late.job_id).await;
    assert_eq!(late.status, JobStatus::Cancelled);
    assert_eq!(late.cancel_reason, Some(CancelReason::Deadline));
    assert_eq!(late.attempt, 0);
    assert!(late.completed_at.is_some_and(|ended| ended >= at(11)));
    assert_eq!(world.store.overdue_jobs(at(12)).await.unwrap(), []);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn an_overdue_job_lets_its_group_go_on(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let late = world
        .submit(NewJob {
            deadline_at: Some(at(10)),
            ..grouped(&key, "g")
        })
        .await;
    let next = world.submit(grouped(&key, "g")).await;

    let lease = world.claim_at(at(11)).await.unwrap();

    assert_eq!(world.status(&late).await, JobStatus::Cancelled);
    assert_eq!(lease.job.job_id, next.job_id);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_paused_queue_gives_nothing(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;

    world.database.execute("update queue set paused = true").await;
    assert!(world.claim().await.is_none());
    assert_eq!(
        world.store.lane_hold(&key).await.unwrap(),
        Some(shared::job::Hold::Paused)
    );

    world.database.execute("update queue set paused = false").await;
    assert_eq!(world.store.lane_hold(&key).await.unwrap(), None);
    world.claim_job(&stored).await;
}

async fn a_hint_that_is_too_high_costs_one_empty_try(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 1).await);
    let stored = world.submit(job(&b)).await;
    let gone = world
        .submit(NewJob {
            priority: 5,
            ..job(&a)
        })
        .await;
    world.cancel(&gone).await;
    assert_eq!(
        world
            .number("select count(*) from lane where top_priority is not null")
            .await,
        2
    );

    let first = world.store.claim(&claimant(), NOW).await.unwrap();
    assert!(matches!(first, Claim::TryAgain), "{first:?}");
    world.claim_job(&stored).await;
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_hint_that_is_too_high_lets_no_lower_job_go_first(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    let with = |key, priority| NewJob { priority, ..job(key) };
    let low = world.submit(with(&a, 1)).await;
    let gone = world.submit(with(&a, 5)).await;
    let high = world.submit(with(&b, 3)).await;
    world.cancel(&gone).await;

    let first = world.store.claim(&claimant(), NOW).await.unwrap();
    assert!(matches!(first, Claim::TryAgain), "{first:?}");
    for job in [&high, &low] {
        world.claim_job(job).await;
    }
    assert_eq!(world.faults().await, [""; 0]);
}

async fn what_a_job_does_not_say_is_decided_by_its_first_claim(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = world
        .submit(NewJob {
            max_turns: Some(3),
            ..job(&key)
        })
        .await;
    let settings = |job: &shared::job::Job| {
        (
            job.model.clone(),
            job.effort.clone(),
            job.permission_mode.clone(),
            job.max_turns,
            job.timeout_seconds,
        )
    };
    let effective = (
        Some("sonnet".to_owned()),
        None,
        Some("acceptEdits".to_owned()),
        Some(3),
        Some(300),
    );

    let lease = world.claim_job(&stored).await;
    assert_eq!(settings(&lease.job), effective);
    world.finish(&lease, Ending::Released).await;
    let mut other = claimant();
    "opus".clone_into(&mut other.defaults.model);
    let Claim::Run(lease) = world.store.claim(&other, NOW).await.unwrap() else {
        panic!("there is a job to claim");
    };

    assert_eq!(settings(&lease.job), effective);
    assert_eq!(settings(&world.job(stored.job_id).await), effective);
}

async fn a_claim_without_an_answer_is_released(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let once = || NewJob {
        max_attempts: 1,
        ..job(&key)
    };
    let (runs, unknown, of_another) = (
        world.submit(once()).await,
        world.submit(once()).await,
        world.submit(once()).await,
    );
    let me = claimant();
    let claim = async || match world.store.claim(&me, NOW).await.unwrap() {
        Claim::Run(lease) => (lease.job.job_id, lease.job.attempt),
        other => panic!("{other:?}"),
    };
    let known = std::collections::HashSet::from([claim().await]);
    assert_eq!(claim().await.0, unknown.job_id);
    world.claim_job(&of_another).await;
    let hand_back = async || {
        let released = world.store.release_unknown(me.worker_id, &known, NOW).await;
        released.unwrap()
    };

    assert_eq!(hand_back().await, 1);
    assert_eq!(hand_back().await, 0);

    for job in [&runs, &of_another] {
        assert_eq!(world.status(job).await, JobStatus::Running);
    }
    let again = world.claim_job(&unknown).await;
    assert_eq!((again.job.attempt, again.job.failures), (2, 0));
    world.finish(&again, Ending::Done).await;
    assert_eq!(world.status(&unknown).await, JobStatus::Done);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_raised_cap_wakes_a_slot(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    for _ in 0..2 {
        world.submit(job(&key)).await;
    }
    world.claim().await.unwrap();
    let tickets = world.tickets().await;

    world.store.put_lane(&key, 1).await.unwrap();
    assert_eq!(world.tickets().await, tickets);
    world.store.put_lane(&key, 2).await.unwrap();

    assert_eq!(world.tickets().await, tickets + 1);
}

async fn jobs_behind_many_wrong_hints_are_seen(db: Db) {
    let world = World::new(db).await;
    for number in 0..70 {
        world.key(&format!("a{number}"), 9).await;
    }
    world.database.execute("update lane set top_priority = 5").await;
    let key = world.key("z", 9).await;
    world.submit(job(&key)).await;

    assert_eq!(world.store.sweep(NOW).await.unwrap().runnable, 1);
}

async fn claims_at_once_take_different_jobs(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 100).await;
    for _ in 0..40 {
        world.submit(job(&key)).await;
    }
    let other = world.other().await;

    let claimers: Vec<_> = (0..8)
        .map(|number| {
            let store = if number % 2 == 0 {
                world.store.clone()
            } else {
                other.clone()
            };
            tokio::spawn(async move {
                let mut leases = Vec::new();
                loop {
                    match store.claim(&claimant(), NOW).await.unwrap() {
                        Claim::Run(lease) => leases.push(*lease),
                        Claim::TryAgain => {}
                        Claim::Nothing => return leases,
                    }
                }
            })
        })
        .collect();
    let mut leases = Vec::new();
    for claimer in claimers {
        leases.extend(claimer.await.unwrap());
    }

    let mut jobs: Vec<_> = leases.iter().map(|lease| lease.job.job_id).collect();
    jobs.sort();
    jobs.dedup();
    assert_eq!((leases.len(), jobs.len()), (40, 40));
    for (number, lease) in leases.iter().enumerate() {
        let ending = if number % 2 == 0 { Ending::Done } else { failed() };
        let report = shared::job::Report {
            duration: Duration::ZERO,
            ..report(ending)
        };
        let finish = world.store.finish(lease, &report, NOW).await.unwrap();
        assert!(matches!(finish, Finish::Became(_)));
    }
    assert_eq!(world.number("select running from lane").await, 0);
    assert_eq!(world.faults().await, [""; 0]);
}
