//! The gateway between a run and a stand-in for the Messages API, both spoken to by hand.

#![expect(
    clippy::unwrap_used,
    reason = "test helpers fail by panicking, and start what they test"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::money::MicroUsd;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, UnixStream};
use tokio::sync::mpsc;
use worker::config::{Address, Anthropic};
use worker::gateway::credentials::Credentials;
use worker::gateway::failure::{ApiFailure, NO_CREDENTIAL, UNREACHABLE};
use worker::gateway::request::Permissions;
use worker::gateway::{Gateway, Upstream};
use worker::spend::Meter;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

const TOKEN: &str = "run-0123456789";

/// A request for a stream whose answer may cost a fiftieth of a cent.
const BODY: &str = r#"{"model":"claude-opus-5-5","max_tokens":10,"stream":true,"m":1}"#;

/// The beginning of an answer of 100 tokens in.
const START: &str = concat!(
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    "8a\r\nevent: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"claude-opus-5-5\",",
    "\"usage\":{\"input_tokens\":100,\"output_tokens\":1}}}\n\n\r\n",
);

/// How an error of the gateway's own ends.
const END_OF_ERROR: &str = r#""type":"error"}"#;

/// One connection of the stand-in: it hands over what it received and sends what it is given.
struct Api {
    address: String,
    received: mpsc::UnboundedReceiver<Vec<u8>>,
    answers: mpsc::UnboundedSender<Option<&'static str>>,
}

impl Api {
    /// Takes one connection, and closes it at an answer of `None`.
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (send, received) = mpsc::unbounded_channel();
        let (answers, mut answer) = mpsc::unbounded_channel::<Option<&'static str>>();
        tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 65_536];
            loop {
                tokio::select! {
                    read = socket.read(&mut buffer) => match read {
                        Ok(0) | Err(_) => return,
                        Ok(read) => { let _ = send.send(buffer[..read].to_vec()); }
                    },
                    text = answer.recv() => match text {
                        Some(Some(text)) => socket.write_all(text.as_bytes()).await.unwrap(),
                        _ => return,
                    },
                }
            }
        });
        Self {
            address,
            received,
            answers,
        }
    }

    /// Everything received until it holds `end`.
    async fn received_until(&mut self, end: &str) -> String {
        let mut all = String::new();
        while !all.contains(end) {
            let part = tokio::time::timeout(PATIENCE, self.received.recv()).await;
            let part = part
                .unwrap_or_else(|_| panic!("no {end:?} came in: {all}"))
                .expect("the connection ended");
            all.push_str(&String::from_utf8_lossy(&part));
        }
        all
    }

    fn answer(&self, text: &'static str) {
        self.answers.send(Some(text)).unwrap();
    }
}

fn upstream(address: &str) -> Upstream {
    Upstream::new(&Address::parse(address).unwrap()).unwrap()
}

/// The run's side.
struct Client {
    gateway: Gateway,
    meter: Arc<Meter>,
    socket: PathBuf,
    _folder: TempDir,
}

impl Client {
    /// With a gateway that is armed for an attempt that may cost a dollar.
    fn start(address: &str, credentials: Credentials) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("gateway.sock");
        let gateway = Gateway::start(
            &socket,
            Arc::new(credentials),
            TOKEN,
            &upstream(address),
            Arc::default(),
        )
        .unwrap();
        let meter = Arc::new(Meter::new(Arc::default(), MicroUsd(1_000_000)));
        gateway.arm(Arc::clone(&meter), Permissions::default());
        Self {
            gateway,
            meter,
            socket,
            _folder: folder,
        }
    }

    async fn send(&self, request: &str) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }
}

