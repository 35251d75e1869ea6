//! Reads the members of a JSON object into values of our types and collects *every* fault on the way, so that a
//! client learns all of them at once. A member that nobody asked for is a fault too.

use serde_json::{Map, Value};
use shared::clock::Timestamp;
use shared::money::MicroUsd;
use shared::{rule, spelling};
use std::borrow::Cow;
use std::ops::RangeInclusive;

use crate::http::problem::{FieldFault, Problem};

/// What is wrong with a value that is being read; where it stands is added by the reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The way from the member down to the fault: empty, or `[" -> 3"]`.
    below: String,
    message: Cow<'static, str>,
    kind: &'static str,
}

impl Fault {
    /// A fault of this kind.
    pub fn new(kind: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            below: String::new(),
            message: message.into(),
            kind,
        }
    }

    /// The value has the right type, but its content can't be used.
    pub fn value(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new("value_error", message)
    }

    /// The fault of the value that stands at `position`.
    pub fn at(self, position: &str) -> FieldFault {
        FieldFault {
            field: format!("{position}{}", self.below),
            message: self.message,
            kind: self.kind,
        }
    }

    /// The same fault one step further down.
    fn under(mut self, step: &str) -> Self {
        self.below = format!(" -> {step}{}", self.below);
        self
    }
}

/// What a rule makes of a value: the thing itself, or all that is wrong with it.
pub type Reading<T> = Result<T, Vec<Fault>>;

fn fault<T>(kind: &'static str, message: impl Into<Cow<'static, str>>) -> Reading<T> {
    Err(vec![Fault::new(kind, message)])
}

/// The members of a JSON object that are still to be read, and the faults found so far.
#[derive(Debug)]
pub struct Fields {
    at: String,
    members: Map<String, Value>,
    faults: Vec<FieldFault>,
    /// The names that were asked for.
    known: Vec<String>,
}

impl Fields {
    /// The object that stands at `at`, or one fault when it isn't an object.
    pub fn of(at: &str, value: Value) -> Result<Self, Problem> {
        match value {
            Value::Object(members) => Ok(Self {
                at: at.to_owned(),
                members,
                faults: Vec::new(),
                known: Vec::new(),
            }),
            _ => Err(Problem::Invalid(vec![FieldFault {
                field: at.to_owned(),
                message: "Input should be a valid dictionary".into(),
                kind: "dict_type",
            }])),
        }
    }

    /// Reads a member that must be there. `None` means that it was a fault.
    pub fn required<T>(&mut self, name: &str, rule: impl Fn(Value) -> Reading<T>) -> Option<T> {
        match self.take(name) {
            Some(value) => self.read(name, value, rule),
            None => {
                self.fault(name, Fault::new("missing", "Field required"));
                None
            }
        }
    }

    /// Reads a member that may be absent or null. `None` means so, or that it was a fault.
    pub fn optional<T>(&mut self, name: &str, rule: impl Fn(Value) -> Reading<T>) -> Option<T> {
        match self.take(name)? {
            Value::Null => None,
            value => self.read(name, value, rule),
        }
    }

