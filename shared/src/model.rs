//! Names of models. One model has many: with a date, with a context size, as each provider writes it, and short ones.

use std::collections::{BTreeMap, BTreeSet};

use crate::env::{Error, Vars};
use serde::Deserialize;

/// The table of prices and short names that the programs bring along.
pub const BUILT_IN_PRICES: &str = include_str!("../prices.json");

/// How much of a name is shown.
const SHOWN: usize = 100;

/// What `PRICES_FILE` may be.
pub const ACCEPTED_PRICES: &str = "a file like shared/prices.json in the source, or nothing for that one";

/// The plain name: lower case, without provider, version of the provider, date and context size.
///
/// `us.anthropic.claude-sonnet-4-5-20250929-v1:0`, `claude-sonnet-4-5@20250929` and `claude-sonnet-4-5[1m]` are all
/// `claude-sonnet-4-5`. A name that isn't of this kind stays as it is, in lower case.
pub fn plain(model: &str) -> String {
    let lower = model.trim().to_ascii_lowercase();
    let mut name = lower.as_str();
    name = name.split_once('[').map_or(name, |(name, _)| name);
    name = name.rsplit_once('/').map_or(name, |(_, name)| name);
    name = match name.split_once("anthropic.") {
        Some((region, rest)) if region.is_empty() || region.ends_with('.') => rest,
        _ => name,
    };
    // `-v1:0`, and before it `@20250929`.
    name = match name.rsplit_once("-v") {
        Some((rest, version)) if is_version(version) => rest,
        _ => name,
    };
    name = match name.rsplit_once('@') {
        Some((rest, date)) if is_digits(date, 8) || date == "latest" || date == "default" => {
            // Vertex puts its version before the date.
            match rest.rsplit_once("-v") {
                Some((rest, version)) if is_version(version) => rest,
                _ => rest,
            }
        }
        _ => name,
    };
    name = match name.rsplit_once('-') {
        Some((rest, date)) if is_digits(date, 8) || date == "latest" => rest,
        _ => name,
    };
    dashed(name)
}

/// A version's dot as the first party writes it: `claude-opus-5.5` → `claude-opus-5-5`.
fn dashed(name: &str) -> String {
    if name.starts_with("claude-") {
        name.replace('.', "-")
    } else {
        name.to_owned()
    }
}

fn is_digits(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// `1`, `1:0`.
fn is_version(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b':')
}

/// A name as it may be shown: it comes from a run, and may be long or hold anything.
pub fn shown(model: &str) -> String {
    let visible = model.chars().filter(|char| !char.is_control());
    visible.take(SHOWN).collect()
}

/// What short names stand for.
#[derive(Clone, Debug)]
pub struct Aliases(BTreeMap<String, Vec<String>>);

/// The part of a table of prices that has the short names.
#[derive(Deserialize)]
struct Table {
    #[serde(default)]
    aliases: BTreeMap<String, Vec<String>>,
}

impl Default for Aliases {
    /// Those that the programs bring along.
    fn default() -> Self {
        Self::parse(BUILT_IN_PRICES).expect("a test reads the table that the programs bring along")
    }
}

impl Aliases {
    /// By plain name.
    pub fn new(aliases: BTreeMap<String, Vec<String>>) -> Self {
        Self(aliases)
    }

    /// Those of a table of prices. The error is a sentence's end.
    pub fn parse(text: &str) -> Result<Self, String> {
        let table: Table = serde_json::from_str(text).map_err(|error| error.to_string())?;
        Ok(Self(table.aliases))
    }

    /// Those that are in force: of `PRICES_FILE`, if it is set.
    pub fn from_vars(vars: &Vars) -> Result<Self, Error> {
        let Some(file) = vars.path("PRICES_FILE")? else {
            return Ok(Self::default());
        };
        let text = std::fs::read_to_string(&file).map_err(|error| format!("can't be read: {error}"));
        text.and_then(|text| Self::parse(&text).map_err(|error| format!("is no table of prices: {error}")))
            .map_err(|problem| Error::new("PRICES_FILE", problem, ACCEPTED_PRICES))
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.0
            .iter()
            .map(|(alias, models)| (alias.as_str(), models.as_slice()))
    }

    /// The models that a plain name stands for; itself if it is no short one.
    pub fn of(&self, plain: &str) -> Vec<String> {
        self.0
            .get(plain)
            .cloned()
            .unwrap_or_else(|| vec![plain.to_owned()])
    }

    /// The models that these names stand for, in whatever spelling they are given.
    pub fn all_of<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> BTreeSet<String> {
        names.into_iter().flat_map(|name| self.of(&plain(name))).collect()
    }
}

