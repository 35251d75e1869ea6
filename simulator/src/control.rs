//! The simulator's own routes, for a test that starts it as a process. They need no credential.
//!
//! `GET /_sim/health` · `GET /_sim/requests[?scenario=NAME][&run=RUN]` · `GET /_sim/last?scenario=NAME&run=RUN` ·
//! `GET /_sim/scenarios` · `GET`, `PUT /_sim/scenarios/NAME` · `POST /_sim/reset` ·
//! `GET /_sim/spend`: what was answered, at list prices

use bytes::Bytes;
use http::{Method, Response};
use serde_json::{Value, json};

use crate::response::{self, Body};
use crate::scenario::Scenario;
use crate::state::State;

/// Answers `/_sim/<path>`.
pub(crate) fn answer(
    state: &State,
    method: &Method,
    path: &str,
    query: &str,
    body: &Bytes,
) -> Response<Body> {
    let asked = |name: &str| {
        query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    };
    match (method.as_str(), path, path.strip_prefix("scenarios/")) {
        ("GET", "health", _) => {
            response::json(200, &json!({"ok": true, "open_requests": state.recorder.open()}))
        }
        ("GET", "requests", _) => {
            let mut requests = state.recorder.requests();
            requests.retain(|request| {
                asked("scenario").is_none_or(|scenario| request.scenario == scenario)
                    && asked("run").is_none_or(|run| request.run == run)
            });
            response::json(200, &json!(requests))
        }
        ("GET", "last", _) => {
            let (scenario, run) = (
                asked("scenario").unwrap_or("default"),
                asked("run").unwrap_or_default(),
            );
            response::json(
                200,
                &state.recorder.last_body(scenario, run).unwrap_or(Value::Null),
            )
        }
        ("GET", "scenarios", _) => response::json(200, &json!(state.scenarios.list())),
        ("GET", _, Some(name)) => match state.scenarios.get(name) {
            Some(scenario) => response::json(200, &json!(*scenario)),
            None => refuse(404, "no such scenario"),
        },
        ("PUT", _, Some(name)) => match serde_json::from_slice::<Scenario>(body) {
            Ok(scenario) if scenario.steps.is_empty() => refuse(400, "steps: at least one is needed"),
            Ok(scenario) => {
                state.scenarios.put(name.to_owned(), scenario);
                response::json(200, &json!({"ok": true}))
            }
            Err(error) => refuse(400, &error.to_string()),
        },
        ("GET", "spend", _) => response::json(200, &state.spend.json()),
        ("POST", "reset", _) => {
            state.recorder.reset();
            state.spend.reset();
            response::json(200, &json!({"ok": true}))
        }
        _ => refuse(404, "no such control route"),
    }
}

fn refuse(status: u16, why: &str) -> Response<Body> {
    response::json(status, &json!({"error": why}))
}
