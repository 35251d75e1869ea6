//! The one way to accept a job, whichever part of the API it comes through: settings merged, budget and queue checked,
//! then one transaction that holds its row, its first event, its place in the queue and the answer for a request that
//! is repeated.

use http::StatusCode;
use serde_json::{Map, Value};
use shared::budget::BudgetStatus;
use shared::clock::Timestamp;
use shared::id::JobId;
use shared::job::{Job, JobKind, NewJob, OnWorkerLost, RunOptions};
use shared::session::Session;
use shared::storage::{IdempotencyOutcome, IdempotencyRecord};
use std::time::Duration;

use crate::config::Config;
use crate::context::Context;
use crate::gate;
use crate::gate::caller::Caller;
use crate::gate::idempotency::IdempotentRequest;
use crate::http::problem::Problem;
use crate::sessions;
use crate::settings::Settings;
use crate::webhooks;

/// What a job is to be, every member right by itself. What is `None` is decided by its session, then by the service.
#[derive(Debug)]
pub struct JobCreate {
    /// Whether a person is waiting.
    pub kind: JobKind,
    /// The prompt.
    pub message: String,
    /// How Claude is run.
    pub settings: Settings,
    /// The JSON Schema of its output.
    pub json_schema: Option<Value>,
    /// What its session is named by.
    pub session: Option<String>,
    /// Jobs of one owner with the same key run one at a time. Never together with a session.
    pub concurrency_key: Option<String>,
    /// Higher runs first, within what the caller may.
    pub priority: i64,
    /// Not before this time.
    pub run_after: Option<Timestamp>,
    /// Cancelled if it hasn't ended so long after it was accepted.
    pub cancel_after: Option<Duration>,
    /// Attempts at most.
    pub max_attempts: Option<i64>,
    /// What a lost worker means.
    pub on_worker_lost: OnWorkerLost,
    /// Whether it fails when the conversation of its session is lost.
    pub fail_on_session_lost: bool,
    /// Seconds an attempt may take.
    pub timeout_seconds: Option<i64>,
    /// The client's own name for it.
    pub custom_id: Option<String>,
    /// Where to tell what happens to it.
    pub webhook_url: Option<String>,
    /// What is told there: `started`, `progress`, `completed`.
    pub webhook_events: Vec<&'static str>,
    /// The client's own pairs of texts.
    pub metadata: Map<String, Value>,
    /// When it was asked for.
    pub created_at: Timestamp,
}

/// Through which part of the API a job comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The routes of jobs.
    Api,
    /// The routes of chat.
    Chat,
}

impl Source {
    /// The word in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Chat => "chat",
        }
    }
}

/// A job that is stored now.
#[derive(Debug)]
pub struct Accepted {
    /// Its row.
    pub job: Job,
    /// Its prompt.
    pub message: String,
    /// The name of its session.
    pub session: Option<String>,
    /// The budget that leaves least.
    pub budget: Option<BudgetStatus>,
}

/// What became of a job that was to be accepted.
#[derive(Debug)]
pub enum Acceptance {
    /// It is stored.
    New(Box<Accepted>),
    /// The same request was answered before, like this.
    Replay(Box<IdempotencyRecord>),
}

/// Accepts the job: in the session `within`, else in the one that it names. For an `idempotent` request the body that
/// `answer` makes is kept with it, and given again for the same request.
pub async fn accept(
    context: &Context,
    caller: &Caller,
    (create, source): (JobCreate, Source),
    within: Option<Session>,
    idempotent: Option<IdempotentRequest>,
    answer: impl FnOnce(&Accepted) -> Result<String, Problem>,
) -> Result<Acceptance, Problem> {
    if let Some(first) = IdempotentRequest::earlier(idempotent.as_ref(), &context.store).await? {
        return Ok(Acceptance::Replay(first));
    }
    let session = match (within, &create.session) {
        (Some(session), _) => Some(session),
        (None, Some(name)) => Some(sessions::find(context, caller, name).await?),
        (None, None) => None,
    };
    if let Some(url) = &create.webhook_url {
        webhooks::check_url(context, url)?;
    }
    let new = new_job(create, caller, session.as_ref(), &context.config)?;
    let budget = gate::check_budget(context, &new.key_id, new.created_at).await?;
    if let Some(max) = caller.rights.max_queued_jobs
        && new.key_id == caller.key_id
        && !context.limits.has_queue_room(&caller.key_id, max).await?
    {
        return Err(Problem::QueueFull(max));
    }
    if new.webhook_url.is_some() {
        webhooks::ensure_secret(context, &new.key_id).await?;
    }
    let mut tx = context.store.begin_submission(&new.key_id).await?;
    if let Some(session_id) = new.session_id
        && !tx.use_session(session_id, new.created_at).await?
    {
        tx.rollback().await?;
        return Err(Problem::NoSuch("Session"));
    }
    let accepted = Accepted {
        job: tx.insert_job(&new).await?,
        message: new.message,
        session: session.map(|session| session.name),
        budget,
    };
    let job = &accepted.job;
    if let Some(idempotent) = idempotent {
        let record = idempotent.record(Some(job.job_id), StatusCode::ACCEPTED, answer(&accepted)?);
        if let IdempotencyOutcome::Replay(first) = tx.remember(&record, idempotent.expired_before).await? {
            tx.rollback().await?;
            idempotent.check(&first)?;
            return Ok(Acceptance::Replay(first));
        }
    }
    tx.commit().await?;
    tracing::info!(job.id = %job.job_id, key.id = %job.key_id, source = source.as_str(), "job {} accepted", job.job_id);
    Ok(Acceptance::New(Box::new(accepted)))
}

