//! What ended jobs have left is removed in time, or when its owner says so; what counts stays.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tests::client::{Answer, Client, at_once};
use tests::database::Db;
use tests::script::{Step, answer, steps};
use tests::system::{KEYS, System};
use tests::{both, eventually};

both!(
    what_is_old_is_removed_and_what_counts_stays,
    workers_share_a_backlog_and_go_on_working,
    a_removal_that_was_cut_short_is_finished,
    an_owner_removes_what_an_ended_job_has_left,
);

/// A day and an hour: longer than the retention of these systems.
const LATER: i64 = 25 * 3_600;

/// The sweeper looks each five seconds, and several may share the machine.
const SOON: Duration = Duration::from_mins(2);

async fn start(db: Db, workers: usize) -> System {
    System::builder()
        .database(db)
        .workers(workers)
        .sandbox(false)
        .stepped_clock()
        .env("JOB_RETENTION_DAYS", "1")
        .start()
        .await
}

fn writes(text: &str) -> tests::script::Script {
    let write = Step::Write {
        file: "kept.txt".to_owned(),
        content: text.to_owned(),
    };
    steps([write]).answering(text)
}

async fn is_removed(client: &Client, id: &str) -> Value {
    eventually(SOON, "a job without data", async || {
        let job = client.job(id).await.data(200).clone();
        (job["data_removed"] == true).then_some(job)
    })
    .await
}

async fn what_is_old_is_removed_and_what_counts_stays(db: Db) {
    let system = start(db, 1).await;
    let client = system.client();
    client.session("kept").await;
    let alone = client.play(&writes("alone")).await;
    let body = json!({ "message": writes("in a session").prompt(), "session": "kept" });
    let together = client.accepted_body(&body).await;
    let script = steps([Step::Stderr("complaint".to_owned()), Step::Exit(3)]);
    let failed = client.play(&script).await;
    let before = at_once([&alone, &together, &failed].map(|id| client.finished(id))).await;
    // These two are as old, but haven't ended.
    let ordered =
        |script: &tests::script::Script| json!({ "message": script.prompt(), "concurrency_key": "k" });
    let running = client.accepted_body(&ordered(&steps([Step::Hang]))).await;
    let waiting = client.accepted_body(&ordered(&answer("later"))).await;
    client.reaches(&running, "running").await;
    let sums = async || {
        let mut sums = Vec::new();
        for sql in [
            "select cast(sum(cost) as bigint) from ledger",
            "select count(*) from ledger",
            "select count(*) from attempt",
            "select count(*) from job",
        ] {
            sums.push(system.database().number(sql).await);
        }
        sums
    };
    let counted = sums().await;
    let spent = client.get("/api/v1/usage").await.data(200)["cost"].clone();

    system.step_clock(LATER);
    for (id, before) in [&alone, &together, &failed].into_iter().zip(&before) {
        let job = is_removed(&client, id).await;

        assert_eq!(
            (&job["message"], &job["result"]),
            (&json!(""), &Value::Null),
            "{job:#}"
        );
        for member in ["status", "cost", "usage", "error_code", "completed_at", "attempt"] {
            assert_eq!(job[member], before[member], "{member}");
        }
        for path in ["result", "events", "stream"] {
            let answer = client.get(&format!("/api/v1/jobs/{id}/{path}")).await;
            answer.assert_problem(410, "data-removed");
        }
        for table in ["prompt", "result", "event"] {
            let left = format!("select count(*) from {table} where job_id = '{id}'");
            assert_eq!(system.database().number(&left).await, 0, "{table}");
        }
    }

    let tails = "select count(*) from attempt where stderr_tail <> ''";
    assert_eq!(system.database().number(tails).await, 0);
    assert_eq!(sums().await, counted);
    assert_eq!(client.get("/api/v1/usage").await.data(200)["cost"], spent);
    let folder = system.workspace(&alone);
    assert!(!folder.parent().unwrap().exists(), "{}", folder.display());
    assert_eq!(left_behind(&system), [""; 0]);
    assert_eq!(kept_in_session(&system), "in a session");
    // What hasn't ended, or has only just, keeps everything.
    let young = client.play(&answer("young")).await;
    assert_eq!(client.finished(&young).await["result"]["content"], "young");
    client.cancel(&running).await.data(202);
    assert_eq!(client.finished(&running).await["status"], "cancelled");
    assert_eq!(client.finished(&waiting).await["result"]["content"], "later");
}

