//! The database goes away and comes back, is locked, read-only or full, the disk has no room, the clock is set: nothing
//! accepted is lost, nothing is accepted that isn't stored, the log says it once, and nobody has to be restarted.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use sqlx::{Connection as _, Executor as _};
use tests::client::{Client, PATIENCE, Sse, Stream, at_once};
use tests::database::{Cluster, Database, Db};
use tests::disk::Disk;
use tests::proxy::Proxy;
use tests::script::{Step, answer, steps};
use tests::system::{self, System};
use tests::trace::assert_one_at_a_time;
use tests::{BUSY, both, eventually, once};

once!(
    postgresql_is_restarted_under_load,
    connections_are_cut_under_load,
    postgresql_falls_silent_under_load,
    postgresql_becomes_read_only,
    postgresql_runs_out_of_disk,
    a_locked_sqlite_file_is_waited_for,
    a_full_disk_refuses_what_it_cannot_hold,
    a_directory_that_cannot_be_written_is_told_at_the_start,
);
both!(
    a_worker_without_room_begins_nothing_and_fails_nothing,
    a_workspace_that_cannot_be_made_fails_no_job_for_good,
    a_stepped_clock_takes_no_lease,
);

/// Submits with one idempotency key until it is accepted; says how often it was refused, which it may be with a 503
/// and a time only.
async fn insist(client: &Client, number: usize, message: &str) -> (String, usize) {
    let mut refusals = 0;
    let body = json!({ "message": message, "max_attempts": 5 });
    let id = eventually(Duration::from_mins(1), "an accepted submission", async || {
        let request = client.request(reqwest::Method::POST, "/api/v1/jobs");
        let request = request
            .timeout(Duration::from_secs(40))
            .header("idempotency-key", format!("outage-{number}"));
        let answer = client.send(request.json(&body)).await;
        match answer.status {
            202 => Some(answer.json["data"]["id"].as_str().unwrap().to_owned()),
            409 => None,
            _ => {
                answer.assert_problem(503, "unavailable");
                assert!(!answer.header("retry-after").is_empty());
                refusals += 1;
                None
            }
        }
    })
    .await;
    (id, refusals)
}

/// Submits small traced jobs, one after the other, until told to stop; their ids and the number of refusals.
async fn keep_submitting(client: &Client, enough: &AtomicBool) -> (Vec<String>, usize) {
    let (mut ids, mut refusals) = (Vec::new(), 0);
    while !enough.load(Ordering::Relaxed) {
        let message = steps([Step::Sleep(100)])
            .traced(&format!("{}", ids.len()))
            .answering("fine")
            .prompt();
        let (id, refused) = insist(client, ids.len(), &message).await;
        ids.push(id);
        refusals += refused;
    }
    (ids, refusals)
}

/// All jobs end well, and no run of one overlapped another of it.
async fn all_end_well(system: &System, ids: &[String]) {
    let client = system.client();
    for job in at_once(ids.iter().map(|id| client.finished(id))).await {
        assert_eq!(job["status"], "done", "{job:#}");
        assert_one_at_a_time(&system.runs(job["id"].as_str().unwrap()));
    }
}

