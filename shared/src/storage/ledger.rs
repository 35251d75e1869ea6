//! Reads the ledger, entry by entry. Its sums are in `usage.rs`.

use super::{Result, Store, read};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId, SessionId};
use crate::money::MicroUsd;

impl Store {
    /// Up to `limit` entries of this part of the ledger, newest first, after the entry with this time and number.
    pub async fn ledger_entries(
        &self,
        part: &LedgerPart,
        beyond: Option<(Timestamp, i64)>,
        limit: i64,
    ) -> Result<Vec<LedgerEntry>> {
        let (at, number) = beyond.unwrap_or((part.to, i64::MIN));
        read!(
            self,
            "read the ledger",
            fetch_all => LedgerEntry,
            ledger_entries_sql(part.key_id.is_some()),
            part.owner(),
            part.from,
            at,
            number,
            limit
        )
    }
}

/// The statement that reads entries: of a key or of all, because each uses its own index.
#[doc(hidden)]
pub const fn ledger_entries_sql(of_key: bool) -> &'static str {
    macro_rules! entries {
        ($of:literal) => {
            concat!(
                "select ledger_number, at, ledger.key_id, job_id, attempt, ledger.session_id, session.name as session,
                   model, cost, input_tokens, output_tokens, cache_creation_input_tokens, cache_read_input_tokens,
                   estimated, reason
                 from ledger left join session on session.session_id = ledger.session_id
                 where ",
                $of,
                " and at >= $2 and (at, ledger_number) < ($3, $4)
                 order by at desc, ledger_number desc limit $5"
            )
        };
    }
    if of_key {
        entries!("ledger.key_id = $1")
    } else {
        entries!("$1 = '*'")
    }
}

/// A part of the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerPart {
    /// The costs of this key's jobs; `None`: of all keys.
    pub key_id: Option<KeyId>,
    /// From this time.
    pub from: Timestamp,
    /// Until before this time.
    pub to: Timestamp,
}

impl LedgerPart {
    pub(super) fn owner(&self) -> &str {
        self.key_id.as_ref().map_or("*", KeyId::as_str)
    }
}

/// One entry of the ledger: what one model cost in one attempt, or an adjustment.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct LedgerEntry {
    /// Its number in the ledger.
    pub ledger_number: i64,
    /// When the attempt ended, or the adjustment was made.
    pub at: Timestamp,
    /// The key that is charged; empty for an adjustment of the global budget.
    pub key_id: KeyId,
    /// The job; `None` for an adjustment.
    pub job_id: Option<JobId>,
    /// The attempt of the job.
    pub attempt: Option<i64>,
    /// The session.
    pub session_id: Option<SessionId>,
    /// The session's name, while the session exists.
    pub session: Option<String>,
    /// The model.
    pub model: Option<String>,
    /// What it cost.
    pub cost: MicroUsd,
    /// Input tokens that were not read from the cache.
    pub input_tokens: i64,
    /// Output tokens.
    pub output_tokens: i64,
    /// Input tokens written to the cache.
    pub cache_creation_input_tokens: i64,
    /// Input tokens read from the cache.
    pub cache_read_input_tokens: i64,
    /// Whether the cost was computed from the tokens seen, because the CLI reported none.
    pub estimated: bool,
    /// The reason of an adjustment.
    pub reason: Option<String>,
}

/// How the ledger is grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerGroup {
    /// By the day on which attempts ended, in UTC: whole days since 1970.
    Day,
    /// By key id.
    Key,
    /// By model; adjustments have none.
    Model,
    /// By session id; jobs without a session are one group.
    Session,
}

/// The sum of a group of entries.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct LedgerSum {
    /// The group; empty for entries without one.
    pub name: String,
    /// The name of the session, if the group is a session.
    pub session: Option<String>,
    /// What it cost.
    pub cost: MicroUsd,
    /// The part of the cost that is estimated.
    pub estimated_cost: MicroUsd,
    /// Input tokens that were not read from the cache.
    pub input_tokens: i64,
    /// Output tokens.
    pub output_tokens: i64,
    /// Input tokens written to the cache.
    pub cache_creation_input_tokens: i64,
    /// Input tokens read from the cache.
    pub cache_read_input_tokens: i64,
    /// The number of entries.
    pub entries: i64,
}
