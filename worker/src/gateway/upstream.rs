//! The Messages API, or whatever stands in its place (`ANTHROPIC_BASE_URL`).

use std::error::Error as _;
use std::time::Duration;

use http::{HeaderMap, Uri};
use shared::env;

/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long the API may be silent in the middle of an answer. The deadlines of the run are shorter; this one ends
/// requests that nobody waits for.
const SILENT: Duration = Duration::from_secs(610);

/// Where requests go. Made once and cloned for each run, so that all share their connections.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// The address without a slash at its end.
    base: String,
    /// The part of it that may be shown.
    host: String,
    client: reqwest::Client,
}

impl Upstream {
    /// Reads the address of the API, with or without a path. The error names `ANTHROPIC_BASE_URL`.
    pub fn new(base: &str) -> Result<Self, env::Error> {
        let accepted = "an address like https://api.anthropic.com or http://127.0.0.1:8080";
        let unusable = |problem: &str| env::Error::new("ANTHROPIC_BASE_URL", problem, accepted);
        let url: reqwest::Url = base.parse().map_err(|_| unusable("isn't an address"))?;
        let host = url
            .host_str()
            .filter(|_| matches!(url.scheme(), "http" | "https"));
        let host = host
            .ok_or_else(|| unusable("isn't an address of a web server"))?
            .to_owned();
        if url.query().is_some() || url.fragment().is_some() {
            return Err(unusable("has a part after its path"));
        }
        let shown = url
            .port()
            .map_or_else(|| host.clone(), |port| format!("{host}:{port}"));
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_WITHIN)
            .read_timeout(SILENT)
            // An answer that leads elsewhere would take the credential along.
            .redirect(reqwest::redirect::Policy::none());
        if is_loopback(&host) {
            builder = builder.no_proxy();
        }
        if url.scheme() == "http" {
            // Nothing to verify; a machine without certificates can run against a simulator.
            builder = builder.tls_certs_only([]);
        }
        // Fails when another part of the program has chosen one before, which is then taken.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let no_client = |error: reqwest::Error| {
            let problem = format!(
                "can't be reached safely ({}); is the package `ca-certificates` installed?",
                chain(&error)
            );
            env::Error::new("ANTHROPIC_BASE_URL", problem, accepted)
        };
        let client = builder.build().map_err(no_client)?;
        Ok(Self {
            base: base.trim_end_matches('/').to_owned(),
            host: shown,
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
            .post(format!("{}{path}", self.base))
            .headers(headers)
            .body(body);
        request.send().await.map_err(|error| {
            format!(
                "The Messages API at {} could not be reached: {}.",
                self.host,
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

fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_have_a_path() {
        let upstream = Upstream::new("http://127.0.0.1:8431/s/name/").unwrap();

        assert_eq!(upstream.base, "http://127.0.0.1:8431/s/name");
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
        ] {
            let error = Upstream::new(address).unwrap_err();
            assert!(
                error.to_string().contains("ANTHROPIC_BASE_URL"),
                "{address}: {error}"
            );
        }
    }

    #[test]
    fn the_real_address_can_be_spoken_to_with_ring() {
        Upstream::new("https://api.anthropic.com").unwrap();
    }

    #[test]
    fn loopback_is_known_in_each_spelling() {
        for host in ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        assert!(!is_loopback("10.0.0.1") && !is_loopback("localhost.example"));
    }
}
