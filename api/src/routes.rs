//! Every path of the API and who answers it. Warp matches the path and nothing else: from there on everything is
//! answered, never rejected, so that one route's refusal can't hide another's.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Method, StatusCode};
use http_body_util::Empty;
use hyper::body::Bytes;
use shared::key::Scope;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use tower::ServiceExt;
use tower::util::BoxCloneService;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use crate::context::Context;
use crate::gate::limits::{Decided, Policy};
use crate::gate::{self, Rule};
use crate::http::problem::Problem;
use crate::http::request::{Request, Segment, Tail};
use crate::http::serve::App;
use crate::http::{cors, reply};
use crate::{
    audit, budgets, chat, docs, files, health, jobs, keys, queue, sessions, templates, tokens, usage,
    webhooks,
};

/// Who may call a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Who has a key that fits the rule of the method.
    Keyed(&'static [Rule]),
    /// Everybody.
    Open,
}

impl Access {
    /// The rules of its methods; none where everybody may call.
    pub const fn rules(self) -> &'static [Rule] {
        match self {
            Self::Keyed(rules) => rules,
            Self::Open => &[],
        }
    }
}

/// A path of the API.
struct Route {
    path: String,
    /// The names of its variable parts.
    variables: &'static [&'static str],
    access: Access,
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

/// A path whose handler gets the context, the request, and the path's variable parts: `keyed` also its caller, who is
/// known then and may call it, `open` for everybody. After a semicolon stands the variable that is the rest of the path.
/// In brackets stands for each method the scope that it needs, the limit it counts for, and the names that its query may
/// have.
macro_rules! route {
    (keyed $($part:tt)/ + $(, $param:ident)* => $handler:path [$($rules:tt)+]) => {
        route!(@ warp::path!($($part)/ +), stringify!($($part)/ +), [$($param: Segment,)*] $handler [$($rules)+])
    };
    (keyed $($part:tt)/ + $(, $param:ident)*; $rest:ident => $handler:path [$($rules:tt)+]) => {
        route!(@ warp::path!($($part)/ + / ..).and(rest()), concat!(stringify!($($part)/ +), "/ Segment"),
            [$($param: Segment,)* $rest: Tail,] $handler [$($rules)+])
    };
    (@ $filter:expr, $parts:expr, [$($param:ident: $kind:ty,)*] $handler:path [$($method:ident $scope:ident $policy:ident ($($query:ident)*)),+]) => {{
        const METHODS: &[Method] = &[$(Method::$method),+];
        const RULES: &[Rule] = &[$(Rule {
            method: Method::$method,
            scope: scope!($scope),
            policy: Policy::$policy,
            query: &[$(stringify!($query)),*],
        }),+];
        let filter = $filter
            .and(warp::ext::get::<Context>())
            .and(warp::ext::get::<Arc<Request>>())
            .then(|$($param: $kind,)* context: Context, request: Arc<Request>| async move {
                let handled = async {
                    let admission = gate::admit(&context, &request, METHODS, RULES).await;
                    let handled = async {
                        let caller = admission.caller?;
                        let handling = $handler(&context, &request, &caller $(, &$param)*).boxed();
                        gate::while_active(&context, &request, &caller, handling).await
                    };
                    (admission.decided, handled.await)
                };
                answer(&context, &request, handled.boxed()).await
            })
            .boxed();
        Route {
            path: written($parts),
            variables: &[$(stringify!($param)),*],
            access: Access::Keyed(RULES),
            filter,
        }
    }};
    (open $($part:tt)/ + => $handler:path) => {{
        let filter = warp::path!($($part)/ +)
            .and(warp::ext::get::<Context>())
            .and(warp::ext::get::<Arc<Request>>())
            .then(|context: Context, request: Arc<Request>| async move {
                let handled = async { (None, $handler(&context, &request).await) };
                answer(&context, &request, handled.boxed()).await
            })
            .boxed();
        Route { path: written(stringify!($($part)/ +)), variables: &[], access: Access::Open, filter }
    }};
}

