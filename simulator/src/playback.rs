//! An answer on the wire: its events with their pauses, and the fault it ends in.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::connection::ResetAtEnd;
use crate::recorder::Open;
use crate::response::Body;
use crate::scenario::{Fault, Step};
use crate::spend::Bill;

/// Between the last event and a cut, so that what was sent before arrives before.
const BEFORE_CUT: Duration = Duration::from_millis(30);

struct Playback {
    events: VecDeque<Value>,
    ending: Ending,
    pause: Duration,
    words: u64,
    bill: Bill,
    _open: Open,
}

enum Ending {
    Complete,
    Silence,
    Pings,
    Cut { reset: Option<ResetAtEnd> },
    Endless,
}

/// The body of a streamed answer.
/// `bill` begins to count it, by the number of its pieces of text, which is 0 when it has no end.
pub(crate) fn body(
    events: Vec<Value>,
    step: &Step,
    reset: ResetAtEnd,
    open: Open,
    bill: impl FnOnce(usize) -> Bill,
) -> Body {
    let mut events = VecDeque::from(events);
    let pieces = events
        .iter()
        .filter(|event| event["type"] == "content_block_delta")
        .count();
    let mut pause = Duration::from_millis(step.chunk_delay_ms);
    let ending = match &step.fault {
        // The server never comes here with NoAnswer.
        None | Some(Fault::NoAnswer) => Ending::Complete,
        Some(Fault::Silence { after_events }) => cut_to(&mut events, *after_events, Ending::Silence),
        Some(Fault::Pings { after_events }) => cut_to(&mut events, *after_events, Ending::Pings),
        Some(Fault::Truncate { after_events }) => cut_to(&mut events, *after_events, Ending::Complete),
        Some(Fault::Close { after_events }) => {
            cut_to(&mut events, *after_events, Ending::Cut { reset: None })
        }
        Some(Fault::Reset { after_events }) => {
            cut_to(&mut events, *after_events, Ending::Cut { reset: Some(reset) })
        }
        Some(Fault::StreamError {
            after_events,
            error_type,
            message,
        }) => {
            events.truncate(*after_events);
            events.push_back(json!({"type": "error", "error": {"type": error_type, "message": message}}));
            Ending::Complete
        }
        Some(Fault::Endless) => {
            pause = if pause.is_zero() {
                Duration::from_millis(50)
            } else {
                pause
            };
            cut_to(&mut events, 2, Ending::Endless)
        }
    };
    let is_endless = matches!(ending, Ending::Endless);
    let playback = Playback {
        events,
        ending,
        pause,
        words: 0,
        bill: bill(if is_endless { 0 } else { pieces }),
        _open: open,
    };
    StreamBody::new(stream::unfold(playback, next)).boxed_unsync()
}

fn cut_to(events: &mut VecDeque<Value>, count: usize, ending: Ending) -> Ending {
    events.truncate(count);
    ending
}

/// The next piece of the body, when its time has come; `None` at the end.
async fn next(mut playback: Playback) -> Option<(io::Result<Frame<Bytes>>, Playback)> {
    if let Some(event) = playback.events.pop_front() {
        if event["type"] == "content_block_delta" && !playback.pause.is_zero() {
            sleep(playback.pause).await;
        }
        playback.bill.sent(&event);
        return Some((Ok(frame(&event)), playback));
    }
    let piece = match &playback.ending {
        Ending::Complete => return None,
        Ending::Silence => pending().await,
        Ending::Pings => {
            sleep(Duration::from_secs(1)).await;
            Ok(frame(&json!({"type": "ping"})))
        }
        Ending::Cut { reset } => {
            sleep(BEFORE_CUT).await;
            if let Some(reset) = reset {
                reset.set();
            }
            Err(io::Error::other("cut, as the scenario says"))
        }
        Ending::Endless => {
            sleep(playback.pause).await;
            playback.words += 1;
            let text = format!("word{} ", playback.words);
            let delta = json!({"type": "text_delta", "text": text});
            let event = json!({"type": "content_block_delta", "index": 0, "delta": delta});
            playback.bill.sent(&event);
            Ok(frame(&event))
        }
    };
    Some((piece, playback))
}

/// One server-sent event.
fn frame(event: &Value) -> Frame<Bytes> {
    let name = event["type"].as_str().unwrap_or_default();
    Frame::data(Bytes::from(format!("event: {name}\ndata: {event}\n\n")))
}
