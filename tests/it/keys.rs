//! Keys of the database: created, used, rotated, revoked. And that their secrets are nowhere.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _};
use tests::client::{Answer, Client, PATIENCE};
use tests::database::{Database, Db};
use tests::script::{Step, steps, until_told};
use tests::system::{KEYS, System, run};
use tests::{BUSY, both, eventually, once};

both!(
    a_key_lives_from_its_making_to_its_deletion,
    the_first_key_is_made_on_the_command_line,
    keys_are_looked_after_on_the_command_line,
    a_key_does_what_its_scopes_say,
    nobody_gives_more_than_they_have,
    a_key_is_bound_to_addresses_also_behind_a_proxy,
    a_key_is_bound_to_models_and_a_priority,
    a_keys_waiting_jobs_and_streams_are_bounded,
    a_key_runs_no_more_at_once_than_it_may,
    a_keys_own_budget_is_set_with_it,
    rotation_under_load_fails_no_call,
    a_revoked_key_opens_nothing_and_its_jobs_end_if_wanted,
    the_jobs_of_a_revoked_key_go_on_unless_they_are_cancelled,
    a_long_wait_is_no_way_round_a_revocation,
    a_key_ends_when_it_expires,
    keys_are_listed_page_by_page,
    another_secret_key_stops_the_start,
    every_change_and_refusal_is_noted,
    no_secret_is_anywhere,
);
once!(
    a_service_on_the_network_starts_with_a_key_of_the_database,
    the_use_of_a_key_is_noted_also_when_that_failed_first,
    what_is_no_key_is_refused_with_every_fault,
    keys_of_the_environment_can_only_be_read,
);

/// A revoked key opens nothing after this.
const REVOKED_WITHIN: Duration = Duration::from_secs(5).saturating_add(BUSY);

fn admin(system: &System) -> Client {
    system.client().with_key(KEYS[2])
}

/// Makes a key; its id and a client that has it.
async fn made(system: &System, body: &Value) -> (String, Client) {
    let answer = admin(system).post("/api/v1/keys", body).await;
    let key = answer.data(201);
    let id = key["id"].as_str().unwrap().to_owned();
    (id, system.client().with_key(key["key"].as_str().unwrap()))
}

async fn patch(client: &Client, id: &str, body: &Value) -> Answer {
    let request = client.request(Method::PATCH, &format!("/api/v1/keys/{id}"));
    client.send(request.json(body)).await
}

async fn the_use_of_a_key_is_noted_also_when_that_failed_first() {
    let system = System::builder().database(Db::Postgres).workers(0).start().await;
    let (id, key) = made(&system, &json!({"name": "k"})).await;
    let mut lock = system.database().postgres().await;
    let sql = "begin; select 1 from api_key for update";
    lock.execute(sqlx::raw_sql(sql)).await.unwrap();

    assert_eq!(key.jobs("").await.status, 200);
    system.writes("note the use of a key").await;
    lock.close().await.unwrap();

    eventually(PATIENCE, "the note of its use", async || {
        let shown = admin(&system).get(&format!("/api/v1/keys/{id}")).await;
        shown.data(200)["last_used_at"].is_string().then_some(())
    })
    .await;
}

async fn is_refused(client: &Client) -> bool {
    client.get("/api/v1/jobs").await.status == 401
}

async fn a_key_lives_from_its_making_to_its_deletion(db: Db) {
    let system = System::builder().database(db).apis(2).workers(0).start().await;
    let admin = admin(&system);
    let body = json!({"name": "ci", "metadata": {"team": "a"}, "max_running_jobs": 3});

    let answer = admin.post("/api/v1/keys", &body).await;

    let key = answer.data(201).clone();
    let (id, secret) = (key["id"].as_str().unwrap(), key["key"].as_str().unwrap());
    assert_eq!(answer.header("location"), format!("/api/v1/keys/{id}"));
    assert_eq!(answer.header("cache-control"), "no-store");
    assert!(
        secret.starts_with(&format!("cjk_{}_", &id[4..])),
        "the prefix and the public part"
    );
    assert_eq!(key["prefix"], format!("{}…{}", &secret[..12], &secret[58..]));
    assert_eq!((&key["status"], &key["version"]), (&json!("active"), &json!(1)));
    assert_eq!(key["scopes"].as_array().unwrap().len(), 10);
    assert_eq!(key["rate_limit"]["submit"], 1_000_000);

    // It opens on both processes, as either header.
    let user = system.client_of(1).with_key(secret);
    assert_eq!(user.jobs("").await.status, 200);
    let bearer = user
        .without_key()
        .request(Method::GET, "/api/v1/jobs")
        .bearer_auth(secret);
    assert_eq!(user.send(bearer).await.status, 200);
    let path = format!("/api/v1/keys/{id}");
    let shown = admin.get(&path).await;
    assert_eq!(
        (&shown.data(200)["name"], &shown.json["data"]["key"]),
        (&json!("ci"), &Value::Null)
    );
    // Its use is noted soon, not with each request.
    eventually(PATIENCE, "the note of its use", async || {
        let key = admin.get(&path).await;
        key.data(200)["last_used_at"].is_string().then_some(())
    })
    .await;

    let stale = admin
        .request(Method::PATCH, &path)
        .header("if-match", "W/\"7\"")
        .json(&json!({"name": "x"}));
    admin.send(stale).await.assert_problem(412, "precondition-failed");
    let wanted = json!({"name": "ci 2", "max_running_jobs": null, "metadata": null});
    let changed = patch(&admin, id, &wanted).await;
    assert_eq!(changed.data(200)["name"], "ci 2");
    assert_eq!(changed.json["data"]["max_running_jobs"], 16);
    assert_eq!(changed.json["data"]["metadata"], json!({}));
    assert_eq!(changed.header("etag"), "W/\"2\"");

    let delete = || admin.send(admin.request(Method::DELETE, &path));
    delete().await.assert_problem(409, "key-active");
    let revoked = admin
        .post(&format!("{path}/revoke"), &json!({"reason": "lost"}))
        .await;
    assert_eq!(revoked.data(200)["status"], "revoked");
    assert_eq!(revoked.json["data"]["revoke_reason"], "lost");
    assert_eq!(
        admin.post(&format!("{path}/revoke"), &json!({})).await.status,
        200,
        "twice is once"
    );
    for api in 0..2 {
        let user = system.client_of(api).with_key(secret);
        eventually(REVOKED_WITHIN, "the refusal", async || {
            is_refused(&user).await.then_some(())
        })
        .await;
    }
    admin
        .post(&format!("{path}/rotate"), &json!({}))
        .await
        .assert_problem(409, "key-not-active");
    assert_eq!(delete().await.status, 204);
    delete().await.assert_problem(404, "not-found");
}

