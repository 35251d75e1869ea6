//! Whether the disk has room for a run: a full or read-only disk is no fault of a job. While it has none, the worker
//! claims nothing, so that no attempt is wasted.

use crate::context::Context;
use crate::heartbeat;
use shared::disk;
use std::path::Path;
use tracing::{info, warn};

/// Checks whether a run would have room; logs and announces a change.
pub(crate) async fn check(ctx: &Context) -> bool {
    let data = ctx.config.data_dir.clone();
    let sockets = ctx.runtime.path().to_owned();
    let (floor, store) = (ctx.config.disk_floor, ctx.store.clone());
    let looked = tokio::task::spawn_blocking(move || {
        let problem = look(&data, &sockets, floor);
        if problem.is_none() {
            store.make_ballast();
        }
        problem
    })
    .await;
    let problem = looked.unwrap_or_else(|error| Some(error.to_string()));
    let room = problem.is_none();
    if ctx.pause.for_room(problem.as_deref()) {
        match problem {
            Some(problem) => warn!("this worker starts no runs: {problem}"),
            None => info!("disk space is back, starting runs again"),
        }
        heartbeat::announce_now(ctx).await;
    }
    room
}

/// What is wrong, in words.
fn look(data: &Path, sockets: &Path, floor: u64) -> Option<String> {
    for (name, folder) in [("DATA_DIR", data), ("the folder for sockets", sockets)] {
        if let Err(error) = disk::try_to_write(folder) {
            return Some(format!("{name} can't be written: {error}."));
        }
    }
    let free = disk::free(data).unwrap_or(u64::MAX);
    if free < floor {
        let (free, floor) = (free >> 20, floor >> 20);
        return Some(format!(
            "DATA_DIR has {free} MiB left, less than DISK_FLOOR_MB ({floor})."
        ));
    }
    None
}
