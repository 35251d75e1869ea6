//! A control group of its own for each run, where the system lets this process make one (version 2, for instance in a
//! systemd service with `Delegate=yes`). It holds every process of the run, whatever that did to its parents and its
//! environment, and the kernel ends all of it at one word. Everywhere else the guard does without.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};

use super::tree::Process;

/// The beginning of the names of the runs' groups; the marker follows.
const PREFIX: &str = "claude-queue.";

/// How long ended processes may take to leave their group.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// How often it is looked whether a run has started more processes while its others were moved. Each round leaves only
/// what was started within the one before, and the guard finds those as well.
const MAX_ROUNDS: usize = 20;

/// The group that this process is in, when groups can be made in it.
pub fn own() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = locate(&mounts, &groups)?;
    let writable = |path: &Path| access(path, Access::WRITE_OK).is_ok();
    (writable(&own) && writable(&own.join("cgroup.procs"))).then_some(own)
}

/// Where the group of version 2 that a process is in is mounted.
fn locate(mounts: &str, groups: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    // Outside of what this process may see of the tree.
    if path.contains("/..") {
        return None;
    }
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let within = Path::new(path).strip_prefix(root).ok()?;
        kind.starts_with("cgroup2 ")
            .then(|| Path::new(point).join(within))
    })
}

/// The group of the run of this marker.
pub(crate) fn of(parent: &Path, marker: &str) -> PathBuf {
    parent.join(format!("{PREFIX}{marker}"))
}

/// The group of a run while this process looks after it.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the group, with nothing in it yet; `None` where it can't be made.
    /// The kernel keeps it to this memory, in bytes, where it lets this process say so.
    pub(crate) fn make(group: &Path, memory: Option<u64>) -> Option<Self> {
        if let Some(parent) = group.parent() {
            // Refused while processes are in the parent itself, which isn't always this process' to change.
            let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory +pids");
        }
        fs::create_dir(group).ok()?;
        let cgroup = Self(group.to_owned());
        // Kernels before 5.14 can't end a group.
        if access(group.join("cgroup.kill"), Access::WRITE_OK).is_err() {
            cgroup.remove();
            return None;
        }
        cgroup.limit(memory);
        Some(cgroup)
    }

    /// Each file is there only if its controller is. The guard looks at the memory as well.
    fn limit(&self, memory: Option<u64>) {
        let set = |file: &str, value: u64| {
            let path = self.0.join(file);
            if path.exists() {
                let _ = fs::write(path, value.to_string());
            }
        };
        set("pids.max", super::MAX_THREADS);
        if let Some(memory) = memory {
            set("memory.max", memory);
            set("memory.swap.max", 0);
        }
    }

    /// Moves these processes into the group, those that they have started meanwhile too: what is started in the group
    /// is born there.
    pub(crate) fn gather(&self, family: impl Fn() -> Vec<Process>) {
        let list = self.0.join("cgroup.procs");
        for _ in 0..MAX_ROUNDS {
            let inside = fs::read_to_string(&list).unwrap_or_default();
            let inside: HashSet<i32> = inside.lines().filter_map(|pid| pid.parse().ok()).collect();
            let mut outside = family();
            outside.retain(|process| !process.zombie && !inside.contains(&process.pid));
            if outside.is_empty() {
                return;
            }
            for process in outside {
                // Gone meanwhile, most likely.
                let _ = fs::write(&list, process.pid.to_string());
            }
        }
    }

    /// Ends every process in the group.
    pub(crate) fn kill(&self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
    }

    /// Removes the group, in which nothing is left.
    pub(crate) fn remove(&self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Ends every process in a run's group without the run's guard, and removes it; nothing when it isn't there. Blocks
/// until they are gone, for some milliseconds.
pub(crate) fn end(group: &Path) {
    end_while(group, || true);
}

fn end_while(group: &Path, may_kill: impl Fn() -> bool) {
    let since = Instant::now();
    // Refused while a process is in it, and when there is none.
    while may_kill() && group.is_dir() && fs::remove_dir(group).is_err() && since.elapsed() < KILL_TIMEOUT {
        let _ = fs::write(group.join("cgroup.kill"), "1");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends what is in the groups of the runs with these markers beside the group of this process' own runs, as long as it
/// may.
pub(crate) fn kill_where(wanted: impl Fn(&str) -> bool, may_kill: impl Fn() -> bool) {
    if !may_kill() {
        return;
    }
    let entries = own().and_then(|own| fs::read_dir(own).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let name = entry.file_name();
        let marker = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if marker.is_some_and(&wanted) {
            end_while(&entry.path(), &may_kill);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 23 0:26 / /sys rw,nosuid - sysfs sysfs rw
31 30 0:27 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn the_own_group_is_found_in_its_mount() {
        let found = locate(MOUNTS, "0::/system.slice/claude-queue.service\n");
        let expected = Path::new("/sys/fs/cgroup/system.slice/claude-queue.service");
        assert_eq!(found.as_deref(), Some(expected));

        // Version 1 beside it.
        let found = locate(MOUNTS, "4:memory:/x\n0::/\n");
        assert_eq!(found.as_deref(), Some(Path::new("/sys/fs/cgroup/")));

        // A container that sees a part of the tree.
        let bound = MOUNTS.replace("0:27 / ", "0:27 /docker/a ");
        let found = locate(&bound, "0::/docker/a/b\n");
        assert_eq!(found.as_deref(), Some(Path::new("/sys/fs/cgroup/b")));
    }

    #[test]
    fn a_group_gets_the_limits_that_its_controllers_have() {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("run");
        fs::create_dir(&group).unwrap();
        for file in ["memory.max", "pids.max"] {
            fs::write(group.join(file), "max").unwrap();
        }

        Cgroup(group.clone()).limit(Some(1 << 30));

        let read = |file| fs::read_to_string(group.join(file)).unwrap();
        assert_eq!(
            (read("memory.max"), read("pids.max")),
            ("1073741824".to_owned(), "4096".to_owned())
        );
        assert!(!group.join("memory.swap.max").exists());
    }

    #[test]
    fn no_group_is_made_up() {
        for (mounts, groups) in [
            ("", "0::/\n"),
            (MOUNTS, "4:memory:/x\n"),
            (MOUNTS, "0::/../other\n"),
            (
                "31 30 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n",
                "0::/\n",
            ),
        ] {
            assert_eq!(locate(mounts, groups), None);
        }
    }
}
