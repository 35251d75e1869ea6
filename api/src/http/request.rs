//! A request: its head, and a body that is read late and never beyond its limit.

pub mod fields;
pub mod headers;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use http::request::Parts;
use http::{HeaderMap, Method, Uri, header};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use serde_json::Value;
use sha2::{Digest, Sha256};
use shared::clock::Timestamp;
use shared::key::hex;
use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, ready};
use std::time::Duration;
use tokio::time::timeout;

use crate::http::problem::{FieldFault, Problem};
use fields::{Fault, Fields};

/// The largest JSON body, in bytes.
pub const BODY_LIMIT: usize = 2 * 1024 * 1024;
/// What is read, and thrown away, of a body that nobody wanted, so that the client sees the answer and not a
/// connection that was reset under its hands.
const LEFTOVER_LIMIT: usize = 16 * 1024 * 1024;
const LEFTOVER_WITHIN: Duration = Duration::from_secs(3);

/// One request. Shared by the edge, which measures and logs it, and the handler that answers it.
#[derive(Debug)]
pub struct Request {
    /// The method; HEAD is GET here, as the server leaves the body out by itself.
    pub method: Method,
    /// The headers, as they came.
    pub headers: HeaderMap,
    /// `X-Request-ID` of the client, or 16 hex digits of our own.
    pub id: String,
    /// The other end of the connection.
    pub peer: SocketAddr,
    uri: Uri,
    body_timeout: Duration,
    body: Mutex<Unread>,
}

/// The part of the body that hasn't been read.
#[derive(Debug)]
struct Unread {
    body: Option<Incoming>,
    /// The client waits for "100 Continue" and has sent nothing yet.
    held_back: bool,
}

impl Request {
    /// The request that came from `peer`, whose body must arrive within `body_timeout`.
    pub fn new(peer: SocketAddr, body_timeout: Duration, request: http::Request<Incoming>) -> Self {
        let (
            Parts {
                method, uri, headers, ..
            },
            body,
        ) = request.into_parts();
        let id = headers::request_id(&headers);
        let held_back = headers.contains_key(header::EXPECT);
        let method = if method == Method::HEAD {
            Method::GET
        } else {
            method
        };
        let body = Mutex::new(Unread {
            body: Some(body),
            held_back,
        });
        Self {
            method,
            headers,
            id,
            peer,
            uri,
            body_timeout,
            body,
        }
    }

    /// The path, as it came.
    pub fn path(&self) -> &str {
        self.uri.path()
    }

    /// The whole address, for matching.
    pub const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The parameters after the question mark.
    pub fn query(&self) -> Query {
        Query::parse(self.uri.query().unwrap_or_default())
    }

    /// The body as JSON; a body that isn't is a problem.
    pub async fn json(&self) -> Result<Json, Problem> {
        let bytes = self.json_bytes().await?;
        if bytes.is_empty() {
            return Err(invalid("body", "Field required", "missing"));
        }
        Json::parse(&bytes)
    }

    /// The body as JSON; no body at all is an empty object.
    pub async fn json_or_nothing(&self) -> Result<Json, Problem> {
        let bytes = self.json_bytes().await?;
        if bytes.is_empty() {
            Ok(Json(Value::Object(serde_json::Map::new())))
        } else {
            Json::parse(&bytes)
        }
    }

    async fn json_bytes(&self) -> Result<Bytes, Problem> {
        if !headers::is_plain(&self.headers) {
            return Err(Problem::UnsupportedEncoding);
        }
        if !headers::says_json(&self.headers) {
            return Err(Problem::UnsupportedMediaType);
        }
        self.bytes(BODY_LIMIT).await
    }

    /// The body, if it isn't larger than `limit` bytes: counted while it arrives, whatever the headers say.
    async fn bytes(&self, limit: usize) -> Result<Bytes, Problem> {
        let Some(mut body) = self.unread().body.take() else {
            return Ok(Bytes::new());
        };
        if body.size_hint().lower() > limit as u64 {
            // Not begun, so that a client that waits for "100 Continue" never sends it.
            self.unread().body = Some(body);
            return Err(Problem::TooLarge(limit));
        }
        self.unread().held_back = false;
        let read = timeout(self.body_timeout, collect(&mut body, limit)).await;
        if let Err(_) | Ok(Err(_)) = read {
            self.unread().body = Some(body);
        }
        read.unwrap_or(Err(Problem::TooSlow))
    }

