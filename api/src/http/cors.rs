//! Which web pages may call the API (CORS). A page of another origin gets an answer without the headers that would
//! let it read it: never an error, since whether to show the answer is for the browser to decide.

use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
};
use http::{HeaderMap, HeaderValue, Method};

/// The headers of an answer that a page may read.
const EXPOSED: &str = "Location, Retry-After, ETag, Link, X-Request-ID, X-Job-Id, X-RateLimit-Limit, \
     X-RateLimit-Remaining, X-RateLimit-Used, X-RateLimit-Reset, X-RateLimit-Resource, RateLimit, RateLimit-Policy, \
     X-Budget-Limit, X-Budget-Remaining, X-Budget-Reset, Idempotency-Replayed, Preference-Applied, Content-Location";

/// The origins that may call.
#[derive(Clone, Debug)]
pub struct Cors {
    any: bool,
    named: Vec<String>,
}

impl Cors {
    /// Every origin.
    pub const fn any() -> Self {
        Self {
            any: true,
            named: Vec::new(),
        }
    }

    /// These origins, `*` for every. `None` when one isn't an origin: a scheme, a host, perhaps a port, no path.
    pub fn of(origins: &[String]) -> Option<Self> {
        let mut cors = Self {
            any: false,
            named: Vec::new(),
        };
        for origin in origins {
            match origin.as_str() {
                "*" => cors.any = true,
                origin => cors.named.push(normal(origin)?),
            }
        }
        Some(cors)
    }

    /// Whether the origin is allowed by its name, not only by `*`.
    pub fn names(&self, origin: &str) -> bool {
        self.named.iter().any(|named| named == origin)
    }

    /// Adds the headers that the browser of the page wants to see, if the page may call.
    pub fn apply_to(&self, request: &HeaderMap, response: &mut HeaderMap) {
        let Some(origin) = request.get(ORIGIN) else { return };
        let named = origin.to_str().is_ok_and(|origin| self.names(origin));
        if !named && !self.any {
            return;
        }
        // Never with credentials: keys travel in headers that the page sets itself.
        let allowed = if named {
            origin.clone()
        } else {
            HeaderValue::from_static("*")
        };
        response.insert(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        if request.contains_key(ACCESS_CONTROL_REQUEST_METHOD) {
            let methods = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE");
            response.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
            if let Some(headers) = request.get(ACCESS_CONTROL_REQUEST_HEADERS) {
                response.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers.clone());
            }
            response.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        } else {
            response.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        }
    }
}

/// Whether a browser asks beforehand if a page may send a request.
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS
        && headers.contains_key(ORIGIN)
        && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// The origin as browsers write it.
fn normal(text: &str) -> Option<String> {
    let url = url::Url::parse(text).ok()?;
    let bare =
        url.path() == "/" && url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    let origin = url.origin();
    (bare && origin.is_tuple()).then(|| origin.ascii_serialization())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(cors: &Cors, pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let request = pairs.iter().map(|(name, value)| {
            (
                http::HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        });
        let mut response = HeaderMap::new();
        cors.apply_to(&request.collect(), &mut response);
        response
    }

    #[test]
    fn a_named_origin_is_echoed_and_another_gets_nothing() {
        let cors = Cors::of(&["https://App.example:443/".into()]).unwrap();
        assert_eq!(
            answer(&cors, &[("origin", "https://app.example")])["access-control-allow-origin"],
            "https://app.example"
        );
        assert!(answer(&cors, &[("origin", "https://evil.example")]).is_empty());
        assert!(answer(&cors, &[]).is_empty());
    }

    #[test]
    fn a_star_allows_everyone_but_names_no_one() {
        let cors = Cors::any();
        let headers = answer(&cors, &[("origin", "https://a.example")]);
        assert_eq!(headers["access-control-allow-origin"], "*");
        assert!(!headers.contains_key("access-control-allow-credentials"));
        assert!(
            headers["access-control-expose-headers"]
                .to_str()
                .unwrap()
                .contains("X-Job-Id")
        );
        assert!(!cors.names("https://a.example"));
    }

    #[test]
    fn a_preflight_learns_which_methods_and_headers_pass() {
        let asked = [
            ("origin", "https://a.example"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "x-api-key,content-type"),
        ];
        let headers = answer(&Cors::any(), &asked);
        assert_eq!(headers["access-control-allow-headers"], "x-api-key,content-type");
        assert!(
            headers["access-control-allow-methods"]
                .to_str()
                .unwrap()
                .contains("POST")
        );
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for text in [
            "a.example",
            "https://a.example/path",
            "https://me@a.example",
            "null",
            "data:x",
        ] {
            assert!(Cors::of(&[text.to_owned()]).is_none(), "{text}");
        }
    }
}
