//! `DATA_DIR` belongs to one database, and a database has one `DATA_DIR`: workspaces and conversations are found there
//! again. The folder holds the names of both, and the database too, so that a process which is pointed at another one
//! doesn't start. Several machines share the folder by a shared file system.

use crate::env::Error;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// The file in the folder that holds the names: of the database, and of the folder.
const FILE: &str = "instance";

/// A folder that belongs to a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDir {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its name.
    pub id: String,
    instance_id: String,
}

impl DataDir {
    /// Makes the folder if it isn't there, and makes sure that it belongs to the database `instance_id`. `known`: the
    /// name of the folder that the database knows already; then no other is taken, not even an empty one.
    pub fn open(data_dir: &Path, instance_id: &str, known: Option<&str>) -> Result<Self, Error> {
        let unusable = |error: std::io::Error| {
            Error::new(
                "DATA_DIR",
                format!("can't be used: {error}"),
                "a folder that this user may write",
            )
        };
        std::fs::create_dir_all(data_dir).map_err(unusable)?;
        let path = data_dir.canonicalize().map_err(unusable)?;
        let file = path.join(FILE);
        if !file.exists() {
            if let Some(known) = known {
                return Err(another(&path, instance_id, known));
            }
            let names = format!("{instance_id} {}", uuid::Uuid::new_v4());
            name(&path, &file, &names).map_err(unusable)?;
        }
        let names = std::fs::read_to_string(&file).map_err(unusable)?;
        let (owner, id) = names.trim().split_once(' ').unwrap_or_default();
        if owner != instance_id {
            let problem = format!("({}) belongs to another database", data_dir.display());
            return Err(Error::new(
                "DATA_DIR",
                problem,
                "the folder of this DATABASE_URL, or an empty one",
            ));
        }
        let folder = Self {
            id: id.to_owned(),
            instance_id: owner.to_owned(),
            path,
        };
        match known {
            Some(known) => folder.confirm(known),
            None => Ok(folder),
        }
    }

    /// The folder that the database knows by the name `known`. It isn't made if it isn't there.
    pub fn existing(data_dir: &Path, instance_id: &str, known: &str) -> Result<Self, Error> {
        if data_dir.join(FILE).exists() {
            Self::open(data_dir, instance_id, Some(known))
        } else {
            Err(another(data_dir, instance_id, known))
        }
    }

    /// Makes sure that it is the folder that the database knows.
    pub fn confirm(self, known: &str) -> Result<Self, Error> {
        if self.id == known {
            Ok(self)
        } else {
            Err(another(&self.path, &self.instance_id, known))
        }
    }
}

fn another(path: &Path, instance_id: &str, known: &str) -> Error {
    let problem = format!(
        "({}) isn't the folder that the other workers of this database use, so a session would not find its workspace \
         and conversation",
        path.display()
    );
    let accepted = format!(
        "the same folder for all workers, on several machines by a shared file system (if the folder is lost, put \
         \"{instance_id} {known}\" into the file {})",
        path.join(FILE).display()
    );
    Error::new("DATA_DIR", problem, accepted)
}

/// Writes the names, whole or not at all, unless somebody else does so first.
fn name(data_dir: &Path, file: &Path, names: &str) -> std::io::Result<()> {
    let new = data_dir.join(format!("{FILE}.{}", uuid::Uuid::new_v4()));
    let mut made = std::fs::File::create_new(&new)?;
    made.write_all(names.as_bytes())?;
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
        let one = DataDir::open(&data_dir, "one", None).unwrap();
        assert_eq!(DataDir::open(&data_dir, "one", None).unwrap(), one);
        assert_eq!(DataDir::open(&data_dir, "one", Some(&one.id)).unwrap(), one);
        let refused = |instance_id| DataDir::open(&data_dir, instance_id, None).unwrap_err();
        assert_eq!(refused("two").variable, "DATA_DIR");
        let files = std::fs::read_dir(&data_dir).unwrap().count();
        assert_eq!(files, 1, "nothing is left beside the names");
        // As if the disk had lost what was written: it isn't everybody's.
        std::fs::write(data_dir.join(FILE), "").unwrap();
        assert_eq!(refused("two").variable, "DATA_DIR");
    }

    #[test]
    fn a_database_has_one_folder_only() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        let known = DataDir::open(&first, "one", None).unwrap().id;

        let refused = DataDir::open(&second, "one", Some(&known)).unwrap_err();

        assert!(refused.to_string().contains("shared file system"), "{refused}");
        assert!(!second.join(FILE).exists(), "it takes no name");
        let third = folder.path().join("third");
        assert!(DataDir::existing(&third, "one", &known).is_err() && !third.exists());
        assert_eq!(DataDir::existing(&first, "one", &known).unwrap().id, known);
        // Two that began at the same time: the database knows one of them.
        let late = DataDir::open(&second, "one", None).unwrap();
        assert_eq!(late.confirm(&known).unwrap_err().variable, "DATA_DIR");
        // A folder that was lost can be replaced on purpose.
        std::fs::write(second.join(FILE), format!("one {known}\n")).unwrap();
        assert_eq!(DataDir::open(&second, "one", Some(&known)).unwrap().id, known);
    }
}
