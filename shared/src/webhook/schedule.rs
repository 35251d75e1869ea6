//! When a failed delivery is tried again.

use crate::env::{Error, Vars};
use std::time::Duration;

/// The variable, its default, and its bounds.
const VARIABLE: &str = "WEBHOOK_RETRY_SCHEDULE";
const DEFAULT: &str = "5,300,1800,7200,18000,36000,50400,72000,86400";
const MOST: usize = 20;
const LONGEST: u64 = 604_800;

/// The shortest wait for a receiver that is overloaded: after a timeout, or when it says so.
const OVERLOADED: Duration = Duration::from_mins(1);

/// By which part of itself a wait may differ, so that deliveries that failed together don't come back together.
const JITTER: f64 = 0.2;

/// The waits between the attempts of a delivery. The first attempt is immediate and isn't part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule(Vec<Duration>);

impl Default for Schedule {
    fn default() -> Self {
        Self::parse(DEFAULT).expect("the default is valid")
    }
}

/// How an attempt failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// The status of the response; `None` if there was none.
    pub status: Option<u16>,
    /// Whether the time ran out.
    pub timed_out: bool,
    /// How long the response asked to wait (`Retry-After`). It counts with status 429 and 5xx.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// Whether the receiver said that it is gone for good (410): its endpoint should be disabled.
    pub fn is_gone(&self) -> bool {
        self.status == Some(410)
    }
}

impl Schedule {
    /// `WEBHOOK_RETRY_SCHEDULE`: 1 to 20 waits in seconds, each 1 to 604,800, with commas between them.
    pub fn from_vars(vars: &Vars) -> Result<Self, Error> {
        let text = vars.or(VARIABLE, DEFAULT)?;
        Self::parse(&text).ok_or_else(|| {
            Error::new(
                VARIABLE,
                "isn't a list of waits",
                format!("1 to {MOST} whole seconds from 1 to {LONGEST}, with commas between them"),
            )
        })
    }

    /// The same from the text. `None` if it isn't valid.
    pub fn parse(text: &str) -> Option<Self> {
        let waits = text
            .split(',')
            .map(|wait| {
                let seconds: u64 = wait.trim().parse().ok()?;
                (1..=LONGEST)
                    .contains(&seconds)
                    .then(|| Duration::from_secs(seconds))
            })
            .collect::<Option<Vec<_>>>()?;
        (waits.len() <= MOST).then_some(Self(waits))
    }

    /// How many attempts a delivery gets, the first included.
    pub fn attempts(&self) -> usize {
        self.0.len() + 1
    }

