//! What the API does beside answering: it notes which keys were used and what was refused, lets open streams count on,
//! forgets limits that nobody is near, and keeps the sums of usage. Each is done again later when it fails.

use shared::clock;
use shared::storage;
use shared::telemetry::chain;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::context::Context;

/// How often uses and refusals are written down.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);
/// How often open streams are renewed.
const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// How often full buckets and old counts are forgotten.
const SWEEP_INTERVAL: Duration = Duration::from_hours(1);

/// How often new costs and jobs are added to the sums that are kept. Until then each reader adds them.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);

/// Keeps the sums of usage until all requests have `ended`.
pub async fn count_usage(context: Context, ended: CancellationToken) {
    let mut ticks = interval(COUNT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while ended.run_until_cancelled(ticks.tick()).await.is_some() {
        if !context.store.is_out() {
            report(&context, context.store.count_usage().await);
        }
    }
}

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
    let (mut uses, mut renew, mut sweep) = (
        every(REPORT_INTERVAL),
        every(RENEW_INTERVAL),
        every(SWEEP_INTERVAL),
    );
    loop {
        tokio::select! {
            Some(stream_id) = closed.recv() => close(&context, stream_id, &mut left).await,
            _ = uses.tick() => report(&context, context.keyring.report().await),
            _ = renew.tick() => {
                for stream_id in std::mem::take(&mut left) {
                    close(&context, stream_id, &mut left).await;
                }
                report(&context, context.streams.renew().await);
                report(&context, context.store.check_clock().await.map(drop));
            }
            _ = sweep.tick() => report(&context, sweep_all(&context).await),
            () = ended.cancelled() => break,
        }
    }
    report(&context, context.keyring.report().await);
    while let Ok(stream_id) = closed.try_recv() {
        report(&context, context.store.close_stream(stream_id).await);
    }
}

async fn close(context: &Context, stream_id: Uuid, left: &mut Vec<Uuid>) {
    let closed = context.store.close_stream(stream_id).await;
    if closed.is_err() {
        left.push(stream_id);
    }
    report(context, closed);
}

async fn sweep_all(context: &Context) -> storage::Result<()> {
    let now = context.store.limits_now().await?;
    context.store.sweep_limits(now).await?;
    // A clock that is wrong decides nothing for others.
    if context.store.check_clock().await?.is_some() {
        return Ok(());
    }
    context.store.sweep_audit(clock::now()).await
}

fn report(context: &Context, done: storage::Result<()>) {
    // An outage is logged once, for everything that it meets.
    if let Err(error) = done
        && !context.store.note(&error)
    {
        tracing::warn!(error = %chain(&error), "background maintenance failed, will retry");
    }
}
