//! `webhooks listen`: a receiver on this machine. It verifies what comes and prints it.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use shared::clock;
use shared::env::Vars;
use shared::webhook::signature::{Headers, SigningSecret, verify};
use tokio::net::TcpListener;

use crate::failure::Failure;
use crate::output;

/// No event of the service is longer.
const LONGEST: usize = 8 * 1024 * 1024;

/// Where to listen, and with which secret.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Port on 127.0.0.1; 0 selects a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The secret of the endpoint, or of the key (or `CLAUDE_QUEUE_WEBHOOK_SECRET`); without it, nothing is verified
    #[arg(long)]
    secret: Option<String>,
    /// Print whole events as JSON, one per line
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let secret = arguments
        .secret
        .or(vars.text("CLAUDE_QUEUE_WEBHOOK_SECRET")?)
        .as_deref()
        .map(SigningSecret::parse)
        .transpose()
        .map_err(|error| Failure::Other(error.to_string()))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, arguments.port));
    let failed = |error| Failure::Other(format!("could not listen on {address}: {error}"));
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    output::result(format_args!("listening on http://{bound}/"))?;
    if secret.is_none() {
        output::note("no --secret, so nothing is verified");
    }
    let secrets: Arc<[SigningSecret]> = secret.into_iter().collect();
    loop {
        let (stream, _) = listener.accept().await.map_err(failed)?;
        let (secrets, as_json) = (secrets.clone(), arguments.json);
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let secrets = secrets.clone();
                async move { Ok::<_, Infallible>(receive(request, &secrets, as_json).await) }
            });
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn receive(
    request: Request<Incoming>,
    secrets: &[SigningSecret],
    as_json: bool,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let header = |name: &str| {
        let value = head.headers.get(name);
        value.and_then(|value| value.to_str().ok()).unwrap_or_default()
    };
    let Ok(body) = Limited::new(body, LONGEST).collect().await else {
        return answer(StatusCode::PAYLOAD_TOO_LARGE);
    };
    let body = body.to_bytes();
    if !secrets.is_empty() {
        let headers = Headers {
            id: Some(header("webhook-id")),
            timestamp: Some(header("webhook-timestamp")),
            signature: Some(header("webhook-signature")),
        };
        if let Err(why) = verify(secrets, &headers, &body, clock::now()) {
            output::note(format_args!("refused: {why}"));
            return answer(StatusCode::UNAUTHORIZED);
        }
    }
    let Ok(event) = serde_json::from_slice::<Value>(&body) else {
        output::note("refused: the body isn't JSON");
        return answer(StatusCode::BAD_REQUEST);
    };
    let printed = if as_json {
        output::json_line(&event)
    } else {
        output::result(line(header("webhook-id"), &event))
    };
    answer(if printed.is_ok() {
        StatusCode::NO_CONTENT
    } else {
        StatusCode::INTERNAL_SERVER_ERROR
    })
}

fn answer(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// An event in one line.
fn line(id: &str, event: &Value) -> String {
    let about = match &event["job"] {
        Value::Null => &event["data"],
        job => job,
    };
    let text = |name: &str| about[name].as_str().unwrap_or("-");
    let mut line = format!("{id}  {}", event["type"].as_str().unwrap_or("-"));
    if about["status"].is_string() {
        line = format!("{line}  {}  {}", text("id"), text("status"));
    }
    if let Some(content) = about["result"]["content"].as_str() {
        line = format!("{line}  {}", crate::show::short(content));
    }
    line
}
