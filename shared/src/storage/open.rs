//! Opening the database and bringing its tables up to date.

use super::group_commit::GroupCommit;
use super::notifier::Notifier;
use super::{
    DatabaseUrl, Db, Error, LOCK_TIMEOUT, Result, Store, WRITER_TIMEOUT, connect, inspect, limit, liveness,
    read,
};
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection, Executor};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::sync::Notify;

/// The first number of a migration of the next major release. Migrations below it only add to the tables, so that this
/// release runs beside every newer one of its major version.
const NEXT_MAJOR: i64 = 10_000;

impl Store {
    /// Opens the database, making a SQLite file that isn't there, and brings its tables up to date.
    /// `slots`: how many runs this process holds at once, which decides the number of connections.
    pub async fn open(url: &DatabaseUrl, slots: u32) -> Result<Self> {
        let liveness = Arc::<liveness::ConnectionLiveness>::default();
        let db = match url {
            DatabaseUrl::Sqlite(path) => Self::open_sqlite(path).await?,
            DatabaseUrl::Postgres(url) => Self::open_postgres(url, slots, &liveness).await?,
        };
        let notifier = Notifier::start(&db, &liveness);
        let store = Self {
            db: Arc::new(db),
            notifier,
            more_ready: Arc::default(),
            tickets: Arc::default(),
            outage: Arc::default(),
            liveness,
            work: Arc::default(),
        };
        store.wait_for_lock().await?;
        store.check_clock().await?;
        let newest = store.newest_migration().await?;
        if newest >= NEXT_MAJOR {
            let text = format!(
                "it has migration {newest} of a newer major release, beside which this one can't run"
            );
            return Err(Error::during("use the database")(text));
        }
        Ok(store)
    }

    async fn newest_migration(&self) -> Result<i64> {
        let row = read!(
            self,
            "read the migrations",
            fetch_one => (i64,),
            "select coalesce(max(version), 0) from migration"
        )?;
        Ok(row.0)
    }

    async fn open_sqlite(path: &std::path::Path) -> Result<Db> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(Error::with("make the folder of the database", folder))?;
        }
        // Already the switch to WAL can fail when several processes make it at once. Unlocked when the file is
        // closed, also by a kill.
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".migrate-lock");
        let lock = path.with_file_name(name);
        // Before anything is written, also beside it. Where the lock file is, this program has been before, and may be
        // writing just now.
        if !lock.exists() {
            inspect::refuse_foreign(path).await?;
        }
        let lock =
            std::fs::File::create(&lock).map_err(Error::with("make the lock file of the database", &lock))?;
        let lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock))
            .await
            .map_err(|error| Error::during("lock the lock file")(error.to_string()))?
            .map_err(Error::during("lock the lock file"))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // A 202 survives a power cut.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(LOCK_TIMEOUT)
            // What was deleted is overwritten.
            .pragma("secure_delete", "on")
            .disable_statement_logging();
        let pool = |connections| {
            SqlitePoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(WRITER_TIMEOUT)
                .test_before_acquire(false)
                // A full disk makes SQLite roll back by itself. The library doesn't learn of it, and would refuse to
                // begin another transaction on this connection for ever.
                .before_acquire(|connection, _| {
                    let usable = !connection.is_in_transaction();
                    Box::pin(async move { Ok(usable) })
                })
        };
        let writer = pool(1)
            .connect_with(options.clone())
            .await
            .map_err(Error::during("open the database"))?;
        Self::migrate_sqlite(&writer).await?;
        let limits = limit::open_limits(path).await?;
        drop(lock);
        let reader = pool(4)
            .min_connections(1)
            .connect_with(options.read_only(true).create_if_missing(false))
            .await
            .map_err(Error::during("open the database"))?;
        Ok(Db::Sqlite {
            writer,
            reader,
            limits,
            submissions: GroupCommit::default(),
            committed: Notify::new(),
            rings: AtomicBool::new(false),
        })
    }

    async fn open_postgres(
        url: &str,
        slots: u32,
        liveness: &Arc<liveness::ConnectionLiveness>,
    ) -> Result<Db> {
        let options = connect::options(url)?;
        connect::check(&options).await?;
        let pool = liveness
            .watch(PgPoolOptions::new())
            .after_connect(|connection, _| Box::pin(connect::set_up(connection)))
            .max_connections((slots + 5).min(16))
            .min_connections(1)
            .acquire_timeout(LOCK_TIMEOUT)
            .connect_with(options)
            .await
            .map_err(Error::during("connect to the database"))?;
        Self::migrate_postgres(&pool).await?;
        Ok(Db::Postgres(pool))
    }

    /// Brings the tables up to date, ours and the queue library's. The caller holds the lock over all processes.
    async fn migrate_sqlite(writer: &SqlitePool) -> Result<()> {
        ours(sqlx::migrate!("../migrations/sqlite"))
            .run(writer)
            .await
            .map_err(Error::during("bring the tables up to date"))?;
        let mut theirs = apalis_sqlite::SqliteStorage::<()>::migrations();
        theirs.set_ignore_missing(true);
        theirs
            .run(writer)
            .await
            .map_err(Error::during("bring the queue's tables up to date"))?;
        // It would make each acknowledgement walk all rows of its worker.
        sqlx::query("drop index if exists LIdx")
            .execute(writer)
            .await
            .map_err(Error::during("bring the queue's tables up to date"))?;
        Ok(())
    }

    /// Brings the tables up to date, ours and the queue library's, under one lock over all processes.
    async fn migrate_postgres(pool: &PgPool) -> Result<()> {
        let options = pool.connect_options();
        let mut lock = options
            .connect()
            .await
            .map_err(Error::during("connect to the database"))?;
        lock.execute("set lock_timeout = 0; select pg_advisory_lock(1668638068, 0)")
            .await
            .map_err(Error::during("lock the database for migration"))?;
        ours(sqlx::migrate!("../migrations/postgres"))
            .run(pool)
            .await
            .map_err(Error::during("bring the tables up to date"))?;
        let mut theirs = apalis_postgres::PostgresStorage::migrations();
        theirs.set_ignore_missing(true);
        theirs
            .run(pool)
            .await
            .map_err(Error::during("bring the queue's tables up to date"))?;
        // A transaction that notifies commits alone: it takes a lock of the whole server until it is on the disk.
        sqlx::query("drop trigger if exists notify_workers on apalis.jobs")
            .execute(pool)
            .await
            .map_err(Error::during("bring the queue's tables up to date"))?;
        let _ = lock.close().await;
        Ok(())
    }
}

/// Our migrations, as they are run: beside those of a newer release, which only add to the tables.
fn ours(mut migrator: Migrator) -> Migrator {
    migrator.dangerous_set_table_name("migration");
    migrator.set_ignore_missing(true);
    migrator
}
