//! A job as clients see it.

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};
use shared::clock::Timestamp;
use shared::id::{KeyId, SessionId};
use shared::job::{Hold, Job, JobStatus};
use shared::storage::{Position, Store};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
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

/// The members of a job, in the order in which people read them.
#[derive(Clone, Debug)]
pub struct Members(Vec<(Cow<'static, str>, Value)>);

impl Members {
    /// Keeps the members of these names.
    pub fn keep(&mut self, names: &[&str]) {
        self.0.retain(|(name, _)| names.contains(&name.as_ref()));
    }

    /// The members but the prompt, as JSON text, to be kept.
    pub fn without_message(&self) -> Result<String, Problem> {
        let mut kept = self.clone();
        kept.0.retain(|(name, _)| name != MESSAGE);
        serde_json::to_string(&kept).map_err(Problem::internal)
    }

    /// The members that were kept, with the prompt in its place.
    pub fn with_message(text: &str, message: String) -> Result<Self, Problem> {
        let mut members = serde_json::from_str::<Self>(text).map_err(Problem::internal)?;
        let place = members.0.len().min(2);
        members.0.insert(place, (MESSAGE.into(), message.into()));
        Ok(members)
    }

    /// What is left for who prefers little: enough to ask again.
    #[must_use]
    pub fn summary(mut self) -> Self {
        self.keep(&["id", "status", "urls"]);
        self
    }
}

impl Serialize for Members {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the members of a job")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    members.push((name.into(), value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// The name of the member that holds the prompt: the third.
const MESSAGE: &str = "message";

/// The job's members, with what has to be read beside its row.
pub async fn show(context: &Context, job: &Job, detail: Detail) -> Result<Members, Problem> {
    let store = &context.store;
    let mut message = message(store, job).await?;
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

/// The job's prompt; empty once it was removed.
pub async fn message(store: &Store, job: &Job) -> Result<String, Problem> {
    if job.data_removed {
        return Ok(String::new());
    }
    Ok(store.prompt(job.job_id).await?)
}

/// The job's result, where it is shown.
pub async fn result(store: &Store, job: &Job, detail: Detail) -> Result<Option<String>, Problem> {
    if detail == Detail::Basic || !job.status.is_final() || job.data_removed {
        return Ok(None);
    }
    Ok(store.result(job.job_id).await?)
}

/// The jobs of a list, one after the other. Their place in the queue isn't counted.
#[derive(Debug)]
pub struct Shower {
    context: Context,
    detail: Detail,
    names: HashMap<SessionId, Option<String>>,
    holds: HashMap<KeyId, Option<Hold>>,
}

impl Shower {
    /// Shows jobs in this detail.
    pub fn new(context: Context, detail: Detail) -> Self {
        Self {
            context,
            detail,
            names: HashMap::new(),
            holds: HashMap::new(),
        }
    }

    /// The members of a job with this prompt, or the part of it that is shown.
    pub async fn show(&mut self, job: &Job, message: String) -> Result<Members, Problem> {
        let store = &self.context.store;
        if let Some(session_id) = job.session_id
            && !self.names.contains_key(&session_id)
        {
            let session = store.session_by_id(session_id).await?;
            self.names.insert(session_id, session.map(|session| session.name));
        }
        if job.status == JobStatus::Queued && !self.holds.contains_key(&job.key_id) {
            let hold = store.lane_hold(&job.key_id).await?;
            self.holds.insert(job.key_id.clone(), hold);
        }
        let beside = Beside {
            message,
            result: result(store, job, self.detail).await?,
            session: job
                .session_id
                .and_then(|session_id| self.names.get(&session_id).cloned().flatten()),
            lane_hold: self.holds.get(&job.key_id).copied().flatten(),
            position: None,
        };
        Ok(members(job, &beside, self.context.config.retention))
    }
}

/// The members of a job on the wire.
pub fn members(job: &Job, beside: &Beside, retention: Duration) -> Members {
    let queued = job.status == JobStatus::Queued;
    let own_hold = Hold::parse(&job.hold);
    let result = beside.result.as_deref().map(parsed);
    let tools_used = result
        .as_ref()
        .map_or(Value::Null, |result| result["tools_used"].clone());
    let position = beside.position.filter(|_| queued);
    let capped = position.is_some_and(|position| position.capped);
    let concurrency_key = job
        .group_key
        .as_deref()
        .and_then(|group| group.strip_prefix("k:"));
    let members = [
        ("id", json!(job.job_id)),
        ("status", json!(job.status)),
        ("message", json!(beside.message)),
        ("webhook_url", json!(job.webhook_url)),
        ("result", json!(result)),
        ("tools_used", tools_used),
        ("error", json!(job.error)),
        ("cost", json!(job.cost)),
        ("duration_ms", json!(job.duration_ms)),
        ("created_at", json!(job.created_at)),
        ("started_at", json!(job.started_at)),
        ("completed_at", json!(job.completed_at)),
        ("kind", json!(job.kind)),
        ("session", json!(beside.session)),
        ("session_id", json!(job.claude_session_id)),
        ("batch_id", Value::Null),
        ("custom_id", json!(job.custom_id)),
        ("retry_of", json!(job.retry_of)),
        ("model", json!(job.model)),
        ("effort", json!(job.effort)),
        ("permission_mode", json!(job.permission_mode)),
        ("priority", json!(job.priority)),
        ("queue_position", json!(position.map(|position| position.ahead))),
        ("queue_position_capped", json!(capped)),
        ("estimated_start_at", Value::Null),
        ("run_after", json!(job.run_after)),
        ("deadline_at", json!(job.deadline_at)),
        ("expires_at", json!(job.completed_at.map(|at| at.plus(retention)))),
        ("attempt", json!(job.attempt)),
        ("max_attempts", json!(job.max_attempts)),
        ("on_worker_lost", json!(job.on_worker_lost)),
        ("hold", json!(own_hold.or(beside.lane_hold).filter(|_| queued))),
        ("hold_reason", json!(job.wait_reason.as_ref().filter(|_| queued))),
        ("concurrency_key", json!(concurrency_key)),
        ("cancel_requested_at", json!(job.cancel_requested_at)),
        ("cancel_reason", json!(job.cancel_reason)),
        ("error_code", json!(job.error_code)),
        ("usage", json!(job.usage.as_deref().map(parsed))),
        ("max_cost_usd", json!(job.max_cost)),
        ("timeout_seconds", json!(job.timeout_seconds)),
        ("max_turns", json!(job.max_turns)),
        ("metadata", parsed(&job.metadata)),
        ("last_event_seq", json!(job.last_event_seq)),
        ("version", json!(job.version)),
        ("data_removed", json!(job.data_removed)),
        ("urls", urls(job)),
    ];
    Members(members.map(|(name, value)| (name.into(), value)).into())
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

/// JSON that we stored ourselves.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

/// When it makes sense to look at an unfinished job again: soon for a young one, seldom for an old one. In seconds.
pub fn look_again_after(job: &Job, now: Timestamp) -> Option<u64> {
    (!job.status.is_final()).then(|| (1 + now.since(job.created_at).as_secs() / 15).min(10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_was_kept_comes_back_in_the_same_order_with_its_prompt() {
        let text = r#"{"id":"job_1","status":"queued","message":"say hi","webhook_url":null,"urls":{}}"#;
        let members = serde_json::from_str::<Members>(text).unwrap();
        let kept = members.without_message().unwrap();
        assert!(!kept.contains("say hi"));
        let again = Members::with_message(&kept, "say hi".to_owned()).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
        assert_eq!(
            serde_json::to_string(&again.summary()).unwrap(),
            r#"{"id":"job_1","status":"queued","urls":{}}"#
        );
    }
}
