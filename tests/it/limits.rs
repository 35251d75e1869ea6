//! How often a key may ask: exactly as often as it says, over all processes, and every answer tells how it stands.

use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;
use sqlx::{Connection as _, Executor as _, SqliteConnection};
use tests::client::{Answer, Client, PATIENCE};
use tests::database::{Cluster, Database, Db};
use tests::system::{KEYS, System};
use tests::{both, eventually, once};

both!(
    two_processes_admit_exactly_the_limit,
    every_answer_to_a_key_says_how_its_limit_stands,
    the_headers_are_true_to_the_second,
    polling_never_eats_what_is_for_submitting,
    hammering_at_a_closed_door_costs_no_database_call,
    a_key_has_limits_of_its_own_and_raising_them_works_at_once,
    trying_keys_is_slowed_down,
);
once!(
    reading_never_waits_for_the_writer_of_jobs,
    a_lost_database_opens_no_door,
    limits_that_can_not_be_counted_open_no_door,
);

fn number(answer: &Answer, header: &str) -> i64 {
    answer
        .header(header)
        .parse()
        .unwrap_or_else(|_| panic!("{header}: {:?}", answer.headers))
}

async fn submit(client: &Client) -> Answer {
    client.submit(&json!({"message": "x"})).await
}

async fn two_processes_admit_exactly_the_limit(db: Db) {
    let system = System::builder()
        .database(db)
        .apis(2)
        .workers(0)
        .env("RATE_LIMIT_REQUESTS", "25")
        .env("RATE_LIMIT_WINDOW", "86400")
        .start()
        .await;
    let calls: Vec<_> = (0..60)
        .map(|number| {
            let client = system.client_of(number % 2);
            tokio::spawn(async move { submit(&client).await.status })
        })
        .collect();

    let mut statuses = Vec::new();
    for call in calls {
        statuses.push(call.await.unwrap());
    }

    assert_eq!(
        statuses.iter().filter(|status| **status == 202).count(),
        25,
        "{statuses:?}"
    );
    assert_eq!(
        statuses.iter().filter(|status| **status == 429).count(),
        35,
        "{statuses:?}"
    );
    assert_eq!(system.database().number("select count(*) from job").await, 25);
    // Another key's limit is its own.
    assert_eq!(submit(&system.client().with_key(KEYS[1])).await.status, 202);
}

