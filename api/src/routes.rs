//! Every path of the API and who answers it. Warp matches the path and nothing else: from there on everything is
//! answered, never rejected, so that one route's refusal can't hide another's.

use futures_util::FutureExt;
use http::{Method, StatusCode};
use shared::key::Scope;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use crate::caller::Caller;
use crate::limits::Policy;
use crate::problem::Problem;
use crate::request::{Request, Segment};
use crate::{audit, budgets, cors, health, jobs, keys, reply, sessions, usage};

/// What a method of a path needs and counts as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The method.
    pub method: Method,
    /// The scope that the key must have; `None`: any key will do.
    pub scope: Option<Scope>,
    /// The limit that a call counts for.
    pub policy: Policy,
}

/// A path of the API.
struct Route {
    path: String,
    /// `None`: everybody may call it, without a key.
    rules: Option<&'static [Rule]>,
    filter: BoxedFilter<(Response,)>,
}

macro_rules! scope {
    (any) => {
        None
    };
    ($scope:ident) => {
        Some(Scope::$scope)
    };
}

/// A path whose handler gets the request and the path's variable parts: `keyed` after its caller is known and may call
/// it, `open` for everybody. In brackets stands for each method the scope that it needs and the limit it counts for.
macro_rules! route {
    (keyed $($part:tt)/ + $(, $param:ident)* => $handler:path [$($method:ident $scope:ident $policy:ident),+]) => {{
        const METHODS: &[Method] = &[$(Method::$method),+];
        const RULES: &[Rule] = &[$(Rule {
            method: Method::$method,
            scope: scope!($scope),
            policy: Policy::$policy,
        }),+];
        let filter = warp::path!($($part)/ +)
            .and(warp::ext::get::<Arc<Request>>())
            .then(|$($param: Segment,)* request: Arc<Request>| async move {
                let handled = async {
                    let caller = admit(&request, METHODS, RULES).await?;
                    let handling = $handler(&request, &caller $(, &$param)*);
                    while_open(&request, &caller, handling).await
                };
                answer(&request, handled).await
            })
            .boxed();
        Route { path: written(stringify!($($part)/ +)), rules: Some(RULES), filter }
    }};
    (open $($part:tt)/ + => $handler:path) => {{
        let filter = warp::path!($($part)/ +)
            .and(warp::ext::get::<Arc<Request>>())
            .then(|request: Arc<Request>| async move { answer(&request, $handler(&request)).await })
            .boxed();
        Route { path: written(stringify!($($part)/ +)), rules: None, filter }
    }};
}

/// The table.
fn table() -> Vec<Route> {
    vec![
        route!(keyed "api" / "v1" / "jobs" => jobs::collection [GET JobsRead Read, POST JobsWrite Submit]),
        route!(keyed "api" / "v1" / "jobs" / Segment, id => jobs::item [GET JobsRead Read, DELETE JobsWrite Read]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "events", id => jobs::events [GET JobsRead Read]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "stream", id => jobs::stream [GET JobsRead Read]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "result", id => jobs::result [GET JobsRead Read]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "cancel", id => jobs::cancel [POST JobsWrite Read]),
        route!(keyed "api" / "v1" / "sessions" => sessions::collection
            [GET SessionsRead Read, POST SessionsWrite Read]),
        route!(keyed "api" / "v1" / "sessions" / Segment, name => sessions::item [GET SessionsRead Read]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "jobs", name => sessions::jobs
            [GET JobsRead Read, POST JobsWrite Submit]),
        route!(keyed "api" / "v1" / "keys" => keys::collection [GET KeysAdmin Read, POST KeysAdmin Read]),
        route!(keyed "api" / "v1" / "keys" / "me" => keys::me [GET any Read]),
        route!(keyed "api" / "v1" / "keys" / Segment, id => keys::item
            [GET KeysAdmin Read, PATCH KeysAdmin Read, DELETE KeysAdmin Read]),
        route!(keyed "api" / "v1" / "keys" / Segment / "rotate", id => keys::rotate [POST KeysAdmin Read]),
        route!(keyed "api" / "v1" / "keys" / Segment / "revoke", id => keys::revoke [POST KeysAdmin Read]),
        route!(keyed "api" / "v1" / "budgets" => budgets::collection [GET UsageRead Read]),
        route!(keyed "api" / "v1" / "budgets" / Segment / Segment, scope, id => budgets::item
            [GET UsageRead Read, PUT BudgetsAdmin Read, DELETE BudgetsAdmin Read]),
        route!(keyed "api" / "v1" / "budgets" / Segment / Segment / "adjust", scope, id => budgets::adjust
            [POST BudgetsAdmin Read]),
        route!(keyed "api" / "v1" / "usage" => usage::summary [GET UsageRead Read]),
        route!(keyed "api" / "v1" / "usage" / "ledger" => usage::ledger [GET UsageRead Read]),
        route!(keyed "api" / "v1" / "audit" => audit::list [GET KeysAdmin Read]),
        route!(open "api" / "v1" / "health" => health::health),
        route!(open "livez" => health::livez),
        route!(open "readyz" => health::readyz),
    ]
}

