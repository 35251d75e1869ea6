//! The Messages API, or whatever stands in its place (`ANTHROPIC_BASE_URL`).

use std::time::Duration;

use http::{HeaderMap, Uri};
use shared::env;
use shared::telemetry::chain;

/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long the API may be silent in the middle of an answer. The deadlines of the run are shorter; this one ends
/// requests that nobody waits for.
const SILENT: Duration = Duration::from_secs(610);

/// What is accepted as an address.
const ACCEPTED: &str = "https://HOST[:PORT][/PATH], or http:// on loopback";

fn unusable(problem: impl Into<String>) -> env::Error {
    env::Error::new("ANTHROPIC_BASE_URL", problem, ACCEPTED)
}

/// An address that the credential and the prompts may be sent to: encrypted, or on this machine.
#[derive(Clone, Debug)]
pub struct Address {
    /// Without a slash at its end.
    base: String,
    /// The part of it that may be shown.
    shown: String,
    encrypted: bool,
    loopback: bool,
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
    pub fn parse(base: &str) -> Result<Self, env::Error> {
        let url: reqwest::Url = base.parse().map_err(|_| unusable("isn't a URL"))?;
        let host = url
            .host_str()
            .filter(|_| matches!(url.scheme(), "http" | "https"));
        let host = host.ok_or_else(|| unusable("isn't the URL of a web server"))?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(unusable("has a part after its path"));
        }
        let address = Self {
            base: base.trim_end_matches('/').to_owned(),
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

/// Where requests go. Made once and cloned for each run, so that all share their connections.
#[derive(Clone, Debug)]
pub struct Upstream {
    address: Address,
    client: reqwest::Client,
}

impl Upstream {
    /// Gets ready to send requests to this address. Fails where certificates can't be checked.
    pub fn new(address: &Address) -> Result<Self, env::Error> {
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_WITHIN)
            .read_timeout(SILENT)
            // An answer that leads elsewhere would take the credential along.
            .redirect(reqwest::redirect::Policy::none());
        if address.loopback {
            builder = builder.no_proxy();
        }
        if !address.encrypted {
            // Nothing to verify; a machine without certificates can run against a simulator.
            builder = builder.tls_certs_only([]);
        }
        // Fails when another part of the program has chosen one before, which is then taken.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = builder.build().map_err(|error| {
            unusable(format!(
                "can't be reached safely ({}); is the package `ca-certificates` installed?",
                chain(&error)
            ))
        })?;
        Ok(Self {
            address: address.clone(),
            client,
        })
    }

    /// Sends a request to the path and query of `uri`. The error is a sentence without any secret.
    pub(super) async fn post(
        &self,
        uri: &Uri,
        headers: HeaderMap,
        body: reqwest::Body,
    ) -> Result<reqwest::Response, String> {
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = self
            .client
            .post(format!("{}{path}", self.address.base))
            .headers(headers)
            .body(body);
        request.send().await.map_err(|error| {
            format!(
                "The Messages API at {} could not be reached: {}.",
                self.address.shown,
                chain(&error.without_url())
            )
        })
    }
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
    fn the_real_address_can_be_spoken_to_with_ring() {
        let address = Address::parse("https://api.anthropic.com").unwrap();

        assert_eq!(address.base, Address::default().base);
        Upstream::new(&address).unwrap();
    }

    #[test]
    fn loopback_is_known_in_each_spelling() {
        for host in ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        assert!(!is_loopback("10.0.0.1") && !is_loopback("localhost.example"));
    }
}
