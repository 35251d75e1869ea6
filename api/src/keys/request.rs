//! The body of a request for a new key.

use serde_json::{Map, Value};
use shared::clock::Timestamp;
use shared::key::{KeyRights, Scope, Scopes, TextList};
use shared::network;

use crate::budgets::BudgetSpec;
use crate::http::problem::Problem;
use crate::http::request::fields::{
    Fault, Fields, Reading, choice, integer, list, members, metadata, parsed, time,
};

/// A new key, every member right by itself.
#[derive(Debug)]
pub(super) struct KeyRequest {
    pub(super) name: String,
    pub(super) rights: KeyRights,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) budget: Option<BudgetSpec>,
    pub(super) metadata: Map<String, Value>,
}

/// Limits on requests of a key's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rates {
    pub(super) submit: Option<i64>,
    pub(super) read: Option<i64>,
    pub(super) window: Option<i64>,
}

impl KeyRequest {
    pub(super) fn read(mut body: Fields, now: Timestamp) -> Result<Self, Problem> {
        let name = body.required("name", name);
        let scopes = body.optional("scopes", scopes).unwrap_or_else(Scopes::ordinary);
        let expires_at = body.optional("expires_at", future(now));
        let rates = body.optional("rate_limit", rates).unwrap_or_default();
        let rights = KeyRights {
            scopes,
            allowed_ips: body.optional("allowed_ips", networks).unwrap_or_default(),
            allowed_models: body.optional("allowed_models", models).unwrap_or_default(),
            rate_submit: rates.submit,
            rate_read: rates.read,
            rate_window: rates.window,
            max_running_jobs: body.optional("max_running_jobs", max_running_jobs()),
            max_queued_jobs: body.optional("max_queued_jobs", max_queued_jobs()),
            max_streams: body.optional("max_streams", max_streams()),
            max_priority: body.optional("max_priority", max_priority()),
        };
        let budget = body.optional("budget", budget);
        let metadata = body.optional("metadata", metadata).unwrap_or_default();
        let request = name.map(|name| Self {
            name,
            rights,
            expires_at,
            budget,
            metadata,
        });
        body.finish(request)
    }
}

pub(super) fn name(value: Value) -> Reading<String> {
    parsed(1..=128, |name| {
        shared::key::name(&name)?;
        Ok::<_, &str>(name)
    })(value)
}

pub(super) fn scopes(value: Value) -> Reading<Scopes> {
    let words = list(Scope::ALL.len(), choice(Scope::WORDS))(value)?;
    // Words that are known are scopes.
    Ok(words
        .into_iter()
        .filter_map(|word| word.parse::<Scope>().ok())
        .collect())
}

/// A time that hasn't come.
pub(super) fn future(now: Timestamp) -> impl Fn(Value) -> Reading<Timestamp> {
    move |value| match time(value)? {
        at if at > now => Ok(at),
        _ => Err(vec![Fault::value("Time should be in the future")]),
    }
}

pub(super) fn networks(value: Value) -> Reading<TextList> {
    let network = parsed(1..=64, |text| {
        let network =
            network::parse(&text).ok_or("Input should be an address or a network such as 10.0.0.0/8")?;
        Ok::<_, &str>(network.trunc().to_string())
    });
    list(50, network)(value).map(TextList)
}

pub(super) fn models(value: Value) -> Reading<TextList> {
    list(50, crate::settings::model)(value).map(TextList)
}

pub(super) fn rates(value: Value) -> Reading<Rates> {
    members(|fields| {
        Some(Rates {
            submit: fields.optional("submit", integer(1..=1_000_000)),
            read: fields.optional("read", integer(1..=1_000_000)),
            window: fields.optional("window", integer(1..=86_400)),
        })
    })(value)
}

pub(super) fn budget(value: Value) -> Reading<BudgetSpec> {
    members(BudgetSpec::read)(value)
}

pub(super) fn max_running_jobs() -> impl Fn(Value) -> Reading<i64> {
    integer(1..=1_000)
}

pub(super) fn max_queued_jobs() -> impl Fn(Value) -> Reading<i64> {
    integer(1..=100_000)
}

