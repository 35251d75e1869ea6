use super::*;
use shared::network;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const BODY: &str = r#"{"type":"webhook.test"}"#;

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

fn guard(allowed: &[&str]) -> Guard {
    Guard {
        allowed: allowed.iter().map(|text| network::parse(text).unwrap()).collect(),
        allow_http: true,
    }
}

fn lookup(answers: &'static [&'static [&'static str]]) -> Lookup {
    let asked = AtomicUsize::new(0);
    Arc::new(move |_| {
        let answer = answers[asked.fetch_add(1, Ordering::Relaxed).min(answers.len() - 1)];
        Box::pin(async move { Ok(answer.iter().map(|text| text.parse().unwrap()).collect()) })
    })
}

async fn send(sender: &Sender, url: &str) -> Outcome {
    let mut headers = HeaderMap::new();
    headers.insert("webhook-id", "msg_1".parse().unwrap());
    headers.insert(header::CONTENT_TYPE, "application/json".parse().unwrap());
    sender
        .send(url, headers, Bytes::from_static(BODY.as_bytes()))
        .await
}

async fn send_once(port: u16) -> Outcome {
    let sender = Sender::new(guard(&["127.0.0.0/8"]), PATIENCE);
    send(&sender, &format!("http://127.0.0.1:{port}/hook?a=b")).await
}

/// Reads a whole request.
async fn request(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    while !read.ends_with(BODY.as_bytes()) {
        assert_ne!(
            stream.read_buf(&mut read).await.unwrap(),
            0,
            "the request broke off"
        );
    }
    String::from_utf8(read).unwrap()
}

/// A receiver that reads each request, writes `answer` and closes the connection. Returns its port and a counter of
/// connections.
async fn receiver(answer: impl Into<String>) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let connections = Arc::new(AtomicUsize::new(0));
    let (answer, counter) = (answer.into(), Arc::clone(&connections));
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            counter.fetch_add(1, Ordering::Relaxed);
            let answer = answer.clone();
            tokio::spawn(async move {
                request(&mut stream).await;
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
        }
    });
    (port, connections)
}

fn answer(head: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {head}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[tokio::test]
async fn the_request_is_sent_as_it_is() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let receiver = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let request = request(&mut stream).await;
        stream
            .write_all(answer("204 No Content", "").as_bytes())
            .await
            .unwrap();
        request
    });

    let outcome = send_once(port).await;

    let request = receiver.await.unwrap();
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /hook?a=b HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("webhook-id: msg_1"), "{head}");
    assert_eq!(body, BODY);
    assert_eq!((outcome.status, outcome.error_class), (Some(204), None));
    assert_eq!(outcome.failure(), None);
    assert!(outcome.duration > Duration::ZERO);
}

#[tokio::test]
async fn the_status_decides() {
    for (head, status, class) in [
        ("200 OK", 200, None),
        ("299 Fine", 299, None),
        ("304 Not Modified", 304, Some(REDIRECT)),
        ("400 Bad Request", 400, Some(STATUS)),
        ("410 Gone", 410, Some(STATUS)),
        ("500 Internal Server Error", 500, Some(STATUS)),
    ] {
        let body = if status == 304 { "" } else { "said\n10.0.0.7" };
        let (port, _) = receiver(answer(head, body)).await;
        let outcome = send_once(port).await;
        assert_eq!(
            (outcome.status, outcome.error_class),
            (Some(status), class),
            "{head}"
        );
        let shown = if status == 304 { "" } else { "said (address)" };
        assert_eq!(outcome.snippet, shown);
        assert_eq!(
            outcome.failure().is_some_and(|failure| failure.is_gone()),
            status == 410
        );
    }
}

