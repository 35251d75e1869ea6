//! The end of a run is written, however long the database takes: the work was done and paid for.

use super::outcome::ErrorCode;
use crate::context::Context;
use shared::clock;
use shared::job::{Ending, JobStatus, Lease, ModelCost, Report, Spend};
use shared::storage::Finish;
use shared::telemetry::chain;
use std::time::Duration;
use tracing::{info, warn};

/// The pause before another try.
const AGAIN: Duration = Duration::from_millis(500);

/// A report that was refused so often is given up for a smaller one.
const REFUSALS: u32 = 3;

/// Writes the end of the run. What a later try may store is tried for as long as the lease is held; only a report that
/// the database refuses for what is in it becomes smaller.
pub(super) async fn finish(ctx: &Context, lease: &Lease, report: Report) {
    let mut report = report;
    let (mut unsure, mut refused) = (false, 0);
    loop {
        match ctx.store.finish(lease, &report, clock::now()).await {
            Ok(Finish::Became(status)) => return tell(lease, &report, status),
            Ok(Finish::Lost) => {
                if unsure && let Some(status) = written_before(ctx, lease).await {
                    return tell(lease, &report, status);
                }
                warn!("the lease was lost; the next attempt will check what this run did");
                return book_late(ctx, lease, &report).await;
            }
            Err(error) => {
                // The commit may have come before the error.
                unsure = true;
                if !ctx.store.note(&error) {
                    warn!(error = %chain(&error), "could not store the end of the run, retrying");
                }
                if !error.is_unavailable() {
                    refused += 1;
                    if refused % REFUSALS == 0 {
                        if leave_out_events(ctx, lease, &mut report).await {
                            // Perhaps that was all.
                            refused = 0;
                        } else {
                            report = reduced(report, refused / REFUSALS);
                        }
                    }
                }
                keep_lease(ctx, lease, &report).await;
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Books what is owed for a run whose lease was taken, as far as it wasn't known then.
async fn book_late(ctx: &Context, lease: &Lease, report: &Report) {
    if report.spend.models.is_empty() {
        return;
    }
    loop {
        match ctx.store.book_late(lease, &report.spend, clock::now()).await {
            Ok(cost) if cost.0 > 0 => return info!(cost_usd = cost.usd(), "booked {cost} of a lost run"),
            Ok(_) => return,
            Err(error) => {
                if !ctx.store.note(&error) {
                    warn!(error = %chain(&error), "could not book what a lost run has cost");
                }
                if !error.is_unavailable() {
                    return;
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Takes the last events out of a report that is refused: they may be what can't be stored.
/// Whether there were any.
async fn leave_out_events(ctx: &Context, lease: &Lease, report: &mut Report) -> bool {
    let dropped = i64::try_from(std::mem::take(&mut report.events).len()).unwrap_or(i64::MAX);
    if dropped == 0 {
        return false;
    }
    warn!(events = dropped, "events of the run are left out");
    if let Err(error) = ctx.store.record_gap(lease, dropped, clock::now()).await {
        ctx.store.note(&error);
    }
    true
}

/// Renews the lease of a run whose end has to wait, and stores what it has cost: what holds up the end may leave this.
async fn keep_lease(ctx: &Context, lease: &Lease, report: &Report) {
    let spend = Some(&report.spend).filter(|spend| !spend.models.is_empty());
    if let Err(error) = ctx.store.record(lease, &[], spend, clock::now()).await {
        ctx.store.note(&error);
    }
}

fn tell(lease: &Lease, report: &Report, status: JobStatus) {
    let (job_id, status, cost) = (lease.job.job_id, status.as_str(), report.spend.total());
    // JSON logs would have a number of 128 bits as text.
    let duration_ms = u64::try_from(report.duration.as_millis()).unwrap_or(u64::MAX);
    let error_code = match &report.ending {
        Ending::Failed { code, .. } | Ending::Retry { code, .. } => Some(code.as_str()),
        _ => None,
    };
    let cost_usd = cost.usd();
    if error_code.is_some_and(ErrorCode::is_for_the_operator) {
        warn!(
            job.status = status,
            error_code, duration_ms, cost_usd, "job {job_id} is {status}, {cost}"
        );
    } else {
        info!(
            job.status = status,
            error_code, duration_ms, cost_usd, "job {job_id} is {status}, {cost}"
        );
    }
}

/// What became of the job, if an earlier try was stored although it seemed to fail.
async fn written_before(ctx: &Context, lease: &Lease) -> Option<JobStatus> {
    let job = ctx.store.job(lease.job.job_id).await.ok().flatten()?;
    (job.attempt == lease.job.attempt && job.status != JobStatus::Running).then_some(job.status)
}

/// The same run with less to store: a job must end, even if the database takes no word of what the run said. `step`
/// 1 keeps what it cost, 2 the sum of that. More than that is never left out: no end is written without it.
fn reduced(report: Report, step: u32) -> Report {
    let total = ModelCost {
        model: "unknown".to_owned(),
        cost: report.spend.total(),
        usage: report.spend.usage(),
    };
    Report {
        ending: Ending::Failed {
            code: ErrorCode::Internal.as_str().to_owned(),
            message: "The end of the run could not be stored as it was; the worker's log says why."
                .to_owned(),
        },
        result: None,
        spend: match step {
            1 => report.spend,
            _ => Spend {
                models: vec![total],
                estimated: true,
                ..Spend::default()
            },
        },
        turns: 0,
        claude_session_id: None,
        stderr_tail: String::new(),
        ..report
    }
}
