//! A fresh database for each test: a SQLite file, or a database in a PostgreSQL cluster that the kit starts itself,
//! once for the test binary, from the installed programs. Also a direct look into it, for what no answer shows.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, SqliteConnection};
use tokio::sync::{Mutex, OnceCell};

use crate::account::{Account, is_root};
use crate::client::PATIENCE;
use crate::disk::Disk;
use crate::{paths, processes};

/// Which database a test runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Db {
    /// A file of its own, in WAL mode.
    Sqlite,
    /// A database of its own in the kit's cluster.
    Postgres,
}

/// One test's database.
#[derive(Clone, Debug)]
pub struct Database {
    db: Db,
    url: String,
}

impl Database {
    /// A migrated database without a row: a SQLite file in `folder` or a PostgreSQL database, copied from a template
    /// that the product has made.
    pub async fn fresh(db: Db, folder: &Path) -> Self {
        static MIGRATED: OnceCell<PathBuf> = OnceCell::const_new();
        let url = match db {
            Db::Sqlite => {
                let template = MIGRATED.get_or_init(async || {
                    let folder = paths::folder('t');
                    migrate(&file_url(&folder), &folder).expect("the product migrates");
                    folder.join(FILE_NAME)
                });
                let file = folder.join(FILE_NAME);
                fs::copy(template.await, &file).expect("the template is copied");
                if let Some(account) = Account::of_product() {
                    account.own(&file).expect("the copy is ours");
                }
                file_url(folder)
            }
            Db::Postgres => cluster().await.fresh().await,
        };
        Self { db, url }
    }

    /// A database without a table: for what makes them.
    pub async fn empty(db: Db, folder: &Path) -> Self {
        let url = match db {
            Db::Sqlite => file_url(folder),
            Db::Postgres => cluster().await.create("").await,
        };
        Self { db, url }
    }

    /// A copy of the database that `migrate` made of an empty one, whose URL it gets: it is called once for each kind
    /// of database, and closes all its connections. For tests that don't start the binaries.
    pub async fn copy(db: Db, folder: &Path, migrate: impl AsyncFnOnce(&str)) -> Self {
        static FILE: OnceCell<PathBuf> = OnceCell::const_new();
        static NAME: OnceCell<String> = OnceCell::const_new();
        let url = match db {
            Db::Sqlite => {
                let template = FILE.get_or_init(async || {
                    let folder = paths::folder('t');
                    migrate(&file_url(&folder)).await;
                    folder.join(FILE_NAME)
                });
                fs::copy(template.await, folder.join(FILE_NAME)).expect("the template is copied");
                file_url(folder)
            }
            Db::Postgres => {
                let cluster = cluster().await;
                let template = NAME.get_or_init(async || {
                    let url = cluster.create("").await;
                    migrate(&url).await;
                    let (path, _) = url.split_once('?').expect("the socket's folder is a parameter");
                    path.rsplit('/').next().unwrap_or_default().to_owned()
                });
                cluster.create(template.await).await
            }
        };
        Self { db, url }
    }

    /// A SQLite file, there or not.
    pub fn file(path: &Path) -> Self {
        Self {
            db: Db::Sqlite,
            url: format!("sqlite://{}", path.display()),
        }
    }

    /// A database in a cluster of the test's own, so that the test may restart or stop the server.
    pub async fn in_cluster(cluster: &Cluster) -> Self {
        Self {
            db: Db::Postgres,
            url: cluster.fresh().await,
        }
    }

    /// Which kind it is.
    pub fn db(&self) -> Db {
        self.db
    }

    /// What the processes get as `DATABASE_URL`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The one integer that a query answers; `null` is 0. Cast a PostgreSQL `sum` to bigint.
    pub async fn number(&self, sql: &str) -> i64 {
        let sql = AssertSqlSafe(sql);
        let answer: Result<Option<i64>, sqlx::Error> = match self.db {
            Db::Sqlite => sqlx::query_scalar(sql).fetch_one(&mut self.sqlite().await).await,
            Db::Postgres => {
                sqlx::query_scalar(sql)
                    .fetch_one(&mut self.postgres().await)
                    .await
            }
        };
        answer.expect("the query answers one integer").unwrap_or(0)
    }

