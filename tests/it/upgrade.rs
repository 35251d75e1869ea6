//! A newer release of the same major version has changed the tables, while this one runs or before it starts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tests::both;
use tests::client::{Client, at_once};
use tests::database::{Database, Db};
use tests::script::{Step, steps};
use tests::system::{System, run};

both!(
    running_processes_do_not_notice_new_columns_and_tables,
    a_process_starts_beside_a_newer_schema,
    a_process_refuses_the_schema_of_another_major_release
);

/// What a later migration of the same major release may do.
async fn migrate_further(database: &Database) {
    for table in [
        "job",
        "prompt",
        "result",
        "attempt",
        "event",
        "session",
        "lane",
        "queue",
        "ledger",
        "budget",
        "idempotency",
        "api_key",
        "worker",
        "instance",
        "audit",
    ] {
        let text = match database.db() {
            Db::Sqlite => format!("alter table {table} add column later integer"),
            Db::Postgres => format!("alter table {table} add column later bigint"),
        };
        database.execute(&text).await;
    }
    let table = match database.db() {
        Db::Sqlite => "create table later (later_number integer primary key) strict",
        Db::Postgres => "create table later (later_number bigint primary key)",
    };
    database.execute(table).await;
    record_migration(database, 9_999).await;
}

async fn record_migration(database: &Database, version: i64) {
    let checksum = match database.db() {
        Db::Sqlite => "x'00'",
        Db::Postgres => "'\\x00'",
    };
    let row = format!(
        "insert into migration (version, description, success, checksum, execution_time)
         values ({version}, 'later', true, {checksum}, 0)"
    );
    database.execute(&row).await;
}

/// Submits, reads and lists until told to stop; the ids.
async fn use_it(client: &Client, enough: &AtomicBool) -> Vec<String> {
    let script = steps([Step::Say("begun".to_owned()), Step::Sleep(200)]).answering("fine");
    let mut ids = Vec::new();
    while !enough.load(Ordering::Relaxed) {
        let id = client.play(&script).await;
        client.job(&id).await.data(200);
        assert_eq!(client.jobs("limit=5").await.status, 200);
        assert_eq!(client.get("/api/v1/sessions").await.status, 200);
        assert_eq!(client.get("/api/v1/usage").await.status, 200);
        ids.push(id);
    }
    ids
}

async fn running_processes_do_not_notice_new_columns_and_tables(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    let enough = AtomicBool::new(false);

    let (ids, ()) = tokio::join!(
        async {
            let all = at_once((0..3).map(|_| use_it(&client, &enough))).await;
            all.concat()
        },
        async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            migrate_further(system.database()).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            enough.store(true, Ordering::Relaxed);
        }
    );

    for job in at_once(ids.iter().map(|id| client.finished(id))).await {
        assert_eq!(job["status"], "done", "{job:#}");
        assert_eq!(job["attempt"], 1, "{job:#}");
    }
    assert!(!system.written().contains("cached plan"));
}

async fn a_process_starts_beside_a_newer_schema(db: Db) {
    let mut system = System::builder().database(db).sandbox(false).start().await;
    migrate_further(system.database()).await;

    let api = system.add_api().await;
    system.add_worker().await;
    system.worker(0).kill();

    let client = system.client_of(api);
    let id = client.play(&steps([]).answering("fine")).await;
    assert_eq!(client.finished(&id).await["status"], "done");
}

async fn a_process_refuses_the_schema_of_another_major_release(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    record_migration(system.database(), 10_000).await;
    let url = system.database().url().to_owned();

    let finished = run(
        "claude-queue-api",
        &[],
        &[("DATABASE_URL", &url), ("API_PORT", "0")],
    )
    .await;

    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(finished.stderr.contains("newer major release"), "{finished:?}");
}
