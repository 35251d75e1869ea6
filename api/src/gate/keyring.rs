//! Whose secret a request carries: the keys of the environment are known, those of the database are looked up and then
//! cached for two seconds. So a key that is revoked stops working everywhere soon after, and a request pays for one
//! digest.

use shared::clock::{self, Timestamp};
use shared::id::KeyId;
use shared::key::{ApiKey, KeyStatus, Kid, Secret, SecretKey};
use shared::storage::{self, Refused, Store};
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::sleep;

use crate::gate::caller::{Caller, Keys};
use crate::http::address;

/// How long a key is used as it was read. Twice this, and a revoked key is noticed everywhere.
const CACHE_TTL: Duration = Duration::from_secs(2);
/// Keys and wrong guesses that are cached.
const CACHE_MAX: usize = 10_000;
/// A key's use is written down this often.
const USE_INTERVAL: Duration = Duration::from_mins(1);
/// Addresses that refused authentications are counted for, between two writings.
const REFUSED_ADDRESSES: usize = 1_000;

/// The keys of this service.
pub struct Keyring {
    store: Store,
    keys: Keys,
    secret_key: Option<SecretKey>,
    known: Mutex<HashMap<Kid, Known>>,
    /// Whether the database holds keys, and when that was looked up.
    stored: Mutex<Option<(bool, Instant)>>,
    used: Mutex<HashMap<KeyId, Use>>,
    refused: Mutex<HashMap<Refused, i64>>,
    warned: AtomicBool,
}

/// A key as it was read, or that there was none.
#[derive(Clone)]
struct Known {
    key: Option<Arc<Stored>>,
    read: Instant,
}

struct Stored {
    key: ApiKey,
    caller: Caller,
}

/// When a key was used last, and when that was written down last.
struct Use {
    at: Timestamp,
    reported: Option<Instant>,
    fresh: bool,
}

/// What a presented secret is.
#[derive(Debug)]
pub enum Found {
    /// The secret of an active key.
    Valid(Caller),
    /// It isn't a key's, or the key isn't active any more; its id, if it is known.
    Refused(Option<KeyId>),
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keyring")
    }
}

impl Keyring {
    /// The keys of the environment, and those of this database, whose secrets are checked with `secret_key`.
    pub fn new(store: Store, keys: Keys, secret_key: Option<SecretKey>) -> Self {
        Self {
            store,
            keys,
            secret_key,
            known: Mutex::default(),
            stored: Mutex::default(),
            used: Mutex::default(),
            refused: Mutex::default(),
            warned: AtomicBool::new(false),
        }
    }

    /// What new secrets are digested with.
    pub const fn secret_key(&self) -> Option<&SecretKey> {
        self.secret_key.as_ref()
    }

    /// Whether there is any key, whatever its status. Once there is one, nobody is anonymous any more.
    pub async fn has_keys(&self) -> storage::Result<bool> {
        Ok(!self.keys.is_empty() || self.has_stored().await?)
    }

    /// Whose secret it is. `guessing`: keys are being tried from there, so the database isn't asked about new ones.
    pub async fn find(&self, secret: &[u8], guessing: bool) -> storage::Result<Found> {
        let mut refused = None;
        if let Some(kid) = Secret::kid_of(secret) {
            let mut known = self.key(&kid, guessing).await?;
            let mut valid = known.as_ref().is_some_and(|stored| self.matches(stored, secret));
            if !valid && !guessing && known.is_some() {
                // It may have been rotated elsewhere a moment ago: who got the new secret there can use it here.
                self.known().remove(&kid);
                known = self.key(&kid, false).await?;
                valid = known.as_ref().is_some_and(|stored| self.matches(stored, secret));
            }
            if let Some(stored) = known {
                if valid && stored.key.status(clock::now()) == KeyStatus::Active {
                    return Ok(Found::Valid(stored.caller.clone()));
                }
                refused = Some(stored.key.key_id.clone());
            }
        }
        Ok(match self.keys.find(secret, guessing) {
            Some(caller) => Found::Valid(caller.clone()),
            None => Found::Refused(refused),
        })
    }

