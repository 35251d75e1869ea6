//! `make bench`: requests a second to a running API with 1, 16 and 64 clients on each database, beside a raw reference
//! of the same minute: one-row transactions for submissions, `/livez` for reads. With `--former DIR` the binaries of
//! another release in that folder are measured in turn with these, and both stand in one table.
//!
//! Each release is measured by a child of this program, so that nothing of one is left when the other begins. Clients,
//! API and database share the machine. Run it in the release profile; every part ends by itself.

#![expect(clippy::print_stdout, reason = "the tables are the point")]
#![expect(clippy::cast_precision_loss, reason = "counts and times far below 2^53")]

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{Connection as _, Executor as _};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tests::database::{Database, Db};
use tests::system::{KEYS, System};
use tests::{paths, script};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// How long each row is measured.
const MEASURED: Duration = Duration::from_secs(3);
/// How many clients ask at once, each over a connection of its own.
const CLIENTS: [usize; 3] = [1, 16, 64];
/// Jobs that have ended before reads are measured.
const ENDED: usize = 40;
/// How often each release is measured; the median counts.
const ROUNDS: usize = 3;

/// One row of the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    database: String,
    work: String,
    clients: usize,
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Processor time of the API for each request, in milliseconds; not known for what isn't the API's.
    cpu_ms: Option<f64>,
    /// Answers of another status than the wanted one.
    refused: u64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--measure"] => {
            let rows = runtime.block_on(measure());
            println!("{}", serde_json::to_string(&rows).expect("rows are JSON"));
        }
        [] => print(&rounds(&paths::binaries(), None)),
        ["--former", folder] => print(&rounds(&paths::binaries(), Some(Path::new(folder)))),
        _ => panic!("usage: bench-http [--former FOLDER_OF_BINARIES]"),
    }
}

/// The rows of this release and of the former one, of all rounds.
fn rounds(this: &Path, former: Option<&Path>) -> Vec<(Row, Option<Row>)> {
    let (mut new, mut old) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        new.push(child(this));
        old.extend(former.map(child));
    }
    let old = (!old.is_empty()).then(|| medians(&old));
    medians(&new)
        .into_iter()
        .enumerate()
        .map(|(index, row)| (row, old.as_ref().map(|old| old[index].clone())))
        .collect()
}

fn child(binaries: &Path) -> Vec<Row> {
    let exe = std::env::current_exe().expect("a running program has a path");
    let output = Command::new(exe)
        .arg("--measure")
        .env(paths::BINARIES, binaries)
        .stderr(std::process::Stdio::inherit())
        .output()
        .expect("this program starts again");
    assert!(output.status.success(), "the measurement failed");
    serde_json::from_slice(&output.stdout).expect("rows of ours")
}

/// Of each row the round whose rate is in the middle.
fn medians(rounds: &[Vec<Row>]) -> Vec<Row> {
    let rows = rounds[0].len();
    (0..rows)
        .map(|row| {
            let mut all: Vec<Row> = rounds.iter().map(|round| round[row].clone()).collect();
            all.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
            all.swap_remove(all.len() / 2)
        })
        .collect()
}

fn print(rows: &[(Row, Option<Row>)]) {
    println!("# Requests to the API; clients, API and database on this machine, median of {ROUNDS} rounds\n");
    println!(
        "| database | work | clients | a second | p50 ms | p99 ms | API's CPU, ms | refused | former release, a second | p99 ms | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (row, former) in rows {
        let cpu = row.cpu_ms.map_or_else(String::new, |cpu| format!("{cpu:.3}"));
        let former = former.as_ref().map_or_else(
            || "| |".to_owned(),
            |former| {
                format!(
                    "{:.0} | {:.1} | {:.2}",
                    former.per_second,
                    former.p99_ms,
                    row.per_second / former.per_second
                )
            },
        );
        println!(
            "| {} | {} | {} | {:.0} | {:.2} | {:.1} | {cpu} | {} | {former} |",
            row.database, row.work, row.clients, row.per_second, row.p50_ms, row.p99_ms, row.refused
        );
    }
}

