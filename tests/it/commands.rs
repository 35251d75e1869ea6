//! What people type: the demo, the service, its client, and the tools beside them.

use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::client::{Client, PATIENCE};
use tests::database::{Database, Db};
use tests::script::{Step, answer, steps, until_told};
use tests::system::{Finished, KEYS, System, command, real_claude, real_cli_permit, run};
use tests::{eventually, once, paths, processes};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader, Lines, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

once!(
    the_demo_runs_a_job_and_leaves_nothing,
    the_demo_without_the_sandbox_claims_neither_it_nor_bash,
    the_doctor_connects_to_the_database,
    a_job_is_submitted_followed_and_cancelled_on_the_command_line,
    a_refusal_is_told_in_a_sentence,
    who_follows_a_job_outlives_a_restart_of_the_service,
    a_service_that_can_not_start_claims_nothing,
    the_key_is_not_written_into_a_file,
    the_doctor_says_what_is_missing,
    the_simulator_answers_until_it_is_told_to_stop,
);

const CLAUDE_QUEUE: &str = "claude-queue";

async fn the_demo_runs_a_job_and_leaves_nothing() {
    let folder = paths::folder('d');
    let folder_name = folder.to_str().unwrap();
    let claude = real_claude();
    let _permit = real_cli_permit().await;
    let env = [
        ("TMPDIR", folder_name),
        ("XDG_RUNTIME_DIR", folder_name),
        (paths::MARKER, folder_name),
        ("CLAUDE_CLI_PATH", claude.to_str().unwrap()),
        // The demo's own simulator is asked, whatever else is set.
        ("ANTHROPIC_API_KEY", "sk-not-to-be-used"),
        ("ANTHROPIC_BASE_URL", "http://127.0.0.1:9"),
    ];

    let finished = run(CLAUDE_QUEUE, &["demo"], &env).await;

    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let told = &finished.stdout;
    let mut rest = told.as_str();
    for word in [
        "simulator ",
        "listening ",
        "POST ",
        "accepted   job_",
        "queued",
        "running",
        "Write ",
        "Bash ",
        "done ",
        "no process is left",
        "Result",
        "I wrote hello.sh",
        "hello.sh, as the job left it",
        "#!/bin/sh",
        "Ledger",
        "attempt 1",
        "tokens in",
        "answers came from a simulator on this machine: no account was used and nothing was paid",
    ] {
        let Some(at) = rest.find(word) else {
            panic!("{word:?} is missing, or out of order:\n{told}")
        };
        rest = &rest[at + word.len()..];
    }
    assert!(told.contains("cost       $"), "{told}");
    assert_eq!(processes::of_folder(&folder), []);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "a file is left");
}

