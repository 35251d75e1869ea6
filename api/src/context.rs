//! Everything that a handler may touch.

use shared::clock;
use shared::storage::{self, Store, Wakeups};
use std::ops::Deref;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

use crate::config::Config;

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

impl Context {
    /// Makes ready what handlers need, and a lane in the queue and a budget for each key.
    pub async fn new(config: Config, store: Store, wakeups: Wakeups) -> storage::Result<Self> {
        for owner in config.keys.owners() {
            store.put_lane(&owner, config.key_max_running_jobs).await?;
            store
                .put_default_budget(&owner, config.max_cost_per_user, clock::now())
                .await?;
        }
        let stopping = CancellationToken::new();
        Ok(Self(Arc::new(Parts {
            config,
            store,
            wakeups,
            stopping,
        })))
    }
}
