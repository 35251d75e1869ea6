//! Lists of jobs.

use super::{JobDetails, beside};
use crate::clock::Timestamp;
use crate::id::{KeyId, SessionId};
use crate::job::{JobKind, JobStatus};
use crate::storage::columns::columns;
use crate::storage::usage::counted;
use crate::storage::{Db, Error, Result, Store};
use sqlx::AssertSqlSafe;

/// Which jobs a list shows.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// Only this owner's; `None` is everybody's.
    pub key_id: Option<KeyId>,
    /// Only these statuses; empty is all.
    pub statuses: Vec<JobStatus>,
    /// Only this session's.
    pub session_id: Option<SessionId>,
    /// Only those with this name of the client's.
    pub custom_id: Option<String>,
    /// Only this kind; `None` is both.
    pub kind: Option<JobKind>,
    /// Only those accepted at this time or later.
    pub created_after: Option<Timestamp>,
    /// Only those accepted before this time.
    pub created_before: Option<Timestamp>,
    /// Oldest first instead of newest first.
    pub ascending: bool,
    /// Only those beyond this `job_number` in that order.
    pub after: Option<i64>,
}

/// One of the parts that a list is put together from, each of which an index has in the order of the list, whatever else is
/// in the table. Columns that would lead a planner to another index are hidden from it, in an expression.
#[derive(Debug)]
struct Part {
    /// What its jobs are.
    condition: String,
    /// The key's column.
    key_id: &'static str,
    /// The number's column.
    number: &'static str,
}

/// A value that a statement gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A text.
    Text(String),
    /// A number.
    Number(i64),
}

/// The text of a statement, and its arguments in order.
#[derive(Debug, Default)]
struct Statement {
    sql: String,
    arguments: Vec<Argument>,
}

impl Statement {
    fn push(&mut self, sql: &str) {
        self.sql.push_str(sql);
    }

    fn push_argument(&mut self, argument: Argument) {
        self.arguments.push(argument);
        self.sql.push('$');
        self.sql.push_str(&self.arguments.len().to_string());
    }

    fn push_text(&mut self, before: &str, text: &str) {
        self.push(before);
        self.push_argument(Argument::Text(text.to_owned()));
    }

    fn push_number(&mut self, before: &str, number: i64) {
        self.push(before);
        self.push_argument(Argument::Number(number));
    }
}

impl JobFilter {
    /// The kinds and statuses (`None`: of all) that the list has, one by one.
    fn parts(&self) -> Vec<(JobKind, Option<JobStatus>)> {
        let kinds = self.kind.map_or_else(|| JobKind::ALL.to_vec(), |kind| vec![kind]);
        let of_kind = |kind| {
            let statuses = if self.statuses.is_empty() {
                vec![None]
            } else {
                self.statuses.iter().copied().map(Some).collect()
            };
            statuses.into_iter().map(move |status| (kind, status))
        };
        kinds.into_iter().flat_map(of_kind).collect()
    }

    /// The jobs of one session or of one name of the client's: so few that they are one part.
    fn few(&self) -> Part {
        let kinds = self.kind.map_or_else(|| JobKind::ALL.to_vec(), |kind| vec![kind]);
        let kinds = kinds.iter().map(|kind| format!("'{}'", kind.as_str()));
        let mut condition = format!("kind || '' in ({})", kinds.collect::<Vec<_>>().join(", "));
        if !self.statuses.is_empty() {
            let words = self
                .statuses
                .iter()
                .map(|status| format!("'{}'", status.as_str()));
            let words = words.collect::<Vec<_>>().join(", ");
            for part in [" and status || '' in (", &words, ")"] {
                condition.push_str(part);
            }
        }
        Part {
            condition,
            key_id: if self.session_id.is_some() {
                "key_id || ''"
            } else {
                "key_id"
            },
            number: "job_number",
        }
    }

    /// The statement that reads the list, and its arguments. `until`: the number after which nothing is shown. Numbers and
    /// words of our own are in the text, so that the planner sees how few rows are wanted, and which partial index has
    /// them.
    #[doc(hidden)]
    pub fn statement(&self, limit: i64, until: Option<i64>) -> (String, Vec<Argument>) {
        let order = if self.ascending { "asc" } else { "desc" };
        let last = format!(" order by job_number {order} limit {limit}");
        let mut statement = Statement::default();
        statement.push(concat!(
            "select ",
            columns!(Job),
            ", coalesce((select substr(message, 1, 200) from prompt where prompt.job_id = job.job_id), '') as message,
             cast(null as text) as result, cast(null as bigint) as ahead, ",
            beside!()
        ));
        let parts = if self.session_id.is_some() || self.custom_id.is_some() {
            vec![self.few()]
        } else {
            self.parts().into_iter().map(of_part).collect()
        };
        let one = parts.len() == 1;
        for (index, part) in parts.iter().enumerate() {
            if !one {
                statement.push(if index == 0 { " from (" } else { " union all " });
                statement.push(concat!("select ", columns!(Job), " from (select ", columns!(Job)));
            }
            statement.push(" from job where ");
            statement.push(&part.condition);
            self.bounds(&mut statement, part, until);
            statement.push(&format!(" order by {} {order} limit {limit}", part.number));
            if !one {
                statement.push(&format!(") as part{index}"));
            }
        }
        if !one {
            statement.push(") as job");
            statement.push(&last);
        }
        (statement.sql, statement.arguments)
    }

