//! Which conversation a run continues: the CLI keeps each as a transcript in the home of the job or session.

use crate::workspace::Folders;
use shared::id::JobId;
use shared::job::Lease;
use uuid::Uuid;

/// A conversation that can be continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Its Claude session.
    pub(super) claude_session_id: Uuid,
    /// Whether an earlier attempt of the same job was cut off in it.
    pub(super) interrupted: bool,
}

/// Proof that a transcript is there.
pub(super) struct Transcript;

impl Transcript {
    /// The transcript of this Claude session, if the CLI has written one.
    pub(super) async fn of(folders: &Folders, claude_session_id: Uuid) -> Option<Self> {
        let path = folders.transcript(claude_session_id).await;
        path.ok().flatten().map(|_| Self)
    }
}

/// The id of the message that an attempt sends: it tells in a transcript whether the message arrived.
pub(super) fn message_id(job_id: &JobId, attempt: i64) -> Uuid {
    let job = job_id.to_string();
    let id = Uuid::try_parse(job.trim_start_matches("job_")).unwrap_or_default();
    Uuid::from_u128(id.as_u128() ^ u128::from(attempt.unsigned_abs()))
}

/// The first of the lease's candidates whose transcript is there; for an attempt of the same job it must hold the
/// job's message, else nothing was done in it that would be worth continuing.
pub(super) async fn find(folders: &Folders, lease: &Lease) -> std::io::Result<Option<Found>> {
    for candidate in &lease.resume {
        let Ok(claude_session_id) = Uuid::try_parse(&candidate.claude_session_id) else {
            continue;
        };
        let Some(path) = folders.transcript(claude_session_id).await? else {
            continue;
        };
        let found = Found {
            claude_session_id,
            interrupted: candidate.interrupted.is_some(),
        };
        let Some(attempt) = candidate.interrupted else {
            return Ok(Some(found));
        };
        let message = message_id(&lease.job.job_id, attempt).to_string();
        if holds(&path, &message).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Whether the file holds the text. Read as a stream: a transcript may have many megabytes.
async fn holds(path: &std::path::Path, text: &str) -> std::io::Result<bool> {
    use tokio::io::AsyncBufReadExt;
    let mut lines = tokio::io::BufReader::new(tokio::fs::File::open(path).await?).split(b'\n');
    let text = text.as_bytes();
    while let Some(line) = lines.next_segment().await? {
        if line.windows(text.len()).any(|window| window == text) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_attempt_sends_a_message_with_an_id_of_its_own() {
        let job_id = JobId::new();
        assert_ne!(message_id(&job_id, 1), message_id(&job_id, 2));
        assert_eq!(message_id(&job_id, 2), message_id(&job_id, 2));
    }
}
