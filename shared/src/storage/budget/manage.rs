//! Budgets as people see and set them.

use crate::budget::{Budget, BudgetStatus, OnExceeded, Period, Scope};
use crate::clock::Timestamp;
use crate::id::KeyId;
use crate::money::MicroUsd;
use crate::storage::{Error, Result, Store, Tx, execute, fetch, read};

/// What came of a wish to change a budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutBudget {
    /// It stands.
    Stored(Box<BudgetStatus>),
    /// Somebody changed it meanwhile: its version isn't the expected one.
    Changed,
    /// The limit is below what was spent in the period already.
    BelowSpent(MicroUsd),
}

type Row = (String, String, MicroUsd, Period, String, OnExceeded, String, i64);

const COLUMNS: &str = "select scope, scope_id, limit_amount, period, alert_thresholds, on_exceeded, origin, version from budget";

impl Store {
    /// Sets a budget, or replaces it. The spend of the period that `now` is in is taken from the ledger, so a budget
    /// may begin, or change its period, at any time; jobs that waited for money look again at once.
    pub async fn put_budget(
        &self,
        budget: &Budget,
        expected: Option<i64>,
        now: Timestamp,
    ) -> Result<PutBudget> {
        let mut tx = self.begin().await?;
        tx.lock_claims().await?;
        let scope = &budget.scope;
        if let Scope::Key(key_id) = scope {
            tx.lock_lane(key_id).await?;
        }
        let before = fetch!(
            tx,
            "read a budget",
            fetch_optional => (i64,),
            "select version from budget where scope = $1 and scope_id = $2",
            scope.name(),
            scope.id()
        )?;
        if expected.is_some() && before.map(|row| row.0) != expected {
            tx.rollback().await?;
            return Ok(PutBudget::Changed);
        }
        let start = budget.period.start(now);
        // Locked first and added up then: a run that is just settled is in the sum, or adds itself afterwards.
        tx.lock_period(scope.name(), scope.id(), start).await?;
        let spent = tx.spent_since(scope, start).await?;
        if spent > budget.limit {
            tx.rollback().await?;
            return Ok(PutBudget::BelowSpent(spent));
        }
        execute!(
            tx,
            "set a budget",
            "update budget_period set spent = $4 where scope = $1 and scope_id = $2 and period_start = $3",
            scope.name(),
            scope.id(),
            start,
            spent
        )?;
        execute!(
            tx,
            "set a budget",
            "insert into budget (scope, scope_id, limit_amount, period, alert_thresholds, on_exceeded, origin, updated_at)
             values ($1, $2, $3, $4, $5, $6, 'set', $7)
             on conflict (scope, scope_id) do update set
               limit_amount = excluded.limit_amount, period = excluded.period,
               alert_thresholds = excluded.alert_thresholds, on_exceeded = excluded.on_exceeded, origin = 'set',
               version = budget.version + 1, updated_at = excluded.updated_at",
            scope.name(),
            scope.id(),
            budget.limit,
            budget.period,
            serde_json::json!(budget.alert_thresholds).to_string(),
            budget.on_exceeded,
            now
        )?;
        tx.free_from_budget(&key_of(scope)).await?;
        tx.commit().await?;
        let status = self.budget(scope, now).await?;
        Ok(status.map_or(PutBudget::Changed, |status| PutBudget::Stored(Box::new(status))))
    }

    /// Takes a budget away; for a key, `default` is what it has then. `false` when there was none.
    pub async fn delete_budget(
        &self,
        scope: &Scope,
        default: Option<MicroUsd>,
        now: Timestamp,
    ) -> Result<bool> {
        let mut tx = self.begin().await?;
        tx.lock_claims().await?;
        if let Scope::Key(key_id) = scope {
            tx.lock_lane(key_id).await?;
        }
        let rows = execute!(
            tx,
            "take a budget away",
            "delete from budget where scope = $1 and scope_id = $2",
            scope.name(),
            scope.id()
        )?;
        tx.free_from_budget(&key_of(scope)).await?;
        tx.commit().await?;
        if let (Scope::Key(key_id), Some(limit)) = (scope, default) {
            self.put_default_budget(key_id, limit, now).await?;
        }
        Ok(rows > 0)
    }

