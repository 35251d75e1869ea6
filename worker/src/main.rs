//! `claude-queue-worker`: takes jobs and runs them. With the argument `guard` it is the guard of one run.

use shared::env::Vars;
use shared::shutdown::Shutdown;
use shared::storage::{DatabaseUrl, Store, Wakeups};
use shared::telemetry;
use shared::{clock, permissions};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use worker::{Config, Error, account};

/// How long what is still open may take to close when everything else has ended.
const CLOSE: Duration = Duration::from_secs(2);

/// Runs the jobs of claude-queue. Settings are variables of the environment or of .env; see .env.example.
#[derive(Debug, clap::Parser)]
#[command(name = "claude-queue-worker", version)]
struct Arguments {}

fn main() -> ExitCode {
    permissions::private_files();
    // First of all: a guard is single-threaded and small.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == worker::guard::ARGUMENT)
    {
        return worker::guard::main();
    }
    let Arguments {} = clap::Parser::parse();
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "claude-queue-worker: {}",
                telemetry::chain(&error)
            );
            ExitCode::from(if matches!(error, Error::Storage(_)) { 1 } else { 2 })
        }
    }
}

/// Becomes the user that runs jobs, then starts the threads: each has the user that its maker has.
fn start() -> Result<(), Error> {
    let mut vars = Vars::from_process()?;
    let folders = account::folders(&vars)?;
    account::become_ordinary(&mut vars, &folders)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Error::Threads)?;
    let ended = runtime.block_on(serve(vars));
    runtime.shutdown_timeout(CLOSE);
    ended
}

async fn serve(vars: Vars) -> Result<(), Error> {
    telemetry::start(&vars)?;
    clock::start(&vars);
    let config = Config::from_vars(&vars)?;
    let url = DatabaseUrl::from_vars(&vars)?;
    vars.warn_misspelt();
    let shutdown = Shutdown::on_signals().map_err(Error::Signals)?;
    let store = Store::open(&url, config.concurrency).await?;
    let listening = CancellationToken::new();
    let wakeups = Wakeups::listen(&store, Duration::from_millis(10), listening.clone());
    worker::run(config, store.clone(), wakeups, shutdown, |worker_id| {
        let _ = writeln!(std::io::stdout(), "worker ready {worker_id}");
    })
    .await?;
    listening.cancel();
    store.close().await;
    Ok(())
}
