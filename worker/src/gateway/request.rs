//! A request of a run: its body is read whole, and what decides its price and whether it is permitted is parsed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderName};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::media::Media;
use crate::spend::answer::tokens_of;
use crate::spend::meter::Planned;
use shared::model::{self, Aliases, AllowedModels};

/// The API's own limit of a request.
const MAX_BODY: usize = 32 * 1024 * 1024;

/// Bodies of one run that are held at once, in units of 1 KiB.
const MAX_HELD: u32 = 64 * 1024;

/// How long a run may take to send a body.
const BODY_WITHIN: Duration = Duration::from_mins(1);

/// A longer name is no model's.
const MAX_MODEL: usize = 200;

/// The answer of a request that doesn't say how long it may be.
const LONGEST_ANSWER: u64 = 128_000;

/// The searches of a request that may make them and doesn't say how many.
const MOST_SEARCHES: u64 = 20;

/// No image has more tokens.
const IMAGE_TOKENS: u64 = 6_000;

/// What a search finds has no more tokens.
const SEARCH_TOKENS: u64 = 25_000;

/// No prompt has more tokens: the largest context window. A document, which the API fetches or unpacks itself, may fill
/// it, however small the request is.
const LONGEST_PROMPT: u64 = 1_000_000;

/// A larger body is parsed where that holds up nobody.
const PARSED_IN_PLACE: usize = 256 * 1024;

/// The headers of a run that travel on; the rest is the gateway's own, or nobody's.
const PASSED: [&str; 9] = [
    "accept",
    "content-type",
    "user-agent",
    "anthropic-version",
    "anthropic-beta",
    "anthropic-dangerous-direct-browser-access",
    "x-app",
    "x-claude-code-session-id",
    "x-client-request-id",
];

/// How the CLI's HTTP client describes itself.
const PASSED_PREFIX: &str = "x-stainless-";

/// What the CLI may ask for by itself. What is missing here is of other products, costs extra (`fast-mode`), or gives
/// access to more of the account than the model (`files-api`, `mcp-servers`, `message-batches` …).
const BETAS: [&str; 39] = [
    "advanced-tool-use-2025-11-20",
    "afk-mode-2026-01-31",
    "auto-mode-classifier-2026-07-16",
    "cache-diagnosis-2026-04-07",
    "cache-keepalive-2026-09-03",
    "claude-code-20250219",
    "claude-code-side-query-2026-09-29",
    "context-1m-2025-08-07",
    "context-hint-2026-04-09",
    "context-management-2025-06-27",
    "effort-2025-11-24",
    "extended-cache-ttl-2025-04-11",
    "fine-grained-tool-streaming-2025-05-14",
    "inline-tools-2026-09-15",
    "interleaved-thinking-2025-05-14",
    "mid-conversation-system-2026-04-07",
    "mid-conversation-system-clear-at-2026-08-21",
    "mid-conversation-tool-changes-2026-07-01",
    "oauth-2025-04-20",
    "per-turn-control-2026-07-01",
    "program-use-case-ids-2026-09-17",
    "prompt-caching-evict-2026-05-12",
    "prompt-caching-scope-2026-01-05",
    "redact-thinking-2026-02-12",
    "request-tags-2026-08-21",
    "resumption-2026-10-08",
    "structured-outputs-2025-12-15",
    "task-budgets-2026-03-13",
    "thinking-binding-controls-2026-08-01",
    "thinking-display-updates-2026-08-18",
    "thinking-resumption-2026-07-17",
    "thinking-token-count-2026-05-13",
    "timing-2026-09-09",
    "token-counting-2024-11-01",
    "tool-examples-2025-10-29",
    "tool-provenance-2026-10-26",
    "tool-search-tool-2025-10-19",
    "web-search-2025-03-05",
    "web-search-results-only-2026-11-15",
];

/// What the requests of an attempt may ask for.
#[derive(Clone, Debug, Default)]
pub struct Permissions {
    /// The models.
    pub models: AllowedModels,
    /// Whether the API may search the web.
    pub web_search: bool,
}

/// Why the gateway refuses a request of a run itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It doesn't hold the run's token.
    Token,
    /// It asks for another path of the account.
    Path,
    /// No attempt is running.
    Disarmed,
    /// Its body is larger than the API takes.
    TooLarge,
    /// Its body didn't come in time, or not whole.
    Incomplete,
    /// Its body isn't what the API takes; the reason.
    Invalid(String),
    /// The key may not use the model.
    Model(String),
    /// It asks for something that a run may not have; what.
    Feature(String),
    /// Tokens were to be counted too often.
    TooOften,
    /// The attempt has spent what was reserved for it.
    NothingLeft,
}

