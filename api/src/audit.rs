//! Who changed what over HTTP, and the list of it.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;
use shared::clock::{self, Timestamp};
use shared::storage::{AuditEntry, AuditRow};
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply::{self, Meta};
use crate::http::request::Request;
use crate::http::request::fields::choice;

/// So many entries are shown at most; more are asked for page by page.
const LARGEST_PAGE: i64 = 200;

/// What is noted about a change that this request makes.
pub fn entry(
    context: &Context,
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
        address: context.client(request).to_string(),
        request_id: request.id.clone(),
        detail,
    }
}

/// `GET /audit?kind=admin`: changes of keys, budgets and webhooks, and refused authentications, newest first.
pub async fn list(context: &Context, request: &Request, _caller: &Caller) -> Result<Response, Problem> {
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
    let rows = context.store.audit_entries(actor, before, limit).await?;
    let data = rows.iter().map(AuditView::of).collect::<Result<Vec<_>, _>>()?;
    let page = AuditPage {
        count: data.len(),
        data,
        meta: Meta::of(request),
        user_id: query.text("user_id"),
    };
    reply::json(StatusCode::OK, &page)
}

/// The list, in the form of the Python service.
#[derive(Debug, Serialize)]
struct AuditPage<'p> {
    count: usize,
    data: Vec<AuditView<'p>>,
    meta: Meta<'p>,
    user_id: Option<&'p str>,
}

/// An entry as clients see it.
#[derive(Debug, Serialize)]
pub struct AuditView<'r> {
    action: &'r str,
    address: Option<&'r str>,
    count: i64,
    created_at: Timestamp,
    detail: Value,
    id: i64,
    object_id: Option<&'r str>,
    request_id: Option<&'r str>,
    user_id: Option<&'r str>,
}

impl<'r> AuditView<'r> {
    fn of(row: &'r AuditRow) -> Result<Self, Problem> {
        let text = |text: &'r String| Some(text.as_str()).filter(|text| !text.is_empty());
        Ok(Self {
            action: &row.action,
            address: text(&row.address),
            count: row.times,
            created_at: Timestamp(row.at.0),
            detail: serde_json::from_str(&row.detail).map_err(Problem::internal)?,
            id: row.audit_number,
            object_id: text(&row.object_id),
            request_id: text(&row.request_id),
            user_id: text(&row.actor),
        })
    }
}