    /// Reads a member of a change: `None` leaves it as it is (or was a fault), `Some(None)`, written as null, takes it
    /// away.
    pub fn change<T>(&mut self, name: &str, rule: impl Fn(Value) -> Reading<T>) -> Option<Option<T>> {
        match self.take(name)? {
            Value::Null => Some(None),
            value => self.read(name, value, rule).map(Some),
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.known.push(name.to_owned());
        self.members.remove(name)
    }

    /// The names of the members that were asked for.
    pub fn known(&self) -> &[String] {
        &self.known
    }

    fn read<T>(&mut self, name: &str, value: Value, rule: impl Fn(Value) -> Reading<T>) -> Option<T> {
        match rule(value) {
            Ok(value) => Some(value),
            Err(faults) => {
                for fault in faults {
                    self.fault(name, fault);
                }
                None
            }
        }
    }

    /// Notes a fault of the member `name`: for rules over more than one member.
    pub fn fault(&mut self, name: &str, fault: Fault) {
        self.faults.push(fault.at(&format!("{} -> {name}", self.at)));
    }

    /// Ends the reading: the `required` parts, when nothing was wrong and no member is left over.
    pub fn finish<T>(mut self, required: Option<T>) -> Result<T, Problem> {
        for name in std::mem::take(&mut self.members)
            .into_iter()
            .map(|(name, _)| name)
        {
            // The name is the client's own text, and may be long.
            let name = name.chars().take(100).collect::<String>();
            let fault = unknown(&name, self.known.iter().map(String::as_str));
            self.fault(&name, fault);
        }
        match required {
            Some(value) if self.faults.is_empty() => Ok(value),
            _ => Err(Problem::Invalid(self.faults)),
        }
    }
}

/// The fault of a name that isn't known, with the known one that it is near.
pub fn unknown<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Fault {
    const WHY: &str = "Extra inputs are not permitted";
    match spelling::nearest(name, known) {
        Some(near) => Fault::new("extra_forbidden", format!("{WHY}; did you mean `{near}`?")),
        None => Fault::new("extra_forbidden", WHY),
    }
}

/// A text of this many characters (Unicode scalar values).
pub fn text(length: RangeInclusive<usize>) -> impl Fn(Value) -> Reading<String> {
    move |value| {
        let Value::String(text) = value else {
            return fault("string_type", "Input should be a valid string");
        };
        // Counting is only needed where the number of bytes doesn't already say it.
        let count = if text.len() < *length.start() {
            text.len()
        } else {
            text.chars().count()
        };
        if count < *length.start() {
            return fault(
                "string_too_short",
                at_least(*length.start(), "character", "String should have"),
            );
        }
        if count > *length.end() {
            return fault(
                "string_too_long",
                at_most(*length.end(), "character", "String should have"),
            );
        }
        if text.contains('\0') {
            // PostgreSQL can't store it, and no program takes it as an argument.
            return fault("value_error", "String should not contain the null character");
        }
        Ok(text)
    }
}

/// A text of this length that `parse` makes something of; what it returns as an error is the message.
pub fn parsed<T, E: Into<Cow<'static, str>>>(
    length: RangeInclusive<usize>,
    parse: impl Fn(String) -> Result<T, E>,
) -> impl Fn(Value) -> Reading<T> {
    let text = text(length);
    move |value| parse(text(value)?).map_err(|message| vec![Fault::value(message)])
}

/// One of these words.
pub fn choice(words: &'static [&'static str]) -> impl Fn(Value) -> Reading<&'static str> {
    move |value| {
        let Value::String(text) = value else {
            return fault("string_type", "Input should be a valid string");
        };
        match words.iter().find(|word| **word == text) {
            Some(word) => Ok(word),
            None => fault("enum", format!("Input should be {}", one_of(words))),
        }
    }
}

/// `true` or `false`.
#[expect(clippy::needless_pass_by_value, reason = "every rule takes the value")]
pub fn boolean(value: Value) -> Reading<bool> {
    match value {
        Value::Bool(value) => Ok(value),
        _ => fault("bool_type", "Input should be a valid boolean"),
    }
}

/// A whole number in this range. `3.0` is one too.
pub fn integer(range: RangeInclusive<i64>) -> impl Fn(Value) -> Reading<i64> {
    move |value| {
        let Value::Number(number) = &value else {
            return fault("int_type", "Input should be a valid integer");
        };
        #[expect(
            clippy::cast_possible_truncation,
            reason = "whole and below 2^53 by the same line"
        )]
        let whole = number.as_i64().or_else(|| {
            number
                .as_f64()
                .filter(|float| float.fract() == 0.0 && float.abs() < 9e15)
                .map(|float| float as i64)
        });
        match whole {
            Some(whole) if whole < *range.start() => fault("greater_than_equal", not_below(range.start())),
            Some(whole) if whole > *range.end() => fault("less_than_equal", not_above(range.end())),
            Some(whole) => Ok(whole),
            // Beyond 64 bits in either direction.
            None if number.as_f64().is_some_and(|float| float.fract() == 0.0) => {
                if number.as_f64() > Some(0.0) {
                    fault("less_than_equal", not_above(range.end()))
                } else {
                    fault("greater_than_equal", not_below(range.start()))
                }
            }
            None => fault("int_type", "Input should be a valid integer"),
        }
    }
}

