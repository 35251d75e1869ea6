//! Writes what a run does into the database while it runs: events in batches, the cost so far, and the renewal of the
//! lease, all in one transaction each time; and learns there whether the run should go on.
//!
//! It works in a task of its own, so that a slow database never stops the run's output from being read.

use shared::clock;
use shared::event::NewEvent;
use shared::job::{Lease, Spend};
use shared::storage::{RunDirective, Store, Wakeups};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::warn;

/// A batch is written when it has this many events, or is this old.
const BATCH: usize = 32;
const BATCH_AGE: Duration = Duration::from_millis(100);

/// What a run has cost is written after so long at the latest: a killed worker's run is paid for all but that.
const SPEND_AGE: Duration = Duration::from_millis(300);

/// More of a run's events than this are not kept.
const MAX_EVENTS: usize = 10_000;
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// How often progress is told at most.
const PROGRESS: Duration = Duration::from_secs(5);

/// The pause before a renewal that failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// Events that the database has refused so often for what is in them are left out: the job must end. What a later try
/// may store is never left out.
const REFUSALS: u32 = 5;

/// What the recorder knows about the lease.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseState {
    /// Whether to go on.
    pub(super) signal: RunDirective,
    /// The lease was held at this moment: when the last successful renewal was *sent*.
    pub(super) held_at: Instant,
}

/// Takes the events of one run.
#[derive(Debug)]
pub(super) struct Recorder {
    notes: mpsc::UnboundedSender<Note>,
    lease_state: watch::Receiver<LeaseState>,
    task: JoinHandle<Vec<NewEvent>>,
    kept: usize,
    bytes: usize,
    dropped: i64,
}

#[derive(Debug)]
enum Note {
    Event(NewEvent),
    Spend(Spend),
    Dropped(i64),
}

impl Recorder {
    /// Starts recording the run of this lease, which is renewed each `renew_every`, and more often when events come.
    pub(super) fn start(store: Store, wakeups: &Wakeups, lease: Arc<Lease>, renew_every: Duration) -> Self {
        let (notes, inbox) = mpsc::unbounded_channel();
        let (tell, lease_state) = watch::channel(LeaseState {
            signal: RunDirective::Continue,
            held_at: lease.held_at.into(),
        });
        let changes = wakeups.directive(lease.job.job_id);
        let lease_tells = lease.tells_progress();
        let writer = Writer {
            store,
            lease,
            inbox,
            tell,
            renew_every,
            events: Vec::new(),
            spend: None,
            dropped: 0,
            renewals: 0,
            tried: None,
            refused: 0,
            progress: lease_tells.then(Instant::now),
        };
        let task = tokio::spawn(writer.write(changes));
        Self {
            notes,
            lease_state,
            task,
            kept: 0,
            bytes: 0,
            dropped: 0,
        }
    }

    /// Keeps an event, unless the run has had too many.
    pub(super) fn event(&mut self, event: NewEvent) {
        self.bytes += event.data.to_string().len();
        if self.kept >= MAX_EVENTS || self.bytes > MAX_BYTES {
            self.dropped += 1;
            return;
        }
        self.kept += 1;
        let _ = self.notes.send(Note::Event(event));
    }

    /// Keeps what the run has cost so far.
    pub(super) fn spend(&self, spend: Spend) {
        if !spend.models.is_empty() {
            let _ = self.notes.send(Note::Spend(spend));
        }
    }

    /// Waits for news about the lease.
    pub(super) async fn changed(&mut self) -> LeaseState {
        if self.lease_state.changed().await.is_err() {
            // The writer ends only after a loss, or by `close`, which takes the recorder.
            std::future::pending::<()>().await;
        }
        *self.lease_state.borrow_and_update()
    }

    /// What is known about the lease.
    pub(super) fn lease_state(&self) -> LeaseState {
        *self.lease_state.borrow()
    }

    /// Whether nobody else can hold the job by then, for whoever asks later: a lease lasts `lease` from its last
    /// renewal.
    pub(super) fn holds(&self, lease: Duration) -> impl Fn() -> bool + Send + use<> {
        let lease_state = self.lease_state.clone();
        move || {
            let lease_state = *lease_state.borrow();
            lease_state.signal != RunDirective::Lost && lease_state.held_at.elapsed() < lease
        }
    }

    /// Stops, and gives the events that are to be written with the end of the run. The lease isn't renewed any more after
    /// this.
    pub(super) async fn close(self) -> Vec<NewEvent> {
        let Self {
            notes, task, dropped, ..
        } = self;
        if dropped > 0 {
            let _ = notes.send(Note::Dropped(dropped));
        }
        drop(notes);
        task.await.unwrap_or_default()
    }
}

struct Writer {
    store: Store,
    lease: Arc<Lease>,
    inbox: mpsc::UnboundedReceiver<Note>,
    tell: watch::Sender<LeaseState>,
    renew_every: Duration,
    events: Vec<NewEvent>,
    spend: Option<Spend>,
    dropped: i64,
    /// How often the lease was renewed.
    renewals: i64,
    /// So many of the events are in a renewal that failed, and may be stored all the same.
    tried: Option<usize>,
    /// How often the events, as they are, were refused.
    refused: u32,
    /// When those who want to hear of progress were told last; `None`: nobody wants to.
    progress: Option<Instant>,
}

