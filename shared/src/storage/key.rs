//! API keys: made, changed, rotated, taken back.

use super::{Error, Result, Store, Tx, execute, fetch, read};
use crate::clock::{self, Timestamp};
use crate::id::{JobId, KeyId};
use crate::job::CancelReason;
use crate::key::{ApiKey, Digest, KeyRights, KeyStatus, NewApiKey, Secret};
use crate::money::MicroUsd;
use std::time::Duration;

/// Jobs that are cancelled between two looks for more.
const CANCELLED_AT_ONCE: i64 = 500;

/// Which keys a list shows.
#[derive(Clone, Debug, Default)]
pub struct KeyFilter {
    /// Only those of this status.
    pub status: Option<KeyStatus>,
    /// Only those of exactly this name.
    pub name: Option<String>,
    /// Only those before this `key_number`.
    pub before: Option<i64>,
}

/// A new secret of a key that is rotated.
#[derive(Clone, Debug)]
pub struct NewSecret {
    /// Its digest.
    pub digest: Digest,
    /// Its last four characters.
    pub last4: String,
    /// Until when the former secret opens too; `None`: no longer.
    pub overlap_until: Option<Timestamp>,
}

impl NewSecret {
    /// A secret with its digest; the former one opens for `grace` more.
    pub fn new((secret, digest): (&Secret, Digest), grace: Duration, now: Timestamp) -> Self {
        Self {
            digest,
            last4: secret.last4().to_owned(),
            overlap_until: (!grace.is_zero()).then(|| now.plus(grace)),
        }
    }
}

impl Tx {
    /// Stores a key, and its lane in the queue. `default_running`: its cap on running jobs if it has none of its own.
    pub async fn insert_api_key(&mut self, key: &NewApiKey, default_running: i64) -> Result<ApiKey> {
        let rights = &key.rights;
        let stored = fetch!(
            self,
            "store a key",
            fetch_one => ApiKey,
            "insert into api_key (key_id, name, secret_digest, last4, scopes, allowed_ips, allowed_models, rate_submit,
               rate_read, rate_window, max_running_jobs, max_queued_jobs, max_streams, max_priority, metadata,
               created_at, created_by, expires_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
             returning *",
            &key.key_id,
            &key.name,
            &key.secret_digest,
            &key.last4,
            rights.scopes.to_string(),
            rights.allowed_ips.to_column(),
            rights.allowed_models.to_column(),
            rights.rate_submit,
            rights.rate_read,
            rights.rate_window,
            rights.max_running_jobs,
            rights.max_queued_jobs,
            rights.max_streams,
            rights.max_priority,
            &key.metadata,
            key.created_at,
            &key.created_by,
            key.expires_at
        )?;
        self.put_key_lane(&stored.key_id, &stored.rights, default_running)
            .await?;
        Ok(stored)
    }

    /// Stores the name, rights, metadata and end of a key, if nobody has changed it since `key.version`; `None` when
    /// somebody has. A raised cap on running jobs frees waiting ones at once.
    pub async fn update_api_key(&mut self, key: &ApiKey, default_running: i64) -> Result<Option<ApiKey>> {
        let rights = &key.rights;
        let stored = fetch!(
            self,
            "change a key",
            fetch_optional => ApiKey,
            "update api_key set name = $3, scopes = $4, allowed_ips = $5, allowed_models = $6, rate_submit = $7,
               rate_read = $8, rate_window = $9, max_running_jobs = $10, max_queued_jobs = $11, max_streams = $12,
               max_priority = $13, metadata = $14, expires_at = $15, version = version + 1
             where key_id = $1 and version = $2 returning *",
            &key.key_id,
            key.version,
            &key.name,
            rights.scopes.to_string(),
            rights.allowed_ips.to_column(),
            rights.allowed_models.to_column(),
            rights.rate_submit,
            rights.rate_read,
            rights.rate_window,
            rights.max_running_jobs,
            rights.max_queued_jobs,
            rights.max_streams,
            rights.max_priority,
            &key.metadata,
            key.expires_at
        )?;
        if let Some(stored) = &stored {
            self.put_key_lane(&stored.key_id, &stored.rights, default_running)
                .await?;
        }
        Ok(stored)
    }

    /// Gives a key another secret, if nobody has changed it since `version`. The present one becomes the former, and
    /// the former opens no more.
    pub async fn rotate_api_key(
        &mut self,
        key_id: &KeyId,
        version: i64,
        secret: &NewSecret,
    ) -> Result<Option<ApiKey>> {
        fetch!(
            self,
            "rotate a key",
            fetch_optional => ApiKey,
            "update api_key set
               previous_digest = case when cast($5 as bigint) is null then null else secret_digest end,
               previous_valid_until = $5, secret_digest = $3, last4 = $4, version = version + 1
             where key_id = $1 and version = $2 and revoked_at is null returning *",
            key_id,
            version,
            &secret.digest,
            &secret.last4,
            secret.overlap_until
        )
    }

    /// Takes a key back. One that is already stays as it is. `None`: there is no such key.
    pub async fn revoke_api_key(
        &mut self,
        key_id: &KeyId,
        reason: Option<&str>,
        now: Timestamp,
    ) -> Result<Option<ApiKey>> {
        execute!(
            self,
            "revoke a key",
            "update api_key set revoked_at = $2, revoke_reason = $3, previous_digest = null,
               previous_valid_until = null, version = version + 1
             where key_id = $1 and revoked_at is null",
            key_id,
            now,
            reason
        )?;
        fetch!(
            self,
            "read a key",
            fetch_optional => ApiKey,
            "select * from api_key where key_id = $1",
            key_id
        )
    }

