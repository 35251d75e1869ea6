//! Budgets as people see and set them.

use crate::budget::{Budget, BudgetStatus, OnExceeded, Period, Scope};
use crate::clock::Timestamp;
use crate::id::KeyId;
use crate::money::MicroUsd;
use crate::storage::{Result, Store, Tx, execute, fetch, read};
use std::collections::BTreeMap;

/// The outcome of a request to set a budget. Unless it is set, roll the transaction back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutBudget {
    /// It stands.
    Stored,
    /// There is no such key.
    NoSuchKey,
    /// Somebody changed it meanwhile: its version isn't the expected one.
    Changed,
    /// The limit is below what was spent in the period already.
    BelowSpent(MicroUsd),
}

/// The outcome of a request to delete a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteBudget {
    /// It is gone, or the default again.
    Deleted,
    /// There was none.
    NoSuchBudget,
    /// Somebody changed it meanwhile: its version isn't the expected one.
    Changed,
}

/// The outcome of a request to adjust what was spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdjustBudget {
    /// It is in the ledger.
    Adjusted,
    /// There is no such budget.
    NoSuchBudget,
}

/// Who set a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "text", rename_all = "lowercase")]
enum Origin {
    /// Nobody: it follows the service's default.
    Default,
    /// A person.
    Set,
}

/// A budget as it is stored, and its state in the current period.
#[derive(sqlx::FromRow)]
struct Row {
    scope: String,
    scope_id: String,
    limit_amount: MicroUsd,
    period: Period,
    alert_thresholds: String,
    on_exceeded: OnExceeded,
    origin: Origin,
    version: i64,
    spent: MicroUsd,
    reserved: MicroUsd,
}

/// The parameters 1 to 3 are the beginnings of the current day, week and month.
macro_rules! with_state {
    ($rest:literal) => {
        concat!(
            "select budget.scope, budget.scope_id, limit_amount, period, alert_thresholds, on_exceeded, origin, version,
               coalesce(spent, 0) as spent, coalesce(reserved, 0) as reserved
             from budget left join budget_period as state
               on state.scope = budget.scope and state.scope_id = budget.scope_id
               and state.period_start = case period when 'day' then cast($1 as bigint) when 'week' then cast($2 as bigint)
                 when 'month' then cast($3 as bigint) else 0 end ",
            $rest
        )
    };
}

const ALERTS: &str =
    "select threshold, at from budget_alert where scope = $1 and scope_id = $2 and period_start = $3
  order by threshold";

impl Row {
    fn status(self, now: Timestamp) -> Result<BudgetStatus> {
        let scope = super::read_scope(&self.scope, &self.scope_id)?;
        Ok(BudgetStatus {
            budget: Budget {
                scope,
                limit: self.limit_amount,
                period: self.period,
                alert_thresholds: serde_json::from_str(&self.alert_thresholds).unwrap_or_default(),
                on_exceeded: self.on_exceeded,
            },
            is_default: self.origin == Origin::Default,
            version: self.version,
            period_start: self.period.start(now),
            resets_at: self.period.end(now),
            spent: self.spent,
            reserved: self.reserved,
            alerts: Vec::new(),
        })
    }
}

impl Store {
    /// The budget of this scope, where it stands, and its alerts.
    pub async fn budget(&self, scope: &Scope, now: Timestamp) -> Result<Option<BudgetStatus>> {
        let row = read!(
            self,
            "read a budget",
            fetch_optional => Row,
            with_state!("where budget.scope = $4 and budget.scope_id = $5"),
            Period::Day.start(now),
            Period::Week.start(now),
            Period::Month.start(now),
            scope.name(),
            scope.id()
        )?;
        match row {
            Some(row) => self.with_alerts(row.status(now)?).await.map(Some),
            None => Ok(None),
        }
    }

    /// The budgets that the jobs of this key count in, and where they stand, without their alerts: one read, for every
    /// submission.
    pub async fn budgets_of(&self, key_id: &KeyId, now: Timestamp) -> Result<Vec<BudgetStatus>> {
        let rows = read!(
            self,
            "read budgets",
            fetch_all => Row,
            with_state!(
                "where (budget.scope = 'key' and budget.scope_id = $4) or (budget.scope = 'global' and budget.scope_id = '')"
            ),
            Period::Day.start(now),
            Period::Week.start(now),
            Period::Month.start(now),
            key_id
        )?;
        rows.into_iter().map(|row| row.status(now)).collect()
    }

