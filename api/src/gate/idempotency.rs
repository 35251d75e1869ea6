//! Requests that carry an idempotency key: they do their work once, however often they are repeated.

use http::{HeaderName, StatusCode};
use shared::clock::{self, Timestamp};
use shared::id::{JobId, KeyId};
use shared::storage::{IdempotencyRecord, Store};
use std::time::Duration;

use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::request::{Json, Request, headers};

/// The answer was given before; nothing was done again.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// A request that may be repeated.
#[derive(Debug)]
pub struct IdempotentRequest {
    key_id: KeyId,
    route: String,
    key: String,
    fingerprint: String,
    now: Timestamp,
    /// Answers from before this time are forgotten.
    pub expired_before: Timestamp,
}

impl IdempotentRequest {
    /// This request, if it carries a key. Answers are kept for `ttl`.
    pub fn of(
        request: &Request,
        caller: &Caller,
        body: &Json,
        ttl: Duration,
    ) -> Result<Option<Self>, Problem> {
        let key =
            headers::idempotency_key(&request.headers).map_err(|why| Problem::BadRequest(why.into()))?;
        let Some(key) = key else { return Ok(None) };
        let now = clock::now();
        Ok(Some(Self {
            key_id: caller.key_id.clone(),
            route: format!("{} {}", request.method, request.path()),
            key: key.to_owned(),
            fingerprint: Request::fingerprint(body),
            now,
            expired_before: now.before(ttl),
        }))
    }

    /// The record of the first request with this key, if there was one; a problem if it was another request.
    pub async fn earlier(
        idempotent: Option<&Self>,
        store: &Store,
    ) -> Result<Option<Box<IdempotencyRecord>>, Problem> {
        let Some(request) = idempotent else {
            return Ok(None);
        };
        let first = store
            .remembered(
                &request.key_id,
                &request.route,
                &request.key,
                request.expired_before,
            )
            .await?;
        let Some(first) = first else { return Ok(None) };
        request.check(&first)?;
        Ok(Some(Box::new(first)))
    }

    /// A problem if the first request with this key was another one.
    pub fn check(&self, first: &IdempotencyRecord) -> Result<(), Problem> {
        if first.fingerprint == self.fingerprint {
            Ok(())
        } else {
            Err(Problem::IdempotencyKeyReused)
        }
    }

    /// The answer to keep.
    pub fn record(&self, job_id: Option<JobId>, status: StatusCode, body: String) -> IdempotencyRecord {
        IdempotencyRecord {
            key_id: self.key_id.clone(),
            route: self.route.clone(),
            idempotency_key: self.key.clone(),
            fingerprint: self.fingerprint.clone(),
            job_id,
            status: i64::from(status.as_u16()),
            body,
            created_at: self.now,
        }
    }
}
