//! The events of a run, made of its messages. Pure. What they say is the agent's word: it can write into the CLI's
//! memory, whatever is done.

use super::output::cut;
use crate::claude::message::ToolResult;
use serde_json::{Value, json};
use shared::event::{EventType, NewEvent};
use shared::job::{Spend, TokenUsage};
use shared::money::MicroUsd;
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// How often the cost so far is reported.
const USAGE_EVENT_INTERVAL: Duration = Duration::from_secs(2);

/// A tool's answer in an event holds no more bytes than this.
const MAX_TOOL_RESULT: usize = 16 * 1024;

/// More open calls than this, or longer ids, aren't remembered; their results come without name and duration.
const MAX_OPEN_TOOLS: usize = 1000;
const MAX_TOOL_ID: usize = 200;

/// What later events need to know of earlier ones.
#[derive(Debug)]
pub(super) struct Steps {
    /// How many texts the main conversation has had.
    texts: u64,
    /// The name of each call that has no result yet, and when it came.
    open_tools: HashMap<String, (String, Instant)>,
    usage: Option<(MicroUsd, TokenUsage)>,
    usage_at: Instant,
}

impl Steps {
    /// Those of a run that started at this moment.
    pub(super) fn new(started: Instant) -> Self {
        Self {
            texts: 0,
            open_tools: HashMap::new(),
            usage: None,
            usage_at: started,
        }
    }

    /// A text block of the main conversation. `index` counts them from 0.
    pub(super) fn text(&mut self, text: &str) -> NewEvent {
        let index = self.texts;
        self.texts += 1;
        let data = json!({ "content": text, "index": index, "tool_name": null });
        NewEvent::new(EventType::Assistant, data)
    }

    /// A call of a tool that came at this moment.
    pub(super) fn tool_call(&mut self, id: &str, name: &str, input: &Value, now: Instant) -> NewEvent {
        if self.open_tools.len() < MAX_OPEN_TOOLS && id.len() <= MAX_TOOL_ID {
            self.open_tools.insert(id.to_owned(), (name.to_owned(), now));
        }
        let data = json!({ "content": null, "tool_name": name, "tool_use_id": id, "input": input });
        NewEvent::new(EventType::Tool, data)
    }

    /// The result of a call that came at this moment.
    pub(super) fn tool_result(&mut self, result: &ToolResult, now: Instant) -> NewEvent {
        let (name, duration_ms) = match self.open_tools.remove(&result.tool_use_id) {
            Some((name, called)) => {
                let duration = now.saturating_duration_since(called).as_millis();
                (Some(name), Some(u64::try_from(duration).unwrap_or(u64::MAX)))
            }
            None => (None, None),
        };
        let content = cut(&result.content, MAX_TOOL_RESULT);
        let mut data = json!({
            "tool_use_id": result.tool_use_id, "tool_name": name, "duration_ms": duration_ms,
            "is_error": result.is_error, "content": content,
        });
        if content.len() < result.content.len() {
            data["truncated"] = json!(true);
        }
        NewEvent::new(EventType::ToolResult, data)
    }

    /// The cost so far, if it is time to report it and if it has changed since it was reported last.
    pub(super) fn usage(&mut self, now: Instant, spend: &Spend) -> Option<NewEvent> {
        if now < self.usage_at + USAGE_EVENT_INTERVAL {
            return None;
        }
        self.usage_at = now;
        if spend.models.is_empty() {
            return None;
        }
        let usage = (spend.total(), spend.usage());
        if self.usage.as_ref() == Some(&usage) {
            return None;
        }
        let data = json!({ "cost": usage.0, "usage": usage.1 });
        self.usage = Some(usage);
        Some(NewEvent::new(EventType::Usage, data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::job::ModelCost;

    const SECOND: Duration = Duration::from_secs(1);

    fn steps() -> (Steps, Instant) {
        let now = Instant::now();
        (Steps::new(now), now)
    }

    fn result(id: &str, content: String) -> ToolResult {
        ToolResult {
            tool_use_id: id.to_owned(),
            content,
            ..ToolResult::default()
        }
    }

    #[test]
    fn texts_are_numbered() {
        let (mut steps, _) = steps();
        for index in 0..3 {
            assert_eq!(steps.text("x").data["index"], index);
        }
    }

    #[test]
    fn a_tools_result_says_which_tool_and_how_long_it_took() {
        let (mut steps, now) = steps();
        steps.tool_call("t1", "Bash", &json!({}), now);
        steps.tool_call("t2", "Read", &json!({}), now + SECOND);

        let first = steps
            .tool_result(&result("t1", "ok".to_owned()), now + 2 * SECOND)
            .data;
        let again = steps
            .tool_result(&result("t1", "ok".to_owned()), now + 3 * SECOND)
            .data;
        let second = steps
            .tool_result(&result("t2", "ok".to_owned()), now + 3 * SECOND)
            .data;

        assert_eq!(
            (&first["tool_name"], &first["duration_ms"]),
            (&json!("Bash"), &json!(2000))
        );
        assert_eq!(
            (&again["tool_name"], &again["duration_ms"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(
            (&second["tool_name"], &second["duration_ms"]),
            (&json!("Read"), &json!(2000))
        );
    }

    #[test]
    fn a_long_result_is_cut_and_says_so() {
        let (mut steps, now) = steps();

        let data = steps
            .tool_result(&result("t", "x".repeat(MAX_TOOL_RESULT + 1)), now)
            .data;

        assert_eq!(data["content"].as_str().unwrap().len(), MAX_TOOL_RESULT);
        assert_eq!(data["truncated"], true);
    }

    #[test]
    fn a_run_without_end_doesnt_fill_the_memory() {
        let (mut steps, now) = steps();
        for number in 0..2 * MAX_OPEN_TOOLS {
            steps.tool_call(&number.to_string(), "Bash", &json!({}), now);
        }
        steps.tool_call(&"x".repeat(MAX_TOOL_ID + 1), "Bash", &json!({}), now);

        assert_eq!(steps.open_tools.len(), MAX_OPEN_TOOLS);
    }

    #[test]
    fn the_cost_is_reported_when_it_has_changed_and_not_too_often() {
        let (mut steps, now) = steps();
        let spend = |micros| Spend {
            models: vec![ModelCost {
                model: "m".to_owned(),
                cost: MicroUsd(micros),
                usage: TokenUsage::default(),
            }],
            ..Spend::default()
        };
        let mut reported = |spend: &Spend, seconds: u32| steps.usage(now + seconds * SECOND, spend).is_some();

        assert!(!reported(&spend(1), 1), "too early");
        assert!(!reported(&Spend::default(), 2), "nothing was spent");
        assert!(reported(&spend(1), 4));
        assert!(!reported(&spend(1), 12), "unchanged");
        assert!(!reported(&spend(2), 13), "too early");
        assert!(reported(&spend(2), 14));
    }
}
