//! Who changed what over HTTP, and the list of it.

use http::StatusCode;
use serde_json::{Value, json};
use shared::clock::{self, Timestamp};
use shared::storage::{AuditEntry, AuditRow};
use warp::reply::Response;

use crate::caller::Caller;
use crate::problem::Problem;
use crate::reply::{self, Meta};
use crate::request::Request;
use crate::request::fields::choice;

/// So many entries are shown at most; more are asked for page by page.
const LARGEST_PAGE: i64 = 200;

/// What is noted about a change that this request makes.
pub fn entry(
    request: &Request,
    caller: &Caller,
    action: &'static str,
    object_id: &str,
    detail: Value,
) -> AuditEntry {
    AuditEntry {
        at: clock::now(),
        actor: caller.key_id.to_string(),
        action,
        object_id: object_id.to_owned(),
        address: request.client().to_string(),
        request_id: request.id.clone(),
        detail,
    }
}

/// `GET /audit?kind=admin`: changes of keys, budgets and webhooks, and refused authentications, newest first.
pub async fn list(request: &Request, _caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let kind = query.value("kind", |word| choice(&["admin"])(word.into()))?;
    if kind.is_none() {
        return Err(Problem::BadRequest(
            "This version has the audit of kind=admin only".into(),
        ));
    }
    // As the Python service did: more than is shown at most is as much as is shown at most.
    let limit = query
        .integer("limit", 1..=i64::MAX)?
        .unwrap_or(50)
        .min(LARGEST_PAGE);
    let before = query.integer("before", 0..=i64::MAX)?.unwrap_or(0);
    let actor = query.text("user_id").unwrap_or_default();
    let rows = request.context.store.audit_entries(actor, before, limit).await?;
    let shown = rows.iter().map(show).collect::<Result<Vec<_>, _>>()?;
    let body = json!({
        "count": shown.len(),
        "data": shown,
        "user_id": query.text("user_id"),
        "meta": Meta::of(request),
    });
    reply::json(StatusCode::OK, &body)
}

fn show(row: &AuditRow) -> Result<Value, Problem> {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Ok(json!({
        "id": row.audit_number,
        "created_at": Timestamp(row.at.0),
        "user_id": text(&row.actor),
        "action": row.action,
        "object_id": text(&row.object_id),
        "address": text(&row.address),
        "request_id": text(&row.request_id),
        "count": row.times,
        "detail": serde_json::from_str::<Value>(&row.detail).map_err(Problem::internal)?,
    }))
}
