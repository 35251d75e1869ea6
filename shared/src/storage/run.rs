//! What the holder of a lease may write: events, renewals, the end. Everything is guarded by (job, attempt), so a
//! worker that lost its lease writes nothing.

use super::{Error, Result, Store, Tx, TxDb, execute, fetch, fetch_locked, read};
use crate::budget::Scope;
use crate::clock::Timestamp;
use crate::event::{EventType, NewEvent};
use crate::id::{JobId, SessionId, WorkerId};
use crate::job::{
    CancelReason, Ending, Hold, Job, JobStatus, Lease, OnWorkerLost, Report, Spend, TokenUsage,
};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::Duration;

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

impl Store {
    /// Renews the lease, stores events and the cost so far, and learns whether to go on. Costs one transaction.
    pub async fn record(
        &self,
        lease: &Lease,
        events: &[NewEvent],
        spend: Option<&Spend>,
        now: Timestamp,
    ) -> Result<RunDirective> {
        let mut tx = self.begin().await?;
        let signal = tx.record(lease, None, events, spend, now).await?;
        tx.commit().await?;
        Ok(signal.unwrap_or(RunDirective::Lost))
    }

    /// The same after a try whose outcome isn't known and which may be under way still: writes only if the lease was
    /// renewed so many times and no more. `None`: it was renewed again or is gone; [`Store::renewals`] tells.
    pub async fn record_again(
        &self,
        lease: &Lease,
        renewals: i64,
        events: &[NewEvent],
        spend: Option<&Spend>,
        now: Timestamp,
    ) -> Result<Option<RunDirective>> {
        let mut tx = self.begin().await?;
        let signal = tx.record(lease, Some(renewals), events, spend, now).await?;
        tx.commit().await?;
        Ok(signal)
    }

    /// Says that `dropped` events of the run weren't kept: their numbers are used up, and a `gap` event follows them.
    pub async fn record_gap(&self, lease: &Lease, dropped: i64, now: Timestamp) -> Result<RunDirective> {
        let mut tx = self.begin().await?;
        let row = fetch!(
            tx,
            "leave events out",
            fetch_optional => (i64,),
            "update job set last_event_seq = last_event_seq + $3 + 1, version = version + 1
             where job_id = $1 and attempt = $2 and status = 'running' returning last_event_seq",
            lease.job.job_id,
            lease.job.attempt,
            dropped
        )?;
        let Some((seq,)) = row else {
            return Ok(RunDirective::Lost);
        };
        let gap = NewEvent::new(EventType::Gap, json!({ "from": seq - dropped, "to": seq - 1 }));
        tx.append_events(lease.job.job_id, seq - 1, &[gap], now).await?;
        tx.commit().await?;
        Ok(RunDirective::Continue)
    }

    /// Whether a run should go on, without writing anything.
    pub async fn signal(&self, lease: &Lease) -> Result<RunDirective> {
        let row = read!(
            self,
            "look at a run",
            fetch_optional => (Option<CancelReason>,),
            "select case when cancel_requested_at is null then null else cancel_reason end from job
             where job_id = $1 and attempt = $2 and status = 'running'",
            lease.job.job_id,
            lease.job.attempt
        )?;
        Ok(match row {
            None => RunDirective::Lost,
            Some((Some(reason),)) => RunDirective::Cancel(reason),
            Some((None,)) => RunDirective::Continue,
        })
    }

    /// How often the lease was renewed; `None` when it's gone.
    pub async fn renewals(&self, lease: &Lease) -> Result<Option<i64>> {
        let row = read!(
            self,
            "look at a lease",
            fetch_optional => (i64,),
            "select renewals from job where job_id = $1 and attempt = $2 and status = 'running'",
            lease.job.job_id,
            lease.job.attempt
        )?;
        Ok(row.map(|row| row.0))
    }

