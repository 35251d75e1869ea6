//! What a submission learns of budgets: why it is refused, and how much is left.

use http::{HeaderName, HeaderValue};
use serde::Serialize;
use serde_json::json;
use shared::budget::{BudgetStatus, Period, Scope};
use shared::clock::Timestamp;
use shared::money::MicroUsd;
use std::time::Duration;

use crate::http::problem::{BudgetExceeded, Problem};

/// The id of the global budget in addresses and answers.
pub const GLOBAL_ID: &str = "global";

/// The id beside the scope's name in addresses and answers.
pub fn shown_id(scope: &Scope) -> &str {
    match scope {
        Scope::Key(key_id) => key_id.as_str(),
        Scope::Global => GLOBAL_ID,
    }
}

/// The budget that leaves least.
pub fn least(budgets: Vec<BudgetStatus>) -> Option<BudgetStatus> {
    budgets.into_iter().min_by_key(BudgetStatus::remaining)
}

/// The headers by which a submission learns how a budget stands.
pub fn headers(status: &BudgetStatus) -> Vec<(HeaderName, HeaderValue)> {
    let amount = |amount: MicroUsd| amount.to_string().replace('$', "");
    let reset = status.resets_at.map(|at| at.unix_seconds().to_string());
    let headers = [
        ("x-budget-limit", Some(amount(status.budget.limit))),
        ("x-budget-remaining", Some(amount(status.remaining()))),
        ("x-budget-reset", reset),
    ];
    headers
        .into_iter()
        .filter_map(|(name, value)| {
            let value = HeaderValue::from_str(&value?).ok()?;
            Some((HeaderName::from_static(name), value))
        })
        .collect()
}

/// Why a submission is refused.
pub fn exceeded(status: &BudgetStatus, now: Timestamp) -> Problem {
    let scope = &status.budget.scope;
    let summary = BudgetSummary {
        id: shown_id(scope),
        limit: status.budget.limit,
        period: status.budget.period,
        reserved: status.reserved,
        resets_at: status.resets_at,
        scope: scope.name(),
        spent: status.spent,
    };
    Problem::BudgetExceeded(Box::new(BudgetExceeded {
        detail: sentence(status),
        summary: json!(summary),
        retry_after: status.resets_at.map(|at| seconds_until(at, now)),
        headers: headers(status),
    }))
}

/// A budget in a refusal.
#[derive(Debug, Serialize)]
struct BudgetSummary<'s> {
    id: &'s str,
    limit: MicroUsd,
    period: Period,
    reserved: MicroUsd,
    resets_at: Option<Timestamp>,
    scope: &'static str,
    spent: MicroUsd,
}

fn sentence(status: &BudgetStatus) -> String {
    let whose = match status.budget.scope {
        Scope::Key(_) => "User",
        Scope::Global => "Global",
    };
    let (spent, limit) = (status.spent, status.budget.limit);
    let next = match status.resets_at {
        Some(at) => format!("it restarts at {at}, or an administrator raises it"),
        None => "an administrator can raise it".to_owned(),
    };
    format!("{whose} budget exceeded: {spent} >= {limit}; {next}")
}

/// The whole seconds from now to then, one at least.
fn seconds_until(at: Timestamp, now: Timestamp) -> Duration {
    let micros = u64::try_from(at.since(now).as_micros()).unwrap_or(u64::MAX);
    Duration::from_secs(micros.div_ceil(1_000_000).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::budget::Budget;
    use shared::id::KeyId;

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

    #[test]
    fn a_refusal_says_how_much_and_until_when() {
        assert_eq!(
            sentence(&status(50_000_000, 50_120_000, 0)),
            "User budget exceeded: $50.12 >= $50.00; it restarts at 2026-12-01T00:00:00.000000+00:00, or an \
             administrator raises it"
        );
    }

    #[test]
    fn a_submission_learns_what_is_left() {
        let shown = headers(&status(50_000_000, 1, 2_000_000))
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
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

    #[test]
    fn the_next_period_is_waited_for_in_whole_seconds() {
        let seconds = |at, now| seconds_until(Timestamp(at), Timestamp(now)).as_secs();
        assert_eq!(
            (
                seconds(60_000_000, 1),
                seconds(60_000_000, 0),
                seconds(0, 60_000_000)
            ),
            (60, 60, 1)
        );
    }
}
