//! The end of jobs: one place where a job becomes final.

use crate::clock::Timestamp;
use crate::delivery::HookEvent;
use crate::event::{EventType, NewEvent};
use crate::id::JobId;
use crate::job::{CancelReason, Ending, Hold, Job, JobStatus};
use crate::storage::columns::columns;
use crate::storage::{Result, Tx, fetch};
use serde_json::json;

impl Tx {
    /// Ends a job that waits, whose lane and group are locked; `false` if it doesn't wait any more. `Cancelled`
    /// takes the reason; `Failed` has its own.
    #[doc(hidden)]
    pub async fn end_waiting(
        &mut self,
        job_id: JobId,
        ending: &Ending,
        reason: CancelReason,
        now: Timestamp,
    ) -> Result<bool> {
        let (status, reason, code, message, event) = match ending {
            Ending::Failed { code, message } => {
                let data = json!({ "error": message, "code": code });
                (
                    JobStatus::Failed,
                    None,
                    Some(code),
                    Some(message),
                    NewEvent::new(EventType::Error, data),
                )
            }
            _ => {
                let data = json!({ "reason": reason.as_str() });
                (
                    JobStatus::Cancelled,
                    Some(reason),
                    None,
                    None,
                    NewEvent::new(EventType::Cancelled, data),
                )
            }
        };
        let ended = fetch!(
            self,
            "end a waiting job",
            fetch_optional => Job,
            concat!("update job set status = $2, cancel_reason = $3, error_code = $4, error = $5, completed_at = $6,
               version = version + 1, last_event_seq = last_event_seq + 1
             where job_id = $1 and status = 'queued' returning ", columns!(Job)),
            job_id,
            status,
            reason,
            code,
            message,
            now
        )?;
        let Some(job) = ended else { return Ok(false) };
        self.append_events(job_id, job.last_event_seq - 1, &[event], now)
            .await?;
        let endpoints = self.has_endpoints(&job.key_id).await?;
        self.conclude(&job, (status, endpoints), now).await?;
        Ok(true)
    }

    /// What follows when a job becomes final, whichever way it ended: who wants to hear of it is told, and the next job of
    /// its group may start. Whatever else the end of a job brings about belongs here. The caller has written the final
    /// status and the last event, and holds the lane; `job` is the row as it was while it waited or ran. `endpoints`:
    /// whether its key has any.
    pub(in crate::storage) async fn conclude(
        &mut self,
        job: &Job,
        (status, endpoints): (JobStatus, bool),
        now: Timestamp,
    ) -> Result<()> {
        let event = match status {
            JobStatus::Done => HookEvent::JobCompleted,
            JobStatus::Cancelled => HookEvent::JobCancelled,
            _ => HookEvent::JobFailed,
        };
        self.announce_job(job, event, endpoints, now).await?;
        // A job that waits for earlier ones of its group holds back none.
        if job.hold != Hold::Order.as_str() {
            self.free_group(job, now).await?;
        }
        Ok(())
    }
}