    /// The one text column of a query, row by row; `null` is the empty text.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        let sql = AssertSqlSafe(sql);
        let answer: Result<Vec<Option<String>>, sqlx::Error> = match self.db {
            Db::Sqlite => sqlx::query_scalar(sql).fetch_all(&mut self.sqlite().await).await,
            Db::Postgres => {
                sqlx::query_scalar(sql)
                    .fetch_all(&mut self.postgres().await)
                    .await
            }
        };
        answer
            .expect("the query answers one column of text")
            .into_iter()
            .map(Option::unwrap_or_default)
            .collect()
    }

    /// Runs one statement past the product and says how many rows it changed.
    pub async fn execute(&self, sql: &str) -> u64 {
        let sql = AssertSqlSafe(sql);
        match self.db {
            Db::Sqlite => {
                let mut connection = self.sqlite().await;
                connection
                    .execute(sqlx::query(sql))
                    .await
                    .expect("the statement runs")
                    .rows_affected()
            }
            Db::Postgres => {
                let mut connection = self.postgres().await;
                connection
                    .execute(sqlx::query(sql))
                    .await
                    .expect("the statement runs")
                    .rows_affected()
            }
        }
    }

    /// A connection to a SQLite database, for a test that locks it.
    pub async fn sqlite(&self) -> SqliteConnection {
        let options: SqliteConnectOptions = self.url.parse().expect("a URL of the kit's");
        // A process may hold the lock for long while the machine is busy, and the test has nothing else to do.
        SqliteConnection::connect_with(&options.busy_timeout(Duration::from_mins(1)))
            .await
            .expect("the SQLite file opens")
    }

    /// A connection to a PostgreSQL database, for a test that locks it.
    pub async fn postgres(&self) -> PgConnection {
        PgConnection::connect(&self.url)
            .await
            .expect("PostgreSQL accepts a connection")
    }
}

/// A PostgreSQL server of the kit's own: on a Unix socket only, as an ordinary user, without fsync (the machine doesn't
/// lose power in a test) but with synchronous commits.
#[derive(Debug)]
pub struct Cluster {
    programs: PathBuf,
    folder: PathBuf,
    /// Where its data is.
    data: PathBuf,
    /// What stands before the programs' command lines.
    enter: Vec<String>,
    account: Option<Account>,
    server: Mutex<Option<Child>>,
    count: Mutex<u32>,
    template: OnceCell<()>,
}

const TEMPLATE: &str = "migrated";

const FILE_NAME: &str = "claude-queue.db";

fn file_url(folder: &Path) -> String {
    format!("sqlite://{}", folder.join(FILE_NAME).display())
}

impl Cluster {
    /// Makes and starts a cluster.
    ///
    /// # Errors
    /// A sentence that says what is missing or what didn't work.
    pub async fn start() -> Result<Self, String> {
        Self::start_on(None).await
    }

