//! Chat: a message whose answer the client waits for or reads as it comes, and that is a job whatever the client does.

use reqwest::Method;
use serde_json::{Value, json};
use tests::client::{Answer, Client, PATIENCE};
use tests::database::Db;
use tests::script::{Step, answer, steps};
use tests::system::{KEYS, System};
use tests::{both, eventually, once};

both!(a_chat_is_answered_and_kept, a_chat_goes_on_when_its_client_leaves);
once!(
    the_end_of_a_chat_has_the_status_that_old_clients_know,
    the_rest_of_the_old_routes_answers_in_the_old_shapes,
    templates_are_listed_applied_and_reloaded,
);

async fn chat(client: &Client, message: &str) -> Answer {
    client
        .post("/api/v1/sessions/s/chat", &json!({ "message": message }))
        .await
}

fn say(text: &str) -> String {
    answer(text).prompt()
}

async fn a_chat_is_answered_and_kept(db: Db) {
    let system = System::builder()
        .database(db)
        .apis(2)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    client.session("s").await;

    let first = chat(&client, &say("hello")).await;
    let data = first.data(200);
    assert_eq!(data["content"], "hello", "{data:#}");
    for member in [
        "session_id",
        "cost",
        "duration_ms",
        "num_turns",
        "tools_used",
        "job_id",
    ] {
        assert!(!data[member].is_null(), "{member}: {data:#}");
    }
    let id = data["job_id"].as_str().unwrap();
    assert_eq!(
        (first.header("x-job-id"), first.header("content-location")),
        (id, format!("/api/v1/jobs/{id}").as_str())
    );
    let job = client.job(id).await;
    assert_eq!(
        (&job.data(200)["kind"], &job.data(200)["status"]),
        (&json!("chat"), &json!("done"))
    );
    assert_eq!(job.data(200)["max_turns"], 25);
    assert_eq!(job.data(200)["timeout_seconds"], 300);
    // Chats aren't among the jobs of a session, but a part of its history, together with jobs.
    assert_eq!(client.get("/api/v1/sessions/s/jobs").await.data(200), &json!([]));
    assert_eq!(client.get("/api/v1/sessions/s/history").await.json["count"], 2);

    // The same request once more is the same chat, also through another process.
    let twice = async |client: &Client, message: &str| {
        let request = client.request(Method::POST, "/api/v1/sessions/s/chat");
        client
            .send(
                request
                    .header("idempotency-key", "k")
                    .json(&json!({ "message": message })),
            )
            .await
    };
    let once = twice(&client, &say("only once")).await;
    let again = twice(&system.client_of(1), &say("only once")).await;
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.data(200), once.data(200));
    twice(&client, "other")
        .await
        .assert_problem(422, "idempotency-key-reused");

    // Later, instead of now.
    let request = client
        .request(Method::POST, "/api/v1/sessions/s/chat")
        .header("prefer", "respond-async");
    let later = client.send(request.json(&json!({"message": say("later")}))).await;
    assert_eq!(later.header("preference-applied"), "respond-async");
    let id = later.data(202)["id"].as_str().unwrap().to_owned();
    assert_eq!(later.header("location"), format!("/api/v1/jobs/{id}"));
    assert_eq!(client.finished(&id).await["result"]["content"], "later");

    // As a stream: nothing that an old client doesn't know, and resumable as the job's events.
    let work = [
        Step::Say("a \"b\"\n".to_owned()),
        Step::Shell("echo x".to_owned()),
    ];
    let body = json!({ "message": steps(work).answering("c").prompt() });
    let stream = client.post("/api/v1/sessions/s/chat/stream", &body).await;
    assert_eq!(stream.status, 200);
    assert_eq!(stream.header("content-type"), "text/event-stream; charset=utf-8");
    let id = stream.header("x-job-id");
    let blocks = stream
        .text
        .split("\r\n\r\n")
        .filter(|block| !block.is_empty() && !block.starts_with(':'));
    let mut seen = Vec::new();
    let mut last = 0;
    for block in blocks {
        let lines = block.split("\r\n").collect::<Vec<_>>();
        let [id, event, data] = lines[..] else {
            panic!("{block:?}")
        };
        let id: u64 = id.strip_prefix("id: ").unwrap().parse().unwrap();
        assert!(id > last, "{block}");
        last = id;
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        seen.push((event.strip_prefix("event: ").unwrap().to_owned(), data));
    }
    let words = seen.iter().map(|(word, _)| word.as_str()).collect::<Vec<_>>();
    assert_eq!(
        words,
        ["assistant", "tool", "assistant", "done"],
        "{}",
        stream.text
    );
    assert_eq!(seen[0].1, json!({"content": "a \"b\"\n", "tool_name": null}));
    assert_eq!(seen[1].1, json!({"content": null, "tool_name": "Bash"}));
    assert_eq!(seen[3].1["job_id"], id);
    let events = client.stream(id, Some(last - 1)).await.rest().await;
    assert_eq!(events.len(), 1, "the end alone is left");

    // The status of the session, and what it has cost.
    let session = client.get("/api/v1/sessions/s").await;
    assert_eq!(session.data(200)["status"], "active");
}

