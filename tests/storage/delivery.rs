//! The outbox: a delivery is written with what it tells about, taken by one process at a time, sent with the same bytes,
//! and ends. None is lost, and none stays for ever.

use super::{NOW, World, at, job, report};
use shared::delivery::{ClaimedDelivery, DeliveryOutcome, DeliveryStatus, Endpoint};
use shared::id::{DeliveryId, EndpointId, KeyId};
use shared::job::{Ending, Job, NewJob};
use shared::storage::{Busy, DeliveryFilter, Resend, Store, Workspace};
use std::collections::BTreeSet;
use std::time::Duration;
use tests::database::Db;

tests::both!(
    a_delivery_is_taken_once_until_its_lease_runs_out,
    hosts_take_turns_and_busy_ones_wait,
    an_endpoint_that_only_fails_is_switched_off,
    what_ends_early_is_not_sent_again,
    a_changed_address_counts_for_what_waits,
    what_tells_of_progress_waits_once,
    what_nobody_delivers_is_forgotten,
    few_tickets_wait_for_those_who_deliver,
    a_key_that_ends_takes_its_endpoints_along
);

/// How long a claim holds.
const LEASE: Duration = Duration::from_mins(1);

/// An endpoint disables itself after this time.
const DISABLE_AFTER: Duration = Duration::from_hours(1);

async fn endpoint(world: &World, key_id: &KeyId, url: &str) -> Endpoint {
    let endpoint = Endpoint {
        endpoint_number: 0,
        endpoint_id: EndpointId::new(),
        key_id: key_id.clone(),
        url: url.to_owned(),
        event_types: String::new(),
        description: String::new(),
        payload: "full".to_owned(),
        headers: String::new(),
        secrets: String::new(),
        metadata: "{}".to_owned(),
        enabled: true,
        disabled_reason: None,
        first_failure_at: None,
        created_at: NOW,
        updated_at: NOW,
        version: 1,
    };
    let mut tx = world.store.begin().await.unwrap();
    let stored = tx.insert_endpoint(&endpoint).await.unwrap().unwrap();
    tx.commit().await.unwrap();
    stored
}

/// A job that was cancelled before it ran, which tells its own address.
async fn ended(world: &World, key_id: &KeyId, url: &str) -> Job {
    let stored = world
        .submit(NewJob {
            webhook_url: Some(url.to_owned()),
            ..job(key_id)
        })
        .await;
    world.cancel(&stored).await;
    stored
}

/// Takes what is due, as a process does: each delivery that has no bytes gets these.
async fn claim(store: &Store, busy: &Busy, body: &str, second: u64) -> Vec<ClaimedDelivery> {
    let due = store.due_deliveries(busy, at(second)).await.unwrap();
    let bodies: Vec<_> = due
        .iter()
        .filter(|delivery| !delivery.has_body)
        .map(|delivery| (delivery.delivery_id, body.to_owned()))
        .collect();
    let ids: Vec<_> = due.iter().map(|delivery| delivery.delivery_id).collect();
    if ids.is_empty() {
        return Vec::new();
    }
    store
        .claim_deliveries(&ids, &bodies, LEASE, at(second))
        .await
        .unwrap()
}

async fn claim_all(world: &World, second: u64) -> Vec<ClaimedDelivery> {
    claim(&world.store, &Busy::default(), "{}", second).await
}

/// An attempt that was answered with this status, or not made at all, and is made again in `retry` seconds.
fn outcome(
    delivery: &ClaimedDelivery,
    status: Option<u16>,
    second: u64,
    retry: Option<u64>,
) -> DeliveryOutcome {
    DeliveryOutcome {
        delivery: delivery.clone(),
        asked: status.is_some(),
        started_at: at(second),
        duration: Duration::from_millis(3),
        status_code: status,
        error_class: match status {
            Some(200) => None,
            Some(_) => Some("http_status"),
            None => Some("no_secret"),
        },
        snippet: "a snippet".to_owned(),
        retry_at: retry.map(|pause| at(second + pause)),
        gone: status == Some(410),
    }
}

async fn record(world: &World, outcomes: &[DeliveryOutcome], second: u64) {
    world
        .store
        .record_deliveries(outcomes, DISABLE_AFTER, at(second))
        .await
        .unwrap();
}

async fn statuses(world: &World) -> Vec<(DeliveryStatus, i64)> {
    let all = world
        .store
        .deliveries(&DeliveryFilter::default(), 1_000)
        .await
        .unwrap();
    all.iter().map(|one| (one.status, one.attempts)).collect()
}

async fn resend(world: &World, delivery_id: DeliveryId) -> Resend {
    let delivery = world.store.delivery(delivery_id).await.unwrap().unwrap();
    let mut tx = world.store.begin().await.unwrap();
    let again = tx.resend(&delivery, NOW).await.unwrap();
    tx.commit().await.unwrap();
    again
}