/// The table.
fn table() -> Vec<Route> {
    vec![
        route!(keyed "api" / "v1" / "jobs" => jobs::collection
            [GET JobsRead Read (limit cursor view fields status kind order session batch_id custom_id key_id
                created_after created_before),
             POST JobsWrite Submit (wait)]),
        route!(keyed "api" / "v1" / "jobs" / Segment, id => jobs::item
            [GET JobsRead Read (view fields wait), DELETE JobsWrite Read ()]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "attempts", id => jobs::attempts [GET JobsRead Read ()]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "events", id => jobs::events
            [GET JobsRead Read (after starting_after limit wait)]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "stream", id => jobs::stream
            [GET JobsRead Read (after starting_after)]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "result", id => jobs::result [GET JobsRead Read ()]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "cancel", id => jobs::cancel [POST JobsWrite Read ()]),
        route!(keyed "api" / "v1" / "sessions" => sessions::collection
            [GET SessionsRead Read (page limit user_id), POST SessionsWrite Read ()]),
        route!(keyed "api" / "v1" / "sessions" / Segment, name => sessions::item
            [GET SessionsRead Read (), PATCH SessionsWrite Read (), DELETE SessionsWrite Read ()]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "repo", name => sessions::repo
            [POST SessionsWrite Read ()]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "history", name => sessions::history
            [GET SessionsRead Read (limit before)]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "jobs", name => jobs::of_session
            [GET JobsRead Read (limit cursor view fields status kind order custom_id created_after created_before),
             POST JobsWrite Submit (wait)]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "files", name => files::of_session
            [GET FilesRead Read (path page limit recursive), POST FilesWrite Read (path)]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "files", name; path => files::session_file
            [GET FilesRead Read (), DELETE FilesWrite Read ()]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "files", id => files::of_job
            [GET FilesRead Read (path page limit recursive)]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "files", id; path => files::job_file [GET FilesRead Read ()]),
        route!(keyed "api" / "v1" / "jobs" / Segment / "archive", id => files::archive [GET FilesRead Read ()]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "jobs" / Segment, name, id => jobs::item_of_session
            [GET JobsRead Read (view fields wait)]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "jobs" / Segment / "cancel", name, id =>
            jobs::cancel_of_session [POST JobsWrite Read ()]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "chat", name => chat::chat
            [POST JobsWrite Submit (cancel_on_disconnect wait)]),
        route!(keyed "api" / "v1" / "sessions" / Segment / "chat" / "stream", name => chat::stream
            [POST JobsWrite Submit (cancel_on_disconnect)]),
        route!(keyed "api" / "v1" / "templates" => templates::list [GET any Read ()]),
        route!(keyed "api" / "v1" / "templates" / "reload" => templates::reload [POST TemplatesWrite Read ()]),
        route!(keyed "api" / "v1" / "templates" / Segment, name => templates::item [GET any Read ()]),
        route!(keyed "api" / "v1" / "tokens" / "count" => tokens::count [POST any Read ()]),
        route!(keyed "api" / "v1" / "keys" => keys::collection
            [GET KeysAdmin Read (limit cursor status name), POST KeysAdmin Read ()]),
        route!(keyed "api" / "v1" / "keys" / "me" => keys::me [GET any Read ()]),
        route!(keyed "api" / "v1" / "keys" / Segment, id => keys::item
            [GET KeysAdmin Read (), PATCH KeysAdmin Read (), DELETE KeysAdmin Read ()]),
        route!(keyed "api" / "v1" / "keys" / Segment / "rotate", id => keys::rotate [POST KeysAdmin Read ()]),
        route!(keyed "api" / "v1" / "keys" / Segment / "revoke", id => keys::revoke [POST KeysAdmin Read ()]),
        route!(keyed "api" / "v1" / "budgets" => budgets::collection [GET UsageRead Read (limit cursor)]),
        route!(keyed "api" / "v1" / "budgets" / Segment / Segment, scope, id => budgets::item
            [GET UsageRead Read (), PUT BudgetsAdmin Read (), DELETE BudgetsAdmin Read ()]),
        route!(keyed "api" / "v1" / "budgets" / Segment / Segment / "adjust", scope, id => budgets::adjust
            [POST BudgetsAdmin Read ()]),
        route!(keyed "api" / "v1" / "usage" => usage::summary [GET UsageRead Read (user_id)]),
        route!(keyed "api" / "v1" / "usage" / "ledger" => usage::ledger
            [GET UsageRead Read (limit cursor group_by from to user_id)]),
        route!(keyed "api" / "v1" / "audit" => audit::list [GET UsageRead Read (kind limit before user_id)]),
        route!(keyed "api" / "v1" / "webhooks" / "secret" => webhooks::secret::show [GET WebhooksRead Read ()]),
        route!(keyed "api" / "v1" / "webhooks" / "secret" / "rotate" => webhooks::secret::rotate
            [POST WebhooksWrite Read ()]),
        route!(keyed "api" / "v1" / "webhooks" / "endpoints" => webhooks::endpoint::collection
            [GET WebhooksRead Read (limit cursor), POST WebhooksWrite Read ()]),
        route!(keyed "api" / "v1" / "webhooks" / "endpoints" / Segment, id => webhooks::endpoint::item
            [GET WebhooksRead Read (), PATCH WebhooksWrite Read (), DELETE WebhooksWrite Read ()]),
        route!(keyed "api" / "v1" / "webhooks" / "endpoints" / Segment / "secret" / "rotate", id =>
            webhooks::endpoint::rotate [POST WebhooksWrite Read ()]),
        route!(keyed "api" / "v1" / "webhooks" / "endpoints" / Segment / "test", id => webhooks::endpoint::test
            [POST WebhooksWrite Read ()]),
        route!(keyed "api" / "v1" / "webhooks" / "endpoints" / Segment / "recover", id => webhooks::endpoint::recover
            [POST WebhooksWrite Read ()]),
        route!(keyed "api" / "v1" / "webhooks" / "deliveries" => webhooks::delivery::list
            [GET WebhooksRead Read (limit cursor key_id job_id endpoint_id status event_type created_after created_before)]),
        route!(keyed "api" / "v1" / "webhooks" / "deliveries" / Segment, id => webhooks::delivery::item
            [GET WebhooksRead Read (include)]),
        route!(keyed "api" / "v1" / "webhooks" / "deliveries" / Segment / "resend", id => webhooks::delivery::resend
            [POST WebhooksWrite Read ()]),
        route!(keyed "api" / "v1" / "queue" / "resume" => queue::resume [POST QueueAdmin Read ()]),
        route!(open "api" / "v1" / "health" => health::health),
        route!(open "openapi.json" => docs::openapi),
        route!(open "docs" => docs::page),
        route!(open "docs" / "start.js" => docs::start),
        route!(open "docs" / "swagger-ui-bundle.js" => docs::script),
        route!(open "docs" / "swagger-ui.css" => docs::style),
        route!(open "redoc" => docs::redoc),
        route!(open "livez" => health::livez),
        route!(open "readyz" => health::readyz),
    ]
}

