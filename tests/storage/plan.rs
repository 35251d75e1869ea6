//! The statements that must cost the same with ten jobs and with a million find their rows by an index, on both
//! databases: nothing is scanned, nothing is sorted. What a list or a sum touches is compared with an empty twin.

use super::{NOW, World};
use shared::clock::Timestamp;
use shared::id::{KeyId, SessionId};
use shared::job::{JobKind, JobStatus};
use shared::key::KeyStatus;
use shared::storage::{self, Argument, JobFilter, KeyFilter, LedgerGroup};
use sqlx::{AssertSqlSafe, Executor, PgConnection, Row, SqliteConnection};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use tests::database::Db;

tests::both!(statements_cost_the_same_on_a_large_table);

/// One set-up for all, because it takes most of the time.
async fn statements_cost_the_same_on_a_large_table(db: Db) {
    let (full, empty) = tokio::join!(World::new(db), World::new(db));
    for world in [&full, &empty] {
        for key in ["big", "small", "busy", "late"] {
            world.key(key, 4).await;
        }
    }
    fill(&full).await;
    hot_statements_use_their_indexes(&full).await;
    every_filter_reads_little_of_a_large_table(&full, &empty).await;
}

/// A statement, the arguments that it is explained with, and the index that it must use.
struct Hot {
    what: &'static str,
    sql: &'static str,
    arguments: &'static [&'static str],
    sqlite: &'static str,
    postgres: &'static str,
}

const HOT: &[Hot] = &[
    Hot {
        what: "which lane is next",
        sql: "select key_id from lane
              where top_priority is not null and hold is null and running < max_running
                and not exists (select 1 from queue where paused or hold is not null)
              order by top_priority desc, last_served limit 1",
        arguments: &[],
        sqlite: "lane_next",
        postgres: "lane_next",
    },
    Hot {
        what: "when the last turn was",
        sql: "(select max(last_served) + 1 from lane)",
        arguments: &[],
        sqlite: "lane_last_served",
        postgres: "lane_last_served",
    },
    Hot {
        what: "the lane's first job",
        sql: "select * from job where key_id = $1 and status = 'queued' and hold = ''
              order by priority desc, kind, job_number limit 2",
        arguments: &["'big'"],
        sqlite: "job_queue",
        postgres: "job_queue",
    },
    Hot {
        what: "the lane's highest priority",
        sql: "(select max(priority) from job where key_id = $1 and status = 'queued' and hold = '')",
        arguments: &["'big'"],
        sqlite: "job_queue",
        postgres: "job_queue",
    },
    Hot {
        what: "whether the group has an earlier job",
        sql: "select cast(1 as bigint) from job
              where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
              limit 1",
        arguments: &["'busy'", "'k:g'"],
        sqlite: "job_group",
        postgres: "job_group",
    },
    Hot {
        what: "the next of the group",
        sql: "select job_id from job
              where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
              order by job_number limit 1",
        arguments: &["'busy'", "'k:g'"],
        sqlite: "job_group",
        postgres: "job_group",
    },
    Hot {
        what: "what is due",
        sql: "select key_id, job_id from job
              where status = 'queued' and hold in ('delay', 'usage_limit', 'upstream') and run_after <= $1
              order by run_after limit 100",
        arguments: &["10"],
        sqlite: "job_due",
        postgres: "job_due",
    },
    Hot {
        what: "which leases there are",
        sql: "select job_id, attempt, renewals from job where status = 'running'",
        arguments: &[],
        sqlite: "job_running",
        postgres: "job_running",
    },
    Hot {
        what: "which deadlines have passed",
        sql: "select job_id from job
              where deadline_at is not null and deadline_at <= $1 and status in ('queued', 'running')
                and cancel_requested_at is null
              limit 100",
        arguments: &["10"],
        sqlite: "job_deadline",
        postgres: "job_deadline",
    },
    Hot {
        what: "what retention takes",
        sql: "select * from job
              where completed_at is not null and not data_removed and completed_at < $1
                and (completed_at, job_number) > ($2, $3)
              order by completed_at, job_number limit 100",
        arguments: &["10", "0", "0"],
        sqlite: "job_retention",
        postgres: "job_retention",
    },
    Hot {
        what: "workspaces that owners want removed",
        sql: "select * from job where remove_requested and job_number > $1 order by job_number limit 100",
        arguments: &["0"],
        sqlite: "job_remove",
        postgres: "job_remove",
    },
    Hot {
        what: "the place of a ready job",
        sql: "select 1 from job as earlier
              where earlier.key_id = job.key_id and earlier.status = 'queued' and earlier.hold = ''
                and earlier.priority = job.priority and earlier.kind = job.kind
                and earlier.job_number < job.job_number
              limit 1000",
        arguments: &[],
        sqlite: "job_queue",
        postgres: "job_queue",
    },
    Hot {
        what: "the place of a job in its group",
        sql: "select 1 from job as earlier
              where earlier.key_id = job.key_id and earlier.group_key = job.group_key
                and earlier.group_key is not null and earlier.status in ('queued', 'running')
                and earlier.job_number < job.job_number
              limit 1000",
        arguments: &[],
        sqlite: "job_group",
        postgres: "job_group",
    },
    Hot {
        what: "a job's events",
        sql: "select job_id, seq, event_type, at, data from event where job_id = $1 and seq > $2 order by seq limit $3",
        arguments: &["'job_5'", "0", "100"],
        sqlite: "sqlite_autoindex_event_1",
        postgres: "event_job_id_seq_key",
    },
    Hot {
        what: "waiting tickets on SQLite",
        sql: "select 1 from Jobs where job_type = $1 and status = 'Pending' and lock_by is null limit $2",
        arguments: &["'jobs'", "1000"],
        sqlite: "idx_jobs_job_type_status_run_at",
        postgres: "",
    },
    Hot {
        what: "waiting tickets on PostgreSQL",
        sql: "select 1 from apalis.jobs where job_type = $1 and status = 'Pending' limit $2",
        arguments: &["'jobs'", "1000"],
        sqlite: "",
        postgres: "idx_apalis_jobs_fetch_partial",
    },
];

