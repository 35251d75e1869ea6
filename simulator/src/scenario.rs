//! What a scenario is: plain data, so that anyone can write one as JSON. Unknown members are refused, because a
//! misspelt one would otherwise change nothing in silence.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A list of answers and the rule that picks one.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What this scenario is for, in a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub about: String,
    /// Which step answers a request.
    #[serde(default)]
    pub pick: Pick,
    /// After the last step: start again at the first (`true`), or repeat the last one (`false`).
    #[serde(default)]
    pub repeat: bool,
    /// The answers, at least one.
    pub steps: Vec<Step>,
    /// The answer to the CLI's side requests (a web search, a summary, a title); by default a short text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auxiliary: Option<Step>,
}

/// How a request finds its step.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pick {
    /// By the number of the model's turns since the last prompt in the conversation, so that a retried request and
    /// a resumed session get the right answer. Nothing is remembered.
    #[default]
    Turn,
    /// By the number of earlier main requests of the same scenario and run: "fail twice, then answer".
    Request,
}

/// One answer. Empty, it is the text `Hello from the simulator.`
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Step {
    /// A thinking block before everything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<String>,
    /// The text. `$CWD`, `$MODEL` and `$PROMPT` are replaced, here and in tools and error messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Tool calls, all in this one answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Tool>,
    /// The tokens that the answer reports.
    pub usage: Usage,
    /// Instead of `end_turn`, or `tool_use` when there are tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// The model that the answer names, instead of the one that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Wait before the response's headers, in milliseconds.
    pub delay_ms: u64,
    /// Into how many pieces the text is cut; 0 counts as 2.
    pub chunks: usize,
    /// Wait before each piece of text, in milliseconds.
    pub chunk_delay_ms: u64,
    /// Further response headers. In a value, `$NOW` is the time in seconds since 1970 and `$NOW+60` a minute later.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Answer with this HTTP error instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_error: Option<HttpError>,
    /// How the answer goes wrong on its way. But for `no_answer` it only concerns streams: the CLI asks once more
    /// without streaming when a stream broke, and then gets the whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
}

/// A tool call of the model.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// The tool's name as the CLI offers it: `Write`, `Bash`, `StructuredOutput`, …
    pub name: String,
    /// Its input.
    #[serde(default)]
    pub input: Value,
    /// Streamed instead of the input, as it stands: for JSON that is cut short or wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_input: Option<String>,
}

/// Tokens of one request, as the API reports them.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Usage {
    /// Input that was neither read from nor written to the cache.
    pub input_tokens: u64,
    /// Output; a stream's first event always says 1, as the API's does.
    pub output_tokens: u64,
    /// Input written to the prompt cache.
    pub cache_creation_input_tokens: u64,
    /// Input read from the prompt cache.
    pub cache_read_input_tokens: u64,
    /// The part of `cache_creation_input_tokens` that is kept for an hour.
    #[serde(skip_serializing_if = "is_none")]
    pub cache_creation_1h_input_tokens: u64,
    /// Searches of the web that the API made.
    #[serde(skip_serializing_if = "is_none")]
    pub web_search_requests: u64,
    /// The answer came in fast mode.
    #[serde(skip_serializing_if = "is_no")]
    pub fast: bool,
    /// The answer came from the United States, as was asked for.
    #[serde(skip_serializing_if = "is_no")]
    pub us_only: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_none(count: &u64) -> bool {
    *count == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_no(is_so: &bool) -> bool {
    !is_so
}

impl Usage {
    /// The same as the API's own object.
    pub(crate) fn as_api(&self) -> Value {
        let mut usage = json!({
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cache_creation_input_tokens": self.cache_creation_input_tokens,
            "cache_read_input_tokens": self.cache_read_input_tokens,
        });
        if self.cache_creation_1h_input_tokens > 0 {
            let hour = self.cache_creation_1h_input_tokens;
            usage["cache_creation"] = json!({
                "ephemeral_5m_input_tokens": self.cache_creation_input_tokens.saturating_sub(hour),
                "ephemeral_1h_input_tokens": hour,
            });
        }
        if self.web_search_requests > 0 {
            usage["server_tool_use"] = json!({ "web_search_requests": self.web_search_requests });
        }
        if self.fast {
            usage["speed"] = json!("fast");
        }
        if self.us_only {
            usage["inference_geo"] = json!("us");
        }
        usage
    }
}

impl Default for Usage {
    fn default() -> Self {
        Self {
            input_tokens: 100,
            output_tokens: 20,
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: 0,
            cache_creation_1h_input_tokens: 0,
            web_search_requests: 0,
            fast: false,
            us_only: false,
        }
    }
}

/// An HTTP response that isn't an answer.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HttpError {
    /// The status, 200 to 599 (200 for a body that isn't the API's).
    pub status: u16,
    /// `error.type` of the body, for instance `overloaded_error`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// `error.message` of the body.
    #[serde(default)]
    pub message: String,
    /// An HTML body instead of the API's JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub html: Option<String>,
}

/// How an answer goes wrong on its way. `after_events` counts server-sent events; with 0 only the headers are sent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// Takes the request and says nothing, not even a status.
    NoAnswer,
    /// Falls silent; the connection stays open.
    Silence {
        /// Events before.
        after_events: usize,
    },
    /// Sends nothing more but a `ping` event each second.
    Pings {
        /// Events before.
        after_events: usize,
    },
    /// Cuts the connection with a reset.
    Reset {
        /// Events before.
        after_events: usize,
    },
    /// Closes the connection in the middle of the body.
    Close {
        /// Events before.
        after_events: usize,
    },
    /// Ends the body properly, though the answer isn't finished.
    Truncate {
        /// Events before.
        after_events: usize,
    },
    /// Ends the stream with an `error` event.
    StreamError {
        /// Events before.
        after_events: usize,
        /// `error.type`, for instance `overloaded_error`.
        error_type: String,
        /// `error.message`.
        message: String,
    },
    /// Streams text for ever, a word each `chunk_delay_ms` (50 when that is 0).
    Endless,
}

impl Scenario {
    /// The step for the n-th turn or request, counted from 0.
    pub(crate) fn step(&self, n: usize) -> Step {
        let Some(last) = self.steps.len().checked_sub(1) else {
            return Step::default();
        };
        self.steps[if self.repeat {
            n % self.steps.len()
        } else {
            n.min(last)
        }]
        .clone()
    }

    /// The answer to a side request.
    pub(crate) fn auxiliary_step(&self) -> Step {
        self.auxiliary.clone().unwrap_or_else(|| Step {
            text: Some("A simulated side answer.".to_owned()),
            ..Step::default()
        })
    }
}

/// The scenarios that a simulator knows, by name.
#[derive(Debug)]
pub(crate) struct Scenarios(Mutex<HashMap<String, Arc<Scenario>>>);

impl Scenarios {
    pub(crate) fn builtin() -> Self {
        let scenarios = crate::builtin()
            .into_iter()
            .map(|(name, scenario)| (name, Arc::new(scenario)));
        Self(Mutex::new(scenarios.collect()))
    }

    pub(crate) fn put(&self, name: String, scenario: Scenario) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name, Arc::new(scenario));
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<Scenario>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// Name and purpose of each, sorted by name.
    pub(crate) fn list(&self) -> BTreeMap<String, String> {
        let scenarios = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        scenarios
            .iter()
            .map(|(name, scenario)| (name.clone(), scenario.about.clone()))
            .collect()
    }
}
