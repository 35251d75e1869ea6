//! A file that a client sends, as a form with parts. It is written where no agent sees it while it arrives, and appears in
//! the workspace whole.

use http::StatusCode;
use http::header::CONTENT_TYPE;
use multer::{Constraints, Field, Multipart, SizeLimit};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::Serialize;
use shared::files::{self, FilePath, Owner, Upload};
use std::sync::Arc;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use warp::reply::Response;

use crate::context::Context;
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers};
use crate::http::request::fields::Fault;
use crate::http::request::{Request, headers, in_query, invalid};

/// The largest file, in bytes.
const MAX_FILE: usize = 10 * 1024 * 1024;
/// What may be around it.
const MAX_AROUND: usize = 64 * 1024;
/// The longest text of the part `path`, in bytes.
const MAX_PATH: u64 = 4_096;
/// How many times longer than another body an upload may take.
const PATIENCE: u32 = 4;

/// What is percent-encoded in the path of `Location`.
const ENCODED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}');

/// What was stored, as clients of the Python service know it.
#[derive(Debug, Serialize)]
struct Stored<'p> {
    path: &'p str,
    size: u64,
    name: &'p str,
}

/// What the form holds.
#[derive(Default)]
struct Form {
    /// The file, its size and the name that the client gave it.
    file: Option<(Upload, u64, String)>,
    path: Option<String>,
}

/// `POST /sessions/{s}/files`.
pub(super) async fn upload(
    context: &Context,
    request: &Request,
    owner: Owner,
    session_number: i64,
) -> Result<Response, Problem> {
    if !headers::is_plain(&request.headers) {
        return Err(Problem::UnsupportedEncoding);
    }
    let boundary = headers::text(&request.headers, CONTENT_TYPE.as_str())
        .and_then(|value| multer::parse_boundary(value).ok())
        .filter(|boundary| (1..=70).contains(&boundary.len()))
        .ok_or(Problem::NotMultipart)?;
    let Ok(_permit) = Arc::clone(&context.files.uploads).try_acquire_owned() else {
        return Err(Problem::Unavailable {
            detail: "Too many files are being uploaded; try again",
            source: None,
        });
    };
    if super::data_dir(context).await?.is_none() {
        return Err(Problem::Unavailable {
            detail: "No worker has started yet, so there is no place for files; try again",
            source: None,
        });
    }
    let receive = receive(context, request, owner, boundary);
    let received = timeout(context.config.body_timeout * PATIENCE, receive).await;
    let form = received.unwrap_or(Err(Problem::TooSlow))?;
    let (upload, size, name) = form
        .file
        .ok_or_else(|| invalid("body -> file", "Field required", "missing"))?;
    let path = destination(request.query().text("path"), form.path.as_deref(), &name)?;
    let placed = path.clone();
    super::look(context, move |_| upload.place(&placed)).await?;
    let stored = Stored {
        path: path.as_str(),
        size,
        name: path.name(),
    };
    let response = reply::data(request, StatusCode::CREATED, stored)?;
    let path = utf8_percent_encode(path.as_str(), ENCODED);
    Ok(response.location(&format!("/api/v1/sessions/{session_number}/files/{path}")))
}

/// Reads the form to its end. What was written of the file is removed if that fails.
async fn receive(
    context: &Context,
    request: &Request,
    owner: Owner,
    boundary: String,
) -> Result<Form, Problem> {
    let sizes = SizeLimit::new()
        .whole_stream((MAX_FILE + MAX_AROUND) as u64)
        .per_field(MAX_FILE as u64)
        .for_field("path", MAX_PATH);
    let constraints = Constraints::new().size_limit(sizes);
    let body = request.stream(MAX_FILE + MAX_AROUND)?;
    let mut parts = Multipart::with_constraints(body, boundary, constraints);
    let mut form = Form::default();
    while let Some(part) = parts.next_field().await.map_err(unreadable)? {
        let name = part.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "file" if form.file.is_none() => form.file = Some(store(context, owner, part).await?),
            "path" if form.path.is_none() => form.path = Some(part.text().await.map_err(unreadable)?),
            "file" | "path" => {
                return Err(invalid(
                    &format!("body -> {name}"),
                    "The part is there twice; send one file a request",
                    "too_long",
                ));
            }
            other => {
                let other = other.chars().take(100).collect::<String>();
                return Err(invalid(
                    &format!("body -> {other}"),
                    "Extra inputs are not permitted; the parts are `file` and `path`",
                    "extra_forbidden",
                ));
            }
        }
    }
    Ok(form)
}

