//! Tokens, split as they are priced.

use serde_json::Value;
use shared::job::TokenUsage;
use std::ops::AddAssign;

/// What one or more requests used, by price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens read that no cache held.
    pub input: u64,
    /// Tokens written, thinking included.
    pub output: u64,
    /// Tokens read from a cache.
    pub cache_read: u64,
    /// Tokens written to a cache for five minutes.
    pub cache_write_5m: u64,
    /// Tokens written to a cache for an hour.
    pub cache_write_1h: u64,
    /// Searches of the web.
    pub web_searches: u64,
}

impl Usage {
    /// Reads the API's `usage` object; what isn't there is 0.
    pub fn read(usage: &Value) -> Self {
        Self {
            input: count(&usage["input_tokens"]),
            output: count(&usage["output_tokens"]),
            cache_read: count(&usage["cache_read_input_tokens"]),
            web_searches: count(&usage["server_tool_use"]["web_search_requests"]),
            ..Self::default()
        }
        .with_cache_writes(
            count(&usage["cache_creation_input_tokens"]),
            count(&usage["cache_creation"]["ephemeral_1h_input_tokens"]),
        )
    }

    /// Reads a member of the CLI's `modelUsage` object; what isn't there is 0.
    pub fn read_camel_case(usage: &Value) -> Self {
        Self {
            input: count(&usage["inputTokens"]),
            output: count(&usage["outputTokens"]),
            cache_read: count(&usage["cacheReadInputTokens"]),
            web_searches: count(&usage["webSearchRequests"]),
            ..Self::default()
        }
        .with_cache_writes(
            count(&usage["cacheCreationInputTokens"]),
            count(&usage["cacheCreationEphemeral1hInputTokens"]),
        )
    }

    /// Both kinds of cache write come as one sum; what isn't marked as an hour's is five minutes'.
    fn with_cache_writes(self, all: u64, for_an_hour: u64) -> Self {
        Self {
            cache_write_5m: all.saturating_sub(for_an_hour),
            cache_write_1h: for_an_hour,
            ..self
        }
    }

    /// The larger of each pair of counters: the state of a request of which both are readings.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        self.pairwise(other, u64::max)
    }

    /// What this counts and `earlier` didn't.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        self.pairwise(earlier, u64::saturating_sub)
    }

    fn pairwise(self, other: Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            input: combine(self.input, other.input),
            output: combine(self.output, other.output),
            cache_read: combine(self.cache_read, other.cache_read),
            cache_write_5m: combine(self.cache_write_5m, other.cache_write_5m),
            cache_write_1h: combine(self.cache_write_1h, other.cache_write_1h),
            web_searches: combine(self.web_searches, other.web_searches),
        }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        *self = self.pairwise(other, u64::saturating_add);
    }
}

/// A larger counter is none that a run could reach, and sums of such would end beyond 64 bits.
pub const MAX_COUNT: u64 = 1_000_000_000_000;

/// A counter; anything that isn't one is 0. Numbers with a fraction lose it.
pub fn count(number: &Value) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast of a float saturates"
    )]
    number
        .as_u64()
        .or_else(|| number.as_f64().map(|number| number as u64))
        .unwrap_or(0)
        .min(MAX_COUNT)
}

/// The same tokens as clients see them.
impl From<Usage> for TokenUsage {
    fn from(usage: Usage) -> Self {
        let tokens = |count: u64| i64::try_from(count.min(MAX_COUNT)).unwrap_or(i64::MAX);
        Self {
            input_tokens: tokens(usage.input),
            output_tokens: tokens(usage.output),
            cache_creation_input_tokens: tokens(usage.cache_write_5m.saturating_add(usage.cache_write_1h)),
            cache_read_input_tokens: tokens(usage.cache_read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn cache_writes_are_split_by_how_long_they_last() {
        let api = json!({"input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 11,
            "cache_creation": {"ephemeral_5m_input_tokens": 9, "ephemeral_1h_input_tokens": 2}, "server_tool_use": {"web_search_requests": 1}});
        let cli = json!({"inputTokens": 3, "outputTokens": 5, "cacheReadInputTokens": 7, "cacheCreationInputTokens": 11,
            "cacheCreationEphemeral1hInputTokens": 2, "webSearchRequests": 1});
        let usage = Usage {
            input: 3,
            output: 5,
            cache_read: 7,
            cache_write_5m: 9,
            cache_write_1h: 2,
            web_searches: 1,
        };

        assert_eq!(Usage::read(&api), usage);
        assert_eq!(Usage::read_camel_case(&cli), usage);
        assert_eq!(TokenUsage::from(usage).cache_creation_input_tokens, 11);
    }

    #[test]
    fn what_is_missing_or_no_number_counts_as_nothing() {
        let usage = json!({"input_tokens": -1, "output_tokens": "many", "cache_read_input_tokens": 2.9, "cache_creation": null});

        assert_eq!(
            Usage::read(&usage),
            Usage {
                cache_read: 2,
                ..Usage::default()
            }
        );
        assert_eq!(Usage::read(&json!(null)), Usage::default());
    }
}
