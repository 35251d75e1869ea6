//! Errors of the API → permanent, again later, or a wait for the API.
//!
//! What the gateway saw decides whether a job waits. What the CLI says about an error decides this job's own end at
//! most, since the agent can write it too.

use super::{Ended, ErrorCode, Verdict, When};
use crate::claude::message::{RateLimit, ResultLine};
use crate::gateway::failure::{ApiFailure, Cause};
use crate::sentence::{excerpt, sentence};

/// What is known about the request that failed, the gateway's knowledge first: it saw the answer itself, while the CLI
/// leaves out headers and some statuses.
#[derive(Debug, Default)]
struct Facts<'a> {
    status: Option<u16>,
    /// The words for it: of the API, of the CLI's result line, of its last assistant line.
    words: [Option<&'a str>; 3],
    /// The sentence for it: of the API, of the CLI.
    texts: [&'a str; 2],
    stop_reason: Option<&'a str>,
    terminal_reason: Option<&'a str>,
    observed: Option<&'a ApiFailure>,
    rate_limit: Option<&'a RateLimit>,
}

impl<'a> Facts<'a> {
    fn of(result: &'a ResultLine, ended: &'a Ended) -> Self {
        // A failure that the gateway saw and the CLI got over, or one that it met differently, isn't this one.
        let observed = ended
            .observed
            .as_ref()
            .filter(|seen| result.api_error_status.is_none_or(|status| status == seen.status));
        let api_word = observed
            .and_then(|seen| seen.error_type.as_deref())
            .or(result.api_error_type.as_deref());
        Self {
            status: observed.map(|seen| seen.status).or(result.api_error_status),
            words: [
                api_word,
                result.api_error.as_deref(),
                ended.last_assistant_error.as_deref(),
            ],
            texts: [
                observed.map_or("", |seen| &seen.message),
                result.text.as_deref().unwrap_or_default(),
            ],
            stop_reason: result.stop_reason.as_deref(),
            terminal_reason: result.terminal_reason.as_deref(),
            observed,
            rate_limit: ended.rate_limit.as_ref(),
        }
    }

    fn is(&self, word: &str) -> bool {
        self.words.contains(&Some(word))
    }

    fn says(&self, text: &str) -> bool {
        self.texts.iter().any(|said| said.to_lowercase().contains(text))
    }

    /// `429: slow down`.
    fn said(&self) -> String {
        let text = excerpt(self.texts.iter().find(|text| !text.is_empty()).unwrap_or(&""));
        match self.status {
            // The CLI's own texts name the status in most cases.
            Some(status) if !text.contains(&status.to_string()) => format!("{status}: {text}"),
            _ => text,
        }
    }

    /// Whether the account's plan is used up, rather than its requests per minute.
    fn is_usage_limit(&self) -> bool {
        let window_is_closed = self
            .rate_limit
            .is_some_and(|limit| limit.is_rejected() && limit.resets_at.is_some());
        self.is("usage_limit_reached")
            || (self.status == Some(429) && window_is_closed)
            || self.says("you've hit your")
    }

    fn code(&self) -> ErrorCode {
        // What ended the turn without an HTTP status comes first: the gateway may remember an older failure.
        if self.stop_reason == Some("refusal") {
            return ErrorCode::Refusal;
        }
        if self.is("max_output_tokens") {
            return ErrorCode::MaxOutputTokens;
        }
        if self.terminal_reason == Some("prompt_too_long") || self.says("prompt is too long") {
            return ErrorCode::PromptTooLong;
        }
        if self.is_usage_limit() {
            return ErrorCode::UsageLimit;
        }
        // Both come as 400 too, with a text.
        if self.is("billing_error") || self.says("credit balance is too low") {
            return ErrorCode::BillingError;
        }
        if self.is("org_disabled_credential") || self.says("organization has been disabled") {
            return ErrorCode::AuthError;
        }
        match self.status {
            Some(401 | 403) => ErrorCode::AuthError,
            Some(402) => ErrorCode::BillingError,
            Some(404) => ErrorCode::ModelNotFound,
            Some(413) => ErrorCode::RequestTooLarge,
            Some(429) => ErrorCode::RateLimited,
            Some(529) => ErrorCode::Overloaded,
            Some(408 | 409 | 500..) => ErrorCode::ApiUnavailable,
            Some(400..) => ErrorCode::InvalidRequest,
            _ => self.code_without_status(),
        }
    }

    fn code_without_status(&self) -> ErrorCode {
        let by_word = [
            ("authentication_failed", ErrorCode::AuthError),
            ("oauth_org_not_allowed", ErrorCode::AuthError),
            ("model_not_found", ErrorCode::ModelNotFound),
            ("overloaded_error", ErrorCode::Overloaded),
            ("overloaded", ErrorCode::Overloaded),
            ("rate_limit", ErrorCode::RateLimited),
        ];
        if let Some((_, code)) = by_word.iter().find(|(word, _)| self.is(word)) {
            return *code;
        }
        // Releases before 2.1.331 leave out the status of this one.
        if self.says("529 overloaded") {
            return ErrorCode::Overloaded;
        }
        if self.is("server_error") || self.is("connection_failed") {
            return ErrorCode::ApiUnavailable;
        }
        if self.is("invalid_request") {
            ErrorCode::InvalidRequest
        } else {
            ErrorCode::ClaudeError
        }
    }

    /// The wait for the API that this failure means, if it isn't about the request alone.
    fn wait(&self, ended: &Ended) -> Option<Verdict> {
        let seen = self.observed?;
        let cause = seen.cause()?;
        let not_before = seen.retry_after.map(|wait| ended.now.plus(wait));
        Some(Verdict::Retry {
            code: code_of(cause),
            message: seen.reason(cause),
            when: match seen.usage_reset {
                Some(reset) if cause == Cause::UsageLimit => When::At(reset),
                _ => When::Upstream { not_before },
            },
            counts: false,
        })
    }
}

fn code_of(cause: Cause) -> ErrorCode {
    match cause {
        Cause::UsageLimit => ErrorCode::UsageLimit,
        Cause::Refused => ErrorCode::AuthError,
        Cause::Billing => ErrorCode::BillingError,
        Cause::RateLimited => ErrorCode::RateLimited,
        Cause::Overloaded => ErrorCode::Overloaded,
        Cause::Unavailable | Cause::Unreachable | Cause::NoRoute => ErrorCode::ApiUnavailable,
    }
}

/// The verdict on a run that an error of the API ended.
pub(super) fn verdict(result: &ResultLine, ended: &Ended) -> Verdict {
    let facts = Facts::of(result, ended);
    let code = facts.code();
    if !is_of_the_turn(code)
        && let Some(wait) = facts.wait(ended)
    {
        return wait;
    }
    let message = message(code, &facts);
    match code {
        ErrorCode::UsageLimit
        | ErrorCode::Overloaded
        | ErrorCode::RateLimited
        | ErrorCode::ApiUnavailable => Verdict::again(code, message),
        _ => Verdict::failed(code, message),
    }
}

/// Whether it ended the turn without an HTTP status: what the gateway remembers then is older.
fn is_of_the_turn(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::Refusal | ErrorCode::MaxOutputTokens | ErrorCode::PromptTooLong
    )
}