    /// The body piece by piece. One that says that it is larger than `limit` bytes isn't begun; the reader counts, and
    /// keeps the time.
    pub fn stream(
        &self,
        limit: usize,
    ) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<'_>, Problem> {
        {
            let mut unread = self.unread();
            let lower = unread.body.as_ref().map_or(0, |body| body.size_hint().lower());
            if lower > limit as u64 {
                return Err(Problem::TooLarge(limit));
            }
            unread.held_back = false;
        }
        Ok(stream::poll_fn(move |cx| {
            let mut unread = self.unread();
            let Some(body) = &mut unread.body else {
                return Poll::Ready(None);
            };
            loop {
                match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                    None => return Poll::Ready(None),
                    Some(Err(error)) => return Poll::Ready(Some(Err(io::Error::other(error)))),
                    Some(Ok(frame)) => {
                        if let Ok(data) = frame.into_data() {
                            return Poll::Ready(Some(Ok(data)));
                        }
                    }
                }
            }
        }))
    }

    /// Reads what the handler left of the body, within bounds.
    pub async fn discard_body(&self) {
        let body = {
            let mut unread = self.unread();
            if unread.held_back {
                None
            } else {
                unread.body.take()
            }
        };
        let Some(mut body) = body.filter(|body| !body.is_end_stream()) else {
            return;
        };
        let rest = async {
            let mut read = 0;
            while let Some(Ok(frame)) = body.frame().await {
                read += frame.data_ref().map_or(0, Bytes::len);
                if read > LEFTOVER_LIMIT {
                    break;
                }
            }
        };
        let _ = timeout(LEFTOVER_WITHIN, rest).await;
    }

    /// The fingerprint of an idempotent request's body: the same however the JSON is spelled. The query says how the
    /// answer is given, not what is done.
    pub fn fingerprint(body: &Json) -> String {
        let mut hash = Sha256::new();
        // Values that came out of JSON can always be written as JSON.
        hash.update(serde_json_canonicalizer::to_vec(&body.0).unwrap_or_default());
        hex(&hash.finalize())
    }

    fn unread(&self) -> std::sync::MutexGuard<'_, Unread> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The frames of `body` in one piece.
async fn collect(body: &mut Incoming, limit: usize) -> Result<Bytes, Problem> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|_| Problem::BadRequest("The body broke off or is not well-formed".into()))?;
        let Some(data) = frame.data_ref() else { continue };
        if whole.len() + data.len() > limit {
            return Err(Problem::TooLarge(limit));
        }
        whole.extend_from_slice(data);
    }
    Ok(whole.freeze())
}

/// A body that was JSON.
#[derive(Debug)]
pub struct Json(Value);

impl Json {
    fn parse(bytes: &[u8]) -> Result<Self, Problem> {
        serde_json::from_slice(bytes)
            .map(Self)
            .map_err(|error| invalid("body", format!("JSON decode error: {error}"), "json_invalid"))
    }

    /// The members of the object that the body must be.
    pub fn fields(self) -> Result<Fields, Problem> {
        Fields::of("body", self.0)
    }
}

/// The parameters after the question mark, decoded, in the order in which they came.
#[derive(Debug)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// The parameters of this text.
    pub fn parse(text: &str) -> Self {
        Self(
            url::form_urlencoded::parse(text.as_bytes())
                .into_owned()
                .collect(),
        )
    }

    /// Refuses names that aren't known, and what no database can be asked for.
    pub fn check(&self, known: &[&str]) -> Result<(), Problem> {
        let unknown = self.0.iter().filter(|(name, _)| !known.contains(&name.as_str()));
        let faults = unknown
            .flat_map(|(name, _)| {
                let name = name.chars().take(100).collect::<String>();
                in_query(&name, vec![fields::unknown(&name, known.iter().copied())])
            })
            .collect::<Vec<_>>();
        if !faults.is_empty() {
            return Err(Problem::Invalid(faults));
        }
        match self.0.iter().find(|(_, value)| value.contains('\0')) {
            Some((name, _)) => {
                let fault = Fault::value("String should not contain the null character");
                let name = name.replace('\0', "");
                Err(Problem::Invalid(in_query(&name, vec![fault])))
            }
            None => Ok(()),
        }
    }

    /// The last value of `name`; an empty one counts as absent.
    pub fn text(&self, name: &str) -> Option<&str> {
        let value = self.0.iter().rev().find(|(key, _)| key == name)?;
        Some(value.1.as_str()).filter(|value| !value.is_empty())
    }

    /// All parameters but those of this name.
    pub fn without(&self, name: &str) -> Vec<(String, String)> {
        self.0.iter().filter(|(key, _)| key != name).cloned().collect()
    }

    /// All values of `name`, and the parts between commas of each.
    pub fn list(&self, name: &str) -> Vec<&str> {
        let values = self.0.iter().filter(|(key, _)| key == name);
        values
            .flat_map(|(_, value)| value.split(','))
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .collect()
    }

    /// A time. A plus sign arrives as a blank unless it was written `%2B`.
    pub fn time(&self, name: &str) -> Result<Option<Timestamp>, Problem> {
        self.value(name, |text| {
            let offset = text
                .len()
                .checked_sub(6)
                .filter(|at| text.as_bytes()[*at] == b' ');
            let text = match offset {
                Some(at) => format!("{}+{}", &text[..at], &text[at + 1..]),
                None => text.to_owned(),
            };
            fields::time(text.into())
        })
    }

    /// A whole number in `range`.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Problem> {
        self.value(name, |text| {
            let number = text.parse::<i64>().ok().map_or(Value::from(text), Value::from);
            fields::integer(range.clone())(number)
        })
    }

    /// One of the values that `rule` knows.
    pub fn value<T>(
        &self,
        name: &str,
        rule: impl Fn(&str) -> fields::Reading<T>,
    ) -> Result<Option<T>, Problem> {
        let Some(text) = self.text(name) else {
            return Ok(None);
        };
        rule(text)
            .map(Some)
            .map_err(|faults| Problem::Invalid(in_query(name, faults)))
    }
}

