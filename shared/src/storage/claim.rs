//! The claim: which job runs next. Highest priority first; within a priority keys take turns; within a key chats go
//! before other jobs, and then the oldest. Claims are made one at a time, so caps, turns and budgets are exact.

use super::budget::{self, Allowance};
use super::columns::columns;
use super::{Error, Result, Store, Tx, execute, fetch, read};
use crate::clock::Timestamp;
use crate::delivery::HookEvent;
use crate::event::{EventType, NewEvent};
use crate::id::{KeyId, WorkerId};
use crate::job::{CancelReason, Ending, Job, JobStatus, Lease, Resume, RunDefaults, RunOptions};
use crate::key::TextList;
use crate::money::MicroUsd;
use serde_json::json;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Who claims, and how it spends.
#[derive(Clone, Debug)]
pub struct Claimant {
    /// The worker.
    pub worker_id: WorkerId,
    /// The version of its CLI, for the record.
    pub cli_version: String,
    /// A run begins with no less money than this (or than it wants, if that is less).
    pub least_reserve: MicroUsd,
    /// What a job gets that doesn't say.
    pub defaults: RunDefaults,
}

/// What a claim found.
#[derive(Debug)]
pub enum Claim {
    /// A job to run; it is this worker's now.
    Run(Box<Lease>),
    /// A job that could not run was ended, or a hint was wrong: look again.
    TryAgain,
    /// Nothing to do.
    Nothing,
}

impl Store {
    /// Claims the best runnable job for this worker.
    pub async fn claim(&self, claimant: &Claimant, now: Timestamp) -> Result<Claim> {
        let asked = Instant::now();
        // Most looks find nothing; they needn't wait for the lock.
        let seen = self.more_ready.swap(false, Ordering::Relaxed);
        if !seen && !self.seems_runnable().await? {
            return Ok(Claim::Nothing);
        }
        let mut tx = self.begin_claim().await?;
        let Some((key_id, top, endpoints)) = tx.take_turn().await? else {
            tx.rollback().await?;
            return Ok(Claim::Nothing);
        };
        // The hint was stale: another lane may have a higher-priority job. Correct the hint and look again.
        let (job, next) = tx.head_of(&key_id).await?;
        let Some(job) = job.filter(|job| job.priority >= top) else {
            tx.give_back_turn(&key_id).await?;
            tx.commit().await?;
            return Ok(Claim::TryAgain);
        };
        // The locks may have taken a while, in which an earlier attempt ended: this one began after it.
        let now = now.plus(asked.elapsed());
        // A job is ended under its group's lock, which comes before the locks that a claim holds: so in another
        // transaction, and the turn is left untaken.
        if job.deadline_at.is_some_and(|at| at <= now) {
            tx.rollback().await?;
            self.cancel_job(job.job_id, CancelReason::Deadline, now).await?;
            return Ok(Claim::TryAgain);
        }
        let left = job.cost_left();
        if left <= MicroUsd::ZERO {
            tx.rollback().await?;
            self.fail_used_up(&job, now).await?;
            return Ok(Claim::TryAgain);
        }
        // Most jobs fit, and then nothing is locked to see that they do: the condition of the reservation decides.
        let budgets = tx.read_budgets(&key_id, now).await?;
        if let Allowance::Reserve(amount) = budget::allow(&budgets, left, claimant.least_reserve) {
            if !tx.reserve(&key_id, &budgets, amount, now).await? {
                tx.rollback().await?;
                return Ok(Claim::TryAgain);
            }
            let held_at = Instant::now();
            let claimed = tx.begin_attempt(job, claimant, amount, now).await?;
            let endpoints = endpoints > 0;
            tx.announce_job(&claimed, HookEvent::JobStarted, endpoints, now)
                .await?;
            if next != Some(top) {
                tx.lower_hint(&key_id).await?;
            }
            tx.commit().await?;
            self.more_ready.store(next.is_some(), Ordering::Relaxed);
            return self.lease((claimed, endpoints), amount, held_at, now).await;
        }
        let budgets = tx.lock_budgets(&key_id, now).await?;
        match budget::allow(&budgets, left, claimant.least_reserve) {
            // Money came back meanwhile.
            Allowance::Reserve(_) => tx.rollback().await?,
            Allowance::Wait { everybody } => {
                tx.hold_for_budget(&key_id, everybody).await?;
                tx.give_back_turn(&key_id).await?;
                tx.commit().await?;
            }
            Allowance::Exceeded { .. } => {
                tx.rollback().await?;
                self.fail_unaffordable(&job, claimant.least_reserve, now).await?;
            }
        }
        Ok(Claim::TryAgain)
    }

