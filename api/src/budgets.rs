//! Budgets over HTTP: seen by those whose jobs count in them, set by administrators.

use http::{Method, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use shared::budget::{Budget, BudgetStatus, OnExceeded, Period, Scope};
use shared::clock::{self, Timestamp};
use shared::id::KeyId;
use shared::key::Scope as Right;
use shared::money::MicroUsd;
use shared::storage::{AdjustBudget, DeleteBudget, IdempotencyOutcome, PutBudget};
use warp::reply::Response;

use crate::audit;
use crate::context::Context;
use crate::gate::budget::{GLOBAL_ID, shown_id};
use crate::gate::caller::Caller;
use crate::gate::idempotency::{IdempotentRequest, REPLAYED};
use crate::http::page::{Pagination, TextCursor, more_than};
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, etag};
use crate::http::request::fields::{Fault, Fields, Reading, choice, dollars, integer, list, text};
use crate::http::request::{Request, Segment, headers, invalid};

/// The largest limit, and the largest adjustment either way: a million dollars.
pub const LARGEST: MicroUsd = MicroUsd(1_000_000_000_000);

/// `/api/v1/budgets`.
pub async fn collection(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=100)?.unwrap_or(20);
    let all = sees_all(caller);
    let bound_to = format!("budgets {all}");
    let after = match query.text("cursor") {
        Some(cursor) => Some(position(&TextCursor::decode(cursor, &bound_to)?.0)?),
        None => None,
    };
    let owner = (!all).then_some(&caller.key_id);
    // One more than is shown tells whether there are more.
    let mut budgets = context
        .store
        .budgets(owner, after.as_ref(), limit + 1, clock::now())
        .await?;
    let next = more_than(limit, &mut budgets, |status| {
        let scope = &status.budget.scope;
        TextCursor(format!("{}/{}", scope.name(), scope.id())).encode(&bound_to)
    });
    let shown = budgets.iter().map(BudgetView::of).collect::<Vec<_>>();
    let pagination = Pagination::new(limit, next);
    Ok(pagination.link(request, reply::list(request, shown, &pagination)?))
}

/// The budget that a cursor stands at.
fn position(text: &str) -> Result<Scope, Problem> {
    let (name, id) = text.split_once('/').ok_or(Problem::InvalidCursor)?;
    Scope::parse(name, id).ok_or(Problem::InvalidCursor)
}

/// `/api/v1/budgets/{scope}/{id}`.
pub async fn item(
    context: &Context,
    request: &Request,
    caller: &Caller,
    scope: &Segment,
    id: &Segment,
) -> Result<Response, Problem> {
    let scope = visible(caller, scope, id)?;
    match request.method {
        Method::GET => {
            let status = find(context, &scope).await?;
            answer(request, &status)
        }
        Method::PUT => put(context, request, caller, scope).await,
        _ => delete(context, request, caller, &scope).await,
    }
}

/// `POST /api/v1/budgets/{scope}/{id}/adjust`: more or less spent than the attempts cost, with a reason.
pub async fn adjust(
    context: &Context,
    request: &Request,
    caller: &Caller,
    scope: &Segment,
    id: &Segment,
) -> Result<Response, Problem> {
    let scope = visible(caller, scope, id)?;
    let body = request.json().await?;
    let ttl = context.config.idempotency_ttl;
    let idempotent = IdempotentRequest::of(request, caller, &body, ttl)?;
    let mut fields = body.fields()?;
    let delta = fields.required("delta_usd", delta);
    let reason = fields.required("reason", text(1..=200));
    let (delta, reason) = fields.finish(delta.zip(reason))?;
    if let Some(first) = IdempotentRequest::earlier(idempotent.as_ref(), &context.store).await? {
        return replay(request, &first.body);
    }
    let now = clock::now();
    let mut tx = context.store.begin().await?;
    if tx.adjust_budget(&scope, delta, &reason, now).await? == AdjustBudget::NoSuchBudget {
        return Err(Problem::NoSuch("Budget"));
    }
    let status = tx.budget(&scope, now).await?.ok_or(Problem::NoSuch("Budget"))?;
    if let Some(idempotent) = idempotent {
        let record = idempotent.record(None, StatusCode::OK, json!(BudgetView::of(&status)).to_string());
        if let IdempotencyOutcome::Replay(first) = tx.remember(&record, idempotent.expired_before).await? {
            tx.rollback().await?;
            idempotent.check(&first)?;
            return replay(request, &first.body);
        }
    }
    let detail = json!({"delta_usd": delta, "reason": reason, "spent_usd": status.spent});
    tx.audit(&audit::entry(
        context,
        request,
        caller,
        "budget.adjust",
        &path(&scope),
        detail,
    ))
    .await?;
    tx.commit().await?;
    answer(request, &status)
}

