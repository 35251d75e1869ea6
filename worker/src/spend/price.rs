//! The price table for runs whose cost the CLI didn't live to say. Pure, integer, and never used when the CLI gave
//! a cost of its own.

use super::usage::Usage;
use shared::money::MicroUsd;

/// Names the table; stored with every estimate. Change it with any price.
pub const VERSION: &str = "cli-2.1.331";

/// Thousandths of a micro-dollar per token, which is dollars per million tokens times a thousand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Price {
    input: u64,
    output: u64,
    cache_write_5m: u64,
    cache_write_1h: u64,
    cache_read: u64,
}

/// Thousandths of a micro-dollar per search.
const WEB_SEARCH: u64 = 10_000_000;

/// In the order of price lists: input, output, written to a cache for five minutes and for an hour, read from it.
const fn price(each: [u64; 5]) -> Price {
    Price {
        input: each[0],
        output: each[1],
        cache_write_5m: each[2],
        cache_write_1h: each[3],
        cache_read: each[4],
    }
}

/// What a model costs that isn't in the table. The CLI does the same.
const UNKNOWN: Price = price([4_000, 20_000, 5_000, 8_000, 200]);

/// List prices, by the model's name without date and context size.
const TABLE: [(&str, Price); 8] = [
    ("claude-opus-5-5", UNKNOWN),
    ("claude-sonnet-5-5", price([2_000, 10_000, 2_500, 4_000, 100])),
    ("claude-haiku-5-5", price([100, 500, 125, 200, 10])),
    ("claude-fable-5-2", price([8_000, 40_000, 10_000, 16_000, 200])),
    ("claude-opus-4-8", price([5_000, 25_000, 6_250, 10_000, 500])),
    ("claude-sonnet-5", price([2_000, 10_000, 2_500, 4_000, 200])),
    ("claude-sonnet-4-5", price([3_000, 15_000, 3_750, 6_000, 300])),
    ("claude-haiku-4-5", price([1_000, 5_000, 1_250, 2_000, 100])),
];

/// What this usage of a model costs at list price. A part of a micro-dollar counts as a whole one, so that no paid
/// token costs nothing. Saturates.
pub fn cost(model: &str, usage: Usage) -> MicroUsd {
    let price = price_of(model);
    let parts = [
        (usage.input, price.input),
        (usage.output, price.output),
        (usage.cache_write_5m, price.cache_write_5m),
        (usage.cache_write_1h, price.cache_write_1h),
        (usage.cache_read, price.cache_read),
        (usage.web_searches, WEB_SEARCH),
    ];
    let thousandths: u128 = parts
        .iter()
        .map(|&(count, each)| u128::from(count) * u128::from(each))
        .sum();
    MicroUsd(i64::try_from(thousandths.div_ceil(1_000)).unwrap_or(i64::MAX))
}

fn price_of(model: &str) -> Price {
    let name = plain(model);
    TABLE
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(UNKNOWN, |&(_, price)| price)
}

/// `claude-sonnet-4-5-20250929[1m]` → `claude-sonnet-4-5`.
fn plain(model: &str) -> &str {
    let name = model.split_once('[').map_or(model, |(name, _)| name);
    match name.rsplit_once('-') {
        Some((name, date)) if date.len() == 8 && date.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_token_has_its_price() {
        let million = 1_000_000;
        for (usage, micros, reason) in [
            (
                Usage {
                    input: million,
                    ..Usage::default()
                },
                4_000_000,
                "input",
            ),
            (
                Usage {
                    output: million,
                    ..Usage::default()
                },
                20_000_000,
                "output",
            ),
            (
                Usage {
                    cache_write_5m: million,
                    ..Usage::default()
                },
                5_000_000,
                "written to a cache",
            ),
            (
                Usage {
                    cache_write_1h: million,
                    ..Usage::default()
                },
                8_000_000,
                "written to a cache for an hour",
            ),
            (
                Usage {
                    cache_read: million,
                    ..Usage::default()
                },
                200_000,
                "read from a cache",
            ),
            (
                Usage {
                    web_searches: 3,
                    ..Usage::default()
                },
                30_000,
                "searches",
            ),
            (Usage::default(), 0, "nothing"),
        ] {
            assert_eq!(cost("claude-opus-5-5", usage), MicroUsd(micros), "{reason}");
        }
    }

    #[test]
    fn a_model_is_found_by_its_plain_name() {
        let usage = Usage {
            input: 1_000,
            ..Usage::default()
        };
        for (model, micros, reason) in [
            ("claude-sonnet-4-5", 3_000, "as it is"),
            ("claude-sonnet-4-5-20250929", 3_000, "with a date"),
            ("claude-opus-4-8[1m]", 5_000, "with a context size"),
            ("claude-haiku-4-5-20251001[1m]", 1_000, "with both"),
            ("claude-sonnet-5", 2_000, "a name that another one begins with"),
            (
                "somebody/else-7b",
                4_000,
                "unknown costs what the CLI takes for it",
            ),
            ("", 4_000, "no name"),
        ] {
            assert_eq!(cost(model, usage), MicroUsd(micros), "{reason}");
        }
    }

    #[test]
    fn a_part_of_a_micro_dollar_counts_as_a_whole_one() {
        assert_eq!(
            cost(
                "claude-haiku-5-5",
                Usage {
                    input: 1,
                    ..Usage::default()
                }
            ),
            MicroUsd(1)
        );
        assert_eq!(
            cost(
                "claude-haiku-5-5",
                Usage {
                    input: 11,
                    ..Usage::default()
                }
            ),
            MicroUsd(2)
        );
    }

    #[test]
    fn absurd_counts_saturate() {
        let usage = Usage {
            input: u64::MAX,
            output: u64::MAX,
            ..Usage::default()
        };
        assert_eq!(cost("claude-fable-5-2", usage), MicroUsd(i64::MAX));
    }
}