    /// What the holder of a claimed job must know beside its row. Nobody else changes it while the job runs, so it is read
    /// after the lock of the claims was given back. A job of which it can't be read is handed back.
    async fn lease(
        &self,
        (job, endpoints): (Job, bool),
        reserved: MicroUsd,
        held_at: Instant,
        now: Timestamp,
    ) -> Result<Claim> {
        let (job_id, attempt) = (job.job_id, job.attempt);
        let read = async {
            let run = self.what_to_run(&job).await?;
            Ok((run, self.resumable(&job).await?))
        };
        match read.await {
            Ok(((message, options, allowed_models), (resume, working_dir))) => {
                Ok(Claim::Run(Box::new(Lease {
                    job,
                    held_at,
                    message,
                    options,
                    allowed_models,
                    reserved,
                    working_dir,
                    resume,
                    endpoints,
                })))
            }
            Err(error) => match self.release_run(job_id, attempt, now).await {
                Ok(_) => Err(error),
                Err(error) => Err(error.after_commit()),
            },
        }
    }

    /// Fails a waiting job whose earlier attempts have cost all that it may cost.
    async fn fail_used_up(&self, job: &Job, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        tx.lock_lane(&job.key_id).await?;
        let ending = Ending::Failed {
            code: "max_cost".to_owned(),
            message: format!(
                "The job's earlier attempts have cost {} of the {} that it may cost. Allow more with `max_cost_usd`, or \
                 go on in the same session.",
                job.cost, job.max_cost
            ),
        };
        tx.end_waiting(job.job_id, &ending, CancelReason::User, now)
            .await?;
        tx.commit().await
    }

    /// The prompt, what only the run needs, and the models that the key may use now.
    async fn what_to_run(&self, job: &Job) -> Result<(String, RunOptions, Vec<String>)> {
        let (message, options, allowed_models) = read!(
            self,
            "read a prompt",
            fetch_one => (String, String, Option<String>),
            "select message, options, (select allowed_models from api_key where key_id = $2) from prompt
             where job_id = $1",
            job.job_id,
            &job.key_id
        )?;
        let allowed_models = allowed_models
            .map_or(Ok(TextList::default()), TextList::try_from)
            .map_err(|error| Error::during("read a key's models")(error.to_string()))?;
        let options = serde_json::from_str(&options)
            .map_err(|error| Error::during("read a prompt")(error.to_string()))?;
        Ok((message, options, allowed_models.0))
    }

    /// The Claude sessions that the next run might continue, best first: this job's earlier attempts, then what its
    /// session's last job left. And the folder that its session works in, if that isn't its own.
    async fn resumable(&self, job: &Job) -> Result<(Vec<Resume>, Option<String>)> {
        if job.attempt == 1 && job.session_id.is_none() {
            return Ok((Vec::new(), None));
        }
        let mut working_dir = None;
        let attempts = read!(
            self,
            "read earlier attempts",
            fetch_all => (i64, String, Option<String>),
            "select attempt, claude_session_id, error_code from attempt where job_id = $1 and attempt < $2 order by attempt desc",
            job.job_id,
            job.attempt
        )?;
        // The CLI couldn't continue a conversation whose transcript is there: trying again would end the same way.
        let futile = attempts
            .iter()
            .any(|(.., code)| code.as_deref() == Some("session_not_found"));
        let mut resumable: Vec<Resume> = attempts
            .into_iter()
            .map(|(attempt, claude_session_id, _)| Resume {
                claude_session_id,
                interrupted: Some(attempt),
            })
            .collect();
        if let Some(session_id) = job.session_id {
            let session = read!(
                self,
                "read a session",
                fetch_optional => (Option<String>, Option<String>),
                "select claude_session_id, working_dir from session where session_id = $1",
                session_id
            )?;
            let (left, in_place) = session.unwrap_or_default();
            working_dir = in_place;
            resumable.extend(left.map(|claude_session_id| Resume {
                claude_session_id,
                interrupted: None,
            }));
        }
        if futile {
            resumable.clear();
        }
        Ok((resumable, working_dir))
    }

