//! Jobs, as they are read. How they are accepted, listed, cancelled and concluded is in the files beside.

mod attempts;
mod cancel;
mod conclude;
mod insert;
mod list;

use super::columns::columns;
use super::{Result, Store, read};
use crate::id::{JobId, KeyId};
use crate::job::{Hold, Job};

pub use attempts::Attempt;
pub use cancel::CancelOutcome;
pub use list::JobFilter;

/// How many jobs are ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Jobs ahead of it, 0 is next. Counted up to 1000.
    pub ahead: i64,
    /// Whether there may be more.
    pub capped: bool,
}

impl Store {
    /// The job, if there is one.
    pub async fn job(&self, job_id: JobId) -> Result<Option<Job>> {
        read!(self, "read a job", fetch_optional => Job, concat!("select ", columns!(Job), " from job where job_id = $1"), job_id)
    }

    /// The job's prompt; empty after retention.
    pub async fn prompt(&self, job_id: JobId) -> Result<String> {
        let row = read!(
            self,
            "read a prompt",
            fetch_optional => (String,),
            "select message from prompt where job_id = $1",
            job_id
        )?;
        Ok(row.map(|row| row.0).unwrap_or_default())
    }

    /// The job's result as JSON text, once a run has left one.
    pub async fn result(&self, job_id: JobId) -> Result<Option<String>> {
        let row = read!(
            self,
            "read a result",
            fetch_optional => (String,),
            "select result from result where job_id = $1",
            job_id
        )?;
        Ok(row.map(|row| row.0))
    }

    /// How many of the owner's jobs go before this queued job.
    pub async fn position(&self, job: &Job) -> Result<Position> {
        let counted = if job.hold == Hold::Order.as_str() {
            read!(
                self,
                "count the jobs ahead",
                fetch_one => (i64,),
                "select count(*) from (
                   select 1 from job
                   where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
                     and job_number < $3
                   limit 1000) as ahead",
                &job.key_id,
                &job.group_key,
                job.job_number
            )?
        } else {
            read!(
                self,
                "count the jobs ahead",
                fetch_one => (i64,),
                "select count(*) from (
                   select 1 from job where key_id = $1 and status = 'queued' and hold = '' and priority > $2
                   union all
                   select 1 from job
                   where key_id = $1 and status = 'queued' and hold = '' and priority = $2 and job_number < $3
                   limit 1000) as ahead",
                &job.key_id,
                job.priority,
                job.job_number
            )?
        };
        Ok(Position {
            ahead: counted.0,
            capped: counted.0 == 1000,
        })
    }

    /// How many of the key's jobs wait, counted up to `limit`.
    pub async fn queued_jobs(&self, key_id: &KeyId, limit: i64) -> Result<i64> {
        let (count,) = read!(
            self,
            "count a key's jobs",
            fetch_one => (i64,),
            "select count(*) from (select 1 from job where key_id = $1 and status = 'queued' limit $2) as waiting",
            key_id,
            limit
        )?;
        Ok(count)
    }
}
