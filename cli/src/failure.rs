//! How a command fails: its message and its exit code.

use std::io;
use std::process::ExitCode;

use shared::{env, storage, telemetry};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The value of a variable is not valid. Exit code 2, as in the services.
    #[error(transparent)]
    Setting(#[from] env::Error),
    /// The service can't be reached.
    #[error("{url} can't be reached ({why}); is the service up, and is CLAUDE_QUEUE_URL right?")]
    Unreachable {
        /// Its URL.
        url: String,
        /// The error of the connection.
        why: String,
    },
    /// The service, or a proxy in front of it, is unavailable; a sentence.
    #[error("{0}")]
    Unavailable(String),
    /// The job ended, but isn't done. The command has printed why.
    #[error("the job isn't done")]
    NotDone,
    /// The job hasn't ended within the given time; in a sentence.
    #[error("{0}")]
    StillRunning(String),
    /// Standard output is closed or full.
    #[error("standard output can't be written: {0}")]
    Output(io::Error),
    /// Any other failure; a sentence.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    /// An error of one of the crates, with its causes.
    pub(crate) fn because(error: &dyn std::error::Error) -> Self {
        Self::Other(telemetry::chain(error))
    }

    /// Whether the same request may succeed a little later.
    pub(crate) const fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Unavailable(_))
    }

    /// What to print, unless the command has printed it already, or nobody reads what is printed.
    pub(crate) fn message(&self) -> Option<String> {
        match self {
            Self::NotDone => None,
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => None,
            other => Some(other.to_string()),
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            // The reader has what it wanted, as `head` does.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Self::NotDone | Self::Output(_) | Self::Other(_) => ExitCode::FAILURE,
            Self::Setting(_) => ExitCode::from(2),
            Self::StillRunning(_) => ExitCode::from(3),
            Self::Unreachable { .. } | Self::Unavailable(_) => ExitCode::from(4),
        }
    }
}

impl From<storage::Error> for Failure {
    fn from(error: storage::Error) -> Self {
        Self::because(&error)
    }
}
