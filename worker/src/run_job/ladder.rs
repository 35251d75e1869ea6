//! How a run is brought to its end: asked, told, made to, each with its time. Pure: it says what to do, and when to
//! ask again.

use super::outcome::{Deadline, Stopped};
use std::time::Duration;
use tokio::time::Instant;

/// What the CLI gets for each rung of the stop ladder: to end its turn, to end itself.
pub(super) const INTERRUPT: Duration = Duration::from_secs(3);
pub(super) const CLOSE: Duration = Duration::from_secs(2);

/// After its result the CLI ends by itself within a moment; longer than this and it is made to.
pub(super) const GOODBYE: Duration = Duration::from_secs(5);

/// What is to be done to the CLI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Ask it to end its turn.
    Interrupt,
    /// Close its input, which tells it to end.
    Close,
    /// End everything of the run.
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rung {
    /// Nobody wants the run to end.
    None,
    /// The CLI was asked to end its turn.
    Interrupted,
    /// Its input is closed: it was told to end, or has given its result.
    Closed,
    /// Everything was killed.
    Killed,
}

/// How far a run was brought to its end, and why. From the moment that somebody wants its end it is killed within
/// [`INTERRUPT`] and [`CLOSE`], whatever the CLI says meanwhile.
#[derive(Debug)]
pub(super) struct Ladder {
    rung: Rung,
    /// When the next rung is due. No meaning on the last one.
    until: Instant,
    total: Duration,
    stopped: Option<Stopped>,
}

impl Ladder {
    /// A run that began at `started` and may take `total`.
    pub(super) fn new(started: Instant, total: Duration) -> Self {
        Self {
            rung: Rung::None,
            until: started + total,
            total,
            stopped: None,
        }
    }

    /// Whether nobody has wanted the run's end yet.
    pub(super) fn is_untouched(&self) -> bool {
        self.rung == Rung::None
    }

    /// Whether there is nothing more that could be done to end the run.
    pub(super) fn is_climbed(&self) -> bool {
        self.rung == Rung::Killed
    }

    /// When [`Self::climb`] is due, unless the ladder is climbed.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// Why the run was ended; none while it ends by itself.
    pub(super) fn stopped(&self) -> Option<Stopped> {
        self.stopped
    }

    /// Somebody wants the run to end. Only the first one counts.
    pub(super) fn interrupt(&mut self, why: Stopped, now: Instant) -> Option<Act> {
        if self.rung != Rung::None {
            return None;
        }
        self.stopped = Some(why);
        Some(self.step(Rung::Interrupted, now + INTERRUPT))
    }

    /// The CLI has given its result: it should end now, since subagents go on spending until it does. Only the first
    /// result counts, and none lengthens what an interrupted run has left.
    pub(super) fn close(&mut self, now: Instant) -> Option<Act> {
        let patience = match self.rung {
            Rung::None => GOODBYE,
            Rung::Interrupted => CLOSE,
            Rung::Closed | Rung::Killed => return None,
        };
        Some(self.step(Rung::Closed, now + patience))
    }

    /// The run must not go on for another moment.
    pub(super) fn kill(&mut self, why: Stopped, now: Instant) -> Option<Act> {
        if self.rung == Rung::Killed {
            return None;
        }
        self.stopped = Some(why);
        Some(self.step(Rung::Killed, now))
    }

    /// The time of this rung is over.
    pub(super) fn climb(&mut self, now: Instant) -> Option<Act> {
        match self.rung {
            Rung::None => self.interrupt(
                Stopped::Timeout {
                    deadline: Deadline::Total,
                    after: self.total,
                },
                now,
            ),
            Rung::Interrupted => Some(self.step(Rung::Closed, now + CLOSE)),
            Rung::Closed => Some(self.step(Rung::Killed, now)),
            Rung::Killed => None,
        }
    }

    /// What the CLI has left to end itself when its output is over and its input closed.
    pub(super) fn left(&self, now: Instant) -> Duration {
        match self.rung {
            Rung::None => GOODBYE,
            Rung::Interrupted => CLOSE,
            Rung::Closed => self.until.saturating_duration_since(now),
            Rung::Killed => Duration::ZERO,
        }
    }

