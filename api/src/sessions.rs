//! Sessions over HTTP: a named conversation whose jobs run one after the other in its own workspace.

pub mod history;
mod request;
pub mod view;

use http::header::{IF_MATCH, IF_NONE_MATCH};
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use shared::id::KeyId;
use shared::session::Session;
use shared::{approved, clock};
use warp::reply::Response;

use crate::audit;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, etag};
use crate::http::request::{Request, Segment, headers};
use crate::settings::Settings;
use request::{SessionRequest, normal};
use view::SessionView;

pub use history::{Message, excerpts, history};
pub use request::MEMBERS;

/// `/api/v1/sessions`.
pub async fn collection(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    match request.method {
        Method::POST => create(context, request, caller).await,
        _ => list(context, request, caller).await,
    }
}

/// `/api/v1/sessions/{s}`.
pub async fn item(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let session = find(context, caller, name.as_ref()).await?;
    match request.method {
        Method::PATCH => change(context, request, caller, session).await,
        Method::DELETE => delete(context, request, caller, &session).await,
        _ => show(context, request, StatusCode::OK, &session).await,
    }
}

/// The session, with the tag of its settings. What its jobs do changes without the tag.
async fn show(
    context: &Context,
    request: &Request,
    status: StatusCode,
    session: &Session,
) -> Result<Response, Problem> {
    let response = reply::data(request, status, SessionView::of(context, session).await?)?;
    Ok(response.etag_unkept(&etag(session.version)))
}

/// `PATCH /sessions/{s}`: what the body names is set, or with null left to the service again.
async fn change(
    context: &Context,
    request: &Request,
    caller: &Caller,
    session: Session,
) -> Result<Response, Problem> {
    let body = request.json().await?.fields()?;
    check_version(request, &session)?;
    let mut wanted = stored(&session)?;
    request::change(body, &mut wanted, &context.config)?;
    wanted.settings.allowed_to(caller, &context.config.aliases)?;
    let settings = serde_json::to_string(&wanted).map_err(Problem::internal)?;
    let changed = put(context, &Session { settings, ..session }).await?;
    show(context, request, StatusCode::OK, &changed).await
}

/// Refuses a change of a state that the client hasn't seen.
fn check_version(request: &Request, session: &Session) -> Result<(), Problem> {
    match headers::text(&request.headers, IF_MATCH.as_str()) {
        Some(tags) if !headers::names_etag(tags, &etag(session.version)) => Err(CHANGED),
        _ => Ok(()),
    }
}

const CHANGED: Problem = Problem::PreconditionFailed("The session was changed meanwhile; read it again");

async fn put(context: &Context, session: &Session) -> Result<Session, Problem> {
    let mut tx = context.store.begin().await?;
    let changed = tx.change_session(session, clock::now()).await?;
    tx.commit().await?;
    changed.ok_or(CHANGED)
}

/// `DELETE /sessions/{s}`: its jobs are cancelled, and its own folder is removed when none of them runs any more. Jobs,
/// results and costs stay.
async fn delete(
    context: &Context,
    request: &Request,
    caller: &Caller,
    session: &Session,
) -> Result<Response, Problem> {
    check_version(request, session)?;
    if !context
        .store
        .delete_session(session.session_id, clock::now())
        .await?
    {
        return Err(Problem::NoSuch("Session"));
    }
    // What can't be done now is done by the workers: the session is deleted.
    if let Err(error) = context.store.cancel_jobs_of_session(session).await {
        context.report(&error.into());
    }
    tracing::info!(session.id = %session.session_id, key.id = %caller.key_id, request.id = %request.id, "session deleted");
    Ok(reply::empty(StatusCode::NO_CONTENT))
}

/// `POST /sessions/{s}/repo`: the session's jobs work in this folder, which they share with whoever else works there.
pub async fn repo(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let session = find(context, caller, name.as_ref()).await?;
    let working_dir = request::repo(request.json().await?.fields()?)?;
    let approved = context.config.approved_directory.clone();
    let resolved = tokio::task::spawn_blocking(move || approved::resolve(approved.as_deref(), &working_dir));
    let resolved = resolved.await.map_err(Problem::internal)?;
    let path = resolved.map_err(|refused| Problem::BadRequest(refused.to_string().into()))?;
    let working_dir = Some(path);
    let changed = put(
        context,
        &Session {
            working_dir,
            ..session
        },
    )
    .await?;
    show(context, request, StatusCode::OK, &changed).await
}

