//! Everything at once: jobs in and out of sessions from three keys, while processes are killed and stopped at random,
//! the guards of runs among them.
//! Then they stop, and what must hold is checked. `CHAOS_JOBS` says how many jobs (80), `CHAOS_SEED` repeats a course.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::client::{Client, PATIENCE, at_once};
use tests::database::Db;
use tests::script::{Step, steps};
use tests::system::{KEYS, System};
use tests::trace::{self, Run};
use tests::{eventually, processes, run_alone};

mod on {
    #[test]
    fn sqlite() {
        super::alone(super::Db::Sqlite);
    }

    #[test]
    fn postgres() {
        super::alone(super::Db::Postgres);
    }
}

fn alone(db: Db) {
    // A job takes about 50 ms of the machine, and a killed one more than one turn.
    let limit = Duration::from_mins(3) + Duration::from_millis(200) * u32::try_from(jobs()).unwrap();
    run_alone(limit, chaos(db));
}

/// How often a fault is injected.
const FAULT_INTERVAL: Duration = Duration::from_millis(300);
/// How many tasks submit at once: enough that jobs wait.
const SUBMITTERS: usize = 6;

/// The sessions that each key has.
const SESSIONS: [&str; 4] = ["a", "b", "c", "d"];

fn jobs() -> usize {
    std::env::var("CHAOS_JOBS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(80)
}

/// A small generator, so that a seed repeats the choices (though not the timing).
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// One accepted job and what its order is measured by.
#[derive(Clone, Debug)]
struct Accepted {
    id: String,
    key: usize,
    /// The name of its session, if it's in one.
    session: Option<String>,
    tag: String,
}

async fn chaos(db: Db) {
    let seed = std::env::var("CHAOS_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(trace::now);
    say(&format!("{db:?}: {} jobs, CHAOS_SEED={seed}", jobs()));
    let mut system = System::builder()
        .database(db)
        .apis(2)
        .workers(3)
        .sandbox(false)
        .env("LEASE_SECONDS", "2")
        .env("CLAUDE_RETRY_BASE_DELAY", "0.2")
        .env("DRAIN_SECONDS", "1")
        .env("LOG_LEVEL", "warn")
        .start()
        .await;
    for key in KEYS {
        let client = system.client().with_key(key);
        at_once(SESSIONS.map(|name| client.session(name))).await;
    }
    let bases = Mutex::new([system.client_of(0), system.client_of(1)]);
    let begin = Instant::now();

    // The submitters go on until all jobs are accepted; the faults fall until most of the work is done.
    let (next, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let submitting = async {
        let seeds = (1..=SUBMITTERS as u64).map(|number| seed ^ (number << 32));
        let accepted = at_once(seeds.map(|seed| submit(&bases, &next, seed))).await;
        done.store(true, Ordering::Relaxed);
        accepted.into_iter().flatten().collect::<Vec<_>>()
    };
    let (accepted, faults) = tokio::join!(
        submitting,
        inject_faults(&mut system, &bases, &done, Rng(seed | 1))
    );

    let faulty = begin.elapsed();
    let finals = finals(&system, &accepted).await;
    let all = begin.elapsed();
    check(&system, &accepted, &finals).await;

    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for job in finals.values() {
        *counts
            .entry(format!("{} {}", job["status"], job["error_code"]))
            .or_default() += 1;
    }
    let attempts = system.database().number("select count(*) from attempt").await;
    let lost = system
        .database()
        .number("select count(*) from attempt where ending = 'lost'")
        .await;
    say(&format!(
        "{db:?}: {} accepted, {faults:?}, {attempts} attempts, {lost} of them lost; {counts:?}; {faulty:?} with faults, {all:?} in all",
        accepted.len()
    ));
}

async fn submit(bases: &Mutex<[Client; 2]>, next: &AtomicUsize, seed: u64) -> Vec<Accepted> {
    let mut rng = Rng(seed | 1);
    let mut accepted = Vec::new();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= jobs() {
            return accepted;
        }
        let key = usize::try_from(rng.below(3)).unwrap();
        let tag = format!("{number:06}");
        let script = steps([
            Step::Spend(0.001),
            Step::Sleep(rng.below(200)),
            Step::Say("half".to_owned()),
            Step::Sleep(rng.below(200)),
        ]);
        let mut body = json!({ "message": script.costing(0.001).traced(&tag).prompt(), "max_attempts": 5 });
        let mut session = None;
        match rng.below(4) {
            0 => session = Some(SESSIONS[usize::try_from(rng.below(4)).unwrap()].to_owned()),
            1 => body["concurrency_key"] = json!(format!("k{}", rng.below(6))),
            _ => {}
        }
        if let Some(session) = &session {
            body["session"] = json!(session);
        }
        // Whatever happens to the answer, the same key makes the same job.
        let id = eventually(Duration::from_mins(1), "an accepted submission", async || {
            let client = {
                let bases = bases.lock().unwrap();
                bases[usize::try_from(rng.below(2)).unwrap()].with_key(KEYS[key])
            };
            let request = client
                .request(reqwest::Method::POST, "/api/v1/jobs")
                .timeout(Duration::from_secs(5));
            let answer = client
                .try_send(
                    request
                        .header("idempotency-key", format!("chaos-{number}"))
                        .json(&body),
                )
                .await;
            let answer = answer.ok()?;
            // While the database is busy it may refuse, but never with anything else than this.
            assert!(
                matches!(answer.status, 202 | 409 | 503),
                "{}: {}",
                answer.status,
                answer.text
            );
            (answer.status == 202).then(|| answer.json["data"]["id"].as_str().unwrap().to_owned())
        })
        .await;
        accepted.push(Accepted {
            id,
            key,
            session,
            tag,
        });
    }
}

#[derive(Debug, Default)]
struct Faults {
    killed: usize,
    stopped: usize,
    guards_killed: usize,
    guards_stopped: usize,
    /// A start may fail while a stopped process holds the database: then a supervisor tries again.
    failed_starts: usize,
}

/// Kills and stops processes until everything is accepted and a good part of it is done, or time is up.
async fn inject_faults(
    system: &mut System,
    bases: &Mutex<[Client; 2]>,
    accepted: &AtomicBool,
    mut rng: Rng,
) -> Faults {
    let mut faults = Faults::default();
    let begin = Instant::now();
    let limit = Duration::from_secs(10) + Duration::from_millis(40) * u32::try_from(jobs()).unwrap();
    let mut stopped: Vec<(usize, Instant)> = Vec::new();
    let mut ticks = tokio::time::interval(FAULT_INTERVAL);
    loop {
        ticks.tick().await;
        stopped.retain(|(_, until)| Instant::now() < *until);
        // Two API processes, three workers, and now and then a guard.
        let index = usize::try_from(rng.below(7)).unwrap();
        let stop = rng.below(3) == 0;
        if index >= 5 {
            inject_guard_fault(system, &mut faults, &mut rng, stop);
        } else if stop && stopped.iter().all(|(other, _)| *other != index) {
            faults.stopped += 1;
            let pause = Duration::from_millis(200 + rng.below(4_000));
            let process = &system.processes()[index];
            process.pause();
            stopped.push((index, Instant::now() + pause));
            wake_after(process.pid().unwrap(), pause);
        } else {
            faults.killed += 1;
            system.processes()[index].kill();
            faults.failed_starts += system.processes()[index].supervise().await;
            stopped.retain(|(other, _)| *other != index);
            if index < 2 {
                bases.lock().unwrap()[index] = system.client_of(index);
            }
        }
        let open = system
            .database()
            .number("select count(*) from job where status in ('queued', 'running')")
            .await;
        let nearly = accepted.load(Ordering::Relaxed) && open <= i64::try_from(jobs() / 10).unwrap();
        if nearly || begin.elapsed() > limit {
            break;
        }
    }
    for process in system.processes() {
        process.resume();
    }
    faults
}

/// Kills a guard, or stops it, one time in three for good: its worker must do without it.
fn inject_guard_fault(system: &System, faults: &mut Faults, rng: &mut Rng, stop: bool) {
    let guards: Vec<i32> = system
        .run_processes()
        .into_iter()
        .filter(|process| process.command.starts_with("claude-queue-guard"))
        .map(|process| process.pid)
        .collect();
    if guards.is_empty() {
        return;
    }
    let guard = guards[usize::try_from(rng.below(guards.len() as u64)).unwrap()];
    if stop {
        faults.guards_stopped += 1;
        processes::signal(guard, Signal::STOP);
        if rng.below(3) > 0 {
            wake_after(guard, Duration::from_millis(200 + rng.below(4_000)));
        }
    } else {
        faults.guards_killed += 1;
        processes::signal(guard, Signal::KILL);
    }
}

/// By itself: a process that stopped in the middle of a transaction on SQLite keeps a start waiting.
fn wake_after(pid: i32, pause: Duration) {
    tokio::spawn(async move {
        tokio::time::sleep(pause).await;
        processes::signal(pid, Signal::CONT);
    });
}

/// Every accepted job at its end.
async fn finals(system: &System, accepted: &[Accepted]) -> BTreeMap<String, Value> {
    let mut finals = BTreeMap::new();
    for some in accepted.chunks(16) {
        let some = some.iter().map(async |job| {
            let client = system.client().with_key(KEYS[job.key]);
            let what = format!("the end of {}", job.id);
            let limit = Duration::from_mins(2) + Duration::from_millis(100) * u32::try_from(jobs()).unwrap();
            let job = eventually(limit, &what, async || {
                let answer = client.get(&format!("/api/v1/jobs/{}?wait=20", job.id)).await;
                let job = answer.data(200).clone();
                tests::client::is_final(&job).then_some(job)
            });
            job.await
        });
        for job in at_once(some).await {
            finals.insert(job["id"].as_str().unwrap().to_owned(), job);
        }
    }
    finals
}

/// What must hold when the faults have stopped.
async fn check(system: &System, accepted: &[Accepted], finals: &BTreeMap<String, Value>) {
    let database = system.database();
    assert_eq!(accepted.len(), jobs());
    assert_eq!(finals.len(), jobs(), "two submissions share a job");
    assert_eq!(
        database.number("select count(*) from job").await,
        i64::try_from(jobs()).unwrap()
    );
    for (id, job) in finals {
        let killed = ["worker_lost", "claude_killed"].map(Value::from);
        let fine = job["status"] == "done" || killed.contains(&job["error_code"]);
        assert!(fine, "{id} ended in a way that nobody asked for: {job:#}");
    }

    // No two runs of one job, of one session or of one concurrency key overlap.
    let mut groups: BTreeMap<String, Vec<Run>> = BTreeMap::new();
    for job in accepted.iter().filter(|job| job.session.is_none()) {
        let runs = system.runs(&job.id);
        trace::assert_one_at_a_time(&runs);
        if let Some(group) = finals[&job.id]["concurrency_key"].as_str() {
            groups
                .entry(format!("{}/{group}", job.key))
                .or_default()
                .extend(runs);
        }
    }
    for runs in groups.values_mut() {
        runs.sort_by_key(|run| run.first);
        trace::assert_one_at_a_time(runs);
    }
    for session in std::fs::read_dir(system.folder().join("data/sessions")).unwrap() {
        trace::assert_one_at_a_time(&trace::read(&session.unwrap().path().join("workspace")));
    }
    // Within each group the jobs ran in the order in which they were stored.
    let rows = database
        .texts("select group_key || ' ' || key_id || ' ' || job_id from job where group_key is not null order by job_number")
        .await;
    let tags: BTreeMap<&str, &str> = accepted
        .iter()
        .map(|job| (job.id.as_str(), job.tag.as_str()))
        .collect();
    let mut wanted: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for row in &rows {
        let (group, id) = row.rsplit_once(' ').unwrap();
        wanted.entry(group).or_default().push(tags[id]);
    }
    let began = began(system, accepted);
    for (group, tags) in &wanted {
        let mut last = 0;
        for tag in tags {
            // A job that was lost each time before it could write has no run to be out of order.
            let Some(&(first, end)) = began.get(*tag) else {
                continue;
            };
            assert!(
                last < first,
                "{group}: {tag} began before its predecessor had ended"
            );
            last = end;
        }
    }

    // The database says the same about the attempts of each job.
    let overlaps = "select count(*) from attempt a join attempt b on b.job_id = a.job_id and b.attempt = a.attempt + 1 \
                    where b.started_at < a.ended_at";
    assert_eq!(database.number(overlaps).await, 0);

    // Every job has one last event, and no event is missing.
    let endings = "select count(*) from event where event_type in ('done', 'error', 'cancelled')";
    assert_eq!(database.number(endings).await, i64::try_from(jobs()).unwrap());
    let gaps = "select count(*) from (select job_id, count(*) as n, max(seq) as last from event group by job_id) e \
                where n <> last";
    assert_eq!(database.number(gaps).await, 0);

    // All money is accounted for, nothing is reserved, nobody counts as running.
    let spent = database
        .number("select cast(sum(cost) as bigint) from ledger")
        .await;
    assert_eq!(
        spent,
        database
            .number("select cast(sum(cost) as bigint) from attempt")
            .await
    );
    assert_eq!(
        spent,
        database.number("select cast(sum(cost) as bigint) from job").await
    );
    assert_eq!(
        spent,
        database
            .number("select cast(sum(spent) as bigint) from budget_period where scope = 'key'")
            .await
    );
    assert_eq!(
        database
            .number("select cast(sum(reserved) as bigint) from budget_period")
            .await,
        0
    );
    assert_eq!(
        database
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
    assert_eq!(
        database
            .number("select cast(sum(running) as bigint) from lane")
            .await,
        0
    );
    assert_eq!(
        database
            .number("select count(*) from attempt where ended_at is null")
            .await,
        0
    );
    // The simulator's own count of what it answered: a killed worker may hide no more than its last 300 ms.
    let answered = system.simulator().spent();
    #[expect(clippy::cast_precision_loss, reason = "amounts stay below 2^53 millionths")]
    let metered = spent as f64 / 1e6;
    say(&format!(
        "${answered:.4} answered, ${metered:.4} in the ledger, ${:.4} between them",
        answered - metered
    ));
    assert!(
        answered >= 0.98 * metered,
        "${answered} answered, ${metered} in the ledger"
    );
    // No more has come within that time than the two answers of a run, a tenth of a cent each.
    let lost = database
        .number("select count(*) from attempt where ending = 'lost'")
        .await;
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    let hidden = 0.002_2 * lost as f64 + 0.001;
    assert!(
        answered - metered <= hidden,
        "${answered} answered, ${metered} in the ledger: more than {lost} lost runs can hide"
    );
    // At least what every done job's answer cost.
    let done = finals.values().filter(|job| job["status"] == "done").count();
    assert!(
        spent >= i64::try_from(done).unwrap() * 1_000,
        "{spent} for {done} jobs"
    );
    system.no_run_process_within(PATIENCE).await;
}

/// When each job's first run began and its last one ended, as far as they wrote it.
fn began(system: &System, accepted: &[Accepted]) -> BTreeMap<String, (u64, u64)> {
    let mut runs: Vec<Run> = accepted
        .iter()
        .filter(|job| job.session.is_none())
        .flat_map(|job| system.runs(&job.id))
        .collect();
    for session in std::fs::read_dir(system.folder().join("data/sessions")).unwrap() {
        runs.extend(trace::read(&session.unwrap().path().join("workspace")));
    }
    let mut spans: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for run in runs {
        let span = spans.entry(run.tag).or_insert((run.first, run.last));
        *span = (span.0.min(run.first), span.1.max(run.last));
    }
    spans
}

#[expect(clippy::print_stderr, reason = "the counts of a chaos run are its result")]
fn say(what: &str) {
    eprintln!("chaos: {what}");
}
