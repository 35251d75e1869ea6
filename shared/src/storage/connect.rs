//! Connections to PostgreSQL: how each session is set up, and what is refused at the start.

use super::error::Cause;
use super::{Error, LOCK_TIMEOUT, Result};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, Executor, Row};
use std::future::Future;
use tokio::time::timeout;

/// What every session is set to, whatever the server, the database or the role is set to.
const SETTINGS: [(&str, &str); 5] = [
    // Plans made while the tables were empty would scan them for ever, and the penalty starts the JIT.
    ("enable_seqscan", "off"),
    ("jit", "off"),
    // A process that was stopped in a transaction must not hold the others for longer.
    ("idle_in_transaction_session_timeout", "5s"),
    ("lock_timeout", "5s"),
    // The order of locks and the conditions of updates are made for this one.
    ("default_transaction_isolation", "read committed"),
];

/// How often two sessions are compared: a pooler may give them different servers by chance.
const COMPARISONS: usize = 3;

const SHARED_SESSIONS: &str = "a connection pooler (PgBouncer) in transaction or statement mode is in between, which \
                               gives each transaction another session; set its pool_mode to session, or connect to \
                               PostgreSQL itself";

/// How to connect. A pooler refuses or drops parameters that it doesn't know, so a session is set up afterwards.
pub(super) fn options(url: &str) -> Result<PgConnectOptions> {
    Ok(url
        .parse::<PgConnectOptions>()
        .map_err(Error::during("read DATABASE_URL"))?
        .application_name("claude-queue")
        .extra_float_digits(None)
        .disable_statement_logging())
}

/// Sets up a session.
pub(super) async fn set_up(connection: &mut PgConnection) -> sqlx::Result<()> {
    let settings = SETTINGS.map(|(name, value)| format!("set {name} = '{value}'"));
    let sql = sqlx::AssertSqlSafe(settings.join("; "));
    connection.execute(sqlx::raw_sql(sql)).await.map(drop)
}

/// Makes sure at the start that the server can be reached and that a session is ours alone and stays as it is set up.
/// Its errors say where the server was looked for.
pub(super) async fn check(options: &PgConnectOptions) -> Result<()> {
    let (mut one, mut other) = (
        in_time(options, connect(options)).await?,
        in_time(options, connect(options)).await?,
    );
    in_time(options, async {
        compare(&mut one, &mut other).await?;
        let lost = lost_settings(&mut one).await?;
        if !lost.is_empty() {
            let text = format!("these settings of a session don't last: {}", lost.join(", "));
            return Err(sqlx::Error::Configuration(text.into()));
        }
        one.close().await?;
        other.close().await
    })
    .await
}

/// A connection that is set up.
pub(super) async fn connect(options: &PgConnectOptions) -> sqlx::Result<PgConnection> {
    let mut connection = options.connect().await?;
    set_up(&mut connection).await?;
    Ok(connection)
}

/// Where these options lead to, without a user or a password.
pub(super) fn place(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or(options.get_username());
    match options.get_socket() {
        Some(socket) => format!(
            "socket {}, port {}, database \"{database}\"",
            socket.display(),
            options.get_port()
        ),
        None => format!(
            "host {}, port {}, database \"{database}\"",
            options.get_host(),
            options.get_port()
        ),
    }
}

async fn in_time<T>(options: &PgConnectOptions, trying: impl Future<Output = sqlx::Result<T>>) -> Result<T> {
    let tried = timeout(LOCK_TIMEOUT, trying).await;
    let reason = match tried {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => error,
        Err(_) => sqlx::Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            "no answer within 5 s",
        )),
    };
    Err(Error::during("connect to PostgreSQL")(Cause::Connection {
        place: place(options),
        said: said(&reason),
        reason,
    }))
}

/// Two sessions at once are two server processes, and stay those. Where a pooler lends one for each transaction, the
/// second gets what the first has just given back, or the first gets another one after that.
async fn compare(one: &mut PgConnection, other: &mut PgConnection) -> sqlx::Result<()> {
    for _ in 0..COMPARISONS {
        let first = backend(one).await?;
        other.execute(sqlx::raw_sql("begin")).await?;
        let (second, now) = (backend(other).await?, backend(one).await?);
        other.execute(sqlx::raw_sql("rollback")).await?;
        if first == second || first != now {
            return Err(sqlx::Error::Configuration(SHARED_SESSIONS.into()));
        }
    }
    Ok(())
}

async fn backend(connection: &mut PgConnection) -> sqlx::Result<i32> {
    let row = connection
        .fetch_one(sqlx::raw_sql("select pg_backend_pid()"))
        .await?;
    row.try_get(0)
}

/// The names of settings that a session doesn't have any more.
async fn lost_settings(connection: &mut PgConnection) -> sqlx::Result<Vec<&'static str>> {
    let mut lost = Vec::new();
    for (name, value) in SETTINGS {
        let sql = sqlx::AssertSqlSafe(format!("select current_setting('{name}') = '{value}'"));
        let row = connection.fetch_one(sqlx::raw_sql(sql)).await?;
        if !row.try_get::<bool, _>(0)? {
            lost.push(name);
        }
    }
    Ok(lost)
}

/// Why it didn't work, in the words of who knows; and what it means where that is hard to see.
fn said(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) if shares_sessions(error.message()) => SHARED_SESSIONS.to_owned(),
        sqlx::Error::Database(error) => error.message().to_owned(),
        sqlx::Error::Io(error) => error.to_string(),
        sqlx::Error::Configuration(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// Whether a server's message is what comes of sharing sessions with others: they name their prepared statements alike, or
/// a statement was prepared in another session.
fn shares_sessions(message: &str) -> bool {
    message.contains("prepared statement \"sqlx_s_")
        || message.contains("not allowed in statement pooling mode")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_has_no_password() {
        for (url, shown) in [
            (
                "postgres://me:secret@db:6432/q",
                "host db, port 6432, database \"q\"",
            ),
            ("postgres://me:secret@db", "host db, port 5432, database \"me\""),
        ] {
            assert_eq!(place(&options(url).unwrap()), shown);
        }
    }

    #[test]
    fn shared_sessions_are_recognised() {
        for message in [
            "prepared statement \"sqlx_s_1\" already exists",
            "prepared statement \"sqlx_s_3\" does not exist",
        ] {
            assert!(shares_sessions(message), "{message}");
        }
        assert!(!shares_sessions("relation \"job\" does not exist"));
    }
}
