//! What is in a workspace. A walk never follows a link into a directory, goes at most 64 directories deep, and reads a
//! bounded number of entries, hidden ones included: an agent can make a directory of any size.

use std::collections::VecDeque;

use super::path::MAX_DEPTH;
use super::{FilePath, OpenFile, Result, Workspace, is_plain};
use cap_std::fs::{Dir, FileType, Metadata, MetadataExt as _};

/// How many entries a list reads.
pub const MAX_ENTRIES: usize = 10_000;
/// The longest path that a walk tells, in bytes.
const MAX_PATH: usize = 1_024;

/// Which of the hidden entries, those that begin with a dot, a walk tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// None.
    Plain,
    /// All but the directory of a repository.
    AllButGit,
}

impl Shown {
    fn shows(self, name: &str) -> bool {
        match self {
            Self::Plain => !name.starts_with('.'),
            Self::AllButGit => name != ".git",
        }
    }
}

/// What an entry of a list is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryKind {
    /// A directory, or a link to one in the workspace.
    Directory,
    /// A regular file, or a link to one in the workspace.
    File,
}

/// An entry of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// From the workspace.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// The size of a file in bytes.
    pub size: Option<u64>,
}

/// The entries of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// A part of them, by path.
    pub entries: Vec<Entry>,
    /// How many there are in all.
    pub total: usize,
    /// Whether there are more than are read.
    pub truncated: bool,
}

/// A regular file that a walk found, with what tells a changed file from an unchanged one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// From the workspace.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// Identity and times: the agent can set back all but the last.
    pub stamp: (u64, i64, i64, i64, i64),
}

impl Workspace {
    /// The entries of `directory` (`None`: the workspace itself), or of everything below it too: `take` of them, after
    /// the first `skip`. Entries that are neither file nor directory, links that lead nowhere or out, and names that
    /// no [`FilePath`] has, are left out.
    pub fn list(
        &self,
        directory: Option<&FilePath>,
        recursive: bool,
        skip: usize,
        take: usize,
    ) -> Result<Listing> {
        let mut entries = Vec::new();
        let truncated = self.walk(
            directory,
            recursive,
            (Shown::Plain, MAX_ENTRIES),
            |path, file_type, _| {
                let kind = if file_type.is_dir() {
                    EntryKind::Directory
                } else if file_type.is_file() {
                    EntryKind::File
                } else {
                    // Only what a link leads to inside the workspace counts.
                    match self.dir.metadata(path).ok().filter(|_| file_type.is_symlink()) {
                        Some(meta) if meta.is_dir() => EntryKind::Directory,
                        Some(meta) if meta.is_file() => EntryKind::File,
                        _ => return,
                    }
                };
                entries.push(Entry {
                    path: path.to_owned(),
                    kind,
                    size: None,
                });
            },
        )?;
        entries.retain(|entry| FilePath::parse(&entry.path).is_ok());
        entries.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        let total = entries.len();
        let mut entries = entries.into_iter().skip(skip).take(take).collect::<Vec<_>>();
        for entry in &mut entries {
            if entry.kind == EntryKind::File {
                // It may be gone by now.
                entry.size = self.dir.metadata(&entry.path).ok().map(|meta| meta.len());
            }
        }
        Ok(Listing {
            entries,
            total,
            truncated,
        })
    }

    /// All regular files, also hidden ones, but not those of a repository's `.git`. No links. And whether there are more
    /// than could be found by reading `max_entries`.
    pub fn files(&self, max_entries: usize) -> Result<(Vec<Found>, bool)> {
        let mut files = Vec::new();
        let truncated = self.walk(
            None,
            true,
            (Shown::AllButGit, max_entries),
            |path, file_type, meta| {
                if file_type.is_file()
                    && let Some(meta) = meta()
                {
                    files.push(Found {
                        path: path.to_owned(),
                        size: meta.len(),
                        stamp: (
                            meta.ino(),
                            meta.mtime(),
                            meta.mtime_nsec(),
                            meta.ctime(),
                            meta.ctime_nsec(),
                        ),
                    });
                }
            },
        )?;
        files.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok((files, truncated))
    }

    /// Opens a file that a walk found.
    pub fn open_found(&self, found: &Found) -> Result<OpenFile> {
        self.open_regular(&found.path)
    }

    /// Tells every entry: its path, its type (of a link, that it is one), and on demand its metadata. Whether there were
    /// more than it reads, or longer or deeper ones.
    fn walk(
        &self,
        from: Option<&FilePath>,
        recursive: bool,
        (shown, max_entries): (Shown, usize),
        mut tell: impl FnMut(&str, &FileType, &dyn Fn() -> Option<Metadata>),
    ) -> Result<bool> {
        let first = match from {
            Some(path) => self.dir.open_dir(path.as_str())?,
            None => self.dir.try_clone()?,
        };
        let from = from.map(FilePath::as_str).unwrap_or_default();
        let (mut truncated, mut read) = (false, 0);
        let mut next = Some((from.to_owned(), Ok(first)));
        let mut waiting = VecDeque::new();
        while let Some((above, directory)) = next {
            if let Ok(directory) = directory {
                let depth = if above.is_empty() {
                    0
                } else {
                    above.split('/').count()
                };
                // What vanishes or forbids reading meanwhile has no entries.
                for entry in directory.entries().into_iter().flatten().flatten() {
                    read += 1;
                    if read > max_entries {
                        return Ok(true);
                    }
                    let name = entry.file_name();
                    let (Some(name), Ok(file_type)) = (is_plain(&name), entry.file_type()) else {
                        continue;
                    };
                    if !shown.shows(name) {
                        continue;
                    }
                    let path = if above.is_empty() {
                        name.to_owned()
                    } else {
                        format!("{above}/{name}")
                    };
                    if path.len() > MAX_PATH || depth >= MAX_DEPTH {
                        truncated = true;
                        continue;
                    }
                    tell(&path, &file_type, &|| entry.metadata().ok());
                    if recursive && file_type.is_dir() {
                        waiting.push_back(path);
                    }
                }
            }
            next = waiting.pop_front().map(|path| {
                let directory: std::io::Result<Dir> = self.dir.open_dir(&path);
                (path, directory)
            });
        }
        Ok(truncated)
    }
}
