//! `.env.example` names every variable that the code reads, with the default that the code has.

use std::collections::BTreeMap;

use shared::env::Vars;
use shared::storage::DatabaseUrl;

/// The settings of the client commands. They have no default in the sense of [`Vars`], and are read inside the binary.
const CLIENT: [&str; 2] = ["CLAUDE_QUEUE_URL", "CLAUDE_QUEUE_API_KEY"];

#[test]
fn the_example_names_every_variable_with_its_default() {
    let example = parse(include_str!("../../.env.example"));

    assert_eq!(example, asked());
}

#[test]
fn the_client_reads_the_variables_that_the_example_names() {
    let source = include_str!("../src/client.rs");

    for name in CLIENT {
        assert!(source.contains(&format!("\"{name}\"")), "{name}");
    }
}

/// What the code reads: name and default, which is empty where there is none.
fn asked() -> BTreeMap<String, String> {
    let mut asked: BTreeMap<String, String> = CLIENT
        .iter()
        .map(|name| ((*name).to_owned(), String::new()))
        .collect();
    let readers: [fn(&Vars); 4] = [
        |vars| drop(api::Config::from_vars(vars).expect("usable defaults")),
        |vars| drop(worker::Config::from_vars(vars).expect("usable defaults")),
        |vars| drop(DatabaseUrl::from_vars(vars).expect("usable defaults")),
        |vars| shared::telemetry::start(vars).expect("usable defaults"),
    ];
    for read in readers {
        // Each has variables of its own, so that two defaults of one variable can't hide each other.
        let vars = Vars::of([]);
        read(&vars);
        for (name, default) in vars.asked() {
            if let Some(other) = asked.insert(name.to_owned(), default.clone()) {
                assert_eq!(other, default, "{name} has two defaults");
            }
        }
    }
    asked
}

/// The assignments of the file, commented or not; what else a comment says is for people.
fn parse(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let assignment = line.strip_prefix("# ").unwrap_or(line);
        let Some((name, value)) = assignment.split_once('=') else {
            continue;
        };
        let is_name = !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
        if is_name {
            let before = found.insert(name.to_owned(), value.to_owned());
            assert_eq!(before, None, "{name} is there twice");
        }
    }
    found
}
