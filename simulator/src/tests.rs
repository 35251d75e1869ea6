//! The simulator as its clients see it, over plain sockets.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;

/// Sends a request and reads until the simulator closes; what came, and the error that ended it, if any.
async fn exchange(
    simulator: &Simulator,
    method: &str,
    path: &str,
    key: &str,
    body: &str,
) -> (String, io::Result<()>) {
    let mut stream = TcpStream::connect(simulator.address).await.unwrap();
    let key = if key.is_empty() {
        String::new()
    } else {
        format!("x-api-key: {key}\r\n")
    };
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{key}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let ended = timeout(Duration::from_mins(1), stream.read_to_end(&mut bytes))
        .await
        .unwrap()
        .map(drop);
    (String::from_utf8(bytes).unwrap(), ended)
}

fn ask(text: &str, stream: bool) -> String {
    json!({"model": "claude-sonnet", "stream": stream, "tools": [{"name": "Bash"}],
           "messages": [{"role": "user", "content": text}]})
    .to_string()
}

async fn started() -> Simulator {
    Simulator::start("127.0.0.1:0".parse().unwrap()).await.unwrap()
}

#[test]
fn every_builtin_scenario_has_steps_and_says_what_it_is_for() {
    let scenarios = builtin();

    assert!(scenarios.len() > 40);
    for (name, scenario) in scenarios {
        assert!(
            !scenario.steps.is_empty() && scenario.about.ends_with('.'),
            "{name}"
        );
    }
}

#[tokio::test]
async fn a_stream_has_the_events_of_the_api_in_order() {
    let simulator = started().await;

    let (answer, ended) = exchange(
        &simulator,
        "POST",
        "/v1/messages?beta=true",
        "sk-x",
        &ask("hi", true),
    )
    .await;

    ended.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.contains("content-type: text/event-stream"),
        "{answer}"
    );
    let events: Vec<&str> = answer
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .collect();
    let delta = "content_block_delta";
    let expected = [
        "message_start",
        "content_block_start",
        delta,
        delta,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(events, expected);
    assert_eq!(
        simulator.last_body("default", "").unwrap()["messages"][0]["content"],
        "hi"
    );
    assert_eq!(simulator.open_requests(), 0);
}

