//! How a run ended → what becomes of its job. Pure: one table, tested on transcripts of the real CLI.
//!
//! The verdict is the CLI's result line, never its exit code alone: an error of the API is a "success" with
//! `is_error`, and an exit with 0 may come without any result.

mod api;
mod code;

use crate::claude::message::{ApiRetry, Message, RateLimit, ResultLine};
use crate::gateway::failure::ApiFailure;
use crate::gateway::request::Refusal;
use crate::sentence::{excerpt, sentence};
use shared::clock::Timestamp;
use shared::job::{Ending, Hold};
use std::time::Duration;

pub use code::ErrorCode;

/// Exit codes by which a shell or the CLI itself says that a signal ended it: HUP, KILL, TERM.
const KILLED: [i32; 3] = [129, 137, 143];

/// All that is known about the end of a run.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The first result line without an origin.
    pub result: Option<Box<ResultLine>>,
    /// The CLI's exit code.
    pub exit: Option<i32>,
    /// The signal that ended the CLI.
    pub signal: Option<i32>,
    /// The `error` of the last assistant line that had one.
    pub last_assistant_error: Option<String>,
    /// The last request that was sent again, unless a later one succeeded.
    pub last_api_retry: Option<ApiRetry>,
    /// The last word about the account's limits.
    pub rate_limit: Option<RateLimit>,
    /// The last request that failed, as the gateway saw it, unless a later one succeeded.
    pub observed: Option<ApiFailure>,
    /// The last request that the gateway refused itself, unless a later one was sent.
    pub refused: Option<Refusal>,
    /// Why this worker ended the run; none when it ended by itself.
    pub stopped: Option<Stopped>,
    /// The end of the CLI's stderr.
    pub stderr_tail: String,
    /// Whether structured output was asked for.
    pub schema_wanted: bool,
    /// The time.
    pub now: Timestamp,
}

impl Ended {
    /// What is known before the first line. The process, the gateway and the worker fill in the rest at the end.
    pub fn new(schema_wanted: bool, now: Timestamp) -> Self {
        Self {
            result: None,
            exit: None,
            signal: None,
            last_assistant_error: None,
            last_api_retry: None,
            rate_limit: None,
            observed: None,
            refused: None,
            stopped: None,
            stderr_tail: String::new(),
            schema_wanted,
            now,
        }
    }

    /// Takes note of what matters at the end.
    pub fn observe(&mut self, message: &Message) {
        match message {
            Message::Result(result) if self.result.is_none() && result.is_verdict() => {
                self.result = Some(result.clone());
            }
            Message::Assistant(answer) if answer.error.is_some() => {
                self.last_assistant_error.clone_from(&answer.error);
            }
            Message::ApiRetry(retry) => self.last_api_retry = Some(retry.clone()),
            // An answer begins.
            Message::Usage(_) => self.last_api_retry = None,
            Message::RateLimit(limit) => self.rate_limit = Some(limit.clone()),
            _ => {}
        }
    }
}

/// Why a worker ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// A cancel was asked for.
    Cancelled,
    /// A deadline passed.
    Timeout {
        /// Which one.
        deadline: Deadline,
        /// How long it is.
        after: Duration,
    },
    /// The worker stops.
    Shutdown,
    /// Another worker may hold the job by now.
    LeaseLost,
    /// The CLI didn't start as its arguments say (`command::unexpected_init`).
    InitMismatch,
    /// The run's processes took more memory than they may.
    OutOfMemory,
    /// The run used too much of the disk.
    DiskFull(DiskLimit),
    /// The guard around the run died, and the run with it, or heard nothing of this worker in time.
    GuardLost,
}

/// Which limit on the disk a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskLimit {
    /// Its own.
    Run,
    /// The disk has too little left, and it used most of all runs.
    Floor,
}

/// The deadlines of a run. None of them needs a line to arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// From the start to the first line.
    FirstOutput,
    /// From one line to the next.
    Idle,
    /// From the start to the end.
    Total,
}

