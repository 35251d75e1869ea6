//! Money: never more than the limit, whoever dies; told, set, adjusted and waited for.

use std::time::Duration;

use chrono::{DateTime, Datelike as _, Months, NaiveDate, NaiveTime, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use tests::client::{Answer, Client, PATIENCE, at_once};
use tests::database::Db;
use tests::script::{Script, Step, answer, steps, until};
use tests::system::{KEYS, System};
use tests::{both, eventually, run_alone};

both!(
    a_month_may_end_in_the_middle_of_a_run,
    a_budget_may_make_jobs_wait_for_the_next_period,
    a_raised_limit_lets_waiting_jobs_begin,
    a_global_budget_counts_every_key,
    a_submission_learns_what_is_left,
    an_administrator_sets_budgets,
    a_key_has_the_default_budget_until_a_person_sets_one,
    an_adjustment_is_made_once,
    thresholds_are_told,
    a_budget_that_makes_no_sense_is_refused,
);

/// Cases with sixteen runs at once: others would starve them, and they others.
mod alone {
    use super::{Db, Duration, killed_workers_leave_nothing_reserved_and_nothing_unpaid};
    use super::{jobs_stop_when_the_money_is_spent, run_alone};

    fn alone(case: impl Future<Output = ()>) {
        run_alone(Duration::from_mins(4), case);
    }

    #[test]
    fn jobs_stop_when_the_money_is_spent_on_sqlite() {
        alone(jobs_stop_when_the_money_is_spent(Db::Sqlite));
    }

    #[test]
    fn jobs_stop_when_the_money_is_spent_on_postgres() {
        alone(jobs_stop_when_the_money_is_spent(Db::Postgres));
    }

    #[test]
    fn killed_workers_leave_nothing_unpaid_on_sqlite() {
        alone(killed_workers_leave_nothing_reserved_and_nothing_unpaid(
            Db::Sqlite,
        ));
    }

    #[test]
    fn killed_workers_leave_nothing_unpaid_on_postgres() {
        alone(killed_workers_leave_nothing_reserved_and_nothing_unpaid(
            Db::Postgres,
        ));
    }
}

/// The id of the client's key.
async fn id_of(client: &Client) -> String {
    let me = client.get("/api/v1/keys/me").await;
    me.data(200)["id"].as_str().unwrap().to_owned()
}

fn admin(system: &System) -> Client {
    system.client().with_key(KEYS[2])
}

async fn put(client: &Client, path: &str, body: &Value) -> Answer {
    let request = client.request(Method::PUT, &format!("/api/v1/budgets/{path}"));
    client.send(request.json(body)).await
}

async fn budget(client: &Client, path: &str) -> Value {
    client
        .get(&format!("/api/v1/budgets/{path}"))
        .await
        .data(200)
        .clone()
}

/// A job that may cost `cap` dollars.
fn capped(script: &Script, cap: f64) -> Value {
    json!({ "message": script.prompt(), "max_cost_usd": cap })
}

/// Submits so many of them, a few at a time, and again what found the database too busy: SQLite has one writer.
async fn submit(client: &Client, body: &Value, count: usize) -> Vec<Answer> {
    let mut answers = Vec::new();
    while answers.len() < count {
        let more = (count - answers.len()).min(10);
        let some = at_once((0..more).map(|_| client.submit(body))).await;
        answers.extend(some.into_iter().filter(|answer| answer.status != 503));
    }
    answers
}

/// All jobs, once all have ended.
async fn ended(system: &System, count: usize) -> Vec<Value> {
    let open = "select count(*) from job where completed_at is null";
    eventually(Duration::from_mins(3), "the end of all jobs", async || {
        (system.database().number(open).await == 0).then_some(())
    })
    .await;
    let (client, mut jobs) = (system.client(), Vec::new());
    let mut query = "limit=100".to_owned();
    loop {
        let page = client.jobs(&query).await;
        jobs.extend(page.data(200).as_array().unwrap().clone());
        let Some(next) = page.json["pagination"]["next_cursor"].as_str() else {
            break;
        };
        query = format!("limit=100&cursor={next}");
    }
    assert_eq!(jobs.len(), count);
    jobs
}

/// What must hold when nothing runs: nothing is reserved, and every sum is the same.
async fn assert_settled(system: &System) -> i64 {
    let database = system.database();
    let spent = database
        .number("select cast(sum(spent) as bigint) from budget_period where scope = 'key'")
        .await;
    for (what, sql) in [
        ("the ledger", "select cast(sum(cost) as bigint) from ledger"),
        ("the attempts", "select cast(sum(cost) as bigint) from attempt"),
        ("the jobs", "select cast(sum(cost) as bigint) from job"),
    ] {
        assert_eq!(database.number(sql).await, spent, "{what}");
    }
    let reserved = "select cast(sum(reserved) as bigint) from budget_period";
    assert_eq!(database.number(reserved).await, 0);
    assert_eq!(
        database
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
    spent
}

/// Sixty jobs of a dollar each on thirty dollars, sixteen at once: thirty run, twenty that were accepted fail and say
/// why, and ten that come later are refused.
async fn jobs_stop_when_the_money_is_spent(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(0)
        .sandbox(false)
        .env("WORKER_CONCURRENCY", "8")
        .env("CLAUDE_MAX_COST_PER_USER", "30")
        .start()
        .await;
    let (client, go) = (system.client(), system.folder().join("go"));
    let script = steps([until(&go)]).answering("ok").costing(1.0);
    let body = capped(&script, 2.0);
    // Before anything is paid: what comes after the last dollar is refused.
    for answer in submit(&client, &body, 50).await {
        answer.data(202);
    }
    system.add_worker().await;
    system.add_worker().await;
    let workers = "select count(distinct worker_id) from attempt";
    eventually(PATIENCE, "runs of both workers", async || {
        (system.database().number(workers).await == 2).then_some(())
    })
    .await;
    std::fs::write(go, "").unwrap();
    let jobs = ended(&system, 50).await;

    assert_eq!(assert_settled(&system).await, 30_000_000);
    let (paid, unpaid): (Vec<_>, Vec<_>) = jobs.iter().partition(|job| job["cost"] == 1.0);
    assert_eq!(paid.len(), 30);
    // The last one gets the dollar that is left, and uses it up.
    let done = paid.iter().filter(|job| job["status"] == "done").count();
    assert_eq!(done, 29);
    for job in unpaid {
        assert_eq!(job["error_code"], "budget_exceeded", "{job:#}");
        let why = job["error"].as_str().unwrap();
        assert!(why.contains("$30.00 of $30.00 spent"), "{why}");
    }
    for answer in submit(&client, &body, 10).await {
        answer.assert_problem(429, "budget-exceeded");
    }
}

/// The same while workers are killed: what was reserved comes back, and what was spent is in the ledger.
async fn killed_workers_leave_nothing_reserved_and_nothing_unpaid(db: Db) {
    let mut system = System::builder()
        .database(db)
        .workers(2)
        .sandbox(false)
        .env("WORKER_CONCURRENCY", "8")
        // Long enough for sixteen runs to start on two cores.
        .env("LEASE_SECONDS", "6")
        .env("CLAUDE_MAX_COST_PER_USER", "50")
        .env("LOG_LEVEL", "warn")
        .start()
        .await;
    let (client, go) = (system.client(), system.folder().join("go"));
    let call = 0.25;
    let script = steps([
        Step::Spend(call),
        until(&go),
        Step::Spend(call),
        Step::Sleep(500),
        Step::Spend(call),
    ])
    .costing(call);
    let body = capped(&script, 1.25);
    let mut seed = u64::from(std::process::id()) | 1;
    let first = system.worker(0).worker_id();
    let paid = format!("select count(*) from job where lease_owner = '{first}' and cost > 0");
    let paid = async || {
        let look = async || (system.database().number(&paid).await > 0).then_some(());
        eventually(PATIENCE, "a run that is paid for", look).await;
    };
    // Nothing is spent but a call of each run until all jobs are accepted and a worker is lost with what it has paid.
    tokio::join!(submit(&client, &body, 100), paid());
    system.worker(0).restart().await;
    std::fs::write(go, "").unwrap();
    for _ in 0..4 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        tokio::time::sleep(Duration::from_millis(1_000 + seed % 1_000)).await;
        system.worker(usize::from(seed & 8 == 0)).restart().await;
    }
    let jobs = ended(&system, 100).await;

    let spent = assert_settled(&system).await;
    // The last run's cap is what is left; the CLI looks after each call.
    assert!((45_000_000..=50_250_000).contains(&spent), "{spent}");
    let done = jobs.iter().filter(|job| job["status"] == "done").count();
    assert!(done > 20, "{done}");
    for job in jobs.iter().filter(|job| job["status"] != "done") {
        let code = job["error_code"].as_str().unwrap();
        // What lost attempts have cost is a part of the job's cap.
        assert!(
            ["budget_exceeded", "max_cost", "worker_lost"].contains(&code),
            "{job:#}"
        );
    }
    let lost = "select count(*) from attempt where ending = 'lost'";
    let paid = "select count(*) from attempt where ending = 'lost' and cost > 0";
    let (lost, paid) = (
        system.database().number(lost).await,
        system.database().number(paid).await,
    );
    assert!(
        lost > 0 && paid > 0,
        "{lost} attempts were lost, {paid} of them paid for"
    );
    let unmarked = "select count(*) from ledger join attempt on attempt.job_id = ledger.job_id
      and attempt.attempt = ledger.attempt where attempt.ending = 'lost' and not ledger.estimated";
    assert_eq!(system.database().number(unmarked).await, 0);
}

/// The beginning of the month after next, and how far the clock must be stepped to be at it.
fn next_month() -> (NaiveDate, i64) {
    let today = Utc::now().date_naive();
    let month = today.with_day(1).unwrap() + Months::new(2);
    (month, (begin_of(month) - Utc::now()).num_seconds())
}

fn begin_of(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(NaiveTime::MIN).and_utc()
}

async fn a_month_may_end_in_the_middle_of_a_run(db: Db) {
    let system = System::builder().database(db).stepped_clock().start().await;
    let (month, at_its_begin) = next_month();
    system.step_clock(at_its_begin - 3_600);
    let (client, admin) = (system.client(), admin(&system));
    let key = id_of(&client).await;
    let monthly = json!({"limit_usd": 1, "period": "month"});
    put(&admin, &format!("key/{key}"), &monthly).await.data(200);
    let old = client
        .accepted_body(&capped(&steps([Step::Spend(0.4), Step::Hang]), 1.0))
        .await;
    client.event(&old, "assistant").await;
    let new = client
        .accepted_body(&capped(&answer("ok").costing(0.3), 1.0))
        .await;
    client.until(&new, |job| job["hold"] == "budget").await;

    system.step_clock(at_its_begin + 3_600);

    assert_eq!(client.finished(&new).await["status"], "done");
    assert_eq!(client.job(&old).await.data(200)["status"], "running");
    client.cancel(&old).await.data(202);
    assert_eq!(client.finished(&old).await["cost"], 0.4);

    let status = budget(&client, &format!("key/{key}")).await;
    assert_eq!(
        (&status["spent_usd"], &status["reserved_usd"]),
        (&json!(0.3), &json!(0.0)),
        "{status:#}"
    );
    assert_eq!(
        status["period_start"],
        format!("{month}T00:00:00.000000+00:00"),
        "{status:#}"
    );
    let resets = format!("{}T00:00:00.000000+00:00", month + Months::new(1));
    assert_eq!(status["resets_at"], resets, "{status:#}");
    let (first, second) = (begin_of(month - Months::new(1)), begin_of(month));
    for (start, spent) in [(first, 400_000), (second, 300_000)] {
        let start = start.timestamp_micros();
        let sql = format!(
            "select spent + 1000 * reserved from budget_period where period_start = {start} and scope_id = '{key}'"
        );
        assert_eq!(system.database().number(&sql).await, spent, "{start}");
    }
}

async fn a_budget_may_make_jobs_wait_for_the_next_period(db: Db) {
    let system = System::builder().database(db).stepped_clock().start().await;
    let (_, at_midnight) = next_month();
    system.step_clock(at_midnight - 600);
    let (client, admin) = (system.client(), admin(&system));
    let key = id_of(&client).await;
    let daily = json!({"limit_usd": 0.5, "period": "day", "on_exceeded": "hold"});
    put(&admin, &format!("key/{key}"), &daily).await.data(200);
    // Its cap is the budget, which it reaches.
    let body = capped(&answer("ok").costing(0.5), 1.0);
    let first = client.accepted_body(&body).await;
    client.finished(&first).await;

    let waiting = client.submit(&body).await;
    assert_eq!(waiting.status, 202, "{}", waiting.text);
    assert_eq!(waiting.header("x-budget-remaining"), "0.00");
    let waiting = waiting.data(202)["id"].as_str().unwrap().to_owned();
    client.until(&waiting, |job| job["hold"] == "budget").await;
    // Another key's jobs go on.
    let other = client.with_key(KEYS[1]);
    other.finished(&other.accepted_body(&body).await).await;

    system.step_clock(at_midnight + 1);

    let job = client.finished(&waiting).await;
    assert_eq!(
        (&job["error_code"], &job["cost"]),
        (&json!("budget_exceeded"), &json!(0.5)),
        "{job:#}"
    );
    let why = job["error"].as_str().unwrap();
    assert!(
        why.starts_with("The budget had only $0.50 left for this run"),
        "{why}"
    );
}

async fn a_raised_limit_lets_waiting_jobs_begin(db: Db) {
    let system = System::start(db).await;
    let (client, admin) = (system.client(), admin(&system));
    let key = id_of(&client).await;
    for path in [format!("key/{key}"), "global/global".to_owned()] {
        put(&admin, &path, &json!({"limit_usd": 1})).await.data(200);
        let script = steps([Step::Say("hi".to_owned()), Step::Hang]);
        let running = client.accepted_body(&capped(&script, 1.0)).await;
        client.event(&running, "assistant").await;
        let waiting = client.accepted_body(&capped(&script, 1.0)).await;
        let job = client.until(&waiting, |job| job["hold"] == "budget").await;
        assert_eq!(job["status"], "queued");
        let now = budget(&client, &path).await;
        assert_eq!(now["remaining_usd"], 0.0, "{now:#}");
        assert!(now["reserved_usd"].as_f64() > Some(0.99), "{now:#}");

        put(&admin, &path, &json!({"limit_usd": 50})).await.data(200);

        let job = client.reaches(&waiting, "running").await;
        assert_eq!(job["hold"], Value::Null);
        for id in [running, waiting] {
            client.cancel(&id).await;
            client.finished(&id).await;
        }
    }
}

async fn a_global_budget_counts_every_key(db: Db) {
    let system = System::builder().database(db).stepped_clock().start().await;
    system.step_clock_to_noon();
    let (one, admin) = (system.client(), admin(&system));
    let two = one.with_key(KEYS[1]);
    let set = put(
        &admin,
        "global/global",
        &json!({"limit_usd": 1.5, "period": "week"}),
    )
    .await;
    assert_eq!(
        (&set.data(200)["scope"], &set.data(200)["id"]),
        (&json!("global"), &json!("global"))
    );
    for (client, cost) in [(&one, 1.0), (&two, 0.5)] {
        let id = client
            .accepted_body(&capped(&answer("ok").costing(cost), 2.0))
            .await;
        assert_eq!(client.finished(&id).await["cost"], cost);
    }

    for client in [&one, &two, &admin] {
        let refused = client.submit(&json!({"message": "hi"})).await;
        refused.assert_problem(429, "budget-exceeded");
        assert_eq!(
            (&refused.json["budget"]["scope"], &refused.json["budget"]["spent"]),
            (&json!("global"), &json!(1.5)),
            "{}",
            refused.text
        );
        let detail = refused.json["detail"].as_str().unwrap();
        assert!(
            detail.starts_with("Global budget exceeded: $1.50 >= $1.50; it restarts at "),
            "{detail}"
        );
    }
    let gone = admin
        .send(admin.request(Method::DELETE, "/api/v1/budgets/global/global"))
        .await;
    assert_eq!(gone.status, 204);
    one.accepted("hi").await;
}

async fn a_submission_learns_what_is_left(db: Db) {
    let system = System::builder().database(db).stepped_clock().start().await;
    let ahead = system.step_clock_to_noon();
    let now = || Utc::now().timestamp() + ahead;
    let (client, admin) = (system.client(), admin(&system));
    let key = id_of(&client).await;
    let body = capped(&answer("ok").costing(0.25), 0.25);

    let accepted = client.submit(&body).await;
    assert_eq!(
        (
            accepted.header("x-budget-limit"),
            accepted.header("x-budget-remaining")
        ),
        ("50.00", "50.00")
    );
    assert_eq!(accepted.header("x-budget-reset"), "", "it never begins anew");
    client.finished(accepted.data(202)["id"].as_str().unwrap()).await;
    client.session("s").await;
    // Whoever waits for the end is told what is left after it.
    let waited = client.post("/api/v1/sessions/s/jobs?wait=60", &body).await;
    assert_eq!(waited.header("x-budget-remaining"), "49.50", "{}", waited.text);
    client.finished(waited.json["data"]["id"].as_str().unwrap()).await;

    put(
        &admin,
        &format!("key/{key}"),
        &json!({"limit_usd": 0.5, "period": "day"}),
    )
    .await
    .data(200);
    for path in ["/api/v1/jobs", "/api/v1/sessions/s/jobs"] {
        let asked = now();
        let refused = client.post(path, &body).await;
        let answered = now();
        refused.assert_problem(429, "budget-exceeded");
        assert_eq!(refused.header("x-should-retry"), "false");
        assert_eq!(refused.header("x-budget-remaining"), "0.00");
        let reset: i64 = refused.header("x-budget-reset").parse().unwrap();
        let after: i64 = refused.header("retry-after").parse().unwrap();
        assert!((1..=86_400).contains(&after), "{after}");
        assert!(
            (reset - answered - 1..=reset - asked + 1).contains(&after),
            "{reset} {after}"
        );
        let budget = &refused.json["budget"];
        for (member, value) in [
            ("scope", json!("key")),
            ("id", json!(key)),
            ("limit", json!(0.5)),
            ("spent", json!(0.5)),
            ("reserved", json!(0.0)),
            ("period", json!("day")),
        ] {
            assert_eq!(budget[member], value, "{member}: {}", refused.text);
        }
        assert!(budget["resets_at"].is_string(), "{}", refused.text);
        let detail = refused.json["detail"].as_str().unwrap();
        assert!(
            detail.starts_with("User budget exceeded: $0.50 >= $0.50"),
            "{detail}"
        );
    }
    put(&admin, &format!("key/{key}"), &json!({"limit_usd": 0.5}))
        .await
        .data(200);
    let refused = client.submit(&body).await;
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (429, ""),
        "no time helps"
    );
    assert_eq!(refused.header("x-should-retry"), "false");
}

