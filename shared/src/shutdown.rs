//! The signals that end a process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How far a process has been asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled by the first SIGTERM or SIGINT: finish what is at hand.
    pub drain: CancellationToken,
    /// Cancelled by the second one: hand back what is at hand.
    pub at_once: CancellationToken,
}

impl Shutdown {
    /// Listens for SIGTERM and SIGINT from now on, in a task that lives as long as the process.
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
