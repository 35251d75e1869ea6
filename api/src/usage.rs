//! What was spent, over HTTP: a summary of a key, and the ledger, entry by entry or added up.

use http::StatusCode;
use http::header::{ACCEPT, CONTENT_TYPE};
use serde::Serialize;
use serde_json::Value;
use shared::budget::Scope;
use shared::clock::{self, Timestamp};
use shared::id::{JobId, KeyId};
use shared::job::JobStatus;
use shared::money::MicroUsd;
use shared::storage::{LedgerEntry, LedgerGroup, LedgerPart, LedgerSum};
use std::time::Duration;
use warp::reply::Response;

use crate::budgets::{self, BudgetView};
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::page::{Pagination, TextCursor, more_than};
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, Meta};
use crate::http::request::fields::{Fault, choice};
use crate::http::request::{Query, Request, headers, in_query};

/// The longest part of the ledger that one request may ask for.
const LONGEST: Duration = Duration::from_hours(366 * 24);
/// What is shown of the ledger unless the request says from when.
const RECENT: Duration = Duration::from_hours(30 * 24);
/// A day of UTC, in microseconds.
const DAY: i64 = 86_400_000_000;

/// `GET /usage`: what a key has done and spent since ever.
pub async fn summary(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let store = &context.store;
    let query = request.query();
    let key_id = owner(caller, &query)?.unwrap_or_else(|| caller.key_id.clone());
    let usage = store.usage(&key_id).await?;
    let budget = store.budget(&Scope::Key(key_id.clone()), clock::now()).await?;
    let page = UsagePage {
        data: UsageView {
            budget: budget.as_ref().map(BudgetView::of),
            cost: usage.cost(),
            jobs: JobCounts {
                cancelled: usage.jobs(Some(JobStatus::Cancelled)),
                completed: usage.jobs(Some(JobStatus::Done)),
                failed: usage.jobs(Some(JobStatus::Failed)),
                queued: usage.jobs(Some(JobStatus::Queued)),
                running: usage.jobs(Some(JobStatus::Running)),
                total: usage.jobs(None),
            },
            messages: usage.messages(),
            sessions: usage.sessions(),
            turns: usage.turns(),
        },
        meta: Meta::of(request),
        user_id: &key_id,
    };
    reply::json(StatusCode::OK, &page)
}

/// The summary, in the form of the Python service.
#[derive(Debug, Serialize)]
struct UsagePage<'p> {
    data: UsageView,
    meta: Meta<'p>,
    user_id: &'p KeyId,
}

/// What a key has done and spent.
#[derive(Debug, Serialize)]
pub struct UsageView {
    budget: Option<BudgetView>,
    cost: MicroUsd,
    jobs: JobCounts,
    messages: i64,
    sessions: i64,
    turns: i64,
}

/// How many jobs of each status there are.
#[derive(Debug, Serialize)]
struct JobCounts {
    cancelled: i64,
    completed: i64,
    failed: i64,
    queued: i64,
    running: i64,
    total: i64,
}

/// `GET /usage/ledger`: what each model cost in each attempt, or sums over days, keys, models or sessions.
pub async fn ledger(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=1_000)?.unwrap_or(100);
    let group = query.value("group_by", |word| {
        choice(&["none", "day", "key", "model", "session"])(word.into())
    })?;
    let group = match group {
        Some("day") => Some(LedgerGroup::Day),
        Some("key") => Some(LedgerGroup::Key),
        Some("model") => Some(LedgerGroup::Model),
        Some("session") => Some(LedgerGroup::Session),
        _ => None,
    };
    let owner = owner(caller, &query)?;
    // A part that begins or ends now moves with each page, so a cursor brings its bounds along.
    let bound_to = format!(
        "{group:?} {owner:?} {:?} {:?}",
        query.text("from"),
        query.text("to")
    );
    let position = match query.text("cursor") {
        Some(cursor) => Some(Position::parse(&TextCursor::decode(cursor, &bound_to)?.0)?),
        None => None,
    };
    let (from, to) = match &position {
        Some(position) => (position.from, position.to),
        None => bounds(&query, clock::now())?,
    };
    let part = LedgerPart {
        key_id: if caller.admin {
            owner
        } else {
            Some(caller.key_id.clone())
        },
        from,
        to,
    };
    let beyond = position.map(|position| position.beyond);
    let page = match group {
        None => entries(context, &part, beyond.as_deref(), limit).await?,
        Some(group) => sums(context, &part, group, beyond.as_deref(), limit).await?,
    };
    let next = page.next.map(|beyond| {
        let position = Position { from, to, beyond };
        TextCursor(position.write()).encode(&bound_to)
    });
    let pagination = Pagination::new(limit, next);
    let response = if headers::prefers(&request.headers, "text/csv") {
        csv(page.columns, &page.rows)?
    } else {
        reply::list(request, page.rows, &pagination)?
    };
    Ok(pagination.link(request, response).varies_by(ACCEPT.as_str()))
}

