//! The files of a workspace, as others than its agent may see and change them. The agent can change everything in it at
//! any moment, also between two looks at the same name. So every access goes through the open directory of the workspace
//! and can't leave it, whatever links are put in its way; what isn't a regular file isn't read; and walks have limits.

mod path;
mod walk;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::SystemTime;

use cap_fs_ext::DirExt as _;
use cap_std::ambient_authority;
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt as _, OpenOptions, OpenOptionsExt as _};
use rustix::fs::OFlags;
use uuid::Uuid;

use crate::id::{JobId, SessionId};

pub use path::FilePath;
pub use walk::{Entry, EntryKind, Found, Listing, MAX_ENTRIES, Shown};

/// The directory of the agent, in the directory of a job or session.
pub const WORKSPACE: &str = "workspace";
/// Where files arrive before they are whole: beside the workspace, where no agent sees them.
const UPLOADS: &str = "uploads";
/// An upload of which nothing was heard for so long is a leftover of a process that was killed.
const UPLOAD_LEFTOVER_SECONDS: i64 = 3_600;

/// Whose workspace it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A job without a session.
    Job(JobId),
    /// A session.
    Session(SessionId),
}

impl Owner {
    /// The two directories under `DATA_DIR` that lead to it.
    pub fn directories(self) -> [String; 2] {
        match self {
            Self::Job(job_id) => ["jobs".to_owned(), job_id.to_string()],
            Self::Session(session_id) => ["sessions".to_owned(), session_id.to_string()],
        }
    }
}

/// Why something can't be done with a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such file or directory.
    #[error("there is no such file or directory")]
    Missing,
    /// What the path leads to can't be used; the sentence says why.
    #[error("{0}")]
    Refused(&'static str),
    /// The disk has no room.
    #[error("the disk is full")]
    DiskFull(#[source] io::Error),
    /// The file system failed.
    #[error("the file system failed")]
    Io(#[source] io::Error),
}

/// What goes well, or why not.
pub type Result<T> = std::result::Result<T, Error>;

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => Self::Missing,
            // The library says it so, without a number of the system.
            (io::ErrorKind::PermissionDenied, None) => Self::Refused("Path outside session workspace"),
            (io::ErrorKind::PermissionDenied, _) => Self::Refused("The file's permissions don't allow it"),
            (io::ErrorKind::NotADirectory, _) => Self::Refused("A part of the path is not a directory"),
            (io::ErrorKind::IsADirectory, _) => Self::Refused("The path is a directory"),
            (io::ErrorKind::DirectoryNotEmpty, _) => Self::Refused("The directory is not empty"),
            (io::ErrorKind::InvalidFilename, _) => Self::Refused("The path or a name in it is too long"),
            (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge, _) => {
                Self::DiskFull(error)
            }
            (_, Some(number)) if number == rustix::io::Errno::LOOP.raw_os_error() => {
                Self::Refused("The path is a link that can't be followed")
            }
            // A socket, or a device without a driver.
            (_, Some(number)) if number == rustix::io::Errno::NXIO.raw_os_error() => {
                Self::Refused("Not a regular file")
            }
            _ => Self::Io(error),
        }
    }
}

/// A file that is open for reading. It is a regular one; the agent may still change it.
#[derive(Debug)]
pub struct OpenFile {
    /// Its content.
    pub file: File,
    /// Its size in bytes when it was opened.
    pub size: u64,
    /// When its content was changed last, as the file system says; the agent can set it.
    pub modified: SystemTime,
    /// A text that differs when the content was changed: the change time of the file can't be set back.
    pub tag: String,
}

/// An open workspace.
#[derive(Debug)]
pub struct Workspace {
    dir: Dir,
}

