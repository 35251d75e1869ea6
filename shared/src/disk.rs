//! Checks whether a directory can be written, and how much room there is. A full or read-only disk can still be read.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

/// More than fits into an inode or a preallocated block, and little for a disk.
static SAMPLE: [u8; 64 * 1024] = [1; 64 * 1024];

/// Writes a small file into the directory and removes it. Blocks.
pub fn try_to_write(directory: &Path) -> io::Result<()> {
    let path = directory.join(format!(".room-{}", uuid::Uuid::new_v4().simple()));
    let mut file = File::create_new(&path)?;
    // Removed before it is written, so that a kill leaves no file either.
    fs::remove_file(&path)?;
    file.write_all(&SAMPLE)
}

/// The bytes that this user may still write where the file or folder is, or its folder. Blocks.
pub fn free(path: &Path) -> io::Result<u64> {
    let there = if path.exists() {
        path
    } else {
        path.parent().unwrap_or(path)
    };
    let there = if there.as_os_str().is_empty() {
        Path::new(".")
    } else {
        there
    };
    let found = rustix::fs::statvfs(there)?;
    Ok(found.f_bavail * found.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_leaves_nothing_and_says_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        try_to_write(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        let missing = try_to_write(&folder.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
