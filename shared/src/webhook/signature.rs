//! Signatures of webhooks, as the Standard Webhooks specification defines them: `v1`, an HMAC-SHA256 over
//! `id.timestamp.body`.

use crate::clock::Timestamp;
use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, PAD, STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::fmt;
use std::time::Duration;
use subtle::ConstantTimeEq;

/// How secrets begin.
const PREFIX: &str = "whsec_";
/// The lengths that the specification allows, in bytes.
const LENGTHS: std::ops::RangeInclusive<usize> = 24..=64;
/// The length of a generated secret, in bytes.
const GENERATED: usize = 32;
/// By how much the time of a request may differ from the receiver's clock.
pub const TOLERANCE: Duration = Duration::from_mins(5);

/// Standard base64. Whoever copies a secret may lose the `=` at its end, which carry no information.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    PAD.with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A text is not a signing secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("A signing secret should be `whsec_` and the standard base64 of 24 to 64 bytes")]
pub struct InvalidSecret;

/// The secret with which deliveries to one receiver are signed. `Debug` doesn't show it.
#[derive(Clone)]
pub struct SigningSecret(Vec<u8>);

impl fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningSecret")
    }
}

impl SigningSecret {
    /// A new secret of 32 random bytes. Fails when the system has no random numbers.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = vec![0; GENERATED];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a secret: standard base64 of 24 to 64 bytes, with or without the prefix `whsec_`, with or without padding.
    pub fn parse(text: &str) -> Result<Self, InvalidSecret> {
        let encoded = text.strip_prefix(PREFIX).unwrap_or(text);
        let bytes = LENIENT.decode(encoded).map_err(|_| InvalidSecret)?;
        if LENGTHS.contains(&bytes.len()) {
            Ok(Self(bytes))
        } else {
            Err(InvalidSecret)
        }
    }

    /// From the bytes that [`as_bytes`](Self::as_bytes) returned.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, InvalidSecret> {
        if LENGTHS.contains(&bytes.len()) {
            Ok(Self(bytes))
        } else {
            Err(InvalidSecret)
        }
    }

    /// The bytes, to be sealed and stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The secret itself, for the one response that shows it: `whsec_` and base64.
    pub fn expose(&self) -> String {
        format!("{PREFIX}{}", STANDARD.encode(&self.0))
    }

    /// The first ten characters, by which people recognise it: `whsec_AbCd…`.
    pub fn prefix(&self) -> String {
        let start: String = self.expose().chars().take(PREFIX.len() + 4).collect();
        format!("{start}…")
    }

    fn sign(&self, id: &str, timestamp: &str, body: &[u8]) -> [u8; 32] {
        let mut mac: Hmac<Sha256> =
            Hmac::new_from_slice(&self.0).expect("an HMAC takes keys of every length");
        for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

/// The header `webhook-signature`: one `v1` signature for each secret, with blanks between them. During a rotation the
/// old secret and the new one are both in use. `timestamp` is the value of `webhook-timestamp`, in Unix seconds.
pub fn signatures(secrets: &[SigningSecret], id: &str, timestamp: i64, body: &[u8]) -> String {
    let timestamp = timestamp.to_string();
    let signed = secrets
        .iter()
        .map(|secret| format!("v1,{}", STANDARD.encode(secret.sign(id, &timestamp, body))));
    signed.collect::<Vec<_>>().join(" ")
}

/// The headers of a received webhook, as far as the signature needs them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers<'a> {
    /// `webhook-id`.
    pub id: Option<&'a str>,
    /// `webhook-timestamp`.
    pub timestamp: Option<&'a str>,
    /// `webhook-signature`.
    pub signature: Option<&'a str>,
}

/// Why a received webhook isn't accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A header is missing or empty.
    #[error("the header `{0}` is missing")]
    Missing(&'static str),
    /// The timestamp isn't a number.
    #[error("the header `webhook-timestamp` isn't in Unix seconds")]
    Timestamp,
    /// It was sent too long ago. It may be a copy of an old one.
    #[error("the webhook was sent more than 5 minutes ago")]
    TooOld,
    /// Its time is in the future.
    #[error("the time of the webhook is more than 5 minutes ahead of this machine's clock")]
    TooNew,
    /// No signature is of one of the secrets.
    #[error("no signature matches; is it the secret of this endpoint?")]
    Signature,
}

