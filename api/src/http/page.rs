//! Pages of lists: cursors, the `pagination` of an answer, the link to the next page.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::LINK;
use serde::Serialize;
use sha2::{Digest, Sha256};
use warp::reply::Response;

use crate::http::problem::Problem;
use crate::http::reply::Headers;
use crate::http::request::{Query, Request};

/// A position in a list: that of the last item seen, bound to the filters under which it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(pub i64);

impl Cursor {
    /// As clients get it. They can't build one, and needn't.
    pub fn encode(self, filters: &str) -> String {
        let mut bytes = self.0.to_be_bytes().to_vec();
        bytes.extend_from_slice(&fingerprint(filters));
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The position that a client names; a problem if it isn't one of ours for these filters.
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

/// A position in a list whose items are found by a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextCursor(pub String);

impl TextCursor {
    /// As clients get it.
    pub fn encode(&self, filters: &str) -> String {
        let mut bytes = fingerprint(filters).to_vec();
        bytes.extend_from_slice(self.0.as_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The position that a client names; a problem if it isn't one of ours for these filters.
    pub fn decode(text: &str, filters: &str) -> Result<Self, Problem> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Problem::InvalidCursor)?;
        let (hash, position) = bytes.split_at_checked(8).ok_or(Problem::InvalidCursor)?;
        match std::str::from_utf8(position) {
            Ok(position) if hash == fingerprint(filters) && !position.contains('\0') => {
                Ok(Self(position.to_owned()))
            }
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

/// Leaves `limit` of the items, of which one more was read if there are more: then the position of the last that is left.
pub fn more_than<T, P>(limit: i64, items: &mut Vec<T>, position: impl Fn(&T) -> P) -> Option<P> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = items.len() > limit;
    items.truncate(limit);
    items.last().filter(|_| more).map(position)
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

/// The `pagination` of a list that is read by page numbers, as in the Python service.
#[derive(Debug, Serialize)]
pub struct PageNumbers {
    limit: i64,
    page: i64,
    pages: i64,
    total: i64,
}

impl PageNumbers {
    /// For a page of a list of `total` items.
    pub fn new(total: i64, page: i64, limit: i64) -> Self {
        Self {
            limit,
            page,
            pages: total.saturating_add(limit - 1) / limit,
            total,
        }
    }

    /// The page and the limit that the query asks for. What is out of range is moved into it.
    pub fn asked(query: &Query, default_limit: i64) -> Result<(i64, i64), Problem> {
        let number = |name| query.integer(name, i64::MIN..=i64::MAX);
        let page = number("page")?.unwrap_or(1).clamp(1, 1_000_000);
        Ok((page, number("limit")?.unwrap_or(default_limit).clamp(1, 100)))
    }

    /// How many items stand before the page, and how many on it.
    pub fn range(page: i64, limit: i64) -> (usize, usize) {
        let number = |number| usize::try_from(number).unwrap_or_default();
        (number((page - 1) * limit), number(limit))
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
    fn a_position_that_is_a_text_comes_back_as_it_went() {
        let text = TextCursor("key/env_1".to_owned()).encode("a");
        assert_eq!(TextCursor::decode(&text, "a").unwrap().0, "key/env_1");
        for made_up in ["", "7", "AAAA", &text[2..], "!!"] {
            assert!(TextCursor::decode(made_up, "a").is_err(), "{made_up:?}");
        }
        assert!(TextCursor::decode(&text, "b").is_err());
    }
}
