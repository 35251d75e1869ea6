//! A request on its way to the API, and its answer on the way back, metered as it passes.
//!
//! It works in a task of its own: a run that hangs up doesn't end the look at what its request cost.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http::header::{self, HeaderValue};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body, Frame};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::MAX_ERROR_BODY;
use crate::spend::answer::AnswerReader;
use crate::spend::meter::Metered;

/// How long the API may take for the beginning of a stream.
const HEAD_WITHIN: Duration = Duration::from_mins(2);

/// How long it may take for an answer that comes whole: a little less than the CLI waits, and the API works on one.
const ANSWER_WITHIN: Duration = Duration::from_secs(570);

/// What has come by the moment in which a run hangs up is read within the first time, and each piece of it within the
/// second: a run that didn't read what the API had sent pays for it all the same.
const CATCH_UP_WITHIN: Duration = Duration::from_millis(500);
const NEXT_WITHIN: Duration = Duration::from_millis(20);

/// How long the answer to a run that has hung up is read for what it cost: a stream until its prompt is counted,
/// anything else to its end.
const LINGER: Duration = Duration::from_mins(1);

/// The same once the attempt has ended, which then waits for it.
const LINGER_AT_END: Duration = Duration::from_secs(2);

/// How long the body of an error may take.
const ERROR_BODY_WITHIN: Duration = Duration::from_secs(10);

/// What came back first.
pub(super) enum Head {
    /// An answer, whose body passes as it comes.
    Answer(Response<()>, Passing),
    /// An error, whole.
    Failure(Response<Bytes>),
    /// None; why.
    Unreachable(String),
}

/// The body of an answer on its way.
#[derive(Debug)]
pub(super) struct Passing(mpsc::Receiver<io::Result<Bytes>>);

impl Body for Passing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0
            .poll_recv(cx)
            .map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

/// How the body of an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// As it should.
    Whole,
    /// It was cut off.
    Cut,
    /// Nobody wants it any more, or waits for it.
    Unwanted,
}

/// Sends a request and passes its answer on. `metered` is none for what costs nothing; `ending` tells the end of the
/// attempt.
pub(super) async fn relay(
    send: impl Future<Output = Result<reqwest::Response, String>>,
    is_stream: bool,
    mut metered: Option<Metered>,
    mut head: oneshot::Sender<Head>,
    ending: CancellationToken,
) {
    let within = if is_stream { HEAD_WITHIN } else { ANSWER_WITHIN };
    let sent = tokio::time::timeout(within, send);
    tokio::pin!(sent);
    let mut patience = Patience::new(ending);
    let sent = loop {
        tokio::select! {
            sent = &mut sent => break sent,
            () = head.closed(), if !patience.is_short() => patience.shorten(LINGER),
            () = patience.ends() => {
                // It may have been read and answered; nobody will know.
                if let Some(metered) = &mut metered {
                    metered.presume(!is_stream);
                }
                return;
            }
        }
    };
    let response = match sent {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return drop(head.send(Head::Unreachable(error))),
        Err(_) => {
            if let Some(metered) = &mut metered {
                metered.presume(!is_stream);
            }
            let seconds = within.as_secs();
            let error = format!("The Messages API gave no answer for {seconds} s.");
            return drop(head.send(Head::Unreachable(error)));
        }
    };
    if !response.status().is_success() {
        // Errors cost nothing.
        drop(metered);
        return drop(head.send(Head::Failure(whole(response).await)));
    }
    let (parts, mut body) = Response::<reqwest::Body>::from(response).into_parts();
    let is_readable = parts
        .headers
        .get(header::CONTENT_ENCODING)
        .is_none_or(|encoding| encoding == HeaderValue::from_static("identity"));
    let is_events = parts
        .headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let since = Instant::now();
    let (pieces, passing) = mpsc::channel(1);
    // A run that has gone by now changes nothing here.
    let _ = head.send(Head::Answer(Response::from_parts(parts, ()), Passing(passing)));
    let mut reader = AnswerReader::new(is_events);
    let end = pass(
        &mut body,
        &pieces,
        &mut patience,
        &mut reader,
        metered.as_mut(),
        is_events,
    )
    .await;
    let Some(metered) = &mut metered else { return };
    let is_whole = match end {
        End::Whole => true,
        End::Cut => false,
        End::Unwanted => is_events && catch_up(&mut body, &mut reader, metered).await,
    };
    if is_whole {
        reader.end();
        metered.observe(reader.reading());
    }
    if !is_readable {
        tracing::warn!(
            "an answer of the Messages API came compressed although that wasn't asked for; its most is charged"
        );
    }
    let says_nothing = !reader.reading().is_final && !reader.has_started();
    if !is_readable || (says_nothing && (!is_whole || is_events || reader.is_lost())) {
        metered.presume(!is_readable || !is_events);
    } else if reader.has_hidden_thoughts() {
        metered.presume_thoughts(since.elapsed());
    }
}

