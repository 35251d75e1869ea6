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
use apalis::prelude::*;
use apalis_core::backend::codec::Codec;
use apalis_core::backend::ext::BackendExt;
use apalis_postgres::PostgresStorage;
use apalis_sqlite::SqliteStorage;
use futures_util::future::BoxFuture;
use shared::clock;
use shared::storage::{Pool, QUEUE, Ticket};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tower_layer::Layer;
use tower_service::Service;

/// Wake-ups may be lost, so every slot also polls at this interval.
const SLOW_POLL: Duration = Duration::from_secs(5);

/// When the library fetches tickets.
#[derive(Clone, Copy, Debug)]
struct Fetches {
    /// So long after a wake-up.
    delay: Duration,
    /// A wake-up that comes while the library fetches is lost, so each is repeated after these pauses.
    again: &'static [Duration],
}

impl Fetches {
    /// The tickets are what wakes slots.
    const AT_ONCE: Self = Self {
        delay: Duration::ZERO,
        again: &[
            Duration::from_millis(5),
            Duration::from_millis(25),
            Duration::from_millis(200),
        ],
    };

    /// By then wake-ups have found their slots without tickets.
    const LATER: Self = Self {
        delay: Duration::from_millis(200),
        again: &[Duration::from_millis(200)],
    };
}

/// How long the library may take to stop, for a database that doesn't answer.
const STOP: Duration = Duration::from_secs(10);

/// How long runs may take to end and be handed back, the database to store it included. Their guards end the rest.
const HAND_BACK: Duration = Duration::from_secs(20);

/// Reads and writes tickets as JSON. Reading never fails: a payload that can't be read would end the library's
/// worker, and an empty ticket is as good as any other.
#[derive(Clone, Copy, Debug)]
struct TicketCodec;

impl Codec<Ticket> for TicketCodec {
    type Compact = Vec<u8>;
    type Error = Infallible;

    fn encode(&self, ticket: &Ticket) -> Result<Vec<u8>, Infallible> {
        Ok(serde_json::to_vec(ticket).unwrap_or_default())
    }

    fn decode(&self, bytes: &Vec<u8>) -> Result<Ticket, Infallible> {
        Ok(serde_json::from_slice(bytes).unwrap_or_default())
    }
}

/// The process's slots. They outlive restarts of the library's worker; while all are taken, or while the worker
/// pauses, nothing is fetched, so that the tickets are left to other workers.
#[derive(Clone)]
struct SlotLayer {
    slots: Slots,
    ctx: Arc<Context>,
}

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

impl<S> Layer<S> for SlotLayer {
    type Service = SlotService<S>;

    fn layer(&self, inner: S) -> SlotService<S> {
        SlotService {
            inner,
            layer: self.clone(),
            wait: None,
        }
    }
}

struct SlotService<S> {
    inner: S,
    layer: SlotLayer,
    wait: Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>,
}

impl<S: Service<Task<A>>, A> Service<Task<A>> for SlotService<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), S::Error>> {
        let parked = self.layer.slots.parked().is_some();
        if !parked {
            let layer = self.layer.clone();
            let wait = self.wait.get_or_insert_with(|| {
                Box::pin(async move {
                    layer.ctx.pause.over().await;
                    layer.slots.free.acquire_owned().await.ok()
                })
            });
            let permit = ready!(Pin::new(wait).poll(cx));
            self.wait = None;
            *self.layer.slots.parked() = permit;
        }
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, task: Task<A>) -> S::Future {
        self.inner.call(task)
    }
}