async fn read_until(stream: &mut UnixStream, end: &str) -> String {
    let mut all = String::new();
    let mut buffer = vec![0; 4096];
    while !all.contains(end) {
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await;
        let read = read.unwrap_or_else(|_| panic!("no {end:?} came: {all}")).unwrap();
        assert_ne!(read, 0, "the answer ended before {end:?}: {all}");
        all.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    all
}

fn api_key() -> Credentials {
    let settings = Anthropic {
        api_key: Some("sk-ant-real".to_owned()),
        ..Anthropic::default()
    };
    Credentials::find(&settings, "/nonexistent".as_ref()).unwrap()
}

fn request(credential: &str, body: &str) -> String {
    format!(
        "POST /v1/messages?beta=true HTTP/1.1\r\nHost: gw\r\n{credential}\r\nanthropic-beta: oauth-2025-04-20\r\n\
         Accept-Encoding: gzip, br\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn the_credential_is_swapped_and_the_rest_passes() {
    let mut api = Api::start().await;
    let client = Client::start(&format!("{}/s/name", api.address), api_key());
    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;

    let received = api.received_until(BODY).await.to_lowercase();
    api.answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nrequest-id: req_1\r\n\r\nhi");
    let answer = read_until(&mut stream, "hi").await;

    assert!(
        received.starts_with("post /s/name/v1/messages?beta=true http/1.1\r\n"),
        "{received}"
    );
    for line in [
        "x-api-key: sk-ant-real\r\n",
        "anthropic-beta: oauth-2025-04-20\r\n",
        "accept-encoding: identity\r\n",
    ] {
        assert!(received.contains(line), "{line} isn't in {received}");
    }
    assert!(
        received.contains("content-length: 63\r\n") && !received.contains("chunked"),
        "{received}"
    );
    assert!(
        !received.contains(TOKEN) && !received.contains("host: gw"),
        "{received}"
    );
    assert!(
        answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("request-id: req_1"),
        "{answer}"
    );
    assert_eq!(client.gateway.last_failure(), None);
}

#[tokio::test]
async fn a_bearer_token_is_swapped_for_the_real_one() {
    let mut api = Api::start().await;
    let settings = Anthropic {
        oauth_token: Some("sk-ant-oat01-real".to_owned()),
        ..Anthropic::default()
    };
    let credentials = Credentials::find(&settings, "/nonexistent".as_ref()).unwrap();
    let client = Client::start(&api.address, credentials);
    let _stream = client
        .send(&request(&format!("Authorization: Bearer {TOKEN}"), BODY))
        .await;

    let received = api.received_until(BODY).await.to_lowercase();

    assert!(
        received.contains("authorization: bearer sk-ant-oat01-real\r\n"),
        "{received}"
    );
    assert!(
        !received.contains("x-api-key") && !received.contains(TOKEN),
        "{received}"
    );
}

#[tokio::test]
async fn a_request_without_the_runs_token_goes_nowhere() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());

    for credential in [
        "x-api-key: run-0123456788",
        "Authorization: Bearer run",
        "x-other: 1",
    ] {
        let mut stream = client.send(&request(credential, BODY)).await;
        let answer = read_until(&mut stream, END_OF_ERROR).await;
        assert!(
            answer.starts_with("HTTP/1.1 401 ") && answer.contains("authentication_error"),
            "{answer}"
        );
    }

    assert!(api.received.try_recv().is_err());
}

#[tokio::test]
async fn other_paths_of_the_account_are_closed() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());

    for line in [
        "GET /v1/files",
        "POST /v1/messages/batches",
        "DELETE /v1/messages",
        "POST /",
    ] {
        let request =
            format!("{line} HTTP/1.1\r\nHost: gw\r\nx-api-key: {TOKEN}\r\nContent-Length: 0\r\n\r\n");
        let mut stream = client.send(&request).await;
        let answer = read_until(&mut stream, END_OF_ERROR).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{line}: {answer}");
    }

    assert!(api.received.try_recv().is_err());
}

#[tokio::test]
async fn each_event_passes_when_it_comes() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    api.received_until(BODY).await;

    api.answer("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    api.answer("b\r\nevent: one\n\r\n");
    // The second event is sent only after the first one has arrived.
    read_until(&mut stream, "event: one\n").await;
    api.answer("b\r\nevent: two\n\r\n0\r\n\r\n");
    read_until(&mut stream, "event: two\n").await;
}

