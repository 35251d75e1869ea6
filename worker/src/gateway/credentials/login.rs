//! The login of the worker's own user, read from the CLI's file and refreshed by the CLI itself.
//!
//! The file contains a refresh token that works once. So the worker copies nothing and never refreshes. It asks the CLI
//! for the state of the login; the CLI then refreshes an old login under its own lock.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use shared::clock;
use tokio::sync::Mutex;

use crate::claude::program;
use crate::gateway::secret::Secret;

/// The CLI refreshes a login that is valid for less than this.
const REFRESH_BEFORE_MS: i64 = 5 * 60 * 1000;

/// Timeout of the CLI's report on the login.
const STATUS_WITHIN: Duration = Duration::from_secs(30);

/// Minimum interval between refresh attempts.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Variables that the CLI may need to reach Anthropic from here.
const PASSED_ON: [&str; 11] = [
    "HOME",
    "PATH",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "NO_PROXY",
    "no_proxy",
    "NODE_EXTRA_CA_CERTS",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// A login in a config directory of the CLI.
#[derive(Debug)]
pub struct Login {
    config_dir: PathBuf,
    claude: PathBuf,
    /// When the CLI was last asked. Locked during the question, so that there is only one at a time.
    asked: Mutex<Option<Instant>>,
}

/// The part of the CLI's file that the worker reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    access_token: String,
    refresh_token: Option<String>,
    expires_at: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CredentialsFile {
    claude_ai_oauth: State,
}

impl Login {
    /// The login in `config_dir`, refreshed by the program `claude`.
    pub fn new(config_dir: &Path, claude: &Path) -> Self {
        Self {
            config_dir: config_dir.to_owned(),
            claude: claude.to_owned(),
            asked: Mutex::default(),
        }
    }

    /// Whether there is a login. Reads a small file.
    pub fn is_there(&self) -> bool {
        let text = std::fs::read(self.file());
        text.is_ok_and(|text| State::parse(&text).is_some())
    }

    /// The access token, refreshed if possible; `None` if there is no login any more.
    pub(super) async fn token(&self) -> Option<Secret> {
        let state = self.read().await?;
        if state.needs_refresh() {
            self.refresh(|state| !state.needs_refresh()).await;
        }
        let state = self.read().await?;
        Some(Secret::new(state.access_token))
    }

    /// Asks the CLI to check a login whose token was rejected, unless there is another token by now.
    pub(super) async fn refused(&self, token: &Secret) {
        self.refresh(|state| state.access_token != token.expose()).await;
    }

    async fn refresh(&self, is_done: impl Fn(&State) -> bool) {
        let mut asked = self.asked.lock().await;
        // Another run may have done the same while this one waited.
        if self
            .read()
            .await
            .is_none_or(|state| is_done(&state) || state.refresh_token.is_none_or(|token| token.is_empty()))
        {
            return;
        }
        if asked.is_some_and(|asked| asked.elapsed() < AGAIN_AFTER) {
            return;
        }
        *asked = Some(Instant::now());
        let mut env: Vec<(String, String)> = PASSED_ON
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), own_variable(name)?)))
            .collect();
        env.push((
            "CLAUDE_CONFIG_DIR".to_owned(),
            self.config_dir.to_string_lossy().into_owned(),
        ));
        env.push(("DISABLE_AUTOUPDATER".to_owned(), "1".to_owned()));
        // Only the file matters, not the output. A missing login is an exit code, not an error here.
        if let Err(error) = program::output(&self.claude, &["auth", "status"], &env, STATUS_WITHIN).await {
            tracing::warn!("the login of the worker's user could not be refreshed: {error}");
        }
    }

    async fn read(&self) -> Option<State> {
        State::parse(&tokio::fs::read(self.file()).await.ok()?)
    }

    fn file(&self) -> PathBuf {
        self.config_dir.join(".credentials.json")
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "handed on to the CLI, and no setting of this program"
)]
fn own_variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

impl State {
    fn parse(file: &[u8]) -> Option<Self> {
        let file: CredentialsFile = serde_json::from_slice(file).ok()?;
        // A rejection clears the token.
        (!file.claude_ai_oauth.access_token.is_empty()).then_some(file.claude_ai_oauth)
    }

    fn needs_refresh(&self) -> bool {
        let left = self
            .expires_at
            .map(|expires_at| expires_at - clock::now().0 / 1000);
        left.is_some_and(|left| left < REFRESH_BEFORE_MS)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::claude::program::test_support::executable;

    /// A stand-in for the CLI that counts its calls and, as the CLI does, replaces the file by a rename.
    fn login(token: &str, expires_in_ms: i64, refreshed: &str) -> (TempDir, Login) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let file = |token: &str, left: i64| {
            let expires_at = clock::now().0 / 1000 + left;
            format!(
                r#"{{"claudeAiOauth":{{"accessToken":"{token}","refreshToken":"r","expiresAt":{expires_at}}}}}"#
            )
        };
        fs::write(path.join(".credentials.json"), file(token, expires_in_ms)).unwrap();
        fs::write(path.join("next"), file(refreshed, 3_600_000)).unwrap();
        let script = "#!/bin/sh\n[ \"$1 $2\" = 'auth status' ] || exit 9\ncd \"$CLAUDE_CONFIG_DIR\" || exit 9\n\
                      echo x >> calls\nsleep 0.2\ncp next new && mv new .credentials.json\n";
        let claude = path.join("claude");
        executable(&claude, script.as_bytes());
        let login = Login::new(path, &claude);
        (folder, login)
    }

    fn calls(folder: &TempDir) -> usize {
        fs::read_to_string(folder.path().join("calls")).map_or(0, |text| text.lines().count())
    }

    #[tokio::test]
    async fn a_fresh_login_is_used_as_it_is() {
        let (folder, login) = login("a", 3_600_000, "b");

        assert_eq!(login.token().await.unwrap().expose(), "a");
        assert_eq!(calls(&folder), 0);
    }

    #[tokio::test]
    async fn many_runs_refresh_an_old_login_once() {
        let (folder, login) = login("a", 60_000, "b");

        let tokens = tokio::join!(login.token(), login.token(), login.token());

        for token in [tokens.0, tokens.1, tokens.2] {
            assert_eq!(token.unwrap().expose(), "b");
        }
        assert_eq!(calls(&folder), 1);
    }

    #[tokio::test]
    async fn a_refused_token_is_looked_into_unless_it_was_replaced() {
        let (folder, login) = login("a", 3_600_000, "b");

        login.refused(&Secret::new("older".to_owned())).await;
        assert_eq!(calls(&folder), 0);
        login.refused(&Secret::new("a".to_owned())).await;
        login.refused(&Secret::new("a".to_owned())).await;

        assert_eq!(calls(&folder), 1);
        assert_eq!(login.token().await.unwrap().expose(), "b");
    }

    #[tokio::test]
    async fn a_login_that_ended_is_no_credential() {
        let (folder, login) = login("a", 60_000, "");

        assert!(login.token().await.is_none());
        assert!(!login.is_there());
        assert_eq!(calls(&folder), 1);
    }

    #[tokio::test]
    async fn a_login_without_a_refresh_token_is_used_to_its_end() {
        let (folder, login) = login("a", 60_000, "b");
        fs::write(
            folder.path().join(".credentials.json"),
            r#"{"claudeAiOauth":{"accessToken":"a","expiresAt":5}}"#,
        )
        .unwrap();

        assert_eq!(login.token().await.unwrap().expose(), "a");
        assert_eq!(calls(&folder), 0);
    }
}
