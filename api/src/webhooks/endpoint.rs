//! Endpoints: addresses that get the events of their owner.

use http::{HeaderName, HeaderValue, Method, StatusCode};
use serde::Serialize;
use serde_json::{Map, Value, json};
use shared::clock::{self, Timestamp};
use shared::delivery::{DeliveryStatus, Endpoint, HookEvent};
use shared::id::{EndpointId, KeyId};
use shared::webhook::address::masked;
use shared::webhook::secrets::Secrets;
use shared::webhook::signature::SigningSecret;
use std::collections::BTreeMap;
use std::time::Duration;
use warp::reply::Response;

use super::delivery::DeliveryView;
use super::{given_or_new, not_allowed, opened, sealer};
use crate::audit;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::page::{Cursor, Pagination, more_than};
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, etag};
use crate::http::request::fields::{
    Fault, Fields, Reading, choice, integer, list, metadata, parsed, text, time,
};
use crate::http::request::{Request, Segment, headers};

/// What is sealed of an endpoint beside its secrets.
pub const HEADERS: &str = "endpoint-headers";

/// Headers that a delivery has of its own, or that would change how it is sent.
const OWN_HEADERS: [&str; 12] = [
    "host",
    "connection",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
    "traceparent",
    "user-agent",
];

/// How often a change is tried that somebody else's comes before.
const TRIES: usize = 5;

