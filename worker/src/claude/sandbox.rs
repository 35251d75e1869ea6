//! Isolates the CLI from the machine: builds the command line of bubblewrap, or none.
//!
//! In the sandbox a run sees the system read-only, its own workspace, home and `/tmp`, only its own processes, and no
//! network except the gateway's socket. The workspace is `/workspace` on every machine, so that a session can resume on
//! any of them. The environment is passed at the spawn, not in arguments, which every user of the machine can read.

mod seccomp;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::claude::command::CliPaths;
use crate::claude::program;
use crate::guard::Setup;
use crate::workspace::Runtime;

const HOME: &str = "/home/agent";
const WORKSPACE: &str = "/workspace";
const CLI: &str = "/opt/claude";
const GATEWAY_SOCKET: &str = "/run/gateway.sock";
const SYSTEM_PROMPT: &str = "/run/system-prompt";

/// Top-level directories of the system besides `/usr`: links into it on most systems, directories on some.
const SYSTEM_FOLDERS: [&str; 5] = ["bin", "sbin", "lib", "lib64", "lib32"];

/// Parts of `/etc` that programs need and that contain no secret. If the worker is root, the agent can read everything
/// that it sees, so the directories with private keys beside the certificates are left out. Missing ones are skipped.
const ETC: [&str; 8] = [
    "ssl/certs",
    "ssl/openssl.cnf",
    "pki/tls/certs",
    "pki/ca-trust",
    "ca-certificates",
    "ld.so.cache",
    "alternatives",
    "localtime",
];

/// Files of `/etc` that the sandbox replaces: the agent has one user and knows one host.
const OWN_ETC: [(&str, &str); 3] = [
    (
        "passwd",
        "agent:x:1000:1000:agent:/home/agent:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    ),
    ("group", "agent:x:1000:\nnogroup:x:65534:\n"),
    ("hosts", "127.0.0.1 localhost job\n::1 localhost\n"),
];

/// Timeout of the trial run of the sandbox.
const TRIAL: Duration = Duration::from_secs(20);

/// Why the sandbox doesn't work. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program `bwrap` is missing.
    #[error(
        "the sandbox needs bubblewrap, and there is no program `bwrap` on the PATH: install the package `bubblewrap` \
         (Debian, Ubuntu: apt-get install bubblewrap), or set SANDBOX_ENABLED=false to run the agent with all rights \
         of this user"
    )]
    Missing,
    /// The system doesn't let bubblewrap work.
    #[error(
        "bubblewrap can't make a sandbox on this system ({said}): {remedy}; or set SANDBOX_ENABLED=false to run the \
         agent with all rights of this user"
    )]
    Forbidden {
        /// The standard error of bubblewrap.
        said: String,
        /// How to let it work.
        remedy: &'static str,
    },
    /// The trial run failed.
    #[error("could not try the sandbox")]
    Trial(#[source] io::Error),
}

/// The files of one run, with absolute paths as the worker sees them.
#[derive(Clone, Debug)]
pub struct Places {
    /// The CLI's own file, with links resolved ([`program::find_cli`]).
    pub cli: PathBuf,
    /// The agent's working directory.
    pub workspace: PathBuf,
    /// The home directory of the agent, with the CLI's sessions.
    pub home: PathBuf,
    /// The directory of this run for temporary files; the sandbox has its own in memory.
    pub tmp: PathBuf,
    /// The socket of the run's gateway.
    pub gateway_socket: PathBuf,
    /// A file with the system prompt.
    pub system_prompt: Option<PathBuf>,
}

/// A program to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// An absolute path.
    pub program: PathBuf,
    /// What bubblewrap is told beside its arguments; none without it.
    pub setup: Option<Setup>,
    /// Without the program's name.
    pub args: Vec<String>,
    /// The working directory.
    pub cwd: PathBuf,
    /// Whether the guard has to forbid a change of the user ([`Launch::no_new_privileges`](crate::claude::process::Launch::no_new_privileges)).
    pub no_new_privileges: bool,
}

/// Whether runs are isolated (`SANDBOX_ENABLED`).
#[derive(Clone, Debug)]
pub enum Isolation {
    /// Each run in a sandbox of its own.
    Sandbox(Bubblewrap),
    /// No sandbox: the CLI runs as the worker's user, with real paths.
    Off,
}

impl Isolation {
    /// The paths of the run as the CLI sees them.
    pub fn paths(&self, places: &Places) -> CliPaths {
        match self {
            Self::Sandbox(_) => CliPaths {
                home: HOME.into(),
                tmp: "/tmp".into(),
                gateway_socket: GATEWAY_SOCKET.into(),
            },
            Self::Off => CliPaths {
                home: places.home.clone(),
                tmp: places.tmp.clone(),
                gateway_socket: places.gateway_socket.clone(),
            },
        }
    }

