//! A client of the HTTP API: one short method a route, and the waiting that tests need.

use std::collections::VecDeque;
use std::sync::Once;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

use crate::eventually;
use crate::script::Script;

/// How long a test waits for a job to end: longer than ever needed, but on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What the server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, when it is JSON; else null.
    pub json: Value,
    /// The body as it came.
    pub text: String,
}

impl Answer {
    /// A header's value; empty when it isn't there.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// The `data` of an answer that must have this status.
    #[track_caller]
    pub fn data(&self, status: u16) -> &Value {
        assert_eq!(self.status, status, "{}", self.text);
        &self.json["data"]
    }

    /// Fails unless this is a complete problem of this status and code.
    #[track_caller]
    pub fn assert_problem(&self, status: u16, code: &str) {
        assert_eq!(
            (self.status, self.json["code"].as_str()),
            (status, Some(code)),
            "{}",
            self.text
        );
        assert_eq!(
            self.header("content-type"),
            "application/problem+json",
            "{}",
            self.text
        );
        assert_eq!(self.json["status"], status, "{}", self.text);
        assert_eq!(self.json["type"], format!("urn:problem:{code}"), "{}", self.text);
        for member in ["title", "detail", "instance", "request_id"] {
            assert!(
                self.json[member].as_str().is_some_and(|text| !text.is_empty()),
                "{member}: {}",
                self.text
            );
        }
        assert_eq!(
            self.json["request_id"],
            self.header("x-request-id"),
            "{}",
            self.text
        );
    }

    /// Fails unless this is a validation error about exactly these fields, each given as (path, type word).
    #[track_caller]
    pub fn assert_faults(&self, expected: &[(&str, &str)]) {
        self.assert_problem(422, "validation-error");
        let mut faults: Vec<(&str, &str)> = self.json["errors"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|fault| {
                (
                    fault["field"].as_str().unwrap_or_default(),
                    fault["type"].as_str().unwrap_or_default(),
                )
            })
            .collect();
        faults.sort_unstable();
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        assert_eq!(faults, expected, "{}", self.text);
        for fault in self.json["errors"].as_array().into_iter().flatten() {
            assert!(
                fault["message"].as_str().is_some_and(|text| !text.is_empty()),
                "{}",
                self.text
            );
        }
    }
}

/// A client with one key, of one API process.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl Client {
    /// A client of the process at `base`, such as `http://127.0.0.1:43210`.
    pub fn new(base: &str, key: Option<&str>) -> Self {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            // An error would say that there is one already.
            let _ = rustls::crypto::ring::default_provider().install_default();
        });
        // No connection is kept: a process that was killed and started again must not meet an old one.
        let http = reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .no_proxy()
            .build()
            .expect("a client without any file to read");
        Self {
            http,
            base: base.to_owned(),
            key: key.map(str::to_owned),
        }
    }

    /// The same with another key.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Self {
        Self {
            key: Some(key.to_owned()),
            ..self.clone()
        }
    }

    /// The same without a key.
    #[must_use]
    pub fn without_key(&self) -> Self {
        Self {
            key: None,
            ..self.clone()
        }
    }

    /// Where the process listens.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// A request to build further.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .timeout(PATIENCE);
        match &self.key {
            Some(key) => request.header("x-api-key", key),
            None => request,
        }
    }

    /// Sends a request; an error is one of the connection.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn try_send(&self, request: RequestBuilder) -> Result<Answer, reqwest::Error> {
        read(request.send().await?).await
    }

    /// Sends a request that must be answered.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        self.try_send(request).await.expect("an answer")
    }

    /// `GET` of any path.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// `POST` of any path with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// `POST /api/v1/jobs`.
    pub async fn submit(&self, body: &Value) -> Answer {
        self.post("/api/v1/jobs", body).await
    }

    /// `POST /api/v1/jobs` with an idempotency key.
    pub async fn submit_once(&self, key: &str, body: &Value) -> Answer {
        self.send(
            self.request(Method::POST, "/api/v1/jobs")
                .header("idempotency-key", key)
                .json(body),
        )
        .await
    }

    /// `GET /api/v1/jobs/{id}`.
    pub async fn job(&self, id: &str) -> Answer {
        self.get(&format!("/api/v1/jobs/{id}")).await
    }

    /// `GET /api/v1/jobs` with a query, such as `status=done&limit=5`.
    pub async fn jobs(&self, query: &str) -> Answer {
        self.get(&format!("/api/v1/jobs?{query}")).await
    }

    /// `POST /api/v1/jobs/{id}/cancel` without a body.
    pub async fn cancel(&self, id: &str) -> Answer {
        self.send(self.request(Method::POST, &format!("/api/v1/jobs/{id}/cancel")))
            .await
    }

    /// `GET /api/v1/jobs/{id}/events` as JSON, with a query.
    pub async fn events(&self, id: &str, query: &str) -> Answer {
        let path = format!("/api/v1/jobs/{id}/events?{query}");
        self.send(
            self.request(Method::GET, &path)
                .header("accept", "application/json"),
        )
        .await
    }

    /// `GET /api/v1/jobs/{id}/events` as a stream that goes on after event `after`.
    pub async fn stream(&self, id: &str, after: Option<u64>) -> Stream {
        let mut request = self
            .request(Method::GET, &format!("/api/v1/jobs/{id}/events"))
            .header("accept", "text/event-stream");
        if let Some(after) = after {
            request = request.header("last-event-id", after.to_string());
        }
        Stream::new(request.send().await.expect("an answer"))
    }

    /// Submits a message that must be accepted; the job's id.
    pub async fn accepted(&self, message: &str) -> String {
        self.accepted_body(&json!({ "message": message })).await
    }

    /// Submits a script for the scripted CLI; the job's id.
    pub async fn play(&self, script: &Script) -> String {
        self.accepted(&script.prompt()).await
    }

    /// Submits a body that must be accepted; the job's id.
    pub async fn accepted_body(&self, body: &Value) -> String {
        let answer = self.submit(body).await;
        answer.data(202)["id"]
            .as_str()
            .expect("a job has an id")
            .to_owned()
    }

    /// Makes a session of this name, or keeps the one that there is; its id, after which its folder is named.
    pub async fn session(&self, name: &str) -> String {
        let answer = self.post("/api/v1/sessions", &json!({ "name": name })).await;
        answer.data(201)["id"].to_string()
    }

    /// The job once it is final.
    pub async fn finished(&self, id: &str) -> Value {
        let begin = std::time::Instant::now();
        loop {
            let answer = self.get(&format!("/api/v1/jobs/{id}?wait=10")).await;
            let job = answer.data(200).clone();
            if is_final(&job) {
                return job;
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "the job isn't final after {PATIENCE:?}: {job:#}"
            );
        }
    }

    /// The job once it has this status; fails at once when it is final with another.
    pub async fn reaches(&self, id: &str, status: &str) -> Value {
        self.until(id, |job| job["status"] == status).await
    }

    /// The job once a condition holds; fails when it is final without.
    pub async fn until(&self, id: &str, condition: impl Fn(&Value) -> bool) -> Value {
        eventually(PATIENCE, &format!("a condition on job {id}"), async || {
            let answer = self.job(id).await;
            let job = answer.data(200).clone();
            if condition(&job) {
                return Some(job);
            }
            assert!(
                !is_final(&job),
                "the job is final without what the test waits for: {job:#}"
            );
            None
        })
        .await
    }

    /// All stored events of a job, over all pages.
    pub async fn all_events(&self, id: &str) -> Vec<Value> {
        let mut events = Vec::new();
        let mut after = 0;
        loop {
            let answer = self.events(id, &format!("after={after}&limit=1000")).await;
            events.extend(
                answer
                    .data(200)
                    .as_array()
                    .expect("a list of events")
                    .iter()
                    .cloned(),
            );
            if answer.json["pagination"]["has_more"] != true {
                return events;
            }
            after = answer.json["pagination"]["next_after"]
                .as_u64()
                .expect("a place to go on from");
        }
    }

    /// The event of this type once it is there; the first, if there are several.
    pub async fn event(&self, id: &str, kind: &str) -> Value {
        eventually(PATIENCE, &format!("an event {kind} of job {id}"), async || {
            self.all_events(id)
                .await
                .into_iter()
                .find(|event| event["type"] == kind)
        })
        .await
    }
}