/// An amount of US dollars of at least one millionth and at most `limit`.
pub fn dollars(limit: MicroUsd) -> impl Fn(Value) -> Reading<MicroUsd> {
    move |value| {
        let Value::Number(number) = value else {
            return fault("float_type", "Input should be a valid number");
        };
        match number.as_f64().and_then(MicroUsd::from_usd) {
            Some(amount) if amount <= MicroUsd::ZERO => fault("greater_than_equal", not_below(&0.000_001)),
            Some(amount) if amount > limit => fault("less_than_equal", not_above(&limit.usd())),
            Some(amount) if number.as_f64().and_then(MicroUsd::exact) == Some(amount) => Ok(amount),
            Some(_) => fault("value_error", "Input should have at most six decimals"),
            None => fault("less_than_equal", not_above(&limit.usd())),
        }
    }
}

/// A time in RFC 3339.
pub fn time(value: Value) -> Reading<Timestamp> {
    let Value::String(text) = value else {
        return fault("string_type", "Input should be a valid string");
    };
    match Timestamp::parse(&text) {
        Some(time) => Ok(time),
        None => fault(
            "datetime_parsing",
            "Input should be a valid datetime with an offset (RFC 3339)",
        ),
    }
}

/// A list of at most `limit` members that are read by `rule`.
pub fn list<T>(limit: usize, rule: impl Fn(Value) -> Reading<T>) -> impl Fn(Value) -> Reading<Vec<T>> {
    move |value| {
        let Value::Array(items) = value else {
            return fault("list_type", "Input should be a valid list");
        };
        if items.len() > limit {
            return fault("too_long", at_most(limit, "item", "List should have"));
        }
        let (mut read, mut faults) = (Vec::with_capacity(items.len()), Vec::new());
        for (index, item) in items.into_iter().enumerate() {
            match rule(item) {
                Ok(item) => read.push(item),
                Err(found) => faults.extend(found.into_iter().map(|fault| fault.under(&index.to_string()))),
            }
        }
        if faults.is_empty() { Ok(read) } else { Err(faults) }
    }
}

/// Rules for tools: a text with commas between them of at most 4,000 characters, or a list of at most 100 rules of 1
/// to 512. They become arguments of the CLI, unchanged.
pub fn rules(value: Value) -> Reading<Vec<String>> {
    let one = |rule: String| rule::check(&rule).map(|()| rule);
    if let Value::String(_) = value {
        let rules = rule::split(&text(0..=4_000)(value)?).into_iter().map(one);
        return rules
            .collect::<Result<_, _>>()
            .map_err(|message| vec![Fault::value(message)]);
    }
    list(100, parsed(1..=512, one))(value)
}

/// At most 16 pairs of texts; names of 1 to 64 characters, values of at most 512.
pub fn metadata(value: Value) -> Reading<Map<String, Value>> {
    let Value::Object(pairs) = value else {
        return fault("dict_type", "Input should be a valid dictionary");
    };
    if pairs.len() > 16 {
        return fault("too_long", at_most(16, "item", "Dictionary should have"));
    }
    let mut faults = Vec::new();
    for (name, value) in &pairs {
        let shown = name.chars().take(64).collect::<String>();
        let found = [
            text(1..=64)(Value::String(name.clone())),
            text(0..=512)(value.clone()),
        ];
        faults.extend(
            found
                .into_iter()
                .filter_map(Result::err)
                .flatten()
                .map(|fault| fault.under(&shown)),
        );
    }
    if faults.is_empty() { Ok(pairs) } else { Err(faults) }
}

/// An object whose members `read` reads; `None` from it means that one was a fault.
pub fn members<T>(read: impl Fn(&mut Fields) -> Option<T>) -> impl Fn(Value) -> Reading<T> {
    move |value| {
        if !value.is_object() {
            return fault("dict_type", "Input should be a valid dictionary");
        }
        let faults = |problem| match problem {
            Problem::Invalid(faults) => faults
                .into_iter()
                .map(|fault| Fault {
                    below: fault.field,
                    message: fault.message,
                    kind: fault.kind,
                })
                .collect::<Vec<_>>(),
            _ => vec![Fault::value("Input should be valid")],
        };
        let mut fields = Fields::of("", value).map_err(faults)?;
        let made = read(&mut fields);
        fields.finish(made).map_err(faults)
    }
}

