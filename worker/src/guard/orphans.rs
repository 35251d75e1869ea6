//! Finding a run's processes when its guard can't: each carries the run's marker in its environment.
//!
//! The marker names the worker, so that a worker that starts can end what a killed one left, and nothing else.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions};

use super::cgroup;
use super::tree::{self, Process};

/// The variable that holds the marker in every process of a run.
pub const RUN_VARIABLE: &str = "CLAUDE_QUEUE_RUN";

/// The variable that holds the marker in the guard of a run.
pub(crate) const GUARD_VARIABLE: &str = "CLAUDE_QUEUE_GUARD";

/// How long a scan goes on while it still finds something that it hasn't killed.
const SCAN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long killed processes may take to go. Only one in the middle of a system call that can't be interrupted lasts
/// longer; it does nothing more but that call, and nobody waits for it.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// The marker of a run of this worker: `<pid>.<start time>.<pid namespace>.<run>`. `run` is the caller's name for it,
/// `<place>.<name>`: the place is what no two runs may be in at once, and the whole is unique in this process.
pub fn marker(run: &str) -> String {
    let pid = std::process::id().cast_signed();
    let started = Process::of(pid).map_or(0, |process| process.started);
    format!("{pid}.{started}.{}.{run}", pid_namespace())
}

/// Kills what runs of workers that no longer live have left on this machine, guards included, and returns how many
/// processes that were. Runs of workers that live, and of workers in other PID namespaces, which can't be told from
/// here, are left alone. Blocks for some milliseconds, at most for ten seconds.
pub fn kill_orphans() -> usize {
    let namespace = pid_namespace();
    kill_where(|marker| worker_is_gone(marker, &namespace), || true)
}

/// Kills what is left on this machine of other runs in the same place as the run of this marker, guards included, and
/// returns how many processes that were. Whoever holds the lease of a place may do so: a run that is still there has
/// lost its own, and its guard is stopped or dead. `holds` says whether that is so, and is asked before each kill: a
/// caller that was stopped for long in the middle would end the run of its successor. Blocks for some milliseconds, at
/// most for ten seconds.
pub fn kill_stale_runs(marker: &str, holds: impl Fn() -> bool) -> usize {
    let Some(place) = place(marker) else { return 0 };
    kill_where(
        |other| other != marker && self::place(other) == Some(place),
        holds,
    )
}

/// The place in a marker.
fn place(marker: &str) -> Option<&str> {
    let run = marker.splitn(4, '.').nth(3)?;
    run.split_once('.').map(|(place, _)| place)
}

/// Kills every process that carries this marker; blocks for some milliseconds, at most for ten seconds.
pub(crate) fn kill_marked(marker: &str) -> usize {
    kill_where(|other| other == marker, || true)
}

fn kill_where(wanted: impl Fn(&str) -> bool, may_kill: impl Fn() -> bool) -> usize {
    cgroup::kill_where(&wanted, &may_kill);
    kill_found(|| living(&wanted), &may_kill)
}

/// Kills what `look` finds until it finds nothing, or nothing that could still be killed; how many processes that were.
fn kill_found(look: impl Fn() -> Vec<Process>, may_kill: impl Fn() -> bool) -> usize {
    let since = Instant::now();
    let mut last_new = since;
    let mut seen = Vec::new();
    let mut empty_looks = 0;
    // Twice: a process in the middle of an exec shows no environment for a moment.
    while empty_looks < 2 && since.elapsed() < SCAN_TIMEOUT && last_new.elapsed() < KILL_TIMEOUT && may_kill()
    {
        let found = look();
        for process in &found {
            if !may_kill() {
                return seen.len();
            }
            process.kill();
            // Reaps an orphan where this worker is the init of a container; for all others it does nothing.
            let _ = rustix::process::waitpid(Pid::from_raw(process.pid), WaitOptions::NOHANG);
            if !seen.contains(&(process.pid, process.started)) {
                seen.push((process.pid, process.started));
                last_new = Instant::now();
            }
        }
        empty_looks = if found.is_empty() { empty_looks + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(10));
    }
    seen.len()
}

