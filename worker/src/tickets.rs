//! Tickets on the queue library, on either database: what a queue is told, and when the library fetches.
//!
//! A ticket says nothing. Whoever gets it looks for everything that is to be done, because tickets may be lost, and looks
//! by itself now and then.

use apalis::prelude::*;
use apalis_core::backend::codec::Codec;
use apalis_core::backend::ext::BackendExt;
use apalis_postgres::PostgresStorage;
use apalis_sqlite::SqliteStorage;
use futures_util::future::BoxFuture;
use shared::storage::{Pool, Queue, Store, Ticket};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tower_layer::Layer;
use tower_service::Service;

/// Wake-ups may be lost, so the library also fetches at this interval.
const SLOW_POLL: Duration = Duration::from_secs(5);

/// When the library fetches tickets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fetches {
    /// So long after a wake-up.
    delay: Duration,
    /// A wake-up that comes while the library fetches is lost, so each is repeated after these pauses.
    again: &'static [Duration],
}

impl Fetches {
    /// The tickets are what wakes slots.
    pub(crate) const AT_ONCE: Self = Self {
        delay: Duration::ZERO,
        again: &[
            Duration::from_millis(5),
            Duration::from_millis(25),
            Duration::from_millis(200),
        ],
    };

    /// By then wake-ups have found their slots without tickets.
    pub(crate) const LATER: Self = Self {
        delay: Duration::from_millis(200),
        again: &[Duration::from_millis(200)],
    };
}

/// How long the library may take to stop, for a database that doesn't answer.
const STOP: Duration = Duration::from_secs(10);

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

/// Who is told by the tickets of a queue.
pub(crate) trait Told: Clone + Send + Sync + 'static {
    /// Whether a ticket would be of use now. While it isn't, none is fetched, so that other processes get them.
    fn is_free(&self) -> bool;

    /// Waits until one is.
    fn free(&self) -> BoxFuture<'static, ()>;

    /// A ticket came. It is used up when this ends.
    fn on_ticket(&self) -> BoxFuture<'static, ()>;
}

#[derive(Clone)]
struct Gate<T>(T);

impl<S, T: Told> Layer<S> for Gate<T> {
    type Service = GatedService<S, T>;

    fn layer(&self, inner: S) -> GatedService<S, T> {
        GatedService {
            inner,
            told: self.0.clone(),
            wait: None,
        }
    }
}

struct GatedService<S, T> {
    inner: S,
    told: T,
    wait: Option<BoxFuture<'static, ()>>,
}

impl<S: Service<Task<A>>, A, T: Told> Service<Task<A>> for GatedService<S, T> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), S::Error>> {
        if !self.told.is_free() {
            let told = &self.told;
            let wait = self.wait.get_or_insert_with(|| told.free());
            ready!(Pin::new(wait).poll(cx));
            self.wait = None;
        }
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, task: Task<A>) -> S::Future {
        self.inner.call(task)
    }
}

async fn on_ticket<T: Told>(_: Ticket, told: Data<T>) -> Result<(), BoxDynError> {
    told.on_ticket().await;
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

/// Where tickets are taken.
pub(crate) struct Source<'s> {
    /// The database.
    pub(crate) store: &'s Store,
    /// Whose tickets.
    pub(crate) queue: Queue,
    /// The name of this process. Never from the configuration: two processes of one name shut each other out.
    pub(crate) name: String,
    /// When the library fetches after a wake-up.
    pub(crate) fetches: Fetches,
    /// Ends it.
    pub(crate) draining: &'s CancellationToken,
}

/// The list of what is handled, for one of the library's storages: they share no trait worth naming.
macro_rules! monitor {
    ($source:expr, $told:expr, $pool:expr, $storage:ident, $library:ident) => {{
        let (told, pool, store) = ($told.clone(), $pool.clone(), $source.store.clone());
        let name = $source.name.clone();
        let config = $library::Config::default()
            .queue($source.queue.name())
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
                let (pause, store) = (starts.pause(), store.clone());
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
                    .data(told.clone())
                    .layer(Gate(told.clone()))
                    .build(on_ticket::<T>)
            })
    }};
}

/// Takes tickets until the process drains.
pub(crate) async fn take<T: Told>(source: &Source<'_>, told: &T, changes: impl Fn() -> watch::Receiver<()>) {
    while !source.draining.is_cancelled() {
        take_until_it_ends(source, told, changes()).await;
    }
}

/// The same, or until the library gives up, which only says that it must start anew.
async fn take_until_it_ends<T: Told>(source: &Source<'_>, told: &T, changes: watch::Receiver<()>) {
    let (store, draining) = (source.store, source.draining);
    let monitor = match store.pool() {
        Pool::Sqlite(pool) => monitor!(source, told, pool, SqliteStorage, apalis_sqlite),
        Pool::Postgres(pool) => monitor!(source, told, pool, PostgresStorage, apalis_postgres),
    };
    let workers = monitor.context();
    let ringing = ring(changes, source.fetches, || {
        for worker in workers.workers() {
            let _ = workers.wake_worker(worker.name());
        }
    });
    let drained = draining.clone();
    let serving = monitor.run_with_signal(async move {
        drained.cancelled().await;
        Ok(())
    });
    tokio::select! {
        ended = serving => if !draining.is_cancelled() {
            tracing::error!(ended = ?ended.err().map(|error| error.to_string()), "the queue's monitor ended, restarting it");
            sleep(Duration::from_secs(1)).await;
        },
        () = ringing => {}
        // The library's own statements wait without an end for a connection whose other end is gone.
        () = store.connection_lost() => {}
        () = async { draining.cancelled().await; sleep(STOP).await } => {}
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
