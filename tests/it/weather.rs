//! The database goes away and comes back, or has no room: nothing accepted is lost, nothing is accepted that isn't
//! stored, and nobody has to be restarted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use sqlx::{Connection as _, Executor as _};
use tests::client::{Client, at_once};
use tests::database::{Cluster, Database, Db};
use tests::script::{Step, answer, steps};
use tests::system::System;
use tests::trace::assert_one_at_a_time;
use tests::{both, eventually, once, place};

once!(
    postgresql_is_restarted_under_load,
    a_locked_sqlite_file_is_waited_for,
    connections_are_cut_under_load,
    a_full_disk_refuses_what_it_cannot_hold,
);
both!(a_workspace_that_cannot_be_made_fails_no_job_for_good);

/// Submits with one idempotency key until it is accepted; says how often it was refused, which it may be with a 503
/// and a time only.
async fn insist(client: &Client, number: usize, message: &str) -> (String, usize) {
    let mut refusals = 0;
    let body = json!({ "message": message, "max_attempts": 5 });
    let id = eventually(Duration::from_mins(1), "an accepted submission", async || {
        let request = client.request(reqwest::Method::POST, "/api/v1/jobs");
        let request = request
            .timeout(Duration::from_secs(40))
            .header("idempotency-key", format!("weather-{number}"));
        let answer = client.send(request.json(&body)).await;
        match answer.status {
            202 => Some(answer.json["data"]["id"].as_str().unwrap().to_owned()),
            409 => None,
            _ => {
                answer.assert_problem(503, "unavailable");
                assert!(!answer.header("retry-after").is_empty());
                refusals += 1;
                None
            }
        }
    })
    .await;
    (id, refusals)
}

/// Submits small traced jobs, one after the other, until told to stop; their ids and the number of refusals.
async fn keep_submitting(client: &Client, enough: &AtomicBool) -> (Vec<String>, usize) {
    let (mut ids, mut refusals) = (Vec::new(), 0);
    while !enough.load(Ordering::Relaxed) {
        let message = steps([Step::Sleep(100)])
            .traced(&format!("{}", ids.len()))
            .answering("fine")
            .prompt();
        let (id, refused) = insist(client, ids.len(), &message).await;
        ids.push(id);
        refusals += refused;
    }
    (ids, refusals)
}

/// All jobs end well, and no run of one overlapped another of it.
async fn all_is_well(system: &System, ids: &[String]) {
    let client = system.client();
    for job in at_once(ids.iter().map(|id| client.finished(id))).await {
        assert_eq!(job["status"], "done", "{job:#}");
        assert_one_at_a_time(&system.lives(job["id"].as_str().unwrap()));
    }
    let database = system.database();
    assert_eq!(
        database.number("select count(*) from job").await,
        i64::try_from(ids.len()).unwrap()
    );
    assert_eq!(database.number("select count(*) from reservation").await, 0);
    assert_eq!(
        database
            .number("select cast(sum(running) as bigint) from lane")
            .await,
        0
    );
}

async fn ready(client: &Client) -> u16 {
    client.get("/readyz").await.status
}

async fn postgresql_is_restarted_under_load() {
    let cluster = Cluster::start().await.unwrap();
    let database = Database::in_cluster(&cluster).await;
    let mut system = System::builder()
        .on(database)
        .workers(2)
        .sandbox(false)
        .env("LEASE_SECONDS", "5")
        .start()
        .await;
    let client = system.client();
    let pids: Vec<_> = system.processes().iter().map(|process| process.pid()).collect();
    let enough = AtomicBool::new(false);

    let ((ids, refusals), ()) = tokio::join!(keep_submitting(&client, &enough), async {
        for how in [Signal::INT, Signal::QUIT, Signal::INT] {
            eventually(Duration::from_secs(30), "ready", async || {
                (ready(&client).await == 200).then_some(())
            })
            .await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            cluster.stop(how).await;
            eventually(Duration::from_secs(30), "not ready", async || {
                (ready(&client).await == 503).then_some(())
            })
            .await;
            assert_eq!(client.get("/livez").await.status, 200);
            cluster.run().await.unwrap();
        }
        eventually(Duration::from_secs(30), "ready", async || {
            (ready(&client).await == 200).then_some(())
        })
        .await;
        enough.store(true, Ordering::Relaxed);
    });

    assert!(
        refusals > 0 && ids.len() > 5,
        "{refusals} refusals, {} jobs",
        ids.len()
    );
    all_is_well(&system, &ids).await;
    assert_eq!(
        system
            .processes()
            .iter()
            .map(|process| process.pid())
            .collect::<Vec<_>>(),
        pids
    );
    // One line an outage and worker, not one a second.
    let complaints = system
        .written()
        .lines()
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .count();
    assert!(complaints < 150, "{complaints} complaints about three outages");
    drop(system);
    cluster.stop(Signal::QUIT).await;
}

