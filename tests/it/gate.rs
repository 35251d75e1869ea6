//! Keys, request ids, slow clients, the drain.

use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::client::{PATIENCE, at_once};
use tests::database::Db;
use tests::script::{Step, steps, until_told};
use tests::system::{KEYS, System};
use tests::{BUSY, both, eventually, once};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

both!(
    without_any_key_everybody_on_this_machine_is_anonymous,
    health_needs_no_key,
    a_process_drains_when_told_to_stop,
);
once!(
    a_key_opens_as_a_header_or_as_a_bearer,
    every_answer_has_its_headers,
    a_request_id_is_taken_or_made,
    slow_headers_are_cut,
    a_slow_body_is_cut,
    answers_are_compressed_for_those_who_ask,
    a_web_page_may_ask_first,
    a_process_that_stops_answers_what_it_has_begun,
    a_worker_that_stops_lets_its_run_finish,
    the_streams_of_one_key_leave_room_for_others,
);

async fn a_key_opens_as_a_header_or_as_a_bearer() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();
    let bare = client.without_key();
    let id = client.accepted("hi").await;
    let path = format!("/api/v1/jobs/{id}");

    for request in [
        bare.request(Method::GET, &path).bearer_auth(KEYS[0]),
        bare.request(Method::GET, &path)
            .header("authorization", format!("bearer {}", KEYS[0])),
        bare.request(Method::GET, &path)
            .header("x-api-key", KEYS[0])
            .bearer_auth(KEYS[0]),
    ] {
        assert_eq!(client.send(request).await.data(200)["id"], id.as_str());
    }
    let basic = bare.request(Method::GET, &path).basic_auth("user", Some(KEYS[0]));
    client.send(basic).await.assert_problem(401, "unauthorized");
    // Only the first 401 of many tells something: no key is ever repeated.
    let wrong = bare.with_key("a-wrong-key-0123").get(&path).await;
    assert!(!wrong.text.contains("a-wrong-key"), "{}", wrong.text);
    assert!(!system.written().contains("a-wrong-key"));
}

async fn without_any_key_everybody_on_this_machine_is_anonymous(db: Db) {
    let system = System::builder()
        .database(db)
        .env("API_KEYS", "")
        .env("ADMIN_API_KEYS", "")
        .start()
        .await;
    let client = system.client().without_key();

    let id = client.accepted("hi").await;
    assert_eq!(client.finished(&id).await["status"], "done");

    // A page that a person on this machine has open is not that person.
    let page = client
        .request(Method::POST, "/api/v1/jobs")
        .header("origin", "https://evil.example");
    let answer = client.send(page.json(&json!({ "message": "hi" }))).await;
    assert_eq!(answer.status, 401, "{}", answer.text);

    // Nor is who comes through a proxy on this machine, whatever the proxy makes of the `Host`.
    for (name, value) in [
        ("x-forwarded-for", "203.0.113.7"),
        ("forwarded", "for=203.0.113.7"),
        ("via", "1.1 proxy"),
    ] {
        let passed_on = client.request(Method::GET, "/api/v1/jobs").header(name, value);
        client.send(passed_on).await.assert_problem(401, "unauthorized");
    }
}

async fn every_answer_has_its_headers() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();

    for path in [
        "/api/v1/jobs",
        "/api/v1/jobs/nonsense",
        "/nowhere",
        "/livez",
        "/api/v1/health",
    ] {
        let answer = client.get(path).await;
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(answer.header("x-frame-options"), "DENY", "{path}");
        assert_eq!(answer.header("referrer-policy"), "no-referrer", "{path}");
        assert!(!answer.header("content-security-policy").is_empty(), "{path}");
        assert!(!answer.header("x-request-id").is_empty(), "{path}");
        assert!(answer.header("x-response-time").ends_with("ms"), "{path}");
        assert!(
            answer.header("cache-control").contains("no-"),
            "{path}: {}",
            answer.header("cache-control")
        );
        assert!(
            answer.header("vary").to_lowercase().contains("accept-encoding"),
            "{path}"
        );
    }
}

