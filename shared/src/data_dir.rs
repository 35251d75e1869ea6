//! `DATA_DIR` belongs to one database: it holds the database's name, so that a process which is pointed at another
//! database, or at another's data, doesn't start.

use crate::env::Error;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Makes the folder if it isn't there, and makes sure that it belongs to the database `instance_id`. Gives its
/// absolute path.
pub fn bind(data_dir: &Path, instance_id: &str) -> Result<PathBuf, Error> {
    let unusable = |error: std::io::Error| {
        Error::new(
            "DATA_DIR",
            format!("can't be used: {error}"),
            "a folder that this user may write",
        )
    };
    std::fs::create_dir_all(data_dir).map_err(unusable)?;
    let file = data_dir.join("instance");
    let made = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&file);
    match made {
        Ok(mut made) => {
            let written = made
                .write_all(instance_id.as_bytes())
                .and_then(|()| made.sync_all());
            written.map_err(unusable)?;
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let owner = std::fs::read_to_string(&file).map_err(unusable)?;
            // An empty file is one that another process of ours is just writing, or couldn't.
            if owner.trim() != instance_id && !owner.trim().is_empty() {
                let problem = format!("({}) belongs to another database", data_dir.display());
                return Err(Error::new(
                    "DATA_DIR",
                    problem,
                    "the folder of this DATABASE_URL, or an empty one",
                ));
            }
        }
        Err(error) => return Err(unusable(error)),
    }
    data_dir.canonicalize().map_err(unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_serves_one_database_only() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = folder.path().join("data");
        bind(&data_dir, "one").unwrap();
        bind(&data_dir, "one").unwrap();
        assert_eq!(bind(&data_dir, "two").unwrap_err().variable, "DATA_DIR");
    }
}
