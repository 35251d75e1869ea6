//! What wakes a slot: tickets on the queue library, on either database, and on PostgreSQL wake-ups themselves.
//!
//! On PostgreSQL a wake-up that finds a free slot claims at once. A ticket, which is fetched a moment later, is for the
//! wake-ups that are lost. On SQLite, where claims and submissions wait for one writer, the library's fetches pace the
//! claims, so that they leave room for the other processes.
//!
//! A ticket says nothing; its slot claims whatever job is best, and again after each job until nothing is left. Each
//! job runs in a task of its own, which holds the slot: an error of the database ends the library's worker and drops
//! every handler that runs, and must not drop a run.

use crate::context::Context;
use crate::run_job;
use crate::tickets::{self, Fetches, Source, Told};
use futures_util::future::BoxFuture;
use shared::clock;
use shared::storage::{Pool, Queue};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::sleep;

/// How long runs may take to end and be handed back, the database to store it included. Their guards end the rest.
const HAND_BACK: Duration = Duration::from_secs(20);

/// The process's slots. The one that the library holds while it waits for a ticket is lent to wake-ups.
#[derive(Clone)]
struct Slots {
    free: Arc<Semaphore>,
    parked: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
}

impl Slots {
    fn new(concurrency: u32) -> Self {
        Self {
            free: Arc::new(Semaphore::new(usize::try_from(concurrency).unwrap_or(1))),
            parked: Arc::default(),
        }
    }

    fn parked(&self) -> MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot that is free now.
    fn take(&self) -> Option<OwnedSemaphorePermit> {
        let free = self.free.clone().try_acquire_owned().ok();
        free.or_else(|| self.parked().take())
    }
}

/// While all slots are taken, or while the worker pauses, nothing is fetched.
#[derive(Clone)]
struct Jobs {
    slots: Slots,
    ctx: Arc<Context>,
}

impl Told for Jobs {
    fn is_free(&self) -> bool {
        self.slots.parked().is_some()
    }

    fn free(&self) -> BoxFuture<'static, ()> {
        let jobs = self.clone();
        Box::pin(async move {
            jobs.ctx.pause.over().await;
            let slot = jobs.slots.free.clone().acquire_owned().await.ok();
            *jobs.slots.parked() = slot;
        })
    }

    fn on_ticket(&self) -> BoxFuture<'static, ()> {
        let jobs = self.clone();
        Box::pin(async move {
            // Without a free slot the ticket is of no use: whoever has one claims again.
            if let Some(slot) = jobs.slots.take() {
                // Acknowledged after the claim, which would have to wait for the one writer of SQLite, and not when the
                // job ends: the job's row is what counts.
                claim_in(&jobs.ctx, slot).await;
            }
        })
    }
}

/// Claims and runs jobs in this slot until nothing is left, in a task of its own. Waits for the first claim; whether it
/// found a job.
async fn claim_in(ctx: &Arc<Context>, slot: OwnedSemaphorePermit) -> bool {
    let (ctx, tasks) = (ctx.clone(), ctx.busy.clone());
    let (claiming, claimed) = oneshot::channel();
    tasks.spawn(async move {
        run_job::claim_and_run_until_none(ctx, claiming).await;
        // Last: frees the slot.
        drop(slot);
    });
    claimed.await.unwrap_or(false)
}

/// Claims at each wake-up, in as many free slots as there are jobs for, for ever.
async fn claim_at_wake_ups(ctx: &Arc<Context>, slots: &Slots) {
    let mut changes = ctx.wakeups.slots();
    let direct = matches!(ctx.store.pool(), Pool::Postgres(_));
    while direct && changes.changed().await.is_ok() {
        while ctx.pause.current(clock::now()).is_none()
            && let Some(slot) = slots.take()
            && claim_in(ctx, slot).await
        {}
    }
    std::future::pending::<()>().await;
}

/// Takes tickets until the worker drains, and then waits for the runs: `DRAIN_SECONDS` for them to end by
/// themselves, then they are ended and their jobs handed back.
pub(crate) async fn serve(ctx: &Arc<Context>) {
    let concurrency = ctx.config.concurrency;
    let slots = Slots::new(concurrency);
    let source = Source {
        store: &ctx.store,
        queue: Queue::Jobs,
        name: ctx.claimant.worker_id.to_string(),
        fetches: match ctx.store.pool() {
            Pool::Sqlite(_) => Fetches::AT_ONCE,
            Pool::Postgres(_) => Fetches::LATER,
        },
        draining: &ctx.draining,
    };
    let jobs = Jobs {
        slots: slots.clone(),
        ctx: ctx.clone(),
    };
    tokio::select! {
        () = tickets::take(&source, &jobs, || ctx.wakeups.slots()) => {}
        () = claim_at_wake_ups(ctx, &slots) => {}
    }
    drop(slots.parked().take());

    let (runs, seconds) = (ctx.busy.len(), ctx.config.drain.as_secs());
    tracing::info!("the worker drains: {runs} runs have {seconds} s, or until the next signal");
    let all_free = slots.free.acquire_many(concurrency);
    tokio::pin!(all_free);
    tokio::select! {
        _ = &mut all_free => return,
        () = sleep(ctx.config.drain) => {}
        () = ctx.handing_back.cancelled() => {}
    }
    ctx.handing_back.cancel();
    if tokio::time::timeout(HAND_BACK, all_free).await.is_err() {
        let runs = ctx.busy.len();
        tracing::error!(
            runs,
            "could not store the end of all runs; others take their leases"
        );
    }
}
