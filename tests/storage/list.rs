//! Lists of jobs, page by page, and a job's place in the queue.

use super::{World, at, grouped, job};
use serde_json::json;
use shared::job::{Ending, Job, JobKind, JobStatus, NewJob};
use shared::storage::{JobFilter, Position};
use tests::database::Db;

tests::both!(
    a_filter_shows_what_it_says,
    pages_show_every_job_once_while_new_ones_arrive,
    a_brief_list_cuts_the_prompt,
    a_place_in_the_queue_counts_only_the_owners_jobs,
    a_place_is_counted_up_to_a_thousand
);
tests::once!(an_ascending_page_ends_before_what_may_still_appear);

async fn listed(world: &World, filter: JobFilter) -> Vec<String> {
    let rows = world.store.jobs(&filter, 100).await.unwrap();
    rows.into_iter()
        .map(|details| details.job.custom_id.unwrap())
        .collect()
}

async fn a_filter_shows_what_it_says(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 9).await, world.key("b", 9).await);
    let mut tx = world.store.begin().await.unwrap();
    let (session, _) = tx.put_session(&a, "main", "{}", at(0), at(0)).await.unwrap();
    tx.commit().await.unwrap();
    let named = |name: &str, seconds, wanted: NewJob| NewJob {
        custom_id: Some(name.to_owned()),
        created_at: at(seconds),
        ..wanted
    };
    let done = world.submit(named("done", 1, job(&a))).await;
    let lease = world.claim_job(&done).await;
    world.finish(&lease, Ending::Done).await;
    world
        .submit(named(
            "chat",
            2,
            NewJob {
                kind: JobKind::Chat,
                ..job(&a)
            },
        ))
        .await;
    let session_id = Some(session.session_id);
    world
        .submit(named(
            "session",
            3,
            NewJob {
                session_id,
                ..job(&a)
            },
        ))
        .await;
    world.submit(named("other", 4, job(&b))).await;

    let own = JobFilter {
        key_id: Some(a.clone()),
        ..JobFilter::default()
    };
    let cases: Vec<(&str, JobFilter, &[&str])> = vec![
        ("all", JobFilter::default(), &["other", "session", "chat", "done"]),
        ("own", own.clone(), &["session", "chat", "done"]),
        (
            "own, oldest first",
            JobFilter {
                ascending: true,
                ..own.clone()
            },
            &["done", "chat", "session"],
        ),
        (
            "done",
            JobFilter {
                statuses: vec![JobStatus::Done],
                ..own.clone()
            },
            &["done"],
        ),
        (
            "two statuses",
            JobFilter {
                statuses: vec![JobStatus::Done, JobStatus::Queued],
                ..own.clone()
            },
            &["session", "chat", "done"],
        ),
        (
            "failed",
            JobFilter {
                statuses: vec![JobStatus::Failed],
                ..own.clone()
            },
            &[],
        ),
        (
            "a session's",
            JobFilter {
                session_id,
                ..own.clone()
            },
            &["session"],
        ),
        (
            "by the client's name",
            JobFilter {
                custom_id: Some("chat".to_owned()),
                ..own.clone()
            },
            &["chat"],
        ),
        (
            "another's by name",
            JobFilter {
                custom_id: Some("other".to_owned()),
                ..own.clone()
            },
            &[],
        ),
        (
            "jobs only",
            JobFilter {
                kind: Some(JobKind::Job),
                ..own.clone()
            },
            &["session", "done"],
        ),
        (
            "from a time on",
            JobFilter {
                created_after: Some(at(2)),
                ..own.clone()
            },
            &["session", "chat"],
        ),
        (
            "before a time",
            JobFilter {
                created_before: Some(at(2)),
                ..own
            },
            &["done"],
        ),
    ];
    for (what, filter, expected) in cases {
        assert_eq!(listed(&world, filter).await, expected, "{what}");
    }
}

