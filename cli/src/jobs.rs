//! `jobs`: lists the newest jobs, one per line.

use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;
use crate::{output, show};

/// The jobs to list.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these statuses, comma-separated: queued, running, done, failed, cancelled
    #[arg(long)]
    status: Option<String>,
    /// Maximum number of jobs, 1 to 100
    #[arg(long, default_value_t = 20)]
    limit: u32,
    /// Print the response as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let mut query = vec![("limit", arguments.limit.to_string())];
    query.extend(arguments.status.map(|status| ("status", status)));
    let page = Client::from_vars(vars)?.jobs(&query).await?;
    if arguments.json {
        return output::json(&page);
    }
    for job in page["data"].as_array().into_iter().flatten() {
        output::result(show::row(job))?;
    }
    if page["pagination"]["has_more"] == true {
        output::note("there are more jobs; --limit shows up to 100");
    }
    Ok(())
}
