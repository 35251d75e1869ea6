//! The Messages API: who asks, which scenario, which step; then the answer.

use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue};
use http::request::Parts;
use http::{HeaderMap, Method, Response};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::connection::ResetAtEnd;
use crate::conversation::{self, Choice};
use crate::recorder::{CredentialKind, Open, Recorded};
use crate::response::{self, Body};
use crate::scenario::{Fault, HttpError, Pick, Scenario, Step};
use crate::spend::Spend;
use crate::state::State;
use crate::{answer, playback};

/// Records a request and answers it.
pub(crate) async fn answer(state: &State, head: &Parts, body: &Bytes, reset: ResetAtEnd) -> Response<Body> {
    let open = state.recorder.opened();
    let (path_choice, path) = Choice::of_path(head.uri.path());
    let (credential_kind, credential) = credential(&head.headers);
    let asked: Value = serde_json::from_slice(body).unwrap_or_default();
    let choice = Choice::of_prompt(&asked)
        .or(path_choice)
        .or_else(|| Choice::of_credential(&credential))
        .unwrap_or_else(|| Choice {
            scenario: "default".to_owned(),
            run: None,
        });
    let header = |name: &str| {
        head.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let run = choice
        .run
        .unwrap_or_else(|| header("x-claude-code-session-id").to_owned());
    let is_turn = path == "/v1/messages" && !conversation::is_auxiliary(&asked);
    // A side request doesn't hold the job's prompt, so a marker there can't be seen here.
    let scenario = state
        .scenarios
        .get(&choice.scenario)
        .or_else(|| (!is_turn).then(Arc::default));

    let n = match &scenario {
        Some(scenario) if is_turn && credential_kind != CredentialKind::None => match scenario.pick {
            Pick::Turn => conversation::turn(&asked),
            Pick::Request => state.recorder.count(&choice.scenario, &run),
        },
        _ => 0,
    };
    let recorded = Recorded {
        number: 0,
        method: head.method.to_string(),
        path: path.to_owned(),
        credential_kind,
        credential,
        scenario: if path.starts_with("/v1/messages") {
            choice.scenario.clone()
        } else {
            String::new()
        },
        run,
        step: n,
        auxiliary: !is_turn,
        model: asked["model"].as_str().unwrap_or_default().to_owned(),
        messages: conversation::messages(&asked).len(),
        stream: asked["stream"] == true,
        bytes: body.len(),
        retry: header("x-stainless-retry-count").parse().unwrap_or_default(),
    };
    let number = state.recorder.record(recorded, is_turn.then(|| asked.clone()));
    let request_id = format!("req_sim_{number}");

    if let Some(step) = state.outage() {
        return play(step, &asked, &request_id, reset, open, &state.spend).await;
    }
    let mut response = match check(head, path, credential_kind, body, &asked, scenario.as_deref()) {
        Err(Refusal(status, kind, message)) => {
            response::json(status, &answer::error(kind, &message, &request_id))
        }
        Ok(None) if path == MODELS => response::json(
            200,
            &json!({"data": [], "has_more": false, "first_id": null, "last_id": null}),
        ),
        Ok(None) => response::json(200, &json!({"input_tokens": body.len() / 4})),
        Ok(Some(scenario)) => {
            let mut step = if is_turn {
                scenario.step(n)
            } else {
                scenario.auxiliary_step()
            };
            if let Some((input_tokens, output_tokens)) = conversation::tokens(&asked) {
                step.usage.input_tokens = input_tokens;
                step.usage.output_tokens = output_tokens;
            }
            play(step, &asked, &request_id, reset, open, &state.spend).await
        }
    };
    if let Ok(value) = HeaderValue::try_from(request_id) {
        response.headers_mut().insert("request-id", value);
    }
    response
}

/// An error that the API itself would give: status, type, message.
struct Refusal(u16, &'static str, String);

/// The list of models, which is empty here.
const MODELS: &str = "/v1/models";

/// The scenario that may answer; `None` when tokens are only to be counted, or models to be listed.
fn check<'a>(
    head: &Parts,
    path: &str,
    credential: CredentialKind,
    body: &Bytes,
    asked: &Value,
    scenario: Option<&'a Scenario>,
) -> Result<Option<&'a Scenario>, Refusal> {
    let invalid = |message: &str| Err(Refusal(400, "invalid_request_error", message.to_owned()));
    if credential == CredentialKind::None {
        return Err(Refusal(
            401,
            "authentication_error",
            "x-api-key header is required".to_owned(),
        ));
    }
    if head.method == Method::GET && path == MODELS {
        return Ok(None);
    }
    let is_known = matches!(path, "/v1/messages" | "/v1/messages/count_tokens");
    if head.method != Method::POST || !is_known {
        return Err(Refusal(404, "not_found_error", "Not found".to_owned()));
    }
    if !asked.is_object() {
        return invalid(if body.is_empty() {
            "The request body is empty"
        } else {
            "The request body is not valid JSON"
        });
    }
    if !asked["model"].is_string() {
        return invalid("model: Field required");
    }
    if conversation::messages(asked).is_empty() {
        return invalid("messages: at least one message is required");
    }
    if path.ends_with("/count_tokens") {
        return Ok(None);
    }
    match scenario {
        Some(scenario) => Ok(Some(scenario)),
        None => invalid("the simulator has no scenario of that name; GET /_sim/scenarios lists them"),
    }
}