/// An endpoint as clients see it.
#[derive(Debug, Serialize)]
pub struct EndpointView {
    id: EndpointId,
    key_id: KeyId,
    url: String,
    event_types: Vec<String>,
    description: String,
    signature: &'static str,
    payload: String,
    headers: BTreeMap<String, &'static str>,
    metadata: Value,
    status: &'static str,
    disabled_reason: Option<String>,
    first_failure_at: Option<Timestamp>,
    created_at: Timestamp,
    updated_at: Timestamp,
    secret_prefix: Option<String>,
    previous_valid_until: Option<Timestamp>,
    stats: StatsView,
    version: i64,
    /// The secret: shown once, to the request that made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

/// How its deliveries of a time went.
#[derive(Debug, Serialize)]
struct StatsView {
    last_24h: CountsView,
}

#[derive(Debug, Default, Serialize)]
struct CountsView {
    pending: i64,
    succeeded: i64,
    failed: i64,
}

impl EndpointView {
    async fn of(context: &Context, endpoint: &Endpoint, secret: Option<String>) -> Result<Self, Problem> {
        let (sealer, now) = (sealer(context)?, clock::now());
        let owner = endpoint.endpoint_id.to_string();
        let secrets = opened(sealer, &owner, &endpoint.secrets)?;
        let since = Timestamp(now.0 - 24 * 3_600 * 1_000_000);
        let mut counts = CountsView::default();
        for (status, count) in context.store.delivery_counts(endpoint.endpoint_id, since).await? {
            match status {
                DeliveryStatus::Pending => counts.pending = count,
                DeliveryStatus::Succeeded => counts.succeeded = count,
                DeliveryStatus::Failed => counts.failed = count,
                DeliveryStatus::Cancelled => {}
            }
        }
        Ok(Self {
            id: endpoint.endpoint_id,
            key_id: endpoint.key_id.clone(),
            url: endpoint.url.clone(),
            event_types: endpoint
                .event_types
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            description: endpoint.description.clone(),
            signature: "v1",
            payload: endpoint.payload.clone(),
            // A value may be a credential of the receiver.
            headers: stored_headers(context, endpoint)?
                .into_keys()
                .map(|name| (name, "…"))
                .collect(),
            metadata: serde_json::from_str(&endpoint.metadata).map_err(Problem::internal)?,
            status: if endpoint.enabled { "enabled" } else { "disabled" },
            disabled_reason: endpoint.disabled_reason.clone(),
            first_failure_at: endpoint.first_failure_at,
            created_at: endpoint.created_at,
            updated_at: endpoint.updated_at,
            secret_prefix: secrets.prefix(),
            previous_valid_until: secrets.previous_valid_until(now),
            stats: StatsView { last_24h: counts },
            version: endpoint.version,
            secret,
        })
    }
}

fn stored_headers(context: &Context, endpoint: &Endpoint) -> Result<BTreeMap<String, String>, Problem> {
    let owner = endpoint.endpoint_id.to_string();
    let opened = sealer(context)?.open(HEADERS, &owner, &endpoint.headers);
    let opened = opened.ok_or_else(|| Problem::internal("the headers of an endpoint can't be opened"))?;
    serde_json::from_slice(&opened).map_err(Problem::internal)
}

/// `/api/v1/webhooks/endpoints`.
pub async fn collection(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    match request.method {
        Method::GET => list_all(context, request, caller).await,
        _ => create(context, request, caller).await,
    }
}

/// `/api/v1/webhooks/endpoints/{id}`.
pub async fn item(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    match request.method {
        Method::GET => {
            let endpoint = find(context, caller, id).await?;
            answer(context, request, &endpoint, None).await
        }
        Method::PATCH => patch(context, request, caller, id).await,
        _ => delete(context, request, caller, id).await,
    }
}

/// `POST /webhooks/endpoints/{id}/secret/rotate`.
pub async fn rotate(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let mut body = request.json_or_nothing().await?.fields()?;
    let grace = body
        .optional("grace_seconds", integer(0..=604_800))
        .unwrap_or(86_400);
    let given = body.optional("secret", signing_secret);
    body.finish(Some(()))?;
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
    let secret = given_or_new(given)?;
    let sealer = sealer(context)?;
    for _ in 0..TRIES {
        let mut endpoint = find(context, caller, id).await?;
        check_match(request, &endpoint)?;
        let (owner, now) = (endpoint.endpoint_id.to_string(), clock::now());
        let mut secrets = opened(sealer, &owner, &endpoint.secrets)?;
        if !secrets.rotate(&secret, grace, now) {
            return Err(Problem::TooManySecrets);
        }
        endpoint.secrets = secrets.seal(sealer, &owner).map_err(Problem::internal)?;
        let mut tx = context.store.begin().await?;
        let Some(stored) = tx.update_endpoint(&endpoint, now).await? else {
            tx.rollback().await?;
            continue;
        };
        let detail = json!({ "grace_seconds": grace.as_secs() });
        tx.audit(&audit::entry(
            context,
            request,
            caller,
            "endpoint.rotate",
            &owner,
            detail,
        ))
        .await?;
        tx.commit().await?;
        return answer(context, request, &stored, Some(secret.expose())).await;
    }
    Err(changed())
}

/// `POST /webhooks/endpoints/{id}/test`: sends an event that means nothing.
pub async fn test(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let endpoint = find(context, caller, id).await?;
    if !endpoint.enabled {
        return Err(Problem::EndpointDisabled);
    }
    let mut tx = context.store.begin().await?;
    let delivery = tx.announce_test(&endpoint, clock::now()).await?;
    tx.commit().await?;
    let view = DeliveryView::of(&delivery, Vec::new());
    let response = reply::data(request, StatusCode::ACCEPTED, view)?;
    Ok(response.location(&format!("/api/v1/webhooks/deliveries/{}", delivery.delivery_id)))
}

/// How many deliveries are sent again.
#[derive(Debug, Serialize)]
struct RecoveredView {
    queued: u64,
}

/// `POST /webhooks/endpoints/{id}/recover`: sends what failed in a time once more.
pub async fn recover(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let endpoint = find(context, caller, id).await?;
    let mut body = request.json().await?.fields()?;
    let since = body.required("since", time);
    let until = body.optional("until", time);
    let now = clock::now();
    if since.is_some_and(|since| now.since(since) > Duration::from_hours(30 * 24)) {
        body.fault("since", Fault::value("Time should be at most 30 days ago"));
    }
    let since = body.finish(since)?;
    if !endpoint.enabled {
        return Err(Problem::EndpointDisabled);
    }
    let mut tx = context.store.begin().await?;
    let queued = tx
        .recover_deliveries(&endpoint, (since, until.unwrap_or(now)), now)
        .await?;
    tx.commit().await?;
    reply::data(request, StatusCode::ACCEPTED, RecoveredView { queued })
}

/// `POST /webhooks/endpoints`.
async fn create(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let sealer = sealer(context)?;
    let mut fields = request.json().await?.fields()?;
    let change = Change::read(&mut fields);
    let given = fields.optional("secret", signing_secret);
    let url = change.url.clone();
    if url.is_none() {
        fields.fault("url", Fault::new("missing", "Field required"));
    }
    let url = fields.finish(url)?;
    check_url(context, &url)?;
    let (endpoint_id, now) = (EndpointId::new(), clock::now());
    let owner = endpoint_id.to_string();
    let secret = given_or_new(given)?;
    let none = sealer.seal(HEADERS, &owner, b"{}").map_err(Problem::internal)?;
    let mut endpoint = Endpoint {
        endpoint_number: 0,
        endpoint_id,
        key_id: caller.key_id.clone(),
        url,
        event_types: String::new(),
        description: String::new(),
        payload: "full".to_owned(),
        headers: none,
        secrets: Secrets::first(&secret, now)
            .seal(sealer, &owner)
            .map_err(Problem::internal)?,
        metadata: "{}".to_owned(),
        enabled: true,
        disabled_reason: None,
        first_failure_at: None,
        created_at: now,
        updated_at: now,
        version: 1,
    };
    change.apply_to(context, &mut endpoint)?;
    let mut tx = context.store.begin().await?;
    let Some(stored) = tx.insert_endpoint(&endpoint).await? else {
        tx.rollback().await?;
        return Err(Problem::TooManyEndpoints);
    };
    let detail = json!({ "url": masked(&endpoint.url) });
    tx.audit(&audit::entry(
        context,
        request,
        caller,
        "endpoint.create",
        &owner,
        detail,
    ))
    .await?;
    tx.commit().await?;
    let view = EndpointView::of(context, &stored, Some(secret.expose())).await?;
    let response = reply::data(request, StatusCode::CREATED, view)?;
    Ok(response
        .location(&format!("/api/v1/webhooks/endpoints/{owner}"))
        .etag_unkept(&etag(stored.version)))
}

async fn list_all(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=100)?.unwrap_or(20);
    let bound_to = format!("endpoints {}", caller.admin);
    let before = match query.text("cursor") {
        Some(cursor) => Cursor::decode(cursor, &bound_to)?.0,
        None => i64::MAX,
    };
    let owner = (!caller.admin).then_some(&caller.key_id);
    let mut endpoints = context.store.endpoints(owner, before, limit + 1).await?;
    let next = more_than(limit, &mut endpoints, |endpoint| {
        Cursor(endpoint.endpoint_number).encode(&bound_to)
    });
    let mut shown = Vec::new();
    for endpoint in &endpoints {
        shown.push(EndpointView::of(context, endpoint, None).await?);
    }
    let pagination = Pagination::new(limit, next);
    Ok(pagination.link(request, reply::list(request, shown, &pagination)?))
}

