//! What a worker is told by its environment.

mod address;
mod anthropic;
pub mod provider;

use crate::spend::price::Prices;
use shared::approved;
use shared::env::{Error, Vars};
use shared::job::{EFFORTS, PERMISSION_MODES, RunDefaults};
use shared::key::SecretKey;
use shared::model::ACCEPTED_PRICES;
use shared::money::MicroUsd;
use shared::webhook::address::Guard;
use shared::webhook::schedule::Schedule;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

pub use address::Address;
pub(crate) use address::unusable;
pub use anthropic::{Anthropic, Federation};

/// The settings of a worker.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where workspaces and homes are kept. `DATA_DIR`, default `./data`.
    pub data_dir: PathBuf,
    /// How many runs this process holds at once. `WORKER_CONCURRENCY`, default: CPU cores.
    pub concurrency: u32,
    /// A run whose lease wasn't renewed for this long is another worker's to take. `LEASE_SECONDS`, 30.
    pub lease: Duration,
    /// What running jobs get to end by themselves when the worker stops. `DRAIN_SECONDS`, 30.
    pub drain: Duration,
    /// From the start of a run to its first line. `JOB_FIRST_OUTPUT_SECONDS`, 120.
    pub first_output: Duration,
    /// From one line of a run to the next. `JOB_IDLE_SECONDS`, 600.
    pub idle: Duration,
    /// What an attempt may take if the job doesn't say. `JOB_TIMEOUT_SECONDS`, 3600.
    pub timeout: Duration,
    /// What an attempt of a chat may take if it doesn't say. `CLAUDE_TIMEOUT_SECONDS`, 300.
    pub chat_timeout: Duration,
    /// The folder in which sessions may be given one to work in. `APPROVED_DIRECTORY`, none.
    pub approved_directory: Option<PathBuf>,
    /// How long a job may wait for the Messages API, from its first wait. `JOB_WAIT_MAX_HOURS`, 24.
    pub longest_wait: Duration,
    /// How long an ended job keeps its prompt, result, events and workspace. `JOB_RETENTION_DAYS`, 30.
    pub retention: Duration,
    /// How long idempotency keys are remembered. `IDEMPOTENCY_TTL_HOURS`, 24.
    pub idempotency_ttl: Duration,
    /// A run begins with no less money than this. `BUDGET_MIN_RESERVE`, 0.05 dollars.
    pub least_reserve: MicroUsd,
    /// The pause before another attempt.
    pub backoff: Backoff,
    /// Whether runs are isolated. `SANDBOX_ENABLED`, true.
    pub sandbox: bool,
    /// The ordinary user that the worker becomes if root starts it. `WORKER_USER`, none.
    pub user: Option<String>,
    /// Memory that a run may hold, with its temporary files, in bytes. `RUN_MEMORY_MB`, default: a quarter of the
    /// machine's, divided by the slots, at least 1024; 0 for no limit.
    pub run_memory: Option<u64>,
    /// What a run may use of the disk, in bytes. `RUN_DISK_MB`, 10240; 0 for no limit.
    pub run_disk: Option<u64>,
    /// With less room than this, in bytes, no run starts, and the largest one ends. `DISK_FLOOR_MB`, 1024.
    pub disk_floor: u64,
    /// What models cost. `PRICES_FILE`, the table that the program brings along.
    pub prices: Arc<Prices>,
    /// How the CLI is run.
    pub claude: Claude,
    /// How the worker reaches the model.
    pub anthropic: Anthropic,
    /// Whether it runs jobs, and whether it delivers webhooks. `WORKER_QUEUES`, `jobs,webhooks`.
    pub queues: Queues,
    /// How webhooks are delivered.
    pub deliveries: Deliveries,
    /// Opens the secrets that sign webhooks. `SECRET_KEY`, as the API has it.
    pub secret_key: Option<SecretKey>,
    /// Where programs are looked for. `PATH`.
    pub path: Option<String>,
    /// Where sockets are put. `XDG_RUNTIME_DIR`, default `/tmp`.
    pub runtime_dir: Option<PathBuf>,
}

