//! What a request may say: nothing is overheard, nothing is answered that didn't happen, and nobody gets more than
//! their key allows.

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::client::{Answer, Client, PATIENCE};
use tests::database::{Cluster, Database, Db};
use tests::proxy::Proxy;
use tests::system::{KEYS, System};
use tests::{both, eventually, once};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

both!(
    the_way_of_answering_is_no_part_of_an_idempotent_request,
    the_last_job_of_a_page_is_found_again_by_its_time,
    a_session_is_named_in_any_script_and_never_like_a_number,
    who_may_make_keys_may_not_give_them_money_or_revoke_stronger_ones,
    an_administrator_sees_whose_a_job_is,
);
once!(
    a_misspelt_parameter_is_named_on_every_path,
    a_wait_that_means_nothing_is_refused_before_the_job_is_accepted,
    what_a_body_is_packed_in_and_a_second_key_are_refused,
    heads_that_are_too_large_or_malformed_have_a_problem_of_their_own,
    an_accepted_job_is_reported_although_the_database_is_gone,
    a_commit_without_an_answer_is_told_and_may_be_repeated,
);

const JOBS: &str = "/api/v1/jobs";

async fn nothing_runs(db: Db) -> (System, Client) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    (system, client)
}

async fn jobs(system: &System) -> i64 {
    system.database().number("select count(*) from job").await
}

async fn a_misspelt_parameter_is_named_on_every_path() {
    let (system, client) = nothing_runs(Db::Sqlite).await;
    let admin = client.with_key(KEYS[2]);

    for (path, access) in api::routes::listed() {
        for rule in access.rules() {
            let path = path.replace("{}", "x");
            let request = admin.request(rule.method.clone(), &format!("{path}?staus=failed"));
            let answer = admin.send(request.json(&json!({}))).await;
            answer.assert_faults(&[("query -> staus", "extra_forbidden")]);
        }
    }
    let answer = client.get(&format!("{JOBS}?staus=failed")).await;
    let message = answer.json["errors"][0]["message"].as_str().unwrap();
    assert!(message.ends_with("did you mean `status`?"), "{message}");
    client
        .get(&format!("{JOBS}?fields=id,staus"))
        .await
        .assert_faults(&[("query -> fields", "enum")]);
    let id = client.accepted("hi").await;
    let shown = client.get(&format!("{JOBS}?fields=status,id")).await;
    assert_eq!(shown.data(200), &json!([{"id": id, "status": "queued"}]));
    assert_eq!(jobs(&system).await, 1);
}

async fn a_wait_that_means_nothing_is_refused_before_the_job_is_accepted() {
    let (system, client) = nothing_runs(Db::Sqlite).await;

    let request = client.request(Method::POST, &format!("{JOBS}?wait=soon"));
    let answer = client.send(request.json(&json!({"message": "hi"}))).await;

    answer.assert_faults(&[("query -> wait", "int_type")]);
    assert_eq!(jobs(&system).await, 0);
}

async fn the_way_of_answering_is_no_part_of_an_idempotent_request(db: Db) {
    let (system, client) = nothing_runs(db).await;
    let body = json!({"message": "once"});
    let submit = async |query: &str| {
        let request = client.request(Method::POST, &format!("{JOBS}{query}"));
        client
            .send(request.header("idempotency-key", "k").json(&body))
            .await
    };

    let first = submit("?wait=1").await;
    for query in ["", "?wait=0", "?wait=1"] {
        let again = submit(query).await;
        assert_eq!(again.data(202)["id"], first.data(202)["id"], "{query}");
        assert_eq!(again.data(202)["message"], "once");
        assert_eq!(again.header("idempotency-replayed"), "true");
    }
    assert_eq!(jobs(&system).await, 1);
}

async fn the_last_job_of_a_page_is_found_again_by_its_time(db: Db) {
    let (_system, client) = nothing_runs(db).await;
    let id = client.accepted("hi").await;
    let at = client.job(&id).await.data(200)["created_at"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(at.ends_with("+00:00"), "{at}");

    let found = client.jobs(&format!("created_after={at}")).await;

    assert_eq!(found.data(200)[0]["id"], id.as_str());
}

async fn what_a_body_is_packed_in_and_a_second_key_are_refused() {
    let (system, client) = nothing_runs(Db::Sqlite).await;
    let post = |name: &'static str, values: &[&'static str]| {
        let request = client.request(Method::POST, JOBS).json(&json!({"message": "hi"}));
        let request = values
            .iter()
            .fold(request, |request, value| request.header(name, *value));
        client.send(request)
    };

    for coding in ["gzip", "br", "zstd"] {
        post("content-encoding", &[coding])
            .await
            .assert_problem(415, "unsupported-media-type");
    }
    post("idempotency-key", &["a", "b"])
        .await
        .assert_problem(400, "bad-request");
    let answer = client
        .submit(&json!({"message": "hi", "max_cost_usd": 0.123_456_7}))
        .await;
    answer.assert_faults(&[("body -> max_cost_usd", "value_error")]);
    assert_eq!(jobs(&system).await, 0);
    assert_eq!(post("content-encoding", &["identity"]).await.status, 202);
}