async fn connections_are_cut_under_load() {
    let system = System::builder()
        .database(Db::Postgres)
        .workers(2)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let long = client
        .play(&steps([Step::Say("begun".to_owned()), Step::Sleep(6_000)]).answering("untouched"))
        .await;
    client.event(&long, "assistant").await;
    let enough = AtomicBool::new(false);

    let ((mut ids, _), ()) = tokio::join!(keep_submitting(&client, &enough), async {
        for _ in 0..12 {
            let cut = "select pg_terminate_backend(pid) from pg_stat_activity \
                       where datname = current_database() and pid <> pg_backend_pid()";
            system.database().execute(cut).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        enough.store(true, Ordering::Relaxed);
    });

    let job = client.finished(&long).await;
    assert_eq!(
        (&job["result"]["content"], &job["attempt"]),
        (&json!("untouched"), &json!(1)),
        "{job:#}"
    );
    ids.push(long);
    all_is_well(&system, &ids).await;
}

async fn a_locked_sqlite_file_is_waited_for() {
    let system = System::builder()
        .sandbox(false)
        .env("LEASE_SECONDS", "60")
        .start()
        .await;
    let client = system.client();
    let long = client
        .play(&steps([Step::Say("begun".to_owned()), Step::Sleep(9_000)]).answering("untouched"))
        .await;
    client.event(&long, "assistant").await;
    let mut lock = system.database().sqlite().await;
    lock.execute("begin immediate").await.unwrap();
    let begin = Instant::now();

    let message = answer("after the lock").prompt();
    let ((id, refusals), ()) = tokio::join!(insist(&client, 0, &message), async {
        // Reads go on: a reader never waits for the writer.
        assert_eq!(client.job(&long).await.data(200)["status"], "running");
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
        tokio::time::sleep(Duration::from_secs(12)).await;
        lock.execute("rollback").await.unwrap();
        lock.close().await.unwrap();
    });

    assert!(refusals > 0);
    assert_eq!(client.finished(&id).await["result"]["content"], "after the lock");
    let job = client.finished(&long).await;
    assert_eq!(
        (&job["result"]["content"], &job["attempt"]),
        (&json!("untouched"), &json!(1)),
        "{job:#}"
    );
}

/// A file system of a few megabytes of its own. None where the tests may not mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = place::folder('m');
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
            .arg(&folder)
            .status()
            .is_ok_and(|status| status.success());
        mounted.then_some(Self(folder))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that is just ending may still hold a file.
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

#[expect(clippy::print_stderr, reason = "a test that could not be made must say so")]
async fn a_full_disk_refuses_what_it_cannot_hold() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("not tested: only root may mount a small disk");
        return;
    };
    let url = format!("sqlite://{}", disk.path().join("small.db").display());
    let system = System::builder()
        .sandbox(false)
        .env("DATABASE_URL", &url)
        .start()
        .await;
    let client = system.client();
    let before = client.play(&answer("before")).await;
    client.finished(&before).await;
    // Full to the last byte.
    let filler = disk.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    let mut piece = vec![0; 1 << 16];
    while !piece.is_empty() {
        if std::io::Write::write_all(&mut file, &piece).is_err() {
            piece.truncate(piece.len() / 2);
        }
    }
    drop(file);

    let (mut stored, mut refused) = (Vec::new(), 0);
    for _ in 0..20 {
        let answer = client.submit(&json!({ "message": "x".repeat(100_000) })).await;
        match answer.status {
            202 => stored.push(answer.json["data"]["id"].as_str().unwrap().to_owned()),
            _ => {
                answer.assert_problem(503, "unavailable");
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    assert_eq!(client.job(&before).await.data(200)["result"]["content"], "before");
    std::fs::remove_file(&filler).unwrap();

    let (after, _) = insist(&client, 1, &answer("after").prompt()).await;
    assert_eq!(client.finished(&after).await["result"]["content"], "after");
    for id in stored {
        assert_eq!(client.finished(&id).await["status"], "done");
    }
    drop(system);
}

async fn a_workspace_that_cannot_be_made_fails_no_job_for_good(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    // A file where the folder belongs is as bad as a directory that can't be written, and root can't get around it.
    let folder = system.folder().join("data/jobs");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::write(&folder, "in the way").unwrap();

    let id = client
        .accepted_body(&json!({ "message": answer("at last").prompt(), "max_attempts": 5 }))
        .await;
    client.event(&id, "retry").await;
    std::fs::remove_file(&folder).unwrap();

    let job = client.finished(&id).await;
    assert_eq!(job["result"]["content"], "at last", "{job:#}");
    assert!(
        system.written().contains("jobs"),
        "the log says which folder it was"
    );
}
