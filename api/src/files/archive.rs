//! A whole workspace as a compressed archive, made while it is sent: no part of it is stored, and little is in memory.

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::stream;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use shared::files::{self, Found, OpenFile, Owner, Workspace};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use sync_wrapper::SyncStream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;
use warp::reply::{Reply, Response};

use super::download::attachment;
use crate::context::Context;
use crate::http::problem::Problem;
use crate::http::reply::Headers;

/// How many entries of a workspace are read for an archive.
const MAX_ENTRIES: usize = 50_000;
/// The sizes of its files together, in bytes: a file with holes says that it is as large as it likes.
const MAX_BYTES: u64 = 10 * 1024 * 1024 * 1024;
/// What is sent at a time.
const CHUNK: usize = 64 * 1024;
/// A client that takes nothing for so long has left.
const STALLED_AFTER: Duration = Duration::from_mins(1);

/// `GET …/archive`: all files as `.tar.gz`, also hidden ones, but no links, no `.git` and nothing else than regular
/// files. `name` is its name without the ending.
pub(super) async fn archive(context: &Context, owner: Owner, name: &str) -> Result<Response, Problem> {
    let Ok(permit) = Arc::clone(&context.files.archives).try_acquire_owned() else {
        return Err(Problem::Unavailable {
            detail: "Too many archives are being made; try again",
            source: None,
        });
    };
    let look = super::look(context, move |data_dir| {
        let workspace = Workspace::open(data_dir, owner)?.ok_or(files::Error::Missing)?;
        let (files, truncated) = workspace.files(MAX_ENTRIES)?;
        Ok((workspace, files, truncated))
    });
    let (workspace, files, truncated) = look.await.map_err(|problem| match problem {
        Problem::NoSuch(_) => Problem::NoSuch("Workspace"),
        problem => problem,
    })?;
    let size = files
        .iter()
        .fold(0_u64, |sum, file| sum.saturating_add(file.size));
    if truncated || size > MAX_BYTES {
        return Err(Problem::ArchiveTooLarge);
    }
    let (sender, receiver) = mpsc::channel(4);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let sender = Sender { sender, runtime };
        if let Err(error) = write(&workspace, &files, sender.clone()) {
            // The client sees that the answer broke off.
            tracing::debug!(%error, "an archive broke off");
            let _ = sender.send(Err(error));
        }
    });
    let content = stream::unfold(receiver, |mut receiver| async {
        let chunk: io::Result<Bytes> = receiver.recv().await?;
        Some((chunk, receiver))
    });
    let response = warp::reply::stream(SyncStream::new(Box::pin(content))).into_response();
    Ok(response
        .with(CONTENT_TYPE, "application/gzip")
        .with(CONTENT_DISPOSITION, attachment(&format!("{name}.tar.gz"))))
}

fn write(workspace: &Workspace, files: &[Found], sender: Sender) -> io::Result<()> {
    let compressed = GzEncoder::new(BufWriter::with_capacity(CHUNK, sender), Compression::fast());
    let mut archive = tar::Builder::new(compressed);
    for found in files {
        // What is gone by now, or isn't a regular file any more, or can't be read, is left out.
        let Ok(open) = workspace.open_found(found) else {
            continue;
        };
        append(&mut archive, &found.path, open)?;
    }
    archive.into_inner()?.finish()?.into_inner()?.flush()
}

fn append(archive: &mut tar::Builder<impl Write>, path: &str, open: OpenFile) -> io::Result<()> {
    let mode = open.file.metadata()?.permissions().mode();
    let modified = open.modified.duration_since(SystemTime::UNIX_EPOCH);
    let mut header = tar::Header::new_gnu();
    header.set_size(open.size);
    header.set_mode(if mode & 0o100 == 0 { 0o644 } else { 0o755 });
    header.set_mtime(modified.unwrap_or_default().as_secs());
    // A file that became shorter is filled up, as its size has been said.
    let content = open.file.chain(io::repeat(0)).take(open.size);
    archive.append_data(&mut header, path, content)
}

/// Sends what is written to it. Whoever writes waits while the client doesn't read.
#[derive(Clone)]
struct Sender {
    sender: mpsc::Sender<io::Result<Bytes>>,
    runtime: Handle,
}

impl Sender {
    fn send(&self, chunk: io::Result<Bytes>) -> io::Result<()> {
        let sent = self
            .runtime
            .block_on(timeout(STALLED_AFTER, self.sender.send(chunk)));
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(Ok(Bytes::copy_from_slice(bytes)))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
