//! Jobs of one session or one concurrency key run one at a time, in order of submission.

use super::{NOW, World, again, at, failed, grouped, job};
use shared::id::KeyId;
use shared::job::{Ending, Job, JobStatus, NewJob};
use tests::database::Db;

tests::both!(
    a_group_runs_one_at_a_time_in_order,
    a_delayed_head_holds_its_group,
    a_delayed_job_behind_the_head_still_waits_for_its_time,
    a_cancelled_head_lets_the_next_go_on,
    a_cancelled_job_in_the_middle_changes_nothing,
    a_retry_keeps_its_place,
    groups_do_not_wait_for_each_other,
    a_high_priority_does_not_overtake_within_a_group,
    two_that_submit_to_a_group_at_once_make_one_head
);

async fn three(world: &World, key: &KeyId) -> [Job; 3] {
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(world.submit(grouped(key, "g")).await);
    }
    jobs.try_into().unwrap()
}

async fn a_group_runs_one_at_a_time_in_order(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let jobs = three(&world, &key).await;
    assert_eq!(
        jobs.each_ref().map(|job| job.hold.as_str()),
        ["", "order", "order"]
    );

    for (number, ending) in [Ending::Done, failed(), Ending::Cancelled]
        .into_iter()
        .enumerate()
    {
        let lease = world.claim_job(&jobs[number]).await;
        assert!(world.claim().await.is_none(), "the others wait for it");
        world.finish(&lease, ending).await;
        assert_eq!(world.faults().await, [""; 0]);
    }
    let after = world.submit(grouped(&key, "g")).await;
    assert_eq!(after.hold, "", "nobody is before it");
}

async fn a_delayed_head_holds_its_group(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let head = world
        .submit(NewJob {
            run_after: Some(at(60)),
            ..grouped(&key, "g")
        })
        .await;
    let next = world.submit(grouped(&key, "g")).await;
    assert_eq!((head.hold.as_str(), next.hold.as_str()), ("delay", "order"));
    assert!(world.claim().await.is_none());

    world.store.sweep(at(60)).await.unwrap();

    let lease = world.claim_job(&head).await;
    world.finish(&lease, Ending::Done).await;
    world.claim_job(&next).await;
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_delayed_job_behind_the_head_still_waits_for_its_time(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let head = world.submit(grouped(&key, "g")).await;
    let next = world
        .submit(NewJob {
            run_after: Some(at(60)),
            ..grouped(&key, "g")
        })
        .await;
    assert_eq!(next.hold, "order");
    let lease = world.claim_job(&head).await;

    world.finish(&lease, Ending::Done).await;

    assert_eq!(world.job(next.job_id).await.hold, "delay");
    assert!(world.claim().await.is_none());
    world.store.sweep(at(60)).await.unwrap();
    world.claim_job(&next).await;
}

async fn a_cancelled_head_lets_the_next_go_on(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let [head, second, third] = three(&world, &key).await;
    let tickets = world.tickets().await;

    world.cancel(&head).await;

    assert_eq!(world.tickets().await, tickets + 1);
    assert_eq!(world.faults().await, [""; 0]);
    let lease = world.claim_job(&second).await;
    assert_eq!(world.status(&third).await, JobStatus::Queued);
    world.finish(&lease, Ending::Done).await;
    world.claim_job(&third).await;
}

async fn a_cancelled_job_in_the_middle_changes_nothing(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let [head, second, third] = three(&world, &key).await;
    let lease = world.claim_job(&head).await;

    world.cancel(&second).await;

    assert!(world.claim().await.is_none());
    assert_eq!(world.faults().await, [""; 0]);
    world.finish(&lease, Ending::Done).await;
    world.claim_job(&third).await;
}

async fn a_retry_keeps_its_place(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let [head, second, _] = three(&world, &key).await;
    for ending in [again(NOW), Ending::Released] {
        let lease = world.claim_job(&head).await;
        world.finish(&lease, ending).await;
    }
    let lease = world.claim_job(&head).await;
    world.finish(&lease, again(at(60))).await;
    assert!(world.claim().await.is_none(), "it still comes first");

    world.store.sweep(at(60)).await.unwrap();
    let lease = world.claim_job(&head).await;
    world.finish(&lease, again(at(120))).await;
    assert_eq!(world.status(&head).await, JobStatus::Failed, "its third failure");
    world.claim_job(&second).await;
    assert_eq!(world.faults().await, [""; 0]);
}

async fn groups_do_not_wait_for_each_other(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 10).await, world.key("b", 10).await);
    for wanted in [
        grouped(&a, "g"),
        grouped(&a, "h"),
        grouped(&b, "g"),
        job(&a),
        job(&a),
    ] {
        assert_eq!(world.submit(wanted).await.hold, "");
    }
    for _ in 0..5 {
        assert!(world.claim().await.is_some());
    }
}

async fn a_high_priority_does_not_overtake_within_a_group(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let first = world
        .submit(NewJob {
            priority: -3,
            ..grouped(&key, "g")
        })
        .await;
    let urgent = world
        .submit(NewJob {
            priority: 9,
            ..grouped(&key, "g")
        })
        .await;
    let plain = world.submit(job(&key)).await;

    world.claim_job(&plain).await;
    let lease = world.claim_job(&first).await;
    assert!(world.claim().await.is_none());
    world.finish(&lease, Ending::Done).await;
    world.claim_job(&urgent).await;
}

async fn two_that_submit_to_a_group_at_once_make_one_head(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 10).await;
    let other = world.other().await;

    let submitted: Vec<_> = (0..24)
        .map(|number| {
            let store = if number % 2 == 0 {
                world.store.clone()
            } else {
                other.clone()
            };
            let wanted = grouped(&key, "g");
            tokio::spawn(async move {
                let mut tx = store.begin().await.unwrap();
                let stored = tx.insert_job(&wanted).await.unwrap();
                tx.commit().await.unwrap();
                stored
            })
        })
        .collect();
    let mut heads = 0;
    for stored in submitted {
        heads += usize::from(stored.await.unwrap().hold.is_empty());
    }

    assert_eq!(heads, 1);
    assert_eq!(world.faults().await, [""; 0]);
    let mut last = 0;
    while let Some(lease) = world.claim().await {
        assert!(lease.job.job_number > last);
        last = lease.job.job_number;
        world.finish(&lease, Ending::Done).await;
    }
    assert_eq!(
        world
            .number("select count(*) from job where status = 'done'")
            .await,
        24
    );
}
