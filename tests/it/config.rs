//! Bad settings stop the start and say which.

use tests::database::{Database, Db};
use tests::script::answer;
use tests::system::{System, run};
use tests::{both, once, paths};

both!(workers_of_one_database_have_one_folder);
once!(
    a_bad_setting_stops_the_start,
    a_secret_is_never_repeated,
    a_database_that_is_not_there_stops_the_start,
    a_missing_database_is_named_at_the_start,
    the_python_services_database_urls_are_understood,
    a_worker_without_a_credential_says_how_to_give_one
);

const API: &str = "claude-queue-api";
const WORKER: &str = "claude-queue-worker";

async fn a_bad_setting_stops_the_start() {
    for (binary, name, value) in [
        (API, "API_PORT", "eighty"),
        (API, "API_PORT", "65536"),
        (API, "API_HOST", "not an address"),
        (API, "ALLOW_ANONYMOUS", "perhaps"),
        (API, "WAIT_MAX_SECONDS", "301"),
        (API, "JOB_MAX_ATTEMPTS", "0"),
        (API, "CLAUDE_MAX_COST_PER_REQUEST", "-1"),
        (API, "CLAUDE_MAX_COST_PER_USER", "much"),
        (API, "KEY_MAX_RUNNING_JOBS", "none"),
        (API, "CORS_ORIGINS", "no origin"),
        (API, "LOG_FORMAT", "xml"),
        (API, "LOG_LEVEL", "verbose"),
        (WORKER, "LOG_LEVEL", "info,loud"),
        (API, "DATABASE_URL", "mysql://localhost/x"),
        (API, "API_HOST", "0.0.0.0"),
        (WORKER, "WORKER_CONCURRENCY", "0"),
        (WORKER, "LEASE_SECONDS", "x"),
        (WORKER, "CLAUDE_TIMEOUT_SECONDS", "-5"),
        (WORKER, "CLAUDE_PERMISSION_MODE", "yolo"),
        (WORKER, "CLAUDE_MAX_TURNS", "many"),
        (WORKER, "SANDBOX_ENABLED", "maybe"),
        (WORKER, "ANTHROPIC_BASE_URL", "not a url"),
        (WORKER, "CLAUDE_CLI_PATH", "/nowhere/claude"),
    ] {
        let folder = paths::folder('d');
        let url = format!("sqlite://{}", folder.join("x.db").display());
        let fake = paths::binary("fake-claude");
        let mut env = vec![
            ("DATABASE_URL", url.as_str()),
            ("DATA_DIR", folder.to_str().unwrap()),
            ("API_PORT", "0"),
            ("ANTHROPIC_API_KEY", "sk-x"),
            ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
        ];
        env.retain(|(known, _)| *known != name);
        env.push((name, value));

        let finished = run(binary, &[], &env).await;

        assert_eq!(finished.code, Some(2), "{name}={value}: {finished:?}");
        // Where the address is open to everybody it's the keys that are missing.
        let named =
            finished.stderr.contains(name) || value == "0.0.0.0" && finished.stderr.contains("API_KEYS");
        assert!(named, "{name}={value}: {finished:?}");
        assert!(
            !finished.stderr.contains("panicked"),
            "{name}={value}: {finished:?}"
        );
    }
}

async fn a_secret_is_never_repeated() {
    for (binary, name, value) in [
        (API, "API_KEYS", "s3cret with blanks"),
        (
            API,
            "DATABASE_URL",
            "postgres://user:s3cret@127.0.0.1:notaport/db",
        ),
        (WORKER, "ANTHROPIC_API_KEY", "s3cret\u{fffd}key"),
    ] {
        let fake = paths::binary("fake-claude");
        let env = [
            ("API_PORT", "0"),
            ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
            (name, value),
        ];

        let finished = run(binary, &[], &env).await;

        assert_eq!(finished.code, Some(2), "{name}: {finished:?}");
        assert!(finished.stderr.contains(name), "{name}: {finished:?}");
        assert!(
            !format!("{finished:?}").contains("s3cret"),
            "{name}: {finished:?}"
        );
    }
}