/// Everything that answers requests.
pub fn routes() -> BoxedFilter<(Response,)> {
    let nothing = warp::ext::get::<Arc<Request>>()
        .then(
            |request: Arc<Request>| async move { answer(&request, async { Err(Problem::NoSuchPath) }).await },
        )
        .boxed();
    table()
        .into_iter()
        .rev()
        .fold(nothing, |others, route| route.filter.or(others).unify().boxed())
}

/// Every path, its variable parts written `{}`, and its rules (`None`: no key is needed): for the documentation, and
/// for the test that a new path can't be forgotten.
pub fn listed() -> Vec<(String, Option<&'static [Rule]>)> {
    table()
        .into_iter()
        .map(|route| (route.path, route.rules))
        .collect()
}

/// A path of the table as it is written in an address.
fn written(parts: &str) -> String {
    let parts = parts.split('/').map(str::trim);
    let parts = parts.map(|part| {
        if part == "Segment" {
            "{}"
        } else {
            part.trim_matches('"')
        }
    });
    parts.fold(String::new(), |path, part| path + "/" + part)
}

/// Who asks, if they may do this: first the key, then its rate, then whether the path has the method, then the scope,
/// then whether the query can mean anything.
async fn admit(request: &Request, methods: &'static [Method], rules: &[Rule]) -> Result<Caller, Problem> {
    let rule = rules.iter().find(|rule| rule.method == request.method);
    let caller = request
        .admit(rule.map_or(Policy::Read, |rule| rule.policy))
        .await?;
    let rule = rule.ok_or(Problem::MethodNotAllowed(methods))?;
    if let Some(scope) = rule.scope {
        caller.require(scope)?;
    }
    request.query().check()?;
    Ok(caller)
}

/// Waits for a handler that reads, unless the caller's key stops opening meanwhile: a long wait is no way around a
/// revocation. What writes has been allowed, and is finished.
async fn while_open(
    request: &Request,
    caller: &Caller,
    handling: impl Future<Output = Result<Response, Problem>>,
) -> Result<Response, Problem> {
    if request.method != Method::GET {
        return handling.await;
    }
    tokio::select! {
        handled = handling => handled,
        () = request.context.keyring.lost(caller) => Err(Problem::Unauthorized),
    }
}

/// What a handler makes of the request, as a response: also when it failed, and when it panicked.
async fn answer(request: &Request, handled: impl Future<Output = Result<Response, Problem>>) -> Response {
    if cors::is_preflight(&request.method, &request.headers) {
        return reply::empty(StatusCode::NO_CONTENT);
    }
    let answered = AssertUnwindSafe(handled).catch_unwind().await;
    let answered = answered.unwrap_or_else(|_| Err(Problem::internal("the handler panicked")));
    request.discard_body().await;
    answered.unwrap_or_else(|problem| problem.reply(request))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_written_as_in_an_address() {
        assert_eq!(
            written("\"api\" / \"v1\" / \"jobs\" / Segment / \"events\""),
            "/api/v1/jobs/{}/events"
        );
    }

    #[test]
    fn only_what_says_so_is_open_to_everybody() {
        let open = listed().into_iter().filter(|(_, rules)| rules.is_none());
        assert_eq!(
            open.map(|(path, _)| path).collect::<Vec<_>>(),
            ["/api/v1/health", "/livez", "/readyz"]
        );
    }

    #[test]
    fn making_a_job_counts_as_a_submission_and_nothing_else_does() {
        for (path, rules) in listed() {
            for rule in rules.unwrap_or_default() {
                let makes_a_job = rule.method == Method::POST && path.ends_with("/jobs");
                assert_eq!(
                    rule.policy == Policy::Submit,
                    makes_a_job,
                    "{} {path}",
                    rule.method
                );
            }
        }
    }
}