/// What becomes of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is done.
    Done,
    /// It failed for good: another attempt would fail in the same way.
    Failed {
        /// For programs.
        code: ErrorCode,
        /// For people: what was wrong and what to do.
        message: String,
    },
    /// Another attempt may do better.
    Retry {
        /// For programs, should this have been the last attempt.
        code: ErrorCode,
        /// For people, likewise.
        message: String,
        /// When to try again.
        when: When,
        /// Whether it counts towards the job's attempts.
        counts: bool,
    },
    /// It was cancelled, as was asked for.
    Cancelled,
    /// Queued again at once, since only the worker stops. Counts nothing.
    Released,
    /// Not this worker's to say any more: nothing may be written.
    Lost,
}

/// When another attempt is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// After the usual pause, which grows with the failures, and not before the time that the API named, if any.
    Backoff {
        /// That time.
        not_before: Option<Timestamp>,
    },
    /// At this time exactly: the account's usage limit is reset. Until then no run on this account can do anything.
    At(Timestamp),
    /// When the Messages API serves runs again, or after the usual pause, but not before the time that the API named.
    Upstream {
        /// That time.
        not_before: Option<Timestamp>,
    },
}

impl Verdict {
    /// The same for storage. `pause_ends` is when the usual pause would end. None when nothing may be written.
    pub fn into_ending(self, pause_ends: Timestamp) -> Option<Ending> {
        Some(match self {
            Self::Done => Ending::Done,
            Self::Failed { code, message } => Ending::Failed {
                code: code.as_str().to_owned(),
                message,
            },
            Self::Retry {
                code,
                message,
                when,
                counts,
            } => {
                let (run_after, hold) = match when {
                    When::Backoff { not_before } => (
                        not_before.map_or(pause_ends, |at| at.max(pause_ends)),
                        Hold::Delay,
                    ),
                    When::Upstream { not_before } => (
                        not_before.map_or(pause_ends, |at| at.max(pause_ends)),
                        Hold::Upstream,
                    ),
                    When::At(at) => (at, Hold::UsageLimit),
                };
                Ending::Retry {
                    code: code.as_str().to_owned(),
                    message,
                    run_after,
                    hold,
                    counts,
                }
            }
            Self::Cancelled => Ending::Cancelled,
            Self::Released => Ending::Released,
            Self::Lost => return None,
        })
    }

    /// Whether the job waits for the Messages API, which is no failure of it.
    pub fn waits(&self) -> bool {
        matches!(
            self,
            Self::Retry {
                when: When::At(_) | When::Upstream { .. },
                ..
            }
        )
    }

    fn failed(code: ErrorCode, message: String) -> Self {
        Self::Failed { code, message }
    }

    /// Another attempt after the usual pause.
    fn again(code: ErrorCode, message: String) -> Self {
        Self::Retry {
            code,
            message,
            when: When::Backoff { not_before: None },
            counts: true,
        }
    }
}

/// What becomes of the job whose run ended like this.
///
/// A run that brought its whole result is done, even if a cancel or a deadline came in the same moment: the work was
/// paid for and is there. Otherwise the reason for which this worker ended the run counts, and only then what the CLI
/// says.
pub fn judge(ended: &Ended) -> Verdict {
    let complete = ended
        .result
        .as_deref()
        .is_some_and(|result| is_complete(result, ended.schema_wanted));
    match ended.stopped {
        Some(Stopped::LeaseLost) => Verdict::Lost,
        Some(Stopped::InitMismatch) => Verdict::failed(
            ErrorCode::ClaudeError,
            sentence(
                "The Claude CLI didn't start with the settings that it was given",
                "",
                "See the worker's log; `doctor` checks the CLI.",
            ),
        ),
        _ if complete => Verdict::Done,
        Some(Stopped::Cancelled) => Verdict::Cancelled,
        Some(Stopped::Shutdown) => Verdict::Released,
        Some(Stopped::Timeout { deadline, after }) => api::wait(ended)
            .unwrap_or_else(|| Verdict::failed(ErrorCode::Timeout, timeout(deadline, after, ended))),
        Some(Stopped::OutOfMemory) => Verdict::failed(
            ErrorCode::OutOfMemory,
            sentence(
                "The run's processes took more memory than they may",
                "",
                "Ask for less at once, or raise the worker's memory limit.",
            ),
        ),
        Some(Stopped::DiskFull(limit)) => Verdict::failed(
            ErrorCode::DiskFull,
            sentence(
                match limit {
                    DiskLimit::Run => "The run's files took more of the disk than they may, and were removed",
                    DiskLimit::Floor => {
                        "The worker's disk was nearly full; of all runs this one used most, and its files were removed"
                    }
                },
                "",
                "Write less, or ask the operator for more room.",
            ),
        ),
        Some(Stopped::GuardLost) => Verdict::again(
            ErrorCode::ClaudeKilled,
            sentence(
                "The process that guards the run was killed, or the machine was too busy for it",
                "",
                "See the worker's log and submit the job again.",
            ),
        ),
        None => refused(ended).unwrap_or_else(|| match &ended.result {
            Some(result) => by_result(result, ended),
            None => without_result(ended),
        }),
    }
}

