//! Tickets only wake a slot: lost, damaged and superfluous ones cost a moment at most.

use std::time::{Duration, Instant};

use serde_json::json;
use tests::client::{PATIENCE, at_once};
use tests::database::{Database, Db};
use tests::script::{Step, answer, steps};
use tests::system::System;
use tests::{BUSY, both, eventually, once};

once!(a_ticket_that_a_stopping_worker_had_fetched_costs_no_job,);
both!(
    lost_tickets_cost_no_job,
    a_ticket_that_a_killed_worker_had_fetched_costs_no_job,
    damaged_tickets_cost_no_job,
    tickets_without_jobs_harm_nothing,
    tickets_are_bounded_and_cleared_away,
    a_lost_wake_up_costs_a_moment,
    an_idle_worker_rests,
    a_restart_of_the_queues_worker_drops_no_run,
);

/// The queue library's own table.
fn table(database: &Database) -> &'static str {
    match database.db() {
        Db::Sqlite => "Jobs",
        Db::Postgres => "apalis.jobs",
    }
}

/// Whatever becomes of tickets, the sweeper pushes those that are missing.
async fn lost_tickets_cost_no_job(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let ids = at_once([1, 2, 3].map(|number| {
        let client = client.clone();
        async move { client.play(&answer(&format!("{number}"))).await }
    }))
    .await;
    let database = system.database();
    assert_eq!(
        database
            .execute(&format!("delete from {}", table(database)))
            .await,
        3
    );
    system.add_worker().await;
    let begin = Instant::now();

    at_once(ids.iter().map(|id| client.finished(id))).await;
    assert!(begin.elapsed() < BUSY, "{:?}", begin.elapsed());

    // While a worker is idle too: whatever it was told is gone when it looks.
    let delete = format!("delete from {}", table(system.database()));
    for number in 0..5 {
        let id = client.play(&answer(&format!("{number}"))).await;
        system.database().execute(&delete).await;
        assert_eq!(client.finished(&id).await["status"], "done");
    }
    assert!(
        begin.elapsed() < Duration::from_secs(15) + BUSY,
        "{:?}",
        begin.elapsed()
    );
}

/// A worker that is told to stop doesn't wait for the library's look at the queue, whose commit may come all the same:
/// it takes a ticket that nobody gets. The next sweep misses it and pushes another.
async fn a_ticket_that_a_stopping_worker_had_fetched_costs_no_job() {
    let mut system = System::builder()
        .database(Db::Postgres)
        .sandbox(false)
        .start()
        .await;
    for statement in [
        "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(2); return null; end $$",
        "create constraint trigger slow_fetch after update on apalis.jobs deferrable initially deferred \
         for each row when (new.status = 'Queued') execute function slow()",
    ] {
        system.database().execute(statement).await;
    }
    // A claim at the wake-up itself finds nothing, so that the ticket is fetched.
    let pause = |paused| format!("update queue set paused = {paused}");
    system.database().execute(&pause(true)).await;
    let client = system.client();
    let id = client.play(&answer("not lost")).await;
    let committing = "select count(*) from pg_stat_activity \
                      where datname = current_database() and wait_event = 'PgSleep'";
    eventually(PATIENCE, "a look that commits", async || {
        (system.database().number(committing).await == 1).then_some(())
    })
    .await;

    assert_eq!(system.worker(0).stop(PATIENCE).await, Some(0));

    eventually(PATIENCE, "a fetched ticket", async || {
        (fetched_tickets(&system).await == 1).then_some(())
    })
    .await;
    system
        .database()
        .execute("drop trigger slow_fetch on apalis.jobs")
        .await;
    system.database().execute(&pause(false)).await;
    runs_without_its_ticket(&mut system, &id).await;
}

/// So it is when a worker is killed between the fetch of a ticket and the claim of a job.
async fn a_ticket_that_a_killed_worker_had_fetched_costs_no_job(db: Db) {
    let mut system = System::builder().database(db).sandbox(false).start().await;
    let (begin, end): (&[&str], &str) = match db {
        Db::Sqlite => (
            &[
                "create view slow as with recursive n (i) as (select 1 union all select i + 1 from n where i < 1000000000) \
                 select count(*) as c from n",
                "create trigger slow_claim after update on job when new.status = 'running' begin select c from slow; end",
            ],
            "drop trigger slow_claim",
        ),
        Db::Postgres => (
            &[
                "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(2); return new; end $$",
                "create trigger slow_claim before update on job for each row when (new.status = 'running') \
                 execute function slow()",
            ],
            "drop trigger slow_claim on job",
        ),
    };
    for statement in begin {
        system.database().execute(statement).await;
    }
    let client = system.client();
    let id = client.play(&answer("not lost")).await;
    eventually(PATIENCE, "a fetched ticket", async || {
        (fetched_tickets(&system).await == 1).then_some(())
    })
    .await;

    system.worker(0).kill();

    system.database().execute(end).await;
    runs_without_its_ticket(&mut system, &id).await;
}

