//! Who may read the files of a process.

use rustix::fs::Mode;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Makes every file, folder and socket that this process and its children create from now on accessible to this user
/// only, whatever the shell's umask is. Prompts, results and the database are nobody else's. Call it first in `main`.
pub fn private_files() {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
}

/// The files and folders of an installation that other users of the machine may open, perhaps because an older release
/// made them: `DATA_DIR`, what lies directly in it, and the files of a SQLite database.
pub fn open_to_others(data_dir: &Path, database: Option<&Path>) -> Vec<PathBuf> {
    let mut found = vec![data_dir.to_owned()];
    found.extend(entries(data_dir));
    if let Some(database) = database {
        let name = database.file_name().unwrap_or_default().as_encoded_bytes();
        let beside = entries(
            database
                .parent()
                .filter(|path| !path.as_os_str().is_empty())
                .unwrap_or(Path::new(".")),
        );
        found.extend(beside.filter(|path| {
            let other = path.file_name().unwrap_or_default().as_encoded_bytes();
            other.starts_with(name)
        }));
    }
    found.retain(|path| {
        // A link has no mode of its own.
        fs::symlink_metadata(path)
            .is_ok_and(|meta| !meta.is_symlink() && meta.permissions().mode() & 0o077 != 0)
    });
    found.sort();
    found.dedup();
    found
}

/// Takes all rights on these files and folders from other users.
pub fn close_to_others(paths: &[PathBuf]) -> io::Result<()> {
    paths.iter().try_for_each(|path| {
        let mode = fs::metadata(path)?.permissions().mode();
        fs::set_permissions(path, Permissions::from_mode(mode & 0o700))
    })
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_is_found_and_closed() {
        let folder = tempfile::tempdir().unwrap();
        let (data, beside) = (folder.path().join("data"), folder.path().join("db"));
        for folder in [&data, &data.join("jobs"), &beside] {
            fs::create_dir(folder).unwrap();
        }
        let (database, log, other) = (beside.join("q.db"), beside.join("q.db-wal"), beside.join("other"));
        for file in [&database, &log, &other] {
            fs::write(file, "").unwrap();
            fs::set_permissions(file, Permissions::from_mode(0o644)).unwrap();
        }
        for folder in [&data, &data.join("jobs")] {
            fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
        }

        let open = open_to_others(&data, Some(&database));

        assert_eq!(open, [data.clone(), data.join("jobs"), database.clone(), log]);
        close_to_others(&open).unwrap();
        assert!(open_to_others(&data, Some(&database)).is_empty());
        assert_eq!(
            fs::metadata(&database).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::metadata(&data).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
