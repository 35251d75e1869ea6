//! A transaction, and what has to happen when it commits.

use super::group_commit::Member;
use super::macros::lock;
use super::wakeups::{DELIVER, DIRECTIVE, RING};
use super::{Db, Error, Queue, Result, Store, budget, error};
use crate::clock::{self, Timestamp};
use crate::id::{JobId, KeyId};
use sqlx::sqlite::SqliteConnection;
use sqlx::{Postgres, Sqlite, Transaction};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering;

/// One transaction. Dropped without [`Tx::commit`], it leaves no trace.
#[derive(Debug)]
pub struct Tx {
    pub(super) db: TxDb,
    pub(super) store: Store,
    /// Lanes that got ready jobs, each with the highest priority among them.
    ready: BTreeMap<KeyId, i64>,
    /// Jobs that changed.
    touched: BTreeSet<JobId>,
    /// Whether a slot should look although no job became ready.
    rings: bool,
    /// Whether slots are woken at the commit.
    pub(super) wakes: bool,
    /// Running jobs whose workers should look whether to go on.
    directed: BTreeSet<JobId>,
    /// Lanes that wait for money which this transaction may have given back.
    pub(super) freed: Vec<(KeyId, Timestamp)>,
    /// The key of which this transaction has announced a job.
    pub(super) announced: Option<KeyId>,
    /// Whether there is something new to deliver.
    pub(super) delivers: bool,
    /// Thresholds of budgets that this transaction found reached.
    pub(super) alerts: Vec<budget::Alert>,
}

#[derive(Debug)]
pub(super) enum TxDb {
    Sqlite(SqliteTx),
    Postgres(Transaction<'static, Postgres>),
}

/// A transaction on SQLite.
#[derive(Debug)]
pub(super) enum SqliteTx {
    /// Of its own.
    Own(Transaction<'static, Sqlite>),
    /// A part of one that several share.
    Shared(Member),
}

impl Deref for SqliteTx {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        match self {
            Self::Own(tx) => tx,
            Self::Shared(member) => member,
        }
    }
}

impl DerefMut for SqliteTx {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        match self {
            Self::Own(tx) => tx,
            Self::Shared(member) => member,
        }
    }
}

impl Tx {
    pub(super) fn new(db: TxDb, store: Store) -> Self {
        Self {
            db,
            store,
            ready: BTreeMap::new(),
            touched: BTreeSet::new(),
            rings: false,
            wakes: false,
            directed: BTreeSet::new(),
            freed: Vec::new(),
            announced: None,
            delivers: false,
            alerts: Vec::new(),
        }
    }

    /// Commits, with the deferred lane hints and tickets, and notifies those who wait.
    pub async fn commit(mut self) -> Result<()> {
        let ready = std::mem::take(&mut self.ready);
        for (key_id, priority) in &ready {
            self.raise_hint(key_id, *priority).await?;
        }
        if self.rings || !ready.is_empty() {
            self.push_tickets(Queue::Jobs, ready.len().max(1)).await?;
            self.wakes = true;
        }
        for alert in std::mem::take(&mut self.alerts) {
            self.announce_alert(&alert, clock::now()).await?;
            self.alerts.push(alert);
        }
        if self.delivers {
            self.push_tickets(Queue::Webhooks, 1).await?;
        }
        let (rings, delivers) = (self.wakes, self.delivers);
        let Self {
            db,
            store,
            touched,
            directed,
            freed,
            alerts,
            ..
        } = self;
        match db {
            TxDb::Sqlite(tx) => {
                match tx {
                    SqliteTx::Own(tx) => tx.commit().await.map_err(Error::during(error::COMMIT))?,
                    SqliteTx::Shared(member) => member.commit().await?,
                }
                if let Db::Sqlite {
                    committed,
                    rings: rung,
                    ..
                } = &*store.db
                {
                    store.outage.wrote();
                    rung.fetch_or(rings, Ordering::Relaxed);
                    committed.notify_one();
                }
            }
            TxDb::Postgres(tx) => {
                let committed = store.liveness.in_time(tx.commit()).await;
                committed.map_err(Error::during(error::COMMIT))?;
                store
                    .notifier
                    .notify(words((rings, delivers), &touched, &directed));
            }
        }
        alerts.iter().for_each(budget::Alert::log);
        // A transaction holds one lane, so others are freed in their own. What fails here is done by the sweeper.
        for (key_id, now) in freed {
            let _ = Box::pin(store.release_budget_hold(&key_id, now)).await;
        }
        Ok(())
    }

    /// Rolls back. Dropping does the same, but later.
    pub async fn rollback(self) -> Result<()> {
        match self.db {
            TxDb::Sqlite(SqliteTx::Own(tx)) => tx.rollback().await,
            // The next one to use the shared transaction rolls it back.
            TxDb::Sqlite(SqliteTx::Shared(_)) => Ok(()),
            TxDb::Postgres(tx) => self.store.liveness.in_time(tx.rollback()).await,
        }
        .map_err(Error::during("roll back"))
    }

    /// Takes the lock under which all claims are made, one at a time.
    #[doc(hidden)]
    pub async fn lock_claims(&mut self) -> Result<()> {
        self.postgres_lock(lock!("", "1"), None).await
    }

    /// SQLite needs no such locks: a transaction is the only writer.
    pub(super) async fn postgres_lock(&mut self, sql: &'static str, name: Option<String>) -> Result<()> {
        if let TxDb::Postgres(tx) = &mut self.db {
            self.store.work.statement();
            let query = match name {
                Some(name) => sqlx::query(sql).bind(name),
                None => sqlx::query(sql),
            };
            let locked = self.store.liveness.in_time(query.execute(&mut **tx)).await;
            locked.map_err(Error::during("wait for a lock"))?;
        }
        Ok(())
    }

    /// A job of this key became ready: its lane's hint is raised and a ticket pushed when this commits.
    pub(super) fn became_ready(&mut self, key_id: &KeyId, priority: i64) {
        let highest = self.ready.entry(key_id.clone()).or_insert(priority);
        *highest = priority.max(*highest);
    }

    /// Those who wait for this job are notified when this commits.
    pub(super) fn touch(&mut self, job_id: JobId) {
        self.touched.insert(job_id);
    }

    /// Those who deliver look when this commits.
    pub(super) fn deliver(&mut self) {
        self.delivers = true;
    }

    /// A slot should look, although no job became ready in this transaction.
    pub(super) fn ring(&mut self) {
        self.rings = true;
    }

    /// The worker of this running job looks whether to go on when this commits.
    pub(super) fn direct(&mut self, job_id: JobId) {
        self.directed.insert(job_id);
    }
}

/// The words of a notification.
fn words(
    (rings, delivers): (bool, bool),
    touched: &BTreeSet<JobId>,
    directed: &BTreeSet<JobId>,
) -> Vec<String> {
    let ring = rings.then(|| RING.to_owned());
    let deliver = delivers.then(|| DELIVER.to_owned());
    let directed = directed.iter().map(|job_id| format!("{DIRECTIVE}{job_id}"));
    ring.into_iter()
        .chain(deliver)
        .chain(touched.iter().map(ToString::to_string))
        .chain(directed)
        .collect()
}
