//! Why and until when a worker claims nothing.

use shared::clock::{self, Timestamp};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why and until when a worker claims nothing: its account has met a limit, its credential is refused, or there is no
/// room for runs.
#[derive(Debug, Default)]
pub struct Pause(Mutex<PauseState>);

#[derive(Debug, Default)]
struct PauseState {
    /// What the account's answers mean.
    account: Option<Break>,
    /// Why a run would have no room, while it hasn't.
    no_room: Option<String>,
    /// Runs in a row whose credential was refused.
    refused: u32,
}

#[derive(Clone, Debug)]
struct Break {
    until: Timestamp,
    /// A break of a certain length also ends when that has passed, if the clock was set back meanwhile.
    ends: Option<Instant>,
    reason: String,
}

impl Break {
    fn lasts(&self, now: Timestamp) -> bool {
        self.until > now && self.ends.is_none_or(|ends| ends > Instant::now())
    }
}

/// After so many refused runs in a row nothing is claimed for a minute, and again after each further one.
const REFUSALS: u32 = 3;
const REFUSED: Duration = Duration::from_mins(1);

/// For how long ahead people are told that there is no room; it is looked at more often.
const NO_ROOM: Duration = Duration::from_secs(15);

impl Pause {
    /// Claims nothing until `until`, or until a later time that was set before.
    pub fn until(&self, until: Timestamp, reason: &str) {
        let new = Break {
            until,
            ends: None,
            reason: reason.to_owned(),
        };
        self.state().begin(new, clock::now());
    }

    /// The API refused a run's credential. True when that begins a pause.
    pub fn refused(&self, now: Timestamp) -> bool {
        let mut state = self.state();
        state.refused = state.refused.saturating_add(1);
        if state.refused < REFUSALS {
            return false;
        }
        let refused = state.refused;
        let new = Break {
            until: now.plus(REFUSED),
            ends: Some(Instant::now() + REFUSED),
            reason: format!(
                "The Anthropic credential was refused {refused} times in a row. Give the worker a valid one."
            ),
        };
        state.begin(new, now);
        true
    }

    /// A run got past its credential.
    pub fn accepted(&self) {
        self.state().refused = 0;
    }

    /// Claims nothing while there is no room, for this reason. True when that is news.
    pub fn for_room(&self, problem: Option<&str>) -> bool {
        let mut state = self.state();
        let news = state.no_room.is_some() != problem.is_some();
        state.no_room = problem.map(str::to_owned);
        news
    }

    /// Waits until no pause is in force.
    pub async fn over(&self) {
        while let Some((until, _)) = self.current(clock::now()) {
            // In steps, because a pause can be made longer and the clock can be set.
            let most = Duration::from_secs(1);
            tokio::time::sleep(until.since(clock::now()).min(most)).await;
        }
    }

    /// The pause that is in force: until when, and why.
    pub fn current(&self, now: Timestamp) -> Option<(Timestamp, String)> {
        let state = self.state();
        let account = state.account.as_ref().filter(|account| account.lasts(now));
        match (account, &state.no_room) {
            (Some(account), _) => Some((account.until, account.reason.clone())),
            (None, Some(problem)) => Some((now.plus(NO_ROOM), problem.clone())),
            (None, None) => None,
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, PauseState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PauseState {
    fn begin(&mut self, new: Break, now: Timestamp) {
        // An old one that is over may have a later time, if the clock was set back meanwhile.
        let keeps = |old: &Break| old.lasts(now) && old.until >= new.until;
        if !self.account.as_ref().is_some_and(keeps) {
            self.account = Some(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_refusals_in_a_row_pause_for_a_minute_and_so_does_each_further_one() {
        let (pause, now) = (Pause::default(), Timestamp(0));
        assert!(!pause.refused(now) && !pause.refused(now));
        pause.accepted();
        assert!(!pause.refused(now) && !pause.refused(now));
        assert!(pause.refused(now));
        assert!(pause.current(Timestamp(59_000_000)).is_some());
        assert!(pause.current(Timestamp(60_000_000)).is_none());

        assert!(pause.refused(Timestamp(60_000_000)));
        assert!(pause.current(Timestamp(61_000_000)).is_some());
    }

    #[test]
    fn a_shorter_pause_doesnt_end_a_longer_one() {
        let (pause, now) = (Pause::default(), clock::now());
        pause.until(now.plus(Duration::from_mins(10)), "long");
        pause.until(now.plus(Duration::from_mins(5)), "short");
        assert_eq!(pause.current(now.plus(Duration::from_mins(6))).unwrap().1, "long");
    }

    #[test]
    fn a_pause_that_is_over_stands_in_no_other_ones_way() {
        let (pause, now) = (Pause::default(), clock::now());
        // It ended by the time that has passed; the clock was set back by an hour meanwhile.
        pause.state().account = Some(Break {
            until: now.plus(Duration::from_hours(1)),
            ends: Some(Instant::now()),
            reason: "over".to_owned(),
        });

        pause.until(now.plus(Duration::from_mins(5)), "new");

        assert_eq!(pause.current(now).unwrap().1, "new");
    }

    #[test]
    fn no_room_is_news_once_and_ends_no_other_pause() {
        let pause = Pause::default();
        assert!(!pause.for_room(None), "there was room before");
        assert!(pause.for_room(Some("full")) && !pause.for_room(Some("still full")));
        assert_eq!(pause.current(Timestamp(0)).unwrap().1, "still full");

        pause.until(Timestamp(100), "limit");
        assert!(pause.for_room(None));
        assert_eq!(pause.current(Timestamp(0)).unwrap().1, "limit");
        assert!(pause.current(Timestamp(100)).is_none());
    }
}
