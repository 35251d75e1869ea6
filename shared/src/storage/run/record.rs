//! While a run goes on: its events, its cost so far, and the renewals of its lease.

use super::{RunDirective, usage_so_far};
use crate::clock::Timestamp;
use crate::event::{EventType, NewEvent};
use crate::job::{CancelReason, Lease, Spend};
use crate::storage::{Error, Result, Store, Tx, fetch, read};
use serde_json::json;

impl Store {
    /// Renews the lease, stores events and the cost so far, and learns whether to go on. Costs one transaction.
    pub async fn record(
        &self,
        lease: &Lease,
        events: &[NewEvent],
        spend: Option<&Spend>,
        now: Timestamp,
    ) -> Result<RunDirective> {
        let mut tx = self.begin().await?;
        let signal = tx.record(lease, None, events, spend, now).await?;
        tx.commit().await?;
        Ok(signal.unwrap_or(RunDirective::Lost))
    }

    /// The same after a try whose outcome isn't known and which may be under way still: writes only if the lease was
    /// renewed so many times and no more. `None`: it was renewed again or is gone; [`Store::renewals`] tells.
    pub async fn record_again(
        &self,
        lease: &Lease,
        renewals: i64,
        events: &[NewEvent],
        spend: Option<&Spend>,
        now: Timestamp,
    ) -> Result<Option<RunDirective>> {
        let mut tx = self.begin().await?;
        let signal = tx.record(lease, Some(renewals), events, spend, now).await?;
        tx.commit().await?;
        Ok(signal)
    }

    /// Says that `dropped` events of the run weren't kept: their numbers are used up, and a `gap` event follows them.
    pub async fn record_gap(&self, lease: &Lease, dropped: i64, now: Timestamp) -> Result<RunDirective> {
        let mut tx = self.begin().await?;
        let row = fetch!(
            tx,
            "leave events out",
            fetch_optional => (i64,),
            "update job set last_event_seq = last_event_seq + $3 + 1, version = version + 1
             where job_id = $1 and attempt = $2 and status = 'running' returning last_event_seq",
            lease.job.job_id,
            lease.job.attempt,
            dropped
        )?;
        let Some((seq,)) = row else {
            return Ok(RunDirective::Lost);
        };
        let gap = NewEvent::new(EventType::Gap, json!({ "from": seq - dropped, "to": seq - 1 }));
        tx.append_events(lease.job.job_id, seq - 1, &[gap], now).await?;
        tx.commit().await?;
        Ok(RunDirective::Continue)
    }

    /// Whether a run should go on, without writing anything.
    pub async fn signal(&self, lease: &Lease) -> Result<RunDirective> {
        let row = read!(
            self,
            "look at a run",
            fetch_optional => (Option<CancelReason>,),
            "select case when cancel_requested_at is null then null else cancel_reason end from job
             where job_id = $1 and attempt = $2 and status = 'running'",
            lease.job.job_id,
            lease.job.attempt
        )?;
        Ok(match row {
            None => RunDirective::Lost,
            Some((Some(reason),)) => RunDirective::Cancel(reason),
            Some((None,)) => RunDirective::Continue,
        })
    }

    /// How often the lease was renewed; `None` when it's gone.
    pub async fn renewals(&self, lease: &Lease) -> Result<Option<i64>> {
        let row = read!(
            self,
            "look at a lease",
            fetch_optional => (i64,),
            "select renewals from job where job_id = $1 and attempt = $2 and status = 'running'",
            lease.job.job_id,
            lease.job.attempt
        )?;
        Ok(row.map(|row| row.0))
    }
}

impl Tx {
    /// `None` when the lease is gone, or was renewed another number of times than `renewals`.
    #[doc(hidden)]
    pub async fn record(
        &mut self,
        lease: &Lease,
        renewals: Option<i64>,
        events: &[NewEvent],
        spend: Option<&Spend>,
        now: Timestamp,
    ) -> Result<Option<RunDirective>> {
        let job = &lease.job;
        let count = i64::try_from(events.len()).unwrap_or(i64::MAX);
        let cost = spend.map(|spend| job.cost + spend.total());
        let usage = spend.map(|spend| usage_so_far(job, spend));
        let text = spend
            .map(serde_json::to_string)
            .transpose()
            .map_err(|error| Error::during("keep the cost so far")(error.to_string()))?;
        let row = fetch!(
            self,
            "renew a lease",
            fetch_optional => (i64, Option<CancelReason>),
            "update job set renewals = renewals + 1, last_event_seq = last_event_seq + $3,
               version = version + $6, cost = coalesce($4, cost), usage = coalesce($5, usage),
               spend = coalesce($8, spend)
             where job_id = $1 and attempt = $2 and status = 'running' and renewals = coalesce($7, renewals)
             returning last_event_seq, case when cancel_requested_at is null then null else cancel_reason end",
            job.job_id,
            job.attempt,
            count,
            cost,
            usage,
            i64::from(count > 0 || spend.is_some()),
            renewals,
            text
        )?;
        let Some((seq, cancel)) = row else {
            return Ok(None);
        };
        self.append_events(job.job_id, seq - count, events, now).await?;
        Ok(Some(cancel.map_or(RunDirective::Continue, RunDirective::Cancel)))
    }
}
