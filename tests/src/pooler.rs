//! `PgBouncer` before a PostgreSQL database, in a pool mode of the test's choice.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};

use crate::client::PATIENCE;
use crate::database::Database;
use crate::{eventually, paths, processes};

/// A running `PgBouncer`; it ends when this is dropped.
#[derive(Debug)]
pub struct Pooler {
    server: Child,
    url: String,
}

impl Pooler {
    /// Starts one before this PostgreSQL database, with `session`, `transaction` or `statement` as its pool mode.
    pub async fn before(database: &Database, pool_mode: &str) -> Self {
        let (path, sockets) = database
            .url()
            .split_once("?host=")
            .expect("a socket of the kit's");
        let name = path.rsplit('/').next().unwrap_or_default();
        let folder = paths::folder('b');
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).expect("our own folder");
        let config = folder.join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host={sockets} user=postgres\n\
             [pgbouncer]\nlisten_addr =\nunix_socket_dir = {}\nauth_type = any\npool_mode = {pool_mode}\n\
             default_pool_size = 60\nignore_startup_parameters = options\n",
            folder.display()
        );
        fs::write(&config, text).expect("our own folder");
        // It refuses to run as root.
        let user: &[&str] = if rustix::process::geteuid().is_root() {
            &["-u", "postgres"]
        } else {
            &[]
        };
        let log = fs::File::create(folder.join("log")).expect("our own folder");
        let server = Command::new("pgbouncer")
            .args(user)
            .arg(&config)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env(paths::MARKER, &folder)
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("PgBouncer is installed (Debian: apt-get install pgbouncer)");
        let pooler = Self {
            server,
            url: format!(
                "postgres://postgres@localhost:6432/{name}?host={}",
                folder.display()
            ),
        };
        eventually(PATIENCE, "PgBouncer", async || {
            let options: PgConnectOptions = pooler.url.parse().expect("a URL of ours");
            // It doesn't know every parameter of a connection.
            let connection = PgConnection::connect_with(&options.extra_float_digits(None)).await;
            connection.ok()?.close().await.ok()
        })
        .await;
        pooler
    }

    /// What a process gets as `DATABASE_URL` to go this way.
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.server.id()) {
            processes::signal(pid, Signal::KILL);
        }
        let _ = self.server.wait();
    }
}