#[tokio::test]
async fn without_streaming_the_answer_is_one_message() {
    let simulator = started().await;

    let (answer, _) = exchange(&simulator, "POST", "/v1/messages", "sim-bash", &ask("hi", false)).await;

    assert!(
        answer.contains(r#""stop_reason":"tool_use""#) && answer.contains("Say hello"),
        "{answer}"
    );
}

#[tokio::test]
async fn who_shows_no_credential_is_refused() {
    let simulator = started().await;

    let (answer, _) = exchange(&simulator, "POST", "/v1/messages", "", &ask("hi", true)).await;

    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    assert!(answer.contains(r#""type":"authentication_error""#), "{answer}");
    assert_eq!(simulator.requests()[0].credential_kind, CredentialKind::None);
}

#[tokio::test]
async fn the_marker_in_the_prompt_beats_the_path_which_beats_the_key() {
    let simulator = started().await;
    let path = "/s/e500/r/v1/messages";

    let (by_key, _) = exchange(&simulator, "POST", "/v1/messages", "sim-e529", &ask("hi", true)).await;
    let (by_path, _) = exchange(&simulator, "POST", path, "sim-e529", &ask("hi", true)).await;
    let (by_marker, _) = exchange(
        &simulator,
        "POST",
        path,
        "sim-e529",
        &ask("[[scenario:e402]] hi", true),
    )
    .await;
    let (unknown, _) = exchange(
        &simulator,
        "POST",
        path,
        "sim-e529",
        &ask("[[scenario:none]]", true),
    )
    .await;

    assert!(by_key.starts_with("HTTP/1.1 529"), "{by_key}");
    assert!(by_path.starts_with("HTTP/1.1 500"), "{by_path}");
    assert!(by_marker.starts_with("HTTP/1.1 402"), "{by_marker}");
    assert!(
        unknown.starts_with("HTTP/1.1 400") && unknown.contains("no scenario"),
        "{unknown}"
    );
    let asked: Vec<_> = simulator
        .requests()
        .into_iter()
        .map(|request| request.scenario)
        .collect();
    assert_eq!(asked, ["e529", "e500", "e402", "none"]);
}

#[tokio::test]
async fn a_counting_scenario_counts_each_run_by_itself() {
    let simulator = started().await;
    let ask = ask("hi", true);

    let mut statuses = Vec::new();
    for run in ["a", "a", "b", "a"] {
        let path = format!("/s/e500-once/{run}/v1/messages");
        let (answer, _) = exchange(&simulator, "POST", &path, "k", &ask).await;
        statuses.push(answer[9..12].to_owned());
    }

    assert_eq!(statuses, ["500", "200", "500", "200"]);
}

#[tokio::test]
async fn every_fault_ends_the_stream_its_own_way() {
    let simulator = started().await;
    let stream = |name: &str| ask(&format!("[[scenario:{name}]]"), true);

    let (reset, reset_end) = exchange(&simulator, "POST", "/v1/messages", "k", &stream("reset")).await;
    let (closed, closed_end) = exchange(&simulator, "POST", "/v1/messages", "k", &stream("close")).await;
    let (truncated, _) = exchange(&simulator, "POST", "/v1/messages", "k", &stream("truncate")).await;
    let (failed, _) = exchange(&simulator, "POST", "/v1/messages", "k", &stream("stream-error")).await;

    assert_eq!(reset_end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    closed_end.unwrap();
    assert!(
        reset.contains("a parti") && !reset.contains("message_stop"),
        "{reset}"
    );
    assert!(
        closed.contains("a parti") && !closed.ends_with("0\r\n\r\n"),
        "{closed}"
    );
    assert!(
        truncated.ends_with("0\r\n\r\n") && !truncated.contains("message_stop"),
        "{truncated}"
    );
    assert!(
        failed.contains("event: error") && failed.contains("overloaded_error"),
        "{failed}"
    );
}

#[tokio::test]
async fn a_silent_answer_ends_when_its_client_leaves() {
    let simulator = started().await;

    for scenario in ["no-answer", "silence", "silence-headers", "pings", "endless"] {
        let ask = ask(&format!("[[scenario:{scenario}]]"), true);
        let client = exchange(&simulator, "POST", "/v1/messages", "k", &ask);
        assert!(
            timeout(Duration::from_millis(200), client).await.is_err(),
            "{scenario}"
        );
    }

    timeout(Duration::from_mins(1), async {
        while simulator.open_requests() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn scenarios_can_be_put_over_http_and_a_misspelt_one_is_refused() {
    let simulator = started().await;
    let good = json!({"steps": [{"text": "mine", "headers": {"x-reset": "$NOW+60"}}]}).to_string();
    let bad = json!({"steps": [{"texts": "mine"}]}).to_string();

    let (accepted, _) = exchange(&simulator, "PUT", "/_sim/scenarios/mine", "", &good).await;
    let (refused, _) = exchange(&simulator, "PUT", "/_sim/scenarios/mine", "", &bad).await;
    let (answer, _) = exchange(&simulator, "POST", "/v1/messages", "sim-mine", &ask("hi", false)).await;
    let (seen, _) = exchange(&simulator, "GET", "/_sim/requests?scenario=mine", "", "").await;

    assert!(accepted.starts_with("HTTP/1.1 200"), "{accepted}");
    assert!(
        refused.starts_with("HTTP/1.1 400") && refused.contains("texts"),
        "{refused}"
    );
    assert!(
        answer.contains(r#""text":"mine""#) && answer.contains("x-reset: "),
        "{answer}"
    );
    assert!(seen.contains("sim-mine"), "{seen}");
}

#[tokio::test]
async fn a_dropped_simulator_takes_no_connection() {
    let simulator = started().await;
    let address = simulator.address;

    drop(simulator);

    timeout(Duration::from_mins(1), async {
        while TcpStream::connect(address).await.is_ok() {}
    })
    .await
    .unwrap();
}
