//! One attempt to deliver a webhook: where it may go is checked at each step, and nothing of it can hold up others.

use super::snippet::{self, snippet};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, header};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use shared::clock;
use shared::retry_after;
use shared::telemetry::chain;
use shared::webhook::address::Guard;
use shared::webhook::schedule::Failure;
use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tracing::{debug, warn};

/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// How much of a response is read, in bytes. A longer one closes the connection.
const READ: usize = 64 * 1_024;

/// How long an unused connection is kept, and how many to one receiver.
const IDLE: Duration = Duration::from_secs(30);
const IDLE_PER_HOST: usize = 10;

/// The classes of errors, which clients see.
const DNS: &str = "dns";
const BLOCKED: &str = "blocked_address";
const CONNECT: &str = "connect";
const TIMEOUT: &str = "timeout";
const TLS: &str = "tls";
const REDIRECT: &str = "redirect";
const STATUS: &str = "http_status";
const PROTOCOL: &str = "protocol";

/// What came of one attempt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The status of the response; `None` if there was none.
    pub status: Option<u16>,
    /// Why the attempt failed: `dns`, `blocked_address`, `connect`, `timeout`, `tls`, `redirect`, `http_status` or
    /// `protocol`. `None` if it succeeded.
    pub error_class: Option<&'static str>,
    /// The start of the response: at most 1 KiB, one line, no inside address. Empty without a response.
    pub snippet: String,
    /// How long the receiver asked to wait (`Retry-After`).
    pub retry_after: Option<Duration>,
    /// From the start of the attempt to the last byte that was read.
    pub duration: Duration,
}

impl Outcome {
    /// The failure, for the schedule of the next attempt; `None` if the attempt succeeded.
    pub fn failure(&self) -> Option<Failure> {
        self.error_class.map(|class| Failure {
            status: self.status,
            timed_out: class == TIMEOUT,
            retry_after: self.retry_after,
        })
    }

    fn without_response(class: &'static str) -> Self {
        Self {
            error_class: Some(class),
            ..Self::default()
        }
    }
}

/// Resolves a name.
type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync>;

/// Sends attempts. Made once and cloned, so that all share their connections. It doesn't limit how many requests go to
/// one host at the same time.
#[derive(Clone, Debug)]
pub struct Sender {
    guard: Arc<Guard>,
    client: reqwest::Client,
}

impl Sender {
    /// Sends to where `guard` allows it, and gives each attempt `timeout`. Where the certificates of this machine can't be
    /// read, it warns, and each delivery over `https` will fail with the class `tls`.
    pub fn new(guard: Guard, timeout: Duration) -> Self {
        Self::with_lookup(guard, timeout, Arc::new(|host| Box::pin(system_lookup(host))))
    }