/// The answer to a request that was answered before.
fn replay(request: &Request, body: &str) -> Result<Response, Problem> {
    let shown = serde_json::from_str::<Value>(body).map_err(Problem::internal)?;
    Ok(reply::data(request, StatusCode::OK, shown)?.with(REPLAYED, "true"))
}

async fn put(
    context: &Context,
    request: &Request,
    caller: &Caller,
    scope: Scope,
) -> Result<Response, Problem> {
    let mut fields = request.json().await?.fields()?;
    for (name, value) in [("scope", scope.name()), ("id", shown_id(&scope))] {
        if fields
            .optional(name, text(0..=128))
            .is_some_and(|given| given != value)
        {
            fields.fault(
                name,
                Fault::value(format!("Input should be as in the path, {value}")),
            );
        }
    }
    let spec = BudgetSpec::read(&mut fields);
    let budget = fields.finish(spec)?.into_budget(scope);
    let now = clock::now();
    let before = context.store.budget(&budget.scope, now).await?;
    let expected = expected(request, before.as_ref())?;
    let mut tx = context.store.begin().await?;
    match tx.put_budget(&budget, expected, now).await? {
        PutBudget::Stored => {}
        PutBudget::NoSuchKey => return Err(Problem::NoSuch("Key")),
        PutBudget::Changed => return Err(changed()),
        PutBudget::BelowSpent(spent) => return Err(below_spent("body -> limit_usd", spent)),
    }
    let status = tx
        .budget(&budget.scope, now)
        .await?
        .ok_or(Problem::NoSuch("Budget"))?;
    let detail = json!({
        "before": before.as_ref().map(|status| BudgetSpecView::of(&status.budget)),
        "after": BudgetSpecView::of(&budget),
    });
    tx.audit(&audit::entry(
        context,
        request,
        caller,
        "budget.put",
        &path(&budget.scope),
        detail,
    ))
    .await?;
    tx.commit().await?;
    answer(request, &status)
}

async fn delete(
    context: &Context,
    request: &Request,
    caller: &Caller,
    scope: &Scope,
) -> Result<Response, Problem> {
    let now = clock::now();
    let before = find(context, scope).await?;
    let expected = expected(request, Some(&before))?;
    let mut tx = context.store.begin().await?;
    let default = context.config.max_cost_per_user;
    match tx.delete_budget(scope, default, expected, now).await? {
        DeleteBudget::Deleted => {}
        DeleteBudget::NoSuchBudget => return Err(Problem::NoSuch("Budget")),
        DeleteBudget::Changed => return Err(changed()),
    }
    let detail = json!({"before": BudgetSpecView::of(&before.budget)});
    tx.audit(&audit::entry(
        context,
        request,
        caller,
        "budget.delete",
        &path(scope),
        detail,
    ))
    .await?;
    tx.commit().await?;
    Ok(reply::empty(StatusCode::NO_CONTENT))
}

/// Who may set budgets sees all of them; others see those that their own jobs count in.
fn sees_all(caller: &Caller) -> bool {
    caller.admin || caller.may(Right::BudgetsAdmin)
}

/// The budget of this address, if it exists for the caller.
fn visible(caller: &Caller, scope: &Segment, id: &Segment) -> Result<Scope, Problem> {
    let id = id.as_ref();
    let scope = match scope.as_ref() {
        "global" if id == GLOBAL_ID => Some(Scope::Global),
        "key" if is_key_id(id) => Some(Scope::Key(KeyId::known(id))),
        _ => None,
    };
    let seen = scope.filter(|scope| match scope {
        Scope::Global => true,
        Scope::Key(key_id) => sees_all(caller) || *key_id == caller.key_id,
    });
    seen.ok_or(Problem::NoSuch("Budget"))
}