/// What the file says that a job wrote into the workspace of the only session.
fn kept_in_session(system: &System) -> String {
    let mut sessions = fs::read_dir(system.folder().join("data/sessions")).unwrap();
    let session = sessions.next().unwrap().unwrap().path();
    fs::read_to_string(session.join("workspace/kept.txt")).unwrap()
}

/// Names in the folder of the jobs that belong to no job that still has data.
fn left_behind(system: &System) -> Vec<String> {
    let Ok(entries) = fs::read_dir(system.folder().join("data/jobs")) else {
        return Vec::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("removed"))
        .collect()
}

/// So many jobs that ended long ago, as they would be stored, each with a workspace of some files; its folders.
async fn backlog(system: &System, count: usize, files: usize) -> Vec<PathBuf> {
    let ids: Vec<String> = (0..count).map(|number| format!("job_{number:032x}")).collect();
    let database = system.database();
    for ids in ids.chunks(100) {
        let rows = |row: fn(&str) -> String| ids.iter().map(|id| row(id)).collect::<Vec<_>>().join(", ");
        let jobs = rows(|id| {
            format!("('{id}', 'env_00000000', 'job', 'done', 3, 'resume', 5000000, '{{}}', 1000, 2000, 1)")
        });
        database
            .execute(&format!(
                "insert into job (job_id, key_id, kind, status, max_attempts, on_worker_lost, max_cost, metadata,
                   created_at, completed_at, last_event_seq) values {jobs}"
            ))
            .await;
        let prompts = rows(|id| format!("('{id}', 'an old message', '{{}}')"));
        database
            .execute(&format!(
                "insert into prompt (job_id, message, options) values {prompts}"
            ))
            .await;
        let results = rows(|id| format!("('{id}', '{{}}')"));
        database
            .execute(&format!("insert into result (job_id, result) values {results}"))
            .await;
        let events = rows(|id| format!("('{id}', 1, 'done', 2000, '{{}}')"));
        database
            .execute(&format!(
                "insert into event (job_id, seq, event_type, at, data) values {events}"
            ))
            .await;
    }
    let folders: Vec<PathBuf> = ids
        .iter()
        .map(|id| system.folder().join("data/jobs").join(id))
        .collect();
    for folder in &folders {
        for file in 0..files {
            let deep = folder.join(format!("workspace/{file}/deep"));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("file"), "old").unwrap();
        }
    }
    if let Some(account) = tests::account::Account::of_product() {
        account.own_all(&system.folder().join("data"));
    }
    folders
}

