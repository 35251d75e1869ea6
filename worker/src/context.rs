//! What the parts of a worker may touch.

use crate::claude::sandbox::Isolation;
use crate::config::Config;
use crate::disk_use::DiskUse;
use crate::gateway::Upstream;
use crate::gateway::credentials::Credentials;
use crate::pause::Pause;
use crate::workspace::Runtime;
use shared::clock::Timestamp;
use shared::id::JobId;
use shared::storage::{Claimant, Store, Wakeups};
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::sync::CancellationToken;

/// One worker process.
#[derive(Debug)]
pub struct Context {
    /// The database.
    pub store: Store,
    /// What other processes commit.
    pub wakeups: Wakeups,
    /// The settings.
    pub config: Config,
    /// Under which name jobs are claimed.
    pub claimant: Claimant,
    /// When this worker started.
    pub started_at: Timestamp,
    /// The CLI's own file.
    pub cli: PathBuf,
    /// Whether and how runs are isolated.
    pub isolation: Isolation,
    /// Where sockets are put.
    pub runtime: Runtime,
    /// Where control groups of runs may be made, if anywhere.
    pub cgroup: Option<PathBuf>,
    /// How the gateway proves who pays.
    pub credentials: Arc<Credentials>,
    /// Where the gateway sends requests.
    pub upstream: Upstream,
    /// Claims of this process are made one at a time.
    pub claiming: tokio::sync::Mutex<()>,
    /// The runs that it holds.
    pub leases: Leases,
    /// What its runs use of the disk.
    pub disk_use: DiskUse,
    /// The slots that are taken.
    pub busy: tokio_util::task::TaskTracker,
    /// Whether this worker may begin runs.
    pub pause: Arc<Pause>,
    /// Its row is written by one at a time.
    pub announcing: tokio::sync::Mutex<()>,
    /// No more claims.
    pub draining: CancellationToken,
    /// End the runs and hand their jobs back.
    pub handing_back: CancellationToken,
}

/// The runs that a process has claimed and not ended yet, as job and attempt.
#[derive(Debug, Default)]
pub struct Leases(Mutex<HashSet<(JobId, i64)>>);

impl Leases {
    /// It was claimed.
    pub fn insert(&self, run: (JobId, i64)) {
        self.runs().insert(run);
    }

    /// It has ended.
    pub fn remove(&self, run: (JobId, i64)) {
        self.runs().remove(&run);
    }

    /// Those there are now.
    pub fn all(&self) -> HashSet<(JobId, i64)> {
        self.runs().clone()
    }

    fn runs(&self) -> std::sync::MutexGuard<'_, HashSet<(JobId, i64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