/// Whether the text can be the id of a key; others needn't be looked for, and not all can be.
pub fn is_key_id(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

async fn find(context: &Context, scope: &Scope) -> Result<BudgetStatus, Problem> {
    let found = context.store.budget(scope, clock::now()).await?;
    found.ok_or(Problem::NoSuch("Budget"))
}

/// The version that `If-Match` wants changed and no other; `None` without that header.
fn expected(request: &Request, present: Option<&BudgetStatus>) -> Result<Option<i64>, Problem> {
    let Some(tags) = headers::text(&request.headers, "if-match") else {
        return Ok(None);
    };
    match present {
        Some(status) if headers::names_etag(tags, &etag(status.version)) => Ok(Some(status.version)),
        _ => Err(changed()),
    }
}

fn changed() -> Problem {
    Problem::PreconditionFailed("The budget is not as If-Match says")
}

/// A limit that the period has cost already.
pub fn below_spent(field: &str, spent: MicroUsd) -> Problem {
    let why = format!("Input should be greater than or equal to what was spent in the period, {spent}");
    invalid(field, why, "greater_than_equal")
}

/// How a budget is set, whatever it bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetSpec {
    limit: MicroUsd,
    period: Period,
    alert_thresholds: Vec<i64>,
    on_exceeded: OnExceeded,
}

impl BudgetSpec {
    /// Reads the members of a budget. `None` means that the limit was a fault.
    pub fn read(fields: &mut Fields) -> Option<Self> {
        let limit = fields.required("limit_usd", dollars(LARGEST));
        let period = fields.optional("period", choice(&["total", "day", "week", "month"]));
        let thresholds = fields.optional("alert_thresholds", list(5, integer(1..=100)));
        let on_exceeded = fields.optional("on_exceeded", choice(&["reject", "hold"]));
        let mut alert_thresholds = thresholds.unwrap_or_else(|| Budget::THRESHOLDS.to_vec());
        alert_thresholds.sort_unstable();
        alert_thresholds.dedup();
        Some(Self {
            limit: limit?,
            period: match period {
                Some("day") => Period::Day,
                Some("week") => Period::Week,
                Some("month") => Period::Month,
                _ => Period::Total,
            },
            alert_thresholds,
            on_exceeded: match on_exceeded {
                Some("hold") => OnExceeded::Hold,
                _ => OnExceeded::Reject,
            },
        })
    }

    /// The budget of this scope.
    pub fn into_budget(self, scope: Scope) -> Budget {
        Budget {
            scope,
            limit: self.limit,
            period: self.period,
            alert_thresholds: self.alert_thresholds,
            on_exceeded: self.on_exceeded,
        }
    }
}

/// An amount that isn't nothing, up to a million dollars either way.
fn delta(value: Value) -> Reading<MicroUsd> {
    let negative = value.as_f64().is_some_and(|usd| usd < 0.0);
    let amount = match value.as_f64() {
        Some(usd) => json!(usd.abs()),
        None => value,
    };
    let amount = dollars(LARGEST)(amount)?;
    Ok(if negative { MicroUsd::ZERO - amount } else { amount })
}

fn answer(request: &Request, status: &BudgetStatus) -> Result<Response, Problem> {
    let response = reply::data(request, StatusCode::OK, BudgetView::of(status))?;
    // The tag is that of the settings, for `If-Match`; what was spent changes without it.
    Ok(response.etag_unkept(&etag(status.version)))
}

/// As the audit names it: `key/env_0123abcd`.
fn path(scope: &Scope) -> String {
    format!("{}/{}", scope.name(), shown_id(scope))
}

/// A budget as it was set, as clients see it.
#[derive(Debug, Serialize)]
pub struct BudgetSpecView {
    alert_thresholds: Vec<i64>,
    id: String,
    limit_usd: MicroUsd,
    on_exceeded: OnExceeded,
    period: Period,
    scope: &'static str,
}

impl BudgetSpecView {
    /// Shows a budget.
    pub fn of(budget: &Budget) -> Self {
        Self {
            alert_thresholds: budget.alert_thresholds.clone(),
            id: shown_id(&budget.scope).to_owned(),
            limit_usd: budget.limit,
            on_exceeded: budget.on_exceeded,
            period: budget.period,
            scope: budget.scope.name(),
        }
    }
}

