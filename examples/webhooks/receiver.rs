//! Receives webhooks of claude-queue, verifies them and prints them.
//!
//! Needs: `cargo add standardwebhooks http serde_json http-body-util hyper hyper-util tokio`
//! Usage: `WEBHOOK_SECRET=whsec_… receiver [PORT]`

#![expect(clippy::print_stdout, reason = "that is what it is for")]

use std::collections::HashSet;
use std::convert::Infallible;
use std::error::Error;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use standardwebhooks::Webhook;
use tokio::net::TcpListener;

/// What the receiver knows.
pub(crate) struct Receiver {
    webhook: Webhook,
    /// An event may come twice; its id tells.
    seen: Mutex<HashSet<String>>,
}

impl Receiver {
    /// One that verifies with this secret.
    pub(crate) fn new(secret: &str) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            webhook: Webhook::new(secret)?,
            seen: Mutex::default(),
        })
    }

    /// Serves until the listener fails. `print` gets each event once.
    pub(crate) async fn serve(
        self,
        listener: TcpListener,
        print: impl Fn(&Value) + Clone + Send + Sync + 'static,
    ) {
        let receiver = Arc::new(self);
        while let Ok((stream, _)) = listener.accept().await {
            let (receiver, print) = (receiver.clone(), print.clone());
            tokio::spawn(async move {
                let service = service_fn(|request: Request<Incoming>| async {
                    let (head, body) = request.into_parts();
                    let status = match body.collect().await {
                        Ok(body) => receiver.receive(&head.headers, &body.to_bytes(), &print),
                        Err(_) => StatusCode::BAD_REQUEST,
                    };
                    let mut response = Response::new(Empty::<Bytes>::new());
                    *response.status_mut() = status;
                    Ok::<_, Infallible>(response)
                });
                let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                let _ = connection.await;
            });
        }
    }

    fn receive(&self, headers: &HeaderMap, body: &[u8], print: impl Fn(&Value)) -> StatusCode {
        if self.webhook.verify(body, headers).is_err() {
            return StatusCode::UNAUTHORIZED;
        }
        let id = headers.get("webhook-id").and_then(|id| id.to_str().ok());
        let new = id.is_some_and(|id| self.seen.lock().is_ok_and(|mut seen| seen.insert(id.to_owned())));
        match serde_json::from_slice(body) {
            Ok(event) if new => print(&event),
            Ok(_) => {}
            Err(_) => return StatusCode::BAD_REQUEST,
        }
        StatusCode::NO_CONTENT
    }
}

/// An event in one line.
pub(crate) fn line(event: &Value) -> String {
    let about = if event["job"].is_null() {
        &event["data"]
    } else {
        &event["job"]
    };
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    format!(
        "{} {} {}",
        text(&event["type"]),
        text(&about["id"]),
        text(&about["status"])
    )
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let receiver = Receiver::new(&std::env::var("WEBHOOK_SECRET")?)?;
    let port = std::env::args().nth(1).map_or(Ok(0), |port| port.parse())?;
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("listening on http://{}/", listener.local_addr()?);
    receiver
        .serve(listener, |event| println!("{}", line(event)))
        .await;
    Ok(())
}