impl Refusal {
    /// Names the reason in the log.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Token => "no token of the run",
            Self::Path => "another path",
            Self::Disarmed => "no attempt",
            Self::TooLarge => "too large",
            Self::Incomplete => "incomplete",
            Self::Invalid(_) => "invalid",
            Self::Model(_) => "model not allowed",
            Self::Feature(_) => "not permitted",
            Self::TooOften => "too often",
            Self::NothingLeft => "nothing left to spend",
        }
    }

    /// The status and type of the answer. The CLI ends at once after a 402 and a 403, and asks again after others.
    pub const fn answer(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Token => (StatusCode::UNAUTHORIZED, "authentication_error"),
            Self::Path => (StatusCode::NOT_FOUND, "not_found_error"),
            Self::Disarmed | Self::Model(_) | Self::Feature(_) => (StatusCode::FORBIDDEN, "permission_error"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "request_too_large"),
            Self::Incomplete | Self::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid_request_error"),
            Self::TooOften => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
            Self::NothingLeft => (StatusCode::PAYMENT_REQUIRED, "billing_error"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token => f.write_str("This request doesn't hold the token of the run."),
            Self::Path => f.write_str(
                "The gateway of a run serves POST /v1/messages and POST /v1/messages/count_tokens only.",
            ),
            Self::Disarmed => f.write_str("No attempt is running."),
            Self::TooLarge => f.write_str("The request has more than 32 MB."),
            Self::Incomplete => f.write_str("The request's body did not come in time, or not whole."),
            Self::Invalid(why) => write!(f, "The request can't be read: {why}."),
            Self::Model(model) => write!(f, "The job's key may not use the model {model}."),
            Self::Feature(what) => write!(f, "A run may not use {what}."),
            Self::TooOften => f.write_str("Tokens are counted too often."),
            Self::NothingLeft => f.write_str("The run has spent what it may cost."),
        }
    }
}

/// A request that may be sent.
#[derive(Debug)]
pub(super) struct Asked {
    /// What it may cost.
    pub(super) planned: Planned,
    /// Whether its answer is to be a stream.
    pub(super) is_stream: bool,
    /// Its headers, without the credential.
    pub(super) headers: HeaderMap,
    /// Its body.
    pub(super) body: Bytes,
    /// Its part of the memory for bodies.
    _held: OwnedSemaphorePermit,
}

/// The members that decide. A name that comes twice is an error, since the API might take the other one.
#[derive(Deserialize)]
struct Members {
    model: String,
    max_tokens: Option<u64>,
    stream: Option<bool>,
    tools: Option<Vec<Tool>>,
    mcp_servers: Option<IgnoredAny>,
    container: Option<IgnoredAny>,
    fallbacks: Option<IgnoredAny>,
    /// Some clouds take betas here.
    anthropic_beta: Option<IgnoredAny>,
    betas: Option<IgnoredAny>,
    speed: Option<String>,
    inference_geo: Option<String>,
    #[serde(default)]
    messages: Media,
}

#[derive(Deserialize)]
struct Tool {
    #[serde(rename = "type")]
    kind: Option<String>,
    max_uses: Option<u64>,
}

/// The memory for the bodies of one run.
pub(super) fn memory() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MAX_HELD as usize))
}

/// Reads a request, and whether it is permitted.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Incoming,
    memory: &Arc<Semaphore>,
    permissions: &Permissions,
    aliases: &Aliases,
) -> Result<Asked, Refusal> {
    let length = match headers.get(header::CONTENT_LENGTH) {
        None => MAX_BODY,
        Some(length) => {
            let length = length.to_str().ok().and_then(|length| length.parse().ok());
            length.ok_or_else(|| Refusal::Invalid("its Content-Length is no number".to_owned()))?
        }
    };
    if length > MAX_BODY {
        return Err(Refusal::TooLarge);
    }
    let kilobytes = u32::try_from(length.div_ceil(1024)).unwrap_or(MAX_HELD);
    let held = Arc::clone(memory)
        .acquire_many_owned(kilobytes)
        .await
        .map_err(|_| Refusal::Disarmed)?;
    let collected = tokio::time::timeout(BODY_WITHIN, Limited::new(body, MAX_BODY).collect()).await;
    let body = match collected {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => return Err(Refusal::TooLarge),
        Ok(Err(_)) | Err(_) => return Err(Refusal::Incomplete),
    };
    let members = if body.len() > PARSED_IN_PLACE {
        let body = body.clone();
        tokio::task::spawn_blocking(move || parse(&body))
            .await
            .unwrap_or(Err(Refusal::Incomplete))?
    } else {
        parse(&body)?
    };
    check(&members, permissions, aliases)?;
    let headers = passed(headers)?;
    Ok(Asked {
        planned: planned(&members, body.len()),
        is_stream: members.stream == Some(true),
        headers,
        body,
        _held: held,
    })
}

