//! `demo`: one job from submit to result, on a machine without an account. The service, the queue, the sandbox and the
//! Claude CLI are the real ones; only the model's answers come from the simulator.

use std::fs::DirBuilder;
use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use shared::clock::Timestamp;
use shared::env::Vars;
use shared::shutdown::Shutdown;
use shared::storage::{LedgerPart, Store};
use shared::telemetry;
use simulator::Simulator;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::client::Client;
use crate::failure::Failure;
use crate::service::Service;
use crate::{output, show};

const PROMPT: &str =
    "Write a small program hello.sh into the workspace, run it, and tell me what it printed.";
/// The file that the simulated model writes; see the scenario `demo`.
const FILE: &str = "hello.sh";
/// The job takes about three seconds.
const JOB_TIMEOUT: Duration = Duration::from_mins(2);
const STOP_TIMEOUT: Duration = Duration::from_secs(40);

/// Options of the demo.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Keep the directory with the database and the workspace, and print its path
    #[arg(long)]
    keep: bool,
}

pub(crate) async fn run(process: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let began = Instant::now();
    let folder = Folder::create(arguments.keep)?;
    let simulator = Simulator::start((Ipv4Addr::LOCALHOST, 0).into())
        .await
        .map_err(|error| Failure::Other(format!("the simulator can't listen on loopback: {error}")))?;
    let key = format!("demo_{}", Uuid::new_v4().simple());
    let vars = settings(process, &folder.0, &simulator.url(), &key)?;
    telemetry::start(&vars)?;
    let sandbox = vars.flag("SANDBOX_ENABLED", true)?;
    let signals =
        Shutdown::on_signals().map_err(|error| Failure::Other(format!("no signal handler: {error}")))?;
    let step = |text: &str| {
        for line in text.lines() {
            output::progress(format_args!("{:7.2} s  {line}", began.elapsed().as_secs_f64()));
        }
    };

    step(&format!("simulator  {} plays the Anthropic API", simulator.url()));
    step("starting   API and worker, on a fresh SQLite database");
    let service = Service::start(&vars, Shutdown::default()).await?;
    let url = format!("http://{}", service.address());
    step(&format!("listening  {url}"));
    let client = Client::new(&url, Some(key))?;

    let played = tokio::select! {
        played = play(&client, step) => played,
        () = signals.drain.cancelled() => Err(Failure::Other("interrupted".to_owned())),
    };
    // The result is read before the service stops, and printed after it, so that it is the end of the output.
    let report = match played {
        Ok(job) => report(&job, service.store(), &folder.0).await,
        Err(failure) => Err(failure),
    };
    step("stopping");
    let stopping = async {
        if report.is_ok() {
            service.stop().await
        } else {
            service.stop_at_once().await
        }
    };
    let stopped = timeout(STOP_TIMEOUT, stopping).await;
    let report = report?;
    stopped.map_err(|_| {
        Failure::Other(format!(
            "the service didn't stop within {} s",
            STOP_TIMEOUT.as_secs()
        ))
    })??;
    nothing_is_left()?;
    step("stopped    no process is left");
    drop(simulator);
    output::progress(format_args!("\n{report}"));
    if arguments.keep {
        output::progress(format_args!(
            "The database and the workspace are in {}",
            folder.0.display()
        ));
    }
    let real = if sandbox {
        "the API, the queue, the sandbox, the Claude CLI and its tools"
    } else {
        "the API, the queue, the Claude CLI and its tools; there was no sandbox"
    };
    output::progress(format_args!(
        "The model's answers came from a simulator on this machine: no account was used and nothing was paid.\n\
         Everything else was real: {real}.\n\
         With an account, run: make up"
    ));
    Ok(())
}

/// Submits the job and prints its events until it ends. Returns the job as it is then.
async fn play(client: &Client, step: impl Fn(&str)) -> Result<Value, Failure> {
    let body = json!({"message": PROMPT});
    step(&format!("POST       /api/v1/jobs {body}"));
    let job = client.submit(&body, &Uuid::new_v4().to_string()).await?;
    let id = job["id"].as_str().unwrap_or_default();
    step(&format!("accepted   {id}"));

    let followed = client.follow(id, 0, |event| {
        if let Some(line) = show::event(event) {
            step(&line);
        }
        Ok(())
    });
    timeout(JOB_TIMEOUT, followed)
        .await
        .map_err(|_| Failure::Other(format!("the job didn't end within {} s", JOB_TIMEOUT.as_secs())))??;
    client.job(id, 0).await
}