impl Workspace {
    /// Opens a workspace under `data_dir`; `None` if there is none (yet, or any more).
    pub fn open(data_dir: &Path, owner: Owner) -> Result<Option<Self>> {
        match open_root(data_dir, owner).and_then(|root| Ok(root.open_dir_nofollow(WORKSPACE)?)) {
            Ok(dir) => Ok(Some(Self { dir })),
            Err(Error::Missing) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens a regular file. Links are followed as far as they stay in the workspace. Doesn't wait for a writer of a
    /// named pipe, and opens no device.
    pub fn open_file(&self, path: &FilePath) -> Result<OpenFile> {
        self.open_regular(path.as_str())
    }

    fn open_regular(&self, path: &str) -> Result<OpenFile> {
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(i32::try_from(flags).unwrap_or_default());
        let file = self.dir.open_with(path, &options)?.into_std();
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(Error::Refused("Not a regular file"));
        }
        Ok(OpenFile {
            size: meta.len(),
            modified: meta.modified()?,
            tag: format!(
                "{:x}-{:x}-{:x}{:08x}",
                meta.ino(),
                meta.len(),
                meta.ctime(),
                meta.ctime_nsec()
            ),
            file,
        })
    }

    /// Removes a file, a link (not what it leads to), or an empty directory.
    pub fn remove(&self, path: &FilePath) -> Result<()> {
        let is_directory = self.dir.symlink_metadata(path.as_str())?.is_dir();
        if is_directory {
            self.dir.remove_dir(path.as_str())?;
        } else {
            self.dir.remove_file(path.as_str())?;
        }
        Ok(())
    }

    /// The directory at `path`, which is made, with those above it, if it isn't there.
    fn make_directory(&self, path: Option<&str>) -> Result<Dir> {
        let Some(path) = path else {
            return Ok(self.dir.try_clone()?);
        };
        // Each step from the one before: what a link leads to must be in the workspace, too.
        let mut made = String::new();
        for part in path.split('/') {
            if !made.is_empty() {
                made.push('/');
            }
            made.push_str(part);
            match self.dir.create_dir_with(&made, &private()) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
        }
        Ok(self.dir.open_dir(path)?)
    }
}

/// A file that arrives. It is removed again unless it is placed.
#[derive(Debug)]
pub struct Upload {
    root: Dir,
    uploads: Dir,
    name: String,
    /// Takes the content.
    pub file: File,
    placed: bool,
}

impl Upload {
    /// Begins a file for this workspace, which is made if it isn't there.
    pub fn begin(data_dir: &Path, owner: Owner) -> Result<Self> {
        let root = make_root(data_dir, owner)?;
        let uploads = make_step(&root, UPLOADS)?;
        remove_leftovers(&uploads);
        let name = Uuid::new_v4().simple().to_string();
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = uploads.open_with(&name, &options)?.into_std();
        Ok(Self {
            root,
            uploads,
            name,
            file,
            placed: false,
        })
    }

    /// Makes the file appear at `path`, whole, in place of what is there. Missing directories are made.
    pub fn place(mut self, path: &FilePath) -> Result<()> {
        self.file.flush()?;
        self.file.sync_all()?;
        let workspace = Workspace {
            dir: make_step(&self.root, WORKSPACE)?,
        };
        let (above, name) = path.split();
        let directory = workspace.make_directory(above)?;
        if directory.symlink_metadata(name).is_ok_and(|there| there.is_dir()) {
            return Err(Error::Refused("The path is a directory"));
        }
        self.uploads.rename(&self.name, &directory, name)?;
        self.placed = true;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.placed {
            let _ = self.uploads.remove_file(&self.name);
        }
    }
}

/// The directory of a job or session. No step of the way is a link.
fn open_root(data_dir: &Path, owner: Owner) -> Result<Dir> {
    let data = Dir::open_ambient_dir(data_dir, ambient_authority())?;
    let [kind, id] = owner.directories();
    Ok(data.open_dir_nofollow(kind)?.open_dir_nofollow(id)?)
}

/// The same, made if it isn't there.
fn make_root(data_dir: &Path, owner: Owner) -> Result<Dir> {
    let data = Dir::open_ambient_dir(data_dir, ambient_authority())?;
    let [kind, id] = owner.directories();
    make_step(&make_step(&data, &kind)?, &id)
}

fn make_step(above: &Dir, name: &str) -> Result<Dir> {
    match above.create_dir_with(name, &private()) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    Ok(above.open_dir_nofollow(name)?)
}

/// Directories that only this user can enter.
fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}

/// Removes what killed processes left.
fn remove_leftovers(uploads: &Dir) {
    let Ok(entries) = uploads.entries() else { return };
    let now = crate::clock::local().0 / 1_000_000;
    for entry in entries.flatten() {
        let written = entry
            .metadata()
            .map_or(now, |meta| cap_std::fs::MetadataExt::mtime(&meta));
        if now - written > UPLOAD_LEFTOVER_SECONDS {
            let _ = uploads.remove_file(entry.file_name());
        }
    }
}

/// Whether a name may be shown: text without control characters, and no longer than a path may be.
fn is_plain(name: &OsStr) -> Option<&str> {
    name.to_str().filter(|name| !name.chars().any(char::is_control))
}

#[cfg(test)]
mod tests;
