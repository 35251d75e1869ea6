//! The events of a chat, in the words of the Python service: `assistant`, `tool`, and at the end `done` or `error`. Its
//! clients may take any other for an error.

use serde::{Deserialize, Serialize};
use shared::event::{Event, EventType};
use shared::id::JobId;
use std::borrow::Cow;
use std::fmt::Write;

use super::result::ChatResult;

/// Text of the model, or a call of a tool.
#[derive(Debug, Deserialize, Serialize)]
pub struct Step<'e> {
    #[serde(borrow)]
    content: Option<Cow<'e, str>>,
    #[serde(borrow)]
    tool_name: Option<Cow<'e, str>>,
}

/// The end of a job that has no answer.
#[derive(Debug, Serialize)]
pub struct StreamError {
    error: String,
    code: String,
    job_id: JobId,
}

/// What the last event of a failed or cancelled job says.
#[derive(Deserialize)]
struct Ending {
    error: Option<String>,
    code: Option<String>,
    reason: Option<String>,
    result: Option<ChatResult>,
}

/// Adds an event to a stream, if clients of the Python service know such.
pub(super) fn frame(text: &mut String, event: &Event) {
    if let Some((word, data)) = translated(event) {
        // Writing to a string can't fail.
        let _ = write!(text, "id: {}\r\nevent: {word}\r\ndata: {data}\r\n\r\n", event.seq);
    }
}

fn translated(event: &Event) -> Option<(&'static str, String)> {
    let step = |word| {
        let step: Step = serde_json::from_str(&event.data).ok()?;
        Some((word, serde_json::to_string(&step).ok()?))
    };
    let done = |result: ChatResult| {
        let data = result.brief().of_job(event.job_id);
        Some(("done", serde_json::to_string(&data).ok()?))
    };
    let error = |error: String, code: String| {
        let error = StreamError {
            error,
            code,
            job_id: event.job_id,
        };
        Some(("error", serde_json::to_string(&error).ok()?))
    };
    match event.event_type {
        EventType::Assistant => step("assistant"),
        EventType::Tool => step("tool"),
        EventType::Done => match ChatResult::parse(&event.data) {
            Ok(result) => done(result),
            Err(_) => error("The result can't be read".to_owned(), "internal".to_owned()),
        },
        EventType::Error | EventType::Cancelled => {
            let ending = serde_json::from_str::<Ending>(&event.data);
            let ending = ending.unwrap_or(Ending {
                error: None,
                code: None,
                reason: None,
                result: None,
            });
            let code = ending.code.unwrap_or_else(|| "cancelled".to_owned());
            match ending.result {
                Some(result) if matches!(code.as_str(), "max_turns" | "max_cost") => done(result),
                _ if code == "timeout" => error("Claude timed out".to_owned(), code),
                _ => {
                    let reason = ending.reason.unwrap_or_else(|| "user".to_owned());
                    let cancelled = || format!("The job was cancelled ({reason})");
                    error(ending.error.unwrap_or_else(cancelled), code)
                }
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use shared::clock::Timestamp;

    fn framed(event_type: EventType, data: &Value) -> (String, JobId) {
        let event = Event {
            job_id: JobId::new(),
            seq: 7,
            event_type,
            at: Timestamp(0),
            data: data.to_string(),
        };
        let mut text = String::new();
        frame(&mut text, &event);
        (text, event.job_id)
    }

    #[test]
    fn events_are_framed_as_the_old_clients_read_them() {
        let (text, _) = framed(
            EventType::Assistant,
            &json!({"content": "a\n\"é", "tool_name": null}),
        );
        assert_eq!(
            text,
            "id: 7\r\nevent: assistant\r\ndata: {\"content\":\"a\\n\\\"é\",\"tool_name\":null}\r\n\r\n"
        );
        let tool =
            json!({"content": null, "tool_name": "Bash", "tool_use_id": "x", "input": {"command": "ls"}});
        let (text, _) = framed(EventType::Tool, &tool);
        assert_eq!(
            text,
            "id: 7\r\nevent: tool\r\ndata: {\"content\":null,\"tool_name\":\"Bash\"}\r\n\r\n"
        );
        for unknown in [
            EventType::Status,
            EventType::Usage,
            EventType::ToolResult,
            EventType::Retry,
        ] {
            assert_eq!(framed(unknown, &json!({})).0, "");
        }
    }

    #[test]
    fn the_last_event_has_the_members_of_the_python_service_in_their_order() {
        let result = json!({"session_id": "s", "content": "c", "cost": 0.5, "duration_ms": 1, "num_turns": 2,
            "tools_used": [{"name": "Bash", "input": {}}], "usage": {}, "is_error": false});
        let (text, job_id) = framed(EventType::Done, &result);
        let data = format!(
            "{{\"session_id\":\"s\",\"content\":\"c\",\"cost\":0.5,\"duration_ms\":1,\"num_turns\":2,\
             \"tools_used\":[{{\"name\":\"Bash\",\"input\":{{}}}}],\"job_id\":\"{job_id}\"}}"
        );
        assert_eq!(text, format!("id: 7\r\nevent: done\r\ndata: {data}\r\n\r\n"));
        let of = |event_type, data: Value| framed(event_type, &data).0;
        let cut = of(
            EventType::Error,
            json!({"error": "e", "code": "max_turns", "result": result}),
        );
        assert!(cut.contains("event: done"), "{cut}");
        let failed = of(EventType::Error, json!({"error": "e", "code": "timeout"}));
        assert!(
            failed.contains("event: error\r\ndata: {\"error\":\"Claude timed out\",\"code\":\"timeout\""),
            "{failed}"
        );
        let cancelled = of(EventType::Cancelled, json!({"reason": "session_deleted"}));
        assert!(
            cancelled.contains("The job was cancelled (session_deleted)"),
            "{cancelled}"
        );
    }
}
