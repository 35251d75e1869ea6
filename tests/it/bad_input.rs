//! What may not be submitted: each its own problem with status, code and the way to the field, and nothing written.

use serde_json::{Value, json};
use tests::client::{Answer, Client};
use tests::database::{Database, Db};
use tests::system::{KEYS, System};
use tests::{both, once};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

both!(a_null_character_in_a_query_is_named,);
once!(
    a_body_that_is_not_json_is_refused,
    a_wrong_member_is_named,
    all_faults_are_told_at_once,
    a_message_has_a_length,
    a_body_has_a_size,
    a_key_must_be_right,
    what_does_not_exist_is_not_found,
    a_wrong_method_is_told_the_right_ones,
    headers_are_checked_too,
);

const JOBS: &str = "/api/v1/jobs";

async fn nothing_runs(db: Db) -> (System, Client) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    (system, client)
}

/// How many rows there are of everything that a submission writes.
async fn rows(database: &Database) -> i64 {
    let tickets = match database.db() {
        Db::Sqlite => "Jobs",
        Db::Postgres => "apalis.jobs",
    };
    let mut rows = 0;
    for table in ["job", "prompt", "event", "idempotency", "ledger", tickets] {
        rows += database.number(&format!("select count(*) from {table}")).await;
    }
    rows
}

async fn raw(client: &Client, body: impl Into<reqwest::Body>) -> Answer {
    let request = client
        .request(reqwest::Method::POST, JOBS)
        .header("content-type", "application/json");
    client.send(request.body(body)).await
}

async fn a_body_that_is_not_json_is_refused() {
    let (system, client) = nothing_runs(Db::Sqlite).await;

    for body in [
        "{",
        "{'message': 'x'}",
        "message=x",
        "{\"message\": \"x\",}",
        "nul",
        "{\"message\": \"\\ud800\"}",
    ] {
        raw(&client, body)
            .await
            .assert_faults(&[("body", "json_invalid")]);
    }
    raw(&client, &b"{\"message\": \"\xff\xfe\"}"[..])
        .await
        .assert_faults(&[("body", "json_invalid")]);
    raw(&client, "[".repeat(100_000))
        .await
        .assert_faults(&[("body", "json_invalid")]);
    raw(&client, "").await.assert_faults(&[("body", "missing")]);
    for body in ["[]", "\"message\"", "7", "null", "true"] {
        raw(&client, body).await.assert_faults(&[("body", "dict_type")]);
    }

    assert_eq!(rows(system.database()).await, 0);
}

async fn a_wrong_member_is_named() {
    let (system, client) = nothing_runs(Db::Sqlite).await;
    // The members beside a good message, and what is wrong.
    let cases: Vec<(Value, &str, &str)> = vec![
        (json!({ "colour": "blue" }), "body -> colour", "extra_forbidden"),
        (json!({ "Message": "x" }), "body -> Message", "extra_forbidden"),
        (json!({ "model": 5 }), "body -> model", "string_type"),
        (json!({ "model": "" }), "body -> model", "string_too_short"),
        (
            json!({ "model": "m".repeat(101) }),
            "body -> model",
            "string_too_long",
        ),
        (
            json!({ "system": "s".repeat(50_001) }),
            "body -> system",
            "string_too_long",
        ),
        (json!({ "effort": "extreme" }), "body -> effort", "enum"),
        (
            json!({ "permission_mode": "yolo" }),
            "body -> permission_mode",
            "enum",
        ),
        (
            json!({ "max_turns": 0 }),
            "body -> max_turns",
            "greater_than_equal",
        ),
        (
            json!({ "max_turns": 1_001 }),
            "body -> max_turns",
            "less_than_equal",
        ),
        (json!({ "max_turns": "5" }), "body -> max_turns", "int_type"),
        (json!({ "max_turns": 1.5 }), "body -> max_turns", "int_type"),
        (json!({ "max_turns": true }), "body -> max_turns", "int_type"),
        (
            json!({ "timeout_seconds": 0 }),
            "body -> timeout_seconds",
            "greater_than_equal",
        ),
        (
            json!({ "timeout_seconds": 86_401 }),
            "body -> timeout_seconds",
            "less_than_equal",
        ),
        (
            json!({ "timeout_seconds": 1e300 }),
            "body -> timeout_seconds",
            "less_than_equal",
        ),
        (
            json!({ "max_cost_usd": -1 }),
            "body -> max_cost_usd",
            "greater_than_equal",
        ),
        (
            json!({ "max_cost_usd": "free" }),
            "body -> max_cost_usd",
            "float_type",
        ),
        (json!({ "priority": 11 }), "body -> priority", "less_than_equal"),
        (
            json!({ "priority": -11 }),
            "body -> priority",
            "greater_than_equal",
        ),
        (
            json!({ "run_after": "tomorrow" }),
            "body -> run_after",
            "datetime_parsing",
        ),
        (
            json!({ "cancel_after": 0 }),
            "body -> cancel_after",
            "greater_than_equal",
        ),
        (
            json!({ "cancel_after": 604_801 }),
            "body -> cancel_after",
            "less_than_equal",
        ),
        (
            json!({ "max_attempts": 0 }),
            "body -> max_attempts",
            "greater_than_equal",
        ),
        (
            json!({ "max_attempts": 6 }),
            "body -> max_attempts",
            "less_than_equal",
        ),
        (
            json!({ "on_worker_lost": "panic" }),
            "body -> on_worker_lost",
            "enum",
        ),
        (json!({ "custom_id": "a b" }), "body -> custom_id", "value_error"),
        (
            json!({ "custom_id": "x".repeat(65) }),
            "body -> custom_id",
            "string_too_long",
        ),
        (
            json!({ "concurrency_key": "" }),
            "body -> concurrency_key",
            "string_too_short",
        ),
        (
            json!({ "concurrency_key": "k".repeat(129) }),
            "body -> concurrency_key",
            "string_too_long",
        ),
        (json!({ "metadata": [] }), "body -> metadata", "dict_type"),
        (
            json!({ "metadata": { "colour": 5 } }),
            "body -> metadata -> colour",
            "string_type",
        ),
        (
            json!({ "allowed_tools": 5 }),
            "body -> allowed_tools",
            "list_type",
        ),
        (
            json!({ "allowed_tools": ["Read", 5] }),
            "body -> allowed_tools -> 1",
            "string_type",
        ),
        (json!({ "session": "" }), "body -> session", "string_too_short"),
    ];

    for (members, field, kind) in cases {
        let mut body = json!({ "message": "hi" });
        body.as_object_mut()
            .unwrap()
            .extend(members.as_object().unwrap().clone());

        client.submit(&body).await.assert_faults(&[(field, kind)]);
    }

    assert_eq!(rows(system.database()).await, 0);
}