/// The wait of a run that was broken off while the API couldn't serve it: that is the reason to tell.
pub(super) fn wait(ended: &Ended) -> Option<Verdict> {
    let facts = Facts {
        observed: ended.observed.as_ref(),
        ..Facts::default()
    };
    facts.wait(ended)
}

/// The last failed request, in words; empty when there was none.
pub(super) fn last_trouble(ended: &Ended) -> String {
    match (&ended.observed, &ended.last_api_retry) {
        (Some(seen), _) => {
            let facts = Facts {
                status: Some(seen.status),
                texts: [&seen.message, ""],
                ..Facts::default()
            };
            format!("its last request to the API failed with {}", facts.said())
        }
        (None, Some(retry)) => match retry.status {
            Some(status) => format!("a request to the API failed with {status}"),
            None => "a request to the API got no answer".to_owned(),
        },
        (None, None) => String::new(),
    }
}

fn message(code: ErrorCode, facts: &Facts<'_>) -> String {
    let (problem, advice) = match code {
        ErrorCode::AuthError => (
            "The worker's Anthropic credential is missing or was refused",
            "Give the worker a valid ANTHROPIC_API_KEY or CLAUDE_CODE_OAUTH_TOKEN, or log in with `claude auth login`; \
             then submit the job again.",
        ),
        ErrorCode::BillingError => (
            "The Anthropic account can't pay for the request",
            "Add credit or settle the account's billing, then submit the job again.",
        ),
        ErrorCode::ModelNotFound => (
            "The model doesn't exist, or not for the worker's account",
            "Name another `model`, or leave it out for the default.",
        ),
        ErrorCode::PromptTooLong => (
            "The conversation is longer than the model can read",
            "Shorten the message, or start a new session.",
        ),
        ErrorCode::RequestTooLarge => (
            "The request has more bytes than the API takes",
            "Leave out large images and files, or start a new session.",
        ),
        ErrorCode::MaxOutputTokens => (
            "The answer grew beyond what the model may write",
            "Ask for less at once, or for the answer in parts.",
        ),
        ErrorCode::Refusal => (
            "The model refused to answer",
            "Change the message; the usage policy of Anthropic says what it may ask for.",
        ),
        ErrorCode::UsageLimit => (
            "The Anthropic account has used up what its plan allows for now",
            "Submit the job again when the limit is reset.",
        ),
        ErrorCode::RateLimited => (
            "The API limits the account's requests",
            "Submit the job again later, or run fewer jobs at once.",
        ),
        ErrorCode::Overloaded => ("The API is overloaded", "Submit the job again later."),
        ErrorCode::ApiUnavailable if facts.is("connection_failed") => (
            "The API can't be reached",
            "Check the worker's connection and ANTHROPIC_BASE_URL, then submit the job again.",
        ),
        ErrorCode::ApiUnavailable => ("The API failed", "Submit the job again later."),
        ErrorCode::InvalidRequest => (
            "The API calls the request invalid",
            "Change the job's message or settings: the same request would be refused again.",
        ),
        _ if facts.says("malformed response") => (
            "What answers at ANTHROPIC_BASE_URL isn't the Messages API",
            "Correct ANTHROPIC_BASE_URL in the worker's settings.",
        ),
        _ => (
            "The Claude CLI reported an error",
            "Submit the job again; if it fails again, see `doctor` and the worker's log.",
        ),
    };
    sentence(problem, &facts.said(), advice)
}
