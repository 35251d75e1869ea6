//! No delivery is lost, whatever is killed or away, and whoever gets one twice knows it by its id.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use sqlx::Executor as _;
use tests::client::{Client, PATIENCE, at_once};
use tests::database::{Cluster, Database, Db};
use tests::receiver::{Reaction, Received, Receiver};
use tests::system::System;
use tests::{both, eventually, once};
use tokio::sync::Semaphore;

use crate::receivers::verified_by_others;
use crate::webhooks::{deliveries, system, verify};

both!(
    a_delivery_survives_its_worker,
    jobs_that_end_at_once_are_all_told_under_kills
);
once!(a_delivery_survives_the_database);

/// Accepts a job that waits for long, which tells that address of its end.
async fn waiting(client: &Client, url: &str) -> String {
    let later = shared::clock::now().plus(Duration::from_hours(1));
    let body = json!({ "message": "later", "webhook_url": url, "run_after": later });
    client.accepted_body(&body).await
}

async fn secret_of(client: &Client) -> String {
    let rotated = client.post("/api/v1/webhooks/secret/rotate", &json!({})).await;
    rotated.data(200)["secret"].as_str().unwrap().to_owned()
}

/// The deliveries have all succeeded; how often each was tried.
async fn all_succeed(client: &Client, count: usize) -> Vec<i64> {
    let listed = eventually(2 * PATIENCE, "successes", async || {
        let listed = deliveries(client, "status=succeeded").await;
        (listed.len() == count).then_some(listed)
    })
    .await;
    listed
        .iter()
        .map(|one| one["attempt_count"].as_i64().unwrap())
        .collect()
}

/// As if the leases of what was claimed had run out, which takes half a minute.
async fn leases_run_out(system: &System) {
    let expire = "update delivery set due_at = created_at where status = 'pending'";
    system.database().execute(expire).await;
}

/// Keeps everybody from recording deliveries until it is dropped.
enum Locked {
    Sqlite(sqlx::SqliteConnection),
    Postgres(sqlx::PgConnection),
}

impl Locked {
    async fn new(database: &Database) -> Self {
        match database.db() {
            Db::Sqlite => {
                let mut connection = database.sqlite().await;
                connection.execute("begin immediate").await.unwrap();
                Self::Sqlite(connection)
            }
            Db::Postgres => {
                let mut connection = database.postgres().await;
                let lock = sqlx::raw_sql("begin; select 1 from delivery for update");
                connection.execute(lock).await.unwrap();
                Self::Postgres(connection)
            }
        }
    }

    async fn release(self) {
        match self {
            Self::Sqlite(mut connection) => connection.execute("rollback").await.map(drop),
            Self::Postgres(mut connection) => connection.execute("rollback").await.map(drop),
        }
        .unwrap();
    }
}

async fn a_delivery_survives_its_worker(db: Db) {
    let allowed = Arc::new(Semaphore::new(0));
    let gate = allowed.clone();
    let rule = move |_: usize, request: &Received| match request.path.as_str() {
        "/during" if gate.available_permits() == 0 => Reaction::Silent,
        "/after" => Reaction::When(gate.clone()),
        _ => Reaction::Status(200),
    };
    let (mut system, receiver) = tokio::join!(
        system(db).env("WEBHOOK_TIMEOUT_SECONDS", "30").start(),
        Receiver::with(rule)
    );
    let client = system.client();
    let secret = secret_of(&client).await;

    // Before: nobody is there who could send it.
    system.worker(0).kill();
    let job = waiting(&client, &receiver.url("/before")).await;
    client.cancel(&job).await;
    assert_eq!(deliveries(&client, "status=pending").await.len(), 1);
    let tickets = match db {
        Db::Sqlite => "select count(*) from Jobs where job_type = 'webhooks' and status = 'Pending'",
        Db::Postgres => "select count(*) from apalis.jobs where job_type = 'webhooks' and status = 'Pending'",
    };
    assert_eq!(system.database().number(tickets).await, 1);
    system.worker(0).start().await;
    receiver.wait(1, PATIENCE).await;
    all_succeed(&client, 1).await;
    eventually(PATIENCE, "a worker that takes the ticket", async || {
        (system.database().number(tickets).await == 0).then_some(())
    })
    .await;

    // During: one receiver never answers. After: the other has answered, and the worker couldn't record it.
    for path in ["/during", "/after"] {
        let job = waiting(&client, &receiver.url(path)).await;
        client.cancel(&job).await;
    }
    receiver.wait(3, PATIENCE).await;
    let locked = Locked::new(system.database()).await;
    let answered = receiver.answered();
    allowed.add_permits(1);
    eventually(PATIENCE, "an answer", async || {
        (receiver.answered() > answered).then_some(())
    })
    .await;
    system.worker(0).kill();
    locked.release().await;
    allowed.add_permits(9);
    leases_run_out(&system).await;
    system.worker(0).start().await;

    let got = receiver.wait(5, PATIENCE).await;
    assert_eq!(
        all_succeed(&client, 3).await,
        [1, 1, 1],
        "what wasn't recorded is no attempt"
    );
    let mut sent: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    for one in &got {
        verify(&secret, one);
        sent.entry(&one.path)
            .or_default()
            .push((one.header("webhook-id"), &one.body));
    }
    for (path, times) in [("/before", 1), ("/during", 2), ("/after", 2)] {
        let sent = &sent[path];
        assert_eq!(sent.len(), times, "{path}: {got:#?}");
        assert!(sent.iter().all(|one| *one == sent[0]), "{path}: {got:#?}");
    }
}

