//! `resume`: lifts the pauses that the Messages API made the workers begin.

use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(vars: &Vars) -> Result<(), Failure> {
    let jobs = Client::from_vars(vars)?.resume_queue().await?;
    output::result(format_args!("resumed; {jobs} waiting jobs were released"))
}
