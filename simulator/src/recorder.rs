//! What was asked, for tests to look at. Bounded: the oldest requests and bodies are dropped first.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::Value;

const REQUESTS_KEPT: usize = 10_000;
const BODIES_KEPT: usize = 256;

/// One request as it came in.
#[derive(Clone, Debug, Serialize)]
pub struct Recorded {
    /// Counts all requests from 1, also those that are no longer kept.
    pub number: u64,
    /// The HTTP method.
    pub method: String,
    /// The path without the query, without the part that chose the scenario.
    pub path: String,
    /// How the caller showed who they are.
    pub credential_kind: CredentialKind,
    /// The API key or bearer token as sent; empty when there was none.
    pub credential: String,
    /// The scenario that answered; empty for a request that isn't for the Messages API.
    pub scenario: String,
    /// The run that the counter belongs to: named by the caller, or the Claude session's id.
    pub run: String,
    /// The step that answered, from 0.
    pub step: usize,
    /// A side request of the CLI, not a turn of the conversation.
    pub auxiliary: bool,
    /// The model asked for.
    pub model: String,
    /// Messages in the conversation.
    pub messages: usize,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// Size of the body in bytes.
    pub bytes: usize,
    /// The `x-stainless-retry-count` header: how often the CLI's HTTP client had tried before.
    pub retry: u64,
}

/// Which header carried the credential.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CredentialKind {
    /// `x-api-key`.
    XApiKey,
    /// `authorization: Bearer`.
    Bearer,
    /// Neither.
    None,
}

#[derive(Debug, Default)]
pub(crate) struct Recorder {
    seen: Mutex<Seen>,
    open: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Seen {
    total: u64,
    requests: VecDeque<Recorded>,
    counters: HashMap<(String, String), usize>,
    bodies: VecDeque<((String, String), Value)>,
}

/// Counts one answer as open for as long as it lives.
#[derive(Debug)]
pub(crate) struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Recorder {
    /// How many main requests this scenario and run had before; counts this one.
    pub(crate) fn count(&self, scenario: &str, run: &str) -> usize {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let counter = seen
            .counters
            .entry((scenario.to_owned(), run.to_owned()))
            .or_default();
        *counter += 1;
        *counter - 1
    }

    /// Keeps a request, and gives it its number.
    pub(crate) fn record(&self, mut request: Recorded, body: Option<Value>) -> u64 {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.total += 1;
        request.number = seen.total;
        if let Some(body) = body {
            let key = (request.scenario.clone(), request.run.clone());
            seen.bodies.retain(|(of, _)| *of != key);
            if seen.bodies.len() == BODIES_KEPT {
                seen.bodies.pop_front();
            }
            seen.bodies.push_back((key, body));
        }
        if seen.requests.len() == REQUESTS_KEPT {
            seen.requests.pop_front();
        }
        seen.requests.push_back(request);
        seen.total
    }

    pub(crate) fn requests(&self) -> Vec<Recorded> {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .requests
            .iter()
            .cloned()
            .collect()
    }

    pub(crate) fn last_body(&self, scenario: &str, run: &str) -> Option<Value> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bodies = seen.bodies.iter().rev();
        bodies
            .find(|((s, r), _)| s == scenario && r == run)
            .map(|(_, body)| body.clone())
    }

    pub(crate) fn opened(&self) -> Open {
        self.open.fetch_add(1, Ordering::Relaxed);
        Open(Arc::clone(&self.open))
    }

    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    pub(crate) fn reset(&self) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Seen::default();
    }
}
