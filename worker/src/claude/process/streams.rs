//! The tasks that serve the standard streams of a run.
//!
//! Standard output is read as fast as it comes, since a CLI that can't write may lose the end of its output: lines
//! wait in memory for the reader, up to [`MAX_WAITING`] in all, and only then is the CLI made to wait.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::claude::line::{OutputLine, ResultScanner};

/// The bytes of a longer line of output aren't kept: half a JSON text says nothing. The CLI's longest lines are a
/// tool's result and the answer's text, both far below it.
pub const MAX_LINE: usize = 16 * 1024 * 1024;

/// Bytes of output that may wait for the reader of a run.
pub const MAX_WAITING: usize = 32 * 1024 * 1024;

/// What each waiting line counts beside its bytes.
const LINE_OVERHEAD: usize = 64;

/// Bytes of standard error that are kept: the last ones.
pub const STDERR_TAIL: usize = 4096;

/// How long the streams of an ended run are still read. Nobody is left to hold them open but a stranger.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// This worker's ends of a run's standard streams.
///
/// They are pairs of sockets and not pipes: a pipe of the CLI can be opened by its path in `/proc` by whatever else the
/// agent runs, and written to in the CLI's name.
#[derive(Debug)]
pub(super) struct Streams {
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: UnixStream,
}

impl Streams {
    /// Both ends: this worker's, and those for standard input, output and error of the run.
    pub(super) fn new() -> io::Result<(Self, [Stdio; 3])> {
        let (stdin, its_stdin) = pair()?;
        let (stdout, its_stdout) = pair()?;
        let (stderr, its_stderr) = pair()?;
        Ok((
            Self {
                stdin,
                stdout,
                stderr,
            },
            [its_stdin, its_stdout, its_stderr],
        ))
    }
}

fn pair() -> io::Result<(UnixStream, Stdio)> {
    // The other end blocks, as programs expect of their standard streams.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, Stdio::from(OwnedFd::from(theirs))))
}

/// A line of output, and the memory that it takes.
pub(super) type Line = (OutputLine, OwnedSemaphorePermit);

/// The tasks of one run. Each ends by itself when the run does.
pub(super) struct StreamTasks {
    stdin: JoinHandle<()>,
    stdout: JoinHandle<()>,
    stderr: JoinHandle<String>,
}

impl StreamTasks {
    /// Starts them: lines from `input` go to the CLI, and its own go to `output`.
    pub(super) fn start(
        streams: Streams,
        input: mpsc::UnboundedReceiver<String>,
        output: mpsc::UnboundedSender<Line>,
    ) -> Self {
        Self {
            stdin: tokio::spawn(write_lines(streams.stdin, input)),
            stdout: tokio::spawn(read_lines(streams.stdout, output)),
            stderr: tokio::spawn(read_tail(streams.stderr)),
        }
    }

    /// Waits for the last output of an ended run and returns the tail of its standard error.
    pub(super) async fn finish(mut self) -> String {
        self.stdin.abort();
        if tokio::time::timeout(DRAIN_TIMEOUT, &mut self.stdout)
            .await
            .is_err()
        {
            self.stdout.abort();
        }
        if let Ok(tail) = tokio::time::timeout(DRAIN_TIMEOUT, &mut self.stderr).await {
            return tail.unwrap_or_default();
        }
        self.stderr.abort();
        String::new()
    }
}

async fn write_lines(mut stdin: impl AsyncWrite + Unpin, mut lines: mpsc::UnboundedReceiver<String>) {
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
    let mut too_long: Option<ResultScanner> = None;
    loop {
        let Ok(read) = reader.fill_buf().await else { return };
        let end = read.iter().position(|byte| *byte == b'\n');
        let part = &read[..end.unwrap_or(read.len())];
        if let Some(scanner) = &mut too_long {
            scanner.feed(part);
        } else if line.len() + part.len() > MAX_LINE {
            let scanner = too_long.insert(ResultScanner::default());
            scanner.feed(&std::mem::take(&mut line));
            scanner.feed(part);
        } else {
            line.extend_from_slice(part);
        }
        let at_end = read.is_empty();
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_none() && !at_end {
            continue;
        }
        if let Some(scanner) = too_long.take() {
            let may_be_result = scanner.may_be_result();
            pass_on(OutputLine::TooLong { may_be_result }, &lines, &room).await;
        } else if end.is_some() || !line.is_empty() {
            pass_on(OutputLine::Whole(std::mem::take(&mut line)), &lines, &room).await;
        }
        if at_end {
            return;
        }
    }
}

/// Waits for room in memory. When nobody wants lines any more they are dropped, so that the CLI can go on writing.
async fn pass_on(line: OutputLine, lines: &mpsc::UnboundedSender<Line>, room: &Arc<Semaphore>) {
    let bytes = match &line {
        OutputLine::Whole(bytes) => bytes.len(),
        OutputLine::TooLong { .. } => 0,
    };
    let size = u32::try_from(bytes + LINE_OVERHEAD).unwrap_or(u32::MAX);
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
