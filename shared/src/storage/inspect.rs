//! Looks at a database without opening it for work: nothing is created, migrated or locked.

use super::{DatabaseUrl, Error, Result, connect};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};
use std::path::Path;

/// The same statements on either connection. Without the table of migrations there is none of the others.
macro_rules! look {
    ($connection:expr, $is_there:literal) => {
        async {
            let there: i64 = sqlx::query_scalar($is_there).fetch_one(&mut $connection).await?;
            if there == 0 {
                return Ok((None, false));
            }
            let schema: Option<i64> = sqlx::query_scalar("select max(version) from migration")
                .fetch_one(&mut $connection)
                .await?;
            let keys: i64 = sqlx::query_scalar("select count(*) from (select 1 from api_key limit 1) k")
                .fetch_one(&mut $connection)
                .await?;
            Ok::<_, sqlx::Error>((schema, keys > 0))
        }
        .await
    };
}

/// What a database holds that may never have been used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The newest migration in it; none before the first start.
    pub schema: Option<i64>,
    /// The newest migration that this release knows.
    pub known: i64,
    /// Whether there are API keys in it.
    pub has_keys: bool,
}

/// Connects to the database and reads what it holds. The error of PostgreSQL names host, port and database, never the
/// password.
pub async fn inspect(url: &DatabaseUrl) -> Result<Inspection> {
    let known = sqlx::migrate!("../migrations/sqlite")
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or(0);
    let (schema, has_keys) = match url {
        DatabaseUrl::Sqlite(path) => {
            let mut connection = SqliteConnectOptions::new()
                .filename(path)
                .read_only(true)
                .disable_statement_logging()
                .connect()
                .await
                .map_err(Error::during("open the database"))?;
            let looked = look!(
                connection,
                "select count(*) from sqlite_master where type = 'table' and name = 'migration'"
            );
            let _ = connection.close().await;
            looked
        }
        DatabaseUrl::Postgres(url) => {
            let options = connect::options(url)?;
            connect::check(&options).await?;
            let mut connection = connect::connect(&options)
                .await
                .map_err(Error::during("connect to the database"))?;
            let looked = look!(connection, "select count(to_regclass('migration'))");
            let _ = connection.close().await;
            looked
        }
    }
    .map_err(Error::during("look into the database"))?;
    Ok(Inspection {
        schema,
        known,
        has_keys,
    })
}

/// The tables of the Python service "Claude Code API".
const PYTHON_SERVICE: [&str; 3] = ["sessions", "messages", "jobs"];

/// Refuses a SQLite file that holds the tables of another program: ours would be mixed with them. Nothing is written, not
/// even a file beside it.
pub(super) async fn refuse_foreign(path: &Path) -> Result<()> {
    let used = path.metadata().is_ok_and(|file| file.is_file() && file.len() > 0);
    if !used {
        return Ok(());
    }
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        // Without a log there is nothing to read but the file; with one, its files are there already.
        .immutable(!Path::new(&log).exists())
        .disable_statement_logging();
    let failed = || Error::during("look into the database");
    let mut connection = options.connect().await.map_err(failed())?;
    let names = sqlx::query_scalar::<_, String>("select name from sqlite_master where type = 'table'")
        .fetch_all(&mut connection)
        .await;
    let _ = connection.close().await;
    let names = names.map_err(failed())?;
    let has = |name: &str| names.iter().any(|there| there == name);
    if has("migration") || names.iter().all(|name| name.starts_with("sqlite_")) {
        return Ok(());
    }
    let whose = if PYTHON_SERVICE.into_iter().all(has) {
        "is the database of the Python service \"Claude Code API\", whose data is not migrated"
    } else {
        "holds the tables of another program"
    };
    let text = format!(
        "{} {whose}; nothing was written to it. Set DATABASE_URL to a file of its own",
        path.display()
    );
    Err(Error::during("use the database")(text))
}
