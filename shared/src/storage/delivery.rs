//! The outbox: events on their way to receivers. Rows are written in the transaction of what they tell about, claimed
//! for a short time by who delivers, and recorded with each attempt. A delivery may be tried twice, never not at all.

use super::budget::Alert;
use super::columns::columns;
use super::{Error, Result, Store, Tx, TxDb, execute, fetch, lock, read};
use crate::budget::Scope;
use crate::clock::Timestamp;
use crate::delivery::{
    ClaimedDelivery, Delivery, DeliveryAttempt, DeliveryOutcome, DeliveryStatus, DueDelivery, Endpoint,
    HookEvent,
};
use crate::id::{DeliveryId, EndpointId, JobId, KeyId};
use crate::job::{Job, Lease};
use crate::webhook::address::masked;
use serde_json::{Value, json};
use sqlx::{Postgres, QueryBuilder, Sqlite};
use std::collections::BTreeSet;
use std::time::Duration;

/// Deliveries that are claimed at once.
const CLAIMED: i64 = 50;

/// So many due deliveries are looked at for a claim.
const LOOKED_AT: i64 = 400;

/// Says of a delivery that nothing could be sent, because what it tells about can't be read.
const UNREADABLE: &str = "unreadable";

/// Says of a delivery that its owner has removed what it told.
const REMOVED: &str = "data_removed";

/// So long before its end a key is said to expire.
const EXPIRING: Duration = Duration::from_hours(7 * 24);

/// So many deliveries of an endpoint are counted.
const COUNTED: i64 = 10_000;

/// So many failed deliveries are sent again by one request.
const RECOVERED: i64 = 10_000;

/// Which deliveries a list shows.
#[derive(Clone, Debug, Default)]
pub struct DeliveryFilter {
    /// Only those of this owner.
    pub key_id: Option<KeyId>,
    /// Only those about this job.
    pub job_id: Option<JobId>,
    /// Only those to this endpoint.
    pub endpoint_id: Option<EndpointId>,
    /// Only those of this status.
    pub status: Option<DeliveryStatus>,
    /// Only those of this type.
    pub event_type: Option<String>,
    /// Only those created after this time.
    pub created_after: Option<Timestamp>,
    /// Only those created before this time.
    pub created_before: Option<Timestamp>,
    /// Only those before this `delivery_number`.
    pub before: Option<i64>,
}

/// What a process has enough of under way: it takes nothing more to these hosts or of these keys.
#[derive(Clone, Debug, Default)]
pub struct Busy {
    /// Hosts with their ports.
    pub hosts: BTreeSet<String>,
    /// Owners.
    pub keys: BTreeSet<KeyId>,
}

/// What came of a request to send a delivery once more.
#[derive(Clone, Debug)]
pub enum Resend {
    /// It is sent.
    Pending(Box<Delivery>),
    /// It is on its way already.
    InProgress,
    /// Its endpoint, or what was sent, is gone.
    Gone,
}

/// Runs a statement that is built for its number of rows; gives the rows that it returns.
macro_rules! built {
    ($tx:expr, $operation:literal, $row:ty, |$query:ident| $build:block) => {{
        $tx.store.work.statement();
        match &mut $tx.db {
            TxDb::Sqlite(tx) => {
                let mut $query = QueryBuilder::<Sqlite>::new("");
                $build
                $query.build_query_as::<$row>().fetch_all(&mut **tx).await
            }
            TxDb::Postgres(tx) => {
                let mut $query = QueryBuilder::<Postgres>::new("");
                $build
                let statement = $query.build_query_as::<$row>().fetch_all(&mut **tx);
                $tx.store.liveness.in_time(statement).await
            }
        }
        .map_err(Error::during($operation))
    }};
}

impl Store {
    /// When the first of the deliveries that wait is due; it may be in the past.
    pub async fn next_delivery_at(&self) -> Result<Option<Timestamp>> {
        let first = read!(
            self,
            "look for due deliveries",
            fetch_optional => (Timestamp,),
            "select due_at from delivery where status = 'pending' and due_at is not null order by due_at limit 1"
        )?;
        Ok(first.map(|first| first.0))
    }

