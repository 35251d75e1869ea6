//! Events: appended by whoever holds the job's row, read by number.

use super::{Error, Result, Store, Tx, TxDb, execute, read};
use crate::clock::Timestamp;
use crate::event::{Event, NewEvent};
use crate::id::JobId;
use crate::job::Job;
use sqlx::{Postgres, QueryBuilder, Sqlite};

impl Tx {
    /// Appends events after number `last`; gives the number of the newest. The caller holds the job's row.
    pub(super) async fn append_events(
        &mut self,
        job_id: JobId,
        last: i64,
        events: &[NewEvent],
        at: Timestamp,
    ) -> Result<i64> {
        if events.is_empty() {
            return Ok(last);
        }
        macro_rules! insert {
            ($db:ty, $tx:expr, $events:expr, $first:expr) => {{
                let mut query =
                    QueryBuilder::<$db>::new("insert into event (job_id, seq, event_type, at, data) ");
                query.push_values($events.iter().zip($first..), |mut row, (event, seq)| {
                    row.push_bind(job_id)
                        .push_bind(seq)
                        .push_bind(event.event_type);
                    row.push_bind(at).push_bind(event.data.to_string());
                });
                query.build().execute(&mut **$tx).await.map(drop)
            }};
        }
        // A statement has room for so many parameters only.
        for (events, first) in events.chunks(1000).zip((last + 1..).step_by(1000)) {
            self.store.work.statement();
            match &mut self.db {
                TxDb::Sqlite(tx) => insert!(Sqlite, tx, events, first),
                TxDb::Postgres(tx) => {
                    let inserting = async { insert!(Postgres, tx, events, first) };
                    self.store.liveness.in_time(inserting).await
                }
            }
            .map_err(Error::during("store events"))?;
        }
        self.touch(job_id);
        Ok(last + i64::try_from(events.len()).unwrap_or(i64::MAX))
    }

    /// Appends events to a job whose row this transaction holds, and counts them there.
    pub(super) async fn finish_events(
        &mut self,
        job: &Job,
        events: &[NewEvent],
        now: Timestamp,
    ) -> Result<()> {
        let seq = self
            .append_events(job.job_id, job.last_event_seq, events, now)
            .await?;
        execute!(
            self,
            "count events",
            "update job set last_event_seq = $2 where job_id = $1",
            job.job_id,
            seq
        )?;
        self.touch(job.job_id);
        Ok(())
    }
}

impl Store {
    /// Up to `limit` events of the job with numbers above `after`, in order.
    pub async fn events_after(&self, job_id: JobId, after: i64, limit: i64) -> Result<Vec<Event>> {
        read!(
            self,
            "read events",
            fetch_all => Event,
            "select job_id, seq, event_type, at, data from event where job_id = $1 and seq > $2 order by seq limit $3",
            job_id,
            after,
            limit
        )
    }
}
