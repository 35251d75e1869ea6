//! Processes that are killed and stopped: nothing lost, nothing run twice at once, nothing left behind.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::client::PATIENCE;
use tests::database::Db;
use tests::script::{Script, Step, answer, steps};
use tests::system::System;
use tests::trace::assert_one_at_a_time;
use tests::{BUSY, both, eventually};

both!(
    a_killed_workers_job_is_done_by_another,
    a_killed_workers_job_resumes_its_session,
    a_stopped_workers_job_is_done_by_another,
    a_worker_that_cannot_renew_ends_its_runs,
    a_killed_workers_runs_end_with_it,
    a_killed_workers_runs_end_with_it_without_a_sandbox,
    a_job_that_kills_its_worker_every_time_ends,
    a_job_may_ask_to_fail_with_its_worker,
    a_killed_api_loses_nothing_that_it_accepted,
    a_worker_that_stops_hands_back_what_does_not_finish,
);

/// Short, so that the tests are quick, and long enough that a machine which hesitates for three seconds loses none.
const LEASE: Duration = Duration::from_secs(3);
/// A lost lease is found within the lease's length and five seconds; a busy machine needs longer.
const RECOVERY: Duration = LEASE.saturating_add(Duration::from_secs(5)).saturating_add(BUSY);

/// Runs long at first, beside a daemon that it leaves behind, and is quick the second time; every run leaves its trace.
fn twice(first: Step) -> Script {
    let first = steps([tests::script::daemon(), Step::Spend(0.0996), first]).traced("first");
    let second = answer("the second time").costing(0.1).traced("second");
    Script {
        runs: vec![first, second],
        ..Script::default()
    }
}

async fn a_killed_workers_job_is_done_by_another(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(2)
        .env("LEASE_SECONDS", &LEASE.as_secs().to_string())
        .start()
        .await;
    let client = system.client();
    let id = client.play(&twice(Step::Sleep(60_000))).await;
    // What it has cost is known a moment after what it has said.
    client.until(&id, |job| job["cost"] == 0.1).await;
    let index = system.running_worker(&id).await;
    let begin = Instant::now();

    system.worker(index).kill();

    client.until(&id, |job| job["attempt"] == 2).await;
    assert!(begin.elapsed() < RECOVERY, "{:?}", begin.elapsed());
    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("done"), &json!(2)),
        "{job:#}"
    );
    assert_eq!(job["result"]["content"], "the second time");
    let runs = system.runs(&id);
    assert_eq!(
        runs.iter().map(|run| run.tag.as_str()).collect::<Vec<_>>(),
        ["first", "second"]
    );
    assert_one_at_a_time(&runs);
    // The killed run is paid for as far as it was seen, and nothing stays reserved.
    assert_eq!(job["cost"], 0.2, "{job:#}");
    assert_eq!(
        system
            .database()
            .number("select cast(sum(cost) as bigint) from ledger")
            .await,
        200_000
    );
    assert_eq!(
        system
            .database()
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
    let endings = system
        .database()
        .texts("select ending from attempt order by attempt")
        .await;
    assert_eq!(endings, ["lost", "done"]);
}

async fn a_killed_workers_job_resumes_its_session(db: Db) {
    let mut system = System::builder()
        .database(db)
        .env("LEASE_SECONDS", &LEASE.as_secs().to_string())
        .start()
        .await;
    let client = system.client();
    // The message of the second run isn't the script; what it knows of it, it knows from the transcript.
    let id = client.play(&twice(Step::Sleep(60_000))).await;
    client.event(&id, "assistant").await;

    system.worker(0).restart().await;

    let job = client.finished(&id).await;
    assert_eq!(job["result"]["content"], "the second time", "{job:#}");
    let sessions = system
        .database()
        .texts("select claude_session_id from attempt order by attempt")
        .await;
    assert_ne!(sessions[0], sessions[1]);
    let home = system.workspace(&id).with_file_name("home");
    let transcripts = home.join(".claude/projects");
    let second = std::fs::read_dir(transcripts)
        .unwrap()
        .map(|project| project.unwrap().path().join(format!("{}.jsonl", sessions[1])))
        .find(|path| path.is_file())
        .expect("the transcript of the second attempt");
    let users: Vec<Value> = std::fs::read_to_string(second)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["type"] == "user" && line["message"]["content"][0]["type"] == "text")
        .collect();
    assert_eq!(
        users.len(),
        2,
        "the first message and the one that says to go on: {users:#?}"
    );
    assert_eq!(users[0]["sessionId"], sessions[0].as_str());
}

async fn a_stopped_workers_job_is_done_by_another(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(2)
        .env("LEASE_SECONDS", &LEASE.as_secs().to_string())
        .start()
        .await;
    let client = system.client();
    let id = client.play(&twice(Step::Sleep(60_000))).await;
    client.event(&id, "assistant").await;
    let index = system.running_worker(&id).await;

    system.pause_worker(index).await;
    let job = client.finished(&id).await;
    let events = client.all_events(&id).await;
    system.worker(index).resume();
    // What it wakes up with belongs to nobody any more; once it works again it has seen that.
    let later = client.play(&answer("awake")).await;
    client.finished(&later).await;

    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("done"), &json!(2)),
        "{job:#}"
    );
    assert_one_at_a_time(&system.runs(&id));
    system.no_run_process_within(Duration::from_secs(6) + BUSY).await;
    assert_eq!(client.all_events(&id).await, events);
    assert_eq!(client.job(&id).await.data(200), &job);
    assert_eq!(
        system
            .database()
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
}

