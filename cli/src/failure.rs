//! How a command fails: what it says, and its exit code.

use std::process::ExitCode;

use shared::{env, storage, telemetry};

/// Why a command didn't do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A variable has a bad value. Exit code 2, as of the services.
    #[error(transparent)]
    Setting(#[from] env::Error),
    /// No service answers.
    #[error("{url} can't be reached ({why}); is the service up, and is CLAUDE_QUEUE_URL right?")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// What the connection said.
        why: String,
    },
    /// The service, or a proxy before it, can't answer now; in a sentence.
    #[error("{0}")]
    Unavailable(String),
    /// The job ended, but not well. The command has said how.
    #[error("the job isn't done")]
    NotDone,
    /// Anything else, in a sentence.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    /// An error of one of the parts, with its causes.
    pub(crate) fn because(error: &dyn std::error::Error) -> Self {
        Self::Other(telemetry::chain(error))
    }

    /// Whether the same request may succeed a little later.
    pub(crate) const fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Unavailable(_))
    }

    /// What to print; `None` when everything is said already.
    pub(crate) fn message(&self) -> Option<String> {
        (!matches!(self, Self::NotDone)).then(|| self.to_string())
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Setting(_) => ExitCode::from(2),
            Self::Unreachable { .. } | Self::Unavailable(_) | Self::NotDone | Self::Other(_) => {
                ExitCode::FAILURE
            }
        }
    }
}

impl From<storage::Error> for Failure {
    fn from(error: storage::Error) -> Self {
        Self::because(&error)
    }
}