fn parse(body: &[u8]) -> Result<Members, Refusal> {
    let members: Members =
        serde_json::from_slice(body).map_err(|error| Refusal::Invalid(model::shown(&error.to_string())))?;
    if members.model.len() > MAX_MODEL {
        return Err(Refusal::Invalid(format!(
            "the model's name has more than {MAX_MODEL} bytes"
        )));
    }
    Ok(members)
}

fn check(members: &Members, permissions: &Permissions, aliases: &Aliases) -> Result<(), Refusal> {
    if !permissions.models.allow(&members.model, aliases) {
        return Err(Refusal::Model(model::shown(&members.model)));
    }
    for (is_there, name) in [
        (members.mcp_servers.is_some(), "mcp_servers"),
        (members.container.is_some(), "container"),
        (members.fallbacks.is_some(), "fallbacks"),
        (members.anthropic_beta.is_some(), "anthropic_beta"),
        (members.betas.is_some(), "betas"),
    ] {
        if is_there {
            return Err(Refusal::Feature(name.to_owned()));
        }
    }
    // A tool with a type of its own runs at the API, or is one that the CLI doesn't have.
    for kind in members
        .tools
        .iter()
        .flatten()
        .filter_map(|tool| tool.kind.as_deref())
    {
        let is_search = kind.starts_with("web_search_");
        if kind != "custom" && !(is_search && permissions.web_search) {
            return Err(Refusal::Feature(format!("the tool {}", model::shown(kind))));
        }
    }
    Ok(())
}

fn planned(members: &Members, bytes: usize) -> Planned {
    let searches = members.tools.iter().flatten();
    let searches = searches
        .filter(|tool| tool.kind.as_deref().is_some_and(|kind| kind != "custom"))
        .map(|tool| tool.max_uses.unwrap_or(MOST_SEARCHES))
        .fold(0, u64::saturating_add);
    let media = members.messages;
    let unseen = if media.documents > 0 {
        LONGEST_PROMPT
    } else {
        let images = media.images.saturating_mul(IMAGE_TOKENS);
        let found = searches.saturating_mul(SEARCH_TOKENS).min(LONGEST_PROMPT);
        images.saturating_add(found)
    };
    Planned {
        model: members.model.clone(),
        fast: members.speed.as_deref().is_some_and(|speed| speed != "standard"),
        region: members.inference_geo.clone(),
        prompt: tokens_of(bytes as u64),
        unseen,
        output: members.max_tokens.unwrap_or(LONGEST_ANSWER),
        searches,
    }
}

/// The headers that travel on.
fn passed(headers: &HeaderMap) -> Result<HeaderMap, Refusal> {
    let mut passed = HeaderMap::new();
    for (name, value) in headers {
        if name == "anthropic-beta" {
            let betas = value.to_str().unwrap_or("?").split(',').map(str::trim);
            if let Some(beta) = betas
                .filter(|beta| !beta.is_empty())
                .find(|beta| !BETAS.contains(beta))
            {
                return Err(Refusal::Feature(format!("the beta {}", model::shown(beta))));
            }
        }
        if is_passed(name) {
            passed.append(name.clone(), value.clone());
        }
    }
    Ok(passed)
}