    /// Up to 50 deliveries that are due, in turn for each host. Takes none of them.
    pub async fn due_deliveries(&self, busy: &Busy, now: Timestamp) -> Result<Vec<DueDelivery>> {
        // The same text says of each host and key whether it is in the list; none has a bar in it.
        let hosts = busy
            .hosts
            .iter()
            .fold("|".to_owned(), |list, host| list + host + "|");
        let keys = busy
            .keys
            .iter()
            .fold("|".to_owned(), |list, key| list + key.as_str() + "|");
        read!(
            self,
            "look for due deliveries",
            fetch_all => DueDelivery,
            "select delivery_id, endpoint_id, job_id, event_type, created_at, body is not null as has_body,
               (select payload from endpoint where endpoint.endpoint_id = delivery.endpoint_id) as payload
             from delivery join (
               select delivery_number as number, row_number() over (partition by host order by due_at) as place from (
                 select delivery_number, due_at, host from delivery
                 where status = 'pending' and due_at <= $1
                   and replace($2, '|' || host || '|', '') = $2 and replace($3, '|' || key_id || '|', '') = $3
                 order by due_at limit $4) as due
               order by place limit $5) as placed on delivery_number = placed.number
             order by placed.place",
            now,
            hosts,
            keys,
            LOOKED_AT,
            CLAIMED
        )
    }

    /// Takes deliveries for `lease`: until then nobody else tries them. Those that have no bytes yet get them from
    /// `bodies`, and are sent unchanged in each attempt from here on. One transaction; what somebody else has taken
    /// meanwhile isn't in the result.
    pub async fn claim_deliveries(
        &self,
        due: &[DeliveryId],
        bodies: &[(DeliveryId, String)],
        lease: Duration,
        now: Timestamp,
    ) -> Result<Vec<ClaimedDelivery>> {
        let mut tx = self.begin().await?;
        // Two that claim the same rows in another order would wait in a circle.
        tx.postgres_lock(lock!("", "3"), None).await?;
        if !bodies.is_empty() {
            built!(tx, "store what is delivered", (DeliveryId,), |query| {
                query.push("update delivery set body = given.column2 from (");
                query.push_values(bodies, |mut row, (delivery_id, body)| {
                    row.push_bind(*delivery_id).push_bind(body);
                });
                query.push(
                    ") as given where delivery_id = given.column1 and body is null and status = 'pending'
                     returning delivery_id",
                );
            })?;
        }
        let claimed = built!(tx, "claim deliveries", ClaimedDelivery, |query| {
            query
                .push("update delivery set due_at = ")
                .push_bind(now.plus(lease));
            query.push(" where status = 'pending' and body is not null and due_at <= ");
            query.push_bind(now).push(" and delivery_id in (");
            let mut list = query.separated(", ");
            for delivery_id in due {
                list.push_bind(*delivery_id);
            }
            query.push(
                ") returning delivery_id, key_id, endpoint_id, url, host, body, attempts, manual,
                   coalesce(
                     (select secrets from endpoint where endpoint.endpoint_id = delivery.endpoint_id),
                     (select secrets from webhook_secret where webhook_secret.key_id = delivery.key_id)) as secrets,
                   (select headers from endpoint where endpoint.endpoint_id = delivery.endpoint_id) as headers",
            );
        })?;
        tx.commit().await?;
        Ok(claimed)
    }

