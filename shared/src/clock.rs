//! The only clock. Times have microseconds, in UTC.

use crate::env::Vars;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

/// A point in time: microseconds since 1970-01-01T00:00:00Z.
///
/// In both databases it is a 64-bit integer, so stored times are compared as integers. In JSON it is RFC 3339 in UTC
/// with microseconds and the offset `+00:00`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, sqlx::Type)]
#[sqlx(transparent)]
pub struct Timestamp(pub i64);

/// The file with the clock's offset, in tests; and the one with the offset of the database's time.
static OFFSET_FILE: OnceLock<PathBuf> = OnceLock::new();
static DATABASE_OFFSET_FILE: OnceLock<PathBuf> = OnceLock::new();

/// By how many microseconds this machine's clock is ahead of the database's; 0 when they agree.
static AHEAD: AtomicI64 = AtomicI64::new(0);

/// Clocks that differ by no more than this agree.
const TOLERANCE: Duration = Duration::from_secs(10);

/// Lets tests change the clock: `CLAUDE_QUEUE_CLOCK_OFFSET_FILE` names a file with the whole seconds, with or without a
/// sign, by which this process's clock is ahead of the machine's. The file is read for each reading of the clock. A
/// missing file or other content means 0. `CLAUDE_QUEUE_DATABASE_CLOCK_OFFSET_FILE` does the same to what this process
/// reads as the database's time. For tests only. Call it once, first; later calls have no effect.
pub fn start(vars: &Vars) {
    if let Some(path) = vars.unlisted("CLAUDE_QUEUE_CLOCK_OFFSET_FILE") {
        tracing::warn!("the clock is set by CLAUDE_QUEUE_CLOCK_OFFSET_FILE, which is for tests only");
        let _ = OFFSET_FILE.set(PathBuf::from(path));
    }
    if let Some(path) = vars.unlisted("CLAUDE_QUEUE_DATABASE_CLOCK_OFFSET_FILE") {
        let _ = DATABASE_OFFSET_FILE.set(PathBuf::from(path));
    }
}

/// The current time, of this machine; of the database while this machine's differs by more than 10 s, as far as that is
/// known ([`compare`]). Only times that people see, deadlines, `run_after`, budget periods and retention depend on it, to
/// the second; leases don't.
pub fn now() -> Timestamp {
    Timestamp(local().0.saturating_sub(AHEAD.load(Ordering::Relaxed)))
}

/// The current time of this machine, right or wrong.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place that asks the system for the time"
)]
pub(crate) fn local() -> Timestamp {
    let now = Timestamp(Utc::now().timestamp_micros());
    OFFSET_FILE.get().map_or(now, |file| now.shifted(offset_in(file)))
}

/// By how many seconds this machine's clock is ahead of the database's, negative if it is behind; `None` when they agree.
pub fn ahead() -> Option<i64> {
    let ahead = AHEAD.load(Ordering::Relaxed);
    (ahead != 0).then_some(ahead / 1_000_000)
}

/// Compares this machine's clock, as it was `before` and `after`, with the database's, as it was in between. While they
/// differ, [`now`] follows the database's.
pub(crate) fn compare(before: Timestamp, database: Timestamp, after: Timestamp) {
    let database = DATABASE_OFFSET_FILE
        .get()
        .map_or(database, |file| database.shifted(offset_in(file)));
    let now = difference(before, database, after);
    let known = AHEAD.swap(now, Ordering::Relaxed);
    if now != 0 && known == 0 {
        tracing::error!(
            ahead_seconds = now / 1_000_000,
            "this machine's clock differs from the database's; it decides nothing until it is right"
        );
    } else if now == 0 && known != 0 {
        tracing::info!("this machine's clock agrees with the database's again");
    }
}

/// The microseconds by which a clock is ahead for certain, 0 within the tolerance.
fn difference(before: Timestamp, database: Timestamp, after: Timestamp) -> i64 {
    if before > database.plus(TOLERANCE) {
        before.0 - database.0
    } else if after < database.before(TOLERANCE) {
        after.0 - database.0
    } else {
        0
    }
}

/// The seconds in the file.
fn offset_in(file: &Path) -> i64 {
    std::fs::read_to_string(file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

impl Timestamp {
    /// Parses RFC 3339 with any offset; `None` if the text isn't that.
    pub fn parse(text: &str) -> Option<Self> {
        DateTime::parse_from_rfc3339(text)
            .ok()
            .map(|at| Self(at.timestamp_micros()))
    }

    /// Whole seconds since the epoch, rounded down.
    pub const fn unix_seconds(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// This time plus `duration`. Saturates at the maximum.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }

    /// This time minus `duration`. Saturates at the minimum.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }

    fn shifted(self, seconds: i64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1_000_000)))
    }

    /// The time from `earlier` to this, or zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// Converts to chrono's type. Times outside chrono's range become the epoch.
    pub fn to_utc(self) -> DateTime<Utc> {
        DateTime::from_timestamp_micros(self.0).unwrap_or_default()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_utc().to_rfc3339_opts(SecondsFormat::Micros, false))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("not an RFC 3339 time"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_the_old_clients_parse_it() {
        let time = Timestamp(1_779_278_400_123_456);
        assert_eq!(time.to_string(), "2026-05-20T12:00:00.123456+00:00");
        assert_eq!(Timestamp::parse(&time.to_string()), Some(time));
        assert_eq!(Timestamp::parse("2026-05-20T14:00:00.123456+02:00"), Some(time));
        assert_eq!(Timestamp::parse("yesterday"), None);
    }

    #[test]
    fn clocks_agree_within_ten_seconds_and_the_time_that_asking_took() {
        let at = |seconds: i64| Timestamp(seconds * 1_000_000);
        for (before, database, after, ahead) in [
            (100, 100, 100, 0),
            (110, 100, 111, 0),
            (111, 100, 112, 11),
            (80, 100, 89, -11),
            (80, 100, 95, 0),
        ] {
            let seconds = difference(at(before), at(database), at(after)) / 1_000_000;
            assert_eq!(seconds, ahead, "{before} {database} {after}");
        }
    }

    #[test]
    fn a_file_steps_the_clock_forward_and_back() {
        let file = std::env::temp_dir().join(format!("claude-queue-clock-{}", std::process::id()));
        assert_eq!(offset_in(&file), 0, "no file");
        for (text, seconds) in [
            ("3600\n", 3600),
            ("-3600", -3600),
            ("+5 ", 5),
            ("soon", 0),
            ("", 0),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(offset_in(&file), seconds, "{text:?}");
        }
        std::fs::remove_file(&file).unwrap();
        assert_eq!(Timestamp(7).shifted(-1), Timestamp(-999_993));
    }
}
