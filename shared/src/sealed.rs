//! Secrets that the service must be able to read again, such as those that sign webhooks: encrypted before they reach
//! the database.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use std::fmt;

/// The form of a sealed text, so that a later form can be told apart: base64 of the nonce and the ciphertext.
const FORM: &str = "s1.";
/// The length of a nonce. It is long enough to be random.
const NONCE: usize = 24;

/// Encrypts values for a column, and decrypts them. Its key is derived from `SECRET_KEY`
/// ([`sealer`](crate::key::SecretKey::sealer)).
#[derive(Clone)]
pub struct Sealer(XChaCha20Poly1305);

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer")
    }
}

impl Sealer {
    /// With this key.
    pub(crate) fn new(key: [u8; 32]) -> Self {
        Self(XChaCha20Poly1305::new(&key.into()))
    }

    /// Encrypts a value. Only the same `purpose` and `owner` (the id of the row) open it again, so that a sealed text
    /// is useless in another row or column. Fails when the system has no random numbers.
    pub fn seal(&self, purpose: &str, owner: &str, plain: &[u8]) -> Result<String, getrandom::Error> {
        let mut nonce = [0; NONCE];
        getrandom::fill(&mut nonce)?;
        let payload = Payload {
            msg: plain,
            aad: &context(purpose, owner),
        };
        let sealed = self.0.encrypt(&XNonce::from(nonce), payload);
        let sealed = sealed.expect("a secret is shorter than 256 GiB");
        Ok(format!(
            "{FORM}{}",
            STANDARD_NO_PAD.encode([nonce.as_slice(), &sealed].concat())
        ))
    }

    /// Decrypts what [`seal`](Self::seal) returned. `None` if the text was changed, or was sealed for another purpose or
    /// owner or with another key.
    pub fn open(&self, purpose: &str, owner: &str, text: &str) -> Option<Vec<u8>> {
        let bytes = STANDARD_NO_PAD.decode(text.strip_prefix(FORM)?).ok()?;
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE>()?;
        let payload = Payload {
            msg: sealed,
            aad: &context(purpose, owner),
        };
        self.0.decrypt(&XNonce::from(*nonce), payload).ok()
    }
}

/// Purpose and owner as one value. The length tells where one ends and the other starts.
fn context(purpose: &str, owner: &str) -> Vec<u8> {
    format!("{}:{purpose}{owner}", purpose.len()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::SecretKey;

    fn sealer(secret_key: &str) -> Sealer {
        SecretKey::new(secret_key).unwrap().sealer().clone()
    }

    #[test]
    fn a_value_is_opened_by_its_own_purpose_owner_and_key() {
        let sealer = sealer("0123456789abcdef");
        let text = sealer.seal("webhook", "key_1", b"the secret").unwrap();

        assert!(text.starts_with(FORM) && text.is_ascii(), "{text}");
        assert_eq!(
            sealer.open("webhook", "key_1", &text).as_deref(),
            Some(&b"the secret"[..])
        );
        for (purpose, owner) in [
            ("webhook", "key_2"),
            ("other", "key_1"),
            ("webhookkey_", "1"),
            ("", "webhookkey_1"),
        ] {
            assert_eq!(sealer.open(purpose, owner, &text), None, "{purpose} {owner}");
        }
        let other = self::sealer("0123456789abcdeg");
        assert_eq!(other.open("webhook", "key_1", &text), None);
    }

    #[test]
    fn equal_values_are_sealed_differently() {
        let sealer = sealer("0123456789abcdef");
        let seal = || sealer.seal("p", "o", b"").unwrap();
        assert_ne!(seal(), seal());
        assert_eq!(sealer.open("p", "o", &seal()), Some(Vec::new()));
    }

    #[test]
    fn a_changed_text_is_not_opened() {
        let sealer = sealer("0123456789abcdef");
        let text = sealer.seal("p", "o", b"the secret").unwrap();
        let bytes = STANDARD_NO_PAD.decode(&text[FORM.len()..]).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let changed = format!("{FORM}{}", STANDARD_NO_PAD.encode(changed));
            assert_eq!(sealer.open("p", "o", &changed), None, "byte {at}");
        }
        for text in ["", FORM, "s1.AAAA", "s1.*", &text[1..], &text[..text.len() - 4]] {
            assert_eq!(sealer.open("p", "o", text), None, "{text}");
        }
    }

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(format!("{:?}", sealer("0123456789abcdef")), "Sealer");
    }
}
