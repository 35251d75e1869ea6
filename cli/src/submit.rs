//! `submit`: submits a prompt and prints the job's id.

use std::io::Read;

use serde_json::{Value, json};
use shared::env::Vars;
use uuid::Uuid;

use crate::client::Client;
use crate::failure::Failure;
use crate::{logs, output, wait};

/// The prompt and the settings of the job.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The prompt; without one, or with `-`, it is read from standard input
    message: Option<String>,
    /// Model, such as sonnet or opus
    #[arg(long)]
    model: Option<String>,
    /// Effort of the model: low, medium, high, xhigh, max
    #[arg(long)]
    effort: Option<String>,
    /// Permission mode: default, plan, acceptEdits, dontAsk, …
    #[arg(long)]
    permission_mode: Option<String>,
    /// Maximum cost of an attempt in dollars
    #[arg(long, value_name = "USD")]
    max_cost: Option<f64>,
    /// Maximum number of turns
    #[arg(long, value_name = "N")]
    max_turns: Option<u32>,
    /// Maximum duration of an attempt in seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Jobs with the same key run one at a time, in order
    #[arg(long, value_name = "KEY")]
    concurrency_key: Option<String>,
    /// A second submission with the same key returns the same job (default: a random key)
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Wait for the end and print the result instead of the id
    #[arg(long)]
    wait: bool,
    /// Print the events until the end
    #[arg(long, short)]
    follow: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let client = Client::from_vars(vars)?;
    let message = match arguments.message.as_deref() {
        Some(message) if message != "-" => message.to_owned(),
        _ => from_stdin()?,
    };
    let mut body = json!({"message": message});
    let optional = [
        ("model", arguments.model.map(Value::from)),
        ("effort", arguments.effort.map(Value::from)),
        ("permission_mode", arguments.permission_mode.map(Value::from)),
        ("max_cost_usd", arguments.max_cost.map(Value::from)),
        ("max_turns", arguments.max_turns.map(Value::from)),
        ("timeout_seconds", arguments.timeout.map(Value::from)),
        ("concurrency_key", arguments.concurrency_key.map(Value::from)),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    let key = arguments
        .idempotency_key
        .unwrap_or_else(|| Uuid::new_v4().to_string());

    let job = client.submit(&body, &key).await?;

    let id = job["id"].as_str().unwrap_or_default();
    if arguments.follow || arguments.wait {
        output::note(id);
    }
    if arguments.follow {
        logs::follow(&client, id).await?;
    }
    if arguments.wait {
        return wait::until_end(&client, id, None, false).await;
    }
    if arguments.follow {
        return wait::done(&client.job(id, 0).await?);
    }
    output::result(id).map_err(|failure| {
        // Whatever the reason: the id is all that leads to the job.
        Failure::Other(format!("{id} is submitted, but {failure}"))
    })
}

fn from_stdin() -> Result<String, Failure> {
    let mut message = String::new();
    std::io::stdin()
        .read_to_string(&mut message)
        .map_err(|error| Failure::Other(format!("the prompt can't be read from standard input: {error}")))?;
    Ok(message)
}
