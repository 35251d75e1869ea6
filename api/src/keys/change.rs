//! A change of a key: of each member nothing, another value, or (null) that it is as the service is set up.

use serde_json::{Map, Value};
use shared::clock::Timestamp;
use shared::key::{ApiKey, Scopes, TextList};

use super::request::{self, Rates};
use crate::budgets::BudgetSpec;
use crate::http::problem::Problem;
use crate::http::request::fields::{Fields, metadata};

/// Absent, null, or a value.
type Wanted<T> = Option<Option<T>>;

/// The body of a request that changes a key.
#[derive(Debug)]
#[expect(clippy::option_option, reason = "absent and null are two changes")]
pub(super) struct Change {
    name: Option<String>,
    scopes: Option<Scopes>,
    expires_at: Option<Option<Timestamp>>,
    allowed_ips: Wanted<TextList>,
    allowed_models: Wanted<TextList>,
    rates: Wanted<Rates>,
    max_running_jobs: Wanted<i64>,
    max_queued_jobs: Wanted<i64>,
    max_streams: Wanted<i64>,
    max_priority: Wanted<i64>,
    pub(super) budget: Wanted<BudgetSpec>,
    metadata: Wanted<Map<String, Value>>,
}

impl Change {
    pub(super) fn read(mut body: Fields, now: Timestamp) -> Result<Self, Problem> {
        let change = Self {
            name: body.optional("name", request::name),
            scopes: body.optional("scopes", request::scopes),
            expires_at: body.change("expires_at", request::future(now)),
            allowed_ips: body.change("allowed_ips", request::networks),
            allowed_models: body.change("allowed_models", request::models),
            rates: body.change("rate_limit", request::rates),
            max_running_jobs: body.change("max_running_jobs", request::max_running_jobs()),
            max_queued_jobs: body.change("max_queued_jobs", request::max_queued_jobs()),
            max_streams: body.change("max_streams", request::max_streams()),
            max_priority: body.change("max_priority", request::max_priority()),
            budget: body.change("budget", request::budget),
            metadata: body.change("metadata", metadata),
        };
        body.finish(Some(change))
    }

    /// Makes it, but for the budget, which isn't part of the key's row.
    pub(super) fn apply_to(&self, key: &mut ApiKey) {
        if let Some(name) = &self.name {
            name.clone_into(&mut key.name);
        }
        if let Some(at) = self.expires_at {
            key.expires_at = at;
        }
        if let Some(metadata) = &self.metadata {
            key.metadata = Value::Object(metadata.clone().unwrap_or_default()).to_string();
        }
        let rights = &mut key.rights;
        if let Some(scopes) = self.scopes {
            rights.scopes = scopes;
        }
        if let Some(networks) = &self.allowed_ips {
            rights.allowed_ips = networks.clone().unwrap_or_default();
        }
        if let Some(models) = &self.allowed_models {
            rights.allowed_models = models.clone().unwrap_or_default();
        }
        if let Some(rates) = self.rates {
            let rates = rates.unwrap_or_default();
            (rights.rate_submit, rights.rate_read, rights.rate_window) =
                (rates.submit, rates.read, rates.window);
        }
        for (wanted, limit) in [
            (self.max_running_jobs, &mut rights.max_running_jobs),
            (self.max_queued_jobs, &mut rights.max_queued_jobs),
            (self.max_streams, &mut rights.max_streams),
            (self.max_priority, &mut rights.max_priority),
        ] {
            if let Some(wanted) = wanted {
                *limit = wanted;
            }
        }
    }

    /// The members that it names.
    pub(super) fn names(&self) -> Vec<&'static str> {
        let named = [
            ("name", self.name.is_some()),
            ("scopes", self.scopes.is_some()),
            ("expires_at", self.expires_at.is_some()),
            ("allowed_ips", self.allowed_ips.is_some()),
            ("allowed_models", self.allowed_models.is_some()),
            ("rate_limit", self.rates.is_some()),
            ("max_running_jobs", self.max_running_jobs.is_some()),
            ("max_queued_jobs", self.max_queued_jobs.is_some()),
            ("max_streams", self.max_streams.is_some()),
            ("max_priority", self.max_priority.is_some()),
            ("budget", self.budget.is_some()),
            ("metadata", self.metadata.is_some()),
        ];
        named
            .into_iter()
            .filter(|(_, named)| *named)
            .map(|(name, _)| name)
            .collect()
    }
}