    /// The budget of this scope, and where it stands.
    pub async fn budget(&self, scope: &Scope, now: Timestamp) -> Result<Option<BudgetStatus>> {
        let row = read!(
            self,
            "read a budget",
            fetch_optional => Row,
            sqlx::AssertSqlSafe(format!("{COLUMNS} where scope = $1 and scope_id = $2")),
            scope.name(),
            scope.id()
        )?;
        match row {
            Some(row) => self.budget_status(row, now).await.map(Some),
            None => Ok(None),
        }
    }

    /// All budgets that apply to this key (`None`: all there are), the global one last.
    pub async fn budgets(&self, key_id: Option<&KeyId>, now: Timestamp) -> Result<Vec<BudgetStatus>> {
        let rows = read!(
            self,
            "list budgets",
            fetch_all => Row,
            sqlx::AssertSqlSafe(format!(
                "{COLUMNS} where $1 = '' or scope = 'global' or (scope = 'key' and scope_id = $1) order by scope desc, scope_id"
            )),
            key_id.map_or("", KeyId::as_str)
        )?;
        let mut budgets = Vec::with_capacity(rows.len());
        for row in rows {
            budgets.push(self.budget_status(row, now).await?);
        }
        Ok(budgets)
    }

    async fn budget_status(&self, row: Row, now: Timestamp) -> Result<BudgetStatus> {
        let (scope, scope_id, limit, period, thresholds, on_exceeded, origin, version) = row;
        let period_start = period.start(now);
        let state = read!(
            self,
            "read a budget's state",
            fetch_optional => (MicroUsd, MicroUsd),
            "select spent, reserved from budget_period where scope = $1 and scope_id = $2 and period_start = $3",
            &scope,
            &scope_id,
            period_start
        )?;
        let alerts = read!(
            self,
            "read a budget's alerts",
            fetch_all => (i64, Timestamp),
            "select threshold, at from budget_alert where scope = $1 and scope_id = $2 and period_start = $3
             order by threshold",
            &scope,
            &scope_id,
            period_start
        )?;
        let (spent, reserved) = state.unwrap_or_default();
        let scope = Scope::parse(&scope, &scope_id)
            .ok_or_else(|| Error::during("read a budget")(format!("an unknown scope, {scope}")))?;
        Ok(BudgetStatus {
            budget: Budget {
                scope,
                limit,
                period,
                alert_thresholds: serde_json::from_str(&thresholds).unwrap_or_default(),
                on_exceeded,
            },
            is_default: origin == "default",
            version,
            period_start,
            resets_at: period.end(now),
            spent,
            reserved,
            alerts,
        })
    }

    /// Writes an adjustment into the ledger and into the budgets that it counts for. A negative one gives money back.
    pub async fn adjust_budget(
        &self,
        scope: &Scope,
        delta: MicroUsd,
        reason: &str,
        now: Timestamp,
    ) -> Result<()> {
        let mut tx = self.begin().await?;
        let key_id = key_of(scope);
        tx.lock_lane(&key_id).await?;
        execute!(
            tx,
            "write an adjustment",
            "insert into ledger (at, key_id, cost, reason) values ($1, $2, $3, $4)",
            now,
            &key_id,
            delta,
            reason
        )?;
        for budget in tx.lock_budgets(&key_id, now).await? {
            tx.add_spent(&budget, delta, now).await?;
        }
        tx.free_from_budget(&key_id).await?;
        tx.commit().await
    }
}

impl Tx {
    /// What the ledger says was spent since this time.
    async fn spent_since(&mut self, scope: &Scope, start: Timestamp) -> Result<MicroUsd> {
        let row = fetch!(
            self,
            "add up the ledger",
            fetch_one => (MicroUsd,),
            "select cast(coalesce(sum(cost), 0) as bigint) from ledger where at >= $2 and ($1 = '' or key_id = $1)",
            scope.id(),
            start
        )?;
        Ok(row.0)
    }
}

/// The key whose lane the scope holds; none, as an empty id, for all.
fn key_of(scope: &Scope) -> KeyId {
    KeyId::known(scope.id())
}
