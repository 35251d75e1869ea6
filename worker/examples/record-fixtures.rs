//! Records the transcripts in `worker/src/claude/fixtures`: the real CLI, with the arguments and the environment that
//! the worker gives it, against the simulator of the Messages API, each in a home and a workspace of its own.
//!
//! ```text
//! cargo run -p worker --example record-fixtures -- [NAME…]      all of them without a name
//! ```
//!
//! The CLI is the pinned one in `tools/claude`. Nothing leaves the machine. A line is kept as it came, except that
//! this machine's paths, addresses and process ids are replaced.

use serde_json::{Map, Value, json};
use shared::money::MicroUsd;
use simulator::{Scenario, Simulator, Step, Tool, Usage};
use std::error::Error;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use worker::claude::command::{self, CliPaths, RunSpec};
use worker::claude::message::{Block, Message};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The longest that one recording may take.
const LONGEST: Duration = Duration::from_mins(2);

/// One transcript.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// What it shows.
    about: &'static str,
    scenario: &'static str,
    /// The name and value of the credential that the CLI is given.
    credential: (&'static str, &'static str),
    act: Act,
    /// Changes the run.
    run: fn(&mut RunSpec),
    /// Variables beside the worker's own; an empty value removes one.
    env: &'static [(&'static str, &'static str)],
}

/// What is done with the CLI.
#[derive(Clone, Copy)]
enum Act {
    /// It is told the prompt, and its stdin is closed after the result.
    Prompt,
    /// The same, as the second run of a session; the cost so far is asked for before the prompt.
    Resume,
    /// It is asked for its cost and then interrupted.
    Interrupt(Moment),
    /// It is sent a signal.
    Signal(Moment, rustix::process::Signal),
    /// This line is written instead of the prompt.
    Line(&'static str),
}

/// When.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    /// The answer has begun to stream.
    Streaming,
    /// A tool runs.
    Tool,
}

const KEY: (&str, &str) = ("ANTHROPIC_API_KEY", "sk-ant-made-up");
const TOKEN: (&str, &str) = ("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-made-up");

const fn case(name: &'static str, scenario: &'static str, about: &'static str) -> Case {
    Case {
        name,
        about,
        scenario,
        credential: KEY,
        act: Act::Prompt,
        run: |_| {},
        env: &[],
    }
}

const fn acted(act: Act, case: Case) -> Case {
    Case { act, ..case }
}

const fn changed(run: fn(&mut RunSpec), case: Case) -> Case {
    Case { run, ..case }
}

const fn with_token(case: Case) -> Case {
    Case {
        credential: TOKEN,
        ..case
    }
}

const fn with_env(env: &'static [(&'static str, &'static str)], case: Case) -> Case {
    Case { env, ..case }
}

