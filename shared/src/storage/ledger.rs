//! What was spent, as it was written down.

use super::{Result, Store, read};
use crate::clock::Timestamp;
use crate::id::JobId;
use crate::money::MicroUsd;

/// One line of the ledger: what one model cost in one attempt of a job.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct LedgerLine {
    /// When the attempt ended.
    pub at: Timestamp,
    /// Which attempt, from 1.
    pub attempt: i64,
    /// The model, as the CLI names it.
    pub model: String,
    /// What it cost.
    pub cost: MicroUsd,
    /// Tokens read that no cache held.
    pub input_tokens: i64,
    /// Tokens written.
    pub output_tokens: i64,
    /// Tokens written to a cache.
    pub cache_creation_input_tokens: i64,
    /// Tokens read from a cache.
    pub cache_read_input_tokens: i64,
    /// Whether the cost was rebuilt from what was seen, because the CLI didn't live to say.
    pub estimated: bool,
}

impl Store {
    /// The ledger's lines of one job, in the order in which they were written.
    pub async fn ledger(&self, job_id: JobId) -> Result<Vec<LedgerLine>> {
        read!(
            self,
            "read the ledger",
            fetch_all => LedgerLine,
            "select at, attempt, model, cost, input_tokens, output_tokens, cache_creation_input_tokens,
               cache_read_input_tokens, estimated
             from ledger where job_id = $1 order by ledger_number",
            job_id
        )
    }
}