/// The job, with what its session and the service add.
fn new_job(
    create: JobCreate,
    caller: &Caller,
    session: Option<&Session>,
    config: &Config,
) -> Result<NewJob, Problem> {
    let settings = match session {
        Some(session) => create.settings.or(sessions::settings(session)?),
        None => create.settings,
    };
    settings.allowed_to(caller, &config.aliases)?;
    let limit = config.max_cost_per_request;
    Ok(NewJob {
        job_id: JobId::new(),
        key_id: session.map_or_else(|| caller.key_id.clone(), |session| session.key_id.clone()),
        kind: create.kind,
        message: create.message,
        options: RunOptions {
            system: settings.system_prompt,
            allowed_tools: settings.allowed_tools,
            disallowed_tools: settings.disallowed_tools,
            json_schema: create.json_schema,
            fail_on_session_lost: create.fail_on_session_lost,
        },
        session_id: session.map(|session| session.session_id),
        concurrency_key: create.concurrency_key,
        priority: create.priority.min(caller.max_priority()),
        run_after: create.run_after,
        deadline_at: create.cancel_after.map(|after| create.created_at.plus(after)),
        max_attempts: create.max_attempts.unwrap_or(config.job_max_attempts),
        on_worker_lost: create.on_worker_lost,
        // What the worker would take may not be what the key may use.
        model: settings
            .model
            .or_else(|| caller.rights.allowed_models.0.first().cloned()),
        effort: settings.effort,
        permission_mode: settings.permission_mode,
        max_turns: settings.max_turns,
        timeout_seconds: create.timeout_seconds,
        max_cost: settings.max_cost_usd.map_or(limit, |cost| cost.min(limit)),
        webhook_url: create.webhook_url,
        webhook_events: if create.webhook_events.is_empty() {
            "completed".to_owned()
        } else {
            create.webhook_events.join(" ")
        },
        custom_id: create.custom_id,
        metadata: Value::Object(create.metadata),
        created_at: create.created_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use shared::id::{KeyId, SessionId};
    use shared::money::MicroUsd;

    const NOW: Timestamp = Timestamp(1_779_278_400_000_000);

    fn create() -> JobCreate {
        JobCreate {
            kind: JobKind::Job,
            message: "say hi".to_owned(),
            settings: Settings::default(),
            json_schema: None,
            session: None,
            concurrency_key: None,
            priority: 0,
            run_after: None,
            cancel_after: None,
            max_attempts: None,
            on_worker_lost: OnWorkerLost::Resume,
            fail_on_session_lost: false,
            timeout_seconds: None,
            custom_id: None,
            webhook_url: None,
            webhook_events: Vec::new(),
            metadata: Map::new(),
            created_at: NOW,
        }
    }

    fn caller(admin: bool) -> Caller {
        let key_id = KeyId::known("env_12345678");
        if admin {
            Caller::administrator(key_id)
        } else {
            Caller::ordinary(key_id)
        }
    }

    #[test]
    fn a_message_alone_makes_a_job_with_the_services_defaults() {
        let job = new_job(create(), &caller(false), None, &Config::default()).unwrap();
        assert_eq!(
            (job.message.as_str(), job.priority, job.max_attempts),
            ("say hi", 0, 3)
        );
        assert_eq!(
            (job.max_cost, job.model, job.session_id),
            (MicroUsd(5_000_000), None, None)
        );
        assert_eq!(job.metadata, json!({}));
    }

    #[test]
    fn only_an_admin_comes_before_the_others() {
        let priority = |admin, priority| {
            let create = JobCreate { priority, ..create() };
            new_job(create, &caller(admin), None, &Config::default())
                .unwrap()
                .priority
        };
        assert_eq!(
            (priority(false, 5), priority(false, -5), priority(true, 5)),
            (0, -5, 5)
        );
    }

    #[test]
    fn a_sessions_settings_fill_what_the_job_leaves_open() {
        let session = Session {
            session_number: 1,
            session_id: SessionId::new(),
            key_id: KeyId::known("env_12345678"),
            name: "s".to_owned(),
            settings: json!({"model": "opus", "effort": "low", "metadata": {"a": "b"}}).to_string(),
            claude_session_id: None,
            total_cost: MicroUsd::ZERO,
            total_turns: 0,
            created_at: NOW,
            updated_at: NOW,
            working_dir: None,
            version: 1,
        };
        let settings = Settings {
            effort: Some("max".to_owned()),
            ..Settings::default()
        };
        let create = JobCreate { settings, ..create() };
        let job = new_job(create, &caller(false), Some(&session), &Config::default()).unwrap();
        assert_eq!(
            (job.model.as_deref(), job.effort.as_deref()),
            (Some("opus"), Some("max"))
        );
        assert_eq!(
            (job.session_id, job.metadata),
            (Some(session.session_id), json!({}))
        );
    }
}