#[tokio::test]
async fn what_the_receiver_asks_for_is_read() {
    let dates = "date: Wed, 21 Oct 2026 09:00:00 GMT\r\nretry-after: Wed, 21 Oct 2026 09:00:10 GMT";
    for (header, seconds) in [
        ("retry-after: 120", Some(120)),
        (dates, Some(10)),
        ("retry-after: x", None),
    ] {
        let (port, _) = receiver(answer(&format!("429 Too Many Requests\r\n{header}"), "")).await;
        let outcome = send_once(port).await;
        assert_eq!(outcome.retry_after, seconds.map(Duration::from_secs), "{header}");
        let failure = outcome.failure().unwrap();
        assert_eq!((failure.status, failure.timed_out), (Some(429), false));
        assert_eq!(failure.retry_after, outcome.retry_after);
    }
}

#[tokio::test]
async fn a_redirect_is_a_failure_and_is_not_followed() {
    let (inside, reached) = receiver(answer("200 OK", "secret")).await;
    let location = format!("302 Found\r\nlocation: http://127.0.0.1:{inside}/");
    let (port, asked) = receiver(answer(&location, "")).await;

    let outcome = send_once(port).await;

    assert_eq!((outcome.status, outcome.error_class), (Some(302), Some(REDIRECT)));
    assert_eq!(
        (asked.load(Ordering::Relaxed), reached.load(Ordering::Relaxed)),
        (1, 0)
    );
}

#[tokio::test]
async fn a_receiver_that_never_answers_is_timed_out() {
    // Connections are accepted by the system, and nobody answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let sender = Sender::new(guard(&["127.0.0.0/8"]), Duration::from_millis(300));

    let outcome = send(&sender, &format!("http://127.0.0.1:{port}/")).await;

    assert_eq!((outcome.status, outcome.error_class), (None, Some(TIMEOUT)));
    assert!(outcome.failure().unwrap().timed_out);
    assert_eq!(outcome.snippet, "");
}

#[tokio::test]
async fn a_response_that_never_ends_is_cut() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
            .await
            .unwrap();
        std::future::pending::<()>().await;
    });
    let sender = Sender::new(guard(&["127.0.0.0/8"]), Duration::from_secs(2));

    let outcome = send(&sender, &format!("http://127.0.0.1:{port}/")).await;

    assert_eq!((outcome.status, outcome.error_class), (Some(200), None));
    assert_eq!(outcome.snippet, "half");
}

#[tokio::test]
async fn a_connection_that_breaks_off_counts_by_its_status() {
    for (sent, status, class) in [
        ("", None, Some(PROTOCOL)),
        ("HTTP/1.1 200", None, Some(PROTOCOL)),
        ("SSH-2.0-OpenSSH_9.6\r\n", None, Some(PROTOCOL)),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
            Some(200),
            None,
        ),
        (
            "HTTP/1.1 500 No\r\ncontent-length: 9\r\n\r\nhalf",
            Some(500),
            Some(STATUS),
        ),
    ] {
        let (port, connections) = receiver(sent).await;
        let outcome = send_once(port).await;
        assert_eq!((outcome.status, outcome.error_class), (status, class), "{sent}");
        assert_eq!(outcome.snippet, if status.is_some() { "half" } else { "" });
        assert_eq!(connections.load(Ordering::Relaxed), 1, "{sent}");
    }
}

#[tokio::test]
async fn a_huge_response_is_not_read_to_its_end() {
    const HUGE: usize = 100 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let receiver = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        request(&mut stream).await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {HUGE}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let (chunk, mut written) = (vec![b'x'; 64 << 10], 0);
        while written < HUGE && stream.write_all(&chunk).await.is_ok() {
            written += chunk.len();
        }
        written
    });

    let outcome = send_once(port).await;

    assert_eq!((outcome.status, outcome.error_class), (Some(200), None));
    assert_eq!(outcome.snippet, "x".repeat(1_024));
    // The rest fits into the buffers of the two sockets.
    let written = receiver.await.unwrap();
    assert!(written < HUGE / 4, "{written}");
}

