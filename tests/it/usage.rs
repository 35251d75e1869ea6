//! What was spent: a summary, and a ledger that agrees with every attempt however it is added up.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tests::both;
use tests::client::{Client, at_once};
use tests::database::Db;
use tests::script::{Step, answer, steps};
use tests::system::{KEYS, System, run};

both!(
    the_ledger_agrees_with_every_attempt,
    a_summary_has_the_shape_of_the_python_service,
    a_ledger_is_read_page_by_page,
    a_ledger_is_a_table_for_a_spreadsheet,
    usage_is_shown_on_the_command_line,
    what_makes_no_sense_is_refused,
);

async fn id_of(client: &Client) -> String {
    let me = client.get("/api/v1/keys/me").await;
    me.data(200)["id"].as_str().unwrap().to_owned()
}

/// Jobs of two keys, in and out of a session, on two models; one is tried twice, one fails, one is cancelled.
async fn spend(system: &System) -> [Client; 3] {
    let clients = KEYS.map(|key| system.client().with_key(key));
    let [one, two, _] = &clients;
    one.session("book").await;
    let body = |cost: f64, more: Value| {
        let mut body = json!({ "message": answer("ok").costing(cost).prompt() });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    };
    let again = Step::ApiError {
        status: Some(529),
        error: "overloaded".to_owned(),
        text: "Overloaded".to_owned(),
    };
    let twice = tests::script::Script {
        runs: vec![steps([Step::Spend(0.125), again]), answer("ok").costing(0.25)],
        ..Default::default()
    };
    let fails = steps([Step::Spend(0.5), Step::Exit(3)]);
    let ids = at_once([
        one.accepted_body(&body(0.01, json!({"session": "book"}))),
        one.accepted_body(&body(0.02, json!({"session": "book", "model": "haiku"}))),
        one.accepted_body(&body(0.04, json!({"model": "haiku"}))),
        one.accepted_body(&json!({"message": twice.prompt()})),
        one.accepted_body(&json!({"message": fails.prompt(), "max_attempts": 1})),
        two.accepted_body(&body(0.08, json!({}))),
    ])
    .await;
    let cancelled = two
        .accepted_body(&json!({"message": steps([Step::Spend(0.16), Step::Hang]).prompt()}))
        .await;
    two.event(&cancelled, "assistant").await;
    two.cancel(&cancelled).await.data(202);
    for id in &ids[..5] {
        one.finished(id).await;
    }
    for id in [&ids[5], &cancelled] {
        two.finished(id).await;
    }
    clients
}

async fn start(db: Db) -> System {
    System::builder()
        .database(db)
        .sandbox(false)
        .env("CLAUDE_RETRY_BASE_DELAY", "0.1")
        .start()
        .await
}

