//! The messages of sessions: the prompts of their jobs, and what the jobs answered.

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use shared::clock::Timestamp;
use shared::id::JobId;
use shared::job::Job;
use shared::money::MicroUsd;
use shared::storage::{self, Exchange, MessagesOf};
use std::borrow::Cow;
use warp::reply::Response;

use super::find;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply::{self, Meta};
use crate::http::request::{Request, Segment};

/// A message as clients see it.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// `user` or `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: String,
    /// The tools that were called for an answer.
    pub tools_used: Option<Box<RawValue>>,
    /// What the answer has cost.
    pub cost: MicroUsd,
    /// How long it took.
    pub duration_ms: i64,
    /// When it was sent.
    pub created_at: Timestamp,
    /// Grows with the conversation.
    pub id: i64,
    /// The job that it belongs to.
    pub job_id: JobId,
}

/// Where a message is found.
#[derive(Clone, Debug)]
struct Position {
    exchange: Exchange,
    answer: bool,
}

impl Position {
    /// A prompt has an even number, its answer the next.
    const fn id(&self) -> i64 {
        self.exchange.job_number * 2 + self.answer as i64
    }
}

/// The list around messages; they go between the brackets of `data`.
#[derive(Serialize)]
struct History<'h> {
    data: [(); 0],
    meta: Meta<'h>,
    session_id: String,
    count: usize,
}

/// `GET /sessions/{s}/history`: the newest messages, oldest first; `before` a message's id, those before it.
pub async fn history(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=1000)?.unwrap_or(100);
    let before = query.integer("before", 0..=i64::MAX)?;
    let session = find(context, caller, name.as_ref()).await?;
    let mut positions = positions(context, MessagesOf::Session(session.session_id), before, limit).await?;
    positions.reverse();
    let around = History {
        data: [],
        meta: Meta::of(request),
        session_id: session
            .claude_session_id
            .unwrap_or_else(|| session.session_number.to_string()),
        count: positions.len(),
    };
    // A thousand messages may be gigabytes: each is read when the client has taken the one before.
    let shared = context.clone();
    let items = stream::iter(positions).then(move |position| {
        let context = shared.clone();
        async move { read(&context, &position).await.map(|(message, _)| message) }
    });
    let context = context.clone();
    reply::long(&around, items, move |problem: &Problem| context.report(problem))
}

/// The newest `limit` messages before the one with this id, each cut to its first characters, with its session.
pub async fn excerpts(
    context: &Context,
    of: MessagesOf<'_>,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<(Message, Exchange, Job)>, Problem> {
    let positions = positions(context, of, before, limit).await?;
    stream::iter(positions)
        .then(async |position| {
            let (mut message, job) = read(context, &position).await?;
            message.content = excerpt(message.content);
            Ok((message, position.exchange, job))
        })
        .try_collect()
        .await
}

/// At most 500 characters, and three dots where more were.
fn excerpt(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(500) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// Where the newest messages are, the newest first.
async fn positions(
    context: &Context,
    of: MessagesOf<'_>,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<Position>, Problem> {
    let last = before.map_or(i64::MAX, |id| id.saturating_sub(1));
    let exchanges = context.store.exchanges(of, last / 2, limit).await?;
    let both = exchanges.into_iter().flat_map(|exchange| {
        let answer = exchange.answered.then(|| Position {
            exchange: exchange.clone(),
            answer: true,
        });
        let prompt = Position {
            exchange,
            answer: false,
        };
        answer.into_iter().chain([prompt])
    });
    let wanted = both.filter(|position| position.id() <= last);
    Ok(wanted.take(usize::try_from(limit).unwrap_or(0)).collect())
}

/// What is shown of a result.
#[derive(Deserialize)]
struct Answer<'r> {
    #[serde(borrow, default)]
    content: Cow<'r, str>,
    #[serde(borrow)]
    tools_used: Option<&'r RawValue>,
}

async fn read(context: &Context, position: &Position) -> Result<(Message, Job), Problem> {
    let part = if position.answer {
        storage::JobPart::Result
    } else {
        storage::JobPart::Full
    };
    let details = context
        .store
        .job_details(position.exchange.job_id, None, None, part)
        .await?
        .ok_or(Problem::NoSuch("Job"))?;
    let job = details.job;
    let mut message = Message {
        role: "user",
        content: details.message,
        tools_used: None,
        cost: MicroUsd::ZERO,
        duration_ms: 0,
        created_at: job.created_at,
        id: position.id(),
        job_id: job.job_id,
    };
    if position.answer {
        let result = details.result.unwrap_or_else(|| "{}".to_owned());
        let answer = serde_json::from_str::<Answer>(&result).map_err(Problem::internal)?;
        message.role = "assistant";
        message.content = answer.content.into_owned();
        message.tools_used = answer.tools_used.map(ToOwned::to_owned);
        (message.cost, message.duration_ms) = (job.cost, job.duration_ms);
        message.created_at = job.completed_at.unwrap_or(job.created_at);
    }
    Ok((message, job))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        assert_eq!(excerpt("é".repeat(500)), "é".repeat(500));
        assert_eq!(excerpt("é".repeat(501)), format!("{}...", "é".repeat(500)));
    }

    #[test]
    fn an_answer_comes_after_its_prompt() {
        let exchange = Exchange {
            job_number: 7,
            job_id: JobId::new(),
            session_number: 1,
            session_name: "s".to_owned(),
            answered: true,
        };
        let id = |answer| {
            Position {
                exchange: exchange.clone(),
                answer,
            }
            .id()
        };
        assert_eq!((id(false), id(true)), (14, 15));
    }
}
