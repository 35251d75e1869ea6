//! A run ends with all of its processes, whatever happens to whom: proved with a stand-in for the CLI that forks
//! daemons which survive every polite signal, inside and outside the sandbox.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "test helpers fail by panicking, and start what they test"
)]

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use worker::claude::line::OutputLine;
use worker::claude::process::{self, EndedBy, Exit, Launch, PendingGuard, Process};
use worker::claude::sandbox::{self, Isolation, Places};
use worker::guard;
use worker::workspace::{RunDir, Runtime};

const GUARD: &str = env!("CARGO_BIN_EXE_claude-queue-worker");

/// Every process of it has the token, `$1`, among its arguments. With `bare` a daemon has an empty environment.
const STUBBORN: &str = r#"#!/bin/sh
trap '' TERM INT HUP
loop='trap "" TERM INT HUP; while :; do sleep 1000 "0.$0"; done'
(setsid nohup sh -c "$loop" "$1" >/dev/null 2>&1 &)
[ "$2" = bare ] && (setsid nohup env -i PATH=/usr/bin:/bin sh -c "$loop" "$1" >/dev/null 2>&1 &)
sh -c "$loop" "$1" &
sleep 0.3
echo ready
echo "complaint" >&2
read -r line
echo "heard $line"
exit 3
"#;

