//! A file as an answer: whole, a part of it, or only that it hasn't changed.

use futures_util::StreamExt;
use http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE,
};
use http::{HeaderMap, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use shared::files::{self, FilePath, OpenFile, Owner, Workspace};
use std::io::{Seek, SeekFrom};
use std::time::{Duration, SystemTime};
use sync_wrapper::SyncStream;
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;
use warp::reply::{Reply, Response};

use crate::context::Context;
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers};
use crate::http::request::{Request, headers};

/// What is read of a file at a time, in bytes.
const CHUNK: usize = 64 * 1024;

/// Types that a browser may be told, since it can do nothing with them but show them; all others are bytes. JSON is
/// missing, because clients take an answer of that type for one of the API.
pub const SAFE_TYPES: [(&str, &str); 15] = [
    ("txt", "text/plain; charset=utf-8"),
    ("log", "text/plain; charset=utf-8"),
    ("md", "text/markdown; charset=utf-8"),
    ("csv", "text/csv; charset=utf-8"),
    ("pdf", "application/pdf"),
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("gif", "image/gif"),
    ("webp", "image/webp"),
    ("mp3", "audio/mpeg"),
    ("mp4", "video/mp4"),
    ("zip", "application/zip"),
    ("gz", "application/gzip"),
    ("tar", "application/x-tar"),
];

/// `GET …/files/{path}`.
pub(super) async fn download(
    context: &Context,
    request: &Request,
    owner: Owner,
    path: FilePath,
) -> Result<Response, Problem> {
    let name = path.name().to_owned();
    let open = super::look(context, move |data_dir| match Workspace::open(data_dir, owner)? {
        Some(workspace) => workspace.open_file(&path),
        None => Err(files::Error::Missing),
    });
    answer(&request.headers, open.await?, &name)
}

fn answer(asked: &HeaderMap, open: OpenFile, name: &str) -> Result<Response, Problem> {
    let tag = format!("\"{}\"", open.tag);
    let described = |response: Response| {
        response
            .etag(&tag)
            .with(LAST_MODIFIED, httpdate::fmt_http_date(open.modified))
            .with(ACCEPT_RANGES, "bytes")
    };
    if is_known(asked, &tag, open.modified) {
        return Ok(described(reply::empty(StatusCode::NOT_MODIFIED)));
    }
    let (mut file, size) = (open.file, open.size);
    let part = match headers::text(asked, RANGE.as_str()) {
        Some(range) if is_current(asked, &tag, open.modified) => {
            Part::of(range, size).map_err(|Unsatisfiable| Problem::RangeNotSatisfiable(size))?
        }
        _ => None,
    };
    let (status, begin, length) = match part {
        Some(part) => (
            StatusCode::PARTIAL_CONTENT,
            part.first,
            part.last - part.first + 1,
        ),
        None => (StatusCode::OK, 0, size),
    };
    file.seek(SeekFrom::Start(begin))
        .map_err(|error| Problem::from(files::Error::from(error)))?;
    let content = tokio::fs::File::from_std(file).take(length);
    let content = ReaderStream::with_capacity(content, CHUNK).boxed();
    let mut response = warp::reply::stream(SyncStream::new(content)).into_response();
    *response.status_mut() = status;
    let response = described(response)
        .with(CONTENT_LENGTH, length.to_string())
        .with(CONTENT_TYPE, content_type(name))
        .with(CONTENT_DISPOSITION, attachment(name));
    Ok(match part {
        Some(part) => response.with(
            CONTENT_RANGE,
            format!("bytes {}-{}/{size}", part.first, part.last),
        ),
        None => response,
    })
}

/// Whether the client has this state of the file.
fn is_known(asked: &HeaderMap, tag: &str, modified: SystemTime) -> bool {
    if asked.contains_key(IF_NONE_MATCH) {
        return headers::matches_etag(asked, tag);
    }
    date(asked, IF_MODIFIED_SINCE.as_str()).is_some_and(|since| whole_seconds(modified) <= since)
}

/// Whether a part of this state is what the client wants: it may have said of which state it has the rest.
fn is_current(asked: &HeaderMap, tag: &str, modified: SystemTime) -> bool {
    match headers::text(asked, IF_RANGE.as_str()) {
        None => true,
        Some(known) if known.starts_with('"') => known == tag,
        Some(known) if known.starts_with("W/") => false,
        Some(_) => date(asked, IF_RANGE.as_str()) == Some(whole_seconds(modified)),
    }
}

fn date(asked: &HeaderMap, name: &str) -> Option<SystemTime> {
    httpdate::parse_http_date(headers::text(asked, name)?).ok()
}

