//! Keys as clients see them: never a secret, nor its digest.

use serde::Serialize;
use serde_json::{Map, Value};
use shared::budget::Scope as BudgetScope;
use shared::clock::{self, Timestamp};
use shared::id::KeyId;
use shared::key::{ApiKey, KeyStatus, Scope, TextList};
use shared::storage::Quota;

use crate::budgets::{BudgetSpecView, BudgetView};
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::gate::limits::Policy;
use crate::http::problem::Problem;

/// A key as clients see it.
#[derive(Debug, Serialize)]
pub(super) struct KeyView {
    allowed_ips: TextList,
    allowed_models: TextList,
    budget: Option<BudgetSpecView>,
    /// How its budgets stand: shown to the key itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) budget_status: Option<Vec<BudgetView>>,
    created_at: Option<Timestamp>,
    created_by: String,
    expires_at: Option<Timestamp>,
    id: KeyId,
    /// The secret: shown once, to the request that made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key: Option<String>,
    last_used_at: Option<Timestamp>,
    max_priority: i64,
    max_queued_jobs: Option<i64>,
    max_running_jobs: i64,
    max_streams: i64,
    metadata: Value,
    name: String,
    prefix: String,
    previous_valid_until: Option<Timestamp>,
    rate_limit: RatesView,
    /// How its limits stand: shown to the key itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rate_limit_status: Option<RateStatusView>,
    revoke_reason: Option<String>,
    revoked_at: Option<Timestamp>,
    scopes: Vec<&'static str>,
    status: KeyStatus,
    version: i64,
}

/// How often a key may ask.
#[derive(Debug, Serialize)]
struct RatesView {
    read: i64,
    submit: i64,
    window: i64,
}

/// How the limits of a key stand.
#[derive(Debug, Serialize)]
pub(super) struct RateStatusView {
    read: QuotaView,
    submit: QuotaView,
}

/// How one limit stands.
#[derive(Debug, Serialize)]
struct QuotaView {
    limit: i64,
    remaining: i64,
    reset: i64,
    used: i64,
    window: i64,
}

impl QuotaView {
    fn of(quota: &Quota) -> Self {
        Self {
            limit: quota.rate.limit(),
            remaining: quota.remaining(),
            reset: quota.reset(),
            used: quota.used(),
            window: quota.rate.window_seconds(),
        }
    }
}

impl KeyView {
    /// A key of the database.
    pub(super) async fn of_stored(context: &Context, key: &ApiKey) -> Result<Self, Problem> {
        let caller = Caller::of(key.key_id.clone(), key.rights.clone());
        let now = clock::now();
        Ok(Self {
            created_at: Some(key.created_at),
            created_by: key.created_by.clone(),
            expires_at: key.expires_at,
            last_used_at: key.last_used_at,
            metadata: serde_json::from_str(&key.metadata).map_err(Problem::internal)?,
            name: key.name.clone(),
            prefix: key.shown(),
            previous_valid_until: key.previous_valid_until.filter(|until| *until > now),
            revoke_reason: key.revoke_reason.clone(),
            revoked_at: key.revoked_at,
            status: key.status(now),
            version: key.version,
            ..Self::of_other(context, &caller).await?
        })
    }

    /// A key that isn't in the database: one of the environment, or none at all. With what the service adds to its
    /// rights.
    pub(super) async fn of_other(context: &Context, caller: &Caller) -> Result<Self, Problem> {
        let (rights, config) = (&caller.rights, &context.config);
        let (submit, read) = (
            caller.rate(Policy::Submit, &config.rates),
            caller.rate(Policy::Read, &config.rates),
        );
        let scope = BudgetScope::Key(caller.key_id.clone());
        let budget = context.store.budget(&scope, clock::now()).await?;
        Ok(Self {
            allowed_ips: rights.allowed_ips.clone(),
            allowed_models: rights.allowed_models.clone(),
            budget: budget.map(|status| BudgetSpecView::of(&status.budget)),
            budget_status: None,
            created_at: None,
            created_by: "environment".to_owned(),
            expires_at: None,
            id: caller.key_id.clone(),
            key: None,
            last_used_at: None,
            max_priority: caller.max_priority(),
            max_queued_jobs: rights.max_queued_jobs,
            max_running_jobs: rights.max_running_jobs.unwrap_or(config.key_max_running_jobs),
            max_streams: caller.max_streams(),
            metadata: Value::Object(Map::new()),
            name: other_name(caller).to_owned(),
            prefix: caller.key_id.to_string(),
            previous_valid_until: None,
            rate_limit: RatesView {
                read: read.limit(),
                submit: submit.limit(),
                window: submit.window_seconds(),
            },
            rate_limit_status: None,
            revoke_reason: None,
            revoked_at: None,
            scopes: rights.scopes.iter().map(Scope::as_str).collect(),
            status: KeyStatus::Active,
            version: 1,
        })
    }
}

/// Where such a key stands.
pub(super) fn other_name(caller: &Caller) -> &'static str {
    match caller.key_id.as_str() {
        "anonymous" => "anonymous",
        _ if caller.may(Scope::KeysAdmin) => "ADMIN_API_KEYS",
        _ => "API_KEYS",
    }
}

/// How the caller's limits stand.
pub(super) async fn rate_limits(context: &Context, caller: &Caller) -> Result<RateStatusView, Problem> {
    let rates = &context.config.rates;
    let quota = |policy| context.limits.quota(caller.bucket(policy, rates));
    Ok(RateStatusView {
        read: QuotaView::of(&quota(Policy::Read).await?),
        submit: QuotaView::of(&quota(Policy::Submit).await?),
    })
}
