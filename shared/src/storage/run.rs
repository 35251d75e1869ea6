//! What the holder of a lease may write: events, renewals, the end. Everything is guarded by (job, attempt), so a
//! worker that lost its lease writes nothing.

mod finish;
mod late;
mod lost;
mod record;

use super::columns::columns;
use super::{Result, Tx, TxDb, fetch_locked};
use crate::id::{JobId, SessionId};
use crate::job::{CancelReason, Job, JobStatus, Spend, TokenUsage};

/// What a worker learns when it writes about its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunDirective {
    /// Go on.
    Continue,
    /// Somebody wants it cancelled.
    Cancel(CancelReason),
    /// The lease is gone: end the run, write nothing.
    Lost,
}

/// What came of finishing a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The job has this status now.
    Became(JobStatus),
    /// The lease was gone; nothing was written.
    Lost,
}

impl Tx {
    /// The session's row is written at the end of a run, but locked before the group: whoever makes a session and
    /// a job in it in one transaction takes them in this order.
    async fn lock_session(&mut self, session_id: Option<SessionId>) -> Result<()> {
        if let (Some(session_id), TxDb::Postgres(_)) = (session_id, &self.db) {
            fetch_locked!(
                self,
                "lock a session",
                fetch_optional => (i64,),
                "select session_number from session where session_id = $1",
                session_id
            )?;
        }
        Ok(())
    }

    async fn lock_running(&mut self, job_id: JobId, attempt: i64) -> Result<Option<Job>> {
        fetch_locked!(
            self,
            "find a run",
            fetch_optional => Job,
            concat!("select ", columns!(Job), " from job where job_id = $1 and attempt = $2 and status = 'running'"),
            job_id,
            attempt
        )
    }
}

/// PostgreSQL's text holds no NUL, and what a program wrote may.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

fn usage_text(usage: TokenUsage) -> String {
    serde_json::to_string(&usage).unwrap_or_default()
}

/// The tokens that are written in the job's row.
fn usage_of(job: &Job) -> TokenUsage {
    job.usage
        .as_deref()
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}

/// The tokens of the earlier attempts and of this one. `job` is as it was claimed.
fn usage_so_far(job: &Job, spend: &Spend) -> String {
    let mut usage = spend.usage();
    usage += usage_of(job);
    usage_text(usage)
}
