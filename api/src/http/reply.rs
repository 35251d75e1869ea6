//! Answers that went well: the envelope, tags for caches.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, LOCATION, RETRY_AFTER, VARY};
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use shared::clock::{self, Timestamp};
use std::io;
use sync_wrapper::SyncStream;
use warp::reply::{Reply, Response};

use crate::http::problem::Problem;
use crate::http::request::Request;

/// Who answered what, and when.
#[derive(Debug, Serialize)]
pub struct Meta<'r> {
    request_id: &'r str,
    timestamp: Timestamp,
    version: &'static str,
}

impl<'r> Meta<'r> {
    /// For the answer to this request, now.
    pub fn of(request: &'r Request) -> Self {
        Self {
            request_id: &request.id,
            timestamp: clock::now(),
            version: "v1",
        }
    }
}

#[derive(Serialize)]
struct Envelope<'r, T, P> {
    data: T,
    meta: Meta<'r>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pagination: Option<P>,
}

/// `{"data": …, "meta": …}`.
pub fn data<T: Serialize>(request: &Request, status: StatusCode, data: T) -> Result<Response, Problem> {
    json(
        status,
        &Envelope {
            data,
            meta: Meta::of(request),
            pagination: None::<()>,
        },
    )
}

/// `{"data": [...], "meta": …, "pagination": …}`.
pub fn list<T: Serialize, P: Serialize>(
    request: &Request,
    data: T,
    pagination: P,
) -> Result<Response, Problem> {
    json(
        StatusCode::OK,
        &Envelope {
            data,
            meta: Meta::of(request),
            pagination: Some(pagination),
        },
    )
}

/// The same, item by item: only one of them is in memory at a time. When one can't be had the answer breaks off, as
/// its status has been sent; `report` gets the reason.
pub fn long_list<T: Serialize + Send + 'static, P: Serialize>(
    request: &Request,
    items: impl Stream<Item = Result<T, Problem>> + Send + 'static,
    pagination: P,
    report: impl Fn(&Problem) + Send + 'static,
) -> Result<Response, Problem> {
    let empty: [(); 0] = [];
    let around = Envelope {
        data: empty,
        meta: Meta::of(request),
        pagination: Some(pagination),
    };
    long(&around, items, report)
}

/// The same in any JSON whose first list is empty: the items go there.
pub fn long<T: Serialize + Send + 'static>(
    around: &impl Serialize,
    items: impl Stream<Item = Result<T, Problem>> + Send + 'static,
    report: impl Fn(&Problem) + Send + 'static,
) -> Result<Response, Problem> {
    let around = serde_json::to_string(around).map_err(Problem::internal)?;
    // The first member is `data`, whose brackets the items go between.
    let (begin, end) = around
        .split_once("[]")
        .ok_or_else(|| Problem::internal("an envelope without data"))?;
    let (begin, end) = (format!("{begin}["), format!("]{end}"));
    let mut before = "";
    let items = items.map(move |item| {
        let item = item.and_then(|item| serde_json::to_string(&item).map_err(Problem::internal));
        let separator = std::mem::replace(&mut before, ",");
        item.map(|item| Bytes::from(format!("{separator}{item}")))
            .map_err(|problem| {
                report(&problem);
                io::Error::other(problem.code())
            })
    });
    let fixed = |text: String| stream::once(async { Ok(Bytes::from(text)) });
    let body = fixed(begin).chain(items).chain(fixed(end));
    let mut response = warp::reply::stream(SyncStream::new(Box::pin(body))).into_response();
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Any JSON, without an envelope.
pub fn json<T: Serialize>(status: StatusCode, body: &T) -> Result<Response, Problem> {
    let text = serde_json::to_vec(body).map_err(Problem::internal)?;
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Plain text.
pub fn text(status: StatusCode, text: String) -> Response {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

/// A status that needs no body: 204, 304.
pub fn empty(status: StatusCode) -> Response {
    let mut response = Response::default();
    *response.status_mut() = status;
    response
}

/// Headers that handlers add to an answer.
pub trait Headers: Sized {
    /// Sets one header. Values that no header can carry are left out.
    #[must_use]
    fn with(self, name: HeaderName, value: impl AsRef<str>) -> Self;

    /// Where the thing that was made or is worked on can be found.
    #[must_use]
    fn location(self, path: &str) -> Self {
        self.with(LOCATION, path)
    }

    /// When to ask again, in seconds.
    #[must_use]
    fn retry_after(self, seconds: u64) -> Self {
        self.with(RETRY_AFTER, seconds.to_string())
    }

    /// The tag of this state; with it the client may keep the answer if it asks again before using it.
    #[must_use]
    fn etag(self, tag: &str) -> Self {
        self.with(ETAG, tag).with(CACHE_CONTROL, "private, no-cache")
    }

    /// The tag of this state, on an answer that must not be kept: it holds a secret, or what
    /// changes without the tag.
    #[must_use]
    fn etag_unkept(self, tag: &str) -> Self {
        self.with(ETAG, tag).with(CACHE_CONTROL, "no-store")
    }

    /// The answer depends on this header of the request.
    #[must_use]
    fn varies_by(self, header: &'static str) -> Self;
}

impl Headers for Response {
    fn with(mut self, name: HeaderName, value: impl AsRef<str>) -> Self {
        if let Ok(value) = HeaderValue::from_str(value.as_ref()) {
            self.headers_mut().insert(name, value);
        }
        self
    }

    fn varies_by(mut self, header: &'static str) -> Self {
        self.headers_mut().append(VARY, HeaderValue::from_static(header));
        self
    }
}

/// `Prefer` was honoured like this.
pub const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// The id of the job that the answer is about.
pub const X_JOB_ID: HeaderName = HeaderName::from_static("x-job-id");

/// The weak tag of a version: what differs from answer to answer, such as `meta`, isn't part of it.
pub fn etag(version: i64) -> String {
    format!("W/\"{version}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_of_a_version_is_weak() {
        assert_eq!(etag(3), "W/\"3\"");
    }
}
