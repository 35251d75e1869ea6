//! Money: reserved before a run, settled after it, never more than the limit.

use super::{NOW, World, at, claimant, failed, job, report, spend};
use shared::budget::{Budget, OnExceeded, Period, Scope};
use shared::clock::Timestamp;
use shared::id::KeyId;
use shared::job::{Ending, Hold, JobStatus, Lease, NewJob, Report};
use shared::money::MicroUsd;
use shared::storage::{AdjustBudget, Claim, DeleteBudget, Finish, PutBudget, Store};
use std::time::Duration;
use tests::database::Db;

tests::both!(
    a_run_reserves_its_whole_cap_and_settles_what_it_cost,
    what_does_not_fit_waits_while_something_is_reserved,
    a_cap_shrinks_to_what_is_left,
    a_job_that_nothing_is_left_for_fails,
    a_job_that_fails_for_money_lets_its_group_go_on,
    a_budget_may_hold_its_jobs_until_the_next_period,
    a_run_settles_into_the_period_it_reserved_in,
    a_job_that_waits_for_the_global_budget_holds_its_lane_only,
    a_raised_limit_frees_what_waits,
    a_removed_budget_gets_its_reservation_back,
    a_budget_set_in_mid_run_counts_that_run,
    a_default_budget_follows_its_variable_and_yields_to_a_person,
    a_ledger_line_is_unique,
    a_raised_limit_frees_what_waits_at_once,
    a_budget_counts_what_was_spent_before_it,
    a_limit_below_what_was_spent_is_refused,
    a_budget_of_an_unknown_key_is_refused,
    only_the_expected_version_is_changed,
    another_period_keeps_what_is_reserved_and_spent,
    a_raised_limit_does_not_count_the_last_months_runs,
    a_budget_that_is_taken_away_is_the_default_again,
    an_adjustment_counts_in_both_budgets_and_frees,
    thresholds_are_told_once_a_period,
    a_raised_limit_takes_alerts_back,
    held_lanes_are_looked_at_however_many_there_are,
    a_settlement_and_a_raise_at_once_leave_nothing_waiting,
    budgets_that_change_all_the_time_lose_nothing
);

