//! Delivers webhooks: claims what is due, sends it, records what came of it. A delivery is tried at least once, whoever
//! is killed when; receivers know a repeated one by its id. A slow receiver holds up only itself.

mod body;
pub mod client;
mod snippet;

use crate::config::Deliveries;
use bytes::Bytes;
use client::Sender;
use http::{HeaderMap, HeaderName, HeaderValue};
use shared::clock;
use shared::delivery::{DeliveryOutcome, DueDelivery};
use shared::sealed::Sealer;
use shared::storage::{Result, Store, Wakeups};
use shared::telemetry::chain;
use shared::webhook::secrets::Secrets;
use shared::webhook::signature::signatures;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Attempts under way at once; the last claim may bring some more.
const AT_ONCE: usize = 100;

/// Attempts under way to one host at once. So many more may wait for them in this process.
const PER_HOST: usize = 10;

/// Results are recorded together, so many at most.
const RECORDED: usize = 50;

/// A wake-up may be lost, and what waits for its time has none.
const POLL: Duration = Duration::from_secs(1);

/// How long recording may take.
const RECORD: Duration = Duration::from_secs(10);

/// What the headers of an endpoint are sealed as.
const HEADERS: &str = "endpoint-headers";

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
    let sender = Arc::new(Sender::new(
        deliverer.config.guard.clone(),
        deliverer.config.timeout,
    ));
    let mut wakeups = deliverer.wakeups.deliveries();
    let mut sending = JoinSet::new();
    let mut busy: BTreeMap<String, Host> = BTreeMap::new();
    loop {
        let draining = deliverer.draining.is_cancelled();
        if draining && sending.is_empty() {
            return;
        }
        if !draining && sending.len() < AT_ONCE {
            match claim(deliverer, &busy).await {
                Ok(due) if !due.is_empty() => {
                    // An attempt that begins later might last longer than the claim.
                    let begin_by = Instant::now() + lease(&deliverer.config) - deliverer.config.timeout - RECORD;
                    for delivery in due {
                        let (name, sender) = (delivery.host.clone(), sender.clone());
                        let host = busy.entry(name.clone()).or_default();
                        host.claimed += 1;
                        let turn = host.turns.clone();
                        let attempt = Attempt::of(deliverer, delivery);
                        sending.spawn(async move {
                            let turn = timeout_at(begin_by, turn.acquire_owned()).await;
                            let outcome = match turn {
                                Ok(Ok(_turn)) => Some(attempt.make(&sender).await),
                                // Somebody else gets it when the claim has run out.
                                _ => None,
                            };
                            (name, outcome)
                        });
                    }
                    continue;
                }
                Ok(_) => {}
                Err(error) if deliverer.store.note(&error) => deliverer.store.answers().await,
                Err(error) => warn!(error = %chain(&error), "could not claim deliveries, retrying"),
            }
        }
        tokio::select! {
            Some(done) = sending.join_next(), if !sending.is_empty() => {
                let mut outcomes = Vec::new();
                let mut next = Some(done);
                while let Some(done) = next {
                    if let Ok((host, outcome)) = done {
                        leave(&mut busy, &host);
                        outcomes.extend(outcome);
                    }
                    next = if outcomes.len() < RECORDED { sending.try_join_next() } else { None };
                }
                if !outcomes.is_empty() {
                    record(deliverer, &outcomes).await;
                }
            }
            changed = wakeups.changed() => if changed.is_err() { sleep(POLL).await },
            () = sleep(POLL) => {}
            () = deliverer.draining.cancelled(), if !draining => {}
        }
    }
}

/// What this process does to one host.
#[derive(Debug)]
struct Host {
    /// Deliveries that were claimed and haven't ended.
    claimed: usize,
    /// Those that are sent take turns.
    turns: Arc<Semaphore>,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            claimed: 0,
            turns: Arc::new(Semaphore::new(PER_HOST)),
        }
    }
}

fn leave(busy: &mut BTreeMap<String, Host>, name: &str) {
    if let Some(host) = busy.get_mut(name) {
        host.claimed -= 1;
        if host.claimed == 0 {
            busy.remove(name);
        }
    }
}

