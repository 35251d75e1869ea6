//! Answers that went well: the envelope, links between pages, tags for caches.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, LINK, LOCATION, RETRY_AFTER, VARY};
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use sha2::{Digest, Sha256};
use shared::clock::{self, Timestamp};
use std::fmt;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use warp::reply::{Reply, Response};

use crate::problem::Problem;
use crate::request::Request;

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
/// its status has been sent.
pub fn long_list<T: Serialize + Send + 'static, P: Serialize>(
    request: &Request,
    items: impl Stream<Item = Result<T, Problem>> + Send + 'static,
    pagination: P,
) -> Result<Response, Problem> {
    let empty: [(); 0] = [];
    let around = Envelope {
        data: empty,
        meta: Meta::of(request),
        pagination: Some(pagination),
    };
    let around = serde_json::to_string(&around).map_err(Problem::internal)?;
    // The first member is `data`, whose brackets the items go between.
    let (begin, end) = around
        .split_once("[]")
        .ok_or_else(|| Problem::internal("an envelope without data"))?;
    let (begin, end) = (format!("{begin}["), format!("]{end}"));
    let context = request.context.clone();
    let mut before = "";
    let items = items.map(move |item| {
        let item = item.and_then(|item| serde_json::to_string(&item).map_err(Problem::internal));
        let separator = std::mem::replace(&mut before, ",");
        item.map(|item| Bytes::from(format!("{separator}{item}")))
            .map_err(|problem| problem.break_off(&context.store))
    });
    let fixed = |text: String| stream::once(async { Ok(Bytes::from(text)) });
    let body = fixed(begin).chain(items).chain(fixed(end));
    let mut response = warp::reply::stream(Exclusive::new(body)).into_response();
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

/// A stream that only one can poll at a time, which is all that a body needs to be.
pub struct Exclusive<S>(Mutex<Pin<Box<S>>>);

impl<S> Exclusive<S> {
    /// Wraps the stream.
    pub fn new(stream: S) -> Self {
        Self(Mutex::new(Box::pin(stream)))
    }
}

impl<S> fmt::Debug for Exclusive<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exclusive")
    }
}

impl<S: Stream> Stream for Exclusive<S> {
    type Item = S::Item;
    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        self.get_mut()
            .0
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()
            .poll_next(context)
    }
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

/// A place in a list: the position of the last item seen, bound to the filters under which it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(pub i64);

impl Cursor {
    /// As clients get it. They can't build one, and needn't.
    pub fn encode(self, filters: &str) -> String {
        let mut bytes = self.0.to_be_bytes().to_vec();
        bytes.extend_from_slice(&fingerprint(filters));
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The place that a client names; a problem if it isn't one of ours for these filters.
    pub fn decode(text: &str, filters: &str) -> Result<Self, Problem> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Problem::InvalidCursor)?;
        let bytes: [u8; 16] = bytes.try_into().map_err(|_| Problem::InvalidCursor)?;
        let (position, hash) = bytes.split_at(8);
        match position.try_into() {
            Ok(position) if hash == fingerprint(filters) => Ok(Self(i64::from_be_bytes(position))),
            _ => Err(Problem::InvalidCursor),
        }
    }
}

/// A place in a list whose items are found by a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextCursor(pub String);

impl TextCursor {
    /// As clients get it.
    pub fn encode(&self, filters: &str) -> String {
        let mut bytes = fingerprint(filters).to_vec();
        bytes.extend_from_slice(self.0.as_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The place that a client names; a problem if it isn't one of ours for these filters.
    pub fn decode(text: &str, filters: &str) -> Result<Self, Problem> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Problem::InvalidCursor)?;
        let (hash, place) = bytes.split_at_checked(8).ok_or(Problem::InvalidCursor)?;
        match std::str::from_utf8(place) {
            Ok(place) if hash == fingerprint(filters) && !place.contains('\0') => Ok(Self(place.to_owned())),
            _ => Err(Problem::InvalidCursor),
        }
    }
}

fn fingerprint(filters: &str) -> [u8; 8] {
    let digest: [u8; 32] = Sha256::digest(filters).into();
    [
        digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7],
    ]
}

/// Leaves `limit` of the items, of which one more was read if there are more: then the place of the last that is left.
pub fn more_than<T, P>(limit: i64, items: &mut Vec<T>, place: impl Fn(&T) -> P) -> Option<P> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = items.len() > limit;
    items.truncate(limit);
    items.last().filter(|_| more).map(place)
}

/// The `pagination` of a list that is read by cursor.
#[derive(Debug, Serialize)]
pub struct Pagination {
    limit: i64,
    has_more: bool,
    next_cursor: Option<String>,
}

impl Pagination {
    /// For a page of at most `limit` items, after which `next` follows.
    pub fn new(limit: i64, next: Option<String>) -> Self {
        Self {
            limit,
            has_more: next.is_some(),
            next_cursor: next,
        }
    }

    /// The `Link` to the next page: the address of this one with another cursor.
    pub fn link(&self, request: &Request, response: Response) -> Response {
        let Some(next) = &self.next_cursor else {
            return response;
        };
        let others = request.query().without("cursor");
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(others.iter()).append_pair("cursor", next);
        response.with(
            LINK,
            format!("<{}?{}>; rel=\"next\"", request.path(), query.finish()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_as_it_went() {
        for position in [0, 1, i64::MAX, -1] {
            let text = Cursor(position).encode("status=done");
            assert_eq!(Cursor::decode(&text, "status=done").unwrap(), Cursor(position));
        }
    }

    #[test]
    fn a_cursor_is_bound_to_its_filters_and_can_not_be_made_up() {
        let text = Cursor(7).encode("status=done");
        assert!(Cursor::decode(&text, "status=queued").is_err());
        for made_up in [
            "",
            "7",
            "AAAA",
            &text[1..],
            &format!("{text}A"),
            "!!!!!!!!!!!!!!!!!!!!!!",
        ] {
            assert!(Cursor::decode(made_up, "status=done").is_err(), "{made_up:?}");
        }
    }

    #[test]
    fn a_place_that_is_a_text_comes_back_as_it_went() {
        let text = TextCursor("key/env_1".to_owned()).encode("a");
        assert_eq!(TextCursor::decode(&text, "a").unwrap().0, "key/env_1");
        for made_up in ["", "7", "AAAA", &text[2..], "!!"] {
            assert!(TextCursor::decode(made_up, "a").is_err(), "{made_up:?}");
        }
        assert!(TextCursor::decode(&text, "b").is_err());
    }

    #[test]
    fn the_tag_of_a_version_is_weak() {
        assert_eq!(etag(3), "W/\"3\"");
    }
}