    fn step(&mut self, rung: Rung, until: Instant) -> Act {
        (self.rung, self.until) = (rung, until);
        match rung {
            Rung::None | Rung::Interrupted => Act::Interrupt,
            Rung::Closed => Act::Close,
            Rung::Killed => Act::Kill,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ladder() -> (Ladder, Instant) {
        let now = Instant::now();
        (Ladder::new(now, 300 * SECOND), now)
    }

    #[test]
    fn a_run_that_hears_nothing_is_killed_five_seconds_after_its_cancel() {
        let (mut ladder, now) = ladder();

        assert_eq!(ladder.interrupt(Stopped::Cancelled, now), Some(Act::Interrupt));
        assert_eq!(ladder.climb(ladder.until()), Some(Act::Close));
        assert_eq!(ladder.climb(ladder.until()), Some(Act::Kill));

        assert_eq!(ladder.until() - now, INTERRUPT + CLOSE);
        assert_eq!(ladder.stopped(), Some(Stopped::Cancelled));
        assert!(ladder.is_climbed() && ladder.climb(now).is_none());
        assert_eq!(ladder.left(now), Duration::ZERO);
    }

    #[test]
    fn results_never_push_the_kill_away() {
        let (mut ladder, now) = ladder();
        ladder.interrupt(Stopped::Cancelled, now);

        let answered = now + SECOND / 10;
        assert_eq!(ladder.close(answered), Some(Act::Close));
        for later in 1..20 {
            assert_eq!(ladder.close(answered + later * SECOND / 10), None);
        }

        assert_eq!(ladder.until(), answered + CLOSE);
        assert_eq!(ladder.left(answered + SECOND), SECOND);
        assert_eq!(ladder.climb(ladder.until()), Some(Act::Kill));
        assert_eq!(ladder.stopped(), Some(Stopped::Cancelled));
    }

    #[test]
    fn a_run_that_repeats_its_result_is_killed_after_the_first() {
        let (mut ladder, now) = ladder();

        assert_eq!(ladder.close(now), Some(Act::Close));
        assert_eq!(ladder.close(now + 4 * SECOND), None);
        // Nor does a cancel, which comes too late.
        assert_eq!(ladder.interrupt(Stopped::Cancelled, now + 4 * SECOND), None);

        assert_eq!(ladder.until(), now + GOODBYE);
        assert_eq!(ladder.climb(ladder.until()), Some(Act::Kill));
        assert_eq!(ladder.stopped(), None);
    }

    #[test]
    fn output_that_ends_leaves_no_more_than_the_ladder_did() {
        let (mut ladder, now) = ladder();
        assert_eq!(ladder.left(now), GOODBYE);
        ladder.interrupt(Stopped::Cancelled, now);
        assert_eq!(ladder.left(now + SECOND), CLOSE);
        ladder.climb(ladder.until());
        assert_eq!(ladder.left(now + 4 * SECOND), SECOND);
        assert_eq!(ladder.left(now + 9 * SECOND), Duration::ZERO);
    }

    #[test]
    fn the_whole_time_ends_a_run_that_nobody_else_ended() {
        let (mut ladder, _) = ladder();

        assert_eq!(ladder.climb(ladder.until()), Some(Act::Interrupt));

        let timeout = Stopped::Timeout {
            deadline: Deadline::Total,
            after: 300 * SECOND,
        };
        assert_eq!(ladder.stopped(), Some(timeout));
    }

    #[test]
    fn a_kill_comes_from_everywhere_and_is_the_last_word() {
        let (mut ladder, now) = ladder();
        ladder.interrupt(Stopped::Cancelled, now);

        assert_eq!(ladder.kill(Stopped::LeaseLost, now), Some(Act::Kill));

        assert_eq!(ladder.kill(Stopped::NotAsTold, now), None);
        assert_eq!(ladder.close(now), None);
        assert_eq!(ladder.interrupt(Stopped::Shutdown, now), None);
        assert_eq!(ladder.stopped(), Some(Stopped::LeaseLost));
    }
}
