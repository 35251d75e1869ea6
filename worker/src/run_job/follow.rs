//! Follows a run to its end: reads its messages, records them, and stops it when it must not go on.

use super::changes::Changes;
use super::outcome::{self, Deadline, Ended, Stopped};
use super::output;
use super::prepare::{Run, session_lost_event};
use super::recorder::Recorder;
use super::steps::Steps;
use super::stop::{StopAction, StopSequence};
use super::transcript;
use super::watchdog::IdleWatchdog;
use crate::claude::command;
use crate::claude::message::{Block, Message};
use crate::claude::process::{EndedBy, Exit, Process};
use crate::disk_use;
use shared::clock;
use shared::files::Owner;
use shared::job::{Report, Spend};
use shared::storage::RunDirective;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tracing::{error, warn};

impl Run<'_> {
    /// Runs it to its end. `None` when another worker may hold the job by then, so that nothing may be written.
    pub(super) async fn follow(mut self, mut recorder: Recorder) -> Option<Report> {
        let mut changes = self.meter.changes();
        self.process.send(&command::user_line(&self.spec));
        if let Some(claude_session_id) = &self.output.session_lost {
            warn!("the session's conversation isn't in DATA_DIR, the run begins a new one");
            recorder.event(session_lost_event(claude_session_id));
        }

        let started = Instant::now();
        let mut stop = StopSequence::new(started, self.total);
        let mut watchdog = IdleWatchdog::new(started);
        let mut steps = Steps::new(started);
        let run = (self.lease.job.job_id, self.lease.job.attempt);
        let folders = vec![
            self.folders.workspace.clone(),
            self.folders.home.clone(),
            self.sockets.tmp(),
        ];
        let mut exceeded = Box::pin(disk_use::exceeded(self.ctx, run, folders));
        let mut within_disk = true;
        let (first_output, idle) = (self.ctx.config.first_output, self.ctx.config.idle);
        loop {
            let (silent_until, too_silent) = watchdog.ends(first_output, idle);
            let lease_ends = recorder.lease_state().held_at + self.ctx.config.lease;
            let act = tokio::select! {
                line = self.process.next_line() => {
                    let Some(line) = line else { break };
                    let now = Instant::now();
                    let message = Message::read(&line);
                    watchdog.hear(&message, now);
                    self.reported.observe(&message);
                    let act = self.react(&message, &mut stop, now);
                    self.note(message, &mut steps, &mut recorder, now);
                    act
                }
                _ = changes.changed() => {
                    let spend = self.meter.spend();
                    if let Some(event) = steps.usage(Instant::now(), &spend) {
                        recorder.event(event);
                    }
                    // Kept at once: this is what is paid for if the worker is lost.
                    recorder.spend(spend);
                    None
                }
                lease_state = recorder.changed() => {
                    self.process.renewed_at(lease_state.held_at.into_std());
                    match lease_state.signal {
                        RunDirective::Lost => stop.kill(Stopped::LeaseLost, Instant::now()),
                        RunDirective::Cancel(_) => stop.interrupt(Stopped::Cancelled, Instant::now()),
                        RunDirective::Continue => None,
                    }
                }
                () = self.ctx.handing_back.cancelled(), if stop.is_untouched() => {
                    stop.interrupt(Stopped::Shutdown, Instant::now())
                }
                () = sleep_until(silent_until), if stop.is_untouched() => {
                    stop.interrupt(too_silent, Instant::now())
                }
                limit = &mut exceeded, if within_disk => {
                    within_disk = false;
                    stop.kill(Stopped::DiskFull(limit), Instant::now())
                }
                () = sleep_until(lease_ends), if !stop.is_over() => {
                    stop.kill(Stopped::LeaseLost, Instant::now())
                }
                () = sleep_until(stop.until()), if !stop.is_over() => stop.advance(Instant::now()),
            };
            match act {
                Some(StopAction::Interrupt) => self.process.send(&command::interrupt_line("stop")),
                Some(StopAction::Close) => self.process.close_stdin(),
                Some(StopAction::Kill) => self.process.kill(),
                None => {}
            }
        }
        drop(exceeded);
        self.end(&stop, recorder).await
    }

    /// What a message means for the run as a whole.
    fn react(&mut self, message: &Message, stop: &mut StopSequence, now: Instant) -> Option<StopAction> {
        match message {
            Message::Init(init) => {
                let mismatch = command::unexpected_init(&self.spec, init, self.ctx.credentials.variable())?;
                error!("the CLI did not start with its settings, ending the run: {mismatch}");
                stop.kill(Stopped::InitMismatch, now)
            }
            Message::Result(result) if result.is_verdict() => {
                if let Some(why) = result.invalid {
                    warn!("the CLI's result can't be used, ending the run: {why}");
                }
                stop.close(now)
            }
            Message::ControlRequest(request) => {
                // The CLI waits for an answer, however long that takes.
                let subtype = request.subtype.as_deref().unwrap_or("unknown");
                self.process
                    .send(&command::refusal_line(&request.request_id, subtype));
                None
            }
            Message::Unreadable => {
                if !std::mem::replace(&mut self.unreadable, true) {
                    warn!("the CLI wrote a line that can't be read; this run's further ones aren't reported");
                }
                None
            }
            _ => None,
        }
    }

    /// Takes note of a message, and records it as events.
    fn note(&mut self, message: Message, steps: &mut Steps, recorder: &mut Recorder, now: Instant) {
        self.output.ended.observe(&message);
        match message {
            Message::Assistant(answer) => {
                let main = answer.parent.is_none() && answer.error.is_none();
                for block in answer.blocks {
                    match block {
                        Block::Text(text) if main => {
                            self.output.text(&text);
                            recorder.event(steps.text(&text));
                        }
                        Block::Text(_) => {}
                        Block::ToolUse { id, name, input } => {
                            self.output.tool(&name, &input);
                            recorder.event(steps.tool_call(&id, &name, &input, now));
                        }
                    }
                }
            }
            Message::User(user) => {
                for result in &user.tool_results {
                    recorder.event(steps.tool_result(result, now));
                }
            }
            _ => {}
        }
    }

    /// Waits until nothing of the run lives, and says what became of it.
    async fn end(self, stop: &StopSequence, mut recorder: Recorder) -> Option<Report> {
        let Self {
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
            mut output,
            unreadable: _,
            reported,
        } = self;
        let exit = end_of(process, stop.left(Instant::now()), &mut recorder).await;
        gateway.disarm().await;
        let (observed, refused) = (gateway.last_failure(), gateway.last_refusal());
        drop(gateway);
        sockets.remove().await;
        let stopped = stop.stopped().or(match exit.ended_by {
            EndedBy::Beat if !recorder.holds(ctx.config.lease)() => Some(Stopped::LeaseLost),
            EndedBy::Deadline => Some(Stopped::Timeout {
                deadline: Deadline::Total,
                after: total,
            }),
            EndedBy::Memory => Some(Stopped::OutOfMemory),
            // Without a beat although the lease is held: this worker was too busy to pass them on.
            EndedBy::GuardLost | EndedBy::Beat => Some(Stopped::GuardLost),
            EndedBy::Exited | EndedBy::Worker => None,
        });
        if matches!(stopped, Some(Stopped::DiskFull(_))) {
            // At once, and before the end is written: that needs room too.
            let removed = folders.remove_for_disk(lease.job.session_id.is_some()).await;
            if let Err(error) = removed {
                warn!(%error, "could not remove the workspace of a run that filled the disk");
            }
        }
        let owner = lease
            .job
            .session_id
            .map_or(Owner::Job(lease.job.job_id), Owner::Session);
        output.changes = Changes::since(before, &ctx.config.data_dir, owner).await;
        let events = recorder.close().await;

        let spend = Spend {
            reported: reported.cost(),
            ..meter.spend()
        };
        if !spend.estimated && reported.differs(spend.total()) {
            let (metered, reported) = (spend.total(), reported.cost().unwrap_or_default());
            warn!("the gateway metered {metered}, but the CLI reports {reported}");
        }
        let now = clock::now();
        let ended = Ended {
            exit: exit.code,
            signal: exit.signal,
            observed,
            refused,
            stopped,
            stderr_tail: exit.stderr_tail.clone(),
            now,
            ..output.ended.clone()
        };
        let verdict = outcome::judge(&ended);
        // Waits for the API are no failures, but their pauses grow all the same.
        let before = if verdict.waits() {
            lease.job.attempt
        } else {
            lease.job.failures + 1
        };
        let pause = ctx.config.backoff.jittered_pause(before);
        let ending = output::of_budget(verdict.into_ending(now.plus(pause))?, &lease);
        let written = transcript::is_written(&folders, spec.claude_session_id).await;
        Some(Report {
            ending,
            result: output::result(&output, &spend, &spec),
            spend,
            duration: Duration::ZERO,
            turns: output
                .ended
                .result
                .as_ref()
                .map_or(0, |result| i64::try_from(result.num_turns).unwrap_or(0)),
            claude_session_id: written.then(|| spec.claude_session_id.to_string()),
            exit: output::describe(&exit),
            stderr_tail: exit.stderr_tail,
            events,
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
