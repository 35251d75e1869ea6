//! What was used, kept as sums: reading them costs the same however many jobs there were.
//!
//! Whoever books a cost, accepts a job or ends one writes no sum. [`Store::count_usage`] adds up afterwards what is new,
//! and a reader adds what isn't counted yet, in the same statement: so the sums are exact at every moment. Rows with a
//! number (of the ledger, jobs, sessions) are counted up to a number below which none can still appear; ended jobs are
//! marked. So a cost that is booked late counts at its own time, and no clock decides anything.

use super::{Db, Result, Store, Tx, execute, fetch, fetch_locked, read};
use crate::id::KeyId;
use crate::job::{JobKind, JobStatus};
use crate::money::MicroUsd;
use crate::storage::ledger::{LedgerGroup, LedgerPart, LedgerSum};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::sleep;

/// So many rows are counted by one transaction.
const AT_ONCE: i64 = 5_000;
/// So many ended jobs are marked by one transaction.
const ENDED_AT_ONCE: i64 = 1_000;
/// How often, and how long apart, transactions are looked at that may have taken a number. None lasts for so long.
const LOOKS: u32 = 50;
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What is counted by its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Ledger,
    Job,
    Session,
}

impl Source {
    const ALL: [Self; 3] = [Self::Ledger, Self::Job, Self::Session];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Ledger => "ledger",
            Self::Job => "job",
            Self::Session => "session",
        }
    }
}

/// Up to which number rows of the source `$name` are counted.
macro_rules! counted {
    ($name:literal) => {
        concat!("(select number from usage_counted where source = '", $name, "')")
    };
}

/// Adds new ledger entries to the sums of one dimension: of each key and, under `*`, of all, over spans of these lengths.
/// `$1` and `$2`: the entries after the first number, up to the second.
macro_rules! add_to_sums {
    ($dimension:literal, $name:literal, $spans:literal) => {
        concat!(
            "with spans (span) as (values ",
            $spans,
            "), owners (everybody) as (values (0), (1))
             insert into usage_sum (dimension, key_id, span, start_at, name, cost, estimated_cost, input_tokens,
               output_tokens, cache_creation_input_tokens, cache_read_input_tokens, entries)
             select '",
            $dimension,
            "', case when everybody = 1 then '*' else key_id end, span, at / span * span, ",
            $name,
            ", sum(cost), sum(case when estimated then cost else 0 end), sum(input_tokens), sum(output_tokens),
               sum(cache_creation_input_tokens), sum(cache_read_input_tokens), count(*)
             from ledger cross join spans cross join owners
             where ledger_number > $1 and ledger_number <= $2
             group by 2, 3, 4, 5
             on conflict (dimension, key_id, span, start_at, name) do update set cost = usage_sum.cost + excluded.cost,
               estimated_cost = usage_sum.estimated_cost + excluded.estimated_cost,
               input_tokens = usage_sum.input_tokens + excluded.input_tokens,
               output_tokens = usage_sum.output_tokens + excluded.output_tokens,
               cache_creation_input_tokens =
                 usage_sum.cache_creation_input_tokens + excluded.cache_creation_input_tokens,
               cache_read_input_tokens = usage_sum.cache_read_input_tokens + excluded.cache_read_input_tokens,
               entries = usage_sum.entries + excluded.entries"
        )
    };
}

pub(super) use counted;

const MINUTE: i64 = 60_000_000;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Adds to lifetime totals what a `select` gives: a key, the name of the total, the addend.
macro_rules! add_to_totals {
    ($select:expr) => {
        concat!(
            "insert into usage_total (key_id, name, value) ",
            $select,
            " on conflict (key_id, name) do update set value = usage_total.value + excluded.value"
        )
    };
}

impl Store {
    /// Adds what is new to the sums. Any number of processes may do it at once.
    pub async fn count_usage(&self) -> Result<()> {
        if let Some(ends) = self.settled_numbers().await? {
            for (source, until) in Source::ALL.into_iter().zip(ends) {
                while self.count_rows(source, until).await? {}
            }
        }
        while self.count_ended().await? {}
        Ok(())
    }

