//! How often a caller may ask. The counts are in the database; what is kept here is only which buckets are throttled
//! and until when, so that more requests to one cost no database call.

use http::{HeaderMap, HeaderName, HeaderValue};
use shared::id::KeyId;
use shared::storage::{Quota, Rate, Result, Store};
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::http::address;
use crate::http::problem::Problem;

/// Failed authentications of one address: 20 in a minute.
const FAILURES: (i64, i64) = (20, 60);
/// More throttled buckets than this aren't kept in memory; the database knows them all.
const CACHE_MAX: usize = 10_000;
/// How long a count of waiting jobs is used.
const COUNT_TTL: Duration = Duration::from_secs(1);

/// What a request counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It makes a job.
    Submit,
    /// Everything else, so that polling never eats what is for submitting.
    Read,
}

impl Policy {
    /// The word in headers and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Submit => "submit",
            Self::Read => "read",
        }
    }
}

/// What keys may do that have no limits of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// `RATE_LIMIT_REQUESTS`, 30, in `RATE_LIMIT_WINDOW`, 60 seconds.
    pub submit: Rate,
    /// `RATE_LIMIT_READ_REQUESTS`, 6,000, in a minute.
    pub read: Rate,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            submit: Rate::new(30, 60),
            read: Rate::new(6_000, 60),
        }
    }
}

impl Rates {
    /// The limit of this policy.
    pub const fn of(&self, policy: Policy) -> Rate {
        match policy {
            Policy::Submit => self.submit,
            Policy::Read => self.read,
        }
    }
}

/// Decides about every request.
pub struct Limits {
    store: Store,
    throttled: Mutex<HashMap<String, Throttled>>,
    waiting: Mutex<HashMap<KeyId, Waiting>>,
}

/// A bucket that grants nothing until a time that follows from what the database said.
struct Throttled {
    quota: Quota,
    since: Instant,
}

impl Throttled {
    fn now(&self) -> Option<Quota> {
        let elapsed = self.since.elapsed();
        (elapsed < self.quota.wait()).then(|| self.quota.after(elapsed))
    }
}

/// How many jobs of a key wait: as counted, and accepted here since.
struct Waiting {
    jobs: i64,
    counted: Instant,
}

impl fmt::Debug for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Limits")
    }
}

impl Limits {
    /// Limits that are counted in this database.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            throttled: Mutex::default(),
            waiting: Mutex::default(),
        }
    }

    /// Counts a request; the answer says whether it is allowed. A database that can't be asked is an error, never a
    /// yes.
    pub async fn take(&self, (bucket, rate): (String, Rate)) -> Result<Quota> {
        let throttled = self.throttled().get(&bucket).and_then(Throttled::now);
        if let Some(quota) = throttled {
            return Ok(quota);
        }
        // Before the call, so that nobody is throttled for longer than the database says.
        let since = Instant::now();
        let quota = self.store.take(&bucket, rate).await?;
        let mut throttled = self.throttled();
        if quota.granted {
            throttled.remove(&bucket);
        } else {
            if throttled.len() >= CACHE_MAX {
                throttled.retain(|_, throttled| throttled.now().is_some());
            }
            if throttled.len() < CACHE_MAX {
                throttled.insert(bucket, Throttled { quota, since });
            }
        }
        Ok(quota)
    }

    /// How a bucket stands, without counting anything.
    pub async fn quota(&self, (bucket, rate): (String, Rate)) -> Result<Quota> {
        self.store.quota(&bucket, rate).await
    }

    /// Counts a failed authentication from this address; whether more may be tried.
    pub async fn failed(&self, client: IpAddr) -> Result<Quota> {
        self.take((address_bucket(client), Rate::new(FAILURES.0, FAILURES.1)))
            .await
    }

    /// Whether so many keys were tried from this address that it has to wait, as far as this process knows.
    pub fn is_guessing(&self, client: IpAddr) -> Option<Quota> {
        self.throttled()
            .get(&address_bucket(client))
            .and_then(Throttled::now)
    }

    /// Whether one more job of this key may wait, of which `max` may. Counted once a second; what is accepted here in
    /// between is added.
    pub async fn has_queue_room(&self, key_id: &KeyId, max: i64) -> Result<bool> {
        let known = self.count_one(key_id, max);
        if let Some(room) = known {
            return Ok(room);
        }
        let jobs = self.store.queued_jobs(key_id, max).await?;
        let waiting = Waiting {
            jobs,
            counted: Instant::now(),
        };
        self.waiting().insert(key_id.clone(), waiting);
        Ok(self.count_one(key_id, max).unwrap_or(jobs < max))
    }

    fn count_one(&self, key_id: &KeyId, max: i64) -> Option<bool> {
        let mut waiting = self.waiting();
        let waiting = waiting.get_mut(key_id)?;
        if waiting.counted.elapsed() > COUNT_TTL {
            return None;
        }
        let room = waiting.jobs < max;
        waiting.jobs += i64::from(room);
        Some(room)
    }

    fn throttled(&self) -> MutexGuard<'_, HashMap<String, Throttled>> {
        self.throttled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<KeyId, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The refusal of a bucket that grants nothing.
