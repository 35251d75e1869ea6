//! The product as a user runs it: its real binaries on a fresh database, started, stopped, killed and watched from
//! outside. A dropped system ends its processes and fails the test when one of them left a process behind or wrote
//! a secret into its log; when the test failed, it shows what the processes wrote.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use simulator::Simulator;
use sqlx::Connection as _;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::account::Account;
use crate::client::{Client, PATIENCE};
use crate::database::{Database, Db};
use crate::disk::Disk;
use crate::{BUSY, eventually, paths, processes, script, trace};

/// The key that a system's client has unless told otherwise; the second key of every system; its administrator's.
pub const KEYS: [&str; 3] = ["kit-key-one-f4b1c2", "kit-key-two-a83e90", "kit-key-admin-77d0e5"];

/// The Anthropic credential that the workers hold; it may be seen by the simulator only.
pub const ANTHROPIC_KEY: &str = "sk-sim-kit-0c5e7a1f93";

/// What a system's workers run as the Claude CLI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cli {
    /// The scripted one of this kit; see [`crate::script`].
    #[default]
    Fake,
    /// The real one, against the simulator. One run at a time in a system, two in the whole test binary.
    Real,
}

/// What a system is made of; see [`System::builder`].
#[derive(Debug)]
pub struct Builder {
    db: Db,
    database: Option<Database>,
    apis: usize,
    workers: usize,
    up: bool,
    cli: Cli,
    sandbox: bool,
    stepped_clock: bool,
    /// The user that the processes run as, unless the tests' own.
    account: Option<Account>,
    enter: Vec<String>,
    env: Vec<(String, String)>,
}

impl Builder {
    /// On which kind of database; SQLite unless told.
    #[must_use]
    pub fn database(mut self, db: Db) -> Self {
        self.db = db;
        self
    }

    /// On this database instead of a fresh one.
    #[must_use]
    pub fn on(mut self, database: Database) -> Self {
        self.database = Some(database);
        self
    }

    /// How many API processes; one unless told.
    #[must_use]
    pub fn apis(mut self, count: usize) -> Self {
        self.apis = count;
        self
    }

    /// How many workers; one unless told.
    #[must_use]
    pub fn workers(mut self, count: usize) -> Self {
        self.workers = count;
        self
    }

    /// `claude-queue up`, API and worker in one process, instead of separate ones.
    #[must_use]
    pub fn up(mut self) -> Self {
        self.up = true;
        self
    }

    /// Which CLI the workers run.
    #[must_use]
    pub fn cli(mut self, cli: Cli) -> Self {
        self.cli = cli;
        self
    }

    /// Whether runs are sandboxed; they are, unless told.
    #[must_use]
    pub fn sandbox(mut self, enabled: bool) -> Self {
        self.sandbox = enabled;
        self
    }

    /// One more environment variable for all processes; it wins over the kit's own.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// All processes see this disk at its path.
    #[must_use]
    pub fn within(mut self, disk: &Disk) -> Self {
        self.enter = disk.enter();
        self
    }

    /// Each process may open only so many files.
    #[must_use]
    pub fn open_files(mut self, count: u32) -> Self {
        let limited = format!("ulimit -n {count} && cd \"$0\" && exec \"$@\"");
        self.enter = vec!["sh".to_owned(), "-c".to_owned(), limited];
        self
    }

    /// All processes start as the tests' own user, which may be root.
    #[must_use]
    pub fn as_root(mut self) -> Self {
        self.account = None;
        self
    }

    /// With a clock that [`System::step_clock`] can step.
    #[must_use]
    pub fn stepped_clock(mut self) -> Self {
        self.stepped_clock = true;
        self
    }

