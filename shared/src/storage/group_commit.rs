//! Group commit on SQLite: submissions that wait for the one writer share a transaction, and so one flush to the disk.
//!
//! Each is a savepoint of its own: what is rolled back, fails or is dropped takes nothing of the others with it. None
//! is told that it is stored before the transaction is committed.

use super::work::Counters;
use super::{Error, Result, WRITER_TIMEOUT, error};
use sqlx::sqlite::{SqliteConnection, SqlitePool};
use sqlx::{Executor, Sqlite, Transaction};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};
use tokio::time::timeout;

const BEGIN: &str = "begin a transaction";

/// The transaction that is being shared, if there is one. Who waits for it gets it in the order of asking.
#[derive(Clone, Debug, Default)]
pub(super) struct GroupCommit(Arc<Mutex<Option<Group>>>);

#[derive(Debug)]
struct Group {
    tx: Transaction<'static, Sqlite>,
    /// Those who are done and wait for the commit.
    done: Vec<oneshot::Sender<std::result::Result<(), Arc<sqlx::Error>>>>,
    /// Somebody's savepoint is open. If nobody works in it any more, it has to be rolled back.
    unfinished: bool,
}

/// A part of a shared transaction. Dropping it rolls it back.
#[derive(Debug)]
pub(super) struct Member(OwnedMutexGuard<Option<Group>>);

impl GroupCommit {
    /// Waits for a turn, and begins a transaction if none is open.
    pub(super) async fn join(&self, writer: &SqlitePool, work: &Counters) -> Result<Member> {
        let mut group = timeout(WRITER_TIMEOUT, self.0.clone().lock_owned())
            .await
            .map_err(|_| Error::during(BEGIN)(sqlx::Error::PoolTimedOut))?;
        tidy(&mut group).await;
        if group.is_none() {
            work.transaction();
            let tx = writer
                .begin_with("BEGIN IMMEDIATE")
                .await
                .map_err(Error::during(BEGIN))?;
            *group = Some(Group {
                tx,
                done: Vec::new(),
                unfinished: false,
            });
            // It gets its turn after those who wait now. Nobody who is dropped meanwhile can leave the transaction open.
            let shared = self.clone();
            tokio::spawn(async move { shared.commit().await });
        }
        let mut member = Member(group);
        member.group().unfinished = true;
        sqlx::query("savepoint member")
            .execute(&mut *member)
            .await
            .map_err(Error::during(BEGIN))?;
        Ok(member)
    }

    async fn commit(&self) {
        let mut group = self.0.lock().await;
        tidy(&mut group).await;
        let Some(Group { tx, done, .. }) = group.take() else {
            return;
        };
        let committed = tx.commit().await.map_err(Arc::new);
        for done in done {
            let _ = done.send(committed.clone());
        }
    }
}

/// Rolls back what was left unfinished. Some errors, as of a full disk, roll back the whole transaction, which shows here.
async fn tidy(group: &mut Option<Group>) {
    let Some(Group { tx, unfinished, .. }) = group else {
        return;
    };
    if !*unfinished {
        return;
    }
    match tx.execute("rollback to member; release member").await {
        Ok(_) => *unfinished = false,
        Err(error) => {
            let error = Arc::new(error);
            for done in group.take().into_iter().flat_map(|group| group.done) {
                let _ = done.send(Err(error.clone()));
            }
        }
    }
}

impl Member {
    fn group(&mut self) -> &mut Group {
        self.0.as_mut().expect("a member's group is open")
    }

    /// Waits until the shared transaction is committed, or has failed.
    pub(super) async fn commit(mut self) -> Result<()> {
        sqlx::query("release member")
            .execute(&mut *self)
            .await
            .map_err(Error::during("store a part of a transaction"))?;
        let (sender, committed) = oneshot::channel();
        let group = self.group();
        group.unfinished = false;
        group.done.push(sender);
        drop(self);
        committed
            .await
            .unwrap_or_else(|_| Err(Arc::new(sqlx::Error::WorkerCrashed)))
            .map_err(Error::during(error::COMMIT))
    }
}

impl Deref for Member {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.0.as_ref().expect("a member's group is open").tx
    }
}

impl DerefMut for Member {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.group().tx
    }
}
