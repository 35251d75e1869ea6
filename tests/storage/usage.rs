//! What was used, as sums that are kept: equal to what is booked, at every moment.

use super::{World, at, failed, job};
use shared::clock::Timestamp;
use shared::id::KeyId;
use shared::job::{Ending, JobKind, JobStatus, NewJob};
use shared::money::MicroUsd;
use shared::storage::{LedgerGroup, LedgerPart, Usage};
use sqlx::Executor as _;
use std::collections::BTreeMap;
use tests::database::Db;

tests::both!(
    sums_are_those_of_the_entries_whatever_is_counted,
    totals_follow_jobs_whatever_is_counted
);
tests::once!(an_entry_that_commits_late_is_counted);

const MINUTE: i64 = 60_000_000;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Books a cost at this time.
async fn book(world: &World, (number, at): (i64, i64), key: &str) {
    let (model, session) = (number % 3, number % 4);
    let sql = format!(
        "insert into ledger (at, key_id, job_id, attempt, session_id, model, cost, input_tokens, output_tokens, estimated)
         values ({at}, '{key}', 'job_{number:032x}', 1, {}, 'model {model}', {}, {number}, 2, {})",
        if session == 0 { "null".to_owned() } else { format!("'ses_{session:032x}'") },
        number * 7 + 1,
        if number % 5 == 0 { "true" } else { "false" },
    );
    world.database.execute(&sql).await;
}

/// The sums of a part by a grouping: name, cost, estimated cost, input tokens, entries.
type Sums = Vec<(String, i64, i64, i64, i64)>;

async fn kept(world: &World, part: &LedgerPart, group: LedgerGroup) -> Sums {
    // Page by page.
    let mut sums: Sums = Vec::new();
    loop {
        let beyond = sums.last().map(|sum| sum.0.clone());
        let page = world
            .store
            .ledger_sums(part, group, beyond.as_deref(), 2)
            .await
            .unwrap();
        if page.is_empty() {
            return sums;
        }
        sums.extend(page.into_iter().map(|sum| {
            (
                sum.name,
                sum.cost.0,
                sum.estimated_cost.0,
                sum.input_tokens,
                sum.entries,
            )
        }));
    }
}

async fn added_up(world: &World, part: &LedgerPart, group: LedgerGroup) -> Sums {
    let entries = world.store.ledger_entries(part, None, 10_000).await.unwrap();
    let mut sums: BTreeMap<String, (i64, i64, i64, i64)> = BTreeMap::new();
    for entry in entries {
        let name = match group {
            LedgerGroup::Day => (entry.at.0 / DAY).to_string(),
            LedgerGroup::Key => entry.key_id.to_string(),
            LedgerGroup::Model => entry.model.unwrap_or_default(),
            LedgerGroup::Session => entry.session_id.map(|id| id.to_string()).unwrap_or_default(),
        };
        let sum = sums.entry(name).or_default();
        sum.0 += entry.cost.0;
        sum.1 += if entry.estimated { entry.cost.0 } else { 0 };
        sum.2 += entry.input_tokens;
        sum.3 += 1;
    }
    sums.into_iter()
        .map(|(name, sum)| (name, sum.0, sum.1, sum.2, sum.3))
        .collect()
}

async fn check(world: &World, start: i64) {
    let parts = [
        (0, 30 * DAY),
        (7, 3 * DAY + 5 * HOUR + 17 * MINUTE + 3),
        (DAY - 1, 2 * DAY + 1),
        (HOUR + 5, HOUR + 6 * MINUTE),
        (2 * DAY, 2 * DAY + MINUTE),
        (3 * DAY + 10, 3 * DAY + 50),
        (5 * DAY, 5 * DAY),
    ];
    for (from, to) in parts {
        for key_id in [Some("a"), Some("b"), None] {
            let part = LedgerPart {
                key_id: key_id.map(KeyId::known),
                from: Timestamp(start + from),
                to: Timestamp(start + to),
            };
            for group in [
                LedgerGroup::Day,
                LedgerGroup::Key,
                LedgerGroup::Model,
                LedgerGroup::Session,
            ] {
                assert_eq!(
                    kept(world, &part, group).await,
                    added_up(world, &part, group).await,
                    "{part:?} {group:?}"
                );
            }
        }
    }
    for key in ["a", "b"] {
        let booked = world
            .number(&format!(
                "select cast(coalesce(sum(cost), 0) as bigint) from ledger where key_id = '{key}'"
            ))
            .await;
        assert_eq!(
            world.store.usage(&KeyId::known(key)).await.unwrap().cost(),
            MicroUsd(booked)
        );
    }
}

