//! `claude-queue-api`: serves the API until it is told to stop.

use api::{Config, Context, StartError};
use shared::env::Vars;
use shared::shutdown::Shutdown;
use shared::storage::{DatabaseUrl, Store, Wakeups};
use shared::telemetry::{self, chain};
use shared::{clock, env, permissions};
use std::error::Error;
use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;
use tokio::net::TcpListener;

/// How often a SQLite file is asked whether somebody wrote to it.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// Connections to PostgreSQL, beside the few that every process has.
const DATABASE_SLOTS: u32 = 8;

/// Serves the HTTP API of claude-queue. Settings are variables of the environment or of .env; see .env.example.
#[derive(Debug, clap::Parser)]
#[command(name = "claude-queue-api", version)]
struct Arguments {}

fn main() -> ExitCode {
    permissions::private_files();
    let Arguments {} = clap::Parser::parse();
    match settings() {
        Ok((config, database)) => run(config, &database),
        Err(error) => {
            complain(&error);
            ExitCode::from(2)
        }
    }
}

fn settings() -> Result<(Config, DatabaseUrl), env::Error> {
    let vars = Vars::from_process()?;
    telemetry::start(&vars)?;
    clock::start(&vars);
    let settings = (Config::from_vars(&vars)?, DatabaseUrl::from_vars(&vars)?);
    vars.warn_misspelt();
    Ok(settings)
}

#[tokio::main]
async fn run(config: Config, database: &DatabaseUrl) -> ExitCode {
    match serve(config, database).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error.as_ref());
            match error.downcast_ref() {
                Some(StartError::Setting(_)) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

async fn serve(config: Config, database: &DatabaseUrl) -> Result<(), Box<dyn Error>> {
    let shutdown = Shutdown::on_signals()?;
    let store = Store::open(database, DATABASE_SLOTS).await?;
    let wakeups = Wakeups::listen(&store, LOOK_EVERY, shutdown.drain.clone());
    let listener = listen(config.address).await?;
    let context = Context::new(config, store.clone(), wakeups).await?;
    // Whoever started this may not read on.
    let _ = writeln!(
        std::io::stdout(),
        "listening on http://{}",
        listener.local_addr()?
    );
    api::serve(listener, context, shutdown).await?;
    store.close().await;
    Ok(())
}

async fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|error| format!("could not listen on {address} (API_HOST, API_PORT): {error}"))
}

/// Says on stderr what went wrong, with its causes.
fn complain(error: &(dyn Error + 'static)) {
    // If stderr is gone, there's nobody to tell.
    let _ = writeln!(std::io::stderr(), "claude-queue-api: {}", chain(error));
}
