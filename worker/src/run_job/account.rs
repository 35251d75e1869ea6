//! What a run's end says about the account that all runs of this worker share.

use super::outcome::{ErrorCode, Verdict, When};
use crate::context::Context;
use crate::heartbeat;
use shared::clock;
use tracing::{error, warn};

/// What the account's answer means for the jobs that would be next. A pause is there for people to see before the job
/// that began it has ended.
pub(super) async fn note_account(ctx: &Context, verdict: &Verdict) {
    let pauses = match verdict {
        Verdict::Retry {
            when: When::At(at),
            message,
            ..
        } => {
            warn!("this worker claims nothing until {at}: {message}");
            ctx.pause.until(*at, message);
            true
        }
        Verdict::Failed {
            code: ErrorCode::AuthError,
            message,
        } => {
            let pauses = ctx.pause.refused(clock::now());
            if pauses {
                error!(
                    "this worker claims nothing for a minute, its credential was refused too often: {message}"
                );
            }
            pauses
        }
        // These say nothing about the account.
        Verdict::Cancelled | Verdict::Released | Verdict::Lost => false,
        Verdict::Done | Verdict::Failed { .. } | Verdict::Retry { .. } => {
            ctx.pause.accepted();
            false
        }
    };
    if pauses {
        heartbeat::announce_now(ctx).await;
    }
}
