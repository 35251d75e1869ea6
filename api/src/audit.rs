//! Who changed what over HTTP, and the list of it.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;
use shared::clock::{self, Timestamp};
use shared::id::KeyId;
use shared::key::Scope;
use shared::storage::{AuditEntry, AuditRow, MessagesOf};
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply::{self, Meta};
use crate::http::request::fields::choice;
use crate::http::request::{Query, Request};
use crate::sessions::{self, Message};
use crate::usage;

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

/// `GET /audit`: the messages of the caller's sessions, newest first, as in the Python service. With `kind=admin`
/// changes.
pub async fn list(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let kind = query.value("kind", |word| choice(&["messages", "admin"])(word.into()))?;
    if kind == Some("admin") {
        caller.require(Scope::KeysAdmin)?;
        changes(context, request).await
    } else {
        messages(context, request, caller).await
    }
}

/// What was said in sessions.
async fn messages(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let owner = usage::owner(caller, &query)?;
    // Everybody's are an administrator's.
    let owner = owner.or_else(|| (!caller.admin).then(|| caller.key_id.clone()));
    let (before, limit) = (query.integer("before", 0..=i64::MAX)?, limit(&query)?);
    let of = owner.as_ref().map_or(MessagesOf::All, MessagesOf::Key);
    let messages = sessions::excerpts(context, of, before, limit).await?;
    let data = messages
        .into_iter()
        .map(|(message, exchange, job)| MessageView {
            session_rowid: exchange.session_number,
            session_name: exchange.session_name,
            user_id: job.key_id,
            message,
        })
        .collect::<Vec<_>>();
    let page = AuditPage {
        count: data.len(),
        data,
        meta: Meta::of(request),
        user_id: query.text("user_id"),
    };
    reply::json(StatusCode::OK, &page)
}

/// As the Python service did: more than is shown at most is as much as is shown at most.
fn limit(query: &Query) -> Result<i64, Problem> {
    let limit = query.integer("limit", 1..=i64::MAX)?;
    Ok(limit.unwrap_or(50).min(LARGEST_PAGE))
}

/// A message as the audit shows it.
#[derive(Debug, Serialize)]
pub struct MessageView {
    #[serde(flatten)]
    message: Message,
    session_rowid: i64,
    session_name: String,
    user_id: KeyId,
}

/// Changes of keys, budgets, webhooks and sessions, and refused authentications, newest first.
async fn changes(context: &Context, request: &Request) -> Result<Response, Problem> {
    let query = request.query();
    let limit = limit(&query)?;
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
struct AuditPage<'p, T> {
    count: usize,
    data: Vec<T>,
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
