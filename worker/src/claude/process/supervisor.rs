//! The worker's side of a running guard: passes commands on, hears its report, and does its work when it can't.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tokio::io::{BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Child;
use tokio::sync::mpsc;

use crate::guard::protocol::{EndedBy, GuardCommand, Report};
use crate::guard::{cgroup, orphans, tree};

/// How long a guard may take to kill its tree before the worker does it in its place.
const GUARD_KILL_TIMEOUT: Duration = Duration::from_secs(4);

/// How long a guard that has reported the end of its run may take to exit.
const GUARD_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// The lines that a guard sends.
pub(super) type Reports = Lines<BufReader<OwnedReadHalf>>;

/// What the worker has of a running guard.
pub(super) struct Supervisor {
    pub(super) guard: Child,
    pub(super) reports: Reports,
    pub(super) writer: OwnedWriteHalf,
    pub(super) commands: mpsc::UnboundedReceiver<GuardCommand>,
    pub(super) deadline: Duration,
    pub(super) cgroup: Option<PathBuf>,
}

/// Exit code, signal and reason.
type Ending = (Option<i32>, Option<i32>, EndedBy);

impl Supervisor {
    /// Returns when no process of the run lives, the guard included.
    pub(super) async fn run(mut self, marker: String) -> Ending {
        let mut overdue = EndedBy::Deadline;
        let patience = tokio::time::sleep(self.deadline.saturating_add(GUARD_KILL_TIMEOUT));
        tokio::pin!(patience);
        let mut killing = false;
        let report = loop {
            tokio::select! {
                command = self.commands.recv(), if !killing => match command {
                    Some(beat @ GuardCommand::Beat { .. }) => self.send(&beat),
                    // The run's owner wants its end, or has dropped it.
                    Some(GuardCommand::Kill) | None => {
                        self.send(&GuardCommand::Kill);
                        killing = true;
                        overdue = EndedBy::Worker;
                        patience.as_mut().reset(tokio::time::Instant::now() + GUARD_KILL_TIMEOUT);
                    }
                },
                report = self.reports.next_line() => break report.ok().flatten(),
                () = &mut patience => {
                    tracing::warn!("the guard of {marker} does not respond, killing the run's processes without it");
                    self.kill_all(marker).await;
                    return (None, None, overdue);
                }
            }
        };
        if let Some(Report::Ended { code, signal, by }) =
            report.and_then(|line| serde_json::from_str(&line).ok())
        {
            // It has nothing left to do; one that was stopped right here is of no use.
            if tokio::time::timeout(GUARD_EXIT_TIMEOUT, self.guard.wait())
                .await
                .is_err()
            {
                let _ = self.guard.kill().await;
            }
            return (code, signal, by);
        }
        tracing::warn!("the guard of {marker} is gone, killing the run's processes without it");
        self.kill_all(marker).await;
        (
            None,
            None,
            if killing {
                EndedBy::Worker
            } else {
                EndedBy::GuardLost
            },
        )
    }

    /// A guard that doesn't read, because it's stopped, mustn't stop the worker: then the command is lost and
    /// [`GUARD_KILL_TIMEOUT`] decides.
    fn send(&self, command: &GuardCommand) {
        if let Ok(mut line) = serde_json::to_vec(command) {
            line.push(b'\n');
            let _ = self.writer.try_write(&line);
        }
    }

    /// Kills everything without the guard's help, and the guard.
    async fn kill_all(&mut self, marker: String) {
        // A stopped guard is still the ancestor of all, which finds those too that have dropped the marker.
        if let Some(guard) = self.guard.id().and_then(|pid| i32::try_from(pid).ok()) {
            // It mustn't wake in the middle and take the end of its child for the end of the run.
            if let Some(pid) = Pid::from_raw(guard) {
                let _ = rustix::process::kill_process(pid, Signal::STOP);
            }
            let _ = tokio::task::spawn_blocking(move || kill_descendants(guard)).await;
        }
        let _ = self.guard.kill().await;
        if let Some(group) = self.cgroup.take() {
            let _ = tokio::task::spawn_blocking(move || cgroup::end(&group)).await;
        }
        kill_by_marker(marker).await;
    }
}

/// Kills what is below `root` until only zombies are left there, which end with their parent.
fn kill_descendants(root: i32) {
    let since = Instant::now();
    while since.elapsed() < GUARD_KILL_TIMEOUT {
        let alive: Vec<_> = tree::descendants(root)
            .into_iter()
            .filter(|process| !process.zombie)
            .collect();
        if alive.is_empty() {
            return;
        }
        for process in alive {
            process.kill();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Kills what carries this marker.
pub(super) async fn kill_by_marker(marker: String) {
    // Fails only while the runtime shuts down; the next start of a worker then does the same.
    let _ = tokio::task::spawn_blocking(move || orphans::kill_marked(&marker)).await;
}
