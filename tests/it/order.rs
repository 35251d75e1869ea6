//! Which job runs when: order within a group, priority, turns of the keys, caps, due times.

use std::path::Path;

use chrono::{SecondsFormat, TimeDelta, Utc};
use serde_json::{Value, json};
use tests::both;
use tests::client::{Client, at_once};
use tests::database::Db;
use tests::script::{Script, Step, steps, until};
use tests::system::{KEYS, System};
use tests::trace::{Run, assert_one_at_a_time};

both!(
    jobs_of_a_session_run_one_at_a_time_in_order,
    jobs_of_a_concurrency_key_run_one_at_a_time_in_order,
    a_failed_or_cancelled_job_does_not_stop_its_session,
    a_job_has_a_session_or_a_concurrency_key,
    a_session_remembers_what_was_said,
    all_slots_are_always_used,
    a_key_never_runs_more_than_its_share,
    the_keys_take_turns,
    a_higher_priority_goes_first,
    a_job_waits_for_its_time,
    a_job_that_is_not_done_in_time_is_cancelled,
);

fn briefly(tag: &str) -> Script {
    steps([Step::Sleep(150)]).traced(tag)
}

/// The same, but not before there is this file.
fn briefly_after(file: &Path, tag: &str) -> Script {
    steps([until(file), Step::Sleep(150)]).traced(tag)
}

