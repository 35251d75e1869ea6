//! Everything that a handler may touch.

use shared::storage::{self, Store, Wakeups};
use shared::telemetry::chain;
use shared::{clock, env};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::files::Files;
use crate::gate::keyring::Keyring;
use crate::gate::limits::Limits;
use crate::gate::streams::Streams;
use crate::gate::waits::Waits;
use crate::http::problem::Problem;
use crate::http::request::Request;
use crate::templates::Templates;

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
    /// Whose secrets are valid.
    pub keyring: Keyring,
    /// How often a caller may ask.
    pub limits: Limits,
    /// Settings by name.
    pub templates: Templates,
    /// The event streams that are open.
    pub streams: Streams,
    /// The requests that wait for a job.
    pub waits: Waits,
    /// What requests for files share.
    pub files: Files,
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
        let templates = Templates::open(&config)?;
        let stopping = CancellationToken::new();
        Ok(Self(Arc::new(Parts {
            keyring: Keyring::new(store.clone(), config.keys.clone(), config.secret_key.clone()),
            limits: Limits::new(store.clone()),
            streams: Streams::new(store.clone()),
            waits: Waits::default(),
            files: Files::default(),
            templates,
            config,
            store,
            wakeups,
            stopping,
        })))
    }

    /// The address of the client, also behind proxies that are trusted.
    pub fn client(&self, request: &Request) -> IpAddr {
        self.config.proxies.client(request.peer.ip(), &request.headers)
    }

    /// Logs what the client of a problem isn't told, in one line; the request's span says which request it was.
    pub fn report(&self, problem: &Problem) {
        match problem {
            Problem::Internal(source) => tracing::error!(error = %chain(source.as_ref()), "a request failed"),
            Problem::Unavailable {
                source: Some(source), ..
            } => {
                // An outage is logged once, not with each request that it meets.
                let noted = source.downcast_ref().is_some_and(|error| self.store.note(error));
                if !noted {
                    tracing::warn!(error = %chain(source.as_ref()), "a request was answered as unavailable");
                }
            }
            _ => {}
        }
    }
}

/// A database that can't be reached is a reason to try again; everything else is a fault of the service.
impl From<storage::Error> for Problem {
    fn from(error: storage::Error) -> Self {
        if error.is_unavailable() {
            let detail = if error.is_undecided() {
                "The database did not confirm this request, so it may have been stored. Repeat it with the same \
                 Idempotency-Key; without one, check first whether it was stored"
            } else if error.is_overload() {
                "The service is overloaded at the moment"
            } else {
                "The database is not available at the moment"
            };
            Self::Unavailable {
                detail,
                source: Some(Box::new(error)),
            }
        } else {
            Self::Internal(Box::new(error))
        }
    }
}

/// Without the right one no key of the database would be valid, and nobody would know why.
fn secret_key_error(problem: &str) -> env::Error {
    env::Error::new("SECRET_KEY", problem, "the value that it had then")
}
