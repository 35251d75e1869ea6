//! Our table of prices against the catalogue in the pinned CLI's binary. When they differ, the CLI was updated or the
//! table was changed: look at the price list, then correct `shared/prices.json` and its version.

use serde_json::Value;
use shared::clock::Timestamp;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use worker::spend::price::{Prices, Row, Tokens};

/// The lines of the program that hold what is looked for. Its source text is in there, in long lines.
fn lines_with(needles: &[&str]) -> Vec<String> {
    let cli = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/claude/node_modules/.bin/claude");
    let file = File::open(&cli)
        .unwrap_or_else(|error| panic!("{}: {error}; `make test` installs it", cli.display()));
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let (mut line, mut found) = (Vec::new(), Vec::new());
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).expect("readable") == 0 {
            return found;
        }
        if line.len() < 1_000 {
            continue;
        }
        // Compiled code isn't text.
        let Ok(text) = std::str::from_utf8(&line) else {
            continue;
        };
        if needles.iter().any(|needle| text.contains(needle)) {
            found.push(text.to_owned());
        }
    }
}

/// The literal that begins at `from`, as JSON: with quoted names, and without what minifying leaves of `true`.
fn literal(text: &str, from: usize) -> Value {
    let (mut depth, mut json, mut quoted) = (0_i32, String::new(), false);
    let mut chars = text[from..].chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '"' => quoted = !quoted,
            '\\' if quoted => {
                json.push(char);
                json.extend(chars.next());
                continue;
            }
            _ if quoted => {}
            '!' => {
                json.push_str(if chars.next() == Some('0') {
                    "true"
                } else {
                    "false"
                });
                continue;
            }
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            'a'..='z' | 'A'..='Z' | '_' if json.ends_with(['{', ',']) => {
                json.push('"');
                json.push(char);
                while let Some(more) = chars.next_if(|next| next.is_alphanumeric() || *next == '_') {
                    json.push(more);
                }
                json.push('"');
                continue;
            }
            _ => {}
        }
        json.push(char);
        if depth == 0 {
            break;
        }
    }
    serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error} in {json}"))
}

fn after<'a>(text: &'a str, marker: &str) -> &'a str {
    let (_, rest) = text
        .split_once(marker)
        .unwrap_or_else(|| panic!("the program has no {marker}"));
    rest
}

fn tokens(of: &Value, names: [&str; 5]) -> Tokens {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "prices are small"
    )]
    let price =
        |name: &str| (of[name].as_f64().unwrap_or_else(|| panic!("no {name} in {of}")) * 1e3).round() as u64;
    let [input, output, write_5m, write_1h, read] = names.map(price);
    Tokens {
        input,
        output,
        cache_write_5m: write_5m,
        cache_write_1h: write_1h,
        cache_read: read,
    }
}

const SNAKE: [&str; 5] = [
    "input",
    "output",
    "cache_write_5m",
    "cache_write_1h",
    "cache_read",
];
const CAMEL: [&str; 5] = [
    "inputTokens",
    "outputTokens",
    "promptCacheWriteTokens",
    "promptCacheWrite1hTokens",
    "promptCacheReadTokens",
];

/// The prices of fast mode: a function of the form `if(e==="a"||e==="b")return X;…`, and `X={inputTokens:…}`.
fn fast_prices(text: &str) -> BTreeMap<String, Tokens> {
    let begin = text.find("={inputTokens:").expect("prices by name");
    let text = &text[begin.saturating_sub(8)..];
    let mut fast = BTreeMap::new();
    let function = after(text, "{if(e===\"claude-");
    let function = function.split_once("return}").expect("an end").0;
    for arm in format!("e===\"claude-{function}").split("if(").map(str::to_owned) {
        let Some((condition, rest)) = arm.split_once(")return ") else {
            continue;
        };
        let name = rest.split(';').next().expect("readable");
        let at = text
            .find(&format!("{name}={{inputTokens:"))
            .unwrap_or_else(|| panic!("no prices {name}"));
        let prices = tokens(&literal(text, at + name.len() + 1), CAMEL);
        for model in condition.split("||") {
            fast.insert(
                model.trim_start_matches("e===").trim_matches('"').to_owned(),
                prices,
            );
        }
    }
    fast
}