/// What a worker works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    /// It runs jobs.
    pub jobs: bool,
    /// It delivers webhooks.
    pub webhooks: bool,
}

impl Queues {
    fn from_vars(vars: &Vars) -> Result<Self, Error> {
        let names = vars.list("WORKER_QUEUES", "jobs,webhooks")?;
        let known = |name: &String| matches!(name.as_str(), "jobs" | "webhooks");
        if names.is_empty() || !names.iter().all(known) {
            return Err(Error::new(
                "WORKER_QUEUES",
                "names a queue that there isn't, or none",
                "jobs, webhooks, or both with a comma between them",
            ));
        }
        let has = |name: &str| names.iter().any(|given| given == name);
        Ok(Self {
            jobs: has("jobs"),
            webhooks: has("webhooks"),
        })
    }
}

/// How webhooks are delivered.
#[derive(Clone, Debug)]
pub struct Deliveries {
    /// Where they may be sent. `WEBHOOK_ALLOW_HTTP`, `WEBHOOK_ALLOWED_SUBNETS`.
    pub guard: Guard,
    /// How long a receiver may take. `WEBHOOK_TIMEOUT_SECONDS`, 15.
    pub timeout: Duration,
    /// When a failed one is tried again. `WEBHOOK_RETRY_SCHEDULE`.
    pub schedule: Schedule,
    /// An endpoint that has only failed for so long is switched off. `WEBHOOK_DISABLE_AFTER_HOURS`, 120.
    pub disable_after: Duration,
}

impl Deliveries {
    fn from_vars(vars: &Vars) -> Result<Self, Error> {
        Ok(Self {
            guard: Guard::from_vars(vars)?,
            timeout: seconds(vars, "WEBHOOK_TIMEOUT_SECONDS", 15, 1, 60)?,
            schedule: Schedule::from_vars(vars)?,
            disable_after: Duration::from_hours(vars.number("WEBHOOK_DISABLE_AFTER_HOURS", 120, 1, 8_760)?),
        })
    }
}

/// Pauses between attempts: `base · factor^failures`, at most `most`, ±20 %.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// `CLAUDE_RETRY_BASE_DELAY`, 5 seconds.
    pub base: f64,
    /// `CLAUDE_RETRY_BACKOFF_FACTOR`, 2.
    pub factor: f64,
    /// `CLAUDE_RETRY_MAX_DELAY`, 300 seconds.
    pub most: f64,
}

impl Backoff {
    /// The pause after this many failures (1 and more), with jitter, so that pauses don't all end at once.
    pub fn jittered_pause(self, failures: i64) -> Duration {
        let random = f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
        self.pause(failures, random)
    }

    /// `random` is from 0 to 1.
    fn pause(self, failures: i64, random: f64) -> Duration {
        let exponent = i32::try_from(failures.clamp(1, 64) - 1).unwrap_or(64);
        let seconds = (self.base * self.factor.powi(exponent)).min(self.most);
        Duration::from_secs_f64(seconds * random.clamp(0.0, 1.0).mul_add(0.4, 0.8))
    }
}

/// How the CLI is run, where a job doesn't say otherwise.
#[derive(Clone, Debug)]
pub struct Claude {
    /// The program. `CLAUDE_CLI_PATH`, default `claude` on the path.
    pub cli: Option<PathBuf>,
    /// `CLAUDE_MODEL`, `sonnet`.
    pub model: String,
    /// `CLAUDE_EFFORT`; the CLI's own default when unset.
    pub effort: Option<String>,
    /// `CLAUDE_PERMISSION_MODE`, `acceptEdits`.
    pub permission_mode: String,
    /// `CLAUDE_MAX_TURNS`, 25; for chats and for jobs in sessions.
    pub max_turns: u32,
    /// `CLAUDE_SYSTEM_PROMPT`; the CLI's own when unset.
    pub system_prompt: Option<String>,
    /// `CLAUDE_ALLOWED_TOOLS`; by default Bash and WebSearch in the sandbox, and nothing without it.
    pub allowed_tools: Vec<String>,
    /// `CLAUDE_DISALLOWED_TOOLS`, nothing. WebFetch needs a network that the sandbox doesn't have, and is added there.
    pub disallowed_tools: Vec<String>,
}