/// Nothing of the backlog is left, and each of its jobs was dealt with once.
async fn is_done(system: &System, folders: &[PathBuf]) {
    let database = system.database();
    eventually(SOON, "the end of the backlog", async || {
        let left = "select count(*) from job where created_at = 1000 and not data_removed";
        (database.number(left).await == 0).then_some(())
    })
    .await;
    for table in ["prompt", "result", "event"] {
        let left = format!(
            "select count(*) from {table} where job_id in (select job_id from job where created_at = 1000)"
        );
        assert_eq!(database.number(&left).await, 0, "{table}");
    }
    let changed = "select count(*) from job where created_at = 1000 and version <> 2";
    assert_eq!(database.number(changed).await, 0);
    let left: Vec<&PathBuf> = folders.iter().filter(|folder| folder.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    // Who comes late to a removal makes its place anew for a moment.
    eventually(SOON, "an empty folder", async || {
        left_behind(system).is_empty().then_some(())
    })
    .await;
}

async fn workers_share_a_backlog_and_go_on_working(db: Db) {
    // They look at once when they start, and again five seconds later.
    let mut system = start(db, 0).await;
    let folders = backlog(&system, 450, 3).await;
    for _ in 0..3 {
        system.add_worker().await;
    }
    let client = system.client();

    let id = client.play(&answer("meanwhile")).await;
    assert_eq!(client.finished(&id).await["status"], "done");

    is_done(&system, &folders).await;
    let written = system.written();
    let complaints: Vec<&str> = written
        .lines()
        .filter(|line| line.contains("could not"))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

async fn a_removal_that_was_cut_short_is_finished(db: Db) {
    let mut system = start(db, 0).await;
    let folders = backlog(&system, 120, 30).await;
    let first = system.add_worker().await;
    let there = || folders.iter().filter(|folder| folder.exists()).count();
    for _ in 0..3 {
        // A quick worker may have removed all of them by now.
        let before = there().max(1);
        eventually(SOON, "a removal", async || (there() < before).then_some(())).await;
        system.worker(first).kill();
        system.worker(first).start().await;
    }

    is_done(&system, &folders).await;
}

async fn remove(client: &Client, id: &str) -> Answer {
    client
        .send(client.request(Method::DELETE, &format!("/api/v1/jobs/{id}")))
        .await
}

async fn an_owner_removes_what_an_ended_job_has_left(db: Db) {
    let mut system = start(db, 1).await;
    let client = system.client();
    client.session("kept").await;
    let alone = client.play(&writes("alone")).await;
    let body = json!({ "message": writes("in a session").prompt(), "session": "kept" });
    let together = client.accepted_body(&body).await;
    at_once([&alone, &together].map(|id| client.finished(id))).await;
    let ordered =
        |script: &tests::script::Script| json!({ "message": script.prompt(), "concurrency_key": "k" });
    let running = client.accepted_body(&ordered(&steps([Step::Hang]))).await;
    let waiting = client.accepted_body(&ordered(&answer("later"))).await;
    client.reaches(&running, "running").await;

    for id in [&running, &waiting] {
        remove(&client, id).await.assert_problem(409, "job-active");
    }
    let unknown = format!("job_{:032x}", 7);
    remove(&client, &unknown).await.assert_problem(404, "not-found");
    let stranger = client.with_key(KEYS[1]);
    remove(&stranger, &alone).await.assert_problem(404, "not-found");
    assert_eq!(client.job(&alone).await.data(200)["data_removed"], false);

    // No worker is needed for what can be read.
    client.cancel(&running).await.data(202);
    client.finished(&running).await;
    client.finished(&waiting).await;
    system.worker(0).kill();
    for id in [&alone, &together] {
        for _ in 0..2 {
            let answer = remove(&client, id).await;
            assert_eq!((answer.status, answer.text.as_str()), (204, ""));
        }
        let job = client.job(id).await.data(200).clone();
        assert_eq!(
            (&job["data_removed"], &job["message"], &job["result"]),
            (&json!(true), &json!(""), &Value::Null),
            "{job:#}"
        );
        assert_eq!(job["status"], "done");
        let result = client.get(&format!("/api/v1/jobs/{id}/result")).await;
        result.assert_problem(410, "data-removed");
        let events = format!("select count(*) from event where job_id = '{id}'");
        assert_eq!(system.database().number(&events).await, 0);
    }
    let folder = system.workspace(&alone).parent().map(Path::to_owned).unwrap();
    assert!(folder.exists(), "a worker's to remove");

    system.worker(0).start().await;
    eventually(SOON, "a removed workspace", async || {
        (!folder.exists()).then_some(())
    })
    .await;
    let wanted = "select count(*) from job where remove_requested";
    eventually(SOON, "an end of it", async || {
        (system.database().number(wanted).await == 0).then_some(())
    })
    .await;
    assert_eq!(kept_in_session(&system), "in a session");
    // The others' data is where it was.
    assert_eq!(client.job(&waiting).await.data(200)["result"]["content"], "later");
}