/// The verdict on a run that ended after the gateway had refused its last request.
fn refused(ended: &Ended) -> Option<Verdict> {
    // The CLI's own limits are told by the CLI.
    if ended
        .result
        .as_ref()
        .is_some_and(|result| result.subtype != "success")
    {
        return None;
    }
    let refusal = ended.refused.as_ref()?;
    Some(match refusal {
        Refusal::NothingLeft => Verdict::failed(
            ErrorCode::MaxCost,
            sentence(
                "The run reached its cap on cost",
                "",
                "Allow more with `max_cost_usd`, or go on in the same session.",
            ),
        ),
        Refusal::Model(_) => Verdict::failed(
            ErrorCode::ModelNotAllowed,
            sentence(
                "The run asked for a model that its key may not use",
                &refusal.to_string(),
                "Name one of the key's models, or ask for the key to be changed.",
            ),
        ),
        Refusal::TooLarge => Verdict::failed(
            ErrorCode::RequestTooLarge,
            sentence(
                "The request has more bytes than the API takes",
                "",
                "Leave out large images and files, or start a new session.",
            ),
        ),
        Refusal::Invalid(_) | Refusal::Feature(_) => Verdict::failed(
            ErrorCode::InvalidRequest,
            sentence(
                "The gateway refused a request of the run",
                &refusal.to_string(),
                "If the Claude CLI itself sends such requests, it isn't the tested version.",
            ),
        ),
        // These say nothing about why the run ended.
        Refusal::Token | Refusal::Path | Refusal::Disarmed | Refusal::Incomplete | Refusal::TooOften => {
            return None;
        }
    })
}

/// Whether the result is all that was asked for.
fn is_complete(result: &ResultLine, schema_wanted: bool) -> bool {
    !result.is_error
        && result.invalid.is_none()
        && result.subtype == "success"
        && !ends_in_a_tool_call(result)
        && result.terminal_reason.as_deref() != Some("tool_deferred")
        && (!schema_wanted || result.structured_output.is_some())
}

/// Whether the model asked for a tool and the turn ended there, without an answer. The CLI calls that a success.
fn ends_in_a_tool_call(result: &ResultLine) -> bool {
    let has_text = result.text.as_deref().is_some_and(|text| !text.trim().is_empty());
    result.stop_reason.as_deref() == Some("tool_use") && !has_text && result.structured_output.is_none()
}

