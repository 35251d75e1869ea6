//! Runs the CLI through a guard and speaks to it by lines.
//!
//! Standard output is read as fast as it comes, since a CLI that can't write may lose the end of its output: lines
//! wait in memory for the reader, up to [`MAX_WAITING`] in all, and only then is the CLI made to wait.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::guard::cgroup;
use crate::guard::former::{self, GUARD_VARIABLE, RUN_VARIABLE};
use crate::guard::order::{Moment, Order, Report, TOO_LATE, ToGuard};
use crate::guard::tree;

pub use crate::guard::order::EndedBy;

/// A longer line of output is left out, with a warning: half a JSON text says nothing. The CLI's longest lines are
/// a tool's result and the answer's text, both far below it.
pub const MAX_LINE: usize = 16 * 1024 * 1024;

/// Bytes of output that may wait for the reader of a run.
pub const MAX_WAITING: usize = 32 * 1024 * 1024;

/// What each waiting line counts beside its bytes.
const LINE_OVERHEAD: usize = 64;

/// Bytes of standard error that are kept: the last ones.
pub const STDERR_TAIL: usize = 4096;

/// How long a guard may take to report for duty, on a machine where everything starts at once.
const GUARD_START: Duration = Duration::from_secs(30);

/// How long a guard may take to end its tree before the worker does it in its place.
const GUARD_PATIENCE: Duration = Duration::from_secs(4);

/// How long a guard that has reported the end of its run may take to end itself.
const GUARD_EXIT: Duration = Duration::from_secs(2);

/// How long the pipes of an ended run are still read. Nobody is left to hold them open but a stranger.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What to run, and for how long.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program, an absolute path: bubblewrap or the CLI.
    pub program: PathBuf,
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
    /// No program of the run may change its user (`sudo`), which would get it out of reach. Bubblewrap sets this
    /// itself, and where it's set-uid it can't start with it.
    pub no_new_privileges: bool,
}

impl Launch {
    /// The run's own control group.
    fn group(&self) -> Option<PathBuf> {
        self.cgroup
            .as_deref()
            .map(|parent| cgroup::of(parent, &self.marker))
    }
}

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
    orders: mpsc::UnboundedSender<Told>,
    supervisor: JoinHandle<Exit>,
    marker: String,
}

type Line = (Vec<u8>, OwnedSemaphorePermit);

#[derive(Debug)]
enum Told {
    Beat(Moment),
    Kill,
}

impl Process {
    fn supervise(
        mut guard: Child,
        stdin_pipe: Option<ChildStdin>,
        reports: Reports,
        writer: OwnedWriteHalf,
        launch: Launch,
    ) -> Self {
        let (line_sender, lines) = mpsc::unbounded_channel();
        let (stdin, stdin_lines) = mpsc::unbounded_channel();
        let (orders, told) = mpsc::unbounded_channel();
        let pipes = Pipes {
            stdin: stdin_pipe.map(|pipe| tokio::spawn(write_lines(pipe, stdin_lines))),
            stdout: guard
                .stdout
                .take()
                .map(|pipe| tokio::spawn(read_lines(pipe, line_sender))),
            stderr: guard.stderr.take().map(|pipe| tokio::spawn(read_tail(pipe))),
        };
        let supervisor = Supervisor {
            guard,
            reports,
            writer,
            told,
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
                stderr_tail: pipes.finish().await,
            }
        });
        Self {
            lines,
            stdin: Some(stdin),
            orders,
            supervisor,
            marker,
        }
    }

    /// The next line of standard output without its line feed; `None` after the last. May be cancelled and called
    /// again without losing a line.
    pub async fn next_line(&mut self) -> Option<Vec<u8>> {
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

    /// Tells the guard that the lease was held at `asked`; see [`Beats`].
    pub fn renewed_at(&self, asked: Instant) {
        tell_beat(&self.orders, asked);
    }

    /// The way to go on with [`Self::renewed_at`] while somebody waits for the end of the run.
    pub fn beats(&self) -> Beats {
        Beats(self.orders.clone())
    }

    /// Ends the whole tree of the run now. [`Self::wait`] returns when that is done.
    pub fn kill(&self) {
        let _ = self.orders.send(Told::Kill);
    }

    /// Waits for the end of a run that should be over, since its output is, and ends it when it isn't within
    /// `patience`: the CLI may live on without its output, and a stopped guard never reports.
    pub async fn end_within(mut self, patience: Duration) -> Exit {
        self.close_stdin();
        // The supervisor hears this beside the end of the run, and stops listening with it.
        let orders = self.orders.clone();
        let reminder = tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            let _ = orders.send(Told::Kill);
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
            orders,
            supervisor,
            marker,
        } = self;
        drop((lines, stdin));
        let exit = supervisor.await;
        drop(orders);
        if let Ok(exit) = exit {
            return exit;
        }
        // The supervising task panicked; its guarantee is kept without it.
        end_by_marker(marker).await;
        Exit {
            code: None,
            signal: None,
            ended_by: EndedBy::GuardLost,
            stderr_tail: String::new(),
        }
    }
}

