//! `APPROVED_DIRECTORY`: the folder of the host in which a session may be given a folder to work in.

use crate::env::{Error, Vars};
use std::io;
use std::path::{Component, Path, PathBuf};

/// Why a folder isn't one to work in.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// There is no approved directory.
    #[error(
        "Directory outside approved path: APPROVED_DIRECTORY is not set, so sessions work in folders of their own"
    )]
    NoneApproved,
    /// It lies outside, or a link in it leads there.
    #[error("Directory outside approved path")]
    Outside,
    /// It isn't there, or isn't a folder.
    #[error("Directory {0} does not exist")]
    Missing(String),
    /// Its path isn't text.
    #[error("Directory {0} has a name that is not UTF-8")]
    NotText(String),
}

/// `APPROVED_DIRECTORY`; without it no session is given another folder than its own.
pub fn from_vars(vars: &Vars) -> Result<Option<PathBuf>, Error> {
    let Some(path) = vars.path("APPROVED_DIRECTORY")? else {
        return Ok(None);
    };
    let unusable = |error: io::Error| {
        Error::new(
            "APPROVED_DIRECTORY",
            format!("can't be used: {error}"),
            "a folder that exists",
        )
    };
    let path = path.canonicalize().map_err(unusable)?;
    if path.is_dir() {
        Ok(Some(path))
    } else {
        Err(unusable(io::ErrorKind::NotADirectory.into()))
    }
}

/// The folder, without links, if it lies in the approved one. A relative path counts from there. What lies outside is
/// refused alike whether it exists or not.
pub fn resolve(approved: Option<&Path>, directory: &str) -> Result<String, Refused> {
    let approved = approved.ok_or(Refused::NoneApproved)?;
    let path = approved.join(directory);
    let Ok(real) = path.canonicalize() else {
        let inside =
            path.starts_with(approved) && !path.components().any(|part| part == Component::ParentDir);
        return Err(if inside {
            Refused::Missing(directory.to_owned())
        } else {
            Refused::Outside
        });
    };
    if !real.starts_with(approved) {
        return Err(Refused::Outside);
    }
    if !real.is_dir() {
        return Err(Refused::Missing(directory.to_owned()));
    }
    real.into_os_string()
        .into_string()
        .map_err(|_| Refused::NotText(directory.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_inside_are_approved() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let approved = root.join("approved");
        std::fs::create_dir_all(approved.join("project/inner")).unwrap();
        std::fs::create_dir(root.join("secret")).unwrap();
        std::fs::write(approved.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(root.join("secret"), approved.join("out")).unwrap();
        std::os::unix::fs::symlink(approved.join("project"), approved.join("in")).unwrap();
        let resolve = |path: &str| {
            resolve(Some(&approved), path).map_err(|refused| match refused {
                Refused::Missing(_) => "missing",
                _ => "outside",
            })
        };
        let project = approved.join("project").to_str().unwrap().to_owned();
        assert_eq!(resolve(&project), Ok(project.clone()));
        assert_eq!(resolve("project"), Ok(project.clone()));
        assert_eq!(resolve("in"), Ok(project.clone()));
        assert_eq!(resolve("project/inner/.."), Ok(project));
        for (path, why) in [
            ("file", "missing"),
            ("none", "missing"),
            ("out", "outside"),
            ("..", "outside"),
            ("../secret", "outside"),
            ("../none", "outside"),
            ("/", "outside"),
            ("/none", "outside"),
            ("/etc", "outside"),
        ] {
            assert_eq!(resolve(path), Err(why), "{path}");
        }
        // A name that only begins alike isn't inside.
        std::fs::create_dir(root.join("approved2")).unwrap();
        assert_eq!(resolve("../approved2"), Err("outside"));
        assert!(matches!(
            super::resolve(None, "project"),
            Err(Refused::NoneApproved)
        ));
    }
}