fn cases() -> Vec<Case> {
    use rustix::process::Signal;
    let schema: fn(&mut RunSpec) = |run| {
        run.json_schema = Some(json!({
            "type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]
        }));
    };
    vec![
        case("text", "default", "a plain answer"),
        case("thinking", "thinking", "an answer after thinking"),
        case("write", "write", "the Write tool makes a file in the workspace"),
        case(
            "write-outside",
            "write-outside",
            "the Write tool is denied outside the workspace; still a success",
        ),
        case("bash", "bash", "the Bash tool runs a command"),
        changed(
            |run| run.allowed_tools.clear(),
            case(
                "bash-denied",
                "curl",
                "a command that isn't allowed is denied; still a success",
            ),
        ),
        case(
            "bash-fails",
            "bash-fails",
            "a command exits with 3; still a success",
        ),
        case("parallel", "parallel", "two tool calls in one answer"),
        case(
            "subagent",
            "subagent",
            "a subagent runs inside its tool call; one result, cost of both",
        ),
        changed(
            |run| "/usage".clone_into(&mut run.prompt),
            case("slash", "default", "a prompt that begins with a slash"),
        ),
        acted(
            Act::Resume,
            case(
                "resume",
                "default",
                "the second run of a session: the CLI's sums include the first",
            ),
        ),
        case("e400", "e400", "an invalid request"),
        case("e400-credit", "e400-credit", "no credit left"),
        case(
            "e400-organization",
            "e400-organization",
            "a disabled organization",
        ),
        case("e400-too-long", "e400-too-long", "a prompt that is too long"),
        case("e401", "e401", "a wrong key"),
        with_token(case("e401-token", "e401", "a wrong token")),
        case("e402", "e402", "a billing error"),
        case("e403", "e403", "no permission"),
        with_token(case("e403-revoked", "e403-revoked", "a revoked login")),
        case("e404", "e404", "a model that doesn't exist"),
        case("e408", "e408", "a timeout at the API"),
        case("e409", "e409", "a conflict at the API"),
        case("e413", "e413", "a request that is too large"),
        case("e429", "e429", "limited, with a short retry-after"),
        case(
            "e429-long",
            "e429-long",
            "limited for an hour, which the transcript doesn't say",
        ),
        case("e429-once", "e429-once", "limited once, then an answer"),
        case("e429-plain", "e429-plain", "limited, without a time"),
        with_token(case(
            "e429-token",
            "e429-plain",
            "limited, with a token: rejected, but no usage limit",
        )),
        with_token(case(
            "usage-limit",
            "usage-limit-fixed",
            "the five-hour limit of a subscription",
        )),
        with_token(case(
            "usage-limit-week",
            "usage-limit-week-fixed",
            "the weekly limit of a subscription",
        )),
        with_token(case(
            "usage-warning",
            "usage-warning",
            "nine tenths of a limit are used; an answer",
        )),
        case("e500", "e500", "a server error"),
        case(
            "e500-final",
            "e500-final",
            "a server error that isn't to be tried again",
        ),
        case("e500-once", "e500-once", "a server error once, then an answer"),
        case("e502", "e502", "a proxy's error page"),
        case("e503", "e503", "unavailable"),
        case("e504", "e504", "a gateway timeout"),
        case("e529", "e529", "overloaded"),
        case("e529-twice", "e529-twice", "overloaded twice, then an answer"),
        case("html", "html", "200 with a web page"),
        case(
            "stream-error",
            "stream-error",
            "overloaded in the middle of a stream; the CLI asks again without one",
        ),
        case(
            "reset-once",
            "reset-once",
            "a connection reset once, then an answer",
        ),
        with_env(
            &[("CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK", "1")],
            case("reset", "reset", "a connection that is always reset"),
        ),
        with_env(
            &[("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")],
            case("refused", "default", "connection refused"),
        ),
        with_env(
            &[("ANTHROPIC_UNIX_SOCKET", "/workspace/none.sock")],
            case("no-socket", "default", "the gateway's socket is gone"),
        ),
        with_env(
            &[("API_TIMEOUT_MS", "1500")],
            case("no-answer", "no-answer", "a server that says nothing at all"),
        ),
        with_env(
            &[("ANTHROPIC_API_KEY", "")],
            case("no-login", "default", "no credential"),
        ),
        case("refusal", "refusal", "the model refuses"),
        case(
            "max-tokens",
            "max-tokens",
            "an answer longer than the model may write",
        ),
        changed(
            |run| run.max_turns = Some(2),
            case("max-turns", "forever", "no turn left"),
        ),
        changed(
            |run| run.max_cost = MicroUsd(500_000),
            case("max-cost", "costly", "the cap on cost is reached"),
        ),
        changed(
            |run| run.max_cost = MicroUsd(100_000),
            case(
                "max-cost-text",
                "costly-text",
                "the cap is broken by a whole answer, which is paid",
            ),
        ),
        changed(schema, case("structured", "structured", "the schema is filled")),
        changed(
            schema,
            case(
                "structured-bad",
                "structured-bad",
                "the schema is never filled rightly",
            ),
        ),
        changed(
            schema,
            case(
                "structured-never",
                "structured-never",
                "the schema is ignored; a success to the CLI",
            ),
        ),
        changed(
            |run| run.json_schema = Some(json!({"type": "nonsense"})),
            case(
                "structured-invalid",
                "default",
                "a schema that isn't one: stderr only",
            ),
        ),
        changed(
            |run| run.resume = Some(Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef)),
            case("resume-unknown", "default", "a session that isn't there"),
        ),
        acted(
            Act::Interrupt(Moment::Streaming),
            case("interrupt-streaming", "endless", "interrupted in an answer"),
        ),
        acted(
            Act::Interrupt(Moment::Tool),
            case("interrupt-tool", "nap", "interrupted while a tool runs"),
        ),
        acted(
            Act::Signal(Moment::Streaming, Signal::INT),
            case(
                "sigint-streaming",
                "endless",
                "SIGINT in an answer: a result, and exit code 0",
            ),
        ),
        acted(
            Act::Signal(Moment::Streaming, Signal::TERM),
            case("sigterm-streaming", "endless", "SIGTERM in an answer: no result"),
        ),
        acted(
            Act::Signal(Moment::Tool, Signal::TERM),
            case("sigterm-tool", "nap", "SIGTERM while a tool runs: no result"),
        ),
        acted(
            Act::Signal(Moment::Streaming, Signal::KILL),
            case("sigkill-streaming", "endless", "SIGKILL in an answer: no result"),
        ),
        acted(
            Act::Signal(Moment::Tool, Signal::KILL),
            case("sigkill-tool", "nap", "SIGKILL while a tool runs: no result"),
        ),
        acted(
            Act::Line(r#"{"type":"user","message":{"role":"user","content":5}}"#),
            case(
                "empty",
                "default",
                "a message that the CLI ignores: no output at all, and exit code 0",
            ),
        ),
        acted(
            Act::Line("no JSON"),
            case(
                "garbage-in",
                "default",
                "a line that the CLI doesn't understand: stderr only",
            ),
        ),
    ]
    .into_iter()
    .chain(costs().into_iter().map(|cost| cost.case))
    .collect()
}

