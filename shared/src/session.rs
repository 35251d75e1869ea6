//! A session: a named conversation with its own workspace, whose jobs run one at a time.

use crate::clock::Timestamp;
use crate::id::{KeyId, SessionId};
use crate::money::MicroUsd;

/// A session as it is stored. The settings are the defaults of its jobs.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Session {
    /// A number by which clients may also address it, in order of creation.
    pub session_number: i64,
    /// The name of its directory under `DATA_DIR/sessions`.
    pub session_id: SessionId,
    /// The owner.
    pub key_id: KeyId,
    /// Unique among the owner's sessions; 1 to 128 characters.
    pub name: String,
    /// Settings, as JSON: `system_prompt model max_turns permission_mode effort allowed_tools disallowed_tools
    /// max_cost_usd metadata`.
    pub settings: String,
    /// The Claude session that the next job resumes; `None` before the first job has run.
    pub claude_session_id: Option<String>,
    /// What its jobs have cost.
    pub total_cost: MicroUsd,
    /// The turns of its jobs.
    pub total_turns: i64,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last used or changed.
    pub updated_at: Timestamp,
    /// The folder of the host in which its jobs work; `None`: a folder of its own.
    pub working_dir: Option<String>,
    /// Grows with every change of its settings.
    pub version: i64,
}
