//! Keys, rate limits, streams and the audit.

use super::{NOW, World, at, job};
use serde_json::json;
use shared::clock::{self, Timestamp};
use shared::id::KeyId;
use shared::key::{
    ApiKey, KeyKind, KeyRights, KeyStatus, Kid, NewApiKey, Scopes, Secret, SecretKey, TextList,
};
use shared::money::MicroUsd;
use shared::storage::{AuditEntry, KeyFilter, NewSecret, Quota, Rate, Refused, Store};
use std::time::Duration;
use tests::database::Db;
use uuid::Uuid;

tests::both!(
    a_key_comes_back_as_it_was_stored,
    a_key_is_changed_only_as_it_was_seen,
    a_rotated_key_has_two_secrets_until_a_time,
    a_key_is_deleted_only_when_it_opens_nothing,
    keys_are_listed_by_status_and_name,
    a_raised_cap_lets_waiting_jobs_run,
    keys_without_a_cap_follow_the_service,
    a_database_knows_its_secret_key,
    the_jobs_of_a_key_are_counted_and_listed,
    a_limit_admits_exactly_as_many_as_it_says,
    processes_that_share_a_database_share_a_limit,
    a_limit_keeps_its_word_in_every_history,
    neither_a_clock_that_goes_back_nor_a_lowered_limit_locks_out_for_long,
    streams_are_counted_over_processes,
    refused_authentications_are_counted_and_changes_noted,
);
tests::once!(
    reading_never_waits_for_the_writer_of_jobs,
    a_spoilt_file_of_limits_is_begun_anew
);

fn secret_key() -> SecretKey {
    SecretKey::new("a-secret-key-for-tests").unwrap()
}

fn new_key(name: &str) -> NewApiKey {
    let kid = Kid::generate().unwrap();
    let secret = Secret::generate(KeyKind::Ordinary, &kid).unwrap();
    NewApiKey {
        key_id: kid.key_id(),
        name: name.to_owned(),
        secret_digest: secret_key().digest(secret.expose().as_bytes()),
        last4: secret.last4().to_owned(),
        rights: KeyRights::of(Scopes::ordinary()),
        metadata: "{}".to_owned(),
        expires_at: None,
        created_at: NOW,
        created_by: "cli".to_owned(),
    }
}

async fn stored(store: &Store, key: &NewApiKey) -> ApiKey {
    let mut tx = store.begin().await.unwrap();
    let stored = tx.insert_api_key(key, 16).await.unwrap();
    tx.commit().await.unwrap();
    stored
}

async fn revoked(store: &Store, key_id: &KeyId) -> Option<ApiKey> {
    let mut tx = store.begin().await.unwrap();
    let key = tx.revoke_api_key(key_id, Some("lost"), NOW).await.unwrap();
    tx.commit().await.unwrap();
    key
}

async fn deleted(store: &Store, key_id: &KeyId, now: Timestamp) -> bool {
    let mut tx = store.begin().await.unwrap();
    let deleted = tx.delete_api_key(key_id, now).await.unwrap();
    tx.commit().await.unwrap();
    deleted
}

async fn a_key_comes_back_as_it_was_stored(db: Db) {
    let world = World::new(db).await;
    let mut new = new_key("the \"first\" 钥匙");
    new.expires_at = Some(at(60));
    new.rights.allowed_ips = TextList(vec!["10.0.0.0/8".to_owned(), "::1/128".to_owned()]);
    new.rights.allowed_models = TextList(vec!["opus, or so".to_owned()]);
    new.rights.max_streams = Some(3);
    new.rights.max_priority = Some(-2);

    let key = stored(&world.store, &new).await;

    assert_eq!(world.store.api_key(&new.key_id).await.unwrap(), Some(key.clone()));
    assert_eq!((key.rights, key.secret_digest), (new.rights, new.secret_digest));
    assert_eq!((key.name.as_str(), key.version), ("the \"first\" 钥匙", 1));
    assert_eq!(
        world.store.api_key(&KeyId::known("key_nothing0")).await.unwrap(),
        None
    );
}

async fn a_key_is_changed_only_as_it_was_seen(db: Db) {
    let world = World::new(db).await;
    let seen = stored(&world.store, &new_key("a")).await;
    let change = async |name: &str| {
        let mut tx = world.store.begin().await.unwrap();
        let mut wanted = seen.clone();
        name.clone_into(&mut wanted.name);
        let changed = tx.update_api_key(&wanted, 16).await.unwrap();
        tx.commit().await.unwrap();
        changed
    };

    let changed = change("b").await.expect("nobody was faster");
    assert_eq!((changed.name.as_str(), changed.version), ("b", 2));
    assert_eq!(change("c").await, None, "it was seen before that");
}