/// Writes the file while it arrives.
async fn store(
    context: &Context,
    owner: Owner,
    mut part: Field<'_>,
) -> Result<(Upload, u64, String), Problem> {
    let name = part.file_name().unwrap_or_default();
    // Some clients send their own path, with the separators of their system.
    let name = name.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
    let failed = |error: std::io::Error| Problem::from(files::Error::from(error));
    let upload = super::look(context, move |data_dir| Upload::begin(data_dir, owner)).await?;
    let mut file = File::from_std(upload.file.try_clone().map_err(failed)?);
    let mut size = 0;
    while let Some(chunk) = part.chunk().await.map_err(unreadable)? {
        file.write_all(&chunk).await.map_err(failed)?;
        size += chunk.len() as u64;
    }
    file.flush().await.map_err(failed)?;
    Ok((upload, size, name))
}

/// Where the file goes: `query` names a directory; `form` a path, or a directory if it ends in a slash.
fn destination(query: Option<&str>, form: Option<&str>, name: &str) -> Result<FilePath, Problem> {
    let refused = |why: &'static str| Problem::InvalidPath(why.into());
    let name = if name.is_empty() { "upload" } else { name };
    let directory = match (query, form.filter(|path| !path.is_empty())) {
        (Some(_), Some(_)) => {
            let fault = Fault::value("Give the path either in the query or in the form");
            return Err(Problem::Invalid(in_query("path", vec![fault])));
        }
        (None, Some(path)) if !path.ends_with('/') => return FilePath::parse(path).map_err(refused),
        (None, Some(path)) => path,
        (Some(path), None) => path,
        (None, None) => "",
    };
    match super::directory(directory)? {
        Some(directory) => directory.join(name).map_err(refused),
        None => FilePath::parse(name).map_err(refused),
    }
}

/// What is wrong with a form that can't be read.
fn unreadable(error: multer::Error) -> Problem {
    match error {
        multer::Error::FieldSizeExceeded { field_name, .. } if field_name.as_deref() == Some("path") => {
            invalid(
                "body -> path",
                "String should have at most 4096 bytes",
                "string_too_long",
            )
        }
        multer::Error::FieldSizeExceeded { .. } | multer::Error::StreamSizeExceeded { .. } => {
            Problem::TooLarge(MAX_FILE)
        }
        _ => Problem::BadRequest("The multipart body broke off or is not well-formed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_name_a_destination_have_their_own_meaning() {
        for (query, form, name, expected) in [
            (None, None, "a.txt", "a.txt"),
            (None, None, "", "upload"),
            (Some("d"), None, "a.txt", "d/a.txt"),
            (Some("/"), None, "a.txt", "a.txt"),
            (Some("d/e/"), Some(""), "a.txt", "d/e/a.txt"),
            (None, Some("d/b.txt"), "a.txt", "d/b.txt"),
            (None, Some("d/"), "a.txt", "d/a.txt"),
        ] {
            let path = destination(query, form, name).unwrap();
            assert_eq!(path.as_str(), expected);
        }
        for (query, form, name) in [
            (None, None, ".."),
            (None, None, ".env"),
            (None, None, "a\nb"),
            (None, Some("../x"), "a"),
            (None, Some("/etc/x"), "a"),
            (None, Some("x/.git/hooks/post-checkout"), "a"),
            (Some(".."), None, "a"),
            (Some("%2e%2e/.."), None, "a"),
        ] {
            let refused = destination(query, form, name);
            assert!(
                matches!(refused, Err(Problem::InvalidPath(_))),
                "{query:?} {form:?} {name:?}"
            );
        }
        assert!(matches!(
            destination(Some("a"), Some("b"), "c"),
            Err(Problem::Invalid(_))
        ));
    }
}