fn is_passed(name: &HeaderName) -> bool {
    PASSED.contains(&name.as_str()) || name.as_str().starts_with(PASSED_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spend::price::Prices;

    fn read(body: &str, allowed: &[&str], web_search: bool) -> Result<Planned, Refusal> {
        let prices = Prices::default();
        let allowed: Vec<String> = allowed.iter().map(|&model| model.to_owned()).collect();
        let permissions = Permissions {
            models: AllowedModels::new(&allowed, prices.aliases()),
            web_search,
        };
        let members = parse(body.as_bytes())?;
        check(&members, &permissions, prices.aliases())?;
        Ok(planned(&members, body.len()))
    }

    #[test]
    fn a_model_that_the_key_may_not_use_is_refused() {
        let opus = r#"{"model": "us.anthropic.claude-opus-5-5[1m]"}"#;
        assert!(
            matches!(read(opus, &["haiku"], false), Err(Refusal::Model(model)) if model.contains("opus"))
        );
        assert!(read(opus, &["opus"], false).is_ok() && read(opus, &[], false).is_ok());
    }

    #[test]
    fn what_costs_more_or_reaches_further_is_refused() {
        for (members, what) in [
            (r#""mcp_servers": []"#, "mcp_servers"),
            (r#""container": "c""#, "container"),
            (r#""fallbacks": [{"model": "x"}]"#, "fallbacks"),
            (
                r#""tools": [{"type": "code_execution_20250825"}]"#,
                "code_execution",
            ),
            (
                r#""tools": [{"name": "a"}, {"type": "advisor_20260301"}]"#,
                "advisor",
            ),
            (r#""tools": [{"type": "web_search_20250305"}]"#, "web_search"),
            (r#""anthropic_beta": ["files-api-2025-04-14"]"#, "anthropic_beta"),
            (r#""betas": ["files-api-2025-04-14"]"#, "betas"),
        ] {
            let body = format!(r#"{{"model": "opus", {members}}}"#);
            let refusal = read(&body, &[], false).unwrap_err();
            assert!(
                matches!(&refusal, Refusal::Feature(said) if said.contains(what)),
                "{refusal:?}"
            );
        }
        let search = r#"{"model": "opus", "tools": [{"type": "web_search_20250305", "max_uses": 8}, {"type": "custom"}]}"#;
        assert_eq!(read(search, &[], true).unwrap().searches, 8);
    }

    #[test]
    fn what_isnt_a_request_is_refused() {
        let deep = format!(
            r#"{{"model": "opus", "messages": {}{}}}"#,
            "[".repeat(100_000),
            "]".repeat(100_000)
        );
        assert!(read(&deep, &[], false).is_ok(), "depth is the API's business");
        let long = format!(r#"{{"model": "{}"}}"#, "m".repeat(10_000));
        for body in [
            "",
            "hello",
            "[]",
            "{}",
            r#"{"model": 5}"#,
            r#"{"model": "haiku", "model": "opus"}"#,
            r#"{"model": "haiku", "mod\u0065l": "opus"}"#,
            r#"{"model": "opus", "max_tokens": -1}"#,
            r#"{"model": "opus", "tools": {}}"#,
            r#"{"model": "opus"} {"#,
            "\u{feff}{\"model\": \"opus\"}",
            &long,
        ] {
            let refusal = read(body, &[], false).unwrap_err();
            assert!(matches!(refusal, Refusal::Invalid(_)), "{body:.50}: {refusal:?}");
            assert!(refusal.to_string().len() < 300, "{refusal}");
        }
    }

    #[test]
    fn the_worst_case_of_a_request_is_read_from_it() {
        let body = r#"{"model": "opus", "max_tokens": 9, "speed": "fast", "inference_geo": "us"}"#;
        let planned = read(body, &[], false).unwrap();
        assert_eq!(
            (planned.output, planned.prompt),
            (9, tokens_of(body.len() as u64))
        );
        assert_eq!((planned.fast, planned.region.as_deref()), (true, Some("us")));
        assert_eq!(
            read(r#"{"model": "opus"}"#, &[], false).unwrap().output,
            LONGEST_ANSWER
        );
    }

    #[test]
    fn what_the_api_fetches_or_unpacks_may_fill_a_prompt() {
        let unseen = |content: &str| {
            let body =
                format!(r#"{{"model": "opus", "messages": [{{"role": "user", "content": {content}}}]}}"#);
            read(&body, &[], true).unwrap().unseen
        };
        assert_eq!(unseen(r#""a text""#), 0);
        assert_eq!(
            unseen(r#"[{"type": "text", "text": "\"type\": \"document\""}]"#),
            0
        );
        assert_eq!(
            unseen(r#"[{"type": "image", "source": {"type": "url", "url": "x"}}]"#),
            IMAGE_TOKENS
        );
        let document = r#"{"source": {"type": "url", "url": "x"}, "type": "docu\u006dent"}"#;
        assert_eq!(unseen(&format!("[{document}]")), LONGEST_PROMPT);
        let result = format!(r#"[{{"type": "tool_result", "tool_use_id": "t", "content": [{document}]}}]"#);
        assert_eq!(unseen(&result), LONGEST_PROMPT);
        let search = r#"{"model": "opus", "tools": [{"type": "web_search_20250305"}]}"#;
        assert_eq!(
            read(search, &[], true).unwrap().unseen,
            MOST_SEARCHES * SEARCH_TOKENS
        );
    }

    #[test]
    fn only_known_headers_travel_on() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("anthropic-beta", "claude-code-20250219, effort-2025-11-24"),
            ("anthropic-version", "2023-06-01"),
            ("x-stainless-os", "Linux"),
            ("x-api-key", "token"),
            ("authorization", "Bearer token"),
            ("cookie", "a=b"),
            ("x-forwarded-for", "1.1.1.1"),
            ("content-length", "5"),
            ("anthropic-workspace", "other"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let passed_on = passed(&headers).unwrap();
        let mut names: Vec<&str> = passed_on.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["anthropic-beta", "anthropic-version", "x-stainless-os"]);

        headers.insert(
            "anthropic-beta",
            "claude-code-20250219,fast-mode-2026-02-01".parse().unwrap(),
        );
        assert!(matches!(passed(&headers), Err(Refusal::Feature(what)) if what.contains("fast-mode")));
    }
}