/// A transcript that shows what a run costs: an answer for each usage, all but the last with a call of a tool.
struct Cost {
    case: Case,
    usages: Vec<Usage>,
}

fn cost(name: &'static str, about: &'static str, run: fn(&mut RunSpec), usages: Vec<Usage>) -> Cost {
    Cost {
        case: changed(run, case(name, name, about)),
        usages,
    }
}

fn costs() -> Vec<Cost> {
    let mixed = Usage {
        input_tokens: 1_234,
        output_tokens: 567,
        cache_creation_input_tokens: 4_321,
        cache_read_input_tokens: 9_876,
        ..Usage::default()
    };
    let hour = Usage {
        cache_creation_1h_input_tokens: 3_001,
        ..mixed
    };
    let prompt = |input_tokens, cache_creation_input_tokens, cache_read_input_tokens| Usage {
        input_tokens,
        output_tokens: 777,
        cache_creation_input_tokens,
        cache_read_input_tokens,
        ..Usage::default()
    };
    let searched = Usage {
        web_search_requests: 3,
        ..mixed
    };
    let fast = Usage { fast: true, ..hour };
    let us = Usage {
        us_only: true,
        ..hour
    };
    let opus: fn(&mut RunSpec) = |run| "opus".clone_into(&mut run.model);
    let haiku: fn(&mut RunSpec) = |run| "haiku".clone_into(&mut run.model);
    let same: fn(&mut RunSpec) = |_| {};
    vec![
        cost("cost-opus", "a cache is written and read", opus, vec![mixed]),
        cost("cost-opus-hour", "both kinds of cache write", opus, vec![hour]),
        cost(
            "cost-haiku-edge",
            "a prompt that is just not long",
            haiku,
            vec![prompt(40_000, 30_000, 30_000)],
        ),
        cost(
            "cost-haiku-long",
            "a long prompt, of which caches hold the most",
            haiku,
            vec![prompt(1, 50_000, 50_000)],
        ),
        cost(
            "cost-haiku-both",
            "a short, a long and a short prompt",
            haiku,
            vec![prompt(5_000, 0, 0), prompt(150_000, 0, 0), prompt(7, 100, 99_000)],
        ),
        cost(
            "cost-fable",
            "the dearest of today",
            |run| "fable".clone_into(&mut run.model),
            vec![hour],
        ),
        cost(
            "cost-opus-4-8",
            "an older model",
            |run| "claude-opus-4-8".clone_into(&mut run.model),
            vec![mixed],
        ),
        cost(
            "cost-sonnet-4-5",
            "a model by its dated id",
            |run| "claude-sonnet-4-5-20250929".clone_into(&mut run.model),
            vec![mixed],
        ),
        cost(
            "cost-haiku-4-5",
            "a model without a tier for long prompts",
            |run| "claude-haiku-4-5".clone_into(&mut run.model),
            vec![prompt(150_000, 0, 0)],
        ),
        cost(
            "cost-sonnet-1m",
            "a larger context window",
            |run| "sonnet[1m]".clone_into(&mut run.model),
            vec![prompt(250_000, 1_000, 0)],
        ),
        cost("cost-search", "searches of the web", same, vec![searched]),
        cost("cost-fast", "fast mode", opus, vec![fast]),
        cost("cost-us", "in the United States", opus, vec![us]),
        cost(
            "cost-fast-us",
            "fast mode in the United States, with searches",
            opus,
            vec![Usage {
                us_only: true,
                web_search_requests: 1,
                ..fast
            }],
        ),
        cost(
            "cost-many",
            "five requests that differ",
            same,
            vec![mixed, hour, searched, us, prompt(3, 0, 200_000)],
        ),
    ]
}

