//! How the CLI is started and what is written to its stdin. Pure.
//!
//! The flags and variables are one tested set: together they keep a hostile workspace or prompt from running
//! anything, reading anything outside, or reaching another run. Don't drop one alone.
//!
//! Tried with 2.1.331 and left out: `CLAUDE_CODE_STARTUP_FAILURE_RESULTS=1` (a refused schema, flag, mode or file still
//! ends without a result line); `CLAUDE_CODE_SUBAGENT_MODEL` (a call that names its model keeps it; models are checked
//! where they are paid for); `--exclude-dynamic-system-prompt-sections` (shortens the system prompt by 350 bytes that
//! are the same in each run); `--managed-settings`, `--restricted` and `--safe-mode` (the sandbox and an empty list of
//! setting sources close the same doors, and `--restricted` takes Bash away).

use super::message::Init;
use crate::guard::orphans::RUN_VARIABLE;
use serde_json::{Value, json};
use shared::model::{self, Aliases};
use shared::money::MicroUsd;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The message of a run that takes over from one that was cut off. The conversation that it resumes already holds
/// the task, and perhaps a part of the work.
pub const INTERRUPTED: &str = "The run of my last message was interrupted before it could finish. \
     Some of its work may be done already. \
     First check what is done, then finish what is missing, and don't repeat what is complete.";

/// Tools that are never offered. What most of them start would happen after the answer, when the run has ended; the
/// first two talk to other sessions of the same user.
const NEVER: [&str; 7] = [
    "SendMessage",
    "ListAgents",
    "CronCreate",
    "CronDelete",
    "CronList",
    "ScheduleWakeup",
    "RemoteTrigger",
];

/// One run of the CLI.
#[derive(Clone, Debug)]
pub struct RunSpec {
    /// The Claude session of this run; a new one for each attempt, so that a late writer can't touch another's.
    pub claude_session_id: Uuid,
    /// The session whose conversation it continues. It is copied, not written to.
    pub resume: Option<Uuid>,
    /// The id of the message; the CLI drops a second message with the same id.
    pub message_id: Uuid,
    /// The model: an alias (`sonnet`) or a full name.
    pub model: String,
    /// `low medium high xhigh max`; none leaves it to the CLI.
    pub effort: Option<String>,
    /// `default acceptEdits plan dontAsk auto bypassPermissions`.
    pub permission_mode: String,
    /// Turns of the main conversation; none for no limit. The CLI doesn't bind subagents by it.
    pub max_turns: Option<u32>,
    /// The CLI's own cap. It is looked at after each answer, so it may be overrun by one.
    pub max_cost: MicroUsd,
    /// A file that replaces the CLI's system prompt, as the CLI sees it. A file because an argument holds 128 KB.
    pub system_prompt_file: Option<PathBuf>,
    /// The schema of the structured output. At most 64 KiB as JSON.
    pub json_schema: Option<Value>,
    /// Whether there are no tools at all.
    pub no_tools: bool,
    /// Rules that allow tools: `Bash`, `Bash(git *)`.
    pub allowed_tools: Vec<String>,
    /// Rules that forbid tools; a bare name takes the tool away.
    pub disallowed_tools: Vec<String>,
    /// What the model is told.
    pub prompt: String,
}

/// Places, as the CLI sees them.
#[derive(Clone, Debug)]
pub struct CliPaths {
    /// Its home, kept from run to run of a session.
    pub home: PathBuf,
    /// A directory for temporary files of this run alone.
    pub tmp: PathBuf,
    /// The socket of its gateway, the only way to the API.
    pub gateway_socket: PathBuf,
}

