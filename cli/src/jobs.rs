//! `jobs`: the newest jobs, one a line.

use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;
use crate::show;

/// Which jobs.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these statuses, with commas between them: queued, running, done, failed, cancelled
    #[arg(long)]
    status: Option<String>,
    /// At most so many, 1 to 100
    #[arg(long, default_value_t = 20)]
    limit: u32,
    /// The service's answer as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let mut query = vec![("limit", arguments.limit.to_string())];
    query.extend(arguments.status.map(|status| ("status", status)));
    let page = Client::from_vars(vars)?.jobs(&query).await?;
    if arguments.json {
        println!("{page:#}");
        return Ok(());
    }
    for job in page["data"].as_array().into_iter().flatten() {
        println!("{}", show::row(job));
    }
    if page["pagination"]["has_more"] == true {
        eprintln!("there are more; --limit shows up to 100");
    }
    Ok(())
}