    /// The workspace as the CLI sees it.
    pub fn workspace(&self, places: &Places) -> PathBuf {
        match self {
            Self::Sandbox(_) => WORKSPACE.into(),
            Self::Off => places.workspace.clone(),
        }
    }

    /// The file with the system prompt as the CLI sees it.
    pub fn system_prompt(&self, places: &Places) -> Option<PathBuf> {
        match self {
            Self::Sandbox(_) => places.system_prompt.is_some().then(|| SYSTEM_PROMPT.into()),
            Self::Off => places.system_prompt.clone(),
        }
    }

    /// The program that runs the CLI with these arguments.
    pub fn command(&self, places: &Places, cli_args: Vec<String>) -> Command {
        match self {
            Self::Sandbox(bubblewrap) => {
                let mut args = vec!["--".to_owned(), CLI.to_owned()];
                args.extend(cli_args);
                let setup = Setup {
                    options: bubblewrap.options(places),
                    filter: bubblewrap.filter.clone(),
                };
                // Its own directory is of no matter: `--chdir` says where the CLI starts.
                Command {
                    program: bubblewrap.program.clone(),
                    setup: Some(setup),
                    args,
                    cwd: "/".into(),
                    no_new_privileges: false,
                }
            }
            Self::Off => Command {
                program: places.cli.clone(),
                setup: None,
                args: cli_args,
                cwd: places.workspace.clone(),
                no_new_privileges: true,
            },
        }
    }
}

/// A bubblewrap that was tried and works here: only [`check`] makes one.
#[derive(Clone, Debug)]
pub struct Bubblewrap {
    program: PathBuf,
    /// The options that show the system: the same for every run.
    system: Vec<String>,
    /// The filter of system calls.
    filter: PathBuf,
    knows: Knows,
    /// The limit on the memory of a run, in bytes.
    memory: Option<u64>,
}

/// Options that came with a release of bubblewrap that some systems don't have yet.
#[derive(Clone, Copy, Debug, Default)]
struct Knows {
    /// `--size`, of 0.7.
    size: bool,
    /// `--disable-userns`, of 0.8.
    disable_userns: bool,
}

impl Bubblewrap {
    /// The same with a limit on the memory of a run: what a run may put into its temporary files is a part of it.
    #[must_use]
    pub fn with_memory(mut self, limit: Option<u64>) -> Self {
        self.memory = limit;
        self
    }
}

/// Finds bubblewrap on `path` (the variable `PATH`) and runs a program in the very sandbox that runs get. The
/// worker doesn't start when this fails.
pub async fn check(runtime: &Runtime, path: Option<&OsStr>) -> Result<Bubblewrap, Error> {
    let program = program::find_program(Path::new("bwrap"), path).ok_or(Error::Missing)?;
    let help = program::output(&program, &["--help"], &[], TRIAL).await;
    let help = help.map_err(Error::Trial)?;
    let help = String::from_utf8_lossy(&help.stdout);
    let knows = Knows {
        size: help.contains("--size "),
        disable_userns: help.contains("--disable-userns "),
    };
    if !(knows.size && knows.disable_userns) {
        tracing::warn!(
            "this bubblewrap is older than 0.8: runs can make user namespaces, and their /tmp has no size of its own"
        );
    }
    let bubblewrap = prepare(program, runtime, knows).map_err(Error::Trial)?;
    try_it(&bubblewrap, runtime).await?;
    Ok(bubblewrap)
}

/// Writes the sandbox's own files and looks at the system once.
fn prepare(program: PathBuf, runtime: &Runtime, knows: Knows) -> io::Result<Bubblewrap> {
    let etc = runtime.path().join("etc");
    fs::create_dir_all(&etc)?;
    for (name, text) in OWN_ETC {
        fs::write(etc.join(name), text)?;
    }
    let mut system = strings(&["--ro-bind", "/usr", "/usr"]);
    for name in SYSTEM_FOLDERS {
        let path = format!("/{name}");
        match fs::read_link(&path) {
            Ok(target) => system.extend(["--symlink".to_owned(), text(&target), path]),
            Err(_) => system.extend(["--ro-bind-try".to_owned(), path.clone(), path]),
        }
    }
    system.extend(strings(&["--dir", "/etc"]));
    for name in ETC {
        let path = format!("/etc/{name}");
        system.extend(["--ro-bind-try".to_owned(), path.clone(), path]);
    }
    for (name, _) in OWN_ETC {
        system.extend([
            "--ro-bind".to_owned(),
            text(&etc.join(name)),
            format!("/etc/{name}"),
        ]);
    }
    let filter = runtime.path().join("filter");
    fs::write(&filter, seccomp::program()?)?;
    Ok(Bubblewrap {
        program,
        system,
        filter,
        knows,
        memory: None,
    })
}

