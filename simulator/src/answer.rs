//! A step as the API's answer: the events of a stream, and the same as one message.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::conversation;
use crate::scenario::{Step, Usage};

/// What the model says to one request.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The server-sent events, in order; each has its own `type`.
    pub(crate) events: Vec<Value>,
    /// The message as a whole, for a request without streaming.
    pub(crate) message: Value,
}

/// Replaces `$CWD`, `$MODEL` and `$PROMPT` in everything that a step says.
pub(crate) fn fill_in(step: &mut Step, body: &Value) {
    let names = [
        ("$CWD", conversation::working_directory(body)),
        ("$MODEL", body["model"].as_str().unwrap_or_default().to_owned()),
        ("$PROMPT", conversation::prompt(body)),
    ];
    let replace = |text: &mut String| {
        for (name, value) in &names {
            if text.contains(name) {
                *text = text.replace(name, value);
            }
        }
    };
    step.text
        .iter_mut()
        .chain(step.thinking.iter_mut())
        .for_each(replace);
    for tool in &mut step.tools {
        each_string(&mut tool.input, &replace);
        tool.raw_input.iter_mut().for_each(replace);
    }
    if let Some(error) = &mut step.http_error {
        replace(&mut error.message);
    }
}

fn each_string(value: &mut Value, change: &impl Fn(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(items) => items.iter_mut().for_each(|item| each_string(item, change)),
        Value::Object(members) => members
            .values_mut()
            .for_each(|member| each_string(member, change)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The answer that a step gives to a request.
pub(crate) fn to(body: &Value, step: &Step) -> Answer {
    let message = json!({
        "id": format!("msg_sim_{}", Uuid::new_v4().simple()),
        "type": "message",
        "role": "assistant",
        "model": step.model.as_deref().map_or_else(|| body["model"].clone(), Value::from),
        "content": [],
        "stop_reason": null,
        "stop_sequence": null,
        "usage": Usage { output_tokens: 1, ..step.usage }.as_api(),
    });
    let mut events = vec![json!({"type": "message_start", "message": message})];
    let mut content = Vec::new();

    if let Some(thinking) = &step.thinking {
        let signature = "c2ltdWxhdGVk";
        let deltas = vec![
            json!({"type": "thinking_delta", "thinking": thinking}),
            json!({"type": "signature_delta", "signature": signature}),
        ];
        block(
            &mut events,
            content.len(),
            &json!({"type": "thinking", "thinking": "", "signature": ""}),
            deltas,
        );
        content.push(json!({"type": "thinking", "thinking": thinking, "signature": signature}));
    }

    let text = match &step.text {
        Some(text) => text.as_str(),
        None if step.tools.is_empty() => "Hello from the simulator.",
        None => "",
    };
    if !text.is_empty() || step.tools.is_empty() {
        let pieces = pieces(text, if step.chunks == 0 { 2 } else { step.chunks });
        let deltas = pieces
            .map(|piece| json!({"type": "text_delta", "text": piece}))
            .collect();
        block(
            &mut events,
            content.len(),
            &json!({"type": "text", "text": ""}),
            deltas,
        );
        content.push(json!({"type": "text", "text": text}));
    }

    for tool in &step.tools {
        let id = format!("toolu_sim_{}", Uuid::new_v4().simple());
        let input = tool.raw_input.clone().unwrap_or_else(|| tool.input.to_string());
        let deltas = vec![json!({"type": "input_json_delta", "partial_json": input})];
        let start = json!({"type": "tool_use", "id": id, "name": tool.name, "input": {}});
        block(&mut events, content.len(), &start, deltas);
        content.push(json!({"type": "tool_use", "id": id, "name": tool.name, "input": tool.input}));
    }

    let usual = if step.tools.is_empty() {
        "end_turn"
    } else {
        "tool_use"
    };
    let stop_reason = step.stop_reason.as_deref().unwrap_or(usual);
    events.push(json!({
        "type": "message_delta",
        "delta": {"stop_reason": stop_reason, "stop_sequence": null},
        "usage": step.usage.as_api(),
    }));
    events.push(json!({"type": "message_stop"}));

    let mut whole = message;
    whole["content"] = Value::Array(content);
    whole["stop_reason"] = stop_reason.into();
    whole["usage"] = step.usage.as_api();
    Answer {
        events,
        message: whole,
    }
}

fn block(events: &mut Vec<Value>, index: usize, start: &Value, deltas: Vec<Value>) {
    events.push(json!({"type": "content_block_start", "index": index, "content_block": start}));
    for delta in deltas {
        events.push(json!({"type": "content_block_delta", "index": index, "delta": delta}));
    }
    events.push(json!({"type": "content_block_stop", "index": index}));
}

/// Cuts a text into at most so many pieces of about the same length, never inside a character. An empty text is one
/// empty piece.
fn pieces(text: &str, count: usize) -> impl Iterator<Item = String> {
    let characters: Vec<char> = text.chars().collect();
    let size = characters.len().div_ceil(count.max(1)).max(1);
    let mut pieces: Vec<String> = characters
        .chunks(size)
        .map(|piece| piece.iter().collect())
        .collect();
    if pieces.is_empty() {
        pieces.push(String::new());
    }
    pieces.into_iter()
}

/// The API's error body.
pub(crate) fn error(kind: &str, message: &str, request_id: &str) -> Value {
    json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Tool;

    #[test]
    fn a_stream_and_the_whole_message_say_the_same() {
        let step = Step {
            thinking: Some("hm".into()),
            text: Some("äöü und mehr".into()),
            tools: vec![Tool {
                name: "Write".into(),
                input: json!({"path": "$CWD/x"}),
                raw_input: None,
            }],
            ..Step::default()
        };

        let answer = to(&json!({"model": "m"}), &step);

        let text: String = answer
            .events
            .iter()
            .filter_map(|event| event["delta"]["text"].as_str())
            .collect();
        assert_eq!(text, "äöü und mehr");
        assert_eq!(answer.message["content"][1]["text"], "äöü und mehr");
        assert_eq!(answer.message["stop_reason"], "tool_use");
        assert_eq!(answer.message["usage"]["output_tokens"], 20);
        assert_eq!(answer.events[0]["message"]["usage"]["output_tokens"], 1);
        assert_eq!(answer.events.last().unwrap()["type"], "message_stop");
    }

    #[test]
    fn names_are_filled_in_wherever_a_step_has_text() {
        let body = json!({"model": "sonnet", "system": "Primary working directory: /workspace",
                          "messages": [{"role": "user", "content": "[[scenario:x]] say $MODEL"}]});
        let mut step = Step {
            text: Some("$MODEL in $CWD".into()),
            tools: vec![Tool {
                name: "W".into(),
                input: json!({"a": [{"b": "$CWD/y"}]}),
                raw_input: None,
            }],
            ..Step::default()
        };

        fill_in(&mut step, &body);

        assert_eq!(step.text.unwrap(), "sonnet in /workspace");
        assert_eq!(step.tools[0].input["a"][0]["b"], "/workspace/y");
    }
}
