//! What a submission, a claim and the end of a run cost, with nothing waiting and with a million jobs waiting, on both
//! databases: medians and 99th percentiles of one connection, in microseconds, commit included.
//!
//! `cargo run --release -p tests --example bench-claims [waiting jobs] [rounds]`

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "it prints a table, and stops where it fails"
)]

use serde_json::json;
use shared::clock::{self, Timestamp};
use shared::id::{JobId, KeyId, WorkerId};
use shared::job::{Ending, JobKind, Lease, NewJob, OnWorkerLost, Report, RunOptions, Spend};
use shared::money::MicroUsd;
use shared::storage::{Claim, Claimant, DatabaseUrl, Finish, Store};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tests::database::{Database, Db};
use tests::paths;

/// The key whose jobs are measured, and the one that another million may belong to.
const KEY: &str = "key_measured";
const OTHER: &str = "key_other";

/// The digits of an id, before its number.
const ZEROS: &str = "00000000000000000000000000000000";

/// What waits while the measuring goes on.
#[derive(Clone, Copy)]
enum Waiting {
    /// Ready jobs of the measured key.
    Own,
    /// Ready jobs of a key that is at its cap.
    Capped,
    /// Jobs of the measured key that wait for their time.
    Delayed,
    /// Jobs of one group of the measured key, behind a head that runs.
    Grouped,
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|text| text.parse().expect("a number"));
    let waiting: u64 = arguments.next().unwrap_or(1_000_000);
    let rounds: usize = arguments
        .next()
        .map_or(1000, |rounds| usize::try_from(rounds).unwrap());

    println!(
        "{waiting} jobs wait, {rounds} rounds. Median / 99th percentile in microseconds with nothing waiting, then with \
         them, and how many times the median that is.\n"
    );
    println!("| database | waiting | submit | | × | claim | | × | finish | | × |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for db in [Db::Sqlite, Db::Postgres] {
        for (name, kind) in [
            ("ready, of the same key", Waiting::Own),
            ("ready, of a key at its cap", Waiting::Capped),
            ("delayed, of the same key", Waiting::Delayed),
            ("in one busy group, submitting to it", Waiting::Grouped),
        ] {
            let empty = Bench::new(db, kind, 0).await;
            let full = Bench::new(db, kind, waiting).await;
            let cells = compare(empty, full, rounds).await;
            println!("| {db:?} | {name} | {} |", cells.join(" | "));
        }
    }
}

/// Measures both in turn, so that whatever else the machine does falls on both alike.
async fn compare(mut empty: Bench, mut full: Bench, rounds: usize) -> Vec<String> {
    let warm_up = rounds / 10;
    for round in 0..rounds + warm_up {
        for bench in [&mut empty, &mut full] {
            bench.round(round >= warm_up).await;
        }
    }
    let (empty, full) = (empty.end().await, full.end().await);
    let mut cells = Vec::new();
    for (empty, full) in empty.into_iter().zip(full) {
        let hundredths = full.0 * 100 / empty.0.max(1);
        cells.push(format!("{} / {}", empty.0, empty.1));
        cells.push(format!("{} / {}", full.0, full.1));
        cells.push(format!("{}.{:02}", hundredths / 100, hundredths % 100));
    }
    cells
}

/// One database under measurement.
struct Bench {
    store: Store,
    folder: PathBuf,
    key: KeyId,
    claimant: Claimant,
    /// The group that jobs are submitted to.
    group: Option<String>,
    /// Whether the group is busy, so that only another job can be claimed.
    busy: bool,
    took: [Vec<u128>; 3],
}

impl Bench {
    async fn new(db: Db, kind: Waiting, waiting: u64) -> Self {
        let folder = paths::folder('b');
        let database = Database::empty(db, &folder).await;
        let url = DatabaseUrl::parse(database.url()).unwrap();
        let store = Store::open(&url, 4).await.unwrap();
        let (key, other) = (KeyId::known(KEY), KeyId::known(OTHER));
        store.put_lane(&key, 1_000_000).await.unwrap();
        store.put_lane(&other, 1).await.unwrap();
        store
            .put_default_budget(&key, MicroUsd(1_000_000_000_000), clock::now())
            .await
            .unwrap();
        let claimant = Claimant {
            worker_id: WorkerId::new(),
            cli_version: "2.1.331".to_owned(),
            least_reserve: MicroUsd(50_000),
            defaults: shared::job::RunDefaults::default(),
        };
        if waiting > 0 {
            fill(&database, &store, &claimant, kind, waiting).await;
        }
        let grouped = matches!(kind, Waiting::Grouped);
        Self {
            store,
            folder,
            key,
            claimant,
            group: grouped.then(|| "busy".to_owned()),
            busy: grouped && waiting > 0,
            took: Default::default(),
        }
    }