async fn an_administrator_sets_budgets(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let (client, admin) = (system.client(), admin(&system));
    let (key, other) = (id_of(&client).await, id_of(&client.with_key(KEYS[1])).await);
    let path = format!("key/{key}");
    let wanted = json!({
        "scope": "key", "id": key, "limit_usd": 12.5, "period": "week", "alert_thresholds": [90, 50, 90],
        "on_exceeded": "hold",
    });

    let set = put(&admin, &path, &wanted).await;
    let shown = set.data(200);
    for (member, value) in [
        ("scope", json!("key")),
        ("id", json!(key)),
        ("limit_usd", json!(12.5)),
        ("period", json!("week")),
        ("alert_thresholds", json!([50, 90])),
        ("on_exceeded", json!("hold")),
        ("spent_usd", json!(0.0)),
        ("reserved_usd", json!(0.0)),
        ("remaining_usd", json!(12.5)),
        ("alerts", json!([])),
        ("is_default", json!(false)),
        ("version", json!(2)),
    ] {
        assert_eq!(shown[member], value, "{member}: {shown:#}");
    }
    assert_eq!(set.header("etag"), "W/\"2\"");
    assert_eq!(&budget(&client, &path).await, shown, "its owner sees it");

    let with_tag = |method: Method, tag: &str| {
        admin
            .request(method, &format!("/api/v1/budgets/{path}"))
            .header("if-match", tag)
    };
    let stale = admin.send(with_tag(Method::PUT, "W/\"1\"").json(&wanted)).await;
    stale.assert_problem(412, "precondition-failed");
    let stale = admin.send(with_tag(Method::DELETE, "\"7\"")).await;
    stale.assert_problem(412, "precondition-failed");
    let fresh = admin
        .send(with_tag(Method::PUT, "\"9\", W/\"2\"").json(&json!({"limit_usd": 3})))
        .await;
    assert_eq!(fresh.data(200)["period"], "total", "a budget is set as a whole");
    let none = admin
        .request(Method::PUT, "/api/v1/budgets/global/global")
        .header("if-match", "*");
    let none = admin.send(none.json(&json!({"limit_usd": 3}))).await;
    none.assert_problem(412, "precondition-failed");

    // Others see neither, and may set nothing.
    let stranger = client.with_key(KEYS[1]);
    stranger
        .get(&format!("/api/v1/budgets/{path}"))
        .await
        .assert_problem(404, "not-found");
    for client in [&client, &stranger] {
        put(client, &path, &wanted)
            .await
            .assert_problem(403, "insufficient-scope");
        let adjust = client
            .post(
                &format!("/api/v1/budgets/{path}/adjust"),
                &json!({"delta_usd": -1, "reason": "x"}),
            )
            .await;
        adjust.assert_problem(403, "insufficient-scope");
    }
    let ids = |answer: &Answer| {
        let budgets = answer.data(200).as_array().unwrap();
        budgets
            .iter()
            .map(|budget| budget["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&client.get("/api/v1/budgets").await), [key.as_str()]);
    put(&admin, "global/global", &json!({"limit_usd": 3}))
        .await
        .data(200);
    assert_eq!(
        ids(&client.get("/api/v1/budgets").await),
        ["global", key.as_str()]
    );
    let mut all = Vec::new();
    let mut next = "/api/v1/budgets?limit=1".to_owned();
    while !next.is_empty() {
        let page = admin.get(&next).await;
        all.extend(ids(&page));
        next = page
            .header("link")
            .split_once('>')
            .map(|(link, _)| link.trim_start_matches('<').to_owned())
            .unwrap_or_default();
    }
    let mut expected = vec![key.clone(), other, id_of(&admin).await];
    expected.sort();
    expected.insert(0, "global".to_owned());
    assert_eq!(all, expected);

    let gone = admin.send(with_tag(Method::DELETE, "W/\"3\"")).await;
    assert_eq!(gone.status, 204, "{}", gone.text);
    let now = budget(&client, &path).await;
    assert_eq!(
        (&now["is_default"], &now["limit_usd"]),
        (&json!(true), &json!(50.0)),
        "{now:#}"
    );
    let audit = admin.get("/api/v1/audit?kind=admin").await;
    let entries = audit.data(200).as_array().unwrap();
    let entries: Vec<(&str, &str)> = entries
        .iter()
        .filter(|entry| entry["action"].as_str().unwrap().starts_with("budget."))
        .map(|entry| {
            (
                entry["action"].as_str().unwrap(),
                entry["object_id"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        entries,
        [
            ("budget.delete", path.as_str()),
            ("budget.put", "global/global"),
            ("budget.put", &path),
            ("budget.put", &path)
        ]
    );
}

async fn a_key_has_the_default_budget_until_a_person_sets_one(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(0)
        .env("CLAUDE_MAX_COST_PER_USER", "7")
        .start()
        .await;
    let (client, admin) = (system.client(), admin(&system));
    let made = admin.post("/api/v1/keys", &json!({"name": "plain"})).await;
    let plain = client.with_key(made.data(201)["key"].as_str().unwrap());
    let wanted = json!({"name": "own", "budget": {"limit_usd": 3, "period": "day"}});
    let made = admin.post("/api/v1/keys", &wanted).await;
    let own = client.with_key(made.data(201)["key"].as_str().unwrap());
    let put_key = id_of(&client.with_key(KEYS[1])).await;
    put(&admin, &format!("key/{put_key}"), &json!({"limit_usd": 5}))
        .await
        .data(200);

    // The setting changes: another process starts with it.
    let later = System::builder()
        .database(db)
        .on(system.database().clone())
        .workers(0)
        .env("CLAUDE_MAX_COST_PER_USER", "9")
        .start()
        .await;
    for (client, limit, period) in [
        (&client, 9.0, "total"),
        (&plain, 9.0, "total"),
        (&own, 3.0, "day"),
        (&client.with_key(KEYS[1]), 5.0, "total"),
    ] {
        let key = id_of(client).await;
        let now = budget(client, &format!("key/{key}")).await;
        assert_eq!(
            (&now["limit_usd"], &now["period"]),
            (&json!(limit), &json!(period)),
            "{now:#}"
        );
    }
    drop(later);
}

async fn an_adjustment_is_made_once(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let (client, admin) = (system.client(), admin(&system));
    let key = id_of(&client).await;
    let path = format!("/api/v1/budgets/key/{key}/adjust");
    let adjust = |body: Value| {
        let request = admin
            .request(Method::POST, &path)
            .header("idempotency-key", "march")
            .json(&body);
        admin.send(request)
    };
    let wanted = json!({"delta_usd": 49.5, "reason": "paid elsewhere"});

    let first = at_once((0..8).map(|_| adjust(wanted.clone()))).await;
    for answer in &first {
        assert_eq!(answer.data(200)["spent_usd"], 49.5, "{}", answer.text);
    }
    let replayed = |answer: &&Answer| answer.header("idempotency-replayed") == "true";
    assert_eq!(first.iter().filter(replayed).count(), 7);
    adjust(json!({"delta_usd": 1, "reason": "other"}))
        .await
        .assert_problem(422, "idempotency-key-reused");

    let more = admin
        .post(&path, &json!({"delta_usd": 1.5, "reason": "more"}))
        .await;
    assert_eq!(
        (&more.data(200)["spent_usd"], &more.data(200)["remaining_usd"]),
        (&json!(51.0), &json!(-1.0))
    );
    client
        .submit(&json!({"message": "hi"}))
        .await
        .assert_problem(429, "budget-exceeded");
    let back = admin
        .post(&path, &json!({"delta_usd": -50, "reason": "a mistake"}))
        .await;
    assert_eq!(back.data(200)["spent_usd"], 1.0);
    client.accepted("hi").await;

    let ledger = client.get("/api/v1/usage/ledger").await;
    let rows = ledger.data(200).as_array().unwrap();
    let told: Vec<(&Value, &Value)> = rows.iter().map(|row| (&row["cost"], &row["reason"])).collect();
    assert_eq!(
        told,
        [
            (&json!(-50.0), &json!("a mistake")),
            (&json!(1.5), &json!("more")),
            (&json!(49.5), &json!("paid elsewhere"))
        ]
    );
    assert_eq!(
        system
            .database()
            .number("select count(*) from audit where action = 'budget.adjust'")
            .await,
        3
    );
}

async fn thresholds_are_told(db: Db) {
    let system = System::start(db).await;
    let (client, admin) = (system.client(), admin(&system));
    let key = id_of(&client).await;
    let path = format!("key/{key}");
    put(
        &admin,
        &path,
        &json!({"limit_usd": 1, "alert_thresholds": [50, 100]}),
    )
    .await
    .data(200);
    let mut told = Vec::new();
    for alerts in [0, 1, 1, 2] {
        let id = client
            .accepted_body(&capped(&answer("ok").costing(0.25), 0.25))
            .await;
        client.finished(&id).await;
        let now = budget(&client, &path).await;
        assert_eq!(now["alerts"].as_array().unwrap().len(), alerts, "{now:#}");
        told.clone_from(now["alerts"].as_array().unwrap());
    }

    let thresholds: Vec<&Value> = told.iter().map(|alert| &alert["threshold"]).collect();
    assert_eq!(thresholds, [&json!(50), &json!(100)]);
    assert!(told.iter().all(|alert| alert["at"].is_string()), "{told:#?}");
    for line in [
        format!("the budget of {key} has reached 50 %: $0.50 of $1.00 spent"),
        format!("the budget of {key} has reached 100 %: $1.00 of $1.00 spent"),
    ] {
        // It is logged after the commit that tells the alert.
        let written = system.writes(&line).await;
        assert_eq!(written.matches(&line).count(), 1, "{line}");
    }
}

async fn a_budget_that_makes_no_sense_is_refused(db: Db) {
    let system = System::start(db).await;
    let (client, admin) = (system.client(), admin(&system));
    let key = id_of(&client).await;
    let path = format!("key/{key}");
    for (body, fault) in [
        (json!({}), ("body -> limit_usd", "missing")),
        (
            json!({"limit_usd": 0}),
            ("body -> limit_usd", "greater_than_equal"),
        ),
        (
            json!({"limit_usd": -5}),
            ("body -> limit_usd", "greater_than_equal"),
        ),
        (
            json!({"limit_usd": 1e12}),
            ("body -> limit_usd", "less_than_equal"),
        ),
        (
            json!({"limit_usd": 1, "period": "year"}),
            ("body -> period", "enum"),
        ),
        (
            json!({"limit_usd": 1, "alert_thresholds": [0]}),
            ("body -> alert_thresholds -> 0", "greater_than_equal"),
        ),
        (
            json!({"limit_usd": 1, "alert_thresholds": [101]}),
            ("body -> alert_thresholds -> 0", "less_than_equal"),
        ),
        (
            json!({"limit_usd": 1, "alert_thresholds": [1, 2, 3, 4, 5, 6]}),
            ("body -> alert_thresholds", "too_long"),
        ),
        (
            json!({"limit_usd": 1, "on_exceeded": "ignore"}),
            ("body -> on_exceeded", "enum"),
        ),
        (
            json!({"limit_usd": 1, "id": "env_00000000"}),
            ("body -> id", "value_error"),
        ),
        (
            json!({"limit_usd": 1, "scope": "global"}),
            ("body -> scope", "value_error"),
        ),
        (
            json!({"limit_usd": 1, "spent_usd": 0}),
            ("body -> spent_usd", "extra_forbidden"),
        ),
    ] {
        put(&admin, &path, &body).await.assert_faults(&[fault]);
    }
    for unknown in ["key/key_12345678", "key/env_00000000", "key/%00", "key/a%20b"] {
        put(&admin, unknown, &json!({"limit_usd": 1}))
            .await
            .assert_problem(404, "not-found");
    }
    for unknown in [
        "global/-",
        "global/x",
        "batch/b",
        "planet/earth",
        "key/key_12345678",
    ] {
        let answer = admin.get(&format!("/api/v1/budgets/{unknown}")).await;
        answer.assert_problem(404, "not-found");
    }
    for (body, fault) in [
        (json!({"delta_usd": 1}), ("body -> reason", "missing")),
        (json!({"reason": "x"}), ("body -> delta_usd", "missing")),
        (
            json!({"delta_usd": 0, "reason": "x"}),
            ("body -> delta_usd", "greater_than_equal"),
        ),
        (
            json!({"delta_usd": 1e7, "reason": "x"}),
            ("body -> delta_usd", "less_than_equal"),
        ),
        (
            json!({"delta_usd": -1e7, "reason": "x"}),
            ("body -> delta_usd", "less_than_equal"),
        ),
        (
            json!({"delta_usd": 1, "reason": ""}),
            ("body -> reason", "string_too_short"),
        ),
        (
            json!({"delta_usd": 1, "reason": "x".repeat(201)}),
            ("body -> reason", "string_too_long"),
        ),
    ] {
        let answer = admin.post(&format!("/api/v1/budgets/{path}/adjust"), &body).await;
        answer.assert_faults(&[fault]);
    }
    let none = admin
        .post(
            "/api/v1/budgets/global/global/adjust",
            &json!({"delta_usd": 1, "reason": "x"}),
        )
        .await;
    none.assert_problem(404, "not-found");
    let cursor = admin.get("/api/v1/budgets?cursor=nonsense").await;
    cursor.assert_problem(400, "invalid-cursor");

    // A budget below what is spent says how much that is.
    let id = client
        .accepted_body(&capped(&answer("ok").costing(0.75), 0.75))
        .await;
    client.finished(&id).await;
    let below = put(&admin, &path, &json!({"limit_usd": 0.5, "period": "month"})).await;
    below.assert_faults(&[("body -> limit_usd", "greater_than_equal")]);
    assert!(below.text.contains("$0.75"), "{}", below.text);
    let now = budget(&client, &path).await;
    assert_eq!(
        (&now["limit_usd"], &now["is_default"]),
        (&json!(50.0), &json!(true)),
        "nothing has changed: {now:#}"
    );
    eventually(PATIENCE, "nothing reserved", async || {
        let now = budget(&client, &path).await;
        (now["reserved_usd"] == 0.0).then_some(())
    })
    .await;
}
