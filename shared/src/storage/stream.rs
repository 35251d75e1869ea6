//! Open event streams, counted in the limiter's tables so that a cap holds over any number of processes.

use super::limit::change;
use super::macros::{lock, on_connection};
use super::{Db, Error, Result, Store};
use crate::clock::Timestamp;
use crate::id::KeyId;
use sqlx::Connection;
use uuid::Uuid;

impl Store {
    /// Counts an event stream of this key that is about to open, unless `max` are open already, in all processes.
    /// `None`: there are. It counts until it is closed or, when it isn't renewed, until `valid_until`.
    pub async fn open_stream(
        &self,
        key_id: &KeyId,
        process_id: Uuid,
        max: i64,
        now: Timestamp,
        valid_until: Timestamp,
    ) -> Result<Option<Uuid>> {
        const OPEN: &str = "insert into open_stream (stream_id, process_id, key_id, valid_until)
            select $1, $2, $3, $4
            where (select count(*) from open_stream where key_id = $3 and valid_until > $5) < $6";
        let stream_id = Uuid::new_v4();
        let opened = match &*self.db {
            Db::Sqlite { limits, .. } => sqlx::query(OPEN)
                .bind(stream_id.to_string())
                .bind(process_id.to_string())
                .bind(key_id)
                .bind(valid_until)
                .bind(now)
                .bind(max)
                .execute(limits)
                .await
                .map(|done| done.rows_affected()),
            Db::Postgres(pool) => {
                // Two that count at once would both find room.
                on_connection!(self, pool, |connection| async {
                    let mut tx = connection.begin().await?;
                    sqlx::query(lock!("", "hashtext($1)", of = streams))
                        .bind(key_id)
                        .execute(&mut *tx)
                        .await?;
                    let done = sqlx::query(OPEN)
                        .bind(stream_id.to_string())
                        .bind(process_id.to_string())
                        .bind(key_id)
                        .bind(valid_until)
                        .bind(now)
                        .bind(max)
                        .execute(&mut *tx)
                        .await?;
                    tx.commit().await?;
                    Ok(done.rows_affected())
                })
            }
        }
        .map_err(Error::during("count an event stream"))?;
        Ok((opened > 0).then_some(stream_id))
    }

    /// A stream goes on to count.
    pub async fn renew_stream(&self, stream_id: Uuid, valid_until: Timestamp) -> Result<()> {
        change!(
            self,
            "renew an event stream",
            "update open_stream set valid_until = $2 where stream_id = $1",
            stream_id.to_string(),
            valid_until
        )
        .map(drop)
    }

    /// A stream counts no more.
    pub async fn close_stream(&self, stream_id: Uuid) -> Result<()> {
        change!(
            self,
            "close an event stream",
            "delete from open_stream where stream_id = $1",
            stream_id.to_string()
        )
        .map(drop)
    }
}
