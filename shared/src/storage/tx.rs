//! A transaction, and what has to happen when it commits.

use super::macros::lock;
use super::{Db, Error, Result, Store, budget, error};
use crate::id::{JobId, KeyId};
use sqlx::{Postgres, Sqlite, Transaction};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

/// One transaction. Dropped without [`Tx::commit`], it leaves no trace.
#[derive(Debug)]
pub struct Tx {
    pub(super) db: TxDb,
    pub(super) store: Store,
    /// Lanes that got ready jobs, each with the highest priority among them.
    ready: BTreeMap<KeyId, i64>,
    /// Lanes whose hint this transaction lowered.
    pub(super) lowered: Vec<KeyId>,
    /// Jobs that changed.
    pub(super) touched: BTreeSet<JobId>,
    /// Whether a slot should look although no job became ready.
    rings: bool,
    /// Thresholds of budgets that this transaction found reached.
    pub(super) alerts: Vec<budget::Alert>,
}

#[derive(Debug)]
pub(super) enum TxDb {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Tx {
    pub(super) fn new(db: TxDb, store: Store) -> Self {
        Self {
            db,
            store,
            ready: BTreeMap::new(),
            lowered: Vec::new(),
            touched: BTreeSet::new(),
            rings: false,
            alerts: Vec::new(),
        }
    }

    /// Commits, and applies the deferred lane hints, tickets and notifications.
    pub async fn commit(mut self) -> Result<()> {
        let ready = std::mem::take(&mut self.ready);
        for (key_id, priority) in &ready {
            self.raise_to(key_id, *priority).await?;
        }
        let rings = self.rings || !ready.is_empty();
        if rings {
            self.push_tickets(ready.len().max(1)).await?;
        }
        self.notify(rings).await?;
        let Self {
            db,
            store,
            lowered,
            alerts,
            ..
        } = self;
        match db {
            TxDb::Sqlite(tx) => {
                tx.commit().await.map_err(Error::during(error::COMMIT))?;
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
                // Others may have changed the hints without seeing this transaction; from here on one of the two
                // sees the other. What fails here is repaired by the sweeper within a second.
                let _ = store.raise_again(&ready, &lowered).await;
            }
        }
        alerts.iter().for_each(budget::Alert::log);
        Ok(())
    }

    /// Rolls back. Dropping does the same, but later.
    pub async fn rollback(self) -> Result<()> {
        match self.db {
            TxDb::Sqlite(tx) => tx.rollback().await,
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

    /// A slot should look, although no job became ready in this transaction.
    pub(super) fn ring(&mut self) {
        self.rings = true;
    }
}
