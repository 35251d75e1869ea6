//! How a run is stopped, as a ladder of stages: interrupt the turn, close the input, kill, each after a grace period.
//! Pure: it says what to do, and when the next stage is due.

use super::outcome::{Deadline, Stopped};
use std::time::Duration;
use tokio::time::Instant;

/// What the CLI gets to end its turn, and then to exit.
pub(super) const INTERRUPT_GRACE: Duration = Duration::from_secs(3);
pub(super) const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// After its result the CLI ends by itself within a moment; longer than this and it is made to.
pub(super) const EXIT_GRACE: Duration = Duration::from_secs(5);

/// What is to be done to the CLI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopAction {
    /// Ask it to end its turn.
    Interrupt,
    /// Close its input, which tells it to end.
    Close,
    /// End everything of the run.
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nobody wants the run to end.
    None,
    /// The CLI was asked to end its turn.
    Interrupted,
    /// Its input is closed: it was told to end, or has given its result.
    Closed,
    /// Everything was killed.
    Killed,
}

/// How far the stop of a run has come, and why it is stopped. Once its end is wanted, the run is killed within
/// [`INTERRUPT_GRACE`] and [`CLOSE_GRACE`], whatever the CLI says meanwhile.
#[derive(Debug)]
pub(super) struct StopSequence {
    stage: Stage,
    /// When the next stage is due. No meaning on the last one.
    until: Instant,
    total: Duration,
    stopped: Option<Stopped>,
}

impl StopSequence {
    /// A run that began at `started` and may take `total`.
    pub(super) fn new(started: Instant, total: Duration) -> Self {
        Self {
            stage: Stage::None,
            until: started + total,
            total,
            stopped: None,
        }
    }

    /// Whether nobody has wanted the run's end yet.
    pub(super) fn is_untouched(&self) -> bool {
        self.stage == Stage::None
    }

    /// Whether there is nothing more that could be done to end the run.
    pub(super) fn is_over(&self) -> bool {
        self.stage == Stage::Killed
    }

    /// When [`Self::advance`] is due, unless it is over.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// Why the run was ended; none while it ends by itself.
    pub(super) fn stopped(&self) -> Option<Stopped> {
        self.stopped
    }

    /// Somebody wants the run to end. Only the first one counts.
    pub(super) fn interrupt(&mut self, why: Stopped, now: Instant) -> Option<StopAction> {
        if self.stage != Stage::None {
            return None;
        }
        self.stopped = Some(why);
        Some(self.step(Stage::Interrupted, now + INTERRUPT_GRACE))
    }

    /// The CLI has given its result: it should end now, since subagents go on spending until it does. Only the first
    /// result counts, and none lengthens what an interrupted run has left.
    pub(super) fn close(&mut self, now: Instant) -> Option<StopAction> {
        let patience = match self.stage {
            Stage::None => EXIT_GRACE,
            Stage::Interrupted => CLOSE_GRACE,
            Stage::Closed | Stage::Killed => return None,
        };
        Some(self.step(Stage::Closed, now + patience))
    }

    /// The run must not go on for another moment.
    pub(super) fn kill(&mut self, why: Stopped, now: Instant) -> Option<StopAction> {
        if self.stage == Stage::Killed {
            return None;
        }
        self.stopped = Some(why);
        Some(self.step(Stage::Killed, now))
    }

    /// The time of this stage is over.
    pub(super) fn advance(&mut self, now: Instant) -> Option<StopAction> {
        match self.stage {
            Stage::None => self.interrupt(
                Stopped::Timeout {
                    deadline: Deadline::Total,
                    after: self.total,
                },
                now,
            ),
            Stage::Interrupted => Some(self.step(Stage::Closed, now + CLOSE_GRACE)),
            Stage::Closed => Some(self.step(Stage::Killed, now)),
            Stage::Killed => None,
        }
    }

    /// What the CLI has left to end itself when its output is over and its input closed.
    pub(super) fn left(&self, now: Instant) -> Duration {
        match self.stage {
            Stage::None => EXIT_GRACE,
            Stage::Interrupted => CLOSE_GRACE,
            Stage::Closed => self.until.saturating_duration_since(now),
            Stage::Killed => Duration::ZERO,
        }
    }

