//! What the sweeper mends and clears away.

use super::{NOW, World, at, job};
use shared::clock;
use shared::job::{Ending, JobStatus, NewJob};
use shared::storage::{Finish, Queue, Swept};
use tests::database::Db;

tests::both!(
    missing_tickets_are_topped_up,
    used_tickets_are_removed,
    a_lane_that_is_wrong_is_repaired,
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
                 values ('{worker}', '{}', 's', {})",
                Queue::Jobs.name(),
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

async fn a_lane_that_is_wrong_is_repaired(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let priority = 4;
    let first = world
        .submit(NewJob {
            priority,
            ..job(&key)
        })
        .await;
    let lease = world.claim_job(&first).await;
    let second = world
        .submit(NewJob {
            priority,
            ..job(&key)
        })
        .await;
    assert_eq!(world.store.repair_lanes().await.unwrap(), 0);

    for wrong in [
        "running = 0",
        "running = 7",
        "top_priority = null",
        "top_priority = -3",
    ] {
        world.database.execute(&format!("update lane set {wrong}")).await;
        assert_eq!(world.store.repair_lanes().await.unwrap(), 1, "{wrong}");
        assert_eq!(world.faults().await, [""; 0], "{wrong}");
    }

    // The end of a run isn't lost because its lane counts wrong.
    world.database.execute("update lane set running = 0").await;
    let finish = world.finish(&lease, Ending::Done).await;
    assert_eq!(finish, Finish::Became(JobStatus::Done));
    world.claim_job(&second).await;
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
