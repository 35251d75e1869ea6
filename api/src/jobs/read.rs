//! Reading jobs: one, many, and the result alone.

use futures_util::stream;
use http::StatusCode;
use http::header::{ACCEPT, IF_NONE_MATCH};
use serde_json::Value;
use shared::clock;
use shared::id::{JobId, KeyId};
use shared::job::{Job, JobKind, JobStatus};
use shared::session::Session;
use shared::spelling;
use shared::storage::{self, JobFilter};
use warp::reply::Response;

use super::view::{self, Detail, JobPart, JobView};
use super::wait::{self, Wait};
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::page::{Cursor, Pagination, more_than};
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, X_JOB_ID, etag};
use crate::http::request::fields::{Fault, choice, text};
use crate::http::request::{Query, Request, headers, in_query};
use crate::sessions;

/// How many rows are read at once of a list that is shown in full.
const AT_ONCE: i64 = 100;

/// The job of this id, if it exists for the caller.
pub async fn find(context: &Context, caller: &Caller, job_id: JobId) -> Result<Job, Problem> {
    let job = context.store.job(job_id).await?;
    job.filter(|job| caller.sees(&job.key_id))
        .ok_or(Problem::NoSuch("Job"))
}

/// Whose jobs the caller may read; `None`: everybody's.
fn reader(caller: &Caller) -> Option<&KeyId> {
    (!caller.admin).then_some(&caller.key_id)
}

/// `GET /jobs/{id}`: the job now, or after `wait` seconds at most, when it has changed from what the client knows or,
/// if it knows nothing, has ended. It is read by one statement; a wait looks at its row before.
pub async fn show(
    context: &Context,
    request: &Request,
    caller: &Caller,
    job_id: JobId,
) -> Result<Response, Problem> {
    let query = request.query();
    let wait = Wait::of(request, context.config.wait_max)?;
    let (detail, fields) = (detail(&query, Detail::Full)?, fields(&query)?);
    let conditional = request.headers.contains_key(IF_NONE_MATCH);
    let known = |job: &Job| conditional && headers::matches_etag(&request.headers, &etag(job.version));
    if !wait.limit.is_zero() {
        let job = find(context, caller, job_id).await?;
        let _permit = wait.permit(context, caller)?;
        wait::until(context, job, wait.limit, |job| {
            job.status.is_final() || (conditional && !known(job))
        })
        .await?;
    }
    let version = headers::known_version(&request.headers);
    let store = &context.store;
    let details = store
        .job_details(job_id, reader(caller), version, detail.part())
        .await?
        .ok_or(Problem::NoSuch("Job"))?;
    let (job, view) = JobView::of(details, context.config.retention);
    let response = if known(&job) {
        reply::empty(StatusCode::NOT_MODIFIED)
    } else {
        reply::data(request, StatusCode::OK, JobPart::of(view, &fields)?)?
    };
    let response = match view::look_again_after(&job, clock::now()) {
        Some(seconds) => response.retry_after(seconds),
        None => response,
    };
    Ok(wait.applied_to(response.etag(&etag(job.version))))
}

/// `GET /jobs/{id}/result`: the result alone, as JSON, or its text for who prefers that.
pub async fn result(
    context: &Context,
    request: &Request,
    caller: &Caller,
    job_id: JobId,
) -> Result<Response, Problem> {
    let store = &context.store;
    let details = store
        .job_details(job_id, reader(caller), None, storage::JobPart::Result)
        .await?
        .ok_or(Problem::NoSuch("Job"))?;
    let job = &details.job;
    if job.data_removed {
        return Err(Problem::DataRemoved);
    }
    if !job.status.is_final() {
        return Err(Problem::JobNotFinished);
    }
    let text = details.result.ok_or(Problem::NoSuch("Result"))?;
    let result = serde_json::from_str::<Value>(&text).map_err(Problem::internal)?;
    let response = match result["content"]
        .as_str()
        .filter(|_| headers::wants_plain_text(&request.headers))
    {
        Some(content) => reply::text(StatusCode::OK, content.to_owned()),
        None => reply::json(StatusCode::OK, &result)?,
    };
    Ok(response
        .with(X_JOB_ID, job.job_id.to_string())
        .varies_by(ACCEPT.as_str()))
}