impl Hot {
    /// The statement as it is explained: one that looks at a job of its caller's is asked for a single job.
    fn whole(&self) -> String {
        // What is a subquery in its statement is in brackets.
        let sql = self.sql.strip_prefix('(').and_then(|sql| sql.strip_suffix(')'));
        let sql = sql.unwrap_or(self.sql);
        if sql.contains("= job.key_id") {
            format!("select (select count(*) from ({sql}) as earlier) from job where job_id = 'job_900'")
        } else {
            sql.to_owned()
        }
    }
}

/// The text of storage: each statement above must be found in it.
const SOURCES: &[&str] = &[
    include_str!("../../shared/src/storage/claim.rs"),
    include_str!("../../shared/src/storage/event.rs"),
    include_str!("../../shared/src/storage/group.rs"),
    include_str!("../../shared/src/storage/job.rs"),
    include_str!("../../shared/src/storage/lane.rs"),
    include_str!("../../shared/src/storage/retention.rs"),
    include_str!("../../shared/src/storage/run.rs"),
    include_str!("../../shared/src/storage/run/record.rs"),
    include_str!("../../shared/src/storage/sweep.rs"),
    include_str!("../../shared/src/storage/ticket.rs"),
];

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

async fn hot_statements_use_their_indexes(world: &World) {
    let db = world.database.db();
    let sources = words(&SOURCES.concat());
    for hot in HOT {
        let index = if db == Db::Sqlite {
            hot.sqlite
        } else {
            hot.postgres
        };
        if index.is_empty() {
            continue;
        }
        // The columns of a whole row have a list of their own.
        let text = hot.sql.strip_prefix("select *").unwrap_or(hot.sql);
        let found = sources.contains(&words(text));
        assert!(
            found,
            "{}: the statement has changed, and this copy of it hasn't",
            hot.what
        );
        let plans = match db {
            Db::Sqlite => vec![sqlite_plan(&mut world.database.sqlite().await, hot).await],
            Db::Postgres => postgres_plans(&mut world.database.postgres().await, hot).await,
        };
        for plan in plans {
            let scans = ["Seq Scan on job", "Seq Scan on event", "Sort", "TEMP B-TREE"];
            assert!(
                plan.contains(index) && !scans.iter().any(|scan| plan.contains(scan)),
                "{}: wanted {index}\n{plan}",
                hot.what
            );
        }
    }
}

