//! What a chat is answered with.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shared::id::JobId;
use shared::job::{Job, JobStatus};

use crate::http::problem::{FailedRun, Problem, RunFailure};

/// The result of a run: the members of the Python service first.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ChatResult {
    /// The Claude session.
    session_id: String,
    /// The answer.
    content: String,
    /// What it has cost.
    cost: f64,
    /// How long it took.
    duration_ms: i64,
    /// How many turns it took.
    num_turns: i64,
    /// Which tools were called.
    tools_used: Vec<ToolUse>,
    /// What the Python service doesn't have.
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// A call of a tool.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ToolUse {
    name: String,
    #[serde(default)]
    input: Value,
}

/// The same with the job that it is the result of.
#[derive(Debug, Serialize)]
pub struct ChatData {
    #[serde(flatten)]
    result: ChatResult,
    job_id: JobId,
}

impl ChatResult {
    /// The answer of a job that has ended; a problem if it has none. A run that has used up its turns or its cap on cost has
    /// said something, and is no error to clients of the Python service: `is_error` and `subtype` say so.
    pub fn of(job: &Job, result: Option<&str>) -> Result<Self, Problem> {
        let code = job.error_code.as_deref().unwrap_or_default();
        let cut_short = job.status == JobStatus::Failed && matches!(code, "max_turns" | "max_cost");
        if (job.status == JobStatus::Done || cut_short)
            && let Some(result) = result
        {
            return Self::parse(result);
        }
        let (failure, detail) = failure(job);
        Err(Problem::Run(FailedRun {
            failure,
            detail,
            job_id: job.job_id,
        }))
    }

    /// Reads what a run has left.
    pub fn parse(result: &str) -> Result<Self, Problem> {
        serde_json::from_str(result).map_err(Problem::internal)
    }

    /// Without the members that the Python service doesn't have.
    #[must_use]
    pub fn brief(mut self) -> Self {
        self.more.clear();
        self
    }

    /// As the result of this job.
    pub const fn of_job(self, job_id: JobId) -> ChatData {
        ChatData { result: self, job_id }
    }
}

/// How a job without an answer ended, for who waited for it.
fn failure(job: &Job) -> (RunFailure, String) {
    let said = || job.error.clone().unwrap_or_else(|| "Claude failed".to_owned());
    match (job.status, job.error_code.as_deref()) {
        (JobStatus::Cancelled, _) => {
            let reason = job.cancel_reason.map_or("user", |reason| reason.as_str());
            (RunFailure::Cancelled, format!("The job was cancelled ({reason})"))
        }
        (_, Some("timeout")) => (RunFailure::Timeout, "Claude timed out".to_owned()),
        (_, Some("budget_exceeded")) => (RunFailure::Budget, said()),
        _ => (RunFailure::Claude, said()),
    }
}