/// The living processes of the runs with these markers, guards included.
fn living(wanted: impl Fn(&str) -> bool) -> Vec<Process> {
    let mut found = Vec::new();
    for process in tree::processes().into_iter().filter(|process| !process.zombie) {
        match marker_of(process.pid) {
            Some((Role::Member, marker)) if wanted(&marker) => found.push(process),
            // While a guard is there, all of its run are its descendants, whatever their environment says.
            Some((Role::Guard, marker)) if wanted(&marker) => {
                found.extend(
                    tree::descendants(process.pid)
                        .into_iter()
                        .filter(|process| !process.zombie),
                );
                found.push(process);
            }
            _ => {}
        }
    }
    found
}

enum Role {
    Member,
    Guard,
}

fn marker_of(pid: i32) -> Option<(Role, String)> {
    parse_environment(&fs::read(format!("/proc/{pid}/environ")).ok()?)
}

fn parse_environment(environment: &[u8]) -> Option<(Role, String)> {
    environment.split(|byte| *byte == 0).find_map(|entry| {
        let (name, value) = std::str::from_utf8(entry).ok()?.split_once('=')?;
        match name {
            RUN_VARIABLE => Some((Role::Member, value.to_owned())),
            GUARD_VARIABLE => Some((Role::Guard, value.to_owned())),
            _ => None,
        }
    })
}

fn worker_is_gone(marker: &str, own_namespace: &str) -> bool {
    let mut parts = marker.splitn(4, '.');
    let (Some(pid), Some(started), Some(namespace), Some(_run)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let (Ok(pid), Ok(started)) = (pid.parse::<i32>(), started.parse::<u64>()) else {
        return false;
    };
    namespace == own_namespace
        && Process::of(pid).is_none_or(|process| process.zombie || process.started != started)
}

/// The number of this process' PID namespace; pids mean nothing in another one.
fn pid_namespace() -> String {
    let link = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let digits = link
        .as_os_str()
        .as_bytes()
        .iter()
        .filter(|byte| byte.is_ascii_digit());
    digits.map(|digit| char::from(*digit)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_a_living_worker_is_left_alone() {
        let namespace = pid_namespace();

        assert!(!worker_is_gone(&marker("job_1-1"), &namespace));
    }

    #[test]
    fn a_pid_that_was_given_to_another_process_is_another_worker() {
        let namespace = pid_namespace();
        let pid = std::process::id();

        assert!(worker_is_gone(
            &format!("{pid}.1.{namespace}.job_1-1"),
            &namespace
        ));
    }

    #[test]
    fn nothing_is_said_about_other_namespaces_and_other_words() {
        let namespace = pid_namespace();
        let pid = std::process::id();

        assert!(!worker_is_gone(&format!("{pid}.1.77.job_1-1"), &namespace));
        for text in ["", "x", "1.2.3", "a.b.c.d", &format!("x.1.{namespace}.r")] {
            assert!(!worker_is_gone(text, &namespace), "{text}");
        }
    }

    #[test]
    fn a_process_that_cant_be_killed_holds_nobody_up_for_long() {
        let ghost = Process {
            pid: i32::MAX,
            parent: 1,
            started: 1,
            zombie: false,
        };
        let since = Instant::now();

        assert_eq!(kill_found(|| vec![ghost], || true), 1);

        assert!(since.elapsed() < SCAN_TIMEOUT / 2, "{:?}", since.elapsed());
    }

    #[test]
    fn whoever_may_not_kill_doesnt_even_look() {
        let looked = std::cell::Cell::new(false);
        let look = || {
            looked.set(true);
            Vec::new()
        };

        assert_eq!(kill_found(look, || false), 0);

        assert!(!looked.get());
    }

    #[test]
    fn the_place_is_what_two_runs_have_in_common() {
        assert_eq!(place(&marker("sess_1.job_1.1")), Some("sess_1"));
        assert_eq!(place("1.2.3.sess_1.job_2.1"), Some("sess_1"));
        for text in ["", "1.2.3", "1.2.3.noname"] {
            assert_eq!(place(text), None, "{text}");
        }
    }

    #[test]
    fn a_marker_is_found_among_other_variables() {
        let environment = b"PATH=/bin\0CLAUDE_QUEUE_RUN=1.2.3.x=y\0HOME=/\0";

        let (_, marker) = parse_environment(environment).unwrap();

        assert_eq!(marker, "1.2.3.x=y");
        assert!(parse_environment(b"X_CLAUDE_QUEUE_RUN=1\0\xff\xfe=2\0").is_none());
    }
}
