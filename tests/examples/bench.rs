//! `make bench`: measures the built binaries and prints a table. Latency from POST to the CLI's first sign of life,
//! jobs a second beside a queue library that does nothing and beside the CLI alone, how long it takes until a killed
//! worker's job is run by another, a real job beside a bare `claude -p`, memory at rest.
//!
//! Run it in the release profile, on a machine that does nothing else; every part ends by itself.

#![expect(clippy::print_stdout, reason = "the tables are the point")]

use apalis::layers::WorkerBuilderExt;
use apalis::prelude::*;
use apalis_postgres::PostgresStorage;
use apalis_sqlite::SqliteStorage;
use futures_util::StreamExt as _;
use serde_json::json;
use simulator::Simulator;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tests::database::{Database, Db};
use tests::script::{self, Script, Step};
use tests::system::{Builder, Cli, System, real_claude};
use tests::{paths, trace};
use tokio::io::AsyncWriteExt as _;

const JOBS: usize = 200;
const REAL_JOBS: usize = 10;
const LEASE: u64 = 5;
const KILLS: usize = 3;

#[tokio::main]
async fn main() {
    println!("# Latency: POST to the CLI's first sign of life, one job at a time ({JOBS} jobs)\n");
    println!("| set-up | p50 ms | p99 ms | memory at rest, MB |");
    println!("|---|---|---|---|");
    for (name, builder) in set_ups() {
        latency(name, builder).await;
    }
    println!(
        "\n# Throughput: jobs a second through a CLI that only answers, without a sandbox, all submitted before the worker starts\n"
    );
    println!(
        "| database | slots | jobs/s | queue library alone, tasks/s | CLI alone, runs/s | POST to start at half that \
         rate, p50 / p99 ms |"
    );
    println!("|---|---|---|---|---|---|");
    for db in [Db::Sqlite, Db::Postgres] {
        for slots in [1, 8, 64] {
            throughput(db, slots).await;
        }
    }
    println!(
        "\n# Recovery: from `kill -9` of a worker to its job's next run in another, leases of {LEASE} s\n"
    );
    println!("| database | s, each of {KILLS} |");
    println!("|---|---|");
    for db in [Db::Sqlite, Db::Postgres] {
        recovery(db).await;
    }
    println!("\n# A job of the real CLI beside a bare `claude -p` ({REAL_JOBS} runs each, in turn)\n");
    println!("| run | median ms | over the bare CLI, ms |");
    println!("|---|---|---|");
    real().await;
}

fn set_ups() -> Vec<(String, Builder)> {
    let quiet = |db| System::builder().database(db).env("LOG_LEVEL", "warn");
    let mut all = Vec::new();
    for (sandbox, word) in [(false, "no sandbox"), (true, "sandbox")] {
        for (name, builder) in [
            ("`claude-queue up`, SQLite", quiet(Db::Sqlite).up()),
            ("API and worker, SQLite", quiet(Db::Sqlite)),
            ("API and worker, PostgreSQL", quiet(Db::Postgres)),
        ] {
            all.push((format!("{name}, {word}"), builder.sandbox(sandbox)));
        }
    }
    all
}

async fn latency(name: String, builder: Builder) {
    let mut system = builder.start().await;
    let client = system.client();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let memory: Vec<String> = system
        .processes()
        .iter()
        .filter_map(|process| process.pid())
        .map(memory)
        .collect();
    let mut waits = Vec::new();
    for number in 0..JOBS {
        let script = Script {
            trace: Some(format!("job{number}")),
            ..Script::default()
        };
        let asked = trace::now();
        let job = client.play(&script).await;
        client.finished(&job).await;
        let first = system.runs(&job).first().expect("the run wrote its trace").first;
        waits.push(millis(first - asked));
    }
    println!(
        "| {name} | {:.1} | {:.1} | {} |",
        percentile(&mut waits, 50),
        percentile(&mut waits, 99),
        memory.join(" + ")
    );
}

/// Resident memory in MB.
fn memory(pid: i32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kb = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next());
    kb.and_then(|kb| kb.parse::<f64>().ok())
        .map_or("?".to_owned(), |kb| format!("{:.1}", kb / 1024.0))
}

