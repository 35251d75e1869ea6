//! Where requests are sent: an address that may have the credential and the prompts.

use shared::env::Error;

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
