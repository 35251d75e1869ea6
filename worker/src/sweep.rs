//! The sweeper: on a timer, no input, the same work every time, safe in every worker at once. It takes lost leases,
//! ends overdue jobs, makes due ones ready, pushes missing tickets, and removes what is older than the retention.

mod retention;

use crate::context::Context;
use crate::disk_space;
use crate::guard;
use crate::heartbeat;
use futures_util::FutureExt;
use futures_util::future::{Fuse, FusedFuture};
use retention::Retention;
use shared::clock;
use shared::job::CancelReason;
use shared::storage::{Result, RunningLease};
use shared::telemetry::chain;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;
use tracing::warn;

/// How often it sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// A longer gap between two looks, and nothing can be said about what wasn't looked at.
const MAX_WATCH_GAP: Duration = Duration::from_secs(2);

/// How often it looks for old data, and says how the worker is.
const SLOW_INTERVAL: Duration = Duration::from_secs(5);

/// How often it looks whether runs would have room.
const DISK_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Old things are removed in small batches; no more of them than this each time.
const MAX_BATCHES: usize = 10;

/// Watches leases on this process's own clock: a lease is lost when it stood still for `LEASE_SECONDS` while it was
/// looked at without a gap. So no clock step, no skew and no outage of the database takes anybody's lease.
#[derive(Debug, Default)]
struct Watch {
    seen: HashMap<RunningLease, Instant>,
    last_look: Option<Instant>,
}

impl Watch {
    /// Takes note of the leases as they are at `now`; gives those that have stood still for `lease`.
    fn look(&mut self, leases: Vec<RunningLease>, now: Instant, lease: Duration) -> Vec<RunningLease> {
        if self.last_look.is_some_and(|last| now - last > MAX_WATCH_GAP) {
            self.seen.clear();
        }
        self.last_look = Some(now);
        let before = std::mem::take(&mut self.seen);
        for lease in leases {
            let since = before.get(&lease).copied().unwrap_or(now);
            self.seen.insert(lease, since);
        }
        self.seen
            .iter()
            .filter(|(_, since)| now - **since >= lease)
            .map(|(lost, _)| lost.clone())
            .collect()
    }
}

/// Watches and sweeps until the worker has handed back its last run.
pub(crate) async fn sweep(ctx: &Context) {
    // Apart: what is slow or waits for a lock in one of them makes no gap in the watch.
    tokio::join!(
        Box::pin(watch_leases(ctx)),
        Box::pin(clean_up(ctx)),
        Box::pin(watch_disk_space(ctx)),
        Box::pin(remove_what_is_old(ctx))
    );
}

/// Looks at the leases each second, and takes the lost ones while it goes on looking.
async fn watch_leases(ctx: &Context) {
    let mut watch = Watch::default();
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let taking = Fuse::terminated();
    tokio::pin!(taking);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let leases = match ctx.store.running_leases().await {
                    Ok(leases) => leases,
                    Err(error) => {
                        // Others are told by the other sweeper, which meets them too.
                        ctx.store.note(&error);
                        continue;
                    }
                };
                let lost = watch.look(leases, Instant::now(), ctx.config.lease);
                if !lost.is_empty() && taking.is_terminated() {
                    taking.set(take(ctx, lost).fuse());
                }
            }
            () = &mut taking => {}
        }
    }
}

async fn take(ctx: &Context, lost: Vec<RunningLease>) {
    // A guard that was killed together with its worker has ended nothing.
    let ended = tokio::task::spawn_blocking(guard::kill_orphans).await;
    if let Ok(processes @ 1..) = ended {
        warn!(processes, "killed processes that a lost worker's runs had left");
    }
    for lease in lost {
        match take_one(ctx, &lease).await {
            Ok(true) => {
                warn!(job.id = %lease.job_id, attempt = lease.attempt, "took over the lease of a lost run");
            }
            Ok(false) => {}
            Err(error) if ctx.store.note(&error) => {}
            Err(error) => {
                warn!(job.id = %lease.job_id, error = %chain(&error), "could not take over a lost lease, retrying");
            }
        }
    }
}

async fn take_one(ctx: &Context, lost: &RunningLease) -> Result<bool> {
    let Some(job) = ctx.store.job(lost.job_id).await? else {
        return Ok(false);
    };
    ctx.store
        .take_lost(&job, lost.attempt, lost.renewals, clock::now())
        .await
}

