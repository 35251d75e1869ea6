//! Sessions: made, found, and brought up to date by their jobs.

use super::{NOW, World, at, job, report};
use shared::clock::Timestamp;
use shared::id::KeyId;
use shared::job::{Ending, Job, NewJob, Resume};
use shared::money::MicroUsd;
use shared::session::Session;
use tests::database::Db;

tests::both!(
    a_session_is_made_once_and_keeps_its_conversation,
    a_session_is_found_by_name_number_and_claude_session,
    sessions_are_listed_last_touched_first,
    a_job_resumes_what_its_session_left,
    a_session_and_its_job_in_one_transaction_do_not_deadlock_with_a_finish
);

async fn put(world: &World, key: &KeyId, name: &str, now: Timestamp) -> (Session, bool) {
    let mut tx = world.store.begin().await.unwrap();
    let put = tx
        .put_session(key, name, r#"{"model":"opus"}"#, now)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    put
}

async fn in_session(world: &World, key: &KeyId, session: &Session) -> Job {
    world
        .submit(NewJob {
            session_id: Some(session.session_id),
            ..job(key)
        })
        .await
}

async fn a_session_is_made_once_and_keeps_its_conversation(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 1).await);

    let (first, new) = put(&world, &a, "main", NOW).await;
    assert!(new);
    world
        .database
        .execute("update session set claude_session_id = 'c', total_turns = 7")
        .await;
    let (second, new) = put(&world, &a, "main", at(5)).await;
    assert!(!new);
    assert_eq!((second.session_id, second.total_turns), (first.session_id, 7));
    assert_eq!((second.created_at, second.updated_at), (NOW, at(5)));
    assert_eq!(second.claude_session_id.as_deref(), Some("c"));
    let (other, new) = put(&world, &b, "main", NOW).await;
    assert!(new && other.session_id != first.session_id);
}

async fn a_session_is_found_by_name_number_and_claude_session(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 1).await);
    let (session, _) = put(&world, &a, "main", NOW).await;
    world
        .database
        .execute("update session set claude_session_id = 'abc'")
        .await;

    for text in [
        "main".to_owned(),
        session.session_number.to_string(),
        "abc".to_owned(),
    ] {
        let find = async |key| {
            world
                .store
                .session(key, &text)
                .await
                .unwrap()
                .map(|found| found.session_id)
        };
        assert_eq!(find(Some(&a)).await, Some(session.session_id), "{text}");
        assert_eq!(find(None).await, Some(session.session_id), "{text}");
        assert_eq!(find(Some(&b)).await, None, "{text} is another's");
    }
    // A number means a number: a name that looks like one hides nobody's session.
    let (named, _) = put(&world, &b, &session.session_number.to_string(), NOW).await;
    for owner in [Some(&a), None] {
        let found = world.store.session(owner, &named.name).await.unwrap().unwrap();
        assert_eq!(found.session_id, session.session_id);
    }
}

async fn sessions_are_listed_last_touched_first(db: Db) {
    let world = World::new(db).await;
    let (a, b) = (world.key("a", 1).await, world.key("b", 1).await);
    for (name, second) in [("one", 1), ("two", 2), ("three", 3)] {
        put(&world, &a, name, at(second)).await;
    }
    put(&world, &b, "other", at(9)).await;
    put(&world, &a, "one", at(4)).await;

    let names = async |key, offset, limit| {
        let (sessions, total) = world.store.sessions(key, offset, limit).await.unwrap();
        let names: Vec<_> = sessions.into_iter().map(|session| session.name).collect();
        (names.join(" "), total)
    };
    assert_eq!(names(Some(&a), 0, 2).await, ("one three".to_owned(), 3));
    assert_eq!(names(Some(&a), 2, 2).await, ("two".to_owned(), 3));
    assert_eq!(names(None, 0, 9).await, ("other one three two".to_owned(), 4));
}

async fn a_job_resumes_what_its_session_left(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let (session, _) = put(&world, &key, "main", NOW).await;
    let first = in_session(&world, &key, &session).await;
    let second = in_session(&world, &key, &session).await;
    assert_eq!(second.hold, "order", "a session's jobs run one at a time");
    assert_eq!(world.store.session_jobs(&session).await.unwrap(), (2, None));

    let lease = world.claim_job(&first).await;
    assert_eq!(lease.resume.len(), 0);
    assert_eq!(
        world.store.session_jobs(&session).await.unwrap(),
        (1, Some(first.job_id))
    );
    let done = report(Ending::Done);
    world.store.finish(&lease, &done, at(3)).await.unwrap();

    let left = world.store.session(None, &session.name).await.unwrap().unwrap();
    assert_eq!((left.total_cost, left.total_turns), (MicroUsd(120_000), 2));
    assert_eq!(
        (left.updated_at, left.claude_session_id),
        (at(3), done.claude_session_id.clone())
    );
    let lease = world.claim_job(&second).await;
    let of_session = Resume {
        claude_session_id: done.claude_session_id.unwrap(),
        interrupted: None,
    };
    assert_eq!(lease.resume, std::slice::from_ref(&of_session));

    // Cut off: its own attempt comes first. The session goes on from its last job that ended.
    world.finish(&lease, Ending::Released).await;
    let again = world.claim_job(&second).await;
    let own = Resume {
        claude_session_id: lease.job.claude_session_id.unwrap(),
        interrupted: Some(1),
    };
    assert_eq!(again.resume, [own, of_session]);
    assert_eq!(world.faults().await, [""; 0]);
}

async fn a_session_and_its_job_in_one_transaction_do_not_deadlock_with_a_finish(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 99).await;
    put(&world, &key, "main", NOW).await;

    let chats: Vec<_> = (0..4)
        .map(|_| {
            let (store, key) = (world.store.clone(), key.clone());
            tokio::spawn(async move {
                for _ in 0..10 {
                    let mut tx = store.begin().await.unwrap();
                    let (session, _) = tx.put_session(&key, "main", "{}", NOW).await.unwrap();
                    let session_id = Some(session.session_id);
                    tx.insert_job(&NewJob {
                        session_id,
                        ..job(&key)
                    })
                    .await
                    .unwrap();
                    tx.commit().await.unwrap();
                }
            })
        })
        .collect();
    let mut done = 0;
    while done < 40 {
        match world.claim().await {
            Some(lease) => {
                world.finish(&lease, Ending::Done).await;
                done += 1;
            }
            None => tokio::task::yield_now().await,
        }
    }
    for chat in chats {
        chat.await.unwrap();
    }
    assert_eq!(world.faults().await, [""; 0]);
}
