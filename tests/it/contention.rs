//! Somebody else holds a lock of the database for long, or the database refuses what a run has said: what was paid for
//! is kept and booked.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use tests::client::{PATIENCE, at_once};
use tests::database::{Database, Db};
use tests::proxy::Proxy;
use tests::script::{Step, steps};
use tests::system::System;
use tests::{both, eventually, once};

once!(
    locks_lose_no_result,
    a_locked_queue_leaves_the_service_ready,
    locked_lanes_make_the_service_unready,
    connections_that_are_all_in_use_are_no_outage,
    many_clients_of_a_slow_database_are_no_outage,
    repeatable_reads_by_default_refuse_no_submission,
);
both!(
    a_result_that_is_refused_is_paid_all_the_same,
    events_that_are_refused_leave_a_gap
);

/// Longer than three lock time-outs, and than the lease.
const HELD: Duration = Duration::from_secs(22);

/// Holds a lock while the runs of several jobs end; they end as if nothing had been, and are paid once.
async fn runs_end_while(lock: &str) {
    let system = System::builder()
        .database(Db::Postgres)
        .sandbox(false)
        .env("LEASE_SECONDS", "15")
        .env("CLAUDE_MAX_COST_PER_USER", "50")
        .start()
        .await;
    let client = system.client();
    let script = steps([Step::Say("begun".to_owned()), Step::Sleep(2_000)])
        .then(Step::Say("more".to_owned()))
        .then(Step::Say("most".to_owned()))
        .answering("fine");
    let ids = at_once((0..4).map(|_| client.play(&script))).await;
    at_once(ids.iter().map(|id| client.event(id, "assistant"))).await;

    let mut holder: PgConnection = system.database().postgres().await;
    let sql = AssertSqlSafe(format!("begin; {lock}"));
    holder.execute(sqlx::raw_sql(sql)).await.unwrap();
    tokio::time::sleep(HELD).await;
    holder.close().await.unwrap();

    let database = system.database();
    for job in at_once(ids.iter().map(|id| client.finished(id))).await {
        assert_eq!(job["status"], "done", "{job:#}");
        assert_eq!(job["attempt"], 1, "{job:#}");
        assert_eq!(job["result"]["content"], "fine");
        let id = job["id"].as_str().unwrap();
        let booked = format!("select cast(sum(cost) as bigint) from ledger where job_id = '{id}'");
        let cost = format!("select cost from job where job_id = '{id}'");
        assert!(database.number(&booked).await > 0);
        assert_eq!(database.number(&booked).await, database.number(&cost).await);
        let events = client.all_events(id).await;
        let said: Vec<&Value> = events
            .iter()
            .filter(|event| event["type"] == "assistant" || event["type"] == "gap")
            .collect();
        assert_eq!(said.len(), 4, "{events:#?}");
    }
    let ledger = "select cast(sum(cost) as bigint) from ledger";
    let spent = "select cast(sum(spent) as bigint) from budget_period";
    assert_eq!(database.number(ledger).await, database.number(spent).await);
    assert_eq!(
        database
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
}

/// All three at once, each in a system of its own: the time is spent waiting.
async fn locks_lose_no_result() {
    tokio::join!(
        runs_end_while("lock table lane in access exclusive mode"),
        runs_end_while("select * from budget_period for update"),
        runs_end_while("lock table event in exclusive mode"),
    );
}

/// Makes the database refuse each row of `table` for which `condition` holds.
async fn refuse(system: &System, table: &str, condition: &str) {
    let database = system.database();
    match database.db() {
        Db::Sqlite => {
            let trigger = format!(
                "create trigger refuse before insert on {table} when {condition}
                 begin select raise(abort, 'refused'); end"
            );
            database.execute(&trigger).await;
        }
        Db::Postgres => {
            let function = "create function refuse() returns trigger language plpgsql as
                $$ begin raise exception 'refused' using errcode = '23514'; end $$";
            database.execute(function).await;
            let trigger = format!(
                "create trigger refuse before insert on {table} for each row when ({condition})
                 execute function refuse()"
            );
            database.execute(&trigger).await;
        }
    }
}

async fn a_result_that_is_refused_is_paid_all_the_same(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    refuse(&system, "result", "new.result like '%poison%'").await;
    let client = system.client();
    let id = client.play(&steps([]).answering("poison").costing(0.5)).await;

    let job = client.finished(&id).await;

    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("internal")),
        "{job:#}"
    );
    let ledger = format!("select cast(sum(cost) as bigint) from ledger where job_id = '{id}'");
    assert_eq!(system.database().number(&ledger).await, 500_000, "{job:#}");
    let other = client.play(&steps([]).answering("fine")).await;
    assert_eq!(client.finished(&other).await["status"], "done");
}

