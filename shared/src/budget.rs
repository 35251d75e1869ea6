//! Budgets: how much may be spent, by whom, in which period.

use crate::clock::Timestamp;
use crate::id::KeyId;
use crate::money::MicroUsd;
use chrono::{Datelike, Days, Months, NaiveDate, NaiveTime};
use serde::{Deserialize, Serialize};

/// What a budget limits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// The jobs of one key.
    Key(KeyId),
    /// All jobs.
    Global,
}

impl Scope {
    /// The word in JSON and in the table: `key` or `global`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Global => "global",
        }
    }

    /// The id next to it in the table: the key's, or empty.
    pub fn id(&self) -> &str {
        match self {
            Self::Key(key_id) => key_id.as_str(),
            Self::Global => "",
        }
    }

    /// Parses the two words; `None` if there is no such scope.
    pub fn parse(name: &str, id: &str) -> Option<Self> {
        match name {
            "key" => Some(Self::Key(KeyId::known(id))),
            "global" => Some(Self::Global),
            _ => None,
        }
    }
}

/// The period of a budget, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Period {
    /// All time.
    Total,
    /// From midnight to midnight.
    Day,
    /// From Monday to Monday.
    Week,
    /// From the first of a month to the first of the next.
    Month,
}

impl Period {
    /// When the period that contains `now` began; 0 for `Total`.
    pub fn start(self, now: Timestamp) -> Timestamp {
        self.first_day(now).map_or(Timestamp(0), midnight)
    }

    /// When the period that contains `now` ends; never for `Total`.
    pub fn end(self, now: Timestamp) -> Option<Timestamp> {
        let first = self.first_day(now)?;
        let next = match self {
            Self::Total => None,
            Self::Day => first.checked_add_days(Days::new(1)),
            Self::Week => first.checked_add_days(Days::new(7)),
            Self::Month => first.checked_add_months(Months::new(1)),
        };
        next.map(midnight)
    }

    fn first_day(self, now: Timestamp) -> Option<NaiveDate> {
        let today = now.to_utc().date_naive();
        match self {
            Self::Total => None,
            Self::Day => Some(today),
            Self::Week => {
                today.checked_sub_days(Days::new(u64::from(today.weekday().num_days_from_monday())))
            }
            Self::Month => today.with_day(1),
        }
    }
}

fn midnight(day: NaiveDate) -> Timestamp {
    Timestamp(day.and_time(NaiveTime::MIN).and_utc().timestamp_micros())
}

/// What happens to a job for which too little budget is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum OnExceeded {
    /// It fails with `budget_exceeded`.
    Reject,
    /// It waits for the next period.
    Hold,
}

/// A budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// What it limits.
    pub scope: Scope,
    /// The limit of spending in a period. More than 0.
    pub limit: MicroUsd,
    /// The period.
    pub period: Period,
    /// Percentages of the limit at which an alert is raised once per period: 1 to 100, at most five.
    pub alert_thresholds: Vec<i64>,
    /// What happens to jobs over the limit.
    pub on_exceeded: OnExceeded,
}

impl Budget {
    /// The default alert thresholds, in percent.
    pub const THRESHOLDS: [i64; 2] = [80, 100];

    /// The default budget of a key: this limit over all time.
    pub fn default_of(key_id: &KeyId, limit: MicroUsd) -> Self {
        Self {
            scope: Scope::Key(key_id.clone()),
            limit,
            period: Period::Total,
            alert_thresholds: Self::THRESHOLDS.to_vec(),
            on_exceeded: OnExceeded::Reject,
        }
    }
}

/// A budget and its current state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetStatus {
    /// The budget.
    pub budget: Budget,
    /// Whether it follows the default (`CLAUDE_MAX_COST_PER_USER`), because no administrator has set it.
    pub is_default: bool,
    /// Incremented by each change of the budget.
    pub version: i64,
    /// When the current period began; 0 for `Total`.
    pub period_start: Timestamp,
    /// When it ends.
    pub resets_at: Option<Timestamp>,
    /// What was spent in the current period.
    pub spent: MicroUsd,
    /// What running jobs have reserved.
    pub reserved: MicroUsd,
    /// The thresholds reached in the period, and when. Empty if only the amounts were read.
    pub alerts: Vec<(i64, Timestamp)>,
}

impl BudgetStatus {
    /// What is neither spent nor reserved. Below zero if the last answer of a run cost more than was reserved, or if
    /// the limit was lowered during a run.
    pub fn remaining(&self) -> MicroUsd {
        self.budget.limit - self.spent - self.reserved
    }

    /// Whether something is left that isn't reserved.
    pub fn has_room(&self) -> bool {
        self.remaining() > MicroUsd::ZERO
    }

    /// Whether a submission is rejected: the budget is spent, and jobs don't wait for the next period.
    pub fn refuses(&self) -> bool {
        self.spent >= self.budget.limit && self.budget.on_exceeded == OnExceeded::Reject
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_begin_at_midnight_on_monday_and_on_the_first() {
        let now = Timestamp::parse("2026-12-31T23:59:59Z").unwrap();
        for (period, start, end) in [
            (Period::Day, "2026-12-31T00:00:00Z", "2027-01-01T00:00:00Z"),
            (Period::Week, "2026-12-28T00:00:00Z", "2027-01-04T00:00:00Z"),
            (Period::Month, "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ] {
            assert_eq!(Some(period.start(now)), Timestamp::parse(start), "{period:?}");
            assert_eq!(period.end(now), Timestamp::parse(end), "{period:?}");
        }
        assert_eq!(
            (Period::Total.start(now), Period::Total.end(now)),
            (Timestamp(0), None)
        );
    }
}
