//! What bubblewrap reads from descriptors: its options and the filter of system calls. As arguments the options would show
//! the run the paths of the machine, in `/proc/1/cmdline`.

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

/// The sandbox of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The options of bubblewrap.
    pub options: Vec<String>,
    /// A file with the filter of system calls, as the kernel takes it.
    pub filter: PathBuf,
}

/// The first arguments of bubblewrap, and the files that must be open when it starts.
pub(crate) struct Descriptors {
    pub(crate) arguments: Vec<String>,
    _files: [File; 2],
}

impl Setup {
    /// Opens the files, for whatever program this process starts next.
    pub(crate) fn open(&self) -> io::Result<Descriptors> {
        let mut options = Vec::new();
        for option in &self.options {
            options.extend(option.bytes());
            options.push(0);
        }
        let files = [inherited(&options)?, inherited(&std::fs::read(&self.filter)?)?];
        let [options, filter] = files.each_ref().map(|file| file.as_raw_fd().to_string());
        Ok(Descriptors {
            arguments: vec!["--args".to_owned(), options, "--seccomp".to_owned(), filter],
            _files: files,
        })
    }
}

/// A file in memory that stays open in the programs that this process starts.
fn inherited(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("claude-queue", MemfdFlags::empty())?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}
