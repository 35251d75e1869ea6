//! Sessions: created, changed, found, listed, deleted; and their messages.

use super::columns::columns;
use super::macros::lock;
use super::{Result, Store, Tx, execute, fetch, fetch_locked, read};
use crate::clock::{self, Timestamp};
use crate::id::{JobId, KeyId, SessionId};
use crate::job::CancelReason;
use crate::session::Session;

/// Sessions that are looked at for one that may give way to a new one.
const EVICTION_CANDIDATES: i64 = 100;

/// A job whose prompt and answer are messages of its session.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Exchange {
    /// Orders the messages.
    pub job_number: i64,
    /// The job.
    pub job_id: JobId,
    /// Its session's number.
    pub session_number: i64,
    /// Its session's name.
    pub session_name: String,
    /// Whether there is an answer.
    pub answered: bool,
}

/// Whose messages are read.
#[derive(Clone, Copy, Debug)]
pub enum MessagesOf<'k> {
    /// Of one session.
    Session(SessionId),
    /// Of all sessions of a key.
    Key(&'k KeyId),
    /// Of everybody.
    All,
}

impl Tx {
    /// Creates the owner's session with this name, or replaces the settings of the existing one. That keeps its
    /// conversation, unless it was last used before `forgotten_before`. Returns the session and whether it is new.
    pub async fn put_session(
        &mut self,
        key_id: &KeyId,
        name: &str,
        settings: &str,
        forgotten_before: Timestamp,
        now: Timestamp,
    ) -> Result<(Session, bool)> {
        let session_id = SessionId::new();
        let session = fetch!(
            self,
            "store a session",
            fetch_one => Session,
            concat!("insert into session (session_id, key_id, name, settings, created_at, updated_at)
             values ($1, $2, $3, $4, $5, $5)
             on conflict (key_id, name) where deleted_at is null do update set settings = excluded.settings,
               claude_session_id = case when session.updated_at >= $6 then session.claude_session_id end,
               updated_at = excluded.updated_at, version = session.version + 1
             returning ", columns!(Session)),
            session_id,
            key_id,
            name,
            settings,
            now,
            forgotten_before
        )?;
        let new = session.session_id == session_id;
        Ok((session, new))
    }

    /// Deletes the owner's least recently used sessions until there are at most `max`, beside this new one only such as no
    /// job waits or runs in. Returns them; `None` if too many are in use.
    pub async fn limit_sessions(
        &mut self,
        new: &Session,
        max: i64,
        now: Timestamp,
    ) -> Result<Option<Vec<Session>>> {
        let key_id = &new.key_id;
        // Two new sessions at once would both be the last that fits.
        self.postgres_lock(lock!("", "hashtext($1)", of = sessions), Some(key_id.to_string()))
            .await?;
        let (count,) = fetch!(
            self,
            "count sessions",
            fetch_one => (i64,),
            "select count(*) from session where key_id = $1 and deleted_at is null",
            key_id
        )?;
        let mut surplus = count - max;
        let mut evicted = Vec::new();
        if surplus <= 0 {
            return Ok(Some(evicted));
        }
        let candidates = fetch!(
            self,
            "look for idle sessions",
            fetch_all => (SessionId,),
            "select session_id from session
             where key_id = $1 and deleted_at is null and session_id <> $2 and not exists (
               select 1 from job where job.key_id = $1 and job.group_key = 's:' || session.session_id
                 and job.group_key is not null and job.status in ('queued', 'running'))
             order by updated_at, session_number limit $3",
            key_id,
            new.session_id,
            EVICTION_CANDIDATES
        )?;
        for (session_id,) in candidates {
            if surplus <= 0 {
                break;
            }
            // A job of it may have been accepted meanwhile: looked at again under the lock that each submission takes.
            if let Some(session) = self.lock_idle_session(session_id).await? {
                self.mark_deleted(session_id, now).await?;
                evicted.push(session);
                surplus -= 1;
            }
        }
        Ok((surplus <= 0).then_some(evicted))
    }

    async fn lock_idle_session(&mut self, session_id: SessionId) -> Result<Option<Session>> {
        let session = fetch_locked!(
            self,
            "lock a session",
            fetch_optional => Session,
            concat!("select ", columns!(Session), " from session where session_id = $1 and deleted_at is null"),
            session_id
        )?;
        let Some(session) = session else { return Ok(None) };
        let idle = !self
            .has_earlier_in_group(&session.key_id, &group_of(session_id))
            .await?;
        Ok(idle.then_some(session))
    }

    async fn mark_deleted(&mut self, session_id: SessionId, now: Timestamp) -> Result<bool> {
        execute!(
            self,
            "delete a session",
            "update session set deleted_at = $2, remove_requested = true, settings = '{}', updated_at = $2
             where session_id = $1 and deleted_at is null",
            session_id,
            now
        )
        .map(|rows| rows > 0)
    }

    /// Records that a job is about to be accepted in this session; `false` when it was deleted. Until the transaction
    /// ends it can't be deleted.
    pub async fn use_session(&mut self, session_id: SessionId, now: Timestamp) -> Result<bool> {
        execute!(
            self,
            "use a session",
            "update session set updated_at = $2 where session_id = $1 and deleted_at is null",
            session_id,
            now
        )
        .map(|rows| rows > 0)
    }

    /// Changes the settings and the folder of a session, if its version is still this one.
    pub async fn change_session(&mut self, session: &Session, now: Timestamp) -> Result<Option<Session>> {
        fetch!(
            self,
            "change a session",
            fetch_optional => Session,
            concat!("update session set settings = $3, working_dir = $4, updated_at = $5, version = version + 1
             where session_id = $1 and version = $2 and deleted_at is null returning ", columns!(Session)),
            session.session_id,
            session.version,
            &session.settings,
            &session.working_dir,
            now
        )
    }
}

/// The group of a session's jobs.
fn group_of(session_id: SessionId) -> String {
    format!("s:{session_id}")
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
                    " from session where name = $1 and key_id = $2 and deleted_at is null"
                ),
                None => concat!(
                    "select ",
                    columns!(Session),
                    " from session where name = $1 and $2 = '' and deleted_at is null
                     order by session_number desc limit 1"
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
                " from session where session_number = $1 and deleted_at is null
                   union all
                   select ",
                columns!(Session),
                " from session where claude_session_id = $2 and claude_session_id is not null and deleted_at is null
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
            group_of(session.session_id)
        )?;
        Ok((queued, active))
    }

