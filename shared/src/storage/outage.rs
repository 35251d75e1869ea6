//! Outages: the database can't be reached, or is locked, full or read-only. All parts of the process see the same
//! outage, so it is logged only twice: when it starts and when it is over.

use super::{Db, Error, Result, Store, execute};
use crate::disk;
use crate::telemetry::chain;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// How often the database is tried during an outage. No error may have occurred for as long before it is over.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// A database that hasn't committed a write within this time is unavailable.
const WRITES_WITHIN: Duration = Duration::from_secs(2);

/// How long a starting process waits for a lock of another process.
const LOCKED_FOR: Duration = Duration::from_secs(30);

/// How long the result of a check is reused.
const CHECKED_FOR: Duration = Duration::from_secs(1);

/// Whether the database is available, as far as this process knows.
#[derive(Debug, Default)]
pub(super) struct Outage {
    /// When the current outage began.
    since: watch::Sender<Option<Instant>>,
    last_error: Mutex<Option<Instant>>,
    /// When a write last succeeded.
    checked: tokio::sync::Mutex<Option<Instant>>,
}

impl Store {
    /// Records an error. Returns true if it belongs to an outage, which is logged once for the whole process. The caller
    /// logs other errors. Needs a runtime.
    pub fn note(&self, error: &Error) -> bool {
        let outage = error.is_outage();
        if outage {
            self.note_outage(&chain(error));
        }
        outage
    }

    /// Records that the database is unavailable.
    fn note_outage(&self, why: &str) {
        *self.outage.last_error() = Some(Instant::now());
        let begins = self.outage.since.send_if_modified(|since| {
            let begins = since.is_none();
            since.get_or_insert_with(Instant::now);
            begins
        });
        if !begins {
            tracing::debug!(error = why, "the database is still unavailable");
            return;
        }
        tracing::warn!(error = why, "the database is unavailable, retrying");
        let store = self.clone();
        tokio::spawn(async move { store.watch_outage().await });
    }

    /// Whether there is an outage.
    pub fn is_out(&self) -> bool {
        self.outage.since.borrow().is_some()
    }

    /// Waits until there is no outage.
    pub async fn answers(&self) {
        // The sender lives as long as this store.
        let _ = self.outage.since.subscribe().wait_for(Option::is_none).await;
    }

    /// Checks whether the database is available, at most once a second, by a write that changes nothing. A read would
    /// also succeed on a full disk, a locked or a read-only file.
    pub async fn is_usable(&self) -> bool {
        if self.is_out() {
            return false;
        }
        let mut checked = self.outage.checked.lock().await;
        // Another task may have checked while this one waited for the lock.
        if self.is_out() {
            return false;
        }
        if checked.is_some_and(|at| at.elapsed() < CHECKED_FOR) {
            return true;
        }
        match timeout(WRITES_WITHIN, self.try_to_write()).await {
            Ok(Ok(())) => *checked = Some(Instant::now()),
            Ok(Err(error)) => {
                self.note(&error);
                return false;
            }
            Err(_) => self.note_outage("it doesn't write within 2 s"),
        }
        !self.is_out()
    }

    /// Waits at start for the holder of SQLite's write lock, which may be a stopped process.
    pub(super) async fn wait_for_lock(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            match self.try_to_write().await {
                Err(error) if error.is_locked() && begin.elapsed() < LOCKED_FOR => {
                    tracing::warn!(error = %chain(&error), "the database is locked, waiting");
                }
                tried => return tried,
            }
        }
    }

    async fn try_to_write(&self) -> Result<()> {
        if let Db::Sqlite { reader, .. } = &*self.db {
            // SQLite's write-ahead log has reserved space, so a small write may succeed when a large one doesn't.
            let file = reader.connect_options().get_filename().to_owned();
            let tried = spawn_blocking(move || disk::try_to_write(file.parent().unwrap_or(Path::new("."))));
            tried
                .await
                .unwrap_or_else(|error| Err(std::io::Error::other(error)))
                .map_err(Error::during("write beside the database"))?;
        }
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "write to the database",
            "update queue set paused = paused where queue_number = 1"
        )?;
        tx.commit().await
    }

    async fn watch_outage(&self) {
        loop {
            tokio::time::sleep(TRY_AGAIN).await;
            let tried = timeout(WRITES_WITHIN, self.try_to_write()).await;
            let quiet = self
                .outage
                .last_error()
                .is_none_or(|last| last.elapsed() >= TRY_AGAIN);
            if matches!(tried, Ok(Ok(()))) && quiet {
                break;
            }
        }
        let since = self.outage.since.send_replace(None);
        let seconds = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        tracing::info!("the database is available again after {seconds:.1} s");
    }
}

impl Outage {
    fn last_error(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
