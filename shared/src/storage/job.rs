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
pub use list::{Argument, JobFilter};

/// A job with what is shown beside its row.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct JobDetails {
    /// Its row.
    #[sqlx(flatten)]
    pub job: Job,
    /// The prompt, or the part of it that was asked for; empty once it was removed.
    pub message: String,
    /// The result as JSON text, once a run has left one.
    pub result: Option<String>,
    /// The name of its session.
    pub session_name: Option<String>,
    lane_hold: Option<String>,
    ahead: Option<i64>,
}

impl JobDetails {
    /// What holds all jobs of its owner, if it is queued.
    pub fn lane_hold(&self) -> Option<Hold> {
        self.lane_hold.as_deref().and_then(Hold::parse)
    }

    /// How many of the owner's jobs go before it, if it is queued and was asked for alone.
    pub fn position(&self) -> Option<Position> {
        self.ahead.map(|ahead| Position {
            ahead,
            capped: ahead == 1000,
        })
    }
}

/// How much of a job is read beside its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobPart {
    /// The prompt, cut to 200 characters.
    Brief,
    /// The prompt and the result.
    Full,
    /// The result.
    Result,
}

/// How many jobs are ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Jobs ahead of it, 0 is next. Counted up to 1000.
    pub ahead: i64,
    /// Whether there may be more.
    pub capped: bool,
}

/// What is shown beside each job: the name of its session, and what holds its lane.
macro_rules! beside {
    () => {
        "(select session.name from session where session.session_id = job.session_id) as session_name,
         case when job.status = 'queued' then (
           select coalesce(lane.hold, queue.hold, case when queue.paused then 'paused' end)
           from queue left join lane on lane.key_id = job.key_id) end as lane_hold"
    };
}

/// How many jobs of its group go before a job.
macro_rules! ahead_in_group {
    () => {
        "(select count(*) from (
           select 1 from job as earlier
           where earlier.key_id = job.key_id and earlier.group_key = job.group_key and earlier.group_key is not null
             and earlier.status in ('queued', 'running') and earlier.job_number < job.job_number
           limit 1000) as earlier)"
    };
}

/// How many of the owner's ready jobs go before a job.
macro_rules! ahead {
    () => {
        "(select count(*) from (
           select 1 from job as better
           where better.key_id = job.key_id and better.status = 'queued' and better.hold = ''
             and better.priority > job.priority
           union all
           select 1 from job as sooner
           where sooner.key_id = job.key_id and sooner.status = 'queued' and sooner.hold = ''
             and sooner.priority = job.priority and sooner.kind < job.kind
           union all
           select 1 from job as earlier
           where earlier.key_id = job.key_id and earlier.status = 'queued' and earlier.hold = ''
             and earlier.priority = job.priority and earlier.kind = job.kind
             and earlier.job_number < job.job_number
           limit 1000) as ahead)"
    };
}

pub(super) use beside;
impl Store {
    /// The job, if there is one.
    pub async fn job(&self, job_id: JobId) -> Result<Option<Job>> {
        read!(self, "read a job", fetch_optional => Job, concat!("select ", columns!(Job), " from job where job_id = $1"), job_id)
    }

    /// The job with what is shown beside its row, in one statement: for this reader (`None`: any), who has the job as it
    /// was at version `known` and then needs neither prompt nor result.
    pub async fn job_details(
        &self,
        job_id: JobId,
        reader: Option<&KeyId>,
        known: Option<i64>,
        part: JobPart,
    ) -> Result<Option<JobDetails>> {
        macro_rules! details {
            ($message:literal, $($result:tt)+) => {
                concat!(
                    "select ",
                    columns!(Job),
                    ", case when data_removed or version = $3 then '' else coalesce((
                       select ",
                    $message,
                    " from prompt where prompt.job_id = job.job_id), '') end as message,
                     case when data_removed or version = $3 or status in ('queued', 'running') then null
                       else ",
                    $($result)+,
                    " end as result,
                     case when status <> 'queued' or version = $3 then null
                       when hold = 'order' then ",
                    ahead_in_group!(),
                    " else ",
                    ahead!(),
                    " end as ahead, ",
                    beside!(),
                    " from job where job_id = $1 and ($2 = '' or key_id = $2)"
                )
            };
        }
        macro_rules! result {
            () => {
                "(select result from result where result.job_id = job.job_id)"
            };
        }
        let sql = match part {
            JobPart::Brief => details!("substr(message, 1, 200)", "null"),
            JobPart::Full => details!("message", result!()),
            JobPart::Result => details!("''", result!()),
        };
        read!(
            self,
            "read a job",
            fetch_optional => JobDetails,
            sql,
            job_id,
            reader.map_or("", KeyId::as_str),
            known.unwrap_or(-1)
        )
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