    /// Of each source the number up to which no row can still appear; `None` when that takes too long to find out.
    async fn settled_numbers(&self) -> Result<Option<[i64; 3]>> {
        let Db::Postgres(_) = &*self.db else {
            // Nobody writes at the same time.
            let row = read!(
                self,
                "look for what isn't counted",
                fetch_one => (i64, i64, i64),
                "select (select coalesce(max(ledger_number), 0) from ledger),
                   (select coalesce(max(job_number), 0) from job),
                   (select coalesce(max(session_number), 0) from session)"
            )?;
            return Ok(Some([row.0, row.1, row.2]));
        };
        let last = read!(
            self,
            "look for what isn't counted",
            fetch_one => (i64, i64, i64),
            "select (select case when is_called then last_value else 0 end from ledger_ledger_number_seq),
               (select case when is_called then last_value else 0 end from job_job_number_seq),
               (select case when is_called then last_value else 0 end from session_session_number_seq)"
        )?;
        let known = read!(
            self,
            "look for what isn't counted",
            fetch_all => (String, i64),
            "select source, number from usage_counted"
        )?;
        let last = [last.0, last.1, last.2];
        let is_new = |(source, last): (Source, i64)| {
            known
                .iter()
                .any(|(name, number)| name == source.as_str() && *number < last)
        };
        if !Source::ALL.into_iter().zip(last).any(is_new) {
            return Ok(None);
        }
        // A number is given out before the commit. Who has taken one of these holds this lock of its table until then.
        let mut writers = self.writers().await?;
        for _ in 0..LOOKS {
            if writers.is_empty() {
                return Ok(Some(last));
            }
            sleep(LOOK_INTERVAL).await;
            let now = self.writers().await?;
            writers.retain(|writer| now.contains(writer));
        }
        Ok(None)
    }

    /// The transactions that write to what is counted.
    async fn writers(&self) -> Result<Vec<(String,)>> {
        read!(
            self,
            "look for transactions that write",
            fetch_all => (String,),
            "select distinct virtualtransaction from pg_locks
             where locktype = 'relation' and mode = 'RowExclusiveLock' and granted
               and database = (select oid from pg_database where datname = current_database())
               and relation in ('ledger'::regclass, 'job'::regclass, 'session'::regclass)"
        )
    }

    /// Counts the next rows up to this number; whether there may be more.
    async fn count_rows(&self, source: Source, until: i64) -> Result<bool> {
        let (known,) = read!(
            self,
            "look for what isn't counted",
            fetch_one => (i64,),
            "select number from usage_counted where source = $1",
            source.as_str()
        )?;
        if known >= until {
            return Ok(false);
        }
        let mut tx = self.begin().await?;
        let (from,) = fetch_locked!(
            tx,
            "look for what isn't counted",
            fetch_one => (i64,),
            "select number from usage_counted where source = $1",
            source.as_str()
        )?;
        let to = until.min(from + AT_ONCE);
        if to <= from {
            tx.rollback().await?;
            return Ok(false);
        }
        match source {
            Source::Ledger => tx.count_ledger(from, to).await?,
            Source::Job => tx.count_accepted(from, to).await?,
            Source::Session => tx.count_sessions(from, to).await?,
        }
        execute!(
            tx,
            "note what is counted",
            "update usage_counted set number = $2 where source = $1",
            source.as_str(),
            to
        )?;
        tx.commit().await?;
        Ok(to < until)
    }

    /// Counts ended jobs that aren't marked, and marks them; whether there may be more.
    async fn count_ended(&self) -> Result<bool> {
        let any = read!(
            self,
            "look for what isn't counted",
            fetch_optional => (i64,),
            "select cast(1 as bigint) from job where completed_at is not null and counted = false limit 1"
        )?;
        if any.is_none() {
            return Ok(false);
        }
        let mut tx = self.begin().await?;
        let ended = fetch!(
            tx,
            "count ended jobs",
            fetch_all => (KeyId, JobKind, JobStatus, i64),
            "update job set counted = true
             where completed_at is not null and counted = false and job_id in (
               select job_id from job where completed_at is not null and counted = false limit $1)
             returning key_id, kind, status, (
               select cast(coalesce(sum(turns), 0) as bigint) from attempt where attempt.job_id = job.job_id)",
            ENDED_AT_ONCE
        )?;
        let mut totals: BTreeMap<(KeyId, String), i64> = BTreeMap::new();
        let count = i64::try_from(ended.len()).unwrap_or(i64::MAX);
        for (key_id, kind, status, turns) in ended {
            let name = format!("{}:{}", kind.as_str(), status.as_str());
            *totals.entry((key_id.clone(), name)).or_default() += 1;
            *totals.entry((key_id, "turns".to_owned())).or_default() += turns;
        }
        for ((key_id, name), value) in totals {
            execute!(
                tx,
                "add to a total",
                add_to_totals!("values ($1, $2, $3)"),
                key_id,
                name,
                value
            )?;
        }
        tx.commit().await?;
        Ok(count == ENDED_AT_ONCE)
    }