    /// Whether the secret is this key's.
    fn matches(&self, stored: &Stored, secret: &[u8]) -> bool {
        if let Some(secret_key) = &self.secret_key {
            return stored.key.is_opened_by(&secret_key.digest(secret), clock::now());
        }
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!("SECRET_KEY isn't set, so keys in the database don't work in this process");
        }
        false
    }

    /// The key of this name, as it was at most two seconds ago.
    async fn key(&self, kid: &Kid, only_known: bool) -> storage::Result<Option<Arc<Stored>>> {
        let known = self.known().get(kid).cloned();
        match known {
            Some(known) if known.read.elapsed() < CACHE_TTL => return Ok(known.key),
            Some(known) if known.key.is_none() && only_known => return Ok(None),
            None if only_known => return Ok(None),
            _ => {}
        }
        let key = self.store.api_key(&kid.key_id()).await?;
        let key = key.map(|key| {
            let caller = Caller::of(key.key_id.clone(), key.rights.clone());
            Arc::new(Stored { key, caller })
        });
        let mut known = self.known();
        if known.len() >= CACHE_MAX {
            known.retain(|_, known| known.key.is_some() && known.read.elapsed() < CACHE_TTL);
        }
        if known.len() < CACHE_MAX {
            let read = Instant::now();
            known.insert(
                kid.clone(),
                Known {
                    key: key.clone(),
                    read,
                },
            );
        }
        Ok(key)
    }

    /// The key was changed here: the next request reads it again.
    pub fn forget(&self, key_id: &KeyId) {
        if let Some(kid) = Kid::of(key_id.as_str()) {
            self.known().remove(&kid);
        }
    }

    /// Whether the database holds any key, whatever its status.
    async fn has_stored(&self) -> storage::Result<bool> {
        let known = *self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        match known {
            Some((stored, read)) if stored || read.elapsed() < CACHE_TTL => return Ok(stored),
            _ => {}
        }
        let stored = self.store.has_api_keys().await?;
        *self.stored.lock().unwrap_or_else(PoisonError::into_inner) = Some((stored, Instant::now()));
        Ok(stored)
    }

    /// Returns when the caller's key stops being valid: it was revoked, deleted, or has expired. Never for others than
    /// keys of the database.
    pub async fn lost(&self, caller: &Caller) {
        loop {
            sleep(CACHE_TTL).await;
            if self.is_lost(caller).await {
                return;
            }
        }
    }

    /// Whether the caller's key isn't valid any more.
    pub async fn is_lost(&self, caller: &Caller) -> bool {
        let Some(kid) = Kid::of(caller.key_id.as_str()) else {
            return false;
        };
        // An outage takes nobody's key.
        self.key(&kid, false)
            .await
            .is_ok_and(|key| key.is_none_or(|stored| stored.key.status(clock::now()) != KeyStatus::Active))
    }

    /// The key was used now.
    pub fn note_use(&self, key_id: &KeyId) {
        if Kid::of(key_id.as_str()).is_none() {
            return;
        }
        let at = clock::now();
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        match used.get_mut(key_id) {
            Some(known) => {
                known.at = at;
                known.fresh = true;
            }
            None => {
                let first = Use {
                    at,
                    reported: None,
                    fresh: true,
                };
                used.insert(key_id.clone(), first);
            }
        }
    }

    /// Counts a refused authentication, of this key if it is known.
    pub fn count_refused(&self, client: IpAddr, key_id: Option<KeyId>) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let mut whose = Refused {
            address: address::counted(client),
            key_id: key_id.map(|key_id| key_id.to_string()).unwrap_or_default(),
        };
        if refused.len() >= REFUSED_ADDRESSES && !refused.contains_key(&whose) {
            whose = Refused {
                address: "others".to_owned(),
                key_id: String::new(),
            };
        }
        *refused.entry(whose).or_default() += 1;
    }

    /// Writes down which keys were used, each at most once a minute, and what was refused.
    pub async fn report(&self) -> storage::Result<()> {
        let due = self.due();
        if !due.is_empty()
            && let Err(error) = self.store.touch_api_keys(&due).await
        {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            for (key_id, _) in &due {
                if let Some(known) = used.get_mut(key_id) {
                    known.fresh = true;
                    known.reported = None;
                }
            }
            return Err(error);
        }
        let refused = std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner));
        if !refused.is_empty() {
            let counts = refused.into_iter().collect::<Vec<_>>();
            let counted = self.store.count_refused(&counts, clock::now()).await;
            if counted.is_err() {
                let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
                for (whose, times) in counts {
                    *refused.entry(whose).or_default() += times;
                }
            }
            return counted;
        }
        Ok(())
    }

    fn due(&self) -> Vec<(KeyId, Timestamp)> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut due = Vec::new();
        for (key_id, known) in used.iter_mut() {
            if known.fresh
                && known
                    .reported
                    .is_none_or(|reported| reported.elapsed() >= USE_INTERVAL)
            {
                due.push((key_id.clone(), known.at));
                known.reported = Some(Instant::now());
                known.fresh = false;
            }
        }
        // In one order, so that no two processes wait for each other.
        due.sort_by(|one, other| one.0.cmp(&other.0));
        due
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Kid, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
