//! Sessions over HTTP: a named conversation whose jobs run one after the other in its own workspace.

use http::header::IF_NONE_MATCH;
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shared::clock::{self, Timestamp};
use shared::id::{JobId, KeyId};
use shared::money::MicroUsd;
use shared::session::Session;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;
use uuid::Uuid;
use warp::reply::Response;

use crate::config::Config;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers};
use crate::http::request::fields::{Fields, metadata, text};
use crate::http::request::{Request, Segment, headers};
use crate::settings::Settings;

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
    reply::data(request, StatusCode::OK, SessionView::of(context, &session).await?)
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

/// The caller's session of this name; a problem if there is none.
pub async fn find(context: &Context, caller: &Caller, name: &str) -> Result<Session, Problem> {
    named(context, caller, name)
        .await?
        .ok_or(Problem::NoSuch("Session"))
}

/// `POST /sessions`: makes the session, or gives the one of that name new settings; its conversation goes on.
async fn create(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let body = request.json().await?.fields()?;
    let wanted = SessionRequest::read(body, &context.config)?;
    wanted.allowed_to(caller, &context.config)?;
    let settings = serde_json::to_string(&wanted.stored).map_err(Problem::internal)?;
    let mut tx = context.store.begin().await?;
    let (session, new) = tx
        .put_session(&caller.key_id, &wanted.name, &settings, clock::now())
        .await?;
    if !new && headers::text(&request.headers, IF_NONE_MATCH.as_str()) == Some("*") {
        tx.rollback().await?;
        return Err(Problem::PreconditionFailed("A session of this name exists"));
    }
    tx.commit().await?;
    let response = reply::data(
        request,
        StatusCode::CREATED,
        SessionView::of(context, &session).await?,
    )?;
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

/// A session as clients see it.
#[derive(Debug, Serialize)]
pub struct SessionView {
    active_job: Option<JobId>,
    allowed_tools: Option<String>,
    claude_session_id: Option<String>,
    created_at: Timestamp,
    disallowed_tools: Option<String>,
    effort: Option<String>,
    id: i64,
    key_id: KeyId,
    max_cost_usd: Option<MicroUsd>,
    max_turns: Option<i64>,
    metadata: Map<String, Value>,
    model: Option<String>,
    name: String,
    permission_mode: Option<String>,
    queued_jobs: i64,
    status: &'static str,
    system_prompt: Option<String>,
    total_cost: MicroUsd,
    total_turns: i64,
    updated_at: Timestamp,
    user_id: KeyId,
    /// As its jobs see it.
    working_dir: &'static str,
}

impl SessionView {
    async fn of(context: &Context, session: &Session) -> Result<Self, Problem> {
        let Stored { settings, metadata } = stored(session)?;
        let (queued_jobs, active_job) = context.store.session_jobs(session).await?;
        Ok(Self {
            active_job,
            allowed_tools: settings.allowed_tools.map(|names| names.join(",")),
            claude_session_id: session.claude_session_id.clone(),
            created_at: session.created_at,
            disallowed_tools: settings.disallowed_tools.map(|names| names.join(",")),
            effort: settings.effort,
            id: session.session_number,
            key_id: session.key_id.clone(),
            max_cost_usd: settings.max_cost_usd,
            max_turns: settings.max_turns,
            metadata,
            model: settings.model,
            name: session.name.clone(),
            permission_mode: settings.permission_mode,
            queued_jobs,
            status: if session.claude_session_id.is_some() {
                "active"
            } else {
                "pending"
            },
            system_prompt: settings.system_prompt,
            total_cost: session.total_cost,
            total_turns: session.total_turns,
            updated_at: session.updated_at,
            user_id: session.key_id.clone(),
            working_dir: "/workspace",
        })
    }
}

/// The `pagination` of the list, in the form of the Python service.
#[derive(Debug, Serialize)]
struct Numbers {
    limit: i64,
    page: i64,
    pages: i64,
    total: i64,
}

/// The names of the members of a request for a session, in the order in which they are read.
pub const MEMBERS: &[&str] = &[
    "name",
    "user_id",
    "system_prompt",
    "model",
    "max_turns",
    "permission_mode",
    "effort",
    "allowed_tools",
    "disallowed_tools",
    "max_cost_usd",
    "metadata",
    "template",
];

/// The body of a request for a session.
#[derive(Debug)]
struct SessionRequest {
    name: String,
    user_id: Option<String>,
    stored: Stored,
}

impl SessionRequest {
    fn read(mut body: Fields, config: &Config) -> Result<Self, Problem> {
        let (wanted, template) = Self::members(&mut body, config);
        let wanted = body.finish(wanted)?;
        if let Some(name) = template {
            return Err(Problem::NoSuchTemplate(name));
        }
        if let Err(why) = check_name(&wanted.name) {
            return Err(Problem::BadRequest(why.into()));
        }
        Ok(wanted)
    }

    /// Reads the members, and the template that is named. `None` means that the name was a fault.
    fn members(body: &mut Fields, config: &Config) -> (Option<Self>, Option<String>) {
        let name = body.required("name", text(1..=128));
        let user_id = body.optional("user_id", text(0..=128));
        let settings = Settings::read(body, "system_prompt", config);
        let metadata = body.optional("metadata", metadata).unwrap_or_default();
        let template = body.optional("template", text(1..=128));
        let wanted = name.map(|name| Self {
            name: normal(&name),
            user_id,
            stored: Stored { settings, metadata },
        });
        (wanted, template)
    }

    /// Refuses what the caller may not ask for.
    fn allowed_to(&self, caller: &Caller, config: &Config) -> Result<(), Problem> {
        let own = |user: &String| user == "default" || user.as_str() == caller.key_id.as_str();
        if !self.user_id.as_ref().is_none_or(own) {
            return Err(Problem::AdminOnly("make sessions for others"));
        }
        self.stored.settings.allowed_to(caller, &config.aliases)
    }
}

/// The one spelling (NFC) of a name that can be typed in more than one way.
fn normal(name: &str) -> String {
    name.nfc().collect()
}

/// Letters, marks and digits of any script, then also blanks and `._-`; no dots that lead anywhere. Nothing that a
/// session is found by beside its name.
fn check_name(name: &str) -> Result<(), &'static str> {
    let begins_well = name.chars().next().is_some_and(char::is_alphanumeric);
    let inside = |char: char| char.is_alphanumeric() || is_combining_mark(char) || " ._-".contains(char);
    if !begins_well || name.contains("..") || !name.chars().all(inside) {
        return Err(
            "Invalid project name: it should begin with a letter or digit and hold only letters, digits, blanks, \
             dots, hyphens and underscores",
        );
    }
    if name.chars().all(char::is_numeric) {
        return Err("Invalid project name: all digits are the number of a session; add a letter");
    }
    if Uuid::try_parse(name).is_ok() {
        return Err("Invalid project name: a UUID is the id of a Claude session; choose another name");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_members_that_are_read_are_those_that_are_listed() {
        let mut body = Fields::of("body", serde_json::json!({})).unwrap();
        SessionRequest::members(&mut body, &Config::default());
        assert_eq!(body.known(), MEMBERS);
    }

    #[test]
    fn names_are_plain_in_any_script() {
        for name in [
            "a",
            "Projekt 7",
            "café.v2",
            "データ",
            "हिन्दी",
            "தமிழ்",
            "cafe\u{301}",
            "a_b-c",
            "7a",
        ] {
            assert_eq!(check_name(&normal(name)), Ok(()), "{name}");
        }
        for name in [
            "",
            ".hidden",
            "a/b",
            "a..b",
            "-a",
            " a",
            "a\n",
            "a\0",
            "../x",
            "a:b",
            "\u{301}a",
            "3",
            "007",
            "٣",
            "5f0c1c3e-2b1f-4d0e-9a0e-0f7d6b1f2a3c",
            "5f0c1c3e2b1f4d0e9a0e0f7d6b1f2a3c",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert_eq!(normal("cafe\u{301}"), "café");
    }

    #[test]
    fn settings_and_metadata_share_a_column() {
        let text = r#"{"model":"opus","metadata":{"a":"b"}}"#;
        let stored: Stored = serde_json::from_str(text).unwrap();
        assert_eq!(stored.settings.model.as_deref(), Some("opus"));
        assert_eq!(stored.metadata["a"], "b");
    }
}
