//! A client of the HTTP API.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::header::ACCEPT;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde_json::Value;
use shared::env::{Error, Vars};
use tokio::time::sleep;

use crate::failure::Failure;

/// Longer than any long poll.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// How often an unreachable service is tried again: for a minute in total, with `FIRST_PAUSE` before the first retry and
/// at most `MAX_PAUSE` before the others. A restart takes less.
const RETRIES: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// A client of one service, with one key.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
    /// Why there is no key, to be said when one is asked for.
    without_key: String,
}

/// One event of a job.
#[derive(Debug)]
pub(crate) struct Event {
    /// Its number within the job.
    pub(crate) seq: i64,
    /// `status`, `assistant`, `tool`, …
    pub(crate) kind: String,
    /// The data, whose members depend on the type.
    pub(crate) data: Value,
}

impl Event {
    /// Whether no event comes after this one.
    pub(crate) fn is_last(&self) -> bool {
        matches!(self.kind.as_str(), "done" | "error" | "cancelled")
    }
}

/// Retries while a service that has responded before is unreachable.
#[derive(Debug, Default)]
pub(crate) struct Retry {
    has_answered: bool,
    tries: u32,
}

impl Retry {
    /// Call this after a success.
    pub(crate) fn reset(&mut self) {
        *self = Self {
            has_answered: true,
            tries: 0,
        };
    }

    /// Waits before another try, at most `limit`. Returns the failure if another try makes no sense.
    pub(crate) async fn wait(&mut self, failure: Failure, limit: Duration) -> Result<(), Failure> {
        if !self.has_answered || !failure.may_pass() || self.tries == RETRIES {
            return Err(failure);
        }
        let pause = MAX_PAUSE.min(FIRST_PAUSE * 2_u32.pow(self.tries));
        self.tries += 1;
        sleep(pause.min(limit)).await;
        Ok(())
    }
}

impl Client {
    /// The service of `CLAUDE_QUEUE_URL` and `CLAUDE_QUEUE_API_KEY`. Without them, the service of `API_HOST` and
    /// `API_PORT` and the first of `API_KEYS`, which is sent to this service only.
    pub(crate) fn from_vars(vars: &Vars) -> Result<Self, Failure> {
        let own = own_url(vars)?;
        let url = vars.text("CLAUDE_QUEUE_URL")?;
        let mut client = Self::new(url.as_deref().unwrap_or(&own), vars.text("CLAUDE_QUEUE_API_KEY")?)?;
        let own_key = vars.list("API_KEYS", "")?.into_iter().next();
        if client.key.is_none() && is_same_service(&client.base, &own) {
            client.key = own_key;
        } else if client.key.is_none() && own_key.is_some() {
            client.without_key = format!(
                "; no key was sent: API_KEYS is for {own} only, set CLAUDE_QUEUE_API_KEY for {}",
                client.base
            );
        }
        Ok(client)
    }

