//! Sessions: made, found, and brought up to date by their jobs.

use super::{NOW, World, at, job, report};
use shared::clock::Timestamp;
use shared::id::KeyId;
use shared::job::{CancelReason, Ending, Job, JobKind, JobStatus, NewJob, Resume};
use shared::money::MicroUsd;
use shared::session::Session;
use shared::storage::{JobPart, MessagesOf};
use tests::database::Db;

tests::both!(
    a_session_is_made_once_and_keeps_its_conversation,
    a_session_is_found_by_name_number_and_claude_session,
    sessions_are_listed_last_touched_first,
    a_job_resumes_what_its_session_left,
    a_session_used_long_ago_begins_anew_when_it_is_created_again,
    a_deleted_session_takes_no_job_and_frees_its_name,
    only_idle_sessions_give_way_to_new_ones,
    chats_go_before_other_jobs_of_their_key,
    a_session_and_its_job_in_one_transaction_do_not_deadlock_with_a_finish
);

async fn put(world: &World, key: &KeyId, name: &str, now: Timestamp) -> (Session, bool) {
    let mut tx = world.store.begin().await.unwrap();
    let put = tx
        .put_session(key, name, r#"{"model":"opus"}"#, NOW, now)
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
                    let (session, _) = tx.put_session(&key, "main", "{}", NOW, NOW).await.unwrap();
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

async fn a_session_used_long_ago_begins_anew_when_it_is_created_again(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    put(&world, &key, "main", at(5)).await;
    world
        .database
        .execute("update session set claude_session_id = 'c'")
        .await;
    let again = async |forgotten_before| {
        let mut tx = world.store.begin().await.unwrap();
        let (session, _) = tx
            .put_session(&key, "main", "{}", forgotten_before, at(5))
            .await
            .unwrap();
        tx.commit().await.unwrap();
        session.claude_session_id
    };
    assert_eq!(again(at(5)).await.as_deref(), Some("c"));
    assert_eq!(again(at(6)).await, None);
}

async fn a_deleted_session_takes_no_job_and_frees_its_name(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let (session, _) = put(&world, &key, "main", NOW).await;
    let running = in_session(&world, &key, &session).await;
    let waiting = in_session(&world, &key, &session).await;
    let lease = world.claim_job(&running).await;
    let usable = async || {
        let mut tx = world.store.begin().await.unwrap();
        let usable = tx.use_session(session.session_id, at(1)).await.unwrap();
        tx.commit().await.unwrap();
        usable
    };
    assert!(usable().await);

    assert!(
        world
            .store
            .delete_session(session.session_id, at(2))
            .await
            .unwrap()
    );

    assert!(
        !world
            .store
            .delete_session(session.session_id, at(2))
            .await
            .unwrap()
    );
    assert!(!usable().await);
    let named = [session.name.clone(), session.session_number.to_string()];
    for name in &named {
        assert!(world.store.session(Some(&key), name).await.unwrap().is_none());
    }
    assert_eq!(world.store.cancel_jobs_of_session(&session).await.unwrap(), 1);
    let waiting = world.store.job(waiting.job_id).await.unwrap().unwrap();
    assert_eq!(waiting.cancel_reason, Some(CancelReason::SessionDeleted));
    assert_eq!(waiting.status, JobStatus::Cancelled);
    world.finish(&lease, Ending::Cancelled).await;
    assert_eq!(world.store.cancel_jobs_of_session(&session).await.unwrap(), 0);
    let left = world.store.sessions_to_remove(0).await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(
        (left[0].session_id, left[0].settings.as_str()),
        (session.session_id, "{}")
    );
    world.store.session_removed(session.session_id).await.unwrap();
    assert!(world.store.sessions_to_remove(0).await.unwrap().is_empty());
    // Its jobs keep its name; a new session of that name is another one.
    let (new, is_new) = put(&world, &key, "main", at(3)).await;
    assert!(is_new && new.session_id != session.session_id);
    let details = world
        .store
        .job_details(running.job_id, None, None, JobPart::Brief)
        .await;
    assert_eq!(details.unwrap().unwrap().session_name.as_deref(), Some("main"));
    let exchanges = world
        .store
        .exchanges(MessagesOf::Key(&key), i64::MAX, 10)
        .await
        .unwrap();
    let numbers: Vec<_> = exchanges.iter().map(|exchange| exchange.job_number).collect();
    assert_eq!(numbers, [running.job_number], "what never ran was never said");
    assert_eq!(world.faults().await, [""; 0]);
}

async fn only_idle_sessions_give_way_to_new_ones(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let limited = async |name: &str, now| {
        let mut tx = world.store.begin().await.unwrap();
        let (session, _) = tx.put_session(&key, name, "{}", NOW, now).await.unwrap();
        let evicted = tx.limit_sessions(&session, 2, now).await.unwrap();
        match evicted {
            Some(evicted) => {
                tx.commit().await.unwrap();
                Some(
                    evicted
                        .into_iter()
                        .map(|session| session.name)
                        .collect::<Vec<_>>(),
                )
            }
            None => {
                tx.rollback().await.unwrap();
                None
            }
        }
    };
    assert_eq!(limited("first", at(1)).await, Some(vec![]));
    assert_eq!(limited("second", at(2)).await, Some(vec![]));
    let first = world.store.session(Some(&key), "first").await.unwrap().unwrap();
    in_session(&world, &key, &first).await;
    assert_eq!(limited("third", at(3)).await, Some(vec!["second".to_owned()]));
    let third = world.store.session(Some(&key), "third").await.unwrap().unwrap();
    in_session(&world, &key, &third).await;
    assert_eq!(limited("fourth", at(4)).await, None);
    let other = world.key("b", 1).await;
    assert!(
        put(&world, &other, "fourth", at(4)).await.1,
        "each key has its own"
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn chats_go_before_other_jobs_of_their_key(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let background = world.submit(job(&key)).await;
    let chat = world
        .submit(NewJob {
            kind: JobKind::Chat,
            ..job(&key)
        })
        .await;
    let position = async |job: &Job| {
        let details = world
            .store
            .job_details(job.job_id, None, None, JobPart::Brief)
            .await;
        details.unwrap().unwrap().position().unwrap().ahead
    };
    assert_eq!((position(&chat).await, position(&background).await), (0, 1));
    let first = world.claim().await.unwrap();
    assert_eq!(first.job.job_id, chat.job_id);
    assert_eq!(
        (first.job.max_turns, first.job.timeout_seconds),
        (Some(25), Some(60))
    );
    let second = world.claim().await.unwrap();
    assert_eq!(second.job.job_id, background.job_id);
    assert_eq!(second.job.max_turns, None);
}