/// Rows of one page, and the last one's position if more follow.
struct Page {
    columns: &'static [&'static str],
    rows: Vec<Row>,
    next: Option<String>,
}

/// A row of either form.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Row {
    Entry(Box<LedgerRowView>),
    Sum(Box<LedgerSumView>),
}

/// Where a page of the ledger goes on.
struct Position {
    from: Timestamp,
    to: Timestamp,
    beyond: String,
}

impl Position {
    fn write(&self) -> String {
        format!("{} {} {}", self.from.0, self.to.0, self.beyond)
    }

    fn parse(text: &str) -> Result<Self, Problem> {
        let mut parts = text.splitn(3, ' ');
        let mut number = || parts.next()?.parse().ok().map(Timestamp);
        let (from, to) = number().zip(number()).ok_or(Problem::InvalidCursor)?;
        let beyond = parts.next().ok_or(Problem::InvalidCursor)?.to_owned();
        Ok(Self { from, to, beyond })
    }
}

/// Whose usage is asked for: `user_id`, which only an administrator may set to another's.
pub fn owner(caller: &Caller, query: &Query) -> Result<Option<KeyId>, Problem> {
    match query.text("user_id").filter(|user| *user != "default") {
        Some(user) if user == caller.key_id.as_str() => Ok(Some(caller.key_id.clone())),
        Some(user) if caller.admin && budgets::is_key_id(user) => Ok(Some(KeyId::known(user))),
        Some(_) if caller.admin => Err(Problem::NoSuch("Key")),
        Some(_) => Err(Problem::AdminOnly("see what others have spent")),
        None => Ok(None),
    }
}

/// The bounds that the query names: the last 30 days unless it says otherwise.
fn bounds(query: &Query, now: Timestamp) -> Result<(Timestamp, Timestamp), Problem> {
    let (from, to) = (query.time("from")?, query.time("to")?.unwrap_or(now));
    let from = from.unwrap_or(to.before(RECENT));
    let fault = |why: &'static str| Problem::Invalid(in_query("from", vec![Fault::value(why)]));
    if from > to {
        return Err(fault("Time should not be after to"));
    }
    if to.since(from) > LONGEST {
        return Err(fault("Time should be at most 366 days before to"));
    }
    Ok((from, to))
}

async fn entries(
    context: &Context,
    part: &LedgerPart,
    beyond: Option<&str>,
    limit: i64,
) -> Result<Page, Problem> {
    let beyond = match beyond {
        Some(position) => {
            let (at, number) = position.split_once(':').ok_or(Problem::InvalidCursor)?;
            let at = at.parse().map(Timestamp).map_err(|_| Problem::InvalidCursor)?;
            Some((at, number.parse().map_err(|_| Problem::InvalidCursor)?))
        }
        None => None,
    };
    let store = &context.store;
    let mut entries = store.ledger_entries(part, beyond, limit + 1).await?;
    let next = more_than(limit, &mut entries, |entry| {
        format!("{}:{}", entry.at.0, entry.ledger_number)
    });
    Ok(Page {
        columns: &[
            "at",
            "key_id",
            "job_id",
            "attempt",
            "session",
            "model",
            "cost",
            "input_tokens",
            "output_tokens",
            "cache_creation_input_tokens",
            "cache_read_input_tokens",
            "estimated",
            "reason",
        ],
        rows: entries
            .into_iter()
            .map(|entry| Row::Entry(Box::new(LedgerRowView::of(entry))))
            .collect(),
        next,
    })
}

