//! Whether there is room for a run: a full or read-only disk is no fault of a job. While there is none the worker
//! claims nothing, so that no job is tried for nothing.

use crate::context::Context;
use crate::presence;
use shared::disk;
use std::path::Path;
use tracing::{info, warn};

/// Looks whether a run would have room; says so in the log and to people when that changes.
pub(crate) async fn check(ctx: &Context) -> bool {
    let data = ctx.config.data_dir.clone();
    let sockets = ctx.runtime.path().to_owned();
    let looked = tokio::task::spawn_blocking(move || look(&data, &sockets)).await;
    let problem = looked.unwrap_or_else(|error| Some(error.to_string()));
    let room = problem.is_none();
    if ctx.pause.for_room(problem.as_deref()) {
        match problem {
            Some(problem) => warn!("this worker begins no runs: {problem}"),
            None => info!("there is room for runs again"),
        }
        presence::announce_now(ctx).await;
    }
    room
}

/// What is wrong, in words.
fn look(data: &Path, sockets: &Path) -> Option<String> {
    for (name, folder) in [("DATA_DIR", data), ("the folder for sockets", sockets)] {
        if let Err(error) = disk::try_to_write(folder) {
            return Some(format!("{name} can't be written: {error}."));
        }
    }
    None
}
