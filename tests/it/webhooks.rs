//! Webhooks: what is sent, how it is signed, when it is tried again, and whom it may reach.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tests::client::{Client, PATIENCE, at_once};
use tests::database::Db;
use tests::receiver::{Reaction, Received, Receiver};
use tests::script::{answer, steps};
use tests::system::{Builder, KEYS, System, run};
use tests::{both, eventually, once};

both!(
    the_end_of_a_job_is_told_to_its_own_url,
    an_endpoint_hears_of_the_jobs_of_its_key_alone,
    a_failed_delivery_is_tried_again_with_the_same_bytes,
    a_receiver_that_is_gone_switches_its_endpoint_off,
    a_dead_receiver_delays_only_itself,
    each_delivery_can_be_seen_and_sent_again,
    budgets_and_keys_tell_their_endpoints,
);
once!(
    addresses_inside_are_refused,
    a_rotated_secret_signs_beside_the_new_one,
    a_worker_that_only_delivers_needs_no_cli,
    bad_receivers_are_named,
    what_is_wrong_with_an_endpoint_is_said,
);

/// A system that may reach receivers on this machine, and is quick to try again.
pub(crate) fn system(db: Db) -> Builder {
    System::builder()
        .database(db)
        .sandbox(false)
        .env("WEBHOOK_ALLOW_HTTP", "true")
        .env("WEBHOOK_ALLOWED_SUBNETS", "127.0.0.0/8")
        .env("WEBHOOK_TIMEOUT_SECONDS", "2")
        .env("WEBHOOK_RETRY_SCHEDULE", "1,1,1,1,1,1,1,1,1,1")
}

/// Submits a job that ends at once and tells it there.
pub(crate) async fn submit(client: &Client, url: &str) -> String {
    let body = json!({ "message": steps([]).prompt(), "webhook_url": url });
    client.accepted_body(&body).await
}

pub(crate) async fn endpoint(client: &Client, body: Value) -> Value {
    client
        .post("/api/v1/webhooks/endpoints", &body)
        .await
        .data(201)
        .clone()
}

pub(crate) async fn deliveries(client: &Client, query: &str) -> Vec<Value> {
    let path = format!("/api/v1/webhooks/deliveries?limit=100&{query}");
    client.get(&path).await.data(200).as_array().unwrap().clone()
}

/// Verifies as the specification says, with code of its own.
pub(crate) fn verify(secret: &str, received: &Received) {
    let secret = shared::webhook::signature::SigningSecret::parse(secret).unwrap();
    let headers = shared::webhook::signature::Headers {
        id: Some(received.header("webhook-id")),
        timestamp: Some(received.header("webhook-timestamp")),
        signature: Some(received.header("webhook-signature")),
    };
    shared::webhook::signature::verify(
        &[secret],
        &headers,
        received.body.as_bytes(),
        shared::clock::now(),
    )
    .unwrap_or_else(|error| panic!("{error}: {received:?}"));
}

