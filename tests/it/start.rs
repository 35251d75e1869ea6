//! How programs start, on what they depend, and what they leave readable: arguments, the folder of `.env`, standard
//! output that nobody reads, signals, permissions.

use std::fs;
use std::io::pipe;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;
use tests::client::{Client, PATIENCE};
use tests::database::Database;
use tests::script::{Step, steps, until_told};
use tests::system::{Finished, KEYS, System, command, run};
use tests::{eventually, once, paths, processes};
use tokio::process::Command;

once!(
    services_take_no_arguments,
    a_closed_or_full_output_loses_nothing,
    a_service_goes_on_when_nobody_reads_what_it_prints,
    a_hangup_drains,
    an_ignored_hangup_stays_ignored,
    relative_paths_count_from_the_folder_of_the_env_file,
    what_only_looks_creates_nothing,
    a_client_finds_the_service_of_its_env_file,
    what_a_service_writes_is_for_its_user_only,
    hidden_characters_are_shown,
    numbers_are_numbers_in_json_logs,
    no_key_is_said_to_be_needed_only_if_none_is,
);

const CLAUDE_QUEUE: &str = "claude-queue";

async fn services_take_no_arguments() {
    for service in ["claude-queue-api", "claude-queue-worker"] {
        let help = run(service, &["--help"], &[]).await;
        assert_eq!(help.code, Some(0), "{help:#?}");
        assert!(help.stdout.contains("Usage: claude-queue-"), "{help:#?}");

        let version = run(service, &["--version"], &[]).await;
        assert_eq!(version.code, Some(0), "{version:#?}");
        assert_eq!(
            version.stdout,
            format!("{service} {}\n", env!("CARGO_PKG_VERSION"))
        );

        for argument in ["--bogus", "serve", "-x"] {
            let refused = run(service, &[argument], &[]).await;
            assert_eq!(refused.code, Some(2), "{refused:#?}");
            assert!(refused.stderr.contains(argument), "{refused:#?}");
            assert_eq!(refused.stdout, "");
        }
    }
}

/// A pipe whose reader has gone.
fn closed() -> Stdio {
    pipe().unwrap().1.into()
}

/// A device without room.
fn full() -> Stdio {
    fs::File::options().write(true).open("/dev/full").unwrap().into()
}

/// Runs a command whose standard output goes there.
async fn printing_to(output: Stdio, mut command: Command) -> Finished {
    let child = command.stdout(output).stderr(Stdio::piped()).spawn().unwrap();
    let ended = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    let ended = ended.expect("it ends").unwrap();
    Finished {
        code: ended.status.code(),
        stdout: String::new(),
        stderr: String::from_utf8_lossy(&ended.stderr).into_owned(),
    }
}