async fn clean_up(ctx: &Context) {
    let mut slowly = Instant::now();
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mut swept = once(ctx).await;
        if swept.is_ok() && Instant::now() >= slowly {
            slowly = Instant::now() + SLOW_INTERVAL;
            swept = rarely(ctx).await;
        }
        if let Err(error) = swept
            && !ctx.store.note(&error)
        {
            warn!(error = %chain(&error), "could not sweep, retrying every second");
        }
    }
}

/// Checks whether runs would have room.
async fn watch_disk_space(ctx: &Context) {
    let mut ticks = tokio::time::interval(DISK_CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        disk_space::check(ctx).await;
    }
}

/// Removes what ended jobs have left.
async fn remove_what_is_old(ctx: &Context) {
    let mut retention = Retention::default();
    let mut ticks = tokio::time::interval(SLOW_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = retention.sweep(ctx).await
            && !ctx.store.note(&error)
        {
            warn!(error = %chain(&error), "could not remove old data, retrying");
        }
    }
}

/// Ends what is overdue, makes ready what is due, and sees to it that slots look.
pub(crate) async fn once(ctx: &Context) -> Result<()> {
    let swept = if ctx.store.check_clock().await?.is_some() {
        // A clock that is wrong decides nothing for others.
        ctx.store.sweep_tickets().await?
    } else {
        for job_id in ctx.store.overdue_jobs(clock::now()).await? {
            ctx.store
                .cancel_job(job_id, CancelReason::Deadline, clock::now())
                .await?;
        }
        let (longest, now) = (ctx.config.longest_wait, clock::now());
        for job_id in ctx.store.waited_since(now.before(longest)).await? {
            ctx.store.fail_waited(job_id, longest, now).await?;
        }
        ctx.store.sweep(clock::now()).await?
    };
    if swept.tickets > 0 {
        tracing::debug!(tickets = swept.tickets, "tickets were missing");
    }
    if swept.runnable > 0 {
        // The wake-up for a ticket that waits may have been lost.
        ctx.wakeups.ring();
    }
    Ok(())
}

async fn rarely(ctx: &Context) -> Result<()> {
    heartbeat::announce(ctx).await?;
    ctx.store.repair_lanes().await?;
    if ctx.store.check_clock().await?.is_some() {
        return Ok(());
    }
    ctx.store.tell_expiring(clock::now()).await?;
    let expired = clock::now().before(ctx.config.idempotency_ttl);
    for _ in 0..MAX_BATCHES {
        if ctx.store.forget_idempotency(expired).await? == 0 {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::id::JobId;

    fn lease(job_id: JobId, renewals: i64) -> RunningLease {
        RunningLease {
            job_id,
            attempt: 1,
            renewals,
        }
    }

    #[test]
    fn a_lease_is_lost_when_it_stood_still_under_watch() {
        let (mut watch, job, start) = (Watch::default(), JobId::new(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let limit = Duration::from_secs(3);

        for second in 0..3 {
            assert!(watch.look(vec![lease(job, 7)], at(second), limit).is_empty());
        }
        assert_eq!(watch.look(vec![lease(job, 7)], at(3), limit), [lease(job, 7)]);
    }

    #[test]
    fn a_renewal_or_a_gap_begins_the_watch_again() {
        let (mut watch, job, start) = (Watch::default(), JobId::new(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let limit = Duration::from_secs(3);

        for second in 0..3 {
            watch.look(vec![lease(job, 7)], at(second), limit);
        }
        assert!(
            watch.look(vec![lease(job, 8)], at(3), limit).is_empty(),
            "renewed"
        );
        assert!(
            watch.look(vec![lease(job, 8)], at(5), limit).is_empty(),
            "2 s old"
        );
        assert!(
            watch.look(vec![lease(job, 8)], at(60), limit).is_empty(),
            "nobody looked for 55 s"
        );
        for second in 61..63 {
            assert!(watch.look(vec![lease(job, 8)], at(second), limit).is_empty());
        }
        assert_eq!(watch.look(vec![lease(job, 8)], at(63), limit), [lease(job, 8)]);
    }
}