async fn the_end_of_a_job_is_told_to_its_own_url(db: Db) {
    let (system, receiver) = tokio::join!(system(db).start(), Receiver::start());
    let client = system.client();
    let rotated = client
        .post("/api/v1/webhooks/secret/rotate", &json!({ "grace_seconds": 0 }))
        .await;
    let secret = rotated.data(200)["secret"].as_str().unwrap().to_owned();

    let all = json!(["started", "completed"]);
    let body = json!({
        "message": steps([]).prompt(), "webhook_url": receiver.url("/hook?token=x"), "webhook_events": all,
        "metadata": { "order": "7" },
    });
    let done = client.accepted_body(&body).await;
    let later = shared::clock::now().plus(Duration::from_hours(1));
    let cancelled = json!({ "message": "later", "webhook_url": receiver.url("/hook"), "run_after": later });
    let cancelled = client.accepted_body(&cancelled).await;
    client.cancel(&cancelled).await;
    client.finished(&done).await;
    client.finished(&cancelled).await;
    let got = receiver.wait(3, PATIENCE).await;

    let of = |id: &str, event: &str| {
        let found = got.iter().find(|one| {
            let body = one.json();
            body["job"]["id"] == id && body["type"] == event
        });
        found.unwrap_or_else(|| panic!("no {event} of {id}: {got:#?}"))
    };
    for one in &got {
        verify(&secret, one);
        assert_eq!(one.header("content-type"), "application/json");
        assert!(one.header("user-agent").starts_with("claude-queue/"), "{one:?}");
        assert!(one.header("webhook-id").starts_with("msg_"), "{one:?}");
    }
    assert!(of(&done, "job.started").json().get("event").is_none());
    let told = of(&done, "job.completed").json();
    assert_eq!(told["event"], "job.completed");
    let (mut shown, mut sent) = (client.job(&done).await.data(200).clone(), told["job"].clone());
    assert_eq!(sent["session_rowid"], Value::Null);
    sent.as_object_mut().unwrap().remove("session_rowid");
    for volatile in ["queue_position", "queue_position_capped"] {
        shown.as_object_mut().unwrap().remove(volatile);
        sent.as_object_mut().unwrap().remove(volatile);
    }
    assert_eq!(sent, shown);
    assert_eq!(of(&cancelled, "job.cancelled").json()["event"], "job.completed");
    let listed = deliveries(&client, &format!("job_id={done}")).await;
    assert_eq!(listed.len(), 2, "{listed:#?}");
    assert!(
        !listed[0]["url"].as_str().unwrap().contains("token"),
        "{listed:#?}"
    );
}