/// Tells the guard of a run when its lease was held.
#[derive(Debug)]
pub struct Beats(mpsc::UnboundedSender<Told>);

impl Beats {
    /// Tells the guard that the lease was held at `asked`, the moment *before* the renewal was sent to the database:
    /// others count from when it was committed, which may be long before this worker hears of it.
    pub fn renewed_at(&self, asked: Instant) {
        tell_beat(&self.0, asked);
    }
}

fn tell_beat(orders: &mpsc::UnboundedSender<Told>, asked: Instant) {
    // The supervisor is gone when the run has ended; then a beat has no meaning.
    let _ = orders.send(Told::Beat(Moment::of(asked)));
}

/// A guard that is on its way while the rest of its run is prepared. Dropped, it ends by itself.
#[derive(Debug)]
pub struct Waiting {
    guard: Child,
    listener: UnixListener,
    path: PathBuf,
}

impl Waiting {
    /// Calls a guard, this very program, for the run of this marker; `runtime_dir` as in [`Launch`].
    pub fn call(marker: &str, runtime_dir: &Path) -> io::Result<Self> {
        Self::under(Path::new("/proc/self/exe"), marker, runtime_dir)
    }

    /// The same with another program as the guard: one that calls [`crate::guard::main`].
    #[expect(clippy::disallowed_methods, reason = "this file starts programs")]
    pub fn under(guard: &Path, marker: &str, runtime_dir: &Path) -> io::Result<Self> {
        let path = runtime_dir.join("guard.sock");
        let listener = bind(&path)?;
        // The environment of the guard stays empty but for its mark: it needs nothing and may hold no secret.
        let guard = Command::new(guard)
            .arg0("claude-queue-guard")
            .arg(crate::guard::ARGUMENT)
            .arg(&path)
            .env_clear()
            .env(GUARD_VARIABLE, marker)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Self {
            guard,
            listener,
            path,
        })
    }

    /// Starts the run. Fails when the program can't be started, with its name in the error. `held_at` says when the
    /// lease was held last, which counts as the first beat; when that's too long ago, nothing is started.
    pub async fn start(self, launch: Launch, held_at: impl Fn() -> Instant) -> io::Result<Process> {
        let Self {
            mut guard,
            listener,
            path,
        } = self;
        // Waiting for a child closes its input if it still has it.
        let stdin = guard.stdin.take();
        let met = tokio::time::timeout(GUARD_START, meet(&listener, &mut guard, &launch, held_at)).await;
        let _ = std::fs::remove_file(&path);
        let (reports, writer) = match met.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(met) => met,
            Err(error) => {
                let _ = guard.kill().await;
                end_by_marker(launch.marker).await;
                return Err(error);
            }
        };
        Ok(Process::supervise(guard, stdin, reports, writer, launch))
    }
}

/// Whether this is the error of a start that came too late for its lease.
pub fn is_too_late(error: &io::Error) -> bool {
    error.raw_os_error() == Some(TOO_LATE.raw_os_error())
}