    /// How long to wait before the next attempt; `None` if there is none, because the waits are used up or the receiver
    /// is gone. `made` is the number of attempts so far, the failed one included. `random` is from 0 to 1.
    ///
    /// A wait is that of the schedule ±20 %, and at least a minute after a timeout or 429. What the receiver asks for
    /// counts from the wait of the schedule up to twice of it, so that no receiver can put a delivery off for years.
    pub fn next(&self, made: usize, failure: &Failure, random: f64) -> Option<Duration> {
        if failure.is_gone() {
            return None;
        }
        let Some(index) = made.checked_sub(1) else {
            return Some(Duration::ZERO);
        };
        let scheduled = *self.0.get(index)?;
        let least = if failure.timed_out || failure.status == Some(429) {
            OVERLOADED
        } else {
            Duration::ZERO
        };
        let base = scheduled.max(least);
        let wait = base
            .mul_f64(1.0 - JITTER + 2.0 * JITTER * random.clamp(0.0, 1.0))
            .max(least);
        let heeds = failure
            .status
            .is_some_and(|status| status == 429 || status >= 500);
        let asked = failure.retry_after.filter(|_| heeds);
        Some(asked.map_or(wait, |asked| wait.max(asked.clamp(base, base * 2))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Failure = Failure {
        status: Some(500),
        timed_out: false,
        retry_after: None,
    };

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_default_takes_more_than_three_days() {
        let schedule = Schedule::from_vars(&Vars::of([])).unwrap();
        assert_eq!(schedule, Schedule::default());
        assert_eq!(schedule.attempts(), 10);
        assert_eq!(schedule.0.iter().sum::<Duration>(), secs(272_105));
    }

    #[test]
    fn a_schedule_has_1_to_20_waits_of_1_second_to_a_week() {
        for text in ["1", "604800", " 5 , 10 ", &["1"; 20].join(",")] {
            assert!(Schedule::parse(text).is_some(), "{text}");
        }
        for text in [
            "",
            ",",
            "5,",
            "0",
            "604801",
            "-5",
            "1.5",
            "5s",
            "5 10",
            &["1"; 21].join(","),
        ] {
            assert!(Schedule::parse(text).is_none(), "{text}");
        }
        let error = Schedule::from_vars(&Vars::of([(VARIABLE, "0")])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "WEBHOOK_RETRY_SCHEDULE isn't a list of waits; accepted: 1 to 20 whole seconds from 1 to 604800, with \
             commas between them"
        );
    }

    #[test]
    fn waits_differ_by_a_fifth() {
        let schedule = Schedule::parse("100,1000").unwrap();
        for (made, random, wait) in [
            (0, 0.5, Some(secs(0))),
            (1, 0.0, Some(secs(80))),
            (1, 0.5, Some(secs(100))),
            (1, 1.0, Some(secs(120))),
            (2, 0.5, Some(secs(1_000))),
            (3, 0.5, None),
            (usize::MAX, 0.5, None),
        ] {
            let found = schedule.next(made, &PLAIN, random);
            assert_eq!(
                found.map(|wait| wait.as_secs_f64().round()),
                wait.map(|wait| wait.as_secs_f64()),
                "{made}"
            );
        }
    }

    #[test]
    fn an_overloaded_receiver_gets_a_minute() {
        let schedule = Schedule::parse("5,1000").unwrap();
        let timed_out = Failure {
            status: None,
            timed_out: true,
            retry_after: None,
        };
        let limited = Failure {
            status: Some(429),
            ..PLAIN
        };
        for failure in [timed_out, limited] {
            assert_eq!(schedule.next(1, &failure, 0.0), Some(secs(60)));
            assert_eq!(schedule.next(1, &failure, 1.0), Some(secs(72)));
            assert_eq!(schedule.next(2, &failure, 0.0), Some(secs(800)));
        }
        assert_eq!(schedule.next(1, &PLAIN, 0.0), Some(secs(4)));
    }

    #[test]
    fn what_the_receiver_asks_for_counts_up_to_twice_the_wait() {
        let schedule = Schedule::parse("100,5").unwrap();
        let asks = |status, seconds| Failure {
            status: Some(status),
            timed_out: false,
            retry_after: Some(secs(seconds)),
        };
        for (made, failure, random, wait) in [
            (1, asks(503, 0), 0.0, 100),
            (1, asks(503, 0), 1.0, 120),
            (1, asks(503, 150), 0.0, 150),
            (1, asks(503, 150), 1.0, 150),
            (1, asks(503, 31_536_000), 0.5, 200),
            (1, asks(429, 150), 0.5, 150),
            (1, asks(404, 150), 0.0, 80),
            (2, asks(429, 1), 0.0, 60),
            (2, asks(429, 90), 0.0, 90),
            (2, asks(429, 900), 0.0, 120),
            (2, asks(500, 900), 0.0, 10),
        ] {
            assert_eq!(
                schedule.next(made, &failure, random),
                Some(secs(wait)),
                "{failure:?}"
            );
        }
    }

    #[test]
    fn a_receiver_that_is_gone_gets_no_more() {
        let gone = Failure {
            status: Some(410),
            ..PLAIN
        };
        assert!(gone.is_gone() && !PLAIN.is_gone());
        assert_eq!(Schedule::default().next(1, &gone, 0.5), None);
    }
}
