//! Whether the process lives, whether it can do its work, and how the service as a whole is.

use http::{Method, StatusCode};
use serde_json::{Value, json};
use shared::clock::{self, Timestamp};
use shared::storage::{Store, WorkerRow};
use std::time::Duration;
use tokio::time::timeout;
use warp::reply::Response;

use crate::context::Context;
use crate::http::problem::{Database, Problem};
use crate::http::reply::{self, Meta};
use crate::http::request::Request;

/// A database that hasn't answered by then can't be used.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// A worker that hasn't said how it is for so long isn't counted.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// `GET /livez`: the process lives. Touches nothing else.
pub async fn livez(_context: &Context, request: &Request) -> Result<Response, Problem> {
    only_get(request)?;
    Ok(reply::text(StatusCode::OK, "ok".to_owned()))
}

/// `GET /readyz`: 200 when requests can be served, 503 while the process stops or the database can't be written.
pub async fn readyz(context: &Context, request: &Request) -> Result<Response, Problem> {
    only_get(request)?;
    let store = &context.store;
    let draining = context.stopping.is_cancelled();
    let database = match store.is_usable().await {
        true => Database::Writes,
        false if workers(store).await.is_some() => Database::Reads,
        false => Database::Silent,
    };
    if database != Database::Writes || draining {
        return Err(Problem::NotReady { database, draining });
    }
    reply::json(
        StatusCode::OK,
        &json!({"status": "ok", "checks": {"database": "ok", "draining": false}}),
    )
}

/// `GET /api/v1/health`: always 200; the body says how things are, for the service as a whole.
pub async fn health(context: &Context, request: &Request) -> Result<Response, Problem> {
    only_get(request)?;
    let store = &context.store;
    let usable = store.is_usable().await;
    let workers = workers(store).await;
    let mut body = describe(workers.as_deref(), usable, clock::now());
    if let Some(seconds) = clock::ahead() {
        body["status"] = json!("degraded");
        body["clock_ahead_seconds"] = json!(seconds);
    }
    body["meta"] = json!(Meta::of(request));
    reply::json(StatusCode::OK, &body)
}

/// The workers that were seen lately; `None` when the database couldn't be asked.
async fn workers(store: &Store) -> Option<Vec<WorkerRow>> {
    let asked = timeout(ANSWER_WITHIN, store.workers(clock::now().before(SEEN_WITHIN))).await;
    asked.ok()?.ok()
}

/// How the service is, by its workers; `None` when the database couldn't be asked. `usable`: it can be written, too.
fn describe(workers: Option<&[WorkerRow]>, usable: bool, now: Timestamp) -> Value {
    let database = if usable && workers.is_some() {
        "ok"
    } else {
        "error"
    };
    let paused = |worker: &&WorkerRow| worker.paused_until.is_some_and(|until| until > now);
    let (claude_cli, state) = match workers {
        None => ("unknown", "unknown"),
        Some([]) => ("not_found", "none"),
        Some(workers) if workers.iter().filter(paused).count() == workers.len() => ("ok", "paused"),
        Some(_) => ("ok", "ok"),
    };
    let shown: Vec<_> = workers
        .unwrap_or_default()
        .iter()
        .map(|worker| show(worker, now))
        .collect();
    let clocks = workers
        .unwrap_or_default()
        .iter()
        .all(|worker| worker.clock_ahead.is_none());
    json!({
        "status": if (database, state) == ("ok", "ok") && clocks { "ok" } else { "degraded" },
        // The queue takes jobs as long as the database does.
        "checks": {"database": database, "claude_cli": claude_cli, "workers": state, "queue": database},
        "workers": shown,
    })
}

fn show(worker: &WorkerRow, now: Timestamp) -> Value {
    let paused_until = worker.paused_until.filter(|until| *until > now);
    json!({
        "id": worker.worker_id,
        "slots": worker.slots,
        "busy": worker.busy,
        "cli_version": worker.cli_version,
        "started_at": worker.started_at,
        "last_seen_at": worker.last_seen_at,
        "paused_until": paused_until,
        "pause_reason": worker.pause_reason.as_ref().filter(|_| paused_until.is_some()),
        "upstream": worker.upstream,
        "clock_ahead_seconds": worker.clock_ahead,
    })
}

fn only_get(request: &Request) -> Result<(), Problem> {
    if request.method == Method::GET {
        Ok(())
    } else {
        Err(Problem::MethodNotAllowed(&[Method::GET]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::id::WorkerId;

    const NOW: Timestamp = Timestamp(1_000_000_000);

    fn worker(paused_until: Option<i64>) -> WorkerRow {
        WorkerRow {
            clock_ahead: None,
            worker_id: WorkerId::new(),
            host: "host".to_owned(),
            slots: 2,
            busy: 1,
            cli_version: "2.1.331".to_owned(),
            started_at: Timestamp(0),
            last_seen_at: NOW,
            paused_until: paused_until.map(Timestamp),
            pause_reason: paused_until.map(|_| "three logins in a row were refused".to_owned()),
            upstream: None,
        }
    }

    #[test]
    fn the_service_is_well_while_one_worker_claims() {
        let status = |workers: &[WorkerRow]| describe(Some(workers), true, NOW)["status"].clone();
        assert_eq!(status(&[worker(None), worker(Some(NOW.0 + 1))]), "ok");
        assert_eq!(status(&[worker(Some(NOW.0))]), "ok", "the pause is over");
        assert_eq!(status(&[worker(Some(NOW.0 + 1))]), "degraded");
        assert_eq!(status(&[]), "degraded");
    }

    #[test]
    fn every_check_is_shown_whatever_is_wrong() {
        let checks = |workers: Option<&[WorkerRow]>, usable| describe(workers, usable, NOW)["checks"].clone();
        let all = |database: &str, claude_cli: &str, workers: &str| json!({"database": database, "claude_cli": claude_cli, "workers": workers, "queue": database});
        assert_eq!(checks(None, false), all("error", "unknown", "unknown"));
        assert_eq!(checks(Some(&[]), true), all("ok", "not_found", "none"));
        let one = [worker(None)];
        assert_eq!(checks(Some(&one), false), all("error", "ok", "ok"));
        assert_eq!(describe(Some(&one), false, NOW)["status"], "degraded");
        assert_eq!(checks(Some(&one), true), all("ok", "ok", "ok"));
    }

    #[test]
    fn a_pause_says_why_and_the_machine_is_not_named() {
        let shown = describe(Some(&[worker(Some(NOW.0 + 1))]), true, NOW);
        assert_eq!(shown["checks"]["workers"], "paused");
        assert_eq!(
            shown["workers"][0]["pause_reason"],
            "three logins in a row were refused"
        );
        assert!(!shown.to_string().contains("\"host\""));
    }
}
