//! Sessions: made, changed, read, deleted.

use serde_json::{Value, json};
use tests::client::{Client, PATIENCE};
use tests::database::Db;
use tests::script::{Step, steps};
use tests::system::{KEYS, System};
use tests::{both, eventually, once};

both!(a_session_from_its_creation_to_its_deletion);
once!(
    only_idle_sessions_give_way_and_the_audit_says_so,
    a_session_can_work_in_an_approved_folder_and_nowhere_else,
    a_job_may_fail_when_its_conversation_is_lost,
    a_template_or_a_name_that_cannot_be_is_refused,
);

async fn make(client: &Client, body: Value) -> Value {
    client.post("/api/v1/sessions", &body).await.data(201).clone()
}

fn texts<'v>(list: &'v Value, member: &str) -> Vec<&'v str> {
    let list = list.as_array().unwrap();
    list.iter().map(|item| item[member].as_str().unwrap()).collect()
}

async fn a_session_from_its_creation_to_its_deletion(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    let session = make(
        &client,
        json!({"name": "s", "model": "opus", "effort": "low", "allowed_tools": "Bash(git *),Read"}),
    )
    .await;
    assert_eq!(session["allowed_tools"], "Bash(git *),Read");
    assert_eq!(
        (&session["status"], &session["working_dir"]),
        (&json!("pending"), &json!("/workspace"))
    );
    let pending = client.get("/api/v1/sessions/s/history").await;
    assert_eq!(pending.data(200), &json!([]));
    assert_eq!(
        (&pending.json["session_id"], &pending.json["count"]),
        (&json!(session["id"].to_string()), &json!(0))
    );

    // Two jobs leave four messages, which are read newest first and shown oldest first.
    for text in ["one", "two"] {
        let message = tests::script::answer(text).prompt();
        let id = client
            .post("/api/v1/sessions/s/jobs", &json!({"message": message}))
            .await;
        let id = id.data(202)["id"].as_str().unwrap().to_owned();
        let job = client.finished(&id).await;
        assert_eq!(job["status"], "done", "{job:#}");
        let own = client.get(&format!("/api/v1/sessions/s/jobs/{id}")).await;
        assert_eq!(own.data(200)["result"]["content"], text);
        client
            .post(&format!("/api/v1/sessions/s/jobs/{id}/cancel"), &json!({}))
            .await
            .assert_problem(409, "job-terminal");
        make(&client, json!({"name": "other"})).await;
        let wrong = client.get(&format!("/api/v1/sessions/other/jobs/{id}")).await;
        wrong.assert_problem(404, "not-found");
    }
    let history = client.get("/api/v1/sessions/s/history").await;
    assert_eq!(history.json["count"], 4);
    assert_eq!(
        texts(history.data(200), "role"),
        ["user", "assistant", "user", "assistant"]
    );
    assert_eq!(history.data(200)[1]["content"], "one");
    assert!(history.data(200)[1]["cost"].as_f64().unwrap() > 0.0);
    let newest = client.get("/api/v1/sessions/s/history?limit=3").await;
    assert_eq!(
        newest.data(200).as_array().unwrap()[..],
        history.data(200).as_array().unwrap()[1..]
    );
    let before = newest.data(200)[0]["id"].to_string();
    let oldest = client
        .get(&format!("/api/v1/sessions/s/history?before={before}"))
        .await;
    assert_eq!(
        oldest.data(200).as_array().unwrap()[..],
        history.data(200).as_array().unwrap()[..1]
    );
    client
        .get("/api/v1/sessions/s/history?limit=0")
        .await
        .assert_problem(422, "validation-error");

    // Again with the same name: other settings, the same conversation.
    let active = client.get("/api/v1/sessions/s").await;
    let tag = active.header("etag").to_owned();
    let again = make(&client, json!({"name": "s", "model": "haiku"})).await;
    assert_eq!(
        (&again["id"], &again["model"], &again["effort"]),
        (&session["id"], &json!("haiku"), &Value::Null)
    );
    assert_eq!(again["claude_session_id"], active.data(200)["claude_session_id"]);
    let only_new = client
        .request(reqwest::Method::POST, "/api/v1/sessions")
        .header("if-none-match", "*")
        .json(&json!({"name": "s"}));
    client
        .send(only_new)
        .await
        .assert_problem(412, "precondition-failed");

    // A change: what isn't named stays, null clears, and an old tag changes nothing.
    let patch = async |body: Value, tag: Option<&str>| {
        let mut request = client
            .request(reqwest::Method::PATCH, "/api/v1/sessions/s")
            .json(&body);
        if let Some(tag) = tag {
            request = request.header("if-match", tag);
        }
        client.send(request).await
    };
    patch(json!({"effort": "max"}), Some(&tag))
        .await
        .assert_problem(412, "precondition-failed");
    let changed = patch(
        json!({"effort": "max", "model": null, "metadata": {"a": "b"}}),
        None,
    )
    .await;
    assert_eq!(
        (&changed.data(200)["effort"], &changed.data(200)["model"]),
        (&json!("max"), &Value::Null)
    );
    let tag = changed.header("etag").to_owned();
    let changed = patch(json!({"max_turns": 7}), Some(&tag)).await;
    assert_eq!(
        (&changed.data(200)["effort"], &changed.data(200)["metadata"]),
        (&json!("max"), &json!({"a": "b"}))
    );
    patch(json!({"max_turns": 0, "name": "x"}), None)
        .await
        .assert_problem(422, "validation-error");
    patch(json!({"permission_mode": "bypassPermissions"}), None)
        .await
        .assert_problem(403, "permission-mode-not-allowed");

    let page = client.get("/api/v1/sessions?page=2&limit=1").await;
    assert_eq!(
        page.json["pagination"],
        json!({"total": 2, "page": 2, "limit": 1, "pages": 2})
    );
    let far = client.get("/api/v1/sessions?page=0&limit=1000").await;
    assert_eq!(
        far.json["pagination"],
        json!({"total": 2, "page": 1, "limit": 100, "pages": 1})
    );

    // Deleted while one job runs and one waits.
    let submit = async |steps: Vec<Step>| {
        let message = tests::script::steps(steps).prompt();
        let job = client
            .post("/api/v1/sessions/s/jobs", &json!({"message": message}))
            .await;
        job.data(202)["id"].as_str().unwrap().to_owned()
    };
    let running = submit(vec![Step::Sleep(600_000)]).await;
    client.reaches(&running, "running").await;
    let waiting = submit(vec![]).await;
    let number = session["id"].to_string();
    let gone = client
        .send(client.request(reqwest::Method::DELETE, &format!("/api/v1/sessions/{number}")))
        .await;
    assert_eq!(gone.status, 204);
    for id in [&running, &waiting] {
        let job = client.finished(id).await;
        assert_eq!(
            (&job["status"], &job["cancel_reason"]),
            (&json!("cancelled"), &json!("session_deleted")),
            "{job:#}"
        );
        assert_eq!(job["session"], "s");
    }
    for path in [
        "s",
        &number,
        active.data(200)["claude_session_id"].as_str().unwrap(),
    ] {
        client
            .get(&format!("/api/v1/sessions/{path}"))
            .await
            .assert_problem(404, "not-found");
    }
    client
        .post("/api/v1/sessions/s/jobs", &json!({"message": "x"}))
        .await
        .assert_problem(404, "not-found");
    eventually(PATIENCE, "the removal of its folder", async || {
        let left = std::fs::read_dir(system.folder().join("data/sessions"))
            .unwrap()
            .count();
        (left == 0).then_some(())
    })
    .await;
    assert_eq!(
        client.jobs("kind=all").await.data(200).as_array().unwrap().len(),
        4
    );
    assert!(
        client.get("/api/v1/usage").await.data(200)["cost"]
            .as_f64()
            .unwrap()
            > 0.0
    );
    let new = make(&client, json!({"name": "s"})).await;
    assert_ne!(new["id"], session["id"]);
    assert_eq!(new["status"], "pending");
}

