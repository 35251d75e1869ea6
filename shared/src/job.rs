//! A job: a prompt, how to run it, and what became of it.

pub mod status;

use crate::clock::Timestamp;
use crate::event::NewEvent;
use crate::id::{JobId, KeyId, SessionId};
use crate::money::MicroUsd;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashSet;
use std::time::{Duration, Instant};

pub use status::JobStatus;

/// Why a queued job may not start yet. Clients must expect more words in later releases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum Hold {
    /// An earlier job of its session or concurrency key hasn't ended.
    Order,
    /// Its time hasn't come: a delayed start, or the pause before another attempt.
    Delay,
    /// The money that is left is reserved by running jobs, or the budget waits for its next period.
    Budget,
    /// The Anthropic account has met a usage limit and says when it ends.
    UsageLimit,
    /// The Messages API couldn't serve its run: it was overloaded, unreachable, refused the worker's credential …
    Upstream,
    /// Somebody paused the queue.
    Paused,
}

impl Hold {
    /// The word on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Delay => "delay",
            Self::Budget => "budget",
            Self::UsageLimit => "usage_limit",
            Self::Upstream => "upstream",
            Self::Paused => "paused",
        }
    }

    /// The hold of that name; none for the empty text of a ready job.
    pub fn parse(text: &str) -> Option<Self> {
        [
            Self::Order,
            Self::Delay,
            Self::Budget,
            Self::UsageLimit,
            Self::Upstream,
            Self::Paused,
        ]
        .into_iter()
        .find(|hold| hold.as_str() == text)
    }
}

/// Whether a person is waiting for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum JobKind {
    /// Submitted as a job.
    Job,
    /// Made by a chat call; hidden from the job lists of a session.
    Chat,
}

impl JobKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Job, Self::Chat];

    /// The word on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Job => "job",
            Self::Chat => "chat",
        }
    }
}

/// What happens when the worker that runs a job is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum OnWorkerLost {
    /// Another attempt resumes the Claude session, or starts again when there is none to resume.
    #[default]
    Resume,
    /// The job fails with `worker_lost`.
    Fail,
}

/// Why a job was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, sqlx::Type)]
#[serde(rename_all = "snake_case")]
#[sqlx(type_name = "text", rename_all = "snake_case")]
pub enum CancelReason {
    /// Its owner asked for it.
    User,
    /// Its `cancel_after` passed.
    Deadline,
    /// Its key was revoked, and its jobs with it.
    KeyRevoked,
    /// Its session was deleted.
    SessionDeleted,
    /// The client that waited for it left, and had asked for that.
    ClientDisconnect,
}

impl CancelReason {
    /// The word on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Deadline => "deadline",
            Self::KeyRevoked => "key_revoked",
            Self::SessionDeleted => "session_deleted",
            Self::ClientDisconnect => "client_disconnect",
        }
    }
}

/// The efforts that there are.
pub const EFFORTS: [&str; 5] = ["low", "medium", "high", "xhigh", "max"];

/// The permission modes that there are.
pub const PERMISSION_MODES: [&str; 6] = [
    "default",
    "plan",
    "acceptEdits",
    "auto",
    "dontAsk",
    "bypassPermissions",
];

/// The parts of a job's settings that only its run needs; stored as JSON beside the prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunOptions {
    /// Replaces the CLI's own system prompt. At most 50,000 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Rules that allow tools, in the CLI's syntax. `None`: the service's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_tools: Option<Vec<String>>,
    /// Rules that forbid tools. `None`: the service's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disallowed_tools: Option<Vec<String>>,
    /// The JSON Schema that the structured output must match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<Value>,
    /// The job fails if the conversation of its session is lost, instead of beginning a new one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fail_on_session_lost: bool,
}

/// What a job gets that doesn't say: written into its row by its first claim, so that each attempt runs alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunDefaults {
    /// The model.
    pub model: String,
    /// The effort; `None` is the CLI's own.
    pub effort: Option<String>,
    /// The permission mode.
    pub permission_mode: String,
    /// Turns at most of a chat, or of a job in a session; other jobs have no limit.
    pub max_turns: i64,
    /// Seconds an attempt of a chat may take.
    pub chat_timeout_seconds: i64,
    /// Seconds an attempt of another job may take.
    pub timeout_seconds: i64,
}

impl RunDefaults {
    /// Turns at most of this job.
    pub fn turns_of(&self, job: &Job) -> Option<i64> {
        (job.kind == JobKind::Chat || job.session_id.is_some()).then_some(self.max_turns)
    }

    /// Seconds an attempt of this job may take.
    pub const fn timeout_of(&self, job: &Job) -> i64 {
        match job.kind {
            JobKind::Chat => self.chat_timeout_seconds,
            JobKind::Job => self.timeout_seconds,
        }
    }
}

