//! What signs the events that a key's jobs send to their own `webhook_url`.

use http::StatusCode;
use serde::Serialize;
use serde_json::json;
use shared::clock::{self, Timestamp};
use shared::webhook::secrets::Secrets;
use std::time::Duration;
use warp::reply::Response;

use super::{given_or_new, opened, sealer};
use crate::audit;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply;
use crate::http::request::Request;
use crate::http::request::fields::integer;

/// How often a change is tried that somebody else's comes before.
const TRIES: usize = 5;

/// A secret as its owner sees it.
#[derive(Debug, Serialize)]
struct SecretView {
    algorithm: &'static str,
    prefix: Option<String>,
    created_at: Timestamp,
    previous_valid_until: Option<Timestamp>,
    /// The secret itself: shown once, to the request that made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

/// `GET /webhooks/secret`: which one it is, never the secret.
pub async fn show(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let sealer = sealer(context)?;
    super::ensure_secret(context, &caller.key_id).await?;
    let stored = context.store.webhook_secret(&caller.key_id).await?;
    let (sealed, created_at, _) = stored.ok_or(Problem::NoSuch("Webhook secret"))?;
    let secrets = opened(sealer, caller.key_id.as_str(), &sealed)?;
    let view = SecretView {
        algorithm: "v1",
        prefix: secrets.prefix(),
        created_at,
        previous_valid_until: secrets.previous_valid_until(clock::now()),
        secret: None,
    };
    reply::data(request, StatusCode::OK, view)
}

/// `POST /webhooks/secret/rotate`: another secret; the old one signs too for `grace_seconds` more.
pub async fn rotate(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let mut body = request.json_or_nothing().await?.fields()?;
    let grace = body
        .optional("grace_seconds", integer(0..=604_800))
        .unwrap_or(86_400);
    body.finish(Some(()))?;
    let sealer = sealer(context)?;
    let (key_id, grace) = (
        &caller.key_id,
        Duration::from_secs(u64::try_from(grace).unwrap_or(0)),
    );
    for _ in 0..TRIES {
        let (now, secret) = (clock::now(), given_or_new(None)?);
        let stored = context.store.webhook_secret(key_id).await?;
        let secrets = match &stored {
            Some((sealed, ..)) => {
                let mut secrets = opened(sealer, key_id.as_str(), sealed)?;
                if !secrets.rotate(&secret, grace, now) {
                    return Err(Problem::TooManySecrets);
                }
                secrets
            }
            None => Secrets::first(&secret, now),
        };
        let sealed = secrets.seal(sealer, key_id.as_str()).map_err(Problem::internal)?;
        let mut tx = context.store.begin().await?;
        let done = match &stored {
            Some((.., version)) => tx.rotate_webhook_secret(key_id, *version, &sealed, now).await?,
            None => !tx.put_webhook_secret(key_id, &sealed, now).await?,
        };
        if !done {
            tx.rollback().await?;
            continue;
        }
        let detail = json!({ "grace_seconds": grace.as_secs() });
        tx.audit(&audit::entry(
            context,
            request,
            caller,
            "webhook_secret.rotate",
            key_id.as_str(),
            detail,
        ))
        .await?;
        tx.commit().await?;
        let view = SecretView {
            algorithm: "v1",
            prefix: secrets.prefix(),
            created_at: now,
            previous_valid_until: secrets.previous_valid_until(now),
            secret: Some(secret.expose()),
        };
        return reply::data(request, StatusCode::OK, view);
    }
    Err(Problem::PreconditionFailed("The secret was changed meanwhile"))
}
