//! Money: reserved before a run, settled after it, never more than the limit.

use super::{NOW, World, at, failed, job, report, spend};
use crate::clock::Timestamp;
use crate::id::KeyId;
use crate::job::{Ending, Hold, JobStatus, NewJob, Report};
use crate::money::MicroUsd;
use ::tests::database::Db;

::tests::both!(
    a_run_reserves_its_whole_cap_and_settles_what_it_cost,
    what_does_not_fit_waits_while_something_is_reserved,
    a_cap_shrinks_to_what_is_left,
    a_job_that_nothing_is_left_for_fails,
    a_job_that_fails_for_money_lets_its_group_go_on,
    a_budget_may_hold_its_jobs_until_the_next_period,
    a_run_settles_into_the_period_it_reserved_in,
    a_global_budget_holds_the_whole_queue,
    a_raised_limit_frees_what_waits,
    a_removed_budget_gets_its_reservation_back,
    a_budget_set_in_mid_run_counts_that_run,
    a_default_budget_follows_its_variable_and_yields_to_a_person,
    a_ledger_line_is_unique
);

/// Finishes with this cost.
async fn finish(world: &World, lease: &crate::job::Lease, micros: i64, now: Timestamp) {
    let report = Report {
        spend: spend(micros),
        ..report(Ending::Done)
    };
    world.store.finish(lease, &report, now).await.unwrap();
}

async fn state(world: &World, key: &KeyId) -> (i64, i64) {
    let of = |column: &str| {
        format!("select {column} from budget_period where scope_id = '{key}' order by period_start")
    };
    (
        world.number(&of("spent")).await,
        world.number(&of("reserved")).await,
    )
}