async fn measure() -> Vec<Row> {
    let mut rows = Vec::new();
    for db in [Db::Sqlite, Db::Postgres] {
        raw(db, &mut rows).await;
        product(db, &mut rows).await;
    }
    rows
}

/// What a submission is compared with: transactions that insert one small row, with the settings for the disk that the
/// product has.
async fn raw(db: Db, rows: &mut Vec<Row>) {
    const TABLE: &str = "create table row (id bigint primary key, text text not null)";
    const INSERT: &str =
        "insert into row values ($1, 'a row of about the length that a short job has in its table')";
    let database = Database::empty(db, &paths::folder('b')).await;
    let next = Arc::new(AtomicU64::new(0));
    match db {
        Db::Sqlite => {
            // SQLite has one writer, so one connection is the fastest.
            let options: sqlx::sqlite::SqliteConnectOptions = database.url().parse().expect("a URL of ours");
            let options = options
                .create_if_missing(true)
                .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
                .synchronous(sqlx::sqlite::SqliteSynchronous::Full);
            let mut connection = sqlx::SqliteConnection::connect_with(&options)
                .await
                .expect("the file opens");
            connection.execute(TABLE).await.expect("an empty database");
            let mut times = Vec::new();
            let began = Instant::now();
            while began.elapsed() < MEASURED {
                let asked = Instant::now();
                let id = i64::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap_or(i64::MAX);
                let insert = sqlx::query(INSERT).bind(id);
                insert.execute(&mut connection).await.expect("a row");
                times.push(asked.elapsed());
            }
            rows.push(row(
                db,
                "raw one-row transaction",
                1,
                began.elapsed(),
                times,
                None,
                0,
            ));
        }
        Db::Postgres => {
            let pool = sqlx::postgres::PgPoolOptions::new().max_connections(16);
            let pool = pool.connect(database.url()).await.expect("the database answers");
            pool.execute(TABLE).await.expect("an empty database");
            for clients in CLIENTS {
                let (began, mut tasks) = (Instant::now(), JoinSet::new());
                for _ in 0..clients {
                    let (pool, next) = (pool.clone(), next.clone());
                    tasks.spawn(async move {
                        let mut times = Vec::new();
                        while began.elapsed() < MEASURED {
                            let asked = Instant::now();
                            let id = i64::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap_or(i64::MAX);
                            let insert = sqlx::query(INSERT).bind(id);
                            insert.execute(&pool).await.expect("a row");
                            times.push(asked.elapsed());
                        }
                        times
                    });
                }
                let times = tasks.join_all().await.concat();
                rows.push(row(
                    db,
                    "raw one-row transaction",
                    clients,
                    began.elapsed(),
                    times,
                    None,
                    0,
                ));
            }
        }
    }
}

/// A request that is asked again and again.
#[derive(Clone)]
struct Asked {
    work: &'static str,
    method: Method,
    path: String,
    key: Option<&'static str>,
    etag: Option<String>,
    body: Bytes,
    wanted: StatusCode,
}

impl Asked {
    fn get(work: &'static str, path: impl Into<String>, key: Option<&'static str>) -> Self {
        Self {
            work,
            method: Method::GET,
            path: path.into(),
            key,
            etag: None,
            body: Bytes::new(),
            wanted: StatusCode::OK,
        }
    }

    fn request(&self, host: &str) -> Request<Full<Bytes>> {
        let mut request = Request::builder()
            .method(self.method.clone())
            .uri(&self.path)
            .header("host", host);
        if let Some(key) = self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        if let Some(etag) = &self.etag {
            request = request.header("if-none-match", etag);
        }
        if !self.body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        request
            .body(Full::new(self.body.clone()))
            .expect("a request of ours")
    }
}

