//! Which conversation a run continues: the CLI keeps each as a transcript in the home of the job or session.

use crate::workspace::Folders;
use shared::id::JobId;
use shared::job::Lease;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use uuid::Uuid;

/// How much of a transcript is searched for a message. An attempt's own lines are its last.
const SEARCHED: u64 = 256 * 1024 * 1024;

const BLOCK: usize = 64 * 1024;

/// A conversation that can be continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Its Claude session.
    pub(super) claude_session_id: Uuid,
    /// Whether an earlier attempt of the same job was cut off in it.
    pub(super) interrupted: bool,
}

/// Whether the CLI has written a transcript of this Claude session.
pub(super) async fn is_written(folders: &Folders, claude_session_id: Uuid) -> bool {
    let path = folders.transcript(claude_session_id).await;
    path.is_ok_and(|path| path.is_some())
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
        let held = tokio::task::spawn_blocking(move || holds(&path, message.as_bytes(), SEARCHED)).await;
        if held.map_err(std::io::Error::other)?? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The Claude session that the job's session had come to, if nothing of it was found here: its folders are gone, or are
/// on another machine.
pub(super) fn lost(lease: &Lease, found: Option<&Found>) -> Option<String> {
    let of_session = lease
        .resume
        .iter()
        .find(|candidate| candidate.interrupted.is_none())?;
    found.is_none().then(|| of_session.claude_session_id.clone())
}

/// Whether the last `searched` bytes of the file hold the text. Read in blocks, since the agent could write the file:
/// it may have any size, and needn't have lines.
fn holds(path: &Path, text: &[u8], searched: u64) -> std::io::Result<bool> {
    let mut file = File::open(path)?;
    let skipped = file.metadata()?.len().saturating_sub(searched);
    file.seek(SeekFrom::Start(skipped))?;
    let mut file = file.take(searched);
    let mut block = vec![0; BLOCK + text.len()];
    // What may be the beginning of the text is kept at the front of the next block.
    let mut kept = 0;
    loop {
        let read = file.read(&mut block[kept..])?;
        if read == 0 {
            return Ok(false);
        }
        let filled = kept + read;
        if block[..filled].windows(text.len()).any(|window| window == text) {
            return Ok(true);
        }
        kept = filled.min(text.len() - 1);
        block.copy_within(filled - kept..filled, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_found_wherever_it_lies_between_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("transcript");
        let text = b"0123456789abcdef";
        for before in [0, 1, BLOCK - 8, BLOCK, BLOCK + 8, 2 * BLOCK + 15] {
            let mut content = vec![b'0'; before];
            content.extend_from_slice(text);
            std::fs::write(&path, &content).unwrap();
            assert!(holds(&path, text, SEARCHED).unwrap(), "{before}");
            content.pop();
            std::fs::write(&path, &content).unwrap();
            assert!(!holds(&path, text, SEARCHED).unwrap(), "{before}");
        }
    }

    #[test]
    fn a_huge_transcript_without_lines_is_searched_at_its_end_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("transcript");
        std::fs::write(&path, "early").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        // Takes no room on the disk.
        file.set_len(100 * SEARCHED).unwrap();
        let searched = 10 * BLOCK as u64;
        std::io::Write::write_all(&mut File::options().append(true).open(&path).unwrap(), b"late").unwrap();

        assert!(holds(&path, b"late", searched).unwrap());
        assert!(!holds(&path, b"early", searched).unwrap());
    }

    #[test]
    fn each_attempt_sends_a_message_with_an_id_of_its_own() {
        let job_id = JobId::new();
        assert_ne!(message_id(&job_id, 1), message_id(&job_id, 2));
        assert_eq!(message_id(&job_id, 2), message_id(&job_id, 2));
    }
}
