//! The secrets that sign the events of one endpoint or key: the newest, and those that it replaced for as long as
//! receivers may still know them only. They are stored sealed, in one column.

use super::signature::SigningSecret;
use crate::clock::Timestamp;
use crate::sealed::Sealer;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What is sealed, so that one secret can't be put in the place of another.
const PURPOSE: &str = "signing-secrets";

/// So many secrets sign at once at most: each makes the header of every event longer.
const MOST: usize = 5;

/// Secrets, the newest first.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secrets(Vec<Entry>);

#[derive(Clone, Serialize, Deserialize)]
struct Entry {
    secret: String,
    created_at: i64,
    /// Until when it signs; the newest has no end.
    valid_until: Option<i64>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secrets")
    }
}

impl Secrets {
    /// A first secret.
    pub fn first(secret: &SigningSecret, now: Timestamp) -> Self {
        Self(vec![Entry {
            secret: secret.expose(),
            created_at: now.0,
            valid_until: None,
        }])
    }

    /// Those that were sealed for this endpoint or key; `None` if they weren't, or under another `SECRET_KEY`.
    pub fn open(sealer: &Sealer, owner: &str, sealed: &str) -> Option<Self> {
        let opened = sealer.open(PURPOSE, owner, sealed)?;
        serde_json::from_slice(&opened).ok()
    }

    /// As they are stored for this endpoint or key.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn seal(&self, sealer: &Sealer, owner: &str) -> Result<String, getrandom::Error> {
        let text = serde_json::to_vec(self).unwrap_or_default();
        sealer.seal(PURPOSE, owner, &text)
    }

    /// Puts a new secret before the others; the newest so far signs for `grace` more. `false` when too many sign already.
    #[must_use]
    pub fn rotate(&mut self, secret: &SigningSecret, grace: Duration, now: Timestamp) -> bool {
        let until = now.plus(grace).0;
        for entry in &mut self.0 {
            entry.valid_until = Some(entry.valid_until.map_or(until, |own| own.min(until)));
        }
        self.0
            .retain(|entry| entry.valid_until.is_none_or(|until| until > now.0));
        if self.0.len() >= MOST {
            return false;
        }
        let Self(first) = Self::first(secret, now);
        self.0.splice(0..0, first);
        true
    }

    /// Those that sign now, the newest first.
    pub fn live(&self, now: Timestamp) -> Vec<SigningSecret> {
        self.0
            .iter()
            .filter(|entry| entry.valid_until.is_none_or(|until| until > now.0))
            .filter_map(|entry| SigningSecret::parse(&entry.secret).ok())
            .collect()
    }

    /// The beginning of the newest one, for people.
    pub fn prefix(&self) -> Option<String> {
        let newest = self.0.first()?;
        SigningSecret::parse(&newest.secret)
            .ok()
            .map(|secret| secret.prefix())
    }

    /// Until when the one before the newest signs, if it still does.
    pub fn previous_valid_until(&self, now: Timestamp) -> Option<Timestamp> {
        let until = self.0.get(1)?.valid_until.map(Timestamp)?;
        (until > now).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::SecretKey;

    const NOW: Timestamp = Timestamp(1_779_278_400_000_000);

    fn secret() -> SigningSecret {
        SigningSecret::generate().unwrap()
    }

    #[test]
    fn what_was_sealed_for_one_owner_opens_for_no_other() {
        let secret_key = SecretKey::new("a-secret-key-that-is-long-enough").unwrap();
        let sealer = secret_key.sealer();
        let first = secret();
        let sealed = Secrets::first(&first, NOW).seal(sealer, "whe_1").unwrap();

        assert!(!sealed.contains(&first.expose()));
        let opened = Secrets::open(sealer, "whe_1", &sealed).unwrap();
        assert_eq!(opened.live(NOW)[0].expose(), first.expose());
        assert!(Secrets::open(sealer, "whe_2", &sealed).is_none());
    }

    #[test]
    fn a_replaced_secret_signs_until_its_grace_is_over() {
        let (first, second) = (secret(), secret());
        let mut secrets = Secrets::first(&first, NOW);

        assert!(secrets.rotate(&second, Duration::from_secs(10), NOW));

        let at = |seconds| {
            let live = secrets.live(NOW.plus(Duration::from_secs(seconds)));
            live.iter().map(SigningSecret::expose).collect::<Vec<_>>()
        };
        assert_eq!(at(9), [second.expose(), first.expose()]);
        assert_eq!(at(10), [second.expose()]);
        assert_eq!(
            secrets.previous_valid_until(NOW),
            Some(NOW.plus(Duration::from_secs(10)))
        );
    }

    #[test]
    fn no_more_than_five_sign_at_once() {
        let mut secrets = Secrets::first(&secret(), NOW);
        let grace = Duration::from_hours(1);
        for _ in 0..4 {
            assert!(secrets.rotate(&secret(), grace, NOW));
        }

        assert!(!secrets.rotate(&secret(), grace, NOW));
        assert!(secrets.rotate(&secret(), Duration::ZERO, NOW));
        assert_eq!(secrets.live(NOW).len(), 1);
    }
}
