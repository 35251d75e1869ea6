//! What the runs of the scripted CLI wrote about themselves: which ran when, on one clock for the whole machine.
//! The proof that two runs of a job, or of a session, never overlapped.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};

/// The name of the file in the working directory of a run.
pub const FILE: &str = "trace.log";

/// One run, as far as it could write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The word that its script gave.
    pub tag: String,
    /// Its Claude session id, which no other attempt has.
    pub session: String,
    /// When it wrote first, in nanoseconds of the monotonic clock.
    pub first: u64,
    /// When it wrote last.
    pub last: u64,
    /// Whether it wrote that it ends.
    pub stopped: bool,
}

/// The monotonic clock, in nanoseconds: the same for every process of the machine.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// One line of the file, about this time.
pub fn line(what: &str, tag: &str, session: &str, at: u64) -> String {
    format!("{what} {tag} {session} {at}\n")
}

/// The runs that wrote into one working directory, in order of their beginning; none when there's no file.
pub fn read(workspace: &Path) -> Vec<Run> {
    let text = fs::read_to_string(workspace.join(FILE)).unwrap_or_default();
    let mut runs: BTreeMap<(&str, &str), Run> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [what, tag, session, time] = words[..] else {
            continue;
        };
        let Ok(time) = time.parse::<u64>() else { continue };
        let run = runs.entry((tag, session)).or_insert_with(|| Run {
            tag: tag.to_owned(),
            session: session.to_owned(),
            first: time,
            last: time,
            stopped: false,
        });
        run.last = run.last.max(time);
        run.stopped |= what == "stop";
    }
    let mut runs: Vec<Run> = runs.into_values().collect();
    runs.sort_by_key(|run| run.first);
    runs
}

/// Fails when two runs overlap; says which.
pub fn assert_one_at_a_time(runs: &[Run]) {
    for pair in runs.windows(2) {
        assert!(
            pair[0].last < pair[1].first,
            "two runs overlap: {:?} and {:?}",
            pair[0],
            pair[1]
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "two runs overlap")]
    fn an_overlap_is_seen() {
        let run = |tag: &str, first, last| Run {
            tag: tag.to_owned(),
            session: "s".to_owned(),
            first,
            last,
            stopped: true,
        };

        assert_one_at_a_time(&[run("a", 1, 5), run("b", 6, 9), run("c", 8, 10)]);
    }
}
