//! How the worker reaches the model: the credential and the address.

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

/// What is accepted as an address.
const ACCEPTED: &str = "https://HOST[:PORT][/PATH], or http:// on loopback";

/// The address can't be used, for this reason.
pub(crate) fn unusable(problem: impl Into<String>) -> Error {
    Error::new("ANTHROPIC_BASE_URL", problem, ACCEPTED)
}

/// An address that the credential and the prompts may be sent to: encrypted, or on this machine.
#[derive(Clone, Debug)]
pub struct Address {
    /// Without a slash at its end.
    pub(crate) base: String,
    /// The part of it that may be shown.
    pub(crate) shown: String,
    /// Whether it is HTTPS.
    pub(crate) encrypted: bool,
    /// Whether it is on this machine.
    pub(crate) loopback: bool,
}

impl Default for Address {
    /// The real one.
    fn default() -> Self {
        Self {
            base: "https://api.anthropic.com".to_owned(),
            shown: "api.anthropic.com".to_owned(),
            encrypted: true,
            loopback: false,
        }
    }
}

impl Address {
    /// Reads an address, with or without a path. The error names `ANTHROPIC_BASE_URL`.
    pub fn parse(base: &str) -> Result<Self, Error> {
        let url: reqwest::Url = base.parse().map_err(|_| unusable("isn't a URL"))?;
        let host = url
            .host_str()
            .filter(|_| matches!(url.scheme(), "http" | "https"));
        let host = host.ok_or_else(|| unusable("isn't the URL of a web server"))?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(unusable("has a part after its path"));
        }
        let address = Self {
            base: root(base).to_owned(),
            shown: url
                .port()
                .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}")),
            encrypted: url.scheme() == "https",
            loopback: is_loopback(host),
        };
        if !address.encrypted && !address.loopback {
            return Err(unusable("would send the credential unencrypted over a network"));
        }
        Ok(address)
    }
}

/// The address without the API's own paths at its end, which people copy along.
fn root(address: &str) -> &str {
    let path = address.find("://").map_or(0, |at| at + 3);
    let path = address[path..].find('/').map_or(address.len(), |at| path + at);
    let (host, path) = address.split_at(path);
    let path = path.trim_end_matches('/');
    let path = path
        .strip_suffix("/v1/messages")
        .or(path.strip_suffix("/v1"))
        .unwrap_or(path);
    &address[..host.len() + path.trim_end_matches('/').len()]
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse()
            .is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_have_a_path() {
        let address = Address::parse("http://127.0.0.1:8431/s/name/").unwrap();

        assert_eq!(address.base, "http://127.0.0.1:8431/s/name");
    }

    #[test]
    fn the_apis_own_paths_at_the_end_mean_the_same_address() {
        for (address, base) in [
            ("https://x", "https://x"),
            ("https://x/", "https://x"),
            ("https://x/v1", "https://x"),
            ("https://x/v1//", "https://x"),
            ("https://x/v1/messages", "https://x"),
            ("https://x//v1/messages/", "https://x"),
            ("https://x/anthropic/v1/messages", "https://x/anthropic"),
            ("https://x/messages", "https://x/messages"),
            ("https://x/apiv1", "https://x/apiv1"),
            ("https://v1", "https://v1"),
        ] {
            assert_eq!(Address::parse(address).unwrap().base, base, "{address}");
        }
    }

    #[test]
    fn other_addresses_are_refused_by_the_variables_name() {
        for address in [
            "",
            "api.anthropic.com",
            "ftp://x",
            "unix:/run/x",
            "https://x/?a=1",
            "https://x/#a",
            "http://api.anthropic.com",
            "http://10.0.0.1:8080",
            "http://localhost.example",
        ] {
            let error = Address::parse(address).unwrap_err();
            assert!(
                error.to_string().contains("ANTHROPIC_BASE_URL"),
                "{address}: {error}"
            );
        }
    }

    #[test]
    fn loopback_is_known_in_each_spelling() {
        for host in ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        assert!(!is_loopback("10.0.0.1") && !is_loopback("localhost.example"));
    }
}
