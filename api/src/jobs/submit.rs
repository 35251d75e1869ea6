//! Submitting a job: the body becomes a [`JobCreate`]; once it is accepted the client hears 202.

use http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};
use shared::clock::{self, Timestamp};
use shared::job::{Job, JobKind, OnWorkerLost};
use shared::session::Session;
use shared::storage::IdempotencyRecord;
use std::time::Duration;
use warp::reply::Response;

use super::accept::{Acceptance, Accepted, JobCreate, Source, accept};
use super::view::{self, Detail, JobContext, JobView, SUMMARY};
use super::wait::{self, Wait};
use crate::config::Config;
use crate::context::Context;
use crate::gate::budget;
use crate::gate::caller::Caller;
use crate::gate::idempotency::{IdempotentRequest, REPLAYED};
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, PREFERENCE_APPLIED, X_JOB_ID, etag};
use crate::http::request::fields::{
    Fault, Fields, Reading, choice, integer, list, metadata, object, parsed, text, time,
};
use crate::http::request::headers::{self, Preferences};
use crate::http::request::{Request, invalid};
use crate::http::selection::Selection;
use crate::settings::Settings;

/// `POST /jobs`, and `POST /sessions/{s}/jobs` with the session. Once the job is accepted the answer says so, whatever
/// fails afterwards.
pub async fn submit(
    context: &Context,
    request: &Request,
    caller: &Caller,
    within: Option<Session>,
) -> Result<Response, Problem> {
    let wait = Wait::of(request, context.config.wait_max)?;
    let body = request.json().await?;
    let idempotent = IdempotentRequest::of(request, caller, &body, context.config.idempotency_ttl)?;
    let create = SubmitRequest::read(body.fields()?, request, context, within.is_none())?.0;
    submitted(
        context,
        request,
        caller,
        (create, Source::Api),
        within,
        idempotent,
        wait,
    )
    .await
}

/// What is kept as the answer to a submission: the job without its prompt.
pub fn kept_answer(retention: Duration) -> impl Fn(&Accepted) -> Result<String, Problem> {
    move |accepted| {
        let view = shown(accepted, retention);
        view.without_message().map_err(Problem::internal)
    }
}

/// Accepts the job, and answers with it, after the wait that the client wants.
pub async fn submitted(
    context: &Context,
    request: &Request,
    caller: &Caller,
    source: (JobCreate, Source),
    within: Option<Session>,
    idempotent: Option<IdempotentRequest>,
    wait: Wait,
) -> Result<Response, Problem> {
    let create = &source.0;
    // For a replay: the request is the same, so its prompt is.
    let message = idempotent.as_ref().map(|_| create.message.clone());
    let retention = context.config.retention;
    let kept = kept_answer(retention);
    // Boxed, since it is most of this future and only a part of its time.
    let accepting = accept(context, caller, source, within, idempotent, kept);
    let accepted = match Box::pin(accepting).await? {
        Acceptance::New(accepted) => accepted,
        Acceptance::Replay(first) => {
            let message = message.unwrap_or_default();
            return replay(context, request, caller, wait, &first, &message).await;
        }
    };
    let waited = waited(context, caller, &accepted.job, wait).await;
    let (response, budget) = match waited {
        Some((job, view)) => {
            // What the run has cost counts.
            let budgets = context.store.budgets_of(&job.key_id, clock::now()).await;
            let least = budgets.ok().and_then(budget::least);
            (answer(request, &job, &view, wait)?, least)
        }
        None => {
            let view = shown(&accepted, retention);
            (answer(request, &accepted.job, &view, wait)?, accepted.budget)
        }
    };
    let mut response = response;
    if let Some(budget) = &budget {
        response.headers_mut().extend(budget::headers(budget));
    }
    Ok(response)
}

/// A job that was accepted just now.
fn shown(accepted: &Accepted, retention: Duration) -> JobView {
    let beside = JobContext {
        message: accepted.message.clone(),
        session: accepted.session.clone(),
        ..JobContext::default()
    };
    JobView::new(&accepted.job, beside, retention)
}

/// The job after the wait that the client wanted. `None` without one, and when it failed: that is logged, and no reason
/// not to say that the job was accepted.
async fn waited(context: &Context, caller: &Caller, job: &Job, wait: Wait) -> Option<(Job, JobView)> {
    let _permit = wait.permit(context, caller).ok()??;
    let waited = async {
        let job = wait::until(context, job.clone(), wait.limit, |job| job.status.is_final()).await?;
        view::show(context, job.job_id, Detail::Full).await
    };
    waited.await.map_err(|problem| context.report(&problem)).ok()
}

