//! What a run can do to the machine: nothing.

use std::fs;
use std::process::Stdio;

use rustix::process::geteuid;
use serde_json::json;
use tests::client::{Client, PATIENCE};
use tests::database::Database;
use tests::disk::Disk;
use tests::script::{Step, answer, steps};
use tests::system::{KEYS, System};
use tests::{account::Account, eventually, once, paths};
use tokio::process::Command;

once!(
    a_worker_that_root_starts_becomes_an_ordinary_user,
    root_runs_nothing_in_the_sandbox,
    a_run_gets_what_tools_need_and_nothing_more_of_the_kernel,
    files_in_memory_count_as_memory,
    a_home_without_rights_doesnt_break_the_session,
    a_run_without_the_sandbox_cant_read_the_workers_memory,
    a_run_that_fills_the_disk_stops_nobody_else,
    a_run_that_takes_more_of_the_disk_than_it_may_ends,
);

/// What a script in the sandbox prints.
async fn prints(system: &System, script: &str) -> String {
    let client = system.client();
    let id = client.play(&steps([Step::Shell(script.to_owned())])).await;
    assert_eq!(client.finished(&id).await["status"], "done");
    fs::read_to_string(system.workspace(&id).join("out")).expect("the script wrote it")
}

async fn a_worker_that_root_starts_becomes_an_ordinary_user() {
    if !geteuid().is_root() {
        // Only root can become somebody else.
        return;
    }
    let system = System::builder()
        .as_root()
        .up()
        .env("WORKER_USER", "nobody")
        .start()
        .await;
    let mut system = system;
    let nobody = Account::find("nobody").unwrap();

    let pid = system.api(0).pid().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let ids = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect::<Vec<u32>>()
    };
    assert_eq!(ids("Uid:"), [nobody.uid; 4]);
    assert_eq!(ids("Gid:"), [nobody.gid; 4]);
    assert_eq!(ids("Groups:"), [nobody.gid]);

    // Settings of the machine and modes of its devices.
    let script = "{ echo x >/proc/sys/kernel/core_pattern || chmod 777 /dev/null || mount --bind /tmp /mnt; } 2>&1 \
                  | tr -s '\\n' ' ' >/workspace/out; stat -c %a /dev/null >>/workspace/out";
    let before = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let said = prints(&system, script).await;

    assert!(
        said.ends_with("666\n") && said.contains("Read-only file system"),
        "{said}"
    );
    assert_eq!(
        fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(),
        before
    );
}

async fn root_runs_nothing_in_the_sandbox() {
    if !geteuid().is_root() {
        return;
    }
    let folder = paths::folder('d');
    let start = async |program: &str, arguments: &[&str]| {
        let url = format!("sqlite://{}", folder.join("data/x.db").display());
        let child = Command::new(paths::binary(program))
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("DATABASE_URL", url)
            .env("DATA_DIR", folder.join("data"))
            .env(paths::MARKER, &folder)
            .current_dir(&folder)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        tokio::time::timeout(PATIENCE, child)
            .await
            .expect("it ends")
            .unwrap()
    };

    for (program, arguments) in [
        ("claude-queue-worker", &[][..]),
        ("claude-queue", &["up"]),
        ("claude-queue", &["demo"]),
    ] {
        let refused = start(program, arguments).await;

        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{program} {arguments:?}: {said}");
        assert!(
            said.contains("WORKER_USER isn't set") && said.contains("useradd"),
            "{said}"
        );
        assert!(!folder.join("data").exists(), "it made nothing");
    }
}

/// Calls the kernel past every library, and says what it answered: `refused` is ENOSYS.
const CALLS: &str = r#"
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
x32 = 0x40000000
calls = {"ptrace": 101, "process_vm_readv": 310, "pidfd_getfd": 438, "io_uring_setup": 425, "userfaultfd": 323, "bpf": 321,
    "perf_event_open": 298, "keyctl": 250, "mount": 165, "unshare": 272, "setns": 308, "clone3": 435, "fsopen": 430,
    "ptrace of x32": 101 | x32, "ptrace of x32 itself": 521 | x32}
for name, number in calls.items():
    ctypes.set_errno(0)
    if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 38:
        print("NOT REFUSED:", name, ctypes.get_errno())
if libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) != -1:
    print("NOT REFUSED: clone with a user namespace")
for family, kind, protocol in [(40, 1, 0), (38, 5, 0), (17, 3, 0), (16, 3, 9), (16, 3, 16)]:
    try:
        socket.socket(family, kind, protocol)
        print("NOT REFUSED: socket", family, protocol)
    except OSError as error:
        if error.errno != 38:
            print("NOT REFUSED: socket", family, protocol, error)
for family in [socket.AF_UNIX, socket.AF_INET, socket.AF_INET6]:
    socket.socket(family, socket.SOCK_STREAM)
socket.socket(16, 3, 0)
connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connected.connect("/run/gateway.sock")
import threading, subprocess
thread = threading.Thread(target=lambda: print("a thread")); thread.start(); thread.join()
for path in ["/proc/1/cmdline", "/proc/net/unix"]:
    for word in [b"/data/jobs", b"claude-queue-", b"/tmp/cq-"]:
        if word in open(path, "rb").read():
            print("SHOWN in", path, open(path, "rb").read())
for path in ["/dev/file", "/usr/file", "/file", "/proc/sys/kernel/core_pattern", "/proc/sys/user/max_user_namespaces"]:
    try:
        open(path, "w")
        print("WRITTEN:", path)
    except OSError:
        pass
if subprocess.run(["unshare", "-U", "true"], stderr=subprocess.DEVNULL).returncode == 0:
    print("MADE: a user namespace")
