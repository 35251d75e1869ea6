//! The events of a job. Each event gets the job's next number and never changes.

use crate::clock::Timestamp;
use crate::id::JobId;
use serde_json::Value;

/// The kinds of event. The last event of a job is `done`, `error` or `cancelled`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, sqlx::Type)]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum EventType {
    /// The job's status changed: `{status, attempt, reason?}`.
    Status,
    /// Text from the model: `{content, tool_name: null}`.
    Assistant,
    /// The model called a tool: `{content: null, tool_name, tool_use_id, input}`.
    Tool,
    /// The result of a tool: `{tool_use_id, is_error, content}`; longer content is cut to 16 KiB, with `truncated`.
    ToolResult,
    /// Cost so far: `{cost, usage}`.
    Usage,
    /// Another attempt is due: `{attempt, delay_ms, error_code}`.
    Retry,
    /// A cancel was requested while the job ran: `{reason}`.
    Cancelling,
    /// The conversation of the job's session wasn't found where the run was, so the run began a new one:
    /// `{claude_session_id}`.
    SessionLost,
    /// Events were left out because the job had too many: `{from, to}`.
    Gap,
    /// The job is done; the data is its result.
    Done,
    /// The job failed: `{error, code, result?}`.
    Error,
    /// The job was cancelled: `{reason, result?}`.
    Cancelled,
}

impl EventType {
    /// The word in JSON and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
            Self::ToolResult => "tool_result",
            Self::Usage => "usage",
            Self::Retry => "retry",
            Self::Cancelling => "cancelling",
            Self::SessionLost => "session_lost",
            Self::Gap => "gap",
            Self::Done => "done",
            Self::Error => "error",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether no event comes after this one.
    pub const fn is_last(self) -> bool {
        matches!(self, Self::Done | Self::Error | Self::Cancelled)
    }
}

/// An event that isn't stored yet; storage assigns its number.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// What happened.
    pub event_type: EventType,
    /// The data, whose members depend on the type.
    pub data: Value,
}

impl NewEvent {
    /// An event of this type with this data.
    pub const fn new(event_type: EventType, data: Value) -> Self {
        Self { event_type, data }
    }
}

/// An event as it is stored.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Event {
    /// The job it belongs to.
    pub job_id: JobId,
    /// 1, 2, 3 … within the job.
    pub seq: i64,
    /// What happened.
    pub event_type: EventType,
    /// When.
    pub at: Timestamp,
    /// The data as JSON text.
    pub data: String,
}