/// All rows, over all pages.
async fn ledger(client: &Client, query: &str) -> Vec<Value> {
    let (mut rows, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = client.get(&format!("/api/v1/usage/ledger?{query}{cursor}")).await;
        rows.extend(page.data(200).as_array().unwrap().clone());
        match page.json["pagination"]["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return rows,
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "test amounts are small")]
fn micros(value: &Value) -> i64 {
    (value.as_f64().unwrap() * 1e6).round() as i64
}

fn total(rows: &[Value]) -> i64 {
    rows.iter().map(|row| micros(&row["cost"])).sum()
}

async fn the_ledger_agrees_with_every_attempt(db: Db) {
    let day = || chrono::Utc::now().format("%Y-%m-%d").to_string();
    let first = day();
    let system = start(db).await;
    let [one, two, admin] = spend(&system).await;
    let database = system.database();
    let (one_id, two_id) = (id_of(&one).await, id_of(&two).await);

    for (client, query, of) in [
        (&one, String::new(), format!("where job.key_id = '{one_id}'")),
        (&two, String::new(), format!("where job.key_id = '{two_id}'")),
        (&admin, String::new(), String::new()),
        (
            &admin,
            format!("user_id={two_id}"),
            format!("where job.key_id = '{two_id}'"),
        ),
    ] {
        let attempts = database
            .number(&format!(
                "select cast(sum(attempt.cost) as bigint) from attempt join job on job.job_id = attempt.job_id {of}"
            ))
            .await;
        let rows = ledger(client, &format!("{query}&limit=2")).await;
        assert_eq!(total(&rows), attempts, "{query}");
        for group in ["day", "key", "model", "session"] {
            let sums = ledger(client, &format!("{query}&group_by={group}&limit=1")).await;
            assert_eq!(total(&sums), attempts, "{query} {group}: {sums:#?}");
            let entries: i64 = sums.iter().map(|sum| sum["entries"].as_i64().unwrap()).sum();
            assert_eq!(usize::try_from(entries).unwrap(), rows.len(), "{group}");
            for word in ["input_tokens", "output_tokens"] {
                let tokens = |rows: &[Value]| {
                    rows.iter()
                        .map(|row| row["usage"][word].as_i64().unwrap())
                        .sum::<i64>()
                };
                assert_eq!(tokens(&sums), tokens(&rows), "{group} {word}");
            }
        }
    }

    let sums = |rows: Vec<Value>, by: &str| -> BTreeMap<String, i64> {
        rows.iter()
            .map(|row| (row[by].as_str().unwrap_or("-").to_owned(), micros(&row["cost"])))
            .collect()
    };
    let by_key = sums(ledger(&admin, "group_by=key").await, "key_id");
    assert_eq!(by_key, BTreeMap::from([(one_id, 945_000), (two_id, 240_000)]));
    let by_session = sums(ledger(&one, "group_by=session").await, "session");
    assert_eq!(
        by_session,
        BTreeMap::from([("-".to_owned(), 915_000), ("book".to_owned(), 30_000)])
    );
    let by_model = sums(ledger(&one, "group_by=model").await, "model");
    assert_eq!(
        by_model,
        BTreeMap::from([
            ("claude-haiku-5-5".to_owned(), 60_000),
            ("claude-sonnet-5-5".to_owned(), 885_000)
        ])
    );
    let by_day = ledger(&one, "group_by=day").await;
    // A day may have ended meanwhile.
    let last = day();
    assert!(
        by_day
            .iter()
            .all(|row| [&first, &last].iter().any(|day| row["day"] == day.as_str())),
        "{by_day:#?}"
    );

    let rows = ledger(&one, "").await;
    let retried: Vec<&Value> = rows.iter().filter(|row| row["attempt"] == 2).collect();
    assert_eq!(retried.len(), 1, "{rows:#?}");
    let of_job = rows.iter().filter(|row| row["job_id"] == retried[0]["job_id"]);
    assert_eq!(of_job.count(), 2, "a line for each attempt");
    let estimated = rows.iter().filter(|row| row["estimated"] == true).count();
    assert_eq!(
        estimated, 0,
        "each answer was whole, also of the run that ended without a result"
    );
    // A part of the time is a part of the ledger.
    assert_eq!(ledger(&one, "to=2020-01-01T00:00:00Z").await, [] as [Value; 0]);
    let (from, to) = (&rows[2]["at"], &rows[0]["at"]);
    let range = format!(
        "from={}&to={}",
        from.as_str().unwrap().replace('+', "%2B"),
        to.as_str().unwrap().replace('+', "%2B")
    );
    let part = ledger(&one, &range).await;
    let expected: Vec<&Value> = rows
        .iter()
        .filter(|row| {
            let at = row["at"].as_str().unwrap();
            at >= from.as_str().unwrap() && at < to.as_str().unwrap()
        })
        .collect();
    assert_eq!(part.iter().collect::<Vec<_>>(), expected);
}

async fn a_summary_has_the_shape_of_the_python_service(db: Db) {
    let system = start(db).await;
    let [one, two, admin] = spend(&system).await;
    let (one_id, two_id) = (id_of(&one).await, id_of(&two).await);

    let usage = one.get("/api/v1/usage").await;
    assert_eq!(
        (usage.status, &usage.json["user_id"]),
        (200, &json!(one_id)),
        "{}",
        usage.text
    );
    let data = usage.data(200);
    assert_eq!(
        (&data["cost"], &data["sessions"]),
        (&json!(0.945), &json!(1)),
        "{data:#}"
    );
    assert!(data["turns"].as_i64().unwrap() >= 4, "{data:#}");
    assert_eq!(data["messages"], 9, "five prompts, four answers");
    assert_eq!(
        data["jobs"],
        json!({"total": 5, "completed": 4, "running": 0, "failed": 1, "queued": 0, "cancelled": 0})
    );
    assert_eq!(
        (&data["budget"]["spent_usd"], &data["budget"]["limit_usd"]),
        (&json!(0.945), &json!(50.0))
    );
    assert!(usage.json["meta"]["request_id"].is_string());

    // The sum is the ledger's: what happens to a job or a session changes nothing.
    system.database().execute("delete from session").await;
    let later = one.get("/api/v1/usage").await;
    assert_eq!(later.data(200)["cost"], 0.945);

    let of_two = admin.get(&format!("/api/v1/usage?user_id={two_id}")).await;
    assert_eq!(of_two.json["user_id"], two_id.as_str());
    assert_eq!(
        of_two.data(200)["jobs"],
        json!({"total": 2, "completed": 1, "running": 0, "failed": 0, "queued": 0, "cancelled": 1})
    );
    let own = one.get(&format!("/api/v1/usage?user_id={one_id}")).await;
    assert_eq!(own.data(200)["cost"], 0.945);
    let others = one.get(&format!("/api/v1/usage?user_id={two_id}")).await;
    others.assert_problem(403, "insufficient-scope");
    let fresh = admin.get("/api/v1/usage").await;
    assert_eq!(fresh.data(200)["jobs"]["total"], 0);
}

async fn a_ledger_is_read_page_by_page(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let key = id_of(&client).await;
    // Ten lines at each of three moments, as they are when many jobs end at once.
    for moment in 0..3 {
        for line in 0..10 {
            let at = chrono::Utc::now().timestamp_micros() - 3_600_000_000 + moment * 1_000_000;
            let at = at - at % 1_000_000;
            system
                .database()
                .execute(&format!(
                    "insert into ledger (at, key_id, cost, model, reason) values ({at}, '{key}', {line}, 'm{line}', 'x')"
                ))
                .await;
        }
    }

    let all = ledger(&client, "limit=1000").await;
    assert_eq!(all.len(), 30);
    for limit in [1, 7, 10, 30] {
        assert_eq!(ledger(&client, &format!("limit={limit}")).await, all, "{limit}");
        let models = ledger(&client, &format!("group_by=model&limit={limit}")).await;
        assert_eq!(models.len(), 10, "{limit}");
    }
    let first = client.get("/api/v1/usage/ledger?limit=7").await;
    assert_eq!(first.json["pagination"]["has_more"], true);
    let link = first.header("link").to_owned();
    let next = link.trim_start_matches('<').split_once('>').unwrap().0;
    assert_eq!(client.get(next).await.data(200)[0], all[7]);
    // What is written meanwhile moves nothing.
    client
        .with_key(KEYS[2])
        .post(
            &format!("/api/v1/budgets/key/{key}/adjust"),
            &json!({"delta_usd": 1, "reason": "late"}),
        )
        .await
        .data(200);
    assert_eq!(client.get(next).await.data(200)[0], all[7]);
    let other = client.get(&format!("{next}&group_by=day")).await;
    other.assert_problem(400, "invalid-cursor");
}

async fn a_ledger_is_a_table_for_a_spreadsheet(db: Db) {
    let system = start(db).await;
    let [one, ..] = spend(&system).await;
    let key = id_of(&one).await;
    let csv = async |query: &str| {
        let request = one
            .request(reqwest::Method::GET, &format!("/api/v1/usage/ledger?{query}"))
            .header("accept", "text/csv");
        one.send(request).await
    };

    let whole = csv("").await;
    assert_eq!(whole.status, 200, "{}", whole.text);
    assert!(
        whole.header("content-type").starts_with("text/csv"),
        "{:?}",
        whole.headers
    );
    assert!(whole.header("vary").contains("accept"), "{:?}", whole.headers);
    let lines: Vec<&str> = whole.text.split_terminator("\r\n").collect();
    assert_eq!(
        lines[0],
        "at,key_id,job_id,attempt,session,model,cost,input_tokens,output_tokens,cache_creation_input_tokens,\
         cache_read_input_tokens,estimated,reason"
    );
    let rows = ledger(&one, "").await;
    assert_eq!(lines.len(), rows.len() + 1);
    for (line, row) in lines[1..].iter().zip(&rows) {
        let fields: Vec<&str> = line.split(',').collect();
        assert_eq!(fields.len(), 13, "{line}");
        assert_eq!(
            (fields[0], fields[1]),
            (row["at"].as_str().unwrap(), key.as_str())
        );
        assert_eq!(fields[2], row["job_id"].as_str().unwrap());
        assert_eq!(
            micros(&fields[6].parse::<f64>().unwrap().into()),
            micros(&row["cost"])
        );
    }
    let sums = csv("group_by=model").await;
    assert!(
        sums.text.starts_with("model,cost,estimated_cost,entries,")
            && sums.text.contains("claude-haiku-5-5,0.06,0.00,2,"),
        "{}",
        sums.text
    );
    let page = csv("limit=1").await;
    assert!(page.header("link").contains("rel=\"next\""), "{:?}", page.headers);
}

async fn usage_is_shown_on_the_command_line(db: Db) {
    let system = start(db).await;
    let [one, ..] = spend(&system).await;
    let (url, key) = (one.base().to_owned(), id_of(&one).await);
    let usage = async |key: &str, arguments: &[&str]| {
        let env = [("CLAUDE_QUEUE_URL", url.as_str()), ("CLAUDE_QUEUE_API_KEY", key)];
        run("claude-queue", &[&["usage"], arguments].concat(), &env).await
    };

    let shown = usage(KEYS[0], &[]).await;
    assert_eq!(shown.code, Some(0), "{shown:?}");
    for line in [
        format!("key       {key}"),
        "spent     $0.9450".to_owned(),
        "budget    $50.0000 in all: $0.9450 spent, $0.0000 reserved, $49.0550 left".to_owned(),
        "jobs      5 total, 4 completed, 0 running, 0 queued, 1 failed, 0 cancelled".to_owned(),
    ] {
        assert!(
            shown.stdout.lines().any(|shown| shown == line),
            "{line}: {shown:?}"
        );
    }
    let by_model = usage(KEYS[0], &["--by", "model"]).await;
    let last = by_model.stdout.lines().last().unwrap();
    assert!(
        last.starts_with("in all") && last.contains("0.9450"),
        "{by_model:?}"
    );
    let by_key = usage(KEYS[2], &["--by", "key", "--json"]).await;
    let rows: Value = serde_json::from_str(&by_key.stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 2, "{by_key:?}");
    let others = usage(KEYS[1], &["--user", &key]).await;
    assert_eq!(others.code, Some(1), "{others:?}");
    assert!(others.stderr.contains("admin"), "{others:?}");
}

async fn what_makes_no_sense_is_refused(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    for (query, fault) in [
        ("from=yesterday", ("query -> from", "datetime_parsing")),
        ("to=2026-05-20", ("query -> to", "datetime_parsing")),
        (
            "from=2025-01-01T00:00:00Z&to=2026-01-02T00:00:01Z",
            ("query -> from", "value_error"),
        ),
        (
            "from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z",
            ("query -> from", "value_error"),
        ),
        ("group_by=colour", ("query -> group_by", "enum")),
        ("limit=0", ("query -> limit", "greater_than_equal")),
        ("limit=1001", ("query -> limit", "less_than_equal")),
    ] {
        let answer = client.get(&format!("/api/v1/usage/ledger?{query}")).await;
        answer.assert_faults(&[fault]);
    }
    let year = "from=2025-01-01T00:00:00Z&to=2026-01-02T00:00:00Z";
    let year = client.get(&format!("/api/v1/usage/ledger?{year}")).await;
    assert_eq!(year.status, 200, "{}", year.text);
    for cursor in ["x", "AAAA", "AAAAAAAAAAAAAAAA"] {
        let answer = client.get(&format!("/api/v1/usage/ledger?cursor={cursor}")).await;
        answer.assert_problem(400, "invalid-cursor");
    }
    for path in ["/api/v1/usage", "/api/v1/usage/ledger"] {
        let others = client.get(&format!("{path}?user_id=env_00000000")).await;
        others.assert_problem(403, "insufficient-scope");
        let odd = client
            .with_key(KEYS[2])
            .get(&format!("{path}?user_id=a%20b"))
            .await;
        odd.assert_problem(404, "not-found");
        client
            .without_key()
            .get(path)
            .await
            .assert_problem(401, "unauthorized");
        client
            .post(path, &json!({}))
            .await
            .assert_problem(405, "method-not-allowed");
    }
}
