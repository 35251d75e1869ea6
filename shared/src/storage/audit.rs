//! The audit: changes of keys and budgets, and rejected authentications.

use super::columns::columns;
use super::{Result, Store, Tx, execute, read};
use crate::clock::Timestamp;
use serde_json::Value;
use std::time::Duration;

/// The action of a rejected authentication.
const REFUSED: &str = "auth.refused";
/// The span of time for which rejected authentications are counted in one row, in microseconds.
const REFUSED_WITHIN: i64 = 15 * 60 * 1_000_000;
/// How long the counts are kept.
const REFUSED_KEPT: Duration = Duration::from_hours(90 * 24);

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditEntry {
    /// When.
    pub at: Timestamp,
    /// Who: a key's id, `anonymous` or `cli`.
    pub actor: String,
    /// What: `key.create`, `budget.put` …
    pub action: &'static str,
    /// The object: an id.
    pub object_id: String,
    /// The client's address; empty if there is none.
    pub address: String,
    /// The request id; empty if there is none.
    pub request_id: String,
    /// Details, never a secret.
    pub detail: Value,
}

/// Identifies a count of rejected authentications.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Refused {
    /// The client's address.
    pub address: String,
    /// The id of the presented key if it exists; otherwise empty.
    pub key_id: String,
}

/// An entry as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct AuditRow {
    /// Numbers entries in order; lists are sorted by it.
    pub audit_number: i64,
    /// When; for rejected authentications, the start of the quarter of an hour.
    pub at: Timestamp,
    /// Who; empty for rejected authentications.
    pub actor: String,
    /// What.
    pub action: String,
    /// The object.
    pub object_id: String,
    /// The client's address.
    pub address: String,
    /// The request id.
    pub request_id: String,
    /// How often.
    pub times: i64,
    /// Details, as JSON.
    pub detail: String,
}

impl Tx {
    /// Records a change, in the transaction that makes it.
    pub async fn audit(&mut self, entry: &AuditEntry) -> Result<()> {
        execute!(
            self,
            "note a change",
            "insert into audit (at, actor, action, object_id, address, request_id, detail)
             values ($1, $2, $3, $4, $5, $6, $7)",
            entry.at,
            &entry.actor,
            entry.action,
            &entry.object_id,
            &entry.address,
            &entry.request_id,
            entry.detail.to_string()
        )
        .map(drop)
    }
}

impl Store {
    /// Records a change that is already committed.
    pub async fn audit(&self, entry: &AuditEntry) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.audit(entry).await?;
        tx.commit().await
    }

    /// Adds rejected authentications to the counts of this quarter of an hour.
    pub async fn count_refused(&self, refused: &[(Refused, i64)], now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        for (refused, times) in refused {
            execute!(
                tx,
                "count refused authentications",
                "insert into audit (at, actor, action, object_id, address, request_id, times, detail)
                 values ($1, '', 'auth.refused', $2, $3, '', $4, '{}')
                 on conflict (at, address, object_id) where action = 'auth.refused'
                 do update set times = audit.times + excluded.times",
                Timestamp(now.0 - now.0.rem_euclid(REFUSED_WITHIN)),
                &refused.key_id,
                &refused.address,
                times
            )?;
        }
        tx.commit().await
    }

    /// Up to `limit` entries before number `before` (0: from the newest), newest first. If `actor` isn't empty, only
    /// its entries.
    pub async fn audit_entries(&self, actor: &str, before: i64, limit: i64) -> Result<Vec<AuditRow>> {
        // Two statements, because each uses its own index.
        let sql = if actor.is_empty() {
            AUDIT_OF_ALL
        } else {
            AUDIT_OF_ACTOR
        };
        let before = if before == 0 { i64::MAX } else { before };
        read!(self, "read the audit", fetch_all => AuditRow, sql, actor, before, limit)
    }

    /// Deletes old counts of rejected authentications. Changes are kept.
    pub async fn sweep_audit(&self, now: Timestamp) -> Result<()> {
        let kept = i64::try_from(REFUSED_KEPT.as_micros()).unwrap_or(i64::MAX);
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "forget old counts",
            "delete from audit where action = $1 and at < $2",
            REFUSED,
            Timestamp(now.0 - kept)
        )?;
        tx.commit().await
    }
}

macro_rules! audit {
    ($of:literal) => {
        concat!(
            "select ",
            columns!(AuditRow),
            " from audit where ",
            $of,
            " and audit_number < $2 order by audit_number desc limit $3"
        )
    };
}

#[doc(hidden)]
pub const AUDIT_OF_ALL: &str = audit!("$1 = ''");
#[doc(hidden)]
pub const AUDIT_OF_ACTOR: &str = audit!("actor = $1");
