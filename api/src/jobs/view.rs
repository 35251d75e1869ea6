//! A job as clients see it.

use serde_json::{Map, Value, json};
use shared::clock::Timestamp;
use shared::id::SessionId;
use shared::job::{Hold, Job, JobStatus};
use shared::storage::{Position, Store};
use std::collections::HashMap;
use std::time::Duration;

use crate::context::Context;
use crate::problem::Problem;

/// How much of a job is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// The prompt cut to 200 characters, no result, no tools.
    Basic,
    /// Everything.
    Full,
}

/// What is shown of a job and isn't in its row.
#[derive(Debug, Default)]
pub struct Beside {
    /// The prompt, or the part of it that is shown.
    pub message: String,
    /// The result, as JSON text.
    pub result: Option<String>,
    /// The name of its session.
    pub session: Option<String>,
    /// What holds all jobs of its owner.
    pub lane_hold: Option<Hold>,
    /// How many jobs go before it.
    pub position: Option<Position>,
}

/// The job's members, with what has to be read beside its row.
pub async fn show(context: &Context, job: &Job, detail: Detail) -> Result<Map<String, Value>, Problem> {
    let store = &context.store;
    let mut message = if job.data_removed {
        String::new()
    } else {
        store.prompt(job.job_id).await?
    };
    if detail == Detail::Basic {
        message = message.chars().take(200).collect();
    }
    let session = match job.session_id {
        Some(session_id) => store.session_by_id(session_id).await?.map(|session| session.name),
        None => None,
    };
    let queued = job.status == JobStatus::Queued;
    let lane_hold = if queued {
        store.lane_hold(&job.key_id).await?
    } else {
        None
    };
    let position = if queued {
        Some(store.position(job).await?)
    } else {
        None
    };
    let result = result(store, job, detail).await?;
    Ok(members(
        job,
        &Beside {
            message,
            result,
            session,
            lane_hold,
            position,
        },
        context.config.retention,
    ))
}

/// The job's result, where it is shown.
pub async fn result(store: &Store, job: &Job, detail: Detail) -> Result<Option<String>, Problem> {
    if detail == Detail::Basic || !job.status.is_final() || job.data_removed {
        return Ok(None);
    }
    Ok(store.result(job.job_id).await?)
}

/// The jobs of a list. Their place in the queue isn't counted.
pub async fn show_all(
    context: &Context,
    jobs: Vec<(Job, String)>,
    detail: Detail,
) -> Result<Vec<Map<String, Value>>, Problem> {
    let store = &context.store;
    let (mut names, mut holds) = (HashMap::<SessionId, Option<String>>::new(), HashMap::new());
    let mut shown = Vec::with_capacity(jobs.len());
    for (job, message) in jobs {
        if let Some(session_id) = job.session_id
            && !names.contains_key(&session_id)
        {
            let session = store.session_by_id(session_id).await?;
            names.insert(session_id, session.map(|session| session.name));
        }
        if job.status == JobStatus::Queued && !holds.contains_key(&job.key_id) {
            holds.insert(job.key_id.clone(), store.lane_hold(&job.key_id).await?);
        }
        let beside = Beside {
            message,
            result: result(store, &job, detail).await?,
            session: job.session_id.and_then(|session_id| names[&session_id].clone()),
            lane_hold: holds.get(&job.key_id).copied().flatten(),
            position: None,
        };
        shown.push(members(&job, &beside, context.config.retention));
    }
    Ok(shown)
}

/// The members of a job on the wire.
pub fn members(job: &Job, beside: &Beside, retention: Duration) -> Map<String, Value> {
    let queued = job.status == JobStatus::Queued;
    let own_hold = Hold::parse(&job.hold);
    let result = beside.result.as_deref().map(parsed);
    let position = beside.position.filter(|_| queued);
    let value = json!({
        "id": job.job_id,
        "status": job.status,
        "message": beside.message,
        "webhook_url": job.webhook_url,
        "tools_used": result.as_ref().map_or(&Value::Null, |result| &result["tools_used"]),
        "result": result,
        "error": job.error,
        "cost": job.cost,
        "duration_ms": job.duration_ms,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "completed_at": job.completed_at,
        "kind": job.kind,
        "session": beside.session,
        "session_id": job.claude_session_id,
        "batch_id": null,
        "custom_id": job.custom_id,
        "retry_of": job.retry_of,
        "model": job.model,
        "effort": job.effort,
        "permission_mode": job.permission_mode,
        "priority": job.priority,
        "queue_position": position.map(|position| position.ahead),
        "queue_position_capped": position.is_some_and(|position| position.capped),
        "estimated_start_at": null,
        "run_after": job.run_after,
        "deadline_at": job.deadline_at,
        "expires_at": job.completed_at.map(|at| at.plus(retention)),
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "on_worker_lost": job.on_worker_lost,
        "hold": own_hold.or(beside.lane_hold).filter(|_| queued),
        "concurrency_key": job.group_key.as_deref().and_then(|group| group.strip_prefix("k:")),
        "cancel_requested_at": job.cancel_requested_at,
        "cancel_reason": job.cancel_reason,
        "error_code": job.error_code,
        "usage": job.usage.as_deref().map(parsed),
        "max_cost_usd": job.max_cost,
        "timeout_seconds": job.timeout_seconds,
        "max_turns": job.max_turns,
        "metadata": parsed(&job.metadata),
        "last_event_seq": job.last_event_seq,
        "version": job.version,
        "data_removed": job.data_removed,
        "urls": urls(job),
    });
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

/// The path of a job.
pub fn path(job: &Job) -> String {
    format!("/api/v1/jobs/{}", job.job_id)
}

fn urls(job: &Job) -> Value {
    let path = path(job);
    json!({
        "self": path,
        "events": format!("{path}/events"),
        "result": format!("{path}/result"),
        "cancel": format!("{path}/cancel"),
    })
}

/// What is left of a job for who prefers little: enough to ask again.
pub fn summary(mut job: Map<String, Value>) -> Map<String, Value> {
    job.retain(|name, _| ["id", "status", "urls"].contains(&name.as_str()));
    job
}

/// JSON that we stored ourselves.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

/// When it makes sense to look at an unfinished job again: soon for a young one, seldom for an old one. In seconds.
pub fn look_again_after(job: &Job, now: Timestamp) -> Option<u64> {
    (!job.status.is_final()).then(|| (1 + now.since(job.created_at).as_secs() / 15).min(10))
}