    /// What holds for each part.
    fn bounds(&self, statement: &mut Statement, part: &Part, until: Option<i64>) {
        let number = part.number;
        if let Some(key_id) = &self.key_id {
            statement.push_text(&format!(" and {} = ", part.key_id), key_id.as_str());
        }
        if let Some(session_id) = self.session_id {
            statement.push_text(" and session_id = ", &session_id.to_string());
        }
        if let Some(custom_id) = &self.custom_id {
            statement.push_text(" and custom_id = ", custom_id);
        }
        // Jobs aren't numbered in the order of their times, since clocks differ and transactions wait. The blocks say
        // which numbers have which times; jobs after the last one that is counted are in no block yet.
        if let Some(at) = self.created_after {
            statement.push_number(" and created_at >= ", at.0);
            statement.push(&format!(" and {number} >= "));
            statement.push(concat!(
                "(select coalesce(min(block) * 1024, ",
                counted!("job"),
                " + 1) from job_block where last_at >= "
            ));
            statement.push_number("", at.0);
            statement.push(")");
        }
        if let Some(at) = self.created_before {
            statement.push_number(" and created_at < ", at.0);
            statement.push(&format!(" and {number} <= "));
            statement.push(
                "(select max(newest.number) from (
                   select coalesce(max(block) * 1024 + 1023, -1) as number from job_block where first_at < ",
            );
            statement.push_number("", at.0);
            for kind in JobKind::ALL {
                statement.push(&format!(
                    " union all select coalesce(max(late.job_number), -1) from job as late
                     where late.kind = '{}' and late.job_number > {} and late.created_at < ",
                    kind.as_str(),
                    counted!("job")
                ));
                statement.push_number("", at.0);
            }
            statement.push(") as newest)");
        }
        if let Some(until) = until {
            statement.push_number(&format!(" and {number} <= "), until);
        }
        if let Some(after) = self.after {
            let beyond = if self.ascending { ">" } else { "<" };
            statement.push_number(&format!(" and {number} {beyond} "), after);
        }
    }
}

impl Store {
    /// Up to `limit` jobs beyond the filter's position, in its order, each with its prompt cut to 200 characters, but
    /// without result and position.
    pub async fn jobs(&self, filter: &JobFilter, limit: i64) -> Result<Vec<JobDetails>> {
        let until = if filter.ascending {
            self.settled_until().await?
        } else {
            None
        };
        let (sql, arguments) = filter.statement(limit, until);
        // Its text is ours: whatever a client says is an argument.
        let sql = AssertSqlSafe(sql);
        macro_rules! rows {
            ($pool:expr) => {{
                let mut query = sqlx::query_as::<_, JobDetails>(sql);
                for argument in arguments {
                    query = match argument {
                        Argument::Text(text) => query.bind(text),
                        Argument::Number(number) => query.bind(number),
                    };
                }
                query.fetch_all($pool)
            }};
        }
        self.work.statement();
        match &*self.db {
            Db::Sqlite { reader, .. } => rows!(reader).await,
            Db::Postgres(pool) => self.liveness.in_time(rows!(pool)).await,
        }
        .map_err(Error::during("list jobs"))
    }

    /// The number up to which no job can still appear, where numbers are given before the commit: whoever reads in
    /// their order and goes on behind the last one would miss it.
    async fn settled_until(&self) -> Result<Option<i64>> {
        let Db::Postgres(pool) = &*self.db else {
            return Ok(None);
        };
        let during = Error::during::<sqlx::Error>;
        // In this order: a number that is given out afterwards is beyond the first.
        let last = sqlx::query_scalar("select last_value from job_job_number_seq").fetch_one(pool);
        let last: i64 = self.liveness.in_time(last).await.map_err(during("list jobs"))?;
        // What `insert_job` locks: each number that is being used is higher.
        let used = sqlx::query_scalar(
            "select cast(objid as bigint) from pg_locks
             where locktype = 'advisory' and classid = 1668638071 and objsubid = 2
               and database = (select oid from pg_database where datname = current_database())",
        )
        .fetch_all(pool);
        let used: Vec<i64> = self.liveness.in_time(used).await.map_err(during("list jobs"))?;
        let below = used
            .into_iter()
            .map(|low| last - (last - low).rem_euclid(i64::from(i32::MAX)));
        Ok(Some(below.min().unwrap_or(last)))
    }
}

/// The jobs of this kind and this status.
fn of_part((kind, status): (JobKind, Option<JobStatus>)) -> Part {
    let kind = kind.as_str();
    let (condition, number) = match status {
        None => (format!("kind = '{kind}'"), "job_number"),
        // There are never many, and their index has no order.
        Some(JobStatus::Running) => (
            format!("kind || '' = '{kind}' and status = 'running'"),
            "job_number + 0",
        ),
        Some(status) => (
            format!(
                "kind = '{kind}' and status = '{}' and status <> 'running'",
                status.as_str()
            ),
            "job_number",
        ),
    };
    Part {
        condition,
        key_id: "key_id",
        number,
    }
}
