//! Keys as clients see them: never a secret, nor its digest.

use serde_json::{Map, Value, json};
use shared::budget::Scope as BudgetScope;
use shared::clock;
use shared::key::{ApiKey, Scope};

use crate::budgets;
use crate::caller::Caller;
use crate::context::Context;
use crate::limits::Policy;
use crate::problem::Problem;

/// A key of the database.
pub(super) async fn show(context: &Context, key: &ApiKey) -> Result<Map<String, Value>, Problem> {
    let caller = Caller::of(key.key_id.clone(), key.rights.clone());
    let metadata = serde_json::from_str::<Value>(&key.metadata).map_err(Problem::internal)?;
    let now = clock::now();
    let mut shown = rights(context, &caller).await?;
    for (name, value) in [
        ("name", json!(key.name)),
        ("prefix", json!(key.shown())),
        ("status", json!(key.status(now))),
        ("created_at", json!(key.created_at)),
        ("expires_at", json!(key.expires_at)),
        ("last_used_at", json!(key.last_used_at)),
        ("created_by", json!(key.created_by)),
        ("revoked_at", json!(key.revoked_at)),
        ("revoke_reason", json!(key.revoke_reason)),
        ("metadata", metadata),
        (
            "previous_valid_until",
            json!(key.previous_valid_until.filter(|until| *until > now)),
        ),
        ("version", json!(key.version)),
    ] {
        shown.insert(name.to_owned(), value);
    }
    Ok(shown)
}

/// A key that isn't in the database: one of the environment, or none at all.
pub(super) async fn show_other(context: &Context, caller: &Caller) -> Result<Map<String, Value>, Problem> {
    let mut shown = rights(context, caller).await?;
    for (name, value) in [
        ("name", json!(other_name(caller))),
        ("prefix", json!(caller.key_id)),
        ("status", json!("active")),
        ("created_at", Value::Null),
        ("expires_at", Value::Null),
        ("last_used_at", Value::Null),
        ("created_by", json!("environment")),
        ("revoked_at", Value::Null),
        ("revoke_reason", Value::Null),
        ("metadata", json!({})),
        ("previous_valid_until", Value::Null),
        ("version", json!(1)),
    ] {
        shown.insert(name.to_owned(), value);
    }
    Ok(shown)
}

/// Where such a key stands.
pub(super) fn other_name(caller: &Caller) -> &'static str {
    match caller.key_id.as_str() {
        "anonymous" => "anonymous",
        _ if caller.may(Scope::KeysAdmin) => "ADMIN_API_KEYS",
        _ => "API_KEYS",
    }
}

/// What a key may do, with what the service adds.
async fn rights(context: &Context, caller: &Caller) -> Result<Map<String, Value>, Problem> {
    let (rights, config) = (&caller.rights, &context.config);
    let (submit, read) = (
        caller.rate(Policy::Submit, config),
        caller.rate(Policy::Read, config),
    );
    let scope = BudgetScope::Key(caller.key_id.clone());
    let budget = context.store.budget(&scope, clock::now()).await?;
    let scopes = rights.scopes.iter().map(Scope::as_str).collect::<Vec<_>>();
    let members = [
        ("id", json!(caller.key_id)),
        ("scopes", json!(scopes)),
        ("allowed_ips", json!(rights.allowed_ips)),
        ("allowed_models", json!(rights.allowed_models)),
        (
            "rate_limit",
            json!({
                "submit": submit.limit(),
                "read": read.limit(),
                "window": submit.window_seconds(),
            }),
        ),
        (
            "max_running_jobs",
            json!(rights.max_running_jobs.unwrap_or(config.key_max_running_jobs)),
        ),
        ("max_queued_jobs", json!(rights.max_queued_jobs)),
        ("max_streams", json!(rights.max_streams)),
        ("max_priority", json!(caller.max_priority())),
        (
            "budget",
            budget.map_or(Value::Null, |status| budgets::terms(&status.budget)),
        ),
    ];
    Ok(members
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect())
}

/// How the caller's limits stand.
pub(super) async fn rate_limits(context: &Context, caller: &Caller) -> Result<Value, Problem> {
    let mut shown = Map::new();
    for policy in [Policy::Submit, Policy::Read] {
        let quota = context.limits.quota(caller, policy, &context.config).await?;
        let state = json!({
            "limit": quota.rate.limit(),
            "window": quota.rate.window_seconds(),
            "remaining": quota.remaining(),
            "used": quota.used(),
            "reset": quota.reset(),
        });
        shown.insert(policy.as_str().to_owned(), state);
    }
    Ok(Value::Object(shown))
}
