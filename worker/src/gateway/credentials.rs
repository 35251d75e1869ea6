//! How the gateway proves to the Messages API who pays. No run and no file of a run ever holds it.

mod identity;
mod login;

use std::path::{Path, PathBuf};

use http::header::{self, HeaderName, HeaderValue};
use shared::env;
use uuid::Uuid;

use crate::config::Anthropic;
use crate::config::provider::Given;
use crate::gateway::API_KEY;
use crate::gateway::secret::Secret;
use crate::gateway::upstream::Upstream;

/// The header of a key of Foundry.
const FOUNDRY_KEY: HeaderName = HeaderName::from_static("api-key");

pub use identity::Identity;
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
    /// A key of Microsoft Foundry.
    FoundryKey(Secret),
    /// An API key of Amazon Bedrock.
    BedrockKey(Secret),
    /// A file that holds an access token of Google, read for each request.
    TokenFile(PathBuf),
    /// A token of the machine's identity, exchanged for short ones.
    Identity(Box<Identity>),
}

/// There is no usable credential right now. The text says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub(super) String);

/// Nobody is logged in any more.
const LOGGED_OUT: &str =
    "The login of the worker's user is no longer valid: run `claude auth login` as that user.";

impl Credentials {
    /// Takes the first that is there, in the CLI's own order: API key, OAuth token, bearer token, login. `claude` is
    /// the CLI, which keeps a login fresh. The error names the ways to give one.
    pub fn find(settings: &Anthropic, claude: &Path) -> Result<Self, env::Error> {
        match &settings.given {
            Some(Given::FoundryKey(key)) => {
                return secret("ANTHROPIC_FOUNDRY_API_KEY", key).map(Self::FoundryKey);
            }
            Some(Given::BedrockKey(key)) => {
                return secret("AWS_BEARER_TOKEN_BEDROCK", key).map(Self::BedrockKey);
            }
            Some(Given::TokenFile(file)) => return Ok(Self::TokenFile(file.clone())),
            None => {}
        }
        if let Some(key) = &settings.api_key {
            return secret("ANTHROPIC_API_KEY", key).map(Self::ApiKey);
        }
        if let Some(token) = &settings.oauth_token {
            return secret("CLAUDE_CODE_OAUTH_TOKEN", token).map(Self::OauthToken);
        }
        if let Some(token) = &settings.auth_token {
            return secret("ANTHROPIC_AUTH_TOKEN", token).map(Self::AuthToken);
        }
        if let Some(federation) = &settings.identity {
            let upstream = Upstream::new(&settings.base_url)?;
            return Ok(Self::Identity(Box::new(Identity::new(
                federation.clone(),
                upstream,
            ))));
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
            Self::FoundryKey(_) => "a key of Microsoft Foundry (ANTHROPIC_FOUNDRY_API_KEY)",
            Self::BedrockKey(_) => "an API key of Amazon Bedrock (AWS_BEARER_TOKEN_BEDROCK)",
            Self::TokenFile(_) => "an access token of Google in a file (GOOGLE_ACCESS_TOKEN_FILE)",
            Self::Identity(_) => "the identity of this machine (ANTHROPIC_IDENTITY_TOKEN_FILE)",
        }
    }

    /// A token for one run, and the variable that makes the CLI speak as it would with the real credential.
    pub fn dummy(&self) -> (&'static str, String) {
        (self.variable(), format!("run-{}", Uuid::new_v4().simple()))
    }

    /// The variable of [`Self::dummy`].
    pub fn variable(&self) -> &'static str {
        match self {
            Self::ApiKey(_) | Self::FoundryKey(_) | Self::BedrockKey(_) | Self::TokenFile(_) => {
                "ANTHROPIC_API_KEY"
            }
            Self::OauthToken(_) | Self::Login(_) | Self::Identity(_) => "CLAUDE_CODE_OAUTH_TOKEN",
            Self::AuthToken(_) => "ANTHROPIC_AUTH_TOKEN",
        }
    }

    /// Whether it is a token of a login, which requests have to say.
    pub(super) fn is_oauth(&self) -> bool {
        matches!(self, Self::OauthToken(_) | Self::Login(_) | Self::Identity(_))
    }

    /// The header of the next request.
    pub(super) async fn header(&self) -> Result<(HeaderName, HeaderValue), Unusable> {
        let (name, text) = match self {
            Self::ApiKey(key) => (API_KEY, key.expose().to_owned()),
            Self::OauthToken(token) | Self::AuthToken(token) | Self::BedrockKey(token) => {
                (header::AUTHORIZATION, bearer(token))
            }
            Self::FoundryKey(key) => (FOUNDRY_KEY, key.expose().to_owned()),
            Self::TokenFile(file) => (header::AUTHORIZATION, bearer(&read(file).await?)),
            Self::Identity(identity) => (header::AUTHORIZATION, bearer(&identity.token().await?)),
            Self::Login(login) => (
                header::AUTHORIZATION,
                bearer(
                    &login
                        .token()
                        .await
                        .ok_or_else(|| Unusable(LOGGED_OUT.to_owned()))?,
                ),
            ),
        };
        let mut value = HeaderValue::try_from(text)
            .map_err(|_| Unusable("The credential can't be sent in a header.".to_owned()))?;
        value.set_sensitive(true);
        Ok((name, value))
    }

    /// Takes note that the API refused this header.
    pub(super) async fn refused(&self, value: &HeaderValue) {
        let token = value.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        let token = Secret::new(token.unwrap_or_default().to_owned());
        match self {
            Self::Login(login) => login.refused(&token).await,
            Self::Identity(identity) => identity.refused(&token).await,
            _ => {}
        }
    }
}

/// A token in a file that something else keeps fresh.
async fn read(file: &Path) -> Result<Secret, Unusable> {
    let text = tokio::fs::read_to_string(file).await;
    let token = text.map(|text| text.trim().to_owned());
    match token {
        Ok(token) if !token.is_empty() => Ok(Secret::new(token)),
        Ok(_) => Err(Unusable(format!("The token file {} is empty.", file.display()))),
        Err(error) => Err(Unusable(format!(
            "The token file {} can't be read: {error}.",
            file.display()
        ))),
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