async fn the_first_key_is_made_on_the_command_line(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        .env("API_KEYS", "")
        .env("ADMIN_API_KEYS", "")
        .start()
        .await;
    let nobody = system.client().without_key();
    assert_eq!(
        nobody.jobs("").await.status,
        200,
        "without any key everybody here may ask"
    );
    let env = [
        ("DATABASE_URL", system.database().url()),
        ("SECRET_KEY", SECRET_KEY),
    ];

    let made = run(
        "claude-queue",
        &["keys", "create", "--admin", "--name", "me"],
        &env,
    )
    .await;

    assert_eq!(made.code, Some(0), "{made:?}");
    let secret = made.stdout.trim();
    assert!(
        secret.starts_with("cja_") && secret.len() == 62,
        "nothing but the secret"
    );
    assert!(!made.stderr.contains(secret));
    let admin = nobody.with_key(secret);
    eventually(REVOKED_WITHIN, "the end of anonymity", async || {
        is_refused(&nobody).await.then_some(())
    })
    .await;
    let me = admin.get("/api/v1/keys/me").await;
    assert_eq!(
        (&me.data(200)["name"], &me.json["data"]["created_by"]),
        (&json!("me"), &json!("cli"))
    );
    assert_eq!(me.json["data"]["scopes"].as_array().unwrap().len(), 14);
    let (_, user) = {
        let answer = admin.post("/api/v1/keys", &json!({"name": "second"})).await;
        let key = answer.data(201)["key"].as_str().unwrap().to_owned();
        (answer, admin.with_key(&key))
    };
    user.accepted("hi").await;
}

/// What the kit gives the processes.
const SECRET_KEY: &str = "kit-secret-key-which-is-long-enough-0123456789";

async fn keys_are_looked_after_on_the_command_line(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let env = [
        ("DATABASE_URL", system.database().url()),
        ("SECRET_KEY", SECRET_KEY),
    ];
    let keys = async |arguments: &[&str]| {
        let done = run("claude-queue", &[&["keys"], arguments].concat(), &env).await;
        (done.code, done.stdout.trim().to_owned(), done.stderr)
    };

    let (code, secret, _) = keys(&["create", "--scope", "jobs:read", "--expires-in-days", "1"]).await;
    assert_eq!(code, Some(0));
    let id = format!("key_{}", &secret[4..12]);
    let user = system.client().with_key(&secret);
    assert_eq!(user.jobs("").await.status, 200);
    user.submit(&json!({"message": "hi"}))
        .await
        .assert_problem(403, "insufficient-scope");
    let (_, list, _) = keys(&["list"]).await;
    assert!(
        list.contains(&id) && list.contains("active") && !list.contains(&secret[13..]),
        "{list}"
    );

    let (code, other, _) = keys(&["rotate", &id, "--grace-seconds", "0"]).await;
    assert_eq!(code, Some(0));
    assert_eq!(user.with_key(&other).jobs("").await.status, 200);
    eventually(REVOKED_WITHIN, "the refusal of the former", async || {
        is_refused(&user).await.then_some(())
    })
    .await;
    let (code, _, _) = keys(&["revoke", &id, "--cancel-jobs"]).await;
    assert_eq!(code, Some(0));
    let user = user.with_key(&other);
    eventually(REVOKED_WITHIN, "the refusal", async || {
        is_refused(&user).await.then_some(())
    })
    .await;

    // Again, which changes nothing and is nothing to note.
    let (code, _, _) = keys(&["revoke", &id, "--reason", "once more"]).await;
    assert_eq!(code, Some(0));
    let revocations = "select count(*) from audit where action = 'key.revoke'";
    assert_eq!(system.database().number(revocations).await, 1);
    let (code, _, error) = keys(&["create", "--name", "red\u{1b}[31m"]).await;
    assert!(code == Some(1) && error.contains("visible characters"), "{error}");

    let (code, _, error) = keys(&["revoke", "key_nothing0"]).await;
    assert!(
        code == Some(1) && error.contains("no key key_nothing0"),
        "{error}"
    );
    let (code, _, error) = keys(&["create", "--scope", "jobs:fly"]).await;
    assert!(code == Some(1) && error.contains("jobs:read"), "{error}");
    let bare = run("claude-queue", &["keys", "create"], &env[..1]).await;
    assert!(
        bare.code == Some(2) && bare.stderr.contains("SECRET_KEY"),
        "{bare:?}"
    );
}

