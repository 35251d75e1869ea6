//! Budgets: what may be spent, checked when a job is submitted, reserved when it is claimed, settled when it ends.
//!
//! A budget's state of one period is a row; `spent + reserved <= limit` is a condition of every reservation. Claims
//! are made one at a time and lock the rows they look at, so the condition is exact under any burst.
//!
//! An attempt counts in the period in which it began, which is when its money was reserved; an adjustment in that in
//! which it was made. So the spend of any period can be added up from the ledger at any time, and is, when a budget
//! begins or changes its period.
//!
//! Readers that will add to a budget lock out writers: a key's budget by its lane, the global one by a lock of its own.
//! What is reserved in a budget is the sum of what its running attempts have reserved.

mod manage;

pub use manage::{AdjustBudget, DeleteBudget, PutBudget};

use super::macros::lock;
use super::{Error, Result, Tx, TxDb, execute, fetch, fetch_locked};
use crate::budget::{Period, Scope};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId};
use crate::job::{Job, Spend, TokenUsage};
use crate::money::MicroUsd;
use sqlx::{Postgres, QueryBuilder, Sqlite};

/// A budget that applies to a job, and its state in the current period.
#[derive(Clone, Debug)]
pub(super) struct Applicable {
    scope: Scope,
    limit: MicroUsd,
    /// Whether jobs wait for the next period instead of failing.
    waits: bool,
    /// Percentages at which it is told.
    thresholds: Vec<i64>,
    period_start: Timestamp,
    spent: MicroUsd,
    reserved: MicroUsd,
}

impl Applicable {
    /// Whether something is left that isn't reserved.
    pub(super) fn has_room(&self) -> bool {
        self.spent + self.reserved < self.limit
    }

    fn is_global(&self) -> bool {
        self.scope == Scope::Global
    }
}

/// What a claim may do about money.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowance {
    /// Reserve this much, in every budget.
    Reserve(MicroUsd),
    /// Wait: what is left is only reserved, or the budget holds its jobs until the next period. The lane is held, and when
    /// nothing at all is left in the global budget, the whole queue.
    Wait { everybody: bool },
    /// There is too little left to begin.
    Exceeded {
        /// Whether it is everybody's budget.
        everybody: bool,
        spent: MicroUsd,
        limit: MicroUsd,
    },
}

/// Decides what a run that wants `wanted` may reserve. If it doesn't fit while something is reserved, it waits; if
/// nothing is, it shrinks to what is left, but not below `least` (or what it wants, if that is less). A budget that is
/// used up decides before one that others will give back to: nobody shall wait for a job that can't begin anyway.
pub(super) fn allow(budgets: &[Applicable], wanted: MicroUsd, least: MicroUsd) -> Allowance {
    let left = |budget: &Applicable| budget.limit - budget.spent - budget.reserved;
    let need = least.min(wanted).max(MicroUsd(1));
    let used_up = || {
        budgets
            .iter()
            .filter(|budget| budget.reserved <= MicroUsd::ZERO && left(budget) < need)
    };
    if let Some(budget) = used_up().find(|budget| !budget.waits) {
        return Allowance::Exceeded {
            everybody: budget.is_global(),
            spent: budget.spent,
            limit: budget.limit,
        };
    }
    let gives_back = budgets
        .iter()
        .find(|budget| budget.reserved > MicroUsd::ZERO && left(budget) < wanted);
    if let Some(budget) = used_up().next().or(gives_back) {
        return Allowance::Wait {
            everybody: budget.is_global() && left(budget) <= MicroUsd::ZERO,
        };
    }
    Allowance::Reserve(budgets.iter().map(left).fold(wanted, MicroUsd::min))
}

/// When the period of `budget` begins; `$2` to `$4` are the beginnings of the day, the week and the month.
macro_rules! period_start {
    () => {
        "case budget.period when 'day' then cast($2 as bigint) when 'week' then cast($3 as bigint)
           when 'month' then cast($4 as bigint) else 0 end"
    };
}