async fn all_faults_are_told_at_once() {
    let (system, client) = nothing_runs(Db::Sqlite).await;

    let answer = client
        .submit(&json!({ "max_turns": 0, "colour": 1, "priority": "high" }))
        .await;

    answer.assert_faults(&[
        ("body -> colour", "extra_forbidden"),
        ("body -> max_turns", "greater_than_equal"),
        ("body -> message", "missing"),
        ("body -> priority", "int_type"),
    ]);
    assert_eq!(rows(system.database()).await, 0);
}

async fn a_message_has_a_length() {
    let (system, client) = nothing_runs(Db::Sqlite).await;

    for (message, kind) in [
        (json!(null), "string_type"),
        (json!(5), "string_type"),
        (json!(["hi"]), "string_type"),
        (json!(""), "string_too_short"),
        (json!("a".repeat(1_000_001)), "string_too_long"),
        (json!("  \n\t "), "value_error"),
        (json!("nul \u{0} character"), "value_error"),
    ] {
        client
            .submit(&json!({ "message": message }))
            .await
            .assert_faults(&[("body -> message", kind)]);
    }
    client
        .submit(&json!({}))
        .await
        .assert_faults(&[("body -> message", "missing")]);

    assert_eq!(rows(system.database()).await, 0);
}

async fn a_body_has_a_size() {
    let (system, client) = nothing_runs(Db::Sqlite).await;
    let body = json!({ "message": "a".repeat(3_000_000) }).to_string();

    let answer = raw(&client, body.clone()).await;
    answer.assert_problem(413, "payload-too-large");
    assert_eq!(answer.json["error"]["code"], "PAYLOAD_TOO_LARGE");

    // In pieces, without a length: only counting finds out.
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = body
        .as_bytes()
        .chunks(10_000)
        .map(|piece| Ok(piece.to_vec()))
        .collect();
    let pieces = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    raw(&client, pieces)
        .await
        .assert_problem(413, "payload-too-large");

    // A client that asks first is told without sending a byte of it.
    let head = format!(
        "POST {JOBS} HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-type: application/json\r\n\
         content-length: 3000000\r\nexpect: 100-continue\r\n\r\n",
        KEYS[0]
    );
    let mut stream = TcpStream::connect(client.base().trim_start_matches("http://"))
        .await
        .unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut line = [0; 12];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"HTTP/1.1 413");

    assert_eq!(rows(system.database()).await, 0);
}