#[test]
fn the_table_is_that_of_the_pinned_cli() {
    let lines = lines_with(&["pricing_tiers:{", ".inference_geo===\"us\"?"]);
    let catalogue = lines
        .iter()
        .find(|line| line.contains("pricing_tiers:{"))
        .expect("the catalogue");
    let arithmetic = lines
        .iter()
        .find(|line| line.contains(".inference_geo==="))
        .expect("the arithmetic");

    let at =
        |marker: &str| catalogue.find(marker).unwrap_or_else(|| panic!("no {marker}")) + marker.len() - 1;
    let tiers = literal(catalogue, at("pricing_tiers:{"));
    let models_at = catalogue[at("pricing_tiers:{")..]
        .find("models:[")
        .expect("readable")
        + at("pricing_tiers:{")
        + 7;
    let models = literal(catalogue, models_at);
    let aliases = literal(catalogue, at("aliases:{"));
    let fast = fast_prices(arithmetic);

    let mut expected = BTreeMap::new();
    for model in models.as_array().expect("readable") {
        let name = model["id"].as_str().expect("readable");
        let tier = &tiers[model["pricing"].as_str().expect("readable")];
        let long = &tier["long_prompt"];
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a number of tokens"
        )]
        let long_prompt = long.is_object().then(|| {
            let above = long["above_prompt_tokens"].as_f64().expect("readable") as u64;
            (above, tokens(long, SNAKE))
        });
        assert_eq!(tier["web_search"].as_f64(), Some(0.01), "{name}");
        expected.insert(
            name.to_owned(),
            Row {
                model: name.to_owned(),
                from: None,
                standard: tokens(tier, SNAKE),
                long_prompt,
                fast: fast.get(name).copied(),
                web_search: 10_000_000,
            },
        );
    }
    let table = Prices::default();
    let now = Timestamp::parse("2026-11-24T00:00:00Z").expect("readable");
    let ours: BTreeMap<String, Row> = table
        .in_force(now)
        .map(|row| {
            (
                row.model.clone(),
                Row {
                    from: None,
                    ..row.clone()
                },
            )
        })
        .collect();
    for (name, row) in &expected {
        assert_eq!(ours.get(name), Some(row), "{name}");
        for id in model_ids(&models, name) {
            assert!(table.knows(&id, now), "{id}, which is {name}");
        }
    }
    assert_eq!(
        ours.len(),
        expected.len(),
        "the table has models that the CLI doesn't know: {:?}",
        ours.keys()
    );
    assert!(fast.len() >= 5, "{fast:?}");

    for (alias, target) in aliases.as_object().expect("readable") {
        let models = table.aliases().of(alias);
        assert_eq!(Some(models[0].as_str()), target["default"].as_str(), "{alias}");
    }
    let (_, rest) = arithmetic
        .split_once(".inference_geo===\"us\"?")
        .expect("readable");
    let factor = rest.split(':').next().expect("readable");
    let value = after(arithmetic, &format!("{factor}="))
        .split([';', ','])
        .next()
        .expect("readable");
    let ours: Vec<(&str, u64)> = table.regions().collect();
    assert_eq!((ours, value), (vec![("us", 1_100)], "1.1"));
}

/// The names that providers give a model.
fn model_ids(models: &Value, name: &str) -> Vec<String> {
    let model = models
        .as_array()
        .expect("readable")
        .iter()
        .find(|model| model["id"] == name)
        .expect("readable");
    let ids = model["provider_ids"].as_object().expect("readable").values();
    ids.filter_map(Value::as_str).map(str::to_owned).collect()
}