#[tokio::test]
async fn a_body_in_pieces_is_sent_whole() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let (first, second) = BODY.split_at(20);
    let mut stream = client
        .send(&format!(
            "POST /v1/messages HTTP/1.1\r\nHost: gw\r\nx-api-key: {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n\
             14\r\n{first}\r\n"
        ))
        .await;

    stream
        .write_all(format!("{:x}\r\n{second}\r\n0\r\n\r\n", second.len()).as_bytes())
        .await
        .unwrap();

    let received = api.received_until(BODY).await.to_lowercase();
    assert!(
        received.contains(&format!("content-length: {}", BODY.len())),
        "{received}"
    );
}

#[tokio::test]
async fn a_run_that_hangs_up_ends_its_stream_and_pays_for_what_came() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    api.received_until(BODY).await;
    api.answer(START);
    read_until(&mut stream, "message_start").await;

    drop(stream);

    let ended = tokio::time::timeout(PATIENCE, api.received.recv()).await;
    assert_eq!(ended.expect("the request goes on"), None);
    client.gateway.disarm().await;
    let spend = client.meter.spend();
    assert_eq!((spend.total(), spend.estimated), (MicroUsd(420), true));
}

#[tokio::test]
async fn a_run_that_hangs_up_before_the_answer_begins_pays_for_its_prompt() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    api.received_until(BODY).await;
    drop(stream);

    api.answer(START);

    // It was read until the prompt was counted.
    let ended = tokio::time::timeout(PATIENCE, api.received.recv()).await;
    assert_eq!(ended.expect("the request goes on"), None);
    client.gateway.disarm().await;
    assert_eq!(client.meter.spend().total(), MicroUsd(420));
}

#[tokio::test]
async fn a_run_that_doesnt_read_pays_for_what_the_api_has_sent() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    api.received_until(BODY).await;
    let text = "x".repeat(1024);
    let delta = format!(
        "data: {{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{{\"type\":\"text_delta\",\"text\":\"{text}\"}}}}\n\n"
    );
    let end = "data: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"output_tokens\":10000}}\n\n";
    let events = format!("{}{end}", delta.repeat(800));
    // More than fits between the gateway and a run that doesn't read.
    let chunk = format!("{:x}\r\n{events}\r\n", events.len());
    api.answer(START);
    api.answer(chunk.leak());
    read_until(&mut stream, "message_start").await;
    let mut changes = client.meter.changes();
    while client.meter.spend().total() < MicroUsd(1_000_000) {
        let stalled = tokio::time::timeout(Duration::from_millis(300), changes.changed()).await;
        if stalled.is_err() {
            break;
        }
    }
    assert!(client.meter.spend().estimated, "the end has passed already");

    drop(stream);
    client.gateway.disarm().await;

    let spend = client.meter.spend();
    assert_eq!(
        (spend.total(), spend.estimated),
        (MicroUsd(100 * 4 + 10_000 * 20), false)
    );
}

#[tokio::test]
async fn a_request_whose_answer_nobody_saw_costs_its_worst_prompt() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let _stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    api.received_until(BODY).await;
    let since = Instant::now();

    client.gateway.disarm().await;

    assert!(since.elapsed() < PATIENCE, "{:?}", since.elapsed());
    let spend = client.meter.spend();
    // A token for two bytes, at the price of a cache for an hour.
    let tokens = i64::try_from(BODY.len().div_ceil(2)).unwrap();
    assert_eq!((spend.total(), spend.estimated), (MicroUsd(tokens * 8), true));
}

#[tokio::test]
async fn an_answer_that_is_no_stream_is_metered_although_the_run_is_gone() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let body = r#"{"model":"claude-opus-5-5","max_tokens":10}"#;
    let stream = client.send(&request(&format!("x-api-key: {TOKEN}"), body)).await;
    api.received_until(body).await;
    drop(stream);

    api.answer(concat!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 72\r\n\r\n",
        r#"{"model":"claude-opus-5-5","usage":{"input_tokens":1,"output_tokens":2}}"#
    ));

    let mut changes = client.meter.changes();
    while client.meter.spend().total() != MicroUsd(44) {
        tokio::time::timeout(PATIENCE, changes.changed())
            .await
            .unwrap()
            .unwrap();
    }
    client.gateway.disarm().await;
    assert!(!client.meter.spend().estimated);
}

