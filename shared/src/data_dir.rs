//! `DATA_DIR` belongs to one database. It contains the database's instance id, and a process refuses to start if the
//! directory belongs to another database.

use crate::env::Error;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Creates the directory if it doesn't exist, and checks that it belongs to the database `instance_id`. Returns its
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
    if !file.exists() {
        name(data_dir, &file, instance_id).map_err(unusable)?;
    }
    let owner = std::fs::read_to_string(&file).map_err(unusable)?;
    if owner.trim() != instance_id {
        let problem = format!("({}) belongs to another database", data_dir.display());
        return Err(Error::new(
            "DATA_DIR",
            problem,
            "the folder of this DATABASE_URL, or an empty one",
        ));
    }
    data_dir.canonicalize().map_err(unusable)
}

/// Writes the instance id atomically, unless another process was first.
fn name(data_dir: &Path, file: &Path, instance_id: &str) -> std::io::Result<()> {
    let new = data_dir.join(format!("instance.{}", uuid::Uuid::new_v4()));
    let mut made = std::fs::File::create_new(&new)?;
    made.write_all(instance_id.as_bytes())?;
    made.sync_all()?;
    let linked = std::fs::hard_link(&new, file);
    std::fs::remove_file(&new)?;
    match linked {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    }
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
        let files = std::fs::read_dir(&data_dir).unwrap().count();
        assert_eq!(files, 1, "nothing is left beside the name");
        // An empty file, as after a crash of the disk, doesn't match every database.
        std::fs::write(data_dir.join("instance"), "").unwrap();
        assert_eq!(bind(&data_dir, "two").unwrap_err().variable, "DATA_DIR");
    }
}