    fn with_lookup(guard: Guard, timeout: Duration, lookup: Lookup) -> Self {
        let guard = Arc::new(guard);
        let resolver = Arc::new(GuardedResolver {
            guard: Arc::clone(&guard),
            lookup,
        });
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(CONNECT_WITHIN.min(timeout))
                .timeout(timeout)
                .dns_resolver(Arc::clone(&resolver))
                // A proxy would resolve the name itself, and a redirect could lead inside.
                .no_proxy()
                .redirect(reqwest::redirect::Policy::none())
                // Each attempt is recorded.
                .retry(reqwest::retry::never())
                .pool_idle_timeout(IDLE)
                .pool_max_idle_per_host(IDLE_PER_HOST)
        };
        // Fails when another part of the program has chosen one before, which is then taken.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = builder().build().unwrap_or_else(|error| {
            warn!(
                "webhooks can't be delivered over https ({}); is the package `ca-certificates` installed?",
                chain(&error)
            );
            let client = builder().tls_certs_only([]).build();
            client.expect("a client without certificates needs nothing of the machine")
        });
        Self { guard, client }
    }

    /// Sends `body` to `url` by POST. The status alone decides whether the receiver has accepted it: 2xx is success, even
    /// if the response breaks off after its head.
    pub async fn send(&self, url: &str, headers: HeaderMap, body: Bytes) -> Outcome {
        let begun = Instant::now();
        let mut outcome = self.attempt(url, headers, body).await;
        outcome.duration = begun.elapsed();
        outcome
    }

    async fn attempt(&self, url: &str, headers: HeaderMap, body: Bytes) -> Outcome {
        // An address in the URL never reaches the resolver. The settings may have changed since the URL was accepted.
        let Ok(target) = self.guard.check_url(url) else {
            return Outcome::without_response(BLOCKED);
        };
        let request = self.client.post(target.url().clone()).headers(headers).body(body);
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(error) => {
                let error = error.without_url();
                debug!("an attempt to deliver a webhook failed: {}", chain(&error));
                return Outcome::without_response(class(&error));
            }
        };
        // The second check of what the resolver has checked; an unknown address counts as not allowed.
        let peer = response.remote_addr();
        if !peer.is_some_and(|peer| self.guard.allows(peer.ip())) {
            return Outcome::without_response(BLOCKED);
        }
        let header = |name| response.headers().get(name)?.to_str().ok();
        let retry_after = header(header::RETRY_AFTER)
            .and_then(|value| retry_after::parse(value, header(header::DATE), clock::now()));
        let status = response.status();
        let error_class = match status {
            status if status.is_success() => None,
            status if status.is_redirection() => Some(REDIRECT),
            _ => Some(STATUS),
        };
        Outcome {
            status: Some(status.as_u16()),
            error_class,
            snippet: snippet(&start_of(&mut response).await),
            retry_after,
            duration: Duration::ZERO,
        }
    }
}

/// The start of the body. Reads on to the end of a short one, so that the connection can be used again.
async fn start_of(response: &mut reqwest::Response) -> Vec<u8> {
    let (mut start, mut read) = (Vec::new(), 0);
    while read < READ
        && let Ok(Some(chunk)) = response.chunk().await
    {
        read += chunk.len();
        let wanted = (snippet::NEEDED - start.len()).min(chunk.len());
        start.extend_from_slice(&chunk[..wanted]);
    }
    start
}

/// The class of an error without a response.
fn class(error: &reqwest::Error) -> &'static str {
    if is_caused_by::<Blocked>(error) {
        BLOCKED
    } else if error.is_timeout() {
        TIMEOUT
    } else if error.is_dns() {
        DNS
    } else if is_caused_by::<rustls::Error>(error) {
        TLS
    } else if error.is_connect() {
        CONNECT
    } else {
        PROTOCOL
    }
}

/// Whether an error or one of its causes is of this type.
fn is_caused_by<E: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| cause(error)).any(<dyn Error>::is::<E>)
}

/// The next cause. What an `io::Error` wraps isn't its own source, and it is what matters here.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}

/// A name has addresses, but none that is allowed.
#[derive(Debug)]
struct Blocked;

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("none of the addresses is allowed")
    }
}

impl Error for Blocked {}

/// Finds the addresses to connect to, without those that aren't allowed. A connection uses what this returned, so a name
/// that changes its addresses in between can't lead elsewhere.
struct GuardedResolver {
    guard: Arc<Guard>,
    lookup: Lookup,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = Arc::clone(&self.guard);
        let found = (self.lookup)(name.as_str().to_owned());
        Box::pin(async move {
            let mut addresses = found.await?;
            if addresses.is_empty() {
                return Err("the name has no address".into());
            }
            addresses.retain(|address| guard.allows(*address));
            if addresses.is_empty() {
                return Err(Blocked.into());
            }
            // Port 0 stands for that of the URL.
            let addresses = addresses.into_iter().map(|address| SocketAddr::new(address, 0));
            Ok(Box::new(addresses) as Addrs)
        })
    }
}

/// The addresses of a name by the system's resolver.
async fn system_lookup(host: String) -> io::Result<Vec<IpAddr>> {
    let found = tokio::net::lookup_host((host, 0)).await?;
    Ok(found.map(|address| address.ip()).collect())
}

#[cfg(test)]
mod tests;
