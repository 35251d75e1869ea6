//! Everything that can be wrong with a request, as `application/problem+json` (RFC 9457): the only file that knows
//! which HTTP status a problem has. A problem is a value; it is rendered, and logged, once at the edge.

use http::header::{ALLOW, CONTENT_RANGE, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderName, HeaderValue, Method, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use shared::id::JobId;
use shared::job::JobStatus;
use shared::key::Scope;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::time::Duration;
use warp::reply::Response;

use crate::http::reply::X_JOB_ID;

/// One member that can't be used, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FieldFault {
    /// The way to it: `body -> metadata -> colour`.
    pub field: String,
    /// A sentence for people.
    pub message: Cow<'static, str>,
    /// The word for programs, from a fixed list: `missing`, `string_too_long` …
    #[serde(rename = "type")]
    pub kind: &'static str,
}

/// A budget that has nothing left.
#[derive(Clone, Debug)]
pub struct BudgetExceeded {
    /// Which one, and what to do, in words.
    pub detail: String,
    /// The same in numbers.
    pub summary: Value,
    /// How long until its next period; `None` when it has none.
    pub retry_after: Option<Duration>,
    /// The headers that say how it stands.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// Why a job that the client waited for has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunFailure {
    /// Its time was used up.
    Timeout,
    /// The budget was used up.
    Budget,
    /// Somebody cancelled it.
    Cancelled,
    /// It hasn't ended yet.
    Waits,
    /// Claude, or what it needs, has failed.
    Claude,
}

/// A job that the client waited for and that has no answer.
#[derive(Clone, Debug)]
pub struct FailedRun {
    /// Why.
    pub failure: RunFailure,
    /// The same for people.
    pub detail: String,
    /// The job.
    pub job_id: JobId,
}