async fn a_closed_or_full_output_loses_nothing() {
    let system = System::builder().workers(0).start().await;
    let url = system.client().base().to_owned();
    let http = [
        ("CLAUDE_QUEUE_URL", url.as_str()),
        ("CLAUDE_QUEUE_API_KEY", KEYS[0]),
    ];
    let data = system.folder().join("data");
    let direct = [
        ("DATABASE_URL", system.database().url()),
        ("DATA_DIR", data.to_str().unwrap()),
        ("SECRET_KEY", "kit-secret-key-which-is-long-enough-0123456789"),
    ];
    let keys = async || system.database().number("select count(*) from api_key").await;

    // The id is all that leads to a job that is paid for.
    for output in [full(), closed()] {
        let submitted = printing_to(output, command(CLAUDE_QUEUE, &["submit", "hi"], &http)).await;
        assert_eq!(submitted.code, Some(1), "{submitted:#?}");
        let newest = system.client().jobs("limit=1").await.data(200)[0]["id"].clone();
        assert!(
            submitted.stderr.contains(newest.as_str().unwrap()),
            "{submitted:#?}"
        );
    }
    // Whoever has read enough has got what they wanted; a full disk hasn't.
    for arguments in [&["jobs"][..], &["jobs", "--json"], &["usage"]] {
        let unread = printing_to(closed(), command(CLAUDE_QUEUE, arguments, &http)).await;
        assert_eq!(
            (unread.code, unread.stderr.as_str()),
            (Some(0), ""),
            "{arguments:?}"
        );
        let cut = printing_to(full(), command(CLAUDE_QUEUE, arguments, &http)).await;
        assert_eq!(cut.code, Some(1), "{arguments:?}: {cut:#?}");
        assert!(
            cut.stderr.contains("standard output can't be written"),
            "{cut:#?}"
        );
    }
    // A key whose secret nobody has seen isn't made.
    for output in [full(), closed()] {
        let unseen = printing_to(
            output,
            command(CLAUDE_QUEUE, &["keys", "create", "--admin"], &direct),
        )
        .await;
        assert_eq!(unseen.code, Some(1), "{unseen:#?}");
        assert!(unseen.stderr.contains("no key was created"), "{unseen:#?}");
        assert_eq!(keys().await, 0);
    }
    let seen = run(CLAUDE_QUEUE, &["keys", "create"], &direct).await;
    assert_eq!((seen.code, keys().await), (Some(0), 1), "{seen:#?}");
    let client = system.client().with_key(seen.stdout.trim());
    client.jobs("").await.data(200);
    let id = system
        .database()
        .texts("select key_id from api_key")
        .await
        .remove(0);
    let unseen = command(
        CLAUDE_QUEUE,
        &["keys", "rotate", "--grace-seconds", "0", &id],
        &direct,
    );
    let unseen = printing_to(full(), unseen).await;
    assert_eq!(unseen.code, Some(1), "{unseen:#?}");
    client.jobs("").await.data(200);
    // Nor does it matter that nobody hears of an error.
    let mut unheard = command(CLAUDE_QUEUE, &["wait", "job_1"], &http);
    let mut unheard = unheard.stdout(closed()).stderr(closed()).spawn().unwrap();
    assert_eq!(unheard.wait().await.unwrap().code(), Some(1));
}

