//! Where a run of the test binary keeps everything, and who clears it away. All lies under one short folder; a
//! reaper process waits for the end of the test binary, however it comes, and then ends every process that
//! belongs to the folder and removes it. So nothing is left behind even after `kill -9`. What a killed reaper
//! left is swept by the next run.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::account::Account;
use crate::processes;

/// The environment variable that every process of a test carries; its value is the folder of its system.
pub const MARKER: &str = "CLAUDE_QUEUE_TEST";

/// The environment variable that names another folder of built binaries: for a measurement of another release.
pub const BINARIES: &str = "CLAUDE_QUEUE_BINARIES";

const PREFIX: &str = "cq-";

/// The folder of this run of the test binary: made, and given its reaper, by the first call.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        sweep();
        let root = Path::new("/tmp").join(format!(
            "{PREFIX}{}-{}",
            std::process::id(),
            &uuid::Uuid::new_v4().simple().to_string()[..4]
        ));
        fs::create_dir(&root).expect("a folder in /tmp for this run of the tests");
        // PostgreSQL runs as another user when the tests run as root, and must be able to pass through.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o711)).expect("the folder is ours");
        keep(&root);
        root
    })
}

/// A new folder under the root, its name of fixed length, so that no name is the beginning of another.
pub fn folder(kind: char) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let folder = root().join(format!("{kind}{:04}", COUNT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&folder).expect("a new folder under the root");
    if let Some(account) = Account::of_product() {
        account.own(&folder).expect("the folder is ours");
    }
    folder
}

/// The folder of the built binaries: where this test binary lies, or one above (`target/debug`), unless [`BINARIES`]
/// names it.
pub fn binaries() -> PathBuf {
    if let Some(folder) = std::env::var_os(BINARIES) {
        return folder.into();
    }
    let exe = std::env::current_exe().expect("a running program has a path");
    let folder = exe.parent().expect("a program lies in a folder");
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder
            .parent()
            .expect("the folder lies in the target folder")
            .to_owned()
    } else {
        folder.to_owned()
    }
}

/// A built binary of the workspace; says what to do when it isn't there.
pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(
        path.is_file(),
        "{} is missing: the tests start the real binaries; run `make test`, or `cargo build --bins` first",
        path.display()
    );
    reachable(path)
}

/// A program where the product's user can start it.
pub fn reachable(program: PathBuf) -> PathBuf {
    match Account::of_product() {
        Some(account) => account.reachable(program, root()),
        None => program,
    }
}

/// A shell script as a program of this name, for a CLI that doesn't even start to be one. Another process writes it: a
/// file that this one has open, even in a child that another test is just forking, can't be started.
pub fn program(name: &str, script: &str) -> PathBuf {
    let path = folder('c').join(name);
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("`install` of coreutils starts");
    let mut input = install.stdin.take().expect("it is piped");
    write!(input, "#!/bin/sh\n{script}\n").expect("it reads its input");
    drop(input);
    assert!(install.wait().expect("our own child").success());
    path
}

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate lies in the repository")
}

fn keep(root: &Path) {
    let reaper = Command::new(binaries().join("reaper"))
        .arg(root)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the reaper starts");
    // The pipe stays open as long as this process runs: its end is what the reaper waits for.
    std::mem::forget(reaper);
}

fn sweep() {
    let Ok(entries) = fs::read_dir("/tmp") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        let Some(pid) = rest.split('-').next().and_then(|pid| pid.parse::<i32>().ok()) else {
            continue;
        };
        let reaper_had_time = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .is_ok_and(|made| made.elapsed().is_ok_and(|age| age > Duration::from_mins(1)));
        if reaper_had_time && !processes::is_alive(pid) {
            clear(&entry.path());
        }
    }
}

/// Ends what belongs to a folder and removes it, as far as that is possible.
pub fn clear(folder: &Path) {
    processes::end_folder(folder, Duration::from_secs(5));
    // A test may have mounted a small disk; only what is in the folder is ours to unmount.
    for mount in fs::read_to_string("/proc/mounts")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
    {
        if Path::new(mount).starts_with(folder) {
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
    }
    let _ = fs::remove_dir_all(folder);
}
