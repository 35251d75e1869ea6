//! A small disk of a test's own, to fill up and to make read-only. It is mounted in a mount namespace that a sleeping
//! process holds, so it is gone with that process, whatever becomes of the test; and an ordinary user may do it too.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::account::is_root;
use crate::paths;

/// A file system of a few megabytes that only processes started with [`Disk::enter`] see at its path.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    holder: Child,
}

impl Disk {
    /// Mounts an empty one. Fails the test where that isn't possible: it needs root, or user namespaces.
    pub fn mount(mebibytes: u32) -> Self {
        let folder = paths::folder('m');
        let script = format!(
            "mount -t tmpfs -o size={mebibytes}m,mode=0777 tmpfs \"$0\" && echo mounted && exec sleep 1000000"
        );
        let mut command = Command::new("unshare");
        if !is_root() {
            command.arg("--map-root-user");
        }
        let mut holder = command
            .args(["--mount", "--propagation", "private", "--", "sh", "-c", &script])
            .arg(&folder)
            .env(paths::MARKER, &folder)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("`unshare` of util-linux starts");
        let mut line = String::new();
        let output = holder.stdout.take().expect("it is piped");
        BufReader::new(output)
            .read_line(&mut line)
            .expect("the holder's output");
        assert_eq!(
            line, "mounted\n",
            "a small disk can't be mounted here: that needs root with CAP_SYS_ADMIN, or user namespaces"
        );
        Self { folder, holder }
    }

    /// Where it is mounted, for processes that entered.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// The same file as everybody else sees it.
    pub fn from_outside(&self, path: &Path) -> PathBuf {
        let root = format!("/proc/{}/root", self.holder.id());
        Path::new(&root).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// What stands before a working directory and a command line to have it run where the disk is mounted.
    pub fn enter(&self) -> Vec<String> {
        let target = format!("--target={}", self.holder.id());
        let mut words = vec!["nsenter", &target, "--mount"];
        if !is_root() {
            words.extend(["--user", "--preserve-credentials"]);
        }
        words.extend(["--", "sh", "-c", "cd \"$0\" && exec \"$@\""]);
        words.into_iter().map(str::to_owned).collect()
    }

    /// Fills it to the last byte.
    pub fn fill(&self) {
        let mut filler = File::create(self.filler()).expect("a new file on the disk");
        let mut piece = vec![0; 1 << 20];
        while !piece.is_empty() {
            if filler.write_all(&piece).is_err() {
                piece.truncate(piece.len() / 2);
            }
        }
    }

    /// Takes back what [`Disk::fill`] wrote.
    pub fn free(&self) {
        fs::remove_file(self.filler()).expect("the disk was filled");
    }

    /// Makes it read-only or writable. Nobody may have a file of it open for writing.
    pub fn set_read_only(&self, read_only: bool) {
        let options = if read_only { "remount,ro" } else { "remount,rw" };
        let words = self.enter();
        let done = Command::new(&words[0])
            .args(&words[1..])
            .args(["/", "mount", "-o", options])
            .arg(&self.folder)
            .status()
            .expect("`nsenter` of util-linux starts");
        assert!(done.success(), "the disk can't be remounted");
    }

    fn filler(&self) -> PathBuf {
        self.from_outside(&self.folder.join("filler"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