async fn a_chat_goes_on_when_its_client_leaves(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    client.session("s").await;
    client.session("t").await;
    let go = system.folder().join("go");
    let held = steps([tests::script::until(&go)]).answering("done").prompt();
    let leave = async |path: &str| {
        let request = client
            .request(Method::POST, path)
            .json(&json!({ "message": &held }));
        let asking = tokio::spawn(request.send());
        let listed = eventually(PATIENCE, "a chat that runs", async || {
            let jobs = client.jobs("kind=chat&status=running").await;
            let jobs = jobs.data(200).as_array().unwrap().clone();
            jobs.first().map(|job| job["id"].as_str().unwrap().to_owned())
        })
        .await;
        asking.abort();
        listed
    };

    for path in ["/api/v1/sessions/s/chat", "/api/v1/sessions/t/chat/stream"] {
        let cancelled = leave(&format!("{path}?cancel_on_disconnect=true")).await;
        let job = client.finished(&cancelled).await;
        assert_eq!(
            (&job["status"], &job["cancel_reason"]),
            (&json!("cancelled"), &json!("client_disconnect")),
            "{job:#}"
        );
    }
    let left = leave("/api/v1/sessions/s/chat").await;
    std::fs::write(&go, "").unwrap();
    let job = client.finished(&left).await;
    assert_eq!(
        (&job["status"], &job["result"]["content"]),
        (&json!("done"), &json!("done")),
        "{job:#}"
    );
    assert!(job["cost"].as_f64().unwrap() > 0.0);
}

async fn the_end_of_a_chat_has_the_status_that_old_clients_know() {
    let system = System::builder()
        .sandbox(false)
        .env("CLAUDE_TIMEOUT_SECONDS", "5")
        .start()
        .await;
    let client = system.client();
    client.session("s").await;
    let post = async |path: &str, body: Value| client.post(&format!("/api/v1/sessions/{path}"), &body).await;

    let slow = steps([Step::Sleep(600_000)]).prompt();
    let late = post("s/chat", json!({"message": slow, "timeout_seconds": 1})).await;
    assert_eq!(
        (late.status, &late.json["code"]),
        (504, &json!("claude-timeout")),
        "{}",
        late.text
    );
    assert_eq!(
        (&late.json["type"], &late.json["detail"]),
        (&json!("claude:timeout"), &json!("Claude timed out"))
    );
    assert!(late.json["job_id"].as_str().unwrap().starts_with("job_"));
    assert_eq!(late.json["job_id"], late.header("x-job-id"));

    let failed = steps([Step::Stderr("no".to_owned()), Step::Exit(3)]).prompt();
    let failed = post("s/chat", json!({"message": failed})).await;
    assert_eq!(
        (failed.status, &failed.json["code"]),
        (502, &json!("claude-error")),
        "{}",
        failed.text
    );
    assert_eq!(failed.json["type"], "claude:ClaudeProcessError");

    let turns = (0..3).map(|_| Step::Shell("true".to_owned())).collect::<Vec<_>>();
    let body = json!({"message": steps(turns).prompt(), "max_turns": 1});
    let cut = post("s/chat", body.clone()).await;
    assert_eq!(cut.data(200)["is_error"], true, "{:#}", cut.json);
    let cut = post("s/chat/stream", body).await;
    assert!(cut.text.contains("event: done"), "{}", cut.text);
    let late = post("s/chat/stream", json!({"message": slow, "timeout_seconds": 1})).await;
    assert!(
        late.text
            .contains("event: error\r\ndata: {\"error\":\"Claude timed out\",\"code\":\"timeout\""),
        "{}",
        late.text
    );

    post("none/chat", json!({"message": "x"}))
        .await
        .assert_problem(404, "not-found");
    for (body, field) in [
        (json!({}), "body -> message"),
        (json!({"message": ""}), "body -> message"),
        (
            json!({"message": "x", "timeout_seconds": 6}),
            "body -> timeout_seconds",
        ),
        (
            json!({"message": "x", "webhook_url": "https://example.com"}),
            "body -> webhook_url",
        ),
        (
            json!({"message": "x", "output_format": 1}),
            "body -> output_format",
        ),
    ] {
        for path in ["s/chat", "s/chat/stream"] {
            let answer = post(path, body.clone()).await;
            answer.assert_problem(422, "validation-error");
            assert_eq!(answer.json["errors"][0]["field"], field);
        }
    }
    let other = client.with_key(KEYS[1]);
    other
        .post("/api/v1/sessions/s/chat", &json!({"message": "x"}))
        .await
        .assert_problem(404, "not-found");

    // Deleted while a client waits: it hears so.
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move { chat(&client, &steps([Step::Sleep(600_000)]).prompt()).await })
    };
    eventually(PATIENCE, "a chat that runs", async || {
        let jobs = client.jobs("kind=chat&status=running").await;
        (!jobs.data(200).as_array().unwrap().is_empty()).then_some(())
    })
    .await;
    client
        .send(client.request(Method::DELETE, "/api/v1/sessions/s"))
        .await;
    waiting.await.unwrap().assert_problem(409, "job-cancelled");
}

