//! The life of one run, top to bottom: claim, prepare, run, finish.

pub mod outcome;
mod recorder;
mod transcript;

use crate::claude::command::{self, RunSpec};
use crate::claude::message::{Block, Message};
use crate::claude::process::{self, EndedBy, Exit, Launch, Process};
use crate::claude::sandbox::Places;
use crate::context::Context;
use crate::gateway::Gateway;
use crate::presence;
use crate::room;
use crate::workspace::{Folders, RunDir};
use outcome::{Deadline, Ended, ErrorCode, Meter, Stopped, Verdict};
use recorder::Recorder;
use serde_json::{Value, json};
use shared::clock;
use shared::event::{EventType, NewEvent};
use shared::job::{Ending, Hold, Lease, Report, Spend};
use shared::storage::{Claim, Finish, Signal};
use shared::telemetry::chain;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tracing::{Instrument, error, info, info_span, warn};
use transcript::Transcript;
use uuid::Uuid;

/// What the CLI gets for each rung of the stop ladder: to end its turn, to end itself.
const INTERRUPT: Duration = Duration::from_secs(3);
const CLOSE: Duration = Duration::from_secs(2);

/// After its result the CLI ends by itself within a moment; longer than this and it is made to.
const GOODBYE: Duration = Duration::from_secs(5);

/// How long a run may take to start.
const PREPARE: Duration = Duration::from_mins(1);

/// How often the cost so far is told, and how often the CLI is asked for what the stream doesn't show.
const TELL_COST: Duration = Duration::from_secs(2);
const ASK_COST: Duration = Duration::from_secs(10);

/// A tool may work longer in silence than the model.
const TOOL_PATIENCE: u32 = 3;

/// A tool's answer in an event holds no more bytes than this.
const TOOL_RESULT: usize = 16 * 1024;