async fn events_that_are_refused_leave_a_gap(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    refuse(&system, "event", "new.data like '%poison%'").await;
    let client = system.client();
    let script = steps([Step::Say("poison".to_owned())]).answering("fine");
    let id = client.play(&script).await;

    let job = client.finished(&id).await;

    assert_eq!(job["status"], "done", "{job:#}");
    let events = client.all_events(&id).await;
    let gaps = events.iter().filter(|event| event["type"] == "gap").count();
    assert_eq!(gaps, 1, "{events:#?}");
}

/// The service while somebody holds a lock: what a look at its readiness says, and what becomes of a submission.
async fn held(system: &System, lock: &str) -> (u16, u16) {
    let client = system.client();
    let mut holder: PgConnection = system.database().postgres().await;
    let sql = AssertSqlSafe(format!("begin; {lock}"));
    holder.execute(sqlx::raw_sql(sql)).await.unwrap();
    // The result of the look before it is reused for a second.
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let body = json!({ "message": steps([]).answering("fine").prompt() });
    let (ready, submitted) = tokio::join!(client.get("/readyz"), client.submit(&body));
    holder.close().await.unwrap();
    eventually(PATIENCE, "ready again", async || {
        (client.get("/readyz").await.status == 200).then_some(())
    })
    .await;
    (ready.status, submitted.status)
}

async fn a_locked_queue_leaves_the_service_ready() {
    let system = System::builder().database(Db::Postgres).workers(0).start().await;
    let lock = "update queue set paused = paused";
    assert_eq!(held(&system, lock).await, (200, 202));
}

async fn locked_lanes_make_the_service_unready() {
    let system = System::builder().database(Db::Postgres).workers(0).start().await;
    for lock in [
        "lock table lane in exclusive mode",
        "select * from lane for update",
        "lock table event in share mode",
        "lock table apalis.jobs in share mode",
    ] {
        assert_eq!(held(&system, lock).await, (503, 503), "{lock}");
    }
}

async fn connections_that_are_all_in_use_are_no_outage() {
    let system = System::builder()
        .database(Db::Postgres)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let id = client.play(&steps([]).answering("fine")).await;
    client.finished(&id).await;
    let mut holder: PgConnection = system.database().postgres().await;
    let lock = "begin; lock table result in access exclusive mode";
    holder.execute(sqlx::raw_sql(lock)).await.unwrap();

    // Each waits for the lock on a connection of its own, and the rest for a connection.
    let (reads, ready) = tokio::join!(at_once((0..80).map(|_| client.job(&id))), async {
        let ready = eventually(PATIENCE, "a full pool", async || {
            let full = system.written().contains("all database connections are in use");
            let ready = client.get("/readyz").await.status;
            assert_eq!(ready, 200);
            full.then_some(ready)
        })
        .await;
        holder.close().await.unwrap();
        ready
    });

    assert_eq!(ready, 200);
    let overloaded = reads.iter().filter(|read| read.text.contains("overloaded"));
    for read in overloaded.clone() {
        read.assert_problem(503, "unavailable");
    }
    assert!(overloaded.count() > 0);
    assert!(!system.written().contains("the database is unavailable"));
}

/// Four hundred clients, and every answer of the database takes 20 ms: not all of them can be served in time.
async fn many_clients_of_a_slow_database_are_no_outage() {
    let folder = tests::paths::folder('r');
    let database = Database::fresh(Db::Postgres, &folder).await;
    let proxy = Proxy::slowly_before(&database, Duration::from_millis(10)).await;
    let url = proxy.url();
    let system = System::builder()
        .on(database)
        .env("DATABASE_URL", url)
        .workers(0)
        .start()
        .await;
    let client = system.client();
    let body = json!({ "message": "hi" });

    let answers = at_once((0..400).map(|_| client.submit(&body))).await;

    let refused: Vec<_> = answers.iter().filter(|answer| answer.status != 202).collect();
    for answer in &refused {
        answer.assert_problem(503, "unavailable");
        assert_eq!(
            answer.json["detail"], "The service is overloaded at the moment",
            "{}",
            answer.text
        );
    }
    let accepted = i64::try_from(answers.len() - refused.len()).unwrap();
    assert_eq!(
        system.database().number("select count(*) from job").await,
        accepted
    );
    assert!(!system.written().contains("the database is unavailable"));
}

async fn repeatable_reads_by_default_refuse_no_submission() {
    let folder = tests::paths::folder('r');
    let database = Database::fresh(Db::Postgres, &folder).await;
    let name = database.texts("select current_database()").await.remove(0);
    let isolation = format!("alter database {name} set default_transaction_isolation = 'repeatable read'");
    database.execute(&isolation).await;
    let system = System::builder().on(database).sandbox(false).start().await;
    let client = system.client();
    let body = json!({ "message": steps([]).answering("fine").prompt() });

    let answers = at_once((0..20).map(|_| client.submit(&body))).await;

    for answer in answers {
        let id = answer.data(202)["id"].as_str().unwrap();
        assert_eq!(client.finished(id).await["status"], "done");
    }
}
