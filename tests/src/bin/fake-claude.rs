//! A scripted Claude Code CLI. It takes the real one's flags, speaks its two-way protocol in the shapes of 2.1.331,
//! keeps a transcript to resume from, pays for each message at the gateway, and does what the script in the prompt says ([`tests::script`]).

use std::fs::{self, File};
use std::io::{self, BufRead as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tests::script::{Deaf, Script, Step};
use tests::{gateway, processes, script, trace};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use uuid::Uuid;

const VERSION: &str = "2.1.331";

fn main() -> ExitCode {
    let born = trace::now();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments
        .iter()
        .any(|argument| argument == "--version" || argument == "-v")
    {
        put(&format!("{VERSION} (Claude Code)"));
        return ExitCode::SUCCESS;
    }
    if arguments.first().is_some_and(|argument| argument == "auth") {
        return auth_status();
    }
    let options = match Options::parse(&arguments) {
        Ok(options) => options,
        Err(error) => {
            complain(&error);
            return ExitCode::FAILURE;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let code = runtime.block_on(run(options, born));
    // The thread that reads standard input may be blocked for ever.
    std::process::exit(code)
}

/// Makes requests past the CLI, so many at once, and writes down what came back.
async fn direct(
    requests: impl Iterator<Item = impl Future<Output = Result<(), gateway::Failure>>>,
    at_once: usize,
) -> Flow {
    let answers: Vec<_> = stream::iter(requests).buffer_unordered(at_once).collect().await;
    let lines: Vec<String> = answers
        .into_iter()
        .map(|answer| match answer {
            Ok(()) => "200\n".to_owned(),
            Err(gateway::Failure::Refused { text, .. }) => format!("{text}\n"),
            Err(gateway::Failure::NoAnswer(text)) => format!("none: {text}\n"),
        })
        .collect();
    fs::write(script::REQUESTS, lines.concat()).expect("a working directory");
    Flow::GoOn
}

/// Flags that take one value.
const ONE: &[&str] = &[
    "--input-format",
    "--output-format",
    "--session-id",
    "--resume",
    "-r",
    "--model",
    "--effort",
    "--permission-mode",
    "--max-turns",
    "--max-budget-usd",
    "--system-prompt",
    "--system-prompt-file",
    "--append-system-prompt",
    "--append-system-prompt-file",
    "--system-prompt-snapshot",
    "--json-schema",
    "--setting-sources",
    "--settings",
    "--fallback-model",
    "--permission-prompt-tool",
    "--permission-prompts",
    "--agents",
];
/// Flags that take all values up to the next flag.
const MANY: &[&str] = &[
    "--allowedTools",
    "--allowed-tools",
    "--disallowedTools",
    "--disallowed-tools",
    "--tools",
    "--add-dir",
    "--mcp-config",
];
/// Flags that take none.
const NONE: &[&str] = &[
    "-p",
    "--print",
    "--verbose",
    "--include-partial-messages",
    "--fork-session",
    "--strict-mcp-config",
    "--replay-user-messages",
    "--session-mirror",
    "--restricted",
    "--bare",
    "--safe-mode",
    "--disable-slash-commands",
    "--include-hook-events",
    "--dangerously-skip-permissions",
];

/// What the command line says, as far as this CLI cares.
#[derive(Debug, Default)]
struct Options {
    partial: bool,
    fork: bool,
    schema: bool,
    session: Option<Uuid>,
    resume: Option<String>,
    model: String,
    permission_mode: String,
    max_turns: u64,
    max_budget: Option<f64>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self {
            model: "opus".to_owned(),
            permission_mode: "default".to_owned(),
            ..Self::default()
        };
        let (mut print, mut verbose, mut input, mut output) = (false, false, String::new(), String::new());
        let mut rest = arguments.iter().peekable();
        while let Some(argument) = rest.next() {
            let (name, given) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
                _ => (argument.as_str(), None),
            };
            let mut value = String::new();
            if ONE.contains(&name) {
                value = match given {
                    Some(value) => value,
                    None => rest
                        .next()
                        .ok_or(format!("error: option '{name} <value>' argument missing"))?
                        .clone(),
                };
            } else if MANY.contains(&name) {
                while given.is_none() && rest.next_if(|next| !next.starts_with('-')).is_some() {}
            } else if !NONE.contains(&name) || given.is_some() {
                return Err(format!("error: unknown option '{argument}'"));
            }
            match name {
                "-p" | "--print" => print = true,
                "--verbose" => verbose = true,
                "--input-format" => input = value,
                "--output-format" => output = value,
                "--include-partial-messages" => options.partial = true,
                "--fork-session" => options.fork = true,
                "--json-schema" => {
                    serde_json::from_str::<Value>(&value)
                        .map_err(|error| format!("Error: Invalid JSON schema: {error}"))?;
                    options.schema = true;
                }
                "--session-id" => {
                    options.session = Some(
                        value
                            .parse()
                            .map_err(|_| "Error: Invalid session ID. Must be a valid UUID.".to_owned())?,
                    );
                }
                "--resume" | "-r" => options.resume = Some(value),
                "--model" => options.model = value,
                "--permission-mode" => options.permission_mode = value,
                "--max-turns" => {
                    options.max_turns = value.parse().map_err(|_| "error: --max-turns".to_owned())?;
                }
                "--max-budget-usd" => {
                    options.max_budget =
                        Some(value.parse().map_err(|_| "error: --max-budget-usd".to_owned())?);
                }
                _ => {}
            }
        }
        if !print || input != "stream-json" || output != "stream-json" {
            return Err(
                "Error: this CLI only plays -p --input-format stream-json --output-format stream-json"
                    .to_owned(),
            );
        }
        if !verbose {
            return Err(
                "Error: When using --print, --output-format=stream-json requires --verbose".to_owned(),
            );
        }
        if options.resume.is_some() && options.session.is_some() && !options.fork {
            return Err(
                "Error: --session-id can only be used with --resume if --fork-session is also specified."
                    .to_owned(),
            );
        }
        Ok(options)
    }
}

fn auth_status() -> ExitCode {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let config = config_folder();
    let (logged_in, method) = if set("ANTHROPIC_API_KEY") {
        (true, "api_key")
    } else if set("CLAUDE_CODE_OAUTH_TOKEN") || set("ANTHROPIC_AUTH_TOKEN") {
        (true, "oauth_token")
    } else if config.join(".credentials.json").is_file() {
        (true, "claude.ai")
    } else {
        (false, "none")
    };
    put(&json!({ "loggedIn": logged_in, "authMethod": method }).to_string());
    if logged_in {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn config_folder() -> PathBuf {
    match std::env::var_os("CLAUDE_CONFIG_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".claude"),
    }
}

/// How a turn went on, or why it didn't.
enum Flow {
    GoOn,
    Interrupted {
        in_tool: bool,
    },
    Budget,
    MaxTurns,
    /// The synthetic message has been written already.
    ApiError {
        status: Option<u16>,
        error: String,
        text: String,
    },
    Exit(i32),
}

/// Tokens of the current process; two prices and two kinds of tokens are enough to play with.
#[derive(Clone, Copy, Default)]
struct Usage {
    input: u64,
    output: u64,
}

impl Usage {
    fn and(self, other: Self) -> Self {
        Self {
            input: self.input + other.input,
            output: self.output + other.output,
        }
    }

    fn json(self) -> Value {
        json!({
            "input_tokens": self.input, "output_tokens": self.output,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        })
    }
}

struct Cli {
    options: Options,
    session: String,
    model: String,
    /// USD per token, in and out.
    price: (f64, f64),
    transcript: PathBuf,
    history: Vec<Value>,
    /// What earlier runs of a resumed session used; the cost shown includes it.
    before: Usage,
    usage: Usage,
    usage_at_last_result: Usage,
    requests: u64,
    begun: Instant,
    results: u64,
    script: Script,
    /// The text of the message that is being answered, as it came.
    heard: String,
    lines: mpsc::Receiver<String>,
    ended: bool,
    waiting: Vec<Value>,
    /// The answers to control requests of this CLI's own.
    answers: Vec<Value>,
}

async fn run(options: Options, born: u64) -> i32 {
    let (sender, lines) = mpsc::channel(1);
    // The channel holds one line: a CLI that is deaf to its input stops reading it.
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    let mut cli = match Cli::open(options, lines) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let mut code = 0;
    // The first answer's life is that of the process.
    let mut since = Some(born);
    while let Some(message) = cli.next_message().await {
        match cli.turn(&message, since.take().unwrap_or_else(trace::now)).await {
            Ok(failed) => code = i32::from(failed),
            Err(exit) => return exit,
        }
        if cli.script.deaf.contains(&Deaf::End) {
            std::future::pending::<()>().await;
        }
    }
    let total = cli.before.and(cli.usage);
    cli.record(&json!({ "type": "cost-state", "input": total.input, "output": total.output }));
    code
}

impl Cli {
    fn open(options: Options, lines: mpsc::Receiver<String>) -> Result<Self, i32> {
        let cwd = std::env::current_dir().unwrap_or_default();
        let slug: String = cwd
            .to_string_lossy()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let projects = config_folder().join("projects");
        let mut history: Vec<Value> = Vec::new();
        let mut session = options.session.unwrap_or_else(Uuid::new_v4).to_string();
        let mut transcript = projects.join(&slug).join(format!("{session}.jsonl"));
        if let Some(resumed) = &options.resume {
            let Some(found) = find_transcript(&projects, resumed) else {
                let error = format!("No conversation found with session ID: {resumed}");
                put(&json!({
                    "type": "result", "subtype": "error_during_execution", "is_error": true, "duration_ms": 0,
                    "duration_api_ms": 0, "num_turns": 0, "stop_reason": null, "session_id": resumed,
                    "total_cost_usd": 0, "usage": Usage::default().json(), "modelUsage": {},
                    "permission_denials": [], "uuid": new_uuid(), "errors": [error], "result_index": 0,
                })
                .to_string());
                complain(&error);
                return Err(1);
            };
            let text = fs::read_to_string(&found).unwrap_or_default();
            // A torn or foreign line is no reason to give up, as in the real one.
            history = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect();
            if !options.fork {
                session.clone_from(resumed);
                transcript = found;
            }
        } else if transcript.exists() {
            complain(&format!("Error: Session ID {session} is already in use."));
            return Err(1);
        }
        let (model, price) = match options.model.as_str() {
            "sonnet" => ("claude-sonnet-5-5", (2.0, 10.0)),
            "haiku" => ("claude-haiku-5-5", (0.1, 0.5)),
            "fable" => ("claude-fable-5-2", (8.0, 40.0)),
            "opus" => ("claude-opus-5-5", (4.0, 20.0)),
            other if other.contains("sonnet") => (other, (2.0, 10.0)),
            other if other.contains("haiku") => (other, (0.1, 0.5)),
            other => (other, (4.0, 20.0)),
        };
        let state = history.iter().rev().find(|line| line["type"] == "cost-state");
        let before = state.map_or_else(Usage::default, |state| Usage {
            input: state["input"].as_u64().unwrap_or(0),
            output: state["output"].as_u64().unwrap_or(0),
        });
        let mut cli = Self {
            session,
            model: model.to_owned(),
            price: (price.0 / 1e6, price.1 / 1e6),
            transcript,
            history: Vec::new(),
            before,
            usage: Usage::default(),
            usage_at_last_result: Usage::default(),
            requests: 0,
            begun: Instant::now(),
            results: 0,
            script: Script::default(),
            heard: String::new(),
            lines,
            ended: false,
            waiting: Vec::new(),
            answers: Vec::new(),
            options,
        };
        if cli.options.fork {
            for line in &history {
                cli.record(line);
            }
        }
        cli.history = history;
        Ok(cli)
    }

    /// The next message of the user; none when standard input has ended.
    async fn next_message(&mut self) -> Option<Value> {
        loop {
            if !self.waiting.is_empty() {
                return Some(self.waiting.remove(0));
            }
            if self.ended {
                return None;
            }
            match self.lines.recv().await {
                Some(line) => drop(self.hear(&line)),
                None => self.ended = true,
            }
        }
    }

    /// Takes one line of standard input; true when it is an interrupt that has an effect.
    fn hear(&mut self, line: &str) -> bool {
        if line.trim().is_empty() {
            return false;
        }
        let Ok(line) = serde_json::from_str::<Value>(line) else {
            complain(&format!("Error parsing streaming input line: {line}"));
            std::process::exit(1);
        };
        match line["type"].as_str() {
            Some("user") => self.waiting.push(line),
            Some("control_request") => return self.control(&line),
            Some("control_response") => self.answers.push(line["response"].clone()),
            _ => {}
        }
        false
    }

    fn control(&mut self, line: &Value) -> bool {
        let id = &line["request_id"];
        let answer = |response: Value| {
            put(&json!({
                "type": "control_response",
                "response": { "subtype": "success", "request_id": id, "response": response },
            })
            .to_string());
        };
        match line["request"]["subtype"].as_str().unwrap_or_default() {
            "interrupt" if self.script.deaf.contains(&Deaf::Interrupt) => {}
            "interrupt" => {
                answer(json!({ "still_queued": [] }));
                return true;
            }
            "get_usage" => answer(json!({
                "session": {
                    "total_cost_usd": self.total_cost(), "total_api_duration_ms": 0,
                    "total_duration_ms": millis(self.begun), "total_lines_added": 0, "total_lines_removed": 0,
                    "model_usage": self.model_usage(self.before.and(self.usage)),
                },
                "subscription_type": null, "rate_limits_available": false, "rate_limits": null, "behaviors": null,
            })),
            "initialize" => answer(json!({ "commands": [], "models": [] })),
            "get_binary_version" => answer(json!({ "version": VERSION })),
            other => put(&json!({
                "type": "control_response",
                "response": {
                    "subtype": "error", "request_id": id,
                    "error": format!("Unsupported control request subtype: {other}"),
                    "error_code": "unsupported_request",
                },
            })
            .to_string()),
        }
        false
    }

    /// Plays one message of the user up to its result; true when that is an error. `Err` is the end of the process.
    async fn turn(&mut self, message: &Value, since: u64) -> Result<bool, i32> {
        let Some(text) = text_of(&message["message"]["content"]) else {
            return Ok(false);
        };
        let resumed = Script::find(&text).or_else(|| {
            // As a model would, it goes on with what the conversation was about.
            self.history
                .iter()
                .rev()
                .filter(|line| line["type"] == "user")
                .find_map(|line| Script::find(&text_of(&line["message"]["content"])?))
        });
        self.script = pick_run(resumed.unwrap_or_default());
        self.obey_signals();
        self.heard.clone_from(&text);
        let begun = Instant::now();
        let requests_before = self.requests;
        self.emit(self.init());
        let uuid = message["uuid"].as_str().map_or_else(new_uuid, str::to_owned);
        let text = text.trim_start().to_owned();
        self.remember(
            "user",
            &uuid,
            &json!({ "role": "user", "content": [{ "type": "text", "text": text }] }),
        );
        self.trace("start", since);
        let flow = self.play().await;
        self.trace("stop", trace::now());
        if let Flow::Exit(code) = flow {
            return Err(code);
        }
        let result = self.result(&flow, begun, self.requests - requests_before);
        let failed = result["is_error"] == true;
        self.emit(result);
        self.usage_at_last_result = self.usage;
        self.results += 1;
        Ok(failed)
    }

    async fn play(&mut self) -> Flow {
        let credentials = [
            "ANTHROPIC_API_KEY",
            "CLAUDE_CODE_OAUTH_TOKEN",
            "ANTHROPIC_AUTH_TOKEN",
        ];
        if !credentials.iter().any(|name| std::env::var_os(name).is_some()) {
            return self.api_error(
                None,
                "authentication_failed",
                "Not logged in · Please run /login",
                0,
            );
        }
        for step in self.script.steps.clone() {
            match self.step(step).await {
                Flow::GoOn => {}
                other => return other,
            }
        }
        if self.options.schema
            && let Some(value) = self.script.structured.clone()
        {
            return self
                .tool(
                    "StructuredOutput",
                    &value,
                    "Structured output provided successfully",
                )
                .await;
        }
        let answer = self.answer();
        self.say(&answer, self.script.cost).await
    }

    fn answer(&self) -> String {
        if self.script.answer.is_empty() {
            self.heard.clone()
        } else {
            self.script.answer.clone()
        }
    }

    async fn step(&mut self, step: Step) -> Flow {
        match step {
            Step::Say(text) => self.say(&text, None).await,
            Step::Sleep(millis) => self.wait(Duration::from_millis(millis), false).await,
            Step::Hang => self.wait(Duration::from_secs(1_000_000), false).await,
            Step::Until(file) => self.wait_for(Path::new(&file)).await,
            Step::Spend(usd) => self.say("Thinking.", Some(usd)).await,
            Step::Direct {
                model,
                tokens: (input, output),
                count,
                at_once,
            } => {
                let asked = (0..count).map(|_| gateway::pay(&model, input, output));
                direct(asked, at_once).await
            }
            Step::DirectFor {
                model,
                tokens: (input, output),
                at_once,
                seconds,
            } => {
                let until = Instant::now() + Duration::from_secs(seconds);
                let asked = std::iter::repeat_with(|| gateway::pay(&model, input, output));
                direct(asked.take_while(|_| Instant::now() < until), at_once).await
            }
            Step::Request(scenario) => self.request(&scenario).await,
            Step::Shell(command) => self.shell(&command).await,
            Step::Write { file, content } => {
                let (result, path) = match std::env::current_dir().map(|cwd| cwd.join(&file)) {
                    Ok(path) => (fs::write(&path, &content), path),
                    Err(error) => (Err(error), PathBuf::from(&file)),
                };
                let result = match result {
                    Ok(()) => format!("File created successfully at: {}", path.display()),
                    Err(error) => format!("Error: {error}"),
                };
                self.tool(
                    "Write",
                    &json!({ "file_path": path, "content": content }),
                    &result,
                )
                .await
            }
            Step::Tool(millis) => {
                let id = match self
                    .call("Bash", &json!({ "command": format!("sleep {millis}") }))
                    .await
                {
                    Ok(id) => id,
                    Err(flow) => return flow,
                };
                let flow = self.wait(Duration::from_millis(millis), true).await;
                if let Flow::GoOn = flow {
                    return self.returned(&id, "", false);
                }
                flow
            }
            Step::Flood { lines, bytes } => {
                let text = "x".repeat(bytes);
                for _ in 0..lines {
                    let id = message_id();
                    self.emit(self.assistant(
                        &id,
                        &json!({ "type": "text", "text": text }),
                        Usage { input: 0, output: 1 },
                    ));
                }
                // Reads what came in while it wrote.
                self.wait(Duration::ZERO, false).await
            }
            Step::Raw(line) => {
                put(&line);
                Flow::GoOn
            }
            Step::Ask(subtype) => {
                put(&json!({
                    "type": "control_request", "request_id": "ask", "request": { "subtype": subtype },
                })
                .to_string());
                while self.answers.is_empty() {
                    match self.wait(Duration::from_millis(20), false).await {
                        Flow::GoOn => {}
                        other => return other,
                    }
                }
                let answer = self.answers.remove(0);
                let of = |member: &str| answer[member].as_str().unwrap_or_default().to_owned();
                self.say(
                    &format!("{} to {}: {}", of("subtype"), of("request_id"), of("error")),
                    None,
                )
                .await
            }
            Step::Stderr(text) => {
                complain(&text);
                Flow::GoOn
            }
            Step::Exit(code) => Flow::Exit(code),
            Step::Die(number) => {
                let pid = i32::try_from(std::process::id()).expect("a process id");
                let named = Signal::from_named_raw(number).expect("a signal's number");
                processes::signal(pid, named);
                std::future::pending().await
            }
            Step::Freeze => std::future::pending().await,
            Step::ApiError { status, error, text } => self.api_error(status, &error, &text, 2),
            Step::UsageLimit(resets_at) => {
                let info = json!({
                    "status": "rejected", "resetsAt": resets_at, "rateLimitType": "five_hour",
                    "overageStatus": "rejected", "overageDisabledReason": "out_of_credits", "isUsingOverage": false,
                });
                self.emit(json!({ "type": "rate_limit_event", "rate_limit_info": info }));
                self.api_error(
                    Some(429),
                    "rate_limit",
                    "You've hit your 5-hour limit · resets 9:35pm (UTC)",
                    0,
                )
            }
        }
    }

    /// Asks the Messages API through the gateway.
    async fn request(&mut self, scenario: &str) -> Flow {
        const RETRIES: u32 = 2;
        let prompt = format!("[[scenario:{scenario}]] Go on.");
        let mut answer = tests::gateway::ask(&self.model, &prompt).await;
        for _ in 0..RETRIES {
            if answer.as_ref().is_ok_and(|(status, _)| *status == 200) {
                break;
            }
            self.wait(Duration::from_millis(50), false).await;
            answer = tests::gateway::ask(&self.model, &prompt).await;
        }
        match answer {
            Ok((200, text)) => self.say(&text, None).await,
            Ok((status, text)) => {
                let error = match status {
                    401 | 403 => "authentication_failed",
                    404 => "model_not_found",
                    429 => "rate_limit",
                    _ => "server_error",
                };
                self.api_error(
                    Some(status),
                    error,
                    &format!("API Error: {status} {text}"),
                    RETRIES,
                )
            }
            Err(error) => {
                let text = format!("Unable to connect to API ({error})");
                self.api_error(None, "server_error", &text, RETRIES)
            }
        }
    }

    /// Waits and listens.
    async fn wait(&mut self, limit: Duration, in_tool: bool) -> Flow {
        let end = tokio::time::Instant::now() + limit;
        let deaf = self.script.deaf.contains(&Deaf::Stdin);
        loop {
            self.trace("tick", trace::now());
            let tick = end.min(tokio::time::Instant::now() + Duration::from_millis(20));
            tokio::select! {
                biased;
                line = self.lines.recv(), if !deaf && !self.ended => match line {
                    Some(line) => {
                        if self.hear(&line) {
                            return Flow::Interrupted { in_tool };
                        }
                    }
                    None => self.ended = true,
                },
                () = tokio::time::sleep_until(tick) => {
                    if tokio::time::Instant::now() >= end {
                        return Flow::GoOn;
                    }
                }
            }
        }
    }

    async fn wait_for(&mut self, file: &Path) -> Flow {
        while !file.exists() {
            match self.wait(Duration::from_millis(10), false).await {
                Flow::GoOn => {}
                other => return other,
            }
        }
        Flow::GoOn
    }

    async fn shell(&mut self, command: &str) -> Flow {
        let input = json!({ "command": command, "description": "A step of the script" });
        let id = match self.call("Bash", &input).await {
            Ok(id) => id,
            Err(flow) => return flow,
        };
        let child = Command::new("setsid")
            .args(["--wait", "sh", "-c", command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => return self.returned(&id, &format!("Error: {error}"), true),
        };
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let output = child.wait_with_output();
        tokio::pin!(output);
        loop {
            tokio::select! {
                output = &mut output => {
                    let output = output.expect("the output of a shell");
                    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
                    text.push_str(&String::from_utf8_lossy(&output.stderr));
                    let failed = !output.status.success();
                    if failed {
                        text = format!("Exit code {}\n{text}", output.status.code().or(output.status.signal()).unwrap_or(-1));
                    }
                    return self.returned(&id, text.trim_end(), failed);
                }
                flow = self.wait(Duration::from_millis(20), true) => match flow {
                    Flow::GoOn => {}
                    other => {
                        if let Some(group) = pid.and_then(Pid::from_raw) {
                            let _ = kill_process_group(group, Signal::KILL);
                        }
                        return other;
                    }
                },
            }
        }
    }

    async fn tool(&mut self, name: &str, input: &Value, result: &str) -> Flow {
        let id = match self.call(name, input).await {
            Ok(id) => id,
            Err(flow) => return flow,
        };
        match self.wait(Duration::ZERO, true).await {
            Flow::GoOn => self.returned(&id, result, result.starts_with("Error")),
            other => other,
        }
    }

    /// A message that calls a tool; the call's id.
    async fn call(&mut self, name: &str, input: &Value) -> Result<String, Flow> {
        let id = format!("toolu_{}", Uuid::new_v4().simple());
        let block = json!({ "type": "tool_use", "id": id, "name": name, "input": input });
        self.message(&block, None, "tool_use").await?;
        Ok(id)
    }

    /// The result of a tool call; then the caps are looked at, as before every further request.
    fn returned(&mut self, id: &str, result: &str, failed: bool) -> Flow {
        let block =
            json!({ "type": "tool_result", "content": result, "is_error": failed, "tool_use_id": id });
        let message = json!({ "role": "user", "content": [block] });
        let uuid = new_uuid();
        self.emit(json!({
            "type": "user", "message": message, "parent_tool_use_id": null, "uuid": uuid, "timestamp": timestamp(),
            "tool_use_result": result,
        }));
        self.remember("user", &uuid, &message);
        if self.options.max_turns > 0 && self.requests >= self.options.max_turns {
            return Flow::MaxTurns;
        }
        self.check_budget()
    }

    async fn say(&mut self, text: &str, usd: Option<f64>) -> Flow {
        let block = json!({ "type": "text", "text": text });
        match self.message(&block, usd, "end_turn").await {
            Ok(()) => self.check_budget(),
            Err(flow) => flow,
        }
    }

    fn check_budget(&self) -> Flow {
        match self.options.max_budget {
            Some(cap) if self.cost(self.usage) >= cap => Flow::Budget,
            _ => Flow::GoOn,
        }
    }

    /// One answer of the model, with one block, and what the API would stream of it. It is paid for at the gateway.
    async fn message(&mut self, block: &Value, usd: Option<f64>, stop_reason: &str) -> Result<(), Flow> {
        let usage = Usage {
            input: 100,
            output: usd.map_or(20, |usd| self.output_for(usd)),
        };
        let id = message_id();
        let start = Usage {
            input: usage.input,
            output: 1,
        };
        self.requests += 1;
        self.emit(json!({ "type": "system", "subtype": "status", "status": "requesting" }));
        self.ask(usage).await?;
        self.stream(
            &id,
            &json!({
                "type": "message_start",
                "message": {
                    "id": id, "type": "message", "role": "assistant", "model": self.model, "content": [],
                    "stop_reason": null, "stop_sequence": null, "usage": start.json(),
                },
            }),
        );
        if let Some(text) = block["text"].as_str() {
            self.stream(&id, &json!({
                "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" },
            }));
            self.stream(&id, &json!({
                "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": text },
            }));
        } else {
            self.stream(
                &id,
                &json!({ "type": "content_block_start", "index": 0, "content_block": block }),
            );
        }
        self.emit(self.assistant(&id, block, start));
        self.stream(&id, &json!({ "type": "content_block_stop", "index": 0 }));
        self.stream(
            &id,
            &json!({
                "type": "message_delta", "delta": { "stop_reason": stop_reason, "stop_sequence": null },
                "usage": usage.json(),
            }),
        );
        self.stream(&id, &json!({ "type": "message_stop" }));
        self.usage.input += usage.input;
        self.usage.output += usage.output;
        let message = json!({
            "id": id, "type": "message", "role": "assistant", "model": self.model, "content": [block],
            "stop_reason": stop_reason, "stop_sequence": null, "usage": usage.json(),
        });
        self.remember("assistant", &new_uuid(), &message);
        Ok(())
    }

    /// Sends a request through the gateway that uses exactly these tokens at the simulator, and listens meanwhile. A
    /// failure that may pass is tried three times, without the real one's pauses.
    async fn ask(&mut self, usage: Usage) -> Result<(), Flow> {
        // Started by hand, without a gateway.
        if std::env::var_os("ANTHROPIC_UNIX_SOCKET").is_none() {
            return Ok(());
        }
        for attempt in 0..3 {
            let model = self.model.clone();
            let answer = gateway::pay(&model, usage.input, usage.output);
            tokio::pin!(answer);
            let answer = loop {
                tokio::select! {
                    answer = &mut answer => break answer,
                    flow = self.wait(Duration::from_millis(20), false) => match flow {
                        Flow::GoOn => {}
                        other => return Err(other),
                    },
                }
            };
            let (status, text) = match answer {
                Ok(()) => return Ok(()),
                Err(gateway::Failure::Refused { status, text }) => (Some(status), text),
                Err(gateway::Failure::NoAnswer(text)) => (None, text),
            };
            let passes = status.is_none_or(|status| matches!(status, 401 | 408 | 409 | 429 | 500..));
            if !passes || attempt == 2 {
                let error = match status {
                    Some(401 | 403) => "authentication_failed",
                    Some(404) => "model_not_found",
                    Some(429) => "rate_limit",
                    Some(500..) | None => "server_error",
                    Some(_) => "unknown",
                };
                return Err(self.api_error(status, error, &format!("API Error: {text}"), attempt));
            }
        }
        Ok(())
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small positive count"
    )]
    fn output_for(&self, usd: f64) -> u64 {
        ((usd - 100.0 * self.price.0).max(0.0) / self.price.1).round() as u64
    }

    fn assistant(&self, id: &str, block: &Value, usage: Usage) -> Value {
        json!({
            "type": "assistant",
            "message": {
                "id": id, "type": "message", "role": "assistant", "model": self.model, "content": [block],
                "stop_reason": null, "stop_sequence": null, "usage": usage.json(), "context_management": null,
            },
            "parent_tool_use_id": null, "timestamp": timestamp(), "request_id": "req_fake",
        })
    }

    fn api_error(&mut self, status: Option<u16>, error: &str, text: &str, retries: u32) -> Flow {
        for attempt in 1..=retries {
            self.emit(json!({
                "type": "system", "subtype": "api_retry", "attempt": attempt, "max_retries": retries,
                "retry_delay_ms": 549.5, "error_status": status,
                "error": if status.is_none() { "unknown" } else { error },
            }));
        }
        self.emit(json!({
            "type": "assistant",
            "message": {
                "id": new_uuid(), "model": "<synthetic>", "role": "assistant", "type": "message",
                "stop_reason": "stop_sequence", "stop_sequence": "", "usage": Usage::default().json(),
                "content": [{ "type": "text", "text": text }],
            },
            "parent_tool_use_id": null, "timestamp": timestamp(), "error": error, "is_api_error_message": true,
            "api_error_status": status,
        }));
        Flow::ApiError {
            status,
            error: error.to_owned(),
            text: text.to_owned(),
        }
    }

    fn init(&self) -> Value {
        let source = if std::env::var_os("ANTHROPIC_API_KEY").is_some() {
            "ANTHROPIC_API_KEY"
        } else {
            "none"
        };
        json!({
            "type": "system", "subtype": "init", "cwd": std::env::current_dir().unwrap_or_default(),
            "tools": ["Bash", "Edit", "Read", "Write"], "mcp_servers": [], "model": self.model,
            "permissionMode": self.options.permission_mode, "slash_commands": [], "apiKeySource": source,
            "claude_code_version": VERSION, "output_style": "default", "agents": [], "skills": [], "plugins": [],
            "capabilities": ["interrupt_receipt_v1"],
        })
    }

    fn result(&self, flow: &Flow, begun: Instant, requests: u64) -> Value {
        let mut line = json!({
            "type": "result", "subtype": "success", "is_error": false, "duration_ms": millis(begun),
            "duration_api_ms": 1, "num_turns": requests.max(1), "stop_reason": "end_turn",
            "total_cost_usd": self.total_cost(), "usage": self.usage.json(),
            "modelUsage": self.model_usage(self.before.and(self.usage)),
            "model_usage_since_last_result": self.model_usage(Usage {
                input: self.usage.input - self.usage_at_last_result.input,
                output: self.usage.output - self.usage_at_last_result.output,
            }),
            "permission_denials": [], "terminal_reason": "completed", "queued_turn_count": 0,
            "result_index": self.results, "safety_stops": 0,
        });
        let mut set = |name: &str, value: Value| line[name] = value;
        match flow {
            Flow::GoOn => {
                set("api_error_status", Value::Null);
                match self.script.structured.as_ref().filter(|_| self.options.schema) {
                    Some(value) => {
                        set("result", json!(value.to_string()));
                        set("structured_output", value.clone());
                        set("stop_reason", json!("tool_use"));
                    }
                    None => set("result", json!(self.answer())),
                }
                return line;
            }
            Flow::Interrupted { in_tool } => {
                let text = format!(
                    "[Request interrupted by user{}]",
                    if *in_tool { " for tool use" } else { "" }
                );
                self.emit(json!({
                    "type": "user", "message": { "role": "user", "content": [{ "type": "text", "text": text }] },
                    "parent_tool_use_id": null, "timestamp": timestamp(),
                }));
                set("subtype", json!("error_during_execution"));
                set(
                    "terminal_reason",
                    json!(if *in_tool {
                        "aborted_tools"
                    } else {
                        "aborted_streaming"
                    }),
                );
                set("stop_reason", Value::Null);
                set(
                    "errors",
                    json!(["[ede_diagnostic] result_type=user last_content_type=n/a stop_reason=null"]),
                );
            }
            Flow::Budget => {
                set("subtype", json!("error_max_budget_usd"));
                set("terminal_reason", json!("budget_exhausted"));
                set(
                    "errors",
                    json!([format!(
                        "Reached maximum budget (${})",
                        self.options.max_budget.unwrap_or(0.0)
                    )]),
                );
            }
            Flow::MaxTurns => {
                set("subtype", json!("error_max_turns"));
                set("terminal_reason", json!("max_turns"));
                set("stop_reason", json!("tool_use"));
                set(
                    "errors",
                    json!([format!(
                        "Reached maximum number of turns ({})",
                        self.options.max_turns
                    )]),
                );
            }
            Flow::ApiError { status, text, error } => {
                set("terminal_reason", json!("api_error"));
                set("api_error_status", json!(status));
                set("stop_reason", json!("stop_sequence"));
                set("result", json!(text));
                if error == "rate_limit" && text.starts_with("You've hit") {
                    set("api_error", json!("usage_limit_reached"));
                }
            }
            Flow::Exit(_) => {}
        }
        set("is_error", json!(true));
        line
    }

    fn model_usage(&self, usage: Usage) -> Value {
        if usage.input + usage.output == 0 {
            return json!({});
        }
        json!({ &self.model: {
            "inputTokens": usage.input, "outputTokens": usage.output, "cacheReadInputTokens": 0,
            "cacheCreationInputTokens": 0, "webSearchRequests": 0, "costUSD": self.cost(usage),
            "contextWindow": 1_000_000, "maxOutputTokens": 128_000, "thinkingTokens": 0,
            "canonicalModel": self.model, "provider": "firstParty", "costBasis": "list",
        } })
    }

    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
    fn cost(&self, usage: Usage) -> f64 {
        usage.input as f64 * self.price.0 + usage.output as f64 * self.price.1
    }

    fn total_cost(&self) -> f64 {
        self.cost(self.before.and(self.usage))
    }

    fn stream(&self, id: &str, event: &Value) {
        if self.options.partial {
            self.emit(json!({ "type": "stream_event", "event": event, "parent_tool_use_id": null, "api_message_id": id }));
        }
    }

    /// Writes one line, with what every line has.
    fn emit(&self, mut line: Value) {
        line["session_id"] = json!(self.session);
        if line.get("uuid").is_none() {
            line["uuid"] = json!(new_uuid());
        }
        put(&line.to_string());
    }

    /// Adds a message to the transcript.
    fn remember(&mut self, role: &str, uuid: &str, message: &Value) {
        self.record(&json!({
            "type": role, "message": message, "uuid": uuid, "sessionId": self.session, "timestamp": timestamp(),
            "cwd": std::env::current_dir().unwrap_or_default(), "version": VERSION, "isSidechain": false,
        }));
    }

    /// Adds a line to the transcript; an unwritable home is no error, as in the real one.
    fn record(&self, line: &Value) {
        if let Some(folder) = self.transcript.parent() {
            let _ = fs::create_dir_all(folder);
        }
        if let Ok(mut file) = File::options().create(true).append(true).open(&self.transcript) {
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }

    fn trace(&self, what: &str, at: u64) {
        let Some(tag) = &self.script.trace else { return };
        if let Ok(mut file) = File::options().create(true).append(true).open(trace::FILE) {
            let _ = file.write_all(trace::line(what, tag, &self.session, at).as_bytes());
        }
    }

    fn obey_signals(&self) {
        let deaf = self.script.deaf.contains(&Deaf::Signals);
        for (kind, code) in [
            (SignalKind::terminate(), 143),
            (SignalKind::interrupt(), 0),
            (SignalKind::hangup(), 129),
        ] {
            let mut signals = signal(kind).expect("a signal handler");
            tokio::spawn(async move {
                loop {
                    signals.recv().await;
                    if !deaf {
                        std::process::exit(code);
                    }
                }
            });
        }
    }
}

/// The script of this run, when the script tells the runs of one home apart. Counts the runs in a file.
fn pick_run(script: Script) -> Script {
    if script.runs.is_empty() {
        return script;
    }
    let counter = PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".fake-runs");
    let before = fs::read(&counter).map_or(0, |bytes| bytes.len());
    let _ = fs::write(&counter, "x".repeat(before + 1));
    script.runs[before.min(script.runs.len() - 1)].clone()
}

fn find_transcript(projects: &PathBuf, session: &str) -> Option<PathBuf> {
    fs::read_dir(projects)
        .ok()?
        .flatten()
        .map(|project| project.path().join(format!("{session}.jsonl")))
        .find(|path| path.is_file())
}

/// The text of a message's content: a string, or its text blocks.
fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(blocks) => Some(
            blocks
                .iter()
                .filter_map(|block| block["text"].as_str())
                .collect::<Vec<_>>()
                .join("\n"),
        ),
        _ => None,
    }
}

fn new_uuid() -> String {
    Uuid::new_v4().to_string()
}

fn message_id() -> String {
    format!("msg_fake_{}", Uuid::new_v4().simple())
}

fn millis(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Fixed: nobody reads it, and a clock would make transcripts differ.
fn timestamp() -> &'static str {
    "2026-11-24T21:00:13.441Z"
}

/// One line on standard output. A reader that is gone is no reason to stop, as in the real one.
fn put(line: &str) {
    let mut out = io::stdout().lock();
    let _ = out
        .write_all(line.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush());
}

fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