/// A budget and where it stands, as clients see it.
#[derive(Debug, Serialize)]
pub struct BudgetView {
    alert_thresholds: Vec<i64>,
    alerts: Vec<AlertView>,
    id: String,
    is_default: bool,
    limit_usd: MicroUsd,
    on_exceeded: OnExceeded,
    period: Period,
    period_start: Timestamp,
    remaining_usd: MicroUsd,
    reserved_usd: MicroUsd,
    resets_at: Option<Timestamp>,
    scope: &'static str,
    spent_usd: MicroUsd,
    version: i64,
}

/// A threshold that was reached.
#[derive(Debug, Serialize)]
struct AlertView {
    at: Timestamp,
    threshold: i64,
}

impl BudgetView {
    /// Shows a budget.
    pub fn of(status: &BudgetStatus) -> Self {
        let budget = &status.budget;
        Self {
            alert_thresholds: budget.alert_thresholds.clone(),
            alerts: status
                .alerts
                .iter()
                .map(|(threshold, at)| AlertView {
                    at: *at,
                    threshold: *threshold,
                })
                .collect(),
            id: shown_id(&budget.scope).to_owned(),
            is_default: status.is_default,
            limit_usd: budget.limit,
            on_exceeded: budget.on_exceeded,
            period: budget.period,
            period_start: status.period_start,
            remaining_usd: status.remaining(),
            reserved_usd: status.reserved,
            resets_at: status.resets_at,
            scope: budget.scope.name(),
            spent_usd: status.spent,
            version: status.version,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<BudgetSpec, Problem> {
        let mut fields = Fields::of("body", value).unwrap();
        let spec = BudgetSpec::read(&mut fields);
        fields.finish(spec)
    }

    #[test]
    fn a_limit_alone_is_a_budget_for_ever() {
        let spec = read(json!({"limit_usd": 12.5})).unwrap();
        let budget = spec.into_budget(Scope::Key(KeyId::known("k")));
        assert_eq!(
            budget,
            Budget::default_of(&KeyId::known("k"), MicroUsd(12_500_000))
        );
    }

    #[test]
    fn every_bad_member_is_named() {
        for (member, value, field, kind) in [
            ("limit_usd", json!(0), "limit_usd", "greater_than_equal"),
            ("limit_usd", json!(-1), "limit_usd", "greater_than_equal"),
            ("limit_usd", json!(1_000_000.01), "limit_usd", "less_than_equal"),
            ("limit_usd", json!("5"), "limit_usd", "float_type"),
            ("period", json!("year"), "period", "enum"),
            (
                "alert_thresholds",
                json!([0]),
                "alert_thresholds -> 0",
                "greater_than_equal",
            ),
            (
                "alert_thresholds",
                json!([50, 101]),
                "alert_thresholds -> 1",
                "less_than_equal",
            ),
            (
                "alert_thresholds",
                json!([1, 2, 3, 4, 5, 6]),
                "alert_thresholds",
                "too_long",
            ),
            ("on_exceeded", json!("shrug"), "on_exceeded", "enum"),
            ("spent_usd", json!(0), "spent_usd", "extra_forbidden"),
        ] {
            let mut body = json!({"limit_usd": 5});
            body[member] = value;
            match read(body) {
                Err(Problem::Invalid(faults)) => assert_eq!(
                    faults
                        .iter()
                        .map(|fault| (fault.field.as_str(), fault.kind))
                        .collect::<Vec<_>>(),
                    [(format!("body -> {field}").as_str(), kind)]
                ),
                other => panic!("{member}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_adjustment_is_something_within_a_million_either_way() {
        assert_eq!(delta(json!(-0.5)), Ok(MicroUsd(-500_000)));
        assert_eq!(delta(json!(1_000_000)), Ok(LARGEST));
        for (value, kind) in [
            (json!(0), "greater_than_equal"),
            (json!(0.000_000_1), "greater_than_equal"),
            (json!(-1_000_001), "less_than_equal"),
            (json!(1e300), "less_than_equal"),
            (json!("1"), "float_type"),
        ] {
            assert!(format!("{:?}", delta(value)).contains(kind), "{kind}");
        }
    }
}