/// The faults of the parameter `name`.
pub fn in_query(name: &str, faults: Vec<Fault>) -> Vec<FieldFault> {
    faults
        .into_iter()
        .map(|fault| fault.at(&format!("query -> {name}")))
        .collect()
}

/// One part of a path, with its percent signs decoded. Nothing is named by what isn't text, or has the null character,
/// which PostgreSQL can't even be asked for.
#[derive(Debug)]
pub struct Segment(String);

impl FromStr for Segment {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = percent_encoding::percent_decode_str(text).decode_utf8();
        match text {
            Ok(text) if !text.contains('\0') => Ok(Self(text.into_owned())),
            _ => Err(()),
        }
    }
}

impl AsRef<str> for Segment {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Segment {
    /// The identifier that this part is. What isn't one names nothing: `what` isn't found.
    pub fn id<T: FromStr>(&self, what: &'static str) -> Result<T, Problem> {
        self.0.parse().map_err(|_| Problem::NoSuch(what))
    }
}

/// The end of a path, as it came: its percent signs aren't decoded.
#[derive(Debug)]
pub struct Tail(String);

impl Tail {
    /// What `warp` left.
    pub fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// As it came.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One fault, by itself.
pub fn invalid(field: &str, message: impl Into<Cow<'static, str>>, kind: &'static str) -> Problem {
    Problem::Invalid(vec![FieldFault {
        field: field.to_owned(),
        message: message.into(),
        kind,
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_parameters_are_decoded_and_may_repeat() {
        let query = Query::parse("status=done,failed&status=queued&name=a%20b+c&empty=&limit=5&limit=6");
        assert_eq!(query.list("status"), ["done", "failed", "queued"]);
        assert_eq!(query.text("name"), Some("a b c"));
        assert_eq!(query.text("empty"), None);
        assert_eq!(query.integer("limit", 1..=100).unwrap(), Some(6));
    }

    #[test]
    fn a_bad_number_in_the_query_names_the_parameter() {
        for (text, kind) in [
            ("limit=0", "greater_than_equal"),
            ("limit=101", "less_than_equal"),
            ("limit=x", "int_type"),
        ] {
            let Err(Problem::Invalid(faults)) = Query::parse(text).integer("limit", 1..=100) else {
                panic!("{text}")
            };
            assert_eq!(
                (faults[0].field.as_str(), faults[0].kind),
                ("query -> limit", kind)
            );
        }
    }

    #[test]
    fn an_unknown_parameter_is_named_with_the_known_one_that_it_is_near() {
        let known = ["status", "limit"];
        assert!(Query::parse("status=done&limit=1").check(&known).is_ok());
        for (text, field, message) in [
            ("staus=failed", "query -> staus", "did you mean `status`?"),
            ("status[]=failed", "query -> status[]", "did you mean `status`?"),
            ("colour=red", "query -> colour", "Extra inputs are not permitted"),
        ] {
            let Err(Problem::Invalid(faults)) = Query::parse(text).check(&known) else {
                panic!("{text}")
            };
            assert_eq!(
                (faults[0].field.as_str(), faults[0].kind),
                (field, "extra_forbidden")
            );
            assert!(faults[0].message.ends_with(message), "{}", faults[0].message);
        }
    }

    #[test]
    fn a_time_of_the_api_may_be_sent_back_as_it_is() {
        for text in [
            "at=2026-11-26T10:00:00.000000+00:00",
            "at=2026-11-26T10:00:00.000000%2B00:00",
            "at=2026-11-26T10:00:00Z",
        ] {
            let at = Query::parse(text).time("at").unwrap();
            assert_eq!(at, Timestamp::parse("2026-11-26T10:00:00Z"), "{text}");
        }
        assert!(Query::parse("at=ö+00:00").time("at").is_err());
    }

    #[test]
    fn only_json_is_json() {
        for text in [
            "{",
            "",
            "{'a': 1}",
            "[1,]",
            "\u{0}",
            "nul",
            &"[".repeat(1_000),
            r#""\ud800""#,
        ] {
            assert!(Json::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Json::parse(b"\xff\xfe").is_err());
        assert!(Json::parse(b" {\"a\": [1, 2.5, null]} ").is_ok());
    }

    #[test]
    fn the_parts_of_a_path_are_decoded() {
        assert_eq!("caf%C3%A9%20x".parse::<Segment>().unwrap().as_ref(), "café x");
        assert!("%ff".parse::<Segment>().is_err());
        assert!("a%00".parse::<Segment>().is_err());
    }
}
