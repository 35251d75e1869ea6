//! Budgets over HTTP: seen by those whose jobs count in them, set by administrators; and what a submission learns of
//! them.

use http::{HeaderName, Method, StatusCode};
use serde_json::{Value, json};
use shared::budget::{Budget, BudgetStatus, OnExceeded, Period, Scope};
use shared::clock::{self, Timestamp};
use shared::id::KeyId;
use shared::key::Scope as Right;
use shared::money::MicroUsd;
use shared::storage::{AdjustBudget, DeleteBudget, IdempotencyOutcome, PutBudget};
use warp::reply::Response;

use crate::audit;
use crate::caller::Caller;
use crate::context::Context;
use crate::problem::Problem;
use crate::repeat::{REPLAYED, Repeat};
use crate::reply::{self, Headers, Pagination, TextCursor, etag, more_than};
use crate::request::fields::{Fault, Fields, Reading, choice, dollars, integer, list, text};
use crate::request::{Request, Segment, headers as request_headers, invalid};

/// The largest limit, and the largest adjustment either way: a million dollars.
pub const LARGEST: MicroUsd = MicroUsd(1_000_000_000_000);

/// The id of the global budget in addresses and answers.
const GLOBAL_ID: &str = "global";

/// `/api/v1/budgets`.
pub async fn collection(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=100)?.unwrap_or(20);
    let all = sees_all(caller);
    let bound_to = format!("budgets {all}");
    let after = match query.text("cursor") {
        Some(cursor) => Some(position(&TextCursor::decode(cursor, &bound_to)?.0)?),
        None => None,
    };
    let owner = (!all).then_some(&caller.key_id);
    let store = &request.context.store;
    // One more than is shown tells whether there are more.
    let mut budgets = store
        .budgets(owner, after.as_ref(), limit + 1, clock::now())
        .await?;
    let next = more_than(limit, &mut budgets, |status| {
        let scope = &status.budget.scope;
        TextCursor(format!("{}/{}", scope.name(), scope.id())).encode(&bound_to)
    });
    let shown = budgets.iter().map(show).collect::<Vec<_>>();
    let pagination = Pagination::new(limit, next);
    Ok(pagination.link(request, reply::list(request, shown, &pagination)?))
}

/// The budget that a cursor stands at.
fn position(place: &str) -> Result<Scope, Problem> {
    let (name, id) = place.split_once('/').ok_or(Problem::InvalidCursor)?;
    Scope::parse(name, id).ok_or(Problem::InvalidCursor)
}

/// `/api/v1/budgets/{scope}/{id}`.
pub async fn item(
    request: &Request,
    caller: &Caller,
    scope: &Segment,
    id: &Segment,
) -> Result<Response, Problem> {
    let scope = visible(caller, scope, id)?;
    match request.method {
        Method::GET => {
            let status = find(request, &scope).await?;
            answer(request, &status)
        }
        Method::PUT => put(request, caller, scope).await,
        _ => delete(request, caller, &scope).await,
    }
}

