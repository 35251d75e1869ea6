//! A job is accepted.

use crate::event::{EventType, NewEvent};
use crate::job::{Hold, Job, JobStatus, NewJob};
use crate::storage::columns::columns;
use crate::storage::{Error, Result, Tx, execute, fetch, in_future};
use serde_json::json;

impl Tx {
    /// Accepts a job: its row, prompt and first event, and a ticket if it is ready. Its session, if it has one,
    /// exists and is its owner's. Gives the job as stored.
    pub async fn insert_job(&mut self, job: &NewJob) -> Result<Job> {
        let group_key = match (&job.session_id, &job.concurrency_key) {
            (Some(session_id), _) => Some(format!("s:{session_id}")),
            (None, Some(key)) => Some(format!("k:{key}")),
            (None, None) => None,
        };
        self.announce_submission(&job.key_id).await?;
        self.lock_group(&job.key_id, group_key.as_deref()).await?;
        let ahead = match &group_key {
            Some(group) => self.has_earlier_in_group(&job.key_id, group).await?,
            None => false,
        };
        let hold = match (ahead, in_future(job.run_after, job.created_at)) {
            (true, _) => Hold::Order.as_str(),
            (false, true) => Hold::Delay.as_str(),
            (false, false) => "",
        };
        let stored = fetch!(
            self,
            "store a job",
            fetch_one => Job,
            concat!("insert into job (job_id, key_id, kind, hold, priority, group_key, session_id, run_after, deadline_at,
               max_attempts, on_worker_lost, model, effort, permission_mode, max_turns, timeout_seconds, max_cost,
               custom_id, metadata, created_at, webhook_url, webhook_events, last_event_seq)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22,
               1)
             returning ", columns!(Job)),
            job.job_id,
            &job.key_id,
            job.kind,
            hold,
            job.priority,
            &group_key,
            job.session_id,
            job.run_after,
            job.deadline_at,
            job.max_attempts,
            job.on_worker_lost,
            &job.model,
            &job.effort,
            &job.permission_mode,
            job.max_turns,
            job.timeout_seconds,
            job.max_cost,
            &job.custom_id,
            job.metadata.to_string(),
            job.created_at,
            &job.webhook_url,
            &job.webhook_events
        )?;
        let options = serde_json::to_string(&job.options)
            .map_err(|error| Error::during("store a prompt")(error.to_string()))?;
        execute!(
            self,
            "store a prompt",
            "insert into prompt (job_id, message, options) values ($1, $2, $3)",
            job.job_id,
            &job.message,
            options
        )?;
        let event = NewEvent::new(
            EventType::Status,
            json!({ "status": JobStatus::Queued, "attempt": 0 }),
        );
        self.append_events(job.job_id, 0, &[event], job.created_at)
            .await?;
        if hold.is_empty() {
            self.became_ready(&job.key_id, job.priority);
        }
        Ok(stored)
    }
}