async fn every_answer_to_a_key_says_how_its_limit_stands(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        .env("RATE_LIMIT_REQUESTS", "2")
        .env("RATE_LIMIT_WINDOW", "3600")
        .start()
        .await;
    let client = system.client();
    let id = submit(&client).await.data(202)["id"].as_str().unwrap().to_owned();
    let mut answers = vec![
        ("submit", 422, client.submit(&json!({})).await),
        ("submit", 429, submit(&client).await),
    ];
    for (status, path) in [
        (200, "/api/v1/jobs".to_owned()),
        (200, format!("/api/v1/jobs/{id}")),
        (404, "/api/v1/jobs/nothing".to_owned()),
        (422, "/api/v1/jobs?limit=0".to_owned()),
        (400, "/api/v1/jobs?cursor=x".to_owned()),
        (403, "/api/v1/keys".to_owned()),
        (409, format!("/api/v1/jobs/{id}/result")),
    ] {
        answers.push(("read", status, client.get(&path).await));
    }
    let request = |method, path: &str| client.send(client.request(method, path));
    answers.push(("read", 405, request(Method::DELETE, "/api/v1/jobs").await));
    let etag = client.job(&id).await.header("etag").to_owned();
    let unchanged = client
        .request(Method::GET, &format!("/api/v1/jobs/{id}"))
        .header("if-none-match", etag);
    answers.push(("read", 304, client.send(unchanged).await));
    answers.push(("read", 200, client.cancel(&id).await));

    for (policy, status, answer) in &answers {
        assert_eq!(answer.status, *status, "{}", answer.text);
        assert_eq!(answer.header("x-ratelimit-resource"), *policy, "{status}");
        let (limit, remaining) = (
            number(answer, "x-ratelimit-limit"),
            number(answer, "x-ratelimit-remaining"),
        );
        assert_eq!(limit, number(answer, "x-ratelimit-used") + remaining, "{status}");
        assert!(number(answer, "x-ratelimit-reset") > 1_700_000_000);
        let window = if *policy == "submit" { 3_600 } else { 60 };
        assert_eq!(
            answer.header("ratelimit-policy"),
            format!("\"{policy}\";q={limit};w={window}")
        );
        assert!(
            answer
                .header("ratelimit")
                .starts_with(&format!("\"{policy}\";r={remaining}"))
        );
    }
    let refused = &answers[1].2;
    refused.assert_problem(429, "rate-limited");
    assert_eq!(refused.json["detail"], "Rate limit exceeded");
    assert_eq!(refused.json["violated-policies"], json!(["submit"]));
    assert_eq!(number(refused, "x-ratelimit-remaining"), 0);
    assert!((1..=1_800).contains(&number(refused, "retry-after")));
    // Who isn't known has no limit that could be shown.
    let nobody = client.with_key("wrong").jobs("").await;
    assert_eq!((nobody.status, nobody.header("x-ratelimit-limit")), (401, ""));
    // A page may read them.
    let page = client
        .request(Method::GET, "/api/v1/jobs")
        .header("origin", "https://app.example");
    let exposed = client
        .send(page)
        .await
        .header("access-control-expose-headers")
        .to_lowercase();
    for name in [
        "x-ratelimit-remaining",
        "ratelimit",
        "ratelimit-policy",
        "retry-after",
    ] {
        assert!(exposed.contains(name), "{exposed}");
    }
}

async fn the_headers_are_true_to_the_second(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        // One more every eight seconds, which is longer than a busy machine takes for the next call.
        .env("RATE_LIMIT_REQUESTS", "2")
        .env("RATE_LIMIT_WINDOW", "16")
        .start()
        .await;
    let client = system.client();
    let seconds = |answer: &Answer, header: &str| u64::try_from(number(answer, header)).unwrap();
    // `Remaining` calls pass, and not one more.
    let begin = Instant::now();
    let first = submit(&client).await;
    for _ in 0..number(&first, "x-ratelimit-remaining") {
        assert_eq!(submit(&client).await.status, 202);
    }
    let refused = submit(&client).await;
    refused.assert_problem(429, "rate-limited");
    let (answered, after) = (Instant::now(), seconds(&refused, "retry-after"));
    // The call comes eight seconds after the first one; the header rounds up.
    assert!(after <= 8 && begin.elapsed() + Duration::from_secs(after) >= Duration::from_secs(8));

    // Before `Retry-After` is over there is no call; when it is over, there is one.
    tokio::time::sleep_until((answered + Duration::from_secs(after.saturating_sub(4))).into()).await;
    let early = submit(&client).await;
    early.assert_problem(429, "rate-limited");
    let left = seconds(&early, "retry-after");
    assert!(left <= 4.min(after), "{left}");
    tokio::time::sleep(Duration::from_secs(left)).await;
    let then = submit(&client).await;
    assert_eq!(then.status, 202);
    assert_eq!(submit(&client).await.status, 429, "only one");

    // At `Reset` the whole limit is back.
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let left = Duration::from_secs(seconds(&then, "x-ratelimit-reset")).saturating_sub(now);
    assert!(left <= Duration::from_secs(17), "{left:?}");
    tokio::time::sleep(left + Duration::from_millis(5)).await;
    for _ in 0..2 {
        assert_eq!(submit(&client).await.status, 202);
    }
    assert_eq!(submit(&client).await.status, 429);
}