async fn a_database_that_is_not_there_stops_the_start() {
    let nobody = "postgres://user:s3cret@127.0.0.1:1/db";

    let finished = run(API, &[], &[("DATABASE_URL", nobody), ("API_PORT", "0")]).await;

    assert!(finished.code.is_some_and(|code| code != 0), "{finished:?}");
    assert!(
        !finished.stderr.contains("s3cret") && !finished.stderr.contains("panicked"),
        "{finished:?}"
    );
    for part in ["127.0.0.1", "port 1,", "\"db\"", "DATABASE_URL", "refused"] {
        assert!(finished.stderr.contains(part), "{part}: {}", finished.stderr);
    }
}

async fn a_missing_database_is_named_at_the_start() {
    let folder = paths::folder('d');
    let database = Database::fresh(Db::Postgres, &folder).await;
    let (url, parameters) = database.url().split_once('?').unwrap();
    let (server, _) = url.rsplit_once('/').unwrap();
    let missing = format!("{server}/no_such_database?{parameters}");

    let finished = run(API, &[], &[("DATABASE_URL", &missing), ("API_PORT", "0")]).await;

    assert!(finished.code.is_some_and(|code| code != 0), "{finished:?}");
    for part in ["\"no_such_database\" does not exist", "DATABASE_URL"] {
        assert!(finished.stderr.contains(part), "{part}: {}", finished.stderr);
    }
    assert!(!finished.stderr.contains("at line"), "{finished:?}");
}

async fn the_python_services_database_urls_are_understood() {
    let folder = paths::folder('d');
    let sqlite = format!("sqlite+aiosqlite:///{}", folder.join("python.db").display());
    let system = System::builder().env("DATABASE_URL", &sqlite).start().await;
    let client = system.client();
    let id = client.play(&answer("sqlite")).await;
    assert_eq!(client.finished(&id).await["result"]["content"], "sqlite");
    assert!(folder.join("python.db").is_file());
    drop(system);

    let fresh = tests::database::Database::fresh(Db::Postgres, &folder).await;
    let postgres = fresh.url().replace("postgres://", "postgresql+asyncpg://");
    let system = System::builder().env("DATABASE_URL", &postgres).start().await;
    let client = system.client();
    let id = client.play(&answer("postgres")).await;
    assert_eq!(client.finished(&id).await["result"]["content"], "postgres");
}

async fn a_worker_without_a_credential_says_how_to_give_one() {
    let folder = paths::folder('d');
    let url = format!("sqlite://{}", folder.join("x.db").display());
    let fake = paths::binary("fake-claude");
    let env = [
        ("DATABASE_URL", url.as_str()),
        ("DATA_DIR", folder.to_str().unwrap()),
        ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
    ];

    let finished = run(WORKER, &[], &env).await;

    assert_eq!(finished.code, Some(2), "{finished:?}");
    for way in [
        "ANTHROPIC_API_KEY",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "claude auth login",
    ] {
        assert!(finished.stderr.contains(way), "{way}: {finished:?}");
    }
}

async fn workers_of_one_database_have_one_folder(db: Db) {
    let mut system = System::builder().database(db).sandbox(false).start().await;
    let other = paths::folder('o');
    let fake = paths::binary("fake-claude");
    let url = system.database().url().to_owned();
    let env = [
        ("DATABASE_URL", url.as_str()),
        ("DATA_DIR", other.to_str().unwrap()),
        ("SANDBOX_ENABLED", "false"),
        ("ANTHROPIC_API_KEY", "sk-x"),
        ("CLAUDE_CLI_PATH", fake.to_str().unwrap()),
    ];

    let finished = run(WORKER, &[], &env).await;

    assert_eq!(finished.code, Some(2), "{finished:?}");
    for part in ["DATA_DIR", "other workers of this database", "shared file system"] {
        assert!(finished.stderr.contains(part), "{part}: {}", finished.stderr);
    }
    // One in the same folder starts.
    system.add_worker().await;
}