async fn product(db: Db, rows: &mut Vec<Row>) {
    let mut system = System::builder()
        .database(db)
        .sandbox(false)
        .env("LOG_LEVEL", "error")
        .env("MAX_QUEUED_JOBS_PER_KEY", "100000000")
        .env("MAX_QUEUED_JOBS", "100000000")
        .start()
        .await;
    let client = system.client();
    let mut last = String::new();
    for _ in 0..ENDED {
        last = client.play(&script::steps([])).await;
        client.finished(&last).await;
    }
    let answer = client.job(&last).await;
    let etag = answer.header("etag").to_owned();
    system.worker(0).stop(Duration::from_secs(30)).await;

    let job = format!("/api/v1/jobs/{last}");
    let finished = Asked::get("GET of a finished job", job, Some(KEYS[0]));
    let unchanged = Asked {
        work: "the same, 304",
        etag: Some(etag),
        wanted: StatusCode::NOT_MODIFIED,
        ..finished.clone()
    };
    let submit = Asked {
        work: "submit",
        method: Method::POST,
        path: "/api/v1/jobs".to_owned(),
        key: Some(KEYS[0]),
        etag: None,
        body: json!({ "message": "Say hello, and nothing else." })
            .to_string()
            .into(),
        wanted: StatusCode::ACCEPTED,
    };
    let all = [
        Asked::get("/livez", "/livez", None),
        finished,
        unchanged,
        Asked::get("list of 20", "/api/v1/jobs?limit=20", Some(KEYS[0])),
        Asked::get(
            "list of 20, administrator",
            "/api/v1/jobs?limit=20",
            Some(KEYS[2]),
        ),
        Asked::get("usage", "/api/v1/usage", Some(KEYS[0])),
        // Last: its rows are in the way of the reads.
        submit,
    ];
    let url = system.api(0).url();
    let pid = system.api(0).pid().expect("the API runs");
    for asked in all {
        for clients in CLIENTS {
            rows.push(ask(db, &url, pid, &asked, clients).await);
        }
    }
}

async fn ask(db: Db, url: &str, pid: i32, asked: &Asked, clients: usize) -> Row {
    let host = url.trim_start_matches("http://").to_owned();
    let refused = Arc::new(AtomicU64::new(0));
    let mut connections = Vec::new();
    for _ in 0..clients {
        connections.push(connect(&host).await);
    }
    let (before, began, mut tasks) = (cpu(pid), Instant::now(), JoinSet::new());
    for mut sender in connections {
        let (asked, host, refused) = (asked.clone(), host.clone(), refused.clone());
        tasks.spawn(async move {
            let mut times = Vec::new();
            while began.elapsed() < MEASURED {
                let sent = Instant::now();
                sender.ready().await.expect("the connection is kept");
                let answer = sender
                    .send_request(asked.request(&host))
                    .await
                    .expect("an answer comes");
                let status = answer.status();
                answer.into_body().collect().await.expect("its body too");
                times.push(sent.elapsed());
                if status != asked.wanted {
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            }
            times
        });
    }
    let times = tasks.join_all().await.concat();
    let took = began.elapsed();
    let used = (cpu(pid) - before) / times.len().max(1) as f64;
    row(
        db,
        asked.work,
        clients,
        took,
        times,
        Some(used),
        refused.load(Ordering::Relaxed),
    )
}

async fn connect(host: &str) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(host).await.expect("the API listens");
    stream.set_nodelay(true).expect("a socket of ours");
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("HTTP/1.1");
    tokio::spawn(connection);
    sender
}

/// Processor time that a process has used, in milliseconds.
fn cpu(pid: i32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |index: usize| {
        fields
            .get(index)
            .and_then(|ticks| ticks.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    // User and system time, in hundredths of a second.
    (ticks(11) + ticks(12)) * 10.0
}

fn row(
    db: Db,
    work: &str,
    clients: usize,
    took: Duration,
    mut times: Vec<Duration>,
    cpu_ms: Option<f64>,
    refused: u64,
) -> Row {
    times.sort();
    let at = |percent: usize| {
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    Row {
        database: format!("{db:?}"),
        work: work.to_owned(),
        clients,
        per_second: times.len() as f64 / took.as_secs_f64(),
        p50_ms: at(50),
        p99_ms: at(99),
        cpu_ms,
        refused,
    }
}