async fn a_key_does_what_its_scopes_say(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let (_, none) = made(&system, &json!({"name": "none", "scopes": []})).await;
    let (_, all) = made(&system, &json!({"name": "all", "scopes": SCOPES})).await;

    for (path, access) in api::routes::listed() {
        for rule in access.rules() {
            let path = path.replace("{}", "nothing");
            let ask = async |client: &Client| {
                let request = client.request(rule.method.clone(), &path).body("{}");
                client
                    .send(request.header("content-type", "application/json"))
                    .await
            };
            let refused = ask(&none).await;
            match rule.scope {
                Some(scope) => {
                    refused.assert_problem(403, "insufficient-scope");
                    let detail = refused.json["detail"].as_str().unwrap();
                    assert!(detail.contains(scope.as_str()), "{path}: {detail}");
                }
                None => assert_ne!(refused.status, 403, "{path}"),
            }
            assert!(
                ![401, 403].contains(&ask(&all).await.status),
                "{} {path}",
                rule.method
            );
        }
    }
    let one = made(&system, &json!({"name": "one", "scopes": ["jobs:read"]}))
        .await
        .1;
    assert_eq!(one.jobs("").await.status, 200);
    one.submit(&json!({"message": "hi"}))
        .await
        .assert_problem(403, "insufficient-scope");
    assert_eq!(system.database().number("select count(*) from job").await, 0);
}

const SCOPES: [&str; 14] = [
    "jobs:read",
    "jobs:write",
    "sessions:read",
    "sessions:write",
    "files:read",
    "files:write",
    "webhooks:read",
    "webhooks:write",
    "usage:read",
    "templates:write",
    "permissions:bypass",
    "keys:admin",
    "budgets:admin",
    "queue:admin",
];

async fn nobody_gives_more_than_they_have(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let (mighty, _) = made(&system, &json!({"name": "mighty", "scopes": SCOPES})).await;
    let (_, clerk) = made(
        &system,
        &json!({"name": "clerk", "scopes": ["keys:admin", "jobs:read"]}),
    )
    .await;

    let wish = json!({"name": "x", "scopes": ["jobs:read", "queue:admin"]});
    clerk
        .post("/api/v1/keys", &wish)
        .await
        .assert_problem(403, "insufficient-scope");
    let default = clerk.post("/api/v1/keys", &json!({"name": "x"})).await;
    default.assert_problem(403, "insufficient-scope");
    // Neither by a change nor by the secret of a key that may more.
    patch(&clerk, &mighty, &json!({"name": "mine"}))
        .await
        .assert_problem(403, "insufficient-scope");
    let rotate = clerk
        .post(&format!("/api/v1/keys/{mighty}/rotate"), &json!({}))
        .await;
    rotate.assert_problem(403, "insufficient-scope");
    let own = clerk
        .post("/api/v1/keys", &json!({"name": "own", "scopes": ["jobs:read"]}))
        .await;
    let own = own.data(201)["id"].as_str().unwrap().to_owned();
    let wider = patch(&clerk, &own, &json!({"scopes": ["jobs:write"]})).await;
    wider.assert_problem(403, "insufficient-scope");
    let ordinary = system.client();
    ordinary
        .get("/api/v1/keys")
        .await
        .assert_problem(403, "insufficient-scope");
    ordinary
        .submit(&json!({"message": "x", "permission_mode": "bypassPermissions"}))
        .await
        .assert_problem(403, "permission-mode-not-allowed");
    let (_, bypass) = made(
        &system,
        &json!({"name": "b", "scopes": ["jobs:write", "permissions:bypass"]}),
    )
    .await;
    bypass
        .accepted_body(&json!({"message": "x", "permission_mode": "bypassPermissions"}))
        .await;
}

async fn a_key_is_bound_to_addresses_also_behind_a_proxy(db: Db) {
    let system = System::builder()
        .database(db)
        .apis(1)
        .workers(0)
        .env("TRUSTED_PROXIES", "127.0.0.0/8")
        .start()
        .await;
    let (_, far) = made(
        &system,
        &json!({"name": "far", "allowed_ips": ["192.0.2.0/24", "2001:db8::/32"]}),
    )
    .await;
    let from = |address: &str| {
        let request = far.request(Method::GET, "/api/v1/jobs");
        far.send(request.header("x-forwarded-for", address))
    };

    far.get("/api/v1/jobs")
        .await
        .assert_problem(403, "ip-not-allowed");
    assert_eq!(from("192.0.2.7").await.status, 200);
    assert_eq!(from("2001:db8::7").await.status, 200);
    from("198.51.100.1").await.assert_problem(403, "ip-not-allowed");
    // What the client itself wrote stands before what the proxy wrote.
    from("192.0.2.7, 198.51.100.1")
        .await
        .assert_problem(403, "ip-not-allowed");

    let (_, here) = made(&system, &json!({"name": "here", "allowed_ips": ["127.0.0.1"]})).await;
    assert_eq!(here.jobs("").await.status, 200);
}

