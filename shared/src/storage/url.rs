//! Parses `DATABASE_URL`, in our format or in that of the Python service.

use crate::env::{Error, Vars};
use sqlx::postgres::PgConnectOptions;
use std::path::PathBuf;

/// The address of the database.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// A SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL server, as a `postgres://` URL. It may contain a password.
    Postgres(String),
}

/// Shows only the location, because a password may be in more than one part of the URL.
impl std::fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite://{}", path.display()),
            Self::Postgres(url) => match url.parse::<PgConnectOptions>() {
                Ok(options) => {
                    let database = options.get_database().unwrap_or_default();
                    write!(
                        f,
                        "postgres://{}:{}/{database}",
                        options.get_host(),
                        options.get_port()
                    )
                }
                Err(_) => f.write_str("postgres://…"),
            },
        }
    }
}

const ACCEPTED: &str =
    "sqlite://PATH (or sqlite+aiosqlite:///PATH), postgres://… (or postgresql+asyncpg://…)";

impl DatabaseUrl {
    /// Reads `DATABASE_URL`; the default is a SQLite file in `./data`.
    pub fn from_vars(vars: &Vars) -> Result<Self, Error> {
        let text = vars.or("DATABASE_URL", "sqlite://data/claude-queue.db")?;
        match Self::parse(&text) {
            Some(Self::Sqlite(file)) => Ok(Self::Sqlite(vars.resolve("DATABASE_URL", file))),
            Some(url) => Ok(url),
            None => Err(Error::new(
                "DATABASE_URL",
                "isn't a database this service knows",
                ACCEPTED,
            )),
        }
    }

    /// Parses a URL in any accepted format.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once(':')?;
        match scheme {
            "postgres"
            | "postgresql"
            | "postgresql+asyncpg"
            | "postgresql+psycopg"
            | "postgresql+psycopg2" => {
                let url = format!("postgres:{rest}");
                (rest.starts_with("//") && url.parse::<PgConnectOptions>().is_ok())
                    .then_some(Self::Postgres(url))
            }
            // SQLAlchemy writes three slashes before a relative path and four before an absolute one.
            "sqlite+aiosqlite" | "sqlite+pysqlite" => rest.strip_prefix("///").and_then(file),
            "sqlite" => match rest.strip_prefix("///") {
                Some(path) if path.starts_with('/') => file(path),
                _ => file(rest.strip_prefix("//").unwrap_or(rest)),
            },
            _ => None,
        }
    }
}

fn file(path: &str) -> Option<DatabaseUrl> {
    let path = path.split('?').next().unwrap_or(path);
    // A database in memory can't be shared by processes, and would lose accepted jobs.
    (!path.is_empty() && !path.contains(":memory:")).then(|| DatabaseUrl::Sqlite(PathBuf::from(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_name_the_same_database() {
        for (text, path) in [
            ("sqlite://data/q.db", "data/q.db"),
            ("sqlite:data/q.db", "data/q.db"),
            ("sqlite:///var/q.db", "/var/q.db"),
            ("sqlite+aiosqlite:///data/q.db", "data/q.db"),
            ("sqlite+aiosqlite:////var/q.db", "/var/q.db"),
        ] {
            assert_eq!(
                DatabaseUrl::parse(text),
                Some(DatabaseUrl::Sqlite(path.into())),
                "{text}"
            );
        }
        let asyncpg = DatabaseUrl::parse("postgresql+asyncpg://me:secret@db/q").unwrap();
        assert_eq!(asyncpg, DatabaseUrl::Postgres("postgres://me:secret@db/q".into()));
        for url in [
            "postgres://me:secret@db/q",
            "postgres://me@db:5432/q?password=secret",
        ] {
            let shown = format!("{:?}", DatabaseUrl::parse(url).unwrap());
            assert_eq!(shown, "postgres://db:5432/q");
        }
    }

    #[test]
    fn other_databases_are_refused() {
        for text in [
            "",
            "mysql://x/y",
            "sqlite::memory:",
            "sqlite+aiosqlite://",
            "data/q.db",
            "postgres:db",
            "postgres://db:notaport/q",
        ] {
            assert_eq!(DatabaseUrl::parse(text), None, "{text}");
        }
    }
}