/// Everything that answers requests, for the handlers of this context.
pub fn app(context: Context) -> App {
    let nothing = warp::ext::get::<Context>()
        .and(warp::ext::get::<Arc<Request>>())
        .then(|context: Context, request: Arc<Request>| async move {
            let handled = async { (None, Err(Problem::NoSuchPath)) };
            answer(&context, &request, handled.boxed()).await
        })
        .boxed();
    let routes = table()
        .into_iter()
        .rev()
        .fold(nothing, |others, route| route.filter.or(others).unify().boxed());
    let service = warp::service(routes).map_request(move |mut request: http::Request<Empty<Bytes>>| {
        request.extensions_mut().insert(context.clone());
        request
    });
    BoxCloneService::new(service)
}

/// Every path, its variable parts written `{}`, and who may call it: for the documentation, and for the test that a
/// new path can't be forgotten.
pub fn listed() -> Vec<(String, Access)> {
    table()
        .into_iter()
        .map(|route| (route.path, route.access))
        .collect()
}

/// The same, with the names of the variable parts: `/api/v1/jobs/{id}`.
pub fn named() -> Vec<(String, Access)> {
    let named = |route: Route| {
        let fill = |path: String, name: &&str| path.replacen("{}", &format!("{{{name}}}"), 1);
        (route.variables.iter().fold(route.path, fill), route.access)
    };
    table().into_iter().map(named).collect()
}

/// What is left of the path.
fn rest() -> impl Filter<Extract = (Tail,), Error = std::convert::Infallible> + Clone {
    warp::path::tail().map(|tail: warp::path::Tail| Tail::new(tail.as_str()))
}

/// Whether everybody may ask for this path.
pub fn is_open(path: &str) -> bool {
    OPEN.contains(&path)
}

/// The paths that are open.
const OPEN: [&str; 9] = [
    "/api/v1/health",
    "/openapi.json",
    "/docs",
    "/docs/start.js",
    "/docs/swagger-ui-bundle.js",
    "/docs/swagger-ui.css",
    "/redoc",
    "/livez",
    "/readyz",
];

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

/// What a handler makes of the request, as a response: also when it failed, and when it panicked. Boxed, or the compiler
/// would make all of this once for each path.
async fn answer(
    context: &Context,
    request: &Request,
    handled: BoxFuture<'_, (Option<Decided>, Result<Response, Problem>)>,
) -> Response {
    if cors::is_preflight(&request.method, &request.headers) {
        return reply::empty(StatusCode::NO_CONTENT);
    }
    let handled = AssertUnwindSafe(handled).catch_unwind().await;
    let (decided, answered) =
        handled.unwrap_or_else(|_| (None, Err(Problem::internal("the handler panicked"))));
    request.discard_body().await;
    let mut response = answered.unwrap_or_else(|problem| {
        context.report(&problem);
        problem.render(&context.config.problem_type_base, request.path(), &request.id)
    });
    if let Some(decided) = decided {
        decided.apply_to(response.headers_mut());
    }
    #[cfg(debug_assertions)]
    docs::compare(request, &response);
    response
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
        let open = listed().into_iter().filter(|(_, access)| *access == Access::Open);
        assert_eq!(open.map(|(path, _)| path).collect::<Vec<_>>(), OPEN);
    }

    #[test]
    fn making_a_job_counts_as_a_submission_and_nothing_else_does() {
        for (path, access) in listed() {
            for rule in access.rules() {
                let makes_a_job =
                    rule.method == Method::POST && (path.ends_with("/jobs") || path.contains("/chat"));
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
