//! The end of a run: what becomes of its job, written once.

use super::{Finish, storable, usage_of, usage_text};
use crate::clock::Timestamp;
use crate::event::{EventType, NewEvent};
use crate::job::{CancelReason, Ending, Hold, Job, JobStatus, Lease, Report, TokenUsage};
use crate::money::MicroUsd;
use crate::storage::{Result, Store, Tx, execute, fetch};
use serde_json::{Value, json};

impl Store {
    /// Ends a run: the result, the cost, the status, all in one transaction.
    pub async fn finish(&self, lease: &Lease, report: &Report, now: Timestamp) -> Result<Finish> {
        let mut tx = self.begin_end_of_run().await?;
        let job = &lease.job;
        tx.lock_session(job.session_id).await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        // The lease keeps the row as it was claimed, but for a cancel, which decides about another attempt.
        let again = matches!(report.ending, Ending::Retry { .. } | Ending::Released);
        let ended = if again {
            match tx.lock_running(job.job_id, job.attempt).await? {
                Some(now_is) => {
                    let before = tx.settled(job.job_id).await?;
                    tx.end_run(&now_is, before, report, EndedBy::Worker, now).await?
                }
                None => None,
            }
        } else {
            let before = (job.cost, usage_of(job));
            tx.end_run(job, before, report, EndedBy::Worker, now).await?
        };
        let Some(status) = ended else {
            tx.rollback().await?;
            return Ok(Finish::Lost);
        };
        tx.commit().await?;
        Ok(Finish::Became(status))
    }
}

impl Tx {
    /// Ends the run of a job, whose group is locked, with this cost and usage `before` it; `None` when the run isn't this
    /// job's any more. What many runs write, the lane and the budgets, comes last, so that it is locked for a short time.
    pub(super) async fn end_run(
        &mut self,
        job: &Job,
        before: (MicroUsd, TokenUsage),
        report: &Report,
        by: EndedBy,
        now: Timestamp,
    ) -> Result<Option<JobStatus>> {
        let mut next = Next::of(job, report, now);
        let spend = report.spend.distinct();
        let (spent, mut usage) = (spend.total(), before.1);
        usage += spend.usage();
        let count = report.events.len() + next.events(job, report, now).len();
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let row = fetch!(
            self,
            "end a run",
            fetch_optional => (i64, Option<CancelReason>),
            "update job set status = $2, hold = $3, run_after = $4, failures = $5, error = $6, error_code = $7,
               cancel_reason = case when $2 = 'cancelled' then coalesce(cancel_reason, $8) else null end,
               completed_at = $9, duration_ms = duration_ms + $10, lease_owner = null, spend = null, wait_since = $12,
               wait_reason = $13, cost = $14, usage = $15, last_event_seq = last_event_seq + $16, version = version + 1
             where job_id = $1 and attempt = $11 and status = 'running'
             returning last_event_seq, cancel_reason",
            job.job_id,
            next.status,
            next.hold,
            next.run_after,
            next.failures,
            &next.error,
            &next.error_code,
            next.cancel_reason,
            next.status.is_final().then_some(now),
            i64::try_from(report.duration.as_millis()).unwrap_or(i64::MAX),
            job.attempt,
            next.wait.as_ref().map(|wait| wait.0),
            next.wait.as_ref().map(|wait| storable(&wait.1)),
            before.0 + spent,
            usage_text(usage),
            count
        )?;
        let Some((seq, cancel_reason)) = row else {
            return Ok(None);
        };
        next.cancel_reason = cancel_reason;
        let reserved = fetch!(
            self,
            "end an attempt",
            fetch_one => (MicroUsd, Timestamp),
            "update attempt set ended_at = $3, ending = $4, error_code = $5, cost = $6, turns = $7, exit = $8,
               stderr_tail = $9, reported_cost = $10
             where job_id = $1 and attempt = $2 returning reserved, started_at",
            job.job_id,
            job.attempt,
            now,
            match by {
                EndedBy::Worker => next.attempt_ending,
                EndedBy::LostLease => "lost",
            },
            &next.attempt_code,
            spent,
            report.turns,
            storable(&report.exit),
            storable(&report.stderr_tail),
            report.spend.reported
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
        self.write_ledger(job, &spend, false, now).await?;
        let mut events = report.events.clone();
        events.extend(next.events(job, report, now));
        self.append_events(job.job_id, seq - count, &events, now).await?;
        if by == EndedBy::LostLease {
            self.direct(job.job_id);
        }
        let endpoints = self.free_slot(&job.key_id).await?;
        if next.status.is_final() {
            self.conclude(job, (next.status, endpoints), now).await?;
        } else if next.hold.is_empty() {
            self.became_ready(&job.key_id, job.priority);
        }
        self.settle(&job.key_id, spent, reserved, now).await?;
        Ok(Some(next.status))
    }
}

/// Who ends an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndedBy {
    /// Its worker.
    Worker,
    /// A sweeper: its worker is lost.
    LostLease,
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