    /// Ends a delivery of which nothing can be sent, so that it doesn't hold up others.
    pub async fn end_unreadable(&self, delivery_id: DeliveryId, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "end a delivery",
            "update delivery set status = 'failed', due_at = null, completed_at = $2, last_error_class = $3
             where delivery_id = $1 and status = 'pending' and body is null",
            delivery_id,
            now,
            UNREADABLE
        )?;
        tx.commit().await
    }

    /// Records attempts, in one transaction. An endpoint that has failed for `disable_after` without a success, or is
    /// gone, is switched off. What somebody else recorded meanwhile stays.
    pub async fn record_deliveries(
        &self,
        outcomes: &[DeliveryOutcome],
        disable_after: Duration,
        now: Timestamp,
    ) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.record_attempts(outcomes, now).await?;
        let endpoint_of = |outcome: &DeliveryOutcome| outcome.delivery.endpoint_id;
        let (failed, taken): (Vec<_>, Vec<_>) = outcomes
            .iter()
            // Where nothing was sent, the receiver isn't to blame.
            .filter(|outcome| outcome.asked)
            .partition(|outcome| outcome.error_class.is_some());
        let taken: BTreeSet<_> = taken.into_iter().filter_map(endpoint_of).collect();
        for endpoint_id in &taken {
            execute!(
                tx,
                "note a success of an endpoint",
                "update endpoint set first_failure_at = null where endpoint_id = $1 and first_failure_at is not null",
                endpoint_id
            )?;
        }
        let gone: BTreeSet<_> = failed
            .iter()
            .filter(|outcome| outcome.gone)
            .filter_map(|outcome| endpoint_of(outcome))
            .collect();
        let failed: BTreeSet<_> = failed.into_iter().filter_map(endpoint_of).collect();
        for endpoint_id in failed.difference(&taken) {
            let since = fetch!(
                tx,
                "note a failure of an endpoint",
                fetch_optional => (Timestamp,),
                "update endpoint set first_failure_at = coalesce(first_failure_at, $2) where endpoint_id = $1 and enabled
                 returning first_failure_at",
                endpoint_id,
                now
            )?;
            let reason = match since {
                Some(_) if gone.contains(endpoint_id) => "gone",
                Some((since,)) if now.since(since) >= disable_after => "failing",
                _ => continue,
            };
            if let Some(endpoint) = tx.disable_endpoint(*endpoint_id, reason, now).await? {
                tracing::warn!(
                    endpoint.id = %endpoint_id,
                    key.id = endpoint.key_id.as_str(),
                    "endpoint {endpoint_id} is switched off: {reason}"
                );
                tx.announce_disabled(&endpoint, reason, now).await?;
            }
        }
        tx.commit().await
    }

    /// The delivery, if there is one.
    pub async fn delivery(&self, delivery_id: DeliveryId) -> Result<Option<Delivery>> {
        read!(
            self,
            "read a delivery",
            fetch_optional => Delivery,
            concat!("select ", columns!(Delivery), " from delivery where delivery_id = $1"),
            delivery_id
        )
    }

    /// The bytes of a delivery, if it has any yet.
    pub async fn delivery_body(&self, delivery_id: DeliveryId) -> Result<Option<String>> {
        let row = read!(
            self,
            "read what is delivered",
            fetch_optional => (Option<String>,),
            "select body from delivery where delivery_id = $1",
            delivery_id
        )?;
        Ok(row.and_then(|row| row.0))
    }

    /// The attempts of a delivery.
    pub async fn delivery_attempts(&self, delivery_id: DeliveryId) -> Result<Vec<DeliveryAttempt>> {
        read!(
            self,
            "read attempts of a delivery",
            fetch_all => DeliveryAttempt,
            "select number, trigger_kind, started_at, duration_ms, status_code, error_class, snippet
             from delivery_attempt where delivery_id = $1 order by number",
            delivery_id
        )
    }

    /// Up to `limit` deliveries, newest first.
    pub async fn deliveries(&self, filter: &DeliveryFilter, limit: i64) -> Result<Vec<Delivery>> {
        // The most selective index first; the rest is compared with each row.
        macro_rules! list {
            ($first:literal, $by:expr) => {
                read!(
                    self,
                    "list deliveries",
                    fetch_all => Delivery,
                    concat!("select ", columns!(Delivery), " from delivery where ", $first,
                     " and delivery_number < $2 and ($3 = '' or key_id = $3) and ($4 = '' or status = $4)
                       and ($5 = '' or event_type = $5) and ($6 = '' or endpoint_id = $6)
                       and created_at > $7 and created_at < $8
                     order by delivery_number desc limit $9"),
                    $by,
                    filter.before.unwrap_or(i64::MAX),
                    filter.key_id.as_ref().map_or("", KeyId::as_str),
                    filter.status.map_or("", DeliveryStatus::as_str),
                    filter.event_type.as_deref().unwrap_or(""),
                    filter.endpoint_id.map_or_else(String::new, |id| id.to_string()),
                    filter.created_after.unwrap_or(Timestamp(i64::MIN)),
                    filter.created_before.unwrap_or(Timestamp(i64::MAX)),
                    limit
                )
            };
        }
        match (filter.job_id, filter.endpoint_id, &filter.key_id) {
            (Some(job_id), ..) => list!("job_id = $1", job_id),
            (None, Some(endpoint_id), _) => list!("endpoint_id = $1", endpoint_id),
            (None, None, Some(key_id)) => list!("key_id = $1", key_id),
            (None, None, None) => list!("$1 = ''", ""),
        }
    }

    /// How many of the newest 10,000 deliveries to an endpoint since a time are of each status.
    pub async fn delivery_counts(
        &self,
        endpoint_id: EndpointId,
        since: Timestamp,
    ) -> Result<Vec<(DeliveryStatus, i64)>> {
        read!(
            self,
            "count deliveries",
            fetch_all => (DeliveryStatus, i64),
            "select status, count(*) from (
               select status, created_at from delivery where endpoint_id = $1 order by delivery_number desc limit $3
             ) as newest where created_at > $2 group by status",
            endpoint_id,
            since,
            COUNTED
        )
    }

    /// Forgets up to 500 deliveries that ended before this time, or that nobody has tried since; how many.
    pub async fn forget_deliveries(&self, before: Timestamp) -> Result<u64> {
        let mut tx = self.begin().await?;
        let forgotten = tx.forget_deliveries(before, 500).await?;
        tx.commit().await?;
        Ok(forgotten)
    }

    /// Tells of keys that are about to expire. A key without an endpoint is told when it gets one.
    pub async fn tell_expiring(&self, now: Timestamp) -> Result<()> {
        // Hardly ever is there one, so a look comes first.
        let any = read!(
            self,
            "look for keys that expire",
            fetch_optional => (i64,),
            "select cast(1 as bigint) from api_key
             where revoked_at is null and expires_at > $1 and expires_at < $2
               and (expiry_told is null or expiry_told <> expires_at)
               and exists (select 1 from endpoint where endpoint.key_id = api_key.key_id) limit 1",
            now,
            now.plus(EXPIRING)
        )?;
        if any.is_none() {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        tx.announce_expiring(now).await?;
        tx.commit().await
    }

    /// A job that runs has something new, for those who want to hear of it. A run that isn't this lease's any more says
    /// nothing.
    pub async fn announce_progress(&self, lease: &Lease, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        let job = fetch!(
            tx,
            "read a running job",
            fetch_optional => Job,
            concat!("select ", columns!(Job), " from job where job_id = $1 and attempt = $2 and status = 'running'"),
            lease.job.job_id,
            lease.job.attempt
        )?;
        match job {
            Some(job) => {
                let event = HookEvent::JobProgress;
                tx.announce_job(&job, event, lease.endpoints, now).await?;
                tx.commit().await
            }
            None => tx.rollback().await,
        }
    }
}

