//! What the API does beside answering: it notes which keys were used and what was refused, lets open streams count on,
//! and forgets limits that nobody is near. Each is done again later when it fails.

use shared::clock;
use shared::storage;
use shared::telemetry::chain;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::context::Context;

/// How often uses and refusals are written down.
const NOTE_EVERY: Duration = Duration::from_secs(2);
/// How often open streams are renewed.
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// How often full buckets and old counts are forgotten.
const SWEEP_EVERY: Duration = Duration::from_hours(1);

/// Does it until all requests have `ended`, and once more then.
pub async fn keep(context: Context, ended: CancellationToken) {
    let Some(mut closed) = context.streams.take_closed() else {
        return;
    };
    let every = |period| {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    // Streams that are closed and count still.
    let mut left = Vec::new();
    let (mut note, mut renew, mut sweep) = (every(NOTE_EVERY), every(RENEW_EVERY), every(SWEEP_EVERY));
    loop {
        tokio::select! {
            Some(stream_id) = closed.recv() => close(&context, stream_id, &mut left).await,
            _ = note.tick() => told(&context, context.keyring.note().await),
            _ = renew.tick() => {
                for stream_id in std::mem::take(&mut left) {
                    close(&context, stream_id, &mut left).await;
                }
                told(&context, context.streams.renew().await);
            }
            _ = sweep.tick() => told(&context, sweep_all(&context).await),
            () = ended.cancelled() => break,
        }
    }
    told(&context, context.keyring.note().await);
    while let Ok(stream_id) = closed.try_recv() {
        told(&context, context.store.close_stream(stream_id).await);
    }
}

async fn close(context: &Context, stream_id: Uuid, left: &mut Vec<Uuid>) {
    let closed = context.store.close_stream(stream_id).await;
    if closed.is_err() {
        left.push(stream_id);
    }
    told(context, closed);
}

async fn sweep_all(context: &Context) -> storage::Result<()> {
    let now = context.store.limits_now().await?;
    context.store.sweep_limits(now).await?;
    context.store.sweep_audit(clock::now()).await
}

fn told(context: &Context, done: storage::Result<()>) {
    // An outage is told once, for everything that it meets.
    if let Err(error) = done
        && !context.store.note(&error)
    {
        tracing::warn!(error = %chain(&error), "a part of the housekeeping has to wait");
    }
}