async fn a_request_id_is_taken_or_made() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();
    let with = |id: &str| {
        client.send(
            client
                .request(Method::GET, "/api/v1/jobs")
                .header("x-request-id", id),
        )
    };

    let answer = with("my-request_1.2").await;
    assert_eq!(answer.header("x-request-id"), "my-request_1.2");
    assert_eq!(answer.json["meta"]["request_id"], "my-request_1.2");
    // One that could break a log line, or fill it, is replaced.
    for bad in ["has blanks in it", "<script>", &"x".repeat(1_000)] {
        assert_ne!(with(bad).await.header("x-request-id"), bad);
    }
    let (one, two) = (client.jobs("").await, client.jobs("").await);
    assert_ne!(one.header("x-request-id"), two.header("x-request-id"));
}

async fn health_needs_no_key(db: Db) {
    let system = System::start(db).await;
    let client = system.client().without_key();

    // A database that takes long to answer is no good health.
    let health = eventually(PATIENCE, "good health", async || {
        let health = client.get("/api/v1/health").await;
        (health.json["status"] == "ok").then_some(health)
    })
    .await;
    assert_eq!(health.status, 200);
    assert_eq!(health.json["checks"]["database"], "ok", "{}", health.text);
    assert_eq!(health.json["checks"]["claude_cli"], "ok", "{}", health.text);
    let livez = client.get("/livez").await;
    assert_eq!((livez.status, livez.text.as_str()), (200, "ok"));
    assert_eq!(client.get("/readyz").await.status, 200);
    assert_eq!(client.send(client.request(Method::HEAD, "/livez")).await.text, "");
}

async fn slow_headers_are_cut() {
    let system = System::builder()
        .workers(0)
        .env("API_HEAD_SECONDS", "2")
        .start()
        .await;
    let address = system.client().base().trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let begin = Instant::now();

    // A header every now and then, without end: the whole head has a deadline, not each byte.
    let cut = async {
        stream
            .write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n")
            .await
            .unwrap();
        let (mut answer, mut number) = (Vec::new(), 0);
        loop {
            number += 1;
            tokio::select! {
                read = stream.read_buf(&mut answer) => if matches!(read, Ok(0) | Err(_)) {
                    return answer;
                },
                () = tokio::time::sleep(Duration::from_millis(200)) => {
                    // What the server says before it closes is read first.
                    let _ = stream.write_all(format!("x-slow-{number}: 1\r\n").as_bytes()).await;
                }
            }
        }
    };
    let answer = tokio::time::timeout(PATIENCE, cut).await;

    let answer = answer.expect("the connection is cut");
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
        "{answer}"
    );
    let took = begin.elapsed();
    // Sooner would be too short for an honest client.
    assert!(took > Duration::from_millis(1_900), "{took:?}");
    // The head of the next client, as fast as usual, is taken.
    assert_eq!(system.client().get("/livez").await.status, 200);
}

