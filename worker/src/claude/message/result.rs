//! The `result` line.

use super::value::MAX_DEPTH;
use super::{items, model_name, status, text};
use crate::spend::{Usage, count};
use serde_json::Value;
use shared::money::MicroUsd;
use std::collections::BTreeMap;
use std::fmt;

/// The end of the answer to a user message. Only the first one without an origin is the verdict of a run; others
/// come from background work or other sessions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResultLine {
    /// Whether it failed. With `subtype` "success" too: that is how errors of the API arrive.
    pub is_error: bool,
    /// `success`, `error_max_turns`, `error_max_budget_usd`, `error_max_structured_output_retries`,
    /// `error_during_execution`; an open set.
    pub subtype: String,
    /// The final answer's text, or the text of an API error.
    pub text: Option<String>,
    /// The value that fits the schema that was asked for.
    pub structured_output: Option<Value>,
    /// Turns, as the CLI counts them: tool results too.
    pub num_turns: u64,
    /// Wall time of the turn, in milliseconds.
    pub duration_ms: u64,
    /// The CLI's own price of the whole process and, in a resumed session, of the runs before it.
    pub total_cost: Option<MicroUsd>,
    /// Tokens and cost by model, with the scope of `total_cost`.
    pub model_usage: BTreeMap<String, ModelUsage>,
    /// Tokens and cost by model since the result line before, of this process alone. None before release 2.1.331.
    pub model_usage_since_last_result: Option<BTreeMap<String, ModelUsage>>,
    /// The tool calls that weren't permitted, as the CLI gives them: `{tool_name, tool_use_id, tool_input}`.
    pub permission_denials: Vec<Value>,
    /// Why the model stopped: `end_turn`, `tool_use`, `refusal` …
    pub stop_reason: Option<String>,
    /// Why the turn ended: `completed`, `api_error`, `max_turns`, `aborted_streaming` …; an open set.
    pub terminal_reason: Option<String>,
    /// The HTTP status of the API error that ended the turn; none when there was no answer.
    pub api_error_status: Option<u16>,
    /// The CLI's word for that error: `usage_limit_reached`, `connection_failed` …
    pub api_error: Option<String>,
    /// The API's word for it: `rate_limit_error`, `billing_error` …
    pub api_error_type: Option<String>,
    /// What went wrong, for subtypes other than `success`.
    pub errors: Vec<String>,
    /// Why the line can't be used; what is known of it is in the other members.
    pub invalid: Option<InvalidResult>,
    /// What made the turn, if it wasn't the user's message: `task-notification`, `peer` …
    pub origin: Option<Value>,
}

impl ResultLine {
    /// `cut` says that something that nests too deep is missing in `line`.
    pub(super) fn read(line: &Value, cut: bool) -> Self {
        // The rest is complete enough without what was left out.
        let invalid = (cut && line.get("structured_output").is_some()).then_some(InvalidResult::TooDeep);
        Self {
            invalid,
            is_error: line["is_error"] == true,
            subtype: text(line, "subtype").unwrap_or_default(),
            text: text(line, "result"),
            structured_output: line.get("structured_output").cloned(),
            num_turns: count(&line["num_turns"]),
            duration_ms: count(&line["duration_ms"]),
            total_cost: cost(&line["total_cost_usd"]),
            model_usage: model_usage(&line["modelUsage"]),
            model_usage_since_last_result: line
                .get("model_usage_since_last_result")
                .filter(|usage| usage.is_object())
                .map(model_usage),
            permission_denials: items(&line["permission_denials"]).cloned().collect(),
            stop_reason: text(line, "stop_reason"),
            terminal_reason: text(line, "terminal_reason"),
            api_error_status: status(&line["api_error_status"]),
            api_error: text(line, "api_error"),
            api_error_type: text(line, "api_error_type"),
            errors: items(&line["errors"])
                .filter_map(|error| error.as_str().map(str::to_owned))
                .collect(),
            origin: line.get("origin").filter(|origin| !origin.is_null()).cloned(),
        }
    }

    /// Whether this answers the user's message. The first such line of a run is its verdict.
    pub fn is_verdict(&self) -> bool {
        self.origin.is_none()
    }
}

/// Why a result line can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidResult {
    /// Its structured output nests too deep to be stored and read again, and isn't whole.
    TooDeep,
    /// It is longer than a line may be; nothing of it is known.
    TooLong,
    /// It isn't valid JSON; nothing of it is known.
    NotJson,
}

impl fmt::Display for InvalidResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooDeep => write!(f, "it is nested deeper than {MAX_DEPTH} levels"),
            Self::TooLong => f.write_str("it is too long"),
            Self::NotJson => f.write_str("it isn't valid JSON"),
        }
    }
}

/// What one model used and cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelUsage {
    /// Tokens and searches.
    pub usage: Usage,
    /// The cost by the CLI's own price table, rounded to the nearest micro-dollar. None when the CLI gave no number.
    pub cost: Option<MicroUsd>,
}

/// No run uses more models than this.
const MAX_MODELS: usize = 100;

/// A larger amount is none that a run could cost.
const MAX_COST: MicroUsd = MicroUsd(1_000_000_000_000);

/// An amount of dollars; a negative one is none.
fn cost(number: &Value) -> Option<MicroUsd> {
    let cost = number.as_f64().and_then(MicroUsd::from_usd)?;
    (cost >= MicroUsd::ZERO).then_some(cost.min(MAX_COST))
}

pub(super) fn model_usage(models: &Value) -> BTreeMap<String, ModelUsage> {
    let models = models.as_object().into_iter().flatten();
    models
        .take(MAX_MODELS)
        .map(|(model, usage)| {
            let usage = ModelUsage {
                usage: Usage::read_camel_case(usage),
                cost: cost(&usage["costUSD"]),
            };
            (model_name(model), usage)
        })
        .collect()
}
