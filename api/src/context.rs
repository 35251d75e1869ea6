//! Everything that a handler may touch.

use shared::storage::{self, Store, Wakeups};
use shared::{clock, env};
use std::ops::Deref;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::keyring::Keyring;
use crate::limits::Limits;
use crate::streams::Streams;

/// What handlers share. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Context(Arc<Parts>);

/// The parts of a [`Context`].
#[derive(Debug)]
pub struct Parts {
    /// The settings.
    pub config: Config,
    /// The database.
    pub store: Store,
    /// Whose secret opens.
    pub keyring: Keyring,
    /// How often a caller may ask.
    pub limits: Limits,
    /// The event streams that are open.
    pub streams: Streams,
    /// Tells who waits for a job that it changed.
    pub wakeups: Wakeups,
    /// Cancelled when the process begins to stop: whoever waits stops waiting.
    pub stopping: CancellationToken,
}

impl Deref for Context {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// Why the API doesn't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting doesn't fit the database.
    #[error(transparent)]
    Setting(#[from] env::Error),
    /// The database can't be used.
    #[error(transparent)]
    Storage(#[from] storage::Error),
}

impl Context {
    /// Makes ready what handlers need, and a lane in the queue and a budget for each key.
    pub async fn new(config: Config, store: Store, wakeups: Wakeups) -> Result<Self, StartError> {
        let stored = store.has_api_keys().await?;
        config.check_exposure(stored)?;
        match &config.secret_key {
            Some(secret_key) if !store.bind_secret(secret_key.check()).await? => {
                return Err(secret_key_error("isn't the one that this database was set up with").into());
            }
            None if stored => {
                return Err(secret_key_error(
                    "is empty, but the database holds keys that are checked with it",
                )
                .into());
            }
            _ => {}
        }
        for owner in config.keys.owners() {
            store.put_lane(&owner, config.key_max_running_jobs).await?;
            store
                .put_default_budget(&owner, config.max_cost_per_user, clock::now())
                .await?;
        }
        store
            .put_key_defaults(
                config.key_max_running_jobs,
                config.max_cost_per_user,
                clock::now(),
            )
            .await?;
        let stopping = CancellationToken::new();
        Ok(Self(Arc::new(Parts {
            keyring: Keyring::new(store.clone(), config.secret_key.clone()),
            limits: Limits::new(store.clone()),
            streams: Streams::new(store.clone()),
            config,
            store,
            wakeups,
            stopping,
        })))
    }
}

/// Without the right one no key of the database would open, and nobody would know why.
fn secret_key_error(problem: &str) -> env::Error {
    env::Error::new("SECRET_KEY", problem, "the value that it had then")
}