async fn a_key_is_bound_to_models_and_a_priority(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let (_, key) = made(
        &system,
        &json!({"name": "k", "allowed_models": ["haiku", "sonnet"], "max_priority": 4}),
    )
    .await;

    let opus = key.submit(&json!({"message": "x", "model": "opus"})).await;
    opus.assert_problem(403, "model-not-allowed");
    let session = key
        .post("/api/v1/sessions", &json!({"name": "s", "model": "opus"}))
        .await;
    session.assert_problem(403, "model-not-allowed");
    let one = key
        .submit(&json!({"message": "x", "model": "sonnet", "priority": 9}))
        .await;
    assert_eq!(
        (&one.data(202)["model"], &one.json["data"]["priority"]),
        (&json!("sonnet"), &json!(4))
    );
    let unsaid = key.submit(&json!({"message": "x"})).await;
    assert_eq!(unsaid.data(202)["model"], "haiku");

    let other = system
        .client()
        .submit(&json!({"message": "x", "priority": 9}))
        .await;
    assert_eq!(other.data(202)["priority"], 0);
}

async fn a_keys_waiting_jobs_and_streams_are_bounded(db: Db) {
    let system = System::builder().database(db).apis(2).workers(0).start().await;
    let (id, key) = made(
        &system,
        &json!({"name": "k", "max_queued_jobs": 3, "max_streams": 2}),
    )
    .await;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(key.accepted("x").await);
    }

    let full = key.submit(&json!({"message": "x"})).await;
    full.assert_problem(429, "queue-full");
    assert_eq!(full.header("retry-after"), "5");
    assert!(
        full.header("x-ratelimit-remaining").parse::<i64>().unwrap() > 0,
        "it isn't the rate"
    );
    key.cancel(&jobs[0]).await.data(200);
    eventually(PATIENCE, "room for one", async || {
        (key.submit(&json!({"message": "x"})).await.status == 202).then_some(())
    })
    .await;
    system.client().accepted("another key's").await;

    // Two streams, over both processes.
    let path = format!("/api/v1/jobs/{}/stream", jobs[1]);
    let secret = key_of(&key);
    let other = system.client_of(1).with_key(&secret);
    let mut first = key.stream(&jobs[1], None).await;
    first.next().await.unwrap();
    let second = other.stream(&jobs[1], None).await;
    assert_eq!((first.status, second.status), (200, 200));
    key.get(&path).await.assert_problem(429, "too-many-streams");
    other.get(&path).await.assert_problem(429, "too-many-streams");
    drop(second);
    eventually(PATIENCE, "a free place", async || {
        let third = key.stream(&jobs[1], None).await;
        (third.status == 200).then_some(())
    })
    .await;
    patch(&admin(&system), &id, &json!({"max_streams": null}))
        .await
        .data(200);
    eventually(REVOKED_WITHIN, "no bound any more", async || {
        let mut open = Vec::new();
        for _ in 0..4 {
            open.push(key.stream(&jobs[1], None).await);
        }
        open.iter().all(|stream| stream.status == 200).then_some(())
    })
    .await;
}

fn key_of(client: &Client) -> String {
    let request = client.request(Method::GET, "/").build().unwrap();
    request.headers()["x-api-key"].to_str().unwrap().to_owned()
}

async fn a_key_runs_no_more_at_once_than_it_may(db: Db) {
    let system = System::start(db).await;
    let (id, key) = made(&system, &json!({"name": "k", "max_running_jobs": 1})).await;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(key.play(&steps([Step::Say("on".to_owned()), Step::Hang])).await);
    }
    key.event(&jobs[0], "assistant").await;
    let running = "select count(*) from job where status = 'running'";
    assert_eq!(system.database().number(running).await, 1);

    // A raised cap takes effect at once.
    patch(&admin(&system), &id, &json!({"max_running_jobs": 3}))
        .await
        .data(200);
    for job in &jobs {
        key.event(job, "assistant").await;
    }
    assert_eq!(system.database().number(running).await, 3);
    for job in &jobs {
        key.cancel(job).await;
        key.finished(job).await;
    }
}

