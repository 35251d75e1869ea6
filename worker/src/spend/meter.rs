//! The meter of an attempt: what its requests have cost, and what they may still cost.
//!
//! The gateway feeds it with what the Messages API answered; what a run says of itself changes nothing here. It also
//! keeps the attempt's reservation: a request is admitted only while something of it is left, and beside others only
//! if its worst case fits.

use super::price::{NanoUsd, Prices, Terms};
use super::usage::Usage;
use shared::clock;
use shared::job::{ModelCost, Spend};
use shared::model;
use shared::money::MicroUsd;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// More models than this are one row of the ledger.
const MAX_MODELS: usize = 50;

/// No model writes more tokens in a second, fast mode included.
const FASTEST: u64 = 400;

/// The row of models that are too many.
const OTHERS: &str = "others";

/// What is known of a request before it is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// The model that is asked for.
    pub model: String,
    /// Whether fast mode is asked for.
    pub fast: bool,
    /// Where it has to run, if it has to.
    pub region: Option<String>,
    /// No fewer than the tokens of its prompt, as far as the request itself shows it.
    pub prompt: u64,
    /// No fewer than the tokens of what the API adds to it: documents that it fetches or unpacks, what its searches
    /// find.
    pub unseen: u64,
    /// No fewer than the tokens of its answer.
    pub output: u64,
    /// No fewer than the searches that it makes.
    pub searches: u64,
}

/// What an answer has told of its usage so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// The model that answers, as it calls itself.
    pub model: Option<String>,
    /// Whether it runs in fast mode, where the answer says so.
    pub fast: Option<bool>,
    /// Where it runs, where the answer says so.
    pub region: Option<String>,
    /// What was counted so far.
    pub usage: Usage,
    /// Whether these are the final figures.
    pub is_final: bool,
}

/// Nothing of the reservation is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NothingLeft;

/// Adds up the requests of an attempt.
#[derive(Debug)]
pub struct Meter {
    prices: Arc<Prices>,
    reserved: NanoUsd,
    sum: Mutex<Sum>,
    /// Whoever waits to be admitted waits in this line: it is fair.
    line: tokio::sync::Mutex<()>,
    settled: Notify,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Sum {
    /// What is settled, by model.
    models: BTreeMap<String, Cost>,
    /// Whether a part of that is estimated.
    estimated: bool,
    /// The requests that are under way.
    open: HashMap<u64, Open>,
    /// How many there were.
    count: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    cost: NanoUsd,
    usage: Usage,
}

#[derive(Debug)]
struct Open {
    worst: NanoUsd,
    model: String,
    so_far: Cost,
}

impl Sum {
    /// What is spent for sure.
    fn spent(&self) -> NanoUsd {
        let settled: NanoUsd = self.models.values().map(|model| model.cost).sum();
        settled + self.open.values().map(|open| open.so_far.cost).sum()
    }

    /// What may be spent when all that is under way has ended.
    fn committed(&self) -> NanoUsd {
        let settled: NanoUsd = self.models.values().map(|model| model.cost).sum();
        settled
            + self
                .open
                .values()
                .map(|open| open.worst.max(open.so_far.cost))
                .sum()
    }

    fn add(models: &mut BTreeMap<String, Cost>, model: &str, more: Cost) {
        let model = if models.contains_key(model) || models.len() < MAX_MODELS {
            model
        } else {
            OTHERS
        };
        let sum = models.entry(model.to_owned()).or_default();
        sum.cost += more.cost;
        sum.usage += more.usage;
    }
}

impl Meter {
    /// A meter of an attempt that may cost `reserved`, at these prices.
    pub fn new(prices: Arc<Prices>, reserved: MicroUsd) -> Self {
        Self {
            prices,
            reserved: NanoUsd::of(reserved),
            sum: Mutex::default(),
            line: tokio::sync::Mutex::default(),
            settled: Notify::new(),
            changes: watch::Sender::new(0),
        }
    }

    /// The prices it counts with.
    pub fn prices(&self) -> &Prices {
        &self.prices
    }

    /// Tells each change of the cost.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The cost so far, by model in alphabetical order: of what is settled, and of what has come of the rest.
    pub fn spend(&self) -> Spend {
        let sum = self.sum();
        let mut models = sum.models.clone();
        let mut estimated = sum.estimated;
        for open in sum.open.values().filter(|open| open.so_far.cost > NanoUsd::ZERO) {
            Sum::add(&mut models, &open.model, open.so_far);
            estimated = true;
        }
        drop(sum);
        let models: Vec<ModelCost> = models
            .into_iter()
            .filter(|(_, model)| model.cost > NanoUsd::ZERO)
            .map(|(model, Cost { cost, usage })| ModelCost {
                model,
                cost: cost.to_micros(),
                usage: usage.into(),
            })
            .collect();
        Spend {
            price_version: (!models.is_empty()).then(|| self.prices.version().to_owned()),
            models,
            estimated,
            reported: None,
        }
    }

