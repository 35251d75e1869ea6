//! Nobody sees what another owns, on any path there is: the table of routes itself says which paths that are, so a new
//! one that this test doesn't know fails it.

use reqwest::Method;
use serde_json::json;
use tests::both;
use tests::client::{Answer, Client};
use tests::database::Db;
use tests::system::{KEYS, System};

both!(
    another_keys_objects_are_not_there,
    without_a_key_nothing_is_shown,
    an_administrator_sees_everything,
);

/// What one key owns.
struct Owned {
    key: String,
    job: String,
    session: String,
    endpoint: String,
    delivery: String,
}

impl Owned {
    async fn by(client: &Client) -> Self {
        let key = client.get("/api/v1/keys/me").await.data(200)["id"]
            .as_str()
            .unwrap()
            .to_owned();
        let session = client.post("/api/v1/sessions", &json!({"name": "private"})).await;
        let session = session.data(201)["id"].as_i64().unwrap().to_string();
        let job = client
            .accepted_body(&json!({"message": "secret words", "session": "private"}))
            .await;
        let endpoint = json!({"url": "https://hooks.example.com/private"});
        let endpoint = client.post("/api/v1/webhooks/endpoints", &endpoint).await;
        let endpoint = endpoint.data(201)["id"].as_str().unwrap().to_owned();
        let test = format!("/api/v1/webhooks/endpoints/{endpoint}/test");
        let delivery = client.post(&test, &json!({})).await;
        assert!(delivery.status < 300, "{}", delivery.text);
        let delivery = client.get("/api/v1/webhooks/deliveries").await.data(200)[0]["id"]
            .as_str()
            .unwrap()
            .to_owned();
        Self {
            key,
            job,
            session,
            endpoint,
            delivery,
        }
    }

    /// The address of a path of the table, with this key's objects in it.
    fn address(&self, path: &str) -> String {
        let object = |start: &str| path.starts_with(start);
        let parts: Vec<&str> = if object("/api/v1/jobs/{}") {
            vec![&self.job, "file"]
        } else if object("/api/v1/sessions/{}/jobs/{}") {
            vec![&self.session, &self.job]
        } else if object("/api/v1/sessions/{}") {
            vec![&self.session, "file"]
        } else if object("/api/v1/templates/{}") {
            // Templates are everybody's, and nobody has one of this name.
            vec!["none"]
        } else if object("/api/v1/keys/{}") {
            vec![&self.key]
        } else if object("/api/v1/webhooks/endpoints/{}") {
            vec![&self.endpoint]
        } else if object("/api/v1/webhooks/deliveries/{}") {
            vec![&self.delivery]
        } else if object("/api/v1/budgets/{}/{}") {
            vec!["key", &self.key]
        } else {
            vec![]
        };
        let filled = parts
            .into_iter()
            .fold(path.to_owned(), |path, part| path.replacen("{}", part, 1));
        assert!(
            !filled.contains("{}"),
            "{path} is a path that this test doesn't know: say here what a key owns there"
        );
        filled
    }
}

async fn ask(client: &Client, method: Method, path: &str) -> Answer {
    let request = client.request(method, path);
    client
        .send(request.header("content-type", "application/json").body("{}"))
        .await
}

/// Whether the answer tells anything of what the key owns; a problem repeats the address that was asked.
fn names(answer: &Answer, owned: &Owned) -> bool {
    let asked = answer.json["instance"].as_str().unwrap_or("\0");
    let told = answer.text.replace(asked, "");
    [
        &owned.job,
        &owned.endpoint,
        &owned.delivery,
        "secret words",
        "private",
    ]
    .iter()
    .any(|word| told.contains(*word))
}

async fn another_keys_objects_are_not_there(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let owner = system.client();
    let owned = Owned::by(&owner).await;
    let admin = owner.with_key(KEYS[2]);
    // All that a key can have without being an administrator's, so that no scope stands before the ownership.
    let scopes = [
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
        "queue:admin",
    ];
    let made = admin
        .post("/api/v1/keys", &json!({"name": "stranger", "scopes": scopes}))
        .await;
    let stranger = owner.with_key(made.data(201)["key"].as_str().unwrap());

    let mut walked = 0;
    for (path, access) in api::routes::listed() {
        let address = owned.address(&path);
        for rule in access.rules() {
            let answer = ask(&stranger, rule.method.clone(), &address).await;
            let place = format!("{} {address}: {} {}", rule.method, answer.status, answer.text);
            assert!(!names(&answer, &owned), "{place}");
            let allowed = rule.scope.is_none_or(|scope| scopes.contains(&scope.as_str()));
            match (allowed, path.contains("{}")) {
                (false, _) => assert_eq!(answer.status, 403, "{place}"),
                (true, true) => answer.assert_problem(404, "not-found"),
                (true, false) => assert_ne!(answer.status, 403, "{place}"),
            }
            walked += 1;
        }
    }
    assert!(walked > 20, "{walked}");
    // Nothing was done to it either.
    let job = owner.job(&owned.job).await;
    assert_eq!(
        (&job.data(200)["status"], &job.json["data"]["message"]),
        (&json!("queued"), &json!("secret words"))
    );
    // A name is free for everybody.
    let own = stranger
        .post("/api/v1/sessions", &json!({"name": "private"}))
        .await;
    assert_ne!(own.data(201)["id"].as_i64().unwrap().to_string(), owned.session);
    // Nor is another's found by naming it elsewhere.
    let within = stranger
        .submit(&json!({"message": "x", "session": owned.session}))
        .await;
    within.assert_problem(404, "not-found");
    let listed = stranger.jobs(&format!("session={}", owned.session)).await;
    assert_eq!(listed.data(200), &json!([]));
}

async fn without_a_key_nothing_is_shown(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let owned = Owned::by(&system.client()).await;
    let nobody = system.client().without_key();

    for (path, access) in api::routes::listed() {
        let address = owned.address(&path);
        if access == api::routes::Access::Open {
            let answer = nobody.get(&address).await;
            // The viewer's script is a text of others, in which any word may stand.
            let viewer = address.starts_with("/docs");
            assert!(
                answer.status == 200 && (viewer || !names(&answer, &owned)),
                "{address}"
            );
            continue;
        }
        for rule in access.rules() {
            let answer = ask(&nobody, rule.method.clone(), &address).await;
            answer.assert_problem(401, "unauthorized");
            assert_eq!(answer.header("www-authenticate"), "Bearer realm=\"api\"");
        }
        // A method that isn't there tells a stranger nothing either.
        ask(&nobody, Method::TRACE, &address)
            .await
            .assert_problem(401, "unauthorized");
    }
}

async fn an_administrator_sees_everything(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let owned = Owned::by(&system.client()).await;
    let admin = system.client().with_key(KEYS[2]);

    for (path, access) in api::routes::listed() {
        for rule in access.rules().iter().filter(|rule| rule.method == Method::GET) {
            let address = owned.address(&path);
            // A stream would stay open; a job that waits has no result and no files; no template has this name.
            if path.ends_with("/stream")
                || path.ends_with("/result")
                || path.ends_with("/files/{}")
                || path.ends_with("/archive")
                || path.starts_with("/api/v1/templates/")
            {
                continue;
            }
            let answer = admin.get(&address).await;
            assert_eq!(answer.status, 200, "{} {address}: {}", rule.method, answer.text);
        }
    }
    assert!(names(&admin.jobs("").await, &owned));
    admin.cancel(&owned.job).await.data(200);
}
