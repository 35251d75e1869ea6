//! A rough count of tokens, as the Python service has it: enough to see whether a prompt is large.

use http::StatusCode;
use serde::Serialize;
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply;
use crate::http::request::Request;
use crate::http::request::fields::text;

/// How long a text is.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct TokenCount {
    characters: usize,
    words: usize,
    estimated_tokens: usize,
}

impl TokenCount {
    fn of(text: &str) -> Self {
        let (characters, words) = (text.chars().count(), text.split_whitespace().count());
        Self {
            characters,
            words,
            estimated_tokens: (characters / 4).max(words),
        }
    }
}

/// `POST /tokens/count`.
pub async fn count(_context: &Context, request: &Request, _caller: &Caller) -> Result<Response, Problem> {
    let mut body = request.json().await?.fields()?;
    let text = body.required("text", text(1..=1_000_000));
    let text = body.finish(text)?;
    reply::data(request, StatusCode::OK, TokenCount::of(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_four_characters_or_a_word() {
        let count = |text| {
            let count = TokenCount::of(text);
            (count.characters, count.words, count.estimated_tokens)
        };
        assert_eq!(count("a b c"), (5, 3, 3));
        assert_eq!(count("éééééééé"), (8, 1, 2));
    }
}
