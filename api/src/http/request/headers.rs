//! What the headers of a request say.

use http::{HeaderMap, header};
use std::time::Duration;

/// The client's `X-Request-ID` when it is harmless, else 16 hex digits.
pub fn request_id(headers: &HeaderMap) -> String {
    let harmless = |id: &&str| {
        (1..=128).contains(&id.len())
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    match text(headers, "x-request-id").filter(harmless) {
        Some(id) => id.to_owned(),
        None => shared::key::hex(&uuid::Uuid::new_v4().into_bytes()[..8]),
    }
}

/// The value of a header that is text.
pub fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// Whether the body is JSON by its `Content-Type`; none counts as JSON.
pub fn says_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return true;
    };
    let Ok(value) = value.to_str() else { return false };
    let essence = value
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// Whether the body is sent as it is, not compressed.
pub fn is_plain(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::CONTENT_ENCODING)
        .iter()
        .all(|value| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity"))
}

/// What `Prefer` (RFC 7240) asks for; what we don't know is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Preferences {
    /// `wait=N`, in seconds.
    pub wait: Option<u64>,
    /// `return=minimal`.
    pub minimal: bool,
    /// `respond-async`.
    pub respond_async: bool,
}

impl Preferences {
    /// Reads all `Prefer` headers; the first of a repeated preference counts.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut preferences = Self::default();
        let values = headers
            .get_all("prefer")
            .iter()
            .filter_map(|value| value.to_str().ok());
        for preference in values.flat_map(|value| value.split(',')) {
            // What follows a semicolon are parameters, of which none is ours.
            let preference = preference.split(';').next().unwrap_or_default();
            let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "wait" if preferences.wait.is_none() => preferences.wait = value.parse().ok(),
                "respond-async" => preferences.respond_async = true,
                "return" => preferences.minimal |= value.eq_ignore_ascii_case("minimal"),
                _ => {}
            }
        }
        preferences
    }
}

/// The key of `Idempotency-Key`: `Ok(None)` without the header, `Err` when it isn't 1 to 255 visible characters.
/// The draft says that it stands in quotes, clients send it bare: both do.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, &'static str> {
    const WRONG: &str = "Idempotency-Key must be 1 to 255 visible ASCII characters";
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.any(|other| other != value) {
        return Err("There are two different Idempotency-Key headers; send one");
    }
    let value = value.to_str().map_err(|_| WRONG)?.trim();
    let quoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
    let key = quoted.unwrap_or(value);
    let fits = (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
    if fits { Ok(Some(key)) } else { Err(WRONG) }
}

/// `Cancel-After`: a number of seconds, or one with `s`, `m` or `h`. `Err` when it's neither, or beyond a week.
pub fn cancel_after(headers: &HeaderMap) -> Result<Option<Duration>, &'static str> {
    const WRONG: &str = "Cancel-After must be 1s to 604800s, such as 30s, 5m or 1h";
    let mut values = headers.get_all("cancel-after").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.any(|other| other != value) {
        return Err("There are two different Cancel-After headers; send one");
    }
    let value = value.to_str().map_err(|_| WRONG)?.trim();
    let (digits, factor) = match value.as_bytes().last() {
        Some(b's') => (&value[..value.len() - 1], 1),
        Some(b'm') => (&value[..value.len() - 1], 60),
        Some(b'h') => (&value[..value.len() - 1], 3_600),
        _ => (value, 1),
    };
    let seconds = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor));
    match seconds.filter(|seconds| (1..=604_800).contains(seconds)) {
        Some(seconds) => Ok(Some(Duration::from_secs(seconds))),
        None => Err(WRONG),
    }
}

/// The version that the client has, if `If-None-Match` names a single tag of ours.
pub fn known_version(headers: &HeaderMap) -> Option<i64> {
    let value = text(headers, header::IF_NONE_MATCH.as_str())?.trim();
    let tag = value.strip_prefix("W/").unwrap_or(value);
    let number = tag.strip_prefix('"')?.strip_suffix('"')?;
    let version = number.parse::<i64>().ok()?;
    (version.to_string() == number).then_some(version)
}

/// Whether `If-None-Match` names this tag, or any. Weak and strong tags compare alike.
pub fn matches_etag(headers: &HeaderMap, etag: &str) -> bool {
    let mut values = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values.any(|value| names_etag(value, etag))
}

/// Whether a list of tags, as `If-Match` and `If-None-Match` have it, names this one, or any.
pub fn names_etag(tags: &str, etag: &str) -> bool {
    let strip = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    tags.split(',')
        .any(|tag| tag.trim() == "*" || strip(tag) == strip(etag))
}

/// How events are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventForm {
    /// `text/event-stream`.
    Stream,
    /// One JSON list.
    List,
}

/// What `Accept` wants of the events of a job; `None` when it allows neither form. JSON unless the stream is asked
/// for by name.
pub fn event_form(headers: &HeaderMap) -> Option<EventForm> {
    let mut any = false;
    let mut list = false;
    for value in headers.get_all(header::ACCEPT) {
        let Ok(value) = value.to_str() else { continue };
        for range in value.split(',') {
            any = true;
            let mut parts = range.split(';').map(str::trim);
            let essence = parts.next().unwrap_or_default().to_ascii_lowercase();
            if parts.any(|parameter| parameter == "q=0") {
                continue;
            }
            match essence.as_str() {
                "text/event-stream" => return Some(EventForm::Stream),
                "application/json" | "application/*" | "*/*" => list = true,
                _ => {}
            }
        }
    }
    (list || !any).then_some(EventForm::List)
}