    /// Lifetime totals of this key.
    pub async fn usage(&self, key_id: &KeyId) -> Result<Usage> {
        let rows = read!(self, "add up usage", fetch_all => (String, i64), USAGE, key_id)?;
        Ok(Usage(rows.into_iter().collect()))
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
        let [p0, p1, p2, p3, p4, p5, p6, p7] = ledger_borders(part.from.0, part.to.0, group);
        read!(
            self,
            "add up the ledger",
            fetch_all => LedgerSum,
            ledger_sums_sql(part.key_id.is_some(), group),
            part.owner(),
            i64::from(beyond.is_some()),
            beyond.unwrap_or(""),
            limit,
            p0,
            p1,
            p2,
            p3,
            p4,
            p5,
            p6,
            p7
        )
    }
}

impl Tx {
    /// Adds the ledger entries with these numbers.
    async fn count_ledger(&mut self, from: i64, to: i64) -> Result<()> {
        const MODELS: &str = add_to_sums!(
            "model",
            "coalesce(model, '')",
            "(60000000), (3600000000), (86400000000)"
        );
        const KEYS: &str = add_to_sums!("key", "key_id", "(60000000), (3600000000), (86400000000)");
        // A service may have as many sessions as jobs, so there are fewer sums.
        const SESSIONS: &str = add_to_sums!(
            "session",
            "coalesce(session_id, '')",
            "(3600000000), (86400000000)"
        );
        for sql in [MODELS, KEYS, SESSIONS] {
            execute!(self, "add up the ledger", sql, from, to)?;
        }
        execute!(
            self,
            "add to a total",
            add_to_totals!(
                "select key_id, 'cost', sum(cost) from ledger
                 where ledger_number > $1 and ledger_number <= $2 group by key_id"
            ),
            from,
            to
        )
        .map(drop)
    }

    /// Adds the jobs with these numbers to those that were accepted, and notes when they were.
    async fn count_accepted(&mut self, from: i64, to: i64) -> Result<()> {
        execute!(
            self,
            "add to a total",
            add_to_totals!(
                "select key_id, kind || ':accepted', count(*) from job
                 where kind in ('job', 'chat') and job_number > $1 and job_number <= $2 group by key_id, kind"
            ),
            from,
            to
        )?;
        execute!(
            self,
            "note when jobs were accepted",
            "insert into job_block (block, first_at, last_at)
             select job_number / 1024, min(created_at), max(created_at) from job
             where kind in ('job', 'chat') and job_number > $1 and job_number <= $2 group by job_number / 1024
             on conflict (block) do update set
               first_at = case when excluded.first_at < job_block.first_at then excluded.first_at
                 else job_block.first_at end,
               last_at = case when excluded.last_at > job_block.last_at then excluded.last_at
                 else job_block.last_at end",
            from,
            to
        )
        .map(drop)
    }

    /// Adds the sessions with these numbers, to those of their keys and, under `*`, to all.
    async fn count_sessions(&mut self, from: i64, to: i64) -> Result<()> {
        execute!(
            self,
            "add to a total",
            add_to_totals!(
                "select case when everybody = 1 then '*' else key_id end, 'sessions', count(*)
                 from session cross join (select 0 as everybody union all select 1) as owners
                 where session_number > $1 and session_number <= $2 group by 1"
            ),
            from,
            to
        )
        .map(drop)
    }
}

/// The lifetime totals of the key `$1`: what is counted, and what isn't yet. An index on the key alone would lead to all of
/// its entries, so the conditions on it are hidden from the planner where the number leads to few.
#[doc(hidden)]
pub const USAGE: &str = concat!(
    "select name, cast(sum(value) as bigint) from (
       select name, value from usage_total where key_id = $1
       union all
       select 'cost', cost from ledger where ledger_number > ",
    counted!("ledger"),
    " and key_id || '' = $1
       union all
       select 'sessions', 1 from session where session_number > ",
    counted!("session"),
    " and key_id || '' = $1
       union all
       select kind || ':accepted', 1 from job
       where key_id = $1 and kind in ('job', 'chat') and job_number > ",
    counted!("job"),
    "
       union all
       select kind || ':' || status, 1 from job where key_id = $1 and completed_at is not null and counted = false
       union all
       select 'turns', turns from job join attempt on attempt.job_id = job.job_id
       where job.key_id = $1 and completed_at is not null and counted = false
       union all
       select kind || ':running', 1 from job where key_id = $1 and status = 'running'
     ) as parts group by name"
);