async fn heads_that_are_too_large_or_malformed_have_a_problem_of_their_own() {
    let (_system, client) = nothing_runs(Db::Sqlite).await;

    let long = client
        .get(&format!("{JOBS}?session={}", "x".repeat(20_000)))
        .await;
    long.assert_problem(414, "uri-too-long");
    let mut request = client.request(Method::GET, JOBS);
    for number in 0..120 {
        request = request.header(format!("x-{number}"), "1");
    }
    client
        .send(request)
        .await
        .assert_problem(431, "headers-too-large");
    let large = client
        .request(Method::GET, JOBS)
        .header("x-large", "x".repeat(70_000));
    client.send(large).await.assert_problem(431, "headers-too-large");

    // What the HTTP library refuses before any handler sees it.
    let many = format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: 1\r\n".repeat(250));
    let endless = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(70_000));
    for (head, status, code) in [
        ("GET / HTTP/9.9\r\n\r\n", 400, "bad-request"),
        ("what is this\r\n\r\n", 400, "bad-request"),
        ("GET /\u{1} HTTP/1.1\r\n\r\n", 400, "bad-request"),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "bad-request"),
        ("POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400, "bad-request"),
        (&many, 431, "headers-too-large"),
        (&endless, 414, "uri-too-long"),
    ] {
        let shown = &head[..head.len().min(40)];
        let answer = sent_as_it_is(&client, head).await;
        let (top, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            top.starts_with(&format!("HTTP/1.1 {status} ")),
            "{shown}: {answer}"
        );
        assert!(
            top.contains("\r\ncontent-type: application/problem+json\r\n"),
            "{answer}"
        );
        assert!(top.contains("\r\ncache-control: no-store\r\n"), "{answer}");
        let problem: Value = serde_json::from_str(body).unwrap();
        assert_eq!(
            (&problem["status"], &problem["code"]),
            (&json!(status), &json!(code))
        );
        let id = problem["request_id"].as_str().unwrap();
        assert!(top.contains(&format!("\r\nx-request-id: {id}\r\n")), "{answer}");
    }
}

/// What a process answers to these bytes.
async fn sent_as_it_is(client: &Client, bytes: &str) -> String {
    let address = client.base().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    read.expect("the process closes the connection").unwrap();
    String::from_utf8(answer).unwrap()
}

async fn a_session_is_named_in_any_script_and_never_like_a_number(db: Db) {
    let (_system, client) = nothing_runs(db).await;
    let make =
        async |client: &Client, name: &str| client.post("/api/v1/sessions", &json!({"name": name})).await;

    for name in ["हिन्दी", "தமிழ்", "cafe\u{301}"] {
        make(&client, name).await.data(201);
    }
    let named = client.get("/api/v1/sessions/caf%C3%A9").await;
    assert_eq!(named.data(200)["name"], "café");
    let number = named.data(200)["id"].to_string();

    for name in [number.as_str(), "007", "5f0c1c3e-2b1f-4d0e-9a0e-0f7d6b1f2a3c"] {
        make(&client, name).await.assert_problem(400, "bad-request");
    }
    let admin = client.with_key(KEYS[2]);
    let by_number = admin.get(&format!("/api/v1/sessions/{number}")).await;
    assert_eq!(by_number.data(200)["name"], "café");
}

