//! Keys over HTTP. A secret is in one answer only, the one to the request that made it.

mod change;
mod request;
mod view;

use http::{Method, StatusCode};
use serde_json::{Value, json};
use shared::budget::Scope as BudgetScope;
use shared::clock::{self, Timestamp};
use shared::id::KeyId;
use shared::key::{ApiKey, Digest, KeyKind, KeyRights, KeyStatus, Kid, NewApiKey, Scope, Secret};
use shared::storage::{self, KeyFilter, NewSecret, PutBudget, Store, Tx};
use std::time::Duration;
use warp::reply::Response;

use crate::audit;
use crate::budgets::{self, BudgetSpec, BudgetSpecView, BudgetView};
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::page::{Cursor, Pagination, more_than};
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, etag};
use crate::http::request::fields::{boolean, choice, integer, text};
use crate::http::request::{Request, Segment, headers};
use change::Change;
use request::KeyRequest;
use view::KeyView;

/// How often a change is tried that somebody else's comes before.
const TRIES: usize = 5;

/// `/api/v1/keys`.
pub async fn collection(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    match request.method {
        Method::GET => list(context, request).await,
        _ => create(context, request, caller).await,
    }
}

/// `/api/v1/keys/{id}`.
pub async fn item(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    match request.method {
        Method::GET => show(context, request, id.as_ref()).await,
        Method::PATCH => patch(context, request, caller, id).await,
        _ => delete(context, request, caller, id).await,
    }
}

/// `GET /keys/me`: the caller's own key, its budgets and its limits, for every caller.
pub async fn me(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let mut shown = match stored(&context.store, &caller.key_id).await? {
        Some(key) => KeyView::of_stored(context, &key).await?,
        None => KeyView::of_other(context, caller).await?,
    };
    let own = context.store.budgets_of(&caller.key_id, clock::now()).await?;
    shown.budget_status = Some(own.iter().map(BudgetView::of).collect());
    shown.rate_limit_status = Some(view::rate_limits(context, caller).await?);
    reply::data(request, StatusCode::OK, shown)
}

/// `POST /keys/{id}/rotate`: another secret; the old one stays valid for `grace_seconds` more.
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
    body.finish(Some(()))?;
    for _ in 0..TRIES {
        let key = find(context, id).await?;
        check_match(request, &key)?;
        may_change(caller, &key)?;
        if key.status(clock::now()) != KeyStatus::Active {
            return Err(Problem::KeyNotActive);
        }
        let kid = Kid::of(key.key_id.as_str()).ok_or(Problem::NoSuch("Key"))?;
        let (secret, digest) = new_secret(context, KeyKind::of(key.is_admin()), &kid)?;
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let fresh = NewSecret::new((&secret, digest), grace, clock::now());
        let mut tx = context.store.begin().await?;
        let Some(rotated) = tx.rotate_api_key(&key.key_id, key.version, &fresh).await? else {
            tx.rollback().await?;
            continue;
        };
        let detail = json!({"grace_seconds": grace.as_secs()});
        tx.audit(&audit::entry(
            context,
            request,
            caller,
            "key.rotate",
            key.key_id.as_str(),
            detail,
        ))
        .await?;
        tx.commit().await?;
        context.keyring.forget(&key.key_id);
        let mut shown = KeyView::of_stored(context, &rotated).await?;
        shown.key = Some(secret.expose().to_owned());
        return Ok(reply::data(request, StatusCode::OK, shown)?.etag_unkept(&etag(rotated.version)));
    }
    Err(Problem::PreconditionFailed("The key was changed meanwhile"))
}

/// `POST /keys/{id}/revoke`: the key stops working everywhere within seconds. Its jobs go on unless the
/// request wants them cancelled.
pub async fn revoke(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let mut body = request.json_or_nothing().await?.fields()?;
    let reason = body.optional("reason", text(0..=200));
    let cancel_jobs = body.optional("cancel_jobs", boolean).unwrap_or(false);
    body.finish(Some(()))?;
    let key = find(context, id).await?;
    may_change(caller, &key)?;
    let mut tx = context.store.begin().await?;
    let revoked = tx
        .revoke_api_key(&key.key_id, reason.as_deref(), clock::now())
        .await?
        .ok_or(Problem::NoSuch("Key"))?;
    if revoked.version != key.version || cancel_jobs {
        let detail = json!({"reason": reason, "cancel_jobs": cancel_jobs});
        tx.audit(&audit::entry(
            context,
            request,
            caller,
            "key.revoke",
            key.key_id.as_str(),
            detail,
        ))
        .await?;
    }
    tx.commit().await?;
    context.keyring.forget(&key.key_id);
    if cancel_jobs {
        // In a task of its own, so that it is done to the end although the client may go away.
        let store = context.store.clone();
        let cancelling = tokio::spawn(async move { store.cancel_jobs_of(&key.key_id).await });
        cancelling.await.map_err(Problem::internal)??;
    }
    reply::data(
        request,
        StatusCode::OK,
        KeyView::of_stored(context, &revoked).await?,
    )
}

