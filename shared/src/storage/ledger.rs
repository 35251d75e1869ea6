//! Reads the ledger: entries, sums and totals.

use super::{Result, Store, read};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId, SessionId};
use crate::job::{JobKind, JobStatus};
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
        // Two statements, because each uses its own index.
        macro_rules! entries {
            ($of:literal) => {
                concat!(
                    "select ledger_number, at, ledger.key_id, job_id, attempt, ledger.session_id, session.name as session,
                       model, cost, input_tokens, output_tokens, cache_creation_input_tokens, cache_read_input_tokens,
                       estimated, reason
                     from ledger left join session on session.session_id = ledger.session_id
                     where ",
                    $of,
                    "at >= $2 and at <= $3 and (at < $3 or ledger_number < $4)
                     order by at desc, ledger_number desc limit $5"
                )
            };
        }
        let sql = match part.key_id {
            Some(_) => entries!("ledger.key_id = $1 and "),
            None => entries!("$1 = '' and "),
        };
        read!(
            self,
            "read the ledger",
            fetch_all => LedgerEntry,
            sql,
            part.owner(),
            part.from,
            at,
            number,
            limit
        )
    }

    /// Up to `limit` sums over this part of the ledger by this grouping, sorted by group name, after the group with this
    /// name.
    pub async fn ledger_sums(
        &self,
        part: &LedgerPart,
        group: LedgerGroup,
        beyond: Option<&str>,
        limit: i64,
    ) -> Result<Vec<LedgerSum>> {
        macro_rules! sums {
            ($by:literal, $of:literal) => {
                concat!(
                    "select named.*, session.name as session from (
                       select ",
                    $by,
                    " as name, cast(sum(cost) as bigint) as cost,
                         cast(coalesce(sum(case when estimated then cost else 0 end), 0) as bigint) as estimated_cost,
                         cast(sum(input_tokens) as bigint) as input_tokens,
                         cast(sum(output_tokens) as bigint) as output_tokens,
                         cast(sum(cache_creation_input_tokens) as bigint) as cache_creation_input_tokens,
                         cast(sum(cache_read_input_tokens) as bigint) as cache_read_input_tokens,
                         count(*) as entries
                       from ledger
                       where ",
                    $of,
                    "at >= $2 and at < $3 and ($4 = 0 or ",
                    $by,
                    " > $5)
                       group by 1 order by 1 limit $6) as named
                     left join session on session.session_id = named.name
                     order by named.name"
                )
            };
        }
        macro_rules! by {
            ($by:literal) => {
                match part.key_id {
                    Some(_) => sums!($by, "key_id = $1 and "),
                    None => sums!($by, "$1 = '' and "),
                }
            };
        }
        let sql = match group {
            LedgerGroup::Day => by!("cast(at / 86400000000 as text)"),
            LedgerGroup::Key => by!("key_id"),
            LedgerGroup::Model => by!("coalesce(model, '')"),
            LedgerGroup::Session => by!("coalesce(session_id, '')"),
        };
        read!(
            self,
            "add up the ledger",
            fetch_all => LedgerSum,
            sql,
            part.owner(),
            part.from,
            part.to,
            i64::from(beyond.is_some()),
            beyond.unwrap_or(""),
            limit
        )
    }

    /// Lifetime totals of this key.
    pub async fn usage(&self, key_id: &KeyId) -> Result<Usage> {
        let (cost,) = read!(
            self,
            "add up the ledger",
            fetch_one => (MicroUsd,),
            "select cast(coalesce(sum(cost), 0) as bigint) from ledger where key_id = $1",
            key_id
        )?;
        let (sessions,) = read!(
            self,
            "count sessions",
            fetch_one => (i64,),
            "select count(*) from session where key_id = $1",
            key_id
        )?;
        let (turns,) = read!(
            self,
            "count turns",
            fetch_one => (i64,),
            "select cast(coalesce(sum(attempt.turns), 0) as bigint) from attempt
             join job on job.job_id = attempt.job_id where job.key_id = $1",
            key_id
        )?;
        let jobs = read!(
            self,
            "count jobs",
            fetch_all => (JobKind, JobStatus, i64),
            "select kind, status, count(*) from job where key_id = $1 group by kind, status",
            key_id
        )?;
        Ok(Usage {
            sessions,
            cost,
            turns,
            jobs,
        })
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
    fn owner(&self) -> &str {
        self.key_id.as_ref().map_or("", KeyId::as_str)
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

/// Totals of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Existing sessions.
    pub sessions: i64,
    /// The sum of the ledger.
    pub cost: MicroUsd,
    /// Turns of all attempts.
    pub turns: i64,
    /// Jobs, counted by kind and status.
    pub jobs: Vec<(JobKind, JobStatus, i64)>,
}

impl Usage {
    /// The number of jobs with this status (`None`: any) that were submitted as jobs.
    pub fn jobs(&self, status: Option<JobStatus>) -> i64 {
        self.count(|kind, counted| kind == JobKind::Job && status.is_none_or(|status| status == counted))
    }

    /// The number of prompts, plus the answers to those whose job is done.
    pub fn messages(&self) -> i64 {
        self.count(|_, _| true) + self.count(|_, status| status == JobStatus::Done)
    }

    fn count(&self, of: impl Fn(JobKind, JobStatus) -> bool) -> i64 {
        let counted = self.jobs.iter().filter(|(kind, status, _)| of(*kind, *status));
        counted.map(|(.., count)| count).sum()
    }
}
