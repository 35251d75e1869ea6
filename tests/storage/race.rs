//! Everything at once: claims, submissions, sweeps, cancels, lost leases and budgets over several stores. No limit is
//! passed at any time, nothing is lost, no group's order is broken, no transaction waits for another in a circle.

use super::{World, again, claimant, failed, job, report, spend};
use serde_json::json;
use shared::clock::{self, Timestamp};
use shared::event::{EventType, NewEvent};
use shared::id::{JobId, KeyId};
use shared::job::{CancelReason, Ending, Lease, NewJob, OnWorkerLost, Report};
use shared::money::MicroUsd;
use shared::storage::{CancelOutcome, Claim, Finish, RunDirective, Store};
use shared::telemetry::chain;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tests::database::Db;

tests::both!(no_limit_is_passed_and_nothing_is_lost_under_load);

/// How long the load lasts.
const LOAD: Duration = Duration::from_secs(8);

/// A lease that stood still for so long is lost.
const LEASE: Duration = Duration::from_millis(400);

/// What happened, in the order of ticks: a run's tick is taken after its claim, and the tick of its end before it.
#[derive(Default)]
struct Log {
    tick: AtomicU64,
    accepted: Mutex<Vec<JobId>>,
    begun: Mutex<Vec<Begun>>,
    ended: Mutex<HashMap<(JobId, i64), u64>>,
    abandoned: Mutex<Vec<Lease>>,
    cancelled: AtomicU64,
    taken: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
}

struct Begun {
    job_id: JobId,
    job_number: i64,
    attempt: i64,
    group: Option<(KeyId, String)>,
    tick: u64,
}

impl Log {
    fn tick(&self) -> u64 {
        self.tick.fetch_add(1, Ordering::SeqCst)
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::SeqCst)
    }

    fn begin(&self, lease: &Lease) {
        let job = &lease.job;
        self.begun.lock().unwrap().push(Begun {
            job_id: job.job_id,
            job_number: job.job_number,
            attempt: job.attempt,
            group: job.group_key.clone().map(|group| (job.key_id.clone(), group)),
            tick: self.tick(),
        });
    }

    fn end(&self, job_id: JobId, attempt: i64, tick: u64) {
        let before = self.ended.lock().unwrap().insert((job_id, attempt), tick);
        assert_eq!(before, None, "attempt {attempt} of {job_id} ended twice");
    }
}

/// Pseudo-random numbers (xorshift), so that a run needs no crate for them.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// 0 and more, below `sides`.
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }

    fn micros(&mut self, below: u64) -> i64 {
        i64::try_from(self.roll(below)).unwrap()
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        let index = usize::try_from(self.roll(all.len() as u64)).unwrap();
        &all[index]
    }

    async fn pause(&mut self, below_ms: u64) {
        let micros = self.roll(below_ms * 1000);
        tokio::time::sleep(Duration::from_micros(micros)).await;
    }

    fn soon(&mut self, below_ms: u64) -> Timestamp {
        clock::now().plus(Duration::from_millis(self.roll(below_ms)))
    }
}

/// An error here is a failure of the test: a deadlock, a lock that was waited for too long, a broken rule.
fn fine<T>(result: shared::storage::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{}", chain(&error)))
}

async fn submit(store: Store, keys: Arc<Vec<KeyId>>, log: Arc<Log>, seed: u64) {
    let mut dice = Dice::new(seed);
    while log.goes_on() {
        let key = dice.one_of(&keys);
        let group = *dice.one_of(&[None, None, Some("a"), Some("b"), Some("c")]);
        let now = clock::now();
        let wanted = NewJob {
            concurrency_key: group.map(str::to_owned),
            priority: *dice.one_of(&[-1, 0, 0, 5]),
            run_after: (dice.roll(10) == 0).then(|| dice.soon(300)),
            deadline_at: (dice.roll(25) == 0).then(|| dice.soon(500)),
            on_worker_lost: *dice.one_of(&[OnWorkerLost::Resume, OnWorkerLost::Resume, OnWorkerLost::Fail]),
            max_cost: MicroUsd(100_000),
            created_at: now,
            ..job(key)
        };
        let mut tx = fine(store.begin().await);
        fine(tx.insert_job(&wanted).await);
        if dice.roll(50) == 0 {
            fine(tx.rollback().await);
            continue;
        }
        fine(tx.commit().await);
        log.accepted.lock().unwrap().push(wanted.job_id);
        if dice.roll(12) == 0 {
            let recent: Vec<JobId> = log
                .accepted
                .lock()
                .unwrap()
                .iter()
                .rev()
                .take(8)
                .copied()
                .collect();
            let job_id = *dice.one_of(&recent);
            let outcome = fine(store.cancel_job(job_id, CancelReason::User, clock::now()).await);
            let done = u64::from(outcome == CancelOutcome::Cancelled);
            log.cancelled.fetch_add(done, Ordering::SeqCst);
        }
        dice.pause(40).await;
    }
}