    /// Waits until a request may be sent: at once while its worst case fits beside those of all that are under way,
    /// otherwise when they have settled. A lone request is admitted while anything is left.
    pub async fn admit(self: &Arc<Self>, planned: Planned) -> Result<Metered, NothingLeft> {
        let _first_in_line = self.line.lock().await;
        let worst = self.worst(&planned);
        loop {
            // Registered before the look, so that no settling is missed.
            let settled = self.settled.notified();
            {
                let mut sum = self.sum();
                if sum.spent() >= self.reserved {
                    return Err(NothingLeft);
                }
                if sum.open.is_empty() || sum.committed() + worst <= self.reserved {
                    let number = sum.count;
                    sum.count += 1;
                    let open = Open {
                        worst,
                        model: self.ledger_name(&planned.model),
                        so_far: Cost::default(),
                    };
                    sum.open.insert(number, open);
                    drop(sum);
                    return Ok(Metered {
                        meter: Arc::clone(self),
                        number,
                        planned,
                        reading: Reading::default(),
                    });
                }
            }
            settled.await;
        }
    }

    /// The most that a request may cost: all of its prompt written to a cache, which is the dearest way to read it.
    fn worst(&self, planned: &Planned) -> NanoUsd {
        let usage = Usage {
            cache_write_1h: planned.prompt.saturating_add(planned.unseen),
            output: planned.output,
            web_searches: planned.searches,
            ..Usage::default()
        };
        self.prices
            .cost(planned.terms(&Reading::default()), usage, clock::now())
    }

    /// A model as the ledger names it.
    fn ledger_name(&self, model: &str) -> String {
        let plain = model::plain(model);
        if self.prices.knows(&plain, clock::now()) {
            plain
        } else {
            model::shown(model)
        }
    }

    fn sum(&self) -> MutexGuard<'_, Sum> {
        self.sum.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Planned {
    fn terms<'a>(&'a self, reading: &'a Reading) -> Terms<'a> {
        Terms {
            model: &self.model,
            fast: reading.fast.unwrap_or(self.fast),
            region: reading.region.as_deref().or(self.region.as_deref()),
        }
    }
}

/// A request under way. What it has cost when it is dropped is settled; marked as estimated unless that was final.
#[derive(Debug)]
pub struct Metered {
    meter: Arc<Meter>,
    number: u64,
    planned: Planned,
    reading: Reading,
}

impl Metered {
    /// What is known of the answer now.
    pub fn observe(&mut self, reading: &Reading) {
        if *reading == self.reading {
            return;
        }
        self.reading = reading.clone();
        let so_far = Cost {
            cost: self.cost(reading.usage),
            usage: reading.usage,
        };
        let meter = &self.meter;
        let answering = reading
            .model
            .as_deref()
            .filter(|model| meter.prices.knows(model, clock::now()));
        let name = answering.map(|model| meter.ledger_name(model));
        let mut sum = meter.sum();
        if let Some(open) = sum.open.get_mut(&self.number) {
            open.so_far = so_far;
            if let Some(name) = name {
                open.model = name;
            }
        }
        drop(sum);
        meter.changed();
    }

    /// It was sent, and nothing is known of what became of it: its prompt counts as if it had been read, and its
    /// answer as if it had been `whole`.
    pub fn presume(&mut self, whole: bool) {
        let usage = Usage {
            cache_write_1h: self.planned.prompt,
            output: if whole { self.planned.output } else { 0 },
            web_searches: if whole { self.planned.searches } else { 0 },
            ..Usage::default()
        };
        self.observe(&Reading {
            usage,
            is_final: false,
            ..self.reading.clone()
        });
    }

    /// The answer was cut off after it has thought for so long without showing its thoughts, which are paid for: it
    /// may have written that many tokens.
    pub fn presume_thoughts(&mut self, time: Duration) {
        let seconds = time.as_secs().saturating_add(1);
        let thought = seconds.saturating_mul(FASTEST).min(self.planned.output);
        let mut reading = self.reading.clone();
        reading.usage.output = reading.usage.output.max(thought);
        self.observe(&reading);
    }

    fn cost(&self, usage: Usage) -> NanoUsd {
        let terms = self.planned.terms(&self.reading);
        let (prices, now) = (&self.meter.prices, clock::now());
        let answering = self
            .reading
            .model
            .as_deref()
            .filter(|model| prices.knows(model, now));
        let terms = Terms {
            model: answering.unwrap_or(terms.model),
            ..terms
        };
        prices.cost(terms, usage, now)
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        let mut sum = self.meter.sum();
        if let Some(open) = sum.open.remove(&self.number)
            && open.so_far.cost > NanoUsd::ZERO
        {
            sum.estimated |= !self.reading.is_final;
            Sum::add(&mut sum.models, &open.model, open.so_far);
        }
        drop(sum);
        self.meter.settled.notify_one();
        self.meter.changed();
    }
}

#[cfg(test)]
mod tests;