async fn the_demo_without_the_sandbox_claims_neither_it_nor_bash() {
    let folder = paths::folder('d');
    let folder_name = folder.to_str().unwrap();
    let claude = real_claude();
    let _permit = real_cli_permit().await;
    let env = [
        ("TMPDIR", folder_name),
        ("XDG_RUNTIME_DIR", folder_name),
        (paths::MARKER, folder_name),
        ("CLAUDE_CLI_PATH", claude.to_str().unwrap()),
        ("SANDBOX_ENABLED", "false"),
    ];

    let finished = run(CLAUDE_QUEUE, &["demo"], &env).await;

    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let told = &finished.stdout;
    for word in ["Write ", "I didn't run it", "there was no sandbox", "#!/bin/sh"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    for word in ["Bash  ", "ran it", "the sandbox, the Claude CLI"] {
        assert!(!told.contains(word), "{word}: {told}");
    }
}

async fn a_job_is_submitted_followed_and_cancelled_on_the_command_line() {
    let system = System::builder().env("JOB_MAX_ATTEMPTS", "1").start().await;
    let script = steps([Step::Say("half way".to_owned())]).answering("all of it");

    let id = ask(&system, &["submit", "--max-turns", "7", &script.prompt()]).await;
    let id = id.trim();
    assert_eq!(ask(&system, &["wait", id]).await, "all of it\n");
    let job: Value = serde_json::from_str(&ask(&system, &["wait", "--json", id]).await).unwrap();
    assert_eq!((&job["status"], &job["max_turns"]), (&json!("done"), &json!(7)));
    let logs = ask(&system, &["logs", id]).await;
    for word in ["queued", "running", "says       half way", "done       $"] {
        assert!(logs.contains(word), "{word}: {logs}");
    }
    let logs = ask(&system, &["logs", "--json", id]).await;
    let numbers: Vec<i64> = logs
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["seq"]
                .as_i64()
                .unwrap()
        })
        .collect();
    let wanted: Vec<i64> = (1..).take(numbers.len()).collect();
    assert!(numbers == wanted && numbers.len() > 3, "{logs}");

    let followed = client(&system, &["submit", "--follow", &script.prompt()]).await;
    assert_eq!(followed.code, Some(0), "{followed:#?}");
    assert!(followed.stderr.starts_with("job_"), "{followed:#?}");
    assert!(followed.stdout.contains("says       half way"), "{followed:#?}");
    let failing = steps([Step::Exit(3)]).prompt();
    let failed = client(&system, &["submit", "--follow", &failing]).await;
    assert_eq!(failed.code, Some(1), "{failed:#?}");
    assert!(failed.stderr.contains("the job is failed"), "{failed:#?}");
    let waited = ask(&system, &["submit", "--wait", &answer("at once").prompt()]).await;
    assert_eq!(waited, "at once\n");
    // The same idempotency key makes one job.
    let once = ["submit", "--idempotency-key", "one", "hi"];
    let done = ask(&system, &once).await;
    assert_eq!(ask(&system, &once).await, done);
    assert_eq!(ask(&system, &["wait", done.trim()]).await, "hi\n");
    let late = client(&system, &["cancel", done.trim()]).await;
    assert_eq!(
        (late.code, late.stderr.as_str()),
        (Some(1), "claude-queue: Job already done (409)\n")
    );

    let id = ask(&system, &["submit", &steps([Step::Hang]).prompt()]).await;
    let id = id.trim();
    system.client().reaches(id, "running").await;
    assert_eq!(ask(&system, &["cancel", id]).await, "cancelling: it is running\n");
    let ended = client(&system, &["wait", id]).await;
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("the job is cancelled"), "{ended:#?}");
    assert_eq!(ask(&system, &["cancel", id]).await, "cancelled\n");

    let jobs = ask(&system, &["jobs"]).await;
    assert_eq!(jobs.lines().count(), 6, "{jobs}");
    let newest = jobs.lines().next().unwrap();
    assert!(newest.starts_with(id) && newest.contains("cancelled"), "{jobs}");
    let some = client(&system, &["jobs", "--status", "done", "--limit", "2", "--json"]).await;
    let page: Value = serde_json::from_str(&some.stdout).unwrap();
    assert_eq!(page["data"].as_array().unwrap().len(), 2, "{page:#}");
    let usage = ask(&system, &["usage"]).await;
    assert!(usage.contains("6 total, 4 completed"), "{usage}");
}

async fn a_refusal_is_told_in_a_sentence() {
    let system = System::builder().workers(0).start().await;
    let url = system.client().base().to_owned();
    let with = |url: &str, key: &str, arguments: &[&str]| {
        let env = [
            ("CLAUDE_QUEUE_URL", url.to_owned()),
            ("CLAUDE_QUEUE_API_KEY", key.to_owned()),
        ];
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        async move {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
            run(CLAUDE_QUEUE, &arguments, &env).await
        }
    };

    for (finished, code, sentence) in [
        (
            with(&url, "wrong", &["jobs"]).await,
            1,
            "claude-queue: Invalid or missing API key (401)\n",
        ),
        (
            with(&url, KEYS[0], &["wait", "job_1"]).await,
            1,
            "claude-queue: Job not found (404)\n",
        ),
        (
            with(&format!("{url}/api/v1/"), KEYS[0], &["wait", "job_1"]).await,
            1,
            "claude-queue: Job not found (404)\n",
        ),
        (
            with(&url, KEYS[0], &["submit", "--max-turns", "0", "hi"]).await,
            1,
            "claude-queue: body -> max_turns: Input should be greater than or equal to 1 (422)\n",
        ),
        (with("jobs", KEYS[0], &["jobs"]).await, 2, "CLAUDE_QUEUE_URL"),
        // Nobody waits for a service that was never there.
        (
            with("http://127.0.0.1:9", KEYS[0], &["logs", "job_1"]).await,
            4,
            "http://127.0.0.1:9 can't be reached",
        ),
    ] {
        assert_eq!(finished.code, Some(code), "{finished:#?}");
        assert!(finished.stderr.contains(sentence), "{sentence}: {finished:#?}");
        assert_eq!(finished.stdout, "");
    }
    let late = with(&url, KEYS[0], &["submit", "hi"]).await;
    let late = with(&url, KEYS[0], &["wait", "--timeout", "1", late.stdout.trim()]).await;
    assert_eq!(late.code, Some(3), "{late:#?}");
    assert!(late.stderr.contains("is still queued; it goes on"), "{late:#?}");
}

