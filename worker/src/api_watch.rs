//! Watches the Messages API: asks it one free question when the worker starts and, while it serves no runs, twice a
//! second, so that runs begin again as soon as it is back. Also sees when a person lifts the pauses.

use crate::context::Context;
use crate::gateway::question::Answer;
use crate::heartbeat;
use crate::sweep;
use shared::clock;
use shared::telemetry::chain;
use std::time::Duration;
use tokio::time::Instant;
use tracing::{info, warn};

/// How often the API is asked while it serves no runs.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// How often it is looked whether a person has lifted the pauses.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Watches until the worker has ended.
pub(crate) async fn watch(ctx: &Context) {
    match ask(ctx).await {
        Answer::Good => info!("the Messages API answers"),
        answer @ Answer::Refused(_) => {
            warn!("the Messages API didn't answer a first question well: {answer}");
        }
    }
    heartbeat::announce_now(ctx).await;
    let (mut resumes, mut shown) = (None, false);
    let (mut asked, mut looked) = (Instant::now(), Instant::now());
    loop {
        let due = ctx.pause.due();
        if let Some(reason) = due.log {
            warn!("runs have to wait for the Messages API: {reason}");
            shown = true;
            heartbeat::announce_now(ctx).await;
        } else if shown && ctx.pause.current(clock::now()).is_none() {
            shown = false;
            heartbeat::announce_now(ctx).await;
        }
        if due.release {
            go_on(ctx).await;
        }
        if due.ask && asked.elapsed() >= ASK_EVERY {
            asked = Instant::now();
            ask(ctx).await;
            continue;
        }
        if resumes.is_none() || looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            resumes = look(ctx, resumes).await.or(resumes);
        }
        let mut next = looked + LOOK_EVERY;
        if due.ask {
            next = next.min(asked + ASK_EVERY);
        }
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = ctx.pause.changed() => {}
        }
    }
}

async fn ask(ctx: &Context) -> Answer {
    let answer = ctx.upstream.ask(&ctx.credentials).await;
    ctx.pause.answered(&answer);
    answer
}

/// An outage is over: what waits for its end is ready now, and slots look for it.
async fn go_on(ctx: &Context) {
    match ctx.store.release_upstream().await {
        Ok(jobs) => info!(jobs, "the Messages API answers again"),
        Err(error) => tell(ctx, &error),
    }
    if let Err(error) = sweep::once(ctx).await {
        tell(ctx, &error);
    }
    heartbeat::announce_now(ctx).await;
}

/// Lifts the pauses when a person has done so since the last look. Gives how often it was done so far.
async fn look(ctx: &Context, before: Option<i64>) -> Option<i64> {
    let now = match ctx.store.resumes().await {
        Ok(resumes) => resumes,
        Err(error) => {
            tell(ctx, &error);
            return None;
        }
    };
    if before.is_some_and(|before| now > before) {
        info!("a person has lifted the pauses of the workers");
        ctx.pause.lift();
        go_on(ctx).await;
    }
    Some(now)
}

fn tell(ctx: &Context, error: &shared::storage::Error) {
    if !ctx.store.note(error) {
        warn!(error = %chain(error), "could not let waiting jobs go on; they do at their time");
    }
}