/// The time as a header says it.
fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// The first and the last byte of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    first: u64,
    last: u64,
}

/// The file has no byte of the part.
#[derive(Debug, PartialEq, Eq)]
struct Unsatisfiable;

impl Part {
    /// The part that `Range` asks for; `None` for what needn't be honoured: another unit, several parts, nonsense.
    fn of(range: &str, size: u64) -> Result<Option<Self>, Unsatisfiable> {
        let Some((first, last)) = range
            .strip_prefix("bytes=")
            .filter(|parts| !parts.contains(','))
            .and_then(|part| part.trim().split_once('-'))
        else {
            return Ok(None);
        };
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            // What has too many digits lies behind every file.
            digits.then(|| text.parse::<u64>().unwrap_or(u64::MAX))
        };
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first > last => Ok(None),
            (Some(first), _) if !last.is_empty() && number(last).is_none() => {
                let _ = first;
                Ok(None)
            }
            (Some(first), _) if first >= size => Err(Unsatisfiable),
            (Some(first), last) => Ok(Some(Self {
                first,
                last: last.unwrap_or(u64::MAX).min(size - 1),
            })),
            (None, Some(length)) if first.is_empty() => {
                if length == 0 || size == 0 {
                    return Err(Unsatisfiable);
                }
                Ok(Some(Self {
                    first: size.saturating_sub(length),
                    last: size - 1,
                }))
            }
            _ => Ok(None),
        }
    }
}

fn content_type(name: &str) -> &'static str {
    let ending = name
        .rsplit_once('.')
        .map(|(_, ending)| ending.to_ascii_lowercase());
    ending
        .and_then(|ending| SAFE_TYPES.into_iter().find(|(known, _)| *known == ending))
        .map_or("application/octet-stream", |(_, content_type)| content_type)
}

/// Makes a browser store the file instead of showing it: under its name as it is, and for old ones in ASCII.
pub(super) fn attachment(name: &str) -> String {
    /// RFC 8187, `attr-char`.
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'.')
        .remove(b'-')
        .remove(b'_')
        .remove(b'~');
    let plain = name
        .chars()
        .map(|char| {
            if char.is_ascii_graphic() && !"\"\\%".contains(char) {
                char
            } else {
                '_'
            }
        })
        .collect::<String>();
    let encoded = utf8_percent_encode(name, ENCODED);
    format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_cut_to_what_the_file_has() {
        let part = |first, last| Ok(Some(Part { first, last }));
        for (range, outcome) in [
            ("bytes=0-0", part(0, 0)),
            ("bytes=2-5", part(2, 5)),
            ("bytes=7-", part(7, 9)),
            ("bytes=7-99999999999999999999999", part(7, 9)),
            ("bytes=-3", part(7, 9)),
            ("bytes=-30", part(0, 9)),
            ("bytes=10-", Err(Unsatisfiable)),
            ("bytes=-0", Err(Unsatisfiable)),
            ("bytes=99999999999999999999999-", Err(Unsatisfiable)),
            ("bytes=5-2", Ok(None)),
            ("bytes=0-1,3-4", Ok(None)),
            ("bytes=", Ok(None)),
            ("bytes=-", Ok(None)),
            ("bytes=a-b", Ok(None)),
            ("bytes=1-b", Ok(None)),
            ("bytes=--1", Ok(None)),
            ("lines=0-1", Ok(None)),
        ] {
            assert_eq!(Part::of(range, 10), outcome, "{range}");
        }
        assert_eq!(Part::of("bytes=0-", 0), Err(Unsatisfiable));
        assert_eq!(Part::of("bytes=-1", 0), Err(Unsatisfiable));
    }

    #[test]
    fn what_a_browser_could_run_is_bytes() {
        for name in [
            "a.html", "a.svg", "a.XML", "a.xhtml", "a.js", "a", "a.html.", "html", "a.md.htm",
        ] {
            assert_eq!(content_type(name), "application/octet-stream", "{name}");
        }
        assert_eq!(content_type("a.PNG"), "image/png");
    }

    #[test]
    fn a_name_can_end_no_header() {
        assert_eq!(
            attachment("a\"b; c.txt"),
            "attachment; filename=\"a_b__c.txt\"; filename*=UTF-8''a%22b%3B%20c.txt".replace("b__c", "b;_c")
        );
        assert_eq!(
            attachment("ü.txt"),
            "attachment; filename=\"_.txt\"; filename*=UTF-8''%C3%BC.txt"
        );
    }
}
