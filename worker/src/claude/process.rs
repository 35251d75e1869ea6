//! Runs the CLI through a guard and speaks to it by lines.

mod launch;
mod streams;
mod supervisor;

use std::io;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::claude::line::OutputLine;
use crate::guard::protocol::{GuardCommand, MonotonicTime};
use launch::StartedGuard;
use streams::{Line, StreamTasks};
use supervisor::{Supervisor, kill_by_marker};

pub use crate::guard::protocol::EndedBy;
pub use launch::{Launch, PendingGuard, is_too_late};
pub use streams::{MAX_LINE, MAX_WAITING, STDERR_TAIL};

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code of the main process; in the sandbox a signal n that ended the CLI shows as 128 + n.
    pub code: Option<i32>,
    /// The signal that ended the main process. Neither code nor signal: the guard was lost and nobody knows.
    pub signal: Option<i32>,
    /// Why the tree was ended.
    pub ended_by: EndedBy,
    /// The last 4 KB of standard error.
    pub stderr_tail: String,
}

/// A run of the CLI. Dropping it ends the run.
#[derive(Debug)]
pub struct Process {
    lines: mpsc::UnboundedReceiver<Line>,
    stdin: Option<mpsc::UnboundedSender<String>>,
    commands: mpsc::UnboundedSender<GuardCommand>,
    supervisor: JoinHandle<Exit>,
    marker: String,
}

impl Process {
    /// Starts the run that `guard` was made for. Fails when the program can't be started, with its name in the error.
    /// `held_at` says when the lease was held last, which counts as the first beat; when that's too long ago, nothing
    /// is started.
    pub async fn start(
        guard: PendingGuard,
        launch: Launch,
        held_at: impl Fn() -> Instant,
    ) -> io::Result<Self> {
        let StartedGuard {
            guard,
            streams,
            reports,
            writer,
        } = guard.start(&launch, held_at).await?;
        let (line_sender, lines) = mpsc::unbounded_channel();
        let (stdin, input) = mpsc::unbounded_channel();
        let (commands, commands_to_guard) = mpsc::unbounded_channel();
        let tasks = StreamTasks::start(streams, input, line_sender);
        let supervisor = Supervisor {
            guard,
            reports,
            writer,
            commands: commands_to_guard,
            deadline: launch.deadline,
            cgroup: launch.group(),
        };
        let marker = launch.marker.clone();
        let supervisor = tokio::spawn(async move {
            let (code, signal, ended_by) = supervisor.run(launch.marker).await;
            Exit {
                code,
                signal,
                ended_by,
                stderr_tail: tasks.finish().await,
            }
        });
        Ok(Self {
            lines,
            stdin: Some(stdin),
            commands,
            supervisor,
            marker,
        })
    }

    /// The next line of standard output without its line feed; `None` after the last. May be cancelled and called
    /// again without losing a line.
    pub async fn next_line(&mut self) -> Option<OutputLine> {
        self.lines.recv().await.map(|(line, _memory)| line)
    }

    /// Hands a line over for the CLI's standard input; a missing line feed is added. Never waits for the CLI to read it,
    /// and does nothing when the input is closed, by [`Self::close_stdin`] or by the CLI.
    pub fn send(&self, line: &str) {
        if let Some(stdin) = &self.stdin {
            let _ = stdin.send(line.to_owned());
        }
    }

    /// Closes the CLI's standard input after the lines that were sent.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Reports to the guard that the lease was held at `asked`; see [`Beats`].
    pub fn renewed_at(&self, asked: Instant) {
        send_beat(&self.commands, asked);
    }

    /// The way to go on with [`Self::renewed_at`] while somebody waits for the end of the run.
    pub fn beats(&self) -> Beats {
        Beats(self.commands.clone())
    }

    /// Ends the whole tree of the run now. [`Self::wait`] returns when that is done.
    pub fn kill(&self) {
        let _ = self.commands.send(GuardCommand::Kill);
    }

    /// Waits for the end of a run that should be over, since its output is, and ends it when it isn't within
    /// `patience`: the CLI may live on without its output, and a stopped guard never reports.
    pub async fn end_within(mut self, patience: Duration) -> Exit {
        self.close_stdin();
        // The supervisor hears this beside the end of the run, and stops listening with it.
        let commands = self.commands.clone();
        let reminder = tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            let _ = commands.send(GuardCommand::Kill);
        });
        let exit = self.wait().await;
        reminder.abort();
        exit
    }

    /// Waits for the end of the run; after that none of its processes lives. It doesn't end a run by itself, but
    /// closes its input and drops what wasn't read.
    pub async fn wait(self) -> Exit {
        let Self {
            lines,
            stdin,
            commands,
            supervisor,
            marker,
        } = self;
        drop((lines, stdin));
        let exit = supervisor.await;
        drop(commands);
        if let Ok(exit) = exit {
            return exit;
        }
        // The supervising task panicked; its guarantee is kept without it.
        kill_by_marker(marker).await;
        Exit {
            code: None,
            signal: None,
            ended_by: EndedBy::GuardLost,
            stderr_tail: String::new(),
        }
    }
}

/// Reports to the guard of a run when its lease was held.
#[derive(Debug)]
pub struct Beats(mpsc::UnboundedSender<GuardCommand>);

impl Beats {
    /// Reports to the guard that the lease was held at `asked`, the moment *before* the renewal was sent to the database:
    /// others count from when it was committed, which may be long before this worker hears of it.
    pub fn renewed_at(&self, asked: Instant) {
        send_beat(&self.0, asked);
    }
}

fn send_beat(commands: &mpsc::UnboundedSender<GuardCommand>, asked: Instant) {
    // The supervisor is gone when the run has ended; then a beat has no meaning.
    let _ = commands.send(GuardCommand::Beat {
        at: MonotonicTime::of(asked),
    });
}
