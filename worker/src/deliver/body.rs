//! What is sent about a job.

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use shared::delivery::DueDelivery;
use shared::view::JobView;
use shared::storage::{JobPart, Result, Store};
use std::time::Duration;

/// A longer result is left out: receivers have limits, and it can be fetched.
const LONGEST_RESULT: usize = 256 * 1024;

/// The bytes that tell a receiver what happened to a job, as the job is now.
pub(super) async fn of_job(store: &Store, delivery: &DueDelivery, retention: Duration) -> Result<String> {
    let Some(job_id) = delivery.job_id else {
        return Ok("{}".to_owned());
    };
    let Some(mut details) = store.job_details(job_id, None, None, JobPart::Full).await? else {
        return Ok("{}".to_owned());
    };
    let truncated = details
        .result
        .as_ref()
        .is_some_and(|result| result.len() > LONGEST_RESULT);
    details.result = details.result.filter(|_| !truncated);
    let session_rowid = match details.job.session_id {
        Some(session_id) => store.session_number(session_id).await?,
        None => None,
    };
    let (job, view) = JobView::of(details, retention);
    let full = Full {
        job: &view,
        session_rowid,
        truncated,
    };
    let data = match delivery.payload.as_deref() {
        Some("thin") => to_raw_value(&thin(&view)),
        _ => to_raw_value(&full),
    };
    let Ok(data) = data else { return Ok("{}".to_owned()) };
    let event = Event {
        event_type: &delivery.event_type,
        timestamp: delivery.created_at,
        // As the Python service called every end.
        event: (delivery.endpoint_id.is_none() && job.status.is_final()).then_some("job.completed"),
        job: delivery.endpoint_id.is_none().then_some(&*data),
        data: delivery.endpoint_id.is_some().then_some(&*data),
    };
    Ok(serde_json::to_string(&event).unwrap_or_default())
}

/// An event as it is sent: `job` to the job's own `webhook_url`, `data` to an endpoint.
#[derive(Serialize)]
struct Event<'e> {
    #[serde(rename = "type")]
    event_type: &'e str,
    timestamp: shared::clock::Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<&'e RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'e RawValue>,
}

#[derive(Serialize)]
struct Full<'v> {
    #[serde(flatten)]
    job: &'v JobView,
    session_rowid: Option<i64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
}

/// Enough to know which job it is about, and where to read about it.
fn thin(view: &JobView) -> Value {
    let Ok(Value::Object(all)) = serde_json::to_value(view) else {
        return json!({});
    };
    let kept = ["id", "status", "session", "batch_id", "custom_id", "metadata", "urls"];
    all.into_iter()
        .filter(|(name, _)| kept.contains(&name.as_str()))
        .collect()
}