    /// Starts everything and waits until it is ready.
    pub async fn start(self) -> System {
        let folder = paths::folder('s');
        let account = self.account;
        for name in ["data", "home", "run", "tmp"] {
            // As the service makes its own.
            let made = fs::DirBuilder::new().mode(0o700).create(folder.join(name));
            made.expect("a new folder");
            if let Some(account) = account {
                account.own(&folder.join(name)).expect("the folder is ours");
            }
        }
        let database = match self.database {
            Some(database) => database,
            None => Database::fresh(self.db, &folder).await,
        };
        let (real, claude) = match self.cli {
            Cli::Fake => (None, paths::binary("fake-claude")),
            Cli::Real => (Some(real_cli_permit().await), real_claude()),
        };
        let started = Simulator::start(([127, 0, 0, 1], 0).into()).await;
        let simulator = Some(started.expect("the simulator starts"));
        let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let mut env: Vec<(String, String)> = [
            ("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin".to_owned()),
            ("HOME", path("home")),
            ("TMPDIR", path("tmp")),
            ("XDG_RUNTIME_DIR", path("run")),
            ("RUST_BACKTRACE", "1".to_owned()),
            (paths::MARKER, folder.to_string_lossy().into_owned()),
            ("DATABASE_URL", database.url().to_owned()),
            ("DATA_DIR", path("data")),
            ("API_PORT", "0".to_owned()),
            ("API_KEYS", KEYS[..2].join(",")),
            ("ADMIN_API_KEYS", KEYS[2].to_owned()),
            (
                "SECRET_KEY",
                "kit-secret-key-which-is-long-enough-0123456789".to_owned(),
            ),
            // A test's disk is small.
            ("DISK_FLOOR_MB", "0".to_owned()),
            ("RATE_LIMIT_REQUESTS", "1000000".to_owned()),
            ("RATE_LIMIT_READ_REQUESTS", "1000000".to_owned()),
            (
                "WORKER_CONCURRENCY",
                if real.is_some() { "1" } else { "4" }.to_owned(),
            ),
            ("CLAUDE_CLI_PATH", claude.to_string_lossy().into_owned()),
            ("SANDBOX_ENABLED", self.sandbox.to_string()),
            ("ANTHROPIC_API_KEY", ANTHROPIC_KEY.to_owned()),
            (
                "ANTHROPIC_BASE_URL",
                simulator.as_ref().map_or_else(String::new, Simulator::url),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec();
        if self.stepped_clock {
            // The database's clock too: it is the time that changes, and not one machine that is wrong.
            for name in [
                "CLAUDE_QUEUE_CLOCK_OFFSET_FILE",
                "CLAUDE_QUEUE_DATABASE_CLOCK_OFFSET_FILE",
            ] {
                env.push((name.to_owned(), path(CLOCK)));
            }
        }
        for (name, value) in self.env {
            env.retain(|(known, _)| *known != name);
            env.push((name, value));
        }
        let mut system = System {
            apis: Vec::new(),
            workers: Vec::new(),
            folder,
            database,
            enter: self.enter,
            account,
            env,
            simulator,
            _real: real,
        };
        if self.up {
            system.add(Kind::Up).await;
        }
        // One after the other: the first one migrates, which the others would only wait for.
        for _ in 0..if self.up { 0 } else { self.apis } {
            system.add(Kind::Api).await;
        }
        for _ in 0..if self.up { 0 } else { self.workers } {
            system.add(Kind::Worker).await;
        }
        system
    }
}

/// The file that steps the clock, in a system's folder.
const CLOCK: &str = "clock";

/// At most two of the real CLI at once: each needs half a second of one of two cores to start.
static REAL_CLIS: Semaphore = Semaphore::const_new(2);

/// The right to run one real CLI, for who starts one without a [`System`].
pub async fn real_cli_permit() -> SemaphorePermit<'static> {
    REAL_CLIS.acquire().await.expect("the semaphore is never closed")
}

/// A running product.
#[derive(Debug)]
pub struct System {
    apis: Vec<Process>,
    workers: Vec<Process>,
    folder: PathBuf,
    database: Database,
    enter: Vec<String>,
    account: Option<Account>,
    env: Vec<(String, String)>,
    simulator: Option<Simulator>,
    _real: Option<SemaphorePermit<'static>>,
}

impl System {
    /// One API process and one worker with the scripted CLI on SQLite, to change at will.
    pub fn builder() -> Builder {
        Builder {
            db: Db::Sqlite,
            database: None,
            apis: 1,
            workers: 1,
            up: false,
            cli: Cli::Fake,
            sandbox: true,
            stepped_clock: false,
            account: Account::of_product(),
            enter: Vec::new(),
            env: Vec::new(),
        }
    }

