//! What the database couldn't do.

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

    /// Whether a unique index or key refused the write.
    pub fn is_conflict(&self) -> bool {
        matches!(&self.cause, Cause::Database(sqlx::Error::Database(error)) if error.is_unique_violation())
    }
}

impl From<String> for Cause {
    fn from(text: String) -> Self {
        Self::Value(text)
    }
}

/// The result of a database operation.
pub type Result<T> = std::result::Result<T, Error>;
