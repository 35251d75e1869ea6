//! A database that doesn't answer, or answers late: the error says so, and afterwards everything goes on.

use super::{World, grouped, job};
use sqlx::{Connection, Executor};
use std::time::{Duration, Instant};
use tests::client::PATIENCE;
use tests::database::Db;
use tests::{BUSY, eventually};

tests::both!(
    a_lock_that_nobody_gives_back_makes_the_database_unavailable,
    a_connection_that_is_cut_makes_the_database_unavailable,
    probes_at_once_find_out_together,
    a_submission_whose_future_is_dropped_leaves_no_trace
);
tests::once!(a_worker_stopped_in_its_claim_holds_up_the_others_for_seconds_only);

async fn a_lock_that_nobody_gives_back_makes_the_database_unavailable(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let submit = async || {
        let mut tx = world.store.begin().await?;
        tx.insert_job(&grouped(&key, "g")).await?;
        tx.commit().await
    };

    let begin = Instant::now();
    let error = match db {
        Db::Sqlite => {
            let mut other = world.database.sqlite().await;
            other.execute("begin immediate").await.unwrap();
            let error = submit().await.unwrap_err();
            other.close().await.unwrap();
            error
        }
        Db::Postgres => {
            let mut other = world.database.postgres().await;
            let lock = "begin; select pg_advisory_xact_lock(1668638069, hashtext('a/k:g'))";
            other.execute(sqlx::raw_sql(lock)).await.unwrap();
            let error = submit().await.unwrap_err();
            other.close().await.unwrap();
            error
        }
    };

    assert!(error.is_unavailable(), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(15) + BUSY);
    submit().await.unwrap();
    assert_eq!(world.number("select count(*) from job").await, 1);
}

async fn probes_at_once_find_out_together(db: Db) {
    let world = World::new(db).await;
    let lock = "begin immediate; update queue set paused = paused";
    let probes = async {
        let probe = || world.store.is_usable();
        // What was true a moment ago is said for a second.
        eventually(PATIENCE, "four probes that find out", async || {
            let usable = tokio::join!(probe(), probe(), probe(), probe());
            (usable == (false, false, false, false)).then_some(())
        })
        .await;
    };
    match db {
        Db::Sqlite => {
            let mut other = world.database.sqlite().await;
            other.execute(sqlx::raw_sql(lock)).await.unwrap();
            probes.await;
            other.close().await.unwrap();
        }
        Db::Postgres => {
            let mut other = world.database.postgres().await;
            let lock = "begin; lock table lane in exclusive mode";
            other.execute(sqlx::raw_sql(lock)).await.unwrap();
            probes.await;
            other.close().await.unwrap();
        }
    }
    world.store.answers().await;
    eventually(PATIENCE, "a usable database", async || {
        world.store.is_usable().await.then_some(())
    })
    .await;
}

async fn a_connection_that_is_cut_makes_the_database_unavailable(db: Db) {
    // SQLite has no connection to cut.
    if db == Db::Sqlite {
        return;
    }
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let mut tx = world.store.begin().await.unwrap();
    tx.insert_job(&job(&key)).await.unwrap();
    world
        .number("select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'claude-queue' and datname = current_database()")
        .await;

    let error = tx.commit().await.unwrap_err();

    assert!(error.is_unavailable(), "{error:?}");
    // A cut connection is found out when it is used: one more call may fail.
    let stored = loop {
        let mut tx = match world.store.begin().await {
            Ok(tx) => tx,
            Err(error) if error.is_unavailable() => continue,
            Err(error) => panic!("{error:?}"),
        };
        let stored = tx.insert_job(&job(&key)).await.unwrap();
        tx.commit().await.unwrap();
        break stored;
    };
    world.claim_job(&stored).await;
    assert_eq!(world.number("select count(*) from job").await, 1);
}

async fn a_submission_whose_future_is_dropped_leaves_no_trace(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    // A client goes away, or a process is told to stop, at any point of a submission.
    let mut finished = 0;
    for micros in (0..4000).step_by(100) {
        let submission = async {
            let mut tx = world.store.begin().await.unwrap();
            tx.insert_job(&job(&key)).await.unwrap();
            tx.commit().await.unwrap();
        };
        let dropped = tokio::time::timeout(Duration::from_micros(micros), submission).await;
        finished += i64::from(dropped.is_ok());
    }

    // The next writer finds no transaction left open, and what was stored is whole.
    world.submit(job(&key)).await;
    let jobs = world.number("select count(*) from job").await;
    assert!(jobs > finished, "{jobs} jobs, {finished} submissions");
    for table in ["prompt", "event"] {
        assert_eq!(world.number(&format!("select count(*) from {table}")).await, jobs);
    }
    let mut claimed = 0;
    while world.claim().await.is_some() {
        claimed += 1;
        if claimed == 9 {
            break;
        }
    }
    assert_eq!(claimed, 9.min(jobs));
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_worker_stopped_in_its_claim_holds_up_the_others_for_seconds_only() {
    let world = World::new(Db::Postgres).await;
    let key = world.key("a", 9).await;
    let stored = world.submit(job(&key)).await;
    let mut stopped = world.store.begin().await.unwrap();
    stopped.lock_claims().await.unwrap();
    stopped.lock_lane(&key).await.unwrap();

    let begin = Instant::now();
    let lease = loop {
        match world.store.claim(&super::claimant(), super::NOW).await {
            Ok(shared::storage::Claim::Run(lease)) => break lease,
            Ok(_) => {}
            Err(error) => assert!(error.is_unavailable(), "{error:?}"),
        }
        assert!(begin.elapsed() < PATIENCE);
    };

    assert_eq!(lease.job.job_id, stored.job_id);
    let error = stopped.commit().await.unwrap_err();
    assert!(error.is_unavailable(), "{error:?}");
    // No connection is still in a transaction that failed to begin for want of the lock.
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(world.store.begin().await.unwrap());
    }
    drop(held);
    assert_eq!(world.faults().await, [""; 0]);
}
