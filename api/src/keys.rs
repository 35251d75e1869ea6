//! Keys over HTTP. A secret is in one answer only, the one to the request that made it.

mod change;
mod view;
mod wish;

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
use crate::budgets::{self, Terms};
use crate::caller::Caller;
use crate::problem::Problem;
use crate::reply::{self, Cursor, Headers, Pagination, etag, more_than};
use crate::request::fields::{boolean, choice, integer, text};
use crate::request::{Request, Segment, headers};
use change::Change;
use wish::Wish;

/// How often a change is tried that somebody else's comes before.
const TRIES: usize = 5;

/// `/api/v1/keys`.
pub async fn collection(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    match request.method {
        Method::GET => list(request).await,
        _ => create(request, caller).await,
    }
}

/// `/api/v1/keys/{id}`.
pub async fn item(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    match request.method {
        Method::GET => show(request, id.as_ref()).await,
        Method::PATCH => patch(request, caller, id).await,
        _ => delete(request, caller, id).await,
    }
}

/// `GET /keys/me`: the caller's own key, its budgets and its limits, for every caller.
pub async fn me(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let context = &request.context;
    let mut shown = match stored(&context.store, &caller.key_id).await? {
        Some(key) => view::show(context, &key).await?,
        None => view::show_other(context, caller).await?,
    };
    let own = context.store.budgets_of(&caller.key_id, clock::now()).await?;
    shown.insert(
        "budget_status".to_owned(),
        own.iter().map(budgets::show).collect(),
    );
    shown.insert(
        "rate_limit_status".to_owned(),
        view::rate_limits(context, caller).await?,
    );
    reply::data(request, StatusCode::OK, shown)
}

/// `POST /keys/{id}/rotate`: another secret; the present one opens for `grace_seconds` more.
pub async fn rotate(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    let mut body = request.json_or_nothing().await?.fields()?;
    let grace = body
        .optional("grace_seconds", integer(0..=604_800))
        .unwrap_or(86_400);
    body.finish(Some(()))?;
    let context = &request.context;
    for _ in 0..TRIES {
        let key = find(request, id).await?;
        check_match(request, &key)?;
        may_change(caller, &key)?;
        if key.status(clock::now()) != KeyStatus::Active {
            return Err(Problem::KeyNotActive);
        }
        let kid = Kid::of(key.key_id.as_str()).ok_or(Problem::NoSuch("Key"))?;
        let (secret, digest) = new_secret(request, KeyKind::of(key.is_admin()), &kid)?;
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let fresh = NewSecret::new((&secret, digest), grace, clock::now());
        let mut tx = context.store.begin().await?;
        let Some(rotated) = tx.rotate_api_key(&key.key_id, key.version, &fresh).await? else {
            tx.rollback().await?;
            continue;
        };
        let detail = json!({"grace_seconds": grace.as_secs()});
        tx.audit(&audit::entry(
            request,
            caller,
            "key.rotate",
            key.key_id.as_str(),
            detail,
        ))
        .await?;
        tx.commit().await?;
        context.keyring.forget(&key.key_id);
        let mut shown = view::show(context, &rotated).await?;
        shown.insert("key".to_owned(), secret.expose().into());
        return Ok(reply::data(request, StatusCode::OK, shown)?.etag_unkept(&etag(rotated.version)));
    }
    Err(Problem::PreconditionFailed("The key was changed meanwhile"))
}