async fn a_run_reserves_its_whole_cap_and_settles_what_it_cost(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 2).await;
    world.budget(Some(&key), 5_000_000, "total", "reject").await;
    world.budget(None, 50_000_000, "total", "reject").await;
    world.submit(job(&key)).await;

    let lease = world.claim().await.unwrap();
    assert_eq!(lease.reserved, MicroUsd(1_000_000));
    assert_eq!(state(&world, &key).await, (0, 1_000_000));
    assert_eq!(
        world
            .number("select reserved from budget_period where scope = 'global'")
            .await,
        1_000_000
    );
    assert_eq!(world.number("select reserved from attempt").await, 1_000_000);

    finish(&world, &lease, 300_000, NOW).await;
    assert_eq!(state(&world, &key).await, (300_000, 0));
    assert_eq!(
        world
            .number("select spent from budget_period where scope = 'global'")
            .await,
        300_000
    );
    assert_eq!(world.number("select count(*) from reservation").await, 0);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn what_does_not_fit_waits_while_something_is_reserved(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    world.budget(Some(&a), 2_500_000, "total", "reject").await;
    for _ in 0..4 {
        world.submit(job(&a)).await;
    }
    let (first, second) = (world.claim().await.unwrap(), world.claim().await.unwrap());

    assert!(
        world.claim().await.is_none(),
        "half a dollar is left, but two may come back"
    );
    assert_eq!(world.store.lane_hold(&a).await.unwrap(), Some(Hold::Budget));
    world.submit(job(&b)).await;
    assert_eq!(world.claim().await.unwrap().job.key_id, b, "another key goes on");
    assert_eq!(world.faults().await, [""; 0]);

    let tickets = world.tickets().await;
    finish(&world, &first, 0, NOW).await;
    assert!(world.tickets().await > tickets, "a slot is told to look");
    assert_eq!(world.store.lane_hold(&a).await.unwrap(), None);
    let third = world.claim().await.unwrap();
    assert!(world.claim().await.is_none());
    finish(&world, &second, 1_000_000, NOW).await;
    finish(&world, &third, 1_000_000, NOW).await;
    let last = world.claim().await.unwrap();
    assert_eq!(
        last.reserved,
        MicroUsd(500_000),
        "nothing is reserved any more: the rest"
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_cap_shrinks_to_what_is_left(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    world.budget(Some(&key), 1_050_000, "total", "reject").await;
    world.submit(job(&key)).await;
    world.submit(job(&key)).await;
    let cheap = NewJob {
        max_cost: MicroUsd(20_000),
        ..job(&key)
    };
    world.submit(cheap).await;
    let lease = world.claim().await.unwrap();
    finish(&world, &lease, 1_000_000, NOW).await;

    let lease = world.claim().await.unwrap();
    assert_eq!(
        lease.reserved,
        MicroUsd(50_000),
        "exactly the least that a run begins with"
    );
    finish(&world, &lease, 30_000, NOW).await;

    let lease = world.claim().await.unwrap();
    assert_eq!(lease.reserved, MicroUsd(20_000), "it wants less than the least");
    finish(&world, &lease, 20_000, NOW).await;
    assert_eq!(state(&world, &key).await, (1_050_000, 0));
    let budgets = world.store.budgets_of(&key, NOW).await.unwrap();
    assert!(budgets[0].refuses(), "{budgets:?}");
    assert_eq!(budgets[0].remaining(), MicroUsd::ZERO);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_job_that_nothing_is_left_for_fails(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    world.budget(Some(&key), 1_049_999, "total", "reject").await;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(world.submit(job(&key)).await);
    }
    let lease = world.claim().await.unwrap();
    finish(&world, &lease, 1_000_000, NOW).await;

    assert!(world.claim().await.is_none());

    for stored in &jobs[1..] {
        let job = world.job(stored.job_id).await;
        assert_eq!(
            (job.status, job.error_code.as_deref()),
            (JobStatus::Failed, Some("budget_exceeded"))
        );
        assert!(job.error.unwrap().contains("$1.00 of $1.049999 spent"));
        assert_eq!(world.events(stored).await, ["status", "error"]);
    }
    assert_eq!(
        world
            .number("select count(*) from lane where running = 0 and top is null and hold is null")
            .await,
        1
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_job_that_fails_for_money_lets_its_group_go_on(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    world.budget(Some(&key), 1_010_000, "total", "reject").await;
    world.submit(job(&key)).await;
    let lease = world.claim().await.unwrap();
    finish(&world, &lease, 1_000_000, NOW).await;
    world.submit(super::grouped(&key, "g")).await;
    let cheap = world
        .submit(NewJob {
            max_cost: MicroUsd(9_000),
            ..super::grouped(&key, "g")
        })
        .await;

    world.claim_job(&cheap).await;
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_budget_may_hold_its_jobs_until_the_next_period(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    world.budget(Some(&key), 1_000_000, "day", "hold").await;
    world.submit(job(&key)).await;
    world.submit(job(&key)).await;
    let lease = world.claim().await.unwrap();
    finish(&world, &lease, 1_000_000, NOW).await;

    assert!(world.claim().await.is_none());
    assert_eq!(world.store.lane_hold(&key).await.unwrap(), Some(Hold::Budget));
    world.store.sweep(at(60)).await.unwrap();
    assert!(world.claim_at(at(60)).await.is_none(), "it is the same day");

    let tomorrow = at(86_400);
    let tickets = world.tickets().await;
    world.store.sweep(tomorrow).await.unwrap();
    assert!(world.tickets().await > tickets);
    let lease = world.claim_at(tomorrow).await.unwrap();
    assert_eq!(lease.reserved, MicroUsd(1_000_000));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_run_settles_into_the_period_it_reserved_in(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 2).await;
    world.budget(Some(&key), 1_000_000, "month", "reject").await;
    world.submit(job(&key)).await;
    world.submit(job(&key)).await;
    let before = Timestamp::parse("2026-10-31T23:59:59Z").unwrap();
    let after = Timestamp::parse("2026-11-01T00:00:01Z").unwrap();
    let old = world.claim_at(before).await.unwrap();
    assert!(world.claim_at(before).await.is_none());

    world.store.sweep(after).await.unwrap();
    let new = world.claim_at(after).await.unwrap();
    assert_eq!(
        new.reserved,
        MicroUsd(1_000_000),
        "the new month has its own money"
    );
    finish(&world, &old, 400_000, after).await;

    let of = |column: &str, month: &str| {
        let start = Timestamp::parse(month).unwrap().0;
        format!("select {column} from budget_period where period_start = {start}")
    };
    let (october, november) = ("2026-10-01T00:00:00Z", "2026-11-01T00:00:00Z");
    assert_eq!(world.number(&of("spent", october)).await, 400_000);
    assert_eq!(world.number(&of("reserved", october)).await, 0);
    assert_eq!(world.number(&of("spent", november)).await, 0);
    assert_eq!(world.number(&of("reserved", november)).await, 1_000_000);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_global_budget_holds_the_whole_queue(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    world.budget(None, 1_500_000, "total", "reject").await;
    world.submit(job(&a)).await;
    let waiting = world.submit(job(&b)).await;
    let lease = world.claim().await.unwrap();

    assert!(world.claim().await.is_none());
    assert_eq!(world.store.lane_hold(&b).await.unwrap(), Some(Hold::Budget));
    assert_eq!(
        world
            .number("select count(*) from queue where hold = 'budget'")
            .await,
        1
    );

    let tickets = world.tickets().await;
    finish(&world, &lease, 200_000, NOW).await;
    assert!(world.tickets().await > tickets);
    assert_eq!(world.claim_job(&waiting).await.reserved, MicroUsd(1_000_000));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_raised_limit_frees_what_waits(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    world.budget(Some(&key), 1_000_000, "total", "reject").await;
    world.submit(job(&key)).await;
    let waiting = world.submit(job(&key)).await;
    world.claim().await.unwrap();
    assert!(world.claim().await.is_none());

    world.budget(Some(&key), 3_000_000, "total", "reject").await;
    world.store.sweep(NOW).await.unwrap();

    world.claim_job(&waiting).await;
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_removed_budget_gets_its_reservation_back(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    world.budget(Some(&key), 1_000_000, "total", "reject").await;
    world.submit(job(&key)).await;
    let lease = world.claim().await.unwrap();

    world.database.execute("delete from budget").await;
    finish(&world, &lease, 300_000, NOW).await;

    assert_eq!(state(&world, &key).await, (300_000, 0));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_budget_set_in_mid_run_counts_that_run(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    world.submit(job(&key)).await;
    let lease = world.claim().await.unwrap();

    world.budget(Some(&key), 1_000_000, "total", "reject").await;
    world.budget(None, 1_000_000, "total", "reject").await;
    finish(&world, &lease, 300_000, NOW).await;

    assert_eq!(state(&world, &key).await, (300_000, 0));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_default_budget_follows_its_variable_and_yields_to_a_person(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 1).await);
    world.budget(Some(&b), 7, "month", "hold").await;
    for limit in [50, 50, 80] {
        for key in [&a, &b] {
            world
                .store
                .put_default_budget(key, MicroUsd(limit), NOW)
                .await
                .unwrap();
        }
    }

    let of = |key: &str| format!("select limit_amount * 100 + version from budget where scope_id = '{key}'");
    assert_eq!(world.number(&of("a")).await, 8002, "changed once");
    assert_eq!(world.number(&of("b")).await, 701);
    assert!(!world.store.budgets_of(&a, NOW).await.unwrap()[0].refuses());
}

async fn a_ledger_line_is_unique(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let lease = world.claim_job(&stored).await;
    world.finish(&lease, failed()).await;

    let mut tx = world.store.begin().await.unwrap();
    let written = tx.settle(&lease.job, &spend(999), NOW).await.unwrap();
    tx.commit().await.unwrap();

    assert_eq!(written, MicroUsd::ZERO);
    assert_eq!(world.number("select cost from ledger").await, 120_000);
    let lines = world.number("select count(*) from ledger").await;
    assert_eq!(lines, 1);
}