/// The budgets that the jobs of the key `$1` count in.
macro_rules! of_key {
    () => {
        "((budget.scope = 'key' and budget.scope_id = $1) or (budget.scope = 'global' and budget.scope_id = ''))"
    };
}

impl Tx {
    /// The budgets that apply to this key's jobs, their states locked until the end of the transaction.
    pub(super) async fn lock_budgets(&mut self, key_id: &KeyId, now: Timestamp) -> Result<Vec<Applicable>> {
        let budgets = fetch!(
            self,
            "read budgets",
            fetch_all => (String, String, MicroUsd, Period, String, String),
            "select scope, scope_id, limit_amount, period, on_exceeded, alert_thresholds from budget
             where (scope = 'key' and scope_id = $1) or (scope = 'global' and scope_id = '')
             order by case scope when 'key' then 1 else 2 end",
            key_id
        )?;
        let mut applicable = Vec::with_capacity(budgets.len());
        for (scope, scope_id, limit, period, on_exceeded, thresholds) in budgets {
            let scope = read_scope(&scope, &scope_id)?;
            let period_start = period.start(now);
            let (spent, reserved) = self.lock_period(&scope, period_start).await?;
            applicable.push(Applicable {
                scope,
                limit,
                waits: on_exceeded == "hold",
                thresholds: read_thresholds(&thresholds),
                period_start,
                spent,
                reserved,
            });
        }
        Ok(applicable)
    }

    async fn lock_period(&mut self, scope: &Scope, start: Timestamp) -> Result<(MicroUsd, MicroUsd)> {
        loop {
            let row = fetch_locked!(
                self,
                "read a budget's state",
                fetch_optional => (MicroUsd, MicroUsd),
                "select spent, reserved from budget_period where scope = $1 and scope_id = $2 and period_start = $3",
                scope.name(),
                scope.id(),
                start
            )?;
            if let Some(state) = row {
                return Ok(state);
            }
            execute!(
                self,
                "begin a budget's period",
                "insert into budget_period (scope, scope_id, period_start) values ($1, $2, $3) on conflict do nothing",
                scope.name(),
                scope.id(),
                start
            )?;
        }
    }

    /// The budgets that apply to this key's jobs, as they are now; nothing is locked.
    pub(super) async fn read_budgets(&mut self, key_id: &KeyId, now: Timestamp) -> Result<Vec<Applicable>> {
        let budgets = fetch!(
            self,
            "read budgets",
            fetch_all => (String, String, MicroUsd, Period, String, Option<MicroUsd>, Option<MicroUsd>),
            concat!(
                "select budget.scope, budget.scope_id, limit_amount, period, on_exceeded, spent, reserved
                 from budget left join budget_period as state
                   on state.scope = budget.scope and state.scope_id = budget.scope_id and state.period_start = ",
                period_start!(),
                " where ",
                of_key!()
            ),
            key_id,
            Period::Day.start(now),
            Period::Week.start(now),
            Period::Month.start(now)
        )?;
        let mut applicable = Vec::with_capacity(budgets.len());
        for (scope, scope_id, limit, period, on_exceeded, spent, reserved) in budgets {
            let scope = read_scope(&scope, &scope_id)?;
            let period_start = period.start(now);
            let (spent, reserved) = match spent.zip(reserved) {
                Some(state) => state,
                // The period begins with this claim.
                None => self.lock_period(&scope, period_start).await?,
            };
            applicable.push(Applicable {
                scope,
                limit,
                waits: on_exceeded == "hold",
                thresholds: Vec::new(),
                period_start,
                spent,
                reserved,
            });
        }
        Ok(applicable)
    }