async fn a_delivery_survives_the_database() {
    let cluster = Cluster::start().await.unwrap();
    let database = Database::in_cluster(&cluster).await;
    let allowed = Arc::new(Semaphore::new(0));
    let gate = allowed.clone();
    let rule = move |number: usize, _: &Received| match number {
        0 => Reaction::When(gate.clone()),
        _ => Reaction::Status(200),
    };
    let (system, receiver) = tokio::join!(
        system(Db::Postgres)
            .on(database)
            .env("WEBHOOK_TIMEOUT_SECONDS", "30")
            .start(),
        Receiver::with(rule)
    );
    let client = system.client();
    let secret = secret_of(&client).await;
    let jobs = [
        waiting(&client, &receiver.url("/")).await,
        waiting(&client, &receiver.url("/")).await,
    ];
    client.cancel(&jobs[0]).await;
    receiver.wait(1, PATIENCE).await;

    // It goes away while a delivery is under way, and is away when that has succeeded.
    cluster.stop(Signal::INT).await;
    allowed.add_permits(1);
    eventually(PATIENCE, "an answer", async || {
        (receiver.answered() > 0).then_some(())
    })
    .await;
    cluster.run().await.unwrap();
    eventually(PATIENCE, "the database", async || {
        (client.get("/readyz").await.status == 200).then_some(())
    })
    .await;
    client.cancel(&jobs[1]).await;
    // Where it took too long to come back, the result is lost and the delivery is made again.
    eventually(PATIENCE, "the second delivery", async || {
        let told: BTreeSet<_> = receiver
            .received()
            .iter()
            .map(|one| one.json()["job"]["id"].as_str().map(str::to_owned))
            .collect();
        (told.len() == 2).then_some(())
    })
    .await;
    leases_run_out(&system).await;
    all_succeed(&client, 2).await;

    for one in receiver.received() {
        verify(&secret, &one);
    }
    drop(system);
    cluster.stop(Signal::QUIT).await;
}

async fn jobs_that_end_at_once_are_all_told_under_kills(db: Db) {
    const JOBS: usize = 200;
    // Every fifth request is answered late, so that a worker is always killed in the middle of some.
    let rule = |number, _: &Received| match number % 5 {
        0 => Reaction::After(Duration::from_millis(300)),
        _ => Reaction::Status(200),
    };
    let (mut system, receiver) = tokio::join!(
        system(db).workers(2).env("WEBHOOK_TIMEOUT_SECONDS", "5").start(),
        Receiver::with(rule)
    );
    let client = system.client();
    let (url, secret) = (receiver.url("/k"), secret_of(&client).await);
    let jobs = at_once((0..JOBS).map(|_| waiting(&client, &url))).await;

    // So many at once may have to ask again on a busy machine.
    let ending = at_once(jobs.iter().map(async |job| {
        eventually(2 * PATIENCE, "a cancelled job", async || {
            matches!(client.cancel(job).await.status, 200 | 409).then_some(())
        })
        .await;
    }));
    let killing = async {
        for round in 0..4 {
            receiver.wait(round * 20 + 1, PATIENCE).await;
            system.worker(round % 2).kill();
            system.worker(round % 2).start().await;
        }
    };
    tokio::join!(ending, killing);
    leases_run_out(&system).await;

    let wanted: BTreeSet<String> = jobs.into_iter().collect();
    let told = |received: &[Received]| -> BTreeMap<String, BTreeSet<String>> {
        let mut told: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for one in received {
            let job = one.json()["job"]["id"].as_str().unwrap().to_owned();
            told.entry(job)
                .or_default()
                .insert(one.header("webhook-id").to_owned());
        }
        told
    };
    let got = eventually(2 * PATIENCE, "a delivery of each job", async || {
        let got = receiver.received();
        (told(&got).len() == JOBS).then_some(got)
    })
    .await;
    let told = told(&got);
    assert_eq!(told.keys().cloned().collect::<BTreeSet<_>>(), wanted);
    assert!(told.values().all(|ids| ids.len() == 1), "{told:#?}");
    verified_by_others(&secret, &got).await;
    eventually(2 * PATIENCE, "all recorded", async || {
        let waiting = "select count(*) from delivery where status <> 'succeeded'";
        (system.database().number(waiting).await == 0).then_some(())
    })
    .await;
}