async fn try_it(bubblewrap: &Bubblewrap, runtime: &Runtime) -> Result<(), Error> {
    let run = runtime.run().map_err(Error::Trial)?;
    let places = Places {
        cli: fs::canonicalize("/bin/sh").map_err(Error::Trial)?,
        workspace: run.tmp(),
        home: run.tmp(),
        tmp: run.tmp(),
        gateway_socket: run.gateway_socket(),
        system_prompt: None,
    };
    fs::write(&places.gateway_socket, "").map_err(Error::Trial)?;
    let script = strings(&["-c", "test -w /workspace && ! test -w /usr && : > /tmp/x"]);
    let command = Isolation::Sandbox(bubblewrap.clone()).command(&places, script);
    let descriptors = command.setup.as_ref().map(Setup::open).transpose();
    let descriptors = descriptors.map_err(Error::Trial)?;
    let first = descriptors.iter().flat_map(|open| &open.arguments);
    let args: Vec<&str> = first.chain(&command.args).map(String::as_str).collect();
    let output = program::output(&command.program, &args, &[], TRIAL).await;
    let output = output.map_err(Error::Trial)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr)
        .trim()
        .chars()
        .take(300)
        .collect::<String>();
    let said = if said.is_empty() {
        output.status.to_string()
    } else {
        said
    };
    Err(Error::Forbidden {
        said,
        remedy: remedy(|setting| fs::read_to_string(setting).ok()),
    })
}

/// What most likely forbids user namespaces, by the settings of the kernel.
fn remedy(setting: impl Fn(&str) -> Option<String>) -> &'static str {
    let is = |name: &str, value: &str| setting(name).is_some_and(|text| text.trim() == value);
    if is("/proc/sys/user/max_user_namespaces", "0") {
        "allow user namespaces: sysctl -w user.max_user_namespaces=10000"
    } else if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "allow user namespaces: sysctl -w kernel.unprivileged_userns_clone=1"
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "give bwrap an AppArmor profile with `userns`, or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    } else {
        "it needs user namespaces; a container must allow them, and then run as an ordinary user, never as root \
         (Docker: --user 1000:1000 --security-opt seccomp=unconfined --security-opt apparmor=unconfined \
         --security-opt systempaths=unconfined; the last one lets root in the container write the host's /proc/sys)"
    }
}

