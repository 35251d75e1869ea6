//! The life of one run, top to bottom: claim, prepare, follow, finish.

mod changes;
mod finish;
mod follow;
pub mod outcome;
mod output;
mod prepare;
mod recorder;
mod steps;
mod stop;
mod transcript;
mod watchdog;

use crate::context::Context;
use recorder::Recorder;
use shared::clock;
use shared::job::{Lease, Report};
use shared::storage::Claim;
use shared::telemetry::chain;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{Instrument, info, info_span, warn};

/// Claims and runs until nothing is left, or until this worker may not. `claiming` learns whether the first claim
/// found a job.
pub async fn claim_and_run_until_none(ctx: Arc<Context>, claiming: oneshot::Sender<bool>) {
    let mut claiming = Some(claiming);
    while !ctx.draining.is_cancelled() {
        // Held until the run has ended.
        let Some(_start) = ctx.pause.start(clock::now()) else {
            return;
        };
        let claimed = claim(&ctx).await;
        if !matches!(claimed, Claim::TryAgain)
            && let Some(claiming) = claiming.take()
        {
            let _ = claiming.send(matches!(claimed, Claim::Run(_)));
        }
        match claimed {
            Claim::Run(lease) => {
                let run_of = (lease.job.job_id, lease.job.attempt);
                let span = info_span!("run", job.id = %lease.job.job_id, attempt = lease.job.attempt);
                run(&ctx, Arc::new(*lease)).instrument(span).await;
                ctx.leases.remove(run_of);
            }
            Claim::TryAgain => {}
            Claim::Nothing => return,
        }
    }
}

/// Claims, while no other task of this process does.
async fn claim(ctx: &Context) -> Claim {
    let _one_at_a_time = ctx.claiming.lock().await;
    match ctx.store.claim(&ctx.claimant, clock::now()).await {
        Ok(claim) => {
            if let Claim::Run(lease) = &claim {
                ctx.leases.insert((lease.job.job_id, lease.job.attempt));
            }
            claim
        }
        Err(error) => {
            if !ctx.store.note(&error) {
                warn!(error = %chain(&error), "could not claim");
            }
            if error.is_undecided() {
                release_unknown(ctx).await;
            }
            // The sweeper pushes another ticket when the database is back.
            Claim::Nothing
        }
    }
}

/// When a connection is lost nobody knows whether the commit came first. A job that was claimed all the same would
/// count as lost with its worker, although no process of it ever ran.
async fn release_unknown(ctx: &Context) {
    loop {
        tokio::select! {
            () = ctx.store.answers() => {}
            () = ctx.draining.cancelled() => {}
        }
        let (worker_id, known) = (ctx.claimant.worker_id, ctx.leases.all());
        match ctx.store.release_unknown(worker_id, &known, clock::now()).await {
            Ok(0) => return,
            Ok(jobs) => return info!(jobs, "released jobs whose claim was committed without an answer"),
            Err(error) => {
                if !ctx.store.note(&error) {
                    warn!(error = %chain(&error), "could not look for claims whose commit was undecided, retrying");
                }
                if ctx.draining.is_cancelled() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

async fn run(ctx: &Context, lease: Arc<Lease>) {
    info!(key.id = %lease.job.key_id, "job {} started, attempt {}", lease.job.job_id, lease.job.attempt);
    let began = Instant::now();
    // From here on the lease is renewed: on a busy machine a run takes long to start.
    let renew_every = (ctx.config.lease / 3).min(Duration::from_secs(10));
    let recorder = Recorder::start(ctx.store.clone(), &ctx.wakeups, lease.clone(), renew_every);
    let report = match prepare::start(ctx, &lease, &recorder).await {
        Ok(run) => run.follow(recorder).await,
        Err(error) => prepare::start_failed(&error, ctx, &lease, recorder).await,
    };
    if let Some(report) = report {
        let duration = began.elapsed();
        finish::finish(ctx, &lease, Report { duration, ..report }).await;
    }
}
