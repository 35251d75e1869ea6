//! Chat: a message in a session whose answer the client waits for, or reads as it comes. It is a job like any other:
//! committed before anything is answered, and finished whether or not the client stays.

pub mod result;
pub mod stream;

use http::StatusCode;
use http::header::CONTENT_LOCATION;
use shared::clock;
use shared::id::JobId;
use shared::job::{CancelReason, Job, JobKind, JobStatus, OnWorkerLost};
use shared::session::Session;
use shared::storage::JobPart;
use std::time::Duration;
use warp::reply::Response;

use crate::config::Config;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::gate::idempotency::{IdempotentRequest, REPLAYED};
use crate::gate::waits::MAX_WAITS;
use crate::http::problem::{FailedRun, Problem, RunFailure};
use crate::http::reply::{self, Headers, PREFERENCE_APPLIED, X_JOB_ID};
use crate::http::request::fields::{Fields, choice, integer, metadata};
use crate::http::request::headers::Preferences;
use crate::http::request::{Request, Segment};
use crate::jobs::accept::{Acceptance, JobCreate, Source, accept};
use crate::jobs::stream::{Live, as_stream};
use crate::jobs::submit::{kept_answer, message, output_format, submitted};
use crate::jobs::view;
use crate::jobs::wait::{self, Wait};
use crate::sessions;
use crate::settings::Settings;
use result::ChatResult;

/// What a run may take longer than its time: to start, to be stopped, and to be recorded.
const GRACE: Duration = Duration::from_secs(30);

/// `POST /sessions/{s}/chat`: 200 with the answer. With `Prefer: respond-async` 202 with the job.
pub async fn chat(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let asked = Asked::read(context, request, caller, name).await?;
    if Preferences::of(&request.headers).respond_async {
        let wait = Wait::of(request, context.config.wait_max)?;
        let Asked {
            create,
            session,
            idempotent,
            ..
        } = asked;
        let source = (create, Source::Chat);
        let response = submitted(context, request, caller, source, Some(session), idempotent, wait).await?;
        let others = response.headers().get(PREFERENCE_APPLIED);
        let others = others.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let applied = ["respond-async".to_owned()].into_iter().chain(others);
        let applied = applied.collect::<Vec<_>>().join(", ");
        return Ok(response.with(PREFERENCE_APPLIED, applied));
    }
    // Before the job is accepted: it would be paid for, and nobody would wait for it.
    let permit = context.waits.enter(&caller.key_id);
    let _permit = permit.ok_or(Problem::TooManyWaits(MAX_WAITS))?;
    let (job, replayed, leaving) = asked.accept(context, caller).await?;
    let ended = ended(context, job).await;
    leaving.stay();
    let (job, content) = ended?;
    let response = reply::data(request, StatusCode::OK, content.of_job(job.job_id))?;
    let response = response
        .with(X_JOB_ID, job.job_id.to_string())
        .with(CONTENT_LOCATION, view::path(&job))
        .varies_by("Prefer");
    Ok(if replayed {
        response.with(REPLAYED, "true")
    } else {
        response
    })
}

/// `POST /sessions/{s}/chat/stream`: the same, as server-sent events, in the words of the Python service.
pub async fn stream(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let asked = Asked::read(context, request, caller, name).await?;
    let max = caller.max_streams();
    let permit = context.streams.enter(&caller.key_id, max).await?;
    let permit = permit.ok_or(Problem::TooManyStreams(max))?;
    let (job, replayed, leaving) = asked.accept(context, caller).await?;
    if job.data_removed {
        return Err(Problem::DataRemoved);
    }
    let live = Live::new(context.clone(), caller, permit, job.job_id, 0);
    let response = as_stream(live.in_words_of(stream::frame, leaving), job.job_id);
    Ok(if replayed {
        response.with(REPLAYED, "true")
    } else {
        response
    })
}

/// A chat that is well-formed.
struct Asked {
    create: JobCreate,
    session: Session,
    idempotent: Option<IdempotentRequest>,
    cancel_on_disconnect: bool,
}

impl Asked {
    async fn read(
        context: &Context,
        request: &Request,
        caller: &Caller,
        name: &Segment,
    ) -> Result<Self, Problem> {
        let session = sessions::find(context, caller, name.as_ref()).await?;
        let words = &["true", "false", "1", "0"];
        let cancel = request
            .query()
            .value("cancel_on_disconnect", |word| choice(words)(word.into()))?;
        let body = request.json().await?;
        let idempotent = IdempotentRequest::of(request, caller, &body, context.config.idempotency_ttl)?;
        let create = create(body.fields()?, caller, &context.config)?;
        Ok(Self {
            create,
            session,
            idempotent,
            cancel_on_disconnect: matches!(cancel, Some("true" | "1")),
        })
    }

    /// The job, and whether an earlier request with the same idempotency key made it.
    async fn accept(self, context: &Context, caller: &Caller) -> Result<(Job, bool, Leaving), Problem> {
        let kept = kept_answer(context.config.retention);
        let source = (self.create, Source::Chat);
        let accepting = accept(context, caller, source, Some(self.session), self.idempotent, kept);
        let (job, replayed) = match Box::pin(accepting).await? {
            Acceptance::New(accepted) => (accepted.job, false),
            Acceptance::Replay(first) => {
                let job_id = first.job_id.ok_or(Problem::NoSuch("Job"))?;
                let job = context.store.job(job_id).await?;
                (job.ok_or(Problem::NoSuch("Job"))?, true)
            }
        };
        let leaving = Leaving {
            context: context.clone(),
            job_id: job.job_id,
            cancels: self.cancel_on_disconnect,
        };
        Ok((job, replayed, leaving))
    }
}