async fn only_idle_sessions_give_way_and_the_audit_says_so() {
    let system = System::builder()
        .workers(0)
        .env("MAX_SESSIONS_PER_USER", "2")
        .start()
        .await;
    let client = system.client();
    for name in ["busy", "idle", "new"] {
        make(&client, json!({"name": name})).await;
        if name == "busy" {
            client
                .post("/api/v1/sessions/busy/jobs", &json!({"message": "x"}))
                .await
                .data(202);
        }
    }
    let left = client.get("/api/v1/sessions").await;
    assert_eq!(texts(left.data(200), "name"), ["new", "busy"]);
    let admin = client.with_key(KEYS[2]);
    let audit = admin.get("/api/v1/audit?kind=admin").await;
    let entry = &audit.data(200)[0];
    assert_eq!(
        (&entry["action"], &entry["detail"]["name"]),
        (&json!("session.evict"), &json!("idle"))
    );
    client
        .post("/api/v1/sessions/new/jobs", &json!({"message": "x"}))
        .await
        .data(202);
    client
        .post("/api/v1/sessions", &json!({"name": "third"}))
        .await
        .assert_problem(429, "too-many-sessions");
    // One of an existing name is no further one.
    make(&client, json!({"name": "busy"})).await;
}

async fn a_session_can_work_in_an_approved_folder_and_nowhere_else() {
    let root = tests::paths::folder('a');
    let project = root.join("project");
    std::fs::create_dir(&project).unwrap();
    // The runs may be another user's.
    std::fs::set_permissions(&project, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    std::os::unix::fs::symlink("/etc", root.join("out")).unwrap();
    let system = System::builder()
        .env("APPROVED_DIRECTORY", root.to_str().unwrap())
        .start()
        .await;
    let client = system.client();
    make(&client, json!({"name": "s"})).await;
    let repo = async |directory: &str| {
        client
            .post("/api/v1/sessions/s/repo", &json!({"working_dir": directory}))
            .await
    };

    for outside in ["/etc", "..", "out", "/nowhere"] {
        let answer = repo(outside).await;
        answer.assert_problem(400, "bad-request");
        assert_eq!(answer.json["detail"], "Directory outside approved path");
    }
    assert_eq!(repo("none").await.json["detail"], "Directory none does not exist");
    repo(&"x".repeat(1025))
        .await
        .assert_problem(422, "validation-error");
    let put = repo(project.to_str().unwrap()).await;
    assert_eq!(put.data(200)["working_dir"], project.to_str().unwrap());

    let work = [Step::Write {
        file: "note.txt".to_owned(),
        content: "x".to_owned(),
    }];
    let body = json!({"message": steps(work).prompt(), "session": "s"});
    let job = client.finished(&client.accepted_body(&body).await).await;
    assert_eq!(job["status"], "done", "{job:#}");
    assert_eq!(std::fs::read_to_string(project.join("note.txt")).unwrap(), "x");

    // What was approved may be a link by the time that a job runs.
    std::fs::rename(&project, root.join("moved")).unwrap();
    std::os::unix::fs::symlink("/etc", &project).unwrap();
    let job = client.finished(&client.accepted_body(&body).await).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("working_directory")),
        "{job:#}"
    );

    std::fs::remove_file(&project).unwrap();
    std::fs::rename(root.join("moved"), &project).unwrap();
    let gone = client
        .send(client.request(reqwest::Method::DELETE, "/api/v1/sessions/s"))
        .await;
    assert_eq!(gone.status, 204);
    eventually(PATIENCE, "the removal of its own folder", async || {
        let left = std::fs::read_dir(system.folder().join("data/sessions"))
            .unwrap()
            .count();
        (left == 0).then_some(())
    })
    .await;
    assert!(project.join("note.txt").exists());
}