async fn who_follows_a_job_outlives_a_restart_of_the_service() {
    let mut system = System::builder().env("LOG_LEVEL", "info,api=debug").start().await;
    let passage = Passage::to(system.client().base()).await;
    let script = steps([Step::Say("before".to_owned()), until_told()]);
    let id = system.client().play(&script.answering("after")).await;
    system.client().event(&id, "assistant").await;
    let follow = |name: &str| {
        let env = [
            ("CLAUDE_QUEUE_URL", passage.url.as_str()),
            ("CLAUDE_QUEUE_API_KEY", KEYS[0]),
        ];
        command(CLAUDE_QUEUE, &[name, &id], &env)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let (mut logs, wait) = (follow("logs"), follow("wait"));
    let mut lines = lines_of(logs.stdout.take().unwrap());
    line_with(&mut lines, "before").await;
    // So has `wait`: it has been told that the job runs.
    let asked = format!("http.path=\"/api/v1/jobs/{id}\"");
    system.writes(&asked).await;

    // Not to where it was: that port is free then for others.
    passage.leads_to("");
    system.api(0).kill();
    // Each of them has tried in vain.
    eventually(PATIENCE, "four tries", async || {
        (passage.refused.load(Ordering::SeqCst) >= 4).then_some(())
    })
    .await;
    system.api(0).start().await;
    passage.leads_to(&system.api(0).url());
    system.tell_to_go_on(&id);

    line_with(&mut lines, "done").await;
    assert_eq!(logs.wait().await.unwrap().code(), Some(0));
    let waited = wait.wait_with_output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&waited.stdout), "after\n");
}

/// One who waits outside of a service's ports, which change with each start.
struct Passage {
    url: String,
    target: Arc<Mutex<String>>,
    refused: Arc<AtomicUsize>,
}

