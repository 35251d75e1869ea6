//! The statements that must cost the same with ten jobs and with a million find their rows by an index, on both
//! databases: nothing is scanned, nothing is sorted.

use super::World;
use sqlx::{AssertSqlSafe, Executor, PgConnection, Row, SqliteConnection};
use tests::database::Db;

tests::both!(hot_statements_use_their_indexes);

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
              order by priority desc, job_number limit 2",
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
        sql: "select 1 from job
              where key_id = $1 and status = 'queued' and hold = '' and priority = $2 and job_number < $3
              limit 1000",
        arguments: &["'big'", "0", "900"],
        sqlite: "job_queue",
        postgres: "job_queue",
    },
    Hot {
        what: "the place of a job in its group",
        sql: "select 1 from job
              where key_id = $1 and group_key = $2 and group_key is not null and status in ('queued', 'running')
                and job_number < $3
              limit 1000",
        arguments: &["'busy'", "'k:g'", "900"],
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
        what: "the owner's list",
        sql: "select job.* from job where job.key_id = $1 and job.job_number < $2 order by job.job_number desc limit 50",
        arguments: &["'big'", "5000"],
        sqlite: "job_list",
        postgres: "job_list",
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

/// The text of storage: each statement above must be found in it.
const SOURCES: &[&str] = &[
    include_str!("../../shared/src/storage/claim.rs"),
    include_str!("../../shared/src/storage/event.rs"),
    include_str!("../../shared/src/storage/group.rs"),
    include_str!("../../shared/src/storage/job.rs"),
    include_str!("../../shared/src/storage/job/list.rs"),
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

async fn hot_statements_use_their_indexes(db: Db) {
    let world = World::new(db).await;
    fill(&world).await;
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
        // The list's is put together when it is used; the columns of a whole row have a list of their own.
        let text = hot.sql.strip_prefix("select *").unwrap_or(hot.sql);
        let found = sources.contains(&words(text)) || hot.what == "the owner's list";
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

/// One key with many ready jobs, one with a long group, many delayed, many ended: where a planner is led astray.
async fn fill(world: &World) {
    for key in ["big", "busy", "late", "old"] {
        world.key(key, 4).await;
    }
    let rows = |count: u32, columns: &str, values: &str| {
        format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {count})
             insert into job (job_id, key_id, kind, max_attempts, on_worker_lost, max_cost, metadata, created_at{columns})
             select {values} from n"
        )
    };
    let common = |id: &str, key: &str| format!("'{id}_' || i, '{key}', 'job', 3, 'resume', 1, '{{}}', i");
    for sql in [
        rows(5000, "", &common("job", "big")),
        rows(
            5000,
            ", group_key, hold",
            &format!(
                "{}, 'k:g', case i when 1 then '' else 'order' end",
                common("grp", "busy")
            ),
        ),
        rows(
            2000,
            ", hold, run_after",
            &format!("{}, 'delay', i", common("due", "late")),
        ),
        rows(
            5000,
            ", status, completed_at, deadline_at",
            &format!("{}, 'done', i, i", common("old", "old")),
        ),
    ] {
        world.database.execute(&sql).await;
    }
    world
        .database
        .execute(
            "insert into event (job_id, seq, event_type, at, data) select job_id, 1, 'status', 0, '{}' from job",
        )
        .await;
    world.database.execute("update lane set top_priority = 0").await;
    if world.database.db() == Db::Postgres {
        world.database.execute("analyze").await;
    }
}

async fn sqlite_plan(connection: &mut SqliteConnection, hot: &Hot) -> String {
    // What is a subquery in its statement is in brackets.
    let whole = hot.sql.strip_prefix('(').and_then(|sql| sql.strip_suffix(')'));
    let sql = AssertSqlSafe(format!("explain query plan {}", whole.unwrap_or(hot.sql)));
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
            hot.sql
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
