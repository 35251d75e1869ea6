//! `make bench`: how long reads take beside an empty table when there are 300,000 ended and 50,000 waiting jobs, and how
//! long another key's read takes while one key asks for its usage as fast as it can.

#![expect(clippy::print_stdout, reason = "the table is the point")]
#![expect(clippy::unwrap_used, reason = "a benchmark that can't measure stops")]

use std::time::{Duration, Instant};
use tests::client::Client;
use tests::database::{Database, Db};
use tests::system::{KEYS, System};

const ENDED: i64 = 300_000;
const WAITING: i64 = 50_000;
/// Requests for each figure.
const REQUESTS: usize = 40;
/// How long the API gets to count what was filled in.
const COUNTING: Duration = Duration::from_mins(1);

const PATHS: &[(&str, bool)] = &[
    ("usage", false),
    ("jobs", false),
    ("jobs?status=queued", false),
    ("jobs?status=running", false),
    ("jobs?status=done", false),
    ("jobs?status=failed", false),
    ("jobs?status=cancelled", false),
    ("jobs?status=failed,cancelled", false),
    ("jobs?kind=chat", false),
    ("jobs?kind=all", false),
    ("jobs?custom_id=rare", false),
    ("jobs?order=asc", false),
    ("jobs?created_before=1970-01-02T00:00:00Z", false),
    ("usage/ledger", false),
    ("usage/ledger?group_by=day", false),
    ("usage/ledger?group_by=model", false),
    ("usage/ledger?group_by=session", false),
    ("sessions", false),
    ("jobs", true),
    ("jobs?status=running", true),
    ("jobs?status=failed", true),
    ("jobs?status=cancelled", true),
    ("jobs?custom_id=rare", true),
    ("jobs?kind=chat", true),
    ("usage/ledger?group_by=day", true),
    ("usage/ledger?group_by=key", true),
    ("audit?kind=admin", true),
    ("keys", true),
];

#[tokio::main]
async fn main() {
    for db in [Db::Sqlite, Db::Postgres] {
        let (empty, full) = (start(db).await, start(db).await);
        let owner = empty_key(&full).await;
        fill(full.database(), &owner).await;
        tokio::time::sleep(COUNTING).await;
        println!("\n# Reads, p50 in ms: {db:?}, empty and with {ENDED} ended and {WAITING} waiting jobs\n");
        println!("| read | empty | full |");
        println!("|---|---|---|");
        for (path, admin) in PATHS {
            let key = if *admin { KEYS[2] } else { KEYS[0] };
            let name = if *admin { "admin: " } else { "" };
            let before = median(&empty.client().with_key(key), path).await;
            let after = median(&full.client().with_key(key), path).await;
            println!("| {name}`{path}` | {before:.1} | {after:.1} |");
        }
        let alone = median(&full.client().with_key(KEYS[1]), "jobs").await;
        let greedy: Vec<_> = (0..24)
            .map(|_| {
                let client = full.client().with_key(KEYS[0]);
                tokio::spawn(async move {
                    loop {
                        client.get("/api/v1/usage").await;
                    }
                })
            })
            .collect();
        let beside = median(&full.client().with_key(KEYS[1]), "jobs").await;
        greedy.iter().for_each(tokio::task::JoinHandle::abort);
        println!("| another key's `jobs` beside 24 clients on `usage` | {alone:.1} (alone) | {beside:.1} |");
    }
}

async fn start(db: Db) -> System {
    System::builder()
        .database(db)
        .workers(0)
        .env("LOG_LEVEL", "warn")
        .env("RATE_LIMIT_READ_REQUESTS", "1000000")
        .start()
        .await
}

async fn empty_key(system: &System) -> String {
    let me = system.client().with_key(KEYS[0]).get("/api/v1/keys/me").await;
    me.data(200)["id"].as_str().unwrap().to_owned()
}

/// The median of some requests, one after the other, in milliseconds.
async fn median(client: &Client, path: &str) -> f64 {
    let path = format!("/api/v1/{path}");
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let began = Instant::now();
        let answer = client.get(&path).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        times.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    times[REQUESTS / 2]
}

/// Ended jobs of one key over 30 days, each with its attempt and its cost, and after them those that wait. Few are chats,
/// failed, cancelled or named.
async fn fill(database: &Database, key: &str) {
    let all = ENDED + WAITING;
    let month = 30 * 86_400_000_000_i64;
    let now = shared_now();
    let numbers = format!("with recursive n (i) as (select 1 union all select i + 1 from n where i < {all})");
    let at = format!("({now} - {month} + cast(i as bigint) * ({month} / {all}))");
    for sql in [
        format!(
            "insert into job (job_id, key_id, kind, status, custom_id, max_attempts, on_worker_lost, max_cost, metadata,
               created_at, completed_at)
             select 'job_' || substr('00000000000000000000000000000000' || i, -32), '{key}',
               case when i = 70000 then 'chat' else 'job' end,
               case when i > {ENDED} then 'queued' when i % 100000 = 17 then 'failed'
                 when i % 100000 = 18 then 'cancelled' else 'done' end,
               case when i = 1000 then 'rare' end, 3, 'resume', 1, '{{}}', {at},
               case when i <= {ENDED} then {at} end
             from n"
        ),
        "insert into attempt (job_id, attempt, worker_id, claude_session_id, reserved, started_at, turns)
         select job_id, 1, 'w', 's', 0, created_at, 2 from job where status <> 'queued'"
            .to_owned(),
        "insert into ledger (at, key_id, job_id, attempt, model, cost)
         select completed_at, key_id, job_id, 1, 'claude-haiku-5-5', 10000 from job where status <> 'queued'"
            .to_owned(),
    ] {
        let sql = if sql.contains("from n") { format!("{numbers} {sql}") } else { sql };
        database.execute(&sql.replace("substr('00000000000000000000000000000000' || i, -32)", padded(database))).await;
    }
    if database.db() == Db::Postgres {
        database.execute("vacuum analyze").await;
    }
}

fn padded(database: &Database) -> &'static str {
    match database.db() {
        Db::Sqlite => "substr('00000000000000000000000000000000' || i, -32)",
        Db::Postgres => "lpad(cast(i as text), 32, '0')",
    }
}

/// Microseconds since 1970.
fn shared_now() -> i64 {
    shared::clock::now().0
}