impl Passage {
    async fn to(base: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let passage = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            target: Arc::default(),
            refused: Arc::default(),
        };
        passage.leads_to(base);
        let (target, refused) = (Arc::clone(&passage.target), Arc::clone(&passage.refused));
        tokio::spawn(async move {
            loop {
                let (mut outer, _) = listener.accept().await.unwrap();
                let target = target.lock().unwrap().clone();
                match TcpStream::connect(target).await {
                    Ok(mut inner) => {
                        tokio::spawn(async move {
                            let _ = copy_bidirectional(&mut outer, &mut inner).await;
                        });
                    }
                    Err(_) => {
                        refused.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        });
        passage
    }

    fn leads_to(&self, base: &str) {
        base.trim_start_matches("http://")
            .clone_into(&mut self.target.lock().unwrap());
    }
}

async fn a_service_that_can_not_start_claims_nothing() {
    let mut system = System::builder().workers(0).start().await;
    let id = system.client().accepted("hi").await;
    system.api(0).stop(PATIENCE).await;
    let folder = paths::folder('d');
    let fake = paths::binary("fake-claude");

    let env = [
        ("DATABASE_URL", system.database().url()),
        ("DATA_DIR", folder.to_str().unwrap()),
        ("XDG_RUNTIME_DIR", folder.to_str().unwrap()),
        ("API_PORT", "0"),
        ("API_KEYS", KEYS[0]),
        ("ANTHROPIC_API_KEY", "sk-x"),
        ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
        ("SECRET_KEY", "another-one-than-the-database-was-set-up-with"),
    ];
    let finished = run(CLAUDE_QUEUE, &["up"], &env).await;

    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(finished.stderr.contains("SECRET_KEY"), "{finished:#?}");
    assert_eq!(finished.stdout, "");
    // No worker has even begun.
    let database: &Database = system.database();
    assert_eq!(database.number("select count(*) from worker").await, 0);
    assert_eq!(database.number("select count(*) from attempt").await, 0);
    assert_eq!(
        database
            .texts("select job_id from job where status = 'queued'")
            .await,
        [id]
    );
}

/// A supervisor keeps what a service says; the kit does, too, and searches it for secrets.
async fn the_key_is_not_written_into_a_file() {
    let mut system = System::builder().up().start().await;
    system.client().jobs("").await.data(200);

    let said = system.writes("Stop with Ctrl-C").await;

    assert!(said.contains("the first of API_KEYS"), "{said}");
    assert!(!KEYS.iter().any(|key| said.contains(key)), "{said}");
    assert_eq!(system.api(0).stop(PATIENCE).await, Some(0));
}

async fn the_doctor_says_what_is_missing() {
    let folder = paths::folder('d');
    let (name, fake) = (folder.to_str().unwrap(), paths::binary("fake-claude"));
    let url = format!("sqlite://{}", folder.join("x.db").display());
    let data = folder.join("data");
    let mut env = vec![
        ("DATABASE_URL", url.as_str()),
        ("DATA_DIR", data.to_str().unwrap()),
        ("XDG_RUNTIME_DIR", name),
        ("ANTHROPIC_API_KEY", "sk-x"),
        ("API_KEYS", KEYS[0]),
        // Where nobody listens.
        ("CLAUDE_QUEUE_URL", "http://127.0.0.1:9"),
        ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
    ];

    let well = run(CLAUDE_QUEUE, &["doctor"], &env).await;

    assert_eq!(well.code, Some(0), "{well:#?}");
    for line in [
        "ok    database",
        "ok    keys        1 key",
        "ok    data",
        "ok    credential",
        "ok    sandbox",
        "note  service     http://127.0.0.1:9 can't be reached",
    ] {
        assert!(well.stdout.contains(line), "{line}: {well:#?}");
    }
    assert!(!well.stdout.contains("BAD") && !well.stdout.contains(KEYS[0]));

    // As an older release left it.
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    if let Some(account) = tests::account::Account::of_product() {
        account.own(&data).unwrap();
    }
    let open = run(CLAUDE_QUEUE, &["doctor"], &env).await;
    assert!(
        open.stdout.contains("note  modes") && open.stdout.contains("--fix"),
        "{open:#?}"
    );
    let fixed = run(CLAUDE_QUEUE, &["doctor", "--fix"], &env).await;
    assert!(
        fixed.stdout.contains("ok    modes       closed 1 files"),
        "{fixed:#?}"
    );
    let closed = run(CLAUDE_QUEUE, &["doctor"], &env).await;
    assert!(
        closed.stdout.contains("ok    modes       the service's"),
        "{closed:#?}"
    );

    env.retain(|(name, _)| !matches!(*name, "CLAUDE_CLI_PATH" | "DATA_DIR"));
    env.push(("CLAUDE_CLI_PATH", "/nowhere/claude"));
    env.push(("DATA_DIR", "/proc/nowhere"));
    let ill = run(CLAUDE_QUEUE, &["doctor"], &env).await;

    assert_eq!(ill.code, Some(1), "{ill:#?}");
    for line in ["BAD   data        DATA_DIR /proc/nowhere", "BAD   claude"] {
        assert!(ill.stdout.contains(line), "{line}: {ill:#?}");
    }
    assert!(ill.stderr.contains("2 checks failed"), "{ill:#?}");
}

async fn the_doctor_connects_to_the_database() {
    let system = System::builder().database(Db::Postgres).workers(0).start().await;
    let data = system.folder().join("data");
    let fake = paths::binary("fake-claude");
    let ask = async |url: &str| {
        let env = [
            ("DATABASE_URL", url),
            ("DATA_DIR", data.to_str().unwrap()),
            ("XDG_RUNTIME_DIR", data.to_str().unwrap()),
            ("SECRET_KEY", "kit-secret-key-which-is-long-enough-0123456789"),
            ("ANTHROPIC_API_KEY", "sk-x"),
            ("CLAUDE_QUEUE_URL", "http://127.0.0.1:9"),
            ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
        ];
        let made = run(CLAUDE_QUEUE, &["doctor"], &env).await;
        (made.code, made.stdout)
    };

    let (code, well) = ask(system.database().url()).await;
    assert_eq!(code, Some(0), "{well}");
    assert!(
        well.contains("ok    database") && well.contains(", schema "),
        "{well}"
    );
    assert!(well.contains("note  keys"), "{well}");
    let key = [
        ("DATABASE_URL", system.database().url()),
        ("SECRET_KEY", "kit-secret-key-which-is-long-enough-0123456789"),
    ];
    assert_eq!(run(CLAUDE_QUEUE, &["keys", "create"], &key).await.code, Some(0));
    let (_, keys) = ask(system.database().url()).await;
    assert!(keys.contains("ok    keys        in the database"), "{keys}");

    let (code, ill) = ask("postgres://me:very-secret@127.0.0.1:9/queue").await;
    assert_eq!(code, Some(1), "{ill}");
    let line = ill
        .lines()
        .find(|line| line.starts_with("BAD   database"))
        .unwrap();
    for word in ["127.0.0.1", "port 9", "queue", "refused", "DATABASE_URL"] {
        assert!(line.contains(word), "{word}: {line}");
    }
    assert!(!ill.contains("very-secret"), "{ill}");
}

async fn the_simulator_answers_until_it_is_told_to_stop() {
    let mut simulator = command(CLAUDE_QUEUE, &["simulator", "--listen", "127.0.0.1:0"], &[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = lines_of(simulator.stdout.take().unwrap());
    let line = line_with(&mut lines, "listening on ").await;
    let client = Client::new(line.trim_start_matches("listening on "), Some("sim-default"));

    let body = json!({
        "model": "claude-sonnet-5", "max_tokens": 100,
        "messages": [{"role": "user", "content": "[[scenario:default]] Hello?"}],
    });
    let request = client.request(Method::POST, "/v1/messages").json(&body);
    let answer = client.send(request).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.json["role"], "assistant", "{}", answer.text);

    let pid = i32::try_from(simulator.id().unwrap()).unwrap();
    processes::signal(pid, Signal::TERM);
    let ended = tokio::time::timeout(PATIENCE, simulator.wait()).await;
    assert_eq!(ended.expect("it stops").unwrap().code(), Some(0));

    let scenarios = run(CLAUDE_QUEUE, &["simulator", "--list"], &[]).await;
    assert!(scenarios.stdout.contains("\ndemo "), "{scenarios:#?}");
}

/// A client command with the system's first key.
async fn client(system: &System, arguments: &[&str]) -> Finished {
    let url = system.client().base().to_owned();
    let env = [
        ("CLAUDE_QUEUE_URL", url.as_str()),
        ("CLAUDE_QUEUE_API_KEY", KEYS[0]),
    ];
    run(CLAUDE_QUEUE, arguments, &env).await
}

/// What a client command prints, which must succeed.
async fn ask(system: &System, arguments: &[&str]) -> String {
    let finished = client(system, arguments).await;
    assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
    finished.stdout
}

fn lines_of<R: AsyncRead + Unpin>(pipe: R) -> Lines<BufReader<R>> {
    BufReader::new(pipe).lines()
}

/// The next line that has this text in it.
async fn line_with<R: AsyncRead + Unpin>(lines: &mut Lines<BufReader<R>>, text: &str) -> String {
    let find = async {
        loop {
            let line = lines.next_line().await.unwrap();
            let line = line.unwrap_or_else(|| panic!("it ended without {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    };
    tokio::time::timeout(PATIENCE, find)
        .await
        .unwrap_or_else(|_| panic!("no line has {text:?}"))
}