impl Tx {
    /// Counts again how many endpoints of a key are enabled: without any, the end of a job looks for none.
    pub(super) async fn count_endpoints(&mut self, key_id: &KeyId) -> Result<()> {
        execute!(
            self,
            "count endpoints",
            "update lane set endpoints = (select count(*) from endpoint where endpoint.key_id = $1 and enabled)
             where key_id = $1",
            key_id
        )
        .map(drop)
    }

    /// What happened to a job, for its own address and for the endpoints of its owner, if it may have `endpoints`.
    pub(super) async fn announce_job(
        &mut self,
        job: &Job,
        event: HookEvent,
        endpoints: bool,
        now: Timestamp,
    ) -> Result<()> {
        let untold = match event {
            HookEvent::JobProgress => self.waiting_progress(job.job_id).await?,
            _ => BTreeSet::new(),
        };
        let wanted = match event {
            HookEvent::JobStarted => "started",
            HookEvent::JobProgress => "progress",
            _ => "completed",
        };
        if let Some(url) = &job.webhook_url
            && job.webhook_events.split(' ').any(|word| word == wanted)
            && !untold.contains(&None)
        {
            self.insert_delivery((&job.key_id, Some(job.job_id)), (None, url), event, None, now)
                .await?;
        }
        if endpoints {
            self.announce_except(&untold, (&job.key_id, Some(job.job_id)), event, None, now)
                .await?;
        }
        Ok(())
    }

    /// Where earlier progress of a job hasn't arrived yet. It tells how the job is when it is sent, so one is enough, and
    /// a receiver that takes none doesn't fill the table.
    async fn waiting_progress(&mut self, job_id: JobId) -> Result<BTreeSet<Option<EndpointId>>> {
        let waiting = fetch!(
            self,
            "look for deliveries of a job",
            fetch_all => (Option<EndpointId>,),
            "select endpoint_id from delivery where job_id = $1 and status = 'pending' and event_type = $2",
            job_id,
            HookEvent::JobProgress.as_str()
        )?;
        Ok(waiting.into_iter().map(|row| row.0).collect())
    }

