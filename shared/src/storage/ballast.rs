//! A file beside a SQLite database that only takes room. When the disk is full it is given up, so that the ends of runs,
//! cancels and deletions can be written, and with them the disk gets room again.

use super::{Db, Store};
use crate::disk;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// In bytes: thousands of ends of runs.
const SIZE: u64 = 16 * 1024 * 1024;

/// A disk with less room than this, in bytes, is full.
const FULL: u64 = 1024 * 1024;

impl Store {
    /// Makes the ballast of a SQLite database if there is none and the disk has much room. Blocks for a moment.
    pub fn make_ballast(&self) {
        if let Some(database) = self.file()
            && let Err(error) = make(&database)
        {
            tracing::debug!(%error, "could not make the ballast beside the database");
        }
    }

    /// Gives the ballast up if the disk of a SQLite database is full. Blocks for a moment.
    pub(super) fn give_up_ballast(&self) {
        let Db::Sqlite { .. } = &*self.db else { return };
        if let Some(database) = self.file()
            && give_up(&database)
        {
            tracing::warn!(
                "the disk of the database is full: gave up the ballast, so that jobs can be ended and deleted"
            );
        }
    }
}

fn place(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(".ballast");
    name.into()
}

fn make(database: &Path) -> io::Result<()> {
    let place = place(database);
    if place.exists() || disk::free(&place)? < 4 * SIZE {
        return Ok(());
    }
    let file = fs::File::create_new(&place)?;
    let made = fallocate(&file, FallocateFlags::empty(), 0, SIZE);
    if made.is_err() {
        fs::remove_file(&place)?;
    }
    Ok(made?)
}

fn give_up(database: &Path) -> bool {
    let place = place(database);
    place.exists() && disk::free(&place).is_ok_and(|free| free < FULL) && fs::remove_file(&place).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ballast_takes_room_and_stays_while_there_is_some() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join("q.db");

        make(&database).unwrap();
        make(&database).unwrap();

        let ballast = folder.path().join("q.db.ballast");
        assert!(fs::metadata(&ballast).unwrap().blocks() * 512 >= SIZE);
        assert!(!give_up(&database) && ballast.exists());
    }
}