type Reports = Lines<BufReader<OwnedReadHalf>>;

fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

/// Waits until the guard has come, gives it its order, and hears that the run has started.
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
                return Err(io::Error::other(format!("the guard ended at its start: {}", status?)));
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
    let order = Order {
        program: launch.program.clone(),
        args: launch.args.clone(),
        env,
        cwd: launch.cwd.clone(),
        cgroup: launch.group(),
        beat_within_ms: milliseconds(launch.beat_within),
        deadline_ms: milliseconds(launch.deadline),
        memory_limit: launch.memory_limit,
        no_new_privileges: launch.no_new_privileges,
        held_at: Moment::of(held_at()),
    };
    let mut line = serde_json::to_vec(&order)?;
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

/// The worker's side of the guard: passes orders on, hears its report, and does its work when it can't.
struct Supervisor {
    guard: Child,
    reports: Reports,
    writer: OwnedWriteHalf,
    told: mpsc::UnboundedReceiver<Told>,
    deadline: Duration,
    cgroup: Option<PathBuf>,
}

type Ending = (Option<i32>, Option<i32>, EndedBy);

impl Supervisor {
    /// Returns when no process of the run lives, the guard included.
    async fn run(mut self, marker: String) -> Ending {
        let mut overdue = EndedBy::Deadline;
        let patience = tokio::time::sleep(self.deadline.saturating_add(GUARD_PATIENCE));
        tokio::pin!(patience);
        let mut told_to_end = false;
        let report = loop {
            tokio::select! {
                told = self.told.recv(), if !told_to_end => match told {
                    Some(Told::Beat(at)) => self.tell(&ToGuard::Beat { at }),
                    // The run's owner wants its end, or has dropped it.
                    Some(Told::Kill) | None => {
                        self.tell(&ToGuard::Kill);
                        told_to_end = true;
                        overdue = EndedBy::Worker;
                        patience.as_mut().reset(tokio::time::Instant::now() + GUARD_PATIENCE);
                    }
                },
                report = self.reports.next_line() => break report.ok().flatten(),
                () = &mut patience => {
                    tracing::warn!("the guard of {marker} doesn't answer: the worker ends the run itself");
                    self.end_all(marker).await;
                    return (None, None, overdue);
                }
            }
        };
        if let Some(Report::Ended { code, signal, by }) =
            report.and_then(|line| serde_json::from_str(&line).ok())
        {
            // It has nothing left to do; one that was stopped right here is of no use.
            if tokio::time::timeout(GUARD_EXIT, self.guard.wait()).await.is_err() {
                let _ = self.guard.kill().await;
            }
            return (code, signal, by);
        }
        tracing::warn!("the guard of {marker} is gone: the worker ends the run itself");
        self.end_all(marker).await;
        (
            None,
            None,
            if told_to_end {
                EndedBy::Worker
            } else {
                EndedBy::GuardLost
            },
        )
    }

    /// A guard that doesn't read, because it's stopped, mustn't stop the worker: then the order is lost and
    /// [`GUARD_PATIENCE`] decides.
    fn tell(&self, order: &ToGuard) {
        if let Ok(mut line) = serde_json::to_vec(order) {
            line.push(b'\n');
            let _ = self.writer.try_write(&line);
        }
    }

    /// Ends everything without the guard's help, and the guard.
    async fn end_all(&mut self, marker: String) {
        // A stopped guard is still the ancestor of all, which finds those too that have dropped the mark.
        if let Some(guard) = self.guard.id().and_then(|pid| i32::try_from(pid).ok()) {
            // It mustn't wake in the middle and take the end of its child for the end of the run.
            if let Some(pid) = Pid::from_raw(guard) {
                let _ = rustix::process::kill_process(pid, Signal::STOP);
            }
            let _ = tokio::task::spawn_blocking(move || end_descendants(guard)).await;
        }
        let _ = self.guard.kill().await;
        if let Some(group) = self.cgroup.take() {
            let _ = tokio::task::spawn_blocking(move || cgroup::end(&group)).await;
        }
        end_by_marker(marker).await;
    }
}

