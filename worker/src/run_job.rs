//! The life of one run, top to bottom: claim, prepare, run, finish.

mod finish;
mod ladder;
pub mod outcome;
mod recorder;
mod result;
mod silence;
mod transcript;

use crate::claude::command::{self, RunSpec};
use crate::claude::message::{Block, Message};
use crate::claude::process::{self, EndedBy, Exit, Launch, PendingGuard, Process};
use crate::claude::sandbox::Places;
use crate::context::Context;
use crate::gateway::Gateway;
use crate::presence;
use crate::room;
use crate::spend::Meter;
use crate::workspace::{Folders, RunDir};
use ladder::{Act, CLOSE, GOODBYE, INTERRUPT, Ladder};
use outcome::{Deadline, Ended, ErrorCode, Stopped, Verdict};
use recorder::Recorder;
use result::{Said, cut};
use serde_json::json;
use shared::clock::{self, Timestamp};
use shared::event::{EventType, NewEvent};
use shared::job::{Ending, Hold, Lease, Report, Spend};
use shared::storage::{Claim, RunDirective};
use shared::telemetry::chain;
use silence::Silence;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tracing::{Instrument, error, info, info_span, warn};
use uuid::Uuid;

/// How long a run may take to start.
const PREPARE: Duration = Duration::from_mins(1);

/// How often the cost so far is told, and how often the CLI is asked for what the stream doesn't show.
const TELL_COST: Duration = Duration::from_secs(2);
const ASK_COST: Duration = Duration::from_secs(10);

/// A tool's answer in an event holds no more bytes than this.
const TOOL_RESULT: usize = 16 * 1024;

/// Claims and runs until nothing is left, or until this worker may not. `claiming` is dropped after the first claim.
pub async fn claim_and_run_until_none(ctx: Arc<Context>, claiming: oneshot::Sender<()>) {
    let mut claiming = Some(claiming);
    while !ctx.draining.is_cancelled() && ctx.pause.current(clock::now()).is_none() {
        let claimed = claim(&ctx).await;
        drop(claiming.take());
        match claimed {
            Claim::Run(lease) => {
                let run_of = (lease.job.job_id, lease.job.attempt);
                let span = info_span!("run", job.id = %lease.job.job_id, attempt = lease.job.attempt);
                run(&ctx, Arc::new(*lease)).instrument(span).await;
                ctx.leases.remove(run_of);
            }
            Claim::TryAgain => {}
            Claim::Nothing => return,
        }
    }
}

/// Claims, while no other task of this process does.
async fn claim(ctx: &Context) -> Claim {
    let _one_at_a_time = ctx.claiming.lock().await;
    match ctx.store.claim(&ctx.claimant, clock::now()).await {
        Ok(claim) => {
            if let Claim::Run(lease) = &claim {
                ctx.leases.insert((lease.job.job_id, lease.job.attempt));
            }
            claim
        }
        Err(error) => {
            if !ctx.store.note(&error) {
                warn!(error = %chain(&error), "could not claim");
            }
            if error.is_undecided() {
                release_unknown(ctx).await;
            }
            // The sweeper pushes another ticket when the database is back.
            Claim::Nothing
        }
    }
}