async fn who_may_make_keys_may_not_give_them_money_or_revoke_stronger_ones(db: Db) {
    let secret = [("SECRET_KEY", "a-secret-key-of-this-test-alone-0123456789")];
    let mut builder = System::builder().database(db).workers(0);
    for (name, value) in secret {
        builder = builder.env(name, value);
    }
    let system = builder.start().await;
    let root = system.client().with_key(KEYS[2]);
    let made = async |client: &Client, body: serde_json::Value| -> Answer {
        client.post("/api/v1/keys", &body).await
    };
    let strong = made(
        &root,
        json!({"name": "strong", "scopes": ["keys:admin", "budgets:admin"]}),
    )
    .await;
    let weak = made(
        &root,
        json!({"name": "weak", "scopes": ["keys:admin", "jobs:read"]}),
    )
    .await;
    let client = system.client().with_key(weak.data(201)["key"].as_str().unwrap());
    let strong = strong.data(201)["id"].as_str().unwrap().to_owned();
    let own = weak.data(201)["id"].as_str().unwrap().to_owned();

    let rich = json!({"name": "rich", "scopes": ["jobs:read"], "budget": {"limit_usd": 1_000_000}});
    made(&client, rich)
        .await
        .assert_problem(403, "insufficient-scope");
    let patch = client.request(Method::PATCH, &format!("/api/v1/keys/{own}"));
    let budget = json!({"budget": {"limit_usd": 1_000_000}});
    client
        .send(patch.json(&budget))
        .await
        .assert_problem(403, "insufficient-scope");
    client
        .post(&format!("/api/v1/keys/{strong}/revoke"), &json!({}))
        .await
        .assert_problem(403, "insufficient-scope");

    // What it may give, it may take.
    let poor = made(&client, json!({"name": "poor", "scopes": ["jobs:read"]})).await;
    let poor = poor.data(201)["id"].as_str().unwrap().to_owned();
    client
        .post(&format!("/api/v1/keys/{poor}/revoke"), &json!({}))
        .await
        .data(200);
    root.post(&format!("/api/v1/keys/{strong}/revoke"), &json!({}))
        .await
        .data(200);
    let delete = client.request(Method::DELETE, &format!("/api/v1/keys/{strong}"));
    client
        .send(delete)
        .await
        .assert_problem(403, "insufficient-scope");
}

async fn an_administrator_sees_whose_a_job_is(db: Db) {
    let (_system, client) = nothing_runs(db).await;
    let other = client.with_key(KEYS[1]);
    let admin = client.with_key(KEYS[2]);
    let id = client.accepted("hi").await;
    other.accepted("hi").await;

    let owner = admin.job(&id).await.data(200)["key_id"].clone();
    let me = client.get("/api/v1/keys/me").await.data(200)["id"].clone();
    assert_eq!(owner, me);
    let owner = owner.as_str().unwrap();
    let listed = admin.jobs(&format!("key_id={owner}")).await;
    assert_eq!(listed.data(200).as_array().unwrap().len(), 1);
    assert_eq!(listed.data(200)[0]["id"], id.as_str());
    other
        .jobs(&format!("key_id={owner}"))
        .await
        .assert_problem(403, "insufficient-scope");
}

async fn an_accepted_job_is_reported_although_the_database_is_gone() {
    let cluster = Cluster::start().await.unwrap();
    let database = Database::in_cluster(&cluster).await;
    let system = System::builder().on(database).workers(0).start().await;
    let client = system.client();
    let request = client
        .request(Method::POST, &format!("{JOBS}?wait=20"))
        .json(&json!({"message": "hi"}));

    let (answer, ()) = tokio::join!(client.send(request), async {
        eventually(PATIENCE, "the job is stored", async || {
            (jobs(&system).await == 1).then_some(())
        })
        .await;
        cluster.stop(Signal::QUIT).await;
    });

    let id = answer.data(202)["id"].as_str().unwrap();
    assert_eq!(answer.header("location"), format!("{JOBS}/{id}"));
    assert_eq!(answer.data(202)["message"], "hi");
    drop(system);
}

async fn a_commit_without_an_answer_is_told_and_may_be_repeated() {
    let folder = tests::paths::folder('r');
    let database = Database::fresh(Db::Postgres, &folder).await;
    let proxy = Proxy::before(&database).await;
    let url = proxy.url();
    let system = System::builder()
        .on(database)
        .env("DATABASE_URL", url)
        .workers(0)
        .start()
        .await;
    let client = system.client();
    let body = json!({"message": "hi"});

    // The answer that is lost may be one to another transaction of the process.
    let mut number = 0;
    let (key, before, refused) = eventually(PATIENCE, "a submission whose commit is lost", async || {
        number += 1;
        let key = format!("key-{number}");
        let before = jobs(&system).await;
        proxy.lose_next_commit();
        let answer = client.submit_once(&key, &body).await;
        let told = answer.text.contains("did not confirm");
        told.then_some((key, before, answer))
    })
    .await;

    refused.assert_problem(503, "unavailable");
    let detail = refused.json["detail"].as_str().unwrap();
    assert!(
        detail.contains("may have been stored") && detail.contains("the same Idempotency-Key"),
        "{detail}"
    );
    assert_eq!(jobs(&system).await, before + 1, "it was stored");
    let again = eventually(PATIENCE, "the database again", async || {
        let answer = client.submit_once(&key, &body).await;
        (answer.status != 503).then_some(answer)
    })
    .await;
    assert_eq!(again.header("idempotency-replayed"), "true");
    let id = again.data(202)["id"].as_str().unwrap();
    assert_eq!(client.job(id).await.data(200)["message"], "hi");
    assert_eq!(jobs(&system).await, before + 1, "nothing was stored twice");
}
