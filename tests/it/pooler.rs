//! `PgBouncer` between the product and PostgreSQL.

use serde_json::json;
use tests::client::at_once;
use tests::database::{Database, Db};
use tests::pooler::Pooler;
use tests::script::{Step, steps};
use tests::system::{System, run};
use tests::{once, paths};

once!(
    jobs_run_through_a_pooler_in_session_mode,
    a_pooler_that_shares_sessions_stops_the_start
);

async fn jobs_run_through_a_pooler_in_session_mode() {
    let folder = paths::folder('q');
    let database = Database::fresh(Db::Postgres, &folder).await;
    let pooler = Pooler::before(&database, "session").await;
    let system = System::builder()
        .on(database)
        .env("DATABASE_URL", pooler.url())
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let script = steps([Step::Say("begun".to_owned()), Step::Sleep(500)]).answering("fine");

    let ids = at_once((0..6).map(|_| client.play(&script))).await;

    for job in at_once(ids.iter().map(|id| client.finished(id))).await {
        assert_eq!(job["status"], "done", "{job:#}");
    }
    // The session's own limit on waiting for locks is there: without it a claim would wait as long as this is held.
    let mut holder = system.database().postgres().await;
    let lock = sqlx::raw_sql("begin; lock table lane in exclusive mode");
    sqlx::Executor::execute(&mut holder, lock).await.unwrap();
    let refused = client.submit(&json!({ "message": "now?" })).await;
    refused.assert_problem(503, "unavailable");
    system.writes("canceling statement due to lock timeout").await;
    sqlx::Connection::close(holder).await.unwrap();
}

async fn a_pooler_that_shares_sessions_stops_the_start() {
    let folder = paths::folder('q');
    let database = Database::fresh(Db::Postgres, &folder).await;
    for mode in ["transaction", "statement"] {
        let pooler = Pooler::before(&database, mode).await;
        let data = folder.join("data");
        let env = [
            ("DATABASE_URL", pooler.url()),
            ("DATA_DIR", data.to_str().unwrap()),
            ("API_PORT", "0"),
            ("API_KEYS", tests::system::KEYS[0]),
        ];

        let finished = run("claude-queue-api", &[], &env).await;

        assert_eq!(finished.code, Some(1), "{mode}: {finished:?}");
        let said = finished.stderr;
        for part in ["PgBouncer", "pool_mode", "session", "DATABASE_URL", "6432"] {
            assert!(said.contains(part), "{mode}: {said}");
        }
    }
}