/// The CLI's arguments.
///
/// Every value is joined to its flag: a value that begins with a dash can't become a flag, and flags that take
/// several values can't swallow what follows. The prompt isn't among them: arguments are visible and bounded.
pub fn arguments(spec: &RunSpec) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "-p",
        "--input-format=stream-json",
        "--output-format=stream-json",
        "--verbose",
        "--include-partial-messages",
        // Nothing that lies in the workspace or the home is a setting, a hook, a server or a plugin.
        "--setting-sources=",
        "--strict-mcp-config",
        // Nobody is there to be asked, so whatever would ask is denied.
        "--permission-prompts=none",
        // The whole CLI runs in a sandbox, so its own for Bash alone stays off.
        r#"--settings={"crossSessionInbound":"refuse","sandbox":{"enabled":false}}"#,
    ]
    .map(str::to_owned)
    .to_vec();
    let mut flag = |name: &str, value: &str| arguments.push(format!("--{name}={value}"));

    flag("session-id", &spec.claude_session_id.to_string());
    flag("model", &spec.model);
    flag("permission-mode", &spec.permission_mode);
    flag("max-budget-usd", &dollars(spec.max_cost));
    if let Some(effort) = &spec.effort {
        flag("effort", effort);
    }
    if let Some(turns) = spec.max_turns {
        flag("max-turns", &turns.to_string());
    }
    if spec.no_tools {
        flag("tools", "");
    }
    if !spec.allowed_tools.is_empty() {
        flag("allowedTools", &spec.allowed_tools.join(","));
    }
    let disallowed = spec.disallowed_tools.iter().map(String::as_str).chain(NEVER);
    flag("disallowedTools", &disallowed.collect::<Vec<_>>().join(","));
    if let Some(schema) = &spec.json_schema {
        flag("json-schema", &without_dialect(schema).to_string());
    }
    if let Some(file) = &spec.system_prompt_file {
        flag("system-prompt-file", &file.to_string_lossy());
    }
    if let Some(session) = spec.resume {
        flag("resume", &session.to_string());
        // The first run's system prompt would be kept otherwise, whatever this one says.
        flag("system-prompt-snapshot", "off");
        arguments.push("--fork-session".to_owned());
    }
    arguments
}

/// The schema without `$schema`: the CLI refuses most dialects by name, and reads a schema that names none.
fn without_dialect(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(members) = schema.as_object_mut() {
        members.remove("$schema");
    }
    schema
}

/// The CLI's whole environment: it must get nothing else. `dummy` is the name and value of a credential that only the
/// run's gateway takes; `run_marker` names the run to whoever looks for its processes.
pub fn environment(paths: &CliPaths, dummy: (&str, &str), run_marker: &str) -> Vec<(String, String)> {
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let tmp = path(&paths.tmp);
    let variables = [
        ("PATH", "/usr/local/bin:/usr/bin:/bin".to_owned()),
        ("LANG", "C.UTF-8".to_owned()),
        ("SHELL", "/bin/bash".to_owned()),
        ("HOME", path(&paths.home)),
        ("CLAUDE_CONFIG_DIR", path(&paths.home.join(".claude"))),
        // The CLI puts sockets and the outputs of tools below these, where another run could find them.
        ("TMPDIR", tmp.clone()),
        ("CLAUDE_CODE_TMPDIR", tmp.clone()),
        ("XDG_RUNTIME_DIR", tmp),
        ("ANTHROPIC_BASE_URL", "http://gateway".to_owned()),
        ("ANTHROPIC_UNIX_SOCKET", path(&paths.gateway_socket)),
        (dummy.0, dummy.1.to_owned()),
        // Waiting for the API happens in the queue, where it costs no slot.
        ("CLAUDE_CODE_MAX_RETRIES", "2".to_owned()),
        // The gateway waits for the API no longer than two minutes for a stream and 570 s for a whole answer; it may keep
        // a request for longer until others of the run have settled.
        ("API_TIMEOUT_MS", "600000".to_owned()),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1".to_owned()),
        ("DISABLE_AUTOUPDATER", "1".to_owned()),
        // An `@path` in a prompt would put any file into the request, whatever the permission mode.
        // CLAUDE_CODE_DISABLE_ATTACHMENTS would do that too, but also hide deferred tools (WebSearch among them), skills
        // and all of plan mode's instructions from the model.
        ("CLAUDE_CODE_DISABLE_FILE_MENTIONS", "1".to_owned()),
        // A conversation that ended in a deferred tool call would begin by running it, by the rules of this start.
        ("CLAUDE_CODE_DISABLE_DEFERRED_TOOL_RESUME", "1".to_owned()),
        // The number of turns binds neither subagents nor searches. The defaults are 20 at once, 3 levels, 200 searches.
        // The gateway takes 32 requests of a run at once.
        ("CLAUDE_CODE_MAX_CONCURRENT_SUBAGENTS", "10".to_owned()),
        ("CLAUDE_CODE_MAX_SUBAGENT_SPAWN_DEPTH", "2".to_owned()),
        ("CLAUDE_CODE_MAX_WEB_SEARCHES_PER_SESSION", "50".to_owned()),
        ("CLAUDE_CODE_WEB_SEARCH_REFILLS_PER_HOUR", "0".to_owned()),
        // Git settings of a workspace can name a program to run.
        ("CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS", "1".to_owned()),
        ("GIT_CONFIG_COUNT", "1".to_owned()),
        ("GIT_CONFIG_KEY_0", "core.fsmonitor".to_owned()),
        ("GIT_CONFIG_VALUE_0", "false".to_owned()),
        ("CLAUDE_CODE_DISABLE_AUTO_MEMORY", "1".to_owned()),
        // The first result would come before the work is done.
        ("CLAUDE_CODE_DISABLE_BACKGROUND_TASKS", "1".to_owned()),
        (RUN_VARIABLE, run_marker.to_owned()),
    ];
    variables.map(|(name, value)| (name.to_owned(), value)).to_vec()
}