async fn polling_never_eats_what_is_for_submitting(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        .env("RATE_LIMIT_REQUESTS", "5")
        .env("RATE_LIMIT_WINDOW", "3600")
        .env("RATE_LIMIT_READ_REQUESTS", "200")
        .start()
        .await;
    let client = system.client();
    let before = number(&submit(&client).await, "x-ratelimit-remaining");

    for _ in 0..40 {
        assert_eq!(
            client.jobs("limit=1").await.header("x-ratelimit-resource"),
            "read"
        );
    }
    client
        .post("/api/v1/sessions", &json!({"name": "s"}))
        .await
        .data(201);

    assert_eq!(
        number(&submit(&client).await, "x-ratelimit-remaining"),
        before - 1
    );
    let session = client
        .post("/api/v1/sessions/s/jobs", &json!({"message": "x"}))
        .await;
    assert_eq!(session.header("x-ratelimit-resource"), "submit");
}

/// When the limiter was asked last about this bucket.
async fn asked_at(database: &Database, bucket: &str) -> i64 {
    let sql = format!("select asked_at from rate_limit where bucket = '{bucket}'");
    match database.db() {
        Db::Postgres => database.number(&sql).await,
        Db::Sqlite => {
            let url = format!("{}.limits", database.url());
            let mut connection = SqliteConnection::connect(&url).await.unwrap();
            sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
                .fetch_one(&mut connection)
                .await
                .unwrap()
        }
    }
}

async fn hammering_at_a_closed_door_costs_no_database_call(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        .env("RATE_LIMIT_REQUESTS", "2")
        .env("RATE_LIMIT_WINDOW", "7200")
        .start()
        .await;
    let client = system.client();
    let me = client.get("/api/v1/keys/me").await.data(200)["id"]
        .as_str()
        .unwrap()
        .to_owned();
    for _ in 0..3 {
        submit(&client).await;
    }
    let bucket = format!("{me}:submit:2/7200");
    let before = asked_at(system.database(), &bucket).await;

    for _ in 0..50 {
        let refused = submit(&client).await;
        refused.assert_problem(429, "rate-limited");
        assert!(number(&refused, "retry-after") > 3_000);
    }

    assert_eq!(asked_at(system.database(), &bucket).await, before);
}

async fn a_key_has_limits_of_its_own_and_raising_them_works_at_once(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let admin = system.client().with_key(KEYS[2]);
    let wish = json!({"name": "k", "rate_limit": {"submit": 2, "read": 500, "window": 600}});
    let made = admin.post("/api/v1/keys", &wish).await;
    let (id, secret) = (
        made.data(201)["id"].as_str().unwrap(),
        made.json["data"]["key"].as_str().unwrap(),
    );
    let key = system.client().with_key(secret);

    assert_eq!(
        submit(&key).await.header("ratelimit-policy"),
        "\"submit\";q=2;w=600"
    );
    assert_eq!(submit(&key).await.status, 202);
    assert_eq!(submit(&key).await.status, 429);
    let read = key.jobs("").await;
    assert_eq!(read.header("ratelimit-policy"), "\"read\";q=500;w=600");
    let me = key.get("/api/v1/keys/me").await;
    assert_eq!(me.data(200)["rate_limit_status"]["submit"]["remaining"], 0);

    let request = admin.request(Method::PATCH, &format!("/api/v1/keys/{id}"));
    let raised = request.json(&json!({"rate_limit": {"submit": 100, "window": 600}}));
    admin.send(raised).await.data(200);
    eventually(PATIENCE, "the raised limit", async || {
        (submit(&key).await.status == 202).then_some(())
    })
    .await;
}

