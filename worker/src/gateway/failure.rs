//! What the Messages API answered when it refused a request: facts that the CLI's own output leaves out, and what they
//! mean for the worker's account.

use std::time::Duration;

use http::{HeaderMap, header};
use serde::Deserialize;
use shared::clock::Timestamp;

use crate::sentence::excerpt;

/// The longest `message` that is kept, in bytes.
const MAX_MESSAGE: usize = 2_000;

/// The longest `retry-after` that is believed.
const LONGEST_RETRY_AFTER: Duration = Duration::from_hours(24);

/// The furthest reset of a usage limit that is believed: a week, and a day for clocks.
const FURTHEST_RESET: Duration = Duration::from_hours(8 * 24);

/// The wait for a usage limit whose end isn't known or has passed.
const UNKNOWN_RESET: Duration = Duration::from_mins(5);

/// The type named in [`ApiFailure::error_type`] when the upstream gave no answer at all.
pub const UNREACHABLE: &str = "gateway_unreachable";

/// The type named in [`ApiFailure::error_type`] when the gateway itself has no usable credential.
pub const NO_CREDENTIAL: &str = "gateway_no_credential";

/// The type named in [`ApiFailure::error_type`] when a success isn't the Messages API's: a page, most likely.
pub const NOT_THE_API: &str = "gateway_not_the_api";

/// How the API begins to say that it refuses a credential, rather than what is asked with it.
const REFUSALS: [&str; 10] = [
    "oauth",
    "token",
    "this token",
    "this credential",
    "api key",
    "invalid api key",
    "your api key",
    "organization",
    "this organization",
    "your organization",
];

/// The last failed request of a run, as the gateway saw it. A later request that succeeds forgets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiFailure {
    /// The HTTP status that the CLI got; 502 with [`UNREACHABLE`], 401 with [`NO_CREDENTIAL`].
    pub status: u16,
    /// `error.type` of the body, e.g. `rate_limit_error`; absent when the body wasn't the API's JSON.
    pub error_type: Option<String>,
    /// How long the API wants not to be asked again: `retry-after`, or the reset of a limit that is used up. At most a
    /// day.
    pub retry_after: Option<Duration>,
    /// When the usage limit of the account ends, if this is one. At most eight days ahead.
    pub usage_reset: Option<Timestamp>,
    /// `error.message` of the body, at most 2,000 bytes; empty when there is none.
    pub message: String,
}

