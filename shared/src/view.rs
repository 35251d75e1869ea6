//! A job as clients and receivers of webhooks see it.

use crate::clock::Timestamp;
use crate::id::{JobId, KeyId};
use crate::job::{CancelReason, Hold, Job, JobKind, JobStatus, OnWorkerLost};
use crate::money::MicroUsd;
use crate::storage::{JobDetails, Position};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::time::Duration;

/// What is shown of a job and isn't in its row.
#[derive(Debug, Default)]
pub struct JobContext {
    /// The prompt, or the part of it that is shown.
    pub message: String,
    /// The result, as JSON text.
    pub result: Option<String>,
    /// The name of its session.
    pub session: Option<String>,
    /// What holds all jobs of its owner.
    pub lane_hold: Option<Hold>,
    /// How many jobs go before it.
    pub position: Option<Position>,
}

/// The members of a job, in the order in which people read them.
#[derive(Clone, Debug, Serialize)]
pub struct JobView {
    id: JobId,
    status: JobStatus,
    message: String,
    webhook_url: Option<String>,
    result: Option<Box<RawValue>>,
    tools_used: Option<Box<RawValue>>,
    error: Option<String>,
    cost: MicroUsd,
    duration_ms: i64,
    created_at: Timestamp,
    started_at: Option<Timestamp>,
    completed_at: Option<Timestamp>,
    kind: JobKind,
    /// Its owner.
    key_id: KeyId,
    session: Option<String>,
    session_id: Option<String>,
    /// There are no batches yet.
    batch_id: Option<String>,
    custom_id: Option<String>,
    retry_of: Option<JobId>,
    model: Option<String>,
    effort: Option<String>,
    permission_mode: Option<String>,
    priority: i64,
    queue_position: Option<i64>,
    queue_position_capped: bool,
    /// Nothing is estimated yet.
    estimated_start_at: Option<Timestamp>,
    run_after: Option<Timestamp>,
    deadline_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    attempt: i64,
    max_attempts: i64,
    on_worker_lost: OnWorkerLost,
    hold: Option<Hold>,
    hold_reason: Option<String>,
    concurrency_key: Option<String>,
    cancel_requested_at: Option<Timestamp>,
    cancel_reason: Option<CancelReason>,
    error_code: Option<String>,
    usage: Option<Value>,
    max_cost_usd: MicroUsd,
    timeout_seconds: Option<i64>,
    max_turns: Option<i64>,
    metadata: Value,
    last_event_seq: i64,
    version: i64,
    data_removed: bool,
    urls: JobUrls,
}

/// Where to go on from a job.
#[derive(Clone, Debug, Serialize)]
struct JobUrls {
    cancel: String,
    events: String,
    result: String,
    #[serde(rename = "self")]
    own: String,
}

impl JobView {
    /// The names of the members.
    pub const MEMBERS: &[&str] = &[
        "id",
        "status",
        "message",
        "webhook_url",
        "result",
        "tools_used",
        "error",
        "cost",
        "duration_ms",
        "created_at",
        "started_at",
        "completed_at",
        "kind",
        "key_id",
        "session",
        "session_id",
        "batch_id",
        "custom_id",
        "retry_of",
        "model",
        "effort",
        "permission_mode",
        "priority",
        "queue_position",
        "queue_position_capped",
        "estimated_start_at",
        "run_after",
        "deadline_at",
        "expires_at",
        "attempt",
        "max_attempts",
        "on_worker_lost",
        "hold",
        "hold_reason",
        "concurrency_key",
        "cancel_requested_at",
        "cancel_reason",
        "error_code",
        "usage",
        "max_cost_usd",
        "timeout_seconds",
        "max_turns",
        "metadata",
        "last_event_seq",
        "version",
        "data_removed",
        "urls",
    ];

    /// The job, with what isn't in its row. Its data is kept for `retention` after its end.
    pub fn new(job: &Job, context: JobContext, retention: Duration) -> Self {
        let queued = job.status == JobStatus::Queued;
        let result = context.result.and_then(|text| RawValue::from_string(text).ok());
        let position = context.position.filter(|_| queued);
        let group = job.group_key.as_deref();
        let path = path(job);
        Self {
            id: job.job_id,
            status: job.status,
            message: context.message,
            webhook_url: job.webhook_url.clone(),
            tools_used: result.as_deref().and_then(tools_used),
            result,
            error: job.error.clone(),
            cost: job.cost,
            duration_ms: job.duration_ms,
            created_at: job.created_at,
            started_at: job.started_at,
            completed_at: job.completed_at,
            kind: job.kind,
            key_id: job.key_id.clone(),
            session: context.session,
            session_id: job.claude_session_id.clone(),
            batch_id: None,
            custom_id: job.custom_id.clone(),
            retry_of: job.retry_of,
            model: job.model.clone(),
            effort: job.effort.clone(),
            permission_mode: job.permission_mode.clone(),
            priority: job.priority,
            queue_position: position.map(|position| position.ahead),
            queue_position_capped: position.is_some_and(|position| position.capped),
            estimated_start_at: None,
            run_after: job.run_after,
            deadline_at: job.deadline_at,
            expires_at: job.completed_at.map(|at| at.plus(retention)),
            attempt: job.attempt,
            max_attempts: job.max_attempts,
            on_worker_lost: job.on_worker_lost,
            hold: Hold::parse(&job.hold).or(context.lane_hold).filter(|_| queued),
            hold_reason: job.wait_reason.clone().filter(|_| queued),
            concurrency_key: group.and_then(|group| group.strip_prefix("k:").map(str::to_owned)),
            cancel_requested_at: job.cancel_requested_at,
            cancel_reason: job.cancel_reason,
            error_code: job.error_code.clone(),
            usage: job.usage.as_deref().map(parsed),
            max_cost_usd: job.max_cost,
            timeout_seconds: job.timeout_seconds,
            max_turns: job.max_turns,
            metadata: parsed(&job.metadata),
            last_event_seq: job.last_event_seq,
            version: job.version,
            data_removed: job.data_removed,
            urls: JobUrls {
                cancel: format!("{path}/cancel"),
                events: format!("{path}/events"),
                result: format!("{path}/result"),
                own: path,
            },
        }
    }