/// The names of the members of a chat, in the order in which they are read.
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
    "on_session_lost",
    "timeout_seconds",
    "metadata",
];

/// The body of a chat as a job.
fn create(mut body: Fields, caller: &Caller, config: &Config) -> Result<JobCreate, Problem> {
    let create = members(&mut body, caller.max_priority(), config);
    body.finish(create)
}

fn members(body: &mut Fields, priority: i64, config: &Config) -> Option<JobCreate> {
    let message = body.required("message", message);
    let settings = Settings::read(body, "system", config);
    let json_schema = body.optional("output_format", output_format).flatten();
    let on_session_lost = body.optional("on_session_lost", choice(&["restart", "fail"]));
    let timeout_seconds = body.optional("timeout_seconds", integer(1..=config.chat_timeout_seconds));
    let metadata = body.optional("metadata", metadata).unwrap_or_default();
    message.map(|message| JobCreate {
        kind: JobKind::Chat,
        message,
        settings,
        json_schema,
        session: None,
        concurrency_key: None,
        // Somebody is waiting.
        priority,
        run_after: None,
        cancel_after: None,
        max_attempts: None,
        on_worker_lost: OnWorkerLost::Resume,
        fail_on_session_lost: on_session_lost == Some("fail"),
        timeout_seconds,
        custom_id: None,
        webhook_url: None,
        webhook_events: Vec::new(),
        metadata,
        created_at: clock::now(),
    })
}

/// The job when it has ended, with its answer. A job that waits or runs for longer than a run may take goes on, and the
/// client hears how to find it.
async fn ended(context: &Context, mut job: Job) -> Result<(Job, ChatResult), Problem> {
    let seconds = job.timeout_seconds.unwrap_or(context.config.chat_timeout_seconds);
    let timeout = Duration::from_secs(seconds.unsigned_abs());
    let job_id = job.job_id;
    let failed = |failure, detail: String| {
        Problem::Run(FailedRun {
            failure,
            detail,
            job_id,
        })
    };
    let goes_on = "The job goes on; look for it by its id";
    while !job.status.is_final() {
        let status = job.status;
        let limit = match status {
            JobStatus::Queued => timeout,
            _ => timeout + GRACE,
        };
        // Also after an outage of the database the job is there.
        let next = match wait::until(context, job.clone(), limit, |job| job.status != status).await {
            Ok(next) => next,
            Err(problem) => {
                context.report(&problem);
                let detail = format!("The database can't be read. {goes_on}");
                return Err(failed(RunFailure::Waits, detail));
            }
        };
        if next.status == status {
            return Err(match status {
                _ if context.stopping.is_cancelled() => {
                    failed(RunFailure::Waits, format!("The service is stopping. {goes_on}"))
                }
                JobStatus::Queued => {
                    let why = next
                        .wait_reason
                        .unwrap_or_else(|| "No worker was free".to_owned());
                    failed(RunFailure::Waits, format!("{why}. {goes_on}"))
                }
                _ => failed(RunFailure::Timeout, "Claude timed out".to_owned()),
            });
        }
        job = next;
    }
    if job.data_removed {
        return Err(Problem::DataRemoved);
    }
    let details = context
        .store
        .job_details(job.job_id, None, None, JobPart::Result)
        .await?;
    let details = details.ok_or(Problem::NoSuch("Job"))?;
    let content = ChatResult::of(&details.job, details.result.as_deref())?;
    Ok((details.job, content))
}

/// What happens when the client leaves before the end.
#[derive(Debug)]
pub struct Leaving {
    context: Context,
    job_id: JobId,
    cancels: bool,
}

impl Leaving {
    /// The client has got what it can get.
    pub fn stay(mut self) {
        self.cancels = false;
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        // A process that stops leaves its clients, not they it.
        if !self.cancels || self.context.stopping.is_cancelled() {
            return;
        }
        let (context, job_id) = (self.context.clone(), self.job_id);
        tokio::spawn(async move {
            let reason = CancelReason::ClientDisconnect;
            if let Err(error) = context.store.cancel_job(job_id, reason, clock::now()).await {
                context.report(&error.into());
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(value: Value) -> Result<JobCreate, Problem> {
        let mut body = Fields::of("body", value).unwrap();
        let create = members(&mut body, 3, &Config::default());
        body.finish(create)
    }

    #[test]
    fn the_members_that_are_read_are_those_that_are_listed() {
        let mut body = Fields::of("body", json!({})).unwrap();
        members(&mut body, 0, &Config::default());
        assert_eq!(body.known(), MEMBERS);
    }

    #[test]
    fn a_chat_is_a_job_that_somebody_waits_for() {
        let create = read(json!({"message": "hi", "allowed_tools": []})).unwrap();
        assert_eq!((create.kind, create.priority), (JobKind::Chat, 3));
        assert_eq!(create.settings.allowed_tools, Some(Vec::new()));
    }

    #[test]
    fn each_bad_member_is_named() {
        for (member, value) in [
            ("message", json!("")),
            ("timeout_seconds", json!(301)),
            ("effort", json!("huge")),
            ("output_format", json!("json")),
            ("webhook_url", json!("https://example.com")),
            ("priority", json!(1)),
            ("session", json!("s")),
        ] {
            let mut body = json!({"message": "hi"});
            body[member] = value;
            let Err(Problem::Invalid(faults)) = read(body) else {
                panic!("{member}")
            };
            assert_eq!(faults[0].field, format!("body -> {member}"));
        }
    }
}