/// The text that adds up a part of the ledger: whole days, hours and minutes are sums that are kept, and the rest is added
/// up from the entries. `$1` is the key or `*`, `$5` to `$12` are the [`borders`].
macro_rules! ledger_sums {
    ($dimension:literal, $name:literal, $by:literal, $of:literal) => {
        concat!(
            "select named.*, session.name as session from (
               select ",
            $by,
            " as name, cast(sum(cost) as bigint) as cost, cast(sum(estimated_cost) as bigint) as estimated_cost,
                 cast(sum(input_tokens) as bigint) as input_tokens,
                 cast(sum(output_tokens) as bigint) as output_tokens,
                 cast(sum(cache_creation_input_tokens) as bigint) as cache_creation_input_tokens,
                 cast(sum(cache_read_input_tokens) as bigint) as cache_read_input_tokens,
                 cast(sum(entries) as bigint) as entries
               from (",
            ledger_sums!(kept $dimension, "86400000000", "$8", "$9"),
            " union all ",
            ledger_sums!(kept $dimension, "3600000000", "$7", "$8"),
            " union all ",
            ledger_sums!(kept $dimension, "3600000000", "$9", "$10"),
            " union all ",
            ledger_sums!(kept $dimension, "60000000", "$6", "$7"),
            " union all ",
            ledger_sums!(kept $dimension, "60000000", "$10", "$11"),
            " union all ",
            ledger_sums!(entries $name, $of, "$5", "$6"),
            " union all ",
            ledger_sums!(entries $name, $of, "$11", "$12"),
            " union all ",
            ledger_sums!(of $name),
            // Hidden from the planner, so that the number leads to the entries, which are few.
            " from ledger where ledger_number > ",
            counted!("ledger"),
            " and ($1 = '*' or key_id || '' = $1) and at + 0 >= $5 and at + 0 < $12
               ) as parts
               where $2 = 0 or ",
            $by,
            " > $3
               group by 1 order by 1 limit $4) as named
             left join session on session.session_id = named.name
             order by named.name"
        )
    };
    (kept $dimension:literal, $span:literal, $from:literal, $to:literal) => {
        concat!(
            "select start_at as at, name, cost, estimated_cost, input_tokens, output_tokens,
               cache_creation_input_tokens, cache_read_input_tokens, entries
             from usage_sum
             where dimension = '",
            $dimension,
            "' and key_id = $1 and span = ",
            $span,
            " and start_at >= ",
            $from,
            " and start_at < ",
            $to
        )
    };
    (entries $name:literal, $of:literal, $from:literal, $to:literal) => {
        concat!(
            ledger_sums!(of $name),
            " from ledger where ",
            $of,
            " and at >= ",
            $from,
            " and at < ",
            $to,
            " and ledger_number <= ",
            counted!("ledger")
        )
    };
    (of $name:literal) => {
        concat!(
            "select at, ",
            $name,
            " as name, cost, case when estimated then cost else 0 end as estimated_cost, input_tokens, output_tokens,
               cache_creation_input_tokens, cache_read_input_tokens, 1 as entries"
        )
    };
}

/// The statement behind [`Store::ledger_sums`].
#[doc(hidden)]
pub const fn ledger_sums_sql(of_key: bool, group: LedgerGroup) -> &'static str {
    macro_rules! sums {
        ($dimension:literal, $name:literal, $by:literal) => {
            if of_key {
                ledger_sums!($dimension, $name, $by, "key_id = $1")
            } else {
                ledger_sums!($dimension, $name, $by, "$1 = '*'")
            }
        };
    }
    match group {
        LedgerGroup::Day => sums!("model", "coalesce(model, '')", "cast(at / 86400000000 as text)"),
        LedgerGroup::Key => sums!("key", "key_id", "name"),
        LedgerGroup::Model => sums!("model", "coalesce(model, '')", "name"),
        LedgerGroup::Session => sums!("session", "coalesce(session_id, '')", "name"),
    }
}

