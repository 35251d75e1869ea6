//! The stream of a job's events: replayed, live, resumed, as JSON.

use serde_json::{Value, json};
use tests::both;
use tests::client::Sse;
use tests::database::Db;
use tests::script::{Script, Step, steps, until_told};
use tests::system::System;

both!(
    a_stream_tells_a_job_from_its_beginning_to_its_end,
    a_stream_is_live,
    a_stream_resumes_after_any_event,
    a_stream_goes_on_at_another_process_after_a_kill,
    events_come_as_json_too,
    json_events_can_be_waited_for,
    a_bad_place_to_go_on_from_is_refused,
    a_stream_of_a_queued_job_that_is_cancelled_ends,
    many_events_keep_their_order,
);

fn busy() -> Script {
    steps([
        Step::Say("First.".to_owned()),
        Step::Shell("echo out".to_owned()),
        Step::Shell("echo broken; exit 3".to_owned()),
    ])
    .answering("Last.")
}

async fn a_stream_tells_a_job_from_its_beginning_to_its_end(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let id = client.play(&busy()).await;

    let mut stream = client.stream(&id, None).await;
    assert_eq!(stream.status, 200);
    assert!(
        stream.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/event-stream")
    );
    let events = stream.rest().await;

    let ids: Vec<u64> = events.iter().map(|event| event.id.unwrap()).collect();
    assert_eq!(ids, (1..=events.len() as u64).collect::<Vec<_>>());
    let told: Vec<String> = events.iter().filter_map(told).collect();
    assert_eq!(
        told,
        [
            "status queued",
            "status running",
            "assistant First.",
            "tool Bash",
            "tool_result out false",
            "tool Bash",
            "tool_result Exit code 3\nbroken true",
            "assistant Last.",
            "done Last.",
        ]
    );
    let last = events.last().unwrap();
    assert_eq!(last.data, client.job(&id).await.data(200)["result"]);
    assert_eq!(client.job(&id).await.json["data"]["last_event_seq"], ids.len());
    // Nothing is left: a client that resumes behind the end is told so, and doesn't wait.
    assert_eq!(client.stream(&id, last.id).await.status, 204);
}

/// What an event says, in a word or two; none for usage, which comes by the clock.
fn told(event: &Sse) -> Option<String> {
    let data = &event.data;
    let text = |name: &str| data[name].as_str().unwrap_or_default().trim().to_owned();
    Some(match event.event.as_str() {
        "usage" => return None,
        "status" => format!("status {}", text("status")),
        "assistant" => format!("assistant {}", text("content")),
        "tool" => format!("tool {}", text("tool_name")),
        "tool_result" => format!("tool_result {} {}", text("content"), data["is_error"]),
        "done" => format!("done {}", text("content")),
        other => format!("{other} {data}"),
    })
}

async fn a_stream_is_live(db: Db) {
    let system = System::builder().database(db).apis(2).start().await;
    let client = system.client();
    let id = client
        .play(&steps([Step::Say("early".to_owned()), until_told()]).answering("late"))
        .await;

    // Through another process than the one that took the job.
    let mut stream = system.client_of(1).stream(&id, None).await;
    let mut early = false;
    while !early {
        let event = stream.next().await.expect("the run waits");
        early = told(&event).as_deref() == Some("assistant early");
    }

    // The early event is there, and only then the run goes on.
    system.tell_to_go_on(&id);
    let rest: Vec<String> = stream.rest().await.iter().filter_map(told).collect();
    assert_eq!(rest, ["assistant late", "done late"]);
}

async fn a_stream_resumes_after_any_event(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let id = client.play(&busy()).await;
    client.finished(&id).await;
    let whole = client.stream(&id, None).await.rest().await;

    for cut in 0..whole.len() {
        let mut stream = client.stream(&id, Some(cut as u64)).await;

        assert_eq!(stream.rest().await, whole[cut..], "after {cut}");
    }
}

async fn a_stream_goes_on_at_another_process_after_a_kill(db: Db) {
    let mut system = System::builder().database(db).apis(2).start().await;
    let client = system.client_of(1);
    let says = |numbers: std::ops::Range<u32>| numbers.map(|number| Step::Say(number.to_string()));
    let script = steps(says(0..3).chain([until_told()]).chain(says(3..8)));
    let id = client.play(&script).await;

    let mut stream = system.client_of(0).stream(&id, None).await;
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        let said = event.event == "assistant" && event.data["content"] == "2";
        events.push(event);
        if said {
            system.api(0).kill();
            system.tell_to_go_on(&id);
        }
    }
    let last = events.last().unwrap().id;
    events.extend(client.stream(&id, last).await.rest().await);

    let whole = client.stream(&id, None).await.rest().await;
    assert_eq!(events, whole);
    assert_eq!(events.last().unwrap().event, "done");
}