    /// Ends a run: the result, the cost, the status, all in one transaction.
    pub async fn finish(&self, lease: &Lease, report: &Report, now: Timestamp) -> Result<Finish> {
        let mut tx = self.begin().await?;
        let job = &lease.job;
        tx.lock_session(job.session_id).await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        let Some(job) = tx.lock_running(job.job_id, job.attempt).await? else {
            tx.rollback().await?;
            return Ok(Finish::Lost);
        };
        let status = tx.end_run(&job, report, Told::ByWorker, now).await?;
        tx.commit().await?;
        Ok(Finish::Became(status))
    }

    /// Hands back jobs that this worker has claimed without knowing: a connection can be lost after the commit. `known`
    /// are its live leases, as job and attempt; its other runs never began. Gives how many there were. The caller makes
    /// no claim meanwhile.
    pub async fn release_unknown(
        &self,
        worker_id: WorkerId,
        known: &HashSet<(JobId, i64)>,
        now: Timestamp,
    ) -> Result<u64> {
        let mut tx = self.begin().await?;
        // Whoever commits still holds it.
        tx.lock_claims().await?;
        let claimed = fetch!(
            tx,
            "look for unknown claims",
            fetch_all => Job,
            "select * from job where status = 'running' and lease_owner = $1",
            worker_id
        )?;
        tx.rollback().await?;
        let unknown = claimed
            .into_iter()
            .filter(|job| !known.contains(&(job.job_id, job.attempt)));
        let mut released = 0;
        for job in unknown {
            let mut tx = self.begin().await?;
            tx.lock_session(job.session_id).await?;
            tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
            if let Some(job) = tx.lock_running(job.job_id, job.attempt).await? {
                tx.end_run(&job, &never_began(), Told::ByWorker, now).await?;
                released += 1;
            }
            tx.commit().await?;
        }
        Ok(released)
    }

    /// Takes the lease of a run that hasn't been renewed since `renewals` was read, and decides what becomes of the
    /// job. `false` when it was renewed or ended meanwhile.
    pub async fn take_lost(&self, job: &Job, attempt: i64, renewals: i64, now: Timestamp) -> Result<bool> {
        let mut tx = self.begin().await?;
        tx.lock_session(job.session_id).await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        let current = tx.lock_running(job.job_id, attempt).await?;
        let same = match &current {
            Some(job) => tx.renewals(job.job_id).await? == renewals,
            None => false,
        };
        let Some(job) = current.filter(|_| same) else {
            tx.rollback().await?;
            return Ok(false);
        };
        let report = tx.report_of_lost(&job, now).await?;
        tx.end_run(&job, &report, Told::Never, now).await?;
        tx.commit().await?;
        Ok(true)
    }
}

