//! `migrate`: migrates the database to this version's schema, and does nothing else.

use shared::env::Vars;
use shared::storage::{DatabaseUrl, Store};

use crate::failure::Failure;
use crate::output;

pub(crate) async fn run(vars: &Vars) -> Result<(), Failure> {
    let url = DatabaseUrl::from_vars(vars)?;
    let store = Store::open(&url, 1)
        .await
        .map_err(|error| Failure::because(&error))?;
    store.close().await;
    output::result(format_args!("{url:?} is up to date"))
}