pub fn refused(policy: &'static str, quota: &Quota) -> Problem {
    Problem::RateLimited {
        policy,
        retry_after: Duration::from_secs(u64::try_from(quota.retry_after()).unwrap_or(1)),
    }
}

fn address_bucket(client: IpAddr) -> String {
    format!("address:{}", address::counted(client))
}

/// What was decided about a request, for the headers of its answer.
#[derive(Clone, Copy, Debug)]
pub struct Decided {
    /// What the request counted as.
    pub policy: Policy,
    /// What the bucket said.
    pub quota: Quota,
    /// When it said so.
    pub at: Instant,
}

impl Decided {
    /// Adds the headers, in both families, as they are true now.
    pub fn apply_to(&self, headers: &mut HeaderMap) {
        let quota = self.quota.after(self.at.elapsed());
        let (policy, rate) = (self.policy.as_str(), quota.rate);
        let more = quota
            .more_in()
            .map(|seconds| format!(";t={seconds}"))
            .unwrap_or_default();
        let remaining = quota.remaining();
        for (name, value) in [
            ("x-ratelimit-limit", rate.limit().to_string()),
            ("x-ratelimit-remaining", remaining.to_string()),
            ("x-ratelimit-used", quota.used().to_string()),
            ("x-ratelimit-reset", quota.reset().to_string()),
            ("x-ratelimit-resource", policy.to_owned()),
            (
                "ratelimit-policy",
                format!("\"{policy}\";q={};w={}", rate.limit(), rate.window_seconds()),
            ),
            ("ratelimit", format!("\"{policy}\";r={remaining}{more}")),
        ] {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::clock::Timestamp;

    #[test]
    fn the_headers_say_what_the_bucket_said() {
        let now = Timestamp(1_800_000_000_500_000);
        let quota = Quota {
            rate: Rate::new(30, 60),
            granted: true,
            now,
            full_at: Timestamp(now.0 + 3_000_000),
        };
        let mut headers = HeaderMap::new();
        Decided {
            policy: Policy::Submit,
            quota,
            at: Instant::now(),
        }
        .apply_to(&mut headers);
        let header = |name: &str| headers[name].to_str().unwrap();
        assert_eq!(header("x-ratelimit-limit"), "30");
        assert_eq!(header("x-ratelimit-remaining"), "28");
        assert_eq!(header("x-ratelimit-used"), "2");
        assert_eq!(header("x-ratelimit-reset"), "1800000004");
        assert_eq!(header("x-ratelimit-resource"), "submit");
        assert_eq!(header("ratelimit-policy"), "\"submit\";q=30;w=60");
        assert_eq!(header("ratelimit"), "\"submit\";r=28;t=1");
    }

    #[test]
    fn a_full_bucket_promises_no_more() {
        let now = Timestamp(1_800_000_000_000_000);
        let quota = Quota {
            rate: Rate::new(30, 60),
            granted: true,
            now,
            full_at: now,
        };
        let mut headers = HeaderMap::new();
        let policy = Policy::Read;
        let at = Instant::now();
        Decided { policy, quota, at }.apply_to(&mut headers);
        assert_eq!(headers["ratelimit"], "\"read\";r=30");
    }
}