/// Variables of the Python service that have no effect here, and what to do instead.
const WITHOUT_EFFECT: [(&str, &str); 3] = [
    (
        "SANDBOX_EXCLUDED_COMMANDS",
        "every command runs inside the sandbox",
    ),
    (
        "CLAUDE_RETRY_MAX_ATTEMPTS",
        "JOB_MAX_ATTEMPTS says how often a job is tried",
    ),
    ("MODERATION", "prompts aren't searched for phrases"),
];

impl Config {
    /// Reads the settings. The error names the first variable that can't be used.
    pub fn from_vars(vars: &Vars) -> Result<Self, Error> {
        for (name, instead) in WITHOUT_EFFECT {
            if vars.text(name)?.is_some() {
                tracing::warn!("{name} has no effect: {instead}");
            }
        }
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let cores = u32::try_from(cores).unwrap_or(2);
        let concurrency = number(vars, "WORKER_CONCURRENCY", cores, 1, 1000)?;
        let sandbox = vars.flag("SANDBOX_ENABLED", true)?;
        if vars.or("SANDBOX_NETWORK", "none")? != "none" {
            let accepted = "none; to give runs a network, set SANDBOX_ENABLED=false on a machine that is a sandbox itself";
            return Err(Error::new(
                "SANDBOX_NETWORK",
                "has a value that this release doesn't know",
                accepted,
            ));
        }
        Ok(Self {
            data_dir: vars.resolve("DATA_DIR", vars.or("DATA_DIR", "./data")?.into()),
            concurrency,
            lease: seconds(vars, "LEASE_SECONDS", 30, 2, 3600)?,
            drain: vars.drain()?,
            first_output: seconds(vars, "JOB_FIRST_OUTPUT_SECONDS", 120, 1, 86_400)?,
            idle: seconds(vars, "JOB_IDLE_SECONDS", 600, 1, 86_400)?,
            timeout: seconds(vars, "JOB_TIMEOUT_SECONDS", 3_600, 1, 86_400)?,
            chat_timeout: seconds(vars, "CLAUDE_TIMEOUT_SECONDS", 300, 1, 86_400)?,
            approved_directory: approved::from_vars(vars)?,
            longest_wait: Duration::from_hours(vars.number("JOB_WAIT_MAX_HOURS", 24, 1, 8760)?),
            retention: vars.retention()?,
            idempotency_ttl: vars.idempotency_ttl()?,
            least_reserve: money(vars, "BUDGET_MIN_RESERVE", 0.05, 0.0, 1_000.0)?,
            backoff: Backoff {
                base: vars.number("CLAUDE_RETRY_BASE_DELAY", 5.0, 0.01, 3600.0)?,
                factor: vars.number("CLAUDE_RETRY_BACKOFF_FACTOR", 2.0, 1.0, 100.0)?,
                most: vars.number("CLAUDE_RETRY_MAX_DELAY", 300.0, 0.01, 86_400.0)?,
            },
            sandbox,
            user: vars.text("WORKER_USER")?,
            run_memory: run_memory(vars, concurrency)?,
            run_disk: run_disk(vars)?,
            disk_floor: vars.number("DISK_FLOOR_MB", 1024_u64, 0, 1024 * 1024)? << 20,
            prices: Arc::new(prices(vars)?),
            claude: Claude::from_vars(vars, sandbox)?,
            anthropic: Anthropic::from_vars(vars)?,
            queues: Queues::from_vars(vars)?,
            deliveries: Deliveries::from_vars(vars)?,
            secret_key: SecretKey::from_vars(vars)?,
            path: vars.unlisted("PATH"),
            runtime_dir: vars.unlisted("XDG_RUNTIME_DIR").map(PathBuf::from),
        })
    }
}

