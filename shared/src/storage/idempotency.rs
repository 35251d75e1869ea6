//! Idempotency keys. A record is written in the transaction that does the work, so that a client that lost the response
//! and repeats the request gets the same response, not a second job.

use super::columns::columns;
use super::{Result, Store, Tx, execute, fetch, read};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId};

/// A response kept for a repeated request.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct IdempotencyRecord {
    /// The owner.
    pub key_id: KeyId,
    /// Method and path, with the path's parameters.
    pub route: String,
    /// The client's key.
    pub idempotency_key: String,
    /// SHA-256 of the request in canonical form, in hex.
    pub fingerprint: String,
    /// The job that the request made.
    pub job_id: Option<JobId>,
    /// The HTTP status of the response.
    pub status: i64,
    /// The `data` of the response, as JSON text.
    pub body: String,
    /// When.
    pub created_at: Timestamp,
}

/// Whether a request is the first with its idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdempotencyOutcome {
    /// It is the first; its record is part of this transaction.
    New,
    /// It is a repetition; this is the record of the first. Nothing was written.
    Replay(Box<IdempotencyRecord>),
}

impl Tx {
    /// Stores a response, unless one for this key exists that was created after `expired_before`.
    pub async fn remember(
        &mut self,
        record: &IdempotencyRecord,
        expired_before: Timestamp,
    ) -> Result<IdempotencyOutcome> {
        let rows = execute!(
            self,
            "remember an idempotency key",
            "insert into idempotency (key_id, route, idempotency_key, fingerprint, job_id, status, body, created_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8)
             on conflict (key_id, route, idempotency_key) do update set
               fingerprint = excluded.fingerprint, job_id = excluded.job_id, status = excluded.status,
               body = excluded.body, created_at = excluded.created_at
             where idempotency.created_at < $9",
            &record.key_id,
            &record.route,
            &record.idempotency_key,
            &record.fingerprint,
            record.job_id,
            record.status,
            &record.body,
            record.created_at,
            expired_before
        )?;
        if rows > 0 {
            return Ok(IdempotencyOutcome::New);
        }
        let before = fetch!(
            self,
            "read an idempotency key",
            fetch_one => IdempotencyRecord,
            concat!("select ", columns!(IdempotencyRecord), " from idempotency where key_id = $1 and route = $2 and idempotency_key = $3"),
            &record.key_id,
            &record.route,
            &record.idempotency_key
        )?;
        Ok(IdempotencyOutcome::Replay(Box::new(before)))
    }
}

impl Store {
    /// The response stored for this key, unless it was created before `expired_before`. A replay writes nothing.
    pub async fn remembered(
        &self,
        key_id: &KeyId,
        route: &str,
        idempotency_key: &str,
        expired_before: Timestamp,
    ) -> Result<Option<IdempotencyRecord>> {
        read!(
            self,
            "read an idempotency key",
            fetch_optional => IdempotencyRecord,
            concat!("select ", columns!(IdempotencyRecord), " from idempotency
             where key_id = $1 and route = $2 and idempotency_key = $3 and created_at >= $4"),
            key_id,
            route,
            idempotency_key,
            expired_before
        )
    }
}
