//! The signals that end a process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How far a process has been asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled by the first SIGTERM, SIGINT or SIGHUP: finish what is at hand.
    pub drain: CancellationToken,
    /// Cancelled by the second one: hand back what is at hand.
    pub at_once: CancellationToken,
}

impl Shutdown {
    /// Listens for SIGTERM, SIGINT and SIGHUP from now on, in a task that lives as long as the process. A SIGHUP that
    /// is ignored at the start, as `nohup` sees to it, stays ignored.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::default();
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut hangup = if hangup_is_ignored() {
            None
        } else {
            Some(signal(SignalKind::hangup())?)
        };
        let requested = shutdown.clone();
        tokio::spawn(async move {
            for token in [requested.drain, requested.at_once] {
                let hung_up = async {
                    match &mut hangup {
                        Some(hangup) => hangup.recv().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! { _ = term.recv() => {}, _ = int.recv() => {}, _ = hung_up => {} }
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}

/// Linux tells which signals a process ignores only here; asking by `sigaction` would take unsafe code.
fn hangup_is_ignored() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores_hangup(&status))
}

fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Signal 1 is the lowest bit.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_hangup_is_seen() {
        assert!(ignores_hangup(
            "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n"
        ));
        assert!(!ignores_hangup(
            "SigIgn:\t0000000000001000\nSigCgt:\t0000000000000001\n"
        ));
        assert!(!ignores_hangup(""));
    }
}