async fn a_delivery_is_taken_once_until_its_lease_runs_out(db: Db) {
    let world = World::new(db).await;
    let (key, other) = (world.key("a", 1).await, world.other().await);
    for number in 0..60 {
        ended(&world, &key, &format!("https://host-{}.example/", number % 7)).await;
    }

    let (one, two) = (Busy::default(), Busy::default());
    let (one, two) = tokio::join!(claim(&world.store, &one, "one", 1), claim(&other, &two, "two", 1));
    let rest = claim(&other, &Busy::default(), "three", 1).await;

    let taken: Vec<_> = [&one, &two, &rest].into_iter().flatten().collect();
    let ids: BTreeSet<_> = taken.iter().map(|one| one.delivery_id).collect();
    assert_eq!((taken.len(), ids.len()), (60, 60), "each is taken once");
    assert!(one.len() <= 50 && two.len() <= 50);
    assert!(claim(&other, &Busy::default(), "four", 59).await.is_empty());
    assert_eq!(world.store.next_delivery_at().await.unwrap(), Some(at(61)));

    // The one who took them is gone.
    let mut again = claim(&other, &Busy::default(), "five", 61).await;
    again.extend(claim(&other, &Busy::default(), "five", 61).await);
    assert_eq!(again.len(), 60);
    for delivery in &again {
        let before = taken.iter().find(|one| one.delivery_id == delivery.delivery_id);
        assert_eq!(delivery.body, before.unwrap().body, "the bytes are stored once");
    }

    // Both record: the first to do so counts.
    let late = outcome(taken[0], Some(500), 62, Some(5));
    record(&world, &[outcome(taken[0], Some(200), 62, None)], 62).await;
    record(&world, &[late], 63).await;
    let attempts = world.store.delivery_attempts(taken[0].delivery_id).await.unwrap();
    assert_eq!(attempts.len(), 1);
    assert_eq!((attempts[0].status_code, attempts[0].number), (Some(200), 1));
    assert_eq!(attempts[0].snippet, "a snippet");
}

async fn hosts_take_turns_and_busy_ones_wait(db: Db) {
    let world = World::new(db).await;
    let (first, second) = (world.key("a", 1).await, world.key("b", 1).await);
    for _ in 0..70 {
        ended(&world, &first, "https://dead.example/").await;
    }
    ended(&world, &first, "https://alive.example/").await;
    ended(&world, &second, "https://other.example:8443/").await;
    let hosts =
        |taken: Vec<ClaimedDelivery>| -> BTreeSet<String> { taken.into_iter().map(|one| one.host).collect() };
    let busy = |hosts: &[&str], keys: &[&KeyId]| Busy {
        hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        keys: keys.iter().map(|key| (*key).clone()).collect(),
    };
    let due = async |busy: &Busy| world.store.due_deliveries(busy, NOW).await.unwrap().len();

    assert_eq!(due(&busy(&["dead.example:443"], &[])).await, 2);
    assert_eq!(due(&busy(&["dead.example:443"], &[&first])).await, 1);
    assert_eq!(due(&busy(&[], &[&first, &second])).await, 0);
    assert_eq!(
        due(&busy(&["dead.example:44"], &[])).await,
        50,
        "a part of a name is no name"
    );
    let taken = claim_all(&world, 0).await;

    assert_eq!(taken.len(), 50);
    let all = ["alive.example:443", "dead.example:443", "other.example:8443"];
    assert_eq!(hosts(taken), all.map(str::to_owned).into());
}

async fn an_endpoint_that_only_fails_is_switched_off(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let failing = endpoint(&world, &key, "https://a.example/?token=secret").await;
    let hour = DISABLE_AFTER.as_secs();
    let submit = async || {
        let stored = world.submit(job(&key)).await;
        world.cancel(&stored).await;
    };
    let state = async || {
        let endpoint = world.store.endpoint(failing.endpoint_id).await.unwrap().unwrap();
        (
            endpoint.enabled,
            endpoint.first_failure_at,
            endpoint.disabled_reason,
        )
    };
    submit().await;
    let fail = async |second: u64, status: Option<u16>| {
        let taken = claim_all(&world, second).await;
        assert_eq!(taken.len(), 1);
        record(&world, &[outcome(&taken[0], status, second, Some(1))], second).await;
    };

    // A fault of the service counts against nobody.
    fail(1, None).await;
    assert_eq!(state().await, (true, None, None));
    fail(10, Some(500)).await;
    fail(10 + hour - 1, Some(500)).await;
    assert_eq!(state().await, (true, Some(at(10)), None));
    // A success begins anew.
    submit().await;
    let taken = claim_all(&world, 10 + hour).await;
    record(
        &world,
        &[outcome(&taken[0], Some(200), 10 + hour, None)],
        10 + hour,
    )
    .await;
    assert_eq!(state().await, (true, None, None));

    let other = endpoint(&world, &key, "https://b.example/").await;
    let begun = 20 + 2 * hour;
    fail(begun, Some(503)).await;
    fail(begun + hour, Some(503)).await;

    assert_eq!(
        state().await,
        (false, Some(at(begun)), Some("failing".to_owned()))
    );
    let told = claim_all(&world, begun + hour).await;
    assert_eq!(told.len(), 1, "nothing waits for it any more");
    assert_eq!(told[0].endpoint_id, Some(other.endpoint_id));
    assert!(told[0].body.contains("endpoint.disabled") && told[0].body.contains("failing"));
    assert!(!told[0].body.contains("secret"), "{}", told[0].body);
    assert_eq!(world.number("select endpoints from lane").await, 1);
}

