//! Budgets: how much may be spent, by whom, in which period.

use crate::clock::Timestamp;
use crate::id::KeyId;
use crate::money::MicroUsd;
use chrono::{Datelike, Days, Months, NaiveDate, NaiveTime};
use serde::{Deserialize, Serialize};

/// What a budget bounds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// The jobs of one key.
    Key(KeyId),
    /// All jobs.
    Global,
}

impl Scope {
    /// The word on the wire and in the table: `key` or `global`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Global => "global",
        }
    }

    /// The id beside it in the table: the key's, or empty.
    pub fn id(&self) -> &str {
        match self {
            Self::Key(key_id) => key_id.as_str(),
            Self::Global => "",
        }
    }

    /// The scope of these two words; `None` when there is no such.
    pub fn parse(name: &str, id: &str) -> Option<Self> {
        match name {
            "key" => Some(Self::Key(KeyId::known(id))),
            "global" => Some(Self::Global),
            _ => None,
        }
    }
}

/// How long a budget lasts, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Period {
    /// For ever.
    Total,
    /// From midnight to midnight.
    Day,
    /// From Monday to Monday.
    Week,
    /// From the first to the first.
    Month,
}

impl Period {
    /// When the period that holds `now` began; 0 for `Total`.
    pub fn start(self, now: Timestamp) -> Timestamp {
        self.first_day(now).map_or(Timestamp(0), midnight)
    }

    /// When the period that holds `now` ends; never for `Total`.
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

/// What happens to a job that there is no money for.
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
    /// What it bounds.
    pub scope: Scope,
    /// What may be spent in a period. More than 0.
    pub limit: MicroUsd,
    /// How long it lasts.
    pub period: Period,
    /// Percentages at which it is told once a period, 1 to 100, at most five.
    pub alert_thresholds: Vec<i64>,
    /// What happens to jobs beyond it.
    pub on_exceeded: OnExceeded,
}

impl Budget {
    /// The percentages at which a budget is told unless it says otherwise.
    pub const THRESHOLDS: [i64; 2] = [80, 100];

    /// What a key has unless a person says otherwise: so much in all.
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

/// A budget and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetStatus {
    /// The budget.
    pub budget: Budget,
    /// Whether it follows the service's default (`CLAUDE_MAX_COST_PER_USER`) and wasn't set by a person.
    pub is_default: bool,
    /// Grows with each change of the budget.
    pub version: i64,
    /// When the current period began; 0 for `Total`.
    pub period_start: Timestamp,
    /// When it ends.
    pub resets_at: Option<Timestamp>,
    /// What was spent in it.
    pub spent: MicroUsd,
    /// What running jobs may still spend.
    pub reserved: MicroUsd,
    /// The thresholds that were reached in it, and when. Empty where only the money was asked for.
    pub alerts: Vec<(i64, Timestamp)>,
}

impl BudgetStatus {
    /// What is neither spent nor reserved; below zero when a run's last answer cost more than was reserved, or when the
    /// limit was lowered in mid-run.
    pub fn remaining(&self) -> MicroUsd {
        self.budget.limit - self.spent - self.reserved
    }

    /// Whether something is left that isn't reserved.
    pub fn has_room(&self) -> bool {
        self.remaining() > MicroUsd::ZERO
    }

    /// Whether a submission is refused: the money is spent, and jobs don't wait for the next period.
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
