//! From submission to result, and what can be read in between.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::client::{Client, PATIENCE, at_once};
use tests::database::Db;
use tests::script::{Step, answer, steps};
use tests::system::{KEYS, System};
use tests::{BUSY, both, once};

both!(
    a_submitted_job_is_done,
    a_job_runs_in_one_process_with_the_api,
    a_message_reaches_the_cli_as_it_is,
    a_message_of_a_million_characters_is_run,
    the_settings_of_a_job_reach_the_cli_and_the_answer,
    a_finished_job_shows_what_it_ran_with,
    a_long_poll_ends_with_the_job,
    the_list_is_filtered_and_paged,
    a_long_list_in_full_does_not_need_room_for_all_of_it,
    what_belongs_to_another_key_is_not_there,
    an_administrator_sees_every_job,
    a_submission_during_a_workers_absence_is_run_later,
    many_jobs_of_several_keys_are_all_done,
);
once!(
    what_a_tool_writes_is_in_the_workspace,
    a_long_poll_ends_with_its_time,
    a_cursor_belongs_to_its_filters,
);

async fn a_submitted_job_is_done(db: Db) {
    let system = System::start(db).await;
    let client = system.client();

    let accepted = client
        .submit(&json!({ "message": answer("42").costing(0.5).prompt() }))
        .await;
    let job = accepted.data(202);
    let id = job["id"].as_str().unwrap();
    assert_eq!(accepted.header("location"), format!("/api/v1/jobs/{id}"));
    assert_eq!(accepted.header("x-job-id"), id);
    assert_eq!(accepted.header("retry-after"), "2");
    assert_eq!(accepted.json["meta"]["version"], "v1");
    assert_eq!(
        accepted.json["meta"]["request_id"],
        accepted.header("x-request-id")
    );
    assert!(id.starts_with("job_") && id.len() == 36, "{id}");
    assert!(
        matches!(job["status"].as_str(), Some("queued" | "running")),
        "{job}"
    );

    let job = client.finished(id).await;
    assert_eq!(job["status"], "done", "{job:#}");
    assert_eq!(job["result"]["content"], "42");
    assert_eq!(job["result"]["is_error"], false);
    assert_eq!(job["result"]["subtype"], "success");
    assert_eq!(job["result"]["num_turns"], 1);
    assert_eq!(job["result"]["tools_used"], json!([]));
    assert_eq!(job["cost"], 0.5);
    assert_eq!(job["result"]["cost"], 0.5);
    assert_eq!(job["attempt"], 1);
    assert_eq!(job["error"], Value::Null);
    assert_eq!(job["error_code"], Value::Null);
    assert_eq!(job["hold"], Value::Null);
    assert_eq!(job["queue_position"], Value::Null);
    assert_eq!(job["usage"]["output_tokens"], 49_980);
    assert_eq!(job["result"]["session_id"], job["session_id"]);
    for time in ["created_at", "started_at", "completed_at", "expires_at"] {
        let time = job[time].as_str().unwrap();
        assert!(time.len() == 32 && time.ends_with("+00:00"), "{time}");
    }
    assert_eq!(job["urls"]["self"], format!("/api/v1/jobs/{id}"));

    let database = system.database();
    assert_eq!(database.number("select count(*) from job").await, 1);
    assert_eq!(
        database.texts("select cli_version from attempt").await,
        ["2.1.331"]
    );
    assert_eq!(
        database
            .number("select cast(sum(cost) as bigint) from attempt")
            .await,
        500_000
    );
    assert_eq!(
        database
            .number("select cast(sum(cost) as bigint) from ledger")
            .await,
        500_000
    );
    assert_eq!(
        database
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
}

async fn a_job_runs_in_one_process_with_the_api(db: Db) {
    let mut system = System::builder().database(db).up().start().await;
    let client = system.client();

    let id = client.play(&answer("together")).await;

    assert_eq!(client.finished(&id).await["result"]["content"], "together");
    assert_eq!(system.api(0).stop(PATIENCE).await, Some(0));
}

async fn what_a_tool_writes_is_in_the_workspace() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    let write = Step::Write {
        file: "hello.txt".to_owned(),
        content: "hello\n".to_owned(),
    };
    let script = steps([
        write,
        Step::Shell("cat hello.txt; echo second > second.txt".to_owned()),
    ]);

    let id = client.play(&script.answering("written")).await;

    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done", "{job:#}");
    let tools: Vec<&str> = job["tools_used"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tool| tool["name"].as_str().unwrap())
        .collect();
    assert_eq!(tools, ["Write", "Bash"]);
    assert_eq!(job["tools_used"], job["result"]["tools_used"]);
    let read = |name: &str| std::fs::read_to_string(system.workspace(&id).join(name)).unwrap();
    assert_eq!(read("hello.txt"), "hello\n");
    assert_eq!(read("second.txt"), "second\n");
}

async fn a_message_reaches_the_cli_as_it_is(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let messages = [
        "/usage",
        "  /clear",
        "-p --version",
        "@/etc/passwd",
        "ünï\u{1F980}\n\r\n\ttab \"quoted\" \\",
        "!ls",
    ];

    for message in messages {
        let id = client.accepted(message).await;

        let job = client.finished(&id).await;
        assert_eq!(job["message"], message);
        // One blank before it keeps the CLI from taking it as a command; the scripted CLI answers with what it got.
        let heard = job["result"]["content"].as_str().unwrap();
        assert!(
            heard == message || heard.strip_prefix(' ') == Some(message),
            "{heard:?} for {message:?}"
        );
        assert!(!heard.starts_with('/'), "{heard:?} would be a command");
    }
}

async fn a_message_of_a_million_characters_is_run(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let message = "a".repeat(1_000_000);

    let accepted = client.submit(&json!({ "message": message })).await;

    let job = client.finished(accepted.data(202)["id"].as_str().unwrap()).await;
    assert_eq!(job["status"], "done");
    assert_eq!(job["result"]["content"].as_str().unwrap().trim_start(), message);
}

async fn the_settings_of_a_job_reach_the_cli_and_the_answer(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let body = json!({
        "message": "hi", "model": "opus", "effort": "low", "permission_mode": "plan", "max_turns": 7,
        "timeout_seconds": 60, "max_cost_usd": 0.25, "priority": 0, "custom_id": "mine-1",
        "metadata": { "colour": "blue" }, "max_attempts": 2, "concurrency_key": "k", "system": "Be brief.",
    });

    let id = client.accepted_body(&body).await;

    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done", "{job:#}");
    for name in [
        "model",
        "effort",
        "permission_mode",
        "max_turns",
        "timeout_seconds",
        "max_cost_usd",
        "custom_id",
        "metadata",
        "max_attempts",
    ] {
        assert_eq!(job[name], body[name], "{name}");
    }
    assert_eq!(
        job["result"]["model_usage"]
            .as_object()
            .unwrap()
            .keys()
            .collect::<Vec<_>>(),
        ["claude-opus-5-5"]
    );
}

async fn a_finished_job_shows_what_it_ran_with(db: Db) {
    let system = System::start(db).await;
    let client = system.client();

    let job = client.finished(&client.play(&answer("hi")).await).await;

    let shown = [
        "model",
        "effort",
        "permission_mode",
        "max_turns",
        "timeout_seconds",
    ]
    .map(|name| job[name].clone());
    let defaults = [
        json!("sonnet"),
        json!(null),
        json!("acceptEdits"),
        json!(null),
        json!(3600),
    ];
    assert_eq!(shown, defaults, "{job:#}");
}

async fn a_long_poll_ends_with_the_job(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let id = client.play(&steps([Step::Sleep(600)])).await;
    let begin = Instant::now();

    let job = client.get(&format!("/api/v1/jobs/{id}?wait=30")).await;

    assert_eq!(job.data(200)["status"], "done");
    assert_eq!(job.header("retry-after"), "");
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
}

async fn a_long_poll_ends_with_its_time() {
    let system = System::builder().env("WAIT_MAX_SECONDS", "2").start().await;
    let client = system.client();
    let id = client.play(&steps([Step::Hang])).await;
    let begin = Instant::now();

    let job = client.get(&format!("/api/v1/jobs/{id}?wait=1")).await;
    assert_eq!(job.data(200)["completed_at"], Value::Null);
    assert!(!job.header("retry-after").is_empty());
    assert!(begin.elapsed() >= Duration::from_secs(1));

    let request = client.request(reqwest::Method::GET, &format!("/api/v1/jobs/{id}"));
    let job = client.send(request.header("prefer", "wait=600")).await;
    assert_eq!(job.header("preference-applied"), "wait=2");
    assert!(begin.elapsed() < Duration::from_secs(2) + BUSY);

    client
        .get(&format!("/api/v1/jobs/{id}?wait=x"))
        .await
        .assert_faults(&[("query -> wait", "int_type")]);
    client.cancel(&id).await.data(202);
    client.finished(&id).await;
}

async fn the_list_is_filtered_and_paged(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let mut ids = Vec::new();
    for number in 0..7 {
        let message = format!("{number} {}", "x".repeat(300));
        ids.push(
            client
                .accepted_body(&json!({ "message": message, "custom_id": format!("c{number}") }))
                .await,
        );
    }
    client.cancel(&ids[3]).await.data(200);
    ids.reverse();

    let all = client.jobs("limit=100").await;
    assert_eq!(listed(&all.json), ids);
    assert_eq!(
        all.json["pagination"],
        json!({ "limit": 100, "has_more": false, "next_cursor": null })
    );
    assert_eq!(
        listed(&client.jobs("status=cancelled").await.json),
        [ids[3].clone()]
    );
    assert_eq!(listed(&client.jobs("status=queued,cancelled").await.json), ids);
    assert_eq!(
        listed(&client.jobs("status=done&status=failed").await.json),
        [""; 0]
    );
    assert_eq!(listed(&client.jobs("custom_id=c2").await.json), [ids[4].clone()]);
    assert_eq!(
        all.json["data"][0]["message"].as_str().unwrap().chars().count(),
        200
    );

    let mut seen = Vec::new();
    let mut query = "limit=2&status=queued".to_owned();
    loop {
        let page = client.jobs(&query).await;
        seen.extend(listed(&page.json));
        // What comes in between is newer than everything that is left, and must not move the pages.
        client.accepted("in between").await;
        let Some(cursor) = page.json["pagination"]["next_cursor"].as_str() else {
            assert_eq!(page.json["pagination"]["has_more"], false);
            break;
        };
        assert!(
            page.header("link").contains("rel=\"next\""),
            "{}",
            page.header("link")
        );
        query = format!("limit=2&status=queued&cursor={cursor}");
    }
    ids.remove(3);
    assert_eq!(seen, ids);
}

async fn a_long_list_in_full_does_not_need_room_for_all_of_it(db: Db) {
    let mut system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let session = client.session("long").await;
    let path = format!("/api/v1/sessions/{session}/jobs");
    // 2 MB each.
    let long = "é".repeat(999_990);
    let mut ids = Vec::new();
    for number in 0..20 {
        let body = json!({ "message": format!("{number} {long}") });
        let answer = client.post(&path, &body).await;
        ids.push(answer.data(202)["id"].as_str().unwrap().to_owned());
    }
    ids.reverse();
    let pid = system.api(0).pid().unwrap();
    let before = peak_memory(pid);

    let all = client.get(&path).await;

    let jobs = all.data(200).as_array().unwrap();
    assert_eq!(listed(&all.json), ids);
    assert_eq!(jobs[3]["message"], format!("16 {long}"));
    assert_eq!(jobs[3]["session"], "long");
    assert_eq!(
        all.json["pagination"],
        json!({ "limit": 1000, "has_more": false, "next_cursor": null })
    );
    assert_eq!(all.json["meta"]["request_id"], all.header("x-request-id"));
    assert_eq!(all.header("content-type"), "application/json");
    let grown = peak_memory(pid) - before;
    assert!(grown < 35_000, "40 MB of prompts took {grown} kB");

    let page = client.get(&format!("{path}?limit=3")).await;
    assert_eq!(listed(&page.json), ids[..3]);
    let next = page.json["pagination"]["next_cursor"].as_str().unwrap();
    assert!(page.header("link").contains(next));
    let page = client.get(&format!("{path}?limit=3&cursor={next}")).await;
    assert_eq!(listed(&page.json), ids[3..6]);
    let none = client.get(&format!("{path}?status=done")).await;
    assert_eq!(none.data(200), &json!([]));
}

/// The most memory that a process has had, in kB.
fn peak_memory(pid: i32) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}

async fn a_cursor_belongs_to_its_filters() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();
    for _ in 0..3 {
        client.accepted("hi").await;
    }
    let page = client.jobs("limit=1").await;
    let cursor = page.json["pagination"]["next_cursor"].as_str().unwrap();

    client
        .jobs(&format!("limit=1&status=done&cursor={cursor}"))
        .await
        .assert_problem(400, "invalid-cursor");
    client
        .jobs("cursor=nonsense")
        .await
        .assert_problem(400, "invalid-cursor");
    client
        .jobs(&format!("cursor={}", "A".repeat(513)))
        .await
        .assert_problem(400, "invalid-cursor");
    client
        .jobs("limit=0")
        .await
        .assert_faults(&[("query -> limit", "greater_than_equal")]);
    client
        .jobs("limit=101")
        .await
        .assert_faults(&[("query -> limit", "less_than_equal")]);
    client
        .jobs("status=finished")
        .await
        .assert_faults(&[("query -> status", "enum")]);
}

