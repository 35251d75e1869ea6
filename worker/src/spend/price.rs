//! List prices. They are data: `shared/prices.json`, or the file that `PRICES_FILE` names. Integer arithmetic, in
//! billionths of a dollar, so that sums over many requests are exact.

use super::usage::Usage;
use serde::Deserialize;
use shared::clock::Timestamp;
use shared::model::{self, Aliases};
use shared::money::MicroUsd;
use std::collections::{BTreeMap, HashSet};
use std::ops::{Add, AddAssign};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The largest price that is believed, in dollars: of a million tokens, or of a search.
const DEAREST: f64 = 100_000.0;

/// Unknown models are told once each, and no more of them than this.
const MAX_TOLD: usize = 100;

/// An amount in billionths of a dollar. Saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct NanoUsd(pub u64);

impl NanoUsd {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// To the nearest millionth of a dollar; what isn't nothing is a millionth at least.
    pub fn to_micros(self) -> MicroUsd {
        let nearest = self.0.saturating_add(500) / 1_000;
        let micros = if self.0 > 0 { nearest.max(1) } else { 0 };
        MicroUsd(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    /// The same amount; a negative one is nothing.
    pub fn of(amount: MicroUsd) -> Self {
        Self(u64::try_from(amount.0).unwrap_or(0).saturating_mul(1_000))
    }
}

impl Add for NanoUsd {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for NanoUsd {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::iter::Sum for NanoUsd {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Add::add)
    }
}

/// Billionths of a dollar per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Read, and not from a cache.
    pub input: u64,
    /// Written.
    pub output: u64,
    /// Written to a cache for five minutes.
    pub cache_write_5m: u64,
    /// Written to a cache for an hour.
    pub cache_write_1h: u64,
    /// Read from a cache.
    pub cache_read: u64,
}

/// The prices of one model, from a time on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The model's plain name.
    pub model: String,
    /// Since when; none for as long as one can think.
    pub from: Option<Timestamp>,
    /// For each request but those below.
    pub standard: Tokens,
    /// For a request with more prompt tokens than this, those of caches included: for all its tokens.
    pub long_prompt: Option<(u64, Tokens)>,
    /// For a request in fast mode.
    pub fast: Option<Tokens>,
    /// Per search of the web.
    pub web_search: u64,
}

/// What decides the price of a request beside its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms<'a> {
    /// The model, in any spelling.
    pub model: &'a str,
    /// Whether it ran in fast mode.
    pub fast: bool,
    /// Where it had to run (`us`), if it had to.
    pub region: Option<&'a str>,
}

/// A table of list prices.
#[derive(Debug)]
pub struct Prices {
    version: String,
    /// Thousandths.
    regions: BTreeMap<String, u64>,
    aliases: Aliases,
    /// By plain name, the newest first.
    rows: BTreeMap<String, Vec<Row>>,
    told: Mutex<HashSet<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: String,
    #[serde(default, rename = "unit")]
    _unit: String,
    #[serde(default)]
    regions: BTreeMap<String, f64>,
    #[serde(default)]
    aliases: BTreeMap<String, Vec<String>>,
    models: Vec<FileRow>,
}

#[derive(Deserialize)]
struct FileRow {
    model: String,
    from: Option<String>,
    #[serde(flatten)]
    standard: FileTokens,
    web_search: f64,
    long_prompt: Option<FileLong>,
    fast: Option<FileTokens>,
}

#[derive(Deserialize)]
struct FileLong {
    above_prompt_tokens: u64,
    #[serde(flatten)]
    tokens: FileTokens,
}

#[derive(Deserialize)]
struct FileTokens {
    input: f64,
    output: f64,
    cache_write_5m: f64,
    cache_write_1h: f64,
    cache_read: f64,
}

impl FileTokens {
    fn tokens(&self) -> Result<Tokens, String> {
        Ok(Tokens {
            input: billionths(self.input, 1e3)?,
            output: billionths(self.output, 1e3)?,
            cache_write_5m: billionths(self.cache_write_5m, 1e3)?,
            cache_write_1h: billionths(self.cache_write_1h, 1e3)?,
            cache_read: billionths(self.cache_read, 1e3)?,
        })
    }
}