async fn sums_are_those_of_the_entries_whatever_is_counted(db: Db) {
    let world = World::new(db).await;
    let start = 20_000 * DAY;
    let mut numbers = 1_i64..;
    let mut some = async |count: usize, world: &World| {
        for number in numbers.by_ref().take(count) {
            let at = start + (number * 7_919 * MINUTE + number * 31) % (6 * DAY);
            book(world, (number, at), if number % 2 == 0 { "a" } else { "b" }).await;
        }
    };
    check(&world, start).await;
    some(40, &world).await;
    check(&world, start).await;
    world.store.count_usage().await.unwrap();
    check(&world, start).await;
    let counted = world.number("select count(*) from usage_sum").await;
    assert!(counted > 0);

    // Some are booked late, at a time whose sums are kept already; and one belongs to nobody.
    some(30, &world).await;
    let sql = format!(
        "insert into ledger (at, key_id, cost, reason) values ({}, '', 5, 'x')",
        start + DAY + 9
    );
    world.database.execute(&sql).await;
    check(&world, start).await;
    let other = world.other().await;
    let (one, two) = tokio::join!(world.store.count_usage(), other.count_usage());
    one.and(two).unwrap();
    world.store.count_usage().await.unwrap();
    check(&world, start).await;
    let left = "select count(*) from ledger
                where ledger_number > (select number from usage_counted where source = 'ledger')";
    assert_eq!(world.number(left).await, 0);
}

async fn totals_follow_jobs_whatever_is_counted(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let usage = async || world.store.usage(&key).await.unwrap();
    let of = |usage: &Usage| {
        [
            None,
            Some(JobStatus::Queued),
            Some(JobStatus::Running),
            Some(JobStatus::Done),
            Some(JobStatus::Failed),
            Some(JobStatus::Cancelled),
        ]
        .map(|status| usage.jobs(status))
    };
    for count in [false, true] {
        let before = usage().await;
        let (now, sessions) = (of(&before), before.sessions());
        let mut tx = world.store.begin().await.unwrap();
        tx.put_session(&key, &format!("session {count}"), "{}", at(0), at(0))
            .await
            .unwrap();
        tx.commit().await.unwrap();
        let mut jobs = Vec::new();
        for _ in 0..5 {
            jobs.push(world.submit(job(&key)).await);
        }
        world
            .submit(NewJob {
                kind: JobKind::Chat,
                priority: -1,
                ..job(&key)
            })
            .await;
        if count {
            world.store.count_usage().await.unwrap();
        }
        let lease = world.claim_job(&jobs[0]).await;
        let second = world.claim_job(&jobs[1]).await;
        let third = world.claim_job(&jobs[2]).await;
        assert_eq!(
            of(&usage().await),
            [now[0] + 5, now[1] + 2, now[2] + 3, now[3], now[4], now[5]]
        );
        world.finish(&lease, Ending::Done).await;
        world.finish(&second, failed()).await;
        world.cancel(&jobs[4]).await;
        for _ in 0..2 {
            let after = usage().await;
            assert_eq!(
                of(&after),
                [
                    now[0] + 5,
                    now[1] + 1,
                    now[2] + 1,
                    now[3] + 1,
                    now[4] + 1,
                    now[5] + 1
                ]
            );
            assert_eq!(
                after.messages(),
                before.messages() + 7,
                "six prompts and an answer"
            );
            assert_eq!(after.turns(), before.turns() + 4);
            assert_eq!(after.cost(), before.cost() + MicroUsd(240_000));
            assert_eq!(after.sessions(), sessions + 1);
            if count {
                world.store.count_usage().await.unwrap();
            }
        }
        world.finish(&third, Ending::Done).await;
        world.cancel(&jobs[3]).await;
        let chat = world.claim().await.unwrap();
        world.finish(&chat, Ending::Done).await;
    }
    assert_eq!(world.faults().await, [""; 0]);
}

async fn an_entry_that_commits_late_is_counted() {
    let world = World::new(Db::Postgres).await;
    let start = 20_000 * DAY;
    let mut late = world.database.postgres().await;
    late.execute("begin; insert into ledger (at, key_id, cost) values (1, 'a', 1000)")
        .await
        .unwrap();
    book(&world, (1, start), "a").await;
    world.store.count_usage().await.unwrap();
    late.execute("commit").await.unwrap();
    check(&world, start).await;

    world.store.count_usage().await.unwrap();
    check(&world, start).await;
    let counted = "select number from usage_counted where source = 'ledger'";
    assert_eq!(world.number(counted).await, 2);
}