async fn pages_show_every_job_once_while_new_ones_arrive(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let mut submitted = Vec::new();
    for _ in 0..7 {
        submitted.push(world.submit(job(&key)).await.job_number);
    }
    for ascending in [false, true] {
        let mut filter = JobFilter {
            key_id: Some(key.clone()),
            ascending,
            ..JobFilter::default()
        };
        let mut seen = Vec::new();
        while seen.len() < submitted.len() {
            let page = world.store.jobs(&filter, 3).await.unwrap();
            let numbers = page.iter().map(|details| details.job.job_number);
            seen.extend(numbers.filter(|number| submitted.contains(number)));
            filter.after = page.last().map(|details| details.job.job_number);
            world.submit(job(&key)).await;
        }
        if !ascending {
            seen.reverse();
        }
        assert_eq!(seen, submitted);
    }
}

async fn a_brief_list_cuts_the_prompt(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let message = "ä".repeat(300);
    world
        .submit(NewJob {
            message: message.clone(),
            metadata: json!({ "a": "b" }),
            ..job(&key)
        })
        .await;

    let listed = world.store.jobs(&JobFilter::default(), 1).await.unwrap();

    assert_eq!(listed[0].message, "ä".repeat(200));
    assert_eq!(world.details(listed[0].job.job_id).await.message, message);
}

async fn place(world: &World, job: &Job) -> i64 {
    world.details(job.job_id).await.position().unwrap().ahead
}

async fn a_place_in_the_queue_counts_only_the_owners_jobs(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 1).await);
    for _ in 0..5 {
        world.submit(job(&b)).await;
    }
    let first = world.submit(job(&a)).await;
    let second = world.submit(job(&a)).await;
    let urgent = world
        .submit(NewJob {
            priority: 3,
            ..job(&a)
        })
        .await;
    let head = world.submit(grouped(&a, "g")).await;
    let behind = world.submit(grouped(&a, "g")).await;
    let last = world.submit(grouped(&a, "g")).await;

    let mut places = Vec::new();
    for job in [&urgent, &first, &second, &head, &behind, &last] {
        places.push(place(&world, job).await);
    }
    assert_eq!(places, [0, 1, 2, 3, 1, 2]);

    world.claim_job(&urgent).await;
    assert_eq!(place(&world, &first).await, 0);
}

async fn a_place_is_counted_up_to_a_thousand(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let mut tx = world.store.begin().await.unwrap();
    for _ in 0..1000 {
        tx.insert_job(&job(&key)).await.unwrap();
    }
    let last = tx.insert_job(&job(&key)).await.unwrap();
    let beyond = tx.insert_job(&job(&key)).await.unwrap();
    tx.commit().await.unwrap();

    for job in [last, beyond] {
        let position = world.details(job.job_id).await.position().unwrap();
        assert_eq!(
            position,
            Position {
                ahead: 1000,
                capped: true
            }
        );
    }
}

async fn an_ascending_page_ends_before_what_may_still_appear() {
    let world = World::new(Db::Postgres).await;
    let key = world.key("a", 9).await;
    let ascending = async |after: Option<i64>| {
        let filter = JobFilter {
            ascending: true,
            after,
            ..JobFilter::default()
        };
        let jobs = world.store.jobs(&filter, 10).await.unwrap();
        jobs.into_iter()
            .map(|details| details.job.job_number)
            .collect::<Vec<_>>()
    };
    let first = world.submit(job(&key)).await.job_number;
    let mut late = world.store.begin().await.unwrap();
    let older = late.insert_job(&job(&key)).await.unwrap().job_number;
    let newer = world.submit(job(&key)).await.job_number;
    assert!(first < older && older < newer);

    assert_eq!(ascending(None).await, [first]);
    late.commit().await.unwrap();

    assert_eq!(ascending(Some(first)).await, [older, newer]);
    assert_eq!(ascending(Some(newer)).await, [0; 0]);
}
