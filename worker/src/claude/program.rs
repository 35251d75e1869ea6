//! Trusted programs that run outside any guard: finds the CLI, reads its version, asks programs short questions.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

/// Runs a trusted program to its end, outside any guard, with this environment and no input. Kills it after `within`,
/// which is an error.
#[expect(clippy::disallowed_methods, reason = "this file starts programs")]
pub(crate) async fn output(
    program: &Path,
    args: &[&str],
    env: &[(String, String)],
    within: Duration,
) -> io::Result<Output> {
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .envs(env.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    match tokio::time::timeout(within, child.wait_with_output()).await {
        Ok(output) => output,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "{} gave no answer within {} s",
                program.display(),
                within.as_secs()
            ),
        )),
    }
}

/// The version that the CLI reports, such as `2.1.331`. Fails if the CLI can't be run or prints something else.
pub async fn cli_version(cli: &Path) -> io::Result<String> {
    let env = [
        ("HOME".to_owned(), "/dev/null".to_owned()),
        ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
    ];
    let output = output(cli, &["--version"], &env, Duration::from_secs(30)).await?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split_ascii_whitespace().next().unwrap_or_default();
    if output.status.success() && version.starts_with(|first: char| first.is_ascii_digit()) {
        Ok(version.to_owned())
    } else {
        let said = String::from_utf8_lossy(if said.trim().is_empty() {
            &output.stderr
        } else {
            &output.stdout
        });
        let said: String = said.trim().chars().take(200).collect();
        Err(io::Error::other(format!(
            "{} --version said no version but: {said}",
            cli.display()
        )))
    }
}

/// Whether a version comes before another one, by its numbers. One that can't be read comes before none.
pub fn is_older(version: &str, other: &str) -> bool {
    let numbers = |version: &str| -> Option<Vec<u64>> {
        // `2.1.331-beta.1` is taken for 2.1.331.
        let release = version.split(['-', '+']).next().unwrap_or_default();
        release.split('.').map(|number| number.parse().ok()).collect()
    };
    numbers(version)
        .zip(numbers(other))
        .is_some_and(|(version, other)| version < other)
}

/// The CLI's real file: `configured` (`CLAUDE_CLI_PATH`: a path, or a name to look up), or `claude` on `path` (the
/// variable `PATH`). Links are followed, because a sandboxed run sees only the file itself. If npm installed a script in
/// place of the program, the program of the platform's package is used.
pub fn find_cli(configured: Option<&Path>, path: Option<&OsStr>) -> io::Result<PathBuf> {
    let wanted = configured.unwrap_or(Path::new("claude"));
    let found = find_program(wanted, path).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("{} isn't an executable file", wanted.display()),
        )
    })?;
    let real = std::fs::canonicalize(found)?;
    Ok(native_sister(&real).unwrap_or(real))
}

/// An executable file: `name` itself when it's a path, or the first one of that name on `path`.
pub(crate) fn find_program(name: &Path, path: Option<&OsStr>) -> Option<PathBuf> {
    let executable = |file: &PathBuf| {
        file.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if name.components().count() > 1 {
        return std::path::absolute(name).ok().filter(executable);
    }
    std::env::split_paths(path?)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(executable)
}

/// The program of the platform's package next to `@anthropic-ai/claude-code`, if `file` is a script of the latter.
fn native_sister(file: &Path) -> Option<PathBuf> {
    use std::io::Read as _;
    let mut start = [0; 4];
    std::fs::File::open(file).ok()?.read_exact(&mut start).ok()?;
    if start == *b"\x7fELF" {
        return None;
    }
    let package = file
        .ancestors()
        .find(|folder| folder.ends_with("@anthropic-ai/claude-code"))?;
    let machine = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "x64"
    };
    find_program(
        &package
            .with_file_name(format!("claude-code-linux-{machine}"))
            .join("claude"),
        None,
    )
}

#[cfg(test)]
pub(crate) mod test_support {
    use std::io::Write as _;
    use std::path::Path;
    use std::process::{Command, Stdio};

    /// Writes a program. Another process does it: one that this process has open for writing, even in a child that
    /// another test is just forking, can't be started.
    #[expect(clippy::disallowed_methods, reason = "a test")]
    pub(crate) fn executable(path: &Path, content: &[u8]) {
        let mut install = Command::new("/usr/bin/install")
            .args(["-D", "-m", "755", "/dev/stdin"])
            .arg(path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        install.stdin.take().unwrap().write_all(content).unwrap();
        assert!(install.wait().unwrap().success());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Instant;

    use super::test_support::executable;
    use super::*;

    #[test]
    fn the_cli_is_looked_up_on_the_path_and_its_links_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (real, bin) = (folder.path().join("lib/claude.bin"), folder.path().join("bin"));
        executable(&real, b"\x7fELF rest");
        fs::create_dir(&bin).unwrap();
        fs::write(folder.path().join("claude"), "not executable").unwrap();
        symlink(&real, bin.join("claude")).unwrap();
        let path = std::env::join_paths([folder.path(), &bin]).unwrap();

        let real = fs::canonicalize(real).unwrap();
        assert_eq!(find_cli(None, Some(&path)).unwrap(), real);
        assert_eq!(find_cli(Some(&bin.join("claude")), None).unwrap(), real);
        assert_eq!(
            find_cli(Some(Path::new("claude.bin")), Some(&path))
                .unwrap_err()
                .kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn a_script_of_the_npm_package_stands_for_the_program_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let modules = fs::canonicalize(folder.path())
            .unwrap()
            .join("node_modules/@anthropic-ai");
        let script = modules.join("claude-code/bin/claude.exe");
        let machine = if cfg!(target_arch = "aarch64") {
            "arm64"
        } else {
            "x64"
        };
        let program = modules.join(format!("claude-code-linux-{machine}/claude"));
        executable(&script, b"#!/usr/bin/env node");

        assert_eq!(find_cli(Some(&script), None).unwrap(), script);
        executable(&program, b"\x7fELF rest");
        assert_eq!(find_cli(Some(&script), None).unwrap(), program);
    }

    #[tokio::test]
    async fn a_program_without_a_version_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
        executable(&good, b"#!/bin/sh\necho '2.1.331 (Claude Code)'\n");
        executable(&bad, b"#!/bin/sh\necho 'needs a newer system' >&2\nexit 1\n");

        assert_eq!(cli_version(&good).await.unwrap(), "2.1.331");
        assert!(
            cli_version(&bad)
                .await
                .unwrap_err()
                .to_string()
                .contains("needs a newer system")
        );
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_ended() {
        let since = Instant::now();

        let error = output(Path::new("/bin/sleep"), &["60"], &[], Duration::from_millis(200))
            .await
            .unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(since.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        for (version, other, older) in [
            ("1.0.17", "2.1.331", true),
            ("2.1.99", "2.1.331", true),
            ("2.1.331", "2.1.331", false),
            ("2.1.331-beta.1", "2.1.331", false),
            ("2.1.332", "2.1.331", false),
            ("2.10.0", "2.9.5", false),
            ("10.0.0", "9.8.7", false),
            ("unknown", "2.1.331", false),
        ] {
            assert_eq!(super::is_older(version, other), older, "{version} {other}");
        }
    }
}
