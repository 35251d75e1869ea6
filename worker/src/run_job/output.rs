//! What a run wrote, and the wire's `Result` of it.

use super::changes::Changes;
use super::outcome::{Ended, ErrorCode};
use crate::claude::command::RunSpec;
use crate::claude::process::Exit;
use serde_json::{Value, json};
use shared::clock::Timestamp;
use shared::job::{Ending, Lease, Spend};

/// Of a run's texts and of its tools' arguments no more bytes than this are kept, each, and no more calls. Events
/// have bounds of their own.
const MAX_KEPT_BYTES: usize = 4 * 1024 * 1024;
const MAX_TOOLS: usize = 1000;

/// What the CLI has said so far.
#[derive(Debug)]
pub(super) struct RunOutput {
    pub(super) ended: Ended,
    texts: Vec<String>,
    text_room: usize,
    text_cut: bool,
    tools: Vec<Value>,
    tool_room: usize,
    tools_cut: bool,
    /// The Claude session that couldn't be continued.
    pub(super) session_lost: Option<String>,
    /// The files that it changed.
    pub(super) changes: Changes,
}

impl RunOutput {
    /// Nothing so far.
    pub(super) fn new(schema_wanted: bool, now: Timestamp) -> Self {
        Self {
            ended: Ended::new(schema_wanted, now),
            texts: Vec::new(),
            text_room: MAX_KEPT_BYTES,
            text_cut: false,
            tools: Vec::new(),
            tool_room: MAX_KEPT_BYTES,
            tools_cut: false,
            session_lost: None,
            changes: Changes::default(),
        }
    }

    /// Keeps a text of the main conversation.
    pub(super) fn text(&mut self, text: &str) {
        let kept = cut(text, self.text_room);
        self.text_cut |= kept.len() < text.len();
        // A text in pieces would be none: what comes after a cut is left out.
        self.text_room = if self.text_cut {
            0
        } else {
            self.text_room - kept.len()
        };
        if !kept.is_empty() {
            self.texts.push(kept.to_owned());
        }
    }

    /// Keeps a call of a tool.
    pub(super) fn tool(&mut self, name: &str, input: &Value) {
        let size = name.len() + input.to_string().len();
        if size > self.tool_room || self.tools.len() >= MAX_TOOLS {
            self.tools_cut = true;
            return;
        }
        self.tool_room -= size;
        self.tools.push(json!({ "name": name, "input": input }));
    }
}

/// The wire's `Result`, also of a run that was cut off: what it said and did until then.
pub(super) fn result(output: &RunOutput, spend: &Spend, spec: &RunSpec) -> Option<Value> {
    // A line of which nothing is known is none.
    let line = output
        .ended
        .result
        .as_deref()
        .filter(|line| !line.subtype.is_empty());
    if line.is_none() && output.texts.is_empty() && output.tools.is_empty() {
        return None;
    }
    let answer = line.and_then(|line| line.text.clone());
    let truncated = output.tools_cut || (answer.is_none() && output.text_cut);
    let mut result = json!({
        "session_id": spec.claude_session_id.to_string(),
        "content": answer.unwrap_or_else(|| output.texts.join("\n")),
        "cost": spend.total(),
        "duration_ms": line.map_or(0, |line| line.duration_ms),
        "num_turns": line.map_or(0, |line| line.num_turns),
        "tools_used": output.tools,
        "is_error": line.is_none_or(|line| line.is_error || line.invalid.is_some()),
        "subtype": line.map_or("interrupted", |line| line.subtype.as_str()),
        "structured_output": line.filter(|line| line.invalid.is_none()).and_then(|line| line.structured_output.clone()),
        "usage": spend.usage(),
        "model_usage": spend.models.iter().map(|model| {
            (model.model.clone(), json!({ "cost": model.cost, "usage": model.usage }))
        }).collect::<serde_json::Map<_, _>>(),
        "permission_denials": line.map_or(&[][..], |line| &line.permission_denials),
        "stop_reason": line.and_then(|line| line.stop_reason.clone()),
        "files_changed": output.changes.files,
    });
    if truncated {
        result["truncated"] = json!(true);
    }
    if output.changes.truncated {
        result["files_changed_truncated"] = json!(true);
    }
    if output.session_lost.is_some() {
        result["session_lost"] = json!(true);
    }
    Some(result)
}