/// `POST /keys`.
async fn create(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let new = KeyRequest::read(request.json().await?.fields()?, clock::now())?;
    within_own(caller, &new.rights)?;
    if new.budget.is_some() {
        caller.require(Scope::BudgetsAdmin)?;
    }
    let kid = Kid::generate().map_err(Problem::internal)?;
    let kind = KeyKind::of(new.rights.scopes.contains(Scope::KeysAdmin));
    let (secret, secret_digest) = new_secret(context, kind, &kid)?;
    let now = clock::now();
    let key = NewApiKey {
        key_id: kid.key_id(),
        name: new.name,
        secret_digest,
        last4: secret.last4().to_owned(),
        rights: new.rights,
        metadata: Value::Object(new.metadata).to_string(),
        expires_at: new.expires_at,
        created_at: now,
        created_by: caller.key_id.to_string(),
    };
    let mut tx = context.store.begin().await?;
    let made = tx
        .insert_api_key(&key, context.config.key_max_running_jobs)
        .await?;
    match &new.budget {
        Some(budget) => put_budget(&mut tx, &key.key_id, budget, now).await?,
        None => {
            tx.put_default_budget(&key.key_id, context.config.max_cost_per_user, now)
                .await?;
        }
    }
    let detail = json!({
        "name": key.name,
        "scopes": key.rights.scopes.to_string(),
        "budget": shown_budget(new.budget.as_ref(), &key.key_id),
    });
    tx.audit(&audit::entry(
        context,
        request,
        caller,
        "key.create",
        key.key_id.as_str(),
        detail,
    ))
    .await?;
    tx.commit().await?;
    context.keyring.forget(&key.key_id);
    let mut shown = KeyView::of_stored(context, &made).await?;
    shown.key = Some(secret.expose().to_owned());
    let response = reply::data(request, StatusCode::CREATED, shown)?;
    Ok(response
        .location(&format!("/api/v1/keys/{}", made.key_id))
        .etag_unkept(&etag(made.version)))
}

/// `GET /keys`: newest first, those of the environment last.
async fn list(context: &Context, request: &Request) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=100)?.unwrap_or(20);
    let status = query.value("status", |word| {
        choice(&["active", "revoked", "expired"])(word.into())
    })?;
    let status = status.map(|word| match word {
        "revoked" => KeyStatus::Revoked,
        "expired" => KeyStatus::Expired,
        _ => KeyStatus::Active,
    });
    let name = query.text("name").map(str::to_owned);
    let bound_to = format!("{status:?} {name:?}");
    let after = match query.text("cursor") {
        Some(cursor) => Cursor::decode(cursor, &bound_to)?.0,
        None => i64::MAX,
    };
    let mut shown = Vec::new();
    // The keys of the environment have the positions -1, -2 … after all others.
    if after > 0 {
        let filter = KeyFilter {
            status,
            name: name.clone(),
            before: Some(after),
        };
        for key in context.store.api_keys(&filter, limit + 1, clock::now()).await? {
            shown.push((key.key_number, KeyView::of_stored(context, &key).await?));
        }
    }
    if status.is_none_or(|status| status == KeyStatus::Active) {
        for (position, key) in (1..).zip(context.config.keys.callers()) {
            let fits = name.as_deref().is_none_or(|name| name == view::other_name(key));
            if -position < after && fits {
                shown.push((-position, KeyView::of_other(context, key).await?));
            }
        }
    }
    let next = more_than(limit, &mut shown, |(position, _)| {
        Cursor(*position).encode(&bound_to)
    });
    let pagination = Pagination::new(limit, next);
    let shown = shown.into_iter().map(|(_, key)| key).collect::<Vec<_>>();
    Ok(pagination.link(request, reply::list(request, shown, &pagination)?))
}

/// `GET /keys/{id}`.
async fn show(context: &Context, request: &Request, id: &str) -> Result<Response, Problem> {
    if let Some(other) = of_environment(context, id) {
        return reply::data(request, StatusCode::OK, KeyView::of_other(context, other).await?);
    }
    let key = stored(&context.store, &KeyId::known(id))
        .await?
        .ok_or(Problem::NoSuch("Key"))?;
    let shown = KeyView::of_stored(context, &key).await?;
    Ok(reply::data(request, StatusCode::OK, shown)?.etag(&etag(key.version)))
}

