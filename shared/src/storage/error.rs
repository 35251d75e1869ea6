//! What the database couldn't do.

use sqlx::error::DatabaseError;
use std::path::Path;
use std::sync::Arc;

/// The operation that makes a transaction's changes so.
pub(super) const COMMIT: &str = "commit";

/// A database operation failed. Its `Display` names the operation; the cause is the source.
#[derive(Debug, thiserror::Error)]
#[error("could not {operation}")]
pub struct Error {
    operation: &'static str,
    #[source]
    cause: Cause,
}

/// Why.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    /// The database or the way to it.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// The same, of a transaction that several shared.
    #[error(transparent)]
    Shared(#[from] Arc<sqlx::Error>),
    /// The way to PostgreSQL when this process starts. Never names a user or a password.
    #[error("{place} (DATABASE_URL): {said}")]
    Connection {
        /// The host, the port and the database.
        place: String,
        /// What happened there, for people.
        said: String,
        /// The same for programs.
        reason: sqlx::Error,
    },
    /// The migrations.
    #[error(transparent)]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// The queue library on SQLite.
    #[error(transparent)]
    SqliteQueue(#[from] apalis_sqlite::Error),
    /// The queue library on PostgreSQL.
    #[error(transparent)]
    PostgresQueue(#[from] apalis_postgres::Error),
    /// A file beside the database.
    #[error(transparent)]
    File(#[from] std::io::Error),
    /// What was read isn't what was once written.
    #[error("a stored value can't be read: {0}")]
    Value(String),
}

impl Error {
    /// An error while doing `operation`, a phrase that follows "could not".
    pub(crate) fn during<C: Into<Cause>>(operation: &'static str) -> impl FnOnce(C) -> Self {
        move |cause| Self {
            operation,
            cause: cause.into(),
        }
    }

    /// The same for a file or directory, whose name the system leaves out.
    pub(crate) fn with(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |error| {
            let named = format!("{}: {error}", path.display());
            Self::during(operation)(std::io::Error::new(error.kind(), named))
        }
    }

    /// Whether the database can't be reached, is busy, full or read-only: a later try may succeed. Everything else
    /// is a fault of this program or of the data.
    pub fn is_unavailable(&self) -> bool {
        matches!(self.cause, Cause::File(_)) || self.database().is_some_and(is_unavailable)
    }

    /// Whether nobody knows if the transaction came through: it was told to, and there was no answer.
    pub fn is_undecided(&self) -> bool {
        self.operation == COMMIT && self.is_unavailable()
    }

    /// The same, of a transaction that came through before: somebody must look what it did.
    pub(super) fn after_commit(self) -> Self {
        Self {
            operation: COMMIT,
            ..self
        }
    }

    /// Whether somebody else holds SQLite's write lock.
    pub(crate) fn is_locked(&self) -> bool {
        let Some(sqlx::Error::Database(error)) = self.database() else {
            return false;
        };
        let code = error.code().unwrap_or_default();
        code.len() < 5 && code.parse::<u32>().is_ok_and(|code| code & 0xff == 5)
    }

    /// Whether nobody can use the database for now; unlike [`Error::is_unavailable`] this leaves out that this one
    /// statement met others and gave way to them, or found no free connection.
    pub(crate) fn is_outage(&self) -> bool {
        self.is_unavailable() && !self.is_collision() && !self.is_overload()
    }

    /// Whether all connections of this process were in use for too long: load, unless the database is gone too.
    pub fn is_overload(&self) -> bool {
        matches!(self.database(), Some(sqlx::Error::PoolTimedOut))
    }

    /// PostgreSQL gave up this statement in favour of others, or of a change of the tables. Nothing of its transaction
    /// was stored, and another try may succeed.
    fn is_collision(&self) -> bool {
        matches!(self.database(), Some(sqlx::Error::Database(error)) if is_collision(&**error))
    }

    fn database(&self) -> Option<&sqlx::Error> {
        match &self.cause {
            Cause::Database(error)
            | Cause::SqliteQueue(apalis_sqlite::Error::Database(error))
            | Cause::PostgresQueue(apalis_postgres::Error::Database(error))
            | Cause::Connection { reason: error, .. } => Some(error),
            Cause::Shared(error) => Some(error),
            _ => None,
        }
    }
}

impl From<String> for Cause {
    fn from(text: String) -> Self {
        Self::Value(text)
    }
}

/// The result of a database operation.
pub type Result<T> = std::result::Result<T, Error>;

fn is_unavailable(error: &sqlx::Error) -> bool {
    use sqlx::Error::{Database, Io, PoolClosed, PoolTimedOut, Protocol, Tls, WorkerCrashed};
    let Database(error) = error else {
        return matches!(
            error,
            Io(_) | Tls(_) | Protocol(_) | PoolTimedOut | PoolClosed | WorkerCrashed
        );
    };
    if is_collision(&**error) {
        return true;
    }
    let code = error.code().unwrap_or_default();
    // SQLite's primary codes: BUSY, LOCKED, READONLY, IOERR, FULL, CANTOPEN; extended ones hold them in the low byte.
    let sqlite = code
        .parse::<u32>()
        .is_ok_and(|code| matches!(code & 0xff, 5 | 6 | 8 | 10 | 13 | 14));
    // PostgreSQL: connection, resources, operator intervention, system; idle-in-transaction timeout, a read-only server.
    let postgres = code.len() == 5
        && (["08", "53", "57", "58"].contains(&&code[..2]) || ["25P03", "25006"].contains(&&*code));
    if code.len() == 5 { postgres } else { sqlite }
}

/// PostgreSQL's lock timeout, deadlock and serialization failure; a connection in a transaction that failed, which isn't used
/// again; and a prepared statement whose table was changed, which is prepared again when it is next used.
fn is_collision(error: &dyn DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    ["55P03", "40P01", "40001", "25P02"].contains(&&*code)
        || (code == "0A000"
            && error
                .message()
                .contains("cached plan must not change result type"))
}