/// `POST /keys/{id}/revoke`: the key opens nothing any more, everywhere within seconds. Its jobs go on unless the
/// request wants them cancelled.
pub async fn revoke(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    let mut body = request.json_or_nothing().await?.fields()?;
    let reason = body.optional("reason", text(0..=200));
    let cancel_jobs = body.optional("cancel_jobs", boolean).unwrap_or(false);
    body.finish(Some(()))?;
    let context = &request.context;
    let key = find(request, id).await?;
    let mut tx = context.store.begin().await?;
    let revoked = tx
        .revoke_api_key(&key.key_id, reason.as_deref(), clock::now())
        .await?
        .ok_or(Problem::NoSuch("Key"))?;
    if revoked.version != key.version || cancel_jobs {
        let detail = json!({"reason": reason, "cancel_jobs": cancel_jobs});
        tx.audit(&audit::entry(
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
    reply::data(request, StatusCode::OK, view::show(context, &revoked).await?)
}

/// `POST /keys`.
async fn create(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let context = &request.context;
    let wish = Wish::read(request.json().await?.fields()?, clock::now())?;
    within_own(caller, &wish.rights)?;
    let kid = Kid::generate().map_err(Problem::internal)?;
    let kind = KeyKind::of(wish.rights.scopes.contains(Scope::KeysAdmin));
    let (secret, secret_digest) = new_secret(request, kind, &kid)?;
    let now = clock::now();
    let key = NewApiKey {
        key_id: kid.key_id(),
        name: wish.name,
        secret_digest,
        last4: secret.last4().to_owned(),
        rights: wish.rights,
        metadata: Value::Object(wish.metadata).to_string(),
        expires_at: wish.expires_at,
        created_at: now,
        created_by: caller.key_id.to_string(),
    };
    let mut tx = context.store.begin().await?;
    let made = tx
        .insert_api_key(&key, context.config.key_max_running_jobs)
        .await?;
    match &wish.budget {
        Some(budget) => put_budget(&mut tx, &key.key_id, budget, now).await?,
        None => {
            tx.put_default_budget(&key.key_id, context.config.max_cost_per_user, now)
                .await?;
        }
    }
    let detail = json!({
        "name": key.name,
        "scopes": key.rights.scopes.to_string(),
        "budget": shown_budget(wish.budget.as_ref(), &key.key_id),
    });
    tx.audit(&audit::entry(
        request,
        caller,
        "key.create",
        key.key_id.as_str(),
        detail,
    ))
    .await?;
    tx.commit().await?;
    context.keyring.forget(&key.key_id);
    let mut shown = view::show(context, &made).await?;
    shown.insert("key".to_owned(), secret.expose().into());
    let response = reply::data(request, StatusCode::CREATED, shown)?;
    Ok(response
        .location(&format!("/api/v1/keys/{}", made.key_id))
        .etag_unkept(&etag(made.version)))
}

/// `GET /keys`: newest first, those of the environment last.
async fn list(request: &Request) -> Result<Response, Problem> {
    let (context, query) = (&request.context, request.query());
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
    // The keys of the environment have the places -1, -2 … after all others.
    if after > 0 {
        let filter = KeyFilter {
            status,
            name: name.clone(),
            before: Some(after),
        };
        for key in context.store.api_keys(&filter, limit + 1, clock::now()).await? {
            shown.push((key.key_number, view::show(context, &key).await?));
        }
    }
    if status.is_none_or(|status| status == KeyStatus::Active) {
        for (place, key) in (1..).zip(context.config.keys.callers()) {
            let fits = name.as_deref().is_none_or(|name| name == view::other_name(key));
            if -place < after && fits {
                shown.push((-place, view::show_other(context, key).await?));
            }
        }
    }
    let next = more_than(limit, &mut shown, |(place, _)| Cursor(*place).encode(&bound_to));
    let pagination = Pagination::new(limit, next);
    let shown = shown.into_iter().map(|(_, key)| key).collect::<Vec<_>>();
    Ok(pagination.link(request, reply::list(request, shown, &pagination)?))
}

/// `GET /keys/{id}`.
async fn show(request: &Request, id: &str) -> Result<Response, Problem> {
    let context = &request.context;
    if let Some(other) = of_environment(request, id) {
        return reply::data(request, StatusCode::OK, view::show_other(context, other).await?);
    }
    let key = stored(&context.store, &KeyId::known(id))
        .await?
        .ok_or(Problem::NoSuch("Key"))?;
    let shown = view::show(context, &key).await?;
    Ok(reply::data(request, StatusCode::OK, shown)?.etag(&etag(key.version)))
}

/// `PATCH /keys/{id}`: what is absent stays, what is null is as the service is set up.
async fn patch(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    let context = &request.context;
    let change = Change::read(request.json().await?.fields()?, clock::now())?;
    for _ in 0..TRIES {
        let mut key = find(request, id).await?;
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
            request,
            caller,
            "key.update",
            key.key_id.as_str(),
            detail,
        ))
        .await?;
        tx.commit().await?;
        context.keyring.forget(&key.key_id);
        let shown = view::show(context, &changed).await?;
        return Ok(reply::data(request, StatusCode::OK, shown)?.etag(&etag(changed.version)));
    }
    Err(Problem::PreconditionFailed("The key was changed meanwhile"))
}

/// `DELETE /keys/{id}`.
async fn delete(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    let context = &request.context;
    let key = find(request, id).await?;
    let mut tx = context.store.begin().await?;
    if !tx.delete_api_key(&key.key_id, clock::now()).await? {
        tx.rollback().await?;
        return Err(Problem::KeyActive);
    }
    let detail = json!({"name": key.name});
    tx.audit(&audit::entry(
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
async fn find(request: &Request, id: &Segment) -> Result<ApiKey, Problem> {
    if of_environment(request, id.as_ref()).is_some() {
        return Err(Problem::KeyReadOnly);
    }
    let key_id = KeyId::known(id.as_ref());
    stored(&request.context.store, &key_id)
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

fn of_environment<'r>(request: &'r Request, id: &str) -> Option<&'r Caller> {
    let mut keys = request.context.config.keys.callers();
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

/// Nobody gives what they haven't.
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

fn new_secret(request: &Request, kind: KeyKind, kid: &Kid) -> Result<(Secret, Digest), Problem> {
    let secret_key = request.context.keyring.secret_key().ok_or(Problem::Unavailable {
        detail: "Keys need SECRET_KEY, which this service is started without",
        source: None,
    })?;
    secret_key.issue(kind, kid).map_err(Problem::internal)
}

/// Gives the key a budget of its own.
async fn put_budget(tx: &mut Tx, key_id: &KeyId, terms: &Terms, now: Timestamp) -> Result<(), Problem> {
    let budget = terms.clone().of(BudgetScope::Key(key_id.clone()));
    match tx.put_budget(&budget, None, now).await? {
        PutBudget::Stored => Ok(()),
        PutBudget::BelowSpent(spent) => Err(budgets::below_spent("body -> budget -> limit_usd", spent)),
        PutBudget::NoSuchKey | PutBudget::Changed => Err(Problem::NoSuch("Key")),
    }
}

/// A budget that was set with its key, for the audit.
fn shown_budget(terms: Option<&Terms>, key_id: &KeyId) -> Value {
    match terms {
        Some(terms) => budgets::terms(&terms.clone().of(BudgetScope::Key(key_id.clone()))),
        None => Value::Null,
    }
}