async fn an_endpoint_hears_of_the_jobs_of_its_key_alone(db: Db) {
    let (system, receiver, thin) = tokio::join!(system(db).start(), Receiver::start(), Receiver::start());
    let client = system.client();
    let other = client.with_key(KEYS[1]);
    let made = endpoint(
        &client,
        json!({ "url": receiver.url("/a"), "headers": { "Authorization": "Bearer hush" },
            "event_types": ["job.completed", "job.failed"] }),
    )
    .await;
    let small = endpoint(&client, json!({ "url": thin.url("/b"), "payload": "thin" })).await;

    let own = client.accepted("hello").await;
    let foreign = other.accepted("hello").await;
    client.finished(&own).await;
    other.finished(&foreign).await;
    let got = receiver.wait(1, PATIENCE).await;
    let slim = thin.wait(2, PATIENCE).await;

    assert_eq!(got[0].json()["data"]["id"], json!(own));
    assert_eq!(
        got[0].json()["data"]["cost"],
        client.job(&own).await.data(200)["cost"]
    );
    assert_eq!(got[0].header("authorization"), "Bearer hush");
    verify(made["secret"].as_str().unwrap(), &got[0]);
    let types: BTreeSet<String> = slim
        .iter()
        .map(|one| one.json()["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(types, ["job.completed", "job.started"].map(str::to_owned).into());
    assert!(slim[0].json()["data"].get("message").is_none(), "{slim:?}");
    verify(small["secret"].as_str().unwrap(), &slim[0]);

    // Others don't see it, and nobody sees the secret or the header again.
    let id = made["id"].as_str().unwrap();
    let path = format!("/api/v1/webhooks/endpoints/{id}");
    other.get(&path).await.assert_problem(404, "not-found");
    let seen = client.get(&path).await.data(200).clone();
    assert!(
        seen.get("secret").is_none() && !seen.to_string().contains("hush"),
        "{seen:#}"
    );
    assert!(deliveries(&other, "").await.is_empty());
    assert!(!system.written().contains("hush"));
    let stored = system
        .database()
        .texts("select headers || secrets from endpoint")
        .await;
    assert!(!stored.concat().contains("hush"), "{stored:?}");

    // A deleted one hears of nothing.
    let deleted = client.request(Method::DELETE, &path);
    assert_eq!(client.send(deleted).await.status, 204);
    let last = client.accepted("hello").await;
    client.finished(&last).await;
    thin.wait(4, PATIENCE).await;
    assert_eq!(receiver.received().len(), 1);
}

async fn a_failed_delivery_is_tried_again_with_the_same_bytes(db: Db) {
    let rule = |number, _: &Received| match number {
        0 => Reaction::Status(500),
        1 => Reaction::Cut,
        2 => Reaction::With(302, "location", "http://127.0.0.1:1/".to_owned()),
        _ => Reaction::Half,
    };
    let (system, receiver) = tokio::join!(system(db).start(), Receiver::with(rule));
    let client = system.client();

    let job = submit(&client, &receiver.url("/x")).await;
    let got = receiver.wait(4, PATIENCE).await;

    let ids: BTreeSet<_> = got
        .iter()
        .map(|one| one.header("webhook-id").to_owned())
        .collect();
    let bodies: BTreeSet<_> = got.iter().map(|one| one.body.clone()).collect();
    assert_eq!((ids.len(), bodies.len()), (1, 1), "{got:#?}");
    let id = deliveries(&client, &format!("job_id={job}")).await[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = format!("/api/v1/webhooks/deliveries/{id}");
    eventually(PATIENCE, "the record", async || {
        (client.get(&path).await.data(200)["status"] == "succeeded").then_some(())
    })
    .await;
    let shown = client.get(&path).await.data(200).clone();
    let attempts: Vec<_> = shown["attempts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|attempt| (attempt["status_code"].clone(), attempt["error_class"].clone()))
        .collect();
    assert_eq!(
        attempts,
        [
            (json!(500), json!("http_status")),
            (json!(null), json!("protocol")),
            (json!(302), json!("redirect")),
            // It has said that it took it.
            (json!(200), json!(null)),
        ],
        "{shown:#}"
    );
}

async fn a_receiver_that_is_gone_switches_its_endpoint_off(db: Db) {
    let (system, gone, other) = tokio::join!(
        system(db).start(),
        Receiver::with(|_, _| Reaction::Status(410)),
        Receiver::start()
    );
    let client = system.client();
    let made = endpoint(
        &client,
        json!({ "url": gone.url("/"), "event_types": ["job.completed"] }),
    )
    .await;
    endpoint(
        &client,
        json!({ "url": other.url("/"), "event_types": ["endpoint.disabled"] }),
    )
    .await;

    let job = client.accepted("hello").await;
    client.finished(&job).await;
    let told = other.wait(1, PATIENCE).await;

    assert_eq!(told[0].json()["data"]["endpoint_id"], made["id"]);
    let path = format!("/api/v1/webhooks/endpoints/{}", made["id"].as_str().unwrap());
    let seen = client.get(&path).await.data(200).clone();
    assert_eq!(
        (&seen["status"], &seen["disabled_reason"]),
        (&json!("disabled"), &json!("gone"))
    );
    let again = client.post(&format!("{path}/test"), &json!({})).await;
    again.assert_problem(409, "endpoint-disabled");
    let enabled = client
        .request(Method::PATCH, &path)
        .json(&json!({ "status": "enabled" }));
    assert_eq!(client.send(enabled).await.data(200)["status"], "enabled");
    let test = client.post(&format!("{path}/test"), &json!({})).await;
    assert_eq!(test.data(202)["event_type"], "webhook.test");
    gone.wait(2, PATIENCE).await;
}

async fn a_dead_receiver_delays_only_itself(db: Db) {
    let (system, dead, alive) = tokio::join!(
        system(db).env("WEBHOOK_TIMEOUT_SECONDS", "30").start(),
        Receiver::with(|_, _| Reaction::Silent),
        Receiver::start()
    );
    let client = system.client();
    let (to_dead, to_alive) = (dead.url("/"), alive.url("/"));
    at_once((0..40).map(|_| submit(&client, &to_dead))).await;
    dead.wait(10, PATIENCE).await;

    at_once((0..5).map(|_| submit(&client, &to_alive))).await;
    alive.wait(5, PATIENCE).await;

    assert_eq!(dead.received().len(), 10, "at most ten to one host at once");
}

async fn each_delivery_can_be_seen_and_sent_again(db: Db) {
    let rule = |number, _: &Received| Reaction::Status(if number == 0 { 400 } else { 200 });
    let (system, receiver) = tokio::join!(
        system(db).env("WEBHOOK_RETRY_SCHEDULE", "3600").start(),
        Receiver::with(rule)
    );
    let client = system.client();
    let job = submit(&client, &receiver.url("/")).await;
    receiver.wait(1, PATIENCE).await;
    let query = format!("job_id={job}");
    eventually(PATIENCE, "the first attempt", async || {
        (deliveries(&client, &query).await[0]["attempt_count"] == 1).then_some(())
    })
    .await;
    let first = deliveries(&client, &query).await.remove(0);
    let path = format!("/api/v1/webhooks/deliveries/{}", first["id"].as_str().unwrap());
    assert_eq!(
        (&first["status"], &first["last_status_code"]),
        (&json!("pending"), &json!(400))
    );
    client
        .post(&format!("{path}/resend"), &json!({}))
        .await
        .assert_problem(409, "delivery-in-progress");
    client
        .with_key(KEYS[1])
        .get(&path)
        .await
        .assert_problem(404, "not-found");

    // As if its last attempt had failed.
    system
        .database()
        .execute("update delivery set status = 'failed', due_at = null, completed_at = created_at")
        .await;
    let again = client.post(&format!("{path}/resend"), &json!({})).await;
    assert_eq!(again.data(202)["status"], "pending");
    let got = receiver.wait(2, PATIENCE).await;

    assert_eq!(got[0].body, got[1].body);
    assert_eq!(got[0].header("webhook-id"), got[1].header("webhook-id"));
    let last = format!("{path}?include=body");
    eventually(PATIENCE, "the second attempt", async || {
        (client.get(&last).await.data(200)["status"] == "succeeded").then_some(())
    })
    .await;
    let seen = client.get(&last).await.data(200).clone();
    assert_eq!(seen["attempts"][1]["trigger"], "manual", "{seen:#}");
    assert_eq!(seen["body"], got[0].json());

    // What the owner removes is removed here too.
    let deleted = client.request(Method::DELETE, &format!("/api/v1/jobs/{job}"));
    assert_eq!(client.send(deleted).await.status, 204);
    assert_eq!(client.get(&last).await.data(200)["body"], Value::Null);
}

async fn addresses_inside_are_refused() {
    let system = System::builder().sandbox(false).start().await;
    let client = system.client();
    for (url, names) in [
        ("http://example.com/", "WEBHOOK_ALLOW_HTTP"),
        ("https://127.0.0.1/", "WEBHOOK_ALLOWED_SUBNETS"),
        ("https://2130706433/", "WEBHOOK_ALLOWED_SUBNETS"),
        ("https://0x7f.1/", "WEBHOOK_ALLOWED_SUBNETS"),
        ("https://[::ffff:10.0.0.1]/", "WEBHOOK_ALLOWED_SUBNETS"),
        ("https://169.254.169.254/latest", "WEBHOOK_ALLOWED_SUBNETS"),
        ("https://user:pass@example.com/", "user"),
        ("https://example.com:22/", "port"),
        ("ftp://example.com/", "https://"),
    ] {
        let answer = client
            .submit(&json!({ "message": "hi", "webhook_url": url }))
            .await;
        answer.assert_problem(422, "webhook-url-not-allowed");
        assert!(
            answer.json["detail"].as_str().unwrap().contains(names),
            "{url}: {}",
            answer.json
        );
        let answer = client
            .post("/api/v1/webhooks/endpoints", &json!({ "url": url }))
            .await;
        answer.assert_problem(422, "webhook-url-not-allowed");
    }
    assert_eq!(system.database().number("select count(*) from job").await, 0);
}

async fn a_rotated_secret_signs_beside_the_new_one() {
    let (system, receiver) = tokio::join!(system(Db::Sqlite).start(), Receiver::start());
    let client = system.client();
    let made = endpoint(
        &client,
        json!({ "url": receiver.url("/"), "event_types": ["job.completed"] }),
    )
    .await;
    let path = format!("/api/v1/webhooks/endpoints/{}", made["id"].as_str().unwrap());

    let rotated = client.post(&format!("{path}/secret/rotate"), &json!({})).await;
    let job = client.accepted("hello").await;
    client.finished(&job).await;
    let got = receiver.wait(1, PATIENCE).await;

    verify(made["secret"].as_str().unwrap(), &got[0]);
    verify(rotated.data(200)["secret"].as_str().unwrap(), &got[0]);
    for _ in 0..3 {
        client
            .post(&format!("{path}/secret/rotate"), &json!({}))
            .await
            .data(200);
    }
    let one_more = client.post(&format!("{path}/secret/rotate"), &json!({})).await;
    one_more.assert_problem(409, "too-many-secrets");
}

async fn a_worker_that_only_delivers_needs_no_cli() {
    let (mut system, receiver) = tokio::join!(
        system(Db::Sqlite).env("WORKER_QUEUES", "jobs").start(),
        Receiver::start()
    );
    let client = system.client();
    let job = submit(&client, &receiver.url("/")).await;
    client.finished(&job).await;
    assert!(receiver.received().is_empty());

    system
        .add_worker_with(&[
            ("WORKER_QUEUES", "webhooks"),
            ("CLAUDE_CLI_PATH", "/nowhere/claude"),
            ("SANDBOX_ENABLED", "true"),
            ("ANTHROPIC_API_KEY", ""),
        ])
        .await;

    receiver.wait(1, PATIENCE).await;

    // What the API has sealed can't be opened with another key, and nothing is sent unsigned.
    let env = [
        ("DATABASE_URL", system.database().url()),
        ("WORKER_QUEUES", "webhooks"),
        ("SECRET_KEY", "another-one-than-the-database-was-set-up-with"),
    ];
    let refused = run("claude-queue-worker", &[], &env).await;
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains("SECRET_KEY"), "{refused:#?}");
}

async fn budgets_and_keys_tell_their_endpoints(db: Db) {
    let (system, receiver) = tokio::join!(system(db).start(), Receiver::start());
    let admin = system.client().with_key(KEYS[2]);
    let soon = shared::clock::now().plus(Duration::from_hours(48));
    let made = admin
        .post("/api/v1/keys", &json!({ "name": "short", "expires_at": soon }))
        .await;
    let (id, client) = {
        let key = made.data(201);
        (
            key["id"].as_str().unwrap(),
            system.client().with_key(key["key"].as_str().unwrap()),
        )
    };
    let types = [
        "budget.threshold_reached",
        "budget.exceeded",
        "key.expiring",
        "batch.ended",
    ];
    let own = endpoint(&client, json!({ "url": receiver.url("/"), "event_types": types })).await;
    let budget = json!({ "limit_usd": 0.5, "alert_thresholds": [50, 100] });
    let put = admin.request(Method::PUT, &format!("/api/v1/budgets/key/{id}"));
    admin.send(put.json(&budget)).await.data(200);

    for _ in 0..2 {
        let job = json!({ "message": answer("ok").costing(0.25).prompt(), "max_cost_usd": 0.25 });
        let job = client.accepted_body(&job).await;
        client.finished(&job).await;
    }
    // The sweeper tells of keys as soon as it has looked at them once more.
    let got = receiver.wait(3, PATIENCE).await;

    let mut told = BTreeMap::new();
    for one in &got {
        verify(own["secret"].as_str().unwrap(), one);
        let event = one.json();
        told.insert(event["type"].as_str().unwrap().to_owned(), event["data"].clone());
    }
    assert_eq!(told.len(), 3, "each once: {told:#?}");
    let threshold = &told["budget.threshold_reached"];
    assert_eq!(
        (
            &threshold["id"],
            &threshold["threshold_percent"],
            &threshold["spent_usd"]
        ),
        (&json!(id), &json!(50), &json!(0.25)),
    );
    assert_eq!(told["budget.exceeded"]["threshold_percent"], 100);
    assert_eq!(told["key.expiring"]["key_id"], json!(id));
    assert!(told["key.expiring"]["expires_at"].is_string(), "{told:#?}");
}

async fn bad_receivers_are_named() {
    let inside = Receiver::start().await;
    let location = inside.url("/latest/meta-data");
    let rule = move |_: usize, request: &Received| match request.path.as_str() {
        "/redirect" => Reaction::With(307, "location", location.clone()),
        "/half" => Reaction::Half,
        "/cut" => Reaction::Cut,
        "/gone" => Reaction::Status(410),
        "/slow" => Reaction::Silent,
        "/long" => Reaction::Long(100 * 1024 * 1024),
        "/busy" => Reaction::With(429, "retry-after", "7".to_owned()),
        _ => Reaction::Status(200),
    };
    let (system, receiver) = tokio::join!(
        system(Db::Sqlite)
            .env("WEBHOOK_TIMEOUT_SECONDS", "1")
            .env("WEBHOOK_RETRY_SCHEDULE", "3600")
            .start(),
        Receiver::with(rule)
    );
    let client = system.client();
    for (url, class) in [
        (receiver.url("/slow"), "timeout"),
        (receiver.url("/busy"), "http_status"),
        ("http://127.0.0.1:1234/".to_owned(), "connect"),
        ("http://does-not-exist.invalid:8080/".to_owned(), "dns"),
        (receiver.url("/long"), ""),
        (receiver.url("/redirect"), "redirect"),
        // It has said that it took it.
        (receiver.url("/half"), ""),
        (receiver.url("/cut"), "protocol"),
        (receiver.url("/gone"), "http_status"),
    ] {
        let job = submit(&client, &url).await;
        let query = format!("job_id={job}");
        eventually(PATIENCE, "an attempt", async || {
            let listed = deliveries(&client, &query).await;
            listed.first().filter(|one| one["attempt_count"] == 1).map(drop)
        })
        .await;
        let seen = deliveries(&client, &query).await.remove(0);
        assert_eq!(
            seen["last_error_class"].as_str().unwrap_or_default(),
            class,
            "{seen:#}"
        );
    }
}

async fn what_is_wrong_with_an_endpoint_is_said() {
    let system = system(Db::Sqlite).start().await;
    let client = system.client();
    let good = json!("https://example.com/");
    for (body, field) in [
        (json!({}), "body -> url"),
        (
            json!({ "url": good, "event_types": ["job.fialed"] }),
            "body -> event_types -> 0",
        ),
        (
            json!({ "url": good, "headers": { "Host": "x" } }),
            "body -> headers",
        ),
        (
            json!({ "url": good, "headers": { "x": "a\nb" } }),
            "body -> headers",
        ),
        (json!({ "url": good, "secret": "whsec_" }), "body -> secret"),
        (json!({ "url": good, "payload": "fat" }), "body -> payload"),
        (json!({ "url": good, "uri": 1 }), "body -> uri"),
    ] {
        let answer = client.post("/api/v1/webhooks/endpoints", &body).await;
        assert_eq!(answer.status, 422, "{body}: {}", answer.json);
        assert_eq!(
            answer.json["errors"][0]["field"], field,
            "{body}: {}",
            answer.json
        );
    }
    for path in ["endpoints/whe_0", "deliveries/dlv_0", "endpoints/x"] {
        client
            .get(&format!("/api/v1/webhooks/{path}"))
            .await
            .assert_problem(404, "not-found");
    }
}
