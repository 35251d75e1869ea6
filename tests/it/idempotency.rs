//! A retried submission makes one job.

use std::collections::HashSet;

use serde_json::json;
use tests::client::at_once;
use tests::database::Db;
use tests::script::{Step, answer, steps};
use tests::system::{KEYS, System};
use tests::{both, once};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

both!(
    fifty_posts_at_once_with_one_key_make_one_job,
    a_repeated_post_is_answered_as_the_first,
    another_body_with_the_same_key_is_refused,
    another_caller_may_use_the_same_key,
    a_refused_submission_does_not_use_up_its_key,
    a_client_that_lost_the_answer_can_try_again,
);
once!(the_spelling_of_the_body_does_not_matter,);

async fn fifty_posts_at_once_with_one_key_make_one_job(db: Db) {
    let system = System::builder().database(db).apis(2).start().await;
    let clients = [system.client_of(0), system.client_of(1)];
    let body = json!({ "message": answer("once").prompt() });

    let answers = at_once((0..50).map(|number| clients[number % 2].submit_once("fifty", &body))).await;

    let mut ids = HashSet::new();
    for answer in &answers {
        match answer.status {
            202 => {
                ids.insert(answer.json["data"]["id"].as_str().unwrap().to_owned());
            }
            _ => panic!("{}: {}", answer.status, answer.text),
        }
    }
    assert_eq!(ids.len(), 1);
    let replayed = answers
        .iter()
        .filter(|answer| answer.header("idempotency-replayed") == "true")
        .count();
    let accepted = answers.iter().filter(|answer| answer.status == 202).count();
    assert_eq!(replayed, accepted - 1);
    assert_eq!(system.database().number("select count(*) from job").await, 1);
    clients[0].finished(ids.iter().next().unwrap()).await;
    assert_eq!(system.database().number("select count(*) from attempt").await, 1);
}

async fn a_repeated_post_is_answered_as_the_first(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let body = json!({ "message": answer("once").prompt() });
    let first = client.submit_once("again", &body).await;
    client.finished(first.data(202)["id"].as_str().unwrap()).await;

    let second = client.submit_once("again", &body).await;

    assert_eq!(second.header("idempotency-replayed"), "true");
    assert_eq!(second.data(202), first.data(202));
    assert_eq!(second.header("location"), first.header("location"));
    assert_ne!(
        second.json["meta"]["request_id"],
        first.json["meta"]["request_id"]
    );
    // In quotes, as a structured header, it is the same key.
    assert_eq!(
        client.submit_once("\"again\"", &body).await.data(202),
        first.data(202)
    );
    assert_eq!(system.database().number("select count(*) from job").await, 1);
}

async fn the_spelling_of_the_body_does_not_matter() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();
    let post = |body: &'static str| {
        let request = client
            .request(reqwest::Method::POST, "/api/v1/jobs")
            .header("idempotency-key", "spelling");
        client.send(request.header("content-type", "application/json").body(body))
    };

    let first = post(r#"{"message": "hi", "max_turns": 5, "metadata": {"a": "1", "b": "2"}}"#).await;
    let second =
        post("{\"metadata\":{\"b\":\"2\",\"a\":\"1\"},\n\"max_turns\":5.0,\"message\":\"h\\u0069\"}").await;

    assert_eq!(second.data(202)["id"], first.data(202)["id"]);
}

async fn another_body_with_the_same_key_is_refused(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    client
        .submit_once("same", &json!({ "message": "one" }))
        .await
        .data(202);

    let answer = client.submit_once("same", &json!({ "message": "two" })).await;

    answer.assert_problem(422, "idempotency-key-reused");
    assert_eq!(system.database().number("select count(*) from job").await, 1);
}

async fn another_caller_may_use_the_same_key(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let body = json!({ "message": "hi" });

    let mine = client.submit_once("shared", &body).await;
    let yours = client
        .with_key(KEYS[1])
        .submit_once("shared", &json!({ "message": "other" }))
        .await;

    assert_ne!(mine.data(202)["id"], yours.data(202)["id"]);
    assert_eq!(yours.header("idempotency-replayed"), "");
}

async fn a_refused_submission_does_not_use_up_its_key(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    client
        .submit_once("later", &json!({ "message": "" }))
        .await
        .assert_problem(422, "validation-error");

    let answer = client.submit_once("later", &json!({ "message": "better" })).await;

    answer.data(202);
    assert_eq!(answer.header("idempotency-replayed"), "");
}

async fn a_client_that_lost_the_answer_can_try_again(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let body = json!({ "message": steps([Step::Sleep(300)]).answering("once").prompt() });
    let text = body.to_string();
    let request = format!(
        "POST /api/v1/jobs HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\nidempotency-key: lost\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{text}",
        KEYS[0],
        text.len()
    );
    let address = client.base().trim_start_matches("http://").to_owned();

    // Five clients that hang up before the answer, then one that waits for it.
    for _ in 0..5 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
    }
    let answer = tests::eventually(tests::client::PATIENCE, "an answer other than 409", async || {
        let answer = client.submit_once("lost", &body).await;
        (answer.status != 409).then_some(answer)
    })
    .await;

    client.finished(answer.data(202)["id"].as_str().unwrap()).await;
    assert_eq!(system.database().number("select count(*) from job").await, 1);
    assert_eq!(system.database().number("select count(*) from attempt").await, 1);
}
