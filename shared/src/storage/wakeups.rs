//! "Something was committed": from any process to whoever waits in this one. A wake-up is a hint, never data.
//!
//! PostgreSQL reports it by `NOTIFY`, sent after the commit. On SQLite one connection asks `pragma data_version`, which
//! changes with every commit of any other connection, when the kernel tells of a write and after each commit of this
//! process, and then reads which jobs have new events. Wake-ups may be lost, so everyone who waits also polls every 2 s.

use super::file_changes::FileChanges;
use super::{Error, LOCK_TIMEOUT, Queue, Result, Store};
use crate::id::JobId;
use sqlx::postgres::{PgListener, PgPoolOptions};
use sqlx::{ConnectOptions, Executor, SqliteConnection};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// The channel that notifications travel on.
pub(super) const CHANNEL: &str = "claude_queue";

/// The word in a notification that says: a slot should look. All others are job ids.
pub(super) const RING: &str = "ring";

/// Before a job id: the worker that runs it should look whether to go on.
pub(super) const DIRECTIVE: &str = "directive:";

/// The word that says: there is something to deliver.
pub(super) const DELIVER: &str = "deliver";

/// A connection to PostgreSQL that brought nothing for so long is asked whether it lives.
const LISTEN_KEEPALIVE: Duration = Duration::from_secs(15);

/// A wake-up can be lost, so everyone who waits for a job looks this often anyway.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Where to wait for changes that any process commits. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Wakeups(Arc<Hub>);

#[derive(Debug)]
struct Hub {
    jobs: Topic,
    directives: Topic,
    slots: watch::Sender<()>,
    deliveries: watch::Sender<()>,
    delivery_tickets: watch::Sender<()>,
}

/// Those who wait for something about a job.
#[derive(Clone, Debug, Default)]
struct Topic(Arc<Mutex<HashMap<JobId, watch::Sender<()>>>>);

impl Topic {
    fn jobs(&self) -> MutexGuard<'_, HashMap<JobId, watch::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn subscribe(&self, job_id: JobId) -> JobWakeup {
        let changes = self
            .jobs()
            .entry(job_id)
            .or_insert_with(|| watch::Sender::new(()))
            .subscribe();
        JobWakeup {
            topic: self.clone(),
            job_id,
            changes,
        }
    }

    fn wake(&self, job_id: JobId) {
        if let Some(sender) = self.jobs().get(&job_id) {
            sender.send_replace(());
        }
    }

    fn wake_all(&self) {
        self.jobs().values().for_each(|sender| {
            sender.send_replace(());
        });
    }
}

/// Waits for changes of one job.
#[derive(Debug)]
pub struct JobWakeup {
    topic: Topic,
    job_id: JobId,
    changes: watch::Receiver<()>,
}

impl JobWakeup {
    /// Waits until something was committed about the job since the last call (or since this was made), or for 2 s:
    /// a wake-up can be lost, so its receiver looks by itself too.
    pub async fn changed(&mut self) {
        self.changed_within(POLL_INTERVAL).await;
    }

    /// The same, for so long as `limit`; whether there was a wake-up.
    pub async fn changed_within(&mut self, limit: Duration) -> bool {
        timeout(limit, self.changes.changed()).await.is_ok()
    }
}

impl Drop for JobWakeup {
    fn drop(&mut self) {
        let mut jobs = self.topic.jobs();
        // This receiver is still counted.
        if jobs
            .get(&self.job_id)
            .is_some_and(|sender| sender.receiver_count() <= 1)
        {
            jobs.remove(&self.job_id);
        }
    }
}

impl Wakeups {
    /// Listens from now on, until `stop`. `every`: while there are many writes a SQLite file is asked this often; 10 ms
    /// where jobs are run, 25 ms where they are only watched. The listening outlives outages of the database.
    pub fn listen(store: &Store, every: Duration, stop: CancellationToken) -> Self {
        let hub = Arc::new(Hub {
            jobs: Topic::default(),
            directives: Topic::default(),
            slots: watch::Sender::new(()),
            deliveries: watch::Sender::new(()),
            delivery_tickets: watch::Sender::new(()),
        });
        let (store, told) = (store.clone(), hub.clone());
        tokio::spawn(async move {
            let listening = async {
                loop {
                    let ended = match &*store.db {
                        super::Db::Sqlite { .. } => watch_file(&store, &told, every).await,
                        super::Db::Postgres(pool) => listen_to(&store, pool, &told).await,
                    };
                    match ended {
                        Err(error) if store.note(&error) => store.answers().await,
                        Err(error) => {
                            tracing::warn!(error = %crate::telemetry::chain(&error), "wake-ups are interrupted, polling instead");
                            tokio::time::sleep(Duration::from_millis(500)).await;
                        }
                        Ok(()) => {}
                    }
                    told.wake_all();
                }
            };
            stop.run_until_cancelled(Box::pin(listening)).await;
        });
        Self(hub)
    }

    /// Registers for changes of a job. Register first, then look, then wait.
    pub fn job(&self, job_id: JobId) -> JobWakeup {
        self.0.jobs.subscribe(job_id)
    }

    /// Registers for what the worker of a running job must know: somebody wants it cancelled, or its lease was taken.
    pub fn directive(&self, job_id: JobId) -> JobWakeup {
        self.0.directives.subscribe(job_id)
    }