/// Tickets that the library has handed out, and that were not acknowledged.
async fn fetched_tickets(system: &System) -> i64 {
    let database = system.database();
    let fetched = format!("select count(*) from {} where status = 'Queued'", table(database));
    database.number(&fetched).await
}

/// Another worker runs the job at its first attempt, although its one ticket is gone.
async fn runs_without_its_ticket(system: &mut System, id: &str) {
    let client = system.client();
    assert_eq!(client.job(id).await.data(200)["attempt"], 0);
    let waiting = format!(
        "select count(*) from {} where status = 'Pending'",
        table(system.database())
    );
    assert_eq!(system.database().number(&waiting).await, 0);

    system.add_worker().await;

    let job = client.finished(id).await;
    assert_eq!(
        (&job["result"]["content"], &job["attempt"]),
        (&json!("not lost"), &json!(1)),
        "{job:#}"
    );
    assert!(fetched_tickets(system).await > 0, "the first one is nobody's");
}

async fn damaged_tickets_cost_no_job(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let first = client.play(&answer("first")).await;
    let second = client.play(&answer("second")).await;
    let garbage = match db {
        Db::Sqlite => "update Jobs set job = x'00ff7b'",
        Db::Postgres => "update apalis.jobs set job = '\\x00ff7b'::bytea",
    };
    assert_eq!(system.database().execute(garbage).await, 2);

    system.add_worker().await;

    assert_eq!(client.finished(&first).await["result"]["content"], "first");
    assert_eq!(client.finished(&second).await["result"]["content"], "second");
}

async fn tickets_without_jobs_harm_nothing(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    for _ in 0..10 {
        let id = client.accepted("never").await;
        client.cancel(&id).await.data(200);
    }

    system.add_worker().await;

    let id = client.play(&answer("the only one")).await;
    assert_eq!(client.finished(&id).await["result"]["content"], "the only one");
    assert_eq!(system.database().number("select count(*) from attempt").await, 1);
}

/// On PostgreSQL a look at the queue costs more with each ticket that waits. So a submission adds none when 64 do:
/// the backlog waits in our own table. Used ones are removed.
async fn tickets_are_bounded_and_cleared_away(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let mut ids = at_once((0..100).map(|_| client.accepted("never"))).await;
    ids.extend(at_once((0..100).map(|_| client.accepted("never"))).await);
    let tickets = format!("select count(*) from {}", table(system.database()));
    let waiting = system.database().number(&tickets).await;
    assert!(
        (1..=128).contains(&waiting),
        "{waiting} tickets wait for 200 jobs"
    );
    at_once(ids.iter().map(|id| client.cancel(id))).await;

    system.add_worker().await;
    let id = client.play(&steps([Step::Sleep(10)])).await;
    client.finished(&id).await;

    eventually(PATIENCE, "few rows in the queue's table", async || {
        (system.database().number(&tickets).await < 50).then_some(())
    })
    .await;
}

/// What a worker does all the time is all that it does most of the time.
async fn an_idle_worker_rests(db: Db) {
    let mut system = System::builder().database(db).start().await;
    let pid = system.worker(0).pid().unwrap();
    let client = system.client();
    client.finished(&client.play(&answer("begun")).await).await;

    let (begin, before) = (Instant::now(), processor_time(pid));
    tokio::time::sleep(Duration::from_secs(3)).await;
    let used = processor_time(pid).saturating_sub(before);

    assert!(used < begin.elapsed() / 8, "{used:?} of {:?}", begin.elapsed());
}

/// How long the processors have worked for a process.
fn processor_time(pid: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum();
    // A hundred ticks a second, on every machine that Linux runs on today.
    Duration::from_millis(ticks * 10)
}

