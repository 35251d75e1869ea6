//! Delivers webhooks: claims what is due, sends it, records what came of it. A delivery is tried at least once, whoever
//! is killed when; receivers know a repeated one by its id. A slow receiver holds up only itself.

mod body;
pub mod client;
mod snippet;

use crate::config::Deliveries;
use crate::tickets::{self, Fetches, Source, Told};
use bytes::Bytes;
use client::Sender;
use futures_util::future::{BoxFuture, join_all};
use http::{HeaderMap, HeaderName, HeaderValue};
use shared::clock;
use shared::delivery::{ClaimedDelivery, DeliveryOutcome};
use shared::id::{KeyId, WorkerId};
use shared::sealed::Sealer;
use shared::storage::{Busy, Queue, Result, Store, Wakeups};
use shared::telemetry::chain;
use shared::webhook::schedule::Failure;
use shared::webhook::secrets::Secrets;
use shared::webhook::signature::signatures;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Deliveries that this process has taken and not ended; the last claim may bring some more.
const AT_ONCE: usize = 300;

/// The same of one key: whoever has many dead receivers delays only itself.
const PER_KEY: usize = 150;

/// The same to one host, of which [`SENT_PER_HOST`] are sent and the others wait for their turn. A host that has answered
/// quickly gets the next ones before these have ended.
const PER_HOST: usize = 10;
const PER_QUICK_HOST: usize = 60;

/// Attempts under way to one host at once.
const SENT_PER_HOST: usize = 10;

/// An attempt that took no longer was quick.
const QUICK: Duration = Duration::from_millis(200);

/// Jobs are read together, so many at most: each takes a connection to PostgreSQL.
const READ_AT_ONCE: usize = 4;

/// Results are recorded together, so many at most.
const RECORDED: usize = 100;

/// Tickets and wake-ups may both be lost.
const POLL: Duration = Duration::from_secs(5);

/// How long recording may take.
const RECORD: Duration = Duration::from_secs(10);

/// What the headers of an endpoint are sealed as.
const HEADERS: &str = "endpoint-headers";

/// Why nothing was sent: the secrets that sign are missing, or can't be opened with this `SECRET_KEY`.
const NO_SECRET: &str = "no_secret";

/// What delivering needs.
#[derive(Debug)]
pub struct Deliverer {
    /// The database.
    pub store: Store,
    /// What other processes commit.
    pub wakeups: Wakeups,
    /// The settings.
    pub config: Deliveries,
    /// Opens the secrets that sign.
    pub sealer: Sealer,
    /// How long an ended job keeps its data: said in what is delivered.
    pub retention: Duration,
    /// No more claims.
    pub draining: CancellationToken,
}

/// Delivers until the process stops, and what is under way then.
pub async fn deliver(deliverer: &Deliverer) {
    let ticketed = Ticketed {
        came: Arc::new(watch::Sender::new(())),
        room: Arc::new(watch::Sender::new(true)),
    };
    let source = Source {
        store: &deliverer.store,
        queue: Queue::Webhooks,
        name: WorkerId::new().to_string(),
        fetches: Fetches::LATER,
        draining: &deliverer.draining,
    };
    tokio::join!(
        tickets::take(&source, &ticketed, || deliverer.wakeups.delivery_tickets()),
        Box::pin(deliver_until_drained(deliverer, &ticketed)),
    );
}

/// A ticket wakes the loop below, as wake-ups do.
#[derive(Clone)]
struct Ticketed {
    came: Arc<watch::Sender<()>>,
    room: Arc<watch::Sender<bool>>,
}

impl Told for Ticketed {
    fn is_free(&self) -> bool {
        *self.room.borrow()
    }

    fn free(&self) -> BoxFuture<'static, ()> {
        let mut room = self.room.subscribe();
        Box::pin(async move {
            let _ = room.wait_for(|room| *room).await;
        })
    }

    fn on_ticket(&self) -> BoxFuture<'static, ()> {
        self.came.send_replace(());
        Box::pin(std::future::ready(()))
    }
}