    /// Deletes a session; `false` if it was deleted before. Its jobs, their costs and results stay. No job is accepted in
    /// it any more; [`Store::cancel_jobs_of_session`] ends those that there are, and a worker removes its folder.
    pub async fn delete_session(&self, session_id: SessionId, now: Timestamp) -> Result<bool> {
        let mut tx = self.begin().await?;
        let deleted = tx.mark_deleted(session_id, now).await?;
        tx.commit().await?;
        Ok(deleted)
    }

    /// Cancels all jobs of a deleted session that wait, asks the workers of the others to end them, and returns how many
    /// haven't ended.
    pub async fn cancel_jobs_of_session(&self, session: &Session) -> Result<usize> {
        loop {
            let jobs = read!(
                self,
                "list a session's jobs",
                fetch_all => (JobId, bool),
                "select job_id, status = 'running' from job
                 where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
                 order by job_number desc limit 500",
                &session.key_id,
                group_of(session.session_id)
            )?;
            for (job_id, _) in &jobs {
                self.cancel_job(*job_id, CancelReason::SessionDeleted, clock::now())
                    .await?;
            }
            // Of those that wait none is left after one look; those that run take a while.
            let running = jobs.iter().filter(|(_, running)| *running).count();
            if running == jobs.len() {
                return Ok(running);
            }
        }
    }

    /// Up to 100 deleted sessions whose folders are still there, after the one with this number.
    pub async fn sessions_to_remove(&self, after: i64) -> Result<Vec<Session>> {
        read!(
            self,
            "look for sessions to remove",
            fetch_all => Session,
            concat!("select ", columns!(Session), " from session where remove_requested and session_number > $1
             order by session_number limit 100"),
            after
        )
    }

    /// Records that the folder of a deleted session was removed.
    pub async fn session_removed(&self, session_id: SessionId) -> Result<()> {
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "note that a session's folder is gone",
            "update session set remove_requested = false where session_id = $1",
            session_id
        )?;
        tx.commit().await
    }

    /// Up to `limit` jobs, the newest first, not newer than this number, whose prompts and answers are messages.
    pub async fn exchanges(&self, of: MessagesOf<'_>, newest: i64, limit: i64) -> Result<Vec<Exchange>> {
        let name = match of {
            MessagesOf::Session(session_id) => session_id.to_string(),
            MessagesOf::Key(key_id) => key_id.to_string(),
            MessagesOf::All => "*".to_owned(),
        };
        let sql = match of {
            MessagesOf::Session(_) => EXCHANGES_OF_SESSION,
            MessagesOf::Key(_) => EXCHANGES_OF_KEY,
            MessagesOf::All => EXCHANGES_OF_ALL,
        };
        read!(self, "list messages", fetch_all => Exchange, sql, name, newest, limit)
    }
}

macro_rules! exchanges {
    ($of:literal) => {
        concat!(
            "select job_number, job_id, session_number, session.name as session_name,
               exists (select 1 from result where result.job_id = job.job_id) as answered
             from job join session on session.session_id = job.session_id
             where ",
            $of,
            " and job.session_id is not null and started_at is not null and not data_removed
               and status in ('done', 'failed', 'cancelled') and job_number <= $2
             order by job_number desc limit $3"
        )
    };
}

#[doc(hidden)]
pub const EXCHANGES_OF_SESSION: &str = exchanges!("job.session_id = $1");
#[doc(hidden)]
pub const EXCHANGES_OF_KEY: &str = exchanges!("job.key_id = $1");
#[doc(hidden)]
pub const EXCHANGES_OF_ALL: &str = exchanges!("$1 = '*'");

macro_rules! sessions {
    ($of:literal) => {
        concat!(
            "select ",
            columns!(Session),
            " from session where ",
            $of,
            " and deleted_at is null order by updated_at desc, session_number desc limit $2 offset $3"
        )
    };
}

#[doc(hidden)]
pub const SESSIONS_OF_KEY: &str = sessions!("key_id = $1");
#[doc(hidden)]
pub const SESSIONS_OF_ALL: &str = sessions!("$1 = '*'");

/// A key has few sessions (`MAX_SESSIONS_PER_USER`), and an index of those that aren't deleted.
const COUNT_SESSIONS: &str =
    "select count(*) from session where (key_id = $1 or $1 = '*') and deleted_at is null";