/// The [`borders`] by which this grouping is added up.
#[doc(hidden)]
pub fn ledger_borders(from: i64, to: i64, group: LedgerGroup) -> [i64; 8] {
    let finest = if group == LedgerGroup::Session {
        HOUR
    } else {
        MINUTE
    };
    borders(from, to, finest)
}

/// The borders between entries, minutes, hours, days, hours, minutes and entries, which together are the time from the
/// first to the last. What can't be had of a length is empty. `finest`: the shortest length that is kept.
fn borders(from: i64, to: i64, finest: i64) -> [i64; 8] {
    let inside = |(from, to): (i64, i64), length: i64| {
        let first = from.div_euclid(length) * length;
        let first = if first < from { first + length } else { first };
        let last = to.div_euclid(length) * length;
        if first < last { (first, last) } else { (to, to) }
    };
    let minutes = inside((from, to), finest);
    let hours = inside(minutes, HOUR);
    let days = inside(hours, DAY);
    [from, minutes.0, hours.0, days.0, days.1, hours.1, minutes.1, to]
}

/// Totals of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage(BTreeMap<String, i64>);

impl Usage {
    /// Existing sessions.
    pub fn sessions(&self) -> i64 {
        self.total("sessions")
    }

    /// The sum of the ledger.
    pub fn cost(&self) -> MicroUsd {
        MicroUsd(self.total("cost"))
    }

    /// Turns of all attempts of jobs that have ended.
    pub fn turns(&self) -> i64 {
        self.total("turns")
    }

    /// The number of jobs with this status (`None`: any) that were submitted as jobs.
    pub fn jobs(&self, status: Option<JobStatus>) -> i64 {
        self.count(JobKind::Job, status)
    }

    /// The number of prompts, plus the answers to those whose job is done.
    pub fn messages(&self) -> i64 {
        let of = |status| {
            JobKind::ALL
                .map(|kind| self.count(kind, status))
                .iter()
                .sum::<i64>()
        };
        of(None) + of(Some(JobStatus::Done))
    }

    fn count(&self, kind: JobKind, status: Option<JobStatus>) -> i64 {
        let total = |word: &str| self.total(&format!("{}:{word}", kind.as_str()));
        match status {
            None => total("accepted"),
            Some(JobStatus::Queued) => {
                let others = JobStatus::ALL
                    .into_iter()
                    .filter(|status| *status != JobStatus::Queued);
                total("accepted") - others.map(|status| total(status.as_str())).sum::<i64>()
            }
            Some(status) => total(status.as_str()),
        }
    }

    fn total(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_cut_into_whole_days_hours_and_minutes_and_a_rest() {
        let at =
            |day: i64, hour: i64, minute: i64, rest: i64| day * DAY + hour * HOUR + minute * MINUTE + rest;
        assert_eq!(
            borders(at(1, 22, 58, 7), at(4, 2, 3, 9), MINUTE),
            [
                at(1, 22, 58, 7),
                at(1, 22, 59, 0),
                at(1, 23, 0, 0),
                at(2, 0, 0, 0),
                at(4, 0, 0, 0),
                at(4, 2, 0, 0),
                at(4, 2, 3, 0),
                at(4, 2, 3, 9)
            ]
        );
        let hour = at(1, 1, 0, 0);
        let (from, to) = (at(1, 0, 58, 7), at(1, 1, 5, 1));
        let minute = at(1, 1, 5, 0);
        assert_eq!(
            borders(from, to, MINUTE),
            [from, at(1, 0, 59, 0), minute, minute, minute, minute, minute, to]
        );
        assert_eq!(borders(from, to, HOUR)[1..7], [to; 6]);
        assert_eq!(borders(5, 9, MINUTE), [5, 9, 9, 9, 9, 9, 9, 9]);
        assert_eq!(borders(hour, hour + HOUR, HOUR)[1..4], [hour, hour, hour + HOUR]);
        assert_eq!(borders(0, DAY, MINUTE), [0, 0, 0, 0, DAY, DAY, DAY, DAY]);
    }

    #[test]
    fn what_is_neither_running_nor_ended_is_queued() {
        let usage = Usage(
            [
                ("job:accepted", 9),
                ("job:done", 4),
                ("job:running", 2),
                ("chat:accepted", 1),
                ("chat:done", 1),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        );
        assert_eq!(usage.jobs(Some(JobStatus::Queued)), 3);
        assert_eq!(usage.jobs(None), 9);
        assert_eq!(usage.messages(), 15);
    }
}