/// How long nobody else tries what was claimed.
fn lease(config: &Deliveries) -> Duration {
    config.timeout * 2 + RECORD
}

/// Takes what is due, with the bytes to send.
async fn claim(deliverer: &Deliverer, busy: &BTreeMap<String, Host>) -> Result<Vec<DueDelivery>> {
    let store = &deliverer.store;
    // A clock that is ahead would take what others are sending.
    if !store.has_due_delivery(clock::now()).await? || clock::ahead().is_some() {
        return Ok(Vec::new());
    }
    let full: BTreeSet<String> = busy
        .iter()
        .filter(|(_, host)| host.claimed >= PER_HOST)
        .map(|(host, _)| host.clone())
        .collect();
    let mut due = store
        .claim_deliveries(&full, lease(&deliverer.config), clock::now())
        .await?;
    let mut bodies = Vec::new();
    for delivery in &mut due {
        if delivery.body.is_none() {
            let body = body::of_job(store, delivery, deliverer.retention).await?;
            bodies.push((delivery.delivery_id, body.clone()));
            delivery.body = Some(body);
        }
    }
    if !bodies.is_empty() {
        store.store_bodies(&bodies).await?;
    }
    Ok(due)
}

/// Records attempts, however often that fails, while nobody else may try them.
async fn record(deliverer: &Deliverer, outcomes: &[DeliveryOutcome]) {
    let until = Instant::now() + RECORD;
    for outcome in outcomes {
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
        let after = deliverer.config.disable_after;
        match deliverer
            .store
            .record_deliveries(outcomes, after, clock::now())
            .await
        {
            Ok(()) => return,
            Err(error) if deliverer.store.note(&error) => {}
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
    delivery: DueDelivery,
    headers: Option<HeaderMap>,
    config: Deliveries,
}

impl Attempt {
    fn of(deliverer: &Deliverer, delivery: DueDelivery) -> Self {
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
        let Some(headers) = headers else {
            // Nothing is sent unsigned.
            return DeliveryOutcome {
                retry_at: Some(started_at.plus(Duration::from_mins(5))).filter(|_| !delivery.manual),
                delivery,
                started_at,
                duration: Duration::ZERO,
                status_code: None,
                error_class: Some("no_secret"),
                snippet: String::new(),
                gone: false,
            };
        };
        let body = Bytes::from(delivery.body.clone().unwrap_or_default());
        let sent = sender.send(&delivery.url, headers, body).await;
        let failure = sent.failure();
        let made = usize::try_from(delivery.attempts).unwrap_or(usize::MAX).saturating_add(1);
        let again = failure
            .filter(|_| !delivery.manual)
            .and_then(|failure| config.schedule.next(made, &failure, random()));
        DeliveryOutcome {
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
fn headers(sealer: &Sealer, delivery: &DueDelivery) -> Option<HeaderMap> {
    let owner = delivery
        .endpoint_id
        .map_or_else(|| delivery.key_id.to_string(), |id| id.to_string());
    let (now, id) = (clock::now(), delivery.delivery_id.message_id());
    let secrets = Secrets::open(sealer, &owner, delivery.secrets.as_deref()?)?.live(now);
    if secrets.is_empty() {
        return None;
    }
    let seconds = now.0 / 1_000_000;
    let body = delivery.body.as_deref().unwrap_or_default();
    let mut headers = HeaderMap::new();
    if let Some(sealed) = &delivery.headers {
        let opened = sealer.open(HEADERS, &owner, sealed)?;
        let own: BTreeMap<String, String> = serde_json::from_slice(&opened).ok()?;
        for (name, value) in own {
            headers.insert(HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?);
        }
    }
    let signature = signatures(&secrets, &id, seconds, body.as_bytes());
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    headers.insert("user-agent", HeaderValue::from_static(concat!("claude-queue/", env!("CARGO_PKG_VERSION"))));
    headers.insert("webhook-id", HeaderValue::try_from(id).ok()?);
    headers.insert("webhook-timestamp", HeaderValue::from(seconds));
    headers.insert("webhook-signature", HeaderValue::try_from(signature).ok()?);
    Some(headers)
}