/// Finishes with this cost.
async fn finish(world: &World, lease: &shared::job::Lease, micros: i64, now: Timestamp) {
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
    assert_eq!(
        world
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
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
            .number("select count(*) from lane where running = 0 and top_priority is null and hold is null")
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

async fn a_job_that_waits_for_the_global_budget_holds_its_lane_only(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    let c = world.key("c", 9).await;
    world.budget(None, 1_500_000, "total", "reject").await;
    world.submit(job(&a)).await;
    let waiting = world.submit(job(&b)).await;
    let lease = world.claim().await.unwrap();
    let held = "select count(*) from queue where hold = 'budget'";

    assert!(world.claim().await.is_none());
    assert_eq!(world.store.lane_hold(&b).await.unwrap(), Some(Hold::Budget));
    assert_eq!(world.number(held).await, 0);
    let max_cost = MicroUsd(500_000);
    let small = world.submit(NewJob { max_cost, ..job(&c) }).await;
    world.claim_job(&small).await;

    // Now nothing is left for anybody.
    world.submit(NewJob { max_cost, ..job(&c) }).await;
    assert!(world.claim().await.is_none());
    assert_eq!(world.number(held).await, 1);

    let tickets = world.tickets().await;
    finish(&world, &lease, 0, NOW).await;
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
    let limit = MicroUsd(2_000_000);
    world.store.put_default_budget(&key, limit, NOW).await.unwrap();

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

    let again = world.finish(&lease, failed()).await;

    assert_eq!(again, Finish::Lost);
    assert_eq!(world.number("select cost from ledger").await, 120_000);
    let lines = world.number("select count(*) from ledger").await;
    assert_eq!(lines, 1);
}

fn of_key(key: &KeyId, limit: i64) -> Budget {
    Budget::default_of(key, MicroUsd(limit))
}

fn global(limit: i64) -> Budget {
    Budget {
        scope: Scope::Global,
        ..of_key(&KeyId::known("x"), limit)
    }
}

/// Sets a budget; when it can't be, nothing is left of it.
async fn put(store: &Store, budget: &Budget, expected: Option<i64>, now: Timestamp) -> PutBudget {
    let mut tx = store.begin().await.unwrap();
    let put = tx.put_budget(budget, expected, now).await.unwrap();
    match put {
        PutBudget::Stored => tx.commit().await.unwrap(),
        _ => tx.rollback().await.unwrap(),
    }
    put
}

async fn adjust(store: &Store, scope: &Scope, delta: i64, now: Timestamp) -> AdjustBudget {
    let mut tx = store.begin().await.unwrap();
    let adjusted = tx
        .adjust_budget(scope, MicroUsd(delta), "why", now)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    adjusted
}

async fn status(world: &World, scope: &Scope, now: Timestamp) -> shared::budget::BudgetStatus {
    world.store.budget(scope, now).await.unwrap().unwrap()
}

async fn a_raised_limit_frees_what_waits_at_once(db: Db) {
    for budget in [
        |key: &KeyId, limit| of_key(key, limit),
        |_: &KeyId, limit| global(limit),
    ] {
        let world = World::new(db).await;
        let key = world.key("a", 9).await;
        put(&world.store, &budget(&key, 1_000_000), None, NOW).await;
        world.submit(job(&key)).await;
        let waiting = world.submit(job(&key)).await;
        world.claim().await.unwrap();
        assert!(world.claim().await.is_none());
        assert_eq!(world.store.lane_hold(&key).await.unwrap(), Some(Hold::Budget));
        let tickets = world.tickets().await;

        assert_eq!(
            put(&world.store, &budget(&key, 3_000_000), None, NOW).await,
            PutBudget::Stored
        );

        assert!(world.tickets().await > tickets, "a slot is told to look");
        world.claim_job(&waiting).await;
        assert_eq!(world.faults().await, [""; 0]);
    }
}

async fn a_budget_counts_what_was_spent_before_it(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    for key in [&a, &b] {
        world.submit(job(key)).await;
        let lease = world.claim().await.unwrap();
        finish(&world, &lease, 300_000, NOW).await;
    }

    put(&world.store, &of_key(&a, 5_000_000), None, NOW).await;
    put(&world.store, &global(5_000_000), None, NOW).await;
    world
        .store
        .put_default_budget(&b, MicroUsd(1), NOW)
        .await
        .unwrap();

    let spent = async |scope| status(&world, &scope, NOW).await.spent;
    assert_eq!(spent(Scope::Key(a)).await, MicroUsd(300_000));
    assert_eq!(spent(Scope::Global).await, MicroUsd(600_000));
    assert_eq!(
        spent(Scope::Key(b)).await,
        MicroUsd(300_000),
        "a default one may be spent from the start"
    );
}

async fn a_limit_below_what_was_spent_is_refused(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    put(&world.store, &of_key(&key, 5_000_000), None, NOW).await;
    world.submit(job(&key)).await;
    let lease = world.claim().await.unwrap();
    finish(&world, &lease, 300_000, NOW).await;

    let refused = put(&world.store, &of_key(&key, 299_999), None, NOW).await;
    assert_eq!(refused, PutBudget::BelowSpent(MicroUsd(300_000)));
    assert_eq!(
        status(&world, &Scope::Key(key.clone()), NOW).await.budget.limit,
        MicroUsd(5_000_000)
    );
    assert_eq!(
        put(&world.store, &of_key(&key, 300_000), None, NOW).await,
        PutBudget::Stored
    );
}

async fn a_budget_of_an_unknown_key_is_refused(db: Db) {
    let world = World::new(db).await;
    let unknown = KeyId::known("key_12345678");
    assert_eq!(
        put(&world.store, &of_key(&unknown, 1), None, NOW).await,
        PutBudget::NoSuchKey
    );
    assert_eq!(
        adjust(&world.store, &Scope::Key(unknown), 1, NOW).await,
        AdjustBudget::NoSuchBudget
    );
    assert_eq!(world.number("select count(*) from budget").await, 0);
    assert_eq!(world.number("select count(*) from ledger").await, 0);
}

async fn only_the_expected_version_is_changed(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let scope = Scope::Key(key.clone());
    let put = async |limit, expected| put(&world.store, &of_key(&key, limit), expected, NOW).await;
    assert_eq!(put(1, Some(1)).await, PutBudget::Changed, "there is none");
    assert_eq!(put(1, None).await, PutBudget::Stored);
    assert_eq!(put(2, Some(1)).await, PutBudget::Stored);
    assert_eq!(put(3, Some(1)).await, PutBudget::Changed);
    let now = status(&world, &scope, NOW).await;
    assert_eq!((now.budget.limit, now.version), (MicroUsd(2), 2));

    let mut tx = world.store.begin().await.unwrap();
    let deleted = tx.delete_budget(&scope, MicroUsd(9), Some(1), NOW).await.unwrap();
    assert_eq!(deleted, DeleteBudget::Changed);
}

async fn another_period_keeps_what_is_reserved_and_spent(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let scope = Scope::Key(key.clone());
    let yesterday = Timestamp(NOW.0 - 86_400_000_000);
    put(&world.store, &of_key(&key, 10_000_000), None, yesterday).await;
    put(&world.store, &global(10_000_000), None, yesterday).await;
    for _ in 0..2 {
        world.submit(job(&key)).await;
        let lease = world.claim_at(yesterday).await.unwrap();
        finish(&world, &lease, 400_000, yesterday).await;
    }
    for _ in 0..2 {
        world.submit(job(&key)).await;
    }
    let began_yesterday = world.claim_at(yesterday).await.unwrap();
    let began_today = world.claim_at(NOW).await.unwrap();

    for budget in [of_key(&key, 10_000_000), global(10_000_000)] {
        let daily = Budget {
            period: Period::Day,
            ..budget
        };
        assert_eq!(put(&world.store, &daily, None, NOW).await, PutBudget::Stored);
    }
    let today = status(&world, &scope, NOW).await;
    assert_eq!(
        (today.spent, today.reserved),
        (MicroUsd::ZERO, MicroUsd(1_000_000)),
        "the run that began today"
    );
    finish(&world, &began_yesterday, 50_000, NOW).await;
    finish(&world, &began_today, 70_000, NOW).await;

    for scope in [&scope, &Scope::Global] {
        let today = status(&world, scope, NOW).await;
        assert_eq!(
            (today.spent, today.reserved),
            (MicroUsd(70_000), MicroUsd::ZERO),
            "{scope:?}"
        );
    }
    // And back again: nothing is lost, nothing is counted twice.
    put(&world.store, &of_key(&key, 10_000_000), None, NOW).await;
    assert_eq!(status(&world, &scope, NOW).await.spent, MicroUsd(920_000));
    assert_eq!(
        world
            .number("select cast(sum(reserved) as bigint) from budget_period")
            .await,
        0
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_raised_limit_does_not_count_the_last_months_runs(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let monthly = |limit| Budget {
        period: Period::Month,
        ..of_key(&key, limit)
    };
    let before = Timestamp::parse("2026-10-31T23:59:59Z").unwrap();
    let after = Timestamp::parse("2026-11-01T00:00:01Z").unwrap();
    put(&world.store, &monthly(1_000_000), None, before).await;
    world.submit(job(&key)).await;
    let old = world.claim_at(before).await.unwrap();
    finish(&world, &old, 400_000, after).await;

    put(&world.store, &monthly(2_000_000), None, after).await;
    let scope = Scope::Key(key.clone());
    assert_eq!(status(&world, &scope, after).await.spent, MicroUsd::ZERO);
    // Also when all is added up anew.
    world.database.execute("delete from budget").await;
    put(&world.store, &monthly(2_000_000), None, after).await;
    assert_eq!(status(&world, &scope, after).await.spent, MicroUsd::ZERO);
    assert_eq!(status(&world, &scope, before).await.spent, MicroUsd(400_000));
}

async fn a_budget_that_is_taken_away_is_the_default_again(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let scope = Scope::Key(key.clone());
    let monthly = Budget {
        period: Period::Month,
        on_exceeded: OnExceeded::Hold,
        ..of_key(&key, 1_000_000)
    };
    put(&world.store, &monthly, None, NOW).await;
    world.submit(job(&key)).await;
    let waiting = world.submit(job(&key)).await;
    let running = world.claim().await.unwrap();
    assert!(world.claim().await.is_none());

    let delete = async |scope: &Scope| {
        let mut tx = world.store.begin().await.unwrap();
        let deleted = tx
            .delete_budget(scope, MicroUsd(9_000_000), None, NOW)
            .await
            .unwrap();
        tx.commit().await.unwrap();
        deleted
    };
    assert_eq!(delete(&scope).await, DeleteBudget::Deleted);
    world.claim_job(&waiting).await;
    finish(&world, &running, 100_000, NOW).await;

    let now = status(&world, &scope, NOW).await;
    assert!(now.is_default);
    assert_eq!(now.budget, of_key(&key, 9_000_000));
    assert_eq!(
        (now.spent, now.reserved),
        (MicroUsd(100_000), MicroUsd(1_000_000))
    );
    assert_eq!(delete(&Scope::Global).await, DeleteBudget::NoSuchBudget);
    put(&world.store, &global(9_000_000), None, NOW).await;
    assert_eq!(delete(&Scope::Global).await, DeleteBudget::Deleted);
    assert_eq!(world.store.budget(&Scope::Global, NOW).await.unwrap(), None);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn an_adjustment_counts_in_both_budgets_and_frees(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let scope = Scope::Key(key.clone());
    let held = Budget {
        on_exceeded: OnExceeded::Hold,
        ..of_key(&key, 1_000_000)
    };
    put(&world.store, &held, None, NOW).await;
    put(&world.store, &global(9_000_000), None, NOW).await;
    assert_eq!(
        adjust(&world.store, &scope, 1_000_000, NOW).await,
        AdjustBudget::Adjusted
    );
    let waiting = world.submit(job(&key)).await;
    assert!(world.claim().await.is_none());
    let tickets = world.tickets().await;

    adjust(&world.store, &scope, -600_000, NOW).await;
    adjust(&world.store, &Scope::Global, 50_000, NOW).await;

    assert!(world.tickets().await > tickets);
    assert_eq!(world.claim_job(&waiting).await.reserved, MicroUsd(600_000));
    assert_eq!(status(&world, &scope, NOW).await.spent, MicroUsd(400_000));
    assert_eq!(status(&world, &Scope::Global, NOW).await.spent, MicroUsd(450_000));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn thresholds_are_told_once_a_period(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let scope = Scope::Key(key.clone());
    let daily = Budget {
        period: Period::Day,
        ..of_key(&key, 1_000_000)
    };
    put(&world.store, &daily, None, NOW).await;
    for (cost, later, told) in [
        (799_999, 0, vec![]),
        (1, 1, vec![(80, at(1))]),
        (100_000, 2, vec![(80, at(1))]),
        (100_000, 3, vec![(80, at(1)), (100, at(3))]),
    ] {
        adjust(&world.store, &scope, cost, at(later)).await;
        assert_eq!(status(&world, &scope, at(later)).await.alerts, told);
    }

    let tomorrow = at(86_400);
    assert_eq!(status(&world, &scope, tomorrow).await.alerts, []);
    world.submit(job(&key)).await;
    let lease = world.claim_at(tomorrow).await.unwrap();
    finish(&world, &lease, 850_000, tomorrow).await;
    assert_eq!(status(&world, &scope, tomorrow).await.alerts, [(80, tomorrow)]);
}

async fn a_raised_limit_takes_alerts_back(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let scope = Scope::Key(key.clone());
    put(&world.store, &of_key(&key, 1_000_000), None, NOW).await;
    adjust(&world.store, &scope, 1_000_000, NOW).await;

    put(&world.store, &of_key(&key, 1_250_000), None, at(1)).await;
    assert_eq!(
        status(&world, &scope, NOW).await.alerts,
        [(80, NOW)],
        "still 80 %, and told already"
    );
    put(&world.store, &of_key(&key, 2_000_000), None, at(2)).await;
    assert_eq!(status(&world, &scope, NOW).await.alerts, []);
    put(&world.store, &of_key(&key, 1_000_000), None, at(3)).await;
    assert_eq!(
        status(&world, &scope, NOW).await.alerts,
        [(80, at(3)), (100, at(3))]
    );
}

/// More than are read at once wait for money; the last of them gets some.
async fn held_lanes_are_looked_at_however_many_there_are(db: Db) {
    let world = World::new(db).await;
    let last = world.key("z", 9).await;
    world.budget(Some(&last), 1_000_000, "day", "hold").await;
    world
        .database
        .execute(
            "insert into lane (key_id, max_running)
             with recursive number(n) as (select 1 union all select n + 1 from number where n < 250)
             select 'k' || n, 1 from number",
        )
        .await;
    world
        .database
        .execute(
            "insert into budget (scope, scope_id, limit_amount, period, alert_thresholds, on_exceeded, origin, updated_at)
             select 'key', key_id, 1, 'total', '[]', 'hold', 'set', 0 from lane where key_id <> 'z'",
        )
        .await;
    world
        .database
        .execute("insert into budget_period (scope, scope_id, period_start, spent) select 'key', key_id, 0, 1 from lane")
        .await;
    world.database.execute("update lane set hold = 'budget'").await;

    world.store.sweep(NOW).await.unwrap();

    assert_eq!(
        world.number("select count(*) from lane where hold is null").await,
        1
    );
    assert_eq!(world.store.lane_hold(&last).await.unwrap(), None);
}

/// A run ends, its budget is raised, and somebody claims, all in the same moment, fifty times: whatever comes first,
/// what waited can begin without anybody's help.
async fn a_settlement_and_a_raise_at_once_leave_nothing_waiting(db: Db) {
    let world = World::new(db).await;
    let others = [world.other().await, world.other().await, world.other().await];
    let key = world.key("a", 9).await;
    // A job that is claimed after the settlement and before the raise would rightly fail, if it might.
    let [of_key, global] = [of_key(&key, 0), global(0)].map(|budget| {
        move |limit| Budget {
            limit: MicroUsd(limit),
            on_exceeded: OnExceeded::Hold,
            ..budget.clone()
        }
    });
    let mut limit = 1_000_000;
    put(&world.store, &of_key(limit), None, NOW).await;
    put(&world.store, &global(limit), None, NOW).await;
    world.submit(job(&key)).await;
    let mut running = world.claim().await.unwrap();

    for round in 0..50 {
        world.submit(job(&key)).await;
        limit += 1_000_000;
        let report = Report {
            spend: spend(1_000_000),
            ..report(Ending::Done)
        };
        let both = async {
            put(&others[1], &of_key(limit), None, NOW).await;
            put(&others[1], &global(limit), None, NOW).await;
        };
        let claiming = async {
            loop {
                match others[2].claim(&claimant(), NOW).await.unwrap() {
                    Claim::Run(lease) => return Some(*lease),
                    Claim::TryAgain => {}
                    Claim::Nothing => return None,
                }
            }
        };
        let (ended, (), claimed) = tokio::join!(others[0].finish(&running, &report, NOW), both, claiming);
        ended.unwrap();
        let next = match claimed {
            Some(lease) => lease,
            None => world
                .claim()
                .await
                .unwrap_or_else(|| panic!("round {round}: it waits")),
        };
        assert_eq!(next.reserved, MicroUsd(1_000_000), "round {round}");
        running = next;
        assert_eq!(world.faults().await, [""; 0], "round {round}");
    }

    finish(&world, &running, 1_000_000, NOW).await;
    assert_eq!(state(&world, &key).await, (51_000_000, 0));
    assert_eq!(world.faults().await, [""; 0]);
}

/// Budgets come, go, and change their periods, and spends are adjusted, while jobs run: in the end each budget has
/// spent what the ledger says, and nothing is reserved.
async fn budgets_that_change_all_the_time_lose_nothing(db: Db) {
    let world = World::new(db).await;
    let keys = [world.key("a", 4).await, world.key("b", 4).await];
    for key in &keys {
        put(&world.store, &of_key(key, 1_000_000_000), None, NOW).await;
        for _ in 0..60 {
            world.submit(job(key)).await;
        }
    }
    let (changer, adjuster, deleter) = (world.other().await, world.other().await, world.other().await);
    let runners = [
        world.other().await,
        world.other().await,
        world.other().await,
        world.other().await,
    ];
    let done = std::sync::atomic::AtomicBool::new(false);
    let goes_on = || !done.load(std::sync::atomic::Ordering::Relaxed);

    let running = async {
        let runs = runners.iter().map(|store| async move {
            let mut idle = 0;
            while idle < 100 {
                match store.claim(&claimant(), NOW).await.unwrap() {
                    Claim::Run(lease) => {
                        idle = 0;
                        let lease: Lease = *lease;
                        let report = Report {
                            spend: spend(10_001),
                            ..report(Ending::Done)
                        };
                        store.finish(&lease, &report, NOW).await.unwrap();
                    }
                    Claim::TryAgain => {}
                    Claim::Nothing => {
                        idle += 1;
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                }
            }
        });
        futures_util::future::join_all(runs).await;
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let changing = async {
        let periods = [Period::Day, Period::Total, Period::Month, Period::Week];
        for period in periods.into_iter().cycle() {
            if !goes_on() {
                return;
            }
            for budget in [
                of_key(&keys[0], 1_000_000_000),
                global(1_000_000_000),
                of_key(&keys[1], 900_000_000),
            ] {
                put(&changer, &Budget { period, ..budget }, None, NOW).await;
            }
        }
    };
    let adjusting = async {
        while goes_on() {
            adjust(&adjuster, &Scope::Key(keys[0].clone()), 7, NOW).await;
            adjust(&adjuster, &Scope::Global, -3, NOW).await;
        }
    };
    let deleting = async {
        while goes_on() {
            for scope in [Scope::Global, Scope::Key(keys[1].clone())] {
                let mut tx = deleter.begin().await.unwrap();
                tx.delete_budget(&scope, MicroUsd(1_000_000_000), None, NOW)
                    .await
                    .unwrap();
                tx.commit().await.unwrap();
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        }
    };
    tokio::join!(running, changing, adjusting, deleting);

    assert_eq!(
        world
            .number("select count(*) from job where status <> 'done'")
            .await,
        0
    );
    for key in &keys {
        put(&world.store, &of_key(key, 1_000_000_000), None, NOW).await;
    }
    for key in &keys {
        let ledger = world
            .number(&format!(
                "select cast(sum(cost) as bigint) from ledger where key_id = '{key}'"
            ))
            .await;
        let now = status(&world, &Scope::Key(key.clone()), NOW).await;
        assert_eq!(
            (now.spent, now.reserved),
            (MicroUsd(ledger), MicroUsd::ZERO),
            "{key}"
        );
    }
    // Whatever the last change left, all periods hold NOW, so what is counted is the whole ledger.
    if let Some(now) = world.store.budget(&Scope::Global, NOW).await.unwrap() {
        let ledger = world.number("select cast(sum(cost) as bigint) from ledger").await;
        assert_eq!((now.spent, now.reserved), (MicroUsd(ledger), MicroUsd::ZERO));
    }
    assert_eq!(
        world
            .number("select cast(sum(reserved) as bigint) from budget_period")
            .await,
        0
    );
    assert_eq!(
        world
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
}