/// The caller's session that `text` names: by its name, its number or the id of its Claude session. An admin who has
/// none of that name gets another owner's.
pub async fn named(context: &Context, caller: &Caller, text: &str) -> Result<Option<Session>, Problem> {
    let (store, text) = (&context.store, &normal(text));
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
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Stored {
    #[serde(flatten)]
    settings: Settings,
    metadata: Map<String, Value>,
}

fn stored(session: &Session) -> Result<Stored, Problem> {
    serde_json::from_str(&session.settings).map_err(Problem::internal)
}

/// The caller's session of this name; a problem if there is none.
pub async fn find(context: &Context, caller: &Caller, name: &str) -> Result<Session, Problem> {
    named(context, caller, name)
        .await?
        .ok_or(Problem::NoSuch("Session"))
}

/// `POST /sessions`: makes the session, or gives the one of that name new settings; its conversation goes on.
async fn create(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let body = request.json().await?.fields()?;
    let mut wanted = SessionRequest::read(body, &context.config)?;
    if let Some(name) = wanted.template.take() {
        let template = context.templates.settings(&name)?;
        wanted.stored.settings = wanted.stored.settings.or(template);
    }
    wanted.allowed_to(caller, &context.config)?;
    let settings = serde_json::to_string(&wanted.stored).map_err(Problem::internal)?;
    let now = clock::now();
    let mut tx = context.store.begin().await?;
    let (session, new) = tx
        .put_session(
            &caller.key_id,
            &wanted.name,
            &settings,
            now.before(context.config.session_timeout),
            now,
        )
        .await?;
    if !new && headers::text(&request.headers, IF_NONE_MATCH.as_str()) == Some("*") {
        tx.rollback().await?;
        return Err(Problem::PreconditionFailed("A session of this name exists"));
    }
    if new {
        let max = context.config.max_sessions_per_user;
        let Some(evicted) = tx.limit_sessions(&session, max, now).await? else {
            tx.rollback().await?;
            return Err(Problem::TooManySessions(max));
        };
        for gone in &evicted {
            let detail = json!({ "name": gone.name, "number": gone.session_number, "for": session.name });
            let id = gone.session_id.to_string();
            tx.audit(&audit::entry(
                context,
                request,
                caller,
                "session.evict",
                &id,
                detail,
            ))
            .await?;
            tracing::info!(session.id = %id, key.id = %caller.key_id, "session evicted for a new one");
        }
    }
    tx.commit().await?;
    let response = show(context, request, StatusCode::CREATED, &session).await?;
    Ok(response.location(&format!("/api/v1/sessions/{}", session.session_number)))
}

/// `GET /sessions`: the caller's sessions, last touched first, a page of them. An admin sees everybody's, or those of
/// `user_id`.
async fn list(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
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
    let (sessions, total) = context.store.sessions(owner, (page - 1) * limit, limit).await?;
    let mut shown = Vec::with_capacity(sessions.len());
    for session in &sessions {
        shown.push(SessionView::of(context, session).await?);
    }
    let pages = total.saturating_add(limit - 1) / limit;
    reply::list(
        request,
        shown,
        Numbers {
            limit,
            page,
            pages,
            total,
        },
    )
}

/// The `pagination` of the list, in the form of the Python service.
#[derive(Debug, Serialize)]
struct Numbers {
    limit: i64,
    page: i64,
    pages: i64,
    total: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_metadata_share_a_column() {
        let text = r#"{"model":"opus","metadata":{"a":"b"}}"#;
        let stored: Stored = serde_json::from_str(text).unwrap();
        assert_eq!(stored.settings.model.as_deref(), Some("opus"));
        assert_eq!(stored.metadata["a"], "b");
    }
}