async fn a_job_may_fail_when_its_conversation_is_lost() {
    let system = System::builder().sandbox(false).start().await;
    let client = system.client();
    client.session("s").await;
    let body =
        |lost: Option<&str>| json!({"message": steps([]).prompt(), "session": "s", "on_session_lost": lost});
    let first = client.finished(&client.accepted_body(&body(None)).await).await;
    std::fs::remove_dir_all(system.folder().join("data/sessions")).unwrap();

    let id = client.accepted_body(&body(Some("fail"))).await;
    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("session_lost")),
        "{job:#}"
    );
    let lost = client.event(&id, "session_lost").await;
    assert_eq!(lost["data"]["claude_session_id"], first["session_id"]);
    let attempts = client.get(&format!("/api/v1/jobs/{id}/attempts")).await;
    assert_eq!(attempts.data(200).as_array().unwrap().len(), 1);

    let job = client.finished(&client.accepted_body(&body(None)).await).await;
    assert_eq!(
        (&job["status"], &job["result"]["session_lost"]),
        (&json!("done"), &json!(true)),
        "{job:#}"
    );
}

async fn a_template_or_a_name_that_cannot_be_is_refused() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();
    let post = async |body: Value| client.post("/api/v1/sessions", &body).await;
    let missing = post(json!({"name": "s", "template": "none"})).await;
    missing.assert_problem(400, "template-not-found");
    assert_eq!(missing.json["detail"], "Template 'none' not found");
    post(json!({"name": "x".repeat(129)}))
        .await
        .assert_faults(&[("body -> name", "string_too_long")]);
    post(json!({"name": "s", "user_id": "somebody"}))
        .await
        .assert_problem(403, "insufficient-scope");
    for name in ["../x", "a/b", ".x", "a..b", "a\\b", "%2e%2e"] {
        post(json!({"name": name}))
            .await
            .assert_problem(400, "bad-request");
    }
    post(json!({"name": "s", "user_id": "default"})).await.data(201);
    let other = client.with_key(KEYS[1]);
    let number = client.get("/api/v1/sessions/s").await.data(200)["id"].to_string();
    for path in ["", "/history", "/jobs"] {
        other
            .get(&format!("/api/v1/sessions/{number}{path}"))
            .await
            .assert_problem(404, "not-found");
    }
}
