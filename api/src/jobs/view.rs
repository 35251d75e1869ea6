//! A job as clients see it.

use serde::Serialize;
use serde_json::value::RawValue;
use shared::clock::Timestamp;
use shared::id::JobId;
use shared::job::Job;
use shared::storage;

pub use shared::view::{JobContext, JobView, path};

use crate::context::Context;
use crate::http::problem::Problem;
use crate::http::selection::Selection;

/// How much of a job is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// The prompt cut to 200 characters, no result, no tools.
    Basic,
    /// Everything.
    Full,
}

impl Detail {
    /// What has to be read for it.
    pub const fn part(self) -> storage::JobPart {
        match self {
            Self::Basic => storage::JobPart::Brief,
            Self::Full => storage::JobPart::Full,
        }
    }
}

/// What is left of a job for who prefers little: enough to ask again.
pub const SUMMARY: &[&str] = &["id", "status", "urls"];

/// The members that were kept, with the prompt in its place.
pub fn with_message(kept: &str, message: &str) -> Result<Box<RawValue>, Problem> {
    let message = serde_json::to_string(message).map_err(Problem::internal)?;
    // What stands before it, an id and a status, can't hold this text.
    let text = kept.replacen(r#""message":"""#, &format!(r#""message":{message}"#), 1);
    RawValue::from_string(text).map_err(Problem::internal)
}

/// A job, or the members of it that the client asked for.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum JobPart {
    /// All.
    Whole(Box<JobView>),
    /// Some.
    Some(Selection),
}

impl JobPart {
    /// The members of these names; of none, all.
    pub fn of(view: JobView, names: &[&str]) -> Result<Self, Problem> {
        if names.is_empty() {
            Ok(Self::Whole(Box::new(view)))
        } else {
            Ok(Self::Some(Selection::of(&view, names)?))
        }
    }
}

/// Reads a job again, and shows it.
pub async fn show(context: &Context, job_id: JobId, detail: Detail) -> Result<(Job, JobView), Problem> {
    let store = &context.store;
    let details = store.job_details(job_id, None, None, detail.part()).await?;
    let details = details.ok_or(Problem::NoSuch("Job"))?;
    Ok(JobView::of(details, context.config.retention))
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
        let kept = r#"{"id":"job_1","status":"queued","message":"","webhook_url":null,"metadata":{"message":""},"urls":{}}"#;
        let again = with_message(kept, "say \"hi\"").unwrap();
        assert_eq!(
            again.get(),
            r#"{"id":"job_1","status":"queued","message":"say \"hi\"","webhook_url":null,"metadata":{"message":""},"urls":{}}"#
        );
        let summary = Selection::of(&again, SUMMARY).unwrap();
        assert_eq!(
            serde_json::to_string(&summary).unwrap(),
            r#"{"id":"job_1","status":"queued","urls":{}}"#
        );
    }
}