    /// What happened, for the endpoints of a key that want to hear of it. An event without a job has a `body`.
    async fn announce(
        &mut self,
        key_id: &KeyId,
        event: HookEvent,
        body: &Value,
        now: Timestamp,
    ) -> Result<()> {
        self.announce_except(&BTreeSet::new(), (key_id, None), event, Some(body), now)
            .await
    }

    /// The same, but not to these endpoints.
    async fn announce_except(
        &mut self,
        untold: &BTreeSet<Option<EndpointId>>,
        (key_id, job_id): (&KeyId, Option<JobId>),
        event: HookEvent,
        body: Option<&Value>,
        now: Timestamp,
    ) -> Result<()> {
        // Progress comes every few seconds, so only who names it gets it.
        let all = event != HookEvent::JobProgress;
        let endpoints = fetch!(
            self,
            "look for endpoints",
            fetch_all => (EndpointId, String),
            "select endpoint_id, url from endpoint
             where key_id = $1 and enabled and (event_types like $2 or $3 and event_types = '')",
            key_id,
            format!("% {} %", event.as_str()),
            all
        )?;
        for (endpoint_id, url) in endpoints {
            if untold.contains(&Some(endpoint_id)) {
                continue;
            }
            self.insert_delivery((key_id, job_id), (Some(endpoint_id), &url), event, body, now)
                .await?;
        }
        Ok(())
    }

    /// A test for one endpoint, whatever it wants to hear of.
    pub async fn announce_test(&mut self, endpoint: &Endpoint, now: Timestamp) -> Result<Delivery> {
        let data = json!({ "endpoint_id": endpoint.endpoint_id });
        let body = json!({ "type": HookEvent::Test.as_str(), "timestamp": now, "data": data });
        self.insert_delivery(
            (&endpoint.key_id, None),
            (Some(endpoint.endpoint_id), &endpoint.url),
            HookEvent::Test,
            Some(&body),
            now,
        )
        .await
    }

    /// A budget has reached a threshold: for the endpoints of its key, or of everybody.
    pub(super) async fn announce_alert(&mut self, alert: &Alert, now: Timestamp) -> Result<()> {
        let event = if alert.threshold >= 100 {
            HookEvent::BudgetExceeded
        } else {
            HookEvent::BudgetThreshold
        };
        let data = json!({
            "scope": alert.scope.name(), "id": alert.scope.id(), "threshold_percent": alert.threshold,
            "spent_usd": alert.spent, "limit_usd": alert.limit,
        });
        let body = json!({ "type": event.as_str(), "timestamp": now, "data": data });
        let owners = match &alert.scope {
            Scope::Key(key_id) if self.has_endpoints(key_id).await? => vec![(key_id.clone(),)],
            Scope::Key(_) => Vec::new(),
            Scope::Global => fetch!(
                self,
                "look for endpoints",
                fetch_all => (KeyId,),
                "select key_id from lane where endpoints > 0"
            )?,
        };
        for (key_id,) in owners {
            self.announce(&key_id, event, &body, now).await?;
        }
        Ok(())
    }

    /// Tells the endpoints of keys that expire within a week, once for each end.
    async fn announce_expiring(&mut self, now: Timestamp) -> Result<()> {
        let expiring = fetch!(
            self,
            "look for keys that expire",
            fetch_all => (KeyId, String, Timestamp),
            "update api_key set expiry_told = expires_at
             where revoked_at is null and expires_at > $1 and expires_at < $2
               and (expiry_told is null or expiry_told <> expires_at)
               and exists (select 1 from endpoint where endpoint.key_id = api_key.key_id)
             returning key_id, name, expires_at",
            now,
            now.plus(EXPIRING)
        )?;
        let event = HookEvent::KeyExpiring;
        for (key_id, name, expires_at) in expiring {
            let data = json!({ "key_id": key_id, "name": name, "expires_at": expires_at });
            let body = json!({ "type": event.as_str(), "timestamp": now, "data": data });
            self.announce(&key_id, event, &body, now).await?;
        }
        Ok(())
    }

    async fn announce_disabled(&mut self, endpoint: &Endpoint, reason: &str, now: Timestamp) -> Result<()> {
        let event = HookEvent::EndpointDisabled;
        let data =
            json!({ "endpoint_id": endpoint.endpoint_id, "url": masked(&endpoint.url), "reason": reason });
        let body = json!({ "type": event.as_str(), "timestamp": now, "data": data });
        self.announce(&endpoint.key_id, event, &body, now).await
    }

