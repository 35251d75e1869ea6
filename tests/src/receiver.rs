//! A receiver of webhooks on loopback, which keeps what it got and answers as it is told, also badly.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::eventually;

/// What a receiver does with a request.
#[derive(Clone, Debug)]
pub enum Reaction {
    /// Answers with this status.
    Status(u16),
    /// The same, with a header.
    With(u16, &'static str, String),
    /// Takes the request and never answers.
    Silent,
    /// Answers with 200 after so long.
    After(Duration),
    /// Answers with 200 once the test allows it.
    When(Arc<Semaphore>),
    /// Answers with 200 and so many bytes.
    Long(usize),
    /// Answers with 200 and closes the connection in the middle of the body.
    Half,
    /// Closes the connection without an answer.
    Cut,
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Received {
    /// The path and query.
    pub path: String,
    /// The headers, their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The bytes of the body.
    pub body: String,
}

impl Received {
    /// The header of this name; empty without one.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

type Rule = dyn Fn(usize, &Received) -> Reaction + Send + Sync;

/// A receiver; it ends with this value.
#[derive(Debug)]
pub struct Receiver {
    port: u16,
    received: Arc<Mutex<Vec<Received>>>,
    answered: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Receiver {
    /// One that answers each request with 200.
    pub async fn start() -> Self {
        Self::with(|_, _| Reaction::Status(200)).await
    }

    /// One that does what `rule` says of the request with this number, from 0.
    pub async fn with(rule: impl Fn(usize, &Received) -> Reaction + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let received: Arc<Mutex<Vec<Received>>> = Arc::default();
        let answered: Arc<AtomicUsize> = Arc::default();
        let (kept, rule): (_, Arc<Rule>) = (received.clone(), Arc::new(rule));
        let counted = answered.clone();
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (kept, rule, counted) = (kept.clone(), rule.clone(), counted.clone());
                tokio::spawn(async move { serve(stream, &kept, &*rule, &counted).await });
            }
        });
        Self {
            port,
            received,
            answered,
            serving,
        }
    }

    /// Where it listens.
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// What it got so far.
    pub fn received(&self) -> Vec<Received> {
        self.received
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// How many requests it got so far.
    pub fn count(&self) -> usize {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many whole answers it has given.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// What it got, as soon as that is so much.
    pub async fn wait(&self, count: usize, limit: Duration) -> Vec<Received> {
        eventually(limit, "webhooks", async || (self.count() >= count).then_some(())).await;
        self.received()
    }
}

async fn serve(
    stream: TcpStream,
    kept: &Mutex<Vec<Received>>,
    rule: &Rule,
    answered: &AtomicUsize,
) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let length = headers
            .get("content-length")
            .and_then(|length| length.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body).await.ok()?;
        let request = Received {
            path,
            headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        };
        let reaction = {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let reaction = rule(kept.len(), &request);
            kept.push(request);
            reaction
        };
        let head = |status: u16, more: &str, length: usize| {
            format!("HTTP/1.1 {status} X\r\n{more}content-length: {length}\r\n\r\n")
        };
        let text = match reaction {
            Reaction::Status(status) => head(status, "", 2) + "ok",
            Reaction::With(status, name, value) => head(status, &format!("{name}: {value}\r\n"), 0),
            Reaction::Silent => std::future::pending().await,
            Reaction::When(allowed) => {
                allowed.acquire().await.ok()?.forget();
                head(200, "", 0)
            }
            Reaction::After(pause) => {
                tokio::time::sleep(pause).await;
                head(200, "", 0)
            }
            Reaction::Long(length) => {
                stream.write_all(head(200, "", length).as_bytes()).await.ok()?;
                let piece = vec![b'x'; 64 * 1024];
                for _ in 0..length / piece.len() {
                    stream.write_all(&piece).await.ok()?;
                }
                continue;
            }
            Reaction::Cut => return None,
            Reaction::Half => {
                stream
                    .write_all((head(200, "", 100) + "half").as_bytes())
                    .await
                    .ok()?;
                return None;
            }
        };
        stream.write_all(text.as_bytes()).await.ok()?;
        answered.fetch_add(1, Ordering::Relaxed);
    }
}
