//! The addresses that get a key's events, and what signs these.

use super::columns::columns;
use super::{Result, Store, Tx, execute, fetch, read};
use crate::clock::Timestamp;
use crate::delivery::{DeliveryStatus, Endpoint};
use crate::id::{EndpointId, KeyId};

/// Endpoints of one key: each makes the end of a job dearer.
const MOST: i64 = 20;

impl Store {
    /// The endpoint, if there is one.
    pub async fn endpoint(&self, endpoint_id: EndpointId) -> Result<Option<Endpoint>> {
        read!(
            self,
            "read an endpoint",
            fetch_optional => Endpoint,
            concat!("select ", columns!(Endpoint), " from endpoint where endpoint_id = $1"),
            endpoint_id
        )
    }

    /// Up to `limit` endpoints of one owner or of all, newest first, those before the `endpoint_number` `before`.
    pub async fn endpoints(&self, owner: Option<&KeyId>, before: i64, limit: i64) -> Result<Vec<Endpoint>> {
        match owner {
            Some(key_id) => read!(
                self,
                "list endpoints",
                fetch_all => Endpoint,
                concat!("select ", columns!(Endpoint), " from endpoint where key_id = $1 and endpoint_number < $2
                 order by endpoint_number desc limit $3"),
                key_id,
                before,
                limit
            ),
            None => read!(
                self,
                "list endpoints",
                fetch_all => Endpoint,
                concat!("select ", columns!(Endpoint), " from endpoint where endpoint_number < $1
                 order by endpoint_number desc limit $2"),
                before,
                limit
            ),
        }
    }

    /// What signs the events of a key's jobs, sealed, since when, and its version.
    pub async fn webhook_secret(&self, key_id: &KeyId) -> Result<Option<(String, Timestamp, i64)>> {
        read!(
            self,
            "read a webhook secret",
            fetch_optional => (String, Timestamp, i64),
            "select secrets, created_at, version from webhook_secret where key_id = $1",
            key_id
        )
    }
}

impl Tx {
    /// Stores a new endpoint; `None`: its key has as many as it may have, which is 20.
    pub async fn insert_endpoint(&mut self, endpoint: &Endpoint) -> Result<Option<Endpoint>> {
        let (count,) = fetch!(
            self,
            "count endpoints",
            fetch_one => (i64,),
            "select count(*) from endpoint where key_id = $1",
            &endpoint.key_id
        )?;
        if count >= MOST {
            return Ok(None);
        }
        let stored = fetch!(
            self,
            "store an endpoint",
            fetch_one => Endpoint,
            concat!("insert into endpoint (endpoint_id, key_id, url, event_types, description, payload, headers, secrets,
               metadata, enabled, created_at, updated_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11) returning ", columns!(Endpoint)),
            endpoint.endpoint_id,
            &endpoint.key_id,
            &endpoint.url,
            &endpoint.event_types,
            &endpoint.description,
            &endpoint.payload,
            &endpoint.headers,
            &endpoint.secrets,
            &endpoint.metadata,
            endpoint.enabled,
            endpoint.created_at
        )?;
        self.count_endpoints(&stored.key_id).await?;
        Ok(Some(stored))
    }

    /// Stores what a person may change of an endpoint, if nobody has since its `version`; `None` when somebody has. One
    /// that is enabled begins without failures.
    pub async fn update_endpoint(&mut self, endpoint: &Endpoint, now: Timestamp) -> Result<Option<Endpoint>> {
        let stored = fetch!(
            self,
            "change an endpoint",
            fetch_optional => Endpoint,
            concat!("update endpoint set url = $3, event_types = $4, description = $5, payload = $6, headers = $7,
               secrets = $8, metadata = $9,
               first_failure_at = case when enabled = $10 then first_failure_at else null end,
               disabled_reason = case when $10 then null else coalesce(disabled_reason, 'by_request') end,
               enabled = $10, updated_at = $11, version = version + 1
             where endpoint_id = $1 and version = $2 returning ", columns!(Endpoint)),
            endpoint.endpoint_id,
            endpoint.version,
            &endpoint.url,
            &endpoint.event_types,
            &endpoint.description,
            &endpoint.payload,
            &endpoint.headers,
            &endpoint.secrets,
            &endpoint.metadata,
            endpoint.enabled,
            now
        )?;
        if let Some(stored) = &stored {
            self.count_endpoints(&stored.key_id).await?;
            self.redirect_deliveries(stored).await?;
            if !stored.enabled {
                self.end_deliveries(stored.endpoint_id, DeliveryStatus::Failed, now)
                    .await?;
            }
        }
        Ok(stored)
    }

    /// Deletes an endpoint, and ends what is on its way to it; `false`: there is none.
    pub async fn delete_endpoint(&mut self, endpoint_id: EndpointId, now: Timestamp) -> Result<bool> {
        let deleted = fetch!(
            self,
            "delete an endpoint",
            fetch_optional => (KeyId,),
            "delete from endpoint where endpoint_id = $1 returning key_id",
            endpoint_id
        )?;
        let Some((key_id,)) = deleted else {
            return Ok(false);
        };
        self.count_endpoints(&key_id).await?;
        self.end_deliveries(endpoint_id, DeliveryStatus::Cancelled, now)
            .await?;
        Ok(true)
    }

    /// Switches an endpoint off that takes nothing; `false` if it was off already.
    pub(super) async fn disable_endpoint(
        &mut self,
        endpoint_id: EndpointId,
        reason: &str,
        now: Timestamp,
    ) -> Result<Option<Endpoint>> {
        let disabled = fetch!(
            self,
            "disable an endpoint",
            fetch_optional => Endpoint,
            concat!("update endpoint set enabled = $4, disabled_reason = $2, updated_at = $3, version = version + 1
             where endpoint_id = $1 and enabled returning ", columns!(Endpoint)),
            endpoint_id,
            reason,
            now,
            false
        )?;
        if let Some(endpoint) = &disabled {
            self.count_endpoints(&endpoint.key_id).await?;
            self.end_deliveries(endpoint_id, DeliveryStatus::Failed, now)
                .await?;
        }
        Ok(disabled)
    }

    /// Switches all endpoints of a key off.
    pub(super) async fn disable_endpoints_of(
        &mut self,
        key_id: &KeyId,
        reason: &str,
        now: Timestamp,
    ) -> Result<()> {
        let disabled = fetch!(
            self,
            "disable endpoints",
            fetch_all => (EndpointId,),
            "update endpoint set enabled = false, disabled_reason = $2, updated_at = $3, version = version + 1
             where key_id = $1 and enabled returning endpoint_id",
            key_id,
            reason,
            now
        )?;
        for (endpoint_id,) in &disabled {
            self.end_deliveries(*endpoint_id, DeliveryStatus::Failed, now)
                .await?;
        }
        if disabled.is_empty() {
            return Ok(());
        }
        self.count_endpoints(key_id).await
    }

    /// Deletes all endpoints of a key and what signs the events of its jobs, and ends what is on its way to it.
    pub(super) async fn delete_endpoints_of(&mut self, key_id: &KeyId, now: Timestamp) -> Result<()> {
        for statement in [
            "delete from endpoint where key_id = $1",
            "delete from webhook_secret where key_id = $1",
        ] {
            execute!(self, "delete endpoints", statement, key_id)?;
        }
        execute!(
            self,
            "end deliveries",
            "update delivery set status = 'cancelled', due_at = null, completed_at = $2
             where key_id = $1 and status = 'pending'",
            key_id,
            now
        )?;
        self.count_endpoints(key_id).await
    }

    /// Stores what signs the events of a key's jobs, if there is nothing yet; whether there was.
    pub async fn put_webhook_secret(&mut self, key_id: &KeyId, sealed: &str, now: Timestamp) -> Result<bool> {
        let rows = execute!(
            self,
            "store a webhook secret",
            "insert into webhook_secret (key_id, secrets, created_at) values ($1, $2, $3)
             on conflict (key_id) do nothing",
            key_id,
            sealed,
            now
        )?;
        Ok(rows == 0)
    }

    /// Replaces what signs the events of a key's jobs, if nobody has since `version`; `false` when somebody has.
    pub async fn rotate_webhook_secret(
        &mut self,
        key_id: &KeyId,
        version: i64,
        sealed: &str,
        now: Timestamp,
    ) -> Result<bool> {
        let rows = execute!(
            self,
            "rotate a webhook secret",
            "update webhook_secret set secrets = $3, created_at = $4, version = version + 1
             where key_id = $1 and version = $2",
            key_id,
            version,
            sealed,
            now
        )?;
        Ok(rows > 0)
    }

    /// What is on its way to an endpoint isn't tried any more.
    async fn end_deliveries(
        &mut self,
        endpoint_id: EndpointId,
        status: DeliveryStatus,
        now: Timestamp,
    ) -> Result<()> {
        execute!(
            self,
            "end deliveries",
            "update delivery set status = $2, due_at = null, completed_at = $3, last_error_class = 'endpoint_disabled'
             where endpoint_id = $1 and status = 'pending'",
            endpoint_id,
            status,
            now
        )
        .map(drop)
    }
}