    async fn insert_delivery(
        &mut self,
        (key_id, job_id): (&KeyId, Option<JobId>),
        (endpoint_id, url): (Option<EndpointId>, &str),
        event: HookEvent,
        body: Option<&Value>,
        now: Timestamp,
    ) -> Result<Delivery> {
        let stored = fetch!(
            self,
            "store a delivery",
            fetch_one => Delivery,
            concat!("insert into delivery (delivery_id, key_id, endpoint_id, job_id, event_type, url, host, body, due_at, created_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9) returning ", columns!(Delivery)),
            DeliveryId::new(),
            key_id,
            endpoint_id,
            job_id,
            event.as_str(),
            url,
            host(url),
            body.map(Value::to_string),
            now
        )?;
        self.deliver();
        Ok(stored)
    }

    async fn record_attempts(&mut self, outcomes: &[DeliveryOutcome], now: Timestamp) -> Result<()> {
        if outcomes.is_empty() {
            return Ok(());
        }
        let recorded = built!(self, "record deliveries", (DeliveryId,), |query| {
            query.push(
                "update delivery set status = made.column3, attempts = made.column2 + 1, due_at = made.column4,
                   manual = false, completed_at = made.column5, last_status_code = made.column6,
                   last_error_class = made.column7
                 from (",
            );
            query.push_values(outcomes, |mut row, outcome| {
                let retry_at = outcome.retry_at.filter(|_| outcome.error_class.is_some());
                let status = match (outcome.error_class, retry_at) {
                    (None, _) => DeliveryStatus::Succeeded,
                    (Some(_), Some(_)) => DeliveryStatus::Pending,
                    (Some(_), None) => DeliveryStatus::Failed,
                };
                row.push_bind(outcome.delivery.delivery_id)
                    .push_bind(outcome.delivery.attempts)
                    .push_bind(status)
                    .push_bind(retry_at)
                    .push_bind((status != DeliveryStatus::Pending).then_some(now))
                    .push_bind(outcome.status_code.map(i64::from))
                    .push_bind(outcome.error_class);
            });
            query.push(
                ") as made where delivery_id = made.column1 and attempts = made.column2 and status = 'pending'
                 returning delivery_id",
            );
        })?;
        let recorded: BTreeSet<_> = recorded.into_iter().map(|row| row.0).collect();
        let made = outcomes
            .iter()
            .filter(|outcome| recorded.contains(&outcome.delivery.delivery_id));
        if recorded.is_empty() {
            return Ok(());
        }
        built!(self, "record attempts of deliveries", (i64,), |query| {
            query.push(
                "insert into delivery_attempt (delivery_id, number, trigger_kind, started_at, duration_ms, status_code,
                   error_class, snippet) ",
            );
            query.push_values(made.clone(), |mut row, outcome| {
                let delivery = &outcome.delivery;
                row.push_bind(delivery.delivery_id)
                    .push_bind(delivery.attempts + 1)
                    .push_bind(if delivery.manual { "manual" } else { "scheduled" })
                    .push_bind(outcome.started_at)
                    .push_bind(i64::try_from(outcome.duration.as_millis()).unwrap_or(i64::MAX))
                    .push_bind(outcome.status_code.map(i64::from))
                    .push_bind(outcome.error_class)
                    .push_bind(&outcome.snippet);
            });
            query.push(" returning number");
        })
        .map(drop)
    }

    /// Sends a delivery once more, with the same id and bytes, to where its endpoint is now.
    pub async fn resend(&mut self, delivery: &Delivery, now: Timestamp) -> Result<Resend> {
        let endpoint = match delivery.endpoint_id {
            Some(endpoint_id) => fetch!(
                self,
                "look for an endpoint",
                fetch_optional => (String,),
                "select url from endpoint where endpoint_id = $1",
                endpoint_id
            )?,
            None => Some((delivery.url.clone(),)),
        };
        let Some((url,)) = endpoint else {
            return Ok(Resend::Gone);
        };
        let again = fetch!(
            self,
            "send a delivery again",
            fetch_optional => Delivery,
            concat!("update delivery set status = 'pending', manual = true, due_at = $2, completed_at = null, url = $3,
               host = $4
             where delivery_id = $1 and status <> 'pending' and (body is not null or attempts = 0) returning ",
             columns!(Delivery)),
            delivery.delivery_id,
            now,
            &url,
            host(&url)
        )?;
        if let Some(again) = again {
            self.deliver();
            return Ok(Resend::Pending(Box::new(again)));
        }
        let waits = fetch!(
            self,
            "read a delivery",
            fetch_optional => (DeliveryStatus,),
            "select status from delivery where delivery_id = $1",
            delivery.delivery_id
        )?;
        Ok(match waits {
            Some((DeliveryStatus::Pending,)) => Resend::InProgress,
            _ => Resend::Gone,
        })
    }