/// The answer to a request whose job looks like this: 202, or 200 when it has ended meanwhile.
fn answer(request: &Request, job: &Job, view: &JobView, wait: Wait) -> Result<Response, Problem> {
    let ended = job.status.is_final();
    let status = if ended {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    let response = respond(request, status, view)?;
    let response = response
        .location(&view::path(job))
        .with(X_JOB_ID, job.job_id.to_string());
    let response = if ended { response } else { response.retry_after(2) };
    Ok(wait.applied_to(response.etag(&etag(job.version))))
}

/// The job, with all members or as few as the client prefers.
fn respond(request: &Request, status: StatusCode, job: &impl Serialize) -> Result<Response, Problem> {
    if Preferences::of(&request.headers).minimal {
        let response = reply::data(request, status, Selection::of(job, SUMMARY)?)?;
        return Ok(response.with(PREFERENCE_APPLIED, "return=minimal"));
    }
    reply::data(request, status, job)
}

/// The answer to a request that was answered before. A client that wants to wait joins the job that there is.
async fn replay(
    context: &Context,
    request: &Request,
    caller: &Caller,
    wait: Wait,
    first: &IdempotencyRecord,
    message: &str,
) -> Result<Response, Problem> {
    if let Some(job_id) = first.job_id
        && !wait.limit.is_zero()
        && let Ok(Some(job)) = context.store.job(job_id).await
        && let Some((job, view)) = waited(context, caller, &job, wait).await
    {
        return Ok(answer(request, &job, &view, wait)?.with(REPLAYED, "true"));
    }
    let kept = view::with_message(&first.body, message)?;
    let status = u16::try_from(first.status)
        .ok()
        .and_then(|status| StatusCode::from_u16(status).ok());
    let response = respond(request, status.unwrap_or(StatusCode::ACCEPTED), &kept)?.with(REPLAYED, "true");
    let response = response.varies_by("Prefer").retry_after(2);
    Ok(match first.job_id {
        Some(job_id) => response
            .location(&format!("/api/v1/jobs/{job_id}"))
            .with(X_JOB_ID, job_id.to_string()),
        None => response,
    })
}

/// The names of the members of a submission, in the order in which they are read.
pub const MEMBERS: &[&str] = &[
    "message",
    "system",
    "model",
    "max_turns",
    "permission_mode",
    "effort",
    "allowed_tools",
    "disallowed_tools",
    "max_cost_usd",
    "output_format",
    "session",
    "concurrency_key",
    "priority",
    "run_after",
    "cancel_after",
    "max_attempts",
    "on_worker_lost",
    "on_session_lost",
    "timeout_seconds",
    "custom_id",
    "metadata",
    "webhook_url",
    "webhook_events",
    "template",
];

/// The body of a submission.
#[derive(Debug)]
struct SubmitRequest(JobCreate);

impl SubmitRequest {
    /// Reads the body, and `Cancel-After`. `top_level`: the job may name its session.
    fn read(
        mut body: Fields,
        request: &Request,
        context: &Context,
        top_level: bool,
    ) -> Result<Self, Problem> {
        let config = &context.config;
        let after = headers::cancel_after(&request.headers)
            .map_err(|why| invalid("header -> Cancel-After", why, "value_error"))?;
        let create = Self::members(&mut body, config, top_level, clock::now());
        let (create, template) = create;
        let mut create = body.finish(create)?;
        if let Some(name) = template {
            create.settings = create.settings.or(context.templates.settings(&name)?);
        }
        create.cancel_after = create.cancel_after.or(after);
        Ok(Self(create))
    }

    /// Reads the members, and the template that is named. `None` means that the message was a fault.
    fn members(
        body: &mut Fields,
        config: &Config,
        top_level: bool,
        now: Timestamp,
    ) -> (Option<JobCreate>, Option<String>) {
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
        let on_session_lost = body.optional("on_session_lost", choice(&["restart", "fail"]));
        let timeout_seconds = body.optional("timeout_seconds", integer(1..=config.job_timeout_max_seconds));
        let custom_id = body.optional("custom_id", parsed(1..=64, custom_id));
        let metadata = body.optional("metadata", metadata).unwrap_or_default();
        let webhook_url = body.optional("webhook_url", text(1..=2_048));
        let events = list(3, choice(&["started", "progress", "completed"]));
        let webhook_events = body.optional("webhook_events", events).unwrap_or_default();
        let template = body.optional("template", text(1..=128));
        if template.is_some() && (session.is_some() || !top_level) {
            let why = "A job in a session has its session's settings; create the session from the template";
            body.fault("template", Fault::value(why));
        }
        let create = message.map(|message| JobCreate {
            kind: JobKind::Job,
            message,
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
            fail_on_session_lost: on_session_lost == Some("fail"),
            timeout_seconds,
            custom_id,
            webhook_url,
            webhook_events,
            metadata,
            created_at: now,
        });
        (create, template)
    }
}

/// A prompt: 1 to 1,000,000 characters, of which one at least can be seen.
pub fn message(value: Value) -> Reading<String> {
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
pub fn output_format(value: Value) -> Reading<Option<Value>> {
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

    const NOW: Timestamp = Timestamp(1_779_278_400_000_000);

    fn read(value: Value) -> Result<JobCreate, Problem> {
        let mut body = Fields::of("body", value).unwrap();
        let (create, _) = SubmitRequest::members(&mut body, &Config::default(), true, NOW);
        body.finish(create)
    }

    fn fault(value: Value) -> (String, &'static str) {
        match read(value) {
            Err(Problem::Invalid(faults)) if faults.len() == 1 => (faults[0].field.clone(), faults[0].kind),
            other => panic!("not one fault: {other:?}"),
        }
    }

    #[test]
    fn the_members_that_are_read_are_those_that_are_listed() {
        let mut body = Fields::of("body", json!({})).unwrap();
        SubmitRequest::members(&mut body, &Config::default(), true, NOW);
        assert_eq!(body.known(), MEMBERS);
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
            ("timeout_seconds", json!(86_401), "less_than_equal"),
            ("on_worker_lost", json!("cry"), "enum"),
            ("on_session_lost", json!("resume"), "enum"),
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
            ("webhook_url", json!(""), "string_too_short"),
            ("webhook_events", json!("completed"), "list_type"),
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