/// What a failed request means for all runs of the account. A failure that only says something about its own request
/// has no cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The account's plan is used up until a known time.
    UsageLimit,
    /// The credential is missing or was refused.
    Refused,
    /// The account can't pay.
    Billing,
    /// The API limits the account's requests.
    RateLimited,
    /// The API is overloaded.
    Overloaded,
    /// The API failed.
    Unavailable,
    /// Nothing answers.
    Unreachable,
    /// What answers doesn't know the path of the Messages API: the address is wrong.
    NoRoute,
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
    /// Reads an answer with an error status that came at `now`. `body` may be cut: then only its status and headers
    /// count.
    pub fn read(status: u16, headers: &HeaderMap, body: &[u8], now: Timestamp) -> Self {
        let detail = serde_json::from_slice::<Envelope>(body)
            .ok()
            .map(|envelope| envelope.error);
        let (error_type, message) = detail.map_or((None, None), |detail| (detail.kind, detail.message));
        let mut message = message.unwrap_or_default();
        message.truncate(message.floor_char_boundary(MAX_MESSAGE));
        Self {
            status,
            error_type,
            retry_after: retry_after(headers, now)
                .or_else(|| (status == 429).then(|| limit_reset(headers, now)).flatten())
                .map(|wait| wait.min(LONGEST_RETRY_AFTER)),
            usage_reset: (status == 429).then(|| usage_reset(headers, now)).flatten(),
            message,
        }
    }

    /// A failure of the gateway's own.
    pub fn own(status: u16, error_type: &str, message: &str) -> Self {
        Self {
            status,
            error_type: Some(error_type.to_owned()),
            retry_after: None,
            usage_reset: None,
            message: message.to_owned(),
        }
    }

    /// What it means for the account; `None` when it says something about this request alone.
    pub fn cause(&self) -> Option<Cause> {
        let kind = self.error_type.as_deref().unwrap_or_default();
        // An error repeats parts of its request, which a run has made up, but never at its beginning.
        let begins = |words: &[&str]| {
            let message = self.message.to_lowercase();
            words.iter().any(|word| message.starts_with(word))
        };
        match kind {
            UNREACHABLE => return Some(Cause::Unreachable),
            NO_CREDENTIAL => return Some(Cause::Refused),
            NOT_THE_API => return Some(Cause::NoRoute),
            "billing_error" => return Some(Cause::Billing),
            "overloaded_error" => return Some(Cause::Overloaded),
            _ => {}
        }
        match self.status {
            429 if self.usage_reset.is_some() => Some(Cause::UsageLimit),
            429 => Some(Cause::RateLimited),
            529 => Some(Cause::Overloaded),
            401 => Some(Cause::Refused),
            402 => Some(Cause::Billing),
            // A permission that this request lacks, for instance to a model, is no fault of the credential.
            403 if kind.is_empty() || kind == "authentication_error" => Some(Cause::Refused),
            403 if begins(&REFUSALS) => Some(Cause::Refused),
            400 if begins(&["your credit balance is too low", "credit balance is too low"]) => {
                Some(Cause::Billing)
            }
            400 if begins(&[
                "this organization has been disabled",
                "your organization has been disabled",
            ]) =>
            {
                Some(Cause::Refused)
            }
            404 if self.is_about_the_model() => None,
            300..=399 | 404 | 405 => Some(Cause::NoRoute),
            408 | 409 | 500.. => Some(Cause::Unavailable),
            _ => None,
        }
    }

    /// Why runs have to wait, and what a person can do about it, in two sentences.
    pub fn reason(&self, cause: Cause) -> String {
        let (problem, advice) = match cause {
            Cause::UsageLimit => (
                "The Anthropic account has used up what its plan allows for now",
                "Runs begin again when the limit is reset.",
            ),
            Cause::Refused => (
                "The worker's Anthropic credential is missing or was refused",
                "Give the worker a valid one.",
            ),
            Cause::Billing => (
                "The Anthropic account can't pay for requests",
                "Add credit or settle the account's billing.",
            ),
            Cause::RateLimited => (
                "The Messages API limits the account's requests",
                "Runs begin one at a time until it serves them again.",
            ),
            Cause::Overloaded => (
                "The Messages API is overloaded",
                "Runs begin one at a time until it serves them again.",
            ),
            Cause::Unavailable => (
                "The Messages API fails",
                "Runs begin one at a time until it serves them again.",
            ),
            Cause::Unreachable => (
                "The Messages API can't be reached",
                "Check the worker's connection and ANTHROPIC_BASE_URL.",
            ),
            Cause::NoRoute => (
                "What answers at ANTHROPIC_BASE_URL isn't the Messages API",
                "Correct ANTHROPIC_BASE_URL in the worker's settings.",
            ),
        };
        let said = excerpt(&self.message);
        let said = match (cause, said.as_str()) {
            (Cause::Unreachable, said) if !said.is_empty() => said.to_owned(),
            (_, "") => self.status.to_string(),
            (_, said) => format!("{}: {said}", self.status),
        };
        format!("{problem} ({said}). {advice}")
    }

    /// Whether a 404 is the API's word on the model that was asked for, which a provider may call a deployment; any
    /// other 404 comes from a wrong address.
    fn is_about_the_model(&self) -> bool {
        let message = self.message.to_lowercase();
        message.contains("model") || message.contains("deployment")
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    Some(headers.get(name)?.to_str().ok()?.trim())
}

/// `retry-after`, as far as it can be read.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let value = text(headers, header::RETRY_AFTER.as_str())?;
    shared::retry_after::parse(value, text(headers, header::DATE.as_str()), now)
}

/// When the last of the limits that are used up is reset.
fn limit_reset(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    ["requests", "tokens", "input-tokens", "output-tokens"]
        .iter()
        .filter(|limit| text(headers, &format!("anthropic-ratelimit-{limit}-remaining")) == Some("0"))
        .filter_map(|limit| Timestamp::parse(text(headers, &format!("anthropic-ratelimit-{limit}-reset"))?))
        .max()
        .map(|reset| reset.since(now))
}

