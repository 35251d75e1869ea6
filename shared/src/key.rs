//! API keys that are kept in the database: what a secret looks like, how it is checked without being stored, and what
//! a key may do.

mod scope;
mod secret;
mod secret_key;

pub use scope::{Scope, Scopes};
pub use secret::{KeyKind, Kid, Secret};
pub use secret_key::{Digest, SecretKey, hex};

use crate::clock::Timestamp;
use crate::id::KeyId;
use serde::{Deserialize, Serialize};

/// Whether a key is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyStatus {
    /// It is valid.
    Active,
    /// It was revoked.
    Revoked,
    /// It has expired.
    Expired,
}

impl KeyStatus {
    /// The word in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
        }
    }
}

/// Checks a key's name: 1 to 128 visible characters, with spaces between them. The error is a sentence for people.
pub fn name(text: &str) -> Result<(), &'static str> {
    if text.chars().count() > 128 {
        return Err("A name should have at most 128 characters");
    }
    if text.trim().is_empty() || text.chars().any(char::is_control) {
        return Err("A name should have visible characters, and no others than those and blanks");
    }
    Ok(())
}

/// What a key may do, and its limits. `None` means the default of the service.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct KeyRights {
    /// Its permissions.
    #[sqlx(try_from = "String")]
    pub scopes: Scopes,
    /// The networks (CIDR) from which it may be used; empty means any.
    #[sqlx(try_from = "String")]
    pub allowed_ips: TextList,
    /// The models that its jobs may use; empty means any. A job without a model gets the first.
    #[sqlx(try_from = "String")]
    pub allowed_models: TextList,
    /// Submissions per window, 1 to 1,000,000.
    pub rate_submit: Option<i64>,
    /// Other requests per window, 1 to 1,000,000.
    pub rate_read: Option<i64>,
    /// The window, in seconds, 1 to 86,400.
    pub rate_window: Option<i64>,
    /// Jobs that run at once, 1 to 1,000; more jobs wait.
    pub max_running_jobs: Option<i64>,
    /// Waiting jobs, 1 to 100,000; more are rejected.
    pub max_queued_jobs: Option<i64>,
    /// Open event streams, 1 to 1,000; more are rejected.
    pub max_streams: Option<i64>,
    /// The maximum priority of its jobs, -10 to 10.
    pub max_priority: Option<i64>,
}

impl KeyRights {
    /// These scopes, and the defaults of the service for everything else.
    pub fn of(scopes: Scopes) -> Self {
        Self {
            scopes,
            allowed_ips: TextList::default(),
            allowed_models: TextList::default(),
            rate_submit: None,
            rate_read: None,
            rate_window: None,
            max_running_jobs: None,
            max_queued_jobs: None,
            max_streams: None,
            max_priority: None,
        }
    }
}

/// A key as it is stored, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct ApiKey {
    /// Numbers keys in order of creation; lists are sorted by it.
    pub key_number: i64,
    /// `key_` and the public part of its secrets.
    pub key_id: KeyId,
    /// For people; 1 to 128 characters, not unique.
    pub name: String,
    /// The digest of its secret.
    pub secret_digest: Digest,
    /// The last four characters of its secret.
    pub last4: String,
    /// The digest of the old secret, from before the last rotation.
    pub previous_digest: Option<Digest>,
    /// Until when the old secret is valid.
    pub previous_valid_until: Option<Timestamp>,
    /// What it may do.
    #[sqlx(flatten)]
    pub rights: KeyRights,
    /// The owner's metadata: pairs of strings, as JSON.
    pub metadata: String,
    /// When it was created.
    pub created_at: Timestamp,
    /// The id of the key that created it, or `cli`.
    pub created_by: String,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
    /// Why it was revoked.
    pub revoke_reason: Option<String>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<Timestamp>,
    /// Incremented by each change.
    pub version: i64,
}

impl ApiKey {
    /// Its status at this time.
    pub fn status(&self, now: Timestamp) -> KeyStatus {
        if self.revoked_at.is_some() {
            KeyStatus::Revoked
        } else if self.expires_at.is_some_and(|at| at <= now) {
            KeyStatus::Expired
        } else {
            KeyStatus::Active
        }
    }