async fn on_ticket(_: Ticket, ctx: Data<Arc<Context>>, slots: Data<Slots>) -> Result<(), BoxDynError> {
    // Without a free slot the ticket is of no use: whoever has one claims again.
    if let Some(slot) = slots.take() {
        // Acknowledged after the claim, which would have to wait for the one writer of SQLite, and not when the job
        // ends: the job's row is what counts.
        claim_in(&ctx, slot).await;
    }
    Ok(())
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

/// How often the library's worker was started lately.
#[derive(Default)]
struct Starts(Mutex<(Option<Instant>, u32)>);

/// So many starts, each within a minute of the one before, are more than an outage makes.
const TOO_MANY: u32 = 5;

impl Starts {
    /// Counts a start. The pause before it: none at first, and up to 5 s for one that fails again and again.
    fn pause(&self) -> Duration {
        let mut starts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let quick = starts
            .0
            .is_some_and(|last| last.elapsed() < Duration::from_mins(1));
        let number = if quick { (starts.1 + 1).min(20) } else { 0 };
        *starts = (Some(Instant::now()), number);
        Duration::from_millis(250) * number
    }

    /// Says that the library's worker has ended, and starts anew. It does so with every outage, which is told anyway.
    fn tell(&self, error: &str) {
        let (_, quick) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if quick < TOO_MANY {
            tracing::debug!(error, "the queue's worker restarts; runs go on");
        } else {
            tracing::warn!(error, "the queue's worker restarts repeatedly; runs continue");
        }
    }
}

/// The list of what is handled, for one of the library's storages: they share no trait worth naming.
macro_rules! monitor {
    ($ctx:expr, $slots:expr, $pool:expr, $storage:ident, $library:ident) => {{
        let (ctx, slots, pool) = ($ctx.clone(), $slots.clone(), $pool.clone());
        // Never from the configuration: two processes of one name shut each other out.
        let name = ctx.claimant.worker_id.to_string();
        let config = $library::Config::default()
            .queue(QUEUE)
            .batch_size(1)
            .lock_tasks(false)
            // The lease alone decides who is lost.
            .missed_heartbeats(1_000_000);
        let starts = Arc::new(Starts::default());
        let ended = starts.clone();
        Monitor::new()
            .should_restart(move |_, error| {
                ended.tell(&error.to_string());
                true
            })
            .register(move |restarts| {
                let (pause, store) = (starts.pause(), ctx.store.clone());
                WorkerBuilder::new(format!("{name}-{restarts}").as_str())
                    .backend(
                        $storage::<Ticket>::new(&pool)
                            .with_config(config.clone())
                            .before_start(move |_| {
                                let store = store.clone();
                                async move {
                                    // It has ended because the database can't be used, most likely.
                                    if !store.is_usable().await {
                                        store.answers().await;
                                    }
                                    sleep(pause).await;
                                    Ok(())
                                }
                            })
                            .with_codec(TicketCodec),
                    )
                    .data(ctx.clone())
                    .data(slots.clone())
                    .layer(SlotLayer {
                        slots: slots.clone(),
                        ctx: ctx.clone(),
                    })
                    .build(on_ticket)
            })
    }};
}

/// Takes tickets until the worker drains, and then waits for the runs: `DRAIN_SECONDS` for them to end by
/// themselves, then they are ended and their jobs handed back.
pub(crate) async fn serve(ctx: &Arc<Context>) {
    let concurrency = ctx.config.concurrency;
    let slots = Slots::new(concurrency);
    let tickets = async {
        while !ctx.draining.is_cancelled() {
            take_tickets(ctx, &slots).await;
        }
    };
    tokio::select! {
        () = tickets => {}
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

/// Takes tickets until the worker drains, or until the library gives up, which only says that it must start anew.
async fn take_tickets(ctx: &Arc<Context>, slots: &Slots) {
    let monitor = match ctx.store.pool() {
        Pool::Sqlite(pool) => monitor!(ctx, slots, pool, SqliteStorage, apalis_sqlite),
        Pool::Postgres(pool) => monitor!(ctx, slots, pool, PostgresStorage, apalis_postgres),
    };
    let workers = monitor.context();
    let fetches = match ctx.store.pool() {
        Pool::Sqlite(_) => Fetches::AT_ONCE,
        Pool::Postgres(_) => Fetches::LATER,
    };
    let ringing = ring(ctx.wakeups.slots(), fetches, || {
        for worker in workers.workers() {
            let _ = workers.wake_worker(worker.name());
        }
    });
    let draining = ctx.draining.clone();
    let serving = monitor.run_with_signal(async move {
        draining.cancelled().await;
        Ok(())
    });
    tokio::select! {
        ended = serving => if !ctx.draining.is_cancelled() {
            tracing::error!(ended = ?ended.err().map(|error| error.to_string()), "the queue's monitor ended, restarting it");
            sleep(Duration::from_secs(1)).await;
        },
        () = ringing => {}
        // The library's own statements wait without an end for a connection whose other end is gone.
        () = ctx.store.connection_lost() => {}
        () = async { ctx.draining.cancelled().await; sleep(STOP).await } => {}
    }
}

/// Wakes the library soon after each change and again, and now and then without one, for ever.
async fn ring(mut changes: watch::Receiver<()>, fetches: Fetches, mut wake: impl FnMut()) {
    let mut pauses = [].iter();
    loop {
        let pause = pauses.next().copied().unwrap_or(SLOW_POLL);
        let due = Instant::now() + pause;
        // The next change doesn't put off what is due for the one before.
        if let Ok(Ok(())) = timeout_at(due, changes.changed()).await {
            let rest = due.saturating_duration_since(Instant::now());
            sleep(rest.min(fetches.delay)).await;
            changes.mark_unchanged();
            pauses = fetches.again.iter();
        }
        wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The milliseconds at which the library is woken, when something changes after these pauses.
    async fn wake_ups(fetches: Fetches, pauses: &[u64]) -> Vec<u128> {
        let (bell, changes) = watch::channel(());
        let (begin, mut wakes) = (Instant::now(), Vec::new());
        let course = async {
            for &pause in pauses {
                sleep(Duration::from_millis(pause)).await;
                bell.send_replace(());
            }
            sleep(Duration::from_secs(12)).await;
        };
        tokio::select! {
            () = ring(changes, fetches, || wakes.push(begin.elapsed().as_millis())) => {}
            () = course => {}
        }
        wakes
    }

    #[tokio::test(start_paused = true)]
    async fn a_wake_up_that_the_library_may_have_lost_is_repeated() {
        // While that one is being repeated there is another.
        assert_eq!(
            wake_ups(Fetches::AT_ONCE, &[1_000, 100]).await,
            [1_000, 1_005, 1_030, 1_100, 1_105, 1_130, 1_330, 6_330, 11_330]
        );
        // While that one waits for its fetch there is another, and one while it is being repeated.
        assert_eq!(
            wake_ups(Fetches::LATER, &[1_000, 100, 150]).await,
            [1_200, 1_400, 1_600, 6_600, 11_600]
        );
    }
}