    /// Up to `limit` budgets after that of this scope, with their alerts: the global one, then those of the keys by
    /// their ids. With a `key_id` only those that its jobs count in.
    pub async fn budgets(
        &self,
        key_id: Option<&KeyId>,
        after: Option<&Scope>,
        limit: i64,
        now: Timestamp,
    ) -> Result<Vec<BudgetStatus>> {
        let rows = read!(
            self,
            "list budgets",
            fetch_all => Row,
            with_state!(
                "where ($4 = '' or budget.scope = 'global' or budget.scope_id = $4)
                   and (budget.scope > $5 or (budget.scope = $5 and budget.scope_id > $6))
                 order by budget.scope, budget.scope_id limit $7"
            ),
            Period::Day.start(now),
            Period::Week.start(now),
            Period::Month.start(now),
            key_id.map_or("", KeyId::as_str),
            after.map_or("", Scope::name),
            after.map_or("", Scope::id),
            limit
        )?;
        let mut budgets = Vec::with_capacity(rows.len());
        for row in rows {
            budgets.push(self.with_alerts(row.status(now)?).await?);
        }
        Ok(budgets)
    }

    async fn with_alerts(&self, mut status: BudgetStatus) -> Result<BudgetStatus> {
        status.alerts = read!(
            self,
            "read a budget's alerts",
            fetch_all => (i64, Timestamp),
            ALERTS,
            status.budget.scope.name(),
            status.budget.scope.id(),
            status.period_start
        )?;
        Ok(status)
    }

    /// Sets the budget that a key has by default (`CLAUDE_MAX_COST_PER_USER`, in all), unless a person set one.
    pub async fn put_default_budget(&self, key_id: &KeyId, limit: MicroUsd, now: Timestamp) -> Result<()> {
        let present = read!(
            self,
            "read a budget",
            fetch_optional => (MicroUsd, Origin),
            "select limit_amount, origin from budget where scope = 'key' and scope_id = $1",
            key_id
        )?;
        if present.is_some_and(|(present, origin)| origin == Origin::Set || present == limit) {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        tx.put_default_budget(key_id, limit, now).await?;
        tx.commit().await
    }
}

impl Tx {
    /// The budget of this scope, where it stands, and its alerts, as this transaction leaves it.
    pub async fn budget(&mut self, scope: &Scope, now: Timestamp) -> Result<Option<BudgetStatus>> {
        let row = fetch!(
            self,
            "read a budget",
            fetch_optional => Row,
            with_state!("where budget.scope = $4 and budget.scope_id = $5"),
            Period::Day.start(now),
            Period::Week.start(now),
            Period::Month.start(now),
            scope.name(),
            scope.id()
        )?;
        let Some(row) = row else { return Ok(None) };
        let mut status = row.status(now)?;
        status.alerts = fetch!(
            self,
            "read a budget's alerts",
            fetch_all => (i64, Timestamp),
            ALERTS,
            scope.name(),
            scope.id(),
            status.period_start
        )?;
        Ok(Some(status))
    }

    /// Sets a budget, or replaces it. The spend of the period that `now` is in is taken from the ledger when the
    /// budget is new or changes its period; what running jobs have reserved moves with it. Jobs that waited for money
    /// look again at once.
    pub async fn put_budget(
        &mut self,
        budget: &Budget,
        expected: Option<i64>,
        now: Timestamp,
    ) -> Result<PutBudget> {
        if !self.lock_scope(&budget.scope).await? {
            return Ok(PutBudget::NoSuchKey);
        }
        let before = self.stored(&budget.scope).await?;
        if expected.is_some() && before.map(|before| before.version) != expected {
            return Ok(PutBudget::Changed);
        }
        let spent = self.enter_period(budget, before, now).await?;
        if spent > budget.limit {
            return Ok(PutBudget::BelowSpent(spent));
        }
        self.write_budget(budget, Origin::Set, spent, now).await?;
        Ok(PutBudget::Stored)
    }