async fn what_ends_early_is_not_sent_again(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let own = endpoint(&world, &key, "https://a.example/").await;
    let removed = ended(&world, &key, "https://b.example/").await;
    let taken = claim_all(&world, 0).await;
    assert_eq!(taken.len(), 2);
    let failed: Vec<_> = taken
        .iter()
        .map(|one| outcome(one, Some(500), 0, Some(5)))
        .collect();
    record(&world, &failed, 0).await;
    assert_eq!(statuses(&world).await, [(DeliveryStatus::Pending, 1); 2]);

    let mut tx = world.store.begin().await.unwrap();
    assert!(tx.delete_endpoint(own.endpoint_id, at(1)).await.unwrap());
    tx.commit().await.unwrap();
    world
        .store
        .remove_data(removed.job_id, Workspace::Gone)
        .await
        .unwrap();

    assert_eq!(statuses(&world).await, [(DeliveryStatus::Cancelled, 1); 2]);
    assert!(claim_all(&world, 3_600).await.is_empty());
    for delivery in &taken {
        // Neither the bytes nor the secret that signed them are there.
        let again = resend(&world, delivery.delivery_id).await;
        assert!(matches!(again, Resend::Gone), "{again:?}");
    }

    // What can't be read ends alone.
    ended(&world, &key, "https://b.example/").await;
    ended(&world, &key, "https://b.example/").await;
    let due = world.store.due_deliveries(&Busy::default(), at(1)).await.unwrap();
    world
        .store
        .end_unreadable(due[0].delivery_id, at(1))
        .await
        .unwrap();
    assert_eq!(claim_all(&world, 1).await.len(), 1);
}

async fn a_changed_address_counts_for_what_waits(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let mut own = endpoint(&world, &key, "https://old.example/").await;
    for _ in 0..2 {
        let stored = world.submit(job(&key)).await;
        world.cancel(&stored).await;
    }
    let taken = claim_all(&world, 0).await;
    let failed = [
        outcome(&taken[0], Some(500), 0, Some(5)),
        outcome(&taken[1], Some(500), 0, None),
    ];
    record(&world, &failed, 0).await;

    "https://new.example:8443/".clone_into(&mut own.url);
    let mut tx = world.store.begin().await.unwrap();
    tx.update_endpoint(&own, at(1)).await.unwrap().unwrap();
    tx.commit().await.unwrap();
    let again = resend(&world, taken[1].delivery_id).await;

    assert!(matches!(again, Resend::Pending(_)), "{again:?}");
    let again = resend(&world, taken[1].delivery_id).await;
    assert!(matches!(again, Resend::InProgress), "{again:?}");
    let sent = claim_all(&world, 5).await;
    assert_eq!(sent.len(), 2);
    for delivery in &sent {
        assert_eq!((&*delivery.url, &*delivery.host), (&*own.url, "new.example:8443"));
        let before = taken.iter().find(|one| one.delivery_id == delivery.delivery_id);
        assert_eq!(delivery.body, before.unwrap().body);
    }
}

async fn what_tells_of_progress_waits_once(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let mut own = endpoint(&world, &key, "https://a.example/").await;
    " job.progress ".clone_into(&mut own.event_types);
    let mut tx = world.store.begin().await.unwrap();
    tx.update_endpoint(&own, NOW).await.unwrap().unwrap();
    tx.commit().await.unwrap();
    let running = world
        .submit(NewJob {
            webhook_url: Some("https://b.example/".to_owned()),
            webhook_events: "progress".to_owned(),
            ..job(&key)
        })
        .await;
    let lease = world.claim_job(&running).await;
    let progress = async || world.store.announce_progress(&lease, NOW).await.unwrap();

    for _ in 0..3 {
        progress().await;
    }
    assert_eq!(statuses(&world).await, [(DeliveryStatus::Pending, 0); 2]);
    let taken = claim_all(&world, 0).await;
    record(&world, &[outcome(&taken[0], Some(200), 0, None)], 0).await;
    progress().await;

    assert_eq!(world.number("select count(*) from delivery").await, 3);
    world.finish(&lease, Ending::Done).await;
    progress().await;
    assert_eq!(
        world.number("select count(*) from delivery").await,
        3,
        "it has ended"
    );
}

