//! Whether a directory can be written: a full disk and a read-only one still let everything be read.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

/// More than fits into an inode or into what a file has in reserve, and little for a disk.
static SAMPLE: [u8; 64 * 1024] = [1; 64 * 1024];

/// Writes a little into a directory and leaves nothing there. Blocks.
pub fn try_to_write(directory: &Path) -> io::Result<()> {
    let path = directory.join(format!(".room-{}", uuid::Uuid::new_v4().simple()));
    let mut file = File::create_new(&path)?;
    // Now, so that a kill leaves nothing behind either.
    fs::remove_file(&path)?;
    file.write_all(&SAMPLE)
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
