//! The recorded transcripts, for tests.

use super::Message;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/claude/fixtures");

/// A run of the real CLI.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) stdout: Vec<u8>,
    pub(crate) exit: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stderr: String,
    /// Whether structured output was asked for.
    pub(crate) schema: bool,
    /// Whether it continued a session.
    pub(crate) resumes: bool,
}

impl Fixture {
    pub(crate) fn messages(&self) -> Vec<Message> {
        self.stdout
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(Message::parse)
            .collect()
    }

    /// What is JSON of it, as it is.
    pub(crate) fn lines(&self) -> impl Iterator<Item = Value> {
        self.stdout
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
    }
}

/// All of them, by name.
pub(crate) fn all() -> BTreeMap<String, Fixture> {
    let index = fs::read(format!("{FOLDER}/index.json")).unwrap();
    let index: BTreeMap<String, Value> = serde_json::from_slice(&index).unwrap();
    let number = |number: &Value| number.as_i64().map(|number| i32::try_from(number).unwrap());
    let fixtures = index.into_iter().map(|(name, entry)| {
        let fixture = Fixture {
            stdout: fs::read(format!("{FOLDER}/{name}.ndjson")).unwrap(),
            exit: number(&entry["exit"]),
            signal: number(&entry["signal"]),
            stderr: entry["stderr"].as_str().unwrap().to_owned(),
            schema: entry["schema"] == true,
            resumes: entry["resumes"] == true,
        };
        (name, fixture)
    });
    fixtures.collect()
}

/// One of them.
pub(crate) fn named(name: &str) -> Fixture {
    all()
        .remove(name)
        .unwrap_or_else(|| panic!("there is no transcript {name}"))
}