/// How the process ended, in words.
pub(super) fn describe(exit: &Exit) -> String {
    match (exit.code, exit.signal) {
        (Some(code), _) => format!("exit {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

/// A run that met its cap because the budget left it no more failed for the budget, not for its own cap.
pub(super) fn of_budget(ending: Ending, lease: &Lease) -> Ending {
    let (had, wanted) = (lease.reserved, lease.job.cost_left());
    match ending {
        Ending::Failed { code, .. } if code == ErrorCode::MaxCost.as_str() && had < wanted => {
            Ending::Failed {
                code: ErrorCode::BudgetExceeded.as_str().to_owned(),
                message: format!(
                    "The budget had only {had} left for this run, which may cost {wanted}, and it has used that up. Raise \
                 the budget, or wait for its next period, and submit the job again; what it did is kept."
                ),
            }
        }
        ending => ending,
    }
}

/// The first bytes of a text, at most so many.
pub(super) fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claude::message::Message;
    use shared::money::MicroUsd;
    use uuid::Uuid;

    fn spec() -> RunSpec {
        RunSpec {
            claude_session_id: Uuid::nil(),
            resume: None,
            message_id: Uuid::nil(),
            model: "sonnet".to_owned(),
            effort: None,
            permission_mode: "acceptEdits".to_owned(),
            max_turns: None,
            max_cost: MicroUsd(1),
            system_prompt_file: None,
            json_schema: None,
            no_tools: false,
            allowed_tools: Vec::new(),
            disallowed_tools: Vec::new(),
            prompt: String::new(),
        }
    }

    fn of(output: &RunOutput) -> Value {
        result(output, &Spend::default(), &spec()).unwrap()
    }

    #[test]
    fn what_fits_is_kept_whole() {
        let mut output = RunOutput::new(false, Timestamp(0));
        output.text("one");
        output.text("two");
        output.tool("Bash", &json!({ "command": "ls" }));

        let result = of(&output);

        assert_eq!(result["content"], "one\ntwo");
        assert_eq!(
            result["tools_used"],
            json!([{ "name": "Bash", "input": { "command": "ls" } }])
        );
        assert_eq!(result.get("truncated"), None);
    }

    #[test]
    fn a_talkative_run_is_cut_and_says_so() {
        let mut output = RunOutput::new(false, Timestamp(0));
        for _ in 0..3 {
            output.text(&"é".repeat(MAX_KEPT_BYTES / 2 - 1));
        }

        let result = of(&output);

        assert!(result["content"].as_str().unwrap().len() <= MAX_KEPT_BYTES + 3);
        assert_eq!(result["truncated"], true);
    }

    #[test]
    fn many_and_large_calls_are_left_out_and_the_result_says_so() {
        let large = json!({ "content": "x".repeat(MAX_KEPT_BYTES / 3) });
        let mut heavy = RunOutput::new(false, Timestamp(0));
        let mut many = RunOutput::new(false, Timestamp(0));
        for _ in 0..4 {
            heavy.tool("Write", &large);
        }
        for _ in 0..=MAX_TOOLS {
            many.tool("Read", &json!({}));
        }

        let (heavy, many) = (of(&heavy), of(&many));

        assert_eq!(heavy["tools_used"].as_array().unwrap().len(), 2);
        assert_eq!(many["tools_used"].as_array().unwrap().len(), MAX_TOOLS);
        assert_eq!(
            (&heavy["truncated"], &many["truncated"]),
            (&json!(true), &json!(true))
        );
    }

    #[test]
    fn an_answer_isnt_cut_with_the_texts_before_it() {
        let mut output = RunOutput::new(false, Timestamp(0));
        output.text(&"x".repeat(MAX_KEPT_BYTES + 1));
        let line = br#"{"type":"result","subtype":"success","is_error":false,"result":"all of it"}"#;
        output.ended.observe(&Message::parse(line));

        let result = of(&output);

        assert_eq!(
            (&result["content"], result.get("truncated")),
            (&json!("all of it"), None)
        );
    }
}
