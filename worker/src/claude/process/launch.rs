//! Starts a guard, and through it the run: the handshake over the guard's socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::OwnedWriteHalf;
use tokio::process::{Child, Command};

use super::streams::Streams;
use super::supervisor::{Reports, kill_by_marker};
use crate::guard::orphans::{GUARD_VARIABLE, RUN_VARIABLE};
use crate::guard::protocol::{MonotonicTime, Report, StartCommand, TOO_LATE};
use crate::guard::{Setup, cgroup};

/// How long a guard may take to connect, on a machine where everything starts at once.
const GUARD_START_TIMEOUT: Duration = Duration::from_secs(30);

/// What to run, and for how long.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program, an absolute path: bubblewrap or the CLI.
    pub program: PathBuf,
    /// What bubblewrap is told beside its arguments; none without it.
    pub setup: Option<Setup>,
    /// Its arguments, without its name.
    pub args: Vec<String>,
    /// The whole environment of the run; the marker is added when it's missing.
    pub env: Vec<(String, String)>,
    /// The directory that the program starts in.
    pub cwd: PathBuf,
    /// The run's mark ([`crate::guard::marker`]), by which its processes are found when the guard is gone.
    pub marker: String,
    /// A control group in which this process may make one for the run ([`crate::guard::cgroup::own`]).
    pub cgroup: Option<PathBuf>,
    /// The run ends when no beat is younger than this.
    pub beat_within: Duration,
    /// The run ends this long after its start.
    pub deadline: Duration,
    /// The run's own directory for the guard's socket; its path must leave room for a socket's name (107 bytes).
    pub runtime_dir: PathBuf,
    /// Memory that the processes of the run may hold together, in bytes, looked at every second.
    pub memory_limit: Option<u64>,
    /// The largest file that the run may write, in bytes.
    pub file_limit: Option<u64>,
    /// No program of the run may change its user (`sudo`), which would get it out of reach. Bubblewrap sets this
    /// itself, and where it's set-uid it can't start with it.
    pub no_new_privileges: bool,
}

impl Launch {
    /// The run's own control group.
    pub(super) fn group(&self) -> Option<PathBuf> {
        self.cgroup
            .as_deref()
            .map(|parent| cgroup::of(parent, &self.marker))
    }
}

/// A guard that starts while the rest of its run is prepared. Dropped, it exits by itself.
#[derive(Debug)]
pub struct PendingGuard {
    guard: Child,
    streams: Streams,
    listener: UnixListener,
    path: PathBuf,
}

impl PendingGuard {
    /// Starts a guard, this very program, for the run of this marker; `runtime_dir` as in [`Launch`].
    pub fn spawn(marker: &str, runtime_dir: &Path) -> io::Result<Self> {
        Self::spawn_as(Path::new("/proc/self/exe"), marker, runtime_dir)
    }

    /// The same with another program as the guard: one that calls [`crate::guard::main`].
    #[expect(clippy::disallowed_methods, reason = "this file starts programs")]
    pub fn spawn_as(guard: &Path, marker: &str, runtime_dir: &Path) -> io::Result<Self> {
        let path = runtime_dir.join("guard.sock");
        let listener = bind(&path)?;
        let (streams, [stdin, stdout, stderr]) = Streams::new()?;
        // The environment of the guard stays empty but for its marker: it needs nothing and may hold no secret.
        let guard = Command::new(guard)
            .arg0("claude-queue-guard")
            .arg(crate::guard::ARGUMENT)
            .arg(&path)
            .env_clear()
            .env(GUARD_VARIABLE, marker)
            .current_dir("/")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .spawn()?;
        Ok(Self {
            guard,
            streams,
            listener,
            path,
        })
    }

    /// Gives the guard its command and waits until the run has started; kills the guard if that fails.
    pub(super) async fn start(
        self,
        launch: &Launch,
        held_at: impl Fn() -> Instant,
    ) -> io::Result<StartedGuard> {
        let Self {
            mut guard,
            streams,
            listener,
            path,
        } = self;
        let met =
            tokio::time::timeout(GUARD_START_TIMEOUT, meet(&listener, &mut guard, launch, held_at)).await;
        let _ = std::fs::remove_file(&path);
        match met.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok((reports, writer)) => Ok(StartedGuard {
                guard,
                streams,
                reports,
                writer,
            }),
            Err(error) => {
                let _ = guard.kill().await;
                kill_by_marker(launch.marker.clone()).await;
                Err(error)
            }
        }
    }
}

/// A guard whose run has started.
pub(super) struct StartedGuard {
    pub(super) guard: Child,
    pub(super) streams: Streams,
    pub(super) reports: Reports,
    pub(super) writer: OwnedWriteHalf,
}

/// Whether this is the error of a start whose lease had expired.
pub fn is_too_late(error: &io::Error) -> bool {
    error.raw_os_error() == Some(TOO_LATE.raw_os_error())
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

/// Waits until the guard has connected, sends it the start command, and waits for its report that the run has started.
async fn meet(
    listener: &UnixListener,
    guard: &mut Child,
    launch: &Launch,
    held_at: impl Fn() -> Instant,
) -> io::Result<(Reports, OwnedWriteHalf)> {
    let socket = loop {
        let (socket, _) = tokio::select! {
            accepted = listener.accept() => accepted?,
            status = guard.wait() => {
                return Err(io::Error::other(format!("the guard exited at its start: {}", status?)));
            }
        };
        let caller = socket.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok());
        if caller == guard.id() {
            break socket;
        }
    };
    let (read, mut writer) = socket.into_split();
    let mut reports = BufReader::new(read).lines();
    let mut env = launch.env.clone();
    if !env.iter().any(|(name, _)| name == RUN_VARIABLE) {
        env.push((RUN_VARIABLE.to_owned(), launch.marker.clone()));
    }
    let command = StartCommand {
        program: launch.program.clone(),
        setup: launch.setup.clone(),
        args: launch.args.clone(),
        env,
        cwd: launch.cwd.clone(),
        cgroup: launch.group(),
        beat_within_ms: milliseconds(launch.beat_within),
        deadline_ms: milliseconds(launch.deadline),
        memory_limit: launch.memory_limit,
        file_limit: launch.file_limit,
        no_new_privileges: launch.no_new_privileges,
        held_at: MonotonicTime::of(held_at()),
    };
    let mut line = serde_json::to_vec(&command)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    let report = reports.next_line().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    match serde_json::from_str(&report)? {
        Report::NotStarted { os_error, message } => {
            if os_error == Some(TOO_LATE.raw_os_error()) {
                return Err(TOO_LATE.into());
            }
            let kind = os_error.map_or(io::ErrorKind::Other, |code| {
                io::Error::from_raw_os_error(code).kind()
            });
            Err(io::Error::new(kind, message))
        }
        Report::Started | Report::Ended { .. } => Ok((reports, writer)),
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