/// The short names of models by which the CLI and its subagents ask, with the variable that says what each stands for.
const FAMILIES: [(&str, &str); 4] = [
    ("fable", "ANTHROPIC_DEFAULT_FABLE_MODEL"),
    ("opus", "ANTHROPIC_DEFAULT_OPUS_MODEL"),
    ("sonnet", "ANTHROPIC_DEFAULT_SONNET_MODEL"),
    ("haiku", "ANTHROPIC_DEFAULT_HAIKU_MODEL"),
];

/// Variables that make the run's own `model` of each short name that stands for one which isn't allowed: subagents and
/// the CLI's side requests ask by short names, and the gateway would refuse them.
pub fn model_variables(
    model: &str,
    aliases: &Aliases,
    allow: impl Fn(&str) -> bool,
) -> Vec<(String, String)> {
    let own = aliases.of(&model::plain(model)).swap_remove(0);
    let refused = FAMILIES.iter().filter(|(family, _)| !allow(family));
    let mut variables: Vec<(String, String)> = refused
        .map(|(_, variable)| ((*variable).to_owned(), own.clone()))
        .collect();
    if !allow("haiku") {
        variables.push(("ANTHROPIC_SMALL_FAST_MODEL".to_owned(), own));
    }
    variables
}

/// The line that gives the CLI its task, with its end. JSON, so no byte of the prompt can be a line of its own: other
/// types of lines run commands and write history.
pub fn user_line(spec: &RunSpec) -> String {
    line(&json!({
        "type": "user",
        "message": {"role": "user", "content": [{"type": "text", "text": as_text(&spec.prompt)}]},
        "uuid": spec.message_id.to_string(),
    }))
}

/// The line that ends the turn. The CLI answers, and its result line follows within a moment in every state.
pub fn interrupt_line(request_id: &str) -> String {
    control_line(request_id, "interrupt")
}

/// The line that asks for usage and cost so far. Free, and answered while a tool runs.
pub fn usage_line(request_id: &str) -> String {
    control_line(request_id, "get_usage")
}

/// The line that answers a question of the CLI with an error. No flag or setting of a run makes the CLI ask anything,
/// so only a later release or the agent does.
pub fn refusal_line(request_id: &Value, subtype: &str) -> String {
    let error = format!("this client doesn't support the control request {subtype}");
    line(&json!({
        "type": "control_response",
        "response": {"subtype": "error", "request_id": request_id, "error": error},
    }))
}

/// Why a run must be stopped at its first line: the CLI isn't set up as the arguments say, so it can't be trusted to
/// keep to the rest of them. `credential` is the variable with the run's credential. What the line doesn't say isn't
/// wrong. None when all is well.
pub fn unexpected_init(spec: &RunSpec, init: &Init, credential: &str) -> Option<String> {
    let servers = &init.mcp_servers;
    if !servers.is_empty() {
        let servers = servers.join(", ");
        return Some(format!("it started MCP servers that nobody asked for: {servers}"));
    }
    // Less than was asked for is harmless; only what lifts all checks isn't.
    let asked = &spec.permission_mode;
    if init.permission_mode.as_deref() == Some("bypassPermissions") && asked != "bypassPermissions" {
        return Some(format!(
            "it started in permission mode bypassPermissions instead of {asked}"
        ));
    }
    // Tokens aren't keys: the CLI calls that `none`.
    let source = init.api_key_source.as_deref().unwrap_or("none");
    (source != "none" && source != credential)
        .then(|| format!("it found an API key that nobody gave it: {source}"))
}

/// The prompt so that the model gets it: a text that begins with a slash is a command of the CLI otherwise, and some
/// of those change its settings. A leading space makes it text.
fn as_text(prompt: &str) -> String {
    if prompt.trim_start().starts_with('/') {
        format!(" {prompt}")
    } else {
        prompt.to_owned()
    }
}

fn control_line(request_id: &str, subtype: &str) -> String {
    line(&json!({"type": "control_request", "request_id": request_id, "request": {"subtype": subtype}}))
}

fn line(value: &Value) -> String {
    format!("{value}\n")
}

/// Dollars as a plain decimal number.
fn dollars(amount: MicroUsd) -> String {
    let micros = amount.0.max(0);
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
}

#[cfg(test)]
mod tests;
