//! What the messages of a request hold that may have far more tokens than bytes: images, and documents, which the API
//! fetches or unpacks itself.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};

/// How deep they may lie: message, content, block, and once more within a tool's result. Deeper ones are none: the API
/// takes them for the text of a tool's input. So the depth of a request is bounded by the API alone.
const DEPTH: u8 = 9;

/// How many there are. What only looks like one counts, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Media {
    pub(super) images: u64,
    pub(super) documents: u64,
}

impl<'de> Deserialize<'de> for Media {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Look(DEPTH).deserialize(deserializer)?.media)
    }
}

/// What was found in a value.
#[derive(Default)]
struct Found {
    media: Media,
    /// The value itself, if it is the type of such a block.
    kind: Option<Kind>,
}

#[derive(Clone, Copy)]
enum Kind {
    Image,
    Document,
}

impl Found {
    fn add(&mut self, other: &Self) {
        self.media.images += other.media.images;
        self.media.documents += other.media.documents;
    }
}

/// Looks into a value, so deep.
#[derive(Clone, Copy)]
struct Look(u8);

impl<'de> DeserializeSeed<'de> for Look {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        if self.0 == 0 {
            return IgnoredAny::deserialize(deserializer).map(|_| Found::default());
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Look {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Found, E> {
        Ok(Found::default())
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Found, E> {
        Ok(Found::default())
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Found, E> {
        Ok(Found::default())
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Found, E> {
        Ok(Found::default())
    }

    fn visit_unit<E: de::Error>(self) -> Result<Found, E> {
        Ok(Found::default())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Found, E> {
        let kind = match text {
            "image" => Some(Kind::Image),
            "document" => Some(Kind::Document),
            _ => None,
        };
        Ok(Found {
            kind,
            ..Found::default()
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Found, A::Error> {
        let mut found = Found::default();
        while let Some(item) = items.next_element_seed(Self(self.0 - 1))? {
            found.add(&item);
        }
        Ok(found)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Found, A::Error> {
        let mut found = Found::default();
        while let Some(name) = members.next_key::<Name>()? {
            let member = members.next_value_seed(Self(self.0 - 1))?;
            found.add(&member);
            match member.kind.filter(|_| name.is_type) {
                Some(Kind::Image) => found.media.images += 1,
                Some(Kind::Document) => found.media.documents += 1,
                None => {}
            }
        }
        Ok(found)
    }
}

/// The name of a member.
struct Name {
    is_type: bool,
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl Visitor<'_> for Read {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Name, E> {
                Ok(Name {
                    is_type: name == "type",
                })
            }
        }
        deserializer.deserialize_str(Read)
    }
}