    /// Reserves the amount in all these budgets, which are all that apply; `false` when it doesn't fit into each of them
    /// any more, and the caller rolls back.
    pub(super) async fn reserve(
        &mut self,
        key_id: &KeyId,
        budgets: &[Applicable],
        amount: MicroUsd,
        now: Timestamp,
    ) -> Result<bool> {
        if budgets.is_empty() {
            return Ok(true);
        }
        let fits = execute!(
            self,
            "reserve in the budgets",
            concat!(
                "update budget_period set reserved = reserved + $5 from budget
                 where budget.scope = budget_period.scope and budget.scope_id = budget_period.scope_id
                   and budget_period.period_start = ",
                period_start!(),
                " and spent + reserved + $5 <= limit_amount and ",
                of_key!()
            ),
            key_id,
            Period::Day.start(now),
            Period::Week.start(now),
            Period::Month.start(now),
            amount
        )?;
        Ok(usize::try_from(fits).is_ok_and(|fits| fits == budgets.len()))
    }

    /// Writes an attempt's cost into the ledger, a line for each model; `late`: on top of what was written when the attempt
    /// ended. The caller holds the job's row. Gives the cost that was written: a line that is there already isn't.
    pub(super) async fn write_ledger(
        &mut self,
        job: &Job,
        spend: &Spend,
        late: bool,
        now: Timestamp,
    ) -> Result<MicroUsd> {
        macro_rules! insert {
            ($db:ty, $tx:expr, $models:expr) => {{
                let mut query = QueryBuilder::<$db>::new(
                    "insert into ledger (at, key_id, job_id, attempt, session_id, model, cost, input_tokens, output_tokens,
                       cache_creation_input_tokens, cache_read_input_tokens, estimated, price_version, late) ",
                );
                query.push_values($models, |mut row, model| {
                    row.push_bind(now)
                        .push_bind(&job.key_id)
                        .push_bind(job.job_id)
                        .push_bind(job.attempt)
                        .push_bind(job.session_id)
                        .push_bind(&model.model)
                        .push_bind(model.cost)
                        .push_bind(model.usage.input_tokens)
                        .push_bind(model.usage.output_tokens)
                        .push_bind(model.usage.cache_creation_input_tokens)
                        .push_bind(model.usage.cache_read_input_tokens)
                        .push_bind(spend.estimated)
                        .push_bind(&spend.price_version)
                        .push_bind(late);
                });
                query.push(" on conflict (job_id, attempt, model, late) do nothing returning cost");
                query.build_query_as::<(MicroUsd,)>().fetch_all(&mut **$tx).await
            }};
        }
        let mut cost = MicroUsd::ZERO;
        // A statement has room for so many parameters only.
        for models in spend.models.chunks(1000) {
            self.store.work.statement();
            let written = match &mut self.db {
                TxDb::Sqlite(tx) => insert!(Sqlite, tx, models),
                TxDb::Postgres(tx) => {
                    let inserting = async { insert!(Postgres, tx, models) };
                    self.store.liveness.in_time(inserting).await
                }
            }
            .map_err(Error::during("write the ledger"))?;
            cost += written.into_iter().map(|row| row.0).sum();
        }
        Ok(cost)
    }

    /// Moves an attempt's cost from reserved to spent, in the periods in which it began: with `reserved`, what it had
    /// reserved and when. A budget that was set while the attempt ran counts what it had reserved, and one that was
    /// removed is gone. The caller holds the lane.
    pub(super) async fn settle(
        &mut self,
        key_id: &KeyId,
        cost: MicroUsd,
        (reserved, began): (MicroUsd, Timestamp),
        now: Timestamp,
    ) -> Result<()> {
        let settled = fetch!(
            self,
            "settle in the budgets",
            fetch_all => (String, String, Timestamp, MicroUsd, Option<MicroUsd>, Option<String>),
            concat!(
                "insert into budget_period (scope, scope_id, period_start, spent)
                 select budget.scope, budget.scope_id, ",
                period_start!(),
                ", cast($5 as bigint) from budget where ",
                of_key!(),
                " on conflict (scope, scope_id, period_start) do update set
                   spent = budget_period.spent + excluded.spent,
                   reserved = case when budget_period.reserved > $6 then budget_period.reserved - $6 else 0 end
                 returning scope, scope_id, period_start, spent,
                   (select limit_amount from budget as b
                    where b.scope = budget_period.scope and b.scope_id = budget_period.scope_id),
                   (select alert_thresholds from budget as b
                    where b.scope = budget_period.scope and b.scope_id = budget_period.scope_id)"
            ),
            key_id,
            Period::Day.start(began),
            Period::Week.start(began),
            Period::Month.start(began),
            cost,
            reserved
        )?;
        for (scope, scope_id, start, spent, limit, thresholds) in settled {
            let scope = read_scope(&scope, &scope_id)?;
            let thresholds = read_thresholds(thresholds.as_deref().unwrap_or_default());
            let limit = limit.unwrap_or_default();
            self.note_alerts(&scope, start, spent, limit, &thresholds, now)
                .await?;
            if scope == Scope::Global {
                self.free_from_budget(&scope, now).await?;
            }
        }
        Ok(())
    }

    /// Holds off, until the end of the transaction, who begins, changes or ends the global budget.
    async fn share_global_budget(&mut self) -> Result<()> {
        self.postgres_lock(lock!("_shared", "2"), None).await
    }

    /// Waits until nobody adds to the global budget, and holds off who wants to.
    async fn own_global_budget(&mut self) -> Result<()> {
        self.postgres_lock(lock!("", "2"), None).await
    }

    /// Adds an amount that nobody had reserved to a budget whose state is locked.
    async fn add_spent(&mut self, budget: &Applicable, amount: MicroUsd, now: Timestamp) -> Result<()> {
        execute!(
            self,
            "adjust a budget",
            "update budget_period set spent = spent + $4 where scope = $1 and scope_id = $2 and period_start = $3",
            budget.scope.name(),
            budget.scope.id(),
            budget.period_start,
            amount
        )?;
        let spent = budget.spent + amount;
        self.note_alerts(
            &budget.scope,
            budget.period_start,
            spent,
            budget.limit,
            &budget.thresholds,
            now,
        )
        .await
    }

    /// Remembers which thresholds of a budget have been reached in its period: each once.
    async fn note_alerts(
        &mut self,
        scope: &Scope,
        start: Timestamp,
        spent: MicroUsd,
        limit: MicroUsd,
        thresholds: &[i64],
        now: Timestamp,
    ) -> Result<()> {
        for &threshold in thresholds
            .iter()
            .filter(|percent| spent.reaches(**percent, limit))
        {
            let new = execute!(
                self,
                "remember a budget's threshold",
                "insert into budget_alert (scope, scope_id, period_start, threshold, at) values ($1, $2, $3, $4, $5)
                 on conflict do nothing",
                scope.name(),
                scope.id(),
                start,
                threshold,
                now
            )?;
            if new > 0 {
                self.alerts.push(Alert {
                    scope: scope.clone(),
                    threshold,
                    spent,
                    limit,
                });
            }
        }
        Ok(())
    }

    /// What the job's settled attempts cost, in money and in tokens.
    pub(super) async fn settled(&mut self, job_id: JobId) -> Result<(MicroUsd, TokenUsage)> {
        let (cost, input_tokens, output_tokens, cache_creation_input_tokens, cache_read_input_tokens) = fetch!(
            self,
            "add up the ledger",
            fetch_one => (MicroUsd, i64, i64, i64, i64),
            "select cast(coalesce(sum(cost), 0) as bigint), cast(coalesce(sum(input_tokens), 0) as bigint),
               cast(coalesce(sum(output_tokens), 0) as bigint),
               cast(coalesce(sum(cache_creation_input_tokens), 0) as bigint),
               cast(coalesce(sum(cache_read_input_tokens), 0) as bigint)
             from ledger where job_id = $1",
            job_id
        )?;
        let usage = TokenUsage {
            input_tokens,
            output_tokens,
            cache_creation_input_tokens,
            cache_read_input_tokens,
        };
        Ok((cost, usage))
    }
}