async fn the_rest_of_the_old_routes_answers_in_the_old_shapes() {
    let system = System::builder().sandbox(false).start().await;
    let client = system.client();
    client.session("s").await;
    chat(&client, &say(&"long ".repeat(200))).await.data(200);

    let tokens = client
        .post("/api/v1/tokens/count", &json!({"text": "a b c"}))
        .await;
    assert_eq!(
        tokens.data(200),
        &json!({"characters": 5, "words": 3, "estimated_tokens": 3})
    );
    client
        .post("/api/v1/tokens/count", &json!({"text": ""}))
        .await
        .assert_problem(422, "validation-error");

    let audit = client.get("/api/v1/audit?limit=5").await;
    let entry = &audit.data(200)[0];
    assert_eq!(
        (&entry["role"], &entry["session_name"], &audit.json["count"]),
        (&json!("assistant"), &json!("s"), &json!(2))
    );
    let content = entry["content"].as_str().unwrap();
    assert!(content.ends_with("...") && content.chars().count() == 503);
    let session = client.get("/api/v1/sessions/s").await;
    assert_eq!(
        (&entry["session_rowid"], &entry["user_id"]),
        (&session.data(200)["id"], &session.data(200)["user_id"])
    );
    let other = client.with_key(KEYS[1]);
    assert_eq!(other.get("/api/v1/audit").await.data(200), &json!([]));
    other
        .get("/api/v1/audit?kind=admin")
        .await
        .assert_problem(403, "insufficient-scope");
    let user = session.data(200)["user_id"].as_str().unwrap();
    other
        .get(&format!("/api/v1/audit?user_id={user}"))
        .await
        .assert_problem(403, "insufficient-scope");
    let admin = client.with_key(KEYS[2]);
    assert_eq!(admin.get("/api/v1/audit").await.json["count"], 2);

    let usage = client.get("/api/v1/usage").await;
    assert_eq!(
        (&usage.data(200)["sessions"], &usage.data(200)["messages"]),
        (&json!(1), &json!(2))
    );
}

async fn templates_are_listed_applied_and_reloaded() {
    let folder = tests::paths::folder('t');
    let file = folder.join("templates.yml");
    std::fs::write(
        &file,
        "mine: {system_prompt: Be brief., effort: low, model: haiku}\n",
    )
    .unwrap();
    let system = System::builder()
        .workers(0)
        .env("TEMPLATES_FILE", file.to_str().unwrap())
        .start()
        .await;
    let client = system.client();
    let list = client.get("/api/v1/templates").await;
    assert_eq!(list.data(200)["mine"]["system_prompt"], "Be brief.");
    assert_eq!(
        client.get("/api/v1/templates/mine").await.data(200)["name"],
        "mine"
    );
    let none = client.get("/api/v1/templates/none").await;
    none.assert_problem(404, "not-found");
    assert_eq!(none.json["detail"], "Template 'none' not found");

    let body = json!({"name": "s", "template": "mine", "effort": "max"});
    let session = client.post("/api/v1/sessions", &body).await;
    assert_eq!(
        (
            &session.data(201)["effort"],
            &session.data(201)["model"],
            &session.data(201)["system_prompt"]
        ),
        (&json!("max"), &json!("haiku"), &json!("Be brief."))
    );
    let job = client.submit(&json!({"message": "x", "template": "mine"})).await;
    assert_eq!(
        (&job.data(202)["effort"], &job.data(202)["model"]),
        (&json!("low"), &json!("haiku"))
    );
    client
        .submit(&json!({"message": "x", "template": "mine", "session": "s"}))
        .await
        .assert_faults(&[("body -> template", "value_error")]);
    client
        .submit(&json!({"message": "x", "template": "none"}))
        .await
        .assert_problem(400, "template-not-found");

    let admin = client.with_key(KEYS[2]);
    let reload = async |client: &Client| client.post("/api/v1/templates/reload", &json!({})).await;
    std::fs::write(&file, "mine: {effort: huge}\n").unwrap();
    let broken = reload(&admin).await;
    broken.assert_problem(422, "validation-error");
    assert!(
        broken.json["detail"]
            .as_str()
            .unwrap()
            .contains("templates -> mine -> effort"),
        "{:#}",
        broken.json
    );
    assert_eq!(
        client.get("/api/v1/templates/mine").await.data(200)["effort"],
        "low"
    );
    std::fs::write(&file, "mine: {}\nother: {effort: high}\n").unwrap();
    assert_eq!(
        reload(&admin).await.data(200),
        &json!({"count": 2, "names": ["mine", "other"]})
    );
}
