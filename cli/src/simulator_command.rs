//! `simulator`: simulates the Anthropic API until a stop signal.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use shared::shutdown::Shutdown;
use simulator::{Scenario, Simulator};

use crate::failure::Failure;
use crate::output;

/// The address, and further scenarios.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Address to listen on; port 0 selects a free one
    #[arg(long, default_value = "127.0.0.1:8431", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// More scenarios: a JSON file with one (named like the file), or with an object of several by name
    #[arg(long, value_name = "FILE")]
    scenarios: Vec<PathBuf>,
    /// Print the built-in scenarios and the purpose of each
    #[arg(long)]
    list: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<(), Failure> {
    if arguments.list {
        for (name, scenario) in simulator::builtin() {
            output::result(format_args!("{name:<18} {}", scenario.about))?;
        }
        return Ok(());
    }
    let mut scenarios = BTreeMap::new();
    for file in &arguments.scenarios {
        scenarios.extend(read(file)?);
    }
    let shutdown =
        Shutdown::on_signals().map_err(|error| Failure::Other(format!("no signal handler: {error}")))?;
    let simulator = Simulator::start(arguments.listen)
        .await
        .map_err(|error| Failure::Other(format!("{} can't be listened on: {error}", arguments.listen)))?;
    for (name, scenario) in scenarios {
        simulator.put_scenario(name, scenario);
    }
    output::progress(format_args!("listening on {}", simulator.url()));
    output::note(format_args!(
        "Point the CLI or claude-queue at it: ANTHROPIC_BASE_URL={} ANTHROPIC_API_KEY=sim-default",
        simulator.url()
    ));
    output::note("[[scenario:NAME]] in a prompt chooses what is answered; --list shows the names.");
    shutdown.drain.cancelled().await;
    Ok(())
}

fn read(file: &Path) -> Result<BTreeMap<String, Scenario>, Failure> {
    let wrong = |why: String| Failure::Other(format!("{}: {why}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if json.get("steps").is_some_and(serde_json::Value::is_array) {
        let scenario = serde_json::from_value(json).map_err(|error| wrong(error.to_string()))?;
        let name = file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        return Ok(BTreeMap::from([(name, scenario)]));
    }
    serde_json::from_value(json).map_err(|error| wrong(error.to_string()))
}
