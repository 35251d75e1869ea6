//! What ended jobs leave is removed: once, the oldest first, and nothing that counts.

use super::{World, at, job, report};
use shared::job::{Ending, Job, JobStatus};
use shared::storage::{Removal, Workspace};
use tests::database::Db;

tests::both!(
    the_data_of_an_ended_job_is_removed_once,
    expired_jobs_are_those_that_ended_before,
    an_owner_removes_data_and_leaves_the_workspace_to_a_worker,
    all_who_remove_at_once_get_the_same_answer
);

tests::once!(removed_text_leaves_the_files_of_a_sqlite_database);

async fn removed_text_leaves_the_files_of_a_sqlite_database() {
    const WORD: &str = "xylophone-4711-";
    let world = World::new(Db::Sqlite).await;
    let key = world.key("a", 1).await;
    let mut new = job(&key);
    // Longer than a page.
    new.message = WORD.repeat(2_000);
    let stored = world.submit(new).await;
    let lease = world.claim_job(&stored).await;
    world.finish(&lease, Ending::Done).await;
    let file = world.store.file().unwrap();
    let holds = || {
        ["", "-wal"].map(|ending| {
            let file = format!("{}{ending}", file.display());
            let bytes = std::fs::read(file).unwrap_or_default();
            bytes.windows(WORD.len()).any(|part| part == WORD.as_bytes())
        })
    };
    world.store.erase_deleted().await.unwrap();
    assert_eq!(holds(), [true, false]);

    let removed = world.store.remove_data(stored.job_id, Workspace::Gone).await;
    assert_eq!(removed.unwrap(), Removal::Removed);
    world.store.erase_deleted().await.unwrap();

    assert_eq!(holds(), [false, false]);
}

/// A job that ended at this second.
async fn ended(world: &World, key: &shared::id::KeyId, second: u64) -> Job {
    let stored = world.submit(job(key)).await;
    let lease = world.claim_job(&stored).await;
    world
        .store
        .finish(&lease, &report(Ending::Done), at(second))
        .await
        .unwrap();
    stored
}

async fn the_data_of_an_ended_job_is_removed_once(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 1).await;
    let stored = world.submit(job(&key)).await;
    let remove = async || {
        let removed = world.store.remove_data(stored.job_id, Workspace::Gone).await;
        (removed.unwrap(), world.job(stored.job_id).await.version)
    };
    assert_eq!(remove().await.0, Removal::Active, "it waits");
    let lease = world.claim_job(&stored).await;
    assert_eq!(remove().await.0, Removal::Active, "it runs");
    world.finish(&lease, Ending::Done).await;

    let first = remove().await;
    assert_eq!(first.0, Removal::Removed);
    assert_eq!(remove().await, first, "again changes nothing");
    let unknown = world
        .store
        .remove_data(shared::id::JobId::new(), Workspace::Gone)
        .await;
    assert_eq!(unknown.unwrap(), Removal::NoSuchJob);

    let left = world.job(stored.job_id).await;
    assert_eq!((left.status, left.data_removed), (JobStatus::Done, true));
    let details = world.details(stored.job_id).await;
    assert_eq!(details.message, "");
    assert_eq!(details.result, None);
    assert_eq!(world.events(&stored).await, [""; 0]);
    let kept = "select count(*) from attempt where stderr_tail is null";
    assert_eq!(world.number(kept).await, 1);
    assert_eq!(
        world.number("select cost from ledger").await,
        120_000,
        "money stays"
    );
    assert_eq!(world.faults().await, [""; 0]);
}

async fn expired_jobs_are_those_that_ended_before(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let mut jobs = Vec::new();
    for second in [10, 20, 20, 30] {
        jobs.push(ended(&world, &key, second).await);
    }
    world.submit(job(&key)).await;
    let ids: Vec<_> = jobs.iter().map(|job| job.job_id).collect();
    let expired = async |after: Option<&Job>| world.store.expired_jobs(at(30), after).await.unwrap();
    let ids_of = |jobs: Vec<Job>| jobs.into_iter().map(|job| job.job_id).collect::<Vec<_>>();

    let all = expired(None).await;
    assert_eq!(ids_of(expired(Some(&all[0])).await), ids[1..3]);
    assert_eq!(ids_of(expired(Some(&all[1])).await), ids[2..3]);
    assert_eq!(ids_of(expired(Some(&all[2])).await), []);
    assert_eq!(ids_of(all), ids[..3]);
    world.store.remove_data(ids[0], Workspace::Gone).await.unwrap();
    assert_eq!(ids_of(expired(None).await), ids[1..3]);
}

async fn an_owner_removes_data_and_leaves_the_workspace_to_a_worker(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let (first, second) = (ended(&world, &key, 10).await, ended(&world, &key, 11).await);
    let left = async |after| {
        let jobs = world.store.workspaces_to_remove(after).await.unwrap();
        jobs.into_iter().map(|job| job.job_id).collect::<Vec<_>>()
    };
    assert_eq!(left(0).await, []);

    for job in [&first, &second] {
        let removed = world.store.remove_data(job.job_id, Workspace::Left).await;
        assert_eq!(removed.unwrap(), Removal::Removed);
        assert!(world.job(job.job_id).await.data_removed);
    }

    assert_eq!(left(0).await, [first.job_id, second.job_id]);
    assert_eq!(left(first.job_number).await, [second.job_id]);
    world.store.workspace_removed(first.job_id).await.unwrap();
    assert_eq!(left(0).await, [second.job_id]);
    // Retention doesn't come to it any more, and does not forget it.
    let again = world.store.remove_data(second.job_id, Workspace::Gone).await;
    assert_eq!(again.unwrap(), Removal::Removed);
    assert_eq!(left(0).await, [second.job_id]);
}

async fn all_who_remove_at_once_get_the_same_answer(db: Db) {
    let world = World::new(db).await;
    let key = world.key("a", 9).await;
    let stored = ended(&world, &key, 10).await;
    let version = world.job(stored.job_id).await.version;
    let removers: Vec<_> = (0..8)
        .map(|number| {
            let (store, job_id) = (world.store.clone(), stored.job_id);
            let workspace = if number % 2 == 0 {
                Workspace::Gone
            } else {
                Workspace::Left
            };
            tokio::spawn(async move { store.remove_data(job_id, workspace).await.unwrap() })
        })
        .collect();
    for remover in removers {
        assert_eq!(remover.await.unwrap(), Removal::Removed);
    }
    assert_eq!(world.job(stored.job_id).await.version, version + 1);
}
