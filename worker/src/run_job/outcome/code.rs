//! The words that tell a program how a run failed.

use std::fmt;

/// How a run failed, as clients see it in `error_code`. An open set: later releases may add words, none changes its
/// meaning. Other parts of the service add `worker_lost` and `expired`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The API failed or couldn't be reached.
    ApiUnavailable,
    /// The worker's Anthropic credential is missing, refused or not allowed to do this.
    AuthError,
    /// The Anthropic account can't pay.
    BillingError,
    /// The budget left the run less than it needed.
    BudgetExceeded,
    /// The CLI failed in a way that has no word of its own.
    ClaudeError,
    /// The CLI was killed from outside, or its guard was.
    ClaudeKilled,
    /// The run ended in the middle of its work: the model asked for a tool, and nothing came after it.
    Incomplete,
    /// The worker itself failed.
    Internal,
    /// The CLI's result can't be used: it nests too deep, is too long, or isn't valid JSON.
    InvalidOutput,
    /// The API calls the request invalid.
    InvalidRequest,
    /// The run reached its cap on cost.
    MaxCost,
    /// The answer grew beyond what the model may write.
    MaxOutputTokens,
    /// The run reached its number of turns.
    MaxTurns,
    /// The run asked for a model that its key may not use.
    ModelNotAllowed,
    /// The model doesn't exist, or not for this account.
    ModelNotFound,
    /// The run used too much of the disk.
    DiskFull,
    /// The run's processes took more memory than they may.
    OutOfMemory,
    /// The API is overloaded.
    Overloaded,
    /// The conversation is longer than the model can read.
    PromptTooLong,
    /// The API limits the account's requests for a while.
    RateLimited,
    /// The model refused.
    Refusal,
    /// The request has too many bytes, mostly of images.
    RequestTooLarge,
    /// No answer fits the schema that was asked for.
    SchemaMismatch,
    /// The conversation of the job's session is lost, and the job was to fail then.
    SessionLost,
    /// The Claude session to continue isn't there. The next attempt must not resume it.
    SessionNotFound,
    /// A deadline passed.
    Timeout,
    /// The account's plan is used up until a known time.
    UsageLimit,
    /// The folder that the job's session works in is gone, or isn't approved any more.
    WorkingDirectory,
}

impl ErrorCode {
    /// All of them.
    pub const ALL: [Self; 28] = [
        Self::ApiUnavailable,
        Self::AuthError,
        Self::BillingError,
        Self::BudgetExceeded,
        Self::ClaudeError,
        Self::ClaudeKilled,
        Self::DiskFull,
        Self::Incomplete,
        Self::Internal,
        Self::InvalidOutput,
        Self::InvalidRequest,
        Self::MaxCost,
        Self::MaxOutputTokens,
        Self::MaxTurns,
        Self::ModelNotAllowed,
        Self::ModelNotFound,
        Self::OutOfMemory,
        Self::Overloaded,
        Self::PromptTooLong,
        Self::RateLimited,
        Self::Refusal,
        Self::RequestTooLarge,
        Self::SchemaMismatch,
        Self::SessionLost,
        Self::SessionNotFound,
        Self::Timeout,
        Self::UsageLimit,
        Self::WorkingDirectory,
    ];

    /// Whether a job that failed with this word needs the operator of the service: the credential, the account, the
    /// network or the machine. The rest is for whoever submits the job.
    pub fn is_for_the_operator(word: &str) -> bool {
        [
            Self::ApiUnavailable,
            Self::AuthError,
            Self::BillingError,
            Self::ClaudeError,
            Self::ClaudeKilled,
            Self::Internal,
            Self::RateLimited,
        ]
        .iter()
        .any(|code| code.as_str() == word)
    }

    /// The word on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ApiUnavailable => "api_unavailable",
            Self::AuthError => "auth_error",
            Self::BillingError => "billing_error",
            Self::BudgetExceeded => "budget_exceeded",
            Self::ClaudeError => "claude_error",
            Self::ClaudeKilled => "claude_killed",
            Self::DiskFull => "disk_full",
            Self::Incomplete => "incomplete",
            Self::Internal => "internal",
            Self::InvalidOutput => "invalid_output",
            Self::InvalidRequest => "invalid_request",
            Self::MaxCost => "max_cost",
            Self::MaxOutputTokens => "max_output_tokens",
            Self::MaxTurns => "max_turns",
            Self::ModelNotAllowed => "model_not_allowed",
            Self::ModelNotFound => "model_not_found",
            Self::OutOfMemory => "out_of_memory",
            Self::Overloaded => "overloaded",
            Self::PromptTooLong => "prompt_too_long",
            Self::RateLimited => "rate_limited",
            Self::Refusal => "refusal",
            Self::RequestTooLarge => "request_too_large",
            Self::SchemaMismatch => "schema_mismatch",
            Self::SessionLost => "session_lost",
            Self::SessionNotFound => "session_not_found",
            Self::Timeout => "timeout",
            Self::UsageLimit => "usage_limit",
            Self::WorkingDirectory => "working_directory",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
