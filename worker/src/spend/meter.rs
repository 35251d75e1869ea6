//! What a run cost: read from the CLI's result lines, or rebuilt from what was seen when there is none.

use super::price::{Prices, Terms};
use super::usage::Usage;
use crate::claude::message::{Message, ModelUsage, RequestUsage};
use shared::job::{ModelCost, Spend};
use shared::money::MicroUsd;
use std::collections::{BTreeMap, HashMap};

/// Adds up a run's cost from its messages, line by line. What it says may be asked for at any time.
///
/// A result line settles what came before it, at the CLI's own price rounded to the nearest micro-dollar. What came
/// after the last one is estimated, from two sources of which the larger counts, model by model: the usage of each
/// request in the stream, at list prices, and the CLI's answers to `get_usage`, which also know
/// subagents and searches. An estimate is marked.
#[derive(Debug)]
pub struct Meter {
    /// By model: what result lines of this process said.
    settled: BTreeMap<String, ModelUsage>,
    /// Whether each settled cost came with a price of the CLI's.
    settled_priced: bool,
    /// The requests since the last result line, by message id.
    requests: HashMap<String, Request>,
    /// The message that started last, by the tool call whose subagent it belongs to.
    started: HashMap<Option<String>, String>,
    /// The newest answer to `get_usage`: sums over the process and the runs that it resumes.
    reported: BTreeMap<String, ModelUsage>,
    /// The part of such sums that is the runs' before. None while it isn't known.
    before: Option<BTreeMap<String, ModelUsage>>,
    /// Whether a request was seen.
    began: bool,
}

#[derive(Debug, Default)]
struct Request {
    model: Option<String>,
    usage: Usage,
}

impl Meter {
    /// A meter that has seen nothing. For a run that resumes a session, ask for `get_usage` before the first message:
    /// without that answer, later ones can't be told from the cost of the runs before and aren't used.
    pub fn new(resumes: bool) -> Self {
        Self {
            settled: BTreeMap::new(),
            settled_priced: true,
            requests: HashMap::new(),
            started: HashMap::new(),
            reported: BTreeMap::new(),
            before: (!resumes).then(BTreeMap::new),
            began: false,
        }
    }

    /// Takes note of a message; whether it may have changed the cost.
    pub fn observe(&mut self, message: &Message) -> bool {
        match message {
            Message::Usage(request) => self.count_request(request),
            Message::Assistant(answer) if answer.model.as_deref() != Some("<synthetic>") => {
                // Each block of an answer repeats what the stream said already; without a stream it's all there is.
                self.count_request(&RequestUsage {
                    message_id: answer.message_id.clone(),
                    parent: answer.parent.clone(),
                    model: answer.model.clone(),
                    usage: answer.usage,
                });
            }
            Message::ControlResponse(answer) => {
                if let Some(usage) = answer.model_usage() {
                    if self.before.is_none() && !self.began {
                        self.before = Some(usage.clone());
                    }
                    self.reported = usage;
                }
            }
            // A result line that couldn't be read settles nothing.
            Message::Result(result) if result.invalid.is_some() && result.model_usage.is_empty() => {
                return false;
            }
            Message::Result(result) => {
                if let Some(usage) = &result.model_usage_since_last_result {
                    self.settle(usage);
                } else {
                    // Older releases: sums over this process alone.
                    self.settled.clear();
                    self.settle(&result.model_usage);
                }
                self.requests.clear();
                self.started.clear();
            }
            _ => return false,
        }
        true
    }

    /// The cost so far, by model in alphabetical order.
    pub fn spend(&self) -> Spend {
        let open = self.open();
        let mut models = self.settled.clone();
        for (model, usage) in &open {
            add(models.entry(model.clone()).or_default(), *usage);
        }
        let estimated = !open.is_empty() || !self.settled_priced;
        Spend {
            models: models
                .into_iter()
                .map(|(model, usage)| ModelCost {
                    cost: usage.cost.unwrap_or_default(),
                    usage: usage.usage.into(),
                    model,
                })
                .collect(),
            estimated,
            price_version: estimated.then(|| PRICES.version().to_owned()),
        }
    }

    fn count_request(&mut self, request: &RequestUsage) {
        self.began = true;
        let id = match &request.message_id {
            Some(id) => id.clone(),
            None => match self.started.get(&request.parent) {
                Some(id) => id.clone(),
                None => return,
            },
        };
        self.started.insert(request.parent.clone(), id.clone());
        let known = self.requests.entry(id).or_default();
        known.usage = known.usage.max(request.usage);
        if known.model.is_none() {
            known.model.clone_from(&request.model);
        }
    }

    fn settle(&mut self, models: &BTreeMap<String, ModelUsage>) {
        for (model, usage) in models {
            self.settled_priced &= usage.cost.is_some();
            add(
                self.settled.entry(model.clone()).or_default(),
                priced(model, *usage),
            );
        }
    }

    /// By model: what no result line has settled, always with a cost, without models that cost nothing.
    fn open(&self) -> BTreeMap<String, ModelUsage> {
        let mut seen = BTreeMap::<String, ModelUsage>::new();
        for request in self.requests.values() {
            let model = request.model.as_deref().unwrap_or("unknown");
            seen.entry(model.to_owned()).or_default().usage += request.usage;
        }
        for (model, usage) in &mut seen {
            usage.cost = Some(list_price(model, usage.usage));
        }
        for (model, usage) in self.reported_since_settled() {
            let seen = seen.entry(model).or_default();
            if usage.cost > seen.cost {
                *seen = usage;
            }
        }
        seen.retain(|_, usage| usage.cost > Some(MicroUsd::ZERO));
        seen
    }

    fn reported_since_settled(&self) -> BTreeMap<String, ModelUsage> {
        let Some(before) = &self.before else {
            return BTreeMap::new();
        };
        let counted = |models: &BTreeMap<String, ModelUsage>, model: &str| {
            models
                .get(model)
                .map_or_else(ModelUsage::default, |usage| priced(model, *usage))
        };
        let since = self.reported.iter().map(|(model, usage)| {
            let (usage, before, settled) = (
                priced(model, *usage),
                counted(before, model),
                counted(&self.settled, model),
            );
            let cost = usage.cost.unwrap_or_default()
                - before.cost.unwrap_or_default()
                - settled.cost.unwrap_or_default();
            let usage = usage.usage.since(before.usage).since(settled.usage);
            (
                model.clone(),
                ModelUsage {
                    usage,
                    cost: Some(cost),
                },
            )
        });
        since.collect()
    }
}

static PRICES: std::sync::LazyLock<Prices> = std::sync::LazyLock::new(Prices::default);

fn list_price(model: &str, usage: Usage) -> MicroUsd {
    let terms = Terms {
        model,
        ..Terms::default()
    };
    PRICES.cost(terms, usage, shared::clock::now()).to_micros()
}

/// With the price of the table where the CLI gave none.
fn priced(model: &str, usage: ModelUsage) -> ModelUsage {
    ModelUsage {
        cost: usage.cost.or_else(|| Some(list_price(model, usage.usage))),
        ..usage
    }
}

fn add(sum: &mut ModelUsage, more: ModelUsage) {
    sum.usage += more.usage;
    sum.cost = Some(sum.cost.unwrap_or_default() + more.cost.unwrap_or_default());
}

#[cfg(test)]
mod tests;
