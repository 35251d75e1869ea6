//! When to look at a SQLite database that other processes write: the kernel tells of writes to its log (WAL).
//!
//! It tells of a write before the commit can be seen, since the log is flushed to the disk in between. So each write
//! begins a short series of looks. Without a watch, for which the kernel may have no room, there are looks all the time.

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// The second look after a write, when nothing was written before.
const FIRST: Duration = Duration::from_millis(1);

/// Looks while nothing is written.
const IDLE: Duration = Duration::from_secs(1);

/// A commit can be seen at the latest so long after its write, on a disk that isn't ill.
const SERIES: Duration = Duration::from_secs(1);

/// Says when to look.
#[derive(Debug)]
pub(super) struct FileChanges {
    watch: Option<AsyncFd<OwnedFd>>,
    /// Between two looks, at least.
    every: Duration,
    pause: Duration,
    due: Instant,
    last: Instant,
}

impl FileChanges {
    /// Watches the database's log. A look every `every` is enough while there are many writes.
    pub(super) fn watch(database: &Path, every: Duration) -> Self {
        let watch = watch(database)
            .inspect_err(|error| {
                tracing::debug!(%error, "writes to the database can't be watched, looking all the time");
            })
            .ok();
        let now = Instant::now();
        Self {
            watch,
            every,
            pause: every,
            due: now,
            last: now,
        }
    }

    /// Waits until it is time to look. Dropping it loses nothing.
    pub(super) async fn next(&mut self) {
        while Instant::now() < self.due {
            let (due, soon) = (self.due, self.last + self.every);
            tokio::select! {
                () = sleep_until(due) => {}
                () = written(self.watch.as_ref()), if due > soon => {
                    let idle = soon < Instant::now();
                    self.pause = if idle { FIRST } else { self.every };
                    self.due = due.min(soon);
                }
            }
        }
        self.looked(Instant::now());
    }

    /// Plans the next look.
    fn looked(&mut self, now: Instant) {
        self.last = now;
        self.due = now + self.pause;
        if self.watch.is_some() {
            // Longer and longer, until the next write begins a new series.
            let longer = self.pause * 2;
            self.pause = if longer < SERIES { longer } else { IDLE };
        }
    }
}

/// Waits for writes to the log. What the kernel tells is only that there were some.
async fn written(watch: Option<&AsyncFd<OwnedFd>>) {
    let read = async |watch: &AsyncFd<OwnedFd>| {
        watch
            .async_io(Interest::READABLE, |fd| {
                rustix::io::read(fd, &mut [0_u8; 4096]).map_err(std::io::Error::from)
            })
            .await
    };
    match watch {
        Some(watch) if read(watch).await.is_ok() => {}
        _ => std::future::pending().await,
    }
}

fn watch(database: &Path) -> Result<AsyncFd<OwnedFd>, std::io::Error> {
    let mut log = database.as_os_str().to_owned();
    log.push("-wal");
    let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    // The log is removed with the last connection; whoever watches has one.
    inotify::add_watch(&inotify, Path::new(&log), WatchFlags::MODIFY)?;
    #[expect(
        deprecated,
        reason = "its successor needs unsafe code, for descriptors that change; an owned one doesn't"
    )]
    AsyncFd::with_interest(inotify, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_write_is_looked_at_at_once_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("a.db-wal");
        std::fs::write(&log, "").unwrap();
        let mut changes = FileChanges::watch(&folder.path().join("a.db"), Duration::from_millis(10));
        assert!(changes.watch.is_some());
        changes.due = Instant::now() + Duration::from_mins(10);

        std::fs::write(folder.path().join("another"), "x").unwrap();
        assert_eq!(changes.next().now_or_never(), None);

        std::fs::write(&log, "a commit").unwrap();
        timeout(Duration::from_mins(1), changes.next())
            .await
            .expect("the write is told");
    }

    #[tokio::test]
    async fn looks_get_rare_while_nothing_is_written_if_writes_are_told() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.db-wal"), "").unwrap();
        for (name, looks) in [("a.db", 10..40), ("none.db", 900..1_100)] {
            let mut changes = FileChanges::watch(&folder.path().join(name), Duration::from_millis(10));
            let (begin, mut count) = (changes.due, 0);
            while changes.due < begin + Duration::from_secs(10) {
                changes.looked(changes.due);
                count += 1;
            }
            assert!(looks.contains(&count), "{name}: {count} looks in 10 s");
        }
    }
}