impl Tx {
    /// `None` when the lease is gone, or was renewed another number of times than `renewals`.
    pub(super) async fn record(
        &mut self,
        lease: &Lease,
        renewals: Option<i64>,
        events: &[NewEvent],
        spend: Option<&Spend>,
        now: Timestamp,
    ) -> Result<Option<RunDirective>> {
        let job = &lease.job;
        let count = i64::try_from(events.len()).unwrap_or(i64::MAX);
        let cost = spend.map(|spend| job.cost + spend.total());
        let usage = spend.map(|spend| usage_so_far(job, spend));
        let row = fetch!(
            self,
            "renew a lease",
            fetch_optional => (i64, Option<CancelReason>),
            "update job set renewals = renewals + 1, last_event_seq = last_event_seq + $3,
               version = version + $6, cost = coalesce($4, cost), usage = coalesce($5, usage)
             where job_id = $1 and attempt = $2 and status = 'running' and renewals = coalesce($7, renewals)
             returning last_event_seq, case when cancel_requested_at is null then null else cancel_reason end",
            job.job_id,
            job.attempt,
            count,
            cost,
            usage,
            i64::from(count > 0 || spend.is_some()),
            renewals
        )?;
        let Some((seq, cancel)) = row else {
            return Ok(None);
        };
        self.append_events(job.job_id, seq - count, events, now).await?;
        if let Some(spend) = spend {
            execute!(
                self,
                "keep the cost so far",
                "update attempt set spend = $3, cost = $4 where job_id = $1 and attempt = $2",
                job.job_id,
                job.attempt,
                serde_json::to_string(spend)
                    .map_err(|error| Error::during("keep the cost so far")(error.to_string()))?,
                spend.total()
            )?;
        }
        Ok(Some(cancel.map_or(RunDirective::Continue, RunDirective::Cancel)))
    }

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
            "select * from job where job_id = $1 and attempt = $2 and status = 'running'",
            job_id,
            attempt
        )
    }

    async fn renewals(&mut self, job_id: JobId) -> Result<i64> {
        fetch!(
            self,
            "read a lease",
            fetch_one => (i64,),
            "select renewals from job where job_id = $1",
            job_id
        )
        .map(|row| row.0)
    }

    /// What is known of a run whose worker is gone.
    async fn report_of_lost(&mut self, job: &Job, now: Timestamp) -> Result<Report> {
        let (spend, started_at) = fetch!(
            self,
            "read an attempt",
            fetch_one => (Option<String>, Timestamp),
            "select spend, started_at from attempt where job_id = $1 and attempt = $2",
            job.job_id,
            job.attempt
        )?;
        let spend: Option<Spend> = spend.and_then(|text| serde_json::from_str(&text).ok());
        let (code, message) = ("worker_lost".to_owned(), lost_message(job));
        let ending = match job.on_worker_lost {
            _ if job.cancel_requested_at.is_some() => Ending::Cancelled,
            OnWorkerLost::Resume => Ending::Retry {
                code,
                message,
                run_after: now,
                hold: Hold::Delay,
                counts: true,
            },
            OnWorkerLost::Fail => Ending::Failed { code, message },
        };
        Ok(Report {
            ending,
            result: None,
            spend: Spend {
                estimated: true,
                ..spend.unwrap_or_default()
            },
            duration: now.since(started_at),
            turns: 0,
            claude_session_id: None,
            stderr_tail: String::new(),
            exit: "its worker was lost".to_owned(),
        })
    }

    /// Ends the run of a job whose row and group are locked.
    async fn end_run(&mut self, job: &Job, report: &Report, told: Told, now: Timestamp) -> Result<JobStatus> {
        let next = Next::of(job, report, now);
        let duration_ms = i64::try_from(report.duration.as_millis()).unwrap_or(i64::MAX);
        let completed_at = next.status.is_final().then_some(now);
        execute!(
            self,
            "end a run",
            "update job set status = $2, hold = $3, run_after = $4, failures = $5, error = $6, error_code = $7,
               cancel_reason = $8, completed_at = $9, duration_ms = duration_ms + $10, lease_owner = null,
               wait_since = $12, wait_reason = $13, version = version + 1
             where job_id = $1 and attempt = $11 and status = 'running'",
            job.job_id,
            next.status,
            next.hold,
            next.run_after,
            next.failures,
            &next.error,
            &next.error_code,
            next.cancel_reason,
            completed_at,
            duration_ms,
            job.attempt,
            next.wait.as_ref().map(|wait| wait.0),
            next.wait.as_ref().map(|wait| storable(&wait.1))
        )?;
        let lane = fetch!(
            self,
            "free a lane's slot",
            fetch_optional => (Option<i64>, i64, Option<String>),
            "update lane set running = running - 1 where key_id = $1 returning top, max_running - running, hold",
            &job.key_id
        )?;
        if let Some((top, room, hold)) = lane {
            if hold.as_deref() == Some(Hold::Budget.as_str()) {
                self.free_from_budget(&Scope::Key(job.key_id.clone())).await?;
            }
            // Only a lane that was full has a job that could not begin before.
            if top.is_some() && room == 1 {
                self.ring();
            }
        }
        if next.status.is_final() {
            self.free_group(job, now).await?;
        } else if next.hold.is_empty() {
            self.became_ready(&job.key_id, job.priority);
        }
        let spent = self.settle(job, &report.spend, now).await?;
        let (cost, usage) = self.settled(job.job_id).await?;
        execute!(
            self,
            "add up a job's cost",
            "update job set cost = $2, usage = $3 where job_id = $1",
            job.job_id,
            cost,
            usage_text(usage)
        )?;
        execute!(
            self,
            "end an attempt",
            "update attempt set ended_at = $3, ending = $4, error_code = $5, cost = $6, turns = $7, exit = $8,
               stderr_tail = $9, spend = null
             where job_id = $1 and attempt = $2",
            job.job_id,
            job.attempt,
            now,
            match told {
                Told::ByWorker => next.attempt_ending,
                Told::Never => "lost",
            },
            &next.attempt_code,
            spent,
            report.turns,
            storable(&report.exit),
            storable(&report.stderr_tail)
        )?;
        if let Some(result) = &report.result {
            execute!(
                self,
                "store a result",
                "insert into result (job_id, result) values ($1, $2)
                 on conflict (job_id) do update set result = excluded.result",
                job.job_id,
                result.to_string()
            )?;
        }
        if let Some(session_id) = job.session_id {
            execute!(
                self,
                "bring the session up to date",
                "update session set total_cost = total_cost + $2, total_turns = total_turns + $3, updated_at = $4,
                   claude_session_id = coalesce($5, claude_session_id)
                 where session_id = $1",
                session_id,
                spent,
                report.turns,
                now,
                report.claude_session_id.as_ref().filter(|_| next.status.is_final())
            )?;
        }
        self.finish_events(job, &next.events(job, report, now), now)
            .await?;
        Ok(next.status)
    }

    /// A slot should look, although no job became ready in this transaction.
    pub(super) fn ring(&mut self) {
        self.rings = true;
    }
}