async fn a_service_goes_on_when_nobody_reads_what_it_prints() {
    let folder = paths::folder('d');
    let (name, fake) = (folder.to_str().unwrap(), paths::binary("fake-claude"));
    let port = free_port();
    let url = format!("sqlite://{name}/q.db");
    let api = simulator::Simulator::start(([127, 0, 0, 1], 0).into())
        .await
        .unwrap();
    let api_url = api.url();
    let env = [
        ("DATABASE_URL", url.as_str()),
        ("DATA_DIR", name),
        ("XDG_RUNTIME_DIR", name),
        ("API_PORT", &port),
        ("API_KEYS", KEYS[0]),
        ("ANTHROPIC_API_KEY", "sk-x"),
        ("ANTHROPIC_BASE_URL", &api_url),
        ("SANDBOX_ENABLED", "false"),
        ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
        // So that the service has much to print.
        ("LOG_LEVEL", "debug"),
    ];
    let mut command = command(CLAUDE_QUEUE, &["up"], &env);
    let mut service = command.stdout(closed()).stderr(closed()).spawn().unwrap();
    let client = Client::new(&format!("http://127.0.0.1:{port}"), Some(KEYS[0]));
    eventually(PATIENCE, "a service that serves", async || {
        let ended = service.try_wait().unwrap();
        assert!(ended.is_none(), "it ended: {ended:?}");
        let asked = client.request(reqwest::Method::GET, "/readyz");
        let answer = client.try_send(asked).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;

    let id = client.accepted("hi").await;
    assert_eq!(client.finished(&id).await["status"], "done");

    processes::signal(i32::try_from(service.id().unwrap()).unwrap(), Signal::TERM);
    let ended = tokio::time::timeout(PATIENCE, service.wait()).await;
    assert_eq!(ended.expect("it stops").unwrap().code(), Some(0));
}

/// One that nobody listens on at this moment.
fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

async fn a_hangup_drains() {
    let mut services = System::builder().start().await;
    let mut both = System::builder().up().start().await;
    for system in [&mut services, &mut both] {
        let client = system.client();
        let id = client
            .play(&steps([Step::Say("begun".to_owned()), until_told()]))
            .await;
        client.event(&id, "assistant").await;
        let has_worker = system.database().number("select count(*) from worker").await == 1;
        assert!(has_worker);
        let separate = system.processes().len() == 2;

        // The worker first: the answer to what it did is read from the API.
        let stopping = if separate { system.worker(0) } else { system.api(0) };
        stopping.signal(Signal::HUP);
        system.writes("the worker drains").await;
        system.tell_to_go_on(&id);
        let stopping = if separate { system.worker(0) } else { system.api(0) };
        assert_eq!(stopping.ended(PATIENCE).await.code(), Some(0));
        let done = format!("select count(*) from job where job_id = '{id}' and status = 'done'");
        assert_eq!(system.database().number(&done).await, 1);
        if separate {
            system.api(0).signal(Signal::HUP);
            assert_eq!(system.api(0).ended(PATIENCE).await.code(), Some(0));
        }
    }
}

/// `nohup` ignores the signal for the program that it starts.
async fn an_ignored_hangup_stays_ignored() {
    let port = free_port();
    let binary = paths::binary(CLAUDE_QUEUE);
    let script = format!("trap '' HUP; exec \"$0\" simulator --listen 127.0.0.1:{port}");
    let mut simulator = Command::new("/bin/sh")
        .args(["-c", &script])
        .arg(binary)
        .env(paths::MARKER, paths::folder('d'))
        .stdin(Stdio::null())
        .stdout(closed())
        .stderr(closed())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let client = Client::new(&format!("http://127.0.0.1:{port}"), None);
    let answers = async || {
        let asked = client.request(reqwest::Method::GET, "/_sim/health");
        client.try_send(asked).await.ok().map(|answer| answer.status)
    };
    eventually(PATIENCE, "a simulator that answers", answers).await;
    let pid = i32::try_from(simulator.id().unwrap()).unwrap();

    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
    // The system doesn't even deliver it.
    assert_eq!(ignored & 1, 1, "{status}");
    processes::signal(pid, Signal::HUP);
    processes::signal(pid, Signal::TERM);
    assert_eq!(simulator.wait().await.unwrap().code(), Some(0));
}

/// A folder with this `.env`, and a folder in it.
fn project(env: &str) -> (PathBuf, PathBuf) {
    let folder = paths::folder('d');
    let sub = folder.join("sub");
    fs::create_dir(&sub).unwrap();
    if let Some(account) = tests::account::Account::of_product() {
        account.own(&sub).unwrap();
    }
    fs::write(folder.join(".env"), env).unwrap();
    (folder, sub)
}

/// Runs a command in this folder.
async fn run_in(folder: &Path, arguments: &[&str], env: &[(&str, &str)]) -> Finished {
    let mut command = command(CLAUDE_QUEUE, arguments, env);
    let ended = command.current_dir(folder).output().await.unwrap();
    Finished {
        code: ended.status.code(),
        stdout: String::from_utf8_lossy(&ended.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&ended.stderr).into_owned(),
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

async fn relative_paths_count_from_the_folder_of_the_env_file() {
    let secret = "SECRET_KEY=kit-secret-key-which-is-long-enough-0123456789\n";
    for (env, database) in [
        // Neither the default nor what the file says depends on where a command is typed.
        (secret.to_owned(), "data/claude-queue.db"),
        (
            format!("{secret}DATABASE_URL=sqlite://./mine/q.db\n"),
            "mine/q.db",
        ),
    ] {
        let (folder, sub) = project(&env);

        let migrated = run_in(&sub, &["migrate"], &[]).await;
        assert_eq!(migrated.code, Some(0), "{migrated:#?}");
        let made = run_in(&sub, &["keys", "create"], &[]).await;
        assert_eq!(made.code, Some(0), "{made:#?}");

        assert_eq!(names(&sub), [""; 0]);
        assert!(folder.join(database).is_file(), "{:?}", names(&folder));
        let listed = run_in(&folder, &["keys", "list"], &[]).await;
        assert_eq!(listed.stdout.lines().count(), 1, "{listed:#?}");
    }
    // What somebody types counts from where they type it.
    let (folder, sub) = project(secret);
    let typed = run_in(&sub, &["migrate"], &[("DATABASE_URL", "sqlite://here.db")]).await;
    assert_eq!(typed.code, Some(0), "{typed:#?}");
    assert!(sub.join("here.db").is_file());
    assert_eq!(names(&folder), [".env", "sub"]);
}

async fn what_only_looks_creates_nothing() {
    let (folder, sub) = project("SECRET_KEY=kit-secret-key-which-is-long-enough-0123456789\n");
    let env = [("CLAUDE_QUEUE_URL", "http://127.0.0.1:9")];
    let id = "key_0123456789";
    for arguments in [
        &["keys", "list"][..],
        &["keys", "rotate", id],
        &["keys", "revoke", id],
        &["doctor"],
        &["jobs"],
        &["usage"],
    ] {
        let finished = run_in(&sub, arguments, &env).await;

        assert_ne!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
        if arguments[0] == "keys" {
            assert!(finished.stderr.contains("there is no database"), "{finished:#?}");
        }
        assert_eq!(
            (names(&folder).join(" "), names(&sub).len()),
            (".env sub".to_owned(), 0)
        );
    }
}

async fn a_client_finds_the_service_of_its_env_file() {
    let system = System::builder().workers(0).start().await;
    let url = system.client().base().to_owned();
    let port = url.rsplit(':').next().unwrap();
    let (_, sub) = project(&format!("API_PORT={port}\nAPI_KEYS={},other\n", KEYS[0]));

    let submitted = run_in(&sub, &["submit", "hi"], &[]).await;
    assert_eq!(submitted.code, Some(0), "{submitted:#?}");
    let named = run_in(&sub, &["jobs"], &[("CLAUDE_QUEUE_URL", &format!("{url}/api/v1"))]).await;
    assert!(named.stdout.contains(submitted.stdout.trim()), "{named:#?}");
    // The key isn't sent where it doesn't belong, which is said when it would have been needed.
    let other = System::builder().workers(0).start().await;
    let refused = run_in(&sub, &["jobs"], &[("CLAUDE_QUEUE_URL", other.client().base())]).await;
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    assert!(
        refused.stderr.contains("set CLAUDE_QUEUE_API_KEY"),
        "{refused:#?}"
    );
}

async fn what_a_service_writes_is_for_its_user_only() {
    let database = Database::file(&paths::folder('d').join("q.db"));
    let folder = database.url().trim_start_matches("sqlite://");
    let folder = Path::new(folder).parent().unwrap().to_owned();
    let system = System::builder().on(database).up().start().await;
    let client = system.client();
    let write = Step::Write {
        file: "made".to_owned(),
        content: "x".to_owned(),
    };
    let id = client
        .play(&steps([write, Step::Say("now".to_owned()), until_told()]))
        .await;
    client.event(&id, "assistant").await;

    let mut found = Vec::new();
    for folder in [
        &folder,
        &system.folder().join("data"),
        &system.folder().join("run"),
    ] {
        walk(folder, &mut found);
    }
    system.tell_to_go_on(&id);

    let readable: Vec<_> = found
        .iter()
        .filter(|(_, mode)| mode & 0o077 != 0)
        .map(|(path, mode)| format!("{mode:o} {}", path.display()))
        .collect();
    assert_eq!(readable, [""; 0]);
    for name in ["q.db", "q.db-wal", "made", "instance"] {
        assert!(
            found.iter().any(|(path, _)| path.ends_with(name)),
            "{name}: {found:#?}"
        );
    }
    client.finished(&id).await;
}

/// What lies under a folder, each with its mode. What goes away meanwhile was there.
fn walk(folder: &Path, found: &mut Vec<(PathBuf, u32)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = path.symlink_metadata() else {
            continue;
        };
        if meta.is_symlink() {
            continue;
        }
        found.push((path.clone(), meta.permissions().mode() & 0o777));
        if meta.is_dir() {
            walk(&path, found);
        }
    }
}

async fn hidden_characters_are_shown() {
    let system = System::start(tests::database::Db::Sqlite).await;
    let message = "user\u{202e}gpj.exe\u{200b} \u{1b}[2J";
    let id = system.client().accepted(message).await;
    system.client().finished(&id).await;
    let url = system.client().base().to_owned();
    let env = [
        ("CLAUDE_QUEUE_URL", url.as_str()),
        ("CLAUDE_QUEUE_API_KEY", KEYS[0]),
    ];

    for arguments in [&["jobs"][..], &["wait", &id], &["logs", &id]] {
        let printed = run(CLAUDE_QUEUE, arguments, &env).await.stdout;
        assert!(
            !printed.contains(['\u{202e}', '\u{200b}', '\u{1b}']),
            "{printed:?}"
        );
        if arguments[0] != "logs" {
            assert!(printed.contains("user\\u{202e}gpj.exe\\u{200b}"), "{printed:?}");
        }
    }
    for arguments in [
        &["jobs", "--json"][..],
        &["wait", "--json", &id],
        &["logs", "--json", &id],
    ] {
        let printed = run(CLAUDE_QUEUE, arguments, &env).await.stdout;
        assert!(
            !printed.contains(['\u{202e}', '\u{200b}', '\u{1b}']),
            "{printed:?}"
        );
    }
    let printed = run(CLAUDE_QUEUE, &["wait", "--json", &id], &env).await.stdout;
    let job: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(job["message"], message);
}

async fn numbers_are_numbers_in_json_logs() {
    let system = System::builder()
        .env("LOG_FORMAT", "json")
        .env("LOG_LEVEL", "debug")
        .start()
        .await;
    let id = system.client().accepted("hi").await;
    system.client().finished(&id).await;
    system.client().job(&id).await.data(200);

    let numbers = ["duration_ms", "http.status", "attempt", "cost_usd"];
    let mut seen = vec![];
    for line in system.written().lines().filter(|line| line.starts_with('{')) {
        let line: Value = serde_json::from_str(line).unwrap();
        for (name, value) in line.as_object().unwrap() {
            let is_number_as_text = value.as_str().is_some_and(|text| text.parse::<f64>().is_ok());
            assert!(!is_number_as_text, "{name}: {line}");
            seen.extend(
                numbers
                    .iter()
                    .filter(|number| *number == name && value.is_number()),
            );
        }
    }
    assert!(
        seen.contains(&&"duration_ms") && seen.contains(&&"http.status"),
        "{seen:?}"
    );
}

async fn no_key_is_said_to_be_needed_only_if_none_is() {
    let mut system = System::builder()
        .up()
        .env("API_KEYS", "")
        .env("ADMIN_API_KEYS", "")
        .start()
        .await;
    assert!(system.writes("Stop with Ctrl-C").await.contains("none is needed"));
    let url = system.database().url().to_owned();
    let data = system.folder().join("data");
    let env = [
        ("DATABASE_URL", url.as_str()),
        ("DATA_DIR", data.to_str().unwrap()),
        ("SECRET_KEY", "kit-secret-key-which-is-long-enough-0123456789"),
        ("CLAUDE_QUEUE_URL", "http://127.0.0.1:9"),
    ];
    let made = run(CLAUDE_QUEUE, &["keys", "create"], &env).await;
    assert_eq!(made.code, Some(0), "{made:#?}");

    system.api(0).stop(PATIENCE).await;
    system.api(0).start().await;
    let said = eventually(PATIENCE, "a welcome", async || {
        let said = system.written();
        let welcomes = said.matches("Stop with Ctrl-C").count();
        let (_, last) = said.rsplit_once("listening on http")?;
        (welcomes == 2).then(|| last.to_owned())
    })
    .await;

    assert!(
        !said.contains("none is needed") && said.contains("X-API-Key"),
        "{said}"
    );
    let answer = system.client().without_key().jobs("").await;
    assert_eq!(answer.status, 401, "{}", answer.text);
}
