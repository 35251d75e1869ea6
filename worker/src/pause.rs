//! Why a worker claims nothing, or one job at a time: its account has met a limit, the Messages API can't serve runs,
//! or there is no room for them.
//!
//! What is known about the API comes from answers that the gateway or the worker itself received, never from what a
//! run prints.

use crate::gateway::failure::{ApiFailure, Cause};
use crate::gateway::question::Answer;
use shared::clock::{self, Timestamp};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Whether this worker may begin runs, and why not.
#[derive(Debug, Default)]
pub struct Pause {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The account's plan is used up.
    usage_limit: Option<Break>,
    /// The API can't serve runs.
    trouble: Option<Trouble>,
    /// Why a run would have no room, while it hasn't.
    no_room: Option<String>,
    /// What the API last answered to the worker's own question, in words.
    answer: Option<String>,
    /// Whether jobs that wait for the API should be made ready: an outage is over.
    recovered: bool,
}

#[derive(Clone, Debug)]
struct Break {
    until: Timestamp,
    /// A break of a certain length also ends when that has passed, if the clock was set back meanwhile.
    ends: Instant,
    reason: String,
    /// Whether it was logged.
    logged: bool,
}

impl Break {
    fn lasts(&self, now: Timestamp) -> bool {
        self.until > now && self.ends > Instant::now()
    }
}

/// The API can't serve runs. While that lasts they begin one at a time, after growing pauses; the first request that
/// succeeds ends it.
#[derive(Debug)]
struct Trouble {
    reason: String,
    since: Instant,
    /// Pauses so far.
    pauses: u32,
    /// No run begins before.
    next: Instant,
    /// A run is under way to see whether the API serves it.
    probing: bool,
    /// The last answer to the worker's own question.
    own: OwnAnswer,
    /// Whether one of them showed the trouble, too: then a good one ends it.
    confirmed: bool,
    /// Whether it was logged.
    logged: bool,
}

/// What the API's last answer to the worker's own question says about the trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnAnswer {
    /// Nothing yet, or nothing that can be relied on.
    Unknown,
    /// It answers.
    Good,
    /// It would serve no run.
    Out,
}

/// The longest pause between two runs that begin while the API can't serve them.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The longest time for which the API's `retry-after` holds up all runs; the job that met it waits for all of it.
const LONGEST_HELD: Duration = Duration::from_mins(1);

/// Trouble that nobody has met for so long is over.
const FORGOTTEN: Duration = Duration::from_mins(2);

/// For how long ahead people are told of a pause whose end isn't known; it is looked at more often.
const TOLD_AHEAD: Duration = Duration::from_secs(15);

/// The right to begin a run, until this is dropped.
#[derive(Debug)]
pub struct Start {
    /// The run is the one that shows whether the API serves runs again.
    probe: Option<Arc<Pause>>,
}

impl Drop for Start {
    fn drop(&mut self) {
        if let Some(pause) = self.probe.take() {
            if let Some(trouble) = &mut pause.state().trouble {
                trouble.probing = false;
            }
            pause.changed.notify_waiters();
        }
    }
}

/// What the worker's watch of the API has to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Ask the API the worker's own question.
    pub ask: bool,
    /// Log that runs are held up, for this reason.
    pub log: Option<String>,
    /// Make the jobs ready that wait for the API.
    pub release: bool,
}