/// `POST /api/v1/budgets/{scope}/{id}/adjust`: more or less spent than the attempts cost, with a reason.
pub async fn adjust(
    request: &Request,
    caller: &Caller,
    scope: &Segment,
    id: &Segment,
) -> Result<Response, Problem> {
    let context = &request.context;
    let scope = visible(caller, scope, id)?;
    let body = request.json().await?;
    let repeat = Repeat::of(request, caller, &body)?;
    let mut fields = body.fields()?;
    let delta = fields.required("delta_usd", delta);
    let reason = fields.required("reason", text(1..=200));
    let (delta, reason) = fields.finish(delta.zip(reason))?;
    if let Some(first) = Repeat::earlier(context, repeat.as_ref()).await? {
        return answer_again(request, &first.body);
    }
    let now = clock::now();
    let mut tx = context.store.begin().await?;
    if tx.adjust_budget(&scope, delta, &reason, now).await? == AdjustBudget::NoSuchBudget {
        return Err(Problem::NoSuch("Budget"));
    }
    let status = tx.budget(&scope, now).await?.ok_or(Problem::NoSuch("Budget"))?;
    if let Some(repeat) = repeat {
        let record = repeat.record(None, StatusCode::OK, show(&status).to_string());
        if let IdempotencyOutcome::Replay(first) = tx.remember(&record, repeat.expired_before).await? {
            tx.rollback().await?;
            repeat.check(&first)?;
            return answer_again(request, &first.body);
        }
    }
    let detail = json!({"delta_usd": delta, "reason": reason, "spent_usd": status.spent});
    tx.audit(&audit::entry(
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
fn answer_again(request: &Request, body: &str) -> Result<Response, Problem> {
    let shown = serde_json::from_str::<Value>(body).map_err(Problem::internal)?;
    Ok(reply::data(request, StatusCode::OK, shown)?.with(REPLAYED, "true"))
}

async fn put(request: &Request, caller: &Caller, scope: Scope) -> Result<Response, Problem> {
    let context = &request.context;
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
    let wanted = Terms::read(&mut fields);
    let budget = fields.finish(wanted)?.of(scope);
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
    let detail =
        json!({"before": before.as_ref().map(|status| terms(&status.budget)), "after": terms(&budget)});
    tx.audit(&audit::entry(
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

async fn delete(request: &Request, caller: &Caller, scope: &Scope) -> Result<Response, Problem> {
    let context = &request.context;
    let now = clock::now();
    let before = find(request, scope).await?;
    let expected = expected(request, Some(&before))?;
    let mut tx = context.store.begin().await?;
    let default = context.config.max_cost_per_user;
    match tx.delete_budget(scope, default, expected, now).await? {
        DeleteBudget::Deleted => {}
        DeleteBudget::NoSuchBudget => return Err(Problem::NoSuch("Budget")),
        DeleteBudget::Changed => return Err(changed()),
    }
    let detail = json!({"before": terms(&before.budget)});
    tx.audit(&audit::entry(
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

async fn find(request: &Request, scope: &Scope) -> Result<BudgetStatus, Problem> {
    let found = request.context.store.budget(scope, clock::now()).await?;
    found.ok_or(Problem::NoSuch("Budget"))
}

/// The version that `If-Match` wants changed and no other; `None` without that header.
fn expected(request: &Request, present: Option<&BudgetStatus>) -> Result<Option<i64>, Problem> {
    let Some(tags) = request_headers::text(&request.headers, "if-match") else {
        return Ok(None);
    };
    match present {
        Some(status) if request_headers::names_etag(tags, &etag(status.version)) => Ok(Some(status.version)),
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
pub struct Terms {
    limit: MicroUsd,
    period: Period,
    alert_thresholds: Vec<i64>,
    on_exceeded: OnExceeded,
}

impl Terms {
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

    /// The budget of this scope with these terms.
    pub fn of(self, scope: Scope) -> Budget {
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
    let response = reply::data(request, StatusCode::OK, show(status))?;
    // The tag is that of the terms, for `If-Match`; what was spent changes without it.
    Ok(response.etag_unkept(&etag(status.version)))
}

/// The id beside the scope's name in addresses and answers.
fn shown_id(scope: &Scope) -> &str {
    match scope {
        Scope::Key(key_id) => key_id.as_str(),
        Scope::Global => GLOBAL_ID,
    }
}

/// As the audit names it: `key/env_0123abcd`.
fn path(scope: &Scope) -> String {
    format!("{}/{}", scope.name(), shown_id(scope))
}

/// A budget as it was set.
pub fn terms(budget: &Budget) -> Value {
    json!({
        "scope": budget.scope.name(),
        "id": shown_id(&budget.scope),
        "limit_usd": budget.limit,
        "period": budget.period,
        "alert_thresholds": budget.alert_thresholds,
        "on_exceeded": budget.on_exceeded,
    })
}

/// A budget and where it stands.
pub fn show(status: &BudgetStatus) -> Value {
    let mut shown = terms(&status.budget);
    let alerts = status.alerts.iter();
    shown["period_start"] = json!(status.period_start);
    shown["resets_at"] = json!(status.resets_at);
    shown["spent_usd"] = json!(status.spent);
    shown["reserved_usd"] = json!(status.reserved);
    shown["remaining_usd"] = json!(status.remaining());
    shown["alerts"] = alerts
        .map(|(threshold, at)| json!({"threshold": threshold, "at": at}))
        .collect();
    shown["is_default"] = json!(status.is_default);
    shown["version"] = json!(status.version);
    shown
}

/// Refuses a submission of this owner for which the money is spent already; gives the budget that leaves least.
pub async fn admit(
    context: &Context,
    owner: &KeyId,
    now: Timestamp,
) -> Result<Option<BudgetStatus>, Problem> {
    let mut budgets = context.store.budgets_of(owner, now).await?;
    if let Some(place) = budgets.iter().position(BudgetStatus::refuses) {
        return Err(Problem::BudgetExceeded(Box::new(budgets.swap_remove(place))));
    }
    Ok(budgets.into_iter().min_by_key(BudgetStatus::remaining))
}

/// The headers by which a submission learns how a budget stands.
pub fn headers(status: &BudgetStatus) -> impl Iterator<Item = (HeaderName, String)> {
    let amount = |amount: MicroUsd| amount.to_string().replace('$', "");
    let reset = status.resets_at.map(|at| at.unix_seconds().to_string());
    [
        (
            HeaderName::from_static("x-budget-limit"),
            Some(amount(status.budget.limit)),
        ),
        (
            HeaderName::from_static("x-budget-remaining"),
            Some(amount(status.remaining())),
        ),
        (HeaderName::from_static("x-budget-reset"), reset),
    ]
    .into_iter()
    .filter_map(|(name, value)| value.map(|value| (name, value)))
}

/// Why a submission is refused, in words.
pub fn exceeded(status: &BudgetStatus) -> String {
    let whose = match status.budget.scope {
        Scope::Key(_) => "User",
        Scope::Global => "Global",
    };
    let (spent, limit) = (status.spent, status.budget.limit);
    let next = match status.resets_at {
        Some(at) => format!("it begins anew at {at}, or an administrator raises it"),
        None => "an administrator can raise it".to_owned(),
    };
    format!("{whose} budget exceeded: {spent} >= {limit}; {next}")
}

/// Why a submission is refused, in numbers.
pub fn summary(status: &BudgetStatus) -> Value {
    let scope = &status.budget.scope;
    json!({
        "scope": scope.name(),
        "id": shown_id(scope),
        "limit": status.budget.limit,
        "spent": status.spent,
        "reserved": status.reserved,
        "period": status.budget.period,
        "resets_at": status.resets_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(limit: i64, spent: i64, reserved: i64) -> BudgetStatus {
        BudgetStatus {
            budget: Budget {
                period: Period::Month,
                ..Budget::default_of(&KeyId::known("env_12345678"), MicroUsd(limit))
            },
            is_default: false,
            version: 3,
            period_start: Timestamp::parse("2026-11-01T00:00:00Z").unwrap(),
            resets_at: Timestamp::parse("2026-12-01T00:00:00Z"),
            spent: MicroUsd(spent),
            reserved: MicroUsd(reserved),
            alerts: vec![(80, Timestamp::parse("2026-11-20T08:00:00Z").unwrap())],
        }
    }

    fn read(value: Value) -> Result<Terms, Problem> {
        let mut fields = Fields::of("body", value).unwrap();
        let terms = Terms::read(&mut fields);
        fields.finish(terms)
    }

    #[test]
    fn a_limit_alone_is_a_budget_for_ever() {
        let terms = read(json!({"limit_usd": 12.5})).unwrap();
        let budget = terms.of(Scope::Key(KeyId::known("k")));
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

    #[test]
    fn a_refusal_says_how_much_and_until_when() {
        assert_eq!(
            exceeded(&status(50_000_000, 50_120_000, 0)),
            "User budget exceeded: $50.12 >= $50.00; it begins anew at 2026-12-01T00:00:00.000000+00:00, or an \
             administrator raises it"
        );
    }

    #[test]
    fn a_submission_learns_what_is_left() {
        let shown = headers(&status(50_000_000, 1, 2_000_000))
            .map(|(name, value)| format!("{name}: {value}"))
            .collect::<Vec<_>>();
        assert_eq!(
            shown,
            [
                "x-budget-limit: 50.00",
                "x-budget-remaining: 47.999999",
                "x-budget-reset: 1796083200"
            ]
        );
    }
}