/// `PATCH /keys/{id}`: what is absent stays, what is null is as the service is set up.
async fn patch(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let change = Change::read(request.json().await?.fields()?, clock::now())?;
    if change.budget.is_some() {
        caller.require(Scope::BudgetsAdmin)?;
    }
    for _ in 0..TRIES {
        let mut key = find(context, id).await?;
        check_match(request, &key)?;
        may_change(caller, &key)?;
        change.apply_to(&mut key);
        within_own(caller, &key.rights)?;
        let mut tx = context.store.begin().await?;
        let changed = tx
            .update_api_key(&key, context.config.key_max_running_jobs)
            .await?;
        let Some(changed) = changed else {
            tx.rollback().await?;
            continue;
        };
        match &change.budget {
            Some(Some(budget)) => put_budget(&mut tx, &key.key_id, budget, clock::now()).await?,
            Some(None) => {
                let scope = BudgetScope::Key(key.key_id.clone());
                let default = context.config.max_cost_per_user;
                tx.delete_budget(&scope, default, None, clock::now()).await?;
            }
            None => {}
        }
        let detail = json!({"changed": change.names(), "budget": shown_budget(change.budget.as_ref().and_then(Option::as_ref), &key.key_id)});
        tx.audit(&audit::entry(
            context,
            request,
            caller,
            "key.update",
            key.key_id.as_str(),
            detail,
        ))
        .await?;
        tx.commit().await?;
        context.keyring.forget(&key.key_id);
        let shown = KeyView::of_stored(context, &changed).await?;
        return Ok(reply::data(request, StatusCode::OK, shown)?.etag(&etag(changed.version)));
    }
    Err(Problem::PreconditionFailed("The key was changed meanwhile"))
}

/// `DELETE /keys/{id}`.
async fn delete(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let key = find(context, id).await?;
    may_change(caller, &key)?;
    let mut tx = context.store.begin().await?;
    if !tx.delete_api_key(&key.key_id, clock::now()).await? {
        tx.rollback().await?;
        return Err(Problem::KeyActive);
    }
    let detail = json!({"name": key.name});
    tx.audit(&audit::entry(
        context,
        request,
        caller,
        "key.delete",
        key.key_id.as_str(),
        detail,
    ))
    .await?;
    tx.commit().await?;
    context.keyring.forget(&key.key_id);
    Ok(reply::empty(StatusCode::NO_CONTENT))
}

/// The key of this id that can be changed.
async fn find(context: &Context, id: &Segment) -> Result<ApiKey, Problem> {
    if of_environment(context, id.as_ref()).is_some() {
        return Err(Problem::KeyReadOnly);
    }
    let key_id = KeyId::known(id.as_ref());
    stored(&context.store, &key_id)
        .await?
        .ok_or(Problem::NoSuch("Key"))
}

/// The key of this id in the database; what can't be one isn't looked up.
async fn stored(store: &Store, key_id: &KeyId) -> storage::Result<Option<ApiKey>> {
    match Kid::of(key_id.as_str()) {
        Some(_) => store.api_key(key_id).await,
        None => Ok(None),
    }
}

fn of_environment<'c>(context: &'c Context, id: &str) -> Option<&'c Caller> {
    let mut keys = context.config.keys.callers();
    keys.find(|key| key.key_id.as_str() == id)
}

/// Refuses a change of another version than the client has seen.
fn check_match(request: &Request, key: &ApiKey) -> Result<(), Problem> {
    match headers::text(&request.headers, "if-match") {
        Some(tags) if !headers::names_etag(tags, &etag(key.version)) => {
            Err(Problem::PreconditionFailed("The key is not as If-Match says"))
        }
        _ => Ok(()),
    }
}

/// Nobody gives what they don't have.
fn within_own(caller: &Caller, rights: &KeyRights) -> Result<(), Problem> {
    match rights.scopes.beyond(caller.rights.scopes) {
        Some(scope) => Err(Problem::InsufficientScope(scope)),
        None => Ok(()),
    }
}

/// Who got the secret of a key that may more than their own, or could widen it, would get round that.
fn may_change(caller: &Caller, key: &ApiKey) -> Result<(), Problem> {
    within_own(caller, &key.rights)
}

fn new_secret(context: &Context, kind: KeyKind, kid: &Kid) -> Result<(Secret, Digest), Problem> {
    let secret_key = context.keyring.secret_key().ok_or(Problem::Unavailable {
        detail: "Keys need SECRET_KEY, which this service is started without",
        source: None,
    })?;
    secret_key.issue(kind, kid).map_err(Problem::internal)
}

/// Gives the key a budget of its own.
async fn put_budget(tx: &mut Tx, key_id: &KeyId, spec: &BudgetSpec, now: Timestamp) -> Result<(), Problem> {
    let budget = spec.clone().into_budget(BudgetScope::Key(key_id.clone()));
    match tx.put_budget(&budget, None, now).await? {
        PutBudget::Stored => Ok(()),
        PutBudget::BelowSpent(spent) => Err(budgets::below_spent("body -> budget -> limit_usd", spent)),
        PutBudget::NoSuchKey | PutBudget::Changed => Err(Problem::NoSuch("Key")),
    }
}

/// A budget that was set with its key, for the audit.
fn shown_budget(spec: Option<&BudgetSpec>, key_id: &KeyId) -> Option<BudgetSpecView> {
    let budget = spec?.clone().into_budget(BudgetScope::Key(key_id.clone()));
    Some(BudgetSpecView::of(&budget))
}
