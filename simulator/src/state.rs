//! What all connections share.

use std::sync::{Mutex, PoisonError};

use crate::recorder::Recorder;
use crate::scenario::{Scenarios, Step};
use crate::spend::Spend;

/// The scenarios, what was asked for, and what the answers cost.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) scenarios: Scenarios,
    pub(crate) recorder: Recorder,
    pub(crate) spend: Spend,
    /// What answers everything while the API is out.
    outage: Mutex<Option<Step>>,
}

impl State {
    /// The built-in scenarios, and nothing asked for yet.
    pub(crate) fn new() -> Self {
        Self {
            scenarios: Scenarios::builtin(),
            recorder: Recorder::default(),
            spend: Spend::default(),
            outage: Mutex::default(),
        }
    }

    pub(crate) fn set_outage(&self, step: Option<Step>) {
        *self.outage.lock().unwrap_or_else(PoisonError::into_inner) = step;
    }

    pub(crate) fn outage(&self) -> Option<Step> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
