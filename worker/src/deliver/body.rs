//! What is sent about a job.

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};
use shared::delivery::DueDelivery;
use shared::storage::{self, JobDetails, JobPart, Store};
use shared::view::JobView;
use std::time::Duration;

/// A longer result is left out, and a longer prompt is cut: receivers have limits, and both can be fetched.
const LONGEST: usize = 256 * 1024;

/// Why there is nothing to send.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The job can't be read, now or ever.
    #[error("the job can't be read")]
    Storage(#[from] storage::Error),
    /// The job isn't there.
    #[error("there is no such job")]
    NoJob,
    /// It can't be written as JSON.
    #[error("the job can't be written as JSON")]
    Json(#[from] serde_json::Error),
}

/// The bytes that tell a receiver what happened to a job, as the job is now.
pub(super) async fn of_job(
    store: &Store,
    delivery: &DueDelivery,
    retention: Duration,
) -> Result<String, Error> {
    let job_id = delivery.job_id.ok_or(Error::NoJob)?;
    let details = store.job_details(job_id, None, None, JobPart::Full).await?;
    let mut details = details.ok_or(Error::NoJob)?;
    let truncated = cut(&mut details);
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
        Some("thin") => to_raw_value(&thin(&view)?),
        _ => to_raw_value(&full),
    }?;
    let sent = Sent {
        event_type: &delivery.event_type,
        timestamp: delivery.created_at,
        // As the Python service called every end.
        event: (delivery.endpoint_id.is_none() && job.status.is_final()).then_some("job.completed"),
        job: delivery.endpoint_id.is_none().then_some(&*data),
        data: delivery.endpoint_id.is_some().then_some(&*data),
    };
    Ok(serde_json::to_string(&sent)?)
}

/// Leaves out what is too long; whether something was.
fn cut(details: &mut JobDetails) -> bool {
    let result = details.result.take_if(|result| result.len() > LONGEST);
    let message = details.message.len() > LONGEST;
    if message {
        details
            .message
            .truncate(details.message.floor_char_boundary(LONGEST));
    }
    result.is_some() || message
}

/// An event as it is sent: `job` to the job's own `webhook_url`, `data` to an endpoint.
#[derive(Serialize)]
struct Sent<'e> {
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
fn thin(view: &JobView) -> serde_json::Result<Value> {
    let all: Map<String, Value> = serde_json::from_str(&serde_json::to_string(view)?)?;
    let kept = [
        "id",
        "status",
        "session",
        "batch_id",
        "custom_id",
        "metadata",
        "urls",
    ];
    Ok(all
        .into_iter()
        .filter(|(name, _)| kept.contains(&name.as_str()))
        .collect())
}
