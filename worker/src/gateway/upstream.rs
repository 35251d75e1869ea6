//! The Messages API, or whatever stands in its place (`ANTHROPIC_BASE_URL`).

use std::time::Duration;

use http::{HeaderMap, Uri};
use shared::env;
use shared::telemetry::chain;

use crate::config::{Address, unusable};

/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long the API may be silent in the middle of an answer. The deadlines of the run are shorter; this one ends
/// requests that nobody waits for.
const SILENT: Duration = Duration::from_secs(610);

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_address_can_be_spoken_to_with_ring() {
        let address = Address::parse("https://api.anthropic.com").unwrap();

        assert_eq!(address.base, Address::default().base);
        Upstream::new(&address).unwrap();
    }
}
