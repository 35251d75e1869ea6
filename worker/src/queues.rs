//! What wakes a slot: tickets on the queue library, on either database.
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
use shared::storage::{Pool, QUEUE, Ticket};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tower_layer::Layer;
use tower_service::Service;

/// Wake-ups may be lost, so every slot also polls at this interval.
const SLOW_POLL: Duration = Duration::from_secs(5);

/// A wake-up that comes while the library fetches is lost until the next one, so each is repeated after these pauses.
const RING_AGAIN: [Duration; 3] = [
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(200),
];

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
    slots: Arc<Semaphore>,
    ctx: Arc<Context>,
}

impl<S> Layer<S> for SlotLayer {
    type Service = SlotService<S>;

    fn layer(&self, inner: S) -> SlotService<S> {
        SlotService {
            inner,
            layer: self.clone(),
            permit: None,
            wait: None,
        }
    }
}

struct SlotService<S> {
    inner: S,
    layer: SlotLayer,
    permit: Option<OwnedSemaphorePermit>,
    wait: Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>,
}

/// The slot that a ticket woke; whoever runs the job takes it.
#[derive(Clone)]
struct Slot(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl<S: Service<Task<A>>, A> Service<Task<A>> for SlotService<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), S::Error>> {
        if self.permit.is_none() {
            let layer = self.layer.clone();
            let wait = self.wait.get_or_insert_with(|| {
                Box::pin(async move {
                    layer.ctx.pause.over().await;
                    layer.slots.acquire_owned().await.ok()
                })
            });
            self.permit = ready!(Pin::new(wait).poll(cx));
            self.wait = None;
        }
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, task: Task<A>) -> S::Future {
        let slot = Slot(Arc::new(Mutex::new(self.permit.take())));
        self.inner.call(task.into_builder().data(slot).build())
    }
}

async fn on_ticket(_: Ticket, ctx: Data<Arc<Context>>, slot: Data<Slot>) -> Result<(), BoxDynError> {
    let ctx = Arc::clone(&ctx);
    let permit = slot.0.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    let slots = ctx.busy.clone();
    let (claiming, claimed) = oneshot::channel();
    slots.spawn(async move {
        run_job::claim_and_run_until_none(ctx, claiming).await;
        // Last: frees the slot.
        drop(permit);
    });
    // Acknowledged now and not when the job ends: the job's row is what counts. But not before the claim either, which
    // would have to wait for the one writer of SQLite.
    let _ = claimed.await;
    Ok(())
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
                                    tokio::time::sleep(pause).await;
                                    Ok(())
                                }
                            })
                            .with_codec(TicketCodec),
                    )
                    .data(ctx.clone())
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
    let slots = Arc::new(Semaphore::new(usize::try_from(concurrency).unwrap_or(1)));
    while !ctx.draining.is_cancelled() {
        take_tickets(ctx, &slots).await;
    }

    let (runs, seconds) = (ctx.busy.len(), ctx.config.drain.as_secs());
    tracing::info!("the worker drains: {runs} runs have {seconds} s, or until the next signal");
    let all_free = slots.acquire_many(concurrency);
    tokio::pin!(all_free);
    tokio::select! {
        _ = &mut all_free => return,
        () = tokio::time::sleep(ctx.config.drain) => {}
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
async fn take_tickets(ctx: &Arc<Context>, slots: &Arc<Semaphore>) {
    let monitor = match ctx.store.pool() {
        Pool::Sqlite(pool) => monitor!(ctx, slots, pool, SqliteStorage, apalis_sqlite),
        Pool::Postgres(pool) => monitor!(ctx, slots, pool, PostgresStorage, apalis_postgres),
    };
    let workers = monitor.context();
    let ringing = ring(ctx.wakeups.slots(), || {
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
            tokio::time::sleep(Duration::from_secs(1)).await;
        },
        () = ringing => {}
        // The library's own statements wait without an end for a connection whose other end is gone.
        () = ctx.store.connection_lost() => {}
        () = async { ctx.draining.cancelled().await; tokio::time::sleep(STOP).await } => {}
    }
}

/// Wakes the library at each change and again soon after, and now and then without one, for ever.
async fn ring(mut changes: watch::Receiver<()>, mut wake: impl FnMut()) {
    let mut pauses = [].iter();
    loop {
        let pause = pauses.next().copied().unwrap_or(SLOW_POLL);
        if let Ok(Ok(())) = tokio::time::timeout(pause, changes.changed()).await {
            pauses = RING_AGAIN.iter();
        }
        wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn a_wake_up_that_the_library_may_have_lost_is_repeated() {
        let (bell, changes) = watch::channel(());
        let (begin, mut rings) = (tokio::time::Instant::now(), Vec::new());
        let course = async {
            sleep(Duration::from_secs(1)).await;
            bell.send_replace(());
            // While that one is being repeated there is another.
            sleep(Duration::from_millis(100)).await;
            bell.send_replace(());
            sleep(Duration::from_secs(12)).await;
        };

        tokio::select! {
            () = ring(changes, || rings.push(begin.elapsed().as_millis())) => {}
            () = course => {}
        }

        assert_eq!(
            rings,
            [1_000, 1_005, 1_030, 1_100, 1_105, 1_130, 1_330, 6_330, 11_330]
        );
    }
}
