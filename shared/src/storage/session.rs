//! Creates, finds and lists sessions.

use super::columns::columns;
use super::usage::counted;
use super::{Result, Store, Tx, fetch, read};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId, SessionId};
use crate::session::Session;

impl Tx {
    /// Creates the owner's session with this name, or replaces the settings of the existing one and keeps its
    /// conversation. Returns the session and whether it is new.
    pub async fn put_session(
        &mut self,
        key_id: &KeyId,
        name: &str,
        settings: &str,
        now: Timestamp,
    ) -> Result<(Session, bool)> {
        let session_id = SessionId::new();
        let session = fetch!(
            self,
            "store a session",
            fetch_one => Session,
            concat!("insert into session (session_id, key_id, name, settings, created_at, updated_at)
             values ($1, $2, $3, $4, $5, $5)
             on conflict (key_id, name) do update set settings = excluded.settings, updated_at = excluded.updated_at
             returning ", columns!(Session)),
            session_id,
            key_id,
            name,
            settings,
            now
        )?;
        let new = session.session_id == session_id;
        Ok((session, new))
    }
}

impl Store {
    /// The number of a session, by which clients of the Python service know it.
    pub async fn session_number(&self, session_id: SessionId) -> Result<Option<i64>> {
        let row = read!(
            self,
            "read a session's number",
            fetch_optional => (i64,),
            "select session_number from session where session_id = $1",
            session_id
        )?;
        Ok(row.map(|row| row.0))
    }

    /// Finds the owner's session (`None`: of any owner) that `text` identifies: by name, then by number, then by the id of
    /// its Claude session.
    pub async fn session(&self, key_id: Option<&KeyId>, text: &str) -> Result<Option<Session>> {
        let owner = key_id.map_or("", KeyId::as_str);
        let number = text.parse::<i64>().ok();
        // No name is a number, and one that was shouldn't hide another's session.
        if number.is_none() {
            // Two statements, because each uses its own index.
            let sql = match key_id {
                Some(_) => concat!(
                    "select ",
                    columns!(Session),
                    " from session where name = $1 and key_id = $2"
                ),
                None => concat!(
                    "select ",
                    columns!(Session),
                    " from session where name = $1 and $2 = '' order by session_number desc limit 1"
                ),
            };
            let by_name = read!(self, "read a session", fetch_optional => Session, sql, text, owner)?;
            if by_name.is_some() {
                return Ok(by_name);
            }
        }
        read!(
            self,
            "read a session",
            fetch_optional => Session,
            concat!(
                "select ",
                columns!(Session),
                " from (
                   select ",
                columns!(Session),
                " from session where session_number = $1
                   union all
                   select ",
                columns!(Session),
                " from session where claude_session_id = $2 and claude_session_id is not null
                 ) as session
                 where key_id = $3 or $3 = '' order by session_number desc limit 1"
            ),
            number.unwrap_or(-1),
            text,
            owner
        )
    }

    /// A page of the owner's sessions (`None`: of all owners), most recently used first, and their total number.
    pub async fn sessions(
        &self,
        key_id: Option<&KeyId>,
        offset: i64,
        limit: i64,
    ) -> Result<(Vec<Session>, i64)> {
        let owner = key_id.map_or("*", KeyId::as_str);
        let sql = if key_id.is_some() {
            SESSIONS_OF_KEY
        } else {
            SESSIONS_OF_ALL
        };
        let sessions = read!(self, "list sessions", fetch_all => Session, sql, owner, limit, offset)?;
        let (total,) = read!(self, "count sessions", fetch_one => (i64,), COUNT_SESSIONS, owner)?;
        Ok((sessions, total))
    }

    /// The number of queued jobs of the session, and the id of its running job.
    pub async fn session_jobs(&self, session: &Session) -> Result<(i64, Option<JobId>)> {
        let (queued, active) = read!(
            self,
            "count a session's jobs",
            fetch_one => (i64, Option<JobId>),
            "select count(case when status = 'queued' then 1 end), min(case when status = 'running' then job_id end)
             from job
             where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')",
            &session.key_id,
            format!("s:{}", session.session_id)
        )?;
        Ok((queued, active))
    }
}

macro_rules! sessions {
    ($of:literal) => {
        concat!(
            "select ",
            columns!(Session),
            " from session where ",
            $of,
            " order by updated_at desc, session_number desc limit $2 offset $3"
        )
    };
}

#[doc(hidden)]
pub const SESSIONS_OF_KEY: &str = sessions!("key_id = $1");
#[doc(hidden)]
pub const SESSIONS_OF_ALL: &str = sessions!("$1 = '*'");

/// Counted sessions, and those that aren't yet.
const COUNT_SESSIONS: &str = concat!(
    "select cast(coalesce(sum(value), 0) as bigint) from (
       select value from usage_total where key_id = $1 and name = 'sessions'
       union all
       select 1 from session where session_number > ",
    counted!("session"),
    " and ($1 = '*' or key_id || '' = $1)) as counts"
);