impl Writer {
    async fn write(mut self, mut changes: shared::storage::JobWakeup) -> Vec<NewEvent> {
        let mut renew_at = Instant::now() + self.renew_every;
        let mut flush_at = None;
        loop {
            let due = flush_at.unwrap_or(renew_at).min(renew_at);
            tokio::select! {
                note = self.inbox.recv() => match note {
                    Some(note) => {
                        let age = self.take(note);
                        let soon = Instant::now() + age;
                        flush_at = Some(flush_at.map_or(soon, |at: Instant| at.min(soon)));
                        if self.events.len() < BATCH {
                            continue;
                        }
                    }
                    None => break,
                },
                () = tokio::time::sleep_until(due) => {}
                () = changes.changed() => {
                    match self.store.signal(&self.lease).await {
                        Ok(RunDirective::Continue) => {}
                        Ok(signal) => self.say(signal, None),
                        // The next renewal will tell.
                        Err(_) => {}
                    }
                    if self.tell.borrow().signal == RunDirective::Lost {
                        return Vec::new();
                    }
                    continue;
                }
            }
            let asked = Instant::now();
            match self.write_down().await {
                Some(RunDirective::Lost) => return Vec::new(),
                Some(_) => renew_at = asked + self.renew_every,
                // Soon again: the lease runs out meanwhile.
                None => renew_at = Instant::now() + AGAIN,
            }
            flush_at = None;
        }
        // The run has ended, and its last events are a part of its end, as what it cost. But those that may be stored
        // already, and a gap, are settled first, however long the database takes.
        while self.tried.is_some() || self.dropped > 0 {
            match self.write_down().await {
                Some(RunDirective::Lost) => return Vec::new(),
                Some(_) => {}
                None => tokio::time::sleep(AGAIN).await,
            }
        }
        self.events
    }

    /// Writes what there is and renews the lease, and says what came of it. `None`: the events have to wait, or some
    /// were left out.
    async fn write_down(&mut self) -> Option<RunDirective> {
        let asked = Instant::now();
        let error = match self.flush().await {
            Ok(signal) => {
                self.refused = 0;
                self.say(signal, Some(asked));
                return Some(signal);
            }
            Err(error) => error,
        };
        if self.store.note(&error) {
            return None;
        }
        let job_id = self.lease.job.job_id;
        warn!(job.id = %job_id, error = %shared::telemetry::chain(&error), "the run's events wait");
        if !error.is_unavailable() {
            self.refused += 1;
        }
        if self.refused == REFUSALS {
            self.refused = 0;
            warn!(job.id = %job_id, events = self.events.len(), "events of the run are left out");
            // Where even this can't be said nothing more is tried.
            let events = i64::try_from(self.events.len()).unwrap_or(i64::MAX);
            self.dropped = if events == 0 { 0 } else { self.dropped + events };
            self.events.clear();
            // What is refused wasn't stored before either.
            self.tried = None;
        }
        // What holds up the events may leave the lease.
        if self.tried.is_none()
            && let Ok(signal) = self.renew().await
            && signal == RunDirective::Lost
        {
            return Some(signal);
        }
        None
    }

    /// Renews the lease alone.
    async fn renew(&mut self) -> shared::storage::Result<RunDirective> {
        let asked = Instant::now();
        let signal = self.record(0).await?;
        self.say(signal, Some(asked));
        Ok(signal)
    }

    /// Takes a note; how old it may become before it is written.
    fn take(&mut self, note: Note) -> Duration {
        match note {
            Note::Event(event) => {
                self.events.push(event);
                BATCH_AGE
            }
            Note::Spend(spend) => {
                self.spend = Some(spend);
                SPEND_AGE
            }
            Note::Dropped(count) => {
                self.dropped += count;
                BATCH_AGE
            }
        }
    }

    async fn flush(&mut self) -> shared::storage::Result<RunDirective> {
        // When a connection is lost nobody knows whether the commit came first, or still comes. Each renewal is counted
        // with what it stores, so the count tells; and the same events are tried again, so that they are stored once.
        while let Some(tried) = self.tried {
            let Some(renewals) = self.store.renewals(&self.lease).await? else {
                return Ok(RunDirective::Lost);
            };
            let (events, spend) = (&self.events[..tried], self.spend.as_ref());
            if renewals > self.renewals
                || self
                    .store
                    .record_again(&self.lease, renewals, events, spend, clock::now())
                    .await?
                    .is_some()
            {
                self.stored(tried);
            }
        }
        let count = self.events.len();
        let signal = self.record(count).await?;
        if count > 0 && self.progress.is_some_and(|told| told.elapsed() >= PROGRESS) {
            self.progress = Some(Instant::now());
            // Nobody relies on it, and the next one says the same and more.
            let _ = self.store.announce_progress(&self.lease, clock::now()).await;
        }
        if self.dropped > 0 && signal != RunDirective::Lost {
            self.store
                .record_gap(&self.lease, self.dropped, clock::now())
                .await?;
            self.dropped = 0;
        }
        Ok(signal)
    }

    /// Stores the first `count` events and the cost so far, and renews the lease.
    async fn record(&mut self, count: usize) -> shared::storage::Result<RunDirective> {
        self.tried = Some(count);
        let (events, spend) = (&self.events[..count], self.spend.as_ref());
        match self.store.record(&self.lease, events, spend, clock::now()).await {
            Ok(signal) => {
                self.stored(count);
                self.spend = None;
                Ok(signal)
            }
            Err(error) => {
                // Before the commit nothing is stored.
                if !error.is_undecided() {
                    self.tried = None;
                }
                Err(error)
            }
        }
    }

    /// The first of the events are stored, with a renewal.
    fn stored(&mut self, count: usize) {
        self.renewals += 1;
        self.events.drain(..count);
        self.tried = None;
    }

    fn say(&self, signal: RunDirective, held_at: Option<Instant>) {
        self.tell.send_modify(|lease_state| {
            lease_state.signal = signal;
            lease_state.held_at = held_at.unwrap_or(lease_state.held_at);
        });
    }
}
