//! The deadlines of a run that does nothing: first output and idle time. Pure.

use super::outcome::{Deadline, Stopped};
use crate::claude::message::{Block, Message};
use std::collections::HashSet;
use std::time::Duration;
use tokio::time::Instant;

/// A tool may work longer in silence than the model.
const TOOL_IDLE_FACTOR: u32 = 3;

/// More open calls than this, or longer ids, aren't kept.
const MAX_OPEN_TOOLS: usize = 1000;
const MAX_TOOL_ID: usize = 200;

/// What the CLI has done so far, as far as these deadlines care.
#[derive(Debug)]
pub(super) struct IdleWatchdog {
    started: Instant,
    /// When it last did something; none before it did anything.
    last: Option<Instant>,
    open_tools: HashSet<String>,
}

impl IdleWatchdog {
    /// A run that began at this moment.
    pub(super) fn new(started: Instant) -> Self {
        Self {
            started,
            last: None,
            open_tools: HashSet::new(),
        }
    }

    /// Takes note of a message that came at this moment.
    pub(super) fn hear(&mut self, message: &Message, now: Instant) {
        match message {
            // An answer to a question of this worker's own; a CLI whose turn hangs gives it too.
            Message::ControlResponse(_) => return,
            Message::Assistant(answer) => {
                for block in &answer.blocks {
                    if let Block::ToolUse { id, .. } = block
                        && self.open_tools.len() < MAX_OPEN_TOOLS
                        && id.len() <= MAX_TOOL_ID
                    {
                        self.open_tools.insert(id.clone());
                    }
                }
            }
            Message::User(user) => {
                for result in &user.tool_results {
                    self.open_tools.remove(&result.tool_use_id);
                }
            }
            _ => {}
        }
        self.last = Some(now);
    }

    /// Until when the CLI may be silent, and what it means if it is longer.
    pub(super) fn ends(&self, first_output: Duration, idle: Duration) -> (Instant, Stopped) {
        let (since, deadline, after) = match self.last {
            None => (self.started, Deadline::FirstOutput, first_output),
            Some(last) if self.open_tools.is_empty() => (last, Deadline::Idle, idle),
            Some(last) => (last, Deadline::Idle, idle * TOOL_IDLE_FACTOR),
        };
        (since + after, Stopped::Timeout { deadline, after })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_mins(2);
    const IDLE: Duration = Duration::from_mins(10);
    const ANSWER: &str = r#"{"type":"control_response","response":{"subtype":"success","request_id":"usage",
        "response":{"session":{"model_usage":{}}}}}"#;
    const INIT: &str = r#"{"type":"system","subtype":"init"}"#;

    fn ends(lines: &[&str]) -> (Duration, Deadline) {
        let started = Instant::now();
        let mut watchdog = IdleWatchdog::new(started);
        for (seconds, line) in (10..).step_by(10).zip(lines) {
            watchdog.hear(
                &Message::parse(line.as_bytes()),
                started + Duration::from_secs(seconds),
            );
        }
        let (until, stopped) = watchdog.ends(FIRST, IDLE);
        let Stopped::Timeout { deadline, .. } = stopped else {
            panic!("{stopped:?}")
        };
        (until - started, deadline)
    }

    #[test]
    fn an_answer_to_our_own_question_is_no_first_output() {
        assert_eq!(ends(&[]), (FIRST, Deadline::FirstOutput));
        assert_eq!(ends(&[ANSWER, ANSWER]), (FIRST, Deadline::FirstOutput));
    }

    #[test]
    fn an_answer_to_our_own_question_is_no_progress() {
        let quiet = (IDLE + Duration::from_secs(10), Deadline::Idle);
        assert_eq!(ends(&[INIT]), quiet);
        assert_eq!(ends(&[INIT, ANSWER, ANSWER, ANSWER]), quiet);
        assert_eq!(
            ends(&[INIT, ANSWER, INIT]).0,
            IDLE + Duration::from_secs(30),
            "anything else is"
        );
    }

    #[test]
    fn an_open_tool_call_may_be_silent_longer() {
        let call = r#"{"type":"assistant","message":{"content":[{"type":"tool_use","id":"t1","name":"Bash","input":{}}]}}"#;
        let answer = r#"{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t1","content":""}]}}"#;

        assert_eq!(ends(&[call]).0, 3 * IDLE + Duration::from_secs(10));
        assert_eq!(ends(&[call, answer]).0, IDLE + Duration::from_secs(20));
    }
}