/// Kills what is below `root` until only zombies are left there, which end with their parent.
fn end_descendants(root: i32) {
    let since = Instant::now();
    while since.elapsed() < GUARD_PATIENCE {
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

async fn end_by_marker(marker: String) {
    // Fails only while the runtime shuts down; the next start of a worker then does the same.
    let _ = tokio::task::spawn_blocking(move || former::end_marked(&marker)).await;
}

/// The tasks that serve the three pipes of a run. Each ends by itself when the run does.
struct Pipes {
    stdin: Option<JoinHandle<()>>,
    stdout: Option<JoinHandle<()>>,
    stderr: Option<JoinHandle<String>>,
}

impl Pipes {
    /// Waits for the last output of an ended run and returns the tail of its standard error.
    async fn finish(self) -> String {
        if let Some(stdin) = self.stdin {
            stdin.abort();
        }
        if let Some(mut stdout) = self.stdout
            && tokio::time::timeout(LAST_WORDS, &mut stdout).await.is_err()
        {
            stdout.abort();
        }
        let Some(mut stderr) = self.stderr else {
            return String::new();
        };
        if let Ok(tail) = tokio::time::timeout(LAST_WORDS, &mut stderr).await {
            return tail.unwrap_or_default();
        }
        stderr.abort();
        String::new()
    }
}

async fn write_lines(mut stdin: ChildStdin, mut lines: mpsc::UnboundedReceiver<String>) {
    while let Some(mut line) = lines.recv().await {
        if !line.ends_with('\n') {
            line.push('\n');
        }
        // The CLI has closed its input or is gone: its output says the rest.
        if stdin.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read_lines(stdout: impl AsyncRead + Unpin, lines: mpsc::UnboundedSender<Line>) {
    let room = Arc::new(Semaphore::new(MAX_WAITING));
    let mut reader = BufReader::with_capacity(64 * 1024, stdout);
    let mut line = Vec::new();
    let mut too_long = false;
    loop {
        let Ok(read) = reader.fill_buf().await else { return };
        let end = read.iter().position(|byte| *byte == b'\n');
        let part = &read[..end.unwrap_or(read.len())];
        if line.len() + part.len() > MAX_LINE {
            too_long = true;
            line = Vec::new();
        } else if !too_long {
            line.extend_from_slice(part);
        }
        let at_end = read.is_empty();
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_none() && !at_end {
            continue;
        }
        if too_long {
            tracing::warn!("a line of the CLI's output over {MAX_LINE} bytes was left out");
            too_long = false;
        } else if end.is_some() || !line.is_empty() {
            pass_on(std::mem::take(&mut line), &lines, &room).await;
        }
        if at_end {
            return;
        }
    }
}

/// Waits for room in memory. When nobody wants lines any more they are dropped, so that the CLI can go on writing.
async fn pass_on(line: Vec<u8>, lines: &mpsc::UnboundedSender<Line>, room: &Arc<Semaphore>) {
    let size = u32::try_from(line.len() + LINE_OVERHEAD).unwrap_or(u32::MAX);
    tokio::select! {
        permit = Arc::clone(room).acquire_many_owned(size) => {
            if let Ok(permit) = permit {
                let _ = lines.send((line, permit));
            }
        }
        () = lines.closed() => {}
    }
}

async fn read_tail(mut stderr: impl AsyncRead + Unpin) -> String {
    let mut tail = Vec::with_capacity(2 * STDERR_TAIL);
    let mut part = [0; STDERR_TAIL];
    while let Ok(read @ 1..) = stderr.read(&mut part).await {
        tail.extend_from_slice(&part[..read]);
        tail.drain(..tail.len().saturating_sub(STDERR_TAIL));
    }
    // The cut may have gone through a character.
    let start = tail
        .iter()
        .take(3)
        .take_while(|byte| **byte & 0b1100_0000 == 0b1000_0000)
        .count();
    String::from_utf8_lossy(&tail[start..]).into_owned()
}
