//! Creates, finds and lists sessions.

use super::columns::columns;
use super::{Result, Store, Tx, fetch, read};
use crate::clock::Timestamp;
use crate::id::{KeyId, SessionId};
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
    /// Finds the owner's session (`None`: of any owner) that `text` identifies: by name, then by number, then by the id of
    /// its Claude session.
    pub async fn session(&self, key_id: Option<&KeyId>, text: &str) -> Result<Option<Session>> {
        let owner = key_id.map_or("", KeyId::as_str);
        let number = text.parse::<i64>().ok();
        // No name is a number, and one that was shouldn't hide another's session.
        if number.is_none() {
            let by_name = read!(
                self,
                "read a session",
                fetch_optional => Session,
                concat!("select ", columns!(Session), " from session where name = $1 and (key_id = $2 or $2 = '') order by session_number desc limit 1"),
                text,
                owner
            )?;
            if by_name.is_some() {
                return Ok(by_name);
            }
        }
        read!(
            self,
            "read a session",
            fetch_optional => Session,
            concat!("select ", columns!(Session), " from session where (session_number = $1 or claude_session_id = $2) and (key_id = $3 or $3 = '')
             order by session_number desc limit 1"),
            number.unwrap_or(-1),
            text,
            owner
        )
    }

    /// The session with this id.
    pub async fn session_by_id(&self, session_id: SessionId) -> Result<Option<Session>> {
        read!(self, "read a session", fetch_optional => Session, concat!("select ", columns!(Session), " from session where session_id = $1"), session_id)
    }

    /// A page of the owner's sessions (`None`: of all owners), most recently used first, and their total number.
    pub async fn sessions(
        &self,
        key_id: Option<&KeyId>,
        offset: i64,
        limit: i64,
    ) -> Result<(Vec<Session>, i64)> {
        let owner = key_id.map_or("", KeyId::as_str);
        let sessions = read!(
            self,
            "list sessions",
            fetch_all => Session,
            concat!("select ", columns!(Session), " from session where key_id = $1 or $1 = ''
             order by updated_at desc, session_number desc limit $2 offset $3"),
            owner,
            limit,
            offset
        )?;
        let (total,) = read!(
            self,
            "count sessions",
            fetch_one => (i64,),
            "select count(*) from session where key_id = $1 or $1 = ''",
            owner
        )?;
        Ok((sessions, total))
    }

    /// The number of queued jobs of the session, and the id of its running job.
    pub async fn session_jobs(&self, session_id: SessionId) -> Result<(i64, Option<crate::id::JobId>)> {
        let (queued,) = read!(
            self,
            "count a session's jobs",
            fetch_one => (i64,),
            "select count(*) from job where session_id = $1 and session_id is not null and status = 'queued'",
            session_id
        )?;
        let active = read!(
            self,
            "find a session's running job",
            fetch_optional => (crate::id::JobId,),
            "select job_id from job where session_id = $1 and session_id is not null and status = 'running'
             order by job_number limit 1",
            session_id
        )?;
        Ok((queued, active.map(|row| row.0)))
    }
}
