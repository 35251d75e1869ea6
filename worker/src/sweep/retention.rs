//! Retention: what ended jobs have left is removed when it is old enough, or when its owner has removed the rest. The
//! workspaces of sessions stay until their sessions are deleted.

use super::MAX_BATCHES;
use crate::context::Context;
use crate::workspace::Folders;
use shared::clock;
use shared::id::{JobId, SessionId};
use shared::job::Job;
use shared::storage::{Result, Workspace};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use tracing::warn;

/// How long deleted text may stay in the log of a SQLite database.
const ERASE_INTERVAL: Duration = Duration::from_secs(30);

/// Removes old data, again and again.
#[derive(Debug, Default)]
pub(super) struct Retention {
    /// Jobs whose workspaces couldn't be removed; each is told once.
    stuck: HashSet<JobId>,
    /// When deleted text was last erased from the files of the database.
    erased: Option<Instant>,
    /// The same of deleted sessions.
    stuck_sessions: HashSet<SessionId>,
}

impl Retention {
    /// Removes what is to be removed now, up to a thousand jobs of each kind. Whatever happens in between, the next
    /// sweep finds the rest.
    pub(super) async fn sweep(&mut self, ctx: &Context) -> Result<()> {
        self.finish_removals(ctx).await?;
        if self.erased.is_none_or(|erased| erased.elapsed() > ERASE_INTERVAL) {
            ctx.store.erase_deleted().await?;
            self.erased = Some(Instant::now());
        }
        self.remove_sessions(ctx).await?;
        if ctx.store.check_clock().await?.is_some() {
            return Ok(());
        }
        let before = clock::now().before(ctx.config.retention);
        for _ in 0..MAX_BATCHES {
            if ctx.store.forget_deliveries(before).await? == 0 {
                break;
            }
        }
        let mut last = None;
        for _ in 0..MAX_BATCHES {
            let jobs = ctx.store.expired_jobs(before, last.as_ref()).await?;
            for job in &jobs {
                if self.remove_workspace(ctx, job).await {
                    ctx.store.remove_data(job.job_id, Workspace::Gone).await?;
                }
            }
            last = jobs.into_iter().next_back();
            if last.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Removes the workspaces of jobs whose owners have removed the rest.
    async fn finish_removals(&mut self, ctx: &Context) -> Result<()> {
        let mut last = 0;
        for _ in 0..MAX_BATCHES {
            let jobs = ctx.store.workspaces_to_remove(last).await?;
            for job in &jobs {
                if self.remove_workspace(ctx, job).await {
                    ctx.store.workspace_removed(job.job_id).await?;
                }
            }
            let Some(job) = jobs.last() else { break };
            last = job.job_number;
        }
        Ok(())
    }

    /// Removes the folders of deleted sessions, each once no job of it runs any more; and cancels what whoever deleted the
    /// session has left.
    async fn remove_sessions(&mut self, ctx: &Context) -> Result<()> {
        let mut last = 0;
        for _ in 0..MAX_BATCHES {
            let sessions = ctx.store.sessions_to_remove(last).await?;
            for session in &sessions {
                if ctx.store.cancel_jobs_of_session(session).await? > 0 {
                    continue;
                }
                let folders = Folders::of_session(&ctx.config.data_dir, &session.session_id);
                match folders.remove().await {
                    Ok(()) => ctx.store.session_removed(session.session_id).await?,
                    Err(error) => {
                        if self.stuck_sessions.insert(session.session_id) {
                            warn!(session.id = %session.session_id, error = %error, "could not remove the folder of a deleted session, retrying");
                        }
                    }
                }
            }
            let Some(session) = sessions.last() else { break };
            last = session.session_number;
        }
        Ok(())
    }

    /// Whether the job has no workspace of its own any more.
    async fn remove_workspace(&mut self, ctx: &Context, job: &Job) -> bool {
        if job.session_id.is_some() {
            return true;
        }
        let folders = Folders::of_job(&ctx.config.data_dir, &job.job_id);
        match folders.remove().await {
            Ok(()) => true,
            Err(error) => {
                if self.stuck.insert(job.job_id) {
                    warn!(job.id = %job.job_id, error = %error, "could not remove an ended job's workspace, retrying");
                }
                false
            }
        }
    }
}
