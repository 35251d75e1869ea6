//! Sessions over HTTP: a named conversation whose jobs run one after the other in its own workspace.

use http::header::IF_NONE_MATCH;
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use shared::clock;
use shared::id::KeyId;
use shared::session::Session;
use warp::reply::Response;

use crate::caller::Caller;
use crate::jobs as job_routes;
use crate::problem::Problem;
use crate::reply::{self, Headers};
use crate::request::fields::{Fields, metadata, text};
use crate::request::{Request, Segment, headers};
use crate::settings::Settings;

/// `/api/v1/sessions`.
pub async fn collection(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    match request.method {
        Method::POST => create(request, caller).await,
        _ => list(request, caller).await,
    }
}

/// `/api/v1/sessions/{s}`.
pub async fn item(request: &Request, caller: &Caller, name: &Segment) -> Result<Response, Problem> {
    let session = find(request, caller, name).await?;
    reply::data(request, StatusCode::OK, show(request, &session).await?)
}

/// `/api/v1/sessions/{s}/jobs`.
pub async fn jobs(request: &Request, caller: &Caller, name: &Segment) -> Result<Response, Problem> {
    let session = find(request, caller, name).await?;
    match request.method {
        Method::POST => job_routes::submit_in_session(request, caller, session).await,
        _ => job_routes::list_of_session(request, &session).await,
    }
}

/// The caller's session that `text` names: by its name, its number or the id of its Claude session. An admin who has
/// none of that name gets another owner's.
pub async fn named(request: &Request, caller: &Caller, text: &str) -> Result<Option<Session>, Problem> {
    let store = &request.context.store;
    match store.session(Some(&caller.key_id), text).await? {
        None if caller.admin => Ok(store.session(None, text).await?),
        found => Ok(found),
    }
}

/// What the session's jobs are run with, unless they say otherwise.
pub fn settings(session: &Session) -> Result<Settings, Problem> {
    Ok(stored(session)?.settings)
}

/// What the table holds about a session beside its row.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Stored {
    #[serde(flatten)]
    settings: Settings,
    metadata: Map<String, Value>,
}

fn stored(session: &Session) -> Result<Stored, Problem> {
    serde_json::from_str(&session.settings).map_err(Problem::internal)
}

async fn find(request: &Request, caller: &Caller, name: &Segment) -> Result<Session, Problem> {
    named(request, caller, name.as_ref())
        .await?
        .ok_or(Problem::NoSuch("Session"))
}

/// `POST /sessions`: makes the session, or gives the one of that name new settings; its conversation goes on.
async fn create(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let context = &request.context;
    let body = request.json().await?.fields()?;
    let wish = Wish::read(body, &context.config)?;
    wish.allowed_to(caller)?;
    let settings = serde_json::to_string(&wish.stored).map_err(Problem::internal)?;
    let mut tx = context.store.begin().await?;
    let (session, new) = tx
        .put_session(&caller.key_id, &wish.name, &settings, clock::now())
        .await?;
    if !new && headers::text(&request.headers, IF_NONE_MATCH.as_str()) == Some("*") {
        tx.rollback().await?;
        return Err(Problem::PreconditionFailed("A session of this name exists"));
    }
    tx.commit().await?;
    let response = reply::data(request, StatusCode::CREATED, show(request, &session).await?)?;
    Ok(response.location(&format!("/api/v1/sessions/{}", session.session_number)))
}

/// `GET /sessions`: the caller's sessions, last touched first, a page of them. An admin sees everybody's, or those of
/// `user_id`.
async fn list(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    // As the Python service did: what is out of range is moved into it.
    let page = query
        .integer("page", i64::MIN..=i64::MAX)?
        .unwrap_or(1)
        .clamp(1, 1_000_000);
    let limit = query
        .integer("limit", i64::MIN..=i64::MAX)?
        .unwrap_or(20)
        .clamp(1, 100);
    let named = query
        .text("user_id")
        .filter(|user| *user != "default")
        .map(KeyId::known);
    let owner = if caller.admin {
        named.as_ref()
    } else {
        Some(&caller.key_id)
    };
    let (sessions, total) = request
        .context
        .store
        .sessions(owner, (page - 1) * limit, limit)
        .await?;
    let mut shown = Vec::with_capacity(sessions.len());
    for session in &sessions {
        shown.push(show(request, session).await?);
    }
    let pages = total.saturating_add(limit - 1) / limit;
    reply::list(
        request,
        shown,
        json!({"total": total, "page": page, "limit": limit, "pages": pages}),
    )
}