    /// One API process and one worker with the scripted CLI.
    pub async fn start(db: Db) -> Self {
        Self::builder().database(db).start().await
    }

    /// A client of the first API process with the first key.
    pub fn client(&self) -> Client {
        self.client_of(0)
    }

    /// A client of an API process with the first key.
    pub fn client_of(&self, api: usize) -> Client {
        Client::new(&self.apis[api].url(), Some(KEYS[0]))
    }

    /// An API process; `claude-queue up` is one.
    pub fn api(&mut self, index: usize) -> &mut Process {
        &mut self.apis[index]
    }

    /// A worker process.
    pub fn worker(&mut self, index: usize) -> &mut Process {
        &mut self.workers[index]
    }

    /// Which of the workers runs this job.
    pub async fn running_worker(&self, job: &str) -> usize {
        let owner = format!("select lease_owner from job where job_id = '{job}' and status = 'running'");
        let owner = self.database.texts(&owner).await.remove(0);
        let index = self.workers.iter().position(|worker| worker.worker_id() == owner);
        index.expect("one of the system's workers holds the lease")
    }

    /// Stops a worker for long, at a moment when it doesn't hold SQLite's one write lock: nobody could take that from a
    /// stopped process, so that everything would wait for it. (PostgreSQL ends its transaction after five seconds.)
    pub async fn pause_worker(&mut self, index: usize) {
        let mut lock = None;
        if self.database.db() == Db::Sqlite {
            let lock = lock.insert(self.database.sqlite().await);
            sqlx::query("begin immediate")
                .execute(lock)
                .await
                .expect("the lock is free now and then");
        }
        self.workers[index].pause();
        if let Some(lock) = lock {
            lock.close().await.expect("the lock is given back");
        }
    }

    /// Every process, to pick one at random.
    pub fn processes(&mut self) -> Vec<&mut Process> {
        self.apis.iter_mut().chain(&mut self.workers).collect()
    }

    /// Starts one more API process; its index.
    pub async fn add_api(&mut self) -> usize {
        self.add(Kind::Api).await;
        self.apis.len() - 1
    }

    /// Starts one more worker; its index.
    pub async fn add_worker(&mut self) -> usize {
        self.add(Kind::Worker).await;
        self.workers.len() - 1
    }

    /// The same with more environment variables, which win over the system's.
    pub async fn add_worker_with(&mut self, env: &[(&str, &str)]) -> usize {
        let before = self.env.clone();
        for (name, value) in env {
            self.env.retain(|(known, _)| known != name);
            self.env.push(((*name).to_owned(), (*value).to_owned()));
        }
        let index = self.add_worker().await;
        self.env = before;
        index
    }

    /// The database.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The Messages API that the runs talk to.
    pub fn simulator(&self) -> &Simulator {
        self.simulator.as_ref().expect("a simulated system")
    }

    /// Stops the Messages API, so that its connections are refused; gives what [`System::restart_simulator`] takes.
    pub fn stop_simulator(&mut self) -> String {
        let simulator = self.simulator.take().expect("a simulated system");
        simulator.url().trim_start_matches("http://").to_owned()
    }

    /// Starts a new Messages API at the address of the one that was stopped.
    pub async fn restart_simulator(&mut self, address: &str) {
        let address = address.parse().expect("an address");
        let started = eventually(PATIENCE, "the former simulator's end", async || {
            Simulator::start(address).await.ok()
        });
        self.simulator = Some(started.await);
    }

    /// Where everything of this system lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Steps the clock of all processes: from now on it is so many seconds ahead of the machine's. Needs
    /// [`Builder::stepped_clock`].
    pub fn step_clock(&self, seconds: i64) {
        // Renamed into place, so that nobody reads a part of it.
        let new = self.folder.join("new-clock");
        fs::write(&new, seconds.to_string()).expect("a file of ours");
        fs::rename(new, self.folder.join(CLOCK)).expect("a file of ours");
    }

