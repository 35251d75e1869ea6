//! Deliveries: what became of each event on its way to each address.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use shared::clock::{self, Timestamp};
use shared::delivery::{Delivery, DeliveryAttempt, DeliveryStatus};
use shared::id::{DeliveryId, EndpointId, JobId, KeyId};
use shared::storage::{DeliveryFilter, Resend};
use shared::webhook::address::masked;
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::page::{Cursor, Pagination, more_than};
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers};
use crate::http::request::fields::{choice, text, time};
use crate::http::request::{Request, Segment};

/// A delivery as clients see it.
#[derive(Debug, Serialize)]
pub struct DeliveryView {
    id: DeliveryId,
    webhook_id: String,
    key_id: KeyId,
    event_type: String,
    job_id: Option<JobId>,
    /// There are no batches yet.
    batch_id: Option<String>,
    endpoint_id: Option<EndpointId>,
    url: String,
    status: DeliveryStatus,
    attempt_count: i64,
    next_attempt_at: Option<Timestamp>,
    created_at: Timestamp,
    completed_at: Option<Timestamp>,
    last_status_code: Option<i64>,
    last_error_class: Option<String>,
    attempts: Vec<AttemptView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<Box<RawValue>>,
}

/// One attempt.
#[derive(Debug, Serialize)]
pub struct AttemptView {
    number: i64,
    trigger: String,
    started_at: Timestamp,
    duration_ms: i64,
    status_code: Option<i64>,
    error_class: Option<String>,
    response_snippet: String,
}

impl AttemptView {
    fn of(attempt: DeliveryAttempt) -> Self {
        Self {
            number: attempt.number,
            trigger: attempt.trigger_kind,
            started_at: attempt.started_at,
            duration_ms: attempt.duration_ms,
            status_code: attempt.status_code,
            error_class: attempt.error_class,
            response_snippet: attempt.snippet,
        }
    }
}

impl DeliveryView {
    /// A delivery with these attempts.
    pub fn of(delivery: &Delivery, attempts: Vec<DeliveryAttempt>) -> Self {
        Self {
            id: delivery.delivery_id,
            webhook_id: delivery.delivery_id.message_id(),
            key_id: delivery.key_id.clone(),
            event_type: delivery.event_type.clone(),
            job_id: delivery.job_id,
            batch_id: None,
            endpoint_id: delivery.endpoint_id,
            url: masked(&delivery.url),
            status: delivery.status,
            attempt_count: delivery.attempts,
            next_attempt_at: delivery.due_at,
            created_at: delivery.created_at,
            completed_at: delivery.completed_at,
            last_status_code: delivery.last_status_code,
            last_error_class: delivery.last_error_class.clone(),
            attempts: attempts.into_iter().map(AttemptView::of).collect(),
            body: None,
        }
    }
}

/// `GET /webhooks/deliveries`: the caller's, newest first, without their attempts.
pub async fn list(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=100)?.unwrap_or(20);
    let status = query.value("status", |word| {
        choice(&["pending", "succeeded", "failed", "cancelled"])(word.into())
    })?;
    let moment = |name| query.value(name, |text| time(Value::from(text)));
    let mut filter = DeliveryFilter {
        key_id: match query.text("key_id") {
            Some(key_id) if caller.admin || key_id == caller.key_id.as_str() => Some(KeyId::known(key_id)),
            Some(_) => return Err(Problem::AdminOnly("list the deliveries of others")),
            None => (!caller.admin).then(|| caller.key_id.clone()),
        },
        status: status.map(|word| match word {
            "pending" => DeliveryStatus::Pending,
            "succeeded" => DeliveryStatus::Succeeded,
            "failed" => DeliveryStatus::Failed,
            _ => DeliveryStatus::Cancelled,
        }),
        event_type: query.value("event_type", |word| text(1..=64)(word.into()))?,
        created_after: moment("created_after")?,
        created_before: moment("created_before")?,
        ..DeliveryFilter::default()
    };
    // What can't be an id is no one's.
    for (name, known) in [
        ("job_id", query.text("job_id")),
        ("endpoint_id", query.text("endpoint_id")),
    ] {
        let Some(id) = known else { continue };
        let read = if name == "job_id" {
            id.parse().map(|id| filter.job_id = Some(id))
        } else {
            id.parse().map(|id| filter.endpoint_id = Some(id))
        };
        if read.is_err() {
            return page(request, Vec::new(), limit, None);
        }
    }
    let bound_to = format!("{filter:?}");
    filter.before = match query.text("cursor") {
        Some(cursor) => Some(Cursor::decode(cursor, &bound_to)?.0),
        None => None,
    };
    let mut deliveries = context.store.deliveries(&filter, limit + 1).await?;
    let next = more_than(limit, &mut deliveries, |delivery| {
        Cursor(delivery.delivery_number).encode(&bound_to)
    });
    let shown = deliveries
        .iter()
        .map(|delivery| DeliveryView::of(delivery, Vec::new()));
    page(request, shown.collect(), limit, next)
}

fn page(
    request: &Request,
    shown: Vec<DeliveryView>,
    limit: i64,
    next: Option<String>,
) -> Result<Response, Problem> {
    let pagination = Pagination::new(limit, next);
    Ok(pagination.link(request, reply::list(request, shown, &pagination)?))
}

/// `GET /webhooks/deliveries/{id}`, with its attempts; `?include=body` adds what was sent.
pub async fn item(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let query = request.query();
    let include = query.value("include", |word| choice(&["body"])(word.into()))?;
    let delivery = find(context, caller, id).await?;
    let attempts = context.store.delivery_attempts(delivery.delivery_id).await?;
    let mut view = DeliveryView::of(&delivery, attempts);
    if include.is_some() {
        let body = context.store.delivery_body(delivery.delivery_id).await?;
        view.body = body.and_then(|body| RawValue::from_string(body).ok());
    }
    reply::data(request, StatusCode::OK, view)
}

/// `POST /webhooks/deliveries/{id}/resend`: one more attempt, with the same id and bytes, signed by what signs now.
pub async fn resend(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let delivery = find(context, caller, id).await?;
    let mut tx = context.store.begin().await?;
    let again = match tx.resend(&delivery, clock::now()).await? {
        Resend::Pending(again) => again,
        refused => {
            tx.rollback().await?;
            return Err(match refused {
                Resend::InProgress => Problem::DeliveryInProgress,
                _ => Problem::DeliveryGone,
            });
        }
    };
    tx.commit().await?;
    let view = DeliveryView::of(&again, Vec::new());
    Ok(reply::data(request, StatusCode::ACCEPTED, view)?
        .location(&format!("/api/v1/webhooks/deliveries/{}", again.delivery_id)))
}

/// The caller's delivery of this id; an administrator's are all.
async fn find(context: &Context, caller: &Caller, id: &Segment) -> Result<Delivery, Problem> {
    let id = id.as_ref().parse().map_err(|_| Problem::NoSuch("Delivery"))?;
    let delivery = context.store.delivery(id).await?;
    delivery
        .filter(|delivery| caller.admin || delivery.key_id == caller.key_id)
        .ok_or(Problem::NoSuch("Delivery"))
}