    /// The same of a job that was read with what is shown beside its row.
    pub fn of(details: JobDetails, retention: Duration) -> (Job, Self) {
        let (lane_hold, position) = (details.lane_hold(), details.position());
        let beside = JobContext {
            message: details.message,
            result: details.result,
            session: details.session_name,
            lane_hold,
            position,
        };
        let view = Self::new(&details.job, beside, retention);
        (details.job, view)
    }

    /// The view in a list, which shows no position.
    #[must_use]
    pub fn without_position(mut self) -> Self {
        self.queue_position = None;
        self.queue_position_capped = false;
        self
    }

    /// The members but the prompt, as JSON text, to be kept: the API puts it back.
    pub fn without_message(&self) -> serde_json::Result<String> {
        let kept = Self {
            message: String::new(),
            ..self.clone()
        };
        serde_json::to_string(&kept)
    }
}

/// The path of a job.
pub fn path(job: &Job) -> String {
    format!("/api/v1/jobs/{}", job.job_id)
}

/// The member of the result that is shown beside it, too.
fn tools_used(result: &RawValue) -> Option<Box<RawValue>> {
    #[derive(serde::Deserialize)]
    struct Tools<'r> {
        #[serde(borrow)]
        tools_used: Option<&'r RawValue>,
    }
    let tools = serde_json::from_str::<Tools>(result.get()).ok()?;
    tools.tools_used.map(ToOwned::to_owned)
}

/// JSON that we stored ourselves.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_the_members_are_those_that_are_shown() {
        let job = Job {
            job_number: 1,
            job_id: JobId::new(),
            key_id: KeyId::known("env_12345678"),
            kind: JobKind::Job,
            status: JobStatus::Queued,
            hold: String::new(),
            wait_reason: None,
            wait_since: None,
            priority: 0,
            group_key: None,
            session_id: None,
            run_after: None,
            deadline_at: None,
            attempt: 0,
            failures: 0,
            max_attempts: 3,
            on_worker_lost: OnWorkerLost::Resume,
            model: None,
            effort: None,
            permission_mode: None,
            max_turns: None,
            timeout_seconds: None,
            max_cost: MicroUsd::ZERO,
            webhook_url: None,
            webhook_events: "completed".to_owned(),
            custom_id: None,
            metadata: "{}".to_owned(),
            retry_of: None,
            claude_session_id: None,
            cost: MicroUsd::ZERO,
            duration_ms: 0,
            usage: None,
            error: None,
            error_code: None,
            cancel_requested_at: None,
            cancel_reason: None,
            created_at: Timestamp(0),
            started_at: None,
            completed_at: None,
            last_event_seq: 1,
            version: 1,
            data_removed: false,
        };
        let view = JobView::new(&job, JobContext::default(), Duration::ZERO);
        let shown = serde_json::to_value(&view).unwrap();
        let mut names = JobView::MEMBERS.to_vec();
        names.sort_unstable();
        assert_eq!(shown.as_object().unwrap().keys().collect::<Vec<_>>(), names);
        let text = serde_json::to_string(&view).unwrap();
        let positions = JobView::MEMBERS
            .iter()
            .map(|name| text.find(&format!("\"{name}\":")).unwrap())
            .collect::<Vec<_>>();
        assert!(positions.is_sorted(), "{text}");
    }

    #[test]
    fn the_tools_of_a_result_are_shown_as_they_were_stored() {
        let result = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        let tools = |text: &str| tools_used(&result(text)).map(|tools| tools.get().to_owned());
        assert_eq!(
            tools(r#"{"content":"x","tools_used":[{"name":"Bash"}]}"#).as_deref(),
            Some(r#"[{"name":"Bash"}]"#)
        );
        assert_eq!(tools(r#"{"content":"x"}"#), None);
        assert_eq!(tools("[]"), None);
    }
}