    /// Whether this is the digest of a valid secret of this key: the current one, or the old one in its grace period.
    pub fn is_opened_by(&self, digest: &Digest, now: Timestamp) -> bool {
        let overlap = self.previous_valid_until.is_some_and(|until| now < until);
        let previous = self.previous_digest.as_ref().filter(|_| overlap);
        // Both are always compared, in constant time.
        let present = self.secret_digest == *digest;
        let before = previous.is_some_and(|previous| previous == digest);
        present || before
    }

    /// Whether it is an admin key, which sees the objects of all keys.
    pub fn is_admin(&self) -> bool {
        self.rights.scopes.contains(Scope::KeysAdmin)
    }

    /// The start and the end of its secret, by which people recognise it.
    pub fn shown(&self) -> String {
        let kid = self.key_id.as_str().trim_start_matches("key_");
        let kind = KeyKind::of(self.is_admin());
        format!("{}_{kid}…{}", kind.prefix(), self.last4)
    }
}

/// A key to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewApiKey {
    /// Its id.
    pub key_id: KeyId,
    /// For people.
    pub name: String,
    /// The digest of its secret.
    pub secret_digest: Digest,
    /// The last four characters of its secret.
    pub last4: String,
    /// What it may do.
    pub rights: KeyRights,
    /// The owner's metadata: pairs of strings, as JSON.
    pub metadata: String,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
    /// When it is created.
    pub created_at: Timestamp,
    /// The id of the key that created it, or `cli`.
    pub created_by: String,
}

/// Strings in one column, as a JSON list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TextList(pub Vec<String>);

impl TextList {
    /// The stored form.
    pub fn to_column(&self) -> String {
        serde_json::json!(self.0).to_string()
    }
}

impl TryFrom<String> for TextList {
    type Error = serde_json::Error;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        serde_json::from_str(&text).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const NOW: Timestamp = Timestamp(1_800_000_000_000_000);

    fn key(present: &Digest, previous: Option<Digest>) -> ApiKey {
        ApiKey {
            key_number: 1,
            key_id: KeyId::known("key_Ab12Cd34"),
            name: "n".to_owned(),
            secret_digest: present.clone(),
            last4: "x9Qz".to_owned(),
            previous_digest: previous,
            previous_valid_until: Some(NOW.plus(Duration::from_mins(1))),
            rights: KeyRights::of(Scopes::ordinary()),
            metadata: "{}".to_owned(),
            created_at: NOW,
            created_by: "cli".to_owned(),
            expires_at: None,
            revoked_at: None,
            revoke_reason: None,
            last_used_at: None,
            version: 1,
        }
    }

    #[test]
    fn the_secret_before_opens_until_its_time_is_over() {
        let secret_key = SecretKey::new("0123456789abcdef").unwrap();
        let [old, new] = ["old", "new"].map(|secret| secret_key.digest(secret.as_bytes()));
        let key = key(&new, Some(old.clone()));

        assert!(key.is_opened_by(&new, NOW) && key.is_opened_by(&old, NOW));
        let later = NOW.plus(Duration::from_mins(1));
        assert!(key.is_opened_by(&new, later) && !key.is_opened_by(&old, later));
        assert!(!key.is_opened_by(&secret_key.digest(b"other"), NOW));
    }

    #[test]
    fn a_key_ends_when_it_is_revoked_or_expires() {
        let digest = SecretKey::new("0123456789abcdef").unwrap().digest(b"x");
        let mut key = key(&digest, None);
        assert_eq!(key.status(NOW), KeyStatus::Active);
        key.expires_at = Some(NOW);
        assert_eq!(key.status(NOW), KeyStatus::Expired);
        key.revoked_at = Some(NOW);
        assert_eq!(key.status(NOW), KeyStatus::Revoked);
    }

    #[test]
    fn a_key_is_shown_by_its_ends() {
        let digest = SecretKey::new("0123456789abcdef").unwrap().digest(b"x");
        let mut key = key(&digest, None);
        assert_eq!(key.shown(), "cjk_Ab12Cd34…x9Qz");
        key.rights.scopes = Scopes::all();
        assert_eq!(key.shown(), "cja_Ab12Cd34…x9Qz");
    }
}
