//! The protocol between worker and guard over their socket: one JSON text a line.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::Setup;

/// The error of a start that came too late.
pub(crate) const TOO_LATE: Errno = Errno::TIME;

/// A time of the machine's monotonic clock, which all its processes share, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct MonotonicTime(u64);

impl MonotonicTime {
    /// Now.
    pub(crate) fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        Self(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
    }

    /// The same time as `instant`, which other processes can't read, or an earlier one: what passes between the looks
    /// at the two clocks must not lengthen a lease.
    pub(crate) fn of(instant: Instant) -> Self {
        let now = Self::now();
        let ago = u64::try_from(instant.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Self(now.0.saturating_sub(ago))
    }

    /// How long ago it was; zero for one that is still to come.
    pub(crate) fn age(self) -> Duration {
        Duration::from_nanos(Self::now().0.saturating_sub(self.0))
    }
}

/// The first line to the guard: what to start and when to end it.
#[derive(Serialize, Deserialize)]
pub(crate) struct StartCommand {
    pub(crate) program: PathBuf,
    pub(crate) setup: Option<Setup>,
    pub(crate) args: Vec<String>,
    /// The whole environment of the run.
    pub(crate) env: Vec<(String, String)>,
    pub(crate) cwd: PathBuf,
    /// The control group that the run gets, if one can be made there.
    pub(crate) cgroup: Option<PathBuf>,
    /// The oldest beat that the run survives.
    pub(crate) beat_within_ms: u64,
    /// Counted from the start.
    pub(crate) deadline_ms: u64,
    /// In bytes.
    pub(crate) memory_limit: Option<u64>,
    /// The largest file that the run may write, in bytes.
    pub(crate) file_limit: Option<u64>,
    /// No program of the run may gain another user's rights, so none can get out of the guard's reach.
    pub(crate) no_new_privileges: bool,
    /// When the lease was taken: the first beat. Nothing is started when it's too old already.
    pub(crate) held_at: MonotonicTime,
}

/// Each further line to the guard.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GuardCommand {
    /// The worker held the job's lease at this moment.
    Beat {
        at: MonotonicTime,
    },
    Kill,
}

/// Each line from the guard.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    Started,
    /// Nothing runs; the guard ends.
    NotStarted {
        os_error: Option<i32>,
        message: String,
    },
    /// No process of the run is left; the guard ends. Code and signal are the main process'.
    Ended {
        code: Option<i32>,
        signal: Option<i32>,
        by: EndedBy,
    },
}

impl Report {
    pub(crate) fn not_started(error: &io::Error, command: &StartCommand) -> Self {
        let (program, cwd) = (command.program.display(), command.cwd.display());
        Self::NotStarted {
            os_error: error.raw_os_error(),
            message: format!("could not start {program} in {cwd}: {error}"),
        }
    }

    /// Another worker may hold the job by now.
    pub(crate) fn too_late() -> Self {
        Self::NotStarted {
            os_error: Some(TOO_LATE.raw_os_error()),
            message: "the lease ran out before the run could start".to_owned(),
        }
    }
}

/// Why the tree of a run was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// The main process ended by itself.
    Exited,
    /// No beat came in time: the worker was stopped, or had lost its lease.
    Beat,
    /// The run took too long.
    Deadline,
    /// The worker said so, or is gone.
    Worker,
    /// The tree used more memory than it may.
    Memory,
    /// Someone else ended the guard, so the run was ended too.
    GuardLost,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_the_same_for_an_instant_and_the_raw_clock() {
        let before = MonotonicTime::now();
        let instant = Instant::now();
        let after = MonotonicTime::now();

        let time = MonotonicTime::of(instant);

        let took = MonotonicTime::now().0 - after.0;
        assert!(time <= after && time.0 + took >= before.0);
    }

    #[test]
    fn a_beat_keeps_its_time_on_the_way() {
        let at = MonotonicTime::now();
        let line = serde_json::to_string(&GuardCommand::Beat { at }).unwrap();

        let GuardCommand::Beat { at: read } = serde_json::from_str(&line).unwrap() else {
            panic!("{line}")
        };

        assert_eq!(read, at);
    }
}