async fn sums(
    context: &Context,
    part: &LedgerPart,
    group: LedgerGroup,
    beyond: Option<&str>,
    limit: i64,
) -> Result<Page, Problem> {
    let store = &context.store;
    let mut sums = store.ledger_sums(part, group, beyond, limit + 1).await?;
    let next = more_than(limit, &mut sums, |sum| sum.name.clone());
    macro_rules! columns {
        ($name:literal) => {
            &[
                $name,
                "cost",
                "estimated_cost",
                "entries",
                "input_tokens",
                "output_tokens",
                "cache_creation_input_tokens",
                "cache_read_input_tokens",
            ]
        };
    }
    Ok(Page {
        columns: match group {
            LedgerGroup::Day => columns!("day"),
            LedgerGroup::Key => columns!("key_id"),
            LedgerGroup::Model => columns!("model"),
            LedgerGroup::Session => columns!("session"),
        },
        rows: sums
            .into_iter()
            .map(|sum| Row::Sum(Box::new(LedgerSumView::of(group, sum))))
            .collect(),
        next,
    })
}

/// What one model cost in one attempt, as clients see it.
#[derive(Debug, Serialize)]
pub struct LedgerRowView {
    at: Timestamp,
    attempt: Option<i64>,
    cost: MicroUsd,
    estimated: bool,
    job_id: Option<JobId>,
    /// What belongs to the global budget alone is nobody's.
    key_id: Option<KeyId>,
    model: Option<String>,
    reason: Option<String>,
    session: Option<String>,
    usage: TokensView,
}

impl LedgerRowView {
    fn of(entry: LedgerEntry) -> Self {
        Self {
            at: entry.at,
            attempt: entry.attempt,
            cost: entry.cost,
            estimated: entry.estimated,
            job_id: entry.job_id,
            key_id: Some(entry.key_id).filter(|key_id| !key_id.as_str().is_empty()),
            model: entry.model,
            reason: entry.reason,
            session: entry.session.or(entry.session_id.map(|id| id.to_string())),
            usage: TokensView {
                cache_creation_input_tokens: entry.cache_creation_input_tokens,
                cache_read_input_tokens: entry.cache_read_input_tokens,
                input_tokens: entry.input_tokens,
                output_tokens: entry.output_tokens,
            },
        }
    }
}

/// Tokens by kind.
#[derive(Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "the names on the wire")]
struct TokensView {
    cache_creation_input_tokens: i64,
    cache_read_input_tokens: i64,
    input_tokens: i64,
    output_tokens: i64,
}

/// A sum over entries, as clients see it.
#[derive(Debug, Serialize)]
#[expect(clippy::option_option, reason = "a name may be absent, or null")]
pub struct LedgerSumView {
    cost: MicroUsd,
    /// Of these four the one by which the sums are grouped is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    day: Option<Option<String>>,
    entries: i64,
    estimated_cost: MicroUsd,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<Option<String>>,
    usage: TokensView,
}

impl LedgerSumView {
    fn of(group: LedgerGroup, sum: LedgerSum) -> Self {
        let name = match group {
            LedgerGroup::Day => sum.name.parse::<i64>().ok().map(day),
            LedgerGroup::Session => sum.session.or(Some(sum.name)),
            LedgerGroup::Key | LedgerGroup::Model => Some(sum.name),
        };
        let name = name.filter(|name| !name.is_empty());
        let of = |wanted| (group == wanted).then(|| name.clone());
        Self {
            cost: sum.cost,
            day: of(LedgerGroup::Day),
            entries: sum.entries,
            estimated_cost: sum.estimated_cost,
            key_id: of(LedgerGroup::Key),
            model: of(LedgerGroup::Model),
            session: of(LedgerGroup::Session),
            usage: TokensView {
                cache_creation_input_tokens: sum.cache_creation_input_tokens,
                cache_read_input_tokens: sum.cache_read_input_tokens,
                input_tokens: sum.input_tokens,
                output_tokens: sum.output_tokens,
            },
        }
    }
}

