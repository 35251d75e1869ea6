//! The guard: the small process around one run, the worker's own program started again.
//!
//! It starts the CLI (in its sandbox or not), and ends the whole tree of the run when the CLI ends, when the worker
//! says so or is gone, when no beat came in time, at the deadline, or when the tree outgrows its memory. It's the
//! subreaper of the run, so whatever daemon the run made is its descendant; without children it has no descendants,
//! and only then does it report and end. It decides nothing about jobs and reads none of the CLI's output.

pub mod cgroup;
pub mod orphans;
pub(crate) mod protocol;
mod setup;
pub(crate) mod tree;

use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, Signal, WaitOptions};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};

use cgroup::Cgroup;
use protocol::{EndedBy, GuardCommand, MonotonicTime, Report, StartCommand};

pub use setup::Setup;

pub use orphans::{kill_orphans, kill_stale_runs, marker};

/// The first argument that turns any program of this project into a guard.
pub const ARGUMENT: &str = "guard";

/// How long the guard waits for its start command: the worker sends it at once.
const START_COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the memory of the tree is added up, when it has a limit.
const MEMORY_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a run without a beat is given to read one that is waiting already.
const LAST_BEAT_TIMEOUT: Duration = Duration::from_millis(20);

/// When a run is moved into its control group. The kernel lets whoever starts a process wait for tens of milliseconds
/// while another is moved, so it isn't done while the run starts; and no run does anything yet that the guard alone
/// couldn't end.
const CGROUP_DELAY: Duration = Duration::from_millis(100);

/// Processes and threads that a run in the sandbox may have at once.
const MAX_THREADS: u64 = 4096;

/// Added to the out-of-memory score of a run, so that a machine without memory loses a run and not its worker.
const OOM_SCORE: &str = "500";

/// Runs the guard. A program calls this first of all, before it starts a thread, when its first argument is
/// [`ARGUMENT`]; the second is the path of the worker's socket.
pub fn main() -> ExitCode {
    let Some(socket) = std::env::args_os().nth(2) else {
        let _ = writeln!(io::stderr(), "guard: this command is for the worker's own use");
        return ExitCode::from(2);
    };
    match guard(Path::new(&socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "guard: {error}");
            ExitCode::FAILURE
        }
    }
}

fn guard(socket: &Path) -> io::Result<()> {
    let worker = rustix::process::getppid();
    // Fails only for a process that is a session's leader already.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    // Not SIGKILL: the signal comes whenever the *thread* ends that started this process, so it must be looked into.
    rustix::process::set_parent_process_death_signal(Some(Signal::USR1))?;
    rustix::process::setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let mut signals = Signals::listen()?;
            let (read, mut reports) = UnixStream::connect(socket).await?.into_split();
            let mut lines = BufReader::new(read).lines();
            let first = tokio::time::timeout(START_COMMAND_TIMEOUT, lines.next_line()).await??;
            // No command: the worker went away before the run began.
            let Some(first) = first else { return Ok(()) };
            let command: StartCommand = serde_json::from_str(&first)?;

            let beat_within = Duration::from_millis(command.beat_within_ms);
            if command.held_at.age() >= beat_within {
                return send(&mut reports, &Report::too_late()).await;
            }
            let main = match start(&command) {
                Ok(main) => main,
                Err(error) => return send(&mut reports, &Report::not_started(&error, &command)).await,
            };
            send(&mut reports, &Report::Started).await.ok();
            let run = Run {
                main,
                status: None,
                worker,
                cgroup: None,
            };
            let ended = run.watch(&command, &mut lines, &mut signals).await;
            // A worker that is gone reads no report; the tree is ended all the same.
            send(&mut reports, &ended).await.ok();
            Ok(())
        })
}

/// Starts the main process of the run on the guard's own standard streams and lets go of these.
#[expect(clippy::disallowed_methods, reason = "the one program that a guard starts")]
fn start(run: &StartCommand) -> io::Result<i32> {
    let sandbox = run.setup.as_ref().map(Setup::open).transpose()?;
    if sandbox.is_some() {
        // Counted for the run's own user namespace, on kernels since 5.14; before, for the whole user.
        let most = Some(MAX_THREADS);
        rustix::process::setrlimit(
            Resource::Nproc,
            Rlimit {
                current: most,
                maximum: most,
            },
        )?;
    }
    if run.file_limit.is_some() {
        rustix::process::setrlimit(
            Resource::Fsize,
            Rlimit {
                current: run.file_limit,
                maximum: run.file_limit,
            },
        )?;
    }
    let mut command = Command::new(&run.program);
    command
        .args(sandbox.iter().flat_map(|open| &open.arguments))
        .args(&run.args)
        .env_clear()
        .envs(run.env.iter().map(|(name, value)| (name, value)));
    command.current_dir(&run.cwd);
    command
        .stdin(Stdio::inherit())
        .stdout(Stdio::inherit())
        .stderr(Stdio::inherit());
    if run.no_new_privileges {
        rustix::thread::set_no_new_privs(true)?;
    }
    // The run inherits the score at its start; the guard then takes its own back.
    let own_score = std::fs::read_to_string("/proc/self/oom_score_adj").ok();
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let started = command.spawn();
    if let Some(score) = own_score {
        let _ = std::fs::write("/proc/self/oom_score_adj", score.trim());
    }
    let child = started?;
    // The worker must see the end of the output when the run ends, and not when the guard does.
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    i32::try_from(child.id()).map_err(io::Error::other)
}

