//! A Messages API on loopback that plays scenarios instead of asking a model.
//!
//! The real Claude CLI talks to it as it talks to the real API: streaming or not, tool turns, every error and every
//! way of falling silent. A [`Scenario`] is data; the built-in ones are in `scenarios.json`.
//!
//! Which scenario answers a request is decided by the first of these that is there:
//!
//! 1. a marker in the prompt, `[[scenario:NAME]]` or `[[scenario:NAME.RUN]]` (so that one service with one
//!    credential can play another scenario for each job);
//! 2. the base URL: `http://HOST:PORT/s/NAME` or `http://HOST:PORT/s/NAME/RUN`;
//! 3. the credential: `sim-NAME` or `sim-NAME.RUN`, as an API key or as a bearer token;
//! 4. otherwise the scenario `default`.
//!
//! `RUN` is any word; it gives a scenario that counts requests a counter of its own. Without one the counter belongs
//! to the Claude session that asks.
//!
//! A prompt may say what its answer uses: `[[tokens:IN:OUT]]`.
//!
//! Start reading at `messages.rs`, which answers a request; then `conversation.rs` (what the request says),
//! `answer.rs` (the answer as events) and `playback.rs` (the events on the wire, with their pauses and faults).

mod answer;
mod connection;
mod control;
mod conversation;
mod messages;
mod playback;
mod recorder;
mod response;
mod scenario;
mod server;
mod spend;
mod state;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use recorder::{CredentialKind, Recorded};
pub use scenario::{Fault, HttpError, Pick, Scenario, Step, Tool, Usage};

use state::State;

/// A running simulator. It stops, with everything it still answers, when this value is dropped.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    state: Arc<State>,
    _stop: DropGuard,
}

impl Simulator {
    /// Binds the address (port 0 picks a free one) and answers from then on, on the current tokio runtime.
    ///
    /// Fails when the address can't be bound. Meant for a loopback address: whoever reaches it is answered.
    pub async fn start(address: SocketAddr) -> io::Result<Self> {
        Self::on(TcpListener::bind(address).await?)
    }

    /// The same on a socket that listens already.
    pub fn on(listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let state = Arc::new(State::new());
        let stop = CancellationToken::new();
        tokio::spawn(server::accept(listener, Arc::clone(&state), stop.clone()));
        Ok(Self {
            address,
            state,
            _stop: stop.drop_guard(),
        })
    }

    /// The base URL without a trailing slash, for `ANTHROPIC_BASE_URL`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The base URL under which one scenario answers, whatever the credential. A marker in the prompt still wins.
    pub fn url_of(&self, scenario: &str, run: &str) -> String {
        format!("http://{}/s/{scenario}/{run}", self.address)
    }

    /// Adds a scenario, or replaces the one of that name, for the requests that come from now on.
    pub fn put_scenario(&self, name: impl Into<String>, scenario: Scenario) {
        self.state.scenarios.put(name.into(), scenario);
    }

    /// Answers every request with this step, whatever it asks, until this is called with `None`: the API is out.
    pub fn set_outage(&self, step: Option<Step>) {
        self.state.set_outage(step);
    }

    /// The requests so far, oldest first; at most the newest 10,000.
    pub fn requests(&self) -> Vec<Recorded> {
        self.state.recorder.requests()
    }

    /// The whole body of the newest main request of a scenario and run; the run is the Claude session's id where the
    /// request named none.
    pub fn last_body(&self, scenario: &str, run: &str) -> Option<Value> {
        self.state.recorder.last_body(scenario, run)
    }

    /// How many answers are being waited for or streamed at this moment.
    pub fn open_requests(&self) -> usize {
        self.state.recorder.open()
    }

    /// What all answers so far cost at list prices, in dollars. Of an answer that is cut off, the part that was sent counts.
    pub fn spent(&self) -> f64 {
        self.state.spend.dollars()
    }

    /// Forgets the requests and sets all counters to 0. Scenarios stay.
    pub fn reset(&self) {
        self.state.recorder.reset();
        self.state.spend.reset();
    }
}

/// The built-in scenarios by name, as in `scenarios.json`.
pub fn builtin() -> BTreeMap<String, Scenario> {
    serde_json::from_str(include_str!("../scenarios.json")).expect("a test reads the built-in scenarios")
}

#[cfg(test)]
mod tests;