/// Claims and runs until nothing is left, or until this worker may not. `claiming` is dropped after the first claim.
pub async fn claim_and_run_until_none(ctx: Arc<Context>, claiming: oneshot::Sender<()>) {
    let mut claiming = Some(claiming);
    while !ctx.draining.is_cancelled() && ctx.pause.current(clock::now()).is_none() {
        let claim = {
            let _one_at_a_time = ctx.claiming.lock().await;
            ctx.store.claim(&ctx.claimant, clock::now()).await
        };
        drop(claiming.take());
        match claim {
            Ok(Claim::Run(lease)) => {
                let span = info_span!("run", job.id = %lease.job.job_id, attempt = lease.job.attempt);
                run(&ctx, Arc::new(*lease)).instrument(span).await;
            }
            Ok(Claim::Again) => {}
            Ok(Claim::Nothing) => return,
            Err(error) => {
                // The sweeper pushes another ticket when the database is back.
                if !ctx.store.note(&error) {
                    warn!(error = %chain(&error), "could not claim");
                }
                return;
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
    let mut report = match start(ctx, &lease, &recorder).await {
        Ok(run) => run.follow(recorder).await,
        Err(_) if !holds(ctx, &recorder) => {
            warn!("the lease ran out before the run could start");
            None
        }
        Err(error) => {
            recorder.close().await;
            // A disk without room is no fault of the job.
            let room = room::check(ctx).await;
            if room {
                error!(error = %error, "could not start the run");
            }
            Some(could_not_start(&error, ctx, &lease, room))
        }
    };
    if let Some(report) = &mut report {
        report.duration = began.elapsed();
        finish(ctx, &lease, report).await;
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

/// Writes the end of the run, however long the database takes: the work was done and paid for.
async fn finish(ctx: &Context, lease: &Lease, report: &Report) {
    let duration_ms = report.duration.as_millis();
    loop {
        match ctx.store.finish(lease, report, clock::now()).await {
            Ok(Finish::Became(status)) => {
                let (job_id, status, cost) = (lease.job.job_id, status.as_str(), report.spend.total());
                info!(
                    job.status = status,
                    duration_ms,
                    cost_usd = cost.usd(),
                    "job {job_id} is {status}, {cost}"
                );
                return;
            }
            Ok(Finish::Lost) => {
                warn!("the lease was lost; what this run did is another attempt's to check");
                return;
            }
            Err(error) => {
                if !ctx.store.note(&error) {
                    warn!(error = %chain(&error), "could not store the end of the run; trying again");
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// A run that lost its lease has ended by now, unless its worker and its guard are both stopped, or were killed in the
/// same moment; then this worker is the one who can end it, if it's on the same machine. Only while it holds the lease
/// itself: after that, what it would find may be its successor.
async fn end_earlier_runs(marker: String, holds: impl Fn() -> bool + Send + 'static) {
    let ended = tokio::task::spawn_blocking(move || crate::guard::end_earlier_runs(&marker, holds)).await;
    if let Ok(processes @ 1..) = ended {
        warn!(processes, "ended what an earlier run had left in the same place");
    }
}

fn could_not_start(error: &std::io::Error, ctx: &Context, lease: &Lease, room: bool) -> Report {
    let pause = ctx.config.backoff.pause(lease.job.failures + 1, random());
    Report {
        ending: Ending::Again {
            code: "internal".to_owned(),
            message: "The worker could not start the Claude CLI; its log says why.".to_owned(),
            run_after: clock::now().plus(pause),
            hold: Hold::Delay,
            counts: room,
        },
        result: None,
        spend: Spend::default(),
        duration: Duration::ZERO,
        turns: 0,
        claude_session_id: None,
        stderr_tail: error.to_string(),
        exit: "not started".to_owned(),
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
    seen: Seen,
}

/// What the CLI has said so far.
struct Seen {
    lines: u64,
    ended: Ended,
    texts: Vec<String>,
    tools: Vec<Value>,
    open_tools: HashSet<String>,
}

/// How far the stop ladder has been climbed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rung {
    /// Nobody wants the run to end.
    None,
    /// The CLI was asked to end its turn.
    Interrupted,
    /// Its input is closed: it was told to end, or has given its result.
    Closed,
    /// Everything was killed.
    Killed,
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
            end_earlier_runs(marker.clone(), recorder.holds(ctx.config.lease)).await;
        }
        folders.create().await?;
        let sockets = ctx.runtime.run()?;
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

        let seen = Seen {
            lines: 0,
            ended: Ended::new(spec.json_schema.is_some(), clock::now()),
            texts: Vec::new(),
            tools: Vec::new(),
            open_tools: HashSet::new(),
        };
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
        let process = Process::start(launch, || recorder.standing().held_at.into_std()).await?;
        Ok(Self {
            ctx,
            lease,
            spec,
            folders,
            gateway,
            process,
            sockets,
            total,
            seen,
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
        let mut last_line = started;
        let mut ask_cost = tokio::time::interval_at(started + ASK_COST, ASK_COST);
        let mut cost_told = started;
        let mut stopped = None;
        let (mut rung, mut rung_until) = (Rung::None, started + self.total);
        loop {
            let (silent_until, silence) = self.patience(started, last_line);
            let lease_ends = recorder.standing().held_at + self.ctx.config.lease;
            tokio::select! {
                line = self.process.next_line() => {
                    let Some(line) = line else { break };
                    last_line = Instant::now();
                    let message = Message::parse(&line);
                    if meter.observe(&message) {
                        // Kept at once: this is what is paid for if the worker is lost.
                        recorder.spend(meter.spend());
                    }
                    let is_result = matches!(&message, Message::Result(result) if result.is_verdict());
                    if let Message::Init(init) = &message
                        && let Some(surprise) = command::surprise(&self.spec, init, self.ctx.credentials.variable())
                    {
                        error!("the CLI isn't set up as it was told, the run is ended: {surprise}");
                        stopped = Some(Stopped::NotAsTold);
                        self.process.kill();
                    }
                    self.note(message, &mut recorder);
                    if is_result && rung != Rung::Killed {
                        // Subagents go on spending until the process ends.
                        self.process.close_stdin();
                        (rung, rung_until) = (Rung::Closed, Instant::now() + GOODBYE);
                    }
                    if last_line >= cost_told + TELL_COST {
                        cost_told = last_line;
                        tell_cost(&meter.spend(), &mut recorder);
                    }
                }
                standing = recorder.changed() => {
                    self.process.renewed_at(standing.held_at.into_std());
                    match standing.signal {
                        Signal::Lost if rung != Rung::Killed => {
                            stopped = Some(Stopped::LeaseLost);
                            self.process.kill();
                            (rung, rung_until) = (Rung::Killed, Instant::now() + Duration::from_hours(1));
                        }
                        Signal::Cancel(_) if rung == Rung::None => {
                            stopped = Some(Stopped::Cancelled);
                            (rung, rung_until) = self.interrupt().await;
                        }
                        _ => {}
                    }
                }
                () = self.ctx.handing_back.cancelled(), if rung == Rung::None => {
                    stopped = Some(Stopped::Shutdown);
                    (rung, rung_until) = self.interrupt().await;
                }
                () = sleep_until(silent_until), if rung == Rung::None => {
                    stopped = Some(silence);
                    (rung, rung_until) = self.interrupt().await;
                }
                () = sleep_until(lease_ends), if rung != Rung::Killed => {
                    stopped = Some(Stopped::LeaseLost);
                    self.process.kill();
                    (rung, rung_until) = (Rung::Killed, Instant::now() + Duration::from_hours(1));
                }
                () = sleep_until(rung_until) => {
                    (rung, rung_until) = match rung {
                        Rung::None => {
                            stopped = Some(Stopped::Timeout { deadline: Deadline::Total, after: self.total });
                            self.interrupt().await
                        }
                        Rung::Interrupted => {
                            self.process.close_stdin();
                            (Rung::Closed, Instant::now() + CLOSE)
                        }
                        Rung::Closed | Rung::Killed => {
                            self.process.kill();
                            (Rung::Killed, Instant::now() + Duration::from_hours(1))
                        }
                    };
                }
                _ = ask_cost.tick() => {
                    self.process.send(&command::usage_line("usage"));
                }
            }
        }
        self.end(stopped, meter, recorder).await
    }

    /// Until when the CLI may be silent, and what it means if it is longer.
    fn patience(&self, started: Instant, last_line: Instant) -> (Instant, Stopped) {
        let (since, deadline, after) = if self.seen.lines == 0 {
            (started, Deadline::FirstOutput, self.ctx.config.first_output)
        } else if self.seen.open_tools.is_empty() {
            (last_line, Deadline::Idle, self.ctx.config.idle)
        } else {
            (last_line, Deadline::Idle, self.ctx.config.idle * TOOL_PATIENCE)
        };
        (since + after, Stopped::Timeout { deadline, after })
    }

    async fn interrupt(&mut self) -> (Rung, Instant) {
        self.process.send(&command::interrupt_line("stop"));
        (Rung::Interrupted, Instant::now() + INTERRUPT)
    }

    /// Takes note of a message, and tells it as events.
    fn note(&mut self, message: Message, recorder: &mut Recorder) {
        self.seen.lines += 1;
        self.seen.ended.observe(&message);
        match message {
            Message::Assistant(answer) => {
                for block in answer.blocks {
                    self.note_block(block, answer.parent.is_none() && answer.error.is_none(), recorder);
                }
            }
            Message::User(user) => {
                for result in user.tool_results {
                    self.seen.open_tools.remove(&result.tool_use_id);
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
                recorder.event(NewEvent::new(
                    EventType::Assistant,
                    json!({ "content": text, "tool_name": null }),
                ));
                self.seen.texts.push(text);
            }
            Block::Text(_) => {}
            Block::ToolUse { id, name, input } => {
                let data = json!({ "content": null, "tool_name": name, "tool_use_id": id, "input": input });
                recorder.event(NewEvent::new(EventType::Tool, data));
                self.seen.open_tools.insert(id);
                if self.seen.tools.len() < 1000 {
                    self.seen.tools.push(json!({ "name": name, "input": input }));
                }
            }
        }
    }

    /// Waits until nothing of the run lives, and says what became of it.
    async fn end(self, stopped: Option<Stopped>, meter: Meter, recorder: Recorder) -> Option<Report> {
        let Self {
            ctx,
            lease,
            spec,
            folders,
            gateway,
            process,
            sockets,
            total,
            seen,
        } = self;
        let exit = process.end_within(GOODBYE).await;
        let observed = gateway.last_failure();
        drop(gateway);
        sockets.remove().await;
        let stopped = stopped.or(match exit.ended_by {
            EndedBy::Beat => Some(Stopped::LeaseLost),
            EndedBy::Deadline => Some(Stopped::Timeout {
                deadline: Deadline::Total,
                after: total,
            }),
            EndedBy::Memory => Some(Stopped::OutOfMemory),
            EndedBy::GuardLost => Some(Stopped::GuardLost),
            _ => None,
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
            ..seen.ended.clone()
        };
        let verdict = outcome::judge(&ended);
        note_account(ctx, &verdict).await;
        let pause = ctx.config.backoff.pause(lease.job.failures + 1, random());
        let ending = of_budget(verdict.into_ending(now.plus(pause))?, &lease);
        let transcript = Transcript::of(&folders, spec.claude_session_id).await;
        Some(Report {
            ending,
            result: result(&seen, &spend, &spec),
            spend,
            duration: Duration::ZERO,
            turns: seen
                .ended
                .result
                .as_ref()
                .map_or(0, |result| i64::try_from(result.num_turns).unwrap_or(0)),
            claude_session_id: transcript.map(|_| spec.claude_session_id.to_string()),
            exit: describe(&exit),
            stderr_tail: exit.stderr_tail,
        })
    }
}

/// What the account's answer means for the jobs that would be next. A pause is there for people to see before the job
/// that began it has ended.
async fn note_account(ctx: &Context, verdict: &Verdict) {
    let pauses = match verdict {
        Verdict::Again {
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
        Verdict::Cancelled | Verdict::HandedBack | Verdict::Lost => false,
        Verdict::Done | Verdict::Failed { .. } | Verdict::Again { .. } => {
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

/// A run that met its cap because the budget left it no more failed for the budget, not for its own cap.
fn of_budget(ending: Ending, lease: &Lease) -> Ending {
    let (had, wanted) = (lease.reserved, lease.job.max_cost);
    match ending {
        Ending::Failed { code, .. } if code == ErrorCode::MaxCost.as_str() && had < wanted => {
            Ending::Failed {
                code: "budget_exceeded".to_owned(),
                message: format!(
                    "The budget had only {had} left for this run, which may cost {wanted}, and it has used that up. Raise \
                 the budget, or wait for its next period, and submit the job again; what it did is kept."
                ),
            }
        }
        ending => ending,
    }
}

/// What this run of the job is asked to do, defaults filled in.
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

/// The wire's `Result`, also of a run that was cut off: what it said and did until then.
fn result(seen: &Seen, spend: &Spend, spec: &RunSpec) -> Option<Value> {
    let line = seen.ended.result.as_deref();
    if line.is_none() && seen.texts.is_empty() && seen.tools.is_empty() {
        return None;
    }
    let content = line
        .and_then(|line| line.text.clone())
        .unwrap_or_else(|| seen.texts.join("\n"));
    Some(json!({
        "session_id": spec.claude_session_id.to_string(),
        "content": content,
        "cost": spend.total(),
        "duration_ms": line.map_or(0, |line| line.duration_ms),
        "num_turns": line.map_or(0, |line| line.num_turns),
        "tools_used": seen.tools,
        "is_error": line.is_none_or(|line| line.is_error),
        "subtype": line.map_or("interrupted", |line| line.subtype.as_str()),
        "structured_output": line.and_then(|line| line.structured_output.clone()),
        "usage": spend.usage(),
        "model_usage": spend.models.iter().map(|model| {
            (model.model.clone(), json!({ "cost": model.cost, "usage": model.usage }))
        }).collect::<serde_json::Map<_, _>>(),
        "permission_denials": line.map_or(&[][..], |line| &line.permission_denials),
        "stop_reason": line.and_then(|line| line.stop_reason.clone()),
    }))
}

fn describe(exit: &Exit) -> String {
    match (exit.code, exit.signal) {
        (Some(code), _) => format!("exit {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

/// From 0 to 1, for pauses that shouldn't all end at once.
fn random() -> f64 {
    f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}