impl Config {
    /// What a job gets that doesn't say.
    pub fn run_defaults(&self) -> RunDefaults {
        RunDefaults {
            model: self.claude.model.clone(),
            effort: self.claude.effort.clone(),
            permission_mode: self.claude.permission_mode.clone(),
            max_turns: i64::from(self.claude.max_turns),
            chat_timeout_seconds: whole_seconds(self.chat_timeout),
            timeout_seconds: whole_seconds(self.timeout),
        }
    }
}

fn whole_seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

impl Claude {
    fn from_vars(vars: &Vars, sandbox: bool) -> Result<Self, Error> {
        let mode = vars.choice("CLAUDE_PERMISSION_MODE", "acceptEdits", &PERMISSION_MODES)?;
        if mode == "bypassPermissions" && !sandbox {
            let accepted = "another mode, or SANDBOX_ENABLED=true";
            let problem = "would let the agent do anything as this user, without a sandbox";
            return Err(Error::new("CLAUDE_PERMISSION_MODE", problem, accepted));
        }
        let effort = vars.text("CLAUDE_EFFORT")?;
        if effort.as_deref().is_some_and(|effort| !EFFORTS.contains(&effort)) {
            return Err(Error::new(
                "CLAUDE_EFFORT",
                "has an unknown value",
                EFFORTS.join(" | "),
            ));
        }
        let mut disallowed_tools = vars.rules("CLAUDE_DISALLOWED_TOOLS", "")?;
        if sandbox {
            disallowed_tools.push("WebFetch".to_owned());
        }
        let mut allowed_tools = vars.rules("CLAUDE_ALLOWED_TOOLS", "Bash,WebSearch")?;
        if !sandbox && vars.text("CLAUDE_ALLOWED_TOOLS")?.is_none() {
            allowed_tools.clear();
        }
        Ok(Self {
            cli: cli(vars)?,
            model: vars.or("CLAUDE_MODEL", "sonnet")?,
            effort,
            permission_mode: mode,
            max_turns: vars.number("CLAUDE_MAX_TURNS", 25, 1, 1000)?,
            system_prompt: vars.text("CLAUDE_SYSTEM_PROMPT")?,
            allowed_tools,
            disallowed_tools,
        })
    }
}

/// A name without a slash is looked up on the path.
fn cli(vars: &Vars) -> Result<Option<PathBuf>, Error> {
    let text = vars.text("CLAUDE_CLI_PATH")?;
    if text.as_ref().is_some_and(|text| text.contains('/')) {
        return vars.path("CLAUDE_CLI_PATH");
    }
    Ok(text.map(PathBuf::from))
}

fn number(vars: &Vars, name: &'static str, default: u32, low: u32, high: u32) -> Result<u32, Error> {
    // The default is this machine's; the example file leaves it empty.
    vars.text(name)?
        .map_or(Ok(default), |_| vars.number(name, default, low, high))
}

fn seconds(vars: &Vars, name: &'static str, default: u64, low: u64, high: u64) -> Result<Duration, Error> {
    vars.number(name, default, low, high).map(Duration::from_secs)
}

/// The CLI alone takes most of the least limit.
fn run_memory(vars: &Vars, slots: u32) -> Result<Option<u64>, Error> {
    let default = share_of_memory(machine_memory(), slots);
    // The default is this machine's, too.
    let megabytes = number(vars, "RUN_MEMORY_MB", default, 0, 1024 * 1024)?;
    let megabytes = u64::from(megabytes);
    if (1..256).contains(&megabytes) {
        return Err(Error::new(
            "RUN_MEMORY_MB",
            "is less than the Claude CLI needs",
            "megabytes, 256 and more, or 0 for no limit",
        ));
    }
    Ok((megabytes > 0).then_some(megabytes * 1024 * 1024))
}