    /// Steps it to the middle of a day (UTC), so that no day, week or month ends within the test; by how many seconds.
    pub fn step_clock_to_noon(&self) -> i64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seconds = now.expect("a clock that is set").as_secs() % 86_400;
        let step = 43_200 - i64::try_from(seconds).expect("seconds of a day");
        self.step_clock(step);
        step
    }

    /// The working directory of a job without a session.
    pub fn workspace(&self, job: &str) -> PathBuf {
        self.folder.join("data/jobs").join(job).join("workspace")
    }

    /// Lets the run of a job go on that waits at [`until_told`](crate::script::until_told). It has begun by then.
    pub fn tell_to_go_on(&self, job: &str) {
        fs::write(self.workspace(job).join(script::GO_ON), "").expect("a workspace");
    }

    /// The runs of a job, as its traced scripts wrote them.
    pub fn runs(&self, job: &str) -> Vec<trace::Run> {
        trace::read(&self.workspace(job))
    }

    /// What the processes wrote, everything.
    pub fn written(&self) -> String {
        self.apis
            .iter()
            .chain(&self.workers)
            .map(Process::written)
            .collect()
    }

    /// Waits until the processes have written these words; everything that they wrote by then.
    pub async fn writes(&self, words: &str) -> String {
        eventually(PATIENCE, words, async || {
            Some(self.written()).filter(|written| written.contains(words))
        })
        .await
    }

    /// The processes of runs: all that belong to this system but for those that the kit itself started.
    pub fn run_processes(&self) -> Vec<processes::Found> {
        let own: Vec<i32> = self
            .apis
            .iter()
            .chain(&self.workers)
            .filter_map(Process::pid)
            .collect();
        processes::of_folder(&self.folder)
            .into_iter()
            .filter(|found| !own.contains(&found.pid))
            .collect()
    }

