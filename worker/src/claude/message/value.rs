//! A JSON value of bounded depth. What is nested deeper is left out instead of refused, so that the rest of a line can
//! be read, and so that whatever is stored of it can be read by every parser later.

use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::Cell;
use std::fmt;

/// Levels of a line that are read. Parsers commonly refuse more than 128, and a result is stored and sent inside other
/// objects.
pub(super) const MAX_DEPTH: usize = 120;

/// A line that was read.
#[derive(Debug, PartialEq)]
pub(super) struct Read {
    pub(super) value: Value,
    /// Whether something nested deeper than [`MAX_DEPTH`] was left out.
    pub(super) cut: bool,
}

/// Parses a text that holds one value.
pub(super) fn read(json: &[u8]) -> serde_json::Result<Read> {
    let cut = Cell::new(false);
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = Bounded {
        left: MAX_DEPTH,
        cut: &cut,
    }
    .deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(Read {
        value,
        cut: cut.get(),
    })
}

#[derive(Clone, Copy)]
struct Bounded<'a> {
    /// Levels that may still be entered.
    left: usize,
    cut: &'a Cell<bool>,
}

impl Bounded<'_> {
    /// For what is in a list or an object; none where that is too deep.
    fn inner(self) -> Option<Self> {
        let left = self.left.checked_sub(1);
        if left.is_none() {
            self.cut.set(true);
        }
        left.map(|left| Self { left, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let Some(inner) = self.inner() else {
            // Skipping needs no recursion, however deep it is.
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        };
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(inner)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let Some(inner) = self.inner() else {
            while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        };
        let mut members = Map::new();
        while let Some(name) = object.next_key::<String>()? {
            members.insert(name, object.next_value_seed(inner)?);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn nested(levels: usize) -> String {
        format!("{}1{}", "[".repeat(levels), "]".repeat(levels))
    }

    #[test]
    fn a_value_is_the_same_as_any_other_parsers() {
        let text = r#"{"a":[1,-2,3.5,1e300,18446744073709551615,true,false,null,"x\u0041é"],"b":{},"c":[],"a2":"","b":2}"#;

        let read = read(text.as_bytes()).unwrap();

        assert_eq!(read.value, serde_json::from_str::<Value>(text).unwrap());
        assert!(!read.cut);
    }

    #[test]
    fn what_is_too_deep_is_left_out_and_the_rest_is_read() {
        for (levels, cut) in [
            (MAX_DEPTH - 1, false),
            (MAX_DEPTH, true),
            (200, true),
            (100_000, true),
        ] {
            let read = read(format!(r#"{{"deep":{},"after":7}}"#, nested(levels)).as_bytes()).unwrap();
            assert_eq!((read.cut, &read.value["after"]), (cut, &json!(7)), "{levels}");
        }
    }

    #[test]
    fn whatever_was_read_can_be_read_again_inside_other_objects() {
        let read = read(nested(500).as_bytes()).unwrap();

        let stored = json!({ "data": { "result": { "structured_output": read.value } } }).to_string();

        serde_json::from_str::<Value>(&stored).unwrap();
    }

    #[test]
    fn broken_and_trailing_text_is_an_error() {
        for text in ["", "{", "[1,]", "{\"a\":NaN}", "1 2", "{\"a\":1}x"] {
            assert!(read(text.as_bytes()).is_err(), "{text}");
        }
    }
}