async fn deliver_until_drained(deliverer: &Deliverer, ticketed: &Ticketed) {
    let sender = Arc::new(Sender::new(
        deliverer.config.guard.clone(),
        deliverer.config.timeout,
    ));
    let (mut wakeups, mut tickets) = (deliverer.wakeups.deliveries(), ticketed.came.subscribe());
    let (mut sending, mut recording) = (JoinSet::new(), JoinSet::new());
    let mut outcomes = Vec::new();
    let mut under_way = UnderWay::default();
    loop {
        let draining = deliverer.draining.is_cancelled();
        if !outcomes.is_empty() && recording.is_empty() {
            let rest = outcomes.split_off(outcomes.len().min(RECORDED));
            let made = std::mem::replace(&mut outcomes, rest);
            recording.spawn(record(
                deliverer.store.clone(),
                deliverer.config.disable_after,
                made,
            ));
        }
        if draining && sending.is_empty() && recording.is_empty() {
            return;
        }
        let room = !draining && under_way.all < AT_ONCE;
        ticketed
            .room
            .send_if_modified(|had| std::mem::replace(had, room) != room);
        let mut next = Instant::now() + POLL;
        if room {
            match claim(deliverer, &under_way.busy()).await {
                Ok(Claim::Taken(claimed)) => {
                    // An attempt that begins later might last longer than the claim.
                    let begin_by =
                        Instant::now() + lease(&deliverer.config) - deliverer.config.timeout - RECORD;
                    for delivery in claimed {
                        let (key, sender) = (under_way.begin(&delivery), sender.clone());
                        let turns = under_way.turns(&delivery.host);
                        let attempt = Attempt::of(deliverer, delivery);
                        sending.spawn(async move {
                            let outcome = match timeout_at(begin_by, turns.acquire_owned()).await {
                                Ok(Ok(_turn)) => Some(attempt.make(&sender).await),
                                // Somebody else gets it when the claim has run out.
                                _ => None,
                            };
                            (key, outcome)
                        });
                    }
                    continue;
                }
                Ok(Claim::Due(after)) => next = next.min(Instant::now() + after),
                Ok(Claim::Nothing) => {}
                Err(error) if deliverer.store.note(&error) => deliverer.store.answers().await,
                Err(error) => warn!(error = %chain(&error), "could not claim deliveries, retrying"),
            }
        }
        tokio::select! {
            Some(done) = sending.join_next(), if !sending.is_empty() => {
                let mut next = Some(done);
                while let Some(done) = next {
                    if let Ok((key, outcome)) = done {
                        under_way.end(&key, outcome.as_ref());
                        outcomes.extend(outcome);
                    }
                    next = sending.try_join_next();
                }
            }
            Some(_) = recording.join_next(), if !recording.is_empty() => {}
            changed = wakeups.changed() => if changed.is_err() { sleep(POLL).await },
            _ = tickets.changed() => {}
            () = sleep_until(next) => {}
            () = deliverer.draining.cancelled(), if !draining => {}
        }
    }
}

/// What this process has taken and not ended.
#[derive(Default)]
struct UnderWay {
    all: usize,
    keys: BTreeMap<KeyId, usize>,
    hosts: BTreeMap<String, Host>,
}

/// What this process does to one host.
struct Host {
    claimed: usize,
    quick: bool,
    /// Those that are sent take turns.
    turns: Arc<Semaphore>,
}

/// One of them.
struct Key {
    key_id: KeyId,
    host: String,
}

impl UnderWay {
    fn begin(&mut self, delivery: &ClaimedDelivery) -> Key {
        self.all += 1;
        *self.keys.entry(delivery.key_id.clone()).or_default() += 1;
        let host = self.hosts.entry(delivery.host.clone()).or_insert_with(|| Host {
            claimed: 0,
            quick: false,
            turns: Arc::new(Semaphore::new(SENT_PER_HOST)),
        });
        host.claimed += 1;
        Key {
            key_id: delivery.key_id.clone(),
            host: delivery.host.clone(),
        }
    }