#[tokio::test]
async fn inside_addresses_are_not_reached() {
    let (port, connections) = receiver(answer("200 OK", "")).await;
    let blocked = |outcome: Outcome| {
        assert_eq!((outcome.status, outcome.error_class), (None, Some(BLOCKED)));
        assert_eq!(outcome.snippet, "");
    };
    let named = Sender::with_lookup(
        guard(&[]),
        PATIENCE,
        lookup(&[&["127.0.0.1", "::1", "10.0.0.1", "::ffff:127.0.0.1"]]),
    );
    blocked(send(&named, &format!("http://hook.example:{port}/")).await);

    let sender = Sender::new(guard(&[]), PATIENCE);
    for host in [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "127.1",
        "[::ffff:127.0.0.1]",
        "localhost",
    ] {
        blocked(send(&sender, &format!("http://{host}:{port}/")).await);
    }
    let strict = Sender::new(Guard::default(), PATIENCE);
    blocked(send(&strict, "http://hook.example/").await);

    assert_eq!(connections.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_name_that_changes_its_address_leads_nowhere_else() {
    let (port, connections) = receiver(answer("200 OK", "")).await;
    let url = format!("http://hook.example:{port}/");
    let answers: &[&[&str]] = &[&["10.0.0.1", "127.0.0.1"], &["127.0.0.2"], &["127.0.0.1"]];
    let sender = Sender::with_lookup(guard(&["127.0.0.1"]), PATIENCE, lookup(answers));

    let mut classes = Vec::new();
    for _ in answers {
        classes.push(send(&sender, &url).await.error_class);
    }

    assert_eq!(classes, [None, Some(BLOCKED), None]);
    assert_eq!(connections.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn the_other_end_is_checked_too() {
    let (port, _) = receiver(answer("200 OK", "secret")).await;
    let lenient = Sender::with_lookup(guard(&["127.0.0.0/8"]), PATIENCE, lookup(&[&["127.0.0.1"]]));
    let sender = Sender {
        guard: Arc::new(guard(&[])),
        ..lenient
    };

    let outcome = send(&sender, &format!("http://hook.example:{port}/")).await;

    assert_eq!((outcome.status, outcome.error_class), (None, Some(BLOCKED)));
    assert_eq!(outcome.snippet, "");
}

#[tokio::test]
async fn a_failure_to_connect_has_its_class() {
    let sender = |lookup| Sender::with_lookup(guard(&["127.0.0.0/8"]), PATIENCE, lookup);
    // Nobody listens on a port that was given back.
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let no_such_name: Lookup = Arc::new(|_| Box::pin(async { Err(io::Error::other("no such name")) }));

    for (lookup, url, class) in [
        (
            lookup(&[&["127.0.0.1"]]),
            format!("http://hook.example:{closed}/"),
            CONNECT,
        ),
        (lookup(&[&[]]), "http://hook.example/".to_owned(), DNS),
        (no_such_name, "https://hook.example/".to_owned(), DNS),
    ] {
        let outcome = send(&sender(lookup), &url).await;
        assert_eq!(
            (outcome.status, outcome.error_class),
            (None, Some(class)),
            "{url}"
        );
        assert_eq!(outcome.snippet, "");
    }
}

#[tokio::test]
async fn a_receiver_that_speaks_no_tls_has_its_class() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut hello = [0; 64];
        stream.read_exact(&mut hello).await.unwrap();
        stream
            .write_all(answer("400 Bad Request", "").as_bytes())
            .await
            .unwrap();
        // Kept open, so that the answer isn't lost with the connection.
        std::future::pending::<()>().await;
    });
    let sender = Sender::new(guard(&["127.0.0.0/8"]), PATIENCE);

    let outcome = send(&sender, &format!("https://127.0.0.1:{port}/")).await;

    assert_eq!((outcome.status, outcome.error_class), (None, Some(TLS)));
}