/// `GET /jobs`: the caller's jobs, newest first.
pub async fn list(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=100)?.unwrap_or(20);
    let detail = detail(&query, Detail::Basic)?;
    let mut filter = filter(&query)?;
    filter.key_id = match query.text("key_id") {
        Some(key_id) if caller.admin || key_id == caller.key_id.as_str() => Some(KeyId::known(key_id)),
        Some(_) => return Err(Problem::AdminOnly("list the jobs of others")),
        None => (!caller.admin).then(|| caller.key_id.clone()),
    };
    if let Some(name) = query.text("session") {
        match sessions::named(context, caller, name).await? {
            Some(session) => filter.session_id = Some(session.session_id),
            None => return page(request, Vec::new(), limit, None),
        }
    }
    // There are no batches, so none of the jobs is of one.
    if query.text("batch_id").is_some() {
        return page(request, Vec::new(), limit, None);
    }
    answer(context, request, filter, limit, detail).await
}

/// `GET /sessions/{s}/jobs`: all jobs of the session but chat runs, newest first.
pub async fn list_of_session(
    context: &Context,
    request: &Request,
    session: &Session,
) -> Result<Response, Problem> {
    let query = request.query();
    let limit = query.integer("limit", 1..=1000)?.unwrap_or(1000);
    let filter = JobFilter {
        session_id: Some(session.session_id),
        ..filter(&query)?
    };
    answer(context, request, filter, limit, detail(&query, Detail::Full)?).await
}

/// The page that the query's cursor names.
async fn answer(
    context: &Context,
    request: &Request,
    mut filter: JobFilter,
    limit: i64,
    detail: Detail,
) -> Result<Response, Problem> {
    let bound_to = format!("{filter:?}");
    let query = request.query();
    let fields = fields(&query)?;
    if let Some(cursor) = query.text("cursor") {
        filter.after = Some(Cursor::decode(cursor, &bound_to)?.0);
    }
    if detail == Detail::Full {
        let fields = fields.iter().map(ToString::to_string).collect();
        return one_by_one(context, request, (filter, limit), &bound_to, fields).await;
    }
    let mut jobs = context.store.jobs(&filter, limit + 1).await?;
    let next = more_than(limit, &mut jobs, |details| {
        Cursor(details.job.job_number).encode(&bound_to)
    });
    let retention = context.config.retention;
    let shown = jobs
        .into_iter()
        .map(|details| JobPart::of(JobView::of(details, retention).1, &fields))
        .collect::<Result<_, _>>()?;
    page(request, shown, limit, next)
}

/// The same page in full: a thousand jobs may have gigabytes of prompts and results. So only their positions are held, and
/// each is read when the client has taken the one before.
async fn one_by_one(
    context: &Context,
    request: &Request,
    (mut filter, limit): (JobFilter, i64),
    bound_to: &str,
    fields: Vec<String>,
) -> Result<Response, Problem> {
    let store = &context.store;
    let (mut positions, mut left) = (Vec::new(), limit + 1);
    while left > 0 {
        let asked = left.min(AT_ONCE);
        let jobs = store.jobs(&filter, asked).await?;
        let read = i64::try_from(jobs.len()).unwrap_or(i64::MAX);
        positions.extend(
            jobs.iter()
                .map(|details| (details.job.job_id, details.job.job_number)),
        );
        filter.after = positions.last().map(|(_, number)| *number);
        left = if read < asked { 0 } else { left - read };
    }
    let next = more_than(limit, &mut positions, |(_, number)| {
        Cursor(*number).encode(bound_to)
    });
    let pagination = Pagination::new(limit, next);
    let shared = context.clone();
    let items = stream::unfold(positions.into_iter(), move |mut positions| {
        let (context, fields) = (shared.clone(), fields.clone());
        async move {
            let (job_id, _) = positions.next()?;
            let read = async {
                let (_, view) = view::show(&context, job_id, Detail::Full).await?;
                let fields = fields.iter().map(String::as_str).collect::<Vec<_>>();
                JobPart::of(view.without_position(), &fields)
            };
            let shown = read.await;
            Some((shown, positions))
        }
    });
    let report = {
        let context = context.clone();
        move |problem: &Problem| context.report(problem)
    };
    let response = reply::long_list(request, items, &pagination, report)?;
    Ok(pagination.link(request, response))
}

