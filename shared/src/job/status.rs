//! The state machine of a job, as one table.

use serde::{Deserialize, Serialize};

/// Where a job stands. The set is closed: clients loop until they see one of the last three.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum JobStatus {
    /// Accepted and waiting; `hold` says for what, if it isn't simply its turn.
    Queued,
    /// A worker holds its lease.
    Running,
    /// Ended well.
    Done,
    /// Ended badly; `error_code` says how.
    Failed,
    /// Ended because somebody or a deadline asked for it.
    Cancelled,
}

impl JobStatus {
    /// All of them, in the order of a job's life.
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Done,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether a job in this status may get that one. A final status never changes.
    pub const fn may_become(self, next: Self) -> bool {
        use JobStatus::{Cancelled, Done, Failed, Queued, Running};
        // From running back to queued: for another attempt.
        matches!(
            (self, next),
            (Queued, Running | Cancelled | Failed) | (Running, Done | Failed | Cancelled | Queued)
        )
    }

    /// Whether the job has ended.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// The word on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_final_status_never_changes() {
        for from in JobStatus::ALL.into_iter().filter(|status| status.is_final()) {
            for to in JobStatus::ALL {
                assert!(!from.may_become(to), "{from:?} -> {to:?}");
            }
        }
    }
}