async fn a_rotated_key_has_two_secrets_until_a_time(db: Db) {
    let world = World::new(db).await;
    let first = stored(&world.store, &new_key("a")).await;
    let rotate = async |key: &ApiKey, secret: &str, overlap_until| {
        let secret = NewSecret {
            digest: secret_key().digest(secret.as_bytes()),
            last4: "last".to_owned(),
            overlap_until,
        };
        let mut tx = world.store.begin().await.unwrap();
        let rotated = tx
            .rotate_api_key(&key.key_id, key.version, &secret)
            .await
            .unwrap();
        tx.commit().await.unwrap();
        rotated
    };
    let [two, three, four] = ["two", "three", "four"].map(|secret| secret_key().digest(secret.as_bytes()));

    let second = rotate(&first, "two", Some(at(60))).await.unwrap();
    assert!(second.is_opened_by(&first.secret_digest, NOW) && second.is_opened_by(&two, NOW));
    assert!(!second.is_opened_by(&first.secret_digest, at(60)));
    assert_eq!(rotate(&first, "lost race", None).await, None);

    // A second rotation ends the oldest secret; one without overlap the former at once.
    let third = rotate(&second, "three", Some(at(60))).await.unwrap();
    assert!(!third.is_opened_by(&first.secret_digest, NOW));
    assert!(third.is_opened_by(&two, NOW) && third.is_opened_by(&three, NOW));
    let fourth = rotate(&third, "four", None).await.unwrap();
    assert!(!fourth.is_opened_by(&three, NOW) && fourth.is_opened_by(&four, NOW));

    revoked(&world.store, &first.key_id).await.unwrap();
    let now = world.store.api_key(&first.key_id).await.unwrap().unwrap();
    assert_eq!(rotate(&now, "five", None).await, None, "it is revoked");
}

async fn a_key_is_deleted_only_when_it_opens_nothing(db: Db) {
    let world = World::new(db).await;
    let key = stored(&world.store, &new_key("a")).await;
    let ending = NewApiKey {
        expires_at: Some(at(60)),
        ..new_key("b")
    };
    let ending = stored(&world.store, &ending).await;

    assert!(!deleted(&world.store, &key.key_id, NOW).await);
    let once = revoked(&world.store, &key.key_id).await.unwrap();
    assert_eq!((once.status(NOW), once.version), (KeyStatus::Revoked, 2));
    assert_eq!(
        revoked(&world.store, &key.key_id).await.unwrap(),
        once,
        "twice is once"
    );
    assert!(deleted(&world.store, &key.key_id, NOW).await);
    assert_eq!(revoked(&world.store, &key.key_id).await, None);

    assert!(!deleted(&world.store, &ending.key_id, at(59)).await);
    assert!(deleted(&world.store, &ending.key_id, at(60)).await);
    assert!(!world.store.has_api_keys().await.unwrap());
}

async fn keys_are_listed_by_status_and_name(db: Db) {
    let world = World::new(db).await;
    let one = stored(&world.store, &new_key("one")).await;
    let two = stored(&world.store, &new_key("two")).await;
    let three = NewApiKey {
        expires_at: Some(at(60)),
        ..new_key("one")
    };
    let three = stored(&world.store, &three).await;
    revoked(&world.store, &two.key_id).await.unwrap();
    let list = async |status, name: Option<&str>, before, now| {
        let filter = KeyFilter {
            status,
            name: name.map(str::to_owned),
            before,
        };
        let keys = world.store.api_keys(&filter, 2, now).await.unwrap();
        keys.into_iter().map(|key| key.key_id).collect::<Vec<_>>()
    };
    let [one_id, two_id, three_id] = [&one, &two, &three].map(|key| key.key_id.clone());

    assert_eq!(
        list(None, None, None, NOW).await,
        [three_id.clone(), two_id.clone()]
    );
    assert_eq!(
        list(None, None, Some(two.key_number), NOW).await,
        std::slice::from_ref(&one_id)
    );
    assert_eq!(
        list(None, Some("one"), None, NOW).await,
        [three_id.clone(), one_id.clone()]
    );
    assert_eq!(list(Some(KeyStatus::Revoked), None, None, NOW).await, [two_id]);
    assert_eq!(
        list(Some(KeyStatus::Expired), None, None, at(60)).await,
        [three_id]
    );
    assert_eq!(list(Some(KeyStatus::Active), None, None, at(60)).await, [one_id]);
}