async fn a_keys_own_budget_is_set_with_it(db: Db) {
    let system = System::builder().database(db).stepped_clock().start().await;
    system.step_clock_to_noon();
    let budget =
        json!({"limit_usd": 0.5, "period": "day", "alert_thresholds": [50], "on_exceeded": "reject"});
    let (id, key) = made(&system, &json!({"name": "k", "budget": budget})).await;

    let me = key.get("/api/v1/keys/me").await;
    let shown = &me.data(200)["budget"];
    assert_eq!(
        (&shown["limit_usd"], &shown["period"]),
        (&json!(0.5), &json!("day"))
    );
    assert_eq!(me.json["data"]["budget_status"][0]["remaining_usd"], 0.5);
    assert!(
        me.json["data"]["rate_limit_status"]["submit"]["remaining"]
            .as_i64()
            .unwrap()
            > 0
    );
    let job = key.play(&steps([Step::Spend(0.4)]).costing(0.2)).await;
    key.finished(&job).await;
    key.submit(&json!({"message": "x"}))
        .await
        .assert_problem(429, "budget-exceeded");

    let admin = admin(&system);
    let below = patch(
        &admin,
        &id,
        &json!({"budget": {"limit_usd": 0.1, "period": "day"}}),
    )
    .await;
    below.assert_faults(&[("body -> budget -> limit_usd", "greater_than_equal")]);
    let raised = patch(&admin, &id, &json!({"budget": {"limit_usd": 5, "period": "day"}})).await;
    assert_eq!(raised.data(200)["budget"]["limit_usd"], 5.0);
    key.accepted("x").await;
    let default = patch(&admin, &id, &json!({"budget": null})).await;
    assert_eq!(default.data(200)["budget"]["limit_usd"], 50.0);
}

