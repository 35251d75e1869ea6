//! `SECRET_KEY`: the only secret of a service, from which the others are derived.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::{Database, Decode, Encode, Type};
use std::fmt;
use subtle::ConstantTimeEq;

use super::secret::{KeyKind, Kid, Secret};
use crate::env::{Error, Vars};
use crate::sealed::Sealer;

const SHORTEST: usize = 16;

/// The key for the digests of secrets. Without it there are only environment keys.
#[derive(Clone)]
pub struct SecretKey {
    /// Initialised once, so that a request pays only for the digest itself.
    pepper: Hmac<Sha256>,
    check: String,
    sealer: Sealer,
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey")
    }
}

impl SecretKey {
    /// `SECRET_KEY`, at least 16 characters; `None` if it isn't set.
    pub fn from_vars(vars: &Vars) -> Result<Option<Self>, Error> {
        let Some(text) = vars.text("SECRET_KEY")? else {
            return Ok(None);
        };
        let accepted = "at least 16 characters, random, such as the output of `openssl rand -hex 32`";
        Self::new(&text)
            .map(Some)
            .ok_or_else(|| Error::new("SECRET_KEY", "is too short", accepted))
    }

    /// From the secret itself; `None` if it is too short.
    pub fn new(text: &str) -> Option<Self> {
        if text.len() < SHORTEST {
            return None;
        }
        let derived = |label: &str| {
            let mut mac = keyed(text.as_bytes());
            mac.update(label.as_bytes());
            mac.finalize().into_bytes()
        };
        let check = hex(&derived("claude-queue/check/1")[..16]);
        let pepper = keyed(&derived("claude-queue/key-pepper/1"));
        let sealer = Sealer::new(derived("claude-queue/sealed/1").into());
        Some(Self {
            pepper,
            check,
            sealer,
        })
    }

    /// A new secret with this public part, and its digest.
    pub fn issue(&self, kind: KeyKind, kid: &Kid) -> Result<(Secret, Digest), getrandom::Error> {
        let secret = Secret::generate(kind, kid)?;
        let digest = self.digest(secret.expose().as_bytes());
        Ok((secret, digest))
    }

    /// A value by which the database recognises this key. It reveals nothing about the key.
    pub fn check(&self) -> &str {
        &self.check
    }

    /// What encrypts the secrets that must be readable again.
    pub fn sealer(&self) -> &Sealer {
        &self.sealer
    }

    /// The digest of a key's secret. A secret is long and random, so a fast digest is enough; a slow one would help an
    /// attacker to overload the service.
    pub fn digest(&self, secret: &[u8]) -> Digest {
        let mut mac = self.pepper.clone();
        mac.update(secret);
        Digest(mac.finalize().into_bytes().into())
    }
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("an HMAC takes keys of every length")
}

/// The digest of a secret, stored as hex. Two digests are compared in constant time.
#[derive(Clone)]
pub struct Digest([u8; 32]);

impl PartialEq for Digest {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Digest {}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest")
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a string can't fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

impl<DB: Database> Type<DB> for Digest
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

impl<'q, DB: Database> Encode<'q, DB> for Digest
where
    String: Encode<'q, DB>,
{
    fn encode_by_ref(&self, buffer: &mut DB::ArgumentBuffer) -> Result<IsNull, BoxDynError> {
        Encode::<DB>::encode(hex(&self.0), buffer)
    }
}

impl<'r, DB: Database> Decode<'r, DB> for Digest
where
    String: Decode<'r, DB>,
{
    fn decode(value: DB::ValueRef<'r>) -> Result<Self, BoxDynError> {
        let text = <String as Decode<DB>>::decode(value)?;
        unhex(&text).map(Self).ok_or_else(|| "not a digest".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_secret_key_gives_other_digests_and_another_check() {
        let [one, other] = ["0123456789abcdef", "0123456789abcdeg"].map(|text| SecretKey::new(text).unwrap());
        assert!(one.digest(b"x") == one.digest(b"x"));
        assert!(one.digest(b"x") != one.digest(b"y"));
        assert!(one.digest(b"x") != other.digest(b"x"));
        assert_ne!(one.check(), other.check());
        assert_eq!(one.check().len(), 32);
    }

    #[test]
    fn a_digest_comes_back_from_its_column() {
        let digest = SecretKey::new("0123456789abcdef").unwrap().digest(b"x");
        assert_eq!(unhex(&hex(&digest.0)), Some(digest.0));
        assert_eq!(unhex("00"), None);
        assert_eq!(unhex(&"zz".repeat(32)), None);
    }

    #[test]
    fn a_short_secret_key_is_refused_by_its_name() {
        let error = SecretKey::from_vars(&Vars::of([("SECRET_KEY", "short-secret")])).unwrap_err();
        assert_eq!(error.variable, "SECRET_KEY");
        assert!(!error.to_string().contains("short-secret"));
        assert!(SecretKey::from_vars(&Vars::of([])).unwrap().is_none());
    }

    /// What a request pays for the check of its key, beside the look into the cache.
    #[test]
    fn a_digest_takes_microseconds() {
        let secret_key = SecretKey::new("0123456789abcdef").unwrap();
        let stored = secret_key.digest(b"cjk_Ab12Cd34_0123456789012345678901234567890123456789012");
        let rounds = 2_000_u32;
        let begun = std::time::Instant::now();
        for _ in 0..rounds {
            let digest = secret_key.digest(b"cjk_Ab12Cd34_0123456789012345678901234567890123456789012");
            assert!(digest == stored);
        }
        println!("a digest and its comparison take {:?}", begun.elapsed() / rounds);
    }
}
