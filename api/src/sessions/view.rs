//! A session as clients see it.

use serde::Serialize;
use serde_json::{Map, Value};
use shared::clock::Timestamp;
use shared::id::{JobId, KeyId};
use shared::money::MicroUsd;
use shared::session::Session;

use super::{Stored, stored};
use crate::context::Context;
use crate::http::problem::Problem;

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
    /// As its jobs see it; after `repo`, as the workers see it.
    working_dir: String,
}

impl SessionView {
    pub(super) async fn of(context: &Context, session: &Session) -> Result<Self, Problem> {
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
            working_dir: session
                .working_dir
                .clone()
                .unwrap_or_else(|| "/workspace".to_owned()),
        })
    }
}