/// Why a request isn't done.
#[derive(Debug)]
pub enum Problem {
    /// The request as a whole makes no sense; the sentence says why.
    BadRequest(Cow<'static, str>),
    /// No file has this path, or what it leads to can't be used; the sentence says why.
    InvalidPath(Cow<'static, str>),
    /// The `cursor` isn't one of ours, or the filters changed between two pages.
    InvalidCursor,
    /// `X-API-Key` and `Authorization` hold different keys.
    AmbiguousCredentials,
    /// No key, or one that isn't valid.
    Unauthorized,
    /// Nobody needs a key here, but a web page may not use that.
    AnonymousFromWeb,
    /// Nobody needs a key here, but what comes through a proxy does.
    AnonymousThroughProxy,
    /// Only a key that may skip permission checks can ask for this mode.
    PermissionModeNotAllowed(String),
    /// Only an admin key may do this.
    AdminOnly(&'static str),
    /// The key doesn't have this scope.
    InsufficientScope(Scope),
    /// The key may not be used from where the request comes.
    IpNotAllowed,
    /// The key's jobs may not run on this model.
    ModelNotAllowed(String),
    /// The caller asked too often.
    RateLimited {
        /// Of which limit.
        policy: &'static str,
        /// When one more is allowed.
        retry_after: Duration,
    },
    /// As many of the key's jobs wait as may.
    QueueFull(i64),
    /// The key has as many sessions as it may, and jobs in all of them.
    TooManySessions(i64),
    /// As many of the key's event streams are open as may.
    TooManyStreams(i64),
    /// The key is one of the environment, which only its operator can change.
    KeyReadOnly,
    /// The key was revoked or has expired.
    KeyNotActive,
    /// The key is active, so it can't be deleted.
    KeyActive,
    /// There's no such path.
    NoSuchPath,
    /// There's no such thing, or it belongs to another key: `Job`, `Session`.
    NoSuch(&'static str),
    /// The path exists, the method doesn't; these do.
    MethodNotAllowed(&'static [Method]),
    /// The client accepts none of the forms that this answer has.
    NotAcceptable,
    /// The request didn't arrive in time.
    TooSlow,
    /// The job has ended, in this status.
    JobFinal(JobStatus),
    /// The job hasn't ended, so there's no result.
    JobNotFinished,
    /// The job is waiting or running, so it can't be removed.
    JobActive,
    /// The idempotency key was used with another body.
    IdempotencyKeyReused,
    /// The data was removed by its owner or by the retention time.
    DataRemoved,
    /// A precondition (`If-None-Match`) isn't met; the sentence says which.
    PreconditionFailed(&'static str),
    /// The body is larger than this many bytes.
    TooLarge(usize),
    /// The body isn't JSON by its `Content-Type`.
    UnsupportedMediaType,
    /// The body isn't a form with parts by its `Content-Type`.
    NotMultipart,
    /// The body is compressed.
    UnsupportedEncoding,
    /// The file has no byte of the range that is asked for; it has this many bytes.
    RangeNotSatisfiable(u64),
    /// The workspace has more files, or larger ones, than go into an archive.
    ArchiveTooLarge,
    /// As many requests of the key wait as may.
    TooManyWaits(i64),
    /// The path and query are longer than this many bytes.
    UriTooLong(usize),
    /// There are more headers than are read, or longer ones.
    HeadersTooLarge,
    /// No more connections can be served now.
    TooManyConnections,
    /// Events can't be sent to this address; the sentence says why, and what would allow it.
    WebhookUrlNotAllowed {
        /// The way to the member: `body -> webhook_url`.
        field: String,
        /// Why.
        reason: String,
    },
    /// As many secrets sign as may.
    TooManySecrets,
    /// The endpoint is switched off.
    EndpointDisabled,
    /// The key has as many endpoints as it may.
    TooManyEndpoints,
    /// The delivery is on its way.
    DeliveryInProgress,
    /// What was delivered was removed, or its endpoint was deleted.
    DeliveryGone,
    /// Members of the body or of the query are wrong: all of them.
    Invalid(Vec<FieldFault>),
    /// There's no template of this name, which a session or a job was to be made from.
    NoSuchTemplate(String),
    /// There's no template of this name, which was asked for.
    UnknownTemplate(String),
    /// The file of templates can't be used.
    BrokenTemplates(String),
    /// The owner, or everybody together, has spent what may be spent.
    BudgetExceeded(Box<BudgetExceeded>),
    /// The job that the client waited for has no answer.
    Run(FailedRun),
    /// Requests can't be served: which check says so.
    NotReady {
        /// What the database does.
        database: Database,
        /// The process is stopping.
        draining: bool,
    },
    /// The service can't do it now; later it can.
    Unavailable {
        /// What the client sees.
        detail: &'static str,
        /// What the log gets.
        source: Option<Box<dyn StdError + Send + Sync>>,
    },
    /// Something that should not happen: logged whole, answered with one sentence.
    Internal(Box<dyn StdError + Send + Sync>),
}

/// What a database does when it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// All.
    Writes,
    /// It is full, read-only or locked.
    Reads,
    /// Nothing: it can't be reached.
    Silent,
}

impl Problem {
    /// Something that should not happen, said in words.
    pub fn internal(what: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Internal(what.into())
    }

    /// The HTTP status.
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_)
            | Self::InvalidPath(_)
            | Self::InvalidCursor
            | Self::AmbiguousCredentials
            | Self::NoSuchTemplate(_) => StatusCode::BAD_REQUEST,
            Self::Unauthorized | Self::AnonymousFromWeb | Self::AnonymousThroughProxy => {
                StatusCode::UNAUTHORIZED
            }
            Self::PermissionModeNotAllowed(_)
            | Self::AdminOnly(_)
            | Self::InsufficientScope(_)
            | Self::IpNotAllowed
            | Self::ModelNotAllowed(_) => StatusCode::FORBIDDEN,
            Self::NoSuchPath | Self::NoSuch(_) | Self::UnknownTemplate(_) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::JobFinal(_)
            | Self::JobNotFinished
            | Self::JobActive
            | Self::KeyReadOnly
            | Self::KeyNotActive
            | Self::KeyActive
            | Self::ArchiveTooLarge
            | Self::TooManySecrets
            | Self::EndpointDisabled
            | Self::TooManyEndpoints
            | Self::DeliveryInProgress => StatusCode::CONFLICT,
            Self::DataRemoved | Self::DeliveryGone => StatusCode::GONE,
            Self::PreconditionFailed(_) => StatusCode::PRECONDITION_FAILED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType | Self::NotMultipart | Self::UnsupportedEncoding => {
                StatusCode::UNSUPPORTED_MEDIA_TYPE
            }
            Self::RangeNotSatisfiable(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::UriTooLong(_) => StatusCode::URI_TOO_LONG,
            Self::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BrokenTemplates(_)
            | Self::Invalid(_)
            | Self::IdempotencyKeyReused
            | Self::WebhookUrlNotAllowed { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Self::BudgetExceeded(_)
            | Self::RateLimited { .. }
            | Self::QueueFull(_)
            | Self::TooManySessions(_)
            | Self::TooManyStreams(_)
            | Self::TooManyWaits(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::NotReady { .. } | Self::Unavailable { .. } | Self::TooManyConnections => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Run(run) => match run.failure {
                RunFailure::Timeout => StatusCode::GATEWAY_TIMEOUT,
                RunFailure::Budget => StatusCode::TOO_MANY_REQUESTS,
                RunFailure::Cancelled => StatusCode::CONFLICT,
                RunFailure::Waits => StatusCode::SERVICE_UNAVAILABLE,
                RunFailure::Claude => StatusCode::BAD_GATEWAY,
            },
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The word that programs tell problems apart by; it never changes.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad-request",
            Self::InvalidPath(_) => "invalid-path",
            Self::InvalidCursor => "invalid-cursor",
            Self::AmbiguousCredentials => "ambiguous-credentials",
            Self::Unauthorized | Self::AnonymousFromWeb | Self::AnonymousThroughProxy => "unauthorized",
            Self::PermissionModeNotAllowed(_) => "permission-mode-not-allowed",
            Self::AdminOnly(_) | Self::InsufficientScope(_) => "insufficient-scope",
            Self::IpNotAllowed => "ip-not-allowed",
            Self::ModelNotAllowed(_) => "model-not-allowed",
            Self::RateLimited { .. } => "rate-limited",
            Self::QueueFull(_) => "queue-full",
            Self::TooManySessions(_) => "too-many-sessions",
            Self::TooManyStreams(_) => "too-many-streams",
            Self::KeyReadOnly => "key-read-only",
            Self::KeyNotActive => "key-not-active",
            Self::KeyActive => "key-active",
            Self::NoSuchPath | Self::NoSuch(_) | Self::UnknownTemplate(_) => "not-found",
            Self::MethodNotAllowed(_) => "method-not-allowed",
            Self::NotAcceptable => "not-acceptable",
            Self::TooSlow => "request-timeout",
            Self::JobFinal(_) => "job-terminal",
            Self::JobNotFinished => "job-not-finished",
            Self::JobActive => "job-active",
            Self::DataRemoved => "data-removed",
            Self::PreconditionFailed(_) => "precondition-failed",
            Self::TooLarge(_) => "payload-too-large",
            Self::UnsupportedMediaType | Self::NotMultipart | Self::UnsupportedEncoding => {
                "unsupported-media-type"
            }
            Self::RangeNotSatisfiable(_) => "range-not-satisfiable",
            Self::ArchiveTooLarge => "archive-too-large",
            Self::TooManyWaits(_) => "too-many-waits",
            Self::UriTooLong(_) => "uri-too-long",
            Self::HeadersTooLarge => "headers-too-large",
            Self::TooManyConnections => "too-many-connections",
            Self::WebhookUrlNotAllowed { .. } => "webhook-url-not-allowed",
            Self::TooManySecrets => "too-many-secrets",
            Self::EndpointDisabled => "endpoint-disabled",
            Self::TooManyEndpoints => "too-many-endpoints",
            Self::DeliveryInProgress => "delivery-in-progress",
            Self::DeliveryGone => "delivery-gone",
            Self::Invalid(_) | Self::BrokenTemplates(_) => "validation-error",
            Self::IdempotencyKeyReused => "idempotency-key-reused",
            Self::NoSuchTemplate(_) => "template-not-found",
            Self::BudgetExceeded(_) => "budget-exceeded",
            Self::NotReady { .. } | Self::Unavailable { .. } => "unavailable",
            Self::Run(run) => match run.failure {
                RunFailure::Timeout => "claude-timeout",
                RunFailure::Budget => "budget-exceeded",
                RunFailure::Cancelled => "job-cancelled",
                RunFailure::Waits => "unavailable",
                RunFailure::Claude => "claude-error",
            },
            Self::Internal(_) => "internal-error",
        }
    }

    /// The sentence for people.
    pub fn detail(&self) -> Cow<'static, str> {
        match self {
            Self::BadRequest(why) | Self::InvalidPath(why) => why.clone(),
            Self::InvalidCursor => "The cursor is not valid for this list and these filters".into(),
            Self::AmbiguousCredentials => "X-API-Key and Authorization hold different keys; send one".into(),
            Self::Unauthorized => "Invalid or missing API key".into(),
            Self::AnonymousFromWeb => {
                "Without a key only programs on this machine are served, not web pages; set API_KEYS, or name \
                 the page's origin in CORS_ORIGINS"
                    .into()
            }
            Self::AnonymousThroughProxy => {
                "Without a key, only programs on this machine are served, and no requests through a proxy; set API_KEYS".into()
            }
            Self::PermissionModeNotAllowed(mode) => format!("This key may not use permission mode {mode}").into(),
            Self::AdminOnly(what) => format!("Only an admin key may {what}").into(),
            Self::InsufficientScope(scope) => format!("This key does not have the scope {scope}").into(),
            Self::IpNotAllowed => "This key may not be used from this address".into(),
            Self::ModelNotAllowed(model) => format!("This key may not use the model {model}").into(),
            Self::RateLimited { .. } => "Rate limit exceeded".into(),
            Self::QueueFull(max) => format!("This key has {max} waiting jobs, which is its maximum").into(),
            Self::TooManySessions(max) => format!(
                "This key has {max} sessions, which is the maximum, and jobs wait or run in all of them; delete one, \
                 or wait"
            )
            .into(),
            Self::TooManyStreams(max) => {
                format!("This key has {max} open event streams, which is its maximum").into()
            }
            Self::KeyReadOnly => "Keys from API_KEYS and ADMIN_API_KEYS can only be changed in these settings".into(),
            Self::KeyNotActive => "The key was revoked or has expired".into(),
            Self::KeyActive => "The key is active; revoke it first".into(),
            Self::NoSuchPath => "There is no such path".into(),
            Self::NoSuch(what) => format!("{what} not found").into(),
            Self::MethodNotAllowed(methods) => format!("This path allows {}", allow(methods)).into(),
            Self::NotAcceptable => "Accept must allow text/event-stream or application/json".into(),
            Self::TooSlow => "The request did not arrive in time".into(),
            Self::JobFinal(status) => format!("Job already {}", status.as_str()).into(),
            Self::JobNotFinished => "Job is not finished".into(),
            Self::JobActive => "Job is queued or running; cancel it first".into(),
            Self::DataRemoved => "The data of this job was removed".into(),
            Self::PreconditionFailed(why) => (*why).into(),
            Self::TooLarge(limit) => format!("Request body exceeds {limit} bytes").into(),
            Self::UnsupportedMediaType => "Content-Type must be application/json".into(),
            Self::NotMultipart => "Content-Type must be multipart/form-data with a boundary".into(),
            Self::RangeNotSatisfiable(size) => format!("The file has {size} bytes, and none in this range").into(),
            Self::ArchiveTooLarge => {
                "The workspace holds more than 50,000 files, or more than 10 GiB; fetch its files one by one".into()
            }
            Self::UnsupportedEncoding => {
                "Content-Encoding must be identity: send the body without compression".into()
            }
            Self::TooManyWaits(max) => {
                format!("{max} requests of this key are waiting for a job, which is the limit").into()
            }
            Self::UriTooLong(limit) => format!("The path and query exceed {limit} bytes").into(),
            Self::HeadersTooLarge => "The headers are too many or too large".into(),
            Self::TooManyConnections => "Too many connections are open; close some, or try again".into(),
            Self::WebhookUrlNotAllowed { field, reason } => format!("{field}: {reason}").into(),
            Self::TooManySecrets => {
                "Five secrets sign already; wait until the grace of one is over, or rotate with grace_seconds 0".into()
            }
            Self::EndpointDisabled => "The endpoint is disabled; enable it first".into(),
            Self::TooManyEndpoints => "The key has 20 endpoints already; delete one first".into(),
            Self::DeliveryInProgress => "The delivery is on its way".into(),
            Self::DeliveryGone => "What was delivered was removed, or its endpoint was deleted".into(),
            Self::BrokenTemplates(why) => format!("TEMPLATES_FILE {why}; the templates stay as they were").into(),
            Self::Run(run) => run.detail.clone().into(),
            Self::Invalid(faults) => match faults.as_slice() {
                [one] => format!("{}: {}", one.field, one.message).into(),
                many => format!("{} fields are not valid", many.len()).into(),
            },
            Self::IdempotencyKeyReused => "This Idempotency-Key was used with another request body".into(),
            Self::NoSuchTemplate(name) | Self::UnknownTemplate(name) => format!("Template '{name}' not found").into(),
            Self::BudgetExceeded(exceeded) => exceeded.detail.clone().into(),
            Self::NotReady { draining: true, .. } => "The service is shutting down".into(),
            Self::NotReady {
                database: Database::Silent,
                ..
            } => "The database does not answer".into(),
            Self::NotReady { .. } => {
                "The database can be read but not written: it is full, read-only or locked; the log says which".into()
            }
            Self::Unavailable { detail, .. } => (*detail).into(),
            Self::Internal(_) => "An unexpected error occurred".into(),
        }
    }

    /// When it makes sense to try again, where that is known.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } => Some(*retry_after),
            Self::BudgetExceeded(exceeded) => exceeded.retry_after,
            Self::Run(run) if run.failure == RunFailure::Waits => Some(Duration::from_secs(5)),
            Self::QueueFull(_)
            | Self::TooManySessions(_)
            | Self::TooManyStreams(_)
            | Self::TooManyWaits(_) => Some(Duration::from_secs(5)),
            Self::TooManyConnections => Some(Duration::from_secs(5)),
            Self::JobNotFinished => Some(Duration::from_secs(2)),
            Self::NotReady { .. } | Self::Unavailable { .. } => Some(Duration::from_secs(5)),
            _ => None,
        }
    }

    /// Whether the same request can't succeed later, so that client libraries need not try.
    fn is_hopeless(&self) -> bool {
        match self {
            Self::TooSlow => false,
            // The next period may be weeks away.
            // A job that is repeated is paid for once more.
            Self::BudgetExceeded(_) | Self::Run(_) => true,
            _ => self.status().is_client_error() && self.retry_after().is_none(),
        }
    }

    /// The members beside the standard ones.
    fn more(&self, request_id: &str) -> Option<(&'static str, Value)> {
        match self {
            Self::Invalid(faults) => Some(("errors", json!(faults))),
            Self::WebhookUrlNotAllowed { field, reason } => Some((
                "errors",
                json!([{ "field": field, "message": reason, "type": "value_error" }]),
            )),
            // Clients of the Python service read this one.
            Self::TooLarge(_) => Some((
                "error",
                json!({"code": "PAYLOAD_TOO_LARGE", "message": self.detail(), "request_id": request_id}),
            )),
            Self::Run(run) => Some(("job_id", json!(run.job_id))),
            Self::RateLimited { policy, .. } => Some(("violated-policies", json!([policy]))),
            Self::BudgetExceeded(exceeded) => Some(("budget", exceeded.summary.clone())),
            Self::NotReady { database, draining } => {
                let database = if *database == Database::Writes {
                    "ok"
                } else {
                    "error"
                };
                Some(("checks", json!({"database": database, "draining": draining})))
            }
            _ => None,
        }
    }

    /// The answer to the request `request_id` for the path `instance`. `type_base` stands before the code in `type`.
    pub fn render(&self, type_base: &str, instance: &str, request_id: &str) -> Response {
        let mut response = Response::new(self.body(type_base, instance, request_id).into());
        *response.status_mut() = self.status();
        self.set_headers(|name, value| {
            response.headers_mut().insert(name, value);
        });
        response
    }

    /// The `type` by which clients of the Python service know a failure of Claude.
    const fn type_of_python_service(&self) -> Option<&'static str> {
        match self {
            Self::Run(FailedRun {
                failure: RunFailure::Timeout,
                ..
            }) => Some("claude:timeout"),
            Self::Run(FailedRun {
                failure: RunFailure::Claude,
                ..
            }) => Some("claude:ClaudeProcessError"),
            _ => None,
        }
    }

    /// The body of that answer, as JSON.
    pub(super) fn body(&self, type_base: &str, instance: &str, request_id: &str) -> Vec<u8> {
        let (status, code) = (self.status(), self.code());
        let body = Body {
            kind: self
                .type_of_python_service()
                .map_or_else(|| format!("{type_base}{code}"), str::to_owned),
            title: title(status),
            status: status.as_u16(),
            detail: &self.detail(),
            instance,
            request_id,
            code,
            more: self.more(request_id).into_iter().collect(),
        };
        // A body of texts and numbers can always be written.
        serde_json::to_vec(&body).unwrap_or_default()
    }

    /// The headers that go with the problem.
    pub(super) fn set_headers(&self, mut insert: impl FnMut(HeaderName, HeaderValue)) {
        insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(after) = self.retry_after() {
            insert(RETRY_AFTER, HeaderValue::from(after.as_secs()));
        }
        if self.is_hopeless() {
            insert(
                HeaderName::from_static("x-should-retry"),
                HeaderValue::from_static("false"),
            );
        }
        match self {
            Self::Unauthorized | Self::AnonymousFromWeb | Self::AnonymousThroughProxy => {
                insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"api\""));
            }
            Self::Run(run) => {
                if let Ok(value) = HeaderValue::from_str(&run.job_id.to_string()) {
                    insert(X_JOB_ID, value);
                }
            }
            Self::MethodNotAllowed(methods) => {
                if let Ok(value) = HeaderValue::from_str(&allow(methods)) {
                    insert(ALLOW, value);
                }
            }
            Self::RangeNotSatisfiable(size) => {
                if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}")) {
                    insert(CONTENT_RANGE, value);
                }
            }
            Self::BudgetExceeded(exceeded) => {
                for (name, value) in &exceeded.headers {
                    insert(name.clone(), value.clone());
                }
            }
            _ => {}
        }
    }
}

