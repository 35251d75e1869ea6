//! Events that leave the service: what is sent, to whom, and how far it has come.

use crate::clock::Timestamp;
use crate::id::{DeliveryId, EndpointId, JobId, KeyId};
use serde::Serialize;
use std::time::Duration;

/// What happened. Receivers must expect more types in later releases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HookEvent {
    /// A run of a job began.
    JobStarted,
    /// A job runs and has new events.
    JobProgress,
    /// A job is done.
    JobCompleted,
    /// A job failed.
    JobFailed,
    /// A job was cancelled.
    JobCancelled,
    /// A batch has ended. Nothing sends it yet, since there are no batches; an endpoint may ask for it.
    BatchEnded,
    /// A budget has reached one of its thresholds.
    BudgetThreshold,
    /// A budget is spent.
    BudgetExceeded,
    /// A key expires within a week.
    KeyExpiring,
    /// Another endpoint of the key was switched off.
    EndpointDisabled,
    /// Somebody asked for a test.
    Test,
}

impl HookEvent {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::JobStarted,
        Self::JobProgress,
        Self::JobCompleted,
        Self::JobFailed,
        Self::JobCancelled,
        Self::BatchEnded,
        Self::BudgetThreshold,
        Self::BudgetExceeded,
        Self::KeyExpiring,
        Self::EndpointDisabled,
        Self::Test,
    ];

    /// The word on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::JobStarted => "job.started",
            Self::JobProgress => "job.progress",
            Self::JobCompleted => "job.completed",
            Self::JobFailed => "job.failed",
            Self::JobCancelled => "job.cancelled",
            Self::BatchEnded => "batch.ended",
            Self::BudgetThreshold => "budget.threshold_reached",
            Self::BudgetExceeded => "budget.exceeded",
            Self::KeyExpiring => "key.expiring",
            Self::EndpointDisabled => "endpoint.disabled",
            Self::Test => "webhook.test",
        }
    }
}

/// An address that gets events of its owner.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Endpoint {
    /// Order of creation.
    pub endpoint_number: i64,
    /// Its id.
    pub endpoint_id: EndpointId,
    /// Its owner, whose events it gets.
    pub key_id: KeyId,
    /// Where they are sent.
    pub url: String,
    /// The types that it gets, with blanks around them; empty for all.
    pub event_types: String,
    /// For people.
    pub description: String,
    /// `full` or `thin`.
    pub payload: String,
    /// Headers to send along, sealed: values may be secret.
    pub headers: String,
    /// The secrets that sign, sealed.
    pub secrets: String,
    /// A JSON object of text pairs.
    pub metadata: String,
    /// Whether it gets events.
    pub enabled: bool,
    /// Why not.
    pub disabled_reason: Option<String>,
    /// When the first of an unbroken row of failures was.
    pub first_failure_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed last.
    pub updated_at: Timestamp,
    /// Grows with each change by a person.
    pub version: i64,
}

/// How far a delivery has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum DeliveryStatus {
    /// It is being tried, or waits for its time.
    Pending,
    /// The receiver has taken it.
    Succeeded,
    /// Nobody has taken it, and it isn't tried again.
    Failed,
    /// Its endpoint was deleted.
    Cancelled,
}

impl DeliveryStatus {
    /// The word on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// An event on its way to one address.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Delivery {
    /// Order of creation.
    pub delivery_number: i64,
    /// Its id.
    pub delivery_id: DeliveryId,
    /// Whose event it is.
    pub key_id: KeyId,
    /// The endpoint; `None` is the job's own `webhook_url`.
    pub endpoint_id: Option<EndpointId>,
    /// The job that it is about.
    pub job_id: Option<JobId>,
    /// What happened.
    pub event_type: String,
    /// Where it is sent.
    pub url: String,
    /// How far it has come.
    pub status: DeliveryStatus,
    /// Attempts that were made.
    pub attempts: i64,
    /// When it is tried next.
    pub due_at: Option<Timestamp>,
    /// When it happened.
    pub created_at: Timestamp,
    /// When it became final.
    pub completed_at: Option<Timestamp>,
    /// What the receiver answered last.
    pub last_status_code: Option<i64>,
    /// Why the last attempt failed, in a word.
    pub last_error_class: Option<String>,
}

/// One attempt of a delivery.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct DeliveryAttempt {
    /// 1, 2, 3 … within the delivery.
    pub number: i64,
    /// `scheduled` or `manual`.
    pub trigger_kind: String,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took.
    pub duration_ms: i64,
    /// What the receiver answered.
    pub status_code: Option<i64>,
    /// Why it failed, in a word.
    pub error_class: Option<String>,
    /// The beginning of the answer.
    pub snippet: String,
}

/// A delivery that is due and that nobody has taken yet.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct DueDelivery {
    /// Its id.
    pub delivery_id: DeliveryId,
    /// The endpoint; `None` is the job's own `webhook_url`.
    pub endpoint_id: Option<EndpointId>,
    /// The job that it is about.
    pub job_id: Option<JobId>,
    /// What happened.
    pub event_type: String,
    /// When it happened.
    pub created_at: Timestamp,
    /// Whether it has its bytes; of a job's event there are none before the first attempt.
    pub has_body: bool,
    /// How much of a job the endpoint is told: `full` or `thin`.
    pub payload: Option<String>,
}

/// A delivery that this process is to try now: nobody else does until its lease has run out.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct ClaimedDelivery {
    /// Its id.
    pub delivery_id: DeliveryId,
    /// Whose event it is.
    pub key_id: KeyId,
    /// The endpoint; `None` is the job's own `webhook_url`.
    pub endpoint_id: Option<EndpointId>,
    /// Where it is sent.
    pub url: String,
    /// The host and port of that, of which few are asked at once.
    pub host: String,
    /// The bytes, stored once and sent unchanged each time.
    pub body: String,
    /// Attempts that were made before.
    pub attempts: i64,
    /// Whether a person asked for this attempt.
    pub manual: bool,
    /// The secrets that sign, sealed; none if the owner has none.
    pub secrets: Option<String>,
    /// The headers of the endpoint, sealed.
    pub headers: Option<String>,
}

/// How an attempt ended.
#[derive(Clone, Debug)]
pub struct DeliveryOutcome {
    /// The delivery that was claimed.
    pub delivery: ClaimedDelivery,
    /// Whether something was sent. If not, the reason is here and not at the receiver.
    pub asked: bool,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took.
    pub duration: Duration,
    /// What the receiver answered.
    pub status_code: Option<u16>,
    /// Why it failed, in a word; `None` is a success.
    pub error_class: Option<&'static str>,
    /// The beginning of the answer.
    pub snippet: String,
    /// When it is tried again after a failure; `None` is never.
    pub retry_at: Option<Timestamp>,
    /// The receiver says that it is gone for good.
    pub gone: bool,
}
