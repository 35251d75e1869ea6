//! The worker's row in the database, for people to look at: that it runs, how many runs it holds, and why it claims
//! nothing when it doesn't.

use crate::context::Context;
use shared::clock;
use shared::storage::{Result, WorkerRow};
use std::time::Duration;

/// A worker whose row wasn't written for this long is removed.
const FORGET_AFTER: Duration = Duration::from_hours(1);

/// Writes this worker's row.
pub(crate) async fn announce(ctx: &Context) -> Result<()> {
    // What was found out first is written first.
    let _one_at_a_time = ctx.announcing.lock().await;
    let now = clock::now();
    let pause = ctx.pause.current(now);
    let row = WorkerRow {
        worker_id: ctx.claimant.worker_id,
        host: host(),
        slots: i64::from(ctx.config.concurrency),
        busy: i64::try_from(ctx.busy.len()).unwrap_or(i64::MAX),
        cli_version: ctx.claimant.cli_version.clone(),
        started_at: ctx.started_at,
        last_seen_at: now,
        paused_until: pause.as_ref().map(|(until, _)| *until),
        pause_reason: pause.map(|(_, reason)| reason),
        upstream: ctx.pause.answer(),
        clock_ahead: clock::ahead(),
    };
    ctx.store.put_worker(&row, now.before(FORGET_AFTER)).await
}

/// The same at once, for what people should see now. An outage delays it to the next regular time.
pub(crate) async fn announce_now(ctx: &Context) {
    if let Err(error) = announce(ctx).await {
        ctx.store.note(&error);
    }
}

fn host() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}
