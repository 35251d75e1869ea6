//! The files of workspaces over HTTP: of sessions, and of jobs without one.

mod archive;
mod download;
mod upload;

pub use download::SAFE_TYPES;

use http::{Method, StatusCode};
use serde::Serialize;
use shared::data_dir::DataDir;
use shared::files::{self, Entry, EntryKind, FilePath, Owner, Workspace};
use shared::job::Job;
use shared::session::Session;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{OnceCell, Semaphore};
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::page::PageNumbers;
use crate::http::problem::Problem;
use crate::http::reply::{self, Meta};
use crate::http::request::{Request, Segment, Tail};
use crate::jobs;
use crate::sessions;

/// How many looks at directories may go on at once: a network disk may not respond, and each holds a thread.
const MAX_LOOKS: usize = 16;
/// How many archives are made at once, and how many uploads arrive.
const MAX_ARCHIVES: usize = 4;
const MAX_UPLOADS: usize = 32;

/// What the requests for files share.
#[derive(Debug)]
pub struct Files {
    data_dir: OnceCell<PathBuf>,
    looks: Arc<Semaphore>,
    archives: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            data_dir: OnceCell::new(),
            looks: Arc::new(Semaphore::new(MAX_LOOKS)),
            archives: Arc::new(Semaphore::new(MAX_ARCHIVES)),
            uploads: Arc::new(Semaphore::new(MAX_UPLOADS)),
        }
    }
}

/// `/api/v1/sessions/{name}/files`.
pub async fn of_session(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let session = sessions::find(context, caller, name.as_ref()).await?;
    in_own_workspace(&session)?;
    let owner = Owner::Session(session.session_id);
    match request.method {
        Method::POST => upload::upload(context, request, owner, session.session_number).await,
        _ => list(context, request, owner).await,
    }
}

/// `/api/v1/sessions/{name}/files/{path}`.
pub async fn session_file(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
    path: &Tail,
) -> Result<Response, Problem> {
    let session = sessions::find(context, caller, name.as_ref()).await?;
    in_own_workspace(&session)?;
    let (owner, path) = (Owner::Session(session.session_id), file_path(path)?);
    if request.method != Method::DELETE {
        return download::download(context, request, owner, path).await;
    }
    look(context, move |data_dir| match Workspace::open(data_dir, owner)? {
        Some(workspace) => workspace.remove(&path),
        None => Err(files::Error::Missing),
    })
    .await?;
    Ok(reply::empty(StatusCode::NO_CONTENT))
}

/// `/api/v1/jobs/{id}/files`.
pub async fn of_job(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let job = find(context, caller, id).await?;
    list(context, request, owner(&job)).await
}

/// `/api/v1/jobs/{id}/files/{path}`.
pub async fn job_file(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
    path: &Tail,
) -> Result<Response, Problem> {
    let job = find(context, caller, id).await?;
    download::download(context, request, owner(&job), file_path(path)?).await
}

/// `/api/v1/jobs/{id}/archive`.
pub async fn archive(
    context: &Context,
    _request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    let job = find(context, caller, id).await?;
    archive::archive(context, owner(&job), &job.job_id.to_string()).await
}

/// A session that works in a directory of the operator's has no files of its own, and those aren't served.
fn in_own_workspace(session: &Session) -> Result<(), Problem> {
    match session.working_dir {
        Some(_) => Err(Problem::InvalidPath(
            "The session works in a directory of its own choice, whose files are not served".into(),
        )),
        None => Ok(()),
    }
}

/// The job of this id, if it exists for the caller and its workspace wasn't removed.
async fn find(context: &Context, caller: &Caller, id: &Segment) -> Result<Job, Problem> {
    let job = jobs::read::find(context, caller, id.id("Job")?).await?;
    if job.data_removed {
        return Err(Problem::DataRemoved);
    }
    Ok(job)
}

/// Whose workspace the job runs in.
fn owner(job: &Job) -> Owner {
    job.session_id.map_or(Owner::Job(job.job_id), Owner::Session)
}

fn file_path(tail: &Tail) -> Result<FilePath, Problem> {
    FilePath::parse_encoded(tail.as_str()).map_err(|why| Problem::InvalidPath(why.into()))
}

/// The directory that a query or a form names; the workspace itself is `None`.
fn directory(text: &str) -> Result<Option<FilePath>, Problem> {
    match text.trim_end_matches('/') {
        "" if text.len() <= 1 => Ok(None),
        "." => Ok(None),
        path => FilePath::parse(path)
            .map(Some)
            .map_err(|why| Problem::InvalidPath(why.into())),
    }
}

/// An entry as clients see it.
#[derive(Debug, Serialize)]
struct EntryView {
    name: String,
    path: String,
    #[serde(rename = "type")]
    kind: &'static str,
    size: Option<u64>,
}

