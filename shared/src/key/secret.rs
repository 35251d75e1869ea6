//! The format of a secret: `cjk_<kid>_<random><checksum>`, all parts in base62. A double click selects it as one word,
//! scanners for leaked secrets can find it, and the checksum finds a typing error without a query.

use std::fmt;

use crate::id::KeyId;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// The public part.
const KID: usize = 8;
/// 43 characters of 62 hold 256 bits.
const RANDOM: usize = 43;
/// A CRC-32 in base62, with zeros in front.
const CHECKSUM: usize = 6;
/// `cjk_`, the kid, `_`, the random part, the checksum.
const LENGTH: usize = 4 + KID + 1 + RANDOM + CHECKSUM;

/// The kind of a key, shown to people by the prefix of its secret. Permissions come from scopes, never from this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// `cjk`.
    Ordinary,
    /// `cja`.
    Admin,
}

impl KeyKind {
    /// The kind of an admin key, or of an ordinary one.
    pub const fn of(admin: bool) -> Self {
        if admin { Self::Admin } else { Self::Ordinary }
    }

    /// The prefix of the secret.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Ordinary => "cjk",
            Self::Admin => "cja",
        }
    }
}

/// The public part of a secret, which identifies the key: 8 characters in base62.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kid(String);

impl Kid {
    /// A new random value.
    pub fn generate() -> Result<Self, getrandom::Error> {
        random(KID).map(Self)
    }

    /// The id of the key.
    pub fn key_id(&self) -> KeyId {
        KeyId::known(format!("key_{}", self.0))
    }

    /// The public part of a key's secrets, from the key's id. `None` if it isn't the id of a database key.
    pub fn of(key_id: &str) -> Option<Self> {
        let kid = key_id.strip_prefix("key_")?;
        (kid.len() == KID && kid.bytes().all(|byte| ALPHABET.contains(&byte))).then(|| Self(kid.to_owned()))
    }
}

/// A new secret. It is shown once and never stored; `Debug` doesn't show it.
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({}…)", &self.0[..4 + KID])
    }
}

impl Secret {
    /// A new secret with this public part, from the system's random numbers.
    pub fn generate(kind: KeyKind, kid: &Kid) -> Result<Self, getrandom::Error> {
        let mut text = format!("{}_{}_{}", kind.prefix(), kid.0, random(RANDOM)?);
        text.push_str(&checksum(&text));
        Ok(Self(text))
    }

    /// The public part of a text in the format of a secret. `None` for any other text, which can be rejected without a
    /// query.
    pub fn kid_of(text: &[u8]) -> Option<Kid> {
        if text.len() != LENGTH || text[..2] != *b"cj" || !b"ka".contains(&text[2]) || text[3] != b'_' {
            return None;
        }
        let text = std::str::from_utf8(text).ok()?;
        let (body, sum) = text.split_at_checked(LENGTH - CHECKSUM)?;
        let (kid, random) = body[4..].split_once('_')?;
        let plain = |part: &str| part.bytes().all(|byte| byte.is_ascii_alphanumeric());
        (kid.len() == KID && plain(kid) && plain(random) && checksum(body) == sum)
            .then(|| Kid(kid.to_owned()))
    }

    /// The secret itself, for the one response that shows it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The last four characters, for people. They are part of the checksum, so they reveal little.
    pub fn last4(&self) -> &str {
        &self.0[LENGTH - 4..]
    }
}

/// `length` random characters, each of the 62 equally likely.
fn random(length: usize) -> Result<String, getrandom::Error> {
    let mut text = String::with_capacity(length);
    let mut bytes = [0; 64];
    loop {
        getrandom::fill(&mut bytes)?;
        // 248 is the largest multiple of 62 in a byte; higher values would make some characters more likely.
        for byte in bytes.into_iter().filter(|byte| *byte < 248) {
            if text.len() == length {
                return Ok(text);
            }
            text.push(char::from(ALPHABET[usize::from(byte % 62)]));
        }
    }
}

fn checksum(text: &str) -> String {
    let mut rest = crc32fast::hash(text.as_bytes());
    let mut digits = [b'0'; CHECKSUM];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(rest % 62) as usize];
        rest /= 62;
    }
    digits.into_iter().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_known_by_its_form() {
        let kid = Kid::generate().unwrap();
        let secret = Secret::generate(KeyKind::Ordinary, &kid).unwrap();
        let text = secret.expose();
        assert_eq!((text.len(), &text[..4]), (62, "cjk_"));
        assert_eq!(Secret::kid_of(text.as_bytes()), Some(kid.clone()));
        assert_eq!(Kid::of(kid.key_id().as_str()), Some(kid));
        assert!(!format!("{secret:?}").contains(&text[14..]));
    }

    #[test]
    fn every_slip_of_one_character_is_seen() {
        let kid = Kid::generate().unwrap();
        let secret = Secret::generate(KeyKind::Admin, &kid).unwrap();
        for index in 0..LENGTH {
            let mut text = secret.expose().as_bytes().to_vec();
            text[index] = if text[index] == b'x' { b'y' } else { b'x' };
            assert_eq!(Secret::kid_of(&text), None, "at {index}");
        }
    }

    #[test]
    fn other_texts_are_no_secrets() {
        for text in [
            "",
            "my-secret-key",
            "cjk_",
            &"cjk_ä".repeat(12),
            &"_".repeat(62),
            &"c".repeat(1_000),
        ] {
            assert_eq!(Secret::kid_of(text.as_bytes()), None, "{text}");
        }
        for id in ["key_", "key_123", "env_12345678", "key_1234567ä", "key_12345678 "] {
            assert_eq!(Kid::of(id), None, "{id}");
        }
    }

    #[test]
    fn no_two_secrets_are_alike() {
        let kid = Kid::generate().unwrap();
        let made = (0..1_000).map(|_| Secret::generate(KeyKind::Ordinary, &kid).unwrap().0);
        assert_eq!(made.collect::<std::collections::HashSet<_>>().len(), 1_000);
    }

    /// The checksum of a known text, so that the format can't change unnoticed.
    #[test]
    fn the_checksum_is_a_crc_32_in_base62() {
        // 0xcbf43926 is the CRC-32 of these digits.
        assert_eq!(checksum("123456789"), "3jZRME");
    }
}