    /// The same, its data on this disk.
    ///
    /// # Errors
    /// As of [`Cluster::start`].
    pub async fn start_on(disk: Option<&Disk>) -> Result<Self, String> {
        let programs = programs()?;
        let account = account()?;
        let folder = paths::folder('p');
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)).map_err(|error| error.to_string())?;
        if let Some(account) = account {
            account
                .own(&folder)
                .map_err(|error| format!("chown {}: {error}", folder.display()))?;
        }
        let cluster = Self {
            programs,
            data: disk.map_or(&*folder, Disk::path).join("data"),
            enter: disk.map(Disk::enter).unwrap_or_default(),
            folder,
            account,
            server: Mutex::new(None),
            count: Mutex::new(0),
            template: OnceCell::const_new(),
        };
        let init = cluster
            .command("initdb")
            .args([
                "--auth=trust",
                "--username=postgres",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "-D",
            ])
            .arg(&cluster.data)
            .output()
            .map_err(|error| format!("initdb doesn't start: {error}"))?;
        if !init.status.success() {
            return Err(format!(
                "initdb failed: {}",
                String::from_utf8_lossy(&init.stderr)
            ));
        }
        cluster.run().await?;
        Ok(cluster)
    }

    /// Starts the server and waits until it accepts connections.
    ///
    /// # Errors
    /// The tail of the server's log.
    pub async fn run(&self) -> Result<(), String> {
        let log_path = self.folder.join("log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(|error| error.to_string())?;
        let server = self
            .command("postgres")
            .arg("-D")
            .arg(&self.data)
            .arg("-k")
            .arg(&self.folder)
            .args(
                [
                    "listen_addresses=",
                    "fsync=off",
                    "full_page_writes=off",
                    "synchronous_commit=on",
                    "max_connections=600",
                    "shared_buffers=64MB",
                    "max_wal_size=256MB",
                ]
                .map(|setting| format!("--{setting}")),
            )
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| format!("postgres doesn't start: {error}"))?;
        *self.server.lock().await = Some(server);
        let begin = Instant::now();
        while PgConnection::connect(&self.url("postgres")).await.is_err() {
            if begin.elapsed() > PATIENCE {
                return Err(format!(
                    "PostgreSQL accepts no connection: {}",
                    fs::read_to_string(&log_path).unwrap_or_default()
                ));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Stops the server: `INT` lets transactions fail and stops cleanly, `QUIT` stops as a crash would.
    pub async fn stop(&self, how: Signal) {
        let Some(mut server) = self.server.lock().await.take() else {
            return;
        };
        // The kit started setpriv, which became the postmaster: the id is the same.
        processes::signal(i32::try_from(server.id()).expect("a process id"), how);
        let begin = Instant::now();
        while server.try_wait().expect("our own child").is_none() {
            assert!(begin.elapsed() < PATIENCE, "PostgreSQL doesn't stop");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether the server has ended by itself.
    pub async fn has_ended(&self) -> bool {
        let mut server = self.server.lock().await;
        let ended = server
            .as_mut()
            .is_none_or(|server| server.try_wait().is_ok_and(|status| status.is_some()));
        if ended {
            *server = None;
        }
        ended
    }

    async fn fresh(&self) -> String {
        if let Err(error) = self.template.get_or_try_init(|| self.make_template()).await {
            panic!("{error}");
        }
        self.create(TEMPLATE).await
    }

    /// A new database, empty or from a template; gives its URL.
    async fn create(&self, template: &str) -> String {
        // One at a time: PostgreSQL refuses to copy a template while anyone is connected to it.
        let mut count = self.count.lock().await;
        *count += 1;
        let name = format!("test_{count}");
        let template = if template.is_empty() {
            "template1"
        } else {
            template
        };
        self.administer(&format!("create database {name} template {template}"))
            .await
            .expect("a database is made");
        self.url(&name)
    }

    async fn make_template(&self) -> Result<(), String> {
        self.administer(&format!("create database {TEMPLATE}"))
            .await
            .map_err(|error| error.to_string())?;
        let data = self.folder.with_extension("d");
        fs::create_dir(&data).map_err(|error| error.to_string())?;
        migrate(&self.url(TEMPLATE), &data)
    }

    async fn administer(&self, sql: &str) -> Result<(), sqlx::Error> {
        let mut connection = PgConnection::connect(&self.url("postgres")).await?;
        connection.execute(AssertSqlSafe(sql)).await?;
        connection.close().await
    }

    fn url(&self, name: &str) -> String {
        format!(
            "postgres://postgres@localhost/{name}?host={}",
            self.folder.display()
        )
    }

    /// A program of PostgreSQL, as the ordinary user that it demands.
    fn command(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut words: Vec<OsString> = self.enter.iter().map(Into::into).collect();
        if !words.is_empty() {
            words.push(self.folder.clone().into());
        }
        words.extend(self.account.map(Account::words).unwrap_or_default());
        words.push(program.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env(paths::MARKER, &self.folder);
        command.current_dir(&self.folder).stdin(Stdio::null());
        command
    }
}

/// Has the product make its tables.
fn migrate(url: &str, folder: &Path) -> Result<(), String> {
    let migrated = Command::new(paths::binary("claude-queue"))
        .arg("migrate")
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", folder)
        .env("DATA_DIR", folder)
        .env("DATABASE_URL", url)
        .env(paths::MARKER, folder)
        .current_dir(folder)
        .output()
        .map_err(|error| format!("claude-queue doesn't start: {error}"))?;
    if migrated.status.success() {
        return Ok(());
    }
    Err(format!(
        "`claude-queue migrate` failed on {url}: {}{}",
        String::from_utf8_lossy(&migrated.stdout),
        String::from_utf8_lossy(&migrated.stderr)
    ))
}

/// The cluster that all tests of the binary share. Its start is tried once: what is missing then is missing for all.
async fn cluster() -> &'static Cluster {
    static CLUSTER: OnceCell<Result<Cluster, String>> = OnceCell::const_new();
    match CLUSTER.get_or_init(Cluster::start).await {
        Ok(cluster) => cluster,
        Err(error) => panic!("{error}"),
    }
}

fn programs() -> Result<PathBuf, String> {
    let mut folders: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|entries| entries.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    // The newest version first.
    folders.sort_by_key(|folder| {
        std::cmp::Reverse(
            folder
                .iter()
                .rev()
                .nth(1)
                .and_then(|version| version.to_str()?.parse::<u32>().ok())
                .unwrap_or(0),
        )
    });
    folders.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    folders.extend(["/usr/local/pgsql/bin", "/usr/local/bin"].map(PathBuf::from));
    folders
        .into_iter()
        .find(|folder| {
            ["initdb", "postgres"]
                .iter()
                .all(|program| folder.join(program).is_file())
        })
        .ok_or_else(|| {
            "PostgreSQL isn't installed: the tests start their own server from `initdb` and `postgres` \
             (Debian: apt-get install postgresql)"
                .to_owned()
        })
}

fn account() -> Result<Option<Account>, String> {
    if !is_root() {
        return Ok(None);
    }
    Account::find("postgres")
        .or_else(|| Account::find("nobody"))
        .map(Some)
        .ok_or_else(|| "initdb refuses root, and there is neither a user postgres nor nobody".to_owned())
}