/// So do they, there are no others, and nothing is held any more.
async fn all_is_well(system: &System, ids: &[String]) {
    all_end_well(system, ids).await;
    let database = system.database();
    assert_eq!(
        database.number("select count(*) from job").await,
        i64::try_from(ids.len()).unwrap()
    );
    assert_eq!(
        database
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
    assert_eq!(
        database
            .number("select cast(sum(running) as bigint) from lane")
            .await,
        0
    );
}

/// A job that speaks first and then takes so many milliseconds, once it has spoken.
async fn long_job(client: &Client, millis: u64) -> String {
    let script = steps([Step::Say("begun".to_owned()), Step::Sleep(millis)]).answering("untouched");
    let id = client.play(&script).await;
    client.event(&id, "assistant").await;
    id
}

/// Such a job went on as if nothing had been.
async fn is_untouched(client: &Client, id: &str) {
    let job = client.finished(id).await;
    assert_eq!(
        (&job["result"]["content"], &job["attempt"]),
        (&json!("untouched"), &json!(1)),
        "{job:#}"
    );
}

/// The stream of a job that ends has brought every event once, in order.
async fn is_whole(mut stream: Stream) {
    let events = stream.rest().await;
    let numbers: Vec<_> = events.iter().filter_map(|event| event.id).collect();
    assert_eq!(
        numbers,
        (1..=numbers.len() as u64).collect::<Vec<_>>(),
        "{events:#?}"
    );
    let last = events.last().map(|Sse { event, .. }| event.as_str());
    assert_eq!(last, Some("done"), "{events:#?}");
}

async fn ready(client: &Client) -> u16 {
    client.get("/readyz").await.status
}

async fn becomes_ready(client: &Client) {
    eventually(PATIENCE, "ready", async || {
        (ready(client).await == 200).then_some(())
    })
    .await;
}

async fn becomes_unready(client: &Client) {
    eventually(PATIENCE, "not ready", async || {
        (ready(client).await == 503).then_some(())
    })
    .await;
    assert_eq!(client.get("/livez").await.status, 200);
    // The caller keeps the outage up until this returns, so the health check must come to say so, too.
    eventually(
        Duration::from_secs(30),
        "a health check that says so",
        async || {
            let health = client.get("/api/v1/health").await;
            assert_eq!(health.status, 200);
            (health.json["checks"]["database"] == "error").then_some(())
        },
    )
    .await;
}

/// Each process has told each outage once: when it began and when it was over. Nothing else is complained about.
/// `outages`: how many the first API process was seen in; another process may have met fewer of them.
async fn outages_were_told(system: &mut System, outages: RangeInclusive<usize>) {
    for (index, process) in system.processes().into_iter().enumerate() {
        let least = if index == 0 { *outages.start() } else { 1 };
        let told = eventually(PATIENCE, "the end of the outage in the log", async || {
            let written = process.written();
            let count = |words: &str| written.matches(words).count();
            let told = count("the database is unavailable");
            (told > 0 && told == count("the database is available again")).then_some(told)
        })
        .await;
        let written = process.written();
        let complaints = |line: &&str| line.contains("WARN") || line.contains("ERROR");
        let complaints: Vec<_> = written.lines().filter(complaints).collect();
        assert!(
            (least..=*outages.end()).contains(&told) && complaints.len() == told,
            "{told} outages told of {outages:?}: {complaints:#?}"
        );
    }
}

async fn postgresql_is_restarted_under_load() {
    let cluster = Cluster::start().await.unwrap();
    let database = Database::in_cluster(&cluster).await;
    let mut system = System::builder()
        .on(database)
        .workers(2)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let pids: Vec<_> = system.processes().iter().map(|process| process.pid()).collect();
    let mut long = vec![long_job(&client, 8_000).await];
    let stream = client.stream(&long[0], None).await;
    let enough = AtomicBool::new(false);

    let ((ids, _), ()) = tokio::join!(keep_submitting(&client, &enough), async {
        let jobs = async || system.database().number("select count(*) from job").await;
        for how in [Signal::INT, Signal::QUIT, Signal::INT] {
            becomes_ready(&client).await;
            let before = jobs().await;
            eventually(PATIENCE, "two more jobs", async || {
                (jobs().await >= before + 2).then_some(())
            })
            .await;
            cluster.stop(how).await;
            becomes_unready(&client).await;
            let refused = client.submit(&json!({ "message": "now?" })).await;
            refused.assert_problem(503, "unavailable");
            cluster.run().await.unwrap();
        }
        let back = Instant::now();
        becomes_ready(&client).await;
        assert!(back.elapsed() < BUSY, "{:?}", back.elapsed());
        enough.store(true, Ordering::Relaxed);
    });

    is_untouched(&client, &long[0]).await;
    is_whole(stream).await;
    long.extend(ids);
    all_is_well(&system, &long).await;
    let now: Vec<_> = system.processes().iter().map(|process| process.pid()).collect();
    assert_eq!(now, pids);
    outages_were_told(&mut system, 3..=3).await;
    drop(system);
    cluster.stop(Signal::QUIT).await;
}

async fn connections_are_cut_under_load() {
    let system = System::builder()
        .database(Db::Postgres)
        .workers(2)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let long = long_job(&client, 6_000).await;
    let stream = client.stream(&long, None).await;
    let enough = AtomicBool::new(false);

    let ((mut ids, _), ()) = tokio::join!(keep_submitting(&client, &enough), async {
        for _ in 0..12 {
            cut(&system).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        enough.store(true, Ordering::Relaxed);
    });

    every_cut_is_found_out(&client).await;
    is_untouched(&client, &long).await;
    is_whole(stream).await;
    ids.push(long);
    all_is_well(&system, &ids).await;
}

/// Ends every connection to the system's database but the one that does so.
async fn cut(system: &System) {
    let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity
               where datname = current_database() and pid <> pg_backend_pid()";
    system.database().number(cut).await;
}

/// A connection that was cut is found out when it is used, unless it lay idle for long: that one read is refused.
async fn every_cut_is_found_out(client: &Client) {
    // More at once than a process has connections.
    eventually(PATIENCE, "reads that are all answered", async || {
        let reads = at_once((0..20).map(|_| client.jobs("limit=1"))).await;
        let refused = reads.iter().filter(|read| read.status != 200);
        let refused: Vec<_> = refused
            .inspect(|read| read.assert_problem(503, "unavailable"))
            .collect();
        refused.is_empty().then_some(())
    })
    .await;
}

/// A firewall forgets the connections, or a machine loses its power: no connection ends, and none brings anything.
async fn postgresql_falls_silent_under_load() {
    let folder = tests::paths::folder('n');
    let database = Database::fresh(Db::Postgres, &folder).await;
    let proxy = Proxy::before(&database).await;
    let system = System::builder()
        .on(database)
        .env("DATABASE_URL", proxy.url())
        .workers(2)
        .sandbox(false)
        .env("LEASE_SECONDS", "60")
        .start()
        .await;
    let client = system.client();
    let long = long_job(&client, 30_000).await;
    let stream = client.stream(&long, None).await;
    let enough = AtomicBool::new(false);

    let ((mut ids, _), first) = tokio::join!(keep_submitting(&client, &enough), async {
        let unwanted = long_job(&client, 120_000).await;
        proxy.swallow();
        let begin = Instant::now();
        let (first, _) = insist(&client, 1_000_000, &answer("after").prompt()).await;
        assert_eq!(client.finished(&first).await["attempt"], 1);
        assert_eq!(client.cancel(&unwanted).await.status, 202);
        assert_eq!(client.finished(&unwanted).await["status"], "cancelled");
        assert!(begin.elapsed() < Duration::from_mins(1), "{:?}", begin.elapsed());

        // Now the server is gone too.
        proxy.swallow_all();
        becomes_unready(&client).await;
        proxy.recover();
        let back = Instant::now();
        becomes_ready(&client).await;
        assert!(back.elapsed() < Duration::from_mins(1), "{:?}", back.elapsed());
        enough.store(true, Ordering::Relaxed);
        first
    });

    is_untouched(&client, &long).await;
    is_whole(stream).await;
    ids.extend([long, first]);
    let cancelled = "select count(*) from job where status = 'cancelled'";
    assert_eq!(system.database().number(cancelled).await, 1);
    all_end_well(&system, &ids).await;
    assert_eq!(
        system
            .database()
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
}

/// As a failover: the connections end, and the new ones lead to a server that is what it is.
async fn set_read_only(system: &System, read_only: &str) {
    let mut connection = system.database().postgres().await;
    let writable = "set session characteristics as transaction read write";
    connection.execute(writable).await.unwrap();
    let name = system
        .database()
        .texts("select current_database()")
        .await
        .remove(0);
    let sql = format!("alter database {name} set default_transaction_read_only = {read_only}");
    connection.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    connection.close().await.unwrap();
    cut(system).await;
}

async fn postgresql_becomes_read_only() {
    let mut system = System::builder()
        .database(Db::Postgres)
        .sandbox(false)
        .start()
        .await;
    let client = system.client();
    let long = long_job(&client, 4_000).await;
    set_read_only(&system, "on").await;
    becomes_unready(&client).await;
    let refused = client.submit(&json!({ "message": "now?" })).await;
    refused.assert_problem(503, "unavailable");
    for process in system.processes() {
        eventually(PATIENCE, "a told outage", async || {
            process
                .written()
                .contains("the database is unavailable")
                .then_some(())
        })
        .await;
    }
    set_read_only(&system, "off").await;

    becomes_ready(&client).await;
    every_cut_is_found_out(&client).await;
    let (id, _) = insist(&client, 0, &answer("again").prompt()).await;
    assert_eq!(client.finished(&id).await["result"]["content"], "again");
    is_untouched(&client, &long).await;
    all_is_well(&system, &[id, long]).await;
    // The cuts may be told apart from what lies between them.
    outages_were_told(&mut system, 1..=3).await;
}

async fn postgresql_runs_out_of_disk() {
    let disk = Disk::mount(192);
    let cluster = Cluster::start_on(Some(&disk)).await.unwrap();
    let database = Database::in_cluster(&cluster).await;
    let system = System::builder()
        .on(database)
        .sandbox(false)
        .env("LEASE_SECONDS", "60")
        .start()
        .await;
    let client = system.client();
    let long = long_job(&client, 4_000).await;
    disk.fill();

    let (stored, refused) = submit_until_refused(&client).await;
    becomes_unready(&client).await;
    disk.free();
    // A server that had no room for its log has stopped, and starts again when told.
    if cluster.has_ended().await {
        cluster.run().await.unwrap();
    }

    becomes_ready(&client).await;
    assert!(refused > 0);
    is_untouched(&client, &long).await;
    for id in &stored {
        assert_eq!(client.finished(id).await["status"], "done");
    }
    let (id, _) = insist(&client, 0, &answer("after").prompt()).await;
    assert_eq!(client.finished(&id).await["result"]["content"], "after");
    drop(system);
    cluster.stop(Signal::QUIT).await;
}

/// Large messages, until ten in a row are refused; the accepted ones and the number of refusals.
async fn submit_until_refused(client: &Client) -> (Vec<String>, usize) {
    let (mut stored, mut refused, mut in_a_row) = (Vec::new(), 0, 0);
    let begin = Instant::now();
    while in_a_row < 10 {
        assert!(begin.elapsed() < PATIENCE, "{} were accepted", stored.len());
        // Random digits, which a database can't make smaller.
        let noise = || uuid::Uuid::new_v4().simple().to_string();
        let message: String = (0..3_000).map(|_| noise()).collect();
        let answer = client.submit(&json!({ "message": message })).await;
        if answer.status == 202 {
            stored.push(answer.json["data"]["id"].as_str().unwrap().to_owned());
            in_a_row = 0;
        } else {
            answer.assert_problem(503, "unavailable");
            assert!(!answer.header("retry-after").is_empty());
            refused += 1;
            in_a_row += 1;
        }
    }
    (stored, refused)
}

async fn a_locked_sqlite_file_is_waited_for() {
    let mut system = System::builder().sandbox(false).start().await;
    let client = system.client();
    let long = long_job(&client, 8_000).await;
    let mut lock = system.database().sqlite().await;
    lock.execute("begin immediate").await.unwrap();
    let begin = Instant::now();

    let prompt = answer("after the lock").prompt();
    let ((id, refusals), released) = tokio::join!(insist(&client, 0, &prompt), async {
        // Reads go on: a reader never waits for the writer.
        assert_eq!(client.job(&long).await.data(200)["status"], "running");
        becomes_unready(&client).await;
        tokio::time::sleep(Duration::from_millis(10_500).saturating_sub(begin.elapsed())).await;
        let unready = client.get("/readyz").await;
        unready.assert_problem(503, "unavailable");
        let why = unready.json["detail"].as_str().unwrap();
        assert!(why.contains("can be read but not written"), "{why}");
        lock.execute("rollback").await.unwrap();
        lock.close().await.unwrap();
        let released = Instant::now();
        becomes_ready(&client).await;
        released.elapsed()
    });

    assert!(refusals > 0);
    assert!(released < BUSY, "{released:?}");
    assert_eq!(client.finished(&id).await["result"]["content"], "after the lock");
    is_untouched(&client, &long).await;
    outages_were_told(&mut system, 1..=1).await;
}

async fn a_full_disk_refuses_what_it_cannot_hold() {
    let disk = Disk::mount(12);
    let file = disk.path().join("small.db");
    let mut system = System::builder()
        .within(&disk)
        .sandbox(false)
        .on(Database::file(&disk.from_outside(&file)))
        .env("DATABASE_URL", &format!("sqlite://{}", file.display()))
        .start()
        .await;
    let client = system.client();
    let before = client.play(&answer("before")).await;
    client.finished(&before).await;
    let long = long_job(&client, 4_000).await;
    let stream = client.stream(&long, None).await;
    disk.fill();

    let (stored, refused) = submit_until_refused(&client).await;
    assert!(refused > 0);
    becomes_unready(&client).await;
    assert_eq!(client.job(&before).await.data(200)["result"]["content"], "before");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(ready(&client).await, 503);
    disk.free();

    becomes_ready(&client).await;
    let (after, _) = insist(&client, 1, &answer("after").prompt()).await;
    assert_eq!(client.finished(&after).await["result"]["content"], "after");
    for id in &stored {
        assert_eq!(client.finished(id).await["status"], "done");
    }
    is_untouched(&client, &long).await;
    is_whole(stream).await;
    // A disk may take a little now and then before it is full for good.
    outages_were_told(&mut system, 1..=5).await;
}

async fn a_directory_that_cannot_be_written_is_told_at_the_start() {
    // Nobody writes there, not even root.
    let database = ("DATABASE_URL", "sqlite:///sys/claude-queue/claude-queue.db");
    for name in ["claude-queue-api", "claude-queue-worker"] {
        let ended = system::run(name, &[], &[database, ("API_PORT", "0")]).await;

        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(
            ended
                .stderr
                .contains("could not make the folder of the database: /sys/claude-queue:"),
            "{}",
            ended.stderr
        );
    }
    let fake = tests::paths::binary("fake-claude");
    let url = format!("sqlite://{}/x.db", tests::paths::folder('d').display());
    let env = [
        ("DATABASE_URL", url.as_str()),
        ("DATA_DIR", "/sys/claude-queue"),
        ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
        ("ANTHROPIC_API_KEY", "sk-none"),
    ];
    let ended = system::run("claude-queue-worker", &[], &env).await;

    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("DATA_DIR"), "{}", ended.stderr);
}

async fn a_worker_without_room_begins_nothing_and_fails_nothing(db: Db) {
    let disk = Disk::mount(4);
    let system = System::builder()
        .database(db)
        .within(&disk)
        .sandbox(false)
        .env("DATA_DIR", disk.path().join("data").to_str().unwrap())
        .env("CLAUDE_RETRY_BASE_DELAY", "0.2")
        .start()
        .await;
    let client = system.client();
    let mut ids = vec![client.play(&answer("before")).await];
    client.finished(&ids[0]).await;
    let pause = async || client.get("/api/v1/health").await.json["workers"][0]["pause_reason"].clone();

    for (why, begin, end) in [
        ("No space left", Disk::fill as fn(&Disk), Disk::free as fn(&Disk)),
        (
            "Read-only",
            |disk: &Disk| disk.set_read_only(true),
            |disk: &Disk| disk.set_read_only(false),
        ),
    ] {
        begin(&disk);
        // At once: it may be tried before the worker has noticed, which must not count.
        for _ in 0..4 {
            ids.push(client.play(&answer("after")).await);
        }
        eventually(PATIENCE, "a paused worker", async || {
            let said = pause().await;
            let said = said.as_str()?;
            assert!(said.contains("DATA_DIR") && said.contains(why), "{said}");
            Some(())
        })
        .await;
        let waits = client.play(&answer("after")).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(client.job(&waits).await.data(200)["attempt"], 0);
        ids.push(waits);
        end(&disk);

        for id in &ids {
            assert_eq!(client.finished(id).await["status"], "done");
        }
        // A slot may be quicker than the word that the pause is over.
        eventually(PATIENCE, "the end of the pause", async || {
            pause().await.is_null().then_some(())
        })
        .await;
    }

    let failures = "select cast(sum(failures) as bigint) from job";
    assert_eq!(system.database().number(failures).await, 0);
    let told = |words: &str| system.written().matches(words).count();
    assert_eq!(told("starts no runs"), 2, "{}", system.written());
    assert_eq!(told("starting runs again"), 2);
}

async fn a_workspace_that_cannot_be_made_fails_no_job_for_good(db: Db) {
    let system = System::builder().database(db).sandbox(false).start().await;
    let client = system.client();
    // A file where the folder belongs is as bad as a directory that can't be written, and root can't get around it.
    let folder = system.folder().join("data/jobs");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::write(&folder, "in the way").unwrap();

    let id = client
        .accepted_body(&json!({ "message": answer("at last").prompt(), "max_attempts": 5 }))
        .await;
    client.event(&id, "retry").await;
    std::fs::remove_file(&folder).unwrap();

    let job = client.finished(&id).await;
    assert_eq!(job["result"]["content"], "at last", "{job:#}");
    assert!(
        system.written().contains("jobs"),
        "the log says which folder it was"
    );
}

async fn a_stepped_clock_takes_no_lease(db: Db) {
    let system = System::builder()
        .database(db)
        .workers(2)
        .sandbox(false)
        .stepped_clock()
        .env("LEASE_SECONDS", "5")
        .env("LOG_LEVEL", "info,worker::queues=debug")
        .start()
        .await;
    let client = system.client();
    let long = long_job(&client, 22_000).await;
    let stream = client.stream(&long, None).await;

    for offset in [3_600, 0, -3_600] {
        system.step_clock(offset);
        let begin = Instant::now();
        for _ in 0..3 {
            let id = client.play(&answer("by any clock")).await;
            assert_eq!(client.finished(&id).await["attempt"], 1);
        }
        // Longer than a lease, looked at by both workers.
        tokio::time::sleep(Duration::from_millis(6_500).saturating_sub(begin.elapsed())).await;
    }

    is_untouched(&client, &long).await;
    is_whole(stream).await;
    assert_eq!(system.database().number("select count(*) from attempt").await, 10);
    assert_eq!(
        system
            .database()
            .number("select count(*) from attempt where ending <> 'done'")
            .await,
        0
    );
    let workers = match db {
        Db::Sqlite => "select count(*) from Workers",
        Db::Postgres => "select count(*) from apalis.workers",
    };
    // Each takes tickets of two queues.
    assert_eq!(system.database().number(workers).await, 4);
    for words in ["lease", "the queue's worker restarts"] {
        assert!(!system.written().contains(words), "{}", system.written());
    }
}