async fn a_raised_cap_lets_waiting_jobs_run(db: Db) {
    let world = World::new(db).await;
    let mut new = new_key("a");
    new.rights.max_running_jobs = Some(1);
    let key = stored(&world.store, &new).await;
    for _ in 0..3 {
        world.submit(job(&key.key_id)).await;
    }
    assert!(world.claim().await.is_some());
    assert!(world.claim().await.is_none(), "one at a time");

    let mut tx = world.store.begin().await.unwrap();
    let mut wanted = key.clone();
    wanted.rights.max_running_jobs = Some(2);
    tx.update_api_key(&wanted, 16).await.unwrap().unwrap();
    tx.commit().await.unwrap();

    assert!(world.tickets().await > 0);
    assert!(world.claim().await.is_some());
    assert!(world.claim().await.is_none());
    assert_eq!(world.faults().await, Vec::<String>::new());
}

async fn keys_without_a_cap_follow_the_service(db: Db) {
    let world = World::new(db).await;
    let plain = stored(&world.store, &new_key("a")).await;
    let mut capped = new_key("b");
    capped.rights.max_running_jobs = Some(3);
    let capped = stored(&world.store, &capped).await;

    world
        .store
        .put_key_defaults(7, MicroUsd(1_000_000), NOW)
        .await
        .unwrap();

    let lane = async |key: &ApiKey| {
        let sql = format!("select max_running from lane where key_id = '{}'", key.key_id);
        world.number(&sql).await
    };
    assert_eq!((lane(&plain).await, lane(&capped).await), (7, 3));
}

async fn a_database_knows_its_secret_key(db: Db) {
    let world = World::new(db).await;
    let other = SecretKey::new("another-secret-key-for-tests").unwrap();

    assert!(world.store.bind_secret(secret_key().check()).await.unwrap());
    assert!(world.store.bind_secret(secret_key().check()).await.unwrap());
    assert!(!world.store.bind_secret(other.check()).await.unwrap());
}

async fn the_jobs_of_a_key_are_counted_and_listed(db: Db) {
    let world = World::new(db).await;
    let key = stored(&world.store, &new_key("a")).await;
    let other = stored(&world.store, &new_key("b")).await;
    world.submit(job(&other.key_id)).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(world.submit(job(&key.key_id)).await.job_id);
    }
    world.cancel(&world.job(waiting[0]).await).await;

    assert_eq!(world.store.queued_jobs(&key.key_id, 100).await.unwrap(), 2);
    assert_eq!(world.store.queued_jobs(&key.key_id, 1).await.unwrap(), 1);
    let listed = world.store.unended_jobs(&key.key_id, 10).await.unwrap();
    assert_eq!(listed, [waiting[2], waiting[1]]);
    assert_eq!(
        world.store.unended_jobs(&key.key_id, 1).await.unwrap(),
        [waiting[2]]
    );
}

async fn a_limit_admits_exactly_as_many_as_it_says(db: Db) {
    let world = World::new(db).await;
    let rate = Rate::new(30, 60);
    let callers: Vec<_> = (0..16)
        .map(|_| {
            let store = world.store.clone();
            tokio::spawn(async move {
                let mut granted = 0;
                for _ in 0..10 {
                    granted += i64::from(store.take_at("k:submit", rate, Some(NOW)).await.unwrap().granted);
                }
                granted
            })
        })
        .collect();

    let mut granted = 0;
    for caller in callers {
        granted += caller.await.unwrap();
    }

    assert_eq!(granted, 30);
    let other = world
        .store
        .take_at("other:submit", rate, Some(NOW))
        .await
        .unwrap();
    assert_eq!((other.granted, other.remaining(), other.used()), (true, 29, 1));
}

async fn processes_that_share_a_database_share_a_limit(db: Db) {
    let world = World::new(db).await;
    let other = world.other().await;
    let rate = Rate::new(5, 3_600);

    let mut granted = 0;
    for _ in 0..10 {
        granted += i64::from(world.store.take("k:read", rate).await.unwrap().granted);
        granted += i64::from(other.take("k:read", rate).await.unwrap().granted);
    }

    assert_eq!(granted, 5);
    let quota = other.quota("k:read", rate).await.unwrap();
    assert_eq!((quota.granted, quota.remaining()), (false, 0));
    world.store.sweep_limits(clock::now()).await.unwrap();
    assert!(
        !other.take("k:read", rate).await.unwrap().granted,
        "only full buckets are swept"
    );
}