async fn sqlite_plan(connection: &mut SqliteConnection, hot: &Hot) -> String {
    let sql = AssertSqlSafe(format!("explain query plan {}", hot.whole()));
    let rows = connection.fetch_all(sqlx::query(sql)).await.unwrap();
    rows.iter()
        .map(|row| row.get::<String, _>("detail") + "\n")
        .collect()
}

/// The plan that is kept for all arguments, and the one for these.
async fn postgres_plans(connection: &mut PgConnection, hot: &Hot) -> Vec<String> {
    let arguments = if hot.arguments.is_empty() {
        String::new()
    } else {
        format!("({})", hot.arguments.join(", "))
    };
    let mut plans = Vec::new();
    for mode in ["force_generic_plan", "force_custom_plan"] {
        let set_up = format!(
            "set enable_seqscan = off; set jit = off; set plan_cache_mode = {mode}; deallocate all; prepare hot as {}",
            hot.whole()
        );
        connection
            .execute(sqlx::raw_sql(AssertSqlSafe(set_up)))
            .await
            .unwrap();
        let explain = AssertSqlSafe(format!("explain execute hot{arguments}"));
        let rows = connection.fetch_all(sqlx::raw_sql(explain)).await.unwrap();
        let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        plans.push(format!("{mode}\n{}", lines.join("\n")));
    }
    plans
}

/// Ended jobs of the large table, and those that wait; all of one key.
const ENDED: i64 = 300_000;
const WAITING: i64 = 50_000;
/// How much more than in an empty table a list may touch, a page of rows included: blocks of PostgreSQL, steps of SQLite's
/// machine. A scan takes thousands and millions.
const BLOCKS: i64 = 3_000;
const STEPS: i64 = 60_000;

