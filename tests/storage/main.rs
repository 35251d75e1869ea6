//! What storage promises, on both databases. Each case gets a database of its own; time is an argument.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]
#![expect(
    clippy::print_stdout,
    reason = "what a load was made of is shown when its test fails"
)]

mod budget;
mod claim;
mod delivery;
mod gate;
mod group;
mod idempotency;
mod list;
mod open;
mod outages;
mod plan;
mod race;
mod retention;
mod run;
mod session;
mod status;
mod submit;
mod sweep;
mod usage;
mod wait;
mod wakeups;
mod work;

use serde_json::json;
use shared::clock::Timestamp;
use shared::id::{JobId, KeyId, WorkerId};
use shared::job::{
    CancelReason, Ending, Hold, Job, JobKind, JobStatus, Lease, ModelCost, NewJob, OnWorkerLost, Report,
    RunDefaults, RunOptions, Spend, TokenUsage,
};
use shared::money::MicroUsd;
use shared::storage::{CancelOutcome, Claim, Claimant, DatabaseUrl, Finish, JobDetails, JobPart, Store};
use shared::telemetry::chain;
use std::time::Duration;
use tests::database::{Database, Db};
use tests::paths;

/// When the cases happen.
const NOW: Timestamp = Timestamp(1_800_000_000_000_000);

/// So many seconds after [`NOW`].
fn at(seconds: u64) -> Timestamp {
    NOW.plus(Duration::from_secs(seconds))
}

/// A database of a case's own, and a store on it.
struct World {
    store: Store,
    database: Database,
}

async fn open(url: &str) -> Store {
    let url = DatabaseUrl::parse(url).expect("the kit's own URL");
    Store::open(&url, 4)
        .await
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

impl World {
    async fn new(db: Db) -> Self {
        let folder = paths::folder('s');
        let database = Database::copy(db, &folder, async |url| open(url).await.close().await).await;
        Self {
            store: open(database.url()).await,
            database,
        }
    }

    /// Another process' store.
    async fn other(&self) -> Store {
        open(self.database.url()).await
    }

    /// An owner whose jobs may run `max_running` at once.
    async fn key(&self, name: &str, max_running: i64) -> KeyId {
        let key_id = KeyId::known(name);
        self.store.put_lane(&key_id, max_running).await.unwrap();
        key_id
    }

    async fn submit(&self, job: NewJob) -> Job {
        let mut tx = self.store.begin().await.unwrap();
        let stored = tx.insert_job(&job).await.unwrap();
        tx.commit().await.unwrap();
        stored
    }

    async fn claim(&self) -> Option<Lease> {
        self.claim_at(NOW).await
    }

    async fn claim_at(&self, now: Timestamp) -> Option<Lease> {
        loop {
            match self.store.claim(&claimant(), now).await.unwrap() {
                Claim::Run(lease) => return Some(*lease),
                Claim::TryAgain => {}
                Claim::Nothing => return None,
            }
        }
    }

    /// Claims, and it must be this job.
    async fn claim_job(&self, job: &Job) -> Lease {
        let lease = self.claim().await.expect("there is a job to claim");
        assert_eq!(lease.job.job_id, job.job_id);
        lease
    }

    async fn finish(&self, lease: &Lease, ending: Ending) -> Finish {
        self.store.finish(lease, &report(ending), NOW).await.unwrap()
    }

    async fn cancel(&self, job: &Job) -> CancelOutcome {
        self.store
            .cancel_job(job.job_id, CancelReason::User, NOW)
            .await
            .unwrap()
    }

    async fn job(&self, job_id: JobId) -> Job {
        self.store.job(job_id).await.unwrap().expect("the job is there")
    }

    /// The job with what is shown beside its row.
    async fn details(&self, job_id: JobId) -> JobDetails {
        let details = self.store.job_details(job_id, None, None, JobPart::Full).await;
        details.unwrap().expect("the job is there")
    }

    async fn status(&self, job: &Job) -> JobStatus {
        self.job(job.job_id).await.status
    }

    /// The types of the job's events, in order.
    async fn events(&self, job: &Job) -> Vec<&'static str> {
        let events = self.store.events_after(job.job_id, 0, 1000).await.unwrap();
        let numbers: Vec<i64> = events.iter().map(|event| event.seq).collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
        events.iter().map(|event| event.event_type.as_str()).collect()
    }

    /// Sets a budget as an operator would: `key_id` or, with none, the global one.
    async fn budget(&self, key_id: Option<&KeyId>, limit: i64, period: &str, on_exceeded: &str) {
        let scope = if key_id.is_some() { "key" } else { "global" };
        let scope_id = key_id.map_or("", KeyId::as_str);
        self.database
            .execute(&format!(
                "insert into budget (scope, scope_id, limit_amount, period, alert_thresholds, on_exceeded, origin,
                   updated_at)
                 values ('{scope}', '{scope_id}', {limit}, '{period}', '[]', '{on_exceeded}', 'set', 0)
                 on conflict (scope, scope_id) do update set limit_amount = excluded.limit_amount"
            ))
            .await;
    }

    async fn number(&self, sql: &str) -> i64 {
        self.database.number(sql).await
    }

    /// How many tickets wait for a slot.
    async fn tickets(&self) -> i64 {
        self.number(match self.database.db() {
            Db::Sqlite => "select count(*) from Jobs where status = 'Pending'",
            Db::Postgres => "select count(*) from apalis.jobs where status = 'Pending'",
        })
        .await
    }

    /// What must hold at every moment, asked in one statement; the names of what doesn't.
    async fn faults(&self) -> Vec<String> {
        self.database.texts(FAULTS).await
    }
}