async fn a_slow_body_is_cut() {
    let system = System::builder()
        .workers(0)
        .env("API_BODY_SECONDS", "2")
        .start()
        .await;
    let address = system.client().base().trim_start_matches("http://").to_owned();
    let head = format!(
        "POST /api/v1/jobs HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-type: application/json\r\n\
         content-length: 1000\r\n\r\n{{",
        KEYS[0]
    );
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let begin = Instant::now();
    stream.write_all(head.as_bytes()).await.unwrap();

    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;

    read.expect("the server gives up").unwrap();
    assert!(
        answer.starts_with(b"HTTP/1.1 408"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    assert!(
        begin.elapsed() > Duration::from_millis(1_900),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(system.database().number("select count(*) from job").await, 0);
}

async fn answers_are_compressed_for_those_who_ask() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();
    for _ in 0..30 {
        client.accepted(&"the same words again ".repeat(10)).await;
    }

    let plain = client.jobs("limit=100").await;
    assert_eq!(plain.header("content-encoding"), "");
    assert_eq!(plain.json["data"].as_array().unwrap().len(), 30);
    let request = client
        .request(Method::GET, "/api/v1/jobs?limit=100")
        .header("accept-encoding", "gzip");
    let small = request.send().await.unwrap();
    assert_eq!(small.headers()["content-encoding"], "gzip");
    assert!(small.bytes().await.unwrap().len() < plain.text.len() / 3);
    // A stream must come at once, so it is never held back by a compressor.
    let id = plain.json["data"][0]["id"].as_str().unwrap().to_owned();
    client.cancel(&id).await.data(200);
    let request = client
        .request(Method::GET, &format!("/api/v1/jobs/{id}/stream"))
        .header("accept-encoding", "gzip");
    assert_eq!(
        request.send().await.unwrap().headers().get("content-encoding"),
        None
    );
}

async fn a_web_page_may_ask_first() {
    let system = System::builder()
        .workers(0)
        .env("CORS_ORIGINS", "https://app.example")
        .start()
        .await;
    let client = system.client().without_key();
    let ask = |origin: &str| {
        let request = client
            .request(Method::OPTIONS, "/api/v1/jobs")
            .header("origin", origin);
        let request = request.header("access-control-request-method", "POST");
        client.send(request.header(
            "access-control-request-headers",
            "x-api-key,content-type,idempotency-key",
        ))
    };

    let answer = ask("https://app.example").await;
    assert_eq!(answer.status / 100, 2);
    assert_eq!(
        answer.header("access-control-allow-origin"),
        "https://app.example"
    );
    assert!(answer.header("access-control-allow-methods").contains("POST"));
    assert!(
        answer
            .header("access-control-allow-headers")
            .to_lowercase()
            .contains("x-api-key")
    );
    assert_eq!(
        ask("https://evil.example")
            .await
            .header("access-control-allow-origin"),
        ""
    );

    let request = client
        .with_key(KEYS[0])
        .request(Method::GET, "/api/v1/jobs")
        .header("origin", "https://app.example");
    let answer = client.send(request).await;
    assert_eq!(
        answer.header("access-control-allow-origin"),
        "https://app.example"
    );
    assert!(
        answer
            .header("access-control-expose-headers")
            .to_lowercase()
            .contains("x-request-id")
    );
}

async fn a_process_drains_when_told_to_stop(db: Db) {
    let mut system = System::builder()
        .database(db)
        .env("DRAIN_SECONDS", "10")
        .start()
        .await;
    let client = system.client();
    let id = client
        .play(&steps([Step::Say("begun".to_owned()), Step::Sleep(60_000)]))
        .await;
    client.event(&id, "assistant").await;
    let mut stream = client.stream(&id, None).await;
    stream.next().await.unwrap();
    let address = client.base().trim_start_matches("http://").to_owned();
    let mut poll = TcpStream::connect(&address).await.unwrap();
    let head = format!(
        "GET /api/v1/jobs/{id}?wait=50 HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\n\r\n",
        KEYS[0]
    );
    poll.write_all(head.as_bytes()).await.unwrap();
    is_read(&poll).await;
    let begin = Instant::now();

    system.api(0).signal(Signal::TERM);

    // Both end at once: the poll with what is true now, the stream with a word, so that the client resumes elsewhere.
    let mut answer = String::new();
    poll.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    let job: Value = serde_json::from_str(body).unwrap();
    assert_eq!(job["data"]["status"], "running", "{answer}");
    stream.rest().await;
    assert!(
        stream.comments.iter().any(|comment| comment == "bye"),
        "{:?}",
        stream.comments
    );
    assert_eq!(system.api(0).ended(PATIENCE).await.code(), Some(0));
    assert!(begin.elapsed() < BUSY, "{:?}", begin.elapsed());
}

/// Waits until the server has taken everything that was written to it: what it hasn't is closed when it stops.
async fn is_read(stream: &TcpStream) {
    let port = |address: std::net::SocketAddr| format!(":{:04X}", address.port());
    let ours = port(stream.local_addr().unwrap());
    let theirs = port(stream.peer_addr().unwrap());
    eventually(PATIENCE, "a request that is read", async || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let rows = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let (mut sent, mut read) = (false, false);
        for row in rows.filter(|row| row.len() > 9) {
            // Bytes that wait to be acknowledged, and bytes that wait to be read.
            let (sending, waiting) = row[4].split_once(':').unwrap_or_default();
            let zero = |count: &str| count.bytes().all(|digit| digit == b'0');
            if row[1].ends_with(&ours) && row[2].ends_with(&theirs) {
                sent = zero(sending);
            } else if row[1].ends_with(&theirs) && row[2].ends_with(&ours) {
                // A connection without an inode isn't accepted yet.
                read = zero(waiting) && row[9] != "0";
            }
        }
        (sent && read).then_some(())
    })
    .await;
}

async fn a_process_that_stops_answers_what_it_has_begun() {
    let mut system = System::builder().workers(0).start().await;
    let client = system.client();
    let body = json!({ "message": "half" }).to_string();
    let (first, second) = body.split_at(5);
    let address = client.base().trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let head = format!(
        "POST /api/v1/jobs HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-length: {}\r\n\r\n{first}",
        KEYS[0],
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    is_read(&stream).await;

    system.api(0).signal(Signal::TERM);
    eventually(PATIENCE, "the listener's end", async || {
        TcpStream::connect(&address).await.err()
    })
    .await;
    stream.write_all(second.as_bytes()).await.unwrap();

    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(
        answer.starts_with("HTTP/1.1 202") || answer.starts_with("HTTP/1.1 503"),
        "{answer}"
    );
    let jobs = system.database().number("select count(*) from job").await;
    assert_eq!(jobs, i64::from(answer.starts_with("HTTP/1.1 202")));
    assert_eq!(system.api(0).ended(PATIENCE).await.code(), Some(0));
}

async fn a_worker_that_stops_lets_its_run_finish() {
    let mut system = System::start(Db::Sqlite).await;
    let client = system.client();
    let id = client
        .play(&steps([Step::Say("begun".to_owned()), until_told()]).answering("finished"))
        .await;
    client.event(&id, "assistant").await;
    let waiting = client.play(&steps([])).await;
    client.finished(&waiting).await;

    system.worker(0).signal(Signal::TERM);
    system.writes("the worker drains").await;
    system.tell_to_go_on(&id);

    assert_eq!(system.worker(0).ended(PATIENCE).await.code(), Some(0));

    let job = client.job(&id).await.data(200).clone();
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("done"), &json!(1)),
        "{job:#}"
    );
    let later = client.accepted("later").await;
    assert_eq!(client.job(&later).await.data(200)["status"], "queued");
}

