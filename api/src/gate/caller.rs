//! Who asks: the key in the headers becomes a [`Caller`]. The keys of the environment are compared here and nowhere else;
//! those of the database in [`super::keyring`].

use http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use shared::id::KeyId;
use shared::key::{KeyRights, Scope, Scopes, hex};
use shared::storage::Rate;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::gate::limits::{Policy, Rates};
use crate::http::cors::Cors;
use crate::http::problem::Problem;
use crate::http::request::headers;

/// Who asks, and what they may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The owner of what this caller makes.
    pub key_id: KeyId,
    /// Whether this caller sees everybody's objects.
    pub admin: bool,
    /// What the key may do, and how much of it.
    pub rights: Arc<KeyRights>,
}

impl Caller {
    /// A caller with the rights that ordinary keys have unless told otherwise.
    pub fn ordinary(key_id: KeyId) -> Self {
        Self::of(key_id, KeyRights::of(Scopes::ordinary()))
    }

    /// A caller who may do everything.
    pub fn administrator(key_id: KeyId) -> Self {
        Self::of(key_id, KeyRights::of(Scopes::all()))
    }

    /// A caller with these rights. Who may make keys sees everybody's objects.
    pub fn of(key_id: KeyId, rights: KeyRights) -> Self {
        Self {
            key_id,
            admin: rights.scopes.contains(Scope::KeysAdmin),
            rights: Arc::new(rights),
        }
    }

    /// Whether an object of this owner exists for the caller.
    pub fn sees(&self, owner: &KeyId) -> bool {
        self.admin || self.key_id == *owner
    }

    /// Whether the key has this scope.
    pub fn may(&self, scope: Scope) -> bool {
        self.rights.scopes.contains(scope)
    }

    /// Refuses what the key has no scope for.
    pub fn require(&self, scope: Scope) -> Result<(), Problem> {
        if self.may(scope) {
            Ok(())
        } else {
            Err(Problem::InsufficientScope(scope))
        }
    }

    /// The highest priority that this caller's jobs get: unless the key says otherwise, only an administrator comes
    /// before the others.
    pub fn max_priority(&self) -> i64 {
        self.rights
            .max_priority
            .unwrap_or(if self.admin { 10 } else { 0 })
    }

    /// How many event streams this caller may have open at once.
    pub fn max_streams(&self) -> i64 {
        self.rights.max_streams.unwrap_or(100)
    }

    /// How often this caller may ask.
    pub fn rate(&self, policy: Policy, rates: &Rates) -> Rate {
        let default = rates.of(policy);
        let own = match policy {
            Policy::Submit => self.rights.rate_submit,
            Policy::Read => self.rights.rate_read,
        };
        Rate::new(
            own.unwrap_or(default.limit()),
            self.rights.rate_window.unwrap_or(default.window_seconds()),
        )
    }

    /// What a request of this caller is counted in. Another limit is another bucket, and that is full: raising a limit
    /// works at once.
    pub fn bucket(&self, policy: Policy, rates: &Rates) -> (String, Rate) {
        let rate = self.rate(policy, rates);
        let (limit, window) = (rate.limit(), rate.window_seconds());
        let key_id = &self.key_id;
        (format!("{key_id}:{}:{limit}/{window}", policy.as_str()), rate)
    }
}

/// The keys of the environment, as digests: the secrets aren't kept.
#[derive(Clone, Default)]
pub struct Keys(Vec<Key>);

#[derive(Clone)]
struct Key {
    digest: [u8; 32],
    caller: Caller,
    /// Too long to be found by trying, so that trying needn't be hindered.
    long: bool,
}

/// Only the public names.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.0.iter().map(|key| &key.caller.key_id))
            .finish()
    }
}

/// Secrets of so many characters can't be guessed, whatever the rate.
const LONG: usize = 24;

impl Keys {
    /// Keys of the two kinds. One that is both is an admin's.
    pub fn of(ordinary: &[String], admin: &[String]) -> Self {
        let mut keys: Vec<Key> = Vec::new();
        let of_kind = |secrets: &[String], kind: fn(KeyId) -> Caller| {
            secrets
                .iter()
                .map(|secret| (digest(secret.as_bytes()), secret.len() >= LONG, kind))
                .collect::<Vec<_>>()
        };
        let admin = of_kind(admin, Caller::administrator);
        for (digest, long, kind) in admin.into_iter().chain(of_kind(ordinary, Caller::ordinary)) {
            if keys.iter().all(|key| key.digest != digest) {
                let caller = kind(KeyId::known(format!("env_{}", hex(&digest[..4]))));
                keys.push(Key { digest, caller, long });
            }
        }
        Self(keys)
    }

