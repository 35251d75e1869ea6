//! Accepting a job: the body becomes a [`NewJob`], and one transaction holds its row, its first event, its place in
//! the queue and the answer for a client that asks again. Only then the client hears 202.

use http::StatusCode;
use serde_json::{Map, Value, json};
use shared::clock::{self, Timestamp};
use shared::id::JobId;
use shared::job::{Job, JobKind, NewJob, OnWorkerLost, RunOptions};
use shared::session::Session;
use shared::storage::{IdempotencyOutcome, IdempotencyRecord};
use std::time::Duration;
use warp::reply::Response;

use super::view::{self, Beside, Detail, Members};
use super::wait::{self, Wait};
use crate::budgets;
use crate::caller::Caller;
use crate::config::Config;
use crate::context::Context;
use crate::problem::Problem;
use crate::repeat::{REPLAYED, Repeat};
use crate::reply::{self, Headers, PREFERENCE_APPLIED, X_JOB_ID, etag};
use crate::request::fields::{Fault, Fields, Reading, choice, integer, metadata, object, parsed, text, time};
use crate::request::headers::{self, Preferences};
use crate::request::{Request, invalid};
use crate::sessions;
use crate::settings::Settings;

/// `POST /jobs`.
pub async fn submit(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    accept(request, caller, None).await
}

/// `POST /sessions/{s}/jobs`.
pub async fn submit_in_session(
    request: &Request,
    caller: &Caller,
    session: Session,
) -> Result<Response, Problem> {
    accept(request, caller, Some(session)).await
}

async fn accept(request: &Request, caller: &Caller, within: Option<Session>) -> Result<Response, Problem> {
    let context = &request.context;
    let body = request.json().await?;
    let repeat = Repeat::of(request, caller, &body)?;
    let wish = Wish::read(body.fields()?, request, within.is_none())?;
    if let Some(first) = Repeat::earlier(context, repeat.as_ref()).await? {
        return answer_again(request, first).await;
    }
    let session = match (within, &wish.session) {
        (Some(session), _) => Some(session),
        (None, Some(name)) => Some(
            sessions::named(request, caller, name)
                .await?
                .ok_or(Problem::NoSuch("Session"))?,
        ),
        (None, None) => None,
    };
    let new = wish.into_job(caller, session.as_ref(), &context.config)?;
    let budget = budgets::admit(context, &new.key_id, new.created_at).await?;
    if new.key_id == caller.key_id && !context.limits.has_room(caller).await? {
        return Err(Problem::QueueFull(
            caller.rights.max_queued_jobs.unwrap_or_default(),
        ));
    }
    // Boxed, since it is most of this future and only a part of its time.
    let response = match Box::pin(store(context, new, session, repeat)).await? {
        Stored::Accepted(job, members) => answer(request, *job, Some(members)).await,
        Stored::Before(first) => answer_again(request, first).await,
    }?;
    Ok(match budget {
        Some(budget) => {
            budgets::headers(&budget).fold(response, |response, (name, value)| response.with(name, value))
        }
        None => response,
    })
}

/// What became of a job that was to be stored.
enum Stored {
    /// It is there; these are its members.
    Accepted(Box<Job>, Members),
    /// Its request was answered before, meanwhile.
    Before(Box<IdempotencyRecord>),
}

/// Stores the job and, for a client that asks again, the answer, in one transaction.
async fn store(
    context: &Context,
    new: NewJob,
    session: Option<Session>,
    repeat: Option<Repeat>,
) -> Result<Stored, Problem> {
    let mut tx = context.store.begin().await?;
    let job = tx.insert_job(&new).await?;
    let session = session.map(|session| session.name);
    let beside = Beside {
        message: new.message,
        session,
        ..Beside::default()
    };
    let members = view::members(&job, &beside, context.config.retention);
    if let Some(repeat) = repeat {
        // The answer to keep: the job as it was accepted, without the prompt, which has its own row.
        let record = repeat.record(Some(job.job_id), StatusCode::ACCEPTED, members.without_message()?);
        if let IdempotencyOutcome::Replay(first) = tx.remember(&record, repeat.expired_before).await? {
            tx.rollback().await?;
            repeat.check(&first)?;
            return Ok(Stored::Before(first));
        }
    }
    tx.commit().await?;
    tracing::info!(job.id = %job.job_id, key.id = %job.key_id, "job {} accepted", job.job_id);
    Ok(Stored::Accepted(Box::new(job), members))
}

