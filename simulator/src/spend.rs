//! What the simulator has answered, at list prices: a truth for tests that knows nothing of whoever counts beside it.
//!
//! Of an answer that is cut off, the part that was sent counts. Errors cost nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::scenario::Usage;

static PRICES: LazyLock<Value> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../shared/prices.json")).expect("a test reads the prices")
});

/// The sum of all answers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spend(Arc<Mutex<Sum>>);

#[derive(Debug, Default)]
struct Sum {
    answers: u64,
    dollars: BTreeMap<String, f64>,
}

/// One answer under way.
#[derive(Debug)]
pub(crate) struct Bill {
    spend: Spend,
    model: String,
    usage: Usage,
    pieces: u64,
    sent: u64,
    billed: f64,
}

impl Spend {
    /// Begins to count an answer of a model, whose text comes in so many pieces. Nothing of it was sent yet.
    pub(crate) fn bill(&self, model: &str, usage: Usage, pieces: usize) -> Bill {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).answers += 1;
        Bill {
            spend: self.clone(),
            model: model.to_owned(),
            usage,
            pieces: pieces as u64,
            sent: 0,
            billed: 0.0,
        }
    }

    /// The sum, in dollars.
    pub(crate) fn dollars(&self) -> f64 {
        let sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sum.dollars.values().sum()
    }

    /// The sum as JSON, by model.
    pub(crate) fn json(&self) -> Value {
        let sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        json!({ "answers": sum.answers, "cost_usd": sum.dollars.values().sum::<f64>(), "models": sum.dollars })
    }

    /// Begins anew.
    pub(crate) fn reset(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Sum::default();
    }
}

impl Bill {
    /// The whole answer was sent.
    pub(crate) fn whole(&mut self) {
        self.to(self.usage.output_tokens);
    }

    /// An event of the answer was sent.
    pub(crate) fn sent(&mut self, event: &Value) {
        match event["type"].as_str().unwrap_or_default() {
            "message_start" => self.to(1),
            "content_block_delta" => {
                self.sent += 1;
                let output = self.usage.output_tokens;
                // An answer without an end has more than it was to have.
                let so_far = (output * self.sent).div_ceil(self.pieces.max(1));
                self.to(if self.pieces == 0 {
                    self.sent
                } else {
                    so_far.min(output)
                });
            }
            "message_delta" => self.whole(),
            _ => {}
        }
    }

    fn to(&mut self, output_tokens: u64) {
        let usage = Usage {
            output_tokens,
            ..self.usage
        };
        let dollars = price(&self.model, &usage);
        let more = dollars - self.billed;
        self.billed = dollars;
        let mut sum = self.spend.0.lock().unwrap_or_else(PoisonError::into_inner);
        *sum.dollars.entry(self.model.clone()).or_default() += more;
    }
}

/// What a request costs, in dollars. A model that has no price costs as much as the dearest.
#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
fn price(model: &str, usage: &Usage) -> f64 {
    let name = model.split('[').next().unwrap_or_default();
    let name = match name.rsplit_once('-') {
        Some((name, date)) if date.len() == 8 => name,
        _ => name,
    };
    let rows = PRICES["models"].as_array().map_or(&[] as &[Value], Vec::as_slice);
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let row = rows.iter().find(|row| row["model"] == name).or_else(|| {
        rows.iter().max_by(|one, other| {
            let by = |row: &Value| (number(&row["output"]), number(&row["input"]));
            by(one).partial_cmp(&by(other)).expect("prices are numbers")
        })
    });
    let Some(mut row) = row else { return 0.0 };
    let prompt = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens;
    let long = &row["long_prompt"];
    if long["above_prompt_tokens"]
        .as_u64()
        .is_some_and(|above| prompt > above)
    {
        row = long;
    } else if usage.fast && row["fast"].is_object() {
        row = &row["fast"];
    }
    let cost = |tokens: u64, price: &str| tokens as f64 * number(&row[price]) / 1e6;
    let hour = usage.cache_creation_1h_input_tokens;
    let tokens = cost(usage.input_tokens, "input")
        + cost(usage.output_tokens, "output")
        + cost(usage.cache_creation_input_tokens - hour, "cache_write_5m")
        + cost(hour, "cache_write_1h")
        + cost(usage.cache_read_input_tokens, "cache_read");
    let factor = if usage.us_only { 1.1 } else { 1.0 };
    tokens * factor + usage.web_search_requests as f64 * 0.01
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-12
    }

    #[test]
    fn an_answer_costs_what_was_sent_of_it() {
        let spend = Spend::default();
        let usage = Usage {
            input_tokens: 100,
            output_tokens: 40,
            ..Usage::default()
        };
        let mut bill = spend.bill("claude-opus-5-5", usage, 2);
        assert!(close(spend.dollars(), 0.0));
        bill.sent(&json!({"type": "message_start"}));
        assert!(close(spend.dollars(), 100.0 * 4e-6 + 20e-6));
        bill.sent(&json!({"type": "content_block_delta"}));
        assert!(close(spend.dollars(), 100.0 * 4e-6 + 20.0 * 20e-6));
        bill.sent(&json!({"type": "message_delta"}));
        assert!(close(spend.dollars(), 100.0 * 4e-6 + 40.0 * 20e-6));
        spend.reset();
        assert!(close(spend.dollars(), 0.0));
    }

    #[test]
    fn prices_are_those_of_the_list() {
        let usage = |input_tokens| Usage {
            input_tokens,
            output_tokens: 0,
            ..Usage::default()
        };
        for (model, tokens, dollars) in [
            ("claude-haiku-5-5", 100_000, 0.01),
            ("claude-haiku-5-5", 200_000, 0.1),
            ("claude-haiku-4-5-20251001", 1_000, 0.001),
            ("claude-sonnet-5-5[1m]", 1_000, 0.002),
            ("somebody-else", 1_000, 0.015),
        ] {
            assert!(close(price(model, &usage(tokens)), dollars), "{model}");
        }
        let dear = Usage {
            cache_creation_input_tokens: 3_000,
            cache_creation_1h_input_tokens: 1_000,
            web_search_requests: 2,
            fast: true,
            us_only: true,
            ..usage(1_000)
        };
        let tokens = 1_000.0 * 8e-6 + 2_000.0 * 10e-6 + 1_000.0 * 16e-6;
        assert!(close(price("claude-opus-5-5", &dear), tokens * 1.1 + 0.02));
    }
}