async fn trying_keys_is_slowed_down(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        .env("TRUSTED_PROXIES", "127.0.0.1")
        .start()
        .await;
    let admin = system.client().with_key(KEYS[2]);
    let made = admin.post("/api/v1/keys", &json!({"name": "k"})).await;
    let secret = made.data(201)["key"].as_str().unwrap().to_owned();
    let attacker = system.client();
    let from = |client: &Client, address: &str| {
        let request = client.request(Method::GET, "/api/v1/jobs");
        attacker.send(request.header("x-forwarded-for", address))
    };
    let good = attacker.with_key(&secret);
    assert_eq!(from(&good, "192.0.2.1").await.status, 200);

    let begin = Instant::now();
    let mut refused = Vec::new();
    for number in 0..30 {
        let guess = attacker.with_key(&format!("guess-{number}"));
        refused.push(from(&guess, "192.0.2.1").await.status);
    }

    assert_eq!(refused[..20], [401; 20]);
    // One more every three seconds.
    let more = usize::try_from(begin.elapsed().as_secs() / 3).unwrap();
    assert!(
        refused[20..].iter().filter(|status| **status == 401).count() <= more,
        "{refused:?}"
    );
    let (last, short) = loop {
        let asked = Instant::now();
        let last = from(&attacker.with_key("guess"), "192.0.2.1").await;
        let short = from(&attacker, "192.0.2.1").await;
        // A machine that takes so long for both has given the address another try.
        let closed = last.header("retry-after").parse().unwrap_or(0);
        if asked.elapsed() + Duration::from_secs(1) < Duration::from_secs(closed) {
            break (last, short);
        }
    };
    last.assert_problem(429, "rate-limited");
    assert!((1..=3).contains(&number(&last, "retry-after")));
    assert_eq!(last.json["violated-policies"], json!(["authentication"]));
    // From there a short key isn't even looked at; one that nobody can guess opens; elsewhere nothing has changed.
    assert_eq!(short.status, 429);
    assert_eq!(from(&good, "192.0.2.1").await.status, 200);
    assert_eq!(from(&attacker, "192.0.2.2").await.status, 200);
    assert_eq!(from(&attacker.with_key("guess"), "192.0.2.2").await.status, 401);
}

async fn reading_never_waits_for_the_writer_of_jobs() {
    let system = System::builder().database(Db::Sqlite).workers(0).start().await;
    let client = system.client();
    let id = submit(&client).await.data(202)["id"].as_str().unwrap().to_owned();
    let mut writer = system.database().sqlite().await;
    writer.execute("begin immediate").await.unwrap();
    let begin = Instant::now();

    for _ in 0..20 {
        client.job(&id).await.data(200);
    }

    // Who waits for it waits for five seconds, each time.
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    writer.execute("rollback").await.unwrap();
}

async fn a_lost_database_opens_no_door() {
    let cluster = Cluster::start().await.unwrap();
    let database = Database::in_cluster(&cluster).await;
    let system = System::builder().on(database).workers(0).start().await;
    let client = system.client();
    let made = client
        .with_key(KEYS[2])
        .post("/api/v1/keys", &json!({"name": "k"}))
        .await;
    let secret = made.data(201)["key"].as_str().unwrap().to_owned();
    client.with_key(&secret).jobs("").await.data(200);

    cluster.stop(Signal::INT).await;

    for key in [KEYS[0], KEYS[2], &secret, "cjk_nothing"] {
        let answer = client.with_key(key).jobs("").await;
        answer.assert_problem(503, "unavailable");
        assert!(!answer.header("retry-after").is_empty());
    }
    // Afterwards everything is as before.
    cluster.run().await.unwrap();
    eventually(PATIENCE, "the database's return", async || {
        (client.with_key(&secret).jobs("").await.status == 200).then_some(())
    })
    .await;
    cluster.stop(Signal::INT).await;
}

async fn limits_that_can_not_be_counted_open_no_door() {
    let system = System::builder().database(Db::Sqlite).workers(0).start().await;
    let client = system.client();
    client.jobs("").await.data(200);
    let url = format!("{}.limits", system.database().url());
    let mut lock = SqliteConnection::connect(&url).await.unwrap();
    lock.execute("begin exclusive").await.unwrap();

    client.jobs("").await.assert_problem(503, "unavailable");

    lock.execute("rollback").await.unwrap();
    client.jobs("").await.data(200);
}
