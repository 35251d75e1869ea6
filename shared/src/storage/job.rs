//! Jobs: accepted, read, listed, cancelled.

use super::{Error, Result, Store, Tx, execute, fetch, fetch_locked, in_future, read};
use crate::clock::Timestamp;
use crate::event::{EventType, NewEvent};
use crate::id::{JobId, KeyId, SessionId};
use crate::job::{CancelReason, Ending, Hold, Job, JobKind, JobStatus, NewJob};
use serde_json::json;
use sqlx::{Postgres, QueryBuilder, Sqlite};

/// Which jobs a list shows.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// Only this owner's; `None` is everybody's.
    pub key_id: Option<KeyId>,
    /// Only these statuses; empty is all.
    pub statuses: Vec<JobStatus>,
    /// Only this session's.
    pub session_id: Option<SessionId>,
    /// Only those with this name of the client's.
    pub custom_id: Option<String>,
    /// Only this kind; `None` is both.
    pub kind: Option<JobKind>,
    /// Only those accepted at this time or later.
    pub created_after: Option<Timestamp>,
    /// Only those accepted before this time.
    pub created_before: Option<Timestamp>,
    /// Oldest first instead of newest first.
    pub ascending: bool,
    /// Only those beyond this `job_number` in that order.
    pub after: Option<i64>,
}

/// What came of a wish to cancel a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelOutcome {
    /// It waited and is cancelled now.
    Cancelled,
    /// It runs; its worker has been told.
    Requested,
    /// It runs and had been told before.
    AlreadyRequested,
    /// It has ended like this.
    AlreadyFinal(JobStatus),
    /// There is no such job.
    NoSuchJob,
}

/// How many jobs are ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Jobs ahead of it, 0 is next. Counted up to 1000.
    pub ahead: i64,
    /// Whether there may be more.
    pub capped: bool,
}

impl Tx {
    /// Accepts a job: its row, prompt and first event, and a ticket if it is ready. Its session, if it has one,
    /// exists and is its owner's. Gives the job as stored.
    pub async fn insert_job(&mut self, job: &NewJob) -> Result<Job> {
        let group_key = match (&job.session_id, &job.concurrency_key) {
            (Some(session_id), _) => Some(format!("s:{session_id}")),
            (None, Some(key)) => Some(format!("k:{key}")),
            (None, None) => None,
        };
        self.lock_group(&job.key_id, group_key.as_deref()).await?;
        let ahead = match &group_key {
            Some(_) => {
                fetch!(
                    self,
                    "look for earlier jobs of the group",
                    fetch_optional => (i64,),
                    "select cast(1 as bigint) from job
                     where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
                     limit 1",
                    &job.key_id,
                    &group_key
                )?
                .is_some()
            }
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
            "insert into job (job_id, key_id, kind, hold, priority, group_key, session_id, run_after, deadline_at,
               max_attempts, on_worker_lost, model, effort, permission_mode, max_turns, timeout_seconds, max_cost,
               custom_id, metadata, created_at, last_event_seq)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, 1)
             returning *",
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
            job.created_at
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

    async fn cancel_waiting(
        &mut self,
        job: &Job,
        reason: CancelReason,
        now: Timestamp,
    ) -> Result<Option<CancelOutcome>> {
        self.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        self.lock_lane(&job.key_id).await?;
        let ended = self
            .end_waiting(job.job_id, &Ending::Cancelled, reason, now)
            .await?;
        Ok(ended.then_some(CancelOutcome::Cancelled))
    }