fn page(
    request: &Request,
    jobs: Vec<JobPart>,
    limit: i64,
    next: Option<String>,
) -> Result<Response, Problem> {
    let pagination = Pagination::new(limit, next);
    let response = reply::list(request, jobs, &pagination)?;
    Ok(pagination.link(request, response))
}

/// Which jobs the query asks for.
fn filter(query: &Query) -> Result<JobFilter, Problem> {
    let mut statuses = Vec::new();
    for word in query.list("status") {
        match JobStatus::ALL.into_iter().find(|status| status.as_str() == word) {
            Some(status) if !statuses.contains(&status) => statuses.push(status),
            Some(_) => {}
            None => return Err(Problem::Invalid(in_query("status", vec![unknown_status()]))),
        }
    }
    statuses.sort_by_key(|status| *status as u8);
    let kind = query.value("kind", |word| choice(&["job", "chat", "all"])(word.into()))?;
    let order = query.value("order", |word| choice(&["desc", "asc"])(word.into()))?;
    Ok(JobFilter {
        key_id: None,
        statuses,
        session_id: None,
        custom_id: query.value("custom_id", |name| text(1..=64)(name.into()))?,
        kind: match kind {
            Some("chat") => Some(JobKind::Chat),
            Some("all") => None,
            _ => Some(JobKind::Job),
        },
        created_after: query.time("created_after")?,
        created_before: query.time("created_before")?,
        ascending: order == Some("asc"),
        after: None,
    })
}

/// The members that the query names; none stands for all.
fn fields(query: &Query) -> Result<Vec<&str>, Problem> {
    let fields = query.list("fields");
    let unknown = fields.iter().filter(|name| !JobView::MEMBERS.contains(name));
    let faults = unknown
        .map(|name| {
            let name = name.chars().take(100).collect::<String>();
            let near = spelling::nearest(&name, JobView::MEMBERS.iter().copied());
            let near = near.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            Fault::new("enum", format!("`{name}` is not a member of a job{near}"))
        })
        .collect::<Vec<_>>();
    if faults.is_empty() {
        Ok(fields)
    } else {
        Err(Problem::Invalid(in_query("fields", faults)))
    }
}

fn unknown_status() -> Fault {
    Fault::new(
        "enum",
        "Input should be 'queued', 'running', 'done', 'failed' or 'cancelled'",
    )
}

fn detail(query: &Query, default: Detail) -> Result<Detail, Problem> {
    Ok(
        match query.value("view", |word| choice(&["basic", "full"])(word.into()))? {
            Some("basic") => Detail::Basic,
            Some(_) => Detail::Full,
            None => default,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_of_a_list_are_read_in_any_order() {
        let one = filter(&Query::parse(
            "status=failed,done&order=asc&created_after=2026-01-01T00:00:00Z",
        ))
        .unwrap();
        let other = filter(&Query::parse(
            "created_after=2026-01-01T00:00:00Z&status=done&order=asc&status=failed",
        ));
        assert_eq!(format!("{one:?}"), format!("{:?}", other.unwrap()));
        assert_eq!(one.statuses, [JobStatus::Done, JobStatus::Failed]);
        assert!(one.ascending);
        assert_eq!(one.kind, Some(JobKind::Job));
    }

    #[test]
    fn an_unknown_member_is_a_fault_that_names_the_known_one() {
        assert_eq!(
            fields(&Query::parse("fields=id,status")).unwrap(),
            ["id", "status"]
        );
        let Err(Problem::Invalid(faults)) = fields(&Query::parse("fields=id,staus")) else {
            panic!("no fault")
        };
        assert_eq!(faults[0].field, "query -> fields");
        assert!(
            faults[0].message.contains("did you mean `status`?"),
            "{}",
            faults[0].message
        );
    }

    #[test]
    fn a_filter_that_means_nothing_is_a_fault() {
        for (text, field) in [
            ("status=dead", "query -> status"),
            ("kind=x", "query -> kind"),
            ("order=up", "query -> order"),
            ("created_before=monday", "query -> created_before"),
        ] {
            let Err(Problem::Invalid(faults)) = filter(&Query::parse(text)) else {
                panic!("{text}")
            };
            assert_eq!(faults[0].field, field);
        }
    }
}
