//! `resume`: lifts the pauses that the Messages API made the workers begin.

use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;

pub(crate) async fn run(vars: &Vars) -> Result<(), Failure> {
    let jobs = Client::from_vars(vars)?.resume_queue().await?;
    println!("resumed; {jobs} waiting jobs were released");
    Ok(())
}
