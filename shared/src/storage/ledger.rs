//! What was spent, as it was written down; and added up.

use super::{Result, Store, read};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId, SessionId};
use crate::job::{JobKind, JobStatus};
use crate::money::MicroUsd;

impl Store {
    /// Up to `limit` entries of this part of the ledger, newest first, beyond the entry at this time and of this number.
    pub async fn ledger_entries(
        &self,
        part: &LedgerPart,
        beyond: Option<(Timestamp, i64)>,
        limit: i64,
    ) -> Result<Vec<LedgerEntry>> {
        let (at, number) = beyond.unwrap_or((part.to, i64::MIN));
        // Two texts, because each has its index.
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

    /// Up to `limit` sums over this part of the ledger, by this grouping, in the order of their groups' names, beyond
    /// the group of this name.
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

    /// What this key has done and spent since ever.
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
    /// What this key's jobs cost; `None`: everybody's.
    pub key_id: Option<KeyId>,
    /// From this time on.
    pub from: Timestamp,
    /// Before this time.
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
    /// Its place in the ledger.
    pub ledger_number: i64,
    /// When the attempt ended, or the adjustment was made.
    pub at: Timestamp,
    /// Whose money it was; empty for an adjustment of the global budget.
    pub key_id: KeyId,
    /// For which job; none for an adjustment.
    pub job_id: Option<JobId>,
    /// For which attempt of it.
    pub attempt: Option<i64>,
    /// In which session.
    pub session_id: Option<SessionId>,
    /// The session's name, as long as there is the session.
    pub session: Option<String>,
    /// The model.
    pub model: Option<String>,
    /// What it cost.
    pub cost: MicroUsd,
    /// Tokens read that no cache held.
    pub input_tokens: i64,
    /// Tokens written.
    pub output_tokens: i64,
    /// Tokens written to a cache.
    pub cache_creation_input_tokens: i64,
    /// Tokens read from a cache.
    pub cache_read_input_tokens: i64,
    /// Whether the cost was rebuilt from what was seen.
    pub estimated: bool,
    /// Why it was adjusted.
    pub reason: Option<String>,
}

/// What the ledger may be added up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerGroup {
    /// The days, in UTC, in which attempts ended: whole days since 1970.
    Day,
    /// The keys, by their ids.
    Key,
    /// The models; adjustments have none.
    Model,
    /// The sessions, by their ids; jobs without one are together.
    Session,
}

/// What a group of entries costs together.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow)]
pub struct LedgerSum {
    /// The group; empty for what has none.
    pub name: String,
    /// The name of the session that it is.
    pub session: Option<String>,
    /// What it cost.
    pub cost: MicroUsd,
    /// The part of it that was rebuilt from what was seen.
    pub estimated_cost: MicroUsd,
    /// Tokens read that no cache held.
    pub input_tokens: i64,
    /// Tokens written.
    pub output_tokens: i64,
    /// Tokens written to a cache.
    pub cache_creation_input_tokens: i64,
    /// Tokens read from a cache.
    pub cache_read_input_tokens: i64,
    /// How many entries it has.
    pub entries: i64,
}

/// What a key has done and spent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Sessions that there are.
    pub sessions: i64,
    /// The sum of the ledger.
    pub cost: MicroUsd,
    /// Turns of all attempts.
    pub turns: i64,
    /// Jobs, counted by kind and status.
    pub jobs: Vec<(JobKind, JobStatus, i64)>,
}

impl Usage {
    /// Jobs of this status (`None`: of any) that were submitted as jobs.
    pub fn jobs(&self, status: Option<JobStatus>) -> i64 {
        self.count(|kind, counted| kind == JobKind::Job && status.is_none_or(|status| status == counted))
    }

    /// Prompts, and the answers to those that were done.
    pub fn messages(&self) -> i64 {
        self.count(|_, _| true) + self.count(|_, status| status == JobStatus::Done)
    }

    fn count(&self, of: impl Fn(JobKind, JobStatus) -> bool) -> i64 {
        let counted = self.jobs.iter().filter(|(kind, status, _)| of(*kind, *status));
        counted.map(|(.., count)| count).sum()
    }
}