/// The answer to a request whose job was accepted with these members (`None`: some time ago): 202, or 200 when the
/// client wanted to wait and the job ended meanwhile.
async fn answer(request: &Request, job: Job, accepted: Option<Members>) -> Result<Response, Problem> {
    let wait = Wait::of(request)?;
    let job = wait::until(&request.context, job, wait.limit, |job| job.status.is_final()).await?;
    let ended = job.status.is_final() && !wait.limit.is_zero();
    let members = match accepted {
        Some(members) if wait.limit.is_zero() => members,
        _ => view::show(&request.context, &job, Detail::Full).await?,
    };
    let status = if ended {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    let response = respond(request, status, members)?;
    let response = response
        .location(&view::path(&job))
        .with(X_JOB_ID, job.job_id.to_string());
    let response = if ended { response } else { response.retry_after(2) };
    Ok(wait.applied_to(response.etag(&etag(job.version))))
}

/// The members, all or as few as the client prefers.
fn respond(request: &Request, status: StatusCode, members: Members) -> Result<Response, Problem> {
    if Preferences::of(&request.headers).minimal {
        let response = reply::data(request, status, members.summary())?;
        return Ok(response.with(PREFERENCE_APPLIED, "return=minimal"));
    }
    reply::data(request, status, members)
}

/// The answer to a request that was answered before. A client that wants to wait joins the job that there is.
async fn answer_again(request: &Request, first: Box<IdempotencyRecord>) -> Result<Response, Problem> {
    let job = match first.job_id {
        Some(job_id) if !Wait::of(request)?.limit.is_zero() => request.context.store.job(job_id).await?,
        _ => None,
    };
    if let Some(job) = job {
        return Ok(answer(request, job, None).await?.with(REPLAYED, "true"));
    }
    let message = match first.job_id {
        Some(job_id) => request.context.store.prompt(job_id).await?,
        None => String::new(),
    };
    let members = Members::with_message(&first.body, message)?;
    let status = u16::try_from(first.status)
        .ok()
        .and_then(|status| StatusCode::from_u16(status).ok());
    let response = respond(request, status.unwrap_or(StatusCode::ACCEPTED), members)?.with(REPLAYED, "true");
    let response = response.varies_by("Prefer").retry_after(2);
    Ok(match first.job_id {
        Some(job_id) => response
            .location(&format!("/api/v1/jobs/{job_id}"))
            .with(X_JOB_ID, job_id.to_string()),
        None => response,
    })
}

/// What a client wants, every member right by itself.
#[derive(Debug)]
struct Wish {
    message: String,
    settings: Settings,
    json_schema: Option<Value>,
    session: Option<String>,
    concurrency_key: Option<String>,
    priority: i64,
    run_after: Option<Timestamp>,
    cancel_after: Option<Duration>,
    max_attempts: Option<i64>,
    on_worker_lost: OnWorkerLost,
    timeout_seconds: Option<i64>,
    custom_id: Option<String>,
    metadata: Map<String, Value>,
    created_at: Timestamp,
}

impl Wish {
    /// Reads the body, and `Cancel-After`. `top_level`: the job may name its session.
    fn read(mut body: Fields, request: &Request, top_level: bool) -> Result<Self, Problem> {
        let config = &request.context.config;
        let after = headers::cancel_after(&request.headers)
            .map_err(|why| invalid("header -> Cancel-After", why, "value_error"))?;
        let wish = Self::members(&mut body, config, top_level, clock::now());
        let template = body.optional("template", text(1..=128));
        let mut wish = body.finish(wish)?;
        if let Some(name) = template {
            return Err(Problem::NoSuchTemplate(name));
        }
        wish.cancel_after = wish.cancel_after.or(after);
        Ok(wish)
    }

    /// Reads the members. `None` means that the message was a fault.
    fn members(body: &mut Fields, config: &Config, top_level: bool, now: Timestamp) -> Option<Self> {
        let message = body.required("message", message);
        let settings = Settings::read(body, "system", config);
        let json_schema = body.optional("output_format", output_format).flatten();
        let session = if top_level {
            body.optional("session", text(1..=128))
        } else {
            None
        };
        let concurrency_key = body.optional("concurrency_key", text(1..=128));
        if concurrency_key.is_some() && (session.is_some() || !top_level) {
            let why = "A job has a session or a concurrency_key, not both: a session is a group already";
            body.fault("concurrency_key", Fault::value(why));
        }
        let priority = body.optional("priority", integer(-10..=10)).unwrap_or(0);
        let run_after = body.optional("run_after", time);
        if run_after.is_some_and(|at| at.since(now) > Duration::from_hours(30 * 24)) {
            body.fault("run_after", Fault::value("Time should be at most 30 days ahead"));
        }
        let cancel_after = body.optional("cancel_after", integer(1..=604_800));
        let max_attempts = body.optional("max_attempts", integer(1..=5));
        let on_worker_lost = body.optional("on_worker_lost", choice(&["resume", "fail"]));
        let timeout_seconds = body.optional("timeout_seconds", integer(1..=config.job_timeout_max_seconds));
        let custom_id = body.optional("custom_id", parsed(1..=64, custom_id));
        let metadata = body.optional("metadata", metadata).unwrap_or_default();
        for name in ["webhook_url", "webhook_events"] {
            // Said at once: a job whose end nobody is told would be worse.
            body.optional(name, |_| {
                Err::<(), _>(vec![Fault::value("This version sends no webhooks")])
            });
        }
        Some(Self {
            message: message?,
            settings,
            json_schema,
            session,
            concurrency_key,
            priority,
            run_after: run_after.filter(|at| *at > now),
            cancel_after: cancel_after
                .and_then(|seconds| u64::try_from(seconds).ok())
                .map(Duration::from_secs),
            max_attempts,
            on_worker_lost: if on_worker_lost == Some("fail") {
                OnWorkerLost::Fail
            } else {
                OnWorkerLost::Resume
            },
            timeout_seconds,
            custom_id,
            metadata,
            created_at: now,
        })
    }

    /// The job, with what its session and the service add.
    fn into_job(
        self,
        caller: &Caller,
        session: Option<&Session>,
        config: &Config,
    ) -> Result<NewJob, Problem> {
        let settings = match session {
            Some(session) => self.settings.or(sessions::settings(session)?),
            None => self.settings,
        };
        settings.allowed_to(caller)?;
        let limit = config.max_cost_per_request;
        Ok(NewJob {
            job_id: JobId::new(),
            key_id: session.map_or_else(|| caller.key_id.clone(), |session| session.key_id.clone()),
            kind: JobKind::Job,
            message: self.message,
            options: RunOptions {
                system: settings.system_prompt,
                allowed_tools: settings.allowed_tools,
                disallowed_tools: settings.disallowed_tools,
                json_schema: self.json_schema,
            },
            session_id: session.map(|session| session.session_id),
            concurrency_key: self.concurrency_key,
            priority: self.priority.min(caller.max_priority()),
            run_after: self.run_after,
            deadline_at: self.cancel_after.map(|after| self.created_at.plus(after)),
            max_attempts: self.max_attempts.unwrap_or(config.job_max_attempts),
            on_worker_lost: self.on_worker_lost,
            // What the worker would take may not be what the key may use.
            model: settings
                .model
                .or_else(|| caller.rights.allowed_models.0.first().cloned()),
            effort: settings.effort,
            permission_mode: settings.permission_mode,
            max_turns: settings.max_turns,
            timeout_seconds: self.timeout_seconds,
            max_cost: settings.max_cost_usd.map_or(limit, |cost| cost.min(limit)),
            custom_id: self.custom_id,
            metadata: Value::Object(self.metadata),
            created_at: self.created_at,
        })
    }
}

/// A prompt: 1 to 1,000,000 characters, of which one at least can be seen.
fn message(value: Value) -> Reading<String> {
    parsed(1..=1_000_000, |message| {
        if message.trim().is_empty() {
            Err("Message should not be only white space")
        } else {
            Ok(message)
        }
    })(value)
}

fn custom_id(id: String) -> Result<String, &'static str> {
    let fits = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    if fits {
        Ok(id)
    } else {
        Err("String should hold only letters, digits, _ and -")
    }
}