    /// Waits until no process of a run is left.
    pub async fn no_run_process_within(&self, limit: Duration) {
        let mut last = Vec::new();
        let gone = tokio::time::timeout(limit, async {
            loop {
                last = self.run_processes();
                if last.is_empty() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        assert!(
            gone.is_ok(),
            "after {limit:?} these processes of a run are still there: {last:#?}"
        );
    }

    async fn add(&mut self, kind: Kind) {
        let index = match kind {
            Kind::Worker => self.workers.len(),
            Kind::Api | Kind::Up => self.apis.len(),
        };
        let mut process = Process::new(kind, index + 1, &self.folder, &self.env);
        process.enter.clone_from(&self.enter);
        process.account = self.account;
        process.start().await;
        match kind {
            Kind::Worker => self.workers.push(process),
            Kind::Api | Kind::Up => self.apis.push(process),
        }
    }
}

impl Drop for System {
    fn drop(&mut self) {
        for process in self.apis.iter_mut().chain(&mut self.workers) {
            process.signal(Signal::CONT);
            process.kill();
        }
        // The guards end what their workers ran; the kit only looks.
        let begin = Instant::now();
        let mut left = processes::of_folder(&self.folder);
        while !left.is_empty() && begin.elapsed() < BUSY {
            std::thread::sleep(Duration::from_millis(20));
            left = processes::of_folder(&self.folder);
        }
        processes::end_folder(&self.folder, Duration::from_secs(2));
        let logged: String = self
            .apis
            .iter()
            .chain(&self.workers)
            .map(Process::written)
            .collect();
        let leaks = leaks(&logged);
        if std::thread::panicking() {
            self.show();
        }
        let _ = fs::remove_dir_all(&self.folder);
        if !std::thread::panicking() {
            assert!(
                left.is_empty(),
                "processes outlived their workers by {BUSY:?}: {left:#?}"
            );
            assert!(leaks.is_empty(), "the logs hold secrets: {leaks:#?}");
            // In builds for tests the API compares each of its answers with the document.
            let undeclared = logged
                .lines()
                .filter(|line| line.contains("is not in the OpenAPI document"));
            let undeclared = undeclared.collect::<Vec<_>>();
            assert!(
                undeclared.is_empty(),
                "add it to api/src/docs/operations.rs: {undeclared:#?}"
            );
        }
    }
}

impl System {
    #[expect(
        clippy::print_stderr,
        reason = "the test harness shows it with the failed test only"
    )]
    fn show(&self) {
        eprintln!("--- {} ({:?})", self.folder.display(), self.database);
        for process in self.apis.iter().chain(&self.workers) {
            let written = process.written();
            let lines: Vec<&str> = written.lines().collect();
            eprintln!("--- {} wrote {} lines, the last ones:", process.name, lines.len());
            for line in &lines[lines.len().saturating_sub(80)..] {
                eprintln!("{line}");
            }
        }
    }
}

fn leaks(written: &str) -> Vec<&str> {
    let secret = |line: &&str| {
        let known = KEYS.iter().chain([&ANTHROPIC_KEY]);
        known.into_iter().any(|secret| line.contains(secret)) || holds_a_secret(line)
    };
    written.lines().filter(secret).collect()
}

/// Whether a text holds what looks like the secret of a key that the product made: `cjk_` or `cja_`, 8 characters, `_`,
/// 49 characters.
pub fn holds_a_secret(text: &str) -> bool {
    ["cjk_", "cja_"].iter().any(|prefix| {
        text.match_indices(prefix).any(|(at, _)| {
            let rest = &text.as_bytes()[at + prefix.len()..];
            let plain = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_alphanumeric);
            rest.len() >= 58 && plain(&rest[..8]) && rest[8] == b'_' && plain(&rest[9..58])
        })
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Api,
    Worker,
    Up,
}

/// One process of the product.
#[derive(Debug)]
pub struct Process {
    kind: Kind,
    name: String,
    folder: PathBuf,
    /// What stands before its working directory and command line, to have it run elsewhere.
    enter: Vec<String>,
    /// The user that it runs as, unless the tests' own.
    account: Option<Account>,
    env: Vec<(String, String)>,
    child: Option<Child>,
    /// How much of standard output belongs to earlier starts.
    old: usize,
    ready_line: String,
}

impl Process {
    fn new(kind: Kind, number: usize, folder: &Path, env: &[(String, String)]) -> Self {
        let name = match kind {
            Kind::Api => format!("api-{number}"),
            Kind::Worker => format!("worker-{number}"),
            Kind::Up => format!("up-{number}"),
        };
        let (folder, env) = (folder.to_owned(), env.to_vec());
        Self {
            kind,
            name,
            folder,
            enter: Vec::new(),
            account: None,
            env,
            child: None,
            old: 0,
            ready_line: String::new(),
        }
    }

    /// Starts it and waits until it says that it is ready.
    pub async fn start(&mut self) {
        self.launch();
        self.ready().await;
    }

    /// Starts it without waiting.
    pub fn launch(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let (program, arguments): (_, &[&str]) = match self.kind {
            Kind::Api => ("claude-queue-api", &[]),
            Kind::Worker => ("claude-queue-worker", &[]),
            Kind::Up => ("claude-queue", &["up"]),
        };
        self.old = fs::read(self.out()).map_or(0, |bytes| bytes.len());
        let open = |path: PathBuf| {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .expect("a log file")
        };
        let mut words: Vec<OsString> = self.enter.iter().map(Into::into).collect();
        if !words.is_empty() {
            words.push(self.folder.clone().into());
        }
        words.extend(self.account.map(Account::words).unwrap_or_default());
        words.push(paths::binary(program).into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        let child = command
            .args(arguments)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(open(self.out()))
            .stderr(open(self.log()))
            .spawn();
        self.child = Some(child.expect("the binary starts"));
    }

    /// Waits until it says that it is ready.
    pub async fn ready(&mut self) {
        if let Err(why) = self.try_ready().await {
            panic!("{why}");
        }
    }

    /// Waits until it says that it is ready, or ends instead.
    ///
    /// # Errors
    /// How it ended, and everything that it wrote.
    pub async fn try_ready(&mut self) -> Result<(), String> {
        let wanted = match self.kind {
            Kind::Api | Kind::Up => "listening on http://",
            Kind::Worker => "worker ready ",
        };
        let begin = Instant::now();
        loop {
            let written = fs::read(self.out()).unwrap_or_default();
            let new = String::from_utf8_lossy(&written[self.old.min(written.len())..]).into_owned();
            // A line counts once it is whole.
            let mut lines = new
                .split_inclusive('\n')
                .filter_map(|line| line.strip_suffix('\n'));
            if let Some(line) = lines.find_map(|line| line.find(wanted).map(|at| line[at..].to_owned())) {
                self.ready_line = line;
                return Ok(());
            }
            if let Some(status) = self.exited() {
                return Err(format!(
                    "{} ended ({status}) instead of getting ready:\n{}",
                    self.name,
                    self.written()
                ));
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "{} isn't ready in time:\n{}",
                self.name,
                self.written()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Starts it as a supervisor does: again and again until it is ready. How often it ended instead.
    pub async fn supervise(&mut self) -> usize {
        let mut failures = 0;
        loop {
            self.launch();
            if self.try_ready().await.is_ok() {
                return failures;
            }
            failures += 1;
        }
    }

    /// Kills it if it runs, and starts it again.
    pub async fn restart(&mut self) {
        self.kill();
        self.start().await;
    }

    /// Where an API process listens.
    pub fn url(&self) -> String {
        let url = self
            .ready_line
            .strip_prefix("listening on ")
            .expect("an API process that was ready");
        url.trim_end_matches('/').to_owned()
    }

    /// The id that a worker gave itself.
    pub fn worker_id(&self) -> &str {
        self.ready_line
            .strip_prefix("worker ready ")
            .expect("a worker that was ready")
            .trim()
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.child
            .as_ref()
            .and_then(|child| i32::try_from(child.id()).ok())
    }

    /// Sends a signal, if it runs.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            processes::signal(pid, signal);
        }
    }

    /// `kill -9`, and its end.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }

    /// SIGSTOP: it stays, but does nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGTERM; its exit code once it has ended, which it must within `limit`.
    pub async fn stop(&mut self, limit: Duration) -> Option<i32> {
        self.signal(Signal::TERM);
        self.ended(limit).await.code()
    }

    /// How it ended, which it must within `limit`.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        eventually(limit, &format!("the end of {}", self.name), async || {
            self.exited()
        })
        .await
    }

    /// What it wrote, standard output first.
    pub fn written(&self) -> String {
        let read = |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        format!("{}{}", read(self.out()), read(self.log()))
    }

    fn exited(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.try_wait().expect("our own child");
        if status.is_some() {
            self.child = None;
        }
        status
    }

    fn out(&self) -> PathBuf {
        self.folder.join(format!("{}.out", self.name))
    }

    fn log(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.name))
    }
}