/// The members in the order in which people read them.
#[derive(Serialize)]
struct Body<'p> {
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    status: u16,
    detail: &'p str,
    instance: &'p str,
    request_id: &'p str,
    code: &'static str,
    #[serde(flatten)]
    more: BTreeMap<&'static str, Value>,
}

/// The value of `Allow`. Whoever answers GET answers HEAD.
fn allow(methods: &[Method]) -> String {
    let names = methods.iter().flat_map(|method| match *method {
        Method::GET => ["GET", "HEAD"].as_slice(),
        Method::POST => &["POST"],
        Method::DELETE => &["DELETE"],
        Method::PATCH => &["PATCH"],
        Method::PUT => &["PUT"],
        _ => &[],
    });
    names.copied().collect::<Vec<_>>().join(", ")
}

/// The title that goes with a status.
fn title(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNPROCESSABLE_ENTITY => "Validation Error",
        other => other.canonical_reason().unwrap_or("Error"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_answers_get_also_answers_head() {
        assert_eq!(allow(&[Method::GET, Method::POST]), "GET, HEAD, POST");
    }

    #[test]
    fn only_hopeless_problems_ask_clients_not_to_retry() {
        assert!(Problem::Unauthorized.is_hopeless());
        assert!(Problem::IdempotencyKeyReused.is_hopeless());
        assert!(!Problem::JobNotFinished.is_hopeless());
        let unavailable = Problem::Unavailable {
            detail: "",
            source: None,
        };
        assert!(!unavailable.is_hopeless());
        assert!(!Problem::internal("x").is_hopeless());
    }

    #[test]
    fn the_log_gets_every_cause_and_the_client_none() {
        let secret = std::io::Error::other("disk /dev/sda is full");
        let problem = Problem::internal(secret);
        assert_eq!(problem.detail(), "An unexpected error occurred");
        let Problem::Internal(source) = &problem else {
            panic!("not internal")
        };
        assert_eq!(shared::telemetry::chain(source.as_ref()), "disk /dev/sda is full");
    }

    #[test]
    fn one_fault_is_named_in_the_detail_and_many_are_counted() {
        let fault = || FieldFault {
            field: "body -> a".to_owned(),
            message: "Field required".into(),
            kind: "missing",
        };
        assert_eq!(
            Problem::Invalid(vec![fault()]).detail(),
            "body -> a: Field required"
        );
        assert_eq!(
            Problem::Invalid(vec![fault(), fault()]).detail(),
            "2 fields are not valid"
        );
    }
}