/// A price as an integer: dollars times `factor`. The error ends a sentence.
fn billionths(dollars: f64, factor: f64) -> Result<u64, String> {
    let (exact, rounded) = (dollars * factor, (dollars * factor).round());
    if !(0.0..=DEAREST).contains(&dollars) || (exact - rounded).abs() > 1e-6 {
        return Err(format!(
            "{dollars} is no price: it has to be from 0 to {DEAREST}, in steps of {}",
            1.0 / factor
        ));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the range is checked above"
    )]
    Ok(rounded as u64)
}

impl Default for Prices {
    fn default() -> Self {
        Self::parse(model::BUILT_IN_PRICES).expect("a test reads the table that the program brings along")
    }
}

impl Prices {
    /// Reads a table. The error is a sentence's end: what is wrong with the file.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if file.version.is_empty() || file.version.len() > 100 {
            return Err("its version should have 1 to 100 characters".to_owned());
        }
        let mut rows = BTreeMap::<String, Vec<Row>>::new();
        for row in &file.models {
            let name = &row.model;
            let read = |error| format!("the row of {name}: {error}");
            if *name != model::plain(name) {
                return Err(format!(
                    "the row of {name} should say {}, without date, provider and context size",
                    model::plain(name)
                ));
            }
            let from = match &row.from {
                Some(date) => Some(Timestamp::parse(&format!("{date}T00:00:00Z")).ok_or_else(|| {
                    format!("the row of {name} begins at {date}, which is no date such as 2026-11-09")
                })?),
                None => None,
            };
            let long_prompt = match &row.long_prompt {
                Some(long) => Some((long.above_prompt_tokens, long.tokens.tokens().map_err(read)?)),
                None => None,
            };
            let fast = row
                .fast
                .as_ref()
                .map(FileTokens::tokens)
                .transpose()
                .map_err(read)?;
            rows.entry(name.clone()).or_default().push(Row {
                model: name.clone(),
                from,
                standard: row.standard.tokens().map_err(read)?,
                long_prompt,
                fast,
                web_search: billionths(row.web_search, 1e9).map_err(read)?,
            });
        }
        for (name, of_model) in &mut rows {
            of_model.sort_by_key(|row| std::cmp::Reverse(row.from));
            if of_model.windows(2).any(|pair| pair[0].from == pair[1].from) {
                return Err(format!("it has two rows of {name} that begin at the same time"));
            }
        }
        if rows.is_empty() {
            return Err("it has no models".to_owned());
        }
        let mut regions = BTreeMap::new();
        for (region, factor) in file.regions {
            regions.insert(region, billionths(factor, 1e3)?.max(1));
        }
        Ok(Self {
            version: file.version,
            regions,
            aliases: Aliases::new(file.aliases),
            rows,
            told: Mutex::default(),
        })
    }

    /// Reads a table from a file. The error is a sentence's end.
    pub fn read(file: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(file).map_err(|error| format!("can't be read: {error}"))?;
        Self::parse(&text).map_err(|error| format!("is no table of prices: {error}"))
    }

    /// Names the table; stored with every cost.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// What short names of models stand for.
    pub fn aliases(&self) -> &Aliases {
        &self.aliases
    }

    /// The factors of regions, in thousandths.
    pub fn regions(&self) -> impl Iterator<Item = (&str, u64)> {
        self.regions
            .iter()
            .map(|(region, factor)| (region.as_str(), *factor))
    }

    /// The row of each model that is in force, by name.
    pub fn in_force(&self, now: Timestamp) -> impl Iterator<Item = &Row> {
        self.rows.values().filter_map(move |rows| in_force(rows, now))
    }

    /// Whether the table has this model, in whatever spelling.
    pub fn knows(&self, model: &str, now: Timestamp) -> bool {
        self.find(model, now).is_some()
    }

    /// What a request with this usage costs. The dearest row counts for a model that the table doesn't have, which is
    /// told once.
    pub fn cost(&self, terms: Terms<'_>, usage: Usage, now: Timestamp) -> NanoUsd {
        let row = self.row(terms.model, now);
        let prompt = usage
            .input
            .saturating_add(usage.cache_read)
            .saturating_add(usage.cache_write_5m)
            .saturating_add(usage.cache_write_1h);
        let tokens = match (&row.fast, &row.long_prompt) {
            (Some(fast), _) if terms.fast => fast,
            (_, Some((above, long))) if prompt > *above => long,
            _ => &row.standard,
        };
        let of_tokens: u128 = [
            (usage.input, tokens.input),
            (usage.output, tokens.output),
            (usage.cache_write_5m, tokens.cache_write_5m),
            (usage.cache_write_1h, tokens.cache_write_1h),
            (usage.cache_read, tokens.cache_read),
        ]
        .iter()
        .map(|&(count, each)| u128::from(count) * u128::from(each))
        .sum();
        let factor = terms.region.map_or(1_000, |region| self.region(region));
        let searches = u128::from(usage.web_searches) * u128::from(row.web_search);
        let sum = (of_tokens * u128::from(factor)).div_ceil(1_000) + searches;
        NanoUsd(u64::try_from(sum).unwrap_or(u64::MAX))
    }

    /// Thousandths. A region without a factor costs nothing extra; a word that no region has is none.
    fn region(&self, region: &str) -> u64 {
        self.regions.get(region).copied().unwrap_or(1_000)
    }

    fn find(&self, model: &str, now: Timestamp) -> Option<&Row> {
        let plain = model::plain(model);
        let names = self.aliases.of(&plain);
        names.iter().find_map(|name| in_force(self.rows.get(name)?, now))
    }

    fn row(&self, model: &str, now: Timestamp) -> &Row {
        if let Some(row) = self.find(model, now) {
            return row;
        }
        let row = self
            .in_force(now)
            .max_by_key(|row| (row.standard.output, row.standard.input))
            .unwrap_or_else(|| {
                self.rows
                    .values()
                    .next()
                    .and_then(|rows| rows.last())
                    .expect("checked when it was read")
            });
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = model::shown(model);
        if told.len() < MAX_TOLD && told.insert(shown.clone()) {
            tracing::warn!(
                "the table of prices ({}) has no model {shown}: it counts as {}, the dearest one",
                self.version,
                row.model
            );
        }
        row
    }
}

