//! Processes of this machine as `/proc` shows them, and how one is killed without hitting another.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

/// How many open files of a run are looked at for its memory; a run may have more than a look has time for.
const MAX_OPEN: usize = 50_000;

/// One process. The pair of pid and start time never comes twice while the machine is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    /// In clock ticks since the machine started.
    pub(crate) started: u64,
    /// Only its entry is left, waiting for its parent.
    pub(crate) zombie: bool,
}

impl Process {
    /// The process of this pid; `None` when there is none.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Sends SIGKILL, unless the process is gone.
    pub(crate) fn kill(&self) {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return;
        };
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => {
                // The handle holds the pid; what it holds must still be the process that was meant.
                if Self::of(self.pid).is_some_and(|now| now.started == self.started) {
                    let _ = rustix::process::pidfd_send_signal(handle, Signal::KILL);
                }
            }
            Err(Errno::SRCH) => {}
            // A kernel or a seccomp filter without pidfds.
            Err(_) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Every process that can be seen, zombies included, in the order of `/proc`.
pub(crate) fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Process::of(entry.ok()?.file_name().to_str()?.parse().ok()?))
        .collect()
}

/// Every descendant of `root`, zombies included, without itself.
pub(crate) fn descendants(root: i32) -> Vec<Process> {
    below(root, &processes())
}

fn below(root: i32, all: &[Process]) -> Vec<Process> {
    let mut family = HashSet::from([root]);
    // A parent's pid may be the higher one (pids wrap around), so one pass may not be enough.
    loop {
        let known = family.len();
        for process in all {
            if family.contains(&process.parent) {
                family.insert(process.pid);
            }
        }
        if family.len() == known {
            break;
        }
    }
    all.iter()
        .filter(|process| process.pid != root && family.contains(&process.pid))
        .copied()
        .collect()
}

/// The memory that the descendants of `root` alone hold, in bytes: anonymous pages, shared ones, and files in memory
/// that no process need have mapped. Not the pages of files on disk, which all runs of one CLI have in common.
pub(crate) fn memory(root: i32) -> u64 {
    let family = descendants(root);
    let (mut anonymous, mut shared) = (0, 0);
    for process in &family {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
        anonymous += parse_memory(&status, "RssAnon:");
        shared += parse_memory(&status, "RssShmem:");
    }
    // Most shared pages are pages of such files, so they aren't counted twice.
    anonymous + shared.max(temporary_files(&family) + unnamed_files(&family))
}

/// What lies in the sandbox's own file systems in memory.
fn temporary_files(family: &[Process]) -> u64 {
    let device = |path: &str| fs::metadata(path).ok().map(|meta| meta.dev());
    let outside = device("/tmp");
    // The first processes of a sandbox still see the machine's folders.
    let inside = family.iter().find(|process| {
        let theirs = device(&format!("/proc/{}/root/tmp", process.pid));
        theirs.is_some() && theirs != outside
    });
    let Some(inside) = inside else { return 0 };
    let used = |folder: &str| {
        let found = rustix::fs::statvfs(format!("/proc/{}/root/{folder}", inside.pid)).ok()?;
        Some((found.f_blocks - found.f_bfree) * found.f_frsize)
    };
    ["tmp", "dev/shm"].into_iter().filter_map(used).sum()
}

/// What lies in files that have no name, and are there as long as a process has them open.
fn unnamed_files(family: &[Process]) -> u64 {
    let mut found = HashMap::new();
    let open = family.iter().flat_map(|process| {
        fs::read_dir(format!("/proc/{}/fd", process.pid))
            .into_iter()
            .flatten()
            .flatten()
    });
    for file in open.take(MAX_OPEN) {
        let path = file.path();
        let unnamed =
            fs::read_link(&path).is_ok_and(|target| target.as_os_str().as_bytes().starts_with(b"/memfd:"));
        if unnamed && let Ok(meta) = fs::metadata(&path) {
            found.insert((meta.dev(), meta.ino()), meta.blocks() * 512);
        }
    }
    found.values().sum()
}

fn parse_stat(stat: &str) -> Option<Process> {
    // The name, in parentheses, may hold anything, also parentheses.
    let (pid, rest) = stat.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let threads: u32 = fields.get(17)?.parse().ok()?;
    Some(Process {
        pid: pid.parse().ok()?,
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
        // A process whose first thread ended is shown as a zombie while the others run.
        zombie: matches!(*fields.first()?, "Z" | "X") && threads <= 1,
    })
}

fn parse_memory(status: &str, name: &str) -> u64 {
    let kilobytes = |line: &str| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok();
    status
        .lines()
        .filter(|line| line.starts_with(name))
        .filter_map(kilobytes)
        .map(|kilobytes| kilobytes * 1024)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32) -> Process {
        Process {
            pid,
            parent,
            started: 1,
            zombie: false,
        }
    }

    #[test]
    fn a_name_with_parentheses_and_spaces_is_skipped() {
        let stat = "42 (a) S 1 (x) R 7 42 42 0 -1 4194304 100 0 0 0 0 0 0 0 20 0 3 0 9876 1 2 3";

        let read = parse_stat(stat).unwrap();

        assert_eq!(
            read,
            Process {
                pid: 42,
                parent: 7,
                started: 9876,
                zombie: false
            }
        );
    }

    #[test]
    fn a_zombie_with_running_threads_is_alive() {
        let stat = |threads: u32| format!("42 (x) Z 7 42 42 0 -1 0 0 0 0 0 0 0 0 0 20 0 {threads} 0 9876 1");

        assert!(parse_stat(&stat(1)).unwrap().zombie);
        assert!(!parse_stat(&stat(2)).unwrap().zombie);
    }

    #[test]
    fn this_process_is_found_below_its_parent() {
        let own = i32::try_from(std::process::id()).unwrap();
        let me = Process::of(own).unwrap();

        assert!(descendants(me.parent).contains(&me));
        assert!(memory(me.parent) > 0);
    }

    #[test]
    fn a_child_with_a_lower_pid_than_its_parent_is_a_descendant() {
        let all = [process(5, 900), process(900, 800), process(800, 1), process(7, 1)];

        let found: Vec<i32> = below(800, &all).iter().map(|process| process.pid).collect();

        assert_eq!(found, [5, 900]);
    }

    #[test]
    fn pages_of_files_dont_count() {
        let status =
            "Name:\tx\nVmRSS:\t  900 kB\nRssAnon:\t  100 kB\nRssFile:\t 790 kB\nRssShmem:\t   10 kB\n";

        assert_eq!(parse_memory(status, "RssAnon:"), 100 * 1024);
        assert_eq!(parse_memory(status, "RssShmem:"), 10 * 1024);
    }
}