    fn step(&mut self, stage: Stage, until: Instant) -> StopAction {
        (self.stage, self.until) = (stage, until);
        match stage {
            Stage::None | Stage::Interrupted => StopAction::Interrupt,
            Stage::Closed => StopAction::Close,
            Stage::Killed => StopAction::Kill,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn sequence() -> (StopSequence, Instant) {
        let now = Instant::now();
        (StopSequence::new(now, 300 * SECOND), now)
    }

    #[test]
    fn a_run_that_hears_nothing_is_killed_five_seconds_after_its_cancel() {
        let (mut stop, now) = sequence();

        assert_eq!(
            stop.interrupt(Stopped::Cancelled, now),
            Some(StopAction::Interrupt)
        );
        assert_eq!(stop.advance(stop.until()), Some(StopAction::Close));
        assert_eq!(stop.advance(stop.until()), Some(StopAction::Kill));

        assert_eq!(stop.until() - now, INTERRUPT_GRACE + CLOSE_GRACE);
        assert_eq!(stop.stopped(), Some(Stopped::Cancelled));
        assert!(stop.is_over() && stop.advance(now).is_none());
        assert_eq!(stop.left(now), Duration::ZERO);
    }

    #[test]
    fn results_never_push_the_kill_away() {
        let (mut stop, now) = sequence();
        stop.interrupt(Stopped::Cancelled, now);

        let answered = now + SECOND / 10;
        assert_eq!(stop.close(answered), Some(StopAction::Close));
        for later in 1..20 {
            assert_eq!(stop.close(answered + later * SECOND / 10), None);
        }

        assert_eq!(stop.until(), answered + CLOSE_GRACE);
        assert_eq!(stop.left(answered + SECOND), SECOND);
        assert_eq!(stop.advance(stop.until()), Some(StopAction::Kill));
        assert_eq!(stop.stopped(), Some(Stopped::Cancelled));
    }

    #[test]
    fn a_run_that_repeats_its_result_is_killed_after_the_first() {
        let (mut stop, now) = sequence();

        assert_eq!(stop.close(now), Some(StopAction::Close));
        assert_eq!(stop.close(now + 4 * SECOND), None);
        // Nor does a cancel, which comes too late.
        assert_eq!(stop.interrupt(Stopped::Cancelled, now + 4 * SECOND), None);

        assert_eq!(stop.until(), now + EXIT_GRACE);
        assert_eq!(stop.advance(stop.until()), Some(StopAction::Kill));
        assert_eq!(stop.stopped(), None);
    }

    #[test]
    fn output_that_ends_leaves_no_more_time_than_the_sequence_did() {
        let (mut stop, now) = sequence();
        assert_eq!(stop.left(now), EXIT_GRACE);
        stop.interrupt(Stopped::Cancelled, now);
        assert_eq!(stop.left(now + SECOND), CLOSE_GRACE);
        stop.advance(stop.until());
        assert_eq!(stop.left(now + 4 * SECOND), SECOND);
        assert_eq!(stop.left(now + 9 * SECOND), Duration::ZERO);
    }

    #[test]
    fn the_whole_time_ends_a_run_that_nobody_else_ended() {
        let (mut stop, _) = sequence();

        assert_eq!(stop.advance(stop.until()), Some(StopAction::Interrupt));

        let timeout = Stopped::Timeout {
            deadline: Deadline::Total,
            after: 300 * SECOND,
        };
        assert_eq!(stop.stopped(), Some(timeout));
    }

    #[test]
    fn a_kill_comes_from_everywhere_and_is_the_last_word() {
        let (mut stop, now) = sequence();
        stop.interrupt(Stopped::Cancelled, now);

        assert_eq!(stop.kill(Stopped::LeaseLost, now), Some(StopAction::Kill));

        assert_eq!(stop.kill(Stopped::InitMismatch, now), None);
        assert_eq!(stop.close(now), None);
        assert_eq!(stop.interrupt(Stopped::Shutdown, now), None);
        assert_eq!(stop.stopped(), Some(Stopped::LeaseLost));
    }
}
