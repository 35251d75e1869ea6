//! Parses one line of the CLI's stdout into a [`Message`]. Pure. It never fails: the CLI's output is only partly
//! documented and grows with every release, so an unknown line is [`Message::Other`], and no member is required.
//!
//! The `type` member distinguishes lines. Their beginning doesn't, because the order of members isn't fixed.

mod repair;
mod result;
mod value;

use super::line::{self, OutputLine};
use crate::spend::Usage;
use serde_json::Value;
use std::collections::BTreeMap;

pub use result::{InvalidResult, ModelUsage, ResultLine};

/// One line of stdout.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The CLI accepted a user message and is about to ask the model; once for every message it is sent.
    Init(Init),
    /// A content block of an answer of the model. All blocks of an answer have the same message id.
    Assistant(Assistant),
    /// Results of tools. Also prompts of subagents and notes of the CLI, which contain no tool results.
    User(User),
    /// Tokens of one request so far.
    Usage(RequestUsage),
    /// A request to the API failed and will be retried.
    ApiRetry(ApiRetry),
    /// The remaining quota of a subscription; only with an OAuth credential.
    RateLimit(RateLimit),
    /// The answer to a user message. Without an origin it is the result of the run.
    Result(Box<ResultLine>),
    /// The answer to a control request.
    ControlResponse(ControlResponse),
    /// A question of the CLI, which waits for an answer. This worker asks for none, so it knows none.
    ControlRequest(ControlRequest),
    /// A line that can't be read and isn't the result.
    Unreadable,
    /// Anything else: progress, hooks, types of later releases, and text that isn't JSON.
    Other,
}

/// The start of a turn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Init {
    /// The permission mode in use.
    pub permission_mode: Option<String>,
    /// Where the CLI found its key: `ANTHROPIC_API_KEY`, `none` for tokens, and others.
    pub api_key_source: Option<String>,
    /// The names of the MCP servers.
    pub mcp_servers: Vec<String>,
}

/// A block of an answer of the model, or an error of the API in the form of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assistant {
    /// The message's id. Several lines share it, and each repeats the usage: count it once.
    pub message_id: Option<String>,
    /// The model; `<synthetic>` when the CLI wrote the text itself.
    pub model: Option<String>,
    /// The tool call whose subagent this comes from; none for the main conversation.
    pub parent: Option<String>,
    /// Its parts, in order.
    pub blocks: Vec<Block>,
    /// The kind of error, if this represents an error of the API (`authentication_failed`, `rate_limit` …).
    pub error: Option<String>,
    /// Tokens at the start of the answer; the output isn't counted yet.
    pub usage: Usage,
}

/// A part of an answer. Thinking is dropped.
#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    /// Text for the reader.
    Text(String),
    /// A call of a tool.
    ToolUse {
        /// Its id, which the tool's answer repeats.
        id: String,
        /// The tool's name.
        name: String,
        /// The arguments, as the model gave them.
        input: Value,
    },
}

/// A message to the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// The tool call whose subagent this goes to; none for the main conversation.
    pub parent: Option<String>,
    /// The results of tools.
    pub tool_results: Vec<ToolResult>,
}

/// The result of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolResult {
    /// The id of the tool call.
    pub tool_use_id: String,
    /// Whether the tool failed or wasn't permitted.
    pub is_error: bool,
    /// The text of the result; other content is named in brackets (`[image]`).
    pub content: String,
}

/// Tokens of one request, from its stream. Counters never decrease within a request; the last line has the final ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestUsage {
    /// The message's id. Releases before 2.1.331 give it only where the message starts; a line without it belongs
    /// to the message that started last for the same `parent`.
    pub message_id: Option<String>,
    /// The tool call whose subagent sent the request; none for the main conversation.
    pub parent: Option<String>,
    /// The model; known where the message starts.
    pub model: Option<String>,
    /// The tokens so far.
    pub usage: Usage,
}

/// A failed request that will be retried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiRetry {
    /// The HTTP status; none if there was no response.
    pub status: Option<u16>,
    /// The CLI's word for the error (`overloaded`, `rate_limit`, `server_error`, `unknown` …).
    pub error: Option<String>,
}

/// The remaining quota of a subscription.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// `allowed`, `allowed_warning` or `rejected`.
    pub status: Option<String>,
    /// The Unix time at which the window ends. None if the rejection isn't the account's usage limit.
    pub resets_at: Option<i64>,
}

impl RateLimit {
    /// Whether a request was rejected because of this.
    pub fn is_rejected(&self) -> bool {
        self.status.as_deref() == Some("rejected")
    }
}

/// The answer to a control request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ControlResponse {
    /// The answer; `null` if there is none, as after an error.
    pub response: Value,
}

impl ControlResponse {
    /// Usage and cost per model, if this answers `get_usage`. They are sums over the process and, in a resumed session,
    /// over the earlier runs.
    pub fn model_usage(&self) -> Option<BTreeMap<String, ModelUsage>> {
        self.response
            .get("session")?
            .get("model_usage")
            .map(result::model_usage)
    }
}

/// A question of the CLI.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ControlRequest {
    /// Its id, which the answer repeats, as it came.
    pub request_id: Value,
    /// What it asks for.
    pub subtype: Option<String>,
}

impl Message {
    /// Reads a line of output.
    pub fn read(line: &OutputLine) -> Self {
        match line {
            OutputLine::Whole(line) => Self::parse(line),
            OutputLine::TooLong { may_be_result: true } => Self::invalid_result(InvalidResult::TooLong),
            OutputLine::TooLong { may_be_result: false } => Self::Unreadable,
        }
    }

