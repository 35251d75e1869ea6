//! The worker's own question to the API, which costs nothing: whether it is there, and takes the credential.

use std::fmt;

use http_body_util::{BodyExt as _, Collected, Limited};
use shared::clock;

use super::MAX_ERROR_BODY;
use super::credentials::Credentials;
use super::failure::{ApiFailure, NO_CREDENTIAL, NOT_THE_API, UNREACHABLE};
use super::upstream::{ANSWER_WITHIN, OAUTH, Upstream, is_page};
use crate::config::provider::Kind;

/// The version of the Messages API that the question is of.
const VERSION: &str = "2023-06-01";

impl Upstream {
    /// Asks a question that costs nothing: which models there are.
    pub async fn ask(&self, credentials: &Credentials) -> Answer {
        let own = |status, kind, message: &str| Answer::Refused(ApiFailure::own(status, kind, message));
        let (name, value) = match credentials.header().await {
            Ok(header) => header,
            Err(error) => return own(401, NO_CREDENTIAL, &error.to_string()),
        };
        let mut request = self
            .client
            .get(format!("{}/v1/models?limit=1", self.address.base))
            .timeout(ANSWER_WITHIN)
            .header("anthropic-version", VERSION)
            .header(name, value);
        if credentials.is_oauth() {
            request = request.header("anthropic-beta", OAUTH);
        }
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return own(502, UNREACHABLE, &self.unreachable(error)),
        };
        let status = response.status();
        if self.provider.kind != Kind::Anthropic && matches!(status.as_u16(), 400 | 404 | 405) {
            // It lists no models, but it is there and has taken the credential.
            return Answer::Good;
        }
        if status.is_success() {
            return if is_page(response.headers()) {
                own(status.as_u16(), NOT_THE_API, "")
            } else {
                Answer::Good
            };
        }
        let headers = response.headers().clone();
        let body = Limited::new(reqwest::Body::from(response), MAX_ERROR_BODY).collect();
        let body = tokio::time::timeout(ANSWER_WITHIN, body).await.ok();
        let body = body
            .and_then(Result::ok)
            .map(Collected::to_bytes)
            .unwrap_or_default();
        Answer::Refused(ApiFailure::read(status.as_u16(), &headers, &body, clock::now()))
    }
}

/// What came back to the worker's own question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The API answered it.
    Good,
    /// It didn't; an answer that never came is [`UNREACHABLE`].
    Refused(ApiFailure),
}

impl Answer {
    /// Whether no run would be served either.
    pub fn is_out(&self) -> bool {
        matches!(self, Self::Refused(failure) if failure.status >= 500)
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good => f.write_str("The API answers."),
            Self::Refused(failure) => match failure.cause() {
                Some(cause) => f.write_str(&failure.reason(cause)),
                None => write!(f, "It answered {}: {}", failure.status, failure.message),
            },
        }
    }
}
