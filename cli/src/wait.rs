//! `wait`: blocks until a job has ended, and prints its result.

use std::time::Duration;

use serde_json::Value;
use shared::env::Vars;
use tokio::time::{Instant, sleep};

use crate::client::{Client, Retry};
use crate::failure::Failure;
use crate::output;

/// Seconds of one long poll; the service may make it shorter.
const POLL_SECONDS: u64 = 50;

/// The job, and how long to wait.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The job's id
    id: String,
    /// Maximum number of seconds to wait
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Print the whole job as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let client = Client::from_vars(vars)?;
    until_end(&client, &arguments.id, arguments.timeout, arguments.json).await
}

/// Waits until the job has ended and prints its result. Fails unless the job is done.
pub(crate) async fn until_end(
    client: &Client,
    id: &str,
    timeout: Option<u64>,
    as_json: bool,
) -> Result<(), Failure> {
    let mut retry = Retry::default();
    // The first request doesn't wait: retries are only for a service that has responded.
    let mut longest = 0;
    let deadline = timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()).as_secs());
        let asked = Instant::now();
        let wait = left.unwrap_or(longest).min(longest);
        longest = POLL_SECONDS;
        let job = match client.job(id, wait).await {
            Ok(job) => job,
            Err(failure) if left == Some(0) => return Err(failure),
            Err(failure) => {
                retry.wait(failure, Duration::from_secs(wait)).await?;
                continue;
            }
        };
        retry.reset();
        if matches!(job["status"].as_str(), Some("done" | "failed" | "cancelled")) {
            return print_result(&job, as_json);
        }
        if left == Some(0) {
            let status = job["status"].as_str().unwrap_or("?");
            return Err(Failure::StillRunning(format!(
                "{id} is still {status}; it goes on"
            )));
        }
        if wait > 0 && asked.elapsed() < Duration::from_secs(1) {
            // The service didn't wait.
            sleep(Duration::from_secs(1)).await;
        }
    }
}

fn print_result(job: &Value, as_json: bool) -> Result<(), Failure> {
    if as_json {
        output::json(job)?;
    } else if let Some(content) = job["result"]["content"]
        .as_str()
        .filter(|content| !content.is_empty())
    {
        output::result(content)?;
    }
    done(job)
}

/// Fails unless the job is done, and says why it isn't.
pub(crate) fn done(job: &Value) -> Result<(), Failure> {
    if job["status"] == "done" {
        return Ok(());
    }
    let why = job["error"]
        .as_str()
        .or(job["cancel_reason"].as_str())
        .unwrap_or_default();
    output::note(format_args!(
        "claude-queue: the job is {}: {why}",
        job["status"].as_str().unwrap_or("?")
    ));
    Err(Failure::NotDone)
}