/// A job that passed the gate and isn't stored yet.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id.
    pub job_id: JobId,
    /// Its owner.
    pub key_id: KeyId,
    /// Whether a person is waiting.
    pub kind: JobKind,
    /// The prompt: 1 to 1,000,000 characters, not only white space.
    pub message: String,
    /// What only the run needs.
    pub options: RunOptions,
    /// The session it runs in; `None` is a throw-away workspace.
    pub session_id: Option<SessionId>,
    /// Jobs of one owner with the same key run one at a time. Never together with a session.
    pub concurrency_key: Option<String>,
    /// Higher runs first. -10 to 10.
    pub priority: i64,
    /// Not before this time.
    pub run_after: Option<Timestamp>,
    /// Cancelled if it hasn't ended by then.
    pub deadline_at: Option<Timestamp>,
    /// Attempts at most, 1 to 5.
    pub max_attempts: i64,
    /// What a lost worker means.
    pub on_worker_lost: OnWorkerLost,
    /// The model; `None` is the service's default.
    pub model: Option<String>,
    /// `low medium high xhigh max`; `None` is the service's default.
    pub effort: Option<String>,
    /// The permission mode; `None` is the service's default.
    pub permission_mode: Option<String>,
    /// Turns at most; `None` is the service's default.
    pub max_turns: Option<i64>,
    /// Seconds an attempt may take; `None` is the service's default.
    pub timeout_seconds: Option<i64>,
    /// What all its attempts together may cost at most.
    pub max_cost: MicroUsd,
    /// Where to tell what happens to it.
    pub webhook_url: Option<String>,
    /// What is told there: words of `started progress completed` with blanks between them.
    pub webhook_events: String,
    /// The client's own name for it.
    pub custom_id: Option<String>,
    /// Up to 16 pairs of text, as a JSON object.
    pub metadata: Value,
    /// When it was accepted.
    pub created_at: Timestamp,
}

/// A job as it is stored, without its prompt and result, which are rows of their own.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Job {
    /// Order of submission over all jobs.
    pub job_number: i64,
    /// Its id.
    pub job_id: JobId,
    /// Its owner.
    pub key_id: KeyId,
    /// Whether a person is waiting.
    pub kind: JobKind,
    /// Where it stands.
    pub status: JobStatus,
    /// Why it may not start: a [`Hold`]'s word, or empty.
    pub hold: String,
    /// Higher runs first.
    pub priority: i64,
    /// `s:<session id>` or `k:<concurrency key>`: the jobs of a group run one at a time.
    pub group_key: Option<String>,
    /// Its session.
    pub session_id: Option<SessionId>,
    /// Not before this time.
    pub run_after: Option<Timestamp>,
    /// Cancelled if it hasn't ended by then.
    pub deadline_at: Option<Timestamp>,
    /// The number of its latest run; 0 before the first. Never falls: (job, attempt) is the fence of a run.
    pub attempt: i64,
    /// Lost workers and retryable errors so far.
    pub failures: i64,
    /// When it first had to wait for the Messages API, if no run has got past that since.
    pub wait_since: Option<Timestamp>,
    /// What the last such wait is for, in a sentence for people.
    pub wait_reason: Option<String>,
    /// Failures that end it.
    pub max_attempts: i64,
    /// What a lost worker means.
    pub on_worker_lost: OnWorkerLost,
    /// The model; since its first claim the effective one, like the next four.
    pub model: Option<String>,
    /// The effort.
    pub effort: Option<String>,
    /// The permission mode.
    pub permission_mode: Option<String>,
    /// Turns at most.
    pub max_turns: Option<i64>,
    /// Seconds an attempt may take.
    pub timeout_seconds: Option<i64>,
    /// What all its attempts together may cost at most.
    pub max_cost: MicroUsd,
    /// Where to tell what happens to it.
    pub webhook_url: Option<String>,
    /// What is told there: words of `started progress completed` with blanks between them.
    pub webhook_events: String,
    /// The client's own name for it.
    pub custom_id: Option<String>,
    /// A JSON object of text pairs.
    pub metadata: String,
    /// The job that this one repeats; this release repeats none.
    pub retry_of: Option<JobId>,
    /// The Claude session of its latest attempt.
    pub claude_session_id: Option<String>,
    /// All attempts' cost so far; grows while it runs.
    pub cost: MicroUsd,
    /// All attempts' running time, in milliseconds.
    pub duration_ms: i64,
    /// Tokens of all attempts so far, as a JSON object.
    pub usage: Option<String>,
    /// A sentence for people.
    pub error: Option<String>,
    /// A word for programs; an open set.
    pub error_code: Option<String>,
    /// When a cancel was asked for while it ran.
    pub cancel_requested_at: Option<Timestamp>,
    /// Why it was, or is being, cancelled.
    pub cancel_reason: Option<CancelReason>,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When its first attempt began.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub completed_at: Option<Timestamp>,
    /// The number of its latest event.
    pub last_event_seq: i64,
    /// Grows with every change a client can see.
    pub version: i64,
    /// Whether prompt, result, events and workspace are gone.
    pub data_removed: bool,
}

impl Job {
    /// What its attempts may still cost. Meant for a job that isn't running.
    pub fn cost_left(&self) -> MicroUsd {
        self.max_cost - self.cost
    }
}