async fn what_belongs_to_another_key_is_not_there(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let other = client.with_key(KEYS[1]);
    let id = client.accepted("mine").await;

    other.job(&id).await.assert_problem(404, "not-found");
    other.events(&id, "").await.assert_problem(404, "not-found");
    other.cancel(&id).await.assert_problem(404, "not-found");
    for path in ["stream", "result", "nonsense"] {
        other
            .get(&format!("/api/v1/jobs/{id}/{path}"))
            .await
            .assert_problem(404, "not-found");
    }
    assert_eq!(listed(&other.jobs("").await.json), [""; 0]);

    assert_eq!(client.job(&id).await.data(200)["status"], "queued");
    assert_eq!(
        client.job(&id).await.json["data"]["cancel_requested_at"],
        Value::Null
    );
}

async fn an_administrator_sees_every_job(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let administrator = client.with_key(KEYS[2]);
    let first = client.accepted("one").await;
    let second = client.with_key(KEYS[1]).accepted("two").await;

    assert_eq!(
        listed(&administrator.jobs("").await.json),
        [second.clone(), first]
    );
    assert_eq!(
        administrator.cancel(&second).await.data(200)["status"],
        "cancelled"
    );
}

async fn a_submission_during_a_workers_absence_is_run_later(db: Db) {
    let mut system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let id = client.play(&answer("late")).await;
    assert_eq!(client.job(&id).await.data(200)["queue_position"], 0);

    system.add_worker().await;

    assert_eq!(client.finished(&id).await["result"]["content"], "late");
}

