//! `logs`: prints a job's events, and follows them while it runs.

use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;
use crate::{output, show};

/// The job, and the format.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The job's id
    id: String,
    /// Print each event as a line of JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let client = Client::from_vars(vars)?;
    if !arguments.json {
        return follow(&client, &arguments.id).await;
    }
    client
        .follow(&arguments.id, 0, |event| {
            output::json_line(&serde_json::json!({"seq": event.seq, "type": event.kind, "data": event.data}))
        })
        .await
}

/// Prints a job's events up to the last one.
pub(crate) async fn follow(client: &Client, id: &str) -> Result<(), Failure> {
    client
        .follow(id, 0, |event| show::event(event).map_or(Ok(()), output::result))
        .await
}