"#;

async fn a_run_gets_what_tools_need_and_nothing_more_of_the_kernel() {
    if cfg!(not(target_arch = "x86_64")) {
        // The numbers above are of this architecture.
        return;
    }
    let system = System::builder().start().await;
    let script = format!(
        "exec >out 2>&1\ncat >calls.py <<'END'\n{CALLS}\nEND\npython3 calls.py\n\
         printf '#include <stdio.h>\nint main(void) {{ puts(\"compiled\"); return 0; }}\n' >c.c\n\
         cc c.c -o compiled && ./compiled\n\
         git init -q . && git add c.c && git -c user.name=a -c user.email=a@b commit -qm first && git log --format=%s\n\
         command -v node >/dev/null || echo 'node 42'\n\
         command -v node >/dev/null && node -e 'require(\"fs\").readFile(\"c.c\", () => console.log(\"node\", 6 * 7))'\n"
    );

    let said = prints(&system, &script).await;

    assert_eq!(said, "a thread\ncompiled\nfirst\nnode 42\n");
}

async fn files_in_memory_count_as_memory() {
    let system = System::builder().env("RUN_MEMORY_MB", "256").start().await;
    let client = system.client();
    let script = "head -c 300M /dev/zero >/tmp/a; ls -s --block-size=1M /tmp/a >>out; rm /tmp/a; \
                  head -c 300M /dev/zero >/dev/shm/a; ls -s --block-size=1M /dev/shm/a >>out; rm /dev/shm/a";
    assert_eq!(prints(&system, script).await, "128 /tmp/a\n64 /dev/shm/a\n");

    let grow = |open: &str| {
        format!("import os, time\n{open}\nfor i in range(600): os.write(f, bytes(1 << 20))\ntime.sleep(600)")
    };
    let unnamed = grow("f = os.memfd_create('x')");
    let script = format!("head -c 100M /dev/zero >/tmp/a; python3 -c \"{unnamed}\"");
    let id = client.play(&steps([Step::Shell(script)])).await;

    let job = client.finished(&id).await;
    assert_eq!(job["error_code"], "out_of_memory", "{job:#}");
}

async fn a_home_without_rights_doesnt_break_the_session() {
    let system = System::builder().start().await;
    let client = system.client();
    let script = steps([Step::Shell("chmod 000 /workspace /home/agent".to_owned())]);
    client.session("locked").await;
    let body = json!({ "message": script.prompt(), "session": "locked" });
    for _ in 0..2 {
        let id = client.accepted_body(&body).await;
        assert_eq!(client.finished(&id).await["status"], "done");
    }
}

async fn a_run_that_fills_the_disk_stops_nobody_else() {
    let disk = Disk::mount(200);
    let file = disk.path().join("small.db");
    let mut system = System::builder()
        .within(&disk)
        .on(Database::file(&disk.from_outside(&file)))
        .env("DATABASE_URL", &format!("sqlite://{}", file.display()))
        .env("DATA_DIR", disk.path().join("data").to_str().unwrap())
        .env("DISK_FLOOR_MB", "60")
        .start()
        .await;
    let client = system.client();
    let other = Client::new(&system.api(0).url(), Some(KEYS[1]));
    let workspace = disk.from_outside(&disk.path().join("data/jobs"));

    // It goes on when it can't, as a program with a bug does.
    let script =
        "while :; do cat /dev/zero >>/workspace/fill; cat /dev/zero >>/home/agent/fill; done 2>/dev/null";
    let greedy = client.play(&steps([Step::Shell(script.to_owned())])).await;
    let ended = client.finished(&greedy).await;
    let body = json!({ "message": answer("still here").prompt() });
    let id = eventually(PATIENCE, "an accepted job", async || {
        let answer = other.submit(&body).await;
        (answer.status == 202).then(|| answer.data(202)["id"].as_str().unwrap().to_owned())
    })
    .await;

    assert_eq!(ended["error_code"], "disk_full", "{ended:#}");
    assert_eq!(other.finished(&id).await["result"]["content"], "still here");
    assert!(!workspace.join(&greedy).exists());
    assert_eq!(system.worker(0).stop(PATIENCE).await, Some(0));
    assert_eq!(system.api(0).stop(PATIENCE).await, Some(0));
}

async fn a_run_that_takes_more_of_the_disk_than_it_may_ends() {
    let system = System::builder().env("RUN_DISK_MB", "20").start().await;
    let client = system.client();

    // One file is stopped by the kernel, many are counted.
    let script = "head -c 30M /dev/zero >/tmp/one; stat -c %s /tmp/one >out";
    assert_eq!(prints(&system, script).await, "20971520\n");
    let script =
        "for i in 1 2 3 4 5 6; do head -c 5M /dev/zero >$i; done; mkdir l; mv ? l; chmod 0 l; sleep 600";
    let id = client.play(&steps([Step::Shell(script.to_owned())])).await;

    let job = client.finished(&id).await;
    assert_eq!(job["error_code"], "disk_full", "{job:#}");
    assert!(!system.workspace(&id).exists());
}

async fn a_run_without_the_sandbox_cant_read_the_workers_memory() {
    let mut system = System::builder().sandbox(false).start().await;
    let pid = system.worker(0).pid().unwrap();

    let script = format!(
        "for file in environ maps mem; do head -c 1 /proc/{pid}/$file >/dev/null 2>&1 && echo READ $file; done >out; \
         tr '\\0' ' ' </proc/{pid}/cmdline >>out"
    );
    let said = prints(&system, &script).await;

    assert!(
        !said.contains("READ") && said.contains("claude-queue-worker"),
        "{said}"
    );
}