async fn what_nobody_delivers_is_forgotten(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    ended(&world, &key, "https://a.example/").await;
    let sent = claim_all(&world, 0).await;
    record(&world, &[outcome(&sent[0], Some(200), 1, None)], 1).await;
    ended(&world, &key, "https://a.example/").await;

    assert_eq!(world.store.forget_deliveries(NOW).await.unwrap(), 0);
    let month = 30 * 24 * 3_600;
    assert_eq!(world.store.forget_deliveries(at(month)).await.unwrap(), 2);

    assert_eq!(world.number("select count(*) from delivery").await, 0);
    assert_eq!(world.number("select count(*) from delivery_attempt").await, 0);
}

async fn few_tickets_wait_for_those_who_deliver(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let tickets = async |queue: &str| {
        let table = match db {
            Db::Sqlite => "Jobs",
            Db::Postgres => "apalis.jobs",
        };
        let sql = format!("select count(*) from {table} where job_type = '{queue}' and status = 'Pending'");
        world.number(&sql).await
    };
    let plain = world.submit(job(&key)).await;
    world.cancel(&plain).await;
    assert_eq!(tickets("webhooks").await, 0, "nobody wants to hear of it");

    let one = world
        .submit(NewJob {
            webhook_url: Some("https://a.example/".to_owned()),
            ..job(&key)
        })
        .await;
    let lease = world.claim_job(&one).await;
    assert_eq!(tickets("webhooks").await, 0);
    world
        .store
        .finish(&lease, &report(Ending::Done), NOW)
        .await
        .unwrap();
    assert_eq!(
        tickets("webhooks").await,
        1,
        "in the transaction that ends the job"
    );

    for _ in 0..20 {
        ended(&world, &key, "https://a.example/").await;
    }
    assert_eq!(tickets("webhooks").await, 4);

    // A transaction that is rolled back leaves neither.
    let deliveries = world.number("select count(*) from delivery").await;
    let last = endpoint(&world, &key, "https://b.example/").await;
    let mut tx = world.store.begin().await.unwrap();
    tx.announce_test(&last, NOW).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(world.number("select count(*) from delivery").await, deliveries);
}

async fn a_key_that_ends_takes_its_endpoints_along(db: Db) {
    let world = World::new(db).await;
    let key = world.key("key_a", 1).await;
    let digest = "0".repeat(64);
    let insert = format!(
        "insert into api_key (key_id, name, secret_digest, last4, scopes, allowed_ips, allowed_models, metadata,
           created_at, created_by)
         values ('key_a', 'n', '{digest}', '', '', '[]', '[]', '{{}}', 0, 'cli')"
    );
    world.database.execute(&insert).await;
    let own = endpoint(&world, &key, "https://a.example/").await;
    let mut tx = world.store.begin().await.unwrap();
    tx.put_webhook_secret(&key, "sealed", NOW).await.unwrap();
    tx.commit().await.unwrap();
    ended(&world, &key, "https://b.example/").await;
    assert_eq!(world.number("select endpoints from lane").await, 1);

    let mut tx = world.store.begin().await.unwrap();
    tx.revoke_api_key(&key, None, at(1)).await.unwrap().unwrap();
    tx.commit().await.unwrap();

    let seen = world.store.endpoint(own.endpoint_id).await.unwrap().unwrap();
    assert_eq!(
        (seen.enabled, seen.disabled_reason.as_deref()),
        (false, Some("key_revoked"))
    );
    assert_eq!(world.number("select endpoints from lane").await, 0);
    let waiting = world.store.due_deliveries(&Busy::default(), at(1)).await.unwrap();
    assert_eq!(waiting.len(), 1, "a job's own address is told of its end");
    assert_eq!(waiting[0].endpoint_id, None);

    let mut tx = world.store.begin().await.unwrap();
    assert!(tx.delete_api_key(&key, at(2)).await.unwrap());
    tx.commit().await.unwrap();

    assert!(world.store.endpoint(own.endpoint_id).await.unwrap().is_none());
    assert!(world.store.webhook_secret(&key).await.unwrap().is_none());
    assert!(claim_all(&world, 2).await.is_empty());
}
