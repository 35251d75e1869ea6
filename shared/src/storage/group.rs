//! Groups: the jobs of one session, or of one `concurrency_key`, run one at a time, in the order in which they came.

use super::macros::lock;
use super::{Result, Tx, fetch};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId};
use crate::job::Job;

impl Tx {
    /// Takes the lock of a group: who decides its order decides alone.
    pub(super) async fn lock_group(&mut self, key_id: &KeyId, group_key: Option<&str>) -> Result<()> {
        match group_key {
            Some(group) => {
                let name = format!("{key_id}/{group}");
                self.postgres_lock(lock!("", "hashtext($1)", of = groups), Some(name))
                    .await
            }
            None => Ok(()),
        }
    }

    /// Whether a job of this group, which is locked, waits or runs.
    pub(super) async fn has_earlier_in_group(&mut self, key_id: &KeyId, group_key: &str) -> Result<bool> {
        let row = fetch!(
            self,
            "look for earlier jobs of the group",
            fetch_optional => (i64,),
            "select cast(1 as bigint) from job
             where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
             limit 1",
            key_id,
            group_key
        )?;
        Ok(row.is_some())
    }

    /// The next job of the group may go on, now that this one, its first, has ended.
    pub(super) async fn free_group(&mut self, job: &Job, now: Timestamp) -> Result<()> {
        let Some(group_key) = &job.group_key else {
            return Ok(());
        };
        let next = fetch!(
            self,
            "let the next job of the group go on",
            fetch_optional => (JobId, String, i64),
            "update job set hold = case when run_after > $3 then 'delay' else '' end, version = version + 1
             where job_id = (
               select job_id from job
               where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
               order by job_number limit 1) and status = 'queued' and hold = 'order'
             returning job_id, hold, priority",
            &job.key_id,
            group_key,
            now
        )?;
        if let Some((job_id, hold, priority)) = next {
            self.touch(job_id);
            if hold.is_empty() {
                self.became_ready(&job.key_id, priority);
            }
        }
        Ok(())
    }
}