async fn claim(store: Store, log: Arc<Log>, seed: u64) {
    let mut dice = Dice::new(seed);
    let claimant = claimant();
    let mut runs = 0;
    while log.goes_on() {
        match fine(store.claim(&claimant, clock::now()).await) {
            Claim::TryAgain => {}
            Claim::Nothing => dice.pause(6).await,
            Claim::Run(lease) => {
                log.begin(&lease);
                runs += 1;
                if runs == 5 || dice.roll(60) == 0 {
                    log.abandoned.lock().unwrap().push(*lease);
                } else {
                    run(&store, &lease, &log, &mut dice).await;
                }
            }
        }
    }
}

async fn run(store: &Store, lease: &Lease, log: &Log, dice: &mut Dice) {
    // A twentieth of what it may cost, so that the budgets last for the test.
    let cap = u64::try_from(lease.reserved.0).unwrap() / 20;
    let mut ending = match dice.roll(10) {
        0 => failed(),
        1 => again(dice.soon(30)),
        2 => Ending::Released,
        _ => Ending::Done,
    };
    if dice.roll(2) == 0 {
        let event = NewEvent::new(EventType::Assistant, json!({ "content": "Hello." }));
        let so_far = spend(dice.micros(cap / 2 + 1));
        match fine(
            store
                .record(lease, &[event.clone(), event], Some(&so_far), clock::now())
                .await,
        ) {
            RunDirective::Continue => {}
            RunDirective::Cancel(_) => ending = Ending::Cancelled,
            RunDirective::Lost => return,
        }
        dice.pause(10).await;
    }
    let report = Report {
        spend: spend(dice.micros(cap + 1)),
        ..report(ending)
    };
    let tick = log.tick();
    match fine(store.finish(lease, &report, clock::now()).await) {
        Finish::Became(_) => log.end(lease.job.job_id, lease.job.attempt, tick),
        Finish::Lost => drop(log.refused.fetch_add(1, Ordering::SeqCst)),
    }
}