async fn send(reports: &mut OwnedWriteHalf, report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    reports.write_all(&line).await
}

struct Signals {
    terminate: SignalStream,
    interrupt: SignalStream,
    parent_gone: SignalStream,
    child: SignalStream,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            parent_gone: signal(SignalKind::user_defined1())?,
            child: signal(SignalKind::child())?,
        })
    }
}

struct Run {
    main: i32,
    /// How the main process ended; absent while it lives.
    status: Option<ExitStatus>,
    /// The process that started the guard.
    worker: Option<rustix::process::Pid>,
    /// Where one can be made, some time after the start.
    cgroup: Option<Cgroup>,
}

impl Run {
    /// Returns when no process of the run is left.
    async fn watch(
        mut self,
        command: &StartCommand,
        lines: &mut Lines<BufReader<OwnedReadHalf>>,
        signals: &mut Signals,
    ) -> Report {
        let by = self.wait_for_end(command, lines, signals).await;
        self.kill_tree().await;
        let code = self.status.and_then(|status| status.code());
        let signal = self.status.and_then(|status| status.signal());
        Report::Ended { code, signal, by }
    }

    async fn wait_for_end(
        &mut self,
        command: &StartCommand,
        lines: &mut Lines<BufReader<OwnedReadHalf>>,
        signals: &mut Signals,
    ) -> EndedBy {
        let deadline = tokio::time::sleep(Duration::from_millis(command.deadline_ms));
        tokio::pin!(deadline);
        let mut memory_checks = tokio::time::interval(MEMORY_CHECK_INTERVAL);
        memory_checks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut group = command.cgroup.as_deref();
        let group_is_due = tokio::time::sleep(CGROUP_DELAY);
        tokio::pin!(group_is_due);
        let mut beat = command.held_at;
        loop {
            // The main process may have ended before the signal was listened to.
            self.reap();
            if self.status.is_some() {
                return EndedBy::Exited;
            }
            let beat_left = Duration::from_millis(command.beat_within_ms).saturating_sub(beat.age());
            let reason = tokio::select! {
                biased;
                line = lines.next_line() => receive(line, &mut beat),
                _ = signals.child.recv() => None,
                _ = signals.terminate.recv() => Some(EndedBy::GuardLost),
                _ = signals.interrupt.recv() => Some(EndedBy::GuardLost),
                _ = signals.parent_gone.recv() => {
                    (rustix::process::getppid() != self.worker).then_some(EndedBy::Worker)
                }
                () = &mut deadline => Some(EndedBy::Deadline),
                () = &mut group_is_due, if group.is_some() => {
                    self.cgroup = group.take().and_then(|group| Cgroup::make(group, command.memory_limit));
                    if let Some(cgroup) = &self.cgroup {
                        cgroup.gather(|| tree::descendants(own_pid()));
                    }
                    None
                }
                _ = memory_checks.tick(), if command.memory_limit.is_some() => {
                    command.memory_limit.is_some_and(|limit| tree::memory(own_pid()) > limit).then_some(EndedBy::Memory)
                }
                // After this process was itself stopped for a while, beats may be waiting to be read.
                () = tokio::time::sleep(beat_left) => {
                    match tokio::time::timeout(LAST_BEAT_TIMEOUT, lines.next_line()).await {
                        Ok(line) => receive(line, &mut beat),
                        Err(_) => Some(EndedBy::Beat),
                    }
                }
            };
            if let Some(reason) = reason {
                return reason;
            }
        }
    }

    /// Kills until the kernel says that this process has no child: then it has no descendant either, since every
    /// orphan among them becomes its child.
    async fn kill_tree(&mut self) {
        let mut pause = Duration::from_millis(1);
        // Most runs leave nothing behind.
        while self.reap() != Left::Nothing {
            if let Some(cgroup) = &self.cgroup {
                cgroup.kill();
            }
            for process in tree::descendants(own_pid()) {
                process.kill();
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove();
        }
    }

    /// Collects whichever children have ended, the adopted ones too.
    fn reap(&mut self) -> Left {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == self.main => {
                    self.status = Some(ExitStatus::from_raw(status.as_raw()));
                }
                Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
                Ok(None) => return Left::Children,
                Err(_) => return Left::Nothing,
            }
        }
    }
}

/// Takes one line of the worker: a beat is noted, anything else is a reason to end.
fn receive(line: io::Result<Option<String>>, beat: &mut MonotonicTime) -> Option<EndedBy> {
    match line.ok().flatten().map(|line| serde_json::from_str(&line)) {
        // The age of a beat is that of its sending: one that lay in the socket proves nothing about now.
        Some(Ok(GuardCommand::Beat { at })) => {
            *beat = at;
            None
        }
        // A kill command, the end of the worker, or a command that this guard doesn't know.
        Some(Ok(GuardCommand::Kill) | Err(_)) | None => Some(EndedBy::Worker),
    }
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

#[derive(PartialEq, Eq)]
enum Left {
    Children,
    Nothing,
}
