//! What requests and answers look like, for the document alone: nothing here is ever made. The tests compare the names of
//! the members with what is read and shown.

#![allow(dead_code, reason = "only their shapes are used")]
#![allow(
    clippy::struct_field_names,
    clippy::struct_excessive_bools,
    clippy::doc_markdown,
    reason = "the names on the wire, and sentences for readers of the document"
)]

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::Value;
use utoipa::openapi::schema::{KnownFormat, Schema, SchemaFormat, Type};
use utoipa::openapi::{ObjectBuilder, RefOr};
use utoipa::{PartialSchema, ToSchema};

/// A time: RFC 3339 in UTC, with microseconds.
struct Time;
/// An amount in US dollars, with at most six decimals.
struct Money;

impl PartialSchema for Time {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)))
            .into()
    }
}

impl ToSchema for Time {
    fn name() -> Cow<'static, str> {
        "Time".into()
    }
}

impl PartialSchema for Money {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(Type::Number).into()
    }
}

impl ToSchema for Money {
    fn name() -> Cow<'static, str> {
        "Money".into()
    }
}

/// Of the members that are listed here an answer may lack one; all others are always there.
pub(super) const OPTIONAL: &[(&str, &[&str])] = &[
    (
        "Problem",
        &[
            "errors",
            "error",
            "budget",
            "violated-policies",
            "job_id",
            "checks",
        ],
    ),
    (
        "Result",
        &[
            "truncated",
            "session_lost",
            "files_changed",
            "files_changed_truncated",
        ],
    ),
    ("Key", &["key", "budget_status", "rate_limit_status"]),
    ("Attempt", &["worker_id", "cli_version", "exit"]),
    (
        "AuditEntry",
        &[
            "action",
            "address",
            "count",
            "detail",
            "object_id",
            "request_id",
            "session_rowid",
            "session_name",
            "job_id",
            "role",
            "content",
            "tools_used",
            "cost",
            "duration_ms",
        ],
    ),
    ("Delivery", &["body"]),
    ("Endpoint", &["secret"]),
    ("WebhookSecret", &["secret"]),
    ("Health", &["clock_ahead_seconds"]),
    (
        "LedgerRow",
        &[
            "at",
            "attempt",
            "estimated",
            "job_id",
            "key_id",
            "model",
            "reason",
            "session",
            "day",
            "entries",
            "estimated_cost",
        ],
    ),
];