/// Every filter of every list, on a table where few rows of a kind are hidden among very many.
async fn every_filter_reads_little_of_a_large_table(full: &World, empty: &World) {
    let db = full.database.db();
    let mut filters = Vec::new();
    for key_id in [Some("big"), Some("small"), None] {
        for kind in [Some(JobKind::Job), Some(JobKind::Chat), None] {
            let of_kind = JobFilter {
                key_id: key_id.map(KeyId::known),
                kind,
                ..JobFilter::default()
            };
            filters.push(of_kind.clone());
            filters.extend(JobStatus::ALL.map(|status| JobFilter {
                statuses: vec![status],
                ..of_kind.clone()
            }));
            filters.push(JobFilter {
                statuses: vec![JobStatus::Failed, JobStatus::Cancelled],
                ..of_kind.clone()
            });
            filters.push(JobFilter {
                statuses: JobStatus::ALL.to_vec(),
                ..of_kind.clone()
            });
            filters.push(JobFilter {
                custom_id: Some("rare".to_owned()),
                ..of_kind.clone()
            });
            filters.push(JobFilter {
                custom_id: Some("missing".to_owned()),
                statuses: vec![JobStatus::Failed],
                ..of_kind.clone()
            });
            filters.push(JobFilter {
                session_id: Some(SessionId::new()),
                ..of_kind.clone()
            });
            for (after, before) in [(None, Some(50)), (Some(ENDED), None), (Some(2_000), Some(2_010))] {
                filters.push(JobFilter {
                    created_after: after.map(Timestamp),
                    created_before: before.map(Timestamp),
                    ..of_kind.clone()
                });
            }
        }
    }
    let mut slow = Vec::new();
    let (mut full, mut empty) = (Connection::new(full).await, Connection::new(empty).await);
    let mut look = async |what: String, sql: &str, arguments: &[Argument]| {
        let (work, least) = (full.work(sql, arguments).await, empty.work(sql, arguments).await);
        if work > least + limit(db) {
            slow.push(format!("{work} instead of {least} for {what}"));
        }
    };
    let half = ENDED / 2;
    for filter in filters {
        for (ascending, after) in [(false, None), (true, Some(half))] {
            let filter = JobFilter {
                ascending,
                after,
                ..filter.clone()
            };
            let (sql, arguments) = filter.statement(21, ascending.then_some(i64::MAX));
            look(format!("{filter:?}"), &sql, &arguments).await;
        }
    }
    let text = |text: &str| Argument::Text(text.to_owned());
    let number = Argument::Number;
    for key in ["big", "small", "*"] {
        look(format!("usage of {key}"), storage::USAGE, &[text(key)]).await;
        for group in [
            LedgerGroup::Day,
            LedgerGroup::Key,
            LedgerGroup::Model,
            LedgerGroup::Session,
        ] {
            let sql = storage::ledger_sums_sql(key != "*", group);
            let mut arguments = vec![text(key), number(0), text(""), number(101)];
            // Whole hours with a bit before and after.
            let (from, to) = ((8 * 3_600 - 30) * 1_000_000, (16 * 3_600 + 40) * 1_000_000);
            arguments.extend(storage::ledger_borders(from, to, group).map(number));
            look(format!("sums of {key} by {group:?}"), sql, &arguments).await;
        }
        let sql = storage::ledger_entries_sql(key != "*");
        let arguments = [
            text(key),
            number(0),
            number(half * 200_000),
            number(half),
            number(101),
        ];
        look(format!("entries of {key}"), sql, &arguments).await;
        let sql = if key == "*" {
            storage::SESSIONS_OF_ALL
        } else {
            storage::SESSIONS_OF_KEY
        };
        look(
            format!("sessions of {key}"),
            sql,
            &[text(key), number(20), number(0)],
        )
        .await;
        let sql = if key == "*" {
            storage::EXCHANGES_OF_ALL
        } else {
            storage::EXCHANGES_OF_KEY
        };
        look(
            format!("messages of {key}"),
            sql,
            &[text(key), number(i64::MAX), number(50)],
        )
        .await;
        let sql = if key == "*" {
            storage::AUDIT_OF_ALL
        } else {
            storage::AUDIT_OF_ACTOR
        };
        let actor = if key == "*" { "" } else { key };
        look(
            format!("audit of {key}"),
            sql,
            &[text(actor), number(i64::MAX), number(50)],
        )
        .await;
    }
    for status in [
        None,
        Some(KeyStatus::Active),
        Some(KeyStatus::Revoked),
        Some(KeyStatus::Expired),
    ] {
        for name in [None, Some("n3".to_owned())] {
            let sql = storage::keys_sql(&KeyFilter {
                status,
                name: name.clone(),
                before: None,
            });
            let name = name.unwrap_or_default();
            let arguments = [number(i64::MAX), text(&name), number(NOW.0), number(21)];
            look(format!("keys {status:?} {name}"), sql, &arguments).await;
        }
    }
    assert!(slow.is_empty(), "{} are slow:\n{}", slow.len(), slow.join("\n"));
}

fn limit(db: Db) -> i64 {
    match db {
        Db::Sqlite => STEPS,
        Db::Postgres => BLOCKS,
    }
}

