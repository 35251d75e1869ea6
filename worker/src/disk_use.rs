//! How much disk a run uses, and which run has to end when the disk has too little left.

use crate::context::Context;
use crate::run_job::outcome::DiskLimit;
use shared::disk;
use shared::id::JobId;
use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often the free space is looked at: one question to the kernel.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// How often the folders of a run are walked, while that is fast; otherwise it takes a tenth of the time.
const WALK_INTERVAL: Duration = Duration::from_secs(2);

/// What each run of this process used when its folders were last walked, in bytes.
#[derive(Debug, Default)]
pub struct DiskUse(Mutex<HashMap<(JobId, i64), u64>>);

impl DiskUse {
    fn uses(&self) -> MutexGuard<'_, HashMap<(JobId, i64), u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_largest(&self, run: (JobId, i64)) -> bool {
        let uses = self.uses();
        let own = uses.get(&run).copied().unwrap_or(0);
        // One of two that are equal.
        uses.iter().all(|(other, size)| (*size, *other) <= (own, run))
    }
}

/// Removes a run from the list when it ends.
struct Listed<'a>(&'a DiskUse, (JobId, i64));

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.uses().remove(&self.1);
    }
}

/// Returns when this run has to end: it uses more than it may, or it uses most when too little is left.
pub(crate) async fn exceeded(ctx: &Context, run: (JobId, i64), folders: Vec<PathBuf>) -> DiskLimit {
    let _listed = Listed(&ctx.disk_use, run);
    let limit = ctx.config.run_disk.unwrap_or(u64::MAX);
    let mut due = Instant::now();
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let data = ctx.config.data_dir.clone();
        let free = tokio::task::spawn_blocking(move || disk::free(&data)).await;
        let is_short = matches!(free, Ok(Ok(free)) if free < ctx.config.disk_floor);
        if Instant::now() < due && !is_short {
            continue;
        }
        let walked = folders.clone();
        let began = Instant::now();
        let used = tokio::task::spawn_blocking(move || used(&walked))
            .await
            .unwrap_or(0);
        due = Instant::now() + WALK_INTERVAL.max(began.elapsed() * 10);
        ctx.disk_use.uses().insert(run, used);
        if used > limit {
            return DiskLimit::Run;
        }
        if is_short && ctx.disk_use.is_largest(run) {
            return DiskLimit::Floor;
        }
    }
}

/// The bytes that the content of these folders takes. Links aren't followed. What can't be read isn't counted, except
/// folders whose rights their owner took away.
fn used(folders: &[PathBuf]) -> u64 {
    let mut waiting = folders.to_vec();
    let mut bytes = 0;
    while let Some(folder) = waiting.pop() {
        for entry in open(&folder).into_iter().flatten().flatten() {
            // Of the entry itself, not of what a link leads to.
            let Ok(meta) = entry.metadata() else { continue };
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    bytes
}

fn open(folder: &Path) -> io::Result<fs::ReadDir> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let mode = fs::symlink_metadata(folder)?.permissions().mode();
            fs::set_permissions(folder, Permissions::from_mode(mode | 0o500))?;
            fs::read_dir(folder)
        }
        entries => entries,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_uses_is_added_up_without_following_links() {
        let folder = tempfile::tempdir().unwrap();
        let (workspace, outside) = (folder.path().join("workspace"), folder.path().join("outside"));
        fs::create_dir_all(workspace.join("deep/locked")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("large"), vec![1; 4 << 20]).unwrap();
        fs::write(workspace.join("deep/locked/file"), vec![1; 1 << 20]).unwrap();
        fs::set_permissions(workspace.join("deep/locked"), Permissions::from_mode(0o000)).unwrap();
        std::os::unix::fs::symlink(&outside, workspace.join("link")).unwrap();

        let bytes = used(&[workspace]);

        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
    }

    #[test]
    fn one_run_is_the_largest() {
        let uses = DiskUse::default();
        let runs = [(JobId::new(), 1), (JobId::new(), 1), (JobId::new(), 2)];
        for (run, size) in runs.into_iter().zip([5, 9, 9]) {
            uses.uses().insert(run, size);
        }

        let largest: Vec<_> = runs.iter().filter(|run| uses.is_largest(**run)).collect();

        assert_eq!(largest.len(), 1);
        assert_ne!(largest[0], &runs[0]);
    }
}
