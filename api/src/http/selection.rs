//! Some members of a JSON object, in their order: what is left when a client asks for a part of an answer.

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use std::fmt;

use crate::http::problem::Problem;

/// The members that were chosen.
#[derive(Debug)]
pub struct Selection(Vec<(String, Box<RawValue>)>);

impl Selection {
    /// The members of these names of what is written as an object.
    pub fn of(object: &impl Serialize, names: &[&str]) -> Result<Self, Problem> {
        let text = serde_json::to_string(object).map_err(Problem::internal)?;
        let mut selection = serde_json::from_str::<Self>(&text).map_err(Problem::internal)?;
        selection.0.retain(|(name, _)| names.contains(&name.as_str()));
        Ok(selection)
    }
}

impl Serialize for Selection {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de> Deserialize<'de> for Selection {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Selection;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Selection, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Selection(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_keep_their_order_and_their_text() {
        let object = serde_json::from_str::<Box<RawValue>>(r#"{"z":1.50,"a":{"y":1,"b":2},"c":3}"#).unwrap();
        let selection = Selection::of(&object, &["a", "z", "missing"]).unwrap();
        assert_eq!(
            serde_json::to_string(&selection).unwrap(),
            r#"{"z":1.50,"a":{"y":1,"b":2}}"#
        );
    }
}
