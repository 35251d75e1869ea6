//! What a run can do to the machine: nothing.

use std::fs;
use std::process::Stdio;

use rustix::process::geteuid;
use tests::client::PATIENCE;
use tests::script::{Step, steps};
use tests::system::System;
use tests::{account::Account, once, paths};
use tokio::process::Command;

once!(
    a_worker_that_root_starts_becomes_an_ordinary_user,
    root_runs_nothing_in_the_sandbox,
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