/// Answers with one step, after its delay.
async fn play(
    mut step: Step,
    asked: &Value,
    request_id: &str,
    reset: ResetAtEnd,
    open: Open,
    spend: &Spend,
) -> Response<Body> {
    answer::fill_in(&mut step, asked);
    sleep(Duration::from_millis(step.delay_ms)).await;
    if matches!(step.fault, Some(Fault::NoAnswer)) {
        pending::<()>().await;
    }
    let mut response = if let Some(error) = &step.http_error {
        error_response(error, request_id)
    } else {
        let answer = answer::to(asked, &step);
        let model = step
            .model
            .as_deref()
            .or(asked["model"].as_str())
            .unwrap_or_default();
        if asked["stream"] == true {
            let mut response = Response::new(playback::body(answer.events, &step, reset, open, |pieces| {
                spend.bill(model, step.usage, pieces)
            }));
            let event_stream = HeaderValue::from_static("text/event-stream; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, event_stream);
            response
        } else {
            spend.bill(model, step.usage, 1).whole();
            response::json(200, &answer.message)
        }
    };
    add_headers(response.headers_mut(), &step);
    response
}

/// Which credential a request shows. The value is what tests look at; nothing here is worth hiding.
fn credential(headers: &HeaderMap) -> (CredentialKind, String) {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).trim().to_owned();
    if let Some(key) = headers.get("x-api-key").map(text).filter(|key| !key.is_empty()) {
        return (CredentialKind::XApiKey, key);
    }
    let bearer = headers.get(AUTHORIZATION).map(text);
    match bearer
        .as_deref()
        .and_then(|value| value.strip_prefix("Bearer "))
        .filter(|token| !token.is_empty())
    {
        Some(token) => (CredentialKind::Bearer, token.to_owned()),
        None => (CredentialKind::None, String::new()),
    }
}

fn error_response(error: &HttpError, request_id: &str) -> Response<Body> {
    let Some(html) = &error.html else {
        return response::json(
            error.status,
            &answer::error(&error.kind, &error.message, request_id),
        );
    };
    response::with_type(error.status, "text/html", html.clone().into())
}

/// A step's own headers. One that HTTP doesn't allow is left out.
#[expect(
    clippy::disallowed_methods,
    reason = "the simulator plays somebody else, with a clock of their own"
)]
fn add_headers(headers: &mut HeaderMap, step: &Step) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    for (name, value) in &step.headers {
        let value = match value.strip_prefix("$NOW") {
            Some("") => now.to_string(),
            Some(plus) => plus
                .strip_prefix('+')
                .and_then(|seconds| seconds.parse::<u64>().ok())
                .map_or_else(
                    || value.clone(),
                    |seconds| now.saturating_add(seconds).to_string(),
                ),
            None => value.clone(),
        };
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::try_from(value)) {
            headers.insert(name, value);
        }
    }
}
