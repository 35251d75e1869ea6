//! Who may: first whose key it is, then whether it isn't used too often, then whether the path has the method and the
//! key its scope, and for what spends money whether some is left.

pub mod budget;
pub mod caller;
pub mod idempotency;
pub mod keyring;
pub mod limits;
pub mod streams;
pub mod waits;

use futures_util::future::BoxFuture;
use http::Method;
use shared::budget::BudgetStatus;
use shared::clock::Timestamp;
use shared::id::KeyId;
use shared::key::Scope;
use std::time::Instant;
use warp::reply::Response;

use crate::context::Context;
use crate::http::address;
use crate::http::problem::Problem;
use crate::http::request::Request;
use caller::Caller;
use keyring::Found;
use limits::{Decided, Policy};

/// What a method of a path needs and counts as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The method.
    pub method: Method,
    /// The scope that the key must have; `None`: any key will do.
    pub scope: Option<Scope>,
    /// The limit that a call counts for.
    pub policy: Policy,
    /// The names that the query may have.
    pub query: &'static [&'static str],
}

/// What the gate decided about a request.
#[derive(Debug)]
pub struct Admission {
    /// About the rate, once the caller was known.
    pub decided: Option<Decided>,
    /// Who asks, if they may do this.
    pub caller: Result<Caller, Problem>,
}

/// Decides before the body is read. `methods` are those that the path has, each with a rule.
pub async fn admit(
    context: &Context,
    request: &Request,
    methods: &'static [Method],
    rules: &[Rule],
) -> Admission {
    let rule = rules.iter().find(|rule| rule.method == request.method);
    let policy = rule.map_or(Policy::Read, |rule| rule.policy);
    let mut decided = None;
    let caller = async {
        let caller = identify(context, request).await?;
        let quota = context
            .limits
            .take(caller.bucket(policy, &context.config.rates))
            .await?;
        let at = Instant::now();
        decided = Some(Decided { policy, quota, at });
        if !quota.granted {
            return Err(limits::refused(policy.as_str(), &quota));
        }
        let rule = rule.ok_or(Problem::MethodNotAllowed(methods))?;
        if let Some(scope) = rule.scope {
            caller.require(scope)?;
        }
        request.query().check(rule.query)?;
        Ok(caller)
    };
    let caller = caller.await;
    Admission { decided, caller }
}

/// Refuses to spend for this owner what is spent already; gives the budget that leaves least. Asked when the body is
/// read, since only that says whose money it is.
pub async fn check_budget(
    context: &Context,
    owner: &KeyId,
    now: Timestamp,
) -> Result<Option<BudgetStatus>, Problem> {
    let mut budgets = context.store.budgets_of(owner, now).await?;
    if let Some(index) = budgets.iter().position(BudgetStatus::refuses) {
        return Err(budget::exceeded(&budgets.swap_remove(index), now));
    }
    Ok(budget::least(budgets))
}

/// Who asks, by the key that the request carries. Counts what is refused.
async fn identify(context: &Context, request: &Request) -> Result<Caller, Problem> {
    let presented = caller::presented(&request.headers)?;
    let keyring = &context.keyring;
    if !keyring.has_keys().await? {
        return caller::anonymous(&request.headers, &context.config.exposure());
    }
    let client = context.client(request);
    let Some(secret) = presented else {
        keyring.count_refused(client, None);
        return Err(Problem::Unauthorized);
    };
    let guessing = context.limits.is_guessing(client);
    match keyring.find(secret, guessing.is_some()).await? {
        Found::Valid(caller) if address::is_in(&caller.rights.allowed_ips.0, client) => {
            keyring.note_use(&caller.key_id);
            Ok(caller)
        }
        Found::Valid(caller) => {
            keyring.count_refused(client, Some(caller.key_id));
            Err(Problem::IpNotAllowed)
        }
        Found::Refused(key_id) => {
            keyring.count_refused(client, key_id);
            let quota = match guessing {
                Some(quota) => quota,
                None => context.limits.failed(client).await?,
            };
            if quota.granted {
                Err(Problem::Unauthorized)
            } else {
                Err(limits::refused("authentication", &quota))
            }
        }
    }
}

/// Waits for a handler that reads, unless the caller's key stops being valid meanwhile: a long wait is no way around a
/// revocation. What writes has been allowed, and is finished.
pub async fn while_active(
    context: &Context,
    request: &Request,
    caller: &Caller,
    handling: BoxFuture<'_, Result<Response, Problem>>,
) -> Result<Response, Problem> {
    if request.method != Method::GET {
        return handling.await;
    }
    tokio::select! {
        handled = handling => handled,
        () = context.keyring.lost(caller) => Err(Problem::Unauthorized),
    }
}