async fn throughput(db: Db, slots: usize) {
    let count: u32 = if slots == 1 { 100 } else { 300 };
    let raw = raw_library(db, slots).await;
    let bare = bare_runs(count, slots).await;
    let builder = System::builder()
        .database(db)
        .workers(0)
        .env("WORKER_CONCURRENCY", &slots.to_string())
        .env("KEY_MAX_RUNNING_JOBS", "1000")
        .sandbox(false)
        .env("LOG_LEVEL", "warn");
    let mut system = builder.start().await;
    let client = system.client();
    let mut jobs = Vec::new();
    for number in 0..count {
        jobs.push(
            client
                .play(&Script {
                    trace: Some(format!("job{number}")),
                    ..Script::default()
                })
                .await,
        );
    }
    system.add_worker().await;
    let began = Instant::now();
    for job in &jobs {
        client.finished(job).await;
    }
    let rate = f64::from(count) / began.elapsed().as_secs_f64();

    let mut waits = Vec::new();
    let pause = Duration::from_secs_f64(1.0 / (rate * 0.5));
    let mut asked = Vec::new();
    for number in 0..100 {
        let at = trace::now();
        let job = client
            .play(&Script {
                trace: Some(format!("wait{number}")),
                ..Script::default()
            })
            .await;
        asked.push((job, at));
        tokio::time::sleep(pause).await;
    }
    for (job, at) in asked {
        client.finished(&job).await;
        waits.push(millis(
            system.runs(&job).first().expect("the run wrote its trace").first - at,
        ));
    }
    let (p50, p99) = (percentile(&mut waits, 50), percentile(&mut waits, 99));
    println!("| {db:?} | {slots} | {rate:.0} | {raw:.0} | {bare:.0} | {p50:.1} / {p99:.1} |");
}

/// Runs a second of the CLI that only answers, without a queue and without a guard.
async fn bare_runs(count: u32, slots: usize) -> f64 {
    let home = paths::folder('b');
    let began = Instant::now();
    futures_util::stream::iter(0..count)
        .for_each_concurrent(slots, |_| async {
            let mut child = tokio::process::Command::from(claude(&paths::binary("fake-claude"), &home, ""))
                .spawn()
                .expect("the CLI starts");
            let mut stdin = child.stdin.take().expect("a pipe");
            stdin.write_all(hello().as_bytes()).await.expect("the CLI reads");
            drop(stdin);
            child.wait_with_output().await.expect("the CLI ends");
        })
        .await;
    f64::from(count) / began.elapsed().as_secs_f64()
}

async fn recovery(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(2)
        .env("LEASE_SECONDS", &LEASE.to_string())
        .env("LOG_LEVEL", "error")
        .start()
        .await;
    let client = system.client();
    let mut seconds = Vec::new();
    for _ in 0..KILLS {
        let job = client
            .play(&Script {
                runs: vec![
                    script::steps([Step::Say("here".to_owned()), Step::Hang]).traced("first"),
                    Script::default().traced("second"),
                ],
                ..Script::default()
            })
            .await;
        client.event(&job, "assistant").await;
        let index = system.running_worker(&job).await;
        let killed = trace::now();
        system.worker(index).kill();
        client.finished(&job).await;
        let next = system.runs(&job).last().expect("a run wrote its trace").first;
        seconds.push(format!("{:.1}", millis(next - killed) / 1e3));
        system.worker(index).start().await;
    }
    println!("| {db:?} | {} |", seconds.join(", "));
}

