//! Starts a run: folders, the conversation to continue, gateway, guard, sandbox, CLI.

use super::changes::Before;
use super::outcome::ErrorCode;
use super::output::RunOutput;
use super::recorder::Recorder;
use super::stop::{CLOSE_GRACE, EXIT_GRACE, INTERRUPT_GRACE};
use super::transcript;
use crate::claude::command::{self, RunSpec};
use crate::claude::process::{self, Launch, PendingGuard, Process};
use crate::claude::sandbox::Places;
use crate::context::Context;
use crate::disk_space;
use crate::gateway::Gateway;
use crate::gateway::request::Permissions;
use crate::guard;
use crate::spend::{Meter, Reported};
use crate::workspace::{Folders, RunDir};
use serde_json::json;
use shared::clock::{self, Timestamp};
use shared::event::{EventType, NewEvent};
use shared::files::Owner;
use shared::job::{Ending, Hold, Lease, Report, Spend};
use shared::model::AllowedModels;
use shared::storage::RunDirective;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tracing::{error, warn};
use uuid::Uuid;

/// The tool whose searches the API makes itself.
const WEB_SEARCH: &str = "WebSearch";

/// How long a run may take to start.
const PREPARE_TIMEOUT: Duration = Duration::from_mins(1);

/// A run under way.
pub(super) struct Run<'a> {
    pub(super) ctx: &'a Context,
    pub(super) lease: Arc<Lease>,
    pub(super) spec: RunSpec,
    pub(super) folders: Folders,
    /// The workspace as the run found it.
    pub(super) before: Before,
    pub(super) gateway: Gateway,
    pub(super) meter: Arc<Meter>,
    pub(super) process: Process,
    pub(super) sockets: RunDir,
    /// How long it may take.
    pub(super) total: Duration,
    pub(super) output: RunOutput,
    /// Whether a line came that can't be read.
    pub(super) unreadable: bool,
    pub(super) reported: Reported,
}

/// Starts the run, in a minute at most.
pub(super) async fn start<'a>(
    ctx: &'a Context,
    lease: &Arc<Lease>,
    recorder: &Recorder,
) -> io::Result<Run<'a>> {
    let until = Instant::now() + PREPARE_TIMEOUT;
    loop {
        let prepared = tokio::time::timeout_at(until, Run::prepare(ctx, lease.clone(), recorder)).await;
        match prepared.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            // The guard found the lease too old, which was renewed meanwhile: the machine is that busy.
            Err(error)
                if process::is_too_late(&error)
                    && recorder.holds(ctx.config.lease)()
                    && Instant::now() < until => {}
            prepared => return prepared,
        }
    }
}