    fn turns(&self, host: &str) -> Arc<Semaphore> {
        self.hosts[host].turns.clone()
    }

    fn end(&mut self, key: &Key, outcome: Option<&DeliveryOutcome>) {
        self.all -= 1;
        end_one(&mut self.keys, &key.key_id, |count| {
            *count -= 1;
            *count
        });
        end_one(&mut self.hosts, &key.host, |host| {
            host.quick = outcome.is_some_and(|outcome| outcome.duration <= QUICK);
            host.claimed -= 1;
            host.claimed
        });
    }

    /// Of what there is enough.
    fn busy(&self) -> Busy {
        let full = |host: &Host| host.claimed >= if host.quick { PER_QUICK_HOST } else { PER_HOST };
        Busy {
            hosts: self
                .hosts
                .iter()
                .filter(|(_, host)| full(host))
                .map(|(name, _)| name.clone())
                .collect(),
            keys: self
                .keys
                .iter()
                .filter(|(_, count)| **count >= PER_KEY)
                .map(|(key, _)| key.clone())
                .collect(),
        }
    }
}

/// Counts one less, and forgets what has none left.
fn end_one<K: Ord, V>(map: &mut BTreeMap<K, V>, key: &K, less: impl FnOnce(&mut V) -> usize) {
    if map.get_mut(key).map(less) == Some(0) {
        map.remove(key);
    }
}

/// How long nobody else tries what was claimed.
fn lease(config: &Deliveries) -> Duration {
    config.timeout * 2 + RECORD
}

/// What a look for deliveries found.
enum Claim {
    /// These are to be sent.
    Taken(Vec<ClaimedDelivery>),
    /// Nothing is due before this time is over.
    Due(Duration),
    /// Nothing that may be sent now.
    Nothing,
}

/// Takes what is due, with the bytes to send.
async fn claim(deliverer: &Deliverer, busy: &Busy) -> Result<Claim> {
    let (store, now) = (&deliverer.store, clock::now());
    let Some(first) = store.next_delivery_at().await? else {
        return Ok(Claim::Nothing);
    };
    // A clock that is ahead would take what others are sending.
    if clock::ahead().is_some() {
        return Ok(Claim::Nothing);
    }
    if first > now {
        return Ok(Claim::Due(first.since(now)));
    }
    let due = store.due_deliveries(busy, now).await?;
    let mut bodies = Vec::new();
    let new: Vec<_> = due.iter().filter(|delivery| !delivery.has_body).collect();
    for some in new.chunks(READ_AT_ONCE) {
        let reading = some
            .iter()
            .map(|delivery| body::of_job(store, delivery, deliverer.retention));
        for (delivery, body) in some.iter().zip(join_all(reading).await) {
            match body {
                Ok(body) => bodies.push((delivery.delivery_id, body)),
                Err(body::Error::Storage(error)) if store.note(&error) => return Err(error),
                Err(error) => {
                    warn!(
                        delivery.id = %delivery.delivery_id,
                        error = %chain(&error),
                        "delivery {} has nothing to tell and ends", delivery.delivery_id
                    );
                    store.end_unreadable(delivery.delivery_id, now).await?;
                }
            }
        }
    }
    if due.is_empty() {
        return Ok(Claim::Nothing);
    }
    let due: Vec<_> = due.into_iter().map(|delivery| delivery.delivery_id).collect();
    let claimed = store
        .claim_deliveries(&due, &bodies, lease(&deliverer.config), clock::now())
        .await?;
    Ok(if claimed.is_empty() {
        Claim::Nothing
    } else {
        Claim::Taken(claimed)
    })
}