/// The JSON Schema of the output: `{"type": "json_schema", "schema": {…}}`, or the schema alone. `{"type": "json"}`
/// is any object, `{"type": "text"}` none.
fn output_format(value: Value) -> Reading<Option<Value>> {
    let mut value = object(64 * 1024)(value)?;
    let alone = value.as_object().is_some_and(|members| members.len() == 1);
    let schema = match value["type"].as_str() {
        Some("text") if alone => return Ok(None),
        Some("json") if alone => json!({"type": "object"}),
        Some("json_schema") => value["schema"].take(),
        _ => value,
    };
    // The schema describes the input of a tool, and that is always an object.
    if schema.is_object() && schema.get("type").is_none_or(|kind| kind == "object") {
        return Ok(Some(schema));
    }
    Err(vec![Fault::value(
        "The schema should be an object and describe an object",
    )])
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::id::{KeyId, SessionId};
    use shared::money::MicroUsd;

    const NOW: Timestamp = Timestamp(1_779_278_400_000_000);

    fn read(value: Value) -> Result<Wish, Problem> {
        let mut body = Fields::of("body", value).unwrap();
        let wish = Wish::members(&mut body, &Config::default(), true, NOW);
        body.finish(wish)
    }

    fn fault(value: Value) -> (String, &'static str) {
        match read(value) {
            Err(Problem::Invalid(faults)) if faults.len() == 1 => (faults[0].field.clone(), faults[0].kind),
            other => panic!("not one fault: {other:?}"),
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
        let job = read(json!({"message": "say hi"}))
            .unwrap()
            .into_job(&caller(false), None, &Config::default())
            .unwrap();
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
    fn each_bad_member_is_named() {
        for (member, value, kind) in [
            ("message", json!("x".repeat(1_000_001)), "string_too_long"),
            ("message", json!("  \n\t "), "value_error"),
            ("message", json!(""), "string_too_short"),
            ("message", json!(1), "string_type"),
            ("session", json!(""), "string_too_short"),
            ("priority", json!(11), "less_than_equal"),
            ("run_after", json!("tomorrow"), "datetime_parsing"),
            ("run_after", json!("2026-06-30T00:00:00Z"), "value_error"),
            ("cancel_after", json!(0), "greater_than_equal"),
            ("max_attempts", json!(6), "less_than_equal"),
            ("max_turns", json!(0), "greater_than_equal"),
            ("max_cost_usd", json!(5.01), "less_than_equal"),
            ("timeout_seconds", json!(3_601), "less_than_equal"),
            ("on_worker_lost", json!("cry"), "enum"),
            ("effort", json!("huge"), "enum"),
            ("permission_mode", json!("yolo"), "enum"),
            ("custom_id", json!("a b"), "value_error"),
            ("metadata", json!([]), "dict_type"),
            ("output_format", json!("json"), "dict_type"),
            ("output_format", json!({"type": "json_schema"}), "value_error"),
            (
                "output_format",
                json!({"type": "array", "items": {}}),
                "value_error",
            ),
            ("webhook_url", json!("https://a.example"), "value_error"),
            ("batch", json!(1), "extra_forbidden"),
        ] {
            let mut body = json!({"message": "hi"});
            body[member] = value;
            assert_eq!(fault(body), (format!("body -> {member}"), kind));
        }
        assert_eq!(fault(json!({})), ("body -> message".to_owned(), "missing"));
    }

    #[test]
    fn a_job_has_a_session_or_a_concurrency_key() {
        let both = json!({"message": "hi", "session": "s", "concurrency_key": "k"});
        assert_eq!(fault(both), ("body -> concurrency_key".to_owned(), "value_error"));
        assert!(read(json!({"message": "hi", "concurrency_key": "k"})).is_ok());
    }

    #[test]
    fn only_an_admin_comes_before_the_others() {
        let priority = |admin, wanted| {
            let wish = read(json!({"message": "hi", "priority": wanted})).unwrap();
            wish.into_job(&caller(admin), None, &Config::default())
                .unwrap()
                .priority
        };
        assert_eq!(
            (priority(false, 5), priority(false, -5), priority(true, 5)),
            (0, -5, 5)
        );
    }

    #[test]
    fn a_time_that_has_passed_is_no_delay() {
        assert_eq!(
            read(json!({"message": "hi", "run_after": "2020-01-01T00:00:00Z"}))
                .unwrap()
                .run_after,
            None
        );
        assert!(
            read(json!({"message": "hi", "run_after": "2026-05-21T00:00:00Z"}))
                .unwrap()
                .run_after
                .is_some()
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
        };
        let wish = read(json!({"message": "hi", "effort": "max"})).unwrap();
        let job = wish
            .into_job(&caller(false), Some(&session), &Config::default())
            .unwrap();
        assert_eq!(
            (job.model.as_deref(), job.effort.as_deref()),
            (Some("opus"), Some("max"))
        );
        assert_eq!(
            (job.session_id, job.metadata),
            (Some(session.session_id), json!({}))
        );
    }

    #[test]
    fn every_spelling_of_an_output_format_is_a_schema_or_none() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "string"}}});
        for (value, expected) in [
            (json!({"type": "text"}), None),
            (json!({"type": "json"}), Some(json!({"type": "object"}))),
            (
                json!({"type": "json_schema", "schema": schema}),
                Some(schema.clone()),
            ),
            (schema.clone(), Some(schema.clone())),
        ] {
            assert_eq!(output_format(value), Ok(expected));
        }
    }
}