    /// Ends a job that waits, whose lane and group are locked; `false` if it doesn't wait any more. `Cancelled`
    /// takes the reason; `Failed` has its own.
    pub(super) async fn end_waiting(
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
            "update job set status = $2, cancel_reason = $3, error_code = $4, error = $5, completed_at = $6,
               version = version + 1
             where job_id = $1 and status = 'queued' returning *",
            job_id,
            status,
            reason,
            code,
            message,
            now
        )?;
        let Some(job) = ended else { return Ok(false) };
        self.finish_events(&job, &[event], now).await?;
        if job.hold != Hold::Order.as_str() {
            self.free_group(&job, now).await?;
        }
        Ok(true)
    }

    async fn request_cancel(
        &mut self,
        job_id: JobId,
        reason: CancelReason,
        now: Timestamp,
    ) -> Result<Option<CancelOutcome>> {
        let row = fetch_locked!(self, "read a job", fetch_optional => Job, "select * from job where job_id = $1", job_id)?;
        let Some(job) = row else {
            return Ok(Some(CancelOutcome::NoSuchJob));
        };
        match job.status {
            JobStatus::Running if job.cancel_requested_at.is_some() => {
                return Ok(Some(CancelOutcome::AlreadyRequested));
            }
            JobStatus::Running => {}
            JobStatus::Queued => return Ok(None),
            status => return Ok(Some(CancelOutcome::AlreadyFinal(status))),
        }
        execute!(
            self,
            "ask for a cancel",
            "update job set cancel_requested_at = $2, cancel_reason = $3, version = version + 1 where job_id = $1",
            job_id,
            now,
            reason
        )?;
        self.finish_events(
            &job,
            &[NewEvent::new(
                EventType::Cancelling,
                json!({ "reason": reason.as_str() }),
            )],
            now,
        )
        .await?;
        Ok(Some(CancelOutcome::Requested))
    }

    /// Locks the lane of this key until the end of the transaction; `false` when there is none.
    pub(super) async fn lock_lane(&mut self, key_id: &KeyId) -> Result<bool> {
        execute!(
            self,
            "lock a lane",
            "update lane set running = running where key_id = $1",
            key_id
        )
        .map(|rows| rows > 0)
    }

    /// Appends events to a job whose row this transaction holds, and counts them there.
    pub(super) async fn finish_events(
        &mut self,
        job: &Job,
        events: &[NewEvent],
        now: Timestamp,
    ) -> Result<()> {
        let seq = self
            .append_events(job.job_id, job.last_event_seq, events, now)
            .await?;
        execute!(
            self,
            "count events",
            "update job set last_event_seq = $2 where job_id = $1",
            job.job_id,
            seq
        )?;
        self.touch(job.job_id);
        Ok(())
    }

    /// The next job of the group may go on, now that this one, its first, has ended.
    pub(super) async fn free_group(&mut self, job: &Job, now: Timestamp) -> Result<()> {
        let Some(group_key) = &job.group_key else {
            return Ok(());
        };
        let next = fetch!(
            self,
            "let the next job of the group go on",
            fetch_optional => (JobId, String, i64),
            "update job set hold = case when run_after > $3 then 'delay' else '' end, version = version + 1
             where job_id = (
               select job_id from job
               where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
               order by job_number limit 1) and status = 'queued' and hold = 'order'
             returning job_id, hold, priority",
            &job.key_id,
            group_key,
            now
        )?;
        if let Some((job_id, hold, priority)) = next {
            self.touch(job_id);
            if hold.is_empty() {
                self.became_ready(&job.key_id, priority);
            }
        }
        Ok(())
    }
}

impl Store {
    /// Cancels a waiting job, or asks the worker of a running one to end it.
    pub async fn cancel_job(
        &self,
        job_id: JobId,
        reason: CancelReason,
        now: Timestamp,
    ) -> Result<CancelOutcome> {
        loop {
            let Some(job) = self.job(job_id).await? else {
                return Ok(CancelOutcome::NoSuchJob);
            };
            if job.status.is_final() {
                return Ok(CancelOutcome::AlreadyFinal(job.status));
            }
            let mut tx = self.begin().await?;
            let outcome = if job.status == JobStatus::Queued {
                // A running job is locked before its lane everywhere, a waiting one after it.
                tx.cancel_waiting(&job, reason, now).await?
            } else {
                tx.request_cancel(job_id, reason, now).await?
            };
            // It may have begun or been handed back between the look and the lock; then look again.
            if let Some(outcome) = outcome {
                tx.commit().await?;
                return Ok(outcome);
            }
            tx.rollback().await?;
        }
    }

    /// The job, if there is one.
    pub async fn job(&self, job_id: JobId) -> Result<Option<Job>> {
        read!(self, "read a job", fetch_optional => Job, "select * from job where job_id = $1", job_id)
    }

    /// The job's prompt; empty after retention.
    pub async fn prompt(&self, job_id: JobId) -> Result<String> {
        let row = read!(
            self,
            "read a prompt",
            fetch_optional => (String,),
            "select message from prompt where job_id = $1",
            job_id
        )?;
        Ok(row.map(|row| row.0).unwrap_or_default())
    }

    /// The job's result as JSON text, once a run has left one.
    pub async fn result(&self, job_id: JobId) -> Result<Option<String>> {
        let row = read!(
            self,
            "read a result",
            fetch_optional => (String,),
            "select result from result where job_id = $1",
            job_id
        )?;
        Ok(row.map(|row| row.0))
    }