async fn patch(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let mut fields = request.json().await?.fields()?;
    let change = Change::read(&mut fields);
    fields.finish(Some(()))?;
    if let Some(url) = &change.url {
        check_url(context, url)?;
    }
    for _ in 0..TRIES {
        let mut endpoint = find(context, caller, id).await?;
        check_match(request, &endpoint)?;
        change.apply_to(context, &mut endpoint)?;
        let mut tx = context.store.begin().await?;
        let Some(stored) = tx.update_endpoint(&endpoint, clock::now()).await? else {
            tx.rollback().await?;
            continue;
        };
        let detail = json!({ "url": masked(&stored.url), "enabled": stored.enabled });
        tx.audit(&audit::entry(
            context,
            request,
            caller,
            "endpoint.update",
            &stored.endpoint_id.to_string(),
            detail,
        ))
        .await?;
        tx.commit().await?;
        return answer(context, request, &stored, None).await;
    }
    Err(changed())
}

async fn delete(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let endpoint = find(context, caller, id).await?;
    let mut tx = context.store.begin().await?;
    if !tx.delete_endpoint(endpoint.endpoint_id, clock::now()).await? {
        tx.rollback().await?;
        return Err(Problem::NoSuch("Endpoint"));
    }
    let detail = json!({ "url": masked(&endpoint.url) });
    tx.audit(&audit::entry(
        context,
        request,
        caller,
        "endpoint.delete",
        &endpoint.endpoint_id.to_string(),
        detail,
    ))
    .await?;
    tx.commit().await?;
    Ok(reply::empty(StatusCode::NO_CONTENT))
}

/// The caller's endpoint of this id; an administrator's are all.
async fn find(context: &Context, caller: &Caller, id: &Segment) -> Result<Endpoint, Problem> {
    let id = id.as_ref().parse().map_err(|_| Problem::NoSuch("Endpoint"))?;
    let endpoint = context.store.endpoint(id).await?;
    endpoint
        .filter(|endpoint| caller.admin || endpoint.key_id == caller.key_id)
        .ok_or(Problem::NoSuch("Endpoint"))
}

async fn answer(
    context: &Context,
    request: &Request,
    endpoint: &Endpoint,
    secret: Option<String>,
) -> Result<Response, Problem> {
    let view = EndpointView::of(context, endpoint, secret).await?;
    Ok(reply::data(request, StatusCode::OK, view)?.etag_unkept(&etag(endpoint.version)))
}

fn check_url(context: &Context, url: &str) -> Result<(), Problem> {
    let checked = context.config.webhook_guard.check_url(url);
    checked
        .map(drop)
        .map_err(|refusal| not_allowed("body -> url", refusal))
}

/// Refuses a change of another version than the client has seen.
fn check_match(request: &Request, endpoint: &Endpoint) -> Result<(), Problem> {
    match headers::text(&request.headers, "if-match") {
        Some(tags) if !headers::names_etag(tags, &etag(endpoint.version)) => Err(changed()),
        _ => Ok(()),
    }
}

fn changed() -> Problem {
    Problem::PreconditionFailed("The endpoint is not as If-Match says, or was changed meanwhile")
}

