//! The only clock. Times have microseconds, in UTC.

use crate::env::Vars;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

/// A point in time: microseconds since 1970-01-01T00:00:00Z.
///
/// In both databases it is a 64-bit integer, so stored times are compared as integers. In JSON it is RFC 3339 in UTC
/// with microseconds and the offset `+00:00`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, sqlx::Type)]
#[sqlx(transparent)]
pub struct Timestamp(pub i64);

/// The file with the clock's offset, in tests.
static OFFSET_FILE: OnceLock<PathBuf> = OnceLock::new();

/// Lets tests change the clock: `CLAUDE_QUEUE_CLOCK_OFFSET_FILE` names a file with the whole seconds, with or without a
/// sign, by which this process's clock is ahead of the machine's. The file is read for each reading of the clock. A
/// missing file or other content means 0. For tests only. Call it once, first; later calls have no effect.
pub fn start(vars: &Vars) {
    if let Some(path) = vars.unlisted("CLAUDE_QUEUE_CLOCK_OFFSET_FILE") {
        tracing::warn!("the clock is set by CLAUDE_QUEUE_CLOCK_OFFSET_FILE, which is for tests only");
        let _ = OFFSET_FILE.set(PathBuf::from(path));
    }
}

/// The current time of this machine. Only times that people see, deadlines and `run_after` depend on it, to the second;
/// leases don't.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place that asks the system for the time"
)]
pub fn now() -> Timestamp {
    let now = Timestamp(Utc::now().timestamp_micros());
    OFFSET_FILE.get().map_or(now, |file| now.shifted(offset_in(file)))
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