impl<'a> Run<'a> {
    async fn prepare(ctx: &'a Context, lease: Arc<Lease>, recorder: &Recorder) -> io::Result<Self> {
        let job = &lease.job;
        let (folders, place) = match &job.session_id {
            Some(session_id) => (
                Folders::of_session(&ctx.config.data_dir, session_id),
                session_id.to_string(),
            ),
            None => (
                Folders::of_job(&ctx.config.data_dir, &job.job_id),
                job.job_id.to_string(),
            ),
        };
        let marker = guard::marker(&format!("{place}.{}.{}", job.job_id, job.attempt));
        if job.attempt > 1 || job.session_id.is_some() {
            kill_stale_runs(marker.clone(), recorder.holds(ctx.config.lease)).await;
        }
        let sockets = ctx.runtime.run()?;
        let guard = PendingGuard::spawn(&marker, sockets.path())?;
        let folders = match &lease.working_dir {
            Some(directory) => folders.working_in(approved(ctx, directory).await?),
            None => folders,
        };
        folders.create().await?;
        // All that is in the workspace of a job without a session comes from this job, also from an earlier attempt.
        let before = match job.session_id {
            // Another directory than its workspace: what changes there isn't told.
            Some(_) if lease.working_dir.is_some() => Before::default(),
            Some(session_id) => Before::of(&ctx.config.data_dir, Owner::Session(session_id)).await,
            None => Before::empty(),
        };
        let resume = transcript::find(&folders, &lease).await?;
        let session_lost = transcript::lost(&lease, resume.as_ref());
        if let Some(claude_session_id) = &session_lost
            && lease.options.fail_on_session_lost
        {
            return Err(io::Error::other(Refusal {
                code: ErrorCode::SessionLost,
                message: "The conversation of the session is lost, and the job was to fail then; without \
                          `on_session_lost: \"fail\"` it begins a new one"
                    .to_owned(),
                event: Some(session_lost_event(claude_session_id)),
            }));
        }
        let spec = spec(ctx, &lease, resume.as_ref())?;

        let mut places = Places {
            cli: ctx.cli.clone(),
            workspace: folders.workspace.clone(),
            home: folders.home.clone(),
            tmp: sockets.tmp(),
            gateway_socket: sockets.gateway_socket(),
            system_prompt: None,
        };
        if let Some(system) = lease
            .options
            .system
            .as_ref()
            .or(ctx.config.claude.system_prompt.as_ref())
        {
            let file = sockets.path().join("system-prompt");
            tokio::fs::write(&file, system).await?;
            places.system_prompt = Some(file);
        }
        let spec = RunSpec {
            system_prompt_file: ctx.isolation.system_prompt(&places),
            ..spec
        };
        let (name, token) = ctx.credentials.dummy();
        let gateway = Gateway::start(
            &places.gateway_socket,
            ctx.credentials.clone(),
            &token,
            &ctx.upstream,
            ctx.pause.clone(),
        )?;
        let meter = Arc::new(Meter::new(Arc::clone(&ctx.config.prices), lease.reserved));
        let web_search = !spec.disallowed_tools.iter().any(|tool| tool == WEB_SEARCH);
        let aliases = ctx.config.prices.aliases();
        let permissions = Permissions {
            models: AllowedModels::new(&lease.allowed_models, aliases),
            web_search,
        };
        gateway.arm(Arc::clone(&meter), permissions.clone());

        let mut output = RunOutput::new(spec.json_schema.is_some(), clock::now());
        output.session_lost = session_lost;
        let total = job
            .timeout_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(ctx.config.timeout, Duration::from_secs);
        let command = ctx.isolation.command(&places, command::arguments(&spec));
        let mut env = command::environment(&ctx.isolation.paths(&places), (name, &token), &marker);
        env.extend(command::model_variables(&spec.model, aliases, |model| {
            permissions.models.allow(model, aliases)
        }));
        if !ctx.config.anthropic.provider.kind.takes_all_betas() {
            // What the gateway would leave out of the header, the CLI shouldn't use in the body.
            env.push((
                "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS".to_owned(),
                "1".to_owned(),
            ));
        }
        let launch = Launch {
            program: command.program,
            setup: command.setup,
            args: command.args,
            env,
            cwd: command.cwd,
            marker,
            cgroup: ctx.cgroup.clone(),
            beat_within: ctx.config.lease,
            // The worker's own deadline comes first; this one is for a worker that can't.
            deadline: total + INTERRUPT_GRACE + CLOSE_GRACE + EXIT_GRACE,
            runtime_dir: sockets.path().to_owned(),
            memory_limit: ctx.config.run_memory,
            file_limit: ctx.config.run_disk,
            no_new_privileges: command.no_new_privileges,
        };
        let process = Process::start(guard, launch, || recorder.lease_state().held_at.into_std()).await?;
        Ok(Self {
            ctx,
            lease,
            spec,
            folders,
            before,
            gateway,
            meter,
            process,
            sockets,
            total,
            output,
            unreadable: false,
            reported: Reported::default(),
        })
    }
}

/// Why the job itself can't be run, whoever tries.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Refusal {
    code: ErrorCode,
    message: String,
    event: Option<NewEvent>,
}

/// The folder in whose place the session works, if it may: what was approved once may be a link by now.
async fn approved(ctx: &Context, directory: &str) -> io::Result<PathBuf> {
    let (root, wanted) = (ctx.config.approved_directory.clone(), directory.to_owned());
    let resolved =
        tokio::task::spawn_blocking(
            move || match shared::approved::resolve(root.as_deref(), &wanted) {
                Ok(real) if real == wanted => Ok(PathBuf::from(real)),
                Ok(_) => Err(format!("Directory {wanted} has become a link")),
                Err(refused) => Err(refused.to_string()),
            },
        );
    resolved.await.map_err(io::Error::other)?.map_err(|why| {
        io::Error::other(Refusal {
            code: ErrorCode::WorkingDirectory,
            message: format!("The session can't work where `repo` has put it: {why}"),
            event: None,
        })
    })
}

/// The event of a conversation that couldn't be continued.
pub(super) fn session_lost_event(claude_session_id: &str) -> NewEvent {
    NewEvent::new(
        EventType::SessionLost,
        json!({ "claude_session_id": claude_session_id }),
    )
}

/// A run that lost its lease has ended by now, unless its worker and its guard are both stopped, or were killed in the
/// same moment; then this worker is the one who can end it, if it's on the same machine. Only while it holds the lease
/// itself: after that, what it would find may be its successor.
async fn kill_stale_runs(marker: String, holds: impl Fn() -> bool + Send + 'static) {
    let ended = tokio::task::spawn_blocking(move || guard::kill_stale_runs(&marker, holds)).await;
    if let Ok(processes @ 1..) = ended {
        warn!(
            processes,
            "killed processes that an earlier run had left in the same workspace"
        );
    }
}