/// Proof that this process holds the run of a job. Only storage makes one, and only with one can anything be
/// written about the run; (`job.job_id`, `job.attempt`) is the fence.
#[derive(Debug)]
pub struct Lease {
    /// The job as it was claimed; `attempt` is this run's number.
    pub job: Job,
    /// When it was claimed: after the wait for the locks, and before anyone else could see it.
    pub held_at: Instant,
    /// The prompt.
    pub message: String,
    /// What only the run needs.
    pub options: RunOptions,
    /// The models that its key may use now, as the key names them; all, if there are none.
    pub allowed_models: Vec<String>,
    /// What this run may cost: reserved in every budget that applies.
    pub reserved: MicroUsd,
    /// The folder of the host that its session works in, instead of one of its own.
    pub working_dir: Option<String>,
    /// The Claude sessions that the run may continue, best first; the first whose transcript is there is taken.
    pub resume: Vec<Resume>,
    /// Whether its key had endpoints for events when the run began.
    pub endpoints: bool,
}

impl Lease {
    /// Whether somebody may want to hear how the run gets on.
    pub fn tells_progress(&self) -> bool {
        self.endpoints || self.job.webhook_url.is_some() && self.job.webhook_events.contains("progress")
    }
}

/// What a run continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The Claude session to resume.
    pub claude_session_id: String,
    /// The earlier attempt of this very job that was cut off in it; `None` is the end of its session's last job.
    pub interrupted: Option<i64>,
}

/// Tokens, as the Messages API counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenUsage {
    /// Tokens read that no cache held.
    pub input_tokens: i64,
    /// Tokens written.
    pub output_tokens: i64,
    /// Tokens written to a cache.
    pub cache_creation_input_tokens: i64,
    /// Tokens read from a cache.
    pub cache_read_input_tokens: i64,
}

impl std::ops::AddAssign for TokenUsage {
    fn add_assign(&mut self, other: Self) {
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
        self.cache_creation_input_tokens += other.cache_creation_input_tokens;
        self.cache_read_input_tokens += other.cache_read_input_tokens;
    }
}

/// What one model cost in one attempt: a row of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCost {
    /// The model, by its plain name.
    pub model: String,
    /// Its cost.
    pub cost: MicroUsd,
    /// Its tokens.
    pub usage: TokenUsage,
}

/// What an attempt cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spend {
    /// A row for each model.
    pub models: Vec<ModelCost>,
    /// Whether a part of it is estimated, because a request was cut off before its answer said what it used.
    pub estimated: bool,
    /// The price table that was used.
    pub price_version: Option<String>,
    /// What the CLI reported. For people only: nothing is decided by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported: Option<MicroUsd>,
}

impl Spend {
    /// The sum over the models.
    pub fn total(&self) -> MicroUsd {
        self.models.iter().map(|model| model.cost).sum()
    }

    /// The same with one row for each model: of those that name a model twice the first counts.
    #[must_use]
    pub fn distinct(&self) -> Self {
        let mut seen = HashSet::new();
        let mut distinct = self.clone();
        distinct.models.retain(|model| seen.insert(model.model.clone()));
        distinct
    }

    /// The tokens of all models.
    pub fn usage(&self) -> TokenUsage {
        let mut sum = TokenUsage::default();
        self.models.iter().for_each(|model| sum += model.usage);
        sum
    }
}

/// How a run ended, as its worker reports it.
#[derive(Clone, Debug)]
pub struct Report {
    /// What becomes of the job.
    pub ending: Ending,
    /// The result, also the partial one of a failed or cancelled run: the wire's `Result` object.
    pub result: Option<Value>,
    /// What it cost.
    pub spend: Spend,
    /// How long it ran.
    pub duration: Duration,
    /// Turns, as the CLI counts them.
    pub turns: i64,
    /// The Claude session to resume from, when its transcript is there.
    pub claude_session_id: Option<String>,
    /// The last 4 KB that the CLI wrote to stderr.
    pub stderr_tail: String,
    /// How the process ended: `exit 0`, `signal 9` …
    pub exit: String,
    /// The run's last events, which aren't stored yet. They come before its end.
    pub events: Vec<NewEvent>,
}

/// What becomes of a job when a run of it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Done.
    Done,
    /// Failed for good.
    Failed {
        /// For programs.
        code: String,
        /// For people: what was wrong and what to do.
        message: String,
    },
    /// Cancelled, as was asked for.
    Cancelled,
    /// Another attempt may do better.
    Retry {
        /// For programs, should this have been the last attempt.
        code: String,
        /// For people.
        message: String,
        /// Not before this time.
        run_after: Timestamp,
        /// Why it waits: `Delay`, `UsageLimit` or `Upstream`. The last two are waits for the Messages API, which
        /// `JOB_WAIT_MAX_HOURS` bounds.
        hold: Hold,
        /// Whether it counts towards `max_attempts`.
        counts: bool,
    },
    /// The worker stops: queued again at once, no failure.
    Released,
}
