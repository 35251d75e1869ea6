//! What all connections share.

use crate::recorder::Recorder;
use crate::scenario::Scenarios;

/// The scenarios, and what was asked for.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) scenarios: Scenarios,
    pub(crate) recorder: Recorder,
}

impl State {
    /// The built-in scenarios, and nothing asked for yet.
    pub(crate) fn new() -> Self {
        Self {
            scenarios: Scenarios::builtin(),
            recorder: Recorder::default(),
        }
    }
}
