//! Opening, migrating, and that the two schemas are one.

use super::{World, job, open};
use shared::storage::{DatabaseUrl, Store};
use sqlx::{AssertSqlSafe, Connection, Executor, SqliteConnection};
use std::collections::BTreeSet;
use tests::database::{Database, Db};
use tests::paths;

tests::both!(
    a_database_opens_again,
    six_that_open_an_empty_database_at_once_all_succeed,
    a_transaction_that_is_dropped_leaves_no_trace,
    a_database_keeps_its_name
);
tests::once!(
    both_databases_have_the_same_tables,
    a_file_of_another_program_is_refused_and_left_as_it_is,
);

async fn a_database_opens_again(db: Db) {
    let database = Database::empty(db, &paths::folder('s')).await;

    open(database.url()).await.close().await;
    let store = open(database.url()).await;

    store.ping().await.unwrap();
    assert_eq!(database.number("select count(*) from queue").await, 1);
}

async fn six_that_open_an_empty_database_at_once_all_succeed(db: Db) {
    let database = Database::empty(db, &paths::folder('s')).await;

    let opened: Vec<_> = (0..6)
        .map(|_| {
            let url = database.url().to_owned();
            tokio::spawn(async move { open(&url).await })
        })
        .collect();

    for store in opened {
        store.await.unwrap().ping().await.unwrap();
    }
    assert_eq!(database.number("select count(*) from queue").await, 1);
}

async fn a_transaction_that_is_dropped_leaves_no_trace(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;

    let mut tx = world.store.begin().await.unwrap();
    tx.insert_job(&job(&key)).await.unwrap();
    drop(tx);

    world.store.begin().await.unwrap().commit().await.unwrap();
    assert_eq!(world.number("select count(*) from job").await, 0);
}

async fn a_database_keeps_its_name(db: Db) {
    let world = World::new(db).await;
    let other = world.other().await;

    let name = world.store.instance_id().await.unwrap();

    assert_eq!(other.instance_id().await.unwrap(), name);
    assert_ne!(World::new(db).await.store.instance_id().await.unwrap(), name);
}

async fn both_databases_have_the_same_tables() {
    let (sqlite, postgres) = (World::new(Db::Sqlite).await, World::new(Db::Postgres).await);

    // A boolean is an integer on SQLite; all other integers have 64 bits on both. What PostgreSQL doesn't log is in a file
    // of its own on SQLite.
    let columns = sqlite
        .database
        .texts(
            "select m.name || '.' || c.name || ' ' || lower(c.type) || case c.\"notnull\" when 1 then ' not null' else '' end
             from sqlite_master as m join pragma_table_info(m.name) as c
             where m.type = 'table' and m.name not in ('migration', 'Jobs', 'Workers', '_sqlx_migrations', 'sqlite_sequence')
               and not (c.pk > 0 and lower(c.type) = 'integer' and c.\"notnull\" = 0)
             union all
             select m.name || '.' || c.name || ' integer not null'
             from sqlite_master as m join pragma_table_info(m.name) as c
             where m.type = 'table' and m.name not in ('migration', '_sqlx_migrations')
               and c.pk > 0 and lower(c.type) = 'integer' and c.\"notnull\" = 0",
        )
        .await;
    let theirs = postgres
        .database
        .texts(
            "select table_name || '.' || column_name || ' '
               || case data_type when 'bigint' then 'integer' when 'boolean' then 'integer' else data_type end
               || case is_nullable when 'NO' then ' not null' else '' end
             from information_schema.columns
             where table_schema = 'public' and table_name not in ('migration', 'rate_limit', 'open_stream')",
        )
        .await;
    assert!(columns.len() > 100, "{columns:?}");
    assert_same(&columns, &theirs);

    let indexes = sqlite
        .database
        .texts(
            "select tbl_name || '.' || name from sqlite_master
             where type = 'index' and name not like 'sqlite_autoindex%' and tbl_name not in ('Jobs', 'Workers')",
        )
        .await;
    let theirs = postgres
        .database
        .texts(
            "select tablename || '.' || indexname from pg_indexes
             where schemaname = 'public' and indexname not in (select conname from pg_constraint)
               and tablename not in ('rate_limit', 'open_stream')",
        )
        .await;
    assert_same(&indexes, &theirs);

    let sql = "select cast(version as text) || ' ' || description from migration order by version";
    assert_eq!(
        sqlite.database.texts(sql).await,
        postgres.database.texts(sql).await
    );
}

fn assert_same(sqlite: &[String], postgres: &[String]) {
    let (sqlite, postgres): (BTreeSet<_>, BTreeSet<_>) = (sqlite.iter().collect(), postgres.iter().collect());
    let only = |a: &BTreeSet<&String>, b: &BTreeSet<&String>| {
        a.difference(b).map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(
        sqlite == postgres,
        "only on SQLite: {:?}; only on PostgreSQL: {:?}",
        only(&sqlite, &postgres),
        only(&postgres, &sqlite)
    );
}

async fn a_file_of_another_program_is_refused_and_left_as_it_is() {
    for (tables, log, sentence) in [
        (&["sessions", "messages", "jobs"][..], false, "Python service"),
        (&["sessions", "messages", "jobs"], true, "Python service"),
        (&["notes"], false, "another program"),
    ] {
        let folder = paths::folder('s');
        let file = folder.join("sessions.db");
        let mode = if log { "wal" } else { "delete" };
        let mut connection = SqliteConnection::connect(&format!("sqlite://{}?mode=rwc", file.display()))
            .await
            .unwrap();
        let pragma = format!("pragma journal_mode = {mode}");
        connection.execute(AssertSqlSafe(pragma)).await.unwrap();
        for table in tables {
            let sql = format!("create table {table} (id integer primary key)");
            connection.execute(AssertSqlSafe(sql)).await.unwrap();
        }
        // With a log, the other program is still at work.
        let connection = if log {
            Some(connection)
        } else {
            connection.close().await.unwrap();
            None
        };
        let content = || {
            let mut files = std::fs::read_dir(&folder)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| !path.to_string_lossy().ends_with("-shm"))
                .map(|path| (path.clone(), std::fs::read(path).unwrap()))
                .collect::<Vec<_>>();
            files.sort();
            files
        };
        let before = content();

        let url = DatabaseUrl::parse(&format!("sqlite+aiosqlite:///{}", file.display())).unwrap();
        let error = Store::open(&url, 1).await.unwrap_err();

        let error = shared::telemetry::chain(&error);
        assert!(
            error.contains(sentence) && error.contains("DATABASE_URL"),
            "{error}"
        );
        assert_eq!(content(), before);
        drop(connection);
    }
}