/// Whether `Accept` names plain text before JSON.
pub fn wants_plain_text(headers: &HeaderMap) -> bool {
    prefers(headers, "text/plain")
}

/// Whether `Accept` names this form before JSON.
pub fn prefers(headers: &HeaderMap, form: &str) -> bool {
    let accept = text(headers, "accept").unwrap_or_default().to_ascii_lowercase();
    let first = |wanted: &str| {
        accept
            .split(',')
            .position(|range| range.trim().starts_with(wanted))
    };
    match (first(form), first("application/json")) {
        (Some(form), Some(json)) => form < json,
        (form, _) => form.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers<const N: usize>(pairs: [(&'static str, &'static str); N]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn a_harmless_request_id_is_kept_and_another_replaced() {
        assert_eq!(request_id(&headers([("x-request-id", "a-b_c.1")])), "a-b_c.1");
        for odd in ["", "a b", "<script>", "x\"y"] {
            let own = request_id(&headers([("x-request-id", odd)]));
            assert_eq!(own.len(), 16, "{odd}");
            assert!(own.bytes().all(|byte| byte.is_ascii_hexdigit()));
        }
    }

    #[test]
    fn preferences_are_read_from_one_header_or_many() {
        let one = Preferences::of(&headers([(
            "prefer",
            "wait=10, return=minimal; x=y, handling=lenient",
        )]));
        let many = Preferences::of(&headers([
            ("prefer", "Wait = \"10\""),
            ("prefer", "return=minimal"),
            ("prefer", "wait=3"),
        ]));
        assert_eq!(
            one,
            Preferences {
                wait: Some(10),
                respond_async: false,
                minimal: true
            }
        );
        assert_eq!(one, many);
        assert_eq!(
            Preferences::of(&headers([("prefer", "wait=soon")])),
            Preferences::default()
        );
    }

    #[test]
    fn idempotency_keys_come_bare_or_in_quotes() {
        for (value, key) in [("abc", "abc"), ("\"abc\"", "abc"), ("a\"b", "a\"b")] {
            assert_eq!(
                idempotency_key(&headers([("idempotency-key", value)])),
                Ok(Some(key))
            );
        }
        for value in ["", "\"\"", "a b"] {
            assert!(
                idempotency_key(&headers([("idempotency-key", value)])).is_err(),
                "{value:?}"
            );
        }
        let long = HeaderValue::from_str(&"k".repeat(256)).unwrap();
        assert!(
            idempotency_key(&HeaderMap::from_iter([(
                "idempotency-key".parse().unwrap(),
                long
            )]))
            .is_err()
        );
        assert_eq!(idempotency_key(&HeaderMap::new()), Ok(None));
        let twice = |other| headers([("idempotency-key", "a"), ("idempotency-key", other)]);
        assert_eq!(idempotency_key(&twice("a")), Ok(Some("a")));
        assert!(idempotency_key(&twice("b")).is_err());
    }

    #[test]
    fn cancel_after_has_a_unit_and_a_limit() {
        for (value, seconds) in [
            ("30s", 30),
            ("5m", 300),
            ("1h", 3_600),
            ("45", 45),
            ("604800s", 604_800),
        ] {
            assert_eq!(
                cancel_after(&headers([("cancel-after", value)])),
                Ok(Some(Duration::from_secs(seconds)))
            );
        }
        for value in [
            "",
            "0s",
            "s",
            "-1s",
            "1d",
            "604801",
            "169h",
            "99999999999999999999h",
        ] {
            assert!(
                cancel_after(&headers([("cancel-after", value)])).is_err(),
                "{value:?}"
            );
        }
    }

    #[test]
    fn etags_compare_weakly() {
        let tag = "W/\"3\"";
        for value in ["W/\"3\"", "\"3\"", "*", "\"1\", W/\"3\""] {
            assert!(matches_etag(&headers([("if-none-match", value)]), tag), "{value}");
        }
        for value in ["W/\"4\"", "3x", ""] {
            assert!(
                !matches_etag(&headers([("if-none-match", value)]), tag),
                "{value}"
            );
        }
    }

    #[test]
    fn events_are_a_stream_only_when_asked_for_by_name() {
        for (value, form) in [
            ("text/event-stream", Some(EventForm::Stream)),
            ("application/json, text/event-stream", Some(EventForm::Stream)),
            ("text/event-stream;q=0, */*", Some(EventForm::List)),
            ("*/*", Some(EventForm::List)),
            ("application/json", Some(EventForm::List)),
            ("text/html", None),
        ] {
            assert_eq!(event_form(&headers([("accept", value)])), form, "{value}");
        }
        assert_eq!(event_form(&HeaderMap::new()), Some(EventForm::List));
    }

    #[test]
    fn plain_text_is_sent_to_who_prefers_it() {
        assert!(wants_plain_text(&headers([("accept", "text/plain")])));
        assert!(!wants_plain_text(&headers([(
            "accept",
            "application/json, text/plain"
        )])));
        assert!(!wants_plain_text(&headers([("accept", "*/*")])));
    }

    #[test]
    fn no_content_type_counts_as_json() {
        assert!(says_json(&HeaderMap::new()));
        assert!(says_json(&headers([(
            "content-type",
            "application/json; charset=utf-8"
        )])));
        assert!(says_json(&headers([(
            "content-type",
            "application/problem+json"
        )])));
        assert!(!says_json(&headers([("content-type", "text/plain")])));
        assert!(!says_json(&headers([(
            "content-type",
            "application/x-www-form-urlencoded"
        )])));
    }
}
