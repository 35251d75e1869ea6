//! Lists of jobs.

use crate::clock::Timestamp;
use crate::id::{KeyId, SessionId};
use crate::job::{Job, JobKind, JobStatus};
use crate::storage::columns::columns;
use crate::storage::{Db, Error, Result, Store};
use sqlx::{Postgres, QueryBuilder, Sqlite};

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

impl Store {
    /// Up to `limit` jobs beyond the filter's position, in its order, each with its prompt (cut to 200 characters
    /// if `brief`).
    pub async fn jobs(&self, filter: &JobFilter, limit: i64, brief: bool) -> Result<Vec<(Job, String)>> {
        let until = if filter.ascending {
            self.settled_until().await?
        } else {
            None
        };
        // Two builders, because a builder is of one database.
        macro_rules! rows {
            ($db:ty, $pool:expr) => {{
                let mut query =
                    QueryBuilder::<$db>::new(concat!("select ", columns!(Job), ", coalesce((select "));
                query.push(if brief {
                    "substr(message, 1, 200)"
                } else {
                    "message"
                });
                query.push(
                    " from prompt where prompt.job_id = job.job_id), '') as message from job where 1 = 1",
                );
                if let Some(key_id) = &filter.key_id {
                    query
                        .push(" and job.key_id = ")
                        .push_bind(key_id.as_str().to_owned());
                }
                if !filter.statuses.is_empty() {
                    query.push(" and job.status in (");
                    let mut list = query.separated(", ");
                    for status in &filter.statuses {
                        list.push_bind(status.as_str());
                    }
                    query.push(")");
                }
                if let Some(session_id) = filter.session_id {
                    query
                        .push(" and job.session_id = ")
                        .push_bind(session_id.to_string());
                }
                if let Some(custom_id) = &filter.custom_id {
                    query
                        .push(" and job.custom_id = ")
                        .push_bind(custom_id.clone());
                }
                if let Some(kind) = filter.kind {
                    query.push(" and job.kind = ").push_bind(kind);
                }
                if let Some(at) = filter.created_after {
                    query.push(" and job.created_at >= ").push_bind(at.0);
                }
                if let Some(at) = filter.created_before {
                    query.push(" and job.created_at < ").push_bind(at.0);
                }
                if let Some(until) = until {
                    query.push(" and job.job_number <= ").push_bind(until);
                }
                let (beyond, order) = if filter.ascending {
                    (" > ", "asc")
                } else {
                    (" < ", "desc")
                };
                if let Some(after) = filter.after {
                    query
                        .push(" and job.job_number")
                        .push(beyond)
                        .push_bind(after);
                }
                query
                    .push(" order by job.job_number ")
                    .push(order)
                    .push(" limit ")
                    .push_bind(limit);
                query
                    .build_query_as::<JobWithMessage>()
                    .fetch_all($pool)
                    .await
            }};
        }
        self.work.statement();
        match &*self.db {
            Db::Sqlite { reader, .. } => rows!(Sqlite, reader),
            Db::Postgres(pool) => self.liveness.in_time(async { rows!(Postgres, pool) }).await,
        }
        .map(|rows| rows.into_iter().map(|row| (row.job, row.message)).collect())
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

#[derive(sqlx::FromRow)]
struct JobWithMessage {
    #[sqlx(flatten)]
    job: Job,
    message: String,
}