/// Reads what has come of an answer that isn't passed on any more; whether that was its end.
async fn catch_up(body: &mut reqwest::Body, reader: &mut AnswerReader, metered: &mut Metered) -> bool {
    let until = Instant::now() + CATCH_UP_WITHIN;
    while Instant::now() < until {
        let frame = match tokio::time::timeout(NEXT_WITHIN, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => return true,
            Ok(Some(Err(_))) | Err(_) => return false,
        };
        reader.read(&frame.into_data().unwrap_or_default());
        metered.observe(reader.reading());
    }
    false
}

/// Passes an answer's body on to its end.
async fn pass(
    body: &mut reqwest::Body,
    pieces: &mpsc::Sender<io::Result<Bytes>>,
    patience: &mut Patience,
    reader: &mut AnswerReader,
    mut metered: Option<&mut Metered>,
    is_events: bool,
) -> End {
    let ending = patience.ending.clone();
    loop {
        if patience.is_short() && is_events && (reader.has_started() || metered.is_none()) {
            return End::Unwanted;
        }
        let frame = tokio::select! {
            frame = body.frame() => frame,
            () = pieces.closed(), if !patience.is_short() => {
                patience.shorten(LINGER);
                continue;
            }
            () = patience.ends() => return End::Unwanted,
        };
        let data = match frame {
            None => return End::Whole,
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            Some(Err(error)) => {
                let _ = pieces.send(Err(io::Error::other(error))).await;
                return End::Cut;
            }
        };
        if let Some(metered) = &mut metered {
            reader.read(&data);
            metered.observe(reader.reading());
        }
        if !data.is_empty() && !patience.is_short() {
            tokio::select! {
                sent = pieces.send(Ok(data)) => if sent.is_err() {
                    patience.shorten(LINGER);
                },
                () = ending.cancelled() => {}
            }
        }
    }
}

/// An error's answer with its body.
async fn whole(response: reqwest::Response) -> Response<Bytes> {
    let (parts, body) = Response::<reqwest::Body>::from(response).into_parts();
    let read = tokio::time::timeout(ERROR_BODY_WITHIN, Limited::new(body, MAX_ERROR_BODY).collect()).await;
    let body = read
        .ok()
        .and_then(Result::ok)
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    Response::from_parts(parts, body)
}

/// How long an answer is still waited for: for ever, until nobody wants it any more.
struct Patience {
    ending: CancellationToken,
    has_ended: bool,
    until: Option<Instant>,
}

impl Patience {
    fn new(ending: CancellationToken) -> Self {
        Self {
            ending,
            has_ended: false,
            until: None,
        }
    }

    fn is_short(&self) -> bool {
        self.until.is_some() || self.ending.is_cancelled()
    }

    fn shorten(&mut self, to: Duration) {
        let until = Instant::now() + to;
        self.until = Some(self.until.map_or(until, |earlier| earlier.min(until)));
    }

    /// Its end. May be called again.
    async fn ends(&mut self) {
        while !self.has_ended {
            let until = self.until;
            let own = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = own => return,
                () = self.ending.cancelled() => {}
            }
            self.has_ended = true;
            self.shorten(LINGER_AT_END);
        }
        if let Some(until) = self.until {
            tokio::time::sleep_until(until).await;
        }
    }
}