/// When the account's usage limit ends, if that is what the answer is about.
fn usage_reset(headers: &HeaderMap, now: Timestamp) -> Option<Timestamp> {
    let rejected = text(headers, "anthropic-ratelimit-unified-status").map(|status| status == "rejected");
    let reset =
        text(headers, "anthropic-ratelimit-unified-reset").and_then(|reset| reset.parse::<i64>().ok());
    if !rejected.unwrap_or(reset.is_some()) {
        return None;
    }
    let reset = reset.map_or(now, |seconds| Timestamp(seconds.saturating_mul(1_000_000)));
    Some(if reset <= now {
        now.plus(UNKNOWN_RESET)
    } else {
        reset.min(now.plus(FURTHEST_RESET))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wed, 21 Oct 2026 07:28:00 GMT.
    const NOW: Timestamp = Timestamp(1_792_567_680_000_000);

    type Pairs<'a> = &'a [(&'static str, &'a str)];

    fn headers(pairs: Pairs<'_>) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn read(status: u16, pairs: &[(&'static str, &str)], kind: &str, message: &str) -> ApiFailure {
        let body = serde_json::json!({"type": "error", "error": {"type": kind, "message": message}});
        ApiFailure::read(status, &headers(pairs), body.to_string().as_bytes(), NOW)
    }

    #[test]
    fn the_api_says_when_it_wants_to_be_asked_again() {
        let cases: [(Pairs<'_>, Option<f64>, &str); 11] = [
            (&[("retry-after", "90")], Some(90.0), "seconds"),
            (&[("retry-after", " 90.5 ")], Some(90.5), "a fraction"),
            (
                &[("retry-after", "Wed, 21 Oct 2026 07:29:30 GMT")],
                Some(90.0),
                "a date",
            ),
            (
                &[("retry-after", "Wednesday, 21-Oct-26 07:29:30 GMT")],
                Some(90.0),
                "an old form of it",
            ),
            (
                &[
                    ("retry-after", "Wed, 21 Oct 2026 09:00:10 GMT"),
                    ("date", "Wed, 21 Oct 2026 09:00:00 GMT"),
                ],
                Some(10.0),
                "the server's clock is ahead",
            ),
            (
                &[("retry-after", "Wed, 21 Oct 2026 07:00:00 GMT")],
                Some(0.0),
                "it has passed",
            ),
            (&[("retry-after", "-5")], None, "below zero"),
            (&[("retry-after", "soon")], None, "no time at all"),
            (&[("retry-after", "NaN")], None, "no number"),
            (
                &[("retry-after", "1e300")],
                Some(86_400.0),
                "no longer than a day",
            ),
            (
                &[
                    ("anthropic-ratelimit-requests-remaining", "12"),
                    ("anthropic-ratelimit-requests-reset", "2026-10-21T07:40:00Z"),
                    ("anthropic-ratelimit-tokens-remaining", "0"),
                    ("anthropic-ratelimit-tokens-reset", "2026-10-21T07:28:30Z"),
                ],
                Some(30.0),
                "the limit that is used up",
            ),
        ];

        for (pairs, seconds, reason) in cases {
            let failure = read(429, pairs, "rate_limit_error", "Slow down");
            assert_eq!(
                failure.retry_after,
                seconds.map(Duration::from_secs_f64),
                "{reason}"
            );
            assert_eq!(failure.cause(), Some(Cause::RateLimited), "{reason}");
        }
    }

    #[test]
    fn a_usage_limit_is_told_by_its_headers() {
        let reset = |pairs: &[(&'static str, &str)]| read(429, pairs, "rate_limit_error", "").usage_reset;
        let status = "anthropic-ratelimit-unified-status";
        let at = "anthropic-ratelimit-unified-reset";

        assert_eq!(
            reset(&[(status, "rejected"), (at, "1792567780")]),
            Some(NOW.plus(Duration::from_secs(100)))
        );
        assert_eq!(
            reset(&[(status, "allowed_warning"), (at, "1792567780")]),
            None,
            "the limit isn't met"
        );
        assert_eq!(
            reset(&[(status, "rejected")]),
            Some(NOW.plus(UNKNOWN_RESET)),
            "its end isn't known"
        );
        assert_eq!(
            reset(&[(status, "rejected"), (at, "5")]),
            Some(NOW.plus(UNKNOWN_RESET)),
            "its end has passed"
        );
        assert_eq!(
            reset(&[(status, "rejected"), (at, "99999999999")]),
            Some(NOW.plus(FURTHEST_RESET)),
            "nobody waits for years"
        );
        let failure = read(429, &[(status, "rejected")], "rate_limit_error", "");
        assert_eq!(failure.cause(), Some(Cause::UsageLimit));
        assert_eq!(read(200, &[(status, "rejected")], "", "").usage_reset, None);
    }

    #[test]
    fn a_failure_is_the_accounts_or_its_requests_own() {
        let revoked = "OAuth token has been revoked. Please obtain a new token.";
        for (status, kind, message, cause, reason) in [
            (
                401,
                "authentication_error",
                "invalid x-api-key",
                Some(Cause::Refused),
                "a wrong key",
            ),
            (
                403,
                "permission_error",
                revoked,
                Some(Cause::Refused),
                "a login that was revoked",
            ),
            (
                403,
                "permission_error",
                "Your account does not have permission to use this model.",
                None,
                "a run may ask for any model",
            ),
            (
                400,
                "invalid_request_error",
                "Your credit balance is too low",
                Some(Cause::Billing),
                "comes as 400",
            ),
            (
                402,
                "billing_error",
                "A problem",
                Some(Cause::Billing),
                "a billing problem",
            ),
            (
                400,
                "invalid_request_error",
                "This organization has been disabled.",
                Some(Cause::Refused),
                "comes as 400 too",
            ),
            (
                400,
                "invalid_request_error",
                "max_tokens: too large",
                None,
                "the request's own fault",
            ),
            (
                400,
                "invalid_request_error",
                "messages.0.content.0: Input tag 'your credit balance is too low' found using 'type' does not match",
                None,
                "the run made up the words",
            ),
            (
                400,
                "invalid_request_error",
                "tools.0: this organization has been disabled",
                None,
                "the same",
            ),
            (
                403,
                "permission_error",
                "This account may not use oauth-token-organization.",
                None,
                "the model's name is the run's",
            ),
            (
                403,
                "permission_error",
                "OAuth authentication is currently not allowed for this organization.",
                Some(Cause::Refused),
                "an account without logins",
            ),
            (413, "request_too_large", "", None, "the request's own fault"),
            (
                404,
                "DeploymentNotFound",
                "The API deployment for this resource does not exist.",
                None,
                "Foundry's word for a model",
            ),
            (
                404,
                "",
                "Publisher Model `projects/p/models/x` was not found.",
                None,
                "Vertex gives no type",
            ),
            (
                404,
                "not_found_error",
                "model: claude-x",
                None,
                "the submitter named it",
            ),
            (
                404,
                "not_found_error",
                "Not Found",
                Some(Cause::NoRoute),
                "no such path",
            ),
            (404, "", "", Some(Cause::NoRoute), "somebody else's 404"),
            (405, "", "", Some(Cause::NoRoute), "a page of a web server"),
            (302, "", "", Some(Cause::NoRoute), "it leads elsewhere"),
            (500, "api_error", "", Some(Cause::Unavailable), "the API failed"),
            (503, "", "", Some(Cause::Unavailable), "a proxy's answer"),
            (
                529,
                "overloaded_error",
                "Overloaded",
                Some(Cause::Overloaded),
                "overloaded",
            ),
            (502, UNREACHABLE, "", Some(Cause::Unreachable), "no answer"),
            (
                401,
                NO_CREDENTIAL,
                "",
                Some(Cause::Refused),
                "nobody is logged in",
            ),
            (200, NOT_THE_API, "", Some(Cause::NoRoute), "a login page"),
        ] {
            assert_eq!(
                read(status, &[], kind, message).cause(),
                cause,
                "{status}: {reason}"
            );
        }
    }

    #[test]
    fn a_page_of_a_proxy_is_a_failure_without_a_type() {
        let failure = ApiFailure::read(502, &HeaderMap::new(), b"<html>Bad Gateway</html>", NOW);

        assert_eq!(failure.error_type, None);
        assert_eq!(failure.message, "");
        assert_eq!(failure.cause(), Some(Cause::Unavailable));
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let failure = read(400, &[], "x", &"é".repeat(3000));

        assert_eq!(failure.message.len(), MAX_MESSAGE);
    }

    #[test]
    fn people_are_told_what_came_back_and_what_to_do() {
        for (failure, told) in [
            (
                ApiFailure::own(
                    502,
                    UNREACHABLE,
                    "The Messages API at x could not be reached: refused.",
                ),
                "can't be reached (The Messages API at x could not be reached: refused). Check",
            ),
            (
                ApiFailure::own(404, "", ""),
                "isn't the Messages API (404). Correct ANTHROPIC_BASE_URL",
            ),
            (
                ApiFailure::own(529, "overloaded_error", "Overloaded."),
                "overloaded (529: Overloaded). Runs",
            ),
        ] {
            let reason = failure.reason(failure.cause().unwrap());
            assert!(reason.contains(told), "{reason}");
        }
    }
}