#[tokio::test]
async fn a_disarmed_gateway_sends_nothing() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    client.gateway.disarm().await;

    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    let answer = read_until(&mut stream, END_OF_ERROR).await;

    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(api.received.try_recv().is_err());
}

#[tokio::test]
async fn bad_requests_are_refused_and_go_nowhere() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let head = format!("POST /v1/messages HTTP/1.1\r\nHost: gw\r\nx-api-key: {TOKEN}\r\n");
    let long = format!(r#"{{"model":"{}"}}"#, "m".repeat(10_000));
    let with = |body: &str| format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    for (request, status) in [
        (with("not JSON"), "400"),
        (with(r#"{"max_tokens":1}"#), "400"),
        (with(&long), "400"),
        (with(r#"{"model":"opus","mcp_servers":[]}"#), "403"),
        (
            with(r#"{"model":"opus","tools":[{"type":"code_execution_20250825"}]}"#),
            "403",
        ),
        (
            format!(
                "{head}anthropic-beta: files-api-2025-04-14\r\nContent-Length: {}\r\n\r\n{BODY}",
                BODY.len()
            ),
            "403",
        ),
        (format!("{head}Content-Length: 34603008\r\n\r\n"), "413"),
        (
            format!("{head}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}"),
            "400",
        ),
    ] {
        let mut stream = client.send(&request).await;
        let answer = read_until(&mut stream, "\r\n\r\n").await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request:.200}: {answer}"
        );
    }
    assert!(api.received.try_recv().is_err());
    assert_eq!(client.meter.spend().total(), MicroUsd(0));
}

#[tokio::test]
async fn a_body_of_33_megabytes_is_refused_whatever_it_says_of_its_length() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let mut stream = client
        .send(&format!(
            "POST /v1/messages HTTP/1.1\r\nHost: gw\r\nx-api-key: {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
        ))
        .await;
    let chunk = format!("100000\r\n{}\r\n", "x".repeat(1024 * 1024));
    let (mut from, mut to) = stream.split();
    let send = async {
        for _ in 0..33 {
            // It is refused in the middle, and then not read any more.
            if to.write_all(chunk.as_bytes()).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let mut answer = vec![0; 64];
    let read = async { from.read_exact(&mut answer).await.unwrap() };

    tokio::select! {
        _ = read => {}
        () = send => {}
        () = tokio::time::sleep(Duration::from_mins(1)) => panic!("no answer"),
    }

    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(api.received.try_recv().is_err());
}

#[tokio::test]
async fn a_thousand_bad_requests_and_three_thousand_connections_are_survived() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let bad = request(&format!("x-api-key: {TOKEN}"), "nothing");
    let mut stream = client.send("").await;
    for _ in 0..1_000 {
        stream.write_all(bad.as_bytes()).await.unwrap();
        let answer = read_until(&mut stream, END_OF_ERROR).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    drop(stream);

    let mut connections = Vec::new();
    for _ in 0..3_000 {
        // Those beyond the gateway's own wait in the kernel's line, which holds about a thousand; then it refuses.
        let connecting = UnixStream::connect(&client.socket);
        if let Ok(Ok(connection)) = tokio::time::timeout(Duration::from_millis(1), connecting).await {
            connections.push(connection);
        }
    }
    assert!(connections.len() >= 64, "{}", connections.len());
    drop(connections);

    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    api.received_until(BODY).await;
    api.answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    read_until(&mut stream, "ok").await;
}

#[tokio::test]
async fn tokens_are_counted_for_nothing_but_not_as_often_as_one_likes() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let count = request(&format!("x-api-key: {TOKEN}"), BODY).replacen(
        "/v1/messages",
        "/v1/messages/count_tokens",
        1,
    );
    let mut stream = client.send(&count).await;
    api.received_until(BODY).await;
    api.answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    read_until(&mut stream, "ok").await;
    assert_eq!(client.meter.spend().total(), MicroUsd(0));

    let bad = request(&format!("x-api-key: {TOKEN}"), "nothing").replacen(
        "/v1/messages",
        "/v1/messages/count_tokens",
        1,
    );
    let mut refused = 0;
    for _ in 0..200 {
        stream.write_all(bad.as_bytes()).await.unwrap();
        let answer = read_until(&mut stream, END_OF_ERROR).await;
        refused += usize::from(answer.starts_with("HTTP/1.1 429 "));
    }
    assert!(refused > 50, "{refused}");
}

#[tokio::test]
async fn a_dropped_gateway_ends_its_requests_and_its_socket() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    api.received_until(BODY).await;

    drop(client.gateway);

    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.is_empty());
    assert!(UnixStream::connect(&client.socket).await.is_err());
}

#[tokio::test]
async fn a_failure_is_remembered_until_a_request_succeeds() {
    let mut api = Api::start().await;
    let client = Client::start(&api.address, api_key());
    let call = request(&format!("x-api-key: {TOKEN}"), BODY);
    let mut stream = client.send(&call).await;
    api.received_until(BODY).await;

    api.answer(
        "HTTP/1.1 429 Too Many Requests\r\nretry-after: 4000\r\nContent-Length: 66\r\n\r\n\
         {\"type\":\"error\",\"error\":{\"type\":\"rate_limit_error\",\"message\":\"x\"}}",
    );
    let answer = read_until(&mut stream, "}}").await;

    assert!(
        answer.starts_with("HTTP/1.1 429 ") && answer.contains("retry-after: 4000"),
        "{answer}"
    );
    let failure = client.gateway.last_failure().unwrap();
    assert_eq!(
        (failure.status, failure.retry_after),
        (429, Some(Duration::from_secs(4000)))
    );
    assert_eq!(failure.error_type.as_deref(), Some("rate_limit_error"));

    stream.write_all(call.as_bytes()).await.unwrap();
    api.received_until(BODY).await;
    api.answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    read_until(&mut stream, "ok").await;
    assert_eq!(client.gateway.last_failure(), None);
}

#[tokio::test]
async fn an_api_that_isnt_there_is_a_bad_gateway_with_a_reason() {
    // Nobody listens on it, and nobody else can.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    let client = Client::start(&format!("http://{address}"), api_key());
    let since = Instant::now();

    let mut stream = client.send(&request(&format!("x-api-key: {TOKEN}"), BODY)).await;
    let answer = read_until(&mut stream, END_OF_ERROR).await;

    assert!(
        answer.starts_with("HTTP/1.1 502 ") && answer.contains("could not be reached"),
        "{answer}"
    );
    let ApiFailure {
        status,
        error_type,
        message,
        ..
    } = client.gateway.last_failure().unwrap();
    assert_eq!((status, error_type.as_deref()), (502, Some(UNREACHABLE)));
    assert!(message.contains("refused"), "{message}");
    assert!(since.elapsed() < PATIENCE);
}

#[tokio::test]
async fn a_login_that_ended_is_said_to_the_run_and_the_worker() {
    let api = Api::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(".credentials.json");
    std::fs::write(&file, r#"{"claudeAiOauth":{"accessToken":"a"}}"#).unwrap();
    let settings = Anthropic {
        config_dir: Some(folder.path().to_owned()),
        ..Anthropic::default()
    };
    let credentials = Credentials::find(&settings, "/nonexistent".as_ref()).unwrap();
    let client = Client::start(&api.address, credentials);
    std::fs::remove_file(&file).unwrap();

    let mut stream = client
        .send(&request(&format!("Authorization: Bearer {TOKEN}"), BODY))
        .await;
    let answer = read_until(&mut stream, END_OF_ERROR).await;

    assert!(
        answer.starts_with("HTTP/1.1 401 ") && answer.contains("claude auth login"),
        "{answer}"
    );
    assert_eq!(
        client.gateway.last_failure().unwrap().error_type.as_deref(),
        Some(NO_CREDENTIAL)
    );
}

#[tokio::test]
async fn a_socket_with_too_long_a_path_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("x".repeat(120));
    let upstream = upstream("http://127.0.0.1:1");

    assert!(Gateway::start(&socket, Arc::new(api_key()), TOKEN, &upstream, Arc::default()).is_err());
}
