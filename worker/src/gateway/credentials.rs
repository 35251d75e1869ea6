//! How the gateway proves to the Messages API who pays. No run and no file of a run ever holds it.

mod login;

use std::path::Path;

use http::header::{self, HeaderName, HeaderValue};
use shared::env;
use uuid::Uuid;

use crate::config::Anthropic;
use crate::gateway::API_KEY;
use crate::gateway::secret::Secret;

pub use login::Login;

/// What is accepted where no credential is found.
const ACCEPTED: &str = "an API key in ANTHROPIC_API_KEY, the token of `claude setup-token` in CLAUDE_CODE_OAUTH_TOKEN, \
                        or a login of this user (`claude auth login`)";

/// The credential of a worker, one for all of its runs.
#[derive(Debug)]
pub enum Credentials {
    /// `ANTHROPIC_API_KEY`.
    ApiKey(Secret),
    /// `CLAUDE_CODE_OAUTH_TOKEN`, made by `claude setup-token`.
    OauthToken(Secret),
    /// `ANTHROPIC_AUTH_TOKEN`, for a gateway of the operator's own.
    AuthToken(Secret),
    /// The login of the worker's own user.
    Login(Login),
}

/// There is no usable credential right now. The text says what to do.
#[derive(Debug, thiserror::Error)]
#[error("The login of the worker's user is no longer valid: run `claude auth login` as that user.")]
pub struct Unusable;

impl Credentials {
    /// Takes the first that is there, in the CLI's own order: API key, OAuth token, bearer token, login. `claude` is
    /// the CLI, which keeps a login fresh. The error names the ways to give one.
    pub fn find(settings: &Anthropic, claude: &Path) -> Result<Self, env::Error> {
        if let Some(key) = &settings.api_key {
            return secret("ANTHROPIC_API_KEY", key).map(Self::ApiKey);
        }
        if let Some(token) = &settings.oauth_token {
            return secret("CLAUDE_CODE_OAUTH_TOKEN", token).map(Self::OauthToken);
        }
        if let Some(token) = &settings.auth_token {
            return secret("ANTHROPIC_AUTH_TOKEN", token).map(Self::AuthToken);
        }
        let login = settings
            .config_dir
            .as_deref()
            .map(|folder| Login::new(folder, claude));
        login.filter(Login::is_there).map(Self::Login).ok_or_else(|| {
            env::Error::new(
                "ANTHROPIC_API_KEY",
                "is missing, and there is no other credential",
                ACCEPTED,
            )
        })
    }

    /// Which kind it is, in words for people.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::ApiKey(_) => "an API key (ANTHROPIC_API_KEY)",
            Self::OauthToken(_) => "a token of `claude setup-token` (CLAUDE_CODE_OAUTH_TOKEN)",
            Self::AuthToken(_) => "a bearer token (ANTHROPIC_AUTH_TOKEN)",
            Self::Login(_) => "the login of this user (`claude auth login`)",
        }
    }

    /// A token for one run, and the variable that makes the CLI speak as it would with the real credential.
    pub fn dummy(&self) -> (&'static str, String) {
        (self.variable(), format!("run-{}", Uuid::new_v4().simple()))
    }

    /// The variable of [`Self::dummy`].
    pub fn variable(&self) -> &'static str {
        match self {
            Self::ApiKey(_) => "ANTHROPIC_API_KEY",
            Self::OauthToken(_) | Self::Login(_) => "CLAUDE_CODE_OAUTH_TOKEN",
            Self::AuthToken(_) => "ANTHROPIC_AUTH_TOKEN",
        }
    }

    /// Whether it is a token of a login, which requests have to say.
    pub(super) fn is_oauth(&self) -> bool {
        matches!(self, Self::OauthToken(_) | Self::Login(_))
    }

    /// The header of the next request.
    pub(super) async fn header(&self) -> Result<(HeaderName, HeaderValue), Unusable> {
        let (name, text) = match self {
            Self::ApiKey(key) => (API_KEY, key.expose().to_owned()),
            Self::OauthToken(token) | Self::AuthToken(token) => (header::AUTHORIZATION, bearer(token)),
            Self::Login(login) => (
                header::AUTHORIZATION,
                bearer(&login.token().await.ok_or(Unusable)?),
            ),
        };
        let mut value = HeaderValue::try_from(text).map_err(|_| Unusable)?;
        value.set_sensitive(true);
        Ok((name, value))
    }

    /// Takes note that the API refused this header.
    pub(super) async fn refused(&self, value: &HeaderValue) {
        if let Self::Login(login) = self {
            let token = value.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
            login
                .refused(&Secret::new(token.unwrap_or_default().to_owned()))
                .await;
        }
    }
}