    /// Sets the budget that a key has by default, unless a person set one.
    pub async fn put_default_budget(
        &mut self,
        key_id: &KeyId,
        limit: MicroUsd,
        now: Timestamp,
    ) -> Result<()> {
        let budget = Budget::default_of(key_id, limit);
        self.lock_scope(&budget.scope).await?;
        let before = self.stored(&budget.scope).await?;
        if before.is_some_and(|before| before.origin == Origin::Set) {
            return Ok(());
        }
        // It may be below what was spent: then it is spent.
        let spent = self.enter_period(&budget, before, now).await?;
        self.write_budget(&budget, Origin::Default, spent, now).await
    }

    /// Takes a budget away; a key has the default one then. What was spent stays in the ledger.
    pub async fn delete_budget(
        &mut self,
        scope: &Scope,
        default: MicroUsd,
        expected: Option<i64>,
        now: Timestamp,
    ) -> Result<DeleteBudget> {
        self.lock_scope(scope).await?;
        let Some(before) = self.stored(scope).await? else {
            return Ok(DeleteBudget::NoSuchBudget);
        };
        if expected.is_some_and(|expected| expected != before.version) {
            return Ok(DeleteBudget::Changed);
        }
        match scope {
            Scope::Key(key_id) => {
                let budget = Budget::default_of(key_id, default);
                let spent = self.enter_period(&budget, Some(before), now).await?;
                self.write_budget(&budget, Origin::Default, spent, now).await?;
            }
            Scope::Global => {
                execute!(
                    self,
                    "take a budget away",
                    "delete from budget where scope = $1 and scope_id = $2",
                    scope.name(),
                    scope.id()
                )?;
                self.free_from_budget(scope, now).await?;
            }
        }
        Ok(DeleteBudget::Deleted)
    }

    /// Writes an adjustment into the ledger and into the budgets that it counts in: a key's also in the global one. A
    /// negative one gives money back.
    pub async fn adjust_budget(
        &mut self,
        scope: &Scope,
        delta: MicroUsd,
        reason: &str,
        now: Timestamp,
    ) -> Result<AdjustBudget> {
        let key_id = key_of(scope);
        self.share_global_budget().await?;
        self.lock_lane(&key_id).await?;
        if self.stored(scope).await?.is_none() {
            return Ok(AdjustBudget::NoSuchBudget);
        }
        execute!(
            self,
            "write an adjustment",
            "insert into ledger (at, key_id, cost, reason) values ($1, $2, $3, $4)",
            now,
            &key_id,
            delta,
            reason
        )?;
        for budget in self.lock_budgets(&key_id, now).await? {
            self.add_spent(&budget, delta, now).await?;
            if delta < MicroUsd::ZERO {
                self.free_from_budget(&budget.scope, now).await?;
            }
        }
        Ok(AdjustBudget::Adjusted)
    }

    /// Nobody reserves or settles in this scope until the end of the transaction. `false` when there is no such key.
    async fn lock_scope(&mut self, scope: &Scope) -> Result<bool> {
        match scope {
            Scope::Key(key_id) => self.lock_lane(key_id).await,
            Scope::Global => {
                self.lock_claims().await?;
                self.own_global_budget().await?;
                Ok(true)
            }
        }
    }

    async fn stored(&mut self, scope: &Scope) -> Result<Option<Stored>> {
        fetch!(
            self,
            "read a budget",
            fetch_optional => Stored,
            "select period, origin, version from budget where scope = $1 and scope_id = $2",
            scope.name(),
            scope.id()
        )
    }

    /// Locks the state of the budget's current period, and sees to it that it is right if `before` had other
    /// periods. Gives what was spent.
    async fn enter_period(
        &mut self,
        budget: &Budget,
        before: Option<Stored>,
        now: Timestamp,
    ) -> Result<MicroUsd> {
        let (scope, start) = (&budget.scope, budget.period.start(now));
        if before.is_none_or(|before| before.period != budget.period) {
            self.count_reserved(scope, budget.period).await?;
            let spent = self.spent_since(scope, start).await?;
            self.lock_period(scope, start).await?;
            execute!(
                self,
                "begin a budget's period",
                "update budget_period set spent = $4 where scope = $1 and scope_id = $2 and period_start = $3",
                scope.name(),
                scope.id(),
                start,
                spent
            )?;
            return Ok(spent);
        }
        Ok(self.lock_period(scope, start).await?.0)
    }