    async fn submit(&self, concurrency_key: Option<String>, now: Timestamp) {
        let mut tx = self.store.begin().await.unwrap();
        let wanted = NewJob {
            concurrency_key,
            ..job(&self.key, now)
        };
        tx.insert_job(&wanted).await.unwrap();
        tx.commit().await.unwrap();
    }

    /// A job is submitted, claimed and done.
    async fn round(&mut self, counts: bool) {
        let now = clock::now();
        let begin = Instant::now();
        self.submit(self.group.clone(), now).await;
        let submitted = begin.elapsed();
        if self.busy {
            self.submit(None, now).await;
        }

        let begin = Instant::now();
        let lease = claim(&self.store, &self.claimant, now).await;
        let claimed = begin.elapsed();

        let begin = Instant::now();
        let finish = self.store.finish(&lease, &report(), now).await.unwrap();
        let finished = begin.elapsed();
        assert!(matches!(finish, Finish::Became(_)));
        if counts {
            for (took, time) in self.took.iter_mut().zip([submitted, claimed, finished]) {
                took.push(time.as_micros());
            }
        }
    }

    /// Median and 99th percentile of submit, claim and finish.
    async fn end(self) -> [(u128, u128); 3] {
        self.store.close().await;
        let _ = std::fs::remove_dir_all(self.folder);
        self.took.map(|mut times| {
            times.sort_unstable();
            (times[times.len() / 2], times[times.len() * 99 / 100])
        })
    }
}

async fn claim(store: &Store, claimant: &Claimant, now: Timestamp) -> Lease {
    loop {
        match store.claim(claimant, now).await.unwrap() {
            Claim::Run(lease) => return *lease,
            Claim::TryAgain => {}
            Claim::Nothing => panic!("a job is ready"),
        }
    }
}

/// Puts the waiting jobs there by SQL, with their prompts and first events.
async fn fill(database: &Database, store: &Store, claimant: &Claimant, kind: Waiting, waiting: u64) {
    let (key, columns, values) = match kind {
        Waiting::Own => (KEY, "", ""),
        Waiting::Capped => (OTHER, "", ""),
        Waiting::Delayed => (KEY, ", hold, run_after", ", 'delay', 4000000000000000 + i"),
        Waiting::Grouped => (
            KEY,
            ", group_key, hold",
            ", 'k:busy', case i when 1 then '' else 'order' end",
        ),
    };
    database
        .execute(&format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {waiting})
             insert into job (job_id, key_id, kind, max_attempts, on_worker_lost, max_cost, metadata, created_at,
               last_event_seq{columns})
             select 'job_' || substr('{ZEROS}' || i, length(cast(i as text)) + 1), '{key}', 'job', 3, 'resume', 1000000, '{{}}', i, 1{values} from n"
        ))
        .await;
    for sql in [
        "insert into prompt (job_id, message, options) select job_id, 'Say hello.', '{}' from job",
        "insert into event (job_id, seq, event_type, at, data)
         select job_id, 1, 'status', 0, '{\"attempt\":0,\"status\":\"queued\"}' from job",
    ] {
        database.execute(sql).await;
    }
    match kind {
        Waiting::Own => drop(
            database
                .execute("update lane set top_priority = 0 where key_id = 'key_measured'")
                .await,
        ),
        Waiting::Capped => {
            database
                .execute("update lane set top_priority = 10, running = 1 where key_id = 'key_other'")
                .await;
        }
        Waiting::Grouped => {
            // The head runs as long as the measuring goes on.
            database
                .execute("update lane set top_priority = 0 where key_id = 'key_measured'")
                .await;
            let head = claim(store, claimant, clock::now()).await;
            assert_eq!(head.job.group_key.as_deref(), Some("k:busy"));
        }
        Waiting::Delayed => {}
    }
    if database.db() == Db::Postgres {
        database.execute("analyze").await;
        database.execute("checkpoint").await;
    }
}

fn job(key_id: &KeyId, now: Timestamp) -> NewJob {
    NewJob {
        job_id: JobId::new(),
        key_id: key_id.clone(),
        kind: JobKind::Job,
        message: "Say hello.".repeat(20),
        options: RunOptions::default(),
        session_id: None,
        concurrency_key: None,
        priority: 0,
        run_after: None,
        deadline_at: None,
        max_attempts: 3,
        on_worker_lost: OnWorkerLost::Resume,
        model: None,
        effort: None,
        permission_mode: None,
        max_turns: None,
        timeout_seconds: None,
        max_cost: MicroUsd(1_000_000),
        webhook_url: None,
        webhook_events: "completed".to_owned(),
        custom_id: None,
        metadata: json!({}),
        created_at: now,
    }
}

fn report() -> Report {
    Report {
        ending: Ending::Done,
        result: Some(json!({ "result": "Hello." })),
        spend: Spend::default(),
        duration: Duration::from_millis(100),
        turns: 1,
        claude_session_id: None,
        stderr_tail: String::new(),
        exit: "exit 0".to_owned(),
        events: Vec::new(),
    }
}
