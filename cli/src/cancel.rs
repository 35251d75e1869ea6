//! `cancel`: cancels a job.

use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;
use crate::output;

/// The job to cancel.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The job's id
    id: String,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let job = Client::from_vars(vars)?.cancel(&arguments.id).await?;
    match job["status"].as_str() {
        Some("cancelled") => output::result("cancelled"),
        _ => output::result(format_args!(
            "cancelling: it is {}",
            job["status"].as_str().unwrap_or("?")
        )),
    }
}