async fn a_worker_that_cannot_renew_ends_its_runs(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(2)
        .sandbox(false)
        .env("LEASE_SECONDS", &LEASE.as_secs().to_string())
        .start()
        .await;
    let client = system.client();
    let id = client.play(&twice(Step::Sleep(60_000))).await;
    client.until(&id, |job| job["cost"] == 0.1).await;
    let begin = tests::trace::now();

    // Nobody can write for a while.
    let (mut file, mut server) = (None, None);
    match db {
        Db::Sqlite => {
            let file = file.insert(system.database().sqlite().await);
            sqlx::query("begin immediate").execute(file).await.unwrap();
        }
        Db::Postgres => {
            let server = server.insert(system.database().postgres().await);
            sqlx::query("begin").execute(&mut *server).await.unwrap();
            sqlx::query("lock table job in exclusive mode")
                .execute(server)
                .await
                .unwrap();
        }
    }
    system.no_run_process_within(LEASE + Duration::from_secs(4)).await;
    drop((file, server));

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["attempt"], &job["cost"]),
        (&json!("done"), &json!(2), &json!(0.2)),
        "{job:#}"
    );
    let runs = system.runs(&id);
    assert_one_at_a_time(&runs);
    // Counted from its last renewal, which was before.
    let lived = Duration::from_nanos(runs[0].last.saturating_sub(begin));
    assert!(lived < LEASE + Duration::from_secs(3), "{lived:?}");
}

async fn a_killed_workers_runs_end_with_it(db: Db) {
    runs_end_with_their_worker(db, true).await;
}

async fn a_killed_workers_runs_end_with_it_without_a_sandbox(db: Db) {
    runs_end_with_their_worker(db, false).await;
}

async fn runs_end_with_their_worker(db: Db, sandbox: bool) {
    let mut system = System::builder().database(db).sandbox(sandbox).start().await;
    let client = system.client();
    let script = steps([
        tests::script::daemon(),
        Step::Say("ready".to_owned()),
        Step::Freeze,
    ])
    .deaf_to(tests::script::Deaf::Signals);
    for _ in 0..3 {
        let id = client.play(&script).await;
        client.event(&id, "assistant").await;
    }
    assert!(system.run_processes().len() >= 6, "{:#?}", system.run_processes());

    system.worker(0).kill();

    system.no_run_process_within(Duration::from_secs(6) + BUSY).await;
}

async fn a_job_that_kills_its_worker_every_time_ends(db: Db) {
    let mut system = System::builder()
        .database(db)
        .env("LEASE_SECONDS", &LEASE.as_secs().to_string())
        .start()
        .await;
    let client = system.client();
    let script = steps([Step::Say("poison".to_owned()), Step::Hang]).prompt();
    let id = client
        .accepted_body(&json!({ "message": script, "max_attempts": 2 }))
        .await;

    for attempt in 1..=2 {
        client
            .until(&id, |job| job["status"] == "running" && job["attempt"] == attempt)
            .await;
        system.worker(0).restart().await;
    }

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("worker_lost")),
        "{job:#}"
    );
    assert_eq!(job["attempt"], 2);
    assert!(job["error"].as_str().unwrap().ends_with('.'), "{}", job["error"]);
}

async fn a_job_may_ask_to_fail_with_its_worker(db: Db) {
    let mut system = System::builder()
        .database(db)
        .env("LEASE_SECONDS", &LEASE.as_secs().to_string())
        .start()
        .await;
    let client = system.client();
    let message = steps([Step::Say("once only".to_owned()), Step::Hang]).prompt();
    let id = client
        .accepted_body(&json!({ "message": message, "on_worker_lost": "fail" }))
        .await;
    client.event(&id, "assistant").await;

    system.worker(0).restart().await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["error_code"], &job["attempt"]),
        (&json!("worker_lost"), &json!(1)),
        "{job:#}"
    );
}

async fn a_killed_api_loses_nothing_that_it_accepted(db: Db) {
    let mut system = System::builder()
        .database(db)
        .apis(2)
        .sandbox(false)
        .start()
        .await;
    let client = system.client_of(0);
    let submitter = tokio::spawn(async move {
        let mut accepted = Vec::new();
        let mut number = 0;
        loop {
            number += 1;
            let body = json!({ "message": answer(&format!("answer {number}")).prompt() });
            let request = client.request(reqwest::Method::POST, "/api/v1/jobs").json(&body);
            match client.try_send(request).await {
                Ok(answer) if answer.status == 202 => {
                    accepted.push((number, answer.json["data"]["id"].as_str().unwrap().to_owned()));
                }
                // SQLite has one writer, and the runs write too.
                Ok(answer) if answer.status == 503 => {}
                _ => return accepted,
            }
        }
    });
    eventually(PATIENCE, "twenty jobs", async || {
        (system.database().number("select count(*) from job").await >= 20).then_some(())
    })
    .await;

    system.api(0).kill();

    let accepted = submitter.await.unwrap();
    assert!(accepted.len() >= 19, "{}", accepted.len());
    let client = system.client_of(1);
    for (number, id) in accepted {
        assert_eq!(
            client.finished(&id).await["result"]["content"],
            format!("answer {number}")
        );
    }
}

async fn a_worker_that_stops_hands_back_what_does_not_finish(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(2)
        .env("DRAIN_SECONDS", "1")
        .start()
        .await;
    let client = system.client();
    let id = client.play(&twice(Step::Sleep(60_000))).await;
    client.event(&id, "assistant").await;
    let index = system.running_worker(&id).await;

    assert_eq!(system.worker(index).stop(PATIENCE).await, Some(0));

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("done"), &json!(2)),
        "{job:#}"
    );
    assert_eq!(system.database().number("select failures from job").await, 0);
    assert_one_at_a_time(&system.runs(&id));
    assert_eq!(job["cost"], 0.2);
}