/// What becomes of a job whose run could not start. `None` when another worker holds it.
pub(super) async fn start_failed(
    error: &io::Error,
    ctx: &Context,
    lease: &Lease,
    recorder: Recorder,
) -> Option<Report> {
    let (held, lost) = (
        recorder.holds(ctx.config.lease)(),
        recorder.lease_state().signal == RunDirective::Lost,
    );
    let mut events = recorder.close().await;
    if lost {
        warn!("the lease was lost before the run could start");
        return None;
    }
    let why = if !held {
        warn!("the lease expired before the run could start, the job is released");
        StartFailure::LeaseExpired
    } else if disk_space::check(ctx).await {
        error!(error = %error, "could not start the run");
        StartFailure::Failed
    } else {
        StartFailure::DiskFull
    };
    let pause = ctx.config.backoff.jittered_pause(lease.job.failures + 1);
    let refusal = error
        .get_ref()
        .and_then(|source| source.downcast_ref::<Refusal>());
    events.extend(refusal.and_then(|refusal| refusal.event.clone()));
    let ending = match refusal {
        Some(refusal) if held => Ending::Failed {
            code: refusal.code.as_str().to_owned(),
            message: refusal.message.clone(),
        },
        _ => why.ending(clock::now().plus(pause)),
    };
    Some(Report {
        ending,
        result: None,
        spend: Spend::default(),
        duration: Duration::ZERO,
        turns: 0,
        claude_session_id: None,
        stderr_tail: error.to_string(),
        exit: "not started".to_owned(),
        events,
    })
}

/// Why a run could not start.
#[derive(Clone, Copy)]
enum StartFailure {
    /// The lease had expired by then.
    LeaseExpired,
    /// The disk had no room for it.
    DiskFull,
    Failed,
}

impl StartFailure {
    fn ending(self, pause_ends: Timestamp) -> Ending {
        match self {
            // Nothing was started, so nothing has failed. Whoever has taken the job meanwhile isn't disturbed.
            Self::LeaseExpired => Ending::Released,
            Self::DiskFull | Self::Failed => Ending::Retry {
                code: ErrorCode::Internal.as_str().to_owned(),
                message: "The worker could not start the Claude CLI; its log says why.".to_owned(),
                run_after: pause_ends,
                hold: Hold::Delay,
                // A disk without room is no fault of the job.
                counts: matches!(self, Self::Failed),
            },
        }
    }
}

/// What this run of the job is asked to do. The claim has filled in what the job didn't say.
fn spec(ctx: &Context, lease: &Lease, resume: Option<&transcript::Found>) -> io::Result<RunSpec> {
    let (job, options, defaults) = (&lease.job, &lease.options, &ctx.config.claude);
    let unclaimed = |member| io::Error::other(format!("the claim has left the job's {member} open"));
    let claude_session_id = job
        .claude_session_id
        .as_deref()
        .and_then(|id| Uuid::try_parse(id).ok())
        .ok_or_else(|| io::Error::other("the attempt has no Claude session id"))?;
    let interrupted = resume.is_some_and(|found| found.interrupted);
    Ok(RunSpec {
        claude_session_id,
        resume: resume.map(|found| found.claude_session_id),
        message_id: transcript::message_id(&job.job_id, job.attempt),
        model: job.model.clone().ok_or_else(|| unclaimed("model"))?,
        effort: job.effort.clone(),
        permission_mode: job
            .permission_mode
            .clone()
            .ok_or_else(|| unclaimed("permission mode"))?,
        max_turns: job.max_turns.and_then(|turns| u32::try_from(turns).ok()),
        max_cost: lease.reserved,
        system_prompt_file: None,
        json_schema: options.json_schema.clone(),
        no_tools: options.allowed_tools.as_ref().is_some_and(Vec::is_empty),
        allowed_tools: options
            .allowed_tools
            .clone()
            .unwrap_or_else(|| defaults.allowed_tools.clone()),
        disallowed_tools: disallowed(&defaults.disallowed_tools, options.disallowed_tools.as_deref()),
        prompt: if interrupted {
            command::INTERRUPTED.to_owned()
        } else {
            lease.message.clone()
        },
    })
}

/// What the operator forbids, and what the job forbids beside it: a job can't take back the operator's rules.
fn disallowed(operators: &[String], jobs: Option<&[String]>) -> Vec<String> {
    let mut rules = operators.to_vec();
    for rule in jobs.unwrap_or_default() {
        if !rules.contains(rule) {
            rules.push(rule.clone());
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_forbids_more_than_the_operator_and_never_less() {
        let rules = |rules: &[&str]| rules.iter().map(ToString::to_string).collect::<Vec<_>>();
        let operators = rules(&["WebFetch", "Bash(rm *)"]);
        for (jobs, expected) in [
            (None, rules(&["WebFetch", "Bash(rm *)"])),
            (Some(rules(&[])), rules(&["WebFetch", "Bash(rm *)"])),
            (
                Some(rules(&["Edit", "WebFetch"])),
                rules(&["WebFetch", "Bash(rm *)", "Edit"]),
            ),
        ] {
            assert_eq!(disallowed(&operators, jobs.as_deref()), expected);
        }
    }

    #[test]
    fn a_run_that_came_too_late_to_start_is_no_failure() {
        assert_eq!(StartFailure::LeaseExpired.ending(Timestamp(7)), Ending::Released);
        for (why, counts) in [(StartFailure::DiskFull, false), (StartFailure::Failed, true)] {
            let Ending::Retry {
                run_after,
                counts: does,
                ..
            } = why.ending(Timestamp(7))
            else {
                panic!("another attempt may do better")
            };
            assert_eq!((run_after, does), (Timestamp(7), counts));
        }
    }
}