fn by_result(result: &ResultLine, ended: &Ended) -> Verdict {
    if let Some(why) = result.invalid {
        return Verdict::failed(
            ErrorCode::InvalidOutput,
            sentence(
                "The result of the run can't be used",
                &why.to_string(),
                "Ask for a shorter or flatter answer and submit the job again.",
            ),
        );
    }
    let said = excerpt(
        result
            .errors
            .first()
            .or(result.text.as_ref())
            .map_or("", String::as_str),
    );
    let reason = result.terminal_reason.as_deref().unwrap_or_default();
    match result.subtype.as_str() {
        "success" if result.is_error => api::verdict(result, ended),
        "success" if reason != "tool_deferred" && ends_in_a_tool_call(result) => Verdict::failed(
            ErrorCode::Incomplete,
            sentence(
                "The run ended with a tool call and without an answer",
                "",
                "Submit the job again, or go on in the same session.",
            ),
        ),
        // The model may end its turn without ever filling the schema, and the CLI calls that a success.
        "success" if reason != "tool_deferred" => schema_mismatch(),
        "error_max_structured_output_retries" => schema_mismatch(),
        "error_max_turns" => Verdict::failed(
            ErrorCode::MaxTurns,
            sentence(
                "The run used up its turns",
                &said,
                "Allow more with `max_turns`, or go on in the same session.",
            ),
        ),
        "error_max_budget_usd" => Verdict::failed(
            ErrorCode::MaxCost,
            sentence(
                "The run reached its cap on cost",
                &said,
                "Allow more with `max_cost_usd`, or go on in the same session.",
            ),
        ),
        _ if said.starts_with("No conversation found") => Verdict::again(
            ErrorCode::SessionNotFound,
            sentence(
                "The conversation to continue is gone",
                &said,
                "Submit the job to a new session.",
            ),
        ),
        _ => api::wait(ended).unwrap_or_else(|| {
            // An interrupt that isn't this worker's comes from outside, as a signal does.
            if reason.starts_with("aborted") {
                return Verdict::again(
                    ErrorCode::ClaudeKilled,
                    sentence(
                        "The Claude CLI was interrupted from outside",
                        "",
                        "Submit the job again.",
                    ),
                );
            }
            Verdict::failed(
                ErrorCode::ClaudeError,
                sentence(
                    "The Claude CLI ended the run early",
                    if said.is_empty() { reason } else { &said },
                    "Submit the job again; if it fails again, see `doctor` and the worker's log.",
                ),
            )
        }),
    }
}

fn schema_mismatch() -> Verdict {
    Verdict::failed(
        ErrorCode::SchemaMismatch,
        sentence(
            "The model gave no answer that fits the schema",
            "",
            "Say in the message how to fill it, or make the schema simpler.",
        ),
    )
}

/// No result is a failure whatever the exit code says; exit code 0 exists too.
fn without_result(ended: &Ended) -> Verdict {
    let said = excerpt(
        ended
            .stderr_tail
            .trim_end()
            .lines()
            .next_back()
            .unwrap_or_default(),
    );
    let killed_by = ended.signal.or_else(|| {
        ended
            .exit
            .filter(|exit| KILLED.contains(exit))
            .map(|exit| exit - 128)
    });
    if let Some(signal) = killed_by {
        return Verdict::again(
            ErrorCode::ClaudeKilled,
            sentence(
                &format!("The Claude CLI was killed from outside by signal {signal}"),
                &said,
                "Look whether the machine ran out of memory, and submit the job again.",
            ),
        );
    }
    if let Some(verdict) = api::wait(ended) {
        return verdict;
    }
    // The id of the session is new in each attempt, so the next one isn't refused.
    if said.contains("is already in use") {
        return Verdict::again(
            ErrorCode::ClaudeError,
            sentence(
                "The Claude CLI refused the session's id",
                &said,
                "Submit the job again.",
            ),
        );
    }
    if said.contains("--json-schema") {
        return Verdict::failed(
            ErrorCode::InvalidRequest,
            sentence(
                "The schema of the output is refused",
                &said,
                "Correct the schema and submit the job again.",
            ),
        );
    }
    let exit = ended.exit.map_or_else(
        || "without an exit code".to_owned(),
        |exit| format!("with exit code {exit}"),
    );
    Verdict::failed(
        ErrorCode::ClaudeError,
        sentence(
            &format!("The Claude CLI ended {exit} and without a result"),
            &said,
            "Check the job's settings; `doctor` checks the CLI itself.",
        ),
    )
}

fn timeout(deadline: Deadline, after: Duration, ended: &Ended) -> String {
    let seconds = after.as_secs();
    let (problem, advice) = match deadline {
        Deadline::FirstOutput => (
            format!("The Claude CLI wrote nothing in its first {seconds} s"),
            "Look whether the machine is overloaded, and submit the job again.",
        ),
        Deadline::Idle => (
            format!("The run made no progress for {seconds} s"),
            "Submit the job again; if it waits for a long command, raise JOB_IDLE_SECONDS.",
        ),
        Deadline::Total => (
            format!("The run took longer than {seconds} s"),
            "Allow more with `timeout_seconds`, or ask for less at once.",
        ),
    };
    sentence(&problem, &api::last_trouble(ended), advice)
}

#[cfg(test)]
mod tests;
