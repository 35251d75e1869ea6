//! What the sweeper mends and clears away.

use super::{NOW, World, at, job};
use shared::clock;
use shared::job::{Ending, NewJob};
use shared::storage::{QUEUE, Swept};
use tests::database::Db;

tests::both!(
    missing_tickets_are_topped_up,
    used_tickets_are_removed,
    a_hint_that_is_too_low_is_raised,
    a_lane_that_counts_wrong_is_repaired,
    hundreds_of_due_jobs_are_released_in_one_sweep,
    sweepers_at_once_do_not_disturb_each_other
);

/// The queue library's table of entries.
fn tickets_table(db: Db) -> &'static str {
    match db {
        Db::Sqlite => "Jobs",
        Db::Postgres => "apalis.jobs",
    }
}

async fn missing_tickets_are_topped_up(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 3).await, world.key("b", 100).await);
    world.key("idle", 100).await;
    assert_eq!(world.store.sweep(NOW).await.unwrap(), Swept::default());
    world.submit(job(&a)).await;
    world
        .database
        .execute(&format!("delete from {}", tickets_table(db)))
        .await;

    let swept = world.store.sweep(NOW).await.unwrap();
    assert_eq!((swept.tickets, world.tickets().await), (1, 1));
    assert_eq!(
        world.store.sweep(NOW).await.unwrap().tickets,
        0,
        "they are there now"
    );

    let mut tx = world.store.begin().await.unwrap();
    for _ in 0..100 {
        tx.insert_job(&job(&b)).await.unwrap();
    }
    tx.commit().await.unwrap();
    world
        .database
        .execute(&format!("delete from {}", tickets_table(db)))
        .await;
    world.store.sweep(NOW).await.unwrap();
    assert_eq!(world.tickets().await, 64, "enough to wake everybody");

    world
        .database
        .execute(&format!("delete from {}", tickets_table(db)))
        .await;
    world.database.execute("update queue set paused = true").await;
    assert_eq!(
        world.store.sweep(NOW).await.unwrap().tickets,
        0,
        "nothing may start"
    );
}

async fn used_tickets_are_removed(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    for _ in 0..6 {
        world.submit(job(&key)).await;
    }
    let table = tickets_table(db);
    let ids = world
        .database
        .texts(&format!("select id from {table} order by id"))
        .await;
    // The queue library's times are the database's own.
    let seconds = clock::now().unix_seconds();
    let time = |seconds: i64| match db {
        Db::Sqlite => seconds.to_string(),
        Db::Postgres => format!("to_timestamp({seconds})"),
    };
    let worker_table = if db == Db::Sqlite {
        "Workers"
    } else {
        "apalis.workers"
    };
    for (worker, seen) in [
        ("gone", seconds - 90_000),
        ("holds", seconds - 90_000),
        // It has registered by a clock that is late.
        ("alive", seconds - 80_000),
    ] {
        world
            .database
            .execute(&format!(
                "insert into {worker_table} (id, worker_type, storage_name, last_seen)
                 values ('{worker}', '{QUEUE}', 's', {})",
                time(seen)
            ))
            .await;
    }
    for (id, status, worker, locked) in [
        (&ids[0], "Done", "gone", 1),
        (&ids[1], "Failed", "gone", 1),
        (&ids[2], "Killed", "gone", 1),
        (&ids[3], "Queued", "gone", 700),
        (&ids[4], "Queued", "holds", 300),
    ] {
        let sql = format!(
            "update {table} set status = '{status}', lock_by = '{worker}', lock_at = {} where id = '{id}'",
            time(seconds - locked)
        );
        assert_eq!(world.database.execute(&sql).await, 1);
    }

    // Whatever this process takes for the time.
    world.store.sweep(at(1_000_000)).await.unwrap();

    let left = world
        .database
        .texts(&format!("select id from {worker_table} order by id"))
        .await;
    assert_eq!(left, ["alive", "holds"]);
    let left = world
        .number(&format!(
            "select count(*) from {table} where id in ('{}', '{}')",
            ids[4], ids[5]
        ))
        .await;
    assert_eq!(left, 2);
}

async fn a_hint_that_is_too_low_is_raised(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = world
        .submit(NewJob {
            priority: 4,
            ..job(&key)
        })
        .await;
    // As if a process had died between its commit and its correction; on SQLite there is no such moment.
    if db == Db::Postgres {
        for top in ["null", "-3"] {
            world
                .database
                .execute(&format!("update lane set top_priority = {top}"))
                .await;
            world.store.sweep(NOW).await.unwrap();
            assert_eq!(world.number("select top_priority from lane").await, 4);
        }
    }
    world.claim_job(&stored).await;
}

async fn a_lane_that_counts_wrong_is_repaired(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 2).await);
    let starved = world.submit(job(&a)).await;
    world.submit(job(&b)).await;
    world
        .database
        .execute("update lane set running = 1 where key_id = 'a'")
        .await;
    let lease = world.claim().await.unwrap();
    assert_eq!(lease.job.key_id, b);
    assert!(world.claim().await.is_none(), "the other lane seems to be full");

    world.store.sweep(NOW).await.unwrap();
    assert_eq!(world.claim_job(&starved).await.job.key_id, a);
    assert_eq!(world.faults().await, [""; 0]);

    // One that counts too few ends its runs all the same.
    world.database.execute("update lane set running = 0").await;
    world.finish(&lease, Ending::Done).await;
    assert_eq!(
        world.store.repair_counters().await.unwrap(),
        1,
        "only the other is wrong now"
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn hundreds_of_due_jobs_are_released_in_one_sweep(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    let mut tx = world.store.begin().await.unwrap();
    for number in 0..250 {
        let key = if number % 3 == 0 { &a } else { &b };
        let run_after = Some(at(10 + number % 7));
        tx.insert_job(&NewJob {
            run_after,
            ..job(key)
        })
        .await
        .unwrap();
    }
    tx.commit().await.unwrap();

    assert_eq!(world.store.sweep(at(20)).await.unwrap().due, 250);

    assert_eq!(
        world
            .number("select count(*) from lane where top_priority = 0")
            .await,
        2
    );
    assert_eq!(
        world
            .number("select count(*) from job where hold = '' and run_after is null")
            .await,
        250
    );
}

async fn sweepers_at_once_do_not_disturb_each_other(db: Db) {
    let world = World::new(db).await;
    let keys = [
        world.key("a", 9).await,
        world.key("b", 9).await,
        world.key("c", 9).await,
    ];
    for round in 0..5 {
        for key in &keys {
            for _ in 0..10 {
                world
                    .submit(NewJob {
                        run_after: Some(at(1 + round)),
                        ..job(key)
                    })
                    .await;
            }
        }
        let sweepers: Vec<_> = (0..4)
            .map(|_| {
                let store = world.store.clone();
                tokio::spawn(async move { store.sweep(at(1 + round)).await.unwrap().due })
            })
            .collect();
        let mut due = 0;
        for sweeper in sweepers {
            due += sweeper.await.unwrap();
        }
        assert_eq!(due, 30, "each job is released once");
    }
}
