//! API keys: created, changed, rotated, revoked.

use super::columns::columns;
use super::{Result, Store, Tx, execute, fetch, read};
use crate::clock::Timestamp;
use crate::id::KeyId;
use crate::key::{ApiKey, Digest, KeyRights, KeyStatus, NewApiKey, Secret};
use crate::money::MicroUsd;
use std::time::Duration;

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

/// The statement that lists keys: one for each set of filters, because each uses its own index.
#[doc(hidden)]
pub const fn keys_sql(filter: &KeyFilter) -> &'static str {
    macro_rules! keys {
        ($name:literal, $status:literal) => {
            keys!($name, $status, "key_number")
        };
        ($name:literal, $status:literal, $number:literal) => {
            concat!(
                "select ",
                columns!(ApiKey),
                " from api_key where ",
                $number,
                " < $1 and ",
                $name,
                " and ",
                $status,
                " order by ",
                $number,
                " desc limit $4"
            )
        };
        ($name:literal) => {
            match filter.status {
                None => keys!($name, "$3 = $3"),
                Some(KeyStatus::Active) => {
                    keys!(
                        $name,
                        "revoked_at is null and (expires_at is null or expires_at > $3)"
                    )
                }
                // Their index has another order, which is hidden from the planner.
                Some(KeyStatus::Expired) => {
                    keys!(
                        $name,
                        "revoked_at is null and expires_at is not null and expires_at <= $3",
                        "key_number + 0"
                    )
                }
                Some(KeyStatus::Revoked) => keys!($name, "revoked_at is not null and $3 = $3"),
            }
        };
    }
    match filter.name {
        None => keys!("$2 = ''"),
        Some(_) => keys!("name = $2"),
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
            concat!("insert into api_key (key_id, name, secret_digest, last4, scopes, allowed_ips, allowed_models, rate_submit,
               rate_read, rate_window, max_running_jobs, max_queued_jobs, max_streams, max_priority, metadata,
               created_at, created_by, expires_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
             returning ", columns!(ApiKey)),
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
            concat!("update api_key set name = $3, scopes = $4, allowed_ips = $5, allowed_models = $6, rate_submit = $7,
               rate_read = $8, rate_window = $9, max_running_jobs = $10, max_queued_jobs = $11, max_streams = $12,
               max_priority = $13, metadata = $14, expires_at = $15, version = version + 1
             where key_id = $1 and version = $2 returning ", columns!(ApiKey)),
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
            concat!("update api_key set
               previous_digest = case when cast($5 as bigint) is null then null else secret_digest end,
               previous_valid_until = $5, secret_digest = $3, last4 = $4, version = version + 1
             where key_id = $1 and version = $2 and revoked_at is null returning ", columns!(ApiKey)),
            key_id,
            version,
            &secret.digest,
            &secret.last4,
            secret.overlap_until
        )
    }

    /// Takes a key back, and disables its endpoints, which its owner can't change any more. One that is already stays as it
    /// is. `None`: there is no such key.
    pub async fn revoke_api_key(
        &mut self,
        key_id: &KeyId,
        reason: Option<&str>,
        now: Timestamp,
    ) -> Result<Option<ApiKey>> {
        let rows = execute!(
            self,
            "revoke a key",
            "update api_key set revoked_at = $2, revoke_reason = $3, previous_digest = null,
               previous_valid_until = null, version = version + 1
             where key_id = $1 and revoked_at is null",
            key_id,
            now,
            reason
        )?;
        if rows > 0 {
            self.disable_endpoints_of(key_id, "key_revoked", now).await?;
        }
        fetch!(
            self,
            "read a key",
            fetch_optional => ApiKey,
            concat!("select ", columns!(ApiKey), " from api_key where key_id = $1"),
            key_id
        )
    }

    /// Deletes a key that was revoked or has expired, with its endpoints; `false` for others. What else it owned and spent
    /// stays under its id.
    pub async fn delete_api_key(&mut self, key_id: &KeyId, now: Timestamp) -> Result<bool> {
        let rows = execute!(
            self,
            "delete a key",
            "delete from api_key where key_id = $1 and (revoked_at is not null or expires_at <= $2)",
            key_id,
            now
        )?;
        if rows > 0 {
            self.delete_endpoints_of(key_id, now).await?;
        }
        Ok(rows > 0)
    }

    async fn put_key_lane(&mut self, key_id: &KeyId, rights: &KeyRights, default_running: i64) -> Result<()> {
        self.put_lane(key_id, rights.max_running_jobs.unwrap_or(default_running))
            .await
    }
}

impl Store {
    /// The key, if there is one.
    pub async fn api_key(&self, key_id: &KeyId) -> Result<Option<ApiKey>> {
        read!(self, "read a key", fetch_optional => ApiKey, concat!("select ", columns!(ApiKey), " from api_key where key_id = $1"), key_id)
    }

    /// Up to `limit` keys, newest first.
    pub async fn api_keys(&self, filter: &KeyFilter, limit: i64, now: Timestamp) -> Result<Vec<ApiKey>> {
        read!(
            self,
            "list keys",
            fetch_all => ApiKey,
            keys_sql(filter),
            filter.before.unwrap_or(i64::MAX),
            filter.name.as_deref().unwrap_or(""),
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
        tx.put_default_caps(max_running).await?;
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
}