    /// Fails a waiting job that no budget leaves enough money for, if that is still so.
    async fn fail_unaffordable(&self, job: &Job, least: MicroUsd, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        tx.lock_lane(&job.key_id).await?;
        let budgets = tx.lock_budgets(&job.key_id, now).await?;
        if let Allowance::Exceeded {
            everybody,
            spent,
            limit,
        } = budget::allow(&budgets, job.cost_left(), least)
        {
            let which = if everybody { "global" } else { "key's" };
            let need = least.min(job.cost_left());
            let ending = Ending::Failed {
                code: "budget_exceeded".to_owned(),
                message: format!(
                    "The {which} budget is used up: {spent} of {limit} spent, and a run needs {need} to begin. Raise \
                     it, or wait for its next period, and submit the job again."
                ),
            };
            tx.end_waiting(job.job_id, &ending, CancelReason::User, now)
                .await?;
        }
        tx.commit().await
    }
}

impl Tx {
    /// The first of the lane's ready jobs, and the priority of the second.
    async fn head_of(&mut self, key_id: &KeyId) -> Result<(Option<Job>, Option<i64>)> {
        let jobs = fetch!(
            self,
            "find the lane's first job",
            fetch_all => Job,
            concat!("select ", columns!(Job), " from job where key_id = $1 and status = 'queued' and hold = ''
             order by priority desc, kind, job_number limit 2"),
            key_id
        )?;
        let mut jobs = jobs.into_iter();
        Ok((jobs.next(), jobs.next().map(|job| job.priority)))
    }

    async fn begin_attempt(
        &mut self,
        job: Job,
        claimant: &Claimant,
        reserved: MicroUsd,
        now: Timestamp,
    ) -> Result<Job> {
        let defaults = &claimant.defaults;
        let claude_session_id = uuid::Uuid::new_v4().to_string();
        let claimed = fetch!(
            self,
            "claim a job",
            fetch_one => Job,
            concat!("update job set status = 'running', attempt = attempt + 1, lease_owner = $2, renewals = 0,
               claude_session_id = $3, run_after = null, started_at = coalesce(started_at, $4),
               model = coalesce(model, $5), effort = coalesce(effort, $6),
               permission_mode = coalesce(permission_mode, $7), max_turns = coalesce(max_turns, $8),
               timeout_seconds = coalesce(timeout_seconds, $9), spend = null, version = version + 1,
               last_event_seq = last_event_seq + 1
             where job_id = $1 and status = 'queued' and hold = '' returning ", columns!(Job)),
            job.job_id,
            claimant.worker_id,
            &claude_session_id,
            now,
            &defaults.model,
            &defaults.effort,
            &defaults.permission_mode,
            defaults.turns_of(&job),
            defaults.timeout_of(&job)
        )?;
        execute!(
            self,
            "begin an attempt",
            "insert into attempt (job_id, attempt, worker_id, claude_session_id, cli_version, reserved, started_at)
             values ($1, $2, $3, $4, $5, $6, $7)",
            claimed.job_id,
            claimed.attempt,
            claimant.worker_id,
            &claude_session_id,
            &claimant.cli_version,
            reserved,
            now
        )?;
        let running = json!({ "status": JobStatus::Running, "attempt": claimed.attempt });
        let event = NewEvent::new(EventType::Status, running);
        self.append_events(claimed.job_id, claimed.last_event_seq - 1, &[event], now)
            .await?;
        Ok(claimed)
    }
}