macro_rules! schemas {
    ($($kind:ident { $($(#[$doc:meta])* $name:ident { $($(#[$member:meta])* $field:ident: $type:ty,)* })* })*) => {
        $($(
            $(#[$doc])*
            #[derive(ToSchema)]
            pub(super) struct $name {
                $($(#[$member])* $field: $type,)*
            }
        )*)*

        /// All of them by name, as JSON; and whether it is something that is sent to the service.
        pub(super) fn all() -> Vec<(String, Value, bool)> {
            let json = |schema: RefOr<Schema>| serde_json::to_value(schema).unwrap_or_default();
            vec![$($((
                $name::name().into_owned(),
                json($name::schema()),
                stringify!($kind) == "requests",
            ),)*)*]
        }
    };
}

schemas! {
requests {
    /// A job to be run.
    JobCreate {
        /// The prompt; not only white space.
        #[schema(min_length = 1, max_length = 1_000_000, example = "Write a haiku about queues into haiku.txt")]
        message: String,
        /// Replaces the system prompt.
        #[schema(max_length = 50_000)]
        system: Option<String>,
        /// A model of the CLI: an alias or an id.
        #[schema(min_length = 1, max_length = 100, example = "sonnet")]
        model: Option<String>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_turns: Option<i64>,
        permission_mode: Option<PermissionMode>,
        effort: Option<Effort>,
        allowed_tools: Option<Rules>,
        disallowed_tools: Option<Rules>,
        /// What all attempts together may cost; at most CLAUDE_MAX_COST_PER_REQUEST.
        max_cost_usd: Option<Money>,
        /// `{"type": "json_schema", "schema": {…}}`, a JSON Schema alone, `{"type": "json"}` or `{"type": "text"}`; up to
        /// 64 KiB.
        output_format: Option<HashMap<String, Value>>,
        /// The name, number or Claude id of a session. Not in a session's own list of jobs.
        #[schema(min_length = 1, max_length = 128)]
        session: Option<String>,
        /// Jobs of one caller with the same key run one at a time, in order. Not together with `session`.
        #[schema(min_length = 1, max_length = 128)]
        concurrency_key: Option<String>,
        /// What is higher than the key's maximum is lowered to it.
        #[schema(minimum = -10, maximum = 10)]
        priority: Option<i64>,
        /// At most 30 days ahead.
        run_after: Option<Time>,
        /// In how many seconds the job is cancelled.
        #[schema(minimum = 1, maximum = 604_800)]
        cancel_after: Option<i64>,
        #[schema(minimum = 1, maximum = 5)]
        max_attempts: Option<i64>,
        /// What happens when its worker is lost: `resume` or `fail`.
        on_worker_lost: Option<OnWorkerLost>,
        /// What happens when the conversation of its session is lost: `restart` or `fail`.
        on_session_lost: Option<OnSessionLost>,
        /// For each attempt; at most JOB_TIMEOUT_MAX_SECONDS.
        #[schema(minimum = 1, maximum = 86_400)]
        timeout_seconds: Option<i64>,
        /// Your own name for the job.
        #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9_-]+$")]
        custom_id: Option<String>,
        metadata: Option<Metadata>,
        /// Where the events of the job are sent.
        #[schema(min_length = 1, max_length = 2_048)]
        webhook_url: Option<String>,
        /// `completed` alone if absent.
        #[schema(max_items = 3)]
        webhook_events: Option<Vec<WebhookEvent>>,
        /// Settings by name; not together with `session`.
        #[schema(min_length = 1, max_length = 128)]
        template: Option<String>,
    }
    /// A session to be made, or new settings for the one of this name.
    SessionCreate {
        /// Letters, marks and digits of any script, then also blanks, dots, hyphens and underscores; not all digits, and no
        /// UUID.
        #[schema(min_length = 1, max_length = 128, example = "my-project")]
        name: String,
        /// `default`, or the caller's own id.
        #[schema(max_length = 128)]
        user_id: Option<String>,
        #[schema(max_length = 50_000)]
        system_prompt: Option<String>,
        #[schema(min_length = 1, max_length = 100)]
        model: Option<String>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_turns: Option<i64>,
        permission_mode: Option<PermissionMode>,
        effort: Option<Effort>,
        allowed_tools: Option<Rules>,
        disallowed_tools: Option<Rules>,
        max_cost_usd: Option<Money>,
        metadata: Option<Metadata>,
        #[schema(min_length = 1, max_length = 128)]
        template: Option<String>,
    }
    /// What changes of a session; null clears it.
    SessionPatch {
        #[schema(max_length = 50_000)]
        system_prompt: Option<String>,
        #[schema(min_length = 1, max_length = 100)]
        model: Option<String>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_turns: Option<i64>,
        permission_mode: Option<PermissionMode>,
        effort: Option<Effort>,
        allowed_tools: Option<Rules>,
        disallowed_tools: Option<Rules>,
        max_cost_usd: Option<Money>,
        metadata: Option<Metadata>,
    }
    /// Where a session works.
    RepoRequest {
        /// Inside APPROVED_DIRECTORY.
        #[schema(min_length = 1, max_length = 1_024)]
        working_dir: String,
    }
    /// A message to be answered.
    ChatRequest {
        #[schema(min_length = 1, max_length = 1_000_000, example = "Say hello.")]
        message: String,
        #[schema(max_length = 50_000)]
        system: Option<String>,
        #[schema(min_length = 1, max_length = 100)]
        model: Option<String>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_turns: Option<i64>,
        permission_mode: Option<PermissionMode>,
        effort: Option<Effort>,
        allowed_tools: Option<Rules>,
        disallowed_tools: Option<Rules>,
        max_cost_usd: Option<Money>,
        output_format: Option<HashMap<String, Value>>,
        on_session_lost: Option<OnSessionLost>,
        /// At most CLAUDE_TIMEOUT_SECONDS.
        #[schema(minimum = 1)]
        timeout_seconds: Option<i64>,
        metadata: Option<Metadata>,
    }
    /// A text whose tokens are estimated.
    CountRequest {
        #[schema(min_length = 1, max_length = 1_000_000)]
        text: String,
    }
    /// Why a job is cancelled.
    CancelRequest {
        #[schema(max_length = 200)]
        reason: Option<String>,
    }
    /// A key to be made.
    KeyCreate {
        #[schema(min_length = 1, max_length = 128)]
        name: String,
        /// All but `permissions:bypass` and those that end in `:admin` if absent.
        #[schema(max_items = 20)]
        scopes: Option<Vec<String>>,
        expires_at: Option<Time>,
        /// Addresses and networks.
        #[schema(max_items = 50)]
        allowed_ips: Option<Vec<String>>,
        #[schema(max_items = 50)]
        allowed_models: Option<Vec<String>>,
        rate_limit: Option<RateLimit>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_running_jobs: Option<i64>,
        #[schema(minimum = 1, maximum = 100_000)]
        max_queued_jobs: Option<i64>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_streams: Option<i64>,
        #[schema(minimum = -10, maximum = 10)]
        max_priority: Option<i64>,
        budget: Option<BudgetPut>,
        metadata: Option<Metadata>,
    }
    /// What changes of a key; null removes a limit.
    KeyPatch {
        #[schema(min_length = 1, max_length = 128)]
        name: Option<String>,
        #[schema(max_items = 20)]
        scopes: Option<Vec<String>>,
        expires_at: Option<Time>,
        #[schema(max_items = 50)]
        allowed_ips: Option<Vec<String>>,
        #[schema(max_items = 50)]
        allowed_models: Option<Vec<String>>,
        rate_limit: Option<RateLimit>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_running_jobs: Option<i64>,
        #[schema(minimum = 1, maximum = 100_000)]
        max_queued_jobs: Option<i64>,
        #[schema(minimum = 1, maximum = 1_000)]
        max_streams: Option<i64>,
        #[schema(minimum = -10, maximum = 10)]
        max_priority: Option<i64>,
        budget: Option<BudgetPut>,
        metadata: Option<Metadata>,
    }
    /// How often a key may ask.
    RateLimit {
        #[schema(minimum = 1, maximum = 1_000_000)]
        submit: Option<i64>,
        #[schema(minimum = 1, maximum = 1_000_000)]
        read: Option<i64>,
        /// In seconds.
        #[schema(minimum = 1, maximum = 86_400)]
        window: Option<i64>,
    }
    /// How long the old secret stays valid.
    RotateRequest {
        /// In seconds; 86400 if absent.
        #[schema(minimum = 0, maximum = 604_800)]
        grace_seconds: Option<i64>,
    }
    /// Why a key is revoked.
    RevokeRequest {
        #[schema(max_length = 200)]
        reason: Option<String>,
        /// Whether its jobs are cancelled, too.
        cancel_jobs: Option<bool>,
    }
    /// A budget as a whole.
    BudgetPut {
        limit_usd: Money,
        /// `total` if absent.
        period: Option<Period>,
        /// In percent.
        #[schema(max_items = 5)]
        alert_thresholds: Option<Vec<i64>>,
        /// What happens to jobs for which nothing is left: they are refused (`reject`) or wait (`hold`).
        on_exceeded: Option<OnExceeded>,
    }
    /// A correction of what was spent.
    Adjustment {
        /// Positive or negative.
        delta_usd: Money,
        #[schema(min_length = 1, max_length = 200)]
        reason: String,
    }
    /// How the signing secret of a key changes; the new one is made by the service.
    KeySecretRotate {
        /// How long the old secret signs too.
        #[schema(minimum = 0, maximum = 604_800)]
        grace_seconds: Option<i64>,
    }
    /// The signing secret to use from now on.
    SecretRotate {
        #[schema(minimum = 0, maximum = 604_800)]
        grace_seconds: Option<i64>,
        /// One is made if absent.
        #[schema(max_length = 200)]
        secret: Option<String>,
    }
    /// An address that gets events.
    EndpointCreate {
        #[schema(min_length = 1, max_length = 2_048)]
        url: String,
        /// All if absent.
        #[schema(max_items = 20)]
        event_types: Option<Vec<String>>,
        #[schema(max_length = 256)]
        description: Option<String>,
        payload: Option<Payload>,
        /// Sent with every event.
        headers: Option<HashMap<String, String>>,
        metadata: Option<Metadata>,
        /// `v1`.
        signature: Option<String>,
        status: Option<EndpointStatus>,
        #[schema(max_length = 200)]
        secret: Option<String>,
    }
    /// What changes of an endpoint.
    EndpointPatch {
        #[schema(min_length = 1, max_length = 2_048)]
        url: Option<String>,
        #[schema(max_items = 20)]
        event_types: Option<Vec<String>>,
        #[schema(max_length = 256)]
        description: Option<String>,
        payload: Option<Payload>,
        headers: Option<HashMap<String, String>>,
        metadata: Option<Metadata>,
        signature: Option<String>,
        status: Option<EndpointStatus>,
    }
    /// Which failed deliveries are sent once more.
    RecoverRequest {
        /// At most 30 days ago.
        since: Time,
        until: Option<Time>,
    }
    /// Nothing: an empty object, or no body.
    Nothing {
    }
}
answers {
    /// Why a request wasn't done (RFC 9457).
    Problem {
        r#type: String,
        title: String,
        status: i64,
        /// A sentence for people.
        detail: String,
        /// The path of the request.
        instance: String,
        request_id: String,
        /// A word for programs.
        #[schema(example = "not-found")]
        code: String,
        errors: Option<Vec<FieldFault>>,
        error: Option<HashMap<String, Value>>,
        budget: Option<HashMap<String, Value>>,
        #[serde(rename = "violated-policies")]
        violated_policies: Option<Vec<String>>,
        job_id: Option<String>,
        checks: Option<HashMap<String, Value>>,
    }
    /// One member that can't be used.
    FieldFault {
        #[schema(example = "body -> message")]
        field: String,
        message: String,
        #[schema(example = "missing")]
        r#type: String,
    }
    /// Who answered, and when.
    Meta {
        request_id: String,
        timestamp: Time,
        version: String,
    }
    /// Where a list goes on.
    Pagination {
        limit: i64,
        has_more: bool,
        next_cursor: Option<String>,
    }
    /// Which page of a list this is.
    PageNumbers {
        limit: i64,
        page: i64,
        pages: i64,
        total: i64,
    }
    /// Where a list of events goes on.
    EventPages {
        has_more: bool,
        limit: i64,
        next_after: i64,
    }
    /// A job.
    Job {
        #[schema(example = "job_01990a0c5b7c7a0f9d2f3b4c5d6e7f80")]
        id: String,
        status: JobStatus,
        message: String,
        webhook_url: Option<String>,
        result: Option<Result>,
        tools_used: Option<Vec<ToolUse>>,
        error: Option<String>,
        cost: Money,
        duration_ms: i64,
        created_at: Time,
        started_at: Option<Time>,
        completed_at: Option<Time>,
        /// `job` or `chat`.
        kind: String,
        /// Its owner.
        key_id: String,
        session: Option<String>,
        session_id: Option<String>,
        batch_id: Option<String>,
        custom_id: Option<String>,
        retry_of: Option<String>,
        model: Option<String>,
        effort: Option<String>,
        permission_mode: Option<String>,
        priority: i64,
        queue_position: Option<i64>,
        queue_position_capped: bool,
        estimated_start_at: Option<Time>,
        run_after: Option<Time>,
        deadline_at: Option<Time>,
        expires_at: Option<Time>,
        attempt: i64,
        max_attempts: i64,
        on_worker_lost: OnWorkerLost,
        /// Why a queued job waits: `order`, `delay`, `budget`, `usage_limit`, `upstream` …; more may come.
        hold: Option<String>,
        hold_reason: Option<String>,
        concurrency_key: Option<String>,
        cancel_requested_at: Option<Time>,
        cancel_reason: Option<String>,
        /// More may come.
        error_code: Option<String>,
        usage: Option<Tokens>,
        max_cost_usd: Money,
        timeout_seconds: Option<i64>,
        max_turns: Option<i64>,
        metadata: Metadata,
        last_event_seq: i64,
        version: i64,
        data_removed: bool,
        urls: JobUrls,
    }
    /// Where to go on from a job.
    JobUrls {
        cancel: String,
        events: String,
        result: String,
        #[serde(rename = "self")]
        own: String,
    }
    /// What a run came to.
    Result {
        session_id: String,
        content: String,
        cost: Money,
        duration_ms: i64,
        num_turns: i64,
        tools_used: Vec<ToolUse>,
        is_error: bool,
        subtype: String,
        structured_output: Option<Value>,
        usage: Option<Tokens>,
        model_usage: HashMap<String, Value>,
        permission_denials: Vec<Value>,
        stop_reason: Option<String>,
        /// Null when it isn't known.
        files_changed: Option<Vec<FileChange>>,
        files_changed_truncated: Option<bool>,
        truncated: Option<bool>,
        session_lost: Option<bool>,
    }
    /// A file that a run changed.
    FileChange {
        path: String,
        /// `created`, `modified` or `deleted`.
        status: String,
        size: Option<i64>,
        /// `sha256:` and 64 hex digits; null for large files.
        digest: Option<String>,
    }
    /// A call of a tool.
    ToolUse {
        name: String,
        input: Value,
    }
    /// Tokens.
    Tokens {
        input_tokens: i64,
        output_tokens: i64,
        cache_creation_input_tokens: i64,
        cache_read_input_tokens: i64,
    }
    /// One try to run a job. The last three are shown to administrators.
    Attempt {
        attempt: i64,
        started_at: Time,
        ended_at: Option<Time>,
        ending: Option<String>,
        error_code: Option<String>,
        turns: i64,
        reserved: Money,
        cost: Money,
        reported_cost: Option<Money>,
        worker_id: Option<String>,
        cli_version: Option<String>,
        exit: Option<String>,
    }
    /// A step of a job.
    Event {
        seq: i64,
        /// `status`, `assistant`, `tool`, `tool_result`, `usage`, `done` …; more may come.
        r#type: String,
        at: Time,
        job_id: String,
        data: HashMap<String, Value>,
    }
    /// A session.
    Session {
        active_job: Option<String>,
        allowed_tools: Option<String>,
        claude_session_id: Option<String>,
        created_at: Time,
        disallowed_tools: Option<String>,
        effort: Option<String>,
        id: i64,
        key_id: String,
        max_cost_usd: Option<Money>,
        max_turns: Option<i64>,
        metadata: Metadata,
        model: Option<String>,
        name: String,
        permission_mode: Option<String>,
        queued_jobs: i64,
        status: String,
        system_prompt: Option<String>,
        total_cost: Money,
        total_turns: i64,
        updated_at: Time,
        user_id: String,
        working_dir: String,
    }
    /// The answer to a message: a result, and its job. It may have more members of a result.
    ChatAnswer {
        session_id: String,
        content: String,
        cost: Money,
        duration_ms: i64,
        num_turns: i64,
        tools_used: Vec<ToolUse>,
        job_id: String,
    }
    /// A part of a conversation.
    History {
        data: Vec<Message>,
        meta: Meta,
        session_id: String,
        count: i64,
    }
    /// What somebody said.
    Message {
        id: i64,
        job_id: String,
        /// `user` or `assistant`.
        role: String,
        content: String,
        tools_used: Option<Vec<ToolUse>>,
        cost: Money,
        duration_ms: i64,
        created_at: Time,
    }
    /// A job that is being cancelled.
    Cancelling {
        id: String,
        status: String,
    }
    /// Settings by name.
    Template {
        name: String,
    }
    /// What a file of templates holds.
    Reloaded {
        count: i64,
        names: Vec<String>,
    }
    /// An estimate.
    TokenCount {
        characters: i64,
        words: i64,
        estimated_tokens: i64,
    }
    /// A file or directory.
    FileEntry {
        name: String,
        path: String,
        /// `file` or `directory`.
        r#type: String,
        size: Option<i64>,
    }
    /// A page of a directory.
    FileList {
        data: Vec<FileEntry>,
        path: String,
        truncated: bool,
        meta: Meta,
        pagination: PageNumbers,
    }
    /// A file that was stored.
    StoredFile {
        path: String,
        size: i64,
        name: String,
    }
    /// A key.
    Key {
        allowed_ips: Vec<String>,
        allowed_models: Vec<String>,
        budget: Option<BudgetSpec>,
        budget_status: Option<Vec<Budget>>,
        created_at: Option<Time>,
        created_by: String,
        expires_at: Option<Time>,
        id: String,
        /// The secret: shown once.
        key: Option<String>,
        last_used_at: Option<Time>,
        max_priority: i64,
        max_queued_jobs: Option<i64>,
        max_running_jobs: i64,
        max_streams: i64,
        metadata: Metadata,
        name: String,
        prefix: String,
        previous_valid_until: Option<Time>,
        rate_limit: Rates,
        rate_limit_status: Option<HashMap<String, Quota>>,
        revoke_reason: Option<String>,
        revoked_at: Option<Time>,
        scopes: Vec<String>,
        status: String,
        version: i64,
    }
    /// How often a key may ask.
    Rates {
        read: i64,
        submit: i64,
        window: i64,
    }
    /// How a limit stands.
    Quota {
        limit: i64,
        remaining: i64,
        reset: i64,
        used: i64,
        window: i64,
    }
    /// A budget.
    BudgetSpec {
        alert_thresholds: Vec<i64>,
        id: String,
        limit_usd: Money,
        on_exceeded: OnExceeded,
        period: Period,
        scope: String,
    }
    /// A budget and where it stands.
    Budget {
        alert_thresholds: Vec<i64>,
        alerts: Vec<Alert>,
        id: String,
        is_default: bool,
        limit_usd: Money,
        on_exceeded: OnExceeded,
        period: Period,
        period_start: Time,
        remaining_usd: Money,
        reserved_usd: Money,
        resets_at: Option<Time>,
        scope: String,
        spent_usd: Money,
        version: i64,
    }
    /// A threshold that was reached.
    Alert {
        at: Time,
        threshold: i64,
    }
    /// What a key has done and spent.
    UsageAnswer {
        data: Usage,
        meta: Meta,
        user_id: String,
    }
    /// The same, without what is around it.
    Usage {
        budget: Option<Budget>,
        cost: Money,
        jobs: JobCounts,
        messages: i64,
        sessions: i64,
        turns: i64,
    }
    /// How many jobs of each status there are.
    JobCounts {
        cancelled: i64,
        completed: i64,
        failed: i64,
        queued: i64,
        running: i64,
        total: i64,
    }
    /// A row of the ledger: an entry, or a sum.
    LedgerRow {
        at: Option<Time>,
        attempt: Option<i64>,
        cost: Money,
        estimated: Option<bool>,
        job_id: Option<String>,
        key_id: Option<String>,
        model: Option<String>,
        reason: Option<String>,
        session: Option<String>,
        day: Option<String>,
        entries: Option<i64>,
        estimated_cost: Option<Money>,
        usage: Tokens,
    }
    /// The audit.
    AuditAnswer {
        count: i64,
        data: Vec<AuditEntry>,
        meta: Meta,
        user_id: Option<String>,
    }
    /// A change that somebody made, or a message.
    AuditEntry {
        action: String,
        address: Option<String>,
        count: i64,
        created_at: Time,
        detail: Value,
        id: i64,
        object_id: Option<String>,
        request_id: Option<String>,
        user_id: Option<String>,
        /// From here on: of a message.
        session_rowid: Option<i64>,
        session_name: Option<String>,
        job_id: Option<String>,
        role: Option<String>,
        content: Option<String>,
        tools_used: Option<Vec<ToolUse>>,
        cost: Option<Money>,
        duration_ms: Option<i64>,
    }
    /// How things are.
    Health {
        status: String,
        checks: HashMap<String, Value>,
        workers: Vec<HashMap<String, Value>>,
        clock_ahead_seconds: Option<i64>,
        meta: Meta,
    }
    /// The process can serve.
    Ready {
        status: String,
        checks: HashMap<String, Value>,
    }
    /// What was made ready again.
    Resumed {
        released_jobs: i64,
    }
    /// The secret that events of jobs are signed with.
    WebhookSecret {
        algorithm: String,
        prefix: Option<String>,
        created_at: Time,
        previous_valid_until: Option<Time>,
        /// Shown once.
        secret: Option<String>,
    }
    /// An address that gets events.
    Endpoint {
        id: String,
        key_id: String,
        url: String,
        event_types: Vec<String>,
        description: String,
        signature: String,
        payload: String,
        headers: HashMap<String, String>,
        metadata: Metadata,
        status: String,
        disabled_reason: Option<String>,
        first_failure_at: Option<Time>,
        created_at: Time,
        updated_at: Time,
        secret_prefix: Option<String>,
        previous_valid_until: Option<Time>,
        stats: HashMap<String, Value>,
        version: i64,
        /// Shown once.
        secret: Option<String>,
    }
    /// How many deliveries are sent once more.
    Recovered {
        queued: i64,
    }
    /// An event on its way.
    Delivery {
        id: String,
        webhook_id: String,
        key_id: String,
        event_type: String,
        job_id: Option<String>,
        batch_id: Option<String>,
        endpoint_id: Option<String>,
        url: String,
        status: String,
        attempt_count: i64,
        next_attempt_at: Option<Time>,
        created_at: Time,
        completed_at: Option<Time>,
        last_status_code: Option<i64>,
        last_error_class: Option<String>,
        attempts: Vec<DeliveryAttempt>,
        body: Option<Value>,
    }
    /// One try to deliver it.
    DeliveryAttempt {
        number: i64,
        trigger: String,
        started_at: Time,
        duration_ms: i64,
        status_code: Option<i64>,
        error_class: Option<String>,
        response_snippet: String,
    }
}
}

/// Up to 16 pairs: names of 1 to 64 characters, values of up to 512.
struct Metadata;

impl PartialSchema for Metadata {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Object)
            .additional_properties(Some(ObjectBuilder::new().schema_type(Type::String)))
            .into()
    }
}

impl ToSchema for Metadata {
    fn name() -> Cow<'static, str> {
        "Metadata".into()
    }
}

/// Rules of the CLI's grammar, such as `Bash(git *)`: a list, or one text with commas.
struct Rules;

impl PartialSchema for Rules {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().into()
    }
}

impl ToSchema for Rules {
    fn name() -> Cow<'static, str> {
        "Rules".into()
    }
}

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($word:literal)+ })*) => {
        $(
            $(#[$doc])*
            struct $name;

            impl PartialSchema for $name {
                fn schema() -> RefOr<Schema> {
                    ObjectBuilder::new()
                        .schema_type(Type::String)
                        .enum_values(Some([$($word),+]))
                        .into()
                }
            }

            impl ToSchema for $name {
                fn name() -> Cow<'static, str> {
                    stringify!($name).into()
                }
            }
        )*

        /// The types that are a choice of words, and the other small ones.
        pub(super) fn small() -> Vec<(String, Value)> {
            let json = |schema: RefOr<Schema>| serde_json::to_value(schema).unwrap_or_default();
            vec![
                $((stringify!($name).to_owned(), json($name::schema())),)*
                ("Time".to_owned(), json(Time::schema())),
                ("Money".to_owned(), json(Money::schema())),
                ("Metadata".to_owned(), json(Metadata::schema())),
                ("Templates".to_owned(), serde_json::json!({"type": "object", "additionalProperties": {"type": "object"}})),
                ("Rules".to_owned(), serde_json::json!({
                    "anyOf": [
                        {"type": "string", "maxLength": 4000},
                        {"type": "array", "items": {"type": "string"}, "maxItems": 100}
                    ],
                })),
            ]
        }
    };
}

words! {
    /// How much a model thinks.
    Effort { "low" "medium" "high" "xhigh" "max" }
    /// What the agent may do without being asked.
    PermissionMode { "default" "plan" "acceptEdits" "auto" "dontAsk" "bypassPermissions" }
    /// What happens to a job whose session has lost its conversation.
    OnSessionLost { "restart" "fail" }
    /// What happens to a job whose worker is lost.
    OnWorkerLost { "resume" "fail" }
    /// When something is sent.
    WebhookEvent { "started" "progress" "completed" }
    /// What happens to jobs beyond a budget.
    OnExceeded { "reject" "hold" }
    /// The period of a budget.
    Period { "total" "day" "week" "month" }
    /// How much is sent.
    Payload { "full" "thin" }
    /// Whether events are sent.
    EndpointStatus { "enabled" "disabled" }
    /// The last three never change again. There are no others.
    JobStatus { "queued" "running" "done" "failed" "cancelled" }
}