    /// Wakes the slots of this process alone.
    pub fn ring(&self) {
        self.0.slots.send_replace(());
    }

    /// Registers for tickets: a change means that a free slot should look.
    pub fn slots(&self) -> watch::Receiver<()> {
        self.0.slots.subscribe()
    }
}

impl Wakeups {
    /// Registers for deliveries: a change means that some may be due.
    pub fn deliveries(&self) -> watch::Receiver<()> {
        self.0.deliveries.subscribe()
    }

    /// Registers for tickets of deliveries: a change means that one may wait.
    pub fn delivery_tickets(&self) -> watch::Receiver<()> {
        self.0.delivery_tickets.subscribe()
    }
}

impl Hub {
    fn wake_all(&self) {
        self.jobs.wake_all();
        self.directives.wake_all();
        self.slots.send_replace(());
        self.deliver();
    }

    fn deliver(&self) {
        self.deliveries.send_replace(());
        self.delivery_tickets.send_replace(());
    }
}

async fn listen_to(store: &Store, pool: &sqlx::PgPool, hub: &Hub) -> Result<()> {
    let mut listener = store
        .liveness
        .in_time(connect(pool))
        .await
        .map_err(Error::during("listen for wake-ups"))?;
    // What was committed before it listened.
    hub.wake_all();
    loop {
        let Ok(told) = timeout(LISTEN_KEEPALIVE, listener.try_recv()).await else {
            // Nothing was committed, or nothing gets through any more.
            let asked = store.liveness.in_time(listener.execute("select 1")).await;
            asked.map_err(Error::during("listen for wake-ups"))?;
            continue;
        };
        match told.map_err(Error::during("listen for wake-ups"))? {
            Some(told) => {
                for word in told.payload().split(' ') {
                    if word == RING {
                        hub.slots.send_replace(());
                    } else if let Some(job_id) = word.strip_prefix(DIRECTIVE) {
                        job_id.parse().into_iter().for_each(|id| hub.directives.wake(id));
                    } else if word == DELIVER {
                        hub.deliver();
                    } else if let Ok(job_id) = word.parse() {
                        hub.jobs.wake(job_id);
                    }
                }
            }
            // The connection was lost and made anew: notifications may be missing.
            None => hub.wake_all(),
        }
    }
}

/// Its connection is in no pool that anybody else uses: one that is silent is kept as long as the system believes in it.
async fn connect(pool: &sqlx::PgPool) -> sqlx::Result<PgListener> {
    let own = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(LOCK_TIMEOUT)
        .connect_lazy_with(pool.connect_options().as_ref().clone());
    let mut listener = PgListener::connect_with(&own).await?;
    listener.listen(CHANNEL).await?;
    Ok(listener)
}

async fn watch_file(store: &Store, hub: &Hub, every: Duration) -> Result<()> {
    let super::Db::Sqlite {
        reader,
        committed,
        rings,
        ..
    } = &*store.db
    else {
        return Ok(());
    };
    let options = reader.connect_options().as_ref().clone();
    let mut connection = options
        .connect()
        .await
        .map_err(Error::during("watch the database"))?;
    let mut version = 0;
    let mut seen = newest_event(&mut connection).await?;
    let mut changes = FileChanges::watch(options.get_filename(), every);
    loop {
        tokio::select! {
            () = changes.next() => {}
            () = committed.notified() => {}
        }
        if rings.swap(false, Ordering::Relaxed) {
            hub.slots.send_replace(());
        }
        let (now,): (i64,) = sqlx::query_as("pragma data_version")
            .fetch_one(&mut connection)
            .await
            .map_err(Error::during("watch the database"))?;
        if now == version {
            continue;
        }
        version = now;
        hub.deliveries.send_replace(());
        let changed: Vec<(i64, JobId, bool)> = sqlx::query_as(
            "select event_number, job_id, event_type in ('cancelling', 'retry', 'error', 'cancelled')
             from event where event_number > $1 order by event_number",
        )
        .bind(seen)
        .fetch_all(&mut connection)
        .await
        .map_err(Error::during("watch the database"))?;
        if let Some(last) = changed.last() {
            seen = last.0;
        }
        for (_, job_id, directs) in changed {
            hub.jobs.wake(job_id);
            if directs {
                hub.directives.wake(job_id);
            }
        }
        // A look at the tickets costs less than a fetch of the queue library, which writes.
        let (jobs, webhooks): (bool, bool) = sqlx::query_as(
            "select exists (select 1 from Jobs where job_type = $1 and status = 'Pending' and lock_by is null),
               exists (select 1 from Jobs where job_type = $2 and status = 'Pending' and lock_by is null)",
        )
        .bind(Queue::Jobs.name())
        .bind(Queue::Webhooks.name())
        .fetch_one(&mut connection)
        .await
        .map_err(Error::during("watch the database"))?;
        if jobs {
            hub.slots.send_replace(());
        }
        if webhooks {
            hub.delivery_tickets.send_replace(());
        }
    }
}

async fn newest_event(connection: &mut SqliteConnection) -> Result<i64> {
    let row: (i64,) = sqlx::query_as("select coalesce(max(event_number), 0) from event")
        .fetch_one(connection)
        .await
        .map_err(Error::during("watch the database"))?;
    Ok(row.0)
}