/// Each line names a fault and counts it.
const FAULTS: &str = "select fault from (
    select 'over its cap' as fault, count(*) as times from (
      select lane.key_id from lane join job on job.key_id = lane.key_id and job.status = 'running'
      group by lane.key_id, lane.max_running having count(*) > lane.max_running) as over_cap
    union all select 'running is not the rows that run', count(*) from lane
      where running <> (select count(*) from job where job.key_id = lane.key_id and job.status = 'running')
    union all select 'reserved is not what running attempts have reserved', count(*) from budget
      where (select cast(coalesce(sum(reserved), 0) as bigint) from budget_period as b
          where b.scope = budget.scope and b.scope_id = budget.scope_id)
        <> (select cast(coalesce(sum(attempt.reserved), 0) as bigint) from job
          join attempt on attempt.job_id = job.job_id and attempt.attempt = job.attempt
          where job.status = 'running' and (budget.scope = 'global' or job.key_id = budget.scope_id))
    union all select 'a hint is too low', count(*) from lane
      where coalesce((select max(priority) from job
        where job.key_id = lane.key_id and job.status = 'queued' and job.hold = ''), -99) > coalesce(top_priority, -99)
    union all select 'spent is not the sum of the ledger', count(*) from budget_period as b
      join budget on budget.scope = b.scope and budget.scope_id = b.scope_id and budget.period = 'total'
      where b.period_start = 0 and spent <> (select cast(coalesce(sum(cost), 0) as bigint) from ledger
        where b.scope = 'global' or ledger.key_id = b.scope_id)
    union all select 'over budget', count(*) from budget_period as b
      join budget on budget.scope = b.scope and budget.scope_id = b.scope_id
      where b.spent + b.reserved > budget.limit_amount
    union all select 'an ended job costs other than its ledger', count(*) from job
      where completed_at is not null and cost <> (
        select cast(coalesce(sum(cost), 0) as bigint) from ledger where ledger.job_id = job.job_id)
    union all select 'an attempt costs other than its ledger', count(*) from attempt
      where ended_at is not null and cost <> (select cast(coalesce(sum(cost), 0) as bigint) from ledger
        where ledger.job_id = attempt.job_id and ledger.attempt = attempt.attempt)
    union all select 'two of a group run', count(*) from (
      select key_id from job where status = 'running' and group_key is not null
      group by key_id, group_key having count(*) > 1) as twice
    union all select 'nobody will free it', count(*) from job
      where status = 'queued' and hold = 'order' and not exists (select 1 from job as before
        where before.key_id = job.key_id and before.group_key = job.group_key
          and before.job_number < job.job_number and before.status in ('queued', 'running'))
    union all select 'it overtook an earlier one of its group', count(*) from job
      where status = 'running' and group_key is not null and exists (select 1 from job as before
        where before.key_id = job.key_id and before.group_key = job.group_key
          and before.job_number < job.job_number and before.status in ('queued', 'running'))
    union all select 'its events are not counted', count(*) from job
      where not data_removed and last_event_seq <> (select count(*) from event where event.job_id = job.job_id)
    union all select 'an ended job without its last event', count(*) from job
      where completed_at is not null and not data_removed and not exists (select 1 from event
        where event.job_id = job.job_id and event.seq = job.last_event_seq
          and event.event_type in ('done', 'error', 'cancelled'))
    union all select 'completed_at and status disagree', count(*) from job
      where (completed_at is not null) <> (status in ('done', 'failed', 'cancelled'))
  ) as counted where times > 0";

