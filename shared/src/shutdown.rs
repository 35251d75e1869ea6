//! The signals that stop a process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Graceful shutdown in two steps.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled by the first SIGTERM or SIGINT: take nothing new, finish what is running.
    pub drain: CancellationToken,
    /// Cancelled by the second signal: release what is running at once.
    pub at_once: CancellationToken,
}

impl Shutdown {
    /// Starts a task that listens for SIGTERM and SIGINT until the process ends.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::default();
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let told = shutdown.clone();
        tokio::spawn(async move {
            for token in [told.drain, told.at_once] {
                tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}