/// A JSON object whose text has at most `limit` bytes.
pub fn object(limit: usize) -> impl Fn(Value) -> Reading<Value> {
    move |value| {
        if !value.is_object() {
            return fault("dict_type", "Input should be a valid dictionary");
        }
        if value.to_string().len() > limit {
            return fault(
                "too_long",
                format!("Dictionary should have at most {limit} bytes as JSON"),
            );
        }
        Ok(value)
    }
}

fn at_least(count: usize, unit: &str, subject: &str) -> String {
    format!(
        "{subject} at least {count} {unit}{}",
        if count == 1 { "" } else { "s" }
    )
}

fn at_most(count: usize, unit: &str, subject: &str) -> String {
    format!(
        "{subject} at most {count} {unit}{}",
        if count == 1 { "" } else { "s" }
    )
}

fn not_below(low: &impl ToString) -> String {
    format!("Input should be greater than or equal to {}", low.to_string())
}

fn not_above(high: &impl ToString) -> String {
    format!("Input should be less than or equal to {}", high.to_string())
}

/// `'a', 'b' or 'c'`.
fn one_of(words: &[&str]) -> String {
    let quoted = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn faults<T: std::fmt::Debug>(result: Result<T, Problem>) -> Vec<(String, &'static str)> {
        match result {
            Err(Problem::Invalid(faults)) => faults
                .into_iter()
                .map(|fault| (fault.field, fault.kind))
                .collect(),
            other => panic!("not faults: {other:?}"),
        }
    }

    #[test]
    fn the_faults_of_a_member_of_a_member_say_the_way_to_it() {
        let rule = members(|fields| fields.required("limit", integer(1..=10)));
        let mut body = Fields::of("body", json!({"rate": {"limit": 11, "x": 1}})).unwrap();
        let rate = body.optional("rate", rule);
        assert_eq!(
            faults(body.finish(rate)),
            [
                ("body -> rate -> limit".to_owned(), "less_than_equal"),
                ("body -> rate -> x".to_owned(), "extra_forbidden"),
            ]
        );
    }

    #[test]
    fn in_a_change_absent_and_null_differ() {
        let mut body = Fields::of("body", json!({"a": null, "b": 1})).unwrap();
        assert_eq!(body.change("a", integer(0..=9)), Some(None));
        assert_eq!(body.change("b", integer(0..=9)), Some(Some(1)));
        assert_eq!(body.change("c", integer(0..=9)), None);
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let value = json!({"message": "", "priority": "high", "max_turns": 1.5, "colour": "red", "metadata": {"a": 1}});
        let mut body = Fields::of("body", value).unwrap();
        let message = body.required("message", text(1..=10));
        body.required("session", text(1..=10));
        body.optional("priority", integer(-10..=10));
        body.optional("max_turns", integer(1..=100));
        body.optional("metadata", metadata);
        body.optional("model", text(1..=10));

        let expected = [
            ("body -> message", "string_too_short"),
            ("body -> session", "missing"),
            ("body -> priority", "int_type"),
            ("body -> max_turns", "int_type"),
            ("body -> metadata -> a", "string_type"),
            ("body -> colour", "extra_forbidden"),
        ];
        assert_eq!(
            faults(body.finish(message)),
            expected.map(|(field, kind)| (field.to_owned(), kind))
        );
    }

    #[test]
    fn null_is_absent_where_a_member_may_be_absent_and_a_fault_where_it_must_not() {
        let mut body = Fields::of("body", json!({"a": null, "b": null})).unwrap();
        assert_eq!(body.optional("a", text(1..=10)), None);
        let b = body.required("b", text(1..=10));
        assert_eq!(faults(body.finish(b)), [("body -> b".to_owned(), "string_type")]);
    }

    #[test]
    fn a_body_that_is_no_object_is_one_fault() {
        for value in [json!([]), json!("x"), json!(1), json!(null)] {
            assert_eq!(
                faults(Fields::of("body", value)),
                [("body".to_owned(), "dict_type")]
            );
        }
    }

    #[test]
    fn texts_are_counted_in_characters_and_hold_no_null() {
        assert!(text(1..=3)(json!("äöü")).is_ok());
        assert_eq!(text(1..=3)(json!("äöüß")).unwrap_err()[0].kind, "string_too_long");
        assert_eq!(text(1..=3)(json!("a\0b")).unwrap_err()[0].kind, "value_error");
        assert_eq!(
            text(1..=3)(json!("")).unwrap_err()[0].message,
            "String should have at least 1 character"
        );
    }

    #[test]
    fn whole_numbers_are_bounded_however_they_are_written() {
        let read = integer(1..=100);
        for (value, outcome) in [
            (json!(1), Ok(1)),
            (json!(100.0), Ok(100)),
            (json!(0), Err("greater_than_equal")),
            (json!(101), Err("less_than_equal")),
            (json!(1e300), Err("less_than_equal")),
            (json!(-1e300), Err("greater_than_equal")),
            (json!(u64::MAX), Err("less_than_equal")),
            (json!(2.5), Err("int_type")),
            (json!("2"), Err("int_type")),
            (json!(true), Err("int_type")),
        ] {
            assert_eq!(
                read(value.clone()).map_err(|faults| faults[0].kind),
                outcome,
                "{value}"
            );
        }
    }

    #[test]
    fn money_is_more_than_nothing_and_at_most_the_limit() {
        let read = dollars(MicroUsd(5_000_000));
        assert_eq!(read(json!(5)), Ok(MicroUsd(5_000_000)));
        assert_eq!(read(json!(0)).unwrap_err()[0].kind, "greater_than_equal");
        assert_eq!(read(json!(-1)).unwrap_err()[0].kind, "greater_than_equal");
        assert_eq!(read(json!(5.000_001)).unwrap_err()[0].kind, "less_than_equal");
        assert_eq!(read(json!(0.123_456)), Ok(MicroUsd(123_456)));
        assert_eq!(read(json!(0.123_456_7)).unwrap_err()[0].kind, "value_error");
        assert_eq!(read(json!(1e300)).unwrap_err()[0].kind, "less_than_equal");
    }

    #[test]
    fn rules_come_as_text_with_commas_or_as_a_list_and_stay_as_they_are() {
        let both = vec!["Bash(touch one, two)".to_owned(), "WebSearch".to_owned()];
        assert_eq!(rules(json!("Bash(touch one, two), WebSearch,")), Ok(both.clone()));
        assert_eq!(rules(json!(["Bash(touch one, two)", "WebSearch"])), Ok(both));
        assert_eq!(rules(json!(["Bash", 3])).unwrap_err()[0].below, " -> 1");
        assert_eq!(rules(json!(["Bash", "Bash(x"])).unwrap_err()[0].below, " -> 1");
        assert_eq!(rules(json!({})).unwrap_err()[0].kind, "list_type");
    }

    #[test]
    fn a_misspelt_member_learns_the_right_one() {
        let mut body = Fields::of("body", json!({"mesage": "hi"})).unwrap();
        body.optional("message", text(1..=10));
        let Err(Problem::Invalid(faults)) = body.finish(Some(())) else {
            panic!("no fault")
        };
        assert_eq!(
            faults[0].message,
            "Extra inputs are not permitted; did you mean `message`?"
        );
    }

    #[test]
    fn choices_are_spelled_out() {
        let faults = choice(&["low", "medium", "high"])(json!("huge")).unwrap_err();
        assert_eq!(faults[0].message, "Input should be 'low', 'medium' or 'high'");
    }

    #[test]
    fn metadata_has_at_most_sixteen_pairs() {
        let many = (0..17)
            .map(|number| (number.to_string(), json!("x")))
            .collect::<Map<_, _>>();
        assert_eq!(metadata(Value::Object(many)).unwrap_err()[0].kind, "too_long");
        assert_eq!(
            metadata(json!({"": "x"})).unwrap_err()[0].kind,
            "string_too_short"
        );
    }
}
