//! `doctor`: checks what the service needs on this machine, and says how to get what is missing.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;

use shared::env::Vars;
use shared::storage::{DatabaseUrl, Inspection, inspect};
use shared::telemetry::chain;
use shared::{disk, permissions};
use worker::account;
use worker::claude::{program, sandbox};
use worker::gateway::credentials::Credentials;
use worker::gateway::question::Answer;
use worker::gateway::upstream::Upstream;
use worker::workspace::Runtime;
use worker::{Config, LOWEST_CLI, TESTED_CLI};

use crate::client::Client;
use crate::failure::Failure;
use crate::output;

/// The result of a check.
enum Finding {
    /// As required.
    Good(String),
    /// It works, but the operator should know.
    Note(String),
    /// The service can't work.
    Bad(String),
}

use Finding::{Bad, Good, Note};

/// Options of the check.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Close files and folders of the service that other users of this machine may open
    #[arg(long)]
    fix: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: &Arguments) -> Result<(), Failure> {
    let mut bad = 0;
    let mut tell = |name: &str, finding: Finding| {
        let (mark, text) = match finding {
            Good(text) => ("ok", text),
            Note(text) => ("note", text),
            Bad(text) => {
                bad += 1;
                ("BAD", text)
            }
        };
        output::progress(format_args!("{mark:<5} {name:<11} {text}"));
    };

    if let Err(error) = api::Config::from_vars(vars) {
        tell("settings", Bad(error.to_string()));
    }
    let config = match Config::from_vars(vars) {
        Ok(config) => Some(config),
        Err(error) => {
            tell("settings", Bad(error.to_string()));
            None
        }
    };
    let (found, has_keys) = database(vars).await;
    tell("database", found);
    tell("keys", keys(vars, has_keys));
    if let Some(config) = &config {
        let path = config.path.as_ref().map(OsString::from);
        tell("data", data_folder(&config.data_dir));
        tell("modes", modes(vars, &config.data_dir, arguments.fix));
        match program::find_cli(config.claude.cli.as_deref(), path.as_deref()) {
            Ok(cli) => {
                tell("claude", claude(&cli).await);
                tell("credential", credential(config, &cli));
                tell("api", messages_api(config, &cli).await);
            }
            Err(error) => {
                let cure = "install it with scripts/install-claude.sh, or set CLAUDE_CLI_PATH";
                tell("claude", Bad(format!("no Claude CLI: {error}; {cure}")));
            }
        }
        tell("sandbox", sandbox(config, path.as_deref()).await);
    }
    tell("service", service(vars).await);
    if bad == 0 {
        return Ok(());
    }
    Err(Failure::Other(format!(
        "{bad} checks failed; the service can't work without them"
    )))
}

/// Connects to the database, but neither creates nor migrates it. Also whether there are keys in it.
async fn database(vars: &Vars) -> (Finding, bool) {
    let url = match DatabaseUrl::from_vars(vars) {
        Ok(url) => url,
        Err(error) => return (Bad(error.to_string()), false),
    };
    if let DatabaseUrl::Sqlite(file) = &url {
        if !file.exists() {
            return (
                Good(format!("{} is created at the first start", file.display())),
                false,
            );
        }
        if let Err(error) = fs::OpenOptions::new().append(true).open(file) {
            return (
                Bad(format!(
                    "{} (DATABASE_URL) can't be written: {error}",
                    file.display()
                )),
                false,
            );
        }
    }
    match inspect(&url).await {
        Ok(found) => (schema(&url, &found), found.has_keys),
        Err(error) => (
            Bad(format!("{}; DATABASE_URL says where it is", chain(&error))),
            false,
        ),
    }
}

fn schema(url: &DatabaseUrl, found: &Inspection) -> Finding {
    let known = found.known;
    match found.schema {
        None => Good(format!("{url:?}, empty; its tables are made at the first start")),
        Some(schema) if schema < known => Note(format!(
            "{url:?}, schema {schema}; the next start migrates it to {known}"
        )),
        Some(schema) if schema > known => Note(format!(
            "{url:?}, schema {schema}, of a newer release than this one, which knows {known}"
        )),
        Some(schema) => Good(format!("{url:?}, schema {schema}")),
    }
}

fn keys(vars: &Vars, in_database: bool) -> Finding {
    let count = |name| vars.list(name, "").map_or(0, |keys| keys.len());
    match count("API_KEYS") + count("ADMIN_API_KEYS") {
        0 if in_database => Good("in the database; `claude-queue keys list` shows them".to_owned()),
        0 => Note("no API_KEYS: every program on this machine may submit jobs".to_owned()),
        1 => Good("1 key".to_owned()),
        count => Good(format!("{count} keys")),
    }
}