/// What a request says of an endpoint; `None` leaves it as it is.
#[derive(Debug)]
struct Change {
    url: Option<String>,
    event_types: Option<Vec<&'static str>>,
    description: Option<String>,
    payload: Option<&'static str>,
    headers: Option<BTreeMap<String, String>>,
    metadata: Option<Map<String, Value>>,
    enabled: Option<bool>,
}

impl Change {
    fn read(fields: &mut Fields) -> Self {
        Self {
            url: fields.optional("url", text(1..=2_048)),
            event_types: fields.optional("event_types", list(20, event_type)),
            description: fields.optional("description", text(0..=256)),
            payload: fields.optional("payload", choice(&["full", "thin"])),
            headers: fields.optional("headers", extra_headers),
            metadata: fields.optional("metadata", metadata),
            enabled: {
                let signature = fields.optional("signature", choice(&["v1"]));
                let _: Option<&str> = signature;
                fields
                    .optional("status", choice(&["enabled", "disabled"]))
                    .map(|status| status == "enabled")
            },
        }
    }

    fn apply_to(&self, context: &Context, endpoint: &mut Endpoint) -> Result<(), Problem> {
        if let Some(url) = &self.url {
            endpoint.url.clone_from(url);
        }
        if let Some(types) = &self.event_types {
            endpoint.event_types = match &types[..] {
                [] => String::new(),
                types => format!(" {} ", types.join(" ")),
            };
        }
        if let Some(description) = &self.description {
            endpoint.description.clone_from(description);
        }
        if let Some(payload) = self.payload {
            payload.clone_into(&mut endpoint.payload);
        }
        if let Some(headers) = &self.headers {
            let text = serde_json::to_vec(headers).map_err(Problem::internal)?;
            let owner = endpoint.endpoint_id.to_string();
            endpoint.headers = sealer(context)?
                .seal(HEADERS, &owner, &text)
                .map_err(Problem::internal)?;
        }
        if let Some(metadata) = &self.metadata {
            endpoint.metadata = Value::Object(metadata.clone()).to_string();
        }
        endpoint.enabled = self.enabled.unwrap_or(endpoint.enabled);
        Ok(())
    }
}

fn event_type(value: Value) -> Reading<&'static str> {
    let word = text(1..=64)(value)?;
    let known = HookEvent::ALL.into_iter().map(HookEvent::as_str);
    known.clone().find(|known| *known == word).ok_or_else(|| {
        let known = known.collect::<Vec<_>>().join(", ");
        vec![Fault::new(
            "literal_error",
            format!("Input should be one of {known}"),
        )]
    })
}

/// A client's own secret.
fn signing_secret(value: Value) -> Reading<SigningSecret> {
    parsed(1..=256, |text: String| {
        SigningSecret::parse(&text).map_err(|error| error.to_string())
    })(value)
}

/// Headers that are sent along: at most 10, none that a delivery has of its own.
fn extra_headers(value: Value) -> Reading<BTreeMap<String, String>> {
    let fault = |message: String| Err(vec![Fault::value(message)]);
    let Value::Object(pairs) = value else {
        return Err(vec![Fault::new(
            "dict_type",
            "Input should be a valid dictionary",
        )]);
    };
    if pairs.len() > 10 {
        return fault("Dictionary should have at most 10 items".to_owned());
    }
    let mut headers = BTreeMap::new();
    for (name, value) in pairs {
        let shown: String = name.chars().take(64).collect();
        let lower = name.to_ascii_lowercase();
        let own = OWN_HEADERS.contains(&lower.as_str())
            || lower.starts_with("webhook-")
            || lower.starts_with("content-");
        if own {
            return fault(format!("The header {shown} is set by the service"));
        }
        if name.len() > 64 || HeaderName::from_bytes(name.as_bytes()).is_err() {
            return fault(format!(
                "{shown} isn't the name of a header of at most 64 characters"
            ));
        }
        let value = value
            .as_str()
            .filter(|value| value.len() <= 1_024 && HeaderValue::from_str(value).is_ok());
        let Some(value) = value else {
            return fault(format!(
                "The value of {shown} should be visible ASCII text of at most 1,024 characters"
            ));
        };
        headers.insert(lower, value.to_owned());
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_the_service_cannot_be_set() {
        for name in [
            "Host",
            "webhook-id",
            "Content-Type",
            "TRANSFER-ENCODING",
            "a b",
            "",
        ] {
            assert!(extra_headers(json!({ name: "x" })).is_err(), "{name}");
        }
        let set = extra_headers(json!({ "Authorization": "Bearer x" })).unwrap();
        assert_eq!(set["authorization"], "Bearer x");
        assert!(extra_headers(json!({ "x": "a\r\nb: c" })).is_err());
    }

    #[test]
    fn an_event_type_is_one_that_there_is() {
        assert_eq!(event_type(json!("job.failed")).unwrap(), "job.failed");
        assert!(event_type(json!("job.fialed")).is_err());
    }
}