/// Numbers that look random and are the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: i64) -> i64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        i64::try_from(self.0 >> 33).unwrap() % limit
    }
}

async fn a_limit_keeps_its_word_in_every_history(db: Db) {
    let world = World::new(db).await;
    let mut dice = Dice(7);
    for history in 0..60 {
        let rate = Rate::new(1 + dice.below(40), 1 + dice.below(120));
        let bucket = format!("history {history}");
        let take = async |now: Timestamp| world.store.take_at(&bucket, rate, Some(now)).await.unwrap();
        let mut now = Timestamp(NOW.0 + dice.below(1_000_000));
        for step in 0..12 {
            now = Timestamp(now.0 + dice.below(rate.window_seconds() * 1_000_000 / 4));
            let quota = take(now).await;
            let place = format!("{rate:?}, history {history}, step {step}: {quota:?}");
            assert_eq!(quota.used() + quota.remaining(), rate.limit(), "{place}");
            match dice.below(4) {
                // `Remaining` calls pass right now, and not one more.
                0 => {
                    for _ in 0..quota.remaining() {
                        assert!(take(now).await.granted, "{place}");
                    }
                    now = check_refusal(&take, take(now).await, &place).await;
                }
                // The first second at which more is promised, there is more, and a second earlier there isn't.
                1 => {
                    if let Some(seconds) = quota.more_in() {
                        let later =
                            |seconds: i64| quota.after(Duration::from_secs(u64::try_from(seconds).unwrap()));
                        assert!(later(seconds).remaining() > quota.remaining(), "{place}");
                        assert_eq!(later(seconds - 1).remaining(), quota.remaining(), "{place}");
                    }
                }
                // At `Reset` the whole limit is back.
                2 => {
                    now = Timestamp(now.0.max(quota.reset() * 1_000_000));
                    let first = take(now).await;
                    assert!(
                        first.granted && first.remaining() == rate.limit() - 1,
                        "{place}: {first:?}"
                    );
                    for _ in 1..rate.limit() {
                        assert!(take(now).await.granted, "{place}");
                    }
                    assert!(!take(now).await.granted, "{place}");
                }
                _ if !quota.granted => now = check_refusal(&take, quota, &place).await,
                _ => {}
            }
        }
    }
}

/// The call after `Retry-After` passes, the one a second earlier doesn't; when that was.
async fn check_refusal(take: &impl AsyncFn(Timestamp) -> Quota, refused: Quota, place: &str) -> Timestamp {
    assert!(
        !refused.granted && refused.remaining() == 0,
        "{place}: {refused:?}"
    );
    let after = refused.retry_after();
    let early = Timestamp(refused.now.0 + (after - 1) * 1_000_000);
    assert!(!take(early).await.granted, "{place}: {refused:?}");
    let then = Timestamp(refused.now.0 + after * 1_000_000);
    assert!(take(then).await.granted, "{place}: {refused:?}");
    then
}

async fn neither_a_clock_that_goes_back_nor_a_lowered_limit_locks_out_for_long(db: Db) {
    let world = World::new(db).await;
    let rate = Rate::new(10, 60);
    for _ in 0..10 {
        world.store.take_at("k", rate, Some(at(86_400))).await.unwrap();
    }

    // A day earlier: the bucket is as empty as it can be, and not emptier.
    let refused = world.store.take_at("k", rate, Some(NOW)).await.unwrap();
    assert_eq!((refused.granted, refused.retry_after()), (false, 6));
    assert!(world.store.take_at("k", rate, Some(at(6))).await.unwrap().granted);

    // Who wasn't at the limit isn't after a step either.
    for _ in 0..5 {
        world.store.take_at("half", rate, Some(at(86_400))).await.unwrap();
    }
    let granted = world.store.take_at("half", rate, Some(NOW)).await.unwrap();
    assert_eq!((granted.granted, granted.remaining()), (true, 4));

    let shorter = Rate::new(10, 5);
    let refused = world.store.take_at("k", shorter, Some(at(6))).await.unwrap();
    assert_eq!((refused.granted, refused.retry_after()), (false, 1));
}