fn claimant() -> Claimant {
    Claimant {
        worker_id: WorkerId::new(),
        cli_version: "2.1.331".to_owned(),
        least_reserve: MicroUsd(50_000),
        defaults: RunDefaults {
            model: "sonnet".to_owned(),
            effort: None,
            permission_mode: "acceptEdits".to_owned(),
            max_turns: 25,
            chat_timeout_seconds: 60,
            timeout_seconds: 300,
        },
    }
}

/// A plain job of this owner, which may cost a dollar.
fn job(key_id: &KeyId) -> NewJob {
    NewJob {
        job_id: JobId::new(),
        key_id: key_id.clone(),
        kind: JobKind::Job,
        message: "Say hello.".to_owned(),
        options: RunOptions::default(),
        session_id: None,
        concurrency_key: None,
        priority: 0,
        run_after: None,
        deadline_at: None,
        max_attempts: 3,
        on_worker_lost: OnWorkerLost::Resume,
        model: None,
        effort: None,
        permission_mode: None,
        max_turns: None,
        timeout_seconds: None,
        max_cost: MicroUsd(1_000_000),
        webhook_url: None,
        webhook_events: "completed".to_owned(),
        custom_id: None,
        metadata: json!({}),
        created_at: NOW,
    }
}

/// A job of the group `group`.
fn grouped(key_id: &KeyId, group: &str) -> NewJob {
    NewJob {
        concurrency_key: Some(group.to_owned()),
        ..job(key_id)
    }
}

/// So much for one model.
fn spend(micros: i64) -> Spend {
    Spend {
        models: vec![ModelCost {
            model: "claude-sonnet-5".to_owned(),
            cost: MicroUsd(micros),
            usage: TokenUsage {
                input_tokens: 10,
                output_tokens: 3,
                ..TokenUsage::default()
            },
        }],
        estimated: false,
        price_version: None,
        reported: None,
    }
}

/// A run that cost 12 cents and ended like this.
fn report(ending: Ending) -> Report {
    Report {
        ending,
        result: Some(json!({ "result": "Hello." })),
        spend: spend(120_000),
        duration: Duration::from_millis(1500),
        turns: 2,
        claude_session_id: Some("11111111-2222-4333-8444-555555555555".to_owned()),
        stderr_tail: "a\0b".to_owned(),
        exit: "exit 0".to_owned(),
        events: Vec::new(),
    }
}

fn failed() -> Ending {
    Ending::Failed {
        code: "refusal".to_owned(),
        message: "It was refused.".to_owned(),
    }
}

/// Another attempt at this time, after a failure that counts.
fn again(run_after: Timestamp) -> Ending {
    Ending::Retry {
        code: "overloaded".to_owned(),
        message: "The API was overloaded.".to_owned(),
        run_after,
        hold: Hold::Delay,
        counts: true,
    }
}