/// Writes a file, because a full disk can still be read.
fn data_folder(folder: &Path) -> Finding {
    // A folder that isn't there is made by the service; this only looks whether it can be.
    let there = folder
        .ancestors()
        .find(|folder| folder.exists() && !folder.as_os_str().is_empty());
    match disk::try_to_write(there.unwrap_or(Path::new("."))) {
        Ok(()) if there != Some(folder) => {
            Good(format!("{} is created at the first start", folder.display()))
        }
        Ok(()) => Good(format!("{} can be written", folder.display())),
        Err(error) => Bad(format!("DATA_DIR {} can't be written: {error}", folder.display())),
    }
}

/// Whether other users of this machine may open what the service keeps.
fn modes(vars: &Vars, data_dir: &Path, fix: bool) -> Finding {
    let database = match DatabaseUrl::from_vars(vars) {
        Ok(DatabaseUrl::Sqlite(file)) => Some(file),
        _ => None,
    };
    let open = permissions::open_to_others(data_dir, database.as_deref());
    let Some(first) = open.first() else {
        return Good("the service's files are for its user only".to_owned());
    };
    let (count, first) = (open.len(), first.display());
    if !fix {
        return Note(format!(
            "other users may open {count} files and folders of the service, {first} among them; `claude-queue doctor \
             --fix` closes them"
        ));
    }
    match permissions::close_to_others(&open) {
        Ok(()) => Good(format!(
            "closed {count} files and folders to other users, {first} among them"
        )),
        Err(error) => Bad(format!(
            "{first} and others are open to other users, and can't be closed: {error}"
        )),
    }
}

async fn claude(cli: &Path) -> Finding {
    match program::cli_version(cli).await {
        Ok(version) if version == TESTED_CLI => Good(format!("{version}, {}", cli.display())),
        Ok(version) if program::is_older(&version, LOWEST_CLI) => Bad(format!(
            "{version}, {}: too old, the worker needs {LOWEST_CLI} or later",
            cli.display()
        )),
        Ok(version) => Note(format!(
            "{version}, {}; this release is tested with {TESTED_CLI}",
            cli.display()
        )),
        Err(error) => Bad(format!("the Claude CLI doesn't run: {error}")),
    }
}

fn credential(config: &Config, cli: &Path) -> Finding {
    match Credentials::find(&config.anthropic, cli) {
        Ok(credentials) => Good(credentials.kind().to_owned()),
        Err(error) => Bad(error.to_string()),
    }
}

/// Asks the Messages API a question that costs nothing.
async fn messages_api(config: &Config, cli: &Path) -> Finding {
    let Ok(credentials) = Credentials::find(&config.anthropic, cli) else {
        return Note("not asked, without a credential".to_owned());
    };
    match Upstream::new(&config.anthropic.base_url) {
        Ok(upstream) => match upstream.of(&config.anthropic.provider).ask(&credentials).await {
            answer @ Answer::Good => Good(answer.to_string()),
            answer @ Answer::Refused(_) => Note(answer.to_string()),
        },
        Err(error) => Bad(error.to_string()),
    }
}

async fn sandbox(config: &Config, path: Option<&OsStr>) -> Finding {
    if !config.sandbox {
        return Note("SANDBOX_ENABLED=false: the agent has all rights of this user".to_owned());
    }
    if config.user.is_none()
        && let Err(error) = account::refuse_root()
    {
        return Bad(error.to_string());
    }
    let runtime = match Runtime::create(config.runtime_dir.as_deref()) {
        Ok(runtime) => runtime,
        Err(error) => return Bad(format!("no directory for sockets: {error}")),
    };
    match sandbox::check(&runtime, path).await {
        Ok(_) => Good("bubblewrap works; runs reach only the Messages API, so WebFetch is off".to_owned()),
        Err(error) => Bad(chain(&error)),
    }
}

async fn service(vars: &Vars) -> Finding {
    let client = match Client::from_vars(vars) {
        Ok(client) => client,
        Err(error) => return Bad(error.to_string()),
    };
    match client.is_ready().await {
        Ok(()) => Good("is up and ready".to_owned()),
        Err(error @ Failure::Unreachable { .. }) => Note(error.to_string()),
        Err(error) => Bad(error.to_string()),
    }
}
