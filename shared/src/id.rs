//! Identifiers. Each is a type prefix and a UUID v7 in 32 hex digits, so that ids sort by creation.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::{Database, Decode, Encode, Type};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// The text isn't an identifier of the expected kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an identifier of this kind")]
pub struct NotAnId;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A new identifier, which sorts after all earlier ones.
            #[expect(clippy::new_without_default, reason = "every call gives another value")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "_{}"), self.0.simple())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;
            fn from_str(text: &str) -> Result<Self, NotAnId> {
                let hex = text.strip_prefix(concat!($prefix, "_")).ok_or(NotAnId)?;
                let canonical = hex.len() == 32 && !hex.bytes().any(|byte| byte.is_ascii_uppercase());
                if canonical { Uuid::try_parse(hex).map(Self).map_err(|_| NotAnId) } else { Err(NotAnId) }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }

        impl<DB: Database> Type<DB> for $name
        where
            String: Type<DB>,
        {
            fn type_info() -> DB::TypeInfo {
                <String as Type<DB>>::type_info()
            }
            fn compatible(info: &DB::TypeInfo) -> bool {
                <String as Type<DB>>::compatible(info)
            }
        }

        impl<'q, DB: Database> Encode<'q, DB> for $name
        where
            String: Encode<'q, DB>,
        {
            fn encode_by_ref(&self, buffer: &mut DB::ArgumentBuffer) -> Result<IsNull, BoxDynError> {
                Encode::<DB>::encode(self.to_string(), buffer)
            }
        }

        impl<'r, DB: Database> Decode<'r, DB> for $name
        where
            String: Decode<'r, DB>,
        {
            fn decode(value: DB::ValueRef<'r>) -> Result<Self, BoxDynError> {
                Ok(<String as Decode<DB>>::decode(value)?.parse()?)
            }
        }
    };
}

id! {
    /// A job: `job_…`.
    JobId, "job"
}
id! {
    /// A session in storage and in the file system: `ses_…`. Clients address it by its name.
    SessionId, "ses"
}
id! {
    /// A worker process, from its start to its end: `wrk_…`.
    WorkerId, "wrk"
}

id! {
    /// An address that gets events: `whe_…`.
    EndpointId, "whe"
}
id! {
    /// An event on its way to one address: `dlv_…`.
    DeliveryId, "dlv"
}

/// The public id of an API key: `key_…` for a key in the database, `env_…` for one from the environment, or
/// `anonymous`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type)]
#[serde(transparent)]
#[sqlx(transparent)]
pub struct KeyId(String);

impl KeyId {
    /// The owner of everything if no key is configured.
    pub fn anonymous() -> Self {
        Self("anonymous".to_owned())
    }

    /// The id of a known key. The caller has checked that it is one.
    pub fn known(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl DeliveryId {
    /// The id of the message, by which receivers know a repeated one: the same in every attempt.
    pub fn message_id(self) -> String {
        format!("msg_{}", self.0.simple())
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_back_and_sort_by_creation() {
        let (first, second) = (JobId::new(), JobId::new());
        assert!(first < second);
        assert_eq!(first.to_string().parse(), Ok(first));
        assert_eq!(first.to_string().len(), 36);
    }

    #[test]
    fn only_the_canonical_form_is_an_id() {
        let id = JobId::new().to_string();
        for text in [
            "",
            "job_",
            "job_12",
            &id.to_uppercase(),
            &id.replace("job_", "ses_"),
            &format!("{id} "),
        ] {
            assert_eq!(text.parse::<JobId>(), Err(NotAnId), "{text:?}");
        }
    }
}