    /// Deletes a key that was revoked or has expired; `false` for others. What it owned and spent stays under its id.
    pub async fn delete_api_key(&mut self, key_id: &KeyId, now: Timestamp) -> Result<bool> {
        let rows = execute!(
            self,
            "delete a key",
            "delete from api_key where key_id = $1 and (revoked_at is not null or expires_at <= $2)",
            key_id,
            now
        )?;
        Ok(rows > 0)
    }

    async fn put_key_lane(&mut self, key_id: &KeyId, rights: &KeyRights, default_running: i64) -> Result<()> {
        self.put_lane(key_id, rights.max_running_jobs.unwrap_or(default_running))
            .await
    }

    /// Makes sure that the key has a lane, with this cap on jobs that run at once. With another cap there may be room
    /// for one that waits.
    pub(super) async fn put_lane(&mut self, key_id: &KeyId, max_running: i64) -> Result<()> {
        let changed = fetch!(
            self,
            "set up a key's lane",
            fetch_optional => (Option<i64>,),
            "insert into lane (key_id, max_running) values ($1, $2)
             on conflict (key_id) do update set max_running = excluded.max_running
             where lane.max_running <> excluded.max_running
             returning top",
            key_id,
            max_running
        )?;
        if let Some((Some(_),)) = changed {
            self.ring();
        }
        Ok(())
    }
}

impl Store {
    /// The key, if there is one.
    pub async fn api_key(&self, key_id: &KeyId) -> Result<Option<ApiKey>> {
        read!(self, "read a key", fetch_optional => ApiKey, "select * from api_key where key_id = $1", key_id)
    }

    /// Up to `limit` keys, newest first.
    pub async fn api_keys(&self, filter: &KeyFilter, limit: i64, now: Timestamp) -> Result<Vec<ApiKey>> {
        read!(
            self,
            "list keys",
            fetch_all => ApiKey,
            "select * from api_key
             where key_number < $1 and ($2 = '' or name = $2)
               and ($3 = '' or $3 = case when revoked_at is not null then 'revoked'
                 when expires_at <= $4 then 'expired' else 'active' end)
             order by key_number desc limit $5",
            filter.before.unwrap_or(i64::MAX),
            filter.name.as_deref().unwrap_or(""),
            filter.status.map_or("", KeyStatus::as_str),
            now,
            limit
        )
    }

    /// Whether any key is stored, whatever its status.
    pub async fn has_api_keys(&self) -> Result<bool> {
        let row = read!(
            self,
            "look for keys",
            fetch_optional => (i64,),
            "select key_number from api_key order by key_number limit 1"
        )?;
        Ok(row.is_some())
    }

    /// Notes when keys were last used.
    pub async fn touch_api_keys(&self, used: &[(KeyId, Timestamp)]) -> Result<()> {
        let mut tx = self.begin().await?;
        for (key_id, at) in used {
            execute!(
                tx,
                "note the use of a key",
                "update api_key set last_used_at = $2 where key_id = $1 and (last_used_at is null or last_used_at < $2)",
                key_id,
                at
            )?;
        }
        tx.commit().await
    }

    /// Gives the stored keys that have none of their own the service's present cap on running jobs and its budget.
    pub async fn put_key_defaults(&self, max_running: i64, budget: MicroUsd, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        let lanes = execute!(
            tx,
            "set up keys' lanes",
            "update lane set max_running = $1 where max_running <> $1
               and key_id in (select key_id from api_key where max_running_jobs is null)",
            max_running
        )?;
        if lanes > 0 {
            tx.ring();
        }
        tx.commit().await?;
        let others = read!(
            self,
            "look for default budgets",
            fetch_all => (KeyId,),
            "select scope_id from budget
             where scope = 'key' and origin = 'default' and limit_amount <> $1
               and scope_id in (select key_id from api_key)",
            budget
        )?;
        for (key_id,) in others {
            self.put_default_budget(&key_id, budget, now).await?;
        }
        Ok(())
    }

    /// Makes the database know this value derived from `SECRET_KEY`, if it knows none; whether it is the one it knows.
    pub async fn bind_secret(&self, check: &str) -> Result<bool> {
        self.instance_id().await?;
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "bind SECRET_KEY",
            "update instance set secret_check = $1 where secret_check is null",
            check
        )?;
        let row = fetch!(
            tx,
            "bind SECRET_KEY",
            fetch_optional => (Option<String>,),
            "select secret_check from instance"
        )?;
        tx.commit().await?;
        let (known,) = row.ok_or_else(|| Error::during("bind SECRET_KEY")("no row".to_owned()))?;
        Ok(known.as_deref() == Some(check))
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

    /// Up to `limit` jobs of this key that wait or run. The newest come first: cancelling them in this order makes none
    /// of them the next of its group.
    pub async fn unended_jobs(&self, key_id: &KeyId, limit: i64) -> Result<Vec<JobId>> {
        let rows = read!(
            self,
            "list a key's jobs",
            fetch_all => (JobId,),
            "select job_id from job where key_id = $1 and status = 'queued'
             union all select job_id from job where key_id = $1 and status = 'running' and cancel_requested_at is null
             order by job_id desc limit $2",
            key_id,
            limit
        )?;
        Ok(rows.into_iter().map(|row| row.0).collect())
    }

    /// Cancels all jobs of a key that was taken back, those that run included: how many. A job that is submitted
    /// meanwhile may be left.
    pub async fn cancel_jobs_of(&self, key_id: &KeyId) -> Result<u64> {
        let mut cancelled = 0;
        loop {
            let jobs = self.unended_jobs(key_id, CANCELLED_AT_ONCE).await?;
            if jobs.is_empty() {
                return Ok(cancelled);
            }
            for job_id in jobs {
                self.cancel_job(job_id, CancelReason::KeyRevoked, clock::now())
                    .await?;
                cancelled += 1;
            }
        }
    }
}
