//! What the Messages API answered when it refused a request: facts that the CLI's own output leaves out.

use http::HeaderMap;
use serde::Deserialize;

/// The longest `message` that is kept, in bytes.
const MAX_MESSAGE: usize = 2_000;

/// The type named in [`ApiFailure::error_type`] when the upstream gave no answer at all.
pub const UNREACHABLE: &str = "gateway_unreachable";

/// The type named in [`ApiFailure::error_type`] when the gateway itself has no usable credential.
pub const NO_CREDENTIAL: &str = "gateway_no_credential";

/// The last failed request of a run, as the gateway saw it. A later request that succeeds forgets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiFailure {
    /// The HTTP status that the CLI got; 502 with [`UNREACHABLE`], 401 with [`NO_CREDENTIAL`].
    pub status: u16,
    /// `error.type` of the body, e.g. `rate_limit_error`; absent when the body wasn't the API's JSON.
    pub error_type: Option<String>,
    /// The `retry-after` header in seconds, however large (the CLI hides values over 60).
    pub retry_after_seconds: Option<u64>,
    /// `anthropic-ratelimit-unified-reset`: when the usage limit of an account ends, in seconds since the epoch.
    pub unified_reset: Option<i64>,
    /// `error.message` of the body, at most 2,000 bytes; empty when there is none.
    pub message: String,
}

#[derive(Deserialize)]
struct Envelope {
    error: Detail,
}

#[derive(Deserialize)]
struct Detail {
    #[serde(rename = "type")]
    kind: Option<String>,
    message: Option<String>,
}

impl ApiFailure {
    /// Reads an answer with an error status. `body` may be cut: then only its status and headers count.
    pub fn read(status: u16, headers: &HeaderMap, body: &[u8]) -> Self {
        let detail = serde_json::from_slice::<Envelope>(body)
            .ok()
            .map(|envelope| envelope.error);
        let (error_type, message) = detail.map_or((None, None), |detail| (detail.kind, detail.message));
        let mut message = message.unwrap_or_default();
        message.truncate(message.floor_char_boundary(MAX_MESSAGE));
        Self {
            status,
            error_type,
            retry_after_seconds: number(headers, "retry-after")
                .and_then(|seconds| u64::try_from(seconds).ok()),
            unified_reset: number(headers, "anthropic-ratelimit-unified-reset"),
            message,
        }
    }
}

fn number(headers: &HeaderMap, name: &str) -> Option<i64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_api_is_read_from_body_and_headers() {
        let mut headers = HeaderMap::new();
        headers.insert("retry-after", "3600".parse().unwrap());
        headers.insert("anthropic-ratelimit-unified-reset", "1790000000".parse().unwrap());
        let body = br#"{"type":"error","error":{"type":"rate_limit_error","message":"Slow down"}}"#;

        let failure = ApiFailure::read(429, &headers, body);

        assert_eq!(failure.error_type.as_deref(), Some("rate_limit_error"));
        assert_eq!(failure.retry_after_seconds, Some(3600));
        assert_eq!(failure.unified_reset, Some(1_790_000_000));
        assert_eq!(failure.message, "Slow down");
    }

    #[test]
    fn a_page_of_a_proxy_is_a_failure_without_a_type() {
        let mut headers = HeaderMap::new();
        headers.insert("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT".parse().unwrap());

        let failure = ApiFailure::read(502, &headers, b"<html>Bad Gateway</html>");

        assert_eq!(failure.error_type, None);
        assert_eq!(failure.retry_after_seconds, None);
        assert_eq!(failure.message, "");
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let body = format!(r#"{{"error":{{"type":"x","message":"{}"}}}}"#, "é".repeat(3000));

        let failure = ApiFailure::read(400, &HeaderMap::new(), body.as_bytes());

        assert_eq!(failure.message.len(), MAX_MESSAGE);
    }
}