    /// Writes down what running attempts have reserved, in the periods of this kind in which they began.
    async fn count_reserved(&mut self, scope: &Scope, period: Period) -> Result<()> {
        let running = fetch!(
            self,
            "read what running attempts have reserved",
            fetch_all => (MicroUsd, Timestamp),
            "select reserved, attempt.started_at from job
             join attempt on attempt.job_id = job.job_id and attempt.attempt = job.attempt
             where job.status = 'running' and ($1 = '' or job.key_id = $1)",
            scope.id()
        )?;
        execute!(
            self,
            "count what is reserved",
            "update budget_period set reserved = 0 where scope = $1 and scope_id = $2 and reserved <> 0",
            scope.name(),
            scope.id()
        )?;
        let mut periods = BTreeMap::<Timestamp, MicroUsd>::new();
        for (reserved, began) in running {
            *periods.entry(period.start(began)).or_default() += reserved;
        }
        for (start, reserved) in periods {
            self.lock_period(scope, start).await?;
            execute!(
                self,
                "count what is reserved",
                "update budget_period set reserved = $4 where scope = $1 and scope_id = $2 and period_start = $3",
                scope.name(),
                scope.id(),
                start,
                reserved
            )?;
        }
        Ok(())
    }

    /// Stores a budget whose state is locked. Its thresholds are told anew if the new limit is beyond them.
    async fn write_budget(
        &mut self,
        budget: &Budget,
        origin: Origin,
        spent: MicroUsd,
        now: Timestamp,
    ) -> Result<()> {
        let (scope, start) = (&budget.scope, budget.period.start(now));
        let thresholds = serde_json::json!(budget.alert_thresholds).to_string();
        execute!(
            self,
            "set a budget",
            "insert into budget (scope, scope_id, limit_amount, period, alert_thresholds, on_exceeded, origin, updated_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8)
             on conflict (scope, scope_id) do update set
               limit_amount = excluded.limit_amount, period = excluded.period,
               alert_thresholds = excluded.alert_thresholds, on_exceeded = excluded.on_exceeded,
               origin = excluded.origin, version = budget.version + 1, updated_at = excluded.updated_at",
            scope.name(),
            scope.id(),
            budget.limit,
            budget.period,
            &thresholds,
            budget.on_exceeded,
            origin,
            now
        )?;
        let told = fetch!(
            self,
            "read a budget's alerts",
            fetch_all => (i64,),
            "select threshold from budget_alert where scope = $1 and scope_id = $2 and period_start = $3",
            scope.name(),
            scope.id(),
            start
        )?;
        for (threshold,) in told {
            if !budget.alert_thresholds.contains(&threshold) || !spent.reaches(threshold, budget.limit) {
                execute!(
                    self,
                    "take a budget's alert back",
                    "delete from budget_alert where scope = $1 and scope_id = $2 and period_start = $3 and threshold = $4",
                    scope.name(),
                    scope.id(),
                    start,
                    threshold
                )?;
            }
        }
        self.note_alerts(scope, start, spent, budget.limit, &budget.alert_thresholds, now)
            .await?;
        self.free_from_budget(scope, now).await
    }

    /// What the ledger says was spent since this time: attempts count from when they began.
    async fn spent_since(&mut self, scope: &Scope, start: Timestamp) -> Result<MicroUsd> {
        // Two texts, because each has its index.
        let row = match scope {
            Scope::Key(key_id) => fetch!(
                self,
                "add up the ledger",
                fetch_one => (MicroUsd,),
                "select cast(coalesce(sum(ledger.cost), 0) as bigint) from ledger
                 left join attempt on attempt.job_id = ledger.job_id and attempt.attempt = ledger.attempt
                 where ledger.key_id = $1 and at >= $2 and coalesce(attempt.started_at, at) >= $2",
                key_id,
                start
            ),
            Scope::Global => fetch!(
                self,
                "add up the ledger",
                fetch_one => (MicroUsd,),
                "select cast(coalesce(sum(ledger.cost), 0) as bigint) from ledger
                 left join attempt on attempt.job_id = ledger.job_id and attempt.attempt = ledger.attempt
                 where at >= $1 and coalesce(attempt.started_at, at) >= $1",
                start
            ),
        }?;
        Ok(row.0)
    }
}

/// What must be known of a budget that is changed.
#[derive(Clone, Copy, sqlx::FromRow)]
struct Stored {
    period: Period,
    origin: Origin,
    version: i64,
}

/// The key whose lane the scope holds; none, as an empty id, for all.
fn key_of(scope: &Scope) -> KeyId {
    KeyId::known(scope.id())
}
