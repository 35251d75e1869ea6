//! The Messages API, or whatever stands in its place (`ANTHROPIC_BASE_URL`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use http::header::{self, HeaderMap, HeaderValue};
use shared::env;
use shared::telemetry::chain;

use super::provider::Asked;
use crate::config::provider::Provider;
use crate::config::{Address, unusable};

/// How long the API has for the worker's own question.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What a request with an OAuth token has to say.
pub(super) const OAUTH: &str = "oauth-2025-04-20";

/// What the exchange of an identity token has to say, too.
const FEDERATION: &str = "oidc-federation-2026-04-01";

/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long the API may be silent in the middle of an answer. The deadlines of the run are shorter; this one ends
/// requests that nobody waits for.
const SILENT: Duration = Duration::from_secs(610);

/// Where requests go. Made once and cloned for each run, so that all share their connections.
#[derive(Clone, Debug)]
pub struct Upstream {
    pub(super) address: Address,
    pub(super) provider: Arc<Provider>,
    pub(super) client: reqwest::Client,
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
            provider: Arc::default(),
            client,
        })
    }

    /// The same for this provider's API at that address.
    #[must_use]
    pub fn of(self, provider: &Provider) -> Self {
        Self {
            provider: Arc::new(provider.clone()),
            ..self
        }
    }

    /// Sends a request to the path and query of `uri`. The error is a sentence without any secret.
    pub(super) async fn post(
        &self,
        uri: &Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<reqwest::Response, String> {
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut sent = Sent {
            path: path.to_owned(),
            headers,
            body,
        };
        if self.provider.rewrites() {
            sent = self.rewritten(uri, sent);
        }
        let request = self
            .client
            .post(format!("{}{}", self.address.base, sent.path))
            .headers(sent.headers)
            .body(sent.body);
        request.send().await.map_err(|error| self.unreachable(error))
    }

    /// The request in the provider's form.
    fn rewritten(&self, uri: &Uri, sent: Sent) -> Sent {
        let mut headers = sent.headers;
        let asked = Asked {
            path: uri.path(),
            query: uri.query(),
            body: &sent.body,
        };
        let (path, body) = self.provider.rewrite(&asked);
        headers.remove(header::CONTENT_LENGTH);
        self.provider.fit(&mut headers);
        Sent { path, headers, body }
    }

    /// Exchanges a token of the machine's identity. The error is a sentence without any secret.
    pub(super) async fn exchange(&self, body: &serde_json::Value) -> Result<Bytes, String> {
        let request = self
            .client
            .post(format!("{}/v1/oauth/token", self.address.base))
            .timeout(ANSWER_WITHIN)
            .header("anthropic-beta", format!("{OAUTH},{FEDERATION}"))
            .json(body);
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        if !status.is_success() {
            return Err(format!(
                "The exchange of the identity token was refused ({}). Check the federation rule and the ids.",
                status.as_u16()
            ));
        }
        response.bytes().await.map_err(|error| self.unreachable(error))
    }

    pub(super) fn unreachable(&self, error: reqwest::Error) -> String {
        format!(
            "The Messages API at {} could not be reached: {}.",
            self.address.shown,
            chain(&error.without_url())
        )
    }
}

/// Whether an answer is a page for people, which the API never gives.
pub(super) fn is_page(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.is_some_and(|kind| kind.starts_with(b"text/html"))
}

/// A request on its way out.
struct Sent {
    path: String,
    headers: HeaderMap,
    body: Bytes,
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
