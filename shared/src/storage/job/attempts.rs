//! The attempts of a job, for people.

use crate::clock::Timestamp;
use crate::id::JobId;
use crate::money::MicroUsd;
use crate::storage::{Result, Store, read};

/// One attempt, as it is read.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Attempt {
    /// Its number, from 1.
    pub attempt: i64,
    /// The worker that has run it.
    pub worker_id: String,
    /// The version of the CLI.
    pub cli_version: Option<String>,
    /// What was reserved for it.
    pub reserved: MicroUsd,
    /// When it was claimed.
    pub started_at: Timestamp,
    /// When it ended, if it has.
    pub ended_at: Option<Timestamp>,
    /// How: `done`, `failed`, `cancelled`, `retry`, `lost`, `released`.
    pub ending: Option<String>,
    /// The code of its error, if it had one.
    pub error_code: Option<String>,
    /// What the gateway metered; 0 until its end.
    pub cost: MicroUsd,
    /// What the CLI said that it had cost, if it came to say it. It decides nothing.
    pub reported_cost: Option<MicroUsd>,
    /// Turns of the model, as the CLI said.
    pub turns: i64,
    /// How the process ended.
    pub exit: Option<String>,
}

impl Store {
    /// The job's attempts, the first one first. A job has few.
    pub async fn attempts(&self, job_id: JobId) -> Result<Vec<Attempt>> {
        read!(
            self,
            "read the attempts of a job",
            fetch_all => Attempt,
            "select attempt, worker_id, cli_version, reserved, started_at, ended_at, ending, error_code, cost,
               reported_cost, turns, exit
             from attempt where job_id = $1 order by attempt limit 1000",
            job_id
        )
    }
}