fn read_scope(name: &str, id: &str) -> Result<Scope> {
    Scope::parse(name, id).ok_or_else(|| Error::during("read a budget")(format!("an unknown scope, {name}")))
}

fn read_thresholds(text: &str) -> Vec<i64> {
    serde_json::from_str(text).unwrap_or_default()
}

/// A threshold that a transaction found reached.
#[derive(Clone, Debug)]
pub(super) struct Alert {
    pub(super) scope: Scope,
    /// In per cent of the limit.
    pub(super) threshold: i64,
    pub(super) spent: MicroUsd,
    pub(super) limit: MicroUsd,
}

impl Alert {
    /// Tells it to the log, once it is committed.
    pub(super) fn log(&self) {
        let Self {
            scope,
            threshold,
            spent,
            limit,
        } = self;
        let whose = match scope {
            Scope::Global => "the global budget".to_owned(),
            Scope::Key(key_id) => format!("the budget of {key_id}"),
        };
        tracing::warn!(
            budget.scope = scope.name(),
            key.id = scope.id(),
            budget.threshold = threshold,
            spent_usd = spent.usd(),
            limit_usd = limit.usd(),
            "{whose} has reached {threshold} %: {spent} of {limit} spent"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(scope: &str, limit: i64, spent: i64, reserved: i64) -> Applicable {
        Applicable {
            scope: Scope::parse(scope, "").unwrap(),
            limit: MicroUsd(limit),
            waits: false,
            thresholds: Vec::new(),
            period_start: Timestamp(0),
            spent: MicroUsd(spent),
            reserved: MicroUsd(reserved),
        }
    }

    #[test]
    fn a_run_reserves_waits_shrinks_or_fails() {
        let allow = |budgets: &[Applicable]| allow(budgets, MicroUsd(100), MicroUsd(5));
        assert_eq!(allow(&[]), Allowance::Reserve(MicroUsd(100)), "no budget");
        assert_eq!(
            allow(&[budget("key", 100, 0, 0)]),
            Allowance::Reserve(MicroUsd(100)),
            "just fits"
        );
        assert_eq!(
            allow(&[budget("key", 199, 0, 100)]),
            Allowance::Wait { everybody: false },
            "only reserved"
        );
        assert_eq!(
            allow(&[budget("key", 140, 100, 0)]),
            Allowance::Reserve(MicroUsd(40)),
            "shrinks"
        );
        let exceeded = Allowance::Exceeded {
            everybody: false,
            spent: MicroUsd(96),
            limit: MicroUsd(100),
        };
        assert_eq!(allow(&[budget("key", 100, 96, 0)]), exceeded, "below the least");
        let both = [budget("key", 100, 96, 0), budget("global", 120, 0, 60)];
        assert_eq!(allow(&both), exceeded, "others needn't wait for it");
        let holds = Applicable {
            waits: true,
            ..budget("key", 100, 96, 0)
        };
        assert_eq!(
            allow(&[holds, budget("global", 120, 0, 60)]),
            Allowance::Wait { everybody: false },
            "nor for this one"
        );
        let both = [budget("key", 140, 100, 0), budget("global", 130, 100, 0)];
        assert_eq!(
            allow(&both),
            Allowance::Reserve(MicroUsd(30)),
            "shrinks to the tightest"
        );
        let both = [budget("key", 1000, 0, 0), budget("global", 120, 0, 60)];
        assert_eq!(
            allow(&both),
            Allowance::Wait { everybody: false },
            "others may fit into what is left"
        );
        let both = [budget("key", 1000, 0, 0), budget("global", 120, 60, 60)];
        assert_eq!(
            allow(&both),
            Allowance::Wait { everybody: true },
            "nothing is left for anybody"
        );
    }
}
