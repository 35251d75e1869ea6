//! The runner: takes queued jobs, runs the Claude Code CLI for each, records what happened and what it cost.
//!
//! Start reading at [`queues`] (what wakes a slot), then [`run_job`] (the life of one run, top to bottom).

pub mod account;
mod api_watch;
pub mod claude;
pub mod config;
pub mod context;
pub mod deliver;
mod disk_space;
pub mod disk_use;
pub mod gateway;
pub mod guard;
mod heartbeat;
pub mod pause;
mod queues;
pub mod run_job;
mod sentence;
pub mod spend;
mod sweep;
mod tickets;
pub mod workspace;

use claude::program;
use claude::sandbox::{self, Isolation};
pub use config::Config;
use context::Context;
use deliver::Deliverer;
use gateway::Upstream;
use gateway::credentials::Credentials;
use shared::clock;
use shared::data_dir::DataDir;
use shared::env;
use shared::id::WorkerId;
use shared::permissions;
use shared::shutdown::Shutdown;
use shared::storage::{self, Claimant, Store, Wakeups};
use std::sync::Arc;
use tracing::{info, warn};

/// The release of the Claude Code CLI that this worker is tested with.
pub const TESTED_CLI: &str = "2.1.331";

/// The lowest release of the Claude Code CLI that has all flags and variables of a run ([`claude::command`]): an older one
/// refuses some of them, or silently ignores some that protect. `CLAUDE_CODE_DISABLE_DEFERRED_TOOL_RESUME` came last.
pub const LOWEST_CLI: &str = "2.1.328";