impl Pause {
    /// Takes note that the API refused a request of a run.
    pub fn failed(&self, failure: &ApiFailure, now: Timestamp) {
        let Some(cause) = failure.cause() else { return };
        let reason = failure.reason(cause);
        let mut state = self.state();
        if let (Cause::UsageLimit, Some(until)) = (cause, failure.usage_reset) {
            state.begin(until, reason, now);
        } else {
            state.meet(reason, failure.retry_after.unwrap_or_default());
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Takes note that the API served a request of a run.
    pub fn served(&self) {
        let mut state = self.state();
        if let Some(trouble) = state.trouble.take() {
            if trouble.logged {
                tracing::info!("the Messages API serves runs again");
            }
            state.recovered |= trouble.confirmed;
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// Takes note of an answer to the worker's own question.
    pub fn answered(&self, answer: &Answer) {
        let mut state = self.state();
        state.answer = Some(answer.to_string());
        let State {
            trouble: Some(trouble),
            recovered,
            ..
        } = &mut *state
        else {
            return;
        };
        let before = trouble.own;
        trouble.own = match answer {
            Answer::Good => OwnAnswer::Good,
            answer if answer.is_out() => OwnAnswer::Out,
            Answer::Refused(_) => OwnAnswer::Unknown,
        };
        if trouble.own != OwnAnswer::Good {
            trouble.confirmed |= matches!(answer, Answer::Refused(failure) if failure.cause().is_some());
        } else if trouble.confirmed && before != OwnAnswer::Good {
            // The next run may begin at once. The others follow when a request of it has succeeded.
            trouble.next = Instant::now();
            trouble.pauses = 0;
            *recovered = true;
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Ends every pause that the API began: a person wants it tried.
    pub fn lift(&self) {
        let mut state = self.state();
        state.usage_limit = None;
        state.trouble = None;
        drop(state);
        self.changed.notify_waiters();
    }

    /// Claims nothing while there is no room, for this reason. True when that is news.
    pub fn for_room(&self, problem: Option<&str>) -> bool {
        let mut state = self.state();
        let news = state.no_room.is_some() != problem.is_some();
        state.no_room = problem.map(str::to_owned);
        drop(state);
        self.changed.notify_waiters();
        news
    }

    /// The right to begin a run, if there is one now.
    pub fn start(self: &Arc<Self>, now: Timestamp) -> Option<Start> {
        let mut state = self.state();
        if state.blocked(now).is_some() {
            return None;
        }
        let probe = state.trouble.as_mut().map(|trouble| {
            trouble.probing = true;
            Arc::clone(self)
        });
        Some(Start { probe })
    }

    /// Waits until a run may begin.
    pub async fn over(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Registered before the look.
            changed.as_mut().enable();
            let Some((until, _)) = self.current(clock::now()) else {
                return;
            };
            // In steps, because the clock can be set.
            let most = until.since(clock::now()).min(Duration::from_secs(1));
            let next = self.state().trouble.as_ref().map(|trouble| trouble.next);
            let most = next.map_or(most, |next| {
                let left = next.saturating_duration_since(Instant::now());
                if left.is_zero() { most } else { left.min(most) }
            });
            let _ = tokio::time::timeout(most, changed).await;
        }
    }

    /// Waits until something about the pauses changes.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The pause that is in force: until when, and why.
    pub fn current(&self, now: Timestamp) -> Option<(Timestamp, String)> {
        self.state().blocked(now)
    }

    /// What the API last answered to the worker's own question, in words.
    pub fn answer(&self) -> Option<String> {
        self.state().answer.clone()
    }

    /// What is to be done now.
    pub fn due(&self) -> Due {
        let mut state = self.state();
        let mut due = Due {
            release: std::mem::take(&mut state.recovered),
            ..Due::default()
        };
        let now = Instant::now();
        let over = |trouble: &Trouble| trouble.own != OwnAnswer::Out && now > trouble.next + FORGOTTEN;
        if state
            .trouble
            .as_ref()
            .is_some_and(|trouble| !trouble.probing && over(trouble))
        {
            state.trouble = None;
        }
        if let Some(limit) = state.usage_limit.as_mut().filter(|limit| !limit.logged) {
            limit.logged = true;
            due.log = Some(limit.reason.clone());
        }
        if let Some(trouble) = &mut state.trouble {
            due.ask = trouble.own != OwnAnswer::Good;
            // A single refusal that passes is no news.
            if !trouble.logged && trouble.since.elapsed() >= Duration::from_secs(1) {
                trouble.logged = true;
                due.log = Some(trouble.reason.clone());
            }
        }
        due
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&mut self, until: Timestamp, reason: String, now: Timestamp) {
        // An old one that is over may have a later time, if the clock was set back meanwhile.
        let keeps = |old: &Break| old.lasts(now) && old.until >= until;
        if !self.usage_limit.as_ref().is_some_and(keeps) {
            self.usage_limit = Some(Break {
                until,
                ends: Instant::now() + until.since(now),
                reason,
                logged: false,
            });
        }
    }

    fn meet(&mut self, reason: String, retry_after: Duration) {
        let now = Instant::now();
        let trouble = self.trouble.get_or_insert_with(|| Trouble {
            reason: String::new(),
            since: now,
            pauses: 0,
            next: now,
            probing: false,
            own: OwnAnswer::Unknown,
            confirmed: false,
            logged: false,
        });
        trouble.reason = reason;
        if trouble.own == OwnAnswer::Good {
            // Its good answer to the worker means nothing for runs.
            trouble.own = OwnAnswer::Unknown;
            trouble.confirmed = false;
        }
        // Runs under way meet it too, each several times; it is the same trouble.
        if now >= trouble.next {
            let pause = Duration::from_secs(1 << trouble.pauses.min(6)).min(LONGEST_PAUSE);
            trouble.next = now + pause;
            trouble.pauses += 1;
        }
        trouble.next = trouble.next.max(now + retry_after.min(LONGEST_HELD));
    }

    /// Until when nothing may begin, and why.
    fn blocked(&self, now: Timestamp) -> Option<(Timestamp, String)> {
        if let Some(limit) = self.usage_limit.as_ref().filter(|limit| limit.lasts(now)) {
            return Some((limit.until, limit.reason.clone()));
        }
        if let Some(problem) = &self.no_room {
            return Some((now.plus(TOLD_AHEAD), problem.clone()));
        }
        let trouble = self.trouble.as_ref()?;
        let left = trouble.next.saturating_duration_since(Instant::now());
        let blocked = trouble.probing || trouble.own == OwnAnswer::Out || !left.is_zero();
        blocked.then(|| (now.plus(left.max(TOLD_AHEAD)), trouble.reason.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::failure::{NO_CREDENTIAL, UNREACHABLE};

    const NOW: Timestamp = Timestamp(1_000_000_000);

    fn failure(status: u16) -> ApiFailure {
        ApiFailure {
            error_type: None,
            ..ApiFailure::own(status, "", "")
        }
    }

    fn refused(status: u16) -> Answer {
        Answer::Refused(failure(status))
    }

    fn pause_after(status: u16) -> Arc<Pause> {
        let pause = Arc::new(Pause::default());
        pause.failed(&failure(status), NOW);
        pause
    }

    /// Whether a run may begin; it ends at once.
    fn may_begin(pause: &Arc<Pause>) -> bool {
        pause.start(NOW).is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn runs_begin_one_at_a_time_after_growing_pauses_until_one_is_served() {
        let pause = pause_after(529);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert!(!may_begin(&pause));
            tokio::time::advance(Duration::from_secs(seconds)).await;
            let probe = pause.start(NOW).expect("the pause is over");
            assert!(!may_begin(&pause), "one at a time");
            // The run's three requests, and those of runs that began before, are one failure.
            for _ in 0..9 {
                pause.failed(&failure(529), NOW);
            }
            drop(probe);
        }

        tokio::time::advance(Duration::from_secs(30)).await;
        let probe = pause.start(NOW).unwrap();
        pause.served();
        assert!(may_begin(&pause), "all may, though the probe runs on");
        drop(probe);
        assert!(may_begin(&pause));
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_that_the_worker_sees_itself_ends_when_its_question_is_answered() {
        let pause = pause_after(503);
        pause.answered(&refused(503));
        tokio::time::advance(Duration::from_mins(10)).await;
        assert!(!may_begin(&pause), "no job is tried for nothing");
        assert_eq!(
            pause.due(),
            Due {
                ask: true,
                log: pause.current(NOW).map(|(_, reason)| reason),
                release: false
            }
        );
        assert_eq!(pause.due().log, None, "told once");

        pause.answered(&Answer::Good);

        let probe = pause.start(NOW).expect("at once");
        assert!(!may_begin(&pause), "one until it is served");
        assert_eq!(pause.current(NOW).map(|_| ()), Some(()));
        let due = pause.due();
        assert!(due.release && !due.ask);
        assert!(!pause.due().release, "once");
        pause.served();
        assert!(may_begin(&pause));
        drop(probe);
    }

    #[tokio::test(start_paused = true)]
    async fn a_good_answer_that_was_not_true_for_runs_isnt_believed_again() {
        let pause = pause_after(503);
        pause.answered(&refused(503));
        pause.answered(&Answer::Good);
        let probe = pause.start(NOW).unwrap();
        pause.failed(&failure(529), NOW);
        drop(probe);
        pause.due();

        pause.answered(&Answer::Good);

        assert!(!may_begin(&pause) && !pause.due().release);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(may_begin(&pause));
    }

    #[tokio::test(start_paused = true)]
    async fn a_good_answer_to_the_worker_alone_ends_nothing() {
        let pause = pause_after(529);
        pause.answered(&Answer::Good);
        assert!(!may_begin(&pause), "models may be listed while none can answer");
        assert!(!pause.due().release);

        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(may_begin(&pause));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_credential_is_tried_by_one_run_at_a_time() {
        let pause = Arc::new(Pause::default());
        pause.failed(&ApiFailure::own(401, NO_CREDENTIAL, "Log in."), NOW);
        pause.answered(&refused(401));
        assert!(!may_begin(&pause));

        tokio::time::advance(Duration::from_secs(1)).await;
        let probe = pause
            .start(NOW)
            .expect("the question may need more rights than a run");
        assert!(!may_begin(&pause));
        drop(probe);

        pause.answered(&Answer::Good);
        assert!(may_begin(&pause) && pause.due().release);
    }

    #[tokio::test(start_paused = true)]
    async fn the_api_says_how_long_the_next_run_waits_but_holds_up_nobody_for_an_hour() {
        for (asked, held) in [(20, 20), (3600, 60)] {
            let pause = Arc::new(Pause::default());
            let limited = ApiFailure {
                retry_after: Some(Duration::from_secs(asked)),
                ..failure(429)
            };
            pause.failed(&limited, NOW);
            tokio::time::advance(Duration::from_secs(held - 1)).await;
            assert!(!may_begin(&pause), "{asked}");
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(may_begin(&pause), "{asked}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_of_one_request_holds_nobody_up() {
        for status in [400, 413] {
            assert!(may_begin(&pause_after(status)), "{status}");
        }
        let pause = Arc::new(Pause::default());
        let model = ApiFailure::own(404, "not_found_error", "model: claude-x");
        pause.failed(&model, NOW);
        assert!(may_begin(&pause));
    }

    #[tokio::test(start_paused = true)]
    async fn a_usage_limit_holds_runs_until_its_reset_or_until_a_person_lifts_it() {
        let pause = Arc::new(Pause::default());
        let limit = |seconds| ApiFailure {
            usage_reset: Some(NOW.plus(Duration::from_secs(seconds))),
            ..failure(429)
        };
        pause.failed(&limit(600), NOW);
        pause.failed(&limit(300), NOW);
        pause.served();
        pause.answered(&Answer::Good);
        let later = |seconds| pause.start(NOW.plus(Duration::from_secs(seconds))).is_some();

        assert!(
            !later(599),
            "a shorter one doesn't end it, and neither does what was asked before"
        );
        assert!(later(600));
        tokio::time::advance(Duration::from_mins(10)).await;
        assert!(later(0), "also when the clock was set back");

        pause.failed(&limit(300), NOW);
        assert!(!may_begin(&pause));
        pause.lift();
        assert!(may_begin(&pause));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken_when_the_pause_ends() {
        let pause = Arc::new(Pause::default());
        pause.failed(&ApiFailure::own(502, UNREACHABLE, "refused"), NOW);
        pause.answered(&Answer::Refused(ApiFailure::own(502, UNREACHABLE, "refused")));
        let waiting = tokio::spawn({
            let pause = pause.clone();
            async move { pause.over().await }
        });
        tokio::time::sleep(Duration::from_mins(1)).await;
        assert!(!waiting.is_finished());
        let begin = Instant::now();

        pause.answered(&Answer::Good);
        waiting.await.unwrap();

        assert_eq!(begin.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn trouble_that_nobody_meets_any_more_is_forgotten() {
        let pause = pause_after(529);
        tokio::time::advance(Duration::from_mins(3)).await;
        pause.due();
        let first = pause.start(NOW);
        assert!(first.is_some() && may_begin(&pause), "any number at once");
    }

    #[test]
    fn no_room_is_news_once_and_ends_no_other_pause() {
        let pause = Arc::new(Pause::default());
        assert!(!pause.for_room(None), "there was room before");
        assert!(pause.for_room(Some("full")) && !pause.for_room(Some("still full")));
        assert_eq!(pause.current(NOW).unwrap().1, "still full");

        pause.failed(&failure(529), NOW);
        assert!(pause.for_room(None));
        assert!(pause.current(NOW).unwrap().1.contains("overloaded"));
    }
}
