//! Which processes belong to a folder, and their end. A process belongs to a folder when its environment, its
//! command line, its working directory or one of its mounts names it: so a daemon that left its parents, and a
//! process inside a sandbox, which sees none of the outside's paths, are found all the same.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// One living process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its process id.
    pub pid: i32,
    /// Its command line, arguments separated by blanks; its name when it has none.
    pub command: String,
}

/// Sends a signal; a process that is gone already is no error.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process of this id is there and not a zombie.
pub fn is_alive(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The state follows the name, which stands in brackets and may hold any character.
        Ok(stat) => !stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
        Err(_) => false,
    }
}

/// Every living process that belongs to `folder`, but for the caller.
pub fn of_folder(folder: &Path) -> Vec<Found> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| pid != own && belongs(pid, folder) && is_alive(pid))
        .map(|pid| Found {
            pid,
            command: command(pid),
        })
        .collect()
}

/// Ends every process that belongs to `folder`, until none is left or `limit` has passed; what is left then.
/// PostgreSQL is told to stop at once, everything else is killed.
pub fn end_folder(folder: &Path, limit: Duration) -> Vec<Found> {
    let begin = Instant::now();
    loop {
        let left = of_folder(folder);
        if left.is_empty() || begin.elapsed() > limit {
            return left;
        }
        let patient = begin.elapsed() < limit / 2;
        for found in &left {
            // A killed postmaster leaves its shared memory behind; one that quits removes it.
            let postgres = found.command.contains("postgres");
            if postgres && patient {
                signal(found.pid, Signal::QUIT);
            } else {
                signal(found.pid, Signal::KILL);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn belongs(pid: i32, folder: &Path) -> bool {
    let names = |file: &str, path: &Path| {
        fs::read(format!("/proc/{pid}/{file}"))
            .is_ok_and(|bytes| contains(&bytes, path.as_os_str().as_encoded_bytes()))
    };
    // Mounts are written from the root of their file system, which /tmp may be.
    let in_tmp = folder.strip_prefix("/tmp").unwrap_or(folder);
    names("environ", folder)
        || names("cmdline", folder)
        || fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
        || names("mountinfo", in_tmp)
}

fn command(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = line
        .split(|&byte| byte == 0)
        .map(String::from_utf8_lossy)
        .collect();
    let line = words.join(" ").trim().to_owned();
    if line.is_empty() {
        return fs::read_to_string(format!("/proc/{pid}/comm"))
            .unwrap_or_default()
            .trim()
            .to_owned();
    }
    line.chars().take(300).collect()
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_daemon_that_left_its_parents_is_found_and_ended() {
        let folder = std::env::temp_dir().join(format!("cq-processes-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let daemon = "setsid sh -c 'trap \"\" TERM HUP; exec sleep 600' >/dev/null 2>&1 &";
        Command::new("sh")
            .args(["-c", daemon])
            .env("MARK", &folder)
            .current_dir("/")
            .status()
            .unwrap();

        // While a process becomes another one it shows neither environment nor command line.
        let begin = Instant::now();
        let settled = |found: &[Found]| matches!(found, [one] if one.command.starts_with("sleep"));
        while !settled(&of_folder(&folder)) {
            assert!(
                begin.elapsed() < Duration::from_secs(30),
                "{:?}",
                of_folder(&folder)
            );
        }
        assert_eq!(end_folder(&folder, Duration::from_secs(5)), []);
        assert_eq!(of_folder(&folder), []);

        fs::remove_dir(&folder).unwrap();
    }
}
