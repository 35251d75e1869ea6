//! The tasks that serve the standard streams of a run.
//!
//! Standard output is read as fast as it comes, since a CLI that can't write may lose the end of its output: lines
//! wait in memory for the reader, up to [`MAX_WAITING`] in all, and only then is the CLI made to wait.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

/// A longer line of output is left out, with a warning: half a JSON text says nothing. The CLI's longest lines are
/// a tool's result and the answer's text, both far below it.
pub const MAX_LINE: usize = 16 * 1024 * 1024;

/// Bytes of output that may wait for the reader of a run.
pub const MAX_WAITING: usize = 32 * 1024 * 1024;

/// What each waiting line counts beside its bytes.
const LINE_OVERHEAD: usize = 64;

/// Bytes of standard error that are kept: the last ones.
pub const STDERR_TAIL: usize = 4096;

/// How long the pipes of an ended run are still read. Nobody is left to hold them open but a stranger.
const PIPE_DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A line of output, and the memory that it takes.
pub(super) type Line = (Vec<u8>, OwnedSemaphorePermit);

/// The tasks of one run. Each ends by itself when the run does.
pub(super) struct Pipes {
    stdin: Option<JoinHandle<()>>,
    stdout: Option<JoinHandle<()>>,
    stderr: Option<JoinHandle<String>>,
}

impl Pipes {
    /// Starts them: lines from `input` go to the CLI, and its own go to `output`.
    pub(super) fn start(
        guard: &mut Child,
        stdin: Option<ChildStdin>,
        input: mpsc::UnboundedReceiver<String>,
        output: mpsc::UnboundedSender<Line>,
    ) -> Self {
        Self {
            stdin: stdin.map(|pipe| tokio::spawn(write_lines(pipe, input))),
            stdout: guard
                .stdout
                .take()
                .map(|pipe| tokio::spawn(read_lines(pipe, output))),
            stderr: guard.stderr.take().map(|pipe| tokio::spawn(read_tail(pipe))),
        }
    }

    /// Waits for the last output of an ended run and returns the tail of its standard error.
    pub(super) async fn finish(self) -> String {
        if let Some(stdin) = self.stdin {
            stdin.abort();
        }
        if let Some(mut stdout) = self.stdout
            && tokio::time::timeout(PIPE_DRAIN_TIMEOUT, &mut stdout)
                .await
                .is_err()
        {
            stdout.abort();
        }
        let Some(mut stderr) = self.stderr else {
            return String::new();
        };
        if let Ok(tail) = tokio::time::timeout(PIPE_DRAIN_TIMEOUT, &mut stderr).await {
            return tail.unwrap_or_default();
        }
        stderr.abort();
        String::new()
    }
}

async fn write_lines(mut stdin: ChildStdin, mut lines: mpsc::UnboundedReceiver<String>) {
    while let Some(mut line) = lines.recv().await {
        if !line.ends_with('\n') {
            line.push('\n');
        }
        // The CLI has closed its input or is gone: its output says the rest.
        if stdin.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read_lines(stdout: impl AsyncRead + Unpin, lines: mpsc::UnboundedSender<Line>) {
    let room = Arc::new(Semaphore::new(MAX_WAITING));
    let mut reader = BufReader::with_capacity(64 * 1024, stdout);
    let mut line = Vec::new();
    let mut too_long = false;
    loop {
        let Ok(read) = reader.fill_buf().await else { return };
        let end = read.iter().position(|byte| *byte == b'\n');
        let part = &read[..end.unwrap_or(read.len())];
        if line.len() + part.len() > MAX_LINE {
            too_long = true;
            line = Vec::new();
        } else if !too_long {
            line.extend_from_slice(part);
        }
        let at_end = read.is_empty();
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_none() && !at_end {
            continue;
        }
        if too_long {
            tracing::warn!("a line of the CLI's output over {MAX_LINE} bytes was left out");
            too_long = false;
        } else if end.is_some() || !line.is_empty() {
            pass_on(std::mem::take(&mut line), &lines, &room).await;
        }
        if at_end {
            return;
        }
    }
}

/// Waits for room in memory. When nobody wants lines any more they are dropped, so that the CLI can go on writing.
async fn pass_on(line: Vec<u8>, lines: &mpsc::UnboundedSender<Line>, room: &Arc<Semaphore>) {
    let size = u32::try_from(line.len() + LINE_OVERHEAD).unwrap_or(u32::MAX);
    tokio::select! {
        permit = Arc::clone(room).acquire_many_owned(size) => {
            if let Ok(permit) = permit {
                let _ = lines.send((line, permit));
            }
        }
        () = lines.closed() => {}
    }
}

async fn read_tail(mut stderr: impl AsyncRead + Unpin) -> String {
    let mut tail = Vec::with_capacity(2 * STDERR_TAIL);
    let mut part = [0; STDERR_TAIL];
    while let Ok(read @ 1..) = stderr.read(&mut part).await {
        tail.extend_from_slice(&part[..read]);
        tail.drain(..tail.len().saturating_sub(STDERR_TAIL));
    }
    // The cut may have gone through a character.
    let start = tail
        .iter()
        .take(3)
        .take_while(|byte| **byte & 0b1100_0000 == 0b1000_0000)
        .count();
    String::from_utf8_lossy(&tail[start..]).into_owned()
}