    /// Up to `limit` jobs beyond the filter's position, in its order, each with its prompt (cut to 200 characters
    /// if `brief`).
    pub async fn jobs(&self, filter: &JobFilter, limit: i64, brief: bool) -> Result<Vec<(Job, String)>> {
        // Two builders, because a builder is of one database.
        macro_rules! rows {
            ($db:ty, $pool:expr) => {{
                let mut query = QueryBuilder::<$db>::new("select job.*, ");
                query.push(if brief {
                    "substr(coalesce(prompt.message, ''), 1, 200)"
                } else {
                    "coalesce(prompt.message, '')"
                });
                query.push(" as message from job left join prompt on prompt.job_id = job.job_id where 1 = 1");
                if let Some(key_id) = &filter.key_id {
                    query
                        .push(" and job.key_id = ")
                        .push_bind(key_id.as_str().to_owned());
                }
                if !filter.statuses.is_empty() {
                    query.push(" and job.status in (");
                    let mut list = query.separated(", ");
                    for status in &filter.statuses {
                        list.push_bind(status.as_str());
                    }
                    query.push(")");
                }
                if let Some(session_id) = filter.session_id {
                    query
                        .push(" and job.session_id = ")
                        .push_bind(session_id.to_string());
                }
                if let Some(custom_id) = &filter.custom_id {
                    query
                        .push(" and job.custom_id = ")
                        .push_bind(custom_id.clone());
                }
                if let Some(kind) = filter.kind {
                    query.push(" and job.kind = ").push_bind(kind);
                }
                if let Some(at) = filter.created_after {
                    query.push(" and job.created_at >= ").push_bind(at.0);
                }
                if let Some(at) = filter.created_before {
                    query.push(" and job.created_at < ").push_bind(at.0);
                }
                let (beyond, order) = if filter.ascending {
                    (" > ", "asc")
                } else {
                    (" < ", "desc")
                };
                if let Some(after) = filter.after {
                    query
                        .push(" and job.job_number")
                        .push(beyond)
                        .push_bind(after);
                }
                query
                    .push(" order by job.job_number ")
                    .push(order)
                    .push(" limit ")
                    .push_bind(limit);
                query
                    .build_query_as::<JobWithMessage>()
                    .fetch_all($pool)
                    .await
            }};
        }
        match &*self.db {
            super::Db::Sqlite { reader, .. } => rows!(Sqlite, reader),
            super::Db::Postgres(pool) => self.silence.in_time(async { rows!(Postgres, pool) }).await,
        }
        .map(|rows| rows.into_iter().map(|row| (row.job, row.message)).collect())
        .map_err(Error::during("list jobs"))
    }

    /// How many of the owner's jobs go before this queued job.
    pub async fn position(&self, job: &Job) -> Result<Position> {
        let counted = if job.hold == Hold::Order.as_str() {
            read!(
                self,
                "count the jobs ahead",
                fetch_one => (i64,),
                "select count(*) from (
                   select 1 from job
                   where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
                     and job_number < $3
                   limit 1000) as ahead",
                &job.key_id,
                &job.group_key,
                job.job_number
            )?
        } else {
            read!(
                self,
                "count the jobs ahead",
                fetch_one => (i64,),
                "select count(*) from (
                   select 1 from job where key_id = $1 and status = 'queued' and hold = '' and priority > $2
                   union all
                   select 1 from job
                   where key_id = $1 and status = 'queued' and hold = '' and priority = $2 and job_number < $3
                   limit 1000) as ahead",
                &job.key_id,
                job.priority,
                job.job_number
            )?
        };
        Ok(Position {
            ahead: counted.0,
            capped: counted.0 == 1000,
        })
    }

    /// What holds all jobs of this key, whatever their own state.
    pub async fn lane_hold(&self, key_id: &KeyId) -> Result<Option<Hold>> {
        let row = read!(
            self,
            "read a lane",
            fetch_optional => (Option<String>, Option<String>, bool),
            "select lane.hold, queue.hold, queue.paused from queue left join lane on lane.key_id = $1",
            key_id
        )?;
        Ok(row.and_then(|(lane, queue, paused)| {
            let own = lane.or(queue).and_then(|word| Hold::parse(&word));
            own.or(paused.then_some(Hold::Paused))
        }))
    }
}

#[derive(sqlx::FromRow)]
struct JobWithMessage {
    #[sqlx(flatten)]
    job: Job,
    message: String,
}