fn run_disk(vars: &Vars) -> Result<Option<u64>, Error> {
    let megabytes = vars.number("RUN_DISK_MB", 10_240_u64, 0, 1024 * 1024 * 1024)?;
    Ok((megabytes > 0).then_some(megabytes << 20))
}

/// What a run may have if nobody says, in MiB.
fn share_of_memory(bytes: u64, slots: u32) -> u32 {
    let share = (bytes >> 20) / 4 / u64::from(slots.max(1));
    u32::try_from(share).unwrap_or(u32::MAX).clamp(1024, 1024 * 1024)
}

/// The memory of this machine, or of the container that this is, in bytes.
fn machine_memory() -> u64 {
    let system = rustix::system::sysinfo();
    let machine = system.totalram * u64::from(system.mem_unit);
    let container = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let container = container.and_then(|text| text.trim().parse().ok());
    machine.min(container.unwrap_or(u64::MAX))
}

/// The table of prices that is in force.
pub fn prices(vars: &Vars) -> Result<Prices, Error> {
    let Some(file) = vars.path("PRICES_FILE")? else {
        return Ok(Prices::default());
    };
    Prices::read(&file).map_err(|problem| Error::new("PRICES_FILE", problem, ACCEPTED_PRICES))
}

fn money(vars: &Vars, name: &'static str, default: f64, low: f64, high: f64) -> Result<MicroUsd, Error> {
    let usd = vars.number(name, default, low, high)?;
    MicroUsd::from_usd(usd).ok_or_else(|| Error::new(name, "isn't an amount", "dollars, as 0.05"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_within_their_bounds() {
        let backoff = Backoff {
            base: 5.0,
            factor: 2.0,
            most: 300.0,
        };
        assert_eq!(backoff.pause(1, 0.5), Duration::from_secs(5));
        assert_eq!(backoff.pause(3, 0.5), Duration::from_secs(20));
        assert_eq!(backoff.pause(60, 1.0), Duration::from_mins(6));
        assert_eq!(backoff.pause(1, 0.0), Duration::from_secs(4));
    }

    #[test]
    fn a_limit_on_memory_leaves_room_for_the_cli() {
        let memory =
            |text| Config::from_vars(&Vars::of([("RUN_MEMORY_MB", text)])).map(|config| config.run_memory);
        let default = Config::from_vars(&Vars::of([])).unwrap().run_memory.unwrap();
        assert!(default >= 1 << 30);
        assert_eq!(share_of_memory(64 << 30, 4), 4096);
        assert_eq!(share_of_memory(8 << 30, 8), 1024);
        assert_eq!(memory("0").unwrap(), None);
        assert_eq!(memory("256").unwrap(), Some(256 * 1024 * 1024));
        for text in ["1", "255", "-1", "much"] {
            assert_eq!(memory(text).unwrap_err().variable, "RUN_MEMORY_MB", "{text}");
        }
    }

    #[test]
    fn without_the_sandbox_nothing_is_allowed_by_default() {
        let open = Config::from_vars(&Vars::of([("SANDBOX_ENABLED", "false")])).unwrap();
        assert!(open.claude.allowed_tools.is_empty());
        let closed = Config::from_vars(&Vars::of([])).unwrap();
        assert_eq!(closed.claude.allowed_tools, ["Bash", "WebSearch"]);
        let bypass = Vars::of([
            ("SANDBOX_ENABLED", "false"),
            ("CLAUDE_PERMISSION_MODE", "bypassPermissions"),
        ]);
        assert_eq!(
            Config::from_vars(&bypass).unwrap_err().variable,
            "CLAUDE_PERMISSION_MODE"
        );
    }
}
