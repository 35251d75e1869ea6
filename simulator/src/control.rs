//! The simulator's own routes, for a test that starts it as a process. They need no credential.
//!
//! `GET /_sim/health` · `GET /_sim/requests[?scenario=NAME][&run=RUN]` · `GET /_sim/last?scenario=NAME&run=RUN` ·
//! `GET /_sim/scenarios` · `GET`, `PUT /_sim/scenarios/NAME` · `POST /_sim/reset`

use bytes::Bytes;
use http::{Method, Response};
use serde_json::{Value, json};

use crate::scenario::Scenario;
use crate::server::{Body, Server, json_response};

/// Answers `/_sim/<path>`.
pub(crate) fn answer(
    server: &Server,
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
            json_response(200, &json!({"ok": true, "open_requests": server.recorder.open()}))
        }
        ("GET", "requests", _) => {
            let mut requests = server.recorder.requests();
            requests.retain(|request| {
                asked("scenario").is_none_or(|scenario| request.scenario == scenario)
                    && asked("run").is_none_or(|run| request.run == run)
            });
            json_response(200, &json!(requests))
        }
        ("GET", "last", _) => {
            let (scenario, run) = (
                asked("scenario").unwrap_or("default"),
                asked("run").unwrap_or_default(),
            );
            json_response(
                200,
                &server.recorder.last_body(scenario, run).unwrap_or(Value::Null),
            )
        }
        ("GET", "scenarios", _) => json_response(200, &json!(server.scenarios.list())),
        ("GET", _, Some(name)) => match server.scenarios.get(name) {
            Some(scenario) => json_response(200, &json!(*scenario)),
            None => refuse(404, "no such scenario"),
        },
        ("PUT", _, Some(name)) => match serde_json::from_slice::<Scenario>(body) {
            Ok(scenario) if scenario.steps.is_empty() => refuse(400, "steps: at least one is needed"),
            Ok(scenario) => {
                server.scenarios.put(name.to_owned(), scenario);
                json_response(200, &json!({"ok": true}))
            }
            Err(error) => refuse(400, &error.to_string()),
        },
        ("POST", "reset", _) => {
            server.recorder.reset();
            json_response(200, &json!({"ok": true}))
        }
        _ => refuse(404, "no such control route"),
    }
}

fn refuse(status: u16, why: &str) -> Response<Body> {
    json_response(status, &json!({"error": why}))
}
