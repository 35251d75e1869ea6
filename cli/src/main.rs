//! `claude-queue`, the command for people: serves (`up`), shows (`demo`), looks after (`migrate`, `doctor`, `keys`, `prices`),
//! plays the Anthropic API (`simulator`), and is a client of a running service (`submit`, `wait`, `logs`, `cancel`,
//! `jobs`, `usage`, `webhooks`).
//!
//! The only crate that knows both the API and the worker. Each command is a file of its name.

mod cancel;
mod client;
mod demo;
mod doctor;
mod failure;
mod jobs;
mod keys;
mod logs;
mod migrate;
mod output;
mod prices;
mod resume;
mod service;
mod show;
mod simulator_command;
mod submit;
mod up;
mod usage;
mod wait;
mod webhooks;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use shared::env::Vars;
use worker::account;

use failure::Failure;

const AFTER_HELP: &str = "\
The client commands use CLAUDE_QUEUE_URL and CLAUDE_QUEUE_API_KEY; without them, API_PORT and API_KEYS of .env.

Exit codes:
  0  done
  1  failed: the job, or the command
  2  a wrong argument or setting
  3  the job is still running after wait --timeout
  4  the service can't be reached or isn't available";

/// Runs Claude Code jobs from a durable queue, behind an HTTP API.
#[derive(Debug, Parser)]
#[command(
    name = "claude-queue",
    version,
    after_help = AFTER_HELP
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve: the API and a worker in one process, on a SQLite file unless the settings name PostgreSQL
    Up,
    /// Run one job with the real Claude CLI and simulated answers; needs no account
    Demo(demo::Arguments),
    /// Migrate the database to this version's schema (the services do so at start)
    Migrate,
    /// Check what the service needs on this machine, and say how to fix what is missing
    Doctor(doctor::Arguments),
    /// Simulate the Anthropic API on loopback, for tests without an account
    Simulator(simulator_command::Arguments),
    /// Submit a job and print its id
    Submit(submit::Arguments),
    /// Wait for a job to end and print its result
    Wait(wait::Arguments),
    /// Print a job's events, and follow them while it runs
    Logs(logs::Arguments),
    /// Cancel a job
    Cancel(cancel::Arguments),
    /// List jobs, the newest first
    Jobs(jobs::Arguments),
    /// Lift the pauses of all workers (usage limit, refused credential, outage) and try again now
    Resume,
    /// Show what was spent and what is left of the budget
    Usage(usage::Arguments),
    /// See and change where events are sent, see what became of each, and receive them on this machine
    Webhooks(webhooks::Arguments),
    /// Print the list prices that are in force
    Prices,
    /// Create, list, rotate and revoke API keys, in the database itself
    Keys(keys::Arguments),
}

fn main() -> ExitCode {
    shared::permissions::private_files();
    // A run's guard is this same program started again; it must stay a small process with one thread.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == worker::guard::ARGUMENT)
    {
        return worker::guard::main();
    }
    let arguments = Arguments::parse();
    match start(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                output::note(format_args!("claude-queue: {message}"));
            }
            failure.exit_code()
        }
    }
}

fn start(command: Command) -> Result<(), Failure> {
    let mut vars = match command {
        Command::Simulator(_) => Vars::of([]),
        _ => Vars::from_process()?,
    };
    // Before the first thread starts: each has the user that its maker has.
    match command {
        Command::Up => {
            let folders = account::folders(&vars)?;
            account::become_ordinary(&mut vars, &folders)?;
        }
        // Its folders are made after that.
        Command::Demo(_) => account::become_ordinary(&mut vars, &[])?,
        _ => {}
    }
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|error| Failure::Other(format!("no runtime could be started: {error}")))?;
    runtime.block_on(run(command, vars))
}

async fn run(command: Command, vars: Vars) -> Result<(), Failure> {
    match command {
        Command::Demo(arguments) => return demo::run(&vars, arguments).await,
        Command::Simulator(arguments) => return simulator_command::run(arguments).await,
        _ => {}
    }
    shared::clock::start(&vars);
    match command {
        Command::Up => up::run(&vars).await,
        Command::Migrate => migrate::run(&vars).await,
        Command::Doctor(arguments) => doctor::run(&vars, &arguments).await,
        Command::Submit(arguments) => submit::run(&vars, arguments).await,
        Command::Wait(arguments) => wait::run(&vars, arguments).await,
        Command::Logs(arguments) => logs::run(&vars, arguments).await,
        Command::Cancel(arguments) => cancel::run(&vars, arguments).await,
        Command::Jobs(arguments) => jobs::run(&vars, arguments).await,
        Command::Resume => resume::run(&vars).await,
        Command::Usage(arguments) => usage::run(&vars, arguments).await,
        Command::Webhooks(arguments) => webhooks::run(&vars, arguments).await,
        Command::Prices => prices::run(&vars),
        Command::Keys(arguments) => keys::run(&vars, arguments).await,
        Command::Demo(_) | Command::Simulator(_) => Ok(()),
    }
}