/// Records attempts, however often that fails, while nobody else may try them.
async fn record(store: Store, disable_after: Duration, outcomes: Vec<DeliveryOutcome>) {
    let until = Instant::now() + RECORD;
    for outcome in &outcomes {
        let delivery = &outcome.delivery;
        debug!(
            delivery.id = %delivery.delivery_id,
            key.id = delivery.key_id.as_str(),
            host = delivery.host,
            status = outcome.status_code,
            error = outcome.error_class,
            "delivery {} attempt {}",
            delivery.delivery_id,
            delivery.attempts + 1
        );
    }
    while Instant::now() < until {
        match store
            .record_deliveries(&outcomes, disable_after, clock::now())
            .await
        {
            Ok(()) => return,
            Err(error) if store.note(&error) => {}
            Err(error) => warn!(error = %chain(&error), "could not record deliveries, retrying"),
        }
        sleep(Duration::from_millis(200)).await;
    }
    warn!(
        deliveries = outcomes.len(),
        "deliveries could not be recorded; they will be sent again"
    );
}

/// A delivery that is about to be sent.
struct Attempt {
    delivery: ClaimedDelivery,
    headers: Option<HeaderMap>,
    config: Deliveries,
}

impl Attempt {
    fn of(deliverer: &Deliverer, delivery: ClaimedDelivery) -> Self {
        Self {
            headers: headers(&deliverer.sealer, &delivery),
            config: deliverer.config.clone(),
            delivery,
        }
    }

    async fn make(self, sender: &Sender) -> DeliveryOutcome {
        let Self {
            delivery,
            headers,
            config,
        } = self;
        let (started_at, begun) = (clock::now(), Instant::now());
        let made = usize::try_from(delivery.attempts)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        let again = |failure: Option<Failure>| {
            let failure = failure.filter(|_| !delivery.manual)?;
            config.schedule.next(made, &failure, random())
        };
        let Some(headers) = headers else {
            // Nothing is sent unsigned.
            return DeliveryOutcome {
                retry_at: again(Some(Failure::default())).map(|pause| started_at.plus(pause)),
                asked: false,
                delivery,
                started_at,
                duration: Duration::ZERO,
                status_code: None,
                error_class: Some(NO_SECRET),
                snippet: String::new(),
                gone: false,
            };
        };
        let body = Bytes::from(delivery.body.clone());
        let sent = sender.send(&delivery.url, headers, body).await;
        let failure = sent.failure();
        let again = again(failure);
        DeliveryOutcome {
            asked: true,
            started_at,
            duration: begun.elapsed(),
            status_code: sent.status,
            error_class: sent.error_class,
            snippet: sent.snippet,
            retry_at: again.map(|pause| clock::now().plus(pause)),
            gone: failure.is_some_and(|failure| failure.is_gone()),
            delivery,
        }
    }
}

/// From 0 to 1.
fn random() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX)
}

/// The headers of an attempt: those of the endpoint, and the signature by every secret that signs now. `None` if there is
/// none that this process can open.
fn headers(sealer: &Sealer, delivery: &ClaimedDelivery) -> Option<HeaderMap> {
    let owner = delivery
        .endpoint_id
        .map_or_else(|| delivery.key_id.to_string(), |id| id.to_string());
    let (now, id) = (clock::now(), delivery.delivery_id.message_id());
    let secrets = Secrets::open(sealer, &owner, delivery.secrets.as_deref()?)?.live(now);
    if secrets.is_empty() {
        return None;
    }
    let seconds = now.0 / 1_000_000;
    let mut headers = HeaderMap::new();
    if let Some(sealed) = &delivery.headers {
        let opened = sealer.open(HEADERS, &owner, sealed)?;
        let own: BTreeMap<String, String> = serde_json::from_slice(&opened).ok()?;
        for (name, value) in own {
            headers.insert(
                HeaderName::try_from(name).ok()?,
                HeaderValue::try_from(value).ok()?,
            );
        }
    }
    let signature = signatures(&secrets, &id, seconds, delivery.body.as_bytes());
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    headers.insert(
        "user-agent",
        HeaderValue::from_static(concat!("claude-queue/", env!("CARGO_PKG_VERSION"))),
    );
    headers.insert("webhook-id", HeaderValue::try_from(id).ok()?);
    headers.insert("webhook-timestamp", HeaderValue::from(seconds));
    headers.insert("webhook-signature", HeaderValue::try_from(signature).ok()?);
    Some(headers)
}
