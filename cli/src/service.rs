//! The API and a worker in one process, over one database.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use api::{Context, StartError};
use shared::env::Vars;
use shared::shutdown::Shutdown;
use shared::storage::{DatabaseUrl, Store, Wakeups};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// How often a SQLite file is polled for commits. As in a worker, because the start of a job waits for it.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A running service.
#[derive(Debug)]
pub(crate) struct Service {
    address: SocketAddr,
    store: Store,
    shutdown: Shutdown,
    listening: CancellationToken,
    api: JoinHandle<io::Result<()>>,
    worker: JoinHandle<Result<(), worker::Error>>,
}

impl Service {
    /// Starts both. They accept requests and run jobs when this returns, and shut down when `shutdown` is cancelled.
    pub(crate) async fn start(vars: &Vars, shutdown: Shutdown) -> Result<Self, Failure> {
        let api_config = api::Config::from_vars(vars)?;
        let worker_config = worker::Config::from_vars(vars)?;
        let url = DatabaseUrl::from_vars(vars)?;
        vars.warn_misspelt();
        let wanted = api_config.address;
        let listener = TcpListener::bind(wanted).await.map_err(|error| {
            Failure::Other(format!(
                "API_HOST and API_PORT: {wanted} can't be listened on: {error}"
            ))
        })?;
        let address = listener.local_addr().unwrap_or(wanted);
        let store = Store::open(&url, worker_config.concurrency)
            .await
            .map_err(|error| Failure::because(&error))?;
        let listening = CancellationToken::new();
        // Stops listening if the start fails.
        let on_failed_start = listening.clone().drop_guard();
        let wakeups = Wakeups::listen(&store, POLL_INTERVAL, listening.clone());

        // The API's settings are checked before the worker claims, and pays for, anything.
        let context = Context::new(api_config, store.clone(), wakeups.clone())
            .await
            .map_err(|error| match error {
                StartError::Setting(error) => error.into(),
                StartError::Storage(error) => Failure::because(&error),
            })?;
        // The worker starts first: a service that can't run jobs shouldn't accept them.
        let (tell_ready, ready) = oneshot::channel();
        let mut worker = tokio::spawn(worker::run(
            worker_config,
            store.clone(),
            wakeups,
            shutdown.clone(),
            move |worker_id| {
                // Nobody waits if the start has failed.
                let _ = tell_ready.send(worker_id);
            },
        ));
        tokio::select! {
            Ok(_) = ready => {}
            ended = &mut worker => {
                let ended = end_of_worker(ended);
                return Err(ended.err().unwrap_or_else(|| Failure::Other("the worker ended at its start".to_owned())));
            }
        }
        on_failed_start.disarm();
        let api = tokio::spawn(api::serve(listener, context, shutdown.clone()));
        Ok(Self {
            address,
            store,
            shutdown,
            listening,
            api,
            worker,
        })
    }

    /// The address on which it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its database.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Returns when both have ended: after `shutdown`, or because one failed, which stops the other.
    pub(crate) async fn ended(mut self) -> Result<(), Failure> {
        let (api, worker) = tokio::select! {
            api = &mut self.api => {
                self.shutdown.drain.cancel();
                (end_of_api(api), end_of_worker(self.worker.await))
            }
            worker = &mut self.worker => {
                self.shutdown.drain.cancel();
                (end_of_api(self.api.await), end_of_worker(worker))
            }
        };
        self.listening.cancel();
        self.store.close().await;
        worker.and(api)
    }

    /// Waits for running jobs and requests, then stops both.
    pub(crate) async fn stop(self) -> Result<(), Failure> {
        self.shutdown.drain.cancel();
        self.ended().await
    }

    /// Stops both at once, with everything that runs.
    pub(crate) async fn stop_at_once(self) -> Result<(), Failure> {
        self.shutdown.at_once.cancel();
        self.stop().await
    }
}

fn end_of_api(ended: Result<io::Result<()>, tokio::task::JoinError>) -> Result<(), Failure> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failure::because(&error)),
        Err(error) => Err(Failure::Other(format!("the API ended: {error}"))),
    }
}

fn end_of_worker(ended: Result<Result<(), worker::Error>, tokio::task::JoinError>) -> Result<(), Failure> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(worker::Error::Configuration(error))) => Err(error.into()),
        Ok(Err(error)) => Err(Failure::because(&error)),
        Err(error) => Err(Failure::Other(format!("the worker ended: {error}"))),
    }
}