impl From<Entry> for EntryView {
    fn from(entry: Entry) -> Self {
        Self {
            name: entry.path.rsplit('/').next().unwrap_or_default().to_owned(),
            path: entry.path,
            kind: match entry.kind {
                EntryKind::Directory => "directory",
                EntryKind::File => "file",
            },
            size: entry.size,
        }
    }
}

/// A page of a directory, as clients of the Python service know it.
#[derive(Serialize)]
struct Page<'r> {
    data: Vec<EntryView>,
    path: &'r str,
    /// Whether the directory has more entries than are read.
    truncated: bool,
    meta: Meta<'r>,
    pagination: PageNumbers,
}

/// `GET …/files`: a page of a directory, by path.
async fn list(context: &Context, request: &Request, owner: Owner) -> Result<Response, Problem> {
    let query = request.query();
    let (page, limit) = PageNumbers::asked(&query, 100)?;
    let recursive = query
        .value("recursive", |word| {
            crate::http::request::fields::choice(&["true", "false"])(word.into())
        })?
        .is_some_and(|word| word == "true");
    let directory = directory(query.text("path").unwrap_or_default())?;
    let (skip, take) = PageNumbers::range(page, limit);
    let asked = directory.clone();
    let listing = look(context, move |data_dir| match Workspace::open(data_dir, owner)? {
        Some(workspace) => workspace.list(asked.as_ref(), recursive, skip, take).map(Some),
        None if asked.is_none() => Ok(None),
        None => Err(files::Error::Missing),
    });
    // A job that hasn't begun has no workspace yet.
    let listing = match listing.await {
        Err(Problem::NoSuch(_)) if directory.is_none() => None,
        Err(Problem::NoSuch(_)) => return Err(Problem::NoSuch("Directory")),
        listing => listing?,
    };
    let (entries, total, truncated) = listing
        .map(|listing| (listing.entries, listing.total, listing.truncated))
        .unwrap_or_default();
    reply::json(
        StatusCode::OK,
        &Page {
            data: entries.into_iter().map(EntryView::from).collect(),
            path: directory.as_ref().map(FilePath::as_str).unwrap_or_default(),
            truncated,
            meta: Meta::of(request),
            pagination: PageNumbers::new(i64::try_from(total).unwrap_or(i64::MAX), page, limit),
        },
    )
}

/// Looks at the file system, in a thread of its own, with the path of `DATA_DIR`.
async fn look<T: Send + 'static>(
    context: &Context,
    what: impl FnOnce(&Path) -> files::Result<T> + Send + 'static,
) -> Result<T, Problem> {
    let data_dir = data_dir(context)
        .await?
        .ok_or(Problem::NoSuch("File"))?
        .to_owned();
    let permit = Arc::clone(&context.files.looks).acquire_owned().await;
    let looked = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        what(&data_dir)
    });
    Ok(looked.await.map_err(Problem::internal)??)
}

/// The path of `DATA_DIR`, once it is sure that it is the folder of this database; `None` if there is none yet. It is a
/// worker that makes it: an API process on another machine could only make the wrong one.
async fn data_dir(context: &Context) -> Result<Option<&PathBuf>, Problem> {
    let known = &context.files.data_dir;
    if let Some(path) = known.get() {
        return Ok(Some(path));
    }
    let store = &context.store;
    let (instance_id, id) = (store.instance_id().await?, store.data_dir_id().await?);
    let Some(id) = id else { return Ok(None) };
    let path = context.config.data_dir.clone();
    let opened = tokio::task::spawn_blocking(move || DataDir::existing(&path, &instance_id, &id));
    let opened = opened.await.map_err(Problem::internal)?;
    let folder = opened.map_err(|error| Problem::Unavailable {
        detail: "This API process can't use the DATA_DIR of the workers; its log says why",
        source: Some(Box::new(error)),
    })?;
    Ok(Some(known.get_or_init(|| async { folder.path }).await))
}

impl From<files::Error> for Problem {
    fn from(error: files::Error) -> Self {
        match error {
            files::Error::Missing => Self::NoSuch("File"),
            files::Error::Refused(why) => Self::InvalidPath(why.into()),
            files::Error::DiskFull(_) => Self::Unavailable {
                detail: "The disk of the workspaces is full",
                source: Some(Box::new(error)),
            },
            files::Error::Io(_) => Self::Internal(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_itself_has_three_names() {
        for text in ["", ".", "/"] {
            assert!(directory(text).unwrap().is_none(), "{text}");
        }
        assert_eq!(directory("a/b/").unwrap().unwrap().as_str(), "a/b");
        for text in ["//", "..", "/a", "a/../b", ".git"] {
            assert!(matches!(directory(text), Err(Problem::InvalidPath(_))), "{text}");
        }
    }
}