/// Who told the end of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Its worker.
    ByWorker,
    /// Nobody: its worker is lost.
    Never,
}

/// What becomes of a job when a run of it ends: decided once, then written.
struct Next {
    status: JobStatus,
    hold: &'static str,
    run_after: Option<Timestamp>,
    failures: i64,
    error: Option<String>,
    error_code: Option<String>,
    cancel_reason: Option<CancelReason>,
    attempt_ending: &'static str,
    /// How the attempt failed, also when the job itself hasn't.
    attempt_code: Option<String>,
    /// Since when the job waits for the Messages API, and why.
    wait: Option<(Timestamp, String)>,
}

impl Next {
    fn of(job: &Job, report: &Report, now: Timestamp) -> Self {
        let next = Self::of_done(job);
        let failed = |failures, code: &str, message: &str| Self {
            status: JobStatus::Failed,
            failures,
            error: Some(storable(message)),
            error_code: Some(code.to_owned()),
            attempt_ending: "failed",
            attempt_code: Some(code.to_owned()),
            ..Self::of_done(job)
        };
        // Another attempt of a job that somebody wants cancelled would be one too many.
        let unwanted = job.cancel_requested_at.is_some();
        match &report.ending {
            Ending::Done => next,
            Ending::Failed { code, message } => failed(job.failures, code, message),
            Ending::Retry { .. } | Ending::Released if unwanted => Self::cancelled(job),
            Ending::Cancelled => Self::cancelled(job),
            Ending::Released => Self {
                status: JobStatus::Queued,
                attempt_ending: "released",
                wait: job.wait_since.zip(job.wait_reason.clone()),
                ..next
            },
            Ending::Retry {
                code,
                message,
                run_after,
                hold,
                counts,
            } => {
                let failures = job.failures + i64::from(*counts);
                if failures >= job.max_attempts {
                    return failed(failures, code, message);
                }
                let later = *run_after > now;
                let waits = matches!(hold, Hold::Upstream | Hold::UsageLimit);
                Self {
                    wait: waits.then(|| (job.wait_since.unwrap_or(now), message.clone())),
                    status: JobStatus::Queued,
                    hold: if later { hold.as_str() } else { "" },
                    run_after: later.then_some(*run_after),
                    failures,
                    attempt_code: Some(code.clone()),
                    attempt_ending: "retry",
                    ..next
                }
            }
        }
    }