/// A run of the stand-in, and the token that finds its processes without the help of what is tested.
struct Stand {
    data: TempDir,
    _runtime: Runtime,
    _dir: RunDir,
    launch: Launch,
    token: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Sandboxed {
    Yes,
    No,
}

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// A time that a test waits for, and within which a busy machine starts a run.
const SHORT: Duration = Duration::from_secs(5);

const BOTH: [Sandboxed; 2] = [Sandboxed::Yes, Sandboxed::No];

async fn isolation(sandboxed: Sandboxed, runtime: &Runtime) -> Isolation {
    match sandboxed {
        Sandboxed::Yes => Isolation::Sandbox(
            sandbox::check(runtime, env::var_os("PATH").as_deref())
                .await
                .unwrap(),
        ),
        Sandboxed::No => Isolation::Off,
    }
}

/// Another process writes it: a file that this one has open, even in a child that another test is just forking,
/// can't be started.
fn write_program(path: &Path, content: &str) {
    let mut install = std::process::Command::new("/usr/bin/install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    install
        .stdin
        .take()
        .unwrap()
        .write_all(content.as_bytes())
        .unwrap();
    assert!(install.wait().unwrap().success());
}

async fn stand_with(sandboxed: Sandboxed, script: &str, more: &[&str]) -> Stand {
    let data = tempfile::tempdir().unwrap();
    let runtime = Runtime::create(Some(data.path())).unwrap();
    let dir = runtime.run().unwrap();
    let isolation = isolation(sandboxed, &runtime).await;
    let at = |name: &str| {
        let path = data.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let cli = data.path().join("cli");
    write_program(&cli, script);
    fs::write(dir.gateway_socket(), "").unwrap();
    let places = Places {
        cli,
        workspace: at("workspace"),
        home: at("home"),
        tmp: dir.tmp(),
        gateway_socket: dir.gateway_socket(),
        system_prompt: None,
    };
    let token: String = uuid::Uuid::new_v4()
        .as_u128()
        .to_string()
        .chars()
        .rev()
        .take(15)
        .collect::<String>()
        + "7";
    let args = std::iter::once(token.as_str())
        .chain(more.iter().copied())
        .map(str::to_owned)
        .collect();
    let command = isolation.command(&places, args);
    let launch = Launch {
        program: command.program,
        setup: command.setup,
        args: command.args,
        env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        cwd: command.cwd,
        marker: guard::marker(&format!("test-{token}")),
        cgroup: None,
        beat_within: Duration::from_mins(1),
        deadline: Duration::from_mins(1),
        runtime_dir: dir.path().to_owned(),
        memory_limit: None,
        file_limit: None,
        no_new_privileges: command.no_new_privileges,
    };
    Stand {
        data,
        _runtime: runtime,
        _dir: dir,
        launch,
        token,
    }
}

/// The next line that was kept.
async fn whole_line(process: &mut Process) -> Option<Vec<u8>> {
    match process.next_line().await? {
        OutputLine::Whole(line) => Some(line),
        OutputLine::TooLong { may_be_result } => panic!("a line was too long, a result: {may_be_result}"),
    }
}

async fn stand(sandboxed: Sandboxed) -> Stand {
    stand_with(sandboxed, STUBBORN, &["bare"]).await
}

impl Stand {
    async fn start(&self) -> Process {
        self.start_held_at(Instant::now).await.unwrap()
    }

    async fn start_held_at(&self, held_at: impl Fn() -> Instant) -> io::Result<Process> {
        Process::start(self.guard(), self.launch.clone(), held_at).await
    }

    fn guard(&self) -> PendingGuard {
        PendingGuard::spawn_as(Path::new(GUARD), &self.launch.marker, &self.launch.runtime_dir).unwrap()
    }

    /// Starts it and waits until its daemons are there.
    async fn started(&self) -> Process {
        let mut process = self.start().await;
        assert_eq!(whole_line(&mut process).await.unwrap(), b"ready");
        self.daemons_there().await;
        process
    }

    /// Waits for the CLI's shell and for each daemon's shell and sleep.
    async fn daemons_there(&self) {
        let since = Instant::now();
        while self.alive().len() < 5 {
            assert!(
                since.elapsed() < PATIENCE,
                "the stand-in has no daemons: {:?}",
                self.alive()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Processes with the token among their arguments that aren't zombies.
    fn alive(&self) -> Vec<String> {
        self.own().map(|(_, command)| command).collect()
    }

    fn pids(&self) -> Vec<i32> {
        self.own().map(|(pid, _)| pid).collect()
    }

    fn own(&self) -> impl Iterator<Item = (i32, String)> {
        commands()
            .into_iter()
            .filter(|(_, command)| command.contains(&self.token))
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.alive(), Vec::<String>::new());
    }

    async fn assert_nothing_left_within(&self, within: Duration) {
        let since = Instant::now();
        while !self.alive().is_empty() && since.elapsed() < within {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.assert_nothing_left();
    }

    fn guard_pid(&self) -> Pid {
        let socket = self.launch.runtime_dir.join("guard.sock");
        let found = commands()
            .into_iter()
            .find(|(_, command)| command.contains(socket.to_str().unwrap()));
        Pid::from_raw(found.expect("no guard").0).unwrap()
    }
}

/// Waits with open input until the run ends.
async fn ended(mut process: Process) -> Exit {
    while process.next_line().await.is_some() {}
    process.wait().await
}

/// Every living process with its arguments.
fn commands() -> Vec<(i32, String)> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&command).replace('\0', " ")))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cli_that_ends_by_itself_leaves_no_daemon() {
    for sandboxed in BOTH {
        let stand = stand(sandboxed).await;
        let mut process = stand.started().await;

        process.send("hello");
        assert_eq!(whole_line(&mut process).await.unwrap(), b"heard hello");
        assert_eq!(whole_line(&mut process).await, None);
        let exit = process.wait().await;

        stand.assert_nothing_left();
        assert_eq!(
            (exit.code, exit.signal, exit.ended_by),
            (Some(3), None, EndedBy::Exited),
            "{sandboxed:?}"
        );
        assert_eq!(exit.stderr_tail, "complaint\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_the_input_is_seen_by_the_cli() {
    let stand = stand(Sandboxed::No).await;
    let mut process = stand.started().await;

    process.close_stdin();

    assert_eq!(whole_line(&mut process).await.unwrap(), b"heard ");
    // Nothing to write it to, and no harm.
    process.send("late");
    assert_eq!(process.wait().await.code, Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_to_end_leaves_nothing() {
    for sandboxed in BOTH {
        let stand = stand(sandboxed).await;
        let process = stand.started().await;

        process.kill();
        let exit = ended(process).await;

        stand.assert_nothing_left();
        // The guard obeyed: only it knows the signal.
        assert_eq!(
            (exit.signal, exit.ended_by),
            (Some(9), EndedBy::Worker),
            "{sandboxed:?}"
        );
    }
}

/// It never lives longer than it takes to start its successor, in a session of its own.
const FLEEING: &str = r#"#!/bin/sh
if [ "$2" = flee ]; then setsid sh "$0" "$1" flee >/dev/null 2>&1 & exit; fi
setsid sh "$0" "$1" flee >/dev/null 2>&1 &
setsid sh "$0" "$1" flee >/dev/null 2>&1 &
echo ready
read -r line
"#;

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_flee_into_their_children_are_caught() {
    for sandboxed in BOTH {
        let stand = stand_with(sandboxed, FLEEING, &[]).await;
        let mut process = stand.start().await;
        assert_eq!(whole_line(&mut process).await.unwrap(), b"ready");
        tokio::time::sleep(Duration::from_millis(200)).await;

        process.kill();
        let exit = ended(process).await;

        stand.assert_nothing_left();
        tokio::time::sleep(Duration::from_millis(100)).await;
        stand.assert_nothing_left();
        assert_eq!(exit.ended_by, EndedBy::Worker, "{sandboxed:?}");
        assert_eq!(exit.signal, Some(9), "the guard had to be helped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_thread_that_started_a_run_isnt_its_end() {
    for sandboxed in BOTH {
        let stand = Arc::new(stand(sandboxed).await);
        let (runtime, same) = (tokio::runtime::Handle::current(), Arc::clone(&stand));
        let starter = std::thread::spawn(move || runtime.block_on(same.started()));
        let process = tokio::task::spawn_blocking(|| starter.join().unwrap())
            .await
            .unwrap();

        tokio::time::sleep(Duration::from_millis(500)).await;

        assert!(!stand.alive().is_empty());
        process.kill();
        assert_eq!(ended(process).await.ended_by, EndedBy::Worker, "{sandboxed:?}");
        stand.assert_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_run_leaves_nothing() {
    for sandboxed in BOTH {
        let stand = stand(sandboxed).await;

        drop(stand.started().await);

        stand.assert_nothing_left_within(PATIENCE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_without_beats_is_ended_and_one_with_beats_is_not() {
    let case = async |sandboxed| {
        let mut stand = stand(sandboxed).await;
        stand.launch.beat_within = SHORT;
        let process = stand.started().await;
        for _ in 0..6 {
            tokio::time::sleep(SHORT / 5).await;
            process.renewed_at(Instant::now());
        }
        assert!(!stand.alive().is_empty());
        let last = Instant::now();

        let exit = ended(process).await;

        stand.assert_nothing_left();
        assert_eq!(exit.ended_by, EndedBy::Beat, "{sandboxed:?}");
        let took = last.elapsed();
        assert!(
            took + Duration::from_millis(100) > SHORT && took < SHORT + PATIENCE,
            "{took:?}"
        );
    };
    tokio::join!(case(Sandboxed::Yes), case(Sandboxed::No));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_counts_from_when_it_was_asked_for() {
    let mut stand = stand(Sandboxed::No).await;
    stand.launch.beat_within = Duration::from_secs(30);
    let process = stand.started().await;

    // The database took half a minute to say yes: others have counted since then.
    process.renewed_at(Instant::now().checked_sub(Duration::from_secs(30)).unwrap());
    let exit = ended(process).await;

    stand.assert_nothing_left();
    assert_eq!(exit.ended_by, EndedBy::Beat);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_ends_a_run() {
    let case = async |sandboxed| {
        let mut stand = stand(sandboxed).await;
        stand.launch.deadline = SHORT;
        let process = stand.started().await;

        let exit = ended(process).await;

        stand.assert_nothing_left();
        assert_eq!(exit.ended_by, EndedBy::Deadline, "{sandboxed:?}");
    };
    tokio::join!(case(Sandboxed::Yes), case(Sandboxed::No));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_outgrows_its_memory_is_ended() {
    for sandboxed in BOTH {
        // tail keeps what has no line feed: 300 MB.
        let hungry = "#!/bin/sh\n(head -c 300000000 /dev/zero; sleep 1000) | tail\n";
        let mut stand = stand_with(sandboxed, hungry, &[]).await;
        stand.launch.memory_limit = Some(100_000_000);
        let process = stand.start().await;

        let exit = process.wait().await;

        stand.assert_nothing_left();
        assert_eq!(exit.ended_by, EndedBy::Memory, "{sandboxed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_guard_leaves_nothing_that_bears_the_mark() {
    for sandboxed in BOTH {
        // Outside the sandbox nobody can find a daemon that has lost both its guard and its mark.
        let stand = match sandboxed {
            Sandboxed::Yes => stand(sandboxed).await,
            Sandboxed::No => stand_with(sandboxed, STUBBORN, &["marked"]).await,
        };
        let mut process = stand.start().await;
        assert_eq!(whole_line(&mut process).await.unwrap(), b"ready");

        kill_process(stand.guard_pid(), Signal::KILL).unwrap();
        let exit = ended(process).await;

        stand.assert_nothing_left();
        assert_eq!(
            (exit.code, exit.ended_by),
            (None, EndedBy::GuardLost),
            "{sandboxed:?}"
        );
    }
}

/// A tree of control groups of the test's own; none where the tests may not mount one.
struct Groups(tempfile::TempDir);

impl Groups {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "cgroup2", "none"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Self(folder))
    }

    /// The groups of these runs: the machine has one tree of groups, whoever mounts it.
    fn of(&self, stand: &Stand) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.to_str().unwrap().contains(&stand.token))
            .collect()
    }

    /// Waits until every process of the run is in its group.
    async fn hold(&self, stand: &Stand) {
        let since = Instant::now();
        loop {
            let lists = self
                .of(stand)
                .iter()
                .map(|group| fs::read_to_string(group.join("cgroup.procs")).unwrap())
                .collect::<String>();
            let inside = |pid: &i32| lists.lines().any(|line| line == pid.to_string());
            if stand.pids().iter().all(inside) {
                return;
            }
            assert!(since.elapsed() < PATIENCE, "outside of {lists}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_group_finds_what_has_lost_both_its_guard_and_its_mark() {
    let Some(groups) = Groups::mount() else {
        // Not by a macro, whose output would be kept from the reader.
        let _ = writeln!(
            io::stderr(),
            "NOT TESTED: control groups, because this user may not mount a tree of them"
        );
        return;
    };
    for sandboxed in BOTH {
        let mut stand = stand(sandboxed).await;
        stand.launch.cgroup = Some(groups.0.path().to_owned());
        let process = stand.started().await;
        groups.hold(&stand).await;
        assert_eq!(groups.of(&stand).len(), 1);

        kill_process(stand.guard_pid(), Signal::KILL).unwrap();
        let exit = ended(process).await;

        stand.assert_nothing_left();
        assert_eq!(exit.ended_by, EndedBy::GuardLost, "{sandboxed:?}");
        assert_eq!(groups.of(&stand), Vec::<PathBuf>::new());

        // The ordinary end leaves no group either.
        let mut process = stand.started().await;
        process.send("hello");
        while process.next_line().await.is_some() {}
        assert_eq!(process.wait().await.ended_by, EndedBy::Exited, "{sandboxed:?}");
        stand.assert_nothing_left();
        assert_eq!(groups.of(&stand), Vec::<PathBuf>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_guard_ends_its_run_first() {
    for sandboxed in BOTH {
        let stand = stand(sandboxed).await;
        let process = stand.started().await;

        kill_process(stand.guard_pid(), Signal::TERM).unwrap();
        let exit = ended(process).await;

        stand.assert_nothing_left();
        assert_eq!(exit.ended_by, EndedBy::GuardLost, "{sandboxed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_guard_doesnt_save_the_run_from_the_worker() {
    for sandboxed in BOTH {
        let stand = stand(sandboxed).await;
        let process = stand.started().await;
        kill_process(stand.guard_pid(), Signal::STOP).unwrap();
        let since = Instant::now();

        process.kill();
        let exit = ended(process).await;

        stand.assert_nothing_left();
        assert_eq!(exit.ended_by, EndedBy::Worker, "{sandboxed:?}");
        assert!(since.elapsed() < PATIENCE, "{:?}", since.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_guard_doesnt_keep_the_worker_when_the_cli_has_ended() {
    // Nothing of it outlives it, so its output ends with it.
    let stand = stand_with(Sandboxed::No, "#!/bin/sh\necho ready\nread -r line\n", &[]).await;
    let mut process = stand.start().await;
    assert_eq!(whole_line(&mut process).await.unwrap(), b"ready");
    kill_process(stand.guard_pid(), Signal::STOP).unwrap();
    process.send("hello");
    while process.next_line().await.is_some() {}
    let since = Instant::now();

    let exit = process.end_within(Duration::from_millis(500)).await;

    stand.assert_nothing_left();
    assert_eq!((exit.code, exit.ended_by), (None, EndedBy::Worker));
    assert!(since.elapsed() < PATIENCE, "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_started_under_a_lease_that_ran_out() {
    for sandboxed in BOTH {
        let mut stand = stand(sandboxed).await;
        // The worker was stopped between its claim and the start.
        let held_at = Instant::now().checked_sub(Duration::from_secs(3)).unwrap();
        stand.launch.beat_within = Duration::from_secs(2);

        let started = stand.start_held_at(|| held_at).await;

        let error = started.unwrap_err();
        assert!(process::is_too_late(&error), "{error}");
        stand.assert_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_next_ends_what_a_stopped_guard_of_a_stopped_worker_guards() {
    for sandboxed in BOTH {
        let mut stand = stand(sandboxed).await;
        let mark = |place: &str, name: &str| guard::marker(&format!("{place}{}.{name}", stand.token));
        let (earlier, next, elsewhere) = (mark("a", "1"), mark("a", "2"), mark("b", "1"));
        stand
            .launch
            .env
            .push(("CLAUDE_QUEUE_RUN".to_owned(), earlier.clone()));
        stand.launch.marker = earlier;
        let process = stand.started().await;
        kill_process(stand.guard_pid(), Signal::STOP).unwrap();

        assert_eq!(guard::kill_stale_runs(&elsewhere, || true), 0);
        assert!(!stand.alive().is_empty());
        // A zombie that wakes up in the middle of its start finds its successor's run.
        assert_eq!(guard::kill_stale_runs(&next, || false), 0);
        let asked = AtomicUsize::new(0);
        let until_it_is_lost = || asked.fetch_add(1, Ordering::Relaxed) < 2;
        assert_eq!(guard::kill_stale_runs(&next, until_it_is_lost), 0);
        stand.daemons_there().await;
        assert!(guard::kill_stale_runs(&next, || true) >= 5);

        stand.assert_nothing_left();
        // The worker, when it wakes, learns that its guard is gone.
        assert_eq!(ended(process).await.ended_by, EndedBy::GuardLost, "{sandboxed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_wakes_up_reads_its_beats_before_it_judges() {
    let mut stand = stand(Sandboxed::No).await;
    stand.launch.beat_within = SHORT;
    let process = stand.started().await;
    let guard = stand.guard_pid();

    kill_process(guard, Signal::STOP).unwrap();
    for _ in 0..6 {
        tokio::time::sleep(SHORT / 5).await;
        process.renewed_at(Instant::now());
    }
    kill_process(guard, Signal::CONT).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;

    assert!(!stand.alive().is_empty());
    process.kill();
    process.wait().await;
    stand.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandboxed_run_sees_and_changes_nothing_but_its_own() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "x").unwrap();
    // Each line names what an agent could try; a shell that succeeds says so.
    let script = format!(
        r#"#!/bin/sh
try() {{ if sh -c "$2" >/dev/null 2>&1; then echo "$1: yes"; else echo "$1: no"; fi; }}
try workspace 'pwd | grep -qx /workspace && : > made'
try home ': > /home/agent/made'
try tmp ': > /tmp/made'
try tools 'ls /usr/bin/env && sh -c true && grep -q agent /etc/passwd'
try 'one user' 'test "$(id -u)" = 1000'
try outside 'cat {outside}/secret'
try 'other homes' 'ls /root /home/[b-z]*'
try 'private keys' 'ls /etc/ssl/private /etc/shadow'
try system ': > /usr/made || : > /etc/made || : > /made || : > /opt/made'
try kernel 'echo 1 > /proc/sys/kernel/sysrq || echo b > /proc/sysrq-trigger'
try processes 'test "$(ls -d /proc/[0-9]* | wc -l)" -gt 12'
try network 'test "$(grep -c : /proc/net/dev)" -gt 1'
try rights 'grep -q "CapEff:.*[1-9a-f]" /proc/self/status || mount -t tmpfs x /mnt'
"#,
        outside = outside.path().display()
    );
    let stand = stand_with(Sandboxed::Yes, &script, &[]).await;
    let mut process = stand.start().await;

    let mut said = Vec::new();
    while let Some(line) = whole_line(&mut process).await {
        said.push(String::from_utf8(line).unwrap());
    }

    let expected = [
        "workspace: yes",
        "home: yes",
        "tmp: yes",
        "tools: yes",
        "one user: yes",
        "outside: no",
        "other homes: no",
        "private keys: no",
        "system: no",
        "kernel: no",
        "processes: no",
        "network: no",
        "rights: no",
    ];
    assert_eq!(said, expected);
    assert_eq!(process.wait().await.code, Some(0));
    assert!(stand.data.path().join("workspace/made").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_isnt_there_is_named() {
    let mut stand = stand(Sandboxed::No).await;
    stand.launch.program = "/nonexistent/claude".into();

    let error = stand.start_held_at(Instant::now).await.unwrap_err();

    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("/nonexistent/claude"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_without_an_order_ends_by_itself() {
    let stand = stand(Sandboxed::No).await;
    let socket = stand.launch.runtime_dir.join("guard.sock");
    let is_there = || {
        commands()
            .iter()
            .any(|(_, command)| command.contains(socket.to_str().unwrap()))
    };

    let waiting = stand.guard();
    // A busy machine takes a moment to start it.
    let since = Instant::now();
    while !is_there() {
        assert!(since.elapsed() < PATIENCE, "the guard doesn't start");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(waiting);

    let since = Instant::now();
    while is_there() {
        assert!(since.elapsed() < PATIENCE, "the guard waits on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn much_output_is_kept_for_a_reader_that_comes_late() {
    let script = "#!/bin/sh\ni=0; while [ $i -lt 20000 ]; do echo \"$i $1 0123456789012345678901234567890123456789\"; i=$((i+1)); done\n";
    let stand = stand_with(Sandboxed::Yes, script, &[]).await;
    let mut process = stand.start().await;
    process.close_stdin();
    stand.assert_nothing_left_within(Duration::from_mins(1)).await;

    let mut lines = 0;
    while let Some(line) = whole_line(&mut process).await {
        assert!(line.starts_with(format!("{lines} ").as_bytes()));
        lines += 1;
    }

    assert_eq!(lines, 20_000);
    assert_eq!(process.wait().await.code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_process_of_a_run_can_write_into_anothers_output_by_its_path() {
    let script = "#!/bin/sh\nfor fd in 0 1 2; do\n\
                  sh -c \"exec 2>/dev/null; echo forged > /proc/$$/fd/$fd\" && echo \"opened $fd\" || echo \"refused $fd\"\n\
                  done\n";
    for sandboxed in [Sandboxed::Yes, Sandboxed::No] {
        let stand = stand_with(sandboxed, script, &[]).await;
        let mut process = stand.start().await;

        let mut lines = Vec::new();
        while let Some(line) = whole_line(&mut process).await {
            lines.push(String::from_utf8(line).unwrap());
        }

        assert_eq!(lines, ["refused 0", "refused 1", "refused 2"]);
        assert_eq!(process.wait().await.code, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_without_end_is_not_kept_and_a_torn_last_line_is() {
    let script = "#!/bin/sh\necho first\nhead -c 20000000 /dev/zero\necho\n\
                  printf '{\"a\":\"'; head -c 17000000 /dev/zero | tr '\\0' x; echo '\",\"type\":\"result\"}'\nprintf last\n\
                  head -c 10000 /dev/zero | tr '\\0' x >&2; printf 'é%.0s' $(seq 2047) >&2; printf z >&2\n";
    let stand = stand_with(Sandboxed::No, script, &[]).await;
    let mut process = stand.start().await;

    assert_eq!(whole_line(&mut process).await.unwrap(), b"first");
    let too_long = |may_be_result| Some(OutputLine::TooLong { may_be_result });
    assert_eq!(process.next_line().await, too_long(false));
    assert_eq!(process.next_line().await, too_long(true));
    assert_eq!(whole_line(&mut process).await.unwrap(), b"last");
    assert_eq!(whole_line(&mut process).await, None);
    let exit = process.wait().await;
    // 4,096 bytes from the end is the middle of the pair of x and é.
    assert_eq!(exit.stderr_tail, format!("x{}z", "é".repeat(2047)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cli_that_reads_nothing_stops_nobody() {
    let stand = stand_with(
        Sandboxed::Yes,
        "#!/bin/sh\necho ready\nexec sleep 1000 \"0.$1\"\n",
        &[],
    )
    .await;
    let mut process = stand.start().await;
    assert_eq!(whole_line(&mut process).await.unwrap(), b"ready");

    process.send(&"x".repeat(1_000_000));
    process.close_stdin();
    process.kill();
    process.wait().await;

    stand.assert_nothing_left();
}

/// A worker in a process of its own, for tests that kill or stop it.
struct Worker {
    process: tokio::process::Child,
    stand: PathBuf,
}

/// Runs in that process; does nothing in an ordinary test run.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_process_of_its_own() {
    let Some(wish) = env::var_os("GUARD_TEST_WORKER") else {
        return;
    };
    let (sandboxed, beat_within) = match wish.to_str().unwrap().split_once(' ').unwrap() {
        ("sandboxed", seconds) => (Sandboxed::Yes, seconds),
        (_, seconds) => (Sandboxed::No, seconds),
    };
    let mut stand = stand_with(sandboxed, STUBBORN, &[&env::var("GUARD_TEST_BARE").unwrap()]).await;
    stand.launch.beat_within = Duration::from_secs(beat_within.parse().unwrap());
    let mut process = stand.start().await;
    assert_eq!(whole_line(&mut process).await.unwrap(), b"ready");
    // The first line on standard error is the other process' news.
    eprintln!("{} {}", stand.token, stand.launch.runtime_dir.display());
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        process.renewed_at(Instant::now());
    }
}

impl Worker {
    /// Starts it and returns it with its run's token.
    async fn start(sandboxed: Sandboxed, beat_within: u64, bare: &str) -> (Self, Stand) {
        let mut process = tokio::process::Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "in_a_process_of_its_own",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(
                "GUARD_TEST_WORKER",
                format!(
                    "{} {beat_within}",
                    if sandboxed == Sandboxed::Yes {
                        "sandboxed"
                    } else {
                        "open"
                    }
                ),
            )
            .env("GUARD_TEST_BARE", bare)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let news = lines.next_line().await.unwrap().unwrap();
        let (token, runtime_dir) = news.split_once(' ').unwrap();
        // Only what finds the processes matters here.
        let mut found = stand(Sandboxed::No).await;
        found.token = token.to_owned();
        found.launch.runtime_dir = runtime_dir.into();
        let stand = PathBuf::from(runtime_dir).ancestors().nth(2).unwrap().to_owned();
        found.daemons_there().await;
        (Self { process, stand }, found)
    }

    fn signal(&self, signal: Signal) {
        kill_process(
            Pid::from_raw(self.process.id().unwrap().cast_signed()).unwrap(),
            signal,
        )
        .unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.start_kill();
        let _ = fs::remove_dir_all(&self.stand);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_takes_its_runs_with_it() {
    for sandboxed in BOTH {
        let (mut worker, stand) = Worker::start(sandboxed, 60, "bare").await;

        worker.process.kill().await.unwrap();

        stand.assert_nothing_left_within(PATIENCE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runs_of_a_stopped_worker_end_while_it_is_stopped() {
    let case = async |sandboxed| {
        let (worker, stand) = Worker::start(sandboxed, SHORT.as_secs(), "bare").await;
        let since = Instant::now();

        worker.signal(Signal::STOP);

        stand.assert_nothing_left_within(SHORT + PATIENCE).await;
        assert!(
            since.elapsed() > Duration::from_millis(1500),
            "{:?}",
            since.elapsed()
        );
    };
    tokio::join!(case(Sandboxed::Yes), case(Sandboxed::No));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_and_its_guard_left_is_ended_at_the_next_start() {
    let mut living = stand_with(Sandboxed::No, STUBBORN, &["marked"]).await;
    living.launch.deadline = Duration::from_mins(2);
    let process = living.started().await;
    // One guard is killed, another is stopped, which its daemon without a mark doesn't survive either.
    let (mut killed, left) = Worker::start(Sandboxed::No, 60, "marked").await;
    let (mut stopped, held) = Worker::start(Sandboxed::No, 60, "bare").await;
    kill_process(held.guard_pid(), Signal::STOP).unwrap();
    killed.signal(Signal::STOP);
    kill_process(left.guard_pid(), Signal::KILL).unwrap();
    killed.process.kill().await.unwrap();
    stopped.process.kill().await.unwrap();
    // Not asserted that they still live: another worker that starts on this machine may have come first.

    tokio::task::spawn_blocking(guard::kill_orphans).await.unwrap();

    left.assert_nothing_left();
    held.assert_nothing_left();
    assert!(!living.alive().is_empty(), "a run of a living worker was ended");
    process.kill();
    process.wait().await;
    living.assert_nothing_left();
}
