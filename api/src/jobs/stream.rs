//! The events of a job: replayed from the table, then live, with no gap between the two. The reader only ever asks
//! for what comes after the last event it sent; a wake-up tells it when to ask, never what happened.

use bytes::Bytes;
use futures_util::stream;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderName, StatusCode};
use serde::Serialize;
use serde_json::value::RawValue;
use shared::clock::Timestamp;
use shared::event::Event;
use shared::id::JobId;
use shared::job::Job;
use shared::storage::JobWakeup;
use shared::telemetry::chain;
use std::convert::Infallible;
use std::fmt::Write;
use std::time::Duration;
use sync_wrapper::SyncStream;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until};
use warp::reply::{Reply, Response};

use super::wait::Wait;
use crate::chat::Leaving;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::gate::streams::StreamPermit;
use crate::http::page::more_than;
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, X_JOB_ID};
use crate::http::request::Request;
use crate::http::request::headers::{EventForm, event_form, text};

/// A comment is sent this often, so that proxies keep the connection and a lost client is noticed.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// How many events are read from the table at a time.
const BATCH_SIZE: i64 = 256;
/// How often a stream checks whether the key that opened it is still valid. It wakes up as often by itself.
const KEY_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// A pause after the database failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// `GET /jobs/{id}/events`: a stream or a list, as `Accept` says.
pub async fn events(
    context: &Context,
    request: &Request,
    caller: &Caller,
    job: Job,
) -> Result<Response, Problem> {
    let response = match event_form(&request.headers) {
        Some(EventForm::Stream) => stream(context, request, caller, &job).await?,
        Some(EventForm::List) => list(context, request, caller, job).await?,
        None => return Err(Problem::NotAcceptable),
    };
    Ok(response.varies_by(ACCEPT.as_str()))
}

/// `GET /jobs/{id}/stream`: always a stream. 204 when the job has ended and nothing is left to send, which tells a
/// browser not to come again.
pub async fn stream(
    context: &Context,
    request: &Request,
    caller: &Caller,
    job: &Job,
) -> Result<Response, Problem> {
    let after = after(request)?;
    if job.data_removed {
        return Err(Problem::DataRemoved);
    }
    if job.status.is_final() && job.last_event_seq <= after {
        return Ok(reply::empty(StatusCode::NO_CONTENT));
    }
    let max = caller.max_streams();
    let permit = context.streams.enter(&caller.key_id, max).await?;
    let permit = permit.ok_or(Problem::TooManyStreams(max))?;
    let live = Live::new(context.clone(), caller, permit, job.job_id, after);
    Ok(as_stream(live, job.job_id))
}

/// The response that is this stream.
pub fn as_stream(live: Live, job_id: JobId) -> Response {
    let chunks = stream::unfold(live, async |mut live| {
        let chunk = live.next().await?;
        Some((Ok::<_, Infallible>(chunk), live))
    });
    let response = warp::reply::stream(SyncStream::new(chunks)).into_response();
    response
        .with(CONTENT_TYPE, "text/event-stream; charset=utf-8")
        .with(HeaderName::from_static("x-accel-buffering"), "no")
        .with(X_JOB_ID, job_id.to_string())
}

/// The events as one JSON list, waiting for the first if the client wants to.
async fn list(context: &Context, request: &Request, caller: &Caller, job: Job) -> Result<Response, Problem> {
    let (mut after, wait) = (after(request)?, Wait::of(request, context.config.wait_max)?);
    let limit = request.query().integer("limit", 1..=1000)?.unwrap_or(100);
    if job.data_removed {
        return Err(Problem::DataRemoved);
    }
    let _permit = wait.permit(context, caller)?;
    let deadline = Instant::now() + wait.limit;
    let mut wakeup = context.wakeups.job(job.job_id);
    let mut job = job;
    let mut events = loop {
        let events = context.store.events_after(job.job_id, after, limit + 1).await?;
        if !events.is_empty() || job.status.is_final() || wait.limit.is_zero() {
            break events;
        }
        tokio::select! {
            () = wakeup.changed() => {}
            () = sleep_until(deadline) => break events,
            () = context.stopping.cancelled() => break events,
        }
        job = context
            .store
            .job(job.job_id)
            .await?
            .ok_or(Problem::NoSuch("Job"))?;
    };
    let has_more = more_than(limit, &mut events, |_| ()).is_some();
    after = events.last().map_or(after, |event| event.seq);
    let shown = events.iter().map(EventView::of).collect::<Result<Vec<_>, _>>()?;
    let pagination = EventPages {
        has_more,
        limit,
        next_after: after,
    };
    Ok(wait
        .applied_to(reply::list(request, shown, pagination)?)
        .with(X_JOB_ID, job.job_id.to_string()))
}

/// The `pagination` of a list of events.
#[derive(Debug, Serialize)]
struct EventPages {
    has_more: bool,
    limit: i64,
    next_after: i64,
}

/// An event in a list, as clients see it.
#[derive(Serialize)]
struct EventView<'e> {
    seq: i64,
    #[serde(rename = "type")]
    event_type: &'static str,
    at: Timestamp,
    job_id: JobId,
    data: &'e RawValue,
}

impl<'e> EventView<'e> {
    fn of(event: &'e Event) -> Result<Self, Problem> {
        let data = serde_json::from_str(&event.data).map_err(Problem::internal)?;
        Ok(Self {
            seq: event.seq,
            event_type: event.event_type.as_str(),
            at: event.at,
            job_id: event.job_id,
            data,
        })
    }
}

