//! Receivers of webhooks as users write them: the examples of the documentation, the libraries of others, and the
//! command line.

use std::process::Stdio;

use serde_json::{Value, json};
use tests::client::{Client, PATIENCE};
use tests::database::Db;
use tests::receiver::{Received, Receiver};
use tests::system::{KEYS, command, run};
use tests::{eventually, once, paths};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::mpsc;

use crate::webhooks::{deliveries, endpoint, submit, system};

#[path = "../../examples/webhooks/receiver.rs"]
#[expect(dead_code, reason = "it is a whole program")]
mod example;

once!(
    the_receivers_of_the_documentation_verify,
    libraries_of_others_verify_what_is_sent,
    people_see_deliveries_on_the_command_line,
);

/// A folder of tools, which a script installs.
fn tool(path: &str, script: &str) -> std::path::PathBuf {
    let tool = paths::repository().join(path);
    assert!(tool.is_file(), "run `scripts/{script}` first, or `make test`");
    tool
}

/// The Python of the tests, with the libraries of others.
fn python() -> Command {
    Command::new(tool("tools/python/venv/bin/python", "install-python.sh"))
}

/// Everything that was received verifies with `PyPI`'s `standardwebhooks` and with the SDK of `OpenAI`.
pub(crate) async fn verified_by_others(secret: &str, received: &[Received]) {
    let lines: Vec<String> = received
        .iter()
        .map(|one| json!({ "secret": secret, "headers": one.headers, "body": one.body }).to_string() + "\n")
        .collect();
    let mut verifier = python()
        .arg(paths::repository().join("tools/python/verify.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = verifier.stdin.take().unwrap();
    let text = lines.concat();
    let (written, verified) = tokio::join!(
        async move {
            input.write_all(text.as_bytes()).await?;
            input.shutdown().await
        },
        verifier.wait_with_output()
    );
    written.unwrap();
    let printed = String::from_utf8_lossy(&verified.unwrap().stdout).into_owned();
    assert_eq!(printed, "ok\n".repeat(received.len()));
}

async fn libraries_of_others_verify_what_is_sent() {
    let (system, receiver) = tokio::join!(system(Db::Sqlite).start(), Receiver::start());
    let client = system.client();
    let rotate = async || {
        let rotated = client.post("/api/v1/webhooks/secret/rotate", &json!({})).await;
        rotated.data(200)["secret"].as_str().unwrap().to_owned()
    };
    let (first, second) = (rotate().await, rotate().await);
    let body = json!({ "message": "Grüße, \u{1F980} \"quoted\"", "webhook_url": receiver.url("/") });
    let job = client.accepted_body(&body).await;
    client.finished(&job).await;
    let got = receiver.wait(1, PATIENCE).await;

    // Both sign while the first may still be in use.
    verified_by_others(&first, &got).await;
    verified_by_others(&second, &got).await;
}

/// A receiver that is a program: its address, and what it prints.
struct Program {
    _child: Child,
    url: String,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Program {
    async fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = line(&mut lines).await;
        let url = first.strip_prefix("listening on ").expect(&first).to_owned();
        Self {
            _child: child,
            url,
            lines,
        }
    }
}

async fn line(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
    line.expect("it prints in time")
        .unwrap()
        .expect("it hasn't ended")
}

/// An endpoint's own secret, which a receiver has before there is an endpoint.
fn own_secret(number: usize) -> String {
    [
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
    ][number]
        .to_owned()
}

/// What no one has signed is refused.
async fn refuses_a_forgery(client: &Client, url: &str) {
    let forged = client.without_key();
    let now = shared::clock::now().0 / 1_000_000;
    let request = Client::new(url.trim_end_matches('/'), None)
        .request(http::Method::POST, "/")
        .header("webhook-id", "msg_1")
        .header("webhook-timestamp", now)
        .header(
            "webhook-signature",
            "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        )
        .json(&json!({ "type": "job.completed", "data": { "id": "forged" } }));
    let answer = forged.send(request).await;
    assert_eq!(answer.status, 401, "{url}");
}

async fn the_receivers_of_the_documentation_verify() {
    let examples = paths::repository().join("examples/webhooks");
    let compiled = paths::folder('n');
    let compiling = Command::new(tool("tools/node/node_modules/.bin/tsc", "install-node.sh"))
        .arg("--project")
        .arg(paths::repository().join("tools/node"))
        .arg("--outDir")
        .arg(&compiled)
        .output();
    let (system, compiling) = tokio::join!(system(Db::Sqlite).start(), compiling);
    let compiling = compiling.unwrap();
    assert!(
        compiling.status.success(),
        "{}",
        String::from_utf8_lossy(&compiling.stdout)
    );
    let client = system.client();

    let mut by_python = python();
    by_python
        .arg(examples.join("receiver.py"))
        .env("WEBHOOK_SECRET", own_secret(0));
    let mut by_node = Command::new("node");
    by_node
        .arg(compiled.join("receiver.js"))
        .env("NODE_PATH", paths::repository().join("tools/node/node_modules"))
        .env("WEBHOOK_SECRET", own_secret(0));
    let (mut by_python, mut by_node) = tokio::join!(Program::start(by_python), Program::start(by_node));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let by_rust = format!("http://{}/", listener.local_addr().unwrap());
    let (print, mut printed) = mpsc::unbounded_channel();
    let receiver = example::Receiver::new(&own_secret(0)).unwrap();
    let serving = tokio::spawn(receiver.serve(listener, move |event: &Value| {
        let _ = print.send(example::line(event));
    }));
    for url in [&by_python.url, &by_node.url, &by_rust] {
        let body = json!({ "url": url, "secret": own_secret(0), "event_types": ["job.completed"] });
        endpoint(&client, body).await;
        refuses_a_forgery(&client, url).await;
    }

    let job = client.accepted("hello").await;
    client.finished(&job).await;

    let wanted = format!("job.completed {job} done");
    assert_eq!(line(&mut by_python.lines).await, wanted);
    assert_eq!(line(&mut by_node.lines).await, wanted);
    let by_rust = tokio::time::timeout(PATIENCE, printed.recv()).await;
    assert_eq!(by_rust.unwrap().unwrap(), wanted);
    eventually(PATIENCE, "three successes", async || {
        (deliveries(&client, "status=succeeded").await.len() == 3).then_some(())
    })
    .await;
    serving.abort();
}

async fn people_see_deliveries_on_the_command_line() {
    let system = system(Db::Sqlite).start().await;
    let client = system.client();
    let env = [
        ("CLAUDE_QUEUE_URL", client.base()),
        ("CLAUDE_QUEUE_API_KEY", KEYS[0]),
    ];
    let ask = async |arguments: &[&str]| {
        let mut all = vec!["webhooks"];
        all.extend(arguments);
        let finished = run("claude-queue", &all, &env).await;
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        finished.stdout
    };
    let secret = ask(&["secret"]).await;
    let secret = secret
        .split_whitespace()
        .find(|word| word.starts_with("whsec_"))
        .unwrap();
    let listening = command("claude-queue", &["webhooks", "listen", "--secret", secret], &[]);
    let mut listening = Program::start(listening).await;
    refuses_a_forgery(&client, &listening.url).await;

    let job = submit(&client, &listening.url).await;
    client.finished(&job).await;

    let printed = line(&mut listening.lines).await;
    assert!(printed.starts_with("msg_") && printed.contains(&job), "{printed}");
    eventually(PATIENCE, "a success", async || {
        (deliveries(&client, "status=succeeded").await.len() == 1).then_some(())
    })
    .await;
    let listed = ask(&["deliveries", "--job", &job]).await;
    assert!(listed.contains("succeeded"), "{listed}");
    let id = deliveries(&client, "").await[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let shown = ask(&["deliveries", &id]).await;
    assert!(shown.contains(&id) && shown.contains("204"), "{shown}");
    ask(&["resend", &id]).await;
    assert_eq!(line(&mut listening.lines).await, printed, "the same id");

    let made = ask(&[
        "endpoints",
        "--create",
        "https://example.com/hook",
        "--events",
        "job.failed",
    ])
    .await;
    assert!(made.contains("whsec_"), "{made}");
    let listed = ask(&["endpoints"]).await;
    assert!(
        listed.contains("https://example.com/hook") && !listed.contains("whsec_"),
        "{listed}"
    );
}