async fn a_key_must_be_right() {
    let (system, client) = nothing_runs(Db::Sqlite).await;
    let good = json!({ "message": "hi" });

    for client in [
        client.without_key(),
        client.with_key("wrong"),
        client.with_key(&KEYS[0][1..]),
        client.with_key(""),
    ] {
        let answer = client.submit(&good).await;
        answer.assert_problem(401, "unauthorized");
        assert_eq!(answer.json["detail"], "Invalid or missing API key");
        assert_eq!(answer.header("www-authenticate"), "Bearer realm=\"api\"");
        client.jobs("").await.assert_problem(401, "unauthorized");
        client
            .job("job_00000000000000000000000000000000")
            .await
            .assert_problem(401, "unauthorized");
    }
    let both = client
        .request(reqwest::Method::POST, JOBS)
        .bearer_auth(KEYS[1])
        .json(&good);
    client
        .send(both)
        .await
        .assert_problem(400, "ambiguous-credentials");
    // The key is looked at before the body: a wrong one learns nothing about it, and makes nobody read it.
    raw(&client.with_key("wrong"), "{")
        .await
        .assert_problem(401, "unauthorized");
    raw(&client.with_key("wrong"), "a".repeat(3_000_000))
        .await
        .assert_problem(401, "unauthorized");

    assert_eq!(rows(system.database()).await, 0);
}

async fn what_does_not_exist_is_not_found() {
    let (system, client) = nothing_runs(Db::Sqlite).await;

    for id in [
        "job_0198f0a1b2c37d4e8f90a1b2c3d4e5f6",
        "job_",
        "5",
        "%00",
        "..%2f",
        "' or 1=1 --",
        &"x".repeat(1_000),
    ] {
        let path = format!("{JOBS}/{}", id.replace(' ', "%20"));
        client.get(&path).await.assert_problem(404, "not-found");
        client
            .get(&format!("{path}/events"))
            .await
            .assert_problem(404, "not-found");
        client
            .post(&format!("{path}/cancel"), &json!({}))
            .await
            .assert_problem(404, "not-found");
    }
    for path in [
        "/api/v1/sessions/%00",
        "/api/v1/sessions/a%00b/jobs",
        "/api/v1/keys/%00",
        "/",
        "/api",
        "/api/v1",
        "/api/v1/job",
        "/api/v2/jobs",
        "/jobs",
        "/api/v1/jobs/job_1/nothing",
    ] {
        assert_eq!(client.get(path).await.status, 404, "{path}");
    }

    assert_eq!(rows(system.database()).await, 0);
}

/// PostgreSQL can't be asked for it, SQLite can.
async fn a_null_character_in_a_query_is_named(db: Db) {
    let (_system, client) = nothing_runs(db).await;
    let admin = client.with_key(KEYS[2]);

    for (path, name) in [
        ("/api/v1/jobs", "session"),
        ("/api/v1/jobs", "cursor"),
        ("/api/v1/sessions", "user_id"),
        ("/api/v1/keys", "name"),
        ("/api/v1/audit", "user_id"),
        ("/api/v1/usage", "user_id"),
        ("/api/v1/budgets", "cursor"),
    ] {
        admin
            .get(&format!("{path}?{name}=a%00b"))
            .await
            .assert_faults(&[(&format!("query -> {name}"), "value_error")]);
    }
}

async fn a_wrong_method_is_told_the_right_ones() {
    let (system, client) = nothing_runs(Db::Sqlite).await;
    let id = "job_0198f0a1b2c37d4e8f90a1b2c3d4e5f6";

    for (method, path, allowed) in [
        ("PUT", JOBS.to_owned(), vec!["GET", "POST"]),
        ("DELETE", JOBS.to_owned(), vec!["GET", "POST"]),
        ("POST", format!("{JOBS}/{id}/events"), vec!["GET"]),
        ("GET", format!("{JOBS}/{id}/cancel"), vec!["POST"]),
        ("POST", "/api/v1/health".to_owned(), vec!["GET"]),
        ("BREW", JOBS.to_owned(), vec!["GET", "POST"]),
    ] {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let answer = client.send(client.request(method, &path)).await;
        answer.assert_problem(405, "method-not-allowed");
        let mut told: Vec<&str> = answer
            .header("allow")
            .split(", ")
            .filter(|method| !matches!(*method, "HEAD" | "OPTIONS"))
            .collect();
        told.sort_unstable();
        assert_eq!(told, allowed, "{path}");
    }

    assert_eq!(rows(system.database()).await, 0);
}

async fn headers_are_checked_too() {
    let (system, client) = nothing_runs(Db::Sqlite).await;
    let good = json!({ "message": "hi" });
    let with = |name: &str, value: &str| {
        client
            .request(reqwest::Method::POST, JOBS)
            .header(name, value)
            .body(good.to_string())
    };

    let answer = client.send(with("content-type", "text/plain")).await;
    answer.assert_problem(415, "unsupported-media-type");
    for key in ["", "a key with blanks", &"k".repeat(256)] {
        client
            .send(with("idempotency-key", key))
            .await
            .assert_problem(400, "bad-request");
    }
    client
        .send(with("cancel-after", "soon"))
        .await
        .assert_faults(&[("header -> Cancel-After", "value_error")]);
    assert_eq!(rows(system.database()).await, 0);

    // No content type at all counts as JSON, and so does any charset.
    assert_eq!(client.send(with("x-nothing", "")).await.status, 202);
    assert_eq!(
        client
            .send(with("content-type", "application/json; charset=utf-8"))
            .await
            .status,
        202
    );
}