/// Whether a job's status is a final one.
pub fn is_final(job: &Value) -> bool {
    matches!(job["status"].as_str(), Some("done" | "failed" | "cancelled"))
}

async fn read(response: Response) -> Result<Answer, reqwest::Error> {
    let status = response.status().as_u16();
    let headers = response.headers().clone();
    let text = response.text().await?;
    let json = serde_json::from_str(&text).unwrap_or(Value::Null);
    Ok(Answer {
        status,
        headers,
        json,
        text,
    })
}

/// One server-sent event.
#[derive(Clone, Debug, PartialEq)]
pub struct Sse {
    /// The `id` line; events without one are not stored.
    pub id: Option<u64>,
    /// The `event` line.
    pub event: String,
    /// The `data` lines, parsed.
    pub data: Value,
}

/// A stream of server-sent events.
#[derive(Debug)]
pub struct Stream {
    /// The HTTP status; 204 when there is nothing left to send.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The comments seen so far.
    pub comments: Vec<String>,
    response: Option<Response>,
    buffer: Vec<u8>,
    ready: VecDeque<Sse>,
}

impl Stream {
    fn new(response: Response) -> Self {
        Self {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            comments: Vec::new(),
            response: Some(response),
            buffer: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    /// The next event; none when the server has closed the stream. Fails when neither comes in time.
    pub async fn next(&mut self) -> Option<Sse> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let response = self.response.as_mut()?;
            let chunk = tokio::time::timeout(PATIENCE, response.chunk())
                .await
                .expect("the stream goes on");
            match chunk {
                Ok(Some(chunk)) => {
                    // Lines may end in CR LF; JSON data holds neither.
                    self.buffer.extend(chunk.iter().filter(|byte| **byte != b'\r'));
                    self.parse();
                }
                Ok(None) | Err(_) => self.response = None,
            }
        }
    }

    /// Everything up to the end of the stream.
    pub async fn rest(&mut self) -> Vec<Sse> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }

    fn parse(&mut self) {
        while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
            let block = String::from_utf8(self.buffer.drain(..end + 2).collect()).expect("a stream is UTF-8");
            let mut event = Sse {
                id: None,
                event: String::new(),
                data: Value::Null,
            };
            let mut data = Vec::new();
            for line in block.lines() {
                match line.split_once(':') {
                    Some(("", comment)) => self.comments.push(comment.trim().to_owned()),
                    Some(("id", id)) => event.id = Some(id.trim().parse().expect("an id is a number")),
                    Some(("event", name)) => name.trim().clone_into(&mut event.event),
                    Some(("data", text)) => data.push(text.strip_prefix(' ').unwrap_or(text)),
                    _ => {}
                }
            }
            if !data.is_empty() {
                event.data = serde_json::from_str(&data.join("\n")).expect("the data of an event is JSON");
                self.ready.push_back(event);
            }
        }
    }
}

/// Runs requests at once and returns their answers in order.
pub async fn at_once<T>(requests: impl IntoIterator<Item = impl Future<Output = T>>) -> Vec<T> {
    futures_util::future::join_all(requests).await
}