    /// Sends what an endpoint hasn't taken in this time once more, 10,000 deliveries at most; how many.
    pub async fn recover_deliveries(
        &mut self,
        endpoint: &Endpoint,
        (since, until): (Timestamp, Timestamp),
        now: Timestamp,
    ) -> Result<u64> {
        let rows = execute!(
            self,
            "send deliveries again",
            "update delivery set status = 'pending', manual = true, due_at = $4, completed_at = null, url = $6, host = $7
             where delivery_id in (
               select delivery_id from delivery
               where endpoint_id = $1 and status = 'failed' and created_at >= $2 and created_at < $3
                 and (body is not null or attempts = 0)
               order by delivery_number limit $5)",
            endpoint.endpoint_id,
            since,
            until,
            now,
            RECOVERED,
            &endpoint.url,
            host(&endpoint.url)
        )?;
        if rows > 0 {
            self.deliver();
        }
        Ok(rows)
    }

    /// What waits for an endpoint goes to where that is now.
    pub(super) async fn redirect_deliveries(&mut self, endpoint: &Endpoint) -> Result<()> {
        execute!(
            self,
            "redirect deliveries",
            "update delivery set url = $2, host = $3 where endpoint_id = $1 and status = 'pending' and url <> $2",
            endpoint.endpoint_id,
            &endpoint.url,
            host(&endpoint.url)
        )
        .map(drop)
    }

    /// Forgets up to `limit` deliveries that ended before this time, or that nobody has tried since; how many.
    async fn forget_deliveries(&mut self, before: Timestamp, limit: i64) -> Result<u64> {
        execute!(
            self,
            "end deliveries",
            "update delivery set status = 'failed', due_at = null, completed_at = $1 - 1
             where delivery_id in (
               select delivery_id from delivery where status = 'pending' and due_at < $1 order by due_at limit $2)",
            before,
            limit
        )?;
        execute!(
            self,
            "forget attempts of deliveries",
            "delete from delivery_attempt where delivery_id in (
               select delivery_id from delivery where completed_at < $1 order by completed_at, delivery_number limit $2)",
            before,
            limit
        )?;
        execute!(
            self,
            "forget deliveries",
            "delete from delivery where delivery_id in (
               select delivery_id from delivery where completed_at < $1 order by completed_at, delivery_number limit $2)",
            before,
            limit
        )
    }

    /// A job's prompt and result are removed from what was delivered about it. What was tried before can't be sent with
    /// the same bytes again, so it isn't; what wasn't tells what is left of the job.
    pub(super) async fn remove_bodies(&mut self, job_id: JobId, now: Timestamp) -> Result<()> {
        execute!(
            self,
            "remove what was delivered",
            "update delivery set body = null, due_at = null,
               completed_at = case when status = 'pending' then $2 else completed_at end,
               last_error_class = case when status = 'pending' then $3 else last_error_class end,
               status = case when status = 'pending' then 'cancelled' else status end
             where job_id = $1 and body is not null",
            job_id,
            now,
            REMOVED
        )
        .map(drop)
    }
}

/// The host and port of a URL that was checked, so that a slow receiver is known by whatever URL.
fn host(url: &str) -> String {
    let url = url::Url::parse(url).ok();
    let host = url.as_ref().and_then(url::Url::host_str).unwrap_or_default();
    let port = url.as_ref().and_then(url::Url::port_or_known_default);
    format!("{host}:{}", port.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_is_known_by_host_and_port() {
        for (url, expected) in [
            ("https://Example.com/a/b?c", "example.com:443"),
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("https://[::1]:443/x", "[::1]:443"),
            ("https://a?b=https://c/", "a:443"),
        ] {
            assert_eq!(host(url), expected, "{url}");
        }
    }
}