impl Bubblewrap {
    /// All options.
    fn options(&self, places: &Places) -> Vec<String> {
        let mut args = strings(&["--unshare-user", "--uid", "1000", "--gid", "1000"]);
        args.extend(strings(&[
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-net",
            "--unshare-uts",
        ]));
        args.extend(strings(&[
            "--unshare-cgroup-try",
            "--die-with-parent",
            "--new-session",
        ]));
        if self.knows.disable_userns {
            args.push("--disable-userns".to_owned());
        }
        args.extend(strings(&["--cap-drop", "ALL", "--hostname", "job"]));
        args.extend(self.system.iter().cloned());
        args.extend(strings(&[
            "--proc",
            "/proc",
            "--ro-bind",
            "/proc/sys",
            "/proc/sys",
        ]));
        args.extend(strings(&["--dev", "/dev"]));
        // Each of these is memory. Two that are full leave a part of the limit for the processes.
        for (folder, part) in [("/dev/shm", 4), ("/tmp", 2)] {
            if let Some(memory) = self.memory.filter(|_| self.knows.size) {
                args.extend(["--size".to_owned(), (memory / part).to_string()]);
            }
            args.extend(strings(&["--tmpfs", folder]));
        }
        args.extend(strings(&["--remount-ro", "/dev"]));
        let mut bind = |how: &str, from: &Path, to: &str| {
            args.extend([how.to_owned(), text(from), to.to_owned()]);
        };
        bind("--bind", &places.home, HOME);
        bind("--bind", &places.workspace, WORKSPACE);
        bind("--ro-bind", &places.cli, CLI);
        bind("--ro-bind", &places.gateway_socket, GATEWAY_SOCKET);
        if let Some(prompt) = &places.system_prompt {
            bind("--ro-bind", prompt, SYSTEM_PROMPT);
        }
        args.extend(strings(&["--remount-ro", "/", "--chdir", WORKSPACE]));
        args
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A path as an argument. The worker's paths are made of its own settings, which are text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            cli: "/srv/claude".into(),
            workspace: "/data/jobs/job_1/workspace".into(),
            home: "/data/jobs/job_1/home".into(),
            tmp: "/tmp/cq/1/tmp".into(),
            gateway_socket: "/tmp/cq/1/gateway.sock".into(),
            system_prompt: Some("/tmp/cq/1/system-prompt".into()),
        }
    }

    fn sandbox() -> Isolation {
        Isolation::Sandbox(Bubblewrap {
            program: "/usr/bin/bwrap".into(),
            system: strings(&["--ro-bind", "/usr", "/usr"]),
            filter: "/tmp/cq/filter".into(),
            knows: Knows {
                size: true,
                disable_userns: true,
            },
            memory: Some(4 << 20),
        })
    }

    #[test]
    fn the_sandbox_shows_the_run_its_own_places_and_nothing_else_of_the_machine() {
        let command = sandbox().command(&places(), strings(&["-p", "--verbose"]));

        let setup = command.setup.unwrap();
        let line = setup.options.join(" ");
        let expected = "--unshare-user --uid 1000 --gid 1000 --unshare-pid --unshare-ipc --unshare-net --unshare-uts \
            --unshare-cgroup-try --die-with-parent --new-session --disable-userns --cap-drop ALL --hostname job --ro-bind /usr /usr \
            --proc /proc --ro-bind /proc/sys /proc/sys --dev /dev \
            --size 1048576 --tmpfs /dev/shm --size 2097152 --tmpfs /tmp --remount-ro /dev --bind /data/jobs/job_1/home /home/agent \
            --bind /data/jobs/job_1/workspace /workspace --ro-bind /srv/claude /opt/claude \
            --ro-bind /tmp/cq/1/gateway.sock /run/gateway.sock --ro-bind /tmp/cq/1/system-prompt /run/system-prompt \
            --remount-ro / --chdir /workspace";
        assert_eq!(line, expected);
        assert_eq!(command.args, ["--", "/opt/claude", "-p", "--verbose"]);
        assert_eq!(setup.filter, Path::new("/tmp/cq/filter"));
        assert_eq!(command.program, Path::new("/usr/bin/bwrap"));
    }

    #[test]
    fn paths_inside_the_sandbox_are_the_same_for_every_run() {
        let paths = sandbox().paths(&places());

        assert_eq!(paths.home, Path::new("/home/agent"));
        assert_eq!(paths.tmp, Path::new("/tmp"));
        assert_eq!(paths.gateway_socket, Path::new("/run/gateway.sock"));
        assert_eq!(sandbox().workspace(&places()), Path::new("/workspace"));
        assert_eq!(
            sandbox().system_prompt(&places()).unwrap(),
            Path::new("/run/system-prompt")
        );
    }

    #[test]
    fn without_the_sandbox_the_cli_is_started_itself_and_can_gain_no_rights() {
        let command = Isolation::Off.command(&places(), strings(&["-p"]));

        assert_eq!(command.program, Path::new("/srv/claude"));
        assert_eq!(command.args, ["-p"]);
        assert_eq!(command.cwd, Path::new("/data/jobs/job_1/workspace"));
        assert!(command.no_new_privileges);
        assert_eq!(
            Isolation::Off.paths(&places()).home,
            Path::new("/data/jobs/job_1/home")
        );
    }

    #[test]
    fn the_remedy_names_the_setting_that_forbids_namespaces() {
        let only = |name: &'static str, value: &'static str| {
            move |setting: &str| (setting == name).then(|| format!("{value}\n"))
        };

        assert!(remedy(only("/proc/sys/user/max_user_namespaces", "0")).contains("max_user_namespaces"));
        assert!(remedy(only("/proc/sys/kernel/unprivileged_userns_clone", "0")).contains("userns_clone"));
        assert!(
            remedy(only(
                "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
                "1"
            ))
            .contains("AppArmor")
        );
        assert!(remedy(|_| None).contains("container"));
    }

    /// A folder for `PATH` with a `bwrap` that does what `script` says.
    fn path_with(script: Option<&str>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        if let Some(script) = script {
            program::test_support::executable(&folder.path().join("bwrap"), script.as_bytes());
        }
        folder
    }

    #[tokio::test]
    async fn without_bubblewrap_the_package_is_named() {
        let runtime = Runtime::create(None).unwrap();
        let path = path_with(None);

        let error = check(&runtime, Some(path.path().as_os_str())).await.unwrap_err();

        assert!(matches!(error, Error::Missing) && error.to_string().contains("apt-get install bubblewrap"));
    }

    #[tokio::test]
    async fn a_bubblewrap_that_may_not_work_says_why() {
        let runtime = Runtime::create(None).unwrap();
        let path = path_with(Some(
            "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n",
        ));

        let error = check(&runtime, Some(path.path().as_os_str())).await.unwrap_err();

        let text = error.to_string();
        assert!(
            text.contains("No permissions") && text.contains("SANDBOX_ENABLED=false"),
            "{text}"
        );
    }
}
