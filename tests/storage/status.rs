//! The table of statuses, and that the SQL obeys it.

use super::{NOW, World, again, failed, job};
use shared::job::{CancelReason, Ending, Job, JobStatus, Lease, RunOptions};
use shared::money::MicroUsd;
use tests::database::Db;

tests::both!(sql_changes_a_status_exactly_as_the_table_says);

/// Everything that changes a status.
#[derive(Clone, Copy, Debug)]
enum Change {
    Claim,
    FinishDone,
    FinishFailed,
    FinishCancelled,
    FinishAgain,
    FinishReleased,
    TakeLost,
    Cancel,
    EndWaitingFailed,
    EndWaitingCancelled,
}

const CHANGES: [Change; 10] = [
    Change::Claim,
    Change::FinishDone,
    Change::FinishFailed,
    Change::FinishCancelled,
    Change::FinishAgain,
    Change::FinishReleased,
    Change::TakeLost,
    Change::Cancel,
    Change::EndWaitingFailed,
    Change::EndWaitingCancelled,
];

impl Change {
    /// The status that it makes of those it applies to, and which those are.
    fn means(self) -> (JobStatus, JobStatus) {
        use JobStatus::{Cancelled, Done, Failed, Queued, Running};
        match self {
            Self::Claim => (Queued, Running),
            Self::FinishDone => (Running, Done),
            Self::FinishFailed => (Running, Failed),
            Self::FinishCancelled => (Running, Cancelled),
            Self::FinishAgain | Self::FinishReleased | Self::TakeLost => (Running, Queued),
            Self::Cancel | Self::EndWaitingCancelled => (Queued, Cancelled),
            Self::EndWaitingFailed => (Queued, Failed),
        }
    }

    async fn make(self, world: &World, job: &Job) {
        // A lease is only proof where storage made it; a test may forge one, to see that the SQL doesn't trust it.
        let lease = Lease {
            job: job.clone(),
            held_at: std::time::Instant::now(),
            message: String::new(),
            allowed_models: Vec::new(),
            options: RunOptions::default(),
            reserved: MicroUsd::ZERO,
            resume: Vec::new(),
            working_dir: None,
            endpoints: false,
        };
        let ending = match self {
            Self::Claim => {
                world.claim().await;
                return;
            }
            Self::TakeLost => {
                world.store.take_lost(job, job.attempt, 0, NOW).await.unwrap();
                return;
            }
            Self::Cancel => {
                world.cancel(job).await;
                return;
            }
            Self::EndWaitingFailed | Self::EndWaitingCancelled => {
                let ending = if matches!(self, Self::EndWaitingFailed) {
                    failed()
                } else {
                    Ending::Cancelled
                };
                let mut tx = world.store.begin().await.unwrap();
                tx.lock_lane(&job.key_id).await.unwrap();
                tx.end_waiting(job.job_id, &ending, CancelReason::User, NOW)
                    .await
                    .unwrap();
                tx.commit().await.unwrap();
                return;
            }
            Self::FinishDone => Ending::Done,
            Self::FinishFailed => failed(),
            Self::FinishCancelled => Ending::Cancelled,
            Self::FinishAgain => again(NOW),
            Self::FinishReleased => Ending::Released,
        };
        world.finish(&lease, ending).await;
    }
}

/// A job in this status.
async fn job_in(world: &World, status: JobStatus) -> Job {
    let key = world.key("a", 100).await;
    let stored = world.submit(job(&key)).await;
    if status != JobStatus::Queued {
        let lease = world.claim_job(&stored).await;
        match status {
            JobStatus::Done => drop(world.finish(&lease, Ending::Done).await),
            JobStatus::Failed => drop(world.finish(&lease, failed()).await),
            JobStatus::Cancelled => drop(world.finish(&lease, Ending::Cancelled).await),
            JobStatus::Queued | JobStatus::Running => {}
        }
    }
    let stored = world.job(stored.job_id).await;
    assert_eq!(stored.status, status);
    stored
}

async fn sql_changes_a_status_exactly_as_the_table_says(db: Db) {
    let world = World::new(db).await;
    let mut seen = Vec::new();
    for change in CHANGES {
        let (applies_to, becomes) = change.means();
        for from in JobStatus::ALL {
            let job = job_in(&world, from).await;
            change.make(&world, &job).await;
            let to = world.status(&job).await;
            let expected = if from == applies_to { becomes } else { from };
            assert_eq!(to, expected, "{change:?} of a {from:?} job");
            if to != from {
                seen.push((from, to));
            }
            // The next case begins with nothing to claim.
            world.cancel(&job).await;
        }
    }

    for from in JobStatus::ALL {
        for to in JobStatus::ALL {
            assert_eq!(
                seen.contains(&(from, to)),
                from.may_become(to),
                "{from:?} to {to:?}"
            );
        }
    }
    assert_eq!(world.faults().await, [""; 0]);
}