/// Why a worker can't start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable has a value that can't be used, or is missing.
    #[error(transparent)]
    Configuration(#[from] env::Error),
    /// The database.
    #[error("the database can't be used")]
    Storage(#[from] storage::Error),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// The runtime folder.
    #[error("could not make the folder for sockets")]
    Runtime(#[source] std::io::Error),
    /// The threads that everything runs on.
    #[error("could not start the worker's threads")]
    Threads(#[source] std::io::Error),
    /// The signals that ask a worker to stop.
    #[error("could not listen to signals")]
    Signals(#[source] std::io::Error),
}

/// Runs a worker until `shutdown` asks it to stop and its runs have ended or were handed back. `ready` is called
/// when it takes jobs.
pub async fn run(
    mut config: Config,
    store: Store,
    wakeups: Wakeups,
    shutdown: Shutdown,
    ready: impl FnOnce(WorkerId) + Send,
) -> Result<(), Error> {
    check_secret_key(&config, &store).await?;
    let deliverer = deliverer(&config, &store, &wakeups, &shutdown);
    if !config.queues.jobs {
        return deliver_only(deliverer, ready).await;
    }
    if config.sandbox {
        account::refuse_root()?;
    }
    if let Err(error) = account::private_memory() {
        warn!(%error, "other processes of this user can read the memory of the worker");
    }
    // Absolute, since a run starts in a folder of its own.
    config.data_dir = bind_data_dir(&config.data_dir, &store).await?;
    let open = permissions::open_to_others(&config.data_dir, store.file().as_deref());
    if let Some(first) = open.first() {
        warn!(
            "other users of this machine may open {} files and folders of the service, {} among them; `claude-queue \
             doctor --fix` closes them",
            open.len(),
            first.display()
        );
    }
    // What a worker that was killed left behind on this machine writes into workspaces that others will get.
    let ended = tokio::task::spawn_blocking(guard::kill_orphans)
        .await
        .unwrap_or(0);
    if ended > 0 {
        warn!(
            processes = ended,
            "killed processes that an earlier worker's runs had left"
        );
    }
    let path = config.path.as_deref().map(std::ffi::OsStr::new);
    let (cli, cli_version) = find_cli(&config).await?;
    if cli_version != TESTED_CLI {
        warn!("the Claude CLI is {cli_version}; this release is tested with {TESTED_CLI}");
    }
    let credentials = Credentials::find(&config.anthropic, &cli)?;
    let upstream = Upstream::new(&config.anthropic.base_url)?.of(&config.anthropic.provider);
    let runtime = workspace::Runtime::create(config.runtime_dir.as_deref()).map_err(Error::Runtime)?;
    let isolation = if config.sandbox {
        Isolation::Sandbox(
            sandbox::check(&runtime, path)
                .await?
                .with_memory(config.run_memory),
        )
    } else {
        Isolation::Off
    };

    match config.run_memory {
        Some(bytes) => info!("each run may use {} MiB of memory (RUN_MEMORY_MB)", bytes >> 20),
        None => warn!("a run may use all memory of the machine (RUN_MEMORY_MB=0)"),
    }
    let worker_id = WorkerId::new();
    let claimant = Claimant {
        worker_id,
        cli_version,
        least_reserve: config.least_reserve,
        defaults: config.run_defaults(),
    };
    let ctx = Arc::new(Context {
        store,
        wakeups,
        claimant,
        started_at: clock::now(),
        cli,
        isolation,
        cgroup: guard::cgroup::own(),
        runtime,
        credentials: Arc::new(credentials),
        upstream,
        claiming: tokio::sync::Mutex::default(),
        leases: context::Leases::default(),
        disk_use: disk_use::DiskUse::default(),
        busy: tokio_util::task::TaskTracker::new(),
        pause: Arc::default(),
        announcing: tokio::sync::Mutex::default(),
        draining: shutdown.drain,
        handing_back: shutdown.at_once,
        config,
    });
    let concurrency = ctx.config.concurrency;
    disk_space::check(&ctx).await;
    heartbeat::announce(&ctx).await?;
    info!(worker.id = %worker_id, slots = concurrency, sandbox = ctx.config.sandbox, "worker {worker_id} is ready");
    ready(worker_id);
    let working = async {
        tokio::select! {
            () = queues::serve(&ctx) => {}
            () = sweep::sweep(&ctx) => {}
            () = api_watch::watch(&ctx) => {}
        }
    };
    let delivering = async {
        if let Some(deliverer) = &deliverer {
            deliver::deliver(deliverer).await;
        }
    };
    tokio::join!(working, Box::pin(delivering));
    // Best effort: a row that stays is forgotten in an hour.
    let _ = ctx.store.remove_worker(worker_id).await;
    info!("the worker has stopped");
    Ok(())
}

/// With another `SECRET_KEY` than the API's no delivery could be signed.
async fn check_secret_key(config: &Config, store: &Store) -> Result<(), Error> {
    match &config.secret_key {
        Some(secret_key) if config.queues.webhooks && !store.bind_secret(secret_key.check()).await? => {
            Err(Error::Configuration(env::Error::new(
                "SECRET_KEY",
                "isn't the one that this database was set up with",
                "the value that the API has",
            )))
        }
        _ => Ok(()),
    }
}

/// What delivers webhooks in this process, if it is to.
fn deliverer(config: &Config, store: &Store, wakeups: &Wakeups, shutdown: &Shutdown) -> Option<Deliverer> {
    if !config.queues.webhooks {
        return None;
    }
    let Some(secret_key) = &config.secret_key else {
        info!("SECRET_KEY isn't set, so this worker delivers no webhooks");
        return None;
    };
    Some(Deliverer {
        store: store.clone(),
        wakeups: wakeups.clone(),
        config: config.deliveries.clone(),
        sealer: secret_key.sealer().clone(),
        retention: config.retention,
        draining: shutdown.drain.clone(),
    })
}

/// A worker without jobs: it needs no CLI, no sandbox and no `DATA_DIR`.
async fn deliver_only(
    deliverer: Option<Deliverer>,
    ready: impl FnOnce(WorkerId) + Send,
) -> Result<(), Error> {
    let Some(deliverer) = deliverer else {
        return Err(Error::Configuration(env::Error::new(
            "SECRET_KEY",
            "isn't set, and without it a worker with WORKER_QUEUES=webhooks can sign nothing",
            "the value that the API has",
        )));
    };
    let worker_id = WorkerId::new();
    info!(worker.id = %worker_id, "worker {worker_id} is ready to deliver webhooks");
    ready(worker_id);
    deliver::deliver(&deliverer).await;
    info!("the worker has stopped");
    Ok(())
}

/// The absolute path of `DATA_DIR`, which the database knows from here on.
async fn bind_data_dir(path: &std::path::Path, store: &Store) -> Result<std::path::PathBuf, Error> {
    let (instance_id, known) = (store.instance_id().await?, store.data_dir_id().await?);
    let folder = DataDir::open(path, &instance_id, known.as_deref())?;
    let known = store.bind_data_dir(&folder.id).await?;
    Ok(folder.confirm(&known)?.path)
}

/// The CLI's own file and its version.
async fn find_cli(config: &Config) -> Result<(std::path::PathBuf, String), env::Error> {
    let accepted = "the path of the Claude Code CLI, or a `claude` on the PATH (npm install -g @anthropic-ai/claude-code)";
    let unusable = |error: std::io::Error| {
        env::Error::new("CLAUDE_CLI_PATH", format!("leads to no CLI: {error}"), accepted)
    };
    let path = config.path.as_deref().map(std::ffi::OsStr::new);
    let cli = program::find_cli(config.claude.cli.as_deref(), path).map_err(unusable)?;
    let version = program::cli_version(&cli).await.map_err(unusable)?;
    if program::is_older(&version, LOWEST_CLI) {
        return Err(env::Error::new(
            "CLAUDE_CLI_PATH",
            format!("leads to the Claude CLI {version}, which is too old: it lacks options that runs need"),
            format!("release {LOWEST_CLI} or later (npm install -g @anthropic-ai/claude-code)"),
        ));
    }
    Ok((cli, version))
}
