//! `Retry-After` of an HTTP response.

use crate::clock::Timestamp;
use std::time::{Duration, UNIX_EPOCH};

/// How long `Retry-After` asks to wait: seconds, whole or not, or an HTTP date, which counts from the response's own
/// `Date` if it has one and from `now` otherwise. `None` if it is neither, or less than zero seconds.
pub fn parse(value: &str, date: Option<&str>, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    if let Some(seconds) = value.parse::<f64>().ok().filter(|seconds| seconds.is_finite()) {
        return Duration::try_from_secs_f64(seconds.min(1e9)).ok();
    }
    let at = http_date(value)?;
    Some(at.since(date.and_then(http_date).unwrap_or(now)))
}

fn http_date(text: &str) -> Option<Timestamp> {
    let since = httpdate::parse_http_date(text.trim())
        .ok()?
        .duration_since(UNIX_EPOCH)
        .ok()?;
    Some(Timestamp(0).plus(since))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wed, 21 Oct 2026 07:28:00 GMT.
    const NOW: Timestamp = Timestamp(1_792_567_680_000_000);

    #[test]
    fn seconds_and_dates_are_read() {
        for (value, date, seconds) in [
            ("90", None, Some(90.0)),
            (" 90.5 ", None, Some(90.5)),
            ("1e300", None, Some(1e9)),
            ("Wed, 21 Oct 2026 07:29:30 GMT", None, Some(90.0)),
            ("Wednesday, 21-Oct-26 07:29:30 GMT", None, Some(90.0)),
            ("Wed Oct 21 07:29:30 2026", None, Some(90.0)),
            (
                "Wed, 21 Oct 2026 09:00:10 GMT",
                Some("Wed, 21 Oct 2026 09:00:00 GMT"),
                Some(10.0),
            ),
            ("Wed, 21 Oct 2026 07:29:30 GMT", Some("today"), Some(90.0)),
            ("Wed, 21 Oct 2026 07:00:00 GMT", None, Some(0.0)),
            ("-5", None, None),
            ("soon", None, None),
            ("NaN", None, None),
            ("inf", None, None),
            ("", None, None),
        ] {
            assert_eq!(
                parse(value, date, NOW),
                seconds.map(Duration::from_secs_f64),
                "{value}"
            );
        }
    }
}