    /// Parses a line. Never fails and never panics, for any bytes.
    ///
    /// Invalid UTF-8 and halves of surrogate pairs become U+FFFD (the CLI cuts a tool's output between two UTF-16
    /// units). What nests too deep is left out of the message. A line that can't be parsed, but may be the result, is
    /// an invalid [`Message::Result`]: a run must not wait for another one.
    pub fn parse(line: &[u8]) -> Self {
        let Some(value::Read { value, cut }) = repair::json(line) else {
            return if line::may_be_result(line) {
                Self::invalid_result(InvalidResult::NotJson)
            } else if line.trim_ascii_start().starts_with(b"{") {
                Self::Unreadable
            } else {
                Self::Other
            };
        };
        let line = value;
        match text(&line, "type").as_deref() {
            Some("assistant") => Self::Assistant(assistant(&line)),
            Some("user") => Self::User(user(&line)),
            Some("result") => Self::Result(Box::new(ResultLine::read(&line, cut))),
            Some("stream_event") => stream_event(&line),
            Some("rate_limit_event") => Self::RateLimit(rate_limit(&line["rate_limit_info"])),
            Some("control_request") => Self::ControlRequest(ControlRequest {
                request_id: line["request_id"].clone(),
                subtype: text(&line["request"], "subtype"),
            }),
            Some("control_response") => Self::ControlResponse(control_response(&line["response"])),
            Some("system") => match text(&line, "subtype").as_deref() {
                Some("init") => Self::Init(init(&line)),
                Some("api_retry") => Self::ApiRetry(api_retry(&line)),
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }

    fn invalid_result(why: InvalidResult) -> Self {
        Self::Result(Box::new(ResultLine {
            invalid: Some(why),
            ..ResultLine::default()
        }))
    }
}

fn init(line: &Value) -> Init {
    Init {
        permission_mode: text(line, "permissionMode"),
        api_key_source: text(line, "apiKeySource"),
        mcp_servers: items(&line["mcp_servers"])
            .map(|server| text(server, "name").unwrap_or_else(|| "one without a name".to_owned()))
            .collect(),
    }
}

fn assistant(line: &Value) -> Assistant {
    let message = &line["message"];
    Assistant {
        message_id: text(message, "id"),
        model: model(message),
        parent: text(line, "parent_tool_use_id"),
        blocks: items(&message["content"]).filter_map(block).collect(),
        error: text(line, "error"),
        usage: Usage::read(&message["usage"]),
    }
}

fn block(block: &Value) -> Option<Block> {
    match block["type"].as_str()? {
        "text" => text(block, "text")
            .filter(|text| !text.is_empty())
            .map(Block::Text),
        "tool_use" => Some(Block::ToolUse {
            id: text(block, "id").unwrap_or_default(),
            name: text(block, "name").unwrap_or_default(),
            input: block["input"].clone(),
        }),
        _ => None,
    }
}

fn user(line: &Value) -> User {
    let tool_results = items(&line["message"]["content"])
        .filter(|block| block["type"] == "tool_result")
        .map(|block| ToolResult {
            tool_use_id: text(block, "tool_use_id").unwrap_or_default(),
            is_error: block["is_error"] == true,
            content: tool_result_text(&block["content"]),
        })
        .collect();
    User {
        parent: text(line, "parent_tool_use_id"),
        tool_results,
    }
}

/// The result of a tool is a text or a list of blocks.
fn tool_result_text(content: &Value) -> String {
    if let Some(text) = content.as_str() {
        return text.to_owned();
    }
    let parts = items(content).map(|block| match (block["text"].as_str(), block["type"].as_str()) {
        (Some(text), _) => text.to_owned(),
        (None, Some(kind)) => format!("[{kind}]"),
        (None, None) => String::new(),
    });
    parts.collect::<Vec<_>>().join("\n")
}

/// The API's own stream, passed through. Only its usage matters, because the whole texts follow later.
fn stream_event(line: &Value) -> Message {
    let event = &line["event"];
    let parent = text(line, "parent_tool_use_id");
    match event["type"].as_str() {
        Some("message_start") => Message::Usage(RequestUsage {
            message_id: text(&event["message"], "id"),
            parent,
            model: model(&event["message"]),
            usage: Usage::read(&event["message"]["usage"]),
        }),
        Some("message_delta") => Message::Usage(RequestUsage {
            message_id: text(line, "api_message_id"),
            parent,
            model: None,
            usage: Usage::read(&event["usage"]),
        }),
        _ => Message::Other,
    }
}

fn api_retry(line: &Value) -> ApiRetry {
    ApiRetry {
        status: status(&line["error_status"]),
        error: text(line, "error"),
    }
}

fn rate_limit(info: &Value) -> RateLimit {
    RateLimit {
        status: text(info, "status"),
        resets_at: info["resetsAt"].as_i64(),
    }
}

fn control_response(response: &Value) -> ControlResponse {
    ControlResponse {
        response: response["response"].clone(),
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(object: &Value, member: &str) -> Option<String> {
    object.get(member)?.as_str().map(str::to_owned)
}

/// The name of a model.
fn model(object: &Value) -> Option<String> {
    text(object, "model").map(|name| model_name(&name))
}

/// Cleans the name so that both databases can store it: a run may print anything.
fn model_name(name: &str) -> String {
    name.chars()
        .map(|letter| if letter.is_control() { '\u{fffd}' } else { letter })
        .take(200)
        .collect()
}

/// An HTTP status.
fn status(number: &Value) -> Option<u16> {
    number.as_u64().and_then(|number| u16::try_from(number).ok())
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