/// Checks a received webhook. One `v1` signature by one of the secrets is enough; other versions are ignored. Signatures
/// are compared in constant time.
pub fn verify(
    secrets: &[SigningSecret],
    headers: &Headers<'_>,
    body: &[u8],
    now: Timestamp,
) -> Result<(), Refused> {
    let present = |value: Option<_>, name| {
        value
            .filter(|text: &&str| !text.is_empty())
            .ok_or(Refused::Missing(name))
    };
    let id = present(headers.id, "webhook-id")?;
    let timestamp = present(headers.timestamp, "webhook-timestamp")?;
    let signature = present(headers.signature, "webhook-signature")?;

    let sent: i64 = timestamp.parse().map_err(|_| Refused::Timestamp)?;
    let age = now.unix_seconds().saturating_sub(sent);
    if age.unsigned_abs() > TOLERANCE.as_secs() {
        return Err(if age > 0 { Refused::TooOld } else { Refused::TooNew });
    }
    let given: Vec<_> = signature
        .split(' ')
        .filter_map(|entry| STANDARD.decode(entry.strip_prefix("v1,")?).ok())
        .collect();
    let matches = secrets.iter().any(|secret| {
        let expected = secret.sign(id, timestamp, body);
        given.iter().any(|given| given.ct_eq(expected.as_slice()).into())
    });
    if matches { Ok(()) } else { Err(Refused::Signature) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const SENT: i64 = 1_614_265_330;
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    fn secret(text: &str) -> SigningSecret {
        SigningSecret::parse(text).unwrap()
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp(seconds * 1_000_000)
    }

    /// From the test suites of the reference implementations and of a client library that verifies such webhooks.
    #[test]
    fn the_known_signatures_come_out() {
        for (key, id, timestamp, body, signature) in [
            (SECRET, ID, SENT, BODY, SIGNATURE),
            (
                "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
                "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
                1_649_367_553,
                br#"{"email":"test@example.com","username":"test_user"}"#,
                "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
            ),
            (
                "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c=",
                "wh_685c059ae39c8190af8c71ed1022a24d",
                1_750_861_210,
                br#"{"id": "evt_685c059ae3a481909bdc86819b066fb6", "object": "event", "created_at": 1750861210, "type": "response.completed", "data": {"id": "resp_123"}}"#,
                "v1,gUAg4R2hWouRZqRQG4uJypNS8YK885G838+EHb4nKBY=",
            ),
        ] {
            let secrets = [secret(key)];
            let timestamp_text = timestamp.to_string();
            let headers = Headers {
                id: Some(id),
                timestamp: Some(&timestamp_text),
                signature: Some(signature),
            };
            assert_eq!(signatures(&secrets, id, timestamp, body), signature);
            assert_eq!(verify(&secrets, &headers, body, at(timestamp)), Ok(()));
        }
    }

    #[test]
    fn each_secret_signs_and_one_signature_is_enough() {
        let (old, new) = (secret(SECRET), SigningSecret::generate().unwrap());
        let both = signatures(&[new.clone(), old.clone()], ID, SENT, BODY);
        let entries: Vec<_> = both.split(' ').collect();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[1], SIGNATURE);

        let timestamp = SENT.to_string();
        let headers = Headers {
            id: Some(ID),
            timestamp: Some(&timestamp),
            signature: Some(&both),
        };
        let other = SigningSecret::generate().unwrap();
        for (secrets, expected) in [
            (vec![old.clone()], Ok(())),
            (vec![new], Ok(())),
            (vec![other.clone(), old], Ok(())),
            (vec![other], Err(Refused::Signature)),
            (vec![], Err(Refused::Signature)),
        ] {
            assert_eq!(verify(&secrets, &headers, BODY, at(SENT)), expected);
        }
    }

    #[test]
    fn what_is_missing_late_or_forged_is_refused() {
        let sent = SENT.to_string();
        let good = Headers {
            id: Some(ID),
            timestamp: Some(&sent),
            signature: Some(SIGNATURE),
        };
        let signed = |signature| Headers {
            signature: Some(signature),
            ..good
        };
        let timed = |timestamp| Headers {
            timestamp: Some(timestamp),
            ..good
        };
        let among = format!(
            "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc= v2,{} {SIGNATURE}",
            &SIGNATURE[3..]
        );
        let other_version = SIGNATURE.replace("v1,", "v2,");
        for (headers, now, expected) in [
            (good, SENT, Ok(())),
            (good, SENT + 300, Ok(())),
            (good, SENT - 300, Ok(())),
            (good, SENT + 301, Err(Refused::TooOld)),
            (good, SENT - 301, Err(Refused::TooNew)),
            (
                Headers { id: None, ..good },
                SENT,
                Err(Refused::Missing("webhook-id")),
            ),
            (
                Headers { id: Some(""), ..good },
                SENT,
                Err(Refused::Missing("webhook-id")),
            ),
            (
                Headers {
                    timestamp: None,
                    ..good
                },
                SENT,
                Err(Refused::Missing("webhook-timestamp")),
            ),
            (
                Headers {
                    signature: None,
                    ..good
                },
                SENT,
                Err(Refused::Missing("webhook-signature")),
            ),
            (timed("hello"), SENT, Err(Refused::Timestamp)),
            (timed("1614265330.5"), SENT, Err(Refused::Timestamp)),
            (timed("99999999999999999999"), SENT, Err(Refused::Timestamp)),
            (timed("-9223372036854775808"), SENT, Err(Refused::TooOld)),
            (timed("1614265331"), SENT, Err(Refused::Signature)),
            (
                Headers {
                    id: Some("msg_x"),
                    ..good
                },
                SENT,
                Err(Refused::Signature),
            ),
            (signed("v1,"), SENT, Err(Refused::Signature)),
            (signed("v1"), SENT, Err(Refused::Signature)),
            (signed(&SIGNATURE[3..]), SENT, Err(Refused::Signature)),
            (signed(&SIGNATURE[..8]), SENT, Err(Refused::Signature)),
            (signed(&SIGNATURE[..11]), SENT, Err(Refused::Signature)),
            (signed(&other_version), SENT, Err(Refused::Signature)),
            (signed(&among), SENT, Ok(())),
        ] {
            assert_eq!(
                verify(&[secret(SECRET)], &headers, BODY, at(now)),
                expected,
                "{headers:?}"
            );
        }
        assert_eq!(
            verify(&[secret(SECRET)], &good, b"another", at(SENT)),
            Err(Refused::Signature)
        );
    }

    #[test]
    fn secrets_are_read_in_each_accepted_form() {
        let padded = "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c=";
        for text in [padded, &padded[6..], padded.trim_end_matches('='), &padded[6..49]] {
            assert_eq!(secret(text).expose(), padded, "{text}");
        }
        let of = |length| STANDARD.encode(vec![7; length]);
        for length in [24, 32, 64] {
            assert_eq!(secret(&of(length)).as_bytes().len(), length);
        }
        let url_safe = padded.replace('+', "-");
        for text in [
            "",
            "whsec_",
            "whsec_whsec_",
            "whsec_ ",
            "secret",
            &of(23),
            &of(65),
            &url_safe,
            "whsk_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        ] {
            assert_eq!(SigningSecret::parse(text).err(), Some(InvalidSecret), "{text}");
        }
    }

    #[test]
    fn a_generated_secret_can_be_read_and_shows_only_its_start() {
        let secret = SigningSecret::generate().unwrap();
        let text = secret.expose();
        assert_eq!(SigningSecret::parse(&text).unwrap().as_bytes(), secret.as_bytes());
        assert_eq!(secret.as_bytes().len(), 32);
        assert_ne!(text, SigningSecret::generate().unwrap().expose());
        assert_eq!(secret.prefix(), format!("{}…", &text[..10]));
        assert_eq!(format!("{secret:?}"), "SigningSecret");
        let bytes = secret.as_bytes().to_vec();
        assert_eq!(SigningSecret::from_bytes(bytes).unwrap().expose(), text);
        assert_eq!(SigningSecret::from_bytes(Vec::new()).err(), Some(InvalidSecret));
    }
}