async fn events_come_as_json_too(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let id = client.play(&busy()).await;
    client.finished(&id).await;
    let stream = client.stream(&id, None).await.rest().await;

    let mut pages = Vec::new();
    let mut after = 0;
    loop {
        let page = client.events(&id, &format!("after={after}&limit=2")).await;
        pages.extend(page.data(200).as_array().unwrap().clone());
        if page.json["pagination"]["has_more"] == false {
            break;
        }
        assert_eq!(page.json["data"].as_array().unwrap().len(), 2);
        after = page.json["pagination"]["next_after"].as_u64().unwrap();
    }

    assert_eq!(pages.len(), stream.len());
    for (json, sse) in pages.iter().zip(&stream) {
        assert_eq!(
            (&json["seq"], &json["type"], &json["data"]),
            (&json!(sse.id), &json!(sse.event), &sse.data)
        );
        assert_eq!(json["job_id"], id.as_str());
        assert!(json["at"].as_str().unwrap().ends_with("+00:00"));
    }
    // What curl asks for without being told: JSON; and a stream at the route that always streams.
    let any = client
        .request(reqwest::Method::GET, &format!("/api/v1/jobs/{id}/events"))
        .header("accept", "*/*");
    assert_eq!(client.send(any).await.header("content-type"), "application/json");
    let curl = client
        .request(reqwest::Method::GET, &format!("/api/v1/jobs/{id}/stream"))
        .header("accept", "*/*");
    assert!(
        client
            .send(curl)
            .await
            .header("content-type")
            .starts_with("text/event-stream")
    );
    let image = client
        .request(reqwest::Method::GET, &format!("/api/v1/jobs/{id}/events"))
        .header("accept", "image/png");
    client.send(image).await.assert_problem(406, "not-acceptable");
}

async fn json_events_can_be_waited_for(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let id = client
        .play(&steps([
            Step::Say("now".to_owned()),
            until_told(),
            Step::Say("then".to_owned()),
        ]))
        .await;
    client.event(&id, "assistant").await;
    let seen = client.all_events(&id).await.last().unwrap()["seq"]
        .as_u64()
        .unwrap();

    let query = format!("after={seen}&wait=50");
    let (page, ()) = tokio::join!(client.events(&id, &query), async { system.tell_to_go_on(&id) });

    let next: Vec<Value> = page.data(200).as_array().unwrap().clone();
    assert!(!next.is_empty());
    assert_eq!(next[0]["seq"], seen + 1);
    client.finished(&id).await;
}

async fn a_bad_place_to_go_on_from_is_refused(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let id = client.accepted("hi").await;

    for value in ["x", "-1", "1.5", "99999999999999999999"] {
        client
            .events(&id, &format!("after={value}"))
            .await
            .assert_problem(400, "bad-request");
        let request = client.request(reqwest::Method::GET, &format!("/api/v1/jobs/{id}/events"));
        let answer = client
            .send(
                request
                    .header("accept", "text/event-stream")
                    .header("last-event-id", value),
            )
            .await;
        answer.assert_problem(400, "bad-request");
    }
}

async fn a_stream_of_a_queued_job_that_is_cancelled_ends(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let id = client.accepted("never").await;
    let mut stream = client.stream(&id, None).await;
    assert_eq!(stream.next().await.unwrap().data["status"], "queued");

    client.cancel(&id).await.data(200);

    let rest = stream.rest().await;
    let last = rest.last().unwrap();
    assert_eq!(
        (last.event.as_str(), &last.data["reason"]),
        ("cancelled", &json!("user"))
    );
}

async fn many_events_keep_their_order(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let says = (0..600).map(|number| Step::Say(format!("line {number}")));

    let id = client.play(&steps(says).answering("end")).await;

    let mut stream = client.stream(&id, None).await;
    let live: Vec<Sse> = stream.rest().await;
    let lines: Vec<&str> = live
        .iter()
        .filter(|event| event.event == "assistant")
        .filter_map(|event| event.data["content"].as_str())
        .collect();
    let wanted: Vec<String> = (0..600)
        .map(|number| format!("line {number}"))
        .chain(["end".to_owned()])
        .collect();
    assert_eq!(lines, wanted);
    assert_eq!(client.stream(&id, None).await.rest().await, live);
}