/// However many streams one key wants, and also where a process may open few files.
async fn the_streams_of_one_key_leave_room_for_others() {
    let system = System::builder().workers(0).open_files(400).start().await;
    let client = system.client();
    let id = client.accepted("waits for a worker").await;

    let streams = at_once((0..300).map(|_| client.stream(&id, None))).await;

    let open = streams.iter().filter(|stream| stream.status == 200).count();
    assert_eq!(open, 100, "as many as a key may have");
    let others: Vec<u16> = streams.iter().map(|stream| stream.status).collect();
    assert!(
        others.iter().all(|status| [200, 429, 503].contains(status)),
        "{others:?}"
    );
    let other = client.with_key(KEYS[1]);
    other.accepted("of another key").await;
    other.jobs("").await.data(200);
    for path in ["/livez", "/readyz"] {
        assert_eq!(client.get(path).await.status, 200, "{path}");
    }

    // Connections on which nothing is asked: beyond their number only the open paths are answered.
    let address = client.base().trim_start_matches("http://");
    let idle = at_once((0..60).map(|_| TcpStream::connect(address))).await;
    for path in ["/livez", "/readyz"] {
        assert_eq!(client.get(path).await.status, 200, "{path}");
    }
    drop((idle, streams));
    eventually(PATIENCE, "room for everybody", async || {
        (other.jobs("").await.status == 200).then_some(())
    })
    .await;
}