    /// Whether there is no key.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The owners that exist without the database: every key, or `anonymous` where there is none.
    pub fn owners(&self) -> Vec<KeyId> {
        if self.0.is_empty() {
            return vec![KeyId::anonymous()];
        }
        self.callers().map(|caller| caller.key_id.clone()).collect()
    }

    /// Whose keys they are.
    pub fn callers(&self) -> impl Iterator<Item = &Caller> {
        self.0.iter().map(|key| &key.caller)
    }

    /// The owner of `secret`. Compares it with every key and every byte, whatever it finds on the way, so that the
    /// time tells nothing. `guessing`: only long keys are valid, because somebody tries keys.
    pub fn find(&self, secret: &[u8], guessing: bool) -> Option<&Caller> {
        let wanted = digest(secret);
        let mut found = u32::MAX;
        for (index, key) in (0u32..).zip(&self.0) {
            found.conditional_assign(&index, key.digest.ct_eq(&wanted));
        }
        let key = self.0.get(usize::try_from(found).ok()?)?;
        (key.long || !guessing).then_some(&key.caller)
    }
}

fn digest(secret: &[u8]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// The key in the headers: `X-API-Key`, or `Authorization: Bearer`. Other schemes aren't ours to judge.
pub fn presented(headers: &HeaderMap) -> Result<Option<&[u8]>, Problem> {
    let api_keys = headers
        .get_all("x-api-key")
        .iter()
        .map(|value| value.as_bytes().trim_ascii());
    let bearers = headers.get_all(header::AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, secret) = value.as_bytes().split_at_checked(7)?;
        scheme
            .eq_ignore_ascii_case(b"bearer ")
            .then(|| secret.trim_ascii())
    });
    let mut secrets = api_keys.chain(bearers);
    let first = secrets.next();
    // The comparison is between two things that the client sent, so its time tells nothing.
    if secrets.any(|other| Some(other) != first) {
        Err(Problem::AmbiguousCredentials)
    } else {
        Ok(first)
    }
}

/// To whom the service is exposed when there is no key.
#[derive(Clone, Copy, Debug)]
pub struct Exposure<'c> {
    /// Whether everybody who can connect may ask.
    pub allow_anonymous: bool,
    /// Whether only programs on this machine can connect.
    pub loopback: bool,
    /// The web pages that may call.
    pub cors: &'c Cors,
}

/// Without any key everybody on this machine may ask. A web page that is open on this machine may not: it could be
/// anyone's, and a browser would send its requests here. (A page gives itself away by `Origin`, and one that made its
/// own name point here by `Host`.) Nor may what a proxy passes on: its client may be anybody.
pub fn anonymous(headers: &HeaderMap, exposure: &Exposure) -> Result<Caller, Problem> {
    if exposure.allow_anonymous {
        return Ok(Caller::ordinary(KeyId::anonymous()));
    }
    if !exposure.loopback {
        // There was a key when the service started, and it was deleted.
        return Err(Problem::Unauthorized);
    }
    let from_page = headers::text(headers, "origin").is_some_and(|origin| !exposure.cors.names(origin));
    if from_page || !host_is_local(headers) {
        return Err(Problem::AnonymousFromWeb);
    }
    if is_passed_on(headers) {
        return Err(Problem::AnonymousThroughProxy);
    }
    Ok(Caller::ordinary(KeyId::anonymous()))
}

/// Whether a proxy has passed the request on. One that says so in none of its headers can't be told from a program on
/// this machine.
fn is_passed_on(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| {
        let name = name.as_str();
        name.starts_with("x-forwarded-") || matches!(name, "forwarded" | "via" | "x-real-ip")
    })
}