async fn rotation_under_load_fails_no_call(db: Db) {
    let system = System::builder().database(db).apis(2).workers(0).start().await;
    let (id, key) = made(&system, &json!({"name": "k"})).await;
    let path = format!("/api/v1/keys/{id}/rotate");
    let secret = Arc::new(std::sync::Mutex::new(key_of(&key)));
    let stop = Arc::new(AtomicBool::new(false));
    let calls: [Arc<AtomicUsize>; 6] = Default::default();
    let callers: Vec<_> = (0..6)
        .map(|number| {
            let client = system.client_of(number % 2);
            let (secret, stop, calls) = (secret.clone(), stop.clone(), calls[number].clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let mine = secret.lock().unwrap().clone();
                    let answer = client.with_key(&mine).jobs("limit=1").await;
                    assert_eq!(answer.status, 200, "{}", answer.text);
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();

    let counts = || calls.each_ref().map(|calls| calls.load(Ordering::Relaxed));
    // Whoever has the former secret goes on with it for a while; the new one opens everywhere at once. A second rotation
    // ends the former, so it comes when everybody has the new one.
    for _ in 0..5 {
        let rotated = admin(&system).post(&path, &json!({"grace_seconds": 60})).await;
        let fresh = rotated.data(200)["key"].as_str().unwrap().to_owned();
        assert!(rotated.json["data"]["previous_valid_until"].is_string());
        assert_ne!(*secret.lock().unwrap(), fresh);
        *secret.lock().unwrap() = fresh;
        let before = counts();
        eventually(PATIENCE, "more calls of each", async || {
            let more = counts()
                .iter()
                .zip(before)
                .all(|(now, before)| *now > before + 10);
            more.then_some(())
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }

    // Without a grace the former secret ends within seconds; a second rotation has ended the oldest long ago.
    let last = secret.lock().unwrap().clone();
    admin(&system)
        .post(&path, &json!({"grace_seconds": 0}))
        .await
        .data(200);
    for api in 0..2 {
        let former = system.client_of(api).with_key(&last);
        eventually(REVOKED_WITHIN, "the refusal", async || {
            is_refused(&former).await.then_some(())
        })
        .await;
        assert!(is_refused(&system.client_of(api).with_key(&key_of(&key))).await);
    }
}

async fn a_revoked_key_opens_nothing_and_its_jobs_end_if_wanted(db: Db) {
    let system = System::builder().database(db).apis(2).start().await;
    let (id, key) = made(&system, &json!({"name": "k", "max_running_jobs": 1})).await;
    let running = key.play(&steps([Step::Say("on".to_owned()), Step::Hang])).await;
    key.event(&running, "assistant").await;
    let waiting = key.accepted("later").await;
    let mut stream = system
        .client_of(1)
        .with_key(&key_of(&key))
        .stream(&running, None)
        .await;
    stream.next().await.unwrap();
    let mut quiet = key.stream(&waiting, None).await;
    quiet.next().await.unwrap();
    let begin = Instant::now();

    let body = json!({"reason": "stolen", "cancel_jobs": true});
    admin(&system)
        .post(&format!("/api/v1/keys/{id}/revoke"), &body)
        .await
        .data(200);

    for open in [&mut stream, &mut quiet] {
        open.rest().await;
        assert!(begin.elapsed() < REVOKED_WITHIN, "{:?}", begin.elapsed());
    }
    assert!(is_refused(&key).await);
    let admin = admin(&system);
    for job in [&running, &waiting] {
        let job = admin.finished(job).await;
        assert_eq!(job["status"], "cancelled", "{job:#}");
    }
    let reasons = "select cancel_reason from job order by job_number";
    assert_eq!(
        system.database().texts(reasons).await,
        ["key_revoked", "key_revoked"]
    );
    system.no_run_process_within(PATIENCE).await;
}

async fn the_jobs_of_a_revoked_key_go_on_unless_they_are_cancelled(db: Db) {
    let system = System::start(db).await;
    let (id, key) = made(&system, &json!({"name": "k"})).await;
    let job = key
        .play(&steps([Step::Say("on".to_owned()), until_told()]).answering("to the end"))
        .await;
    key.event(&job, "assistant").await;
    let mut quiet = key.stream(&job, None).await;
    quiet.next().await.unwrap();

    admin(&system)
        .post(&format!("/api/v1/keys/{id}/revoke"), &json!({}))
        .await
        .data(200);
    system.tell_to_go_on(&job);

    assert_eq!(admin(&system).finished(&job).await["status"], "done");
}

async fn a_long_wait_is_no_way_round_a_revocation(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let (id, key) = made(&system, &json!({"name": "k"})).await;
    let job = key.accepted("x").await;
    let poll = tokio::spawn({
        let (key, path) = (key.clone(), format!("/api/v1/jobs/{job}?wait=50"));
        async move { key.get(&path).await }
    });
    let mut stream = key.stream(&job, None).await;
    stream.next().await.unwrap();
    let begin = Instant::now();

    admin(&system)
        .post(&format!("/api/v1/keys/{id}/revoke"), &json!({}))
        .await
        .data(200);

    stream.rest().await;
    poll.await.unwrap().assert_problem(401, "unauthorized");
    assert!(begin.elapsed() < REVOKED_WITHIN, "{:?}", begin.elapsed());
}

async fn a_key_ends_when_it_expires(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        .stepped_clock()
        .start()
        .await;
    let hour = sqlx_now() + 3_600_000_000;
    let (id, key) = made(&system, &json!({"name": "k", "expires_at": rfc3339(hour)})).await;
    system.step_clock(3_500);
    assert_eq!(key.jobs("").await.status, 200, "not before");

    system.step_clock(3_600);
    eventually(REVOKED_WITHIN, "the end", async || {
        is_refused(&key).await.then_some(())
    })
    .await;

    let shown = admin(&system).get(&format!("/api/v1/keys/{id}")).await;
    assert_eq!(shown.data(200)["status"], "expired");
    let path = format!("/api/v1/keys/{id}");
    assert_eq!(
        admin(&system)
            .send(admin(&system).request(Method::DELETE, &path))
            .await
            .status,
        204
    );
}

fn sqlx_now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.unwrap().as_micros()).unwrap()
}

fn rfc3339(micros: u64) -> String {
    let (days, rest) = (micros / 86_400_000_000, micros % 86_400_000_000);
    // Days to a date, by the civil calendar (from 1 March of year 0 on).
    let z = i64::try_from(days).unwrap() + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (
        doy - (153 * mp + 2) / 5 + 1,
        if mp < 10 { mp + 3 } else { mp - 9 },
    );
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (seconds, micros) = (rest / 1_000_000, rest % 1_000_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

async fn keys_of_the_environment_can_only_be_read() {
    let system = System::builder().workers(0).start().await;
    let admin = admin(&system);
    let me = system.client().get("/api/v1/keys/me").await;
    let id = me.data(200)["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("env_") && id.len() == 12, "{id}");
    assert_eq!(me.json["data"]["name"], "API_KEYS");

    let path = format!("/api/v1/keys/{id}");
    assert_eq!(admin.get(&path).await.data(200)["id"], id.as_str());
    patch(&admin, &id, &json!({"name": "x"}))
        .await
        .assert_problem(409, "key-read-only");
    for action in ["rotate", "revoke"] {
        let answer = admin.post(&format!("{path}/{action}"), &json!({})).await;
        answer.assert_problem(409, "key-read-only");
    }
    let delete = admin.send(admin.request(Method::DELETE, &path)).await;
    delete.assert_problem(409, "key-read-only");
    for id in [
        "env_00000000",
        "key_nothing0",
        "key_'; drop table job",
        "anonymous",
    ] {
        let answer = admin.get(&format!("/api/v1/keys/{id}")).await;
        answer.assert_problem(404, "not-found");
    }
}

async fn keys_are_listed_page_by_page(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let admin = admin(&system);
    let mut expected = Vec::new();
    for number in 0..5 {
        expected.push(made(&system, &json!({"name": format!("k{number}")})).await.0);
    }
    expected.reverse();
    let revoke = format!("/api/v1/keys/{}/revoke", expected[0]);
    admin.post(&revoke, &json!({})).await.data(200);

    let (mut listed, mut path) = (Vec::new(), "/api/v1/keys?limit=3".to_owned());
    loop {
        let page = admin.get(&path).await;
        for key in page.data(200).as_array().unwrap() {
            assert_eq!(key["key"], Value::Null);
            listed.push(key["id"].as_str().unwrap().to_owned());
        }
        match page.json["pagination"]["next_cursor"].as_str() {
            Some(cursor) => path = format!("/api/v1/keys?limit=3&cursor={cursor}"),
            None => break,
        }
    }
    assert_eq!(listed[..5], expected);
    assert!(
        listed.len() == 8 && listed[5..].iter().all(|id| id.starts_with("env_")),
        "{listed:?}"
    );
    let ids = async |query: &str| {
        let page = admin.get(&format!("/api/v1/keys?{query}")).await;
        let keys = page.data(200).as_array().unwrap().clone();
        keys.iter()
            .map(|key| key["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(ids("status=revoked").await, expected[..1]);
    assert_eq!(ids("name=k1").await, expected[3..4]);
    assert_eq!(ids("name=ADMIN_API_KEYS").await.len(), 1);
    assert_eq!(ids("status=expired").await, Vec::<String>::new());
    assert_eq!(admin.get("/api/v1/keys?status=lost").await.status, 422);
}

async fn what_is_no_key_is_refused_with_every_fault() {
    let system = System::builder().workers(0).start().await;
    let admin = admin(&system);
    for (body, faults) in [
        (json!({}), vec![("body -> name", "missing")]),
        (
            json!({"name": "k", "scopes": ["jobs:fly"]}),
            vec![("body -> scopes -> 0", "enum")],
        ),
        (
            json!({"name": "", "max_running_jobs": -1, "max_queued_jobs": 1e12, "rate_limit": {"submit": 0}}),
            vec![
                ("body -> name", "string_too_short"),
                ("body -> max_running_jobs", "greater_than_equal"),
                ("body -> max_queued_jobs", "less_than_equal"),
                ("body -> rate_limit -> submit", "greater_than_equal"),
            ],
        ),
        (
            json!({"name": "k", "expires_at": "2020-01-01T00:00:00Z", "allowed_ips": ["10.0.0.0/33", "x"]}),
            vec![
                ("body -> expires_at", "value_error"),
                ("body -> allowed_ips -> 0", "value_error"),
                ("body -> allowed_ips -> 1", "value_error"),
            ],
        ),
        (
            json!({"name": "k", "budget": {"limit_usd": 0}}),
            vec![("body -> budget -> limit_usd", "greater_than_equal")],
        ),
        (
            json!({"name": "k", "key": "mine"}),
            vec![("body -> key", "extra_forbidden")],
        ),
    ] {
        admin.post("/api/v1/keys", &body).await.assert_faults(&faults);
    }
    let (id, _) = made(&system, &json!({"name": "k"})).await;
    let grace = json!({"grace_seconds": 604_801});
    let answer = admin.post(&format!("/api/v1/keys/{id}/rotate"), &grace).await;
    answer.assert_faults(&[("body -> grace_seconds", "less_than_equal")]);
    let body = json!({"cancel_jobs": "yes", "reason": "x".repeat(201)});
    let answer = admin.post(&format!("/api/v1/keys/{id}/revoke"), &body).await;
    answer.assert_faults(&[
        ("body -> cancel_jobs", "bool_type"),
        ("body -> reason", "string_too_long"),
    ]);
    let past = patch(&admin, &id, &json!({"expires_at": "2020-01-01T00:00:00Z"})).await;
    past.assert_faults(&[("body -> expires_at", "value_error")]);
    let count = "select count(*) from api_key";
    assert_eq!(system.database().number(count).await, 1);
    assert_eq!(
        system
            .database()
            .number("select count(*) from api_key where revoked_at is not null")
            .await,
        0
    );
}

async fn another_secret_key_stops_the_start(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    made(&system, &json!({"name": "k"})).await;
    let start = async |secret_key: &str| {
        let env = [
            ("DATABASE_URL", system.database().url()),
            ("API_PORT", "0"),
            ("API_KEYS", "k"),
            ("SECRET_KEY", secret_key),
        ];
        run("claude-queue-api", &[], &env).await
    };

    for wrong in ["another-secret-key-which-is-long-too", "", "too-short"] {
        let ended = start(wrong).await;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(
            ended.stderr.contains("SECRET_KEY") && !ended.stderr.contains("which-is-long-too"),
            "{ended:?}"
        );
    }
}

async fn a_service_on_the_network_starts_with_a_key_of_the_database() {
    let folder = tests::paths::folder('k');
    let database = Database::empty(Db::Sqlite, &folder).await;
    let env = [
        ("DATABASE_URL", database.url()),
        ("SECRET_KEY", SECRET_KEY),
        ("API_HOST", "0.0.0.0"),
        ("API_PORT", "0"),
    ];
    let refused = run("claude-queue-api", &[], &env).await;
    assert!(
        refused.code == Some(2) && refused.stderr.contains("API_KEYS"),
        "{refused:?}"
    );

    let made = run("claude-queue", &["keys", "create", "--admin"], &env).await;
    assert_eq!(made.code, Some(0), "{made:?}");

    // Loopback only in a test: that it gets as far as listening is shown by what stops it.
    let mut taken = env.to_vec();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    taken[2] = ("API_HOST", "127.0.0.1");
    taken[3] = ("API_PORT", &port);
    let ended = run("claude-queue-api", &[], &taken).await;
    assert!(
        ended.code == Some(1) && ended.stderr.contains("could not listen"),
        "{ended:?}"
    );
}

async fn every_change_and_refusal_is_noted(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let admin = admin(&system);
    let (id, key) = made(&system, &json!({"name": "k"})).await;
    patch(&admin, &id, &json!({"name": "k2"})).await.data(200);
    admin
        .post(&format!("/api/v1/keys/{id}/rotate"), &json!({}))
        .await
        .data(200);
    admin
        .post(&format!("/api/v1/keys/{id}/revoke"), &json!({"reason": "r"}))
        .await
        .data(200);
    for _ in 0..5 {
        assert!(is_refused(&key.with_key("no-such-key")).await);
    }
    assert!(is_refused(&key).await, "revoked by this very process");
    let deleted = admin
        .send(admin.request(Method::DELETE, &format!("/api/v1/keys/{id}")))
        .await;
    assert_eq!(deleted.status, 204);

    // They are counted for each quarter of an hour, one of which may have ended meanwhile.
    let times = |rows: &[Value], object: &Value| -> i64 {
        rows.iter()
            .filter(|row| row["action"] == "auth.refused" && row["object_id"] == *object)
            .map(|row| row["count"].as_i64().unwrap())
            .sum()
    };
    let rows = eventually(PATIENCE, "the counts of refusals", async || {
        let answer = admin.get("/api/v1/audit?kind=admin").await;
        let rows = answer.data(200).as_array().unwrap().clone();
        (times(&rows, &json!(id)) == 1).then_some(rows)
    })
    .await;

    assert_eq!(times(&rows, &Value::Null), 5);
    let me = admin.get("/api/v1/keys/me").await.data(200)["id"].clone();
    let mut changes: Vec<_> = rows.iter().filter(|row| row["user_id"] == me).collect();
    changes.reverse();
    let actions: Vec<_> = changes
        .iter()
        .map(|row| row["action"].as_str().unwrap())
        .collect();
    assert_eq!(
        actions,
        [
            "key.create",
            "key.update",
            "key.rotate",
            "key.revoke",
            "key.delete"
        ]
    );
    for row in changes {
        assert_eq!(
            (&row["object_id"], &row["address"]),
            (&json!(id), &json!("127.0.0.1"))
        );
        assert!(row["request_id"].is_string() && row["created_at"].is_string());
    }
    system
        .client()
        .get("/api/v1/audit?kind=admin")
        .await
        .assert_problem(403, "insufficient-scope");
}

/// Everything that the product stored or wrote: on SQLite the files themselves, on PostgreSQL every row of every table.
async fn everything(system: &System) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut folders = vec![system.folder().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                let bytes = std::fs::read(&path).unwrap_or_default();
                all.push((shown(&path), String::from_utf8_lossy(&bytes).into_owned()));
            }
        }
    }
    if system.database().db() == Db::Postgres {
        let tables =
            "select '\"' || table_schema || '\".\"' || table_name || '\"' from information_schema.tables
            where table_schema in ('public', 'apalis') and table_type = 'BASE TABLE'";
        for table in system.database().texts(tables).await {
            let rows = format!("select cast(t as text) from {table} as t");
            all.push((table, system.database().texts(&rows).await.join("\n")));
        }
    }
    all
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

async fn no_secret_is_anywhere(db: Db) {
    let system = System::builder()
        .database(db)
        .env("LOG_LEVEL", "trace")
        .start()
        .await;
    let admin = admin(&system);
    let (id, key) = made(&system, &json!({"name": "k"})).await;
    let mut secrets = vec![key_of(&key)];
    let rotated = admin.post(&format!("/api/v1/keys/{id}/rotate"), &json!({})).await;
    secrets.push(rotated.data(200)["key"].as_str().unwrap().to_owned());
    secrets.extend(KEYS.map(str::to_owned));
    secrets.push(SECRET_KEY.to_owned());
    secrets.push("wrong-secret-of-a-client".to_owned());
    let job = key.play(&steps([Step::Say("hi".to_owned())])).await;
    key.finished(&job).await;
    let mut answers = vec![rotated.text.replace(&secrets[1], "")];
    for path in [
        "/api/v1/keys",
        "/api/v1/keys/me",
        &format!("/api/v1/keys/{id}"),
        "/api/v1/audit?kind=admin",
        "/api/v1/jobs?view=full",
        &format!("/api/v1/jobs/{job}/events"),
        &format!("/api/v1/jobs/{job}/result"),
        "/api/v1/usage",
        "/api/v1/budgets",
    ] {
        for client in [&admin, &key, &key.with_key("wrong-secret-of-a-client")] {
            let answer = client.get(path).await;
            answers.push(format!("{:?} {}", answer.headers, answer.text));
        }
    }
    // A secret in the wrong place is refused, and not repeated.
    let name = key
        .post("/api/v1/sessions", &json!({"name": "s", "metadata": {"a": 1}}))
        .await;
    answers.push(name.text);
    admin
        .post(&format!("/api/v1/keys/{id}/revoke"), &json!({}))
        .await
        .data(200);

    let mut all = everything(&system).await;
    all.push(("the answers".to_owned(), answers.join("\n")));
    assert!(all.iter().map(|(_, text)| text.len()).sum::<usize>() > 10_000);
    for (place, text) in &all {
        for secret in &secrets {
            assert!(!text.contains(secret.as_str()), "{place} holds {}…", &secret[..8]);
            // Nor its random part alone.
            assert!(
                secret.len() != 62 || !text.contains(&secret[13..56]),
                "{place} holds a part of {}…",
                &secret[..8]
            );
        }
        assert!(
            !tests::system::holds_a_secret(text),
            "{place} holds what looks like a secret"
        );
    }
}