    /// A client of the service at `url`.
    pub(crate) fn new(url: &str, key: Option<String>) -> Result<Self, Failure> {
        // An error means that one is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let parsed = Url::parse(url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"));
        let Some(parsed) = parsed else {
            return Err(
                Error::new("CLAUDE_QUEUE_URL", "isn't a URL", "such as http://127.0.0.1:8000").into(),
            );
        };
        let host = parsed.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let mut builder = reqwest::Client::builder().connect_timeout(Duration::from_secs(10));
        if host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()) {
            // A proxy couldn't reach this machine's loopback.
            builder = builder.no_proxy();
        }
        let http = builder
            .build()
            .map_err(|error| Failure::Other(format!("no HTTP client: {}", cause(&error))))?;
        Ok(Self {
            http,
            base: base(url).to_owned(),
            key,
            without_key: String::new(),
        })
    }

    /// Submits a job. The same idempotency key never creates two jobs.
    pub(crate) async fn submit(&self, body: &Value, idempotency_key: &str) -> Result<Value, Failure> {
        let request = self
            .request(Method::POST, "/api/v1/jobs")
            .header("idempotency-key", idempotency_key);
        let mut answer = self.send(request.json(body)).await?;
        Ok(answer["data"].take())
    }

    /// The job, as soon as it has ended or after `wait` seconds.
    pub(crate) async fn job(&self, id: &str, wait: u64) -> Result<Value, Failure> {
        let request = self.request(Method::GET, &format!("{}?wait={wait}", job_path(id)));
        let mut answer = self.send(request).await?;
        Ok(answer["data"].take())
    }

    /// A page of the newest jobs.
    pub(crate) async fn jobs(&self, query: &[(&str, String)]) -> Result<Value, Failure> {
        self.send(self.request(Method::GET, "/api/v1/jobs").query(query))
            .await
    }

    /// The totals of the key.
    pub(crate) async fn usage(&self, query: &[(&str, String)]) -> Result<Value, Failure> {
        self.send(self.request(Method::GET, "/api/v1/usage").query(query))
            .await
    }

    /// A page of the ledger.
    pub(crate) async fn ledger(&self, query: &[(&str, String)]) -> Result<Value, Failure> {
        self.send(self.request(Method::GET, "/api/v1/usage/ledger").query(query))
            .await
    }

    /// Cancels a job.
    pub(crate) async fn cancel(&self, id: &str) -> Result<Value, Failure> {
        let mut answer = self
            .send(self.request(Method::POST, &format!("{}/cancel", job_path(id))))
            .await?;
        Ok(answer["data"].take())
    }

    /// Lifts the workers' pauses. The number of jobs that were released.
    pub(crate) async fn resume_queue(&self) -> Result<i64, Failure> {
        let answer = self
            .send(self.request(Method::POST, "/api/v1/queue/resume"))
            .await?;
        Ok(answer["data"]["released_jobs"].as_i64().unwrap_or_default())
    }

    /// Reads what is at a path.
    pub(crate) async fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Value, Failure> {
        self.send(self.request(Method::GET, path).query(query)).await
    }

    /// Posts a body to a path.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// Changes what is at a path.
    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.send(self.request(Method::PATCH, path).json(body)).await
    }

    /// Deletes what is at a path.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), Failure> {
        self.answered(self.request(Method::DELETE, path)).await.map(drop)
    }

    /// Asks the service whether it is ready.
    pub(crate) async fn is_ready(&self) -> Result<(), Failure> {
        self.answered(self.request(Method::GET, "/readyz"))
            .await
            .map(drop)
    }

    /// Passes every event of a job after number `after` to `see`, stored and new ones, up to the last. An interrupted
    /// stream is resumed where it stopped, also after a restart of the service.
    pub(crate) async fn follow(
        &self,
        id: &str,
        mut after: i64,
        mut see: impl FnMut(&Event) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut retry = Retry::default();
        loop {
            let request = self.request(Method::GET, &format!("{}/events", job_path(id)));
            let request = request
                .header(ACCEPT, "text/event-stream")
                .header("last-event-id", after.to_string());
            // A stream lasts longer than any other response.
            let response = match self.answered(request.timeout(Duration::from_hours(24))).await {
                Ok(response) => response,
                Err(failure) => {
                    retry.wait(failure, MAX_PAUSE).await?;
                    continue;
                }
            };
            retry.has_answered = true;
            if response.status() == StatusCode::NO_CONTENT {
                return Ok(());
            }
            let mut reader = EventReader::default();
            let mut bytes = response.bytes_stream();
            while let Some(Ok(piece)) = bytes.next().await {
                for event in reader.read(&piece) {
                    after = event.seq;
                    retry.reset();
                    see(&event)?;
                    if event.is_last() {
                        return Ok(());
                    }
                }
            }
            if reader.said_bye {
                retry.reset();
            }
            let ended = self.unreachable("the event stream ended repeatedly".to_owned());
            retry.wait(ended, MAX_PAUSE).await?;
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .timeout(ANSWER_TIMEOUT);
        match &self.key {
            Some(key) => request.header("x-api-key", key),
            None => request,
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Value, Failure> {
        let response = self.answered(request).await?;
        response
            .json()
            .await
            .map_err(|error| self.unreachable(cause(&error)))
    }

    /// Sends a request. A response that isn't a success becomes a failure with the problem's sentence.
    async fn answered(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let response = request
            .send()
            .await
            .map_err(|error| self.unreachable(cause(&error)))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let problem: Value = response.json().await.unwrap_or_default();
        let mut sentence = sentence(status, &problem);
        if status == StatusCode::UNAUTHORIZED {
            sentence.push_str(&self.without_key);
        }
        Err(match status {
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                Failure::Unavailable(sentence)
            }
            _ => Failure::Other(sentence),
        })
    }

    fn unreachable(&self, why: String) -> Failure {
        Failure::Unreachable {
            url: self.base.clone(),
            why,
        }
    }
}

/// The address under which this machine's own service is reached.
fn own_url(vars: &Vars) -> Result<String, Error> {
    let host = vars.or("API_HOST", "127.0.0.1")?;
    let host = match host.trim_matches(['[', ']']).parse() {
        Ok(IpAddr::V4(address)) if address.is_unspecified() => "127.0.0.1".to_owned(),
        Ok(IpAddr::V6(address)) if address.is_unspecified() => "[::1]".to_owned(),
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        _ => host,
    };
    let port: u16 = vars.number("API_PORT", 8000, 0, u16::MAX)?;
    Ok(format!("http://{host}:{port}"))
}

/// The service's URL as people give it: the API's own path at its end is added by each request.
fn base(url: &str) -> &str {
    let url = url.trim_end_matches('/');
    url.strip_suffix("/api/v1").unwrap_or(url).trim_end_matches('/')
}

/// Whether two URLs lead to the same service on this machine, whatever name of the loopback they use.
fn is_same_service(url: &str, own: &str) -> bool {
    let address = |url: &str| {
        let url = Url::parse(url).ok().filter(|url| url.scheme() == "http")?;
        let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
        let host = match host.parse::<IpAddr>() {
            Ok(address) if address.is_loopback() => "localhost".to_owned(),
            _ => host,
        };
        Some((host, url.port_or_known_default()))
    };
    base(url) == base(own) || address(url).is_some_and(|address_of| address(own) == Some(address_of))
}

/// Escapes an id, so that it can't change the path.
fn job_path(id: &str) -> String {
    let id: String = id
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
        .collect();
    format!("/api/v1/jobs/{id}")
}

/// Formats a problem as one sentence, with each field that isn't valid on its own line.
fn sentence(status: StatusCode, problem: &Value) -> String {
    let detail = problem["detail"].as_str().or(problem["title"].as_str());
    let mut parts = vec![format!(
        "{} ({})",
        detail.unwrap_or("the service refused"),
        status.as_u16()
    )];
    if let Some(request_id) = problem["request_id"]
        .as_str()
        .filter(|_| status.is_server_error())
    {
        parts.push(format!(" [request {request_id}]"));
    }
    let faults = problem["errors"]
        .as_array()
        .map_or(&[] as &[Value], Vec::as_slice);
    // If there is only one fault, it is the detail already.
    for fault in faults.iter().filter(|_| faults.len() > 1) {
        let (field, message) = (fault["field"].as_str(), fault["message"].as_str());
        parts.push(format!(
            "\n  {}: {}",
            field.unwrap_or("?"),
            message.unwrap_or("?")
        ));
    }
    parts.concat()
}

/// The innermost cause of an error, without the library's text around it.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Parses server-sent events from a stream of bytes.
#[derive(Debug, Default)]
struct EventReader {
    line: Vec<u8>,
    seq: Option<i64>,
    kind: String,
    data: String,
    /// The service has ended the stream on purpose; the next stream continues it.
    said_bye: bool,
}

impl EventReader {
    /// The events that are complete with this piece. Events without a number are not stored, and are left out.
    fn read(&mut self, piece: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for byte in piece {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line))
                .trim_end_matches('\r')
                .to_owned();
            if line.is_empty() {
                let (seq, kind, data) = (
                    self.seq.take(),
                    std::mem::take(&mut self.kind),
                    std::mem::take(&mut self.data),
                );
                if let Some(seq) = seq {
                    events.push(Event {
                        seq,
                        kind,
                        data: serde_json::from_str(&data).unwrap_or_default(),
                    });
                }
                continue;
            }
            self.said_bye |= line == ": bye";
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => self.seq = value.parse().ok(),
                "event" => value.clone_into(&mut self.kind),
                "data" => self.data.push_str(value),
                _ => {}
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_read_however_the_bytes_are_cut() {
        let stream = "retry: 3000\r\n\r\n: ping\r\n\r\nid: 1\r\nevent: status\r\ndata: {\"status\":\"queued\"}\r\n\r\n\
                      event: delta\r\ndata: {}\r\n\r\nid: 2\nevent: done\ndata: {\"cost\":0.1}\n\n";

        for size in [1, 7, stream.len()] {
            let mut reader = EventReader::default();
            let events: Vec<Event> = stream
                .as_bytes()
                .chunks(size)
                .flat_map(|piece| reader.read(piece))
                .collect();

            assert_eq!(events.len(), 2, "pieces of {size}");
            assert_eq!((events[0].seq, events[0].kind.as_str()), (1, "status"));
            assert_eq!(events[0].data, json!({"status": "queued"}));
            assert!(events[1].is_last() && !events[0].is_last());
            assert!(!reader.said_bye);
            assert!(reader.read(b": bye\r\n\r\n").is_empty() && reader.said_bye);
        }
    }

    #[test]
    fn the_own_key_goes_to_the_own_service_only() {
        let client = |url, port| {
            let vars = Vars::of([
                ("CLAUDE_QUEUE_URL", url),
                ("API_PORT", port),
                ("API_KEYS", "own,other"),
            ]);
            Client::from_vars(&vars).unwrap()
        };

        for (url, port, base) in [
            ("", "", "http://127.0.0.1:8000"),
            ("", "8123", "http://127.0.0.1:8123"),
            ("http://localhost:8123/", "8123", "http://localhost:8123"),
            ("http://[::1]:8123/api/v1/", "8123", "http://[::1]:8123"),
        ] {
            let own = client(url, port);
            assert_eq!((own.base.as_str(), own.key.as_deref()), (base, Some("own")));
        }
        for url in [
            "http://127.0.0.1:8124",
            "https://queue.example",
            "http://10.0.0.7:8123/api/v1",
        ] {
            let other = client(url, "8123");
            assert_eq!(other.key, None, "{url}");
            assert!(other.without_key.contains("CLAUDE_QUEUE_API_KEY"), "{url}");
            assert!(!other.base.ends_with("/api/v1"), "{url}");
        }
        let everywhere = Vars::of([("API_HOST", "0.0.0.0"), ("CLAUDE_QUEUE_API_KEY", "mine")]);
        let everywhere = Client::from_vars(&everywhere).unwrap();
        assert_eq!(everywhere.base, "http://127.0.0.1:8000");
        assert_eq!(everywhere.key.as_deref(), Some("mine"));
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_service_that_was_there_is_waited_for() {
        let away = || Failure::Unavailable("503".to_owned());
        let mut retry = Retry::default();
        assert!(retry.wait(away(), MAX_PAUSE).await.is_err());

        retry.reset();
        let begun = tokio::time::Instant::now();
        let mut tries = 0;
        while retry.wait(away(), MAX_PAUSE).await.is_ok() {
            tries += 1;
        }
        assert_eq!((tries, begun.elapsed().as_secs()), (RETRIES, 58));

        retry.reset();
        let refused = Failure::Other("404".to_owned());
        assert!(retry.wait(refused, MAX_PAUSE).await.is_err());
    }

    #[test]
    fn a_problem_is_told_with_every_field() {
        let fault = |field: &str| json!({"field": field, "message": "too short"});
        let one = json!({"detail": "body -> a: too short", "errors": [fault("body -> a")]});
        let two = json!({"detail": "Two are wrong", "errors": [fault("body -> a"), fault("body -> b")]});

        let told = |problem| sentence(StatusCode::UNPROCESSABLE_ENTITY, problem);

        assert_eq!(told(&one), "body -> a: too short (422)");
        assert_eq!(
            told(&two),
            "Two are wrong (422)\n  body -> a: too short\n  body -> b: too short"
        );
    }

    #[test]
    fn only_a_service_of_this_machine_gets_the_key_of_the_env_file() {
        let local = Client::from_vars(&Vars::of([("API_KEYS", "one,two")])).unwrap();
        let remote = Vars::of([
            ("API_KEYS", "one"),
            ("CLAUDE_QUEUE_URL", "https://jobs.example.org/"),
        ]);
        let remote = Client::from_vars(&remote).unwrap();

        assert_eq!(local.key.as_deref(), Some("one"));
        assert_eq!(
            (remote.key, remote.base.as_str()),
            (None, "https://jobs.example.org")
        );
        assert!(Client::from_vars(&Vars::of([("CLAUDE_QUEUE_URL", "jobs")])).is_err());
    }
}