fn host_is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers::text(headers, "host") else {
        return true;
    };
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn keys() -> Keys {
        Keys::of(
            &["one".into(), "two".into(), "both".into()],
            &["root".into(), "both".into()],
        )
    }

    fn ask(pairs: &[(&'static str, &'static str)]) -> Result<Caller, &'static str> {
        let headers = headers(pairs);
        let secret = presented(&headers).map_err(|problem| problem.code())?;
        secret
            .and_then(|secret| keys().find(secret, false).cloned())
            .ok_or("unauthorized")
    }

    #[test]
    fn each_key_is_valid_as_itself_in_either_header() {
        let one = ask(&[("x-api-key", "one")]).unwrap();
        assert_eq!(one.key_id.as_str(), format!("env_{}", &hex(&digest(b"one"))[..8]));
        assert_eq!(ask(&[("authorization", "Bearer one")]), Ok(one.clone()));
        assert_eq!(ask(&[("authorization", "bearer  one")]), Ok(one.clone()));
        assert_eq!(
            ask(&[("authorization", "Bearer one"), ("x-api-key", "one")]),
            Ok(one.clone())
        );
        assert!(!one.admin);
        assert_ne!(ask(&[("x-api-key", "two")]).unwrap().key_id, one.key_id);
    }

    #[test]
    fn a_key_of_both_kinds_is_an_admins_and_counts_once() {
        assert!(ask(&[("x-api-key", "root")]).unwrap().admin);
        assert!(ask(&[("x-api-key", "both")]).unwrap().admin);
        assert_eq!(keys().owners().len(), 4);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for pairs in [
            vec![],
            vec![("x-api-key", "")],
            vec![("x-api-key", "on")],
            vec![("x-api-key", "one, two")],
            vec![("x-api-key", "ONE")],
            vec![("authorization", "one")],
            vec![("authorization", "Basic one")],
            vec![("authorization", "Bearer")],
            vec![("authorization", "Bearer ")],
        ] {
            assert_eq!(ask(&pairs), Err("unauthorized"), "{pairs:?}");
        }
    }

    #[test]
    fn two_different_keys_are_ambiguous_even_when_both_are_valid() {
        let both = [("x-api-key", "one"), ("authorization", "Bearer two")];
        assert_eq!(ask(&both), Err("ambiguous-credentials"));
        assert_eq!(
            ask(&[("x-api-key", "one"), ("x-api-key", "two")]),
            Err("ambiguous-credentials")
        );
    }

    #[test]
    fn while_somebody_guesses_only_long_keys_are_valid() {
        let long = "a-key-of-thirty-two-characters--";
        let keys = Keys::of(&["short".into(), long.into()], &[]);
        assert!(keys.find(b"short", false).is_some() && keys.find(b"short", true).is_none());
        assert!(keys.find(long.as_bytes(), true).is_some());
    }

    #[test]
    fn a_service_that_lost_its_last_key_does_not_serve_the_network() {
        let cors = Cors::any();
        let exposure = Exposure {
            allow_anonymous: false,
            loopback: false,
            cors: &cors,
        };
        assert!(anonymous(&headers(&[]), &exposure).is_err());
    }

    #[test]
    fn secrets_are_not_kept() {
        let shown = format!("{:?}", Keys::of(&["my-secret-key".into()], &[]));
        assert!(shown.starts_with("{env_"), "{shown}");
        assert!(!shown.contains("my-secret-key"));
    }

    #[test]
    fn without_keys_programs_on_this_machine_are_served_and_web_pages_are_not() {
        let cors = Cors::any();
        let ask = |pairs: &[(&'static str, &'static str)], allow_anonymous: bool| {
            let exposure = Exposure {
                allow_anonymous,
                loopback: true,
                cors: &cors,
            };
            anonymous(&headers(pairs), &exposure)
                .map(|caller| caller.key_id.to_string())
                .ok()
        };
        let anonymous = Some("anonymous".to_owned());
        for pairs in [
            vec![],
            vec![("host", "127.0.0.1:8000")],
            vec![("host", "localhost")],
            vec![("host", "[::1]:8000")],
            vec![("user-agent", "whatever")],
        ] {
            assert_eq!(ask(&pairs, false), anonymous, "{pairs:?}");
        }
        for pairs in [
            vec![("host", "127.0.0.1:8000"), ("origin", "https://evil.example")],
            vec![("host", "127.0.0.1:8000"), ("origin", "null")],
            vec![("host", "evil.example:8000")],
            vec![("host", "127.0.0.1.evil.example")],
            vec![("host", "127.0.0.1:8000"), ("x-forwarded-for", "127.0.0.1")],
            vec![("host", "127.0.0.1:8000"), ("x-forwarded-proto", "https")],
            vec![("host", "127.0.0.1:8000"), ("x-real-ip", "203.0.113.7")],
            vec![("forwarded", "for=203.0.113.7")],
            vec![("via", "1.1 proxy")],
        ] {
            assert_eq!(ask(&pairs, false), None, "{pairs:?}");
        }
        assert_eq!(
            ask(
                &[
                    ("host", "queue.example"),
                    ("origin", "https://a.example"),
                    ("x-forwarded-for", "203.0.113.7")
                ],
                true
            ),
            anonymous
        );
    }
}