/// A wake-up that comes while the library looks at the queue is lost. The worker repeats each one (`queues.rs` has the test
/// of that), and if all are lost the sweeper wakes a slot.
async fn a_lost_wake_up_costs_a_moment(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    let database = system.database();
    let insert = match db {
        Db::Sqlite => {
            "insert into Jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority) \
             values ('01ARZ3NDEKTSV4RRFFQ69G5FAV', 'jobs', x'7b7d', 'Pending', 0, 1, 0, 0)"
        }
        Db::Postgres => {
            "insert into apalis.jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority) \
             values ('01ARZ3NDEKTSV4RRFFQ69G5FAV', 'jobs', '{}'::bytea, 'Pending', 0, 1, to_timestamp(0), 0)"
        }
    };

    // Without a ticket, and with one of which nobody was told.
    for ticket in [None, Some(insert)] {
        database.execute("update queue set paused = true").await;
        let id = client.play(&answer("at last")).await;
        let used = format!(
            "select count(*) from {} where status = 'Pending'",
            table(database)
        );
        eventually(PATIENCE, "a used ticket", async || {
            (database.number(&used).await == 0).then_some(())
        })
        .await;
        let job = client.job(&id).await.data(200).clone();
        assert_eq!(
            (&job["status"], &job["hold"]),
            (&json!("queued"), &json!("paused"))
        );
        // Let the three rings of the ticket's own wake-up pass.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let begin = Instant::now();

        database.execute("update queue set paused = false").await;
        if let Some(insert) = ticket {
            database.execute(insert).await;
        }

        client.finished(&id).await;
        // The sweeper looks each second.
        assert!(begin.elapsed() < BUSY, "{:?}", begin.elapsed());
    }
}

/// Any error of the database ends the library's worker, which drops every handler that runs. Runs aren't handlers: they go
/// on, in the slots that they have, while the next worker of the library starts.
async fn a_restart_of_the_queues_worker_drops_no_run(db: Db) {
    let system = System::builder()
        .database(db)
        .sandbox(false)
        .env("WORKER_CONCURRENCY", "2")
        // A single restart is nothing to be told of.
        .env("LOG_LEVEL", "info,worker=debug")
        .start()
        .await;
    let client = system.client();
    let script = |tag: usize, millis| steps([Step::Sleep(millis)]).traced(&tag.to_string());
    // One slot is free, so the queue's worker goes on looking, while the other one holds a long run.
    let long = client.play(&script(0, 9_000)).await;
    client.reaches(&long, "running").await;
    let database = system.database();

    match db {
        Db::Sqlite => {
            let mut lock = database.sqlite().await;
            sqlx::query("begin immediate").execute(&mut lock).await.unwrap();
            // A look at the queue gives up after five seconds.
            eventually(PATIENCE, "a restart", async || {
                system
                    .written()
                    .contains("the queue's worker restarts")
                    .then_some(())
            })
            .await;
            sqlx::query("rollback").execute(&mut lock).await.unwrap();
        }
        Db::Postgres => {
            let broken = "alter function apalis.get_jobs rename to get_none";
            database.execute(broken).await;
            client.submit(&json!({ "message": "a ring" })).await.data(202);
            eventually(PATIENCE, "a restart", async || {
                system
                    .written()
                    .contains("the queue's worker restarts")
                    .then_some(())
            })
            .await;
            database
                .execute("alter function apalis.get_none rename to get_jobs")
                .await;
        }
    }
    let mut ids = vec![long];
    for tag in 1..7 {
        let body = json!({ "message": script(tag, 200).prompt() });
        let id = eventually(PATIENCE, "an accepted job", async || {
            let answer = client.submit(&body).await;
            (answer.status == 202).then(|| answer.json["data"]["id"].as_str().unwrap().to_owned())
        });
        ids.push(id.await);
    }

    for job in at_once(ids.iter().map(|id| client.finished(id))).await {
        assert_eq!(
            (&job["status"], &job["attempt"]),
            (&json!("done"), &json!(1)),
            "{job:#}"
        );
    }
    // The slots belong to the process: the new worker has no more of them than the old one.
    let runs: Vec<_> = ids.iter().flat_map(|id| system.runs(id)).collect();
    for run in &runs {
        let at_once = runs
            .iter()
            .filter(|other| other.first <= run.first && run.first <= other.last);
        assert!(at_once.count() <= 2, "{runs:#?}");
    }
}
