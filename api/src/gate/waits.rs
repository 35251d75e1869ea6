//! Requests that wait for a job, counted for each key in this process.

use shared::id::KeyId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Requests of one key that may wait at once.
pub const MAX_WAITS: i64 = 200;

type Counts = Arc<Mutex<HashMap<KeyId, i64>>>;

/// The requests that wait.
#[derive(Debug, Default)]
pub struct Waits(Counts);

/// Counts for one request that waits; dropping it makes room for another.
#[derive(Debug)]
pub struct WaitPermit {
    counts: Counts,
    key_id: KeyId,
}

impl Waits {
    /// Counts one more; `None` when [`MAX_WAITS`] of this key wait.
    pub fn enter(&self, key_id: &KeyId) -> Option<WaitPermit> {
        let mut counts = lock(&self.0);
        let count = counts.entry(key_id.clone()).or_default();
        if *count >= MAX_WAITS {
            return None;
        }
        *count += 1;
        Some(WaitPermit {
            counts: Arc::clone(&self.0),
            key_id: key_id.clone(),
        })
    }
}

impl Drop for WaitPermit {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        if let Some(count) = counts.get_mut(&self.key_id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key_id);
            }
        }
    }
}

fn lock(counts: &Counts) -> MutexGuard<'_, HashMap<KeyId, i64>> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_so_many_waits_and_gets_each_back() {
        let waits = Waits::default();
        let key_id = KeyId::known("key_a");
        let mut permits = (0..MAX_WAITS)
            .map(|_| waits.enter(&key_id).unwrap())
            .collect::<Vec<_>>();
        assert!(waits.enter(&key_id).is_none());
        assert!(waits.enter(&KeyId::known("key_b")).is_some());
        permits.pop();
        assert!(waits.enter(&key_id).is_some());
        permits.clear();
        assert!(lock(&waits.0).is_empty());
    }
}
