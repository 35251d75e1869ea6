//! What a run has cost beyond what was known when its lease was taken: it is owed all the same.

use crate::clock::Timestamp;
use crate::job::{Job, Lease, ModelCost, Spend};
use crate::money::MicroUsd;
use crate::storage::columns::columns;
use crate::storage::{Result, Store, execute, fetch, fetch_locked};

impl Store {
    /// Books what the run of a lost lease has cost, less what was settled for it already; gives that rest. Once, however
    /// often it is tried.
    pub async fn book_late(&self, lease: &Lease, spend: &Spend, now: Timestamp) -> Result<MicroUsd> {
        let mut tx = self.begin_end_of_run().await?;
        let (job_id, attempt) = (lease.job.job_id, lease.job.attempt);
        tx.lock_session(lease.job.session_id).await?;
        fetch_locked!(
            tx,
            "read a job",
            fetch_optional => Job,
            concat!("select ", columns!(Job), " from job where job_id = $1"),
            job_id
        )?;
        tx.lock_lane(&lease.job.key_id).await?;
        let settled = fetch!(
            tx,
            "read the ledger",
            fetch_all => (String, MicroUsd, i64, i64, i64, i64),
            "select coalesce(model, ''), cost, input_tokens, output_tokens, cache_creation_input_tokens,
               cache_read_input_tokens
             from ledger where job_id = $1 and attempt = $2",
            job_id,
            attempt
        )?;
        let mut rest = spend.clone();
        for (model, cost, input, output, creation, read) in settled {
            if let Some(left) = rest.models.iter_mut().find(|left| left.model == model) {
                left.cost = left.cost - cost;
                left.usage.input_tokens -= input;
                left.usage.output_tokens -= output;
                left.usage.cache_creation_input_tokens -= creation;
                left.usage.cache_read_input_tokens -= read;
            }
        }
        rest.models
            .retain(|model: &ModelCost| model.cost > MicroUsd::ZERO);
        if rest.models.is_empty() {
            tx.rollback().await?;
            return Ok(MicroUsd::ZERO);
        }
        let cost = tx.write_ledger(&lease.job, &rest, true, now).await?;
        execute!(
            tx,
            "add to a job's cost",
            "update job set cost = cost + $2, version = version + 1 where job_id = $1",
            job_id,
            cost
        )?;
        let (began,) = fetch!(
            tx,
            "add to an attempt's cost",
            fetch_one => (Timestamp,),
            "update attempt set cost = cost + $3 where job_id = $1 and attempt = $2 returning started_at",
            job_id,
            attempt,
            cost
        )?;
        if let Some(session_id) = lease.job.session_id {
            execute!(
                tx,
                "add to a session's cost",
                "update session set total_cost = total_cost + $2 where session_id = $1",
                session_id,
                cost
            )?;
        }
        // What the attempt had reserved was given back when it was settled.
        tx.settle(&lease.job.key_id, cost, (MicroUsd::ZERO, began), now)
            .await?;
        tx.commit().await?;
        Ok(cost)
    }
}