/// The date of a day that is counted from 1970.
fn day(number: i64) -> String {
    Timestamp(number.saturating_mul(DAY))
        .to_utc()
        .format("%Y-%m-%d")
        .to_string()
}

/// The rows as comma-separated values (RFC 4180), the names of the columns first.
fn csv(columns: &[&str], rows: &[Row]) -> Result<Response, Problem> {
    let mut text = columns.join(",");
    text.push_str("\r\n");
    for row in rows {
        let row = serde_json::to_value(row).map_err(Problem::internal)?;
        for (index, column) in columns.iter().enumerate() {
            if index > 0 {
                text.push(',');
            }
            let value = row.get(column).or_else(|| row["usage"].get(column));
            text.push_str(&field(column, value.unwrap_or(&Value::Null)));
        }
        text.push_str("\r\n");
    }
    Ok(reply::text(StatusCode::OK, text).with(CONTENT_TYPE, "text/csv; charset=utf-8; header=present"))
}

/// One field. A text that a spreadsheet would take for a formula gets an apostrophe before it.
fn field(column: &str, value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => {
            let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
            let text = if formula { format!("'{text}") } else { text.clone() };
            if text.contains(['"', ',', '\n', '\r']) {
                format!("\"{}\"", text.replace('"', "\"\""))
            } else {
                text
            }
        }
        // A number of dollars never has an exponent here.
        Value::Number(number) if column.ends_with("cost") => number
            .as_f64()
            .and_then(MicroUsd::from_usd)
            .map_or_else(String::new, |cost| cost.to_string().replace('$', "")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: Timestamp = Timestamp(1_779_278_400_000_000);

    #[test]
    fn the_ledger_is_asked_for_up_to_a_year_at_a_time() {
        let bounds = |text: &str| {
            bounds(&Query::parse(text), NOW).map(|(from, to)| (from.to_string(), to.to_string()))
        };
        let recent = (
            "2026-04-20T12:00:00.000000+00:00",
            "2026-05-20T12:00:00.000000+00:00",
        );
        assert_eq!(bounds("").unwrap(), (recent.0.to_owned(), recent.1.to_owned()));
        assert!(bounds("from=2025-05-19T12:00:00Z").is_ok());
        for wrong in [
            "from=2025-05-19T11:59:59Z",
            "from=2026-06-01T00:00:00Z",
            "from=yesterday",
            "to=2026-05-20",
            "from=2026-05-20T12:00:01Z",
        ] {
            assert!(matches!(bounds(wrong), Err(Problem::Invalid(_))), "{wrong}");
        }
    }

    #[test]
    fn a_position_comes_back_as_it_went() {
        let position = Position {
            from: Timestamp(-5),
            to: NOW,
            beyond: "claude sonnet 5".to_owned(),
        };
        let back = Position::parse(&position.write()).unwrap();
        assert_eq!(
            (back.from, back.to, back.beyond),
            (position.from, position.to, position.beyond)
        );
        for wrong in ["", "1", "1 2", "a b c"] {
            assert!(Position::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn fields_are_quoted_and_no_formula_gets_through() {
        for (column, value, expected) in [
            ("model", json!("claude-sonnet-5"), "claude-sonnet-5"),
            ("reason", json!("a \"b\", c"), "\"a \"\"b\"\", c\""),
            ("reason", json!("=1+1"), "'=1+1"),
            ("session", json!("-x,y"), "\"'-x,y\""),
            ("cost", json!(-0.000_001), "-0.000001"),
            ("cost", json!(12), "12.00"),
            ("attempt", json!(2), "2"),
            ("estimated", json!(true), "true"),
            ("job_id", Value::Null, ""),
        ] {
            assert_eq!(field(column, &value), expected);
        }
    }

    #[test]
    fn days_are_dates() {
        assert_eq!(
            (day(0).as_str(), day(20_593).as_str()),
            ("1970-01-01", "2026-05-20")
        );
    }
}