async fn jobs_of_a_session_run_one_at_a_time_in_order(db: Db) {
    let system = System::builder()
        .database(db)
        .apis(2)
        .workers(2)
        .sandbox(false)
        .start()
        .await;
    let clients = [system.client_of(0), system.client_of(1)];
    clients[0].session("one").await;
    let go = system.folder().join("go");

    let mut ids = Vec::new();
    for number in 0..8 {
        let script = briefly_after(&go, &number.to_string());
        let body = json!({ "message": script.prompt(), "session": "one" });
        ids.push(clients[number % 2].accepted_body(&body).await);
    }
    let waiting = clients[0].job(&ids[7]).await.data(200).clone();
    std::fs::write(go, "").unwrap();
    let jobs = at_once(ids.iter().map(|id| clients[0].finished(id))).await;

    assert_eq!(
        (&waiting["status"], &waiting["hold"]),
        (&json!("queued"), &json!("order"))
    );
    assert!(jobs.iter().all(|job| job["status"] == "done"), "{jobs:#?}");
    let folder = std::fs::read_dir(system.folder().join("data/sessions"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    in_order(&tests::trace::read(&folder.join("workspace")), 8);
}

fn in_order(runs: &[Run], count: usize) {
    assert_one_at_a_time(runs);
    let tags: Vec<&str> = runs.iter().map(|run| run.tag.as_str()).collect();
    let wanted: Vec<String> = (0..count).map(|number| number.to_string()).collect();
    assert_eq!(tags, wanted);
}

/// The runs of several jobs, in order of their beginning.
fn runs(system: &System, ids: &[String]) -> Vec<Run> {
    let mut runs: Vec<Run> = ids.iter().flat_map(|id| system.runs(id)).collect();
    runs.sort_by_key(|run| run.first);
    runs
}

async fn jobs_of_a_concurrency_key_run_one_at_a_time_in_order(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(2)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();

    let mut ids = Vec::new();
    for number in 0..6 {
        let body = json!({ "message": briefly(&number.to_string()).prompt(), "concurrency_key": "deploy" });
        ids.push(client.accepted_body(&body).await);
    }
    at_once(ids.iter().map(|id| client.finished(id))).await;

    in_order(&runs(&system, &ids), 6);
}

async fn a_failed_or_cancelled_job_does_not_stop_its_session(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    client.session("one").await;
    let submit = async |script: Script| {
        client
            .accepted_body(&json!({ "message": script.prompt(), "session": "one" }))
            .await
    };

    let running = submit(steps([Step::Say("begun".to_owned()), Step::Hang])).await;
    let failing = submit(steps([Step::Exit(1)])).await;
    let cancelled = submit(briefly("never")).await;
    let last = submit(briefly("last")).await;
    client.cancel(&cancelled).await.data(200);
    client.event(&running, "assistant").await;
    assert_eq!(client.job(&failing).await.data(200)["hold"], "order");
    client.cancel(&running).await.data(202);

    assert_eq!(client.finished(&last).await["status"], "done");
    assert_eq!(client.finished(&failing).await["status"], "failed");
    assert_eq!(client.finished(&running).await["status"], "cancelled");
}

async fn a_job_has_a_session_or_a_concurrency_key(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    client.session("one").await;

    let both = client
        .submit(&json!({ "message": "hi", "session": "one", "concurrency_key": "k" }))
        .await;
    both.assert_problem(422, "validation-error");
    client
        .submit(&json!({ "message": "hi", "session": "two" }))
        .await
        .assert_problem(404, "not-found");
    // Another key's session isn't there either.
    let other = client.with_key(KEYS[1]);
    other
        .submit(&json!({ "message": "hi", "session": "one" }))
        .await
        .assert_problem(404, "not-found");
    assert_eq!(system.database().number("select count(*) from job").await, 0);
}

async fn a_session_remembers_what_was_said(db: Db) {
    let system = System::builder().database(db).workers(2).start().await;
    let client = system.client();
    client.session("one").await;
    let write = Step::Write {
        file: "note.txt".to_owned(),
        content: "from the first job".to_owned(),
    };
    let first = json!({ "message": steps([write]).costing(0.2).prompt(), "session": "one" });
    let first = client.finished(&client.accepted_body(&first).await).await;

    let second = json!({ "message": steps([Step::Shell("cat note.txt".to_owned())]).costing(0.1).prompt(), "session": "one" });
    let second = client.finished(&client.accepted_body(&second).await).await;

    assert_eq!(
        (&first["status"], &second["status"]),
        (&json!("done"), &json!("done")),
        "{first:#} {second:#}"
    );
    let read = client.event(second["id"].as_str().unwrap(), "tool_result").await;
    assert_eq!(read["data"]["content"], "from the first job");
    // The CLI's own total includes the first job; the second one's cost doesn't.
    assert_eq!(second["cost"], 0.1004);
    let session = client.get("/api/v1/sessions/one").await;
    let session = session.data(200);
    assert!(
        (session["total_cost"].as_f64().unwrap() - 0.3008).abs() < 1e-9,
        "{session:#}"
    );
    assert_eq!(second["result"].get("session_lost"), None);

    // Somebody has removed its folders: the next job can't go on in the conversation, and says so.
    std::fs::remove_dir_all(system.folder().join("data/sessions")).unwrap();
    let third = json!({ "message": steps([]).prompt(), "session": "one" });
    let third = client.finished(&client.accepted_body(&third).await).await;

    assert_eq!(third["status"], "done", "{third:#}");
    assert_eq!(third["result"]["session_lost"], true, "{third:#}");
    let lost = client.event(third["id"].as_str().unwrap(), "session_lost").await;
    assert_eq!(
        lost["data"]["claude_session_id"], second["session_id"],
        "{lost:#}"
    );
}

async fn all_slots_are_always_used(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(2)
        .sandbox(false)
        .env("WORKER_CONCURRENCY", "2")
        .start()
        .await;
    let client = system.client();
    let script = |number: usize| steps([Step::Sleep(1_200)]).traced(&number.to_string());

    let ids = at_once((0..20).map(|number| {
        let client = client.clone();
        async move { client.play(&script(number)).await }
    }))
    .await;
    at_once(ids.iter().map(|id| client.finished(id))).await;

    let runs = runs(&system, &ids);
    assert_eq!(runs.len(), 20);
    let at = |time: u64| {
        runs.iter()
            .filter(|run| run.first <= time && time <= run.last)
            .count()
    };
    assert_eq!(
        runs.iter().map(|run| at(run.first)).max(),
        Some(4),
        "never more than four, and four were reached"
    );
    // Between an end and the next claim is a moment, but for those that a busy machine drags out.
    let times = async |column: &str| -> Vec<i64> {
        let sql = format!("select cast({column} as text) from attempt order by {column}");
        let times = system.database().texts(&sql).await;
        times.iter().map(|time| time.parse().unwrap()).collect()
    };
    let (ends, claims) = (times("ended_at").await, times("started_at").await);
    let mut gaps: Vec<i64> = claims[4..]
        .iter()
        .zip(&ends)
        .map(|(claim, end)| claim - end)
        .collect();
    gaps.sort_unstable();
    assert!(
        gaps[gaps.len() / 2] < 3_000_000,
        "so many µs lie between an end and a claim: {gaps:?}"
    );
}

async fn a_key_never_runs_more_than_its_share(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(2)
        .sandbox(false)
        .env("KEY_MAX_RUNNING_JOBS", "2")
        .start()
        .await;
    let client = system.client();
    let other = client.with_key(KEYS[1]);

    let go = system.folder().join("go");
    let ids = at_once((0..10).map(|number| {
        let (client, script) = (client.clone(), briefly_after(&go, &number.to_string()));
        async move { client.play(&script).await }
    }))
    .await;
    // Another key doesn't wait behind a full one.
    other.finished(&other.play(&briefly("other")).await).await;
    let done = "select count(*) from job where status = 'done'";
    assert_eq!(system.database().number(done).await, 1);
    std::fs::write(go, "").unwrap();
    at_once(ids.iter().map(|id| client.finished(id))).await;

    let runs = runs(&system, &ids);
    for run in &runs {
        let running = runs
            .iter()
            .filter(|other| other.first <= run.first && run.first <= other.last)
            .count();
        assert!(running <= 2, "{running} jobs of one key run at once");
    }
}

/// Lets jobs queue up behind one that holds the only slot, then lets them go; the words of their runs in order.
async fn queued_up(
    system: &System,
    client: &Client,
    submit: impl AsyncFnOnce() -> Vec<String>,
) -> Vec<String> {
    let blocker = client
        .play(&steps([Step::Say("in the way".to_owned()), Step::Hang]))
        .await;
    client.event(&blocker, "assistant").await;
    let ids = submit().await;
    client.cancel(&blocker).await.data(202);
    let administrator = client.with_key(KEYS[2]);
    at_once(ids.iter().map(|id| administrator.finished(id))).await;
    runs(system, &ids).into_iter().map(|run| run.tag).collect()
}

async fn the_keys_take_turns(db: Db) {
    let system = System::builder()
        .database(db)
        .sandbox(false)
        .env("WORKER_CONCURRENCY", "1")
        .start()
        .await;
    let client = system.client();

    let order = queued_up(&system, &client, async || {
        let mut ids = Vec::new();
        for number in 0..6 {
            ids.push(client.play(&briefly(&format!("one-{number}"))).await);
        }
        for number in 0..2 {
            ids.push(
                client
                    .with_key(KEYS[1])
                    .play(&briefly(&format!("two-{number}")))
                    .await,
            );
        }
        ids
    })
    .await;

    let place = |tag: &str| order.iter().position(|found| found == tag).unwrap();
    assert!(place("two-0") <= 1 && place("two-1") <= 3, "{order:?}");
    let first: Vec<&String> = order.iter().filter(|tag| tag.starts_with("one")).collect();
    assert_eq!(first, ["one-0", "one-1", "one-2", "one-3", "one-4", "one-5"]);
}

async fn a_higher_priority_goes_first(db: Db) {
    let system = System::builder()
        .database(db)
        .sandbox(false)
        .env("WORKER_CONCURRENCY", "1")
        .start()
        .await;
    let client = system.client();
    let administrator = client.with_key(KEYS[2]);

    let order = queued_up(&system, &client, async || {
        let mut ids = Vec::new();
        for (tag, client, priority) in [
            ("low", &client, -5),
            ("middle", &client, 0),
            ("lowest", &client, -10),
            ("high", &administrator, 5),
            ("middle-too", &client, 0),
        ] {
            let body = json!({ "message": briefly(tag).prompt(), "priority": priority });
            ids.push(client.accepted_body(&body).await);
        }
        ids
    })
    .await;

    assert_eq!(order, ["high", "middle", "middle-too", "low", "lowest"]);
    // An ordinary key doesn't get past the others by asking for it.
    let lifted = client
        .submit(&json!({ "message": "me first", "priority": 10 }))
        .await;
    assert!(
        lifted.status != 202 || lifted.json["data"]["priority"] == 0,
        "{}",
        lifted.text
    );
}

async fn a_job_waits_for_its_time(db: Db) {
    let system = System::builder().database(db).stepped_clock().start().await;
    let client = system.client();
    let body = |time: &str| json!({ "message": briefly("later").prompt(), "run_after": time });
    let later = Utc::now() + TimeDelta::hours(1);
    let later = later.to_rfc3339_opts(SecondsFormat::Micros, false);

    let id = client.accepted_body(&body(&later)).await;
    let job = client.job(&id).await.data(200).clone();
    assert_eq!(
        (&job["status"], &job["hold"], &job["run_after"]),
        (&json!("queued"), &json!("delay"), &json!(later))
    );

    system.step_clock(3_600);
    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done");
    assert!(job["started_at"].as_str().unwrap() >= later.as_str(), "{job:#}");
    client
        .submit(&body("2199-01-01T00:00:00Z"))
        .await
        .assert_problem(422, "validation-error");
}

async fn a_job_that_is_not_done_in_time_is_cancelled(db: Db) {
    let system = System::builder()
        .database(db)
        .sandbox(false)
        .stepped_clock()
        .env("WORKER_CONCURRENCY", "1")
        .start()
        .await;
    let client = system.client();
    let hang = steps([Step::Say("begun".to_owned()), Step::Hang]).prompt();

    let running = client
        .accepted_body(&json!({ "message": hang, "cancel_after": 3_600 }))
        .await;
    client.event(&running, "assistant").await;
    let queued = client
        .request(reqwest::Method::POST, "/api/v1/jobs")
        .header("cancel-after", "1800s");
    let queued = client.send(queued.json(&json!({ "message": "too late" }))).await;
    let queued = queued.data(202)["id"].as_str().unwrap().to_owned();

    system.step_clock(1_800);
    let never = client.finished(&queued).await;
    assert_eq!(
        (&never["status"], &never["cancel_reason"]),
        (&json!("cancelled"), &json!("deadline")),
        "{never:#}"
    );
    assert_eq!(never["started_at"], Value::Null);
    assert_eq!(client.job(&running).await.data(200)["status"], "running");
    system.step_clock(3_600);
    let ended = client.finished(&running).await;
    assert_eq!(
        (&ended["status"], &ended["cancel_reason"]),
        (&json!("cancelled"), &json!("deadline")),
        "{ended:#}"
    );
    assert!(ended["started_at"].is_string());
    assert_eq!(system.run_processes(), []);
}