/// What the simulator doesn't play by itself.
fn put_scenarios(simulator: &Simulator) {
    let bash = |command: &str| Scenario {
        steps: vec![
            Step {
                tools: vec![Tool {
                    name: "Bash".to_owned(),
                    input: json!({"command": command}),
                    raw_input: None,
                }],
                ..Step::default()
            },
            Step {
                text: Some("That was it.".to_owned()),
                ..Step::default()
            },
        ],
        ..Scenario::default()
    };
    // Short, because a killed CLI leaves it behind.
    for cost in costs() {
        let count = cost.usages.len();
        let steps = cost.usages.into_iter().enumerate().map(|(number, usage)| Step {
            usage,
            ..if number + 1 < count {
                bash("true").steps.swap_remove(0)
            } else {
                Step::default()
            }
        });
        let scenario = Scenario {
            steps: steps.collect(),
            ..Scenario::default()
        };
        simulator.put_scenario(cost.case.name, scenario);
    }
    simulator.put_scenario("nap", bash("true; sleep 6"));
    simulator.put_scenario("curl", bash("curl --version"));
    // A reset time that is the same in each recording, so that the tests can name it.
    for (name, base, reset) in [
        ("usage-limit-fixed", "usage-limit", "1900000000"),
        ("usage-limit-week-fixed", "usage-limit-week", "1900300000"),
    ] {
        let mut scenario = simulator::builtin().remove(base).expect("the simulator has it");
        for value in scenario
            .steps
            .iter_mut()
            .flat_map(|step| step.headers.values_mut())
        {
            if value.starts_with("$NOW") {
                reset.clone_into(value);
            }
        }
        simulator.put_scenario(name, scenario);
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let claude = root
        .join("../tools/claude/node_modules/.bin/claude")
        .canonicalize()?;
    let fixtures = root.join("src/claude/fixtures");
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let simulator = Simulator::start(([127, 0, 0, 1], 0).into()).await?;
    put_scenarios(&simulator);

    let index_file = fixtures.join("index.json");
    let mut index: Map<String, Value> = std::fs::read(&index_file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    for case in cases() {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == case.name) {
            continue;
        }
        let (lines, entry) = timeout(LONGEST, record(&case, &claude, &simulator)).await??;
        report(&case, &entry);
        std::fs::write(fixtures.join(format!("{}.ndjson", case.name)), lines)?;
        index.insert(case.name.to_owned(), entry);
        std::fs::write(&index_file, serde_json::to_string_pretty(&index)? + "\n")?;
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "says how far it is")]
fn report(case: &Case, entry: &Value) {
    println!(
        "{}: exit {}, signal {}",
        case.name, entry["exit"], entry["signal"]
    );
}

/// Runs the CLI once, or twice to resume; gives the transcript of the last run and its entry in the index.
async fn record(case: &Case, claude: &Path, simulator: &Simulator) -> Outcome<(String, Value)> {
    let place = tempfile::tempdir()?;
    let paths = CliPaths {
        home: place.path().join("home"),
        tmp: place.path().join("tmp"),
        gateway_socket: place.path().join("api.sock"),
    };
    let workspace = place.path().join("workspace");
    for folder in [&paths.home, &paths.tmp, &workspace] {
        std::fs::create_dir(folder)?;
    }
    let mut spec = RunSpec {
        claude_session_id: Uuid::new_v4(),
        resume: None,
        message_id: Uuid::new_v4(),
        model: "sonnet".to_owned(),
        effort: None,
        permission_mode: "acceptEdits".to_owned(),
        max_turns: None,
        max_cost: MicroUsd(5_000_000),
        system_prompt_file: None,
        json_schema: None,
        no_tools: false,
        allowed_tools: vec!["Bash".to_owned(), "WebSearch".to_owned()],
        disallowed_tools: Vec::new(),
        prompt: "Do what the scenario says.".to_owned(),
    };
    (case.run)(&mut spec);
    let start = |spec: &RunSpec| {
        #[expect(
            clippy::disallowed_methods,
            reason = "a tool for developers, without guard and sandbox"
        )]
        let mut cli = Command::new(claude);
        let base_url = simulator.url_of(case.scenario, case.name);
        let mut env = command::environment(&paths, case.credential, "recording");
        // There is no gateway here: the CLI speaks to the simulator itself.
        env.retain(|(name, _)| name != "ANTHROPIC_UNIX_SOCKET");
        env.push(("ANTHROPIC_BASE_URL".to_owned(), base_url));
        cli.env_clear().envs(env);
        for (name, value) in case.env {
            if value.is_empty() {
                cli.env_remove(name)
            } else {
                cli.env(name, value)
            };
        }
        cli.args(command::arguments(spec))
            .current_dir(&workspace)
            .kill_on_drop(true);
        cli.stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };

    if matches!(case.act, Act::Resume) {
        run(start(&spec)?, &spec, Act::Prompt).await?;
        spec.resume = Some(spec.claude_session_id);
        spec.claude_session_id = Uuid::new_v4();
        spec.message_id = Uuid::new_v4();
    }
    let (stdout, stderr, status) = run(start(&spec)?, &spec, case.act).await?;

    let clean = |text: String| neutral(text, place.path(), simulator);
    let entry = json!({
        "about": case.about,
        "scenario": case.scenario,
        "schema": spec.json_schema.is_some(),
        "resumes": spec.resume.is_some(),
        "exit": status.code(),
        "signal": std::os::unix::process::ExitStatusExt::signal(&status),
        "stderr": clean(stderr),
    });
    Ok((clean(stdout), entry))
}