    fn of_done(job: &Job) -> Self {
        Self {
            status: JobStatus::Done,
            hold: "",
            run_after: None,
            failures: job.failures,
            error: None,
            error_code: None,
            cancel_reason: None,
            attempt_ending: "done",
            attempt_code: None,
            wait: None,
        }
    }

    fn cancelled(job: &Job) -> Self {
        Self {
            status: JobStatus::Cancelled,
            cancel_reason: Some(job.cancel_reason.unwrap_or(CancelReason::User)),
            attempt_ending: "cancelled",
            ..Self::of_done(job)
        }
    }

    /// The events that say so; the last one of a final status carries the result.
    fn events(&self, job: &Job, report: &Report, now: Timestamp) -> Vec<NewEvent> {
        let with_result = |mut data: Value| {
            if let (Some(data), Some(result)) = (data.as_object_mut(), &report.result) {
                data.insert("result".to_owned(), result.clone());
            }
            data
        };
        match self.status {
            JobStatus::Done => vec![NewEvent::new(
                EventType::Done,
                report.result.clone().unwrap_or_else(|| json!({})),
            )],
            JobStatus::Failed => {
                let data = json!({ "error": self.error, "code": self.error_code });
                vec![NewEvent::new(EventType::Error, with_result(data))]
            }
            JobStatus::Cancelled => {
                let data = json!({ "reason": self.cancel_reason.map(CancelReason::as_str) });
                vec![NewEvent::new(EventType::Cancelled, with_result(data))]
            }
            JobStatus::Queued | JobStatus::Running => {
                let mut events = Vec::new();
                let mut queued = json!({ "status": self.status, "attempt": job.attempt });
                if let Ending::Retry { code, .. } = &report.ending {
                    let delay = self.run_after.map_or(0, |at| at.since(now).as_millis());
                    let data = json!({ "attempt": job.attempt + 1, "delay_ms": delay, "error_code": code });
                    events.push(NewEvent::new(EventType::Retry, data));
                    queued["reason"] = json!(code);
                } else {
                    queued["reason"] = json!("shutdown");
                }
                events.push(NewEvent::new(EventType::Status, queued));
                events
            }
        }
    }
}

fn never_began() -> Report {
    Report {
        ending: Ending::Released,
        result: None,
        spend: Spend::default(),
        duration: Duration::ZERO,
        turns: 0,
        claude_session_id: None,
        stderr_tail: String::new(),
        exit: "not started".to_owned(),
    }
}

/// PostgreSQL's text holds no NUL, and what a program wrote may.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

fn lost_message(job: &Job) -> String {
    match job.on_worker_lost {
        OnWorkerLost::Fail => {
            "The worker that ran the job was lost, and the job asked not to be run again. Check what \
                               it has done before you submit it again."
                .to_owned()
        }
        OnWorkerLost::Resume => format!(
            "The worker that ran the job was lost, at failure {} of at most {}. If the job itself ends its worker \
             (memory, disk), make it smaller; else submit it again.",
            job.failures + 1,
            job.max_attempts
        ),
    }
}

fn usage_text(usage: TokenUsage) -> String {
    serde_json::to_string(&usage).unwrap_or_default()
}

/// The tokens of the earlier attempts and of this one. `job` is as it was claimed.
fn usage_so_far(job: &Job, spend: &Spend) -> String {
    let mut usage = spend.usage();
    usage += job
        .usage
        .as_deref()
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    usage_text(usage)
}