/// The models that a key may use, in whatever spelling they are asked for: the one rule for the submission of a job and
/// for each request of its runs.
#[derive(Clone, Debug, Default)]
pub struct AllowedModels(Option<BTreeSet<String>>);

impl AllowedModels {
    /// These models; all, if there are none.
    pub fn new(models: &[String], aliases: &Aliases) -> Self {
        Self((!models.is_empty()).then(|| aliases.all_of(models)))
    }

    /// Whether this model is one of them. A short name that stands for more than one has to be allowed them all.
    pub fn allow(&self, model: &str, aliases: &Aliases) -> bool {
        let Some(models) = &self.0 else {
            return true;
        };
        let asked = aliases.of(&plain(model));
        asked.iter().all(|model| models.contains(model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_allowed_or_not_in_every_spelling() {
        let aliases = Aliases::default();
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        for (allowed, model, expected) in [
            (&["haiku"][..], "claude-haiku-5-5", true),
            (&["haiku"], "haiku", true),
            (&["haiku"], "claude-haiku-5-5[1m]", true),
            (&["haiku"], "us.anthropic.claude-haiku-5-5", true),
            (&["haiku"], "claude-haiku-5-5@20261001", true),
            (&["claude-opus-5-5-20260601"], "opus[1m]", true),
            (&["eu.anthropic.claude-opus-5-5-v1:0"], "Claude-Opus-5.5", true),
            (&["haiku"], "claude-haiku-4-5", false),
            (&["haiku"], "opus", false),
            (&["haiku"], "claude-haiku-5-5-fast", false),
            (&["haiku"], "somebody/else", false),
            (&["haiku"], "", false),
            (&["opus"], "opusplan", false),
            (&["opus", "sonnet"], "opusplan", true),
            (&["in-house"], "in-house", true),
            (&[], "anything", true),
        ] {
            let models = AllowedModels::new(&names(allowed), &aliases);
            assert_eq!(models.allow(model, &aliases), expected, "{model} by {allowed:?}");
        }
    }

    #[test]
    fn a_file_replaces_the_short_names() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prices.json");
        let of = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Aliases::from_vars(&Vars::of([("PRICES_FILE", file.to_str().unwrap())]))
        };
        let own = of(r#"{"version": "v", "aliases": {"opus": ["claude-opus-9"]}, "models": []}"#).unwrap();
        assert_eq!(own.of("opus"), ["claude-opus-9"]);
        assert_eq!(of("prices").unwrap_err().variable, "PRICES_FILE");
        assert_eq!(
            Aliases::from_vars(&Vars::of([])).unwrap().of("opus"),
            ["claude-opus-5-5"]
        );
    }

    #[test]
    fn one_model_has_one_plain_name() {
        for (name, expected) in [
            ("claude-sonnet-4-5", "claude-sonnet-4-5"),
            ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
            ("claude-sonnet-4-5-20250929[1m]", "claude-sonnet-4-5"),
            ("claude-opus-5-5[1M]", "claude-opus-5-5"),
            ("Claude-Opus-5-5", "claude-opus-5-5"),
            (" claude-opus-5-5 ", "claude-opus-5-5"),
            ("us.anthropic.claude-opus-4-6-v1", "claude-opus-4-6"),
            (
                "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
                "claude-sonnet-4-5",
            ),
            ("anthropic.claude-opus-5-5", "claude-opus-5-5"),
            ("eu.anthropic.claude-haiku-5-5", "claude-haiku-5-5"),
            ("claude-sonnet-4-5@20250929", "claude-sonnet-4-5"),
            ("claude-3-5-sonnet-v2@20241022", "claude-3-5-sonnet"),
            ("claude-3-5-haiku-latest", "claude-3-5-haiku"),
            (
                "arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-opus-5-5",
                "claude-opus-5-5",
            ),
            ("anthropic/claude-opus-5.5", "claude-opus-5-5"),
            ("opus[1m]", "opus"),
            ("gpt-4.1", "gpt-4.1"),
            ("", ""),
        ] {
            assert_eq!(plain(name), expected, "{name}");
        }
    }

    #[test]
    fn short_names_stand_for_models() {
        let aliases = Aliases::new(BTreeMap::from([(
            "opus".to_owned(),
            vec!["claude-opus-5-5".to_owned()],
        )]));
        let names = ["opus[1m]".to_owned(), "claude-haiku-4-5-20251001".to_owned()];
        let models: Vec<String> = aliases.all_of(&names).into_iter().collect();
        assert_eq!(models, ["claude-haiku-4-5", "claude-opus-5-5"]);
    }

    #[test]
    fn a_name_is_shown_in_part_and_without_control_characters() {
        assert_eq!(shown("a\n\u{1b}[2Jb"), "a[2Jb");
        assert_eq!(shown(&"é".repeat(10_000)).chars().count(), SHOWN);
    }
}