fn bearer(token: &Secret) -> String {
    format!("Bearer {}", token.expose())
}

fn secret(name: &'static str, text: &str) -> Result<Secret, env::Error> {
    let text = text.trim();
    if text.is_empty() || HeaderValue::try_from(text).is_err() || text.contains(char::is_whitespace) {
        return Err(env::Error::new(
            name,
            "isn't a credential",
            "one word without spaces, as Anthropic gave it",
        ));
    }
    Ok(Secret::new(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(change: impl FnOnce(&mut Anthropic)) -> Result<Credentials, env::Error> {
        let mut settings = Anthropic::default();
        change(&mut settings);
        Credentials::find(&settings, Path::new("/nonexistent/claude"))
    }

    #[test]
    fn the_first_kind_that_is_there_is_taken() {
        let all = |settings: &mut Anthropic| {
            settings.api_key = Some("key".to_owned());
            settings.oauth_token = Some("oauth".to_owned());
            settings.auth_token = Some("auth".to_owned());
        };

        assert!(matches!(find(all), Ok(Credentials::ApiKey(_))));
        let token = |settings: &mut Anthropic| {
            all(settings);
            settings.api_key = None;
        };
        assert!(matches!(find(token), Ok(Credentials::OauthToken(_))));
        let bearer = |settings: &mut Anthropic| settings.auth_token = Some("auth".to_owned());
        assert!(matches!(find(bearer), Ok(Credentials::AuthToken(_))));
    }

    #[test]
    fn without_any_the_three_ways_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = find(|settings| settings.config_dir = Some(folder.path().to_owned())).unwrap_err();

        let text = error.to_string();
        for way in [
            "ANTHROPIC_API_KEY",
            "CLAUDE_CODE_OAUTH_TOKEN",
            "claude auth login",
        ] {
            assert!(text.contains(way), "{text}");
        }
    }

    #[test]
    fn a_key_that_cant_be_sent_is_refused_without_being_shown() {
        let error = find(|settings| settings.api_key = Some("sk-ant\nsecond".to_owned())).unwrap_err();

        assert!(error.to_string().contains("ANTHROPIC_API_KEY") && !error.to_string().contains("second"));
    }

    #[test]
    fn a_credential_shows_nothing() {
        let credentials = find(|settings| settings.api_key = Some("sk-ant-api03-x".to_owned())).unwrap();

        assert!(!format!("{credentials:?}").contains("api03"));
    }

    #[tokio::test]
    async fn the_run_speaks_as_it_would_with_the_real_credential() {
        let of = |credentials: &Credentials| credentials.dummy().0;
        let (key, token) = (
            Credentials::ApiKey(Secret::new("k".into())),
            Credentials::OauthToken(Secret::new("t".into())),
        );

        assert_eq!(
            (of(&key), of(&token)),
            ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN")
        );
        assert_ne!(key.dummy().1, key.dummy().1);
        assert_eq!(key.header().await.unwrap().0, API_KEY);
        let (name, value) = token.header().await.unwrap();
        assert_eq!(
            (name, value.to_str().unwrap()),
            (header::AUTHORIZATION, "Bearer t")
        );
        assert!(value.is_sensitive());
    }
}