/// What a program that was run to its end said.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a binary of the product as [`command`] does, to its end; killed when it takes too long.
pub async fn run(name: &str, arguments: &[&str], env: &[(&str, &str)]) -> Finished {
    let output = tokio::time::timeout(PATIENCE, command(name, arguments, env).output())
        .await
        .unwrap_or_else(|_| panic!("{name} {arguments:?} doesn't end"))
        .expect("the binary starts");
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A binary of the product with nothing in its environment but what is given (and a path and a home), in a folder of
/// its own; killed when it is dropped.
pub fn command(name: &str, arguments: &[&str], env: &[(&str, &str)]) -> tokio::process::Command {
    let folder = paths::folder('r');
    let mut command = tokio::process::Command::new(paths::binary(name));
    if let Some(account) = Account::of_product() {
        command.uid(account.uid).gid(account.gid);
    }
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", &folder)
        .env(paths::MARKER, &folder)
        .envs(env.iter().copied())
        .current_dir(&folder)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// The real CLI's binary, as `make test` installs it.
pub fn real_claude() -> PathBuf {
    let link = paths::repository().join("tools/claude/node_modules/.bin/claude");
    // The link leads to the native binary, which a sandbox can be given as the one file that it is.
    let binary = fs::canonicalize(&link);
    let binary = binary.unwrap_or_else(|error| {
        panic!(
            "the real Claude CLI isn't there: run `make test`, or scripts/install-claude.sh ({}: {error})",
            link.display()
        )
    });
    paths::reachable(binary)
}