/// The result, the file that the job wrote, and the ledger entries.
async fn report(job: &Value, store: &Store, folder: &Path) -> Result<String, Failure> {
    let id = job["id"].as_str().unwrap_or_default();
    if job["status"] != "done" {
        let error = job["error"].as_str().unwrap_or("no reason was given");
        let status = job["status"].as_str().unwrap_or("?");
        return Err(Failure::Other(format!("the job is {status}: {error}")));
    }
    let result = job["result"]["content"].as_str().unwrap_or_default();

    let file = folder.join("data/jobs").join(id).join("workspace").join(FILE);
    let content = std::fs::read_to_string(&file)
        .map_err(|error| Failure::Other(format!("the job didn't write {}: {error}", file.display())))?;

    // The demo's database contains nothing else.
    let everything = LedgerPart {
        key_id: None,
        from: Timestamp(0),
        to: Timestamp(i64::MAX),
    };
    let lines = store
        .ledger_entries(&everything, None, 100)
        .await
        .map_err(|error| Failure::because(&error))?;
    if lines.is_empty() {
        return Err(Failure::Other("the ledger has no line for the job".to_owned()));
    }
    let ledger: Vec<String> = lines
        .iter()
        .rev()
        .map(|line| {
            let cache = line.cache_creation_input_tokens + line.cache_read_input_tokens;
            format!(
                "    {}  {id}  attempt {}  {}  {} tokens in, {cache} cached, {} out  ${:.6}",
                line.at.to_utc().format("%Y-%m-%d %H:%M:%S"),
                line.attempt.unwrap_or_default(),
                line.model.as_deref().unwrap_or_default(),
                line.input_tokens,
                line.output_tokens,
                line.cost.usd(),
            )
        })
        .collect();
    Ok(format!(
        "Result\n{}\n{FILE}, as the job left it\n{}\nLedger\n{}\n",
        indented(result),
        indented(&content),
        ledger.join("\n")
    ))
}

fn indented(text: &str) -> String {
    text.lines().flat_map(|line| ["    ", line, "\n"]).collect()
}

/// The settings of the service: everything in the demo's own directory, on free ports. Only these few variables of this
/// process are passed on, so that no account is used by accident.
fn settings(process: &Vars, folder: &Path, simulator: &str, key: &str) -> Result<Vars, Failure> {
    let passed_on = |name| process.unlisted(name).unwrap_or_default();
    let database = format!("sqlite://{}", folder.join("claude-queue.db").display());
    // Without the sandbox the worker doesn't let the CLI run commands, so the simulated model doesn't try.
    let scenario = if process.flag("SANDBOX_ENABLED", true)? {
        "sim-demo"
    } else {
        "sim-demo-without-sandbox"
    };
    let level = process.unlisted("LOG_LEVEL").unwrap_or_else(|| "warn".to_owned());
    Ok(Vars::of([
        ("PATH", passed_on("PATH").as_str()),
        ("HOME", passed_on("HOME").as_str()),
        ("XDG_RUNTIME_DIR", passed_on("XDG_RUNTIME_DIR").as_str()),
        ("CLAUDE_CLI_PATH", passed_on("CLAUDE_CLI_PATH").as_str()),
        ("SANDBOX_ENABLED", passed_on("SANDBOX_ENABLED").as_str()),
        ("LOG_LEVEL", &level),
        ("DATABASE_URL", &database),
        ("DATA_DIR", &folder.join("data").display().to_string()),
        ("API_PORT", "0"),
        ("API_KEYS", key),
        ("ANTHROPIC_API_KEY", scenario),
        ("ANTHROPIC_BASE_URL", simulator),
    ]))
}

/// Fails if this process still has children: guards of runs. A guard exits only after all processes of its run.
fn nothing_is_left() -> Result<(), Failure> {
    let own = std::process::id().to_string();
    let mut left = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // pid (name) state parent …; the name may contain anything, so the part after its last bracket is read.
        let Some((name, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        if rest.split(' ').nth(1) == Some(own.as_str()) {
            left.push(name.to_owned());
        }
    }
    if left.is_empty() {
        return Ok(());
    }
    Err(Failure::Other(format!("processes are left: {}", left.join(", "))))
}

/// The demo's own directory, removed at the end.
struct Folder(PathBuf, bool);

impl Folder {
    fn create(keep: bool) -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("claude-queue-demo-{}", Uuid::new_v4().simple()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| Failure::Other(format!("{} can't be made: {error}", path.display())))?;
        Ok(Self(path, keep))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.1 {
            // Anything that can't be removed is in the temporary directory, which the system cleans.
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