async fn sweep(store: Store, log: Arc<Log>) {
    let mut watched: HashMap<(JobId, i64), (i64, Instant)> = HashMap::new();
    while log.goes_on() {
        fine(store.sweep(clock::now()).await);
        for job_id in fine(store.overdue_jobs(clock::now()).await) {
            fine(
                store
                    .cancel_job(job_id, CancelReason::Deadline, clock::now())
                    .await,
            );
        }
        let leases = fine(store.running_leases().await);
        watched.retain(|(job_id, attempt), _| {
            leases
                .iter()
                .any(|lease| lease.job_id == *job_id && lease.attempt == *attempt)
        });
        for lease in leases {
            let now = Instant::now();
            let seen = watched
                .entry((lease.job_id, lease.attempt))
                .or_insert((lease.renewals, now));
            if seen.0 != lease.renewals {
                *seen = (lease.renewals, now);
            } else if seen.1.elapsed() >= LEASE {
                take(&store, &log, lease.job_id, lease.attempt, lease.renewals).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn take(store: &Store, log: &Log, job_id: JobId, attempt: i64, renewals: i64) {
    let job = fine(store.job(job_id).await).unwrap();
    let tick = log.tick();
    if fine(store.take_lost(&job, attempt, renewals, clock::now()).await) {
        log.end(job_id, attempt, tick);
        log.taken.fetch_add(1, Ordering::SeqCst);
    }
}

impl Log {
    /// Whether everything has happened that is to be survived.
    fn was_load(&self) -> bool {
        self.begun.lock().unwrap().len() > 100
            && !self.abandoned.lock().unwrap().is_empty()
            && [&self.taken, &self.cancelled]
                .iter()
                .all(|count| count.load(Ordering::SeqCst) > 0)
    }
}

async fn no_limit_is_passed_and_nothing_is_lost_under_load(db: Db) {
    let world = World::new(db).await;
    let mut keys = Vec::new();
    for number in 0..8 {
        keys.push(world.key(&format!("key{number}"), 1 + number % 4).await);
    }
    // Two keys run out of money, one of them in the course of the test; everybody waits for the global budget now
    // and then.
    world.budget(Some(&keys[0]), 250_000, "total", "reject").await;
    world.budget(Some(&keys[1]), 60_000, "total", "reject").await;
    world.budget(Some(&keys[2]), 100_000_000, "total", "hold").await;
    world.budget(None, 700_000, "total", "hold").await;
    let keys = Arc::new(keys);
    let log = Arc::new(Log::default());
    let stores = [world.store.clone(), world.other().await, world.other().await];

    let mut tasks = Vec::new();
    for number in 0..8_u64 {
        let store = stores[usize::try_from(number).unwrap() % stores.len()].clone();
        tasks.push(tokio::spawn(claim(store.clone(), log.clone(), 100 + number)));
        if number < 4 {
            tasks.push(tokio::spawn(submit(
                store.clone(),
                keys.clone(),
                log.clone(),
                number,
            )));
        }
        if number < 2 {
            tasks.push(tokio::spawn(sweep(store, log.clone())));
        }
    }
    let begin = Instant::now();
    // On a busy machine it takes longer until there was a load.
    while (begin.elapsed() < LOAD || (!log.was_load() && begin.elapsed() < Duration::from_secs(90)))
        && !tasks.iter().any(tokio::task::JoinHandle::is_finished)
    {
        assert_eq!(world.faults().await, [""; 0], "after {:?}", begin.elapsed());
        world
            .database
            .execute("update budget set limit_amount = limit_amount + 100000 where scope = 'global'")
            .await;
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    log.stop.store(true, Ordering::SeqCst);
    for task in tasks {
        task.await.expect("no task failed");
    }

    assert_eq!(world.faults().await, [""; 0]);
    let too_low = world
        .number(
            "select count(*) from lane where coalesce(top_priority, -99) < coalesce((
               select max(priority) from job where key_id = lane.key_id and status = 'queued' and hold = ''), -99)",
        )
        .await;
    assert_eq!(too_low, 0, "no lane is stuck, whether or not somebody sweeps");
    drain(&world, &log).await;
    check(&world, &log).await;
}

/// Runs what is left, alone.
async fn drain(world: &World, log: &Log) {
    world
        .database
        .execute("update budget set limit_amount = 100000000000 where scope = 'global'")
        .await;
    let mut dice = Dice::new(7);
    let (mut before, mut progress) = (i64::MAX, Instant::now());
    loop {
        let left = world
            .number("select count(*) from job where status in ('queued', 'running')")
            .await;
        if left == 0 {
            return;
        }
        if left < before {
            (before, progress) = (left, Instant::now());
        }
        assert!(
            progress.elapsed() < Duration::from_mins(1),
            "{left} jobs don't run"
        );
        for lease in fine(world.store.running_leases().await) {
            take(&world.store, log, lease.job_id, lease.attempt, lease.renewals).await;
        }
        let later = clock::now().plus(Duration::from_secs(1));
        fine(world.store.sweep(later).await);
        while let Some(lease) = world.claim_at(later).await {
            log.begin(&lease);
            run(&world.store, &lease, log, &mut dice).await;
        }
    }
}

async fn check(world: &World, log: &Log) {
    assert_eq!(world.faults().await, [""; 0]);
    let accepted = log.accepted.lock().unwrap().len();
    assert_eq!(
        world.number("select count(*) from job").await,
        i64::try_from(accepted).unwrap()
    );
    assert_eq!(
        world
            .number("select count(*) from job where completed_at is null")
            .await,
        0
    );
    assert_eq!(
        world
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
    assert_eq!(
        world
            .number("select count(*) from lane where running <> 0 or top_priority is not null")
            .await,
        0
    );

    // A worker that comes back to a run which was taken from it changes nothing.
    let abandoned = std::mem::take(&mut *log.abandoned.lock().unwrap());
    for lease in &abandoned {
        assert_eq!(world.finish(lease, Ending::Done).await, Finish::Lost);
    }
    assert_eq!(world.faults().await, [""; 0]);

    let mut groups: BTreeMap<_, Vec<&Begun>> = BTreeMap::new();
    let mut begun = std::mem::take(&mut *log.begun.lock().unwrap());
    begun.sort_by_key(|run| run.tick);
    for run in &begun {
        if let Some(group) = &run.group {
            groups.entry(group).or_default().push(run);
        }
    }
    let ended = std::mem::take(&mut *log.ended.lock().unwrap());
    for (group, runs) in groups {
        for pair in runs.windows(2) {
            let (before, next) = (pair[0], pair[1]);
            let end = ended[&(before.job_id, before.attempt)];
            assert!(end < next.tick, "two of {group:?} ran at once");
            assert!(before.job_number <= next.job_number, "{group:?} was out of order");
        }
    }
    assert_eq!(begun.len(), ended.len(), "every run ended once");

    // The load was one.
    let (runs, taken) = (begun.len(), log.taken.load(Ordering::SeqCst));
    let (cancelled, refused) = (
        log.cancelled.load(Ordering::SeqCst),
        log.refused.load(Ordering::SeqCst),
    );
    println!(
        "{accepted} jobs, {runs} runs, {taken} leases taken, {cancelled} cancelled, {refused} late finishes"
    );
    assert!(runs > 100 && taken > 0 && cancelled > 0 && !abandoned.is_empty());
    let broke = world
        .number("select count(*) from job where error_code = 'budget_exceeded'")
        .await;
    assert!(broke > 0, "a budget was used up");
}
