//! `make bench`: what the gateway of a run costs in time and processor, beside requests that go straight to the
//! simulator, and what is billed beyond a cap.
//!
//! The gateway runs in a child of this program, so that its processor time is known. Client and simulator share the
//! machine with it. Run it in the release profile; every part ends by itself. `passing` and `caps` name a part alone.

#![expect(clippy::print_stdout, reason = "the tables are the point")]
#![expect(clippy::cast_precision_loss, reason = "counts and times far below 2^53")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shared::money::MicroUsd;
use simulator::{Scenario, Simulator, Step as Turn};
use tests::client::at_once;
use tests::paths;
use tests::script::{Step, steps};
use tests::system::System;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use worker::config::{Address, Anthropic};
use worker::gateway::credentials::Credentials;
use worker::gateway::request::Permissions;
use worker::gateway::{Gateway, Upstream};
use worker::spend::Meter;

const TOKEN: &str = "bench-0123456789";

/// Requests of each kind and way.
const REQUESTS: usize = 300;
/// Answers that are streamed to measure the processor's time.
const ANSWERS: usize = 20;
/// Runs with a cap, and the cap in dollars.
const RUNS: usize = 50;
const CAP: f64 = 0.10;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--gateway", socket, url] => runtime.block_on(serve(Path::new(socket), url)),
        parts => runtime.block_on(async {
            let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
            println!("Load of the machine at the start: {}\n", load());
            if wanted("passing") {
                passing().await;
            }
            if wanted("caps") {
                caps().await;
            }
            println!("\nLoad of the machine at the end: {}", load());
        }),
    }
}

/// One, five and fifteen minutes.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// The child: a gateway until its standard input ends.
async fn serve(socket: &Path, url: &str) {
    let settings = Anthropic {
        api_key: Some("sim-default".to_owned()),
        ..Anthropic::default()
    };
    let credentials = Credentials::find(&settings, "/nonexistent".as_ref()).expect("a key");
    let upstream = Upstream::new(&Address::parse(url).expect("an address")).expect("a client");
    let gateway =
        Gateway::start(socket, Arc::new(credentials), TOKEN, &upstream, Arc::default()).expect("a socket");
    let meter = Arc::new(Meter::new(Arc::default(), MicroUsd(i64::MAX / 2_000)));
    gateway.arm(meter, Permissions::default());
    println!("ready");
    let until_its_end = || std::io::stdin().read_to_end(&mut Vec::new());
    let _ = tokio::task::spawn_blocking(until_its_end).await;
}

/// A gateway in a process of its own.
struct Served {
    child: Child,
    socket: std::path::PathBuf,
}

impl Served {
    fn start(url: &str) -> Self {
        let socket = paths::folder('b').join("gateway.sock");
        let program = std::env::current_exe().expect("this program");
        let mut child = Command::new(program)
            .arg("--gateway")
            .arg(&socket)
            .arg(url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("it is ready");
        Self { child, socket }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).await.expect("it listens")
    }