/// When a connection is lost nobody knows whether the commit came first. A job that was claimed all the same would
/// count as lost with its worker, although no process of it ever ran.
async fn release_unknown(ctx: &Context) {
    loop {
        tokio::select! {
            () = ctx.store.answers() => {}
            () = ctx.draining.cancelled() => {}
        }
        let (worker_id, known) = (ctx.claimant.worker_id, ctx.leases.all());
        match ctx.store.release_unknown(worker_id, &known, clock::now()).await {
            Ok(0) => return,
            Ok(jobs) => return warn!(jobs, "handed back what was claimed without an answer"),
            Err(error) => {
                if !ctx.store.note(&error) {
                    warn!(error = %chain(&error), "could not look for claims without an answer; trying again");
                }
                if ctx.draining.is_cancelled() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

async fn run(ctx: &Context, lease: Arc<Lease>) {
    info!(key.id = %lease.job.key_id, "job {} begins, attempt {}", lease.job.job_id, lease.job.attempt);
    let began = Instant::now();
    // From here on the lease is renewed: on a busy machine a run takes long to start.
    let renew_every = (ctx.config.lease / 3).min(Duration::from_secs(10));
    let recorder = Recorder::start(ctx.store.clone(), &ctx.wakeups, lease.clone(), renew_every);
    let report = match start(ctx, &lease, &recorder).await {
        Ok(run) => run.follow(recorder).await,
        Err(error) => did_not_start(&error, ctx, &lease, recorder).await,
    };
    if let Some(report) = report {
        let duration = began.elapsed();
        finish::finish(ctx, &lease, Report { duration, ..report }).await;
    }
}

/// Starts the run, in a minute at most.
async fn start<'a>(ctx: &'a Context, lease: &Arc<Lease>, recorder: &Recorder) -> std::io::Result<Run<'a>> {
    let until = Instant::now() + PREPARE;
    loop {
        let prepared = tokio::time::timeout_at(until, Run::prepare(ctx, lease.clone(), recorder)).await;
        match prepared.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            // The guard found the lease too old, which was renewed meanwhile: the machine is that busy.
            Err(error) if process::is_too_late(&error) && holds(ctx, recorder) && Instant::now() < until => {}
            prepared => return prepared,
        }
    }
}

/// Whether nobody else can hold the job by now.
fn holds(ctx: &Context, recorder: &Recorder) -> bool {
    recorder.holds(ctx.config.lease)()
}

/// A run that lost its lease has ended by now, unless its worker and its guard are both stopped, or were killed in the
/// same moment; then this worker is the one who can end it, if it's on the same machine. Only while it holds the lease
/// itself: after that, what it would find may be its successor.
async fn kill_stale_runs(marker: String, holds: impl Fn() -> bool + Send + 'static) {
    let ended = tokio::task::spawn_blocking(move || crate::guard::kill_stale_runs(&marker, holds)).await;
    if let Ok(processes @ 1..) = ended {
        warn!(processes, "ended what an earlier run had left in the same place");
    }
}

/// What becomes of a job whose run could not start. `None` when another worker holds it.
async fn did_not_start(
    error: &std::io::Error,
    ctx: &Context,
    lease: &Lease,
    recorder: Recorder,
) -> Option<Report> {
    let (held, lost) = (
        holds(ctx, &recorder),
        recorder.lease_state().signal == RunDirective::Lost,
    );
    recorder.close().await;
    if lost {
        warn!("the lease was lost before the run could start");
        return None;
    }
    let why = if !held {
        warn!("the lease ran out before the run could start; the job is handed back");
        NotStarted::TooLate
    } else if room::check(ctx).await {
        error!(error = %error, "could not start the run");
        NotStarted::Failed
    } else {
        NotStarted::NoRoom
    };
    let pause = ctx.config.backoff.pause(lease.job.failures + 1, random());
    Some(Report {
        ending: why.ending(clock::now().plus(pause)),
        result: None,
        spend: Spend::default(),
        duration: Duration::ZERO,
        turns: 0,
        claude_session_id: None,
        stderr_tail: error.to_string(),
        exit: "not started".to_owned(),
    })
}

/// Why a run could not start.
#[derive(Clone, Copy)]
enum NotStarted {
    /// The lease had run out by then.
    TooLate,
    /// There was no room for it.
    NoRoom,
    Failed,
}

impl NotStarted {
    fn ending(self, pause_ends: Timestamp) -> Ending {
        match self {
            // Nothing was started, so nothing has failed. Whoever has taken the job meanwhile isn't disturbed.
            Self::TooLate => Ending::Released,
            Self::NoRoom | Self::Failed => Ending::Retry {
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

/// A run under way.
struct Run<'a> {
    ctx: &'a Context,
    lease: Arc<Lease>,
    spec: RunSpec,
    folders: Folders,
    gateway: Gateway,
    process: Process,
    sockets: RunDir,
    total: Duration,
    said: Said,
}

impl<'a> Run<'a> {
    async fn prepare(ctx: &'a Context, lease: Arc<Lease>, recorder: &Recorder) -> std::io::Result<Self> {
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
        let marker = crate::guard::marker(&format!("{place}.{}.{}", job.job_id, job.attempt));
        if job.attempt > 1 || job.session_id.is_some() {
            kill_stale_runs(marker.clone(), recorder.holds(ctx.config.lease)).await;
        }
        let sockets = ctx.runtime.run()?;
        let guard = PendingGuard::spawn(&marker, sockets.path())?;
        folders.create().await?;
        let resume = transcript::find(&folders, &lease).await?;
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
        )?;

        let said = Said::new(spec.json_schema.is_some(), clock::now());
        let total = job
            .timeout_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(ctx.config.timeout, Duration::from_secs);
        let command = ctx.isolation.command(&places, command::arguments(&spec));
        let launch = Launch {
            program: command.program,
            args: command.args,
            env: command::environment(&ctx.isolation.paths(&places), (name, &token), &marker),
            cwd: command.cwd,
            marker,
            cgroup: ctx.cgroup.clone(),
            beat_within: ctx.config.lease,
            // The worker's own deadline comes first; this one is for a worker that can't.
            deadline: total + INTERRUPT + CLOSE + GOODBYE,
            runtime_dir: sockets.path().to_owned(),
            memory_limit: ctx.config.run_memory,
            no_new_privileges: command.no_new_privileges,
        };
        let process = Process::start(guard, launch, || recorder.lease_state().held_at.into_std()).await?;
        Ok(Self {
            ctx,
            lease,
            spec,
            folders,
            gateway,
            process,
            sockets,
            total,
            said,
        })
    }

    /// Runs it to its end. `None` when another worker may hold the job by then, so that nothing may be written.
    async fn follow(mut self, mut recorder: Recorder) -> Option<Report> {
        let mut meter = Meter::new(self.spec.resume.is_some());
        if self.spec.resume.is_some() {
            // What the earlier runs of the conversation cost isn't this run's.
            self.process.send(&command::usage_line("usage-0"));
        }
        self.process.send(&command::user_line(&self.spec));

        let started = Instant::now();
        let mut ladder = Ladder::new(started, self.total);
        let mut silence = Silence::new(started);
        let mut ask_cost = tokio::time::interval_at(started + ASK_COST, ASK_COST);
        let mut cost_told = started;
        let (first_output, idle) = (self.ctx.config.first_output, self.ctx.config.idle);
        loop {
            let (silent_until, too_silent) = silence.ends(first_output, idle);
            let lease_ends = recorder.lease_state().held_at + self.ctx.config.lease;
            let act = tokio::select! {
                line = self.process.next_line() => {
                    let Some(line) = line else { break };
                    let now = Instant::now();
                    let message = Message::parse(&line);
                    silence.hear(&message, now);
                    if meter.observe(&message) {
                        // Kept at once: this is what is paid for if the worker is lost.
                        recorder.spend(meter.spend());
                    }
                    let act = self.react(&message, &mut ladder, now);
                    self.note(message, &mut recorder);
                    if now >= cost_told + TELL_COST {
                        cost_told = now;
                        tell_cost(&meter.spend(), &mut recorder);
                    }
                    act
                }
                lease_state = recorder.changed() => {
                    self.process.renewed_at(lease_state.held_at.into_std());
                    match lease_state.signal {
                        RunDirective::Lost => ladder.kill(Stopped::LeaseLost, Instant::now()),
                        RunDirective::Cancel(_) => ladder.interrupt(Stopped::Cancelled, Instant::now()),
                        RunDirective::Continue => None,
                    }
                }
                () = self.ctx.handing_back.cancelled(), if ladder.is_untouched() => {
                    ladder.interrupt(Stopped::Shutdown, Instant::now())
                }
                () = sleep_until(silent_until), if ladder.is_untouched() => {
                    ladder.interrupt(too_silent, Instant::now())
                }
                () = sleep_until(lease_ends), if !ladder.is_climbed() => {
                    ladder.kill(Stopped::LeaseLost, Instant::now())
                }
                () = sleep_until(ladder.until()), if !ladder.is_climbed() => ladder.climb(Instant::now()),
                _ = ask_cost.tick() => {
                    self.process.send(&command::usage_line("usage"));
                    None
                }
            };
            match act {
                Some(Act::Interrupt) => self.process.send(&command::interrupt_line("stop")),
                Some(Act::Close) => self.process.close_stdin(),
                Some(Act::Kill) => self.process.kill(),
                None => {}
            }
        }
        self.end(&ladder, meter, recorder).await
    }

    /// What a message means for the run as a whole.
    fn react(&self, message: &Message, ladder: &mut Ladder, now: Instant) -> Option<Act> {
        match message {
            Message::Init(init) => {
                let surprise = command::surprise(&self.spec, init, self.ctx.credentials.variable())?;
                error!("the CLI isn't set up as it was told, the run is ended: {surprise}");
                ladder.kill(Stopped::NotAsTold, now)
            }
            Message::Result(result) if result.is_verdict() => ladder.close(now),
            _ => None,
        }
    }

    /// Takes note of a message, and tells it as events.
    fn note(&mut self, message: Message, recorder: &mut Recorder) {
        self.said.ended.observe(&message);
        match message {
            Message::Assistant(answer) => {
                for block in answer.blocks {
                    self.note_block(block, answer.parent.is_none() && answer.error.is_none(), recorder);
                }
            }
            Message::User(user) => {
                for result in user.tool_results {
                    let content = cut(&result.content, TOOL_RESULT);
                    let mut data = json!({
                        "tool_use_id": result.tool_use_id, "is_error": result.is_error, "content": content,
                    });
                    if content.len() < result.content.len() {
                        data["truncated"] = json!(true);
                    }
                    recorder.event(NewEvent::new(EventType::ToolResult, data));
                }
            }
            _ => {}
        }
    }

    fn note_block(&mut self, block: Block, main: bool, recorder: &mut Recorder) {
        match block {
            Block::Text(text) if main => {
                self.said.text(&text);
                recorder.event(NewEvent::new(
                    EventType::Assistant,
                    json!({ "content": text, "tool_name": null }),
                ));
            }
            Block::Text(_) => {}
            Block::ToolUse { id, name, input } => {
                self.said.tool(&name, &input);
                let data = json!({ "content": null, "tool_name": name, "tool_use_id": id, "input": input });
                recorder.event(NewEvent::new(EventType::Tool, data));
            }
        }
    }

    /// Waits until nothing of the run lives, and says what became of it.
    async fn end(self, ladder: &Ladder, meter: Meter, mut recorder: Recorder) -> Option<Report> {
        let Self {
            ctx,
            lease,
            spec,
            folders,
            gateway,
            process,
            sockets,
            total,
            said,
        } = self;
        let exit = end_of(process, ladder.left(Instant::now()), &mut recorder).await;
        let observed = gateway.last_failure();
        drop(gateway);
        sockets.remove().await;
        let stopped = ladder.stopped().or(match exit.ended_by {
            EndedBy::Beat if !holds(ctx, &recorder) => Some(Stopped::LeaseLost),
            EndedBy::Deadline => Some(Stopped::Timeout {
                deadline: Deadline::Total,
                after: total,
            }),
            EndedBy::Memory => Some(Stopped::OutOfMemory),
            // Without a beat although the lease is held: this worker was too busy to pass them on.
            EndedBy::GuardLost | EndedBy::Beat => Some(Stopped::GuardLost),
            EndedBy::Exited | EndedBy::Worker => None,
        });
        recorder.close().await;

        let spend = meter.spend();
        let now = clock::now();
        let ended = Ended {
            exit: exit.code,
            signal: exit.signal,
            observed,
            stopped,
            stderr_tail: exit.stderr_tail.clone(),
            now,
            ..said.ended.clone()
        };
        let verdict = outcome::judge(&ended);
        note_account(ctx, &verdict).await;
        let pause = ctx.config.backoff.pause(lease.job.failures + 1, random());
        let ending = result::of_budget(verdict.into_ending(now.plus(pause))?, &lease);
        let written = transcript::is_written(&folders, spec.claude_session_id).await;
        Some(Report {
            ending,
            result: result::result(&said, &spend, &spec),
            spend,
            duration: Duration::ZERO,
            turns: said
                .ended
                .result
                .as_ref()
                .map_or(0, |result| i64::try_from(result.num_turns).unwrap_or(0)),
            claude_session_id: written.then(|| spec.claude_session_id.to_string()),
            exit: result::describe(&exit),
            stderr_tail: exit.stderr_tail,
        })
    }
}

/// Waits for the end of a process whose output is over. Beats are passed on meanwhile: with a short lease its guard
/// would take the wait for the worker's end.
async fn end_of(process: Process, patience: Duration, recorder: &mut Recorder) -> Exit {
    let beats = process.beats();
    let end = process.end_within(patience);
    tokio::pin!(end);
    loop {
        tokio::select! {
            exit = &mut end => return exit,
            lease_state = recorder.changed() => beats.renewed_at(lease_state.held_at.into_std()),
        }
    }
}

/// What the account's answer means for the jobs that would be next. A pause is there for people to see before the job
/// that began it has ended.
async fn note_account(ctx: &Context, verdict: &Verdict) {
    let pauses = match verdict {
        Verdict::Retry {
            when: outcome::When::At(at),
            message,
            ..
        } => {
            warn!("this worker claims nothing until {at}: {message}");
            ctx.pause.until(*at, message);
            true
        }
        Verdict::Failed {
            code: ErrorCode::AuthError,
            message,
        } => {
            let pauses = ctx.pause.refused(clock::now());
            if pauses {
                error!(
                    "this worker claims nothing for a minute, its credential was refused too often: {message}"
                );
            }
            pauses
        }
        // These say nothing about the account.
        Verdict::Cancelled | Verdict::Released | Verdict::Lost => false,
        Verdict::Done | Verdict::Failed { .. } | Verdict::Retry { .. } => {
            ctx.pause.accepted();
            false
        }
    };
    if pauses {
        presence::announce_now(ctx).await;
    }
}

fn tell_cost(spend: &Spend, recorder: &mut Recorder) {
    if spend.models.is_empty() {
        return;
    }
    recorder.event(NewEvent::new(
        EventType::Usage,
        json!({ "cost": spend.total(), "usage": spend.usage() }),
    ));
}

/// What this run of the job is asked to do. The claim has filled in what the job didn't say.
fn spec(ctx: &Context, lease: &Lease, resume: Option<&transcript::Found>) -> std::io::Result<RunSpec> {
    let (job, options, defaults) = (&lease.job, &lease.options, &ctx.config.claude);
    let claude_session_id = job
        .claude_session_id
        .as_deref()
        .and_then(|id| Uuid::try_parse(id).ok())
        .ok_or_else(|| std::io::Error::other("the attempt has no Claude session id"))?;
    let interrupted = resume.is_some_and(|found| found.interrupted);
    Ok(RunSpec {
        claude_session_id,
        resume: resume.map(|found| found.claude_session_id),
        message_id: transcript::message_id(&job.job_id, job.attempt),
        model: job.model.clone().unwrap_or_else(|| defaults.model.clone()),
        effort: job.effort.clone().or_else(|| defaults.effort.clone()),
        permission_mode: job
            .permission_mode
            .clone()
            .unwrap_or_else(|| defaults.permission_mode.clone()),
        max_turns: Some(
            job.max_turns
                .and_then(|turns| u32::try_from(turns).ok())
                .unwrap_or(defaults.max_turns),
        ),
        max_cost: lease.reserved,
        system_prompt_file: None,
        json_schema: options.json_schema.clone(),
        allowed_tools: options
            .allowed_tools
            .clone()
            .unwrap_or_else(|| defaults.allowed_tools.clone()),
        disallowed_tools: options
            .disallowed_tools
            .clone()
            .unwrap_or_else(|| defaults.disallowed_tools.clone()),
        prompt: if interrupted {
            command::INTERRUPTED.to_owned()
        } else {
            lease.message.clone()
        },
    })
}

/// From 0 to 1, for pauses that shouldn't all end at once.
fn random() -> f64 {
    f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_came_too_late_to_start_is_no_failure() {
        assert_eq!(NotStarted::TooLate.ending(Timestamp(7)), Ending::Released);
        for (why, counts) in [(NotStarted::NoRoom, false), (NotStarted::Failed, true)] {
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