/// The number of the last event that the client has: `Last-Event-ID`, else `?after=` or `?starting_after=`, else 0.
fn after(request: &Request) -> Result<i64, Problem> {
    let query = request.query();
    let named = text(&request.headers, "last-event-id").filter(|id| !id.is_empty());
    let Some(id) = named
        .or_else(|| query.text("after"))
        .or_else(|| query.text("starting_after"))
    else {
        return Ok(0);
    };
    match id.parse::<i64>() {
        Ok(seq) if seq >= 0 => Ok(seq),
        _ => Err(Problem::BadRequest(
            "Last-Event-ID and after are the number of an event".into(),
        )),
    }
}

/// An event as a server-sent event. The data is JSON without line breaks.
fn frame(text: &mut String, event: &Event) {
    // Writing to a string can't fail.
    let _ = write!(
        text,
        "id: {}\r\nevent: {}\r\ndata: {}\r\n\r\n",
        event.seq,
        event.event_type.as_str(),
        event.data
    );
}

/// How an event is written, if it is.
type Frame = fn(&mut String, &Event);

/// A stream that is open.
#[derive(Debug)]
pub struct Live {
    context: Context,
    caller: Caller,
    /// When to check whether the caller's key is still valid.
    check_key_at: Instant,
    /// Held as long as the stream is open.
    _permit: StreamPermit,
    job_id: JobId,
    after: i64,
    wakeup: JobWakeup,
    pings: Interval,
    until: Instant,
    frame: Frame,
    greeted: bool,
    ended: bool,
    /// What happens when the client leaves before the end.
    leaving: Option<Leaving>,
}

impl Live {
    /// The events of this job after this one.
    pub fn new(context: Context, caller: &Caller, permit: StreamPermit, job_id: JobId, after: i64) -> Self {
        // Registered before the first look at the table.
        let wakeup = context.wakeups.job(job_id);
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let until = Instant::now() + context.config.stream_max;
        Self {
            context,
            caller: caller.clone(),
            check_key_at: Instant::now() + KEY_CHECK_INTERVAL,
            _permit: permit,
            job_id,
            after,
            wakeup,
            pings,
            until,
            frame,
            greeted: false,
            ended: false,
            leaving: None,
        }
    }

    /// The same in other words, for a client that may leave.
    #[must_use]
    pub fn in_words_of(self, frame: Frame, leaving: Leaving) -> Self {
        Self {
            frame,
            greeted: true,
            leaving: Some(leaving),
            ..self
        }
    }

    /// What to send next; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            if let Some(leaving) = self.leaving.take() {
                leaving.stay();
            }
            return None;
        }
        let mut text = String::new();
        if !self.greeted {
            self.greeted = true;
            text.push_str("retry: 3000\r\n\r\n");
        }
        loop {
            if Instant::now() >= self.check_key_at {
                self.check_key_at = Instant::now() + KEY_CHECK_INTERVAL;
                if self.context.keyring.is_lost(&self.caller).await {
                    return Some(self.bye());
                }
            }
            self.read(&mut text).await;
            if !text.is_empty() {
                return Some(text.into());
            }
            if self.ended {
                return None;
            }
            tokio::select! {
                () = self.wakeup.changed() => {}
                _ = self.pings.tick() => {
                    self.ended = self.is_over().await;
                    return Some(Bytes::from_static(if self.ended { b": bye\r\n\r\n" } else { b": ping\r\n\r\n" }));
                }
                // The client comes again, here or to another process, and misses nothing.
                () = sleep_until(self.until) => return Some(self.bye()),
                () = self.context.stopping.cancelled() => return Some(self.bye()),
            }
        }
    }

    /// Adds the events that came since the last look. The stream outlives an outage; what was missed is in the table.
    async fn read(&mut self, text: &mut String) {
        if self.context.store.is_out() {
            // Whoever waits is woken when it is over.
            return;
        }
        match self
            .context
            .store
            .events_after(self.job_id, self.after, BATCH_SIZE)
            .await
        {
            Ok(events) => {
                for event in &events {
                    (self.frame)(text, event);
                    self.after = event.seq;
                    self.ended |= event.event_type.is_last();
                }
            }
            Err(error) if self.context.store.note(&error) => {}
            Err(error) => {
                tracing::warn!(job.id = %self.job_id, error = %chain(&error), "the event stream waits for the database");
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }

    /// Whether the job ended without an event that says so: its data was removed meanwhile.
    async fn is_over(&self) -> bool {
        match self.context.store.job(self.job_id).await {
            Ok(Some(job)) => job.data_removed || (job.status.is_final() && job.last_event_seq <= self.after),
            Ok(None) => true,
            Err(_) => false,
        }
    }

    fn bye(&mut self) -> Bytes {
        self.ended = true;
        Bytes::from_static(b": bye\r\n\r\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::event::EventType;

    #[test]
    fn an_event_is_framed_as_the_old_clients_read_it() {
        let event = Event {
            job_id: JobId::new(),
            seq: 7,
            event_type: EventType::ToolResult,
            at: Timestamp(0),
            data: r#"{"a":"x\ny"}"#.to_owned(),
        };
        let mut text = String::new();
        frame(&mut text, &event);
        assert_eq!(
            text,
            "id: 7\r\nevent: tool_result\r\ndata: {\"a\":\"x\\ny\"}\r\n\r\n"
        );
    }
}