    /// Milliseconds of processor time so far.
    fn processor(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let ticks = |at: usize| {
            fields
                .get(at)
                .and_then(|text| text.parse::<f64>().ok())
                .unwrap_or(0.0)
        };
        // A hundred ticks a second, on every Linux.
        (ticks(11) + ticks(12)) * 10.0
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn request(scenario: &str, bytes: usize) -> String {
    let body = json!({
        "model": "claude-opus-5-5", "max_tokens": 32_000, "stream": true,
        "messages": [{ "role": "user", "content": format!("[[scenario:{scenario}]] {}", "x".repeat(bytes)) }],
        "tools": [{ "name": "Bash", "input_schema": {} }],
    });
    let body = body.to_string();
    format!(
        "POST /v1/messages?beta=true HTTP/1.1\r\nhost: gateway\r\nx-api-key: {TOKEN}\r\nanthropic-version: 2023-06-01\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends a request, and gives the milliseconds to the first event and the bytes of the answer.
async fn ask(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &str) -> (f64, usize) {
    let began = Instant::now();
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let (mut first, mut bytes) = (None, 0);
    let mut end: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = stream.read(&mut buffer).await.expect("it answers");
        assert_ne!(read, 0, "the answer ended early");
        bytes += read;
        let piece = &buffer[..read];
        if first.is_none() && piece.windows(13).any(|part| part == b"message_start") {
            first = Some(began.elapsed());
        }
        end.extend_from_slice(&piece[read.saturating_sub(5)..]);
        end.drain(..end.len().saturating_sub(5));
        if end == b"0\r\n\r\n" {
            return (first.expect("it has a beginning").as_secs_f64() * 1e3, bytes);
        }
    }
}

fn long_answer() -> Scenario {
    Scenario {
        steps: vec![Turn {
            text: Some("Ten words of an answer, as a model writes them. ".repeat(20_000)),
            chunks: 40_000,
            ..Turn::default()
        }],
        ..Scenario::default()
    }
}

async fn passing() {
    let simulator = Simulator::start(([127, 0, 0, 1], 0).into())
        .await
        .expect("the simulator starts");
    simulator.put_scenario("long", long_answer());
    let gateway = Served::start(&simulator.url());
    let address = simulator.url().trim_start_matches("http://").to_owned();

    println!("# Time to the first byte of an answer, ms ({REQUESTS} requests each way, in turn)\n");
    println!("| request | straight p50 / p99 | through the gateway p50 / p99 | difference p50 |");
    println!("|---|---|---|---|");
    for (name, bytes) in [("1 KB", 1_000), ("150 KB", 150_000), ("2 MB", 2_000_000)] {
        let request = request("default", bytes);
        let (mut straight, mut through) = (Vec::new(), Vec::new());
        let mut direct = TcpStream::connect(&address).await.expect("it listens");
        direct.set_nodelay(true).expect("a TCP connection");
        let mut way = gateway.connect().await;
        for number in 0..REQUESTS + 20 {
            let (one, _) = ask(&mut direct, &request).await;
            let (other, _) = ask(&mut way, &request).await;
            // The first ones open connections and warm up.
            if number >= 20 {
                straight.push(one);
                through.push(other);
            }
        }
        let (a, b) = (percentile(&mut straight, 50), percentile(&mut through, 50));
        println!(
            "| {name} | {a:.2} / {:.2} | {b:.2} / {:.2} | {:+.2} |",
            percentile(&mut straight, 99),
            percentile(&mut through, 99),
            b - a
        );
    }

    let request = request("long", 1_000);
    let mut way = gateway.connect().await;
    ask(&mut way, &request).await;
    let (before, began) = (gateway.processor(), Instant::now());
    let mut bytes = 0;
    for _ in 0..ANSWERS {
        bytes += ask(&mut way, &request).await.1;
    }
    let megabytes = bytes as f64 / 1e6;
    let spent = gateway.processor() - before;
    println!(
        "\nProcessor time of the gateway: {:.1} ms per MB streamed, {:.1} µs an event ({megabytes:.0} MB in {} answers of \
         40,000 events, {:.0} MB/s)",
        spent / megabytes,
        spent * 1e3 / (ANSWERS as f64 * 40_000.0),
        ANSWERS,
        megabytes / began.elapsed().as_secs_f64()
    );
}

fn direct(tokens: u64, count: usize, at_once: usize) -> Step {
    Step::Direct {
        model: "claude-opus-5-5".to_owned(),
        tokens: (0, tokens),
        count,
        at_once,
    }
}

/// What a job has cost, and whether it ended as it should.
fn cost(job: &Value) -> f64 {
    assert_eq!(job["error_code"], "max_cost", "{job:#}");
    job["cost"].as_f64().expect("an amount")
}

async fn caps() {
    println!("\n# What is billed beyond a cap of ${CAP:.2}\n");
    println!(
        "| a run's requests | runs | most beyond, $ | mean beyond, $ | an answer, $ | simulator billed beside the ledger, $ |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, tokens, at_once_each) in [
        ("one at a time", 3_500, 1),
        ("8 at once", 700, 8),
        ("16 at once", 3_500, 16),
    ] {
        let system = System::builder()
            .sandbox(false)
            .env("LOG_LEVEL", "error")
            .env("WORKER_CONCURRENCY", "4")
            .env("CLAUDE_MAX_COST_PER_USER", "1000")
            .env("RATE_LIMIT_REQUESTS", "1000")
            .start()
            .await;
        let client = system.client();
        let prompt = steps([direct(tokens, 60, at_once_each)]).prompt();
        let ids = at_once((0..RUNS).map(|_| async {
            client
                .accepted_body(&json!({ "message": prompt, "max_cost_usd": CAP }))
                .await
        }))
        .await;
        let mut beyond = Vec::new();
        let mut ledger = 0.0;
        for id in &ids {
            let cost = cost(&client.finished(id).await);
            ledger += cost;
            beyond.push(cost - CAP);
        }
        println!(
            "| {name} | {RUNS} | {:.4} | {:.4} | {:.4} | {:+.4} |",
            beyond.iter().copied().fold(f64::MIN, f64::max),
            beyond.iter().sum::<f64>() / beyond.len() as f64,
            tokens as f64 * 20e-6,
            system.simulator().spent() - ledger
        );
    }

    let system = System::builder()
        .sandbox(false)
        .env("LOG_LEVEL", "error")
        .start()
        .await;
    let client = system.client();
    let flood = Step::DirectFor {
        model: "claude-opus-5-5".to_owned(),
        tokens: (0, 700),
        at_once: 16,
        seconds: 10,
    };
    let began = Instant::now();
    let id = client
        .accepted_body(&json!({ "message": steps([flood]).prompt(), "max_cost_usd": CAP }))
        .await;
    let job = client.finished(&id).await;
    let answers =
        std::fs::read_to_string(system.workspace(&id).join(tests::script::REQUESTS)).unwrap_or_default();
    let of = |start: &str| answers.lines().filter(|line| line.starts_with(start)).count();
    println!(
        "\n16 direct requests at once for 10 s against a cap of ${CAP:.2}: ${:.4} billed by the simulator, ${:.4} in the \
         ledger; {} served, {} refused, {} others, in {:.1} s",
        system.simulator().spent(),
        cost(&job),
        of("200"),
        of("402"),
        answers.lines().count() - of("200") - of("402"),
        began.elapsed().as_secs_f64()
    );
    assert!(began.elapsed() > Duration::from_secs(10));
}

/// The value below which so many percent lie.
fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * percent / 100).min(values.len() - 1)]
}