/// A session as clients see it.
async fn show(request: &Request, session: &Session) -> Result<Value, Problem> {
    let Stored { settings, metadata } = stored(session)?;
    let (queued_jobs, active_job) = request.context.store.session_jobs(session.session_id).await?;
    Ok(json!({
        "id": session.session_number,
        "name": session.name,
        "user_id": session.key_id,
        // As its jobs see it.
        "working_dir": "/workspace",
        "system_prompt": settings.system_prompt,
        "model": settings.model,
        "max_turns": settings.max_turns,
        "permission_mode": settings.permission_mode,
        "effort": settings.effort,
        "allowed_tools": settings.allowed_tools.map(|names| names.join(",")),
        "disallowed_tools": settings.disallowed_tools.map(|names| names.join(",")),
        "max_cost_usd": settings.max_cost_usd,
        "metadata": metadata,
        "status": if session.claude_session_id.is_some() { "active" } else { "pending" },
        "claude_session_id": session.claude_session_id,
        "total_cost": session.total_cost,
        "total_turns": session.total_turns,
        "active_job": active_job,
        "queued_jobs": queued_jobs,
        "created_at": session.created_at,
        "updated_at": session.updated_at,
    }))
}

/// What a client wants of a session.
#[derive(Debug)]
struct Wish {
    name: String,
    user_id: Option<String>,
    stored: Stored,
}

impl Wish {
    fn read(mut body: Fields, config: &crate::config::Config) -> Result<Self, Problem> {
        let name = body.required("name", text(1..=128));
        let user_id = body.optional("user_id", text(0..=128));
        let settings = Settings::read(&mut body, "system_prompt", config);
        let metadata = body.optional("metadata", metadata).unwrap_or_default();
        let template = body.optional("template", text(1..=128));
        let wish = name.map(|name| Self {
            name,
            user_id,
            stored: Stored { settings, metadata },
        });
        let wish = body.finish(wish)?;
        if let Some(name) = template {
            return Err(Problem::NoSuchTemplate(name));
        }
        if !is_name(&wish.name) {
            return Err(Problem::BadRequest("Invalid project name".into()));
        }
        Ok(wish)
    }

    /// Refuses what the caller may not ask for.
    fn allowed_to(&self, caller: &Caller) -> Result<(), Problem> {
        let own = |user: &String| user == "default" || user.as_str() == caller.key_id.as_str();
        if !self.user_id.as_ref().is_none_or(own) {
            return Err(Problem::AdminOnly("make sessions for others"));
        }
        self.stored.settings.allowed_to(caller)
    }
}

/// Letters and digits of any script, then also blanks and `._-`; no dots that lead anywhere.
fn is_name(name: &str) -> bool {
    let begins_well = name.chars().next().is_some_and(char::is_alphanumeric);
    let inside = |char: char| char.is_alphanumeric() || " ._-".contains(char);
    begins_well && !name.contains("..") && name.chars().all(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        for name in ["a", "Projekt 7", "café.v2", "データ", "a_b-c"] {
            assert!(is_name(name), "{name}");
        }
        for name in [
            "", ".hidden", "a/b", "a..b", "-a", " a", "a\n", "a\0", "../x", "a:b",
        ] {
            assert!(!is_name(name), "{name:?}");
        }
    }

    #[test]
    fn settings_and_metadata_share_a_column() {
        let text = r#"{"model":"opus","metadata":{"a":"b"}}"#;
        let stored: Stored = serde_json::from_str(text).unwrap();
        assert_eq!(stored.settings.model.as_deref(), Some("opus"));
        assert_eq!(stored.metadata["a"], "b");
    }
}
