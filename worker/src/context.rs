//! What the parts of a worker may touch.

use crate::claude::sandbox::Isolation;
use crate::config::Config;
use crate::gateway::Upstream;
use crate::gateway::credentials::Credentials;
use crate::workspace::Runtime;
use shared::clock::{self, Timestamp};
use shared::storage::{Claimant, Store, Wakeups};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// One worker process.
#[derive(Debug)]
pub struct Context {
    /// The database.
    pub store: Store,
    /// What other processes commit.
    pub wakeups: Wakeups,
    /// The settings.
    pub config: Config,
    /// Under which name jobs are claimed.
    pub claimant: Claimant,
    /// The CLI's own file.
    pub cli: PathBuf,
    /// Whether and how runs are isolated.
    pub isolation: Isolation,
    /// Where sockets are put.
    pub runtime: Runtime,
    /// How the gateway proves who pays.
    pub credentials: Arc<Credentials>,
    /// Where the gateway sends requests.
    pub upstream: Upstream,
    /// Claims of this process are made one at a time.
    pub claiming: tokio::sync::Mutex<()>,
    /// The slots that are taken.
    pub busy: tokio_util::task::TaskTracker,
    /// Whether this worker claims nothing for a while.
    pub pause: Pause,
    /// No more claims.
    pub draining: CancellationToken,
    /// End the runs and hand their jobs back.
    pub handing_back: CancellationToken,
}

/// Why and until when a worker claims nothing: its account has met a limit, or its credential is refused.
#[derive(Debug, Default)]
pub struct Pause(Mutex<PauseState>);

#[derive(Debug, Default)]
struct PauseState {
    pause: Option<(Timestamp, String)>,
    /// Runs in a row whose credential was refused.
    refused: u32,
}

/// After so many refused runs in a row nothing is claimed for a minute.
const REFUSALS: u32 = 3;

impl Pause {
    /// Claims nothing until `until`, or until a later time that was set before.
    pub fn until(&self, until: Timestamp, reason: &str) {
        let mut state = self.state();
        if state.pause.as_ref().is_none_or(|(set, _)| *set < until) {
            state.pause = Some((until, reason.to_owned()));
        }
    }

    /// Takes note of whether the API refused a run's credential. True when that begins a pause.
    pub fn note_refusal(&self, refused: bool, now: Timestamp) -> bool {
        let mut state = self.state();
        state.refused = if refused { state.refused + 1 } else { 0 };
        if state.refused < REFUSALS {
            return false;
        }
        state.refused = 0;
        drop(state);
        let minute = Duration::from_mins(1);
        self.until(
            now.plus(minute),
            "The Anthropic credential was refused three times in a row.",
        );
        true
    }

    /// Waits until no pause is in force.
    pub async fn over(&self) {
        while let Some((until, _)) = self.current(clock::now()) {
            // In steps, because a pause can be made longer and the clock can be set.
            tokio::time::sleep(until.since(clock::now()).min(Duration::from_secs(1))).await;
        }
    }

    /// The pause that is in force.
    pub fn current(&self, now: Timestamp) -> Option<(Timestamp, String)> {
        self.state().pause.clone().filter(|(until, _)| *until > now)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, PauseState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_refusals_in_a_row_pause_for_a_minute() {
        let (pause, now) = (Pause::default(), Timestamp(0));
        for refused in [true, true, false, true, true] {
            assert!(!pause.note_refusal(refused, now));
        }
        assert!(pause.note_refusal(true, now));
        assert!(pause.current(Timestamp(59_000_000)).is_some());
        assert!(pause.current(Timestamp(60_000_000)).is_none());
    }

    #[test]
    fn a_shorter_pause_doesnt_end_a_longer_one() {
        let pause = Pause::default();
        pause.until(Timestamp(100), "long");
        pause.until(Timestamp(50), "short");
        assert_eq!(pause.current(Timestamp(60)).unwrap().1, "long");
    }
}