async fn streams_are_counted_over_processes(db: Db) {
    let world = World::new(db).await;
    let other = world.other().await;
    let key_id = KeyId::known("key_12345678");
    let [one, two] = [Uuid::new_v4(), Uuid::new_v4()];

    let first = world
        .store
        .open_stream(&key_id, one, 2, NOW, at(30))
        .await
        .unwrap()
        .expect("the first");
    other
        .open_stream(&key_id, two, 2, NOW, at(30))
        .await
        .unwrap()
        .expect("the second");
    assert_eq!(
        other.open_stream(&key_id, two, 2, NOW, at(30)).await.unwrap(),
        None
    );
    assert!(
        other
            .open_stream(&KeyId::known("another"), two, 2, NOW, at(30))
            .await
            .unwrap()
            .is_some(),
        "another key's"
    );

    world.store.close_stream(first).await.unwrap();
    let renewed = other
        .open_stream(&key_id, two, 2, NOW, at(30))
        .await
        .unwrap()
        .expect("in its place");

    // The second one's process has died, or doesn't know of it.
    other.renew_stream(renewed, at(60)).await.unwrap();
    other.renew_stream(first, at(60)).await.unwrap();
    assert_eq!(
        world
            .store
            .open_stream(&key_id, one, 1, at(40), at(70))
            .await
            .unwrap(),
        None
    );
    assert!(
        world
            .store
            .open_stream(&key_id, one, 1, at(60), at(90))
            .await
            .unwrap()
            .is_some()
    );
    world.store.sweep_limits(at(61)).await.unwrap();

    let opening: Vec<_> = (0..8)
        .map(|_| {
            let (store, key_id) = (world.store.clone(), KeyId::known("key_burst000"));
            tokio::spawn(async move { store.open_stream(&key_id, one, 3, NOW, at(30)).await.unwrap() })
        })
        .collect();
    let mut opened = 0;
    for stream in opening {
        opened += usize::from(stream.await.unwrap().is_some());
    }
    assert_eq!(opened, 3, "in a burst too");
}

async fn refused_authentications_are_counted_and_changes_noted(db: Db) {
    let world = World::new(db).await;
    let entry = AuditEntry {
        at: NOW,
        actor: "key_12345678".to_owned(),
        action: "key.create",
        object_id: "key_87654321".to_owned(),
        address: "127.0.0.1".to_owned(),
        request_id: "r1".to_owned(),
        detail: json!({"name": "a"}),
    };
    world.store.audit(&entry).await.unwrap();
    let refused = |address: &str| Refused {
        address: address.to_owned(),
        key_id: String::new(),
    };
    for seconds in [1, 2, 3_600] {
        let counts = [(refused("10.0.0.1"), 3), (refused("10.0.0.2"), 1)];
        world.store.count_refused(&counts, at(seconds)).await.unwrap();
    }

    let rows = world.store.audit_entries("", 0, 100).await.unwrap();
    let counts = rows
        .iter()
        .map(|row| (row.action.as_str(), row.address.as_str(), row.times))
        .collect::<Vec<_>>();
    assert_eq!(
        counts,
        [
            ("auth.refused", "10.0.0.2", 1),
            ("auth.refused", "10.0.0.1", 3),
            ("auth.refused", "10.0.0.2", 2),
            ("auth.refused", "10.0.0.1", 6),
            ("key.create", "127.0.0.1", 1),
        ]
    );
    assert_eq!(rows[4].detail, json!({"name": "a"}).to_string());
    let page = world
        .store
        .audit_entries("", rows[2].audit_number, 1)
        .await
        .unwrap();
    assert_eq!(page, [rows[3].clone()]);
    assert_eq!(
        world.store.audit_entries("key_12345678", 0, 10).await.unwrap(),
        [rows[4].clone()]
    );

    world.store.sweep_audit(at(200 * 86_400)).await.unwrap();
    assert_eq!(
        world.store.audit_entries("", 0, 10).await.unwrap(),
        [rows[4].clone()]
    );
}

async fn reading_never_waits_for_the_writer_of_jobs() {
    let world = World::new(Db::Sqlite).await;
    let writer = world.store.begin().await.unwrap();

    // If it waited, it would be for so long that it failed.
    let taken = world.store.take("k:read", Rate::new(6_000, 60)).await;

    assert!(taken.unwrap().granted);
    writer.rollback().await.unwrap();
}

async fn a_spoilt_file_of_limits_is_begun_anew() {
    let world = World::new(Db::Sqlite).await;
    world.store.take("k", Rate::new(1, 3_600)).await.unwrap();
    world.store.close().await;
    let path = world.database.url().trim_start_matches("sqlite://").to_owned();
    for ending in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{path}.limits{ending}"));
    }
    std::fs::write(
        format!("{path}.limits"),
        b"this is not a database, but some bytes that are",
    )
    .unwrap();

    let store = world.other().await;

    assert!(store.take("k", Rate::new(1, 3_600)).await.unwrap().granted);
}
