//! The description of the API: the OpenAPI document, and a page that shows it without anything from elsewhere.

mod document;
mod operations;
mod schemas;

use bytes::Bytes;
use flate2::read::GzDecoder;
use http::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION,
};
use http::{Method, StatusCode};
use std::io::Read;
use std::sync::OnceLock;
use warp::reply::Response;

use crate::context::Context;
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers};
use crate::http::request::{Request, headers};

/// What the page may do: run its own script, and ask this service.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
                      connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

const PAGE: &str = include_str!("docs/viewer/index.html");
const START: &str = include_str!("docs/viewer/start.js");
const SCRIPT: &[u8] = include_bytes!("docs/viewer/swagger-ui-bundle.js.gz");
const STYLE: &[u8] = include_bytes!("docs/viewer/swagger-ui.css.gz");

/// `GET /openapi.json`.
pub async fn openapi(context: &Context, request: &Request) -> Result<Response, Problem> {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    allowed(context, request)?;
    let text = DOCUMENT.get_or_init(|| document::document().to_string().into());
    Ok(sent(text.clone(), "application/json"))
}

/// `GET /docs`.
pub async fn page(context: &Context, request: &Request) -> Result<Response, Problem> {
    allowed(context, request)?;
    let page = sent(Bytes::from_static(PAGE.as_bytes()), "text/html; charset=utf-8");
    Ok(page.with(CONTENT_SECURITY_POLICY, POLICY))
}

/// `GET /redoc`: the page that the Python service had beside it.
pub async fn redoc(context: &Context, request: &Request) -> Result<Response, Problem> {
    allowed(context, request)?;
    Ok(reply::empty(StatusCode::TEMPORARY_REDIRECT).with(LOCATION, "/docs"))
}

/// `GET /docs/start.js`.
pub async fn start(context: &Context, request: &Request) -> Result<Response, Problem> {
    allowed(context, request)?;
    Ok(sent(
        Bytes::from_static(START.as_bytes()),
        "text/javascript; charset=utf-8",
    ))
}

/// `GET /docs/swagger-ui-bundle.js`.
pub async fn script(context: &Context, request: &Request) -> Result<Response, Problem> {
    allowed(context, request)?;
    packed(request, SCRIPT, "text/javascript; charset=utf-8")
}

/// `GET /docs/swagger-ui.css`.
pub async fn style(context: &Context, request: &Request) -> Result<Response, Problem> {
    allowed(context, request)?;
    packed(request, STYLE, "text/css; charset=utf-8")
}

/// Compares an answer with the document, and logs an error if its status or type isn't there: the tests look for that in
/// the logs. Not in release builds.
#[cfg(debug_assertions)]
pub fn compare(request: &Request, response: &Response) {
    static DOCUMENT: OnceLock<serde_json::Value> = OnceLock::new();
    let document = DOCUMENT.get_or_init(document::document);
    let method = request.method.as_str().to_ascii_lowercase();
    let Some((path, item)) = document::item(document, request.path()) else {
        return;
    };
    let (operation, status) = (&item[&method], response.status().as_u16());
    if operation.is_null() || status == 405 {
        return;
    }
    let declared = &operation["responses"][status.to_string()];
    let declared = match declared["$ref"].as_str() {
        Some(reference) => document
            .pointer(&reference[1..])
            .unwrap_or(&serde_json::Value::Null),
        None => declared,
    };
    let content_type = response
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .map_or("", |value| value.split(';').next().unwrap_or_default().trim());
    let known = match declared.get("content") {
        Some(content) => content.get(content_type).is_some(),
        None => content_type.is_empty() && !declared.is_null(),
    };
    if !known {
        tracing::error!("{method} {path}: {status} {content_type} is not in the OpenAPI document");
    }
}

fn allowed(context: &Context, request: &Request) -> Result<(), Problem> {
    if !context.config.enable_docs {
        return Err(Problem::NoSuchPath);
    }
    if request.method != Method::GET {
        return Err(Problem::MethodNotAllowed(&[Method::GET]));
    }
    Ok(())
}

fn sent(text: Bytes, content_type: &str) -> Response {
    Response::new(text.into()).with(CONTENT_TYPE, content_type)
}

/// A file that is stored compressed, as the client takes it.
fn packed(request: &Request, file: &'static [u8], content_type: &str) -> Result<Response, Problem> {
    let takes = headers::text(&request.headers, ACCEPT_ENCODING.as_str())
        .is_some_and(|accepted| accepted.contains("gzip"));
    let response = if takes {
        sent(Bytes::from_static(file), content_type).with(CONTENT_ENCODING, "gzip")
    } else {
        let mut plain = Vec::new();
        GzDecoder::new(file)
            .read_to_end(&mut plain)
            .map_err(Problem::internal)?;
        sent(plain.into(), content_type)
    };
    Ok(response.with(CACHE_CONTROL, "public, max-age=3600"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_viewer_is_whole_and_loads_nothing_from_elsewhere() {
        for (file, word) in [(SCRIPT, "SwaggerUIBundle"), (STYLE, ".swagger-ui")] {
            let mut text = String::new();
            GzDecoder::new(file).read_to_string(&mut text).unwrap();
            assert!(text.contains(word));
        }
        assert!(
            !PAGE.contains("//") && !START.contains("://"),
            "an address of another host"
        );
    }
}