pub(super) fn max_streams() -> impl Fn(Value) -> Reading<i64> {
    integer(1..=1_000)
}

pub(super) fn max_priority() -> impl Fn(Value) -> Reading<i64> {
    integer(-10..=10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: Timestamp = Timestamp(1_800_000_000_000_000);

    fn read(value: Value) -> Result<KeyRequest, Problem> {
        KeyRequest::read(Fields::of("body", value).unwrap(), NOW)
    }

    #[test]
    fn a_name_alone_makes_an_ordinary_key() {
        let request = read(json!({"name": "ci"})).unwrap();
        assert_eq!(request.rights, KeyRights::of(Scopes::ordinary()));
        assert_eq!((request.expires_at, request.budget), (None, None));
    }

    #[test]
    fn every_bad_member_is_named() {
        for (member, value, field, kind) in [
            ("name", json!(""), "name", "string_too_short"),
            ("name", json!("x".repeat(129)), "name", "string_too_long"),
            ("name", json!("  "), "name", "value_error"),
            ("scopes", json!(["jobs:fly"]), "scopes -> 0", "enum"),
            ("scopes", json!("jobs:read"), "scopes", "list_type"),
            (
                "expires_at",
                json!("2020-01-01T00:00:00Z"),
                "expires_at",
                "value_error",
            ),
            ("expires_at", json!("tomorrow"), "expires_at", "datetime_parsing"),
            (
                "allowed_ips",
                json!(["10.0.0.0/33"]),
                "allowed_ips -> 0",
                "value_error",
            ),
            (
                "allowed_ips",
                json!(["::1", "localhost"]),
                "allowed_ips -> 1",
                "value_error",
            ),
            ("allowed_ips", json!(vec!["::1"; 51]), "allowed_ips", "too_long"),
            (
                "allowed_models",
                json!(["--x"]),
                "allowed_models -> 0",
                "value_error",
            ),
            (
                "rate_limit",
                json!({"submit": -1}),
                "rate_limit -> submit",
                "greater_than_equal",
            ),
            (
                "rate_limit",
                json!({"window": 86_401}),
                "rate_limit -> window",
                "less_than_equal",
            ),
            (
                "rate_limit",
                json!({"burst": 1}),
                "rate_limit -> burst",
                "extra_forbidden",
            ),
            ("rate_limit", json!(5), "rate_limit", "dict_type"),
            (
                "max_running_jobs",
                json!(0),
                "max_running_jobs",
                "greater_than_equal",
            ),
            (
                "max_queued_jobs",
                json!(100_001),
                "max_queued_jobs",
                "less_than_equal",
            ),
            ("max_streams", json!(1e300), "max_streams", "less_than_equal"),
            ("max_priority", json!(11), "max_priority", "less_than_equal"),
            (
                "budget",
                json!({"limit_usd": -5}),
                "budget -> limit_usd",
                "greater_than_equal",
            ),
            ("budget", json!({}), "budget -> limit_usd", "missing"),
            (
                "budget",
                json!({"limit_usd": 1, "period": "year"}),
                "budget -> period",
                "enum",
            ),
            (
                "budget",
                json!({"limit_usd": 1, "alert_thresholds": [0]}),
                "budget -> alert_thresholds -> 0",
                "greater_than_equal",
            ),
            ("admin", json!(true), "admin", "extra_forbidden"),
        ] {
            let mut body = json!({"name": "ci"});
            body[member] = value;
            match read(body) {
                Err(Problem::Invalid(faults)) => assert_eq!(
                    faults
                        .iter()
                        .map(|fault| (fault.field.as_str(), fault.kind))
                        .collect::<Vec<_>>(),
                    [(format!("body -> {field}").as_str(), kind)]
                ),
                other => panic!("{member}: {other:?}"),
            }
        }
    }

    #[test]
    fn networks_are_kept_in_their_plain_form() {
        let request = read(json!({"name": "ci", "allowed_ips": ["10.1.2.3/8", "::1"]})).unwrap();
        assert_eq!(request.rights.allowed_ips.0, ["10.0.0.0/8", "::1/128"]);
    }
}
