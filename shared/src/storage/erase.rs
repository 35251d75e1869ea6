//! Deleted text leaves the files of a SQLite database too: `secure_delete` overwrites it in the pages, and this empties
//! the log, which holds the pages as they were. PostgreSQL does so by its own VACUUM and log rotation.

use super::{Db, Error, Result, Store};
use sqlx::{ConnectOptions as _, Connection as _};
use std::path::PathBuf;
use std::time::Duration;

/// How long it waits for others. They go first: what is left is erased the next time.
const PATIENCE: Duration = Duration::from_millis(100);

impl Store {
    /// The file of a SQLite database.
    pub fn file(&self) -> Option<PathBuf> {
        match &*self.db {
            Db::Sqlite { writer, .. } => Some(writer.connect_options().get_filename().to_owned()),
            Db::Postgres(_) => None,
        }
    }

    /// Copies the log of a SQLite database into its file and empties it, unless others are reading. Does nothing on
    /// PostgreSQL, or when the log is empty.
    pub async fn erase_deleted(&self) -> Result<()> {
        let Db::Sqlite { writer, .. } = &*self.db else {
            return Ok(());
        };
        let options = (*writer.connect_options()).clone();
        let mut log = options.get_filename().as_os_str().to_owned();
        log.push("-wal");
        if std::fs::metadata(log).is_ok_and(|log| log.len() == 0) {
            return Ok(());
        }
        let mut connection = options
            .busy_timeout(PATIENCE)
            .connect()
            .await
            .map_err(Error::during("empty the database's log"))?;
        let emptied = sqlx::query("pragma wal_checkpoint(truncate)")
            .execute(&mut connection)
            .await;
        // Errors of the end don't matter, the connection is gone.
        let _ = connection.close().await;
        match emptied.map_err(Error::during("empty the database's log")) {
            Err(error) if error.is_unavailable() => Ok(()),
            emptied => emptied.map(drop),
        }
    }
}