enum Connection {
    Sqlite(SqliteConnection, Arc<AtomicI64>),
    Postgres(PgConnection),
}

impl Connection {
    async fn new(world: &World) -> Self {
        match world.database.db() {
            Db::Sqlite => {
                let mut connection = world.database.sqlite().await;
                let steps = Arc::new(AtomicI64::new(0));
                let counted = Arc::clone(&steps);
                let mut handle = connection.lock_handle().await.unwrap();
                handle.set_progress_handler(100, move || {
                    counted.fetch_add(100, Ordering::Relaxed);
                    true
                });
                drop(handle);
                Self::Sqlite(connection, steps)
            }
            Db::Postgres => {
                let mut connection = world.database.postgres().await;
                let set_up = "set enable_seqscan = off; set jit = off";
                connection.execute(sqlx::raw_sql(set_up)).await.unwrap();
                Self::Postgres(connection)
            }
        }
    }

    /// How much a statement touches: blocks on PostgreSQL, on SQLite steps of its machine.
    async fn work(&mut self, sql: &str, arguments: &[Argument]) -> i64 {
        macro_rules! bound {
            ($sql:expr) => {{
                let mut query = sqlx::query(AssertSqlSafe($sql));
                for argument in arguments {
                    query = match argument {
                        Argument::Text(text) => query.bind(text),
                        Argument::Number(number) => query.bind(number),
                    };
                }
                query
            }};
        }
        match self {
            Self::Sqlite(connection, steps) => {
                steps.store(0, Ordering::Relaxed);
                connection.fetch_all(bound!(sql.to_owned())).await.unwrap();
                steps.load(Ordering::Relaxed)
            }
            Self::Postgres(connection) => {
                let explain = format!("explain (analyze, buffers, timing off) {sql}");
                let rows = connection.fetch_all(bound!(explain)).await.unwrap();
                let lines: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
                let buffers = lines
                    .iter()
                    .find(|line| line.contains("Buffers: shared"))
                    .unwrap();
                let numbers = buffers
                    .split(['=', ' '])
                    .filter_map(|word| word.parse::<i64>().ok());
                numbers.sum()
            }
        }
    }
}