/// One process, to its end: stdout, stderr, status.
async fn run(mut cli: Child, spec: &RunSpec, act: Act) -> Outcome<(String, String, ExitStatus)> {
    let mut stdin = cli.stdin.take();
    let mut stderr = cli.stderr.take().expect("it is piped");
    let mut lines = BufReader::new(cli.stdout.take().expect("it is piped")).lines();
    let mut stdout = String::new();

    if matches!(act, Act::Resume) {
        write(&mut stdin, &command::usage_line("before")).await?;
    }
    if let Act::Line(line) = act {
        write(&mut stdin, &format!("{line}\n")).await?;
        stdin = None;
    } else {
        write(&mut stdin, &command::user_line(spec)).await?;
    }
    let mut acted = false;
    while let Some(line) = lines.next_line().await? {
        stdout.push_str(&line);
        stdout.push('\n');
        let message = Message::parse(line.as_bytes());
        if matches!(message, Message::Result(_)) {
            stdin = None;
        }
        let (Act::Interrupt(moment) | Act::Signal(moment, _)) = act else {
            continue;
        };
        if acted || moment_of(&message, &line) != Some(moment) {
            continue;
        }
        acted = true;
        if moment == Moment::Tool {
            // The call is announced a little before the tool runs.
            sleep(Duration::from_millis(1500)).await;
        }
        match act {
            Act::Interrupt(_) => {
                write(&mut stdin, &command::usage_line("so-far")).await?;
                write(&mut stdin, &command::interrupt_line("stop")).await?;
            }
            Act::Signal(_, signal) => {
                let pid = cli
                    .id()
                    .and_then(|id| i32::try_from(id).ok())
                    .and_then(rustix::process::Pid::from_raw);
                rustix::process::kill_process(pid.ok_or("it has ended already")?, signal)?;
            }
            Act::Prompt | Act::Resume | Act::Line(_) => {}
        }
    }
    drop(stdin);
    let mut said = String::new();
    stderr.read_to_string(&mut said).await?;
    Ok((stdout, said, cli.wait().await?))
}

fn moment_of(message: &Message, line: &str) -> Option<Moment> {
    match message {
        Message::Other if line.contains(r#""text_delta""#) => Some(Moment::Streaming),
        Message::Assistant(answer)
            if answer
                .blocks
                .iter()
                .any(|block| matches!(block, Block::ToolUse { .. })) =>
        {
            Some(Moment::Tool)
        }
        _ => None,
    }
}

async fn write(stdin: &mut Option<ChildStdin>, line: &str) -> Outcome<()> {
    if let Some(stdin) = stdin {
        stdin.write_all(line.as_bytes()).await?;
        stdin.flush().await?;
    }
    Ok(())
}

/// The places of a run in the sandbox instead of this machine's.
fn neutral(text: String, place: &Path, simulator: &Simulator) -> String {
    let place = place.to_string_lossy();
    let address = simulator.url();
    let host = address.trim_start_matches("http://");
    // The CLI writes a path as one word in some places.
    let slug: String = place
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let replaced = [
        (format!("{place}/workspace"), "/workspace"),
        (format!("{place}/home"), "/home/agent"),
        (format!("{place}/tmp"), "/tmp"),
        (place.into_owned(), "/run"),
        (format!("{slug}-workspace"), "-workspace"),
        (host.to_owned(), "gateway"),
    ];
    let text = replaced
        .into_iter()
        .fold(text, |text, (from, to)| text.replace(&from, to));
    without_pid(&text)
}

/// `/tmp/cc-socks/12345.sock` → `/tmp/cc-socks/1.sock`
fn without_pid(text: &str) -> String {
    let mut parts = text.split("/cc-socks/");
    let mut clean = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        clean.push_str("/cc-socks/1");
        clean.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    clean
}