/// The newest row that has begun.
fn in_force(rows: &[Row], now: Timestamp) -> Option<&Row> {
    rows.iter().find(|row| row.from.is_none_or(|from| from <= now))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000_000);

    fn usage(input: u64, output: u64) -> Usage {
        Usage {
            input,
            output,
            ..Usage::default()
        }
    }

    fn cost(model: &str, usage: Usage) -> NanoUsd {
        let terms = Terms {
            model,
            ..Terms::default()
        };
        Prices::default().cost(terms, usage, NOW)
    }

    #[test]
    fn each_kind_of_token_has_its_price() {
        let none = Usage::default();
        for (usage, dollars, reason) in [
            (usage(1_000_000, 0), 4.0, "input"),
            (usage(0, 1_000_000), 20.0, "output"),
            (
                Usage {
                    cache_write_5m: 1_000_000,
                    ..none
                },
                5.0,
                "written to a cache",
            ),
            (
                Usage {
                    cache_write_1h: 1_000_000,
                    ..none
                },
                8.0,
                "for an hour",
            ),
            (
                Usage {
                    cache_read: 1_000_000,
                    ..none
                },
                0.2,
                "read from a cache",
            ),
            (
                Usage {
                    web_searches: 3,
                    ..none
                },
                0.03,
                "searches",
            ),
            (none, 0.0, "nothing"),
        ] {
            let micros = MicroUsd::from_usd(dollars).unwrap();
            assert_eq!(cost("claude-opus-5-5", usage).to_micros(), micros, "{reason}");
        }
    }

    #[test]
    fn a_long_prompt_changes_the_price_of_the_whole_request() {
        let haiku = |input, cache_read, output| {
            let usage = Usage {
                input,
                output,
                cache_read,
                ..Usage::default()
            };
            cost("haiku", usage).to_micros().0
        };
        assert_eq!(haiku(100_000, 0, 1_000), 10_000 + 500, "just not long");
        assert_eq!(haiku(100_001, 0, 1_000), 50_001 + 2_500, "long");
        assert_eq!(haiku(1, 100_000, 0), 5_001, "what a cache holds counts");
    }

    #[test]
    fn fast_mode_and_regions_cost_more() {
        let prices = Prices::default();
        let cost = |model, fast, region| {
            let terms = Terms { model, fast, region };
            prices.cost(terms, usage(1_000_000, 0), NOW).to_micros().0
        };
        assert_eq!(cost("opus", true, None), 8_000_000);
        assert_eq!(cost("opus", false, Some("us")), 4_400_000);
        assert_eq!(cost("opus", true, Some("us")), 8_800_000);
        assert_eq!(cost("opus", false, Some("not_available")), 4_000_000);
        assert_eq!(cost("sonnet", true, None), 2_000_000, "it has no fast mode");
    }

    #[test]
    fn an_unknown_model_costs_the_dearest_row() {
        let dearest = cost("claude-opus-4-1", usage(1_000, 0));
        for model in ["somebody/else-7b", "", "claude-opus-9"] {
            assert_eq!(cost(model, usage(1_000, 0)), dearest, "{model}");
        }
    }

    #[test]
    fn amounts_are_rounded_once_and_no_paid_token_costs_nothing() {
        assert_eq!(cost("haiku", usage(1, 0)), NanoUsd(100));
        assert_eq!(NanoUsd(100).to_micros(), MicroUsd(1));
        assert_eq!(NanoUsd(1_499).to_micros(), MicroUsd(1));
        assert_eq!(NanoUsd(1_500).to_micros(), MicroUsd(2));
        assert_eq!(NanoUsd(0).to_micros(), MicroUsd(0));
        assert_eq!(cost("fable", usage(u64::MAX, u64::MAX)), NanoUsd(u64::MAX));
    }

    #[test]
    fn the_newest_row_that_has_begun_is_in_force() {
        let row = |from: &str, input: u64| {
            format!(
                r#"{{"model": "claude-x-1"{from}, "input": {input}, "output": 1, "cache_write_5m": 1, "cache_write_1h": 1,
                    "cache_read": 1, "web_search": 0.01}}"#
            )
        };
        let (old, new) = (row("", 1), row(r#", "from": "2027-01-10""#, 2));
        let text = format!(r#"{{"version": "v", "models": [{old}, {new}]}}"#);
        let prices = Prices::parse(&text).unwrap();
        let cost = |at: &str| {
            let terms = Terms {
                model: "claude-x-1",
                ..Terms::default()
            };
            prices
                .cost(terms, usage(1_000, 0), Timestamp::parse(at).unwrap())
                .0
        };
        assert_eq!(cost("2027-01-09T23:59:59Z"), 1_000_000);
        assert_eq!(cost("2027-01-10T00:00:00Z"), 2_000_000);
    }

    #[test]
    fn a_bad_table_is_refused_with_a_reason() {
        let with = |row: &str| format!(r#"{{"version": "v", "models": [{row}]}}"#);
        let row = r#""input": 1, "output": 1, "cache_write_5m": 1, "cache_write_1h": 1, "cache_read": 1, "web_search": 0.01"#;
        for (text, reason) in [
            ("prices".to_owned(), "expected value"),
            (r#"{"version": "v", "models": []}"#.to_owned(), "no models"),
            (with(r#"{"model": "claude-x-1"}"#), "missing field"),
            (
                with(&format!(
                    r#"{{"model": "claude-x-1", {}}}"#,
                    row.replacen('1', "-1", 1)
                )),
                "no price",
            ),
            (
                with(&format!(
                    r#"{{"model": "claude-x-1", {}}}"#,
                    row.replacen('1', "0.0001", 1)
                )),
                "no price",
            ),
            (
                with(&format!(r#"{{"model": "claude-x-1-20260101", {row}}}"#)),
                "should say claude-x-1",
            ),
            (
                with(&format!(r#"{{"model": "claude-x-1", "from": "soon", {row}}}"#)),
                "no date",
            ),
            (
                with(&format!(r#"{{"model": "a", {row}}}, {{"model": "a", {row}}}"#)),
                "two rows of a",
            ),
        ] {
            let error = Prices::parse(&text).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