/// One key with very many ended jobs and after them many that wait, among which few are chats, failed, cancelled, running
/// or named; one with a few jobs, older than all of those; one with a long group; and one whose jobs are delayed.
async fn fill(world: &World) {
    let all = ENDED + WAITING;
    let numbers = |count: i64| {
        format!("with recursive n (i) as (select 1 union all select i + 1 from n where i < {count})")
    };
    let ended = numbers(ENDED);
    let held = |count: i64, columns: &str, values: &str| {
        format!(
            "{} insert into job (kind, max_attempts, on_worker_lost, max_cost, metadata, created_at, job_id, key_id, hold, {columns})
             select 'job', 3, 'resume', 1, '{{}}', {all} + i, {values} from n",
            numbers(count)
        )
    };
    let statements = [
        format!(
            "{} insert into job (job_id, key_id, kind, status, custom_id, max_attempts, on_worker_lost, max_cost, metadata,
               created_at, completed_at, deadline_at, counted)
             select 'job_' || i, case when i < 100 then 'small' else 'big' end,
               case when i in (50, 30000) then 'chat' else 'job' end,
               case when i > {ENDED} then 'queued' when i % 20000 = 17 then 'failed' when i % 20000 = 18 then 'cancelled'
                 when i % 20000 = 19 then 'running' else 'done' end,
               case when i = 1000 then 'rare' when i % 3 = 0 then 'n' || i end, 3, 'resume', 1, '{{}}', i,
               case when i > {ENDED} or i % 20000 = 19 then null else i end,
               case when i < 5000 and i % 20000 <> 19 then i end, i < {ENDED} - 100
             from n",
            numbers(all)
        ),
        held(5_000, "group_key", "'grp_' || i, 'busy', case i when 1 then '' else 'order' end, 'k:g'"),
        held(2_000, "run_after", "'due_' || i, 'late', 'delay', i"),
        "insert into event (job_id, seq, event_type, at, data)
         select job_id, 1, 'status', 0, '{}' from job where job_number < 5000"
            .to_owned(),
        format!(
            "{ended} insert into ledger (at, key_id, job_id, attempt, session_id, model, cost)
             select cast(i as bigint) * 200000, case when i < 100 then 'small' else 'big' end, 'job_' || i, 1,
               'ses_' || i % 50, 'm', 1
             from n"
        ),
        format!(
            "{ended} insert into session (session_id, key_id, name, settings, created_at, updated_at)
             select 'ses_' || i, case when i < 100 then 'small' else 'big' end, 'n' || i, '{{}}', i, i from n
             where i <= 5000"
        ),
        format!(
            "{ended} insert into audit (at, actor, action, object_id, address, request_id, detail)
             select i, case when i < 100 then 'small' else 'big' end, 'key.put', '', '', '', '{{}}' from n
             where i <= 20000"
        ),
        format!(
            "{ended} insert into api_key (key_id, name, secret_digest, last4, scopes, allowed_ips, allowed_models,
               metadata, created_at, created_by, expires_at, revoked_at)
             select 'key_' || i, 'n' || i, '', '', '', '[]', '[]', '{{}}', i, 'cli', case when i = 7 then 1 end,
               case when i = 9 then 1 end
             from n where i <= 20000"
        ),
        "update lane set top_priority = 0".to_owned(),
    ];
    match world.database.db() {
        Db::Sqlite => fill_sqlite(&mut world.database.sqlite().await, &statements).await,
        Db::Postgres => fill_postgres(&mut world.database.postgres().await, &statements).await,
    }
    world.store.count_usage().await.unwrap();
    if world.database.db() == Db::Postgres {
        world.database.execute("analyze").await;
    }
}

/// The tables that get many rows.
const LARGE: &str = "('job', 'ledger', 'audit', 'api_key')";

/// Fills them while they have no indexes, which takes a fraction of the time. `indexes`: their names and texts.
fn script(set_up: &str, indexes: &[(String, String)], statements: &[String]) -> AssertSqlSafe<String> {
    let mut script = format!("{set_up}; ");
    script.extend(indexes.iter().map(|(name, _)| format!("drop index {name};")));
    script.extend(statements.iter().map(|statement| format!("{statement};")));
    script.extend(indexes.iter().map(|(_, sql)| format!("{sql};")));
    AssertSqlSafe(script + "commit")
}

async fn fill_sqlite(connection: &mut SqliteConnection, statements: &[String]) {
    let indexes = format!(
        "select name, sql from sqlite_master where type = 'index' and sql is not null and tbl_name in {LARGE}"
    );
    let indexes = sqlx::query_as(AssertSqlSafe(indexes)).fetch_all(&mut *connection);
    let indexes: Vec<(String, String)> = indexes.await.unwrap();
    let set_up = "pragma synchronous = off; pragma cache_size = -200000; begin immediate";
    let filling = sqlx::raw_sql(script(set_up, &indexes, statements));
    connection.execute(filling).await.unwrap();
}

async fn fill_postgres(connection: &mut PgConnection, statements: &[String]) {
    let indexes = format!(
        "select indexname::text, indexdef from pg_indexes where schemaname = 'public' and tablename in {LARGE}
           and indexname not in (select conname from pg_constraint)"
    );
    let indexes = sqlx::query_as(AssertSqlSafe(indexes)).fetch_all(&mut *connection);
    let indexes: Vec<(String, String)> = indexes.await.unwrap();
    let set_up = "set synchronous_commit = off; set maintenance_work_mem = '128MB'; begin";
    let filling = sqlx::raw_sql(script(set_up, &indexes, statements));
    connection.execute(filling).await.unwrap();
}
