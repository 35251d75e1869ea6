//! Workload identity: the platform's token of this machine, exchanged for short tokens of Anthropic (RFC 7523).
//!
//! Written after Anthropic's documentation, and never run against the real service.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use tokio::sync::Mutex;

use super::{Unusable, read};
use crate::config::Federation;
use crate::gateway::secret::Secret;
use crate::gateway::upstream::Upstream;

/// A token is exchanged anew when it is valid for less than this.
const RENEW_BEFORE: Duration = Duration::from_mins(2);

/// How long an exchange that failed isn't repeated while a token is still valid, or after a refusal.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// The way from the platform's token to Anthropic's.
#[derive(Debug)]
pub struct Identity {
    federation: Federation,
    upstream: Upstream,
    /// Held while one is exchanged, so that runs share it.
    current: Mutex<Current>,
}

#[derive(Debug, Default)]
struct Current {
    token: Option<(Secret, Instant)>,
    tried: Option<Instant>,
}

#[derive(Deserialize)]
struct Granted {
    access_token: String,
    expires_in: u64,
}

impl Identity {
    /// Exchanges at this address. Nothing is asked before the first request.
    pub(super) fn new(federation: Federation, upstream: Upstream) -> Self {
        Self {
            federation,
            upstream,
            current: Mutex::default(),
        }
    }

    /// A token that is valid for a while.
    pub(super) async fn token(&self) -> Result<Secret, Unusable> {
        let mut current = self.current.lock().await;
        let left = |until: &Instant| until.saturating_duration_since(Instant::now());
        let valid = current.token.clone().filter(|(_, until)| !left(until).is_zero());
        if let Some((token, until)) = &valid
            && (left(until) > RENEW_BEFORE
                || current.tried.is_some_and(|tried| tried.elapsed() < AGAIN_AFTER))
        {
            return Ok(token.clone());
        }
        current.tried = Some(Instant::now());
        match self.exchange().await {
            Ok((token, lifetime)) => {
                current.token = Some((token.clone(), Instant::now() + lifetime));
                Ok(token)
            }
            Err(error) => valid.map(|(token, _)| token).ok_or(error),
        }
    }

    /// The API refused this token: the next request has another, unless one was just exchanged.
    pub(super) async fn refused(&self, token: &Secret) {
        let mut current = self.current.lock().await;
        let fresh = current.tried.is_some_and(|tried| tried.elapsed() < AGAIN_AFTER);
        if !fresh && current.token.as_ref().is_some_and(|(known, _)| known == token) {
            current.token = None;
        }
    }

    async fn exchange(&self) -> Result<(Secret, Duration), Unusable> {
        let assertion = read(&self.federation.token_file).await?;
        let mut body = json!({
            "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "assertion": assertion.expose(),
            "federation_rule_id": self.federation.rule,
            "organization_id": self.federation.organization,
        });
        if let Some(account) = &self.federation.service_account {
            body["service_account_id"] = json!(account);
        }
        if let Some(workspace) = &self.federation.workspace {
            body["workspace_id"] = json!(workspace);
        }
        let granted = self.upstream.exchange(&body).await.map_err(Unusable)?;
        let granted: Granted = serde_json::from_slice(&granted).map_err(|_| {
            Unusable("The exchange of the identity token gave an answer without a token.".to_owned())
        })?;
        Ok((
            Secret::new(granted.access_token),
            Duration::from_secs(granted.expires_in.min(86_400)),
        ))
    }
}
