//! Webhooks over HTTP: where a key's events are sent, what signs them, and what became of each.

pub mod delivery;
pub mod endpoint;
pub mod secret;

use shared::clock;
use shared::id::KeyId;
use shared::sealed::Sealer;
use shared::webhook::address::Refusal;
use shared::webhook::secrets::Secrets;
use shared::webhook::signature::SigningSecret;

use crate::context::Context;
use crate::http::problem::Problem;

/// What seals secrets. Without `SECRET_KEY` there is none, and so no webhooks.
fn sealer(context: &Context) -> Result<&Sealer, Problem> {
    let secret_key = context.keyring.secret_key().ok_or(Problem::Unavailable {
        detail: "Webhooks need SECRET_KEY, which this service is started without",
        source: None,
    })?;
    Ok(secret_key.sealer())
}

/// The secrets that were stored for this endpoint or key.
fn opened(sealer: &Sealer, owner: &str, sealed: &str) -> Result<Secrets, Problem> {
    Secrets::open(sealer, owner, sealed).ok_or_else(|| Problem::internal("a webhook secret can't be opened"))
}

/// The one that the client gave, or a new one.
fn given_or_new(given: Option<SigningSecret>) -> Result<SigningSecret, Problem> {
    match given {
        Some(secret) => Ok(secret),
        None => SigningSecret::generate().map_err(Problem::internal),
    }
}

/// An address that isn't accepted, as the fault of a member.
fn not_allowed(field: &str, refusal: Refusal) -> Problem {
    Problem::WebhookUrlNotAllowed {
        field: field.to_owned(),
        reason: refusal.to_string(),
    }
}

/// Makes sure that the events of a key's jobs are signed, from its first job with a `webhook_url` on.
pub async fn ensure_secret(context: &Context, key_id: &KeyId) -> Result<(), Problem> {
    let sealer = sealer(context)?;
    if context.store.webhook_secret(key_id).await?.is_some() {
        return Ok(());
    }
    let now = clock::now();
    let secret = given_or_new(None)?;
    let sealed = Secrets::first(&secret, now)
        .seal(sealer, key_id.as_str())
        .map_err(Problem::internal)?;
    let mut tx = context.store.begin().await?;
    tx.put_webhook_secret(key_id, &sealed, now).await?;
    tx.commit().await?;
    Ok(())
}

/// Checks the `webhook_url` of a job.
pub fn check_url(context: &Context, url: &str) -> Result<(), Problem> {
    let checked = context.config.webhook_guard.check_url(url);
    checked
        .map(drop)
        .map_err(|refusal| not_allowed("body -> webhook_url", refusal))
}