async fn nothing(_: u64, done: Data<Arc<AtomicUsize>>) -> Result<(), BoxDynError> {
    done.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// Tasks a second of the queue library with the same batch and concurrency and a handler that does nothing.
async fn raw_library(db: Db, slots: usize) -> f64 {
    const TASKS: usize = 1_000;
    let folder = paths::folder('b');
    let database = Database::empty(db, &folder).await;
    let done = Arc::new(AtomicUsize::new(0));
    macro_rules! run {
        ($storage:expr) => {{
            let mut storage = $storage;
            for task in 0..TASKS {
                storage.push(task as u64).await.expect("a task is pushed");
            }
            let worker = WorkerBuilder::new("raw")
                .backend(storage)
                .concurrency(slots)
                .data(done.clone())
                .build(nothing);
            let running = tokio::spawn(worker.run());
            while done.load(Ordering::Relaxed) == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let (before, began) = (done.load(Ordering::Relaxed), Instant::now());
            let limit = Duration::from_mins(1);
            while done.load(Ordering::Relaxed) < TASKS && began.elapsed() < limit {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let did = done.load(Ordering::Relaxed) - before;
            running.abort();
            f64::from(u32::try_from(did).unwrap_or(0)) / began.elapsed().as_secs_f64()
        }};
    }
    match db {
        Db::Sqlite => {
            let options: sqlx::sqlite::SqliteConnectOptions = database.url().parse().expect("a URL of ours");
            let options = options
                .create_if_missing(true)
                .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
                .synchronous(sqlx::sqlite::SqliteSynchronous::Full)
                .busy_timeout(Duration::from_secs(5));
            let pool = sqlx::SqlitePool::connect_with(options)
                .await
                .expect("the file opens");
            SqliteStorage::<()>::migrations()
                .run(&pool)
                .await
                .expect("the library's tables");
            let config = apalis_sqlite::Config::default().batch_size(1);
            run!(SqliteStorage::<u64>::new(&pool).with_config(config))
        }
        Db::Postgres => {
            let pool = sqlx::PgPool::connect(database.url())
                .await
                .expect("the database answers");
            PostgresStorage::<()>::setup(&pool)
                .await
                .expect("the library's tables");
            let config = apalis_postgres::Config::default().batch_size(1);
            run!(PostgresStorage::<u64>::new(&pool).with_config(config))
        }
    }
}

async fn real() {
    let simulator = Simulator::start(([127, 0, 0, 1], 0).into())
        .await
        .expect("the simulator starts");
    let system = |sandbox: bool| {
        System::builder()
            .cli(Cli::Real)
            .sandbox(sandbox)
            .env("LOG_LEVEL", "warn")
            .start()
    };
    let (boxed, open) = (system(true).await, system(false).await);
    let (mut bare, mut in_box, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REAL_JOBS {
        let url = simulator.url();
        let alone = tokio::task::spawn_blocking(move || bare_claude(&url));
        bare.push(alone.await.expect("it was measured"));
        for (system, times) in [(&boxed, &mut in_box), (&open, &mut without)] {
            let began = Instant::now();
            let job = system.client().accepted("hello").await;
            system.client().finished(&job).await;
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    let base = percentile(&mut bare, 50);
    println!("| `claude -p` | {base:.0} | |");
    for (name, times) in [("job, sandbox", &mut in_box), ("job, no sandbox", &mut without)] {
        let median = percentile(times, 50);
        println!("| {name} | {median:.0} | {:+.0} |", median - base);
    }
}

/// The wall time of the CLI alone, in the form that jobs use it.
fn bare_claude(url: &str) -> f64 {
    let home = paths::folder('b');
    let began = Instant::now();
    let mut child = claude(&real_claude(), &home, url)
        .spawn()
        .expect("the CLI starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(hello().as_bytes()).expect("the CLI reads");
    drop(stdin);
    child.wait_with_output().expect("the CLI ends");
    began.elapsed().as_secs_f64() * 1e3
}

fn claude(program: &Path, home: &Path, url: &str) -> Command {
    let mut command = Command::new(program);
    command
        .args([
            "-p",
            "--input-format=stream-json",
            "--output-format=stream-json",
            "--verbose",
            "--model=sonnet",
        ])
        .env_clear()
        .envs([
            ("PATH", "/usr/bin:/bin"),
            ("ANTHROPIC_API_KEY", "sim-default"),
            ("ANTHROPIC_BASE_URL", url),
            ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"),
        ])
        .env("HOME", home)
        .current_dir(home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

fn hello() -> String {
    json!({ "type": "user", "message": { "role": "user", "content": "hello" } }).to_string() + "\n"
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn millis(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}

/// The value below which so many percent lie.
fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * percent / 100).min(values.len() - 1)]
}
