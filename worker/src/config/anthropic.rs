//! How the worker reaches the model: the credential and the address.

use super::address::Address;
use super::provider::{self, Given, Provider};
use shared::env::{Error, Vars};
use std::path::PathBuf;

/// How the worker reaches the model. Secrets are not shown.
#[derive(Clone, Default)]
pub struct Anthropic {
    /// `ANTHROPIC_API_KEY`.
    pub api_key: Option<String>,
    /// `CLAUDE_CODE_OAUTH_TOKEN`, made by `claude setup-token`.
    pub oauth_token: Option<String>,
    /// `ANTHROPIC_AUTH_TOKEN`, for gateways that want a bearer token.
    pub auth_token: Option<String>,
    /// Where the CLI keeps the login of this user. `CLAUDE_CONFIG_DIR`, default `~/.claude`.
    pub config_dir: Option<PathBuf>,
    /// Where requests are sent. `ANTHROPIC_BASE_URL`, `https://api.anthropic.com`; or the provider's address.
    pub base_url: Address,
    /// Whose API that is.
    pub provider: Provider,
    /// The credential of a provider that isn't Anthropic.
    pub given: Option<Given>,
    /// How a token of the machine's identity is exchanged, if that is set up.
    pub identity: Option<Federation>,
}

/// Workload identity: a token that the platform gives to this machine or pod is exchanged for a short one of Anthropic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Federation {
    /// The file with the platform's token; it is read at each exchange. `ANTHROPIC_IDENTITY_TOKEN_FILE`.
    pub token_file: PathBuf,
    /// `ANTHROPIC_FEDERATION_RULE_ID`.
    pub rule: String,
    /// `ANTHROPIC_ORGANIZATION_ID`.
    pub organization: String,
    /// `ANTHROPIC_SERVICE_ACCOUNT_ID`.
    pub service_account: Option<String>,
    /// `ANTHROPIC_WORKSPACE_ID`.
    pub workspace: Option<String>,
}

impl Federation {
    fn from_vars(vars: &Vars) -> Result<Option<Self>, Error> {
        let token_file = vars.text("ANTHROPIC_IDENTITY_TOKEN_FILE")?;
        let rule = vars.text("ANTHROPIC_FEDERATION_RULE_ID")?;
        let organization = vars.text("ANTHROPIC_ORGANIZATION_ID")?;
        let service_account = vars.text("ANTHROPIC_SERVICE_ACCOUNT_ID")?;
        let workspace = vars.text("ANTHROPIC_WORKSPACE_ID")?;
        let Some(token_file) = token_file else {
            if rule.is_some() || service_account.is_some() {
                return Err(Error::new(
                    "ANTHROPIC_IDENTITY_TOKEN_FILE",
                    "is missing, and ANTHROPIC_FEDERATION_RULE_ID has no effect without it",
                    "the file in which the platform keeps a token of this machine's identity",
                ));
            }
            return Ok(None);
        };
        let needed = |name, value: Option<String>| {
            value.ok_or_else(|| {
                let problem = "is missing, and ANTHROPIC_IDENTITY_TOKEN_FILE needs it";
                Error::new(name, problem, "the id that the Claude Console shows")
            })
        };
        Ok(Some(Self {
            token_file: PathBuf::from(token_file),
            rule: needed("ANTHROPIC_FEDERATION_RULE_ID", rule)?,
            organization: needed("ANTHROPIC_ORGANIZATION_ID", organization)?,
            service_account,
            workspace,
        }))
    }
}

impl std::fmt::Debug for Anthropic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Anthropic")
            .field("base_url", &self.base_url)
            .finish_non_exhaustive()
    }
}

impl Anthropic {
    /// Reads the credentials and the address. The error names the variable that can't be used.
    pub(super) fn from_vars(vars: &Vars) -> Result<Self, Error> {
        let chosen = provider::chosen(vars)?;
        let base_url = vars.or("ANTHROPIC_BASE_URL", "https://api.anthropic.com")?;
        let (provider, base_url, given) = match chosen {
            Some(chosen) => (chosen.provider, chosen.address, Some(chosen.credential)),
            None => {
                let provider = Provider {
                    models: provider::models(vars)?,
                    ..Provider::default()
                };
                (provider, Address::parse(&base_url)?, None)
            }
        };
        let home = vars
            .unlisted("HOME")
            .map(|home| PathBuf::from(home).join(".claude"));
        Ok(Self {
            api_key: credential(vars, "ANTHROPIC_API_KEY")?,
            oauth_token: credential(vars, "CLAUDE_CODE_OAUTH_TOKEN")?,
            auth_token: credential(vars, "ANTHROPIC_AUTH_TOKEN")?,
            config_dir: vars.path("CLAUDE_CONFIG_DIR")?.or(home),
            base_url,
            provider,
            given,
            identity: Federation::from_vars(vars)?,
        })
    }
}

fn credential(vars: &Vars, name: &'static str) -> Result<Option<String>, Error> {
    let text = vars.text(name)?;
    if text
        .as_ref()
        .is_some_and(|text| !text.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        let problem = "has a character that no header can carry";
        return Err(Error::new(name, problem, "visible ASCII characters only"));
    }
    Ok(text)
}