async fn many_jobs_of_several_keys_are_all_done(db: Db) {
    let system = System::builder()
        .database(db)
        .apis(2)
        .workers(2)
        .sandbox(false)
        .start()
        .await;
    let clients: Vec<Client> = (0..6)
        .map(|number| system.client_of(number % 2).with_key(KEYS[number % 3]))
        .collect();
    let scripts: Vec<_> = (0..60)
        .map(|number| answer(&format!("answer {number}")).costing(0.01))
        .collect();

    let ids = at_once(
        scripts
            .iter()
            .enumerate()
            .map(|(number, script)| clients[number % 6].play(script)),
    )
    .await;
    let jobs = at_once(
        ids.iter()
            .enumerate()
            .map(|(number, id)| clients[number % 6].finished(id)),
    )
    .await;

    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), 60);
    for (number, job) in jobs.iter().enumerate() {
        assert_eq!(job["result"]["content"], format!("answer {number}"), "{job:#}");
        assert_eq!(job["attempt"], 1);
    }
    let database = system.database();
    assert_eq!(database.number("select count(*) from attempt").await, 60);
    assert_eq!(
        database
            .number("select cast(sum(cost) as bigint) from ledger")
            .await,
        600_000
    );
}

fn listed(list: &Value) -> Vec<String> {
    list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["id"].as_str().unwrap().to_owned())
        .collect()
}
