//! Formats jobs and events as lines for people.

use serde_json::Value;

use crate::client::Event;

/// The maximum number of characters of a long text.
const WIDTH: usize = 110;

/// Formats an event; `None` if it has nothing for a person to read.
pub(crate) fn event(event: &Event) -> Option<String> {
    let data = &event.data;
    let (word, text) = match event.kind.as_str() {
        "status" => {
            let attempt = data["attempt"].as_i64().filter(|attempt| *attempt > 1);
            let why = data["reason"]
                .as_str()
                .map(|reason| format!(" ({reason})"))
                .unwrap_or_default();
            let attempt = attempt
                .map(|attempt| format!("attempt {attempt}"))
                .unwrap_or_default();
            (word(&data["status"]).to_owned(), format!("{attempt}{why}"))
        }
        "assistant" => ("says".to_owned(), short(word(&data["content"]))),
        "tool" => (
            word(&data["tool_name"]).to_owned(),
            short(&tool_input(&data["input"])),
        ),
        "tool_result" => {
            let what = if data["is_error"] == true { "failed" } else { "→" };
            (what.to_owned(), short(word(&data["content"])))
        }
        "usage" => ("cost".to_owned(), format!("{} so far", money(&data["cost"]))),
        "retry" => {
            let seconds = data["delay_ms"].as_f64().unwrap_or_default() / 1000.0;
            (
                "retry".to_owned(),
                format!("in {seconds:.1} s, because of {}", word(&data["error_code"])),
            )
        }
        "cancelling" => ("cancelling".to_owned(), word(&data["reason"]).to_owned()),
        "session_lost" => (
            "session".to_owned(),
            "its conversation was not found, a new one begins".to_owned(),
        ),
        "gap" => (
            "…".to_owned(),
            format!("events {} to {} were left out", data["from"], data["to"]),
        ),
        "done" => {
            let turns = data["num_turns"].as_i64().unwrap_or_default();
            (
                "done".to_owned(),
                format!("{}, {turns} turns", money(&data["cost"])),
            )
        }
        "error" => (
            "failed".to_owned(),
            format!("{} [{}]", word(&data["error"]), word(&data["code"])),
        ),
        "cancelled" => ("cancelled".to_owned(), word(&data["reason"]).to_owned()),
        _ => return None,
    };
    Some(format!("{word:<10} {text}").trim_end().to_owned())
}

/// A row of a table of jobs: id, status, cost, creation time, the start of the prompt.
pub(crate) fn row(job: &Value) -> String {
    let status = match job["hold"].as_str() {
        Some(hold) => format!("{} ({hold})", word(&job["status"])),
        None => word(&job["status"]).to_owned(),
    };
    let created = word(&job["created_at"]);
    let created = created.get(..19).unwrap_or(created).replace('T', " ");
    let (id, cost) = (word(&job["id"]), money(&job["cost"]));
    let message: String = short(word(&job["message"])).chars().take(50).collect();
    format!("{id:<36}  {status:<20}  {cost:>9}  {created}  {message}")
        .trim_end()
        .to_owned()
}

/// Dollars, to a hundredth of a cent.
pub(crate) fn money(cost: &Value) -> String {
    format!("${:.4}", cost.as_f64().unwrap_or_default())
}

/// Shortens a text to one line of at most `WIDTH` characters.
pub(crate) fn short(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.chars().count() <= WIDTH {
        return text;
    }
    text.chars().take(WIDTH - 1).chain(['…']).collect()
}

/// The member of a tool's input that says what it does.
fn tool_input(input: &Value) -> String {
    let telling = [
        "command",
        "file_path",
        "path",
        "pattern",
        "query",
        "url",
        "prompt",
    ];
    let found = telling.iter().find_map(|member| input[*member].as_str());
    found.map_or_else(|| input.to_string(), str::to_owned)
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(kind: &str, data: Value) -> String {
        event(&Event {
            seq: 1,
            kind: kind.to_owned(),
            data,
        })
        .unwrap()
    }

    #[test]
    fn events_are_told_in_a_line_each() {
        assert_eq!(
            line("status", json!({"status": "running", "attempt": 1})),
            "running"
        );
        assert_eq!(
            line(
                "status",
                json!({"status": "queued", "attempt": 2, "reason": "worker_lost"})
            ),
            "queued     attempt 2 (worker_lost)"
        );
        assert_eq!(
            line(
                "tool",
                json!({"tool_name": "Bash", "input": {"command": "ls\n-l"}})
            ),
            "Bash       ls -l"
        );
        assert_eq!(
            line("done", json!({"cost": 0.01752, "num_turns": 3})),
            "done       $0.0175, 3 turns"
        );
        assert_eq!(
            line("error", json!({"error": "No.", "code": "auth_error"})),
            "failed     No. [auth_error]"
        );
    }
}
