//! The description of the API: others make clients from it and send what it allows.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tests::client::{Client, PATIENCE};
use tests::database::Db;
use tests::system::{KEYS, System};
use tests::{once, paths};
use tokio::process::Command;

once!(
    the_document_and_its_page_are_served,
    what_the_document_names_is_read,
    nobody_finds_an_answer_that_is_not_in_the_document,
    a_python_client_made_from_the_document_runs_a_job,
    a_typescript_client_made_from_the_document_compiles_and_runs_a_job,
);

/// A program of the tests' Python.
pub(crate) fn python(name: &str) -> Command {
    let program = paths::repository().join("tools/python/venv/bin").join(name);
    assert!(
        program.is_file(),
        "run `scripts/install-python.sh` first, or `make test`"
    );
    let mut command = quiet(&program);
    // What it starts is beside it.
    command.env(
        "PATH",
        format!("{}:/usr/bin:/bin", program.parent().unwrap().display()),
    );
    command
}

/// A program of the tests' TypeScript tools.
pub(crate) fn typescript(name: &str) -> Command {
    let program = paths::repository()
        .join("tools/typescript/node_modules/.bin")
        .join(name);
    assert!(
        program.exists(),
        "run `scripts/install-typescript.sh` first, or `make test`"
    );
    quiet(program)
}

pub(crate) fn quiet(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .kill_on_drop(true)
        .env_remove("HTTP_PROXY")
        .env_remove("HTTPS_PROXY")
        .env("NO_PROXY", "*");
    command
}

/// What a program wrote, once it has ended well.
pub(crate) async fn done(mut command: Command) -> String {
    let ended = tokio::time::timeout(2 * PATIENCE, command.output()).await;
    let output = ended.expect("it ends in time").expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

async fn document(client: &Client, folder: &Path) -> Value {
    let answer = client.without_key().get("/openapi.json").await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    fs::write(folder.join("openapi.json"), &answer.text).unwrap();
    answer.json
}

async fn the_document_and_its_page_are_served() {
    let system = System::builder().workers(0).start().await;
    let nobody = system.client().without_key();

    let answer = nobody.get("/openapi.json").await;
    assert_eq!((answer.status, &answer.json["openapi"]), (200, &json!("3.1.0")));
    let page = nobody.get("/docs").await;
    assert_eq!(page.status, 200);
    assert!(
        page.header("content-security-policy")
            .starts_with("default-src 'none'; script-src 'self'")
    );
    for address in [
        "/docs/start.js",
        "/docs/swagger-ui-bundle.js",
        "/docs/swagger-ui.css",
    ] {
        assert!(page.text.contains(address), "{address}");
        let plain = nobody.get(address).await;
        assert_eq!(plain.status, 200, "{address}");
        let packed = nobody
            .request(reqwest::Method::GET, address)
            .header("accept-encoding", "gzip");
        let packed = packed.send().await.unwrap();
        if address != "/docs/start.js" {
            assert_eq!(packed.headers()["content-encoding"], "gzip", "{address}");
        }
        assert!(packed.bytes().await.unwrap().len() <= plain.text.len());
    }
    assert_eq!(
        nobody.get("/redoc").await.text,
        page.text,
        "it leads to the same page"
    );

    let hidden = System::builder()
        .workers(0)
        .env("ENABLE_DOCS", "false")
        .start()
        .await;
    for address in ["/openapi.json", "/docs", "/docs/start.js", "/redoc"] {
        hidden
            .client()
            .get(address)
            .await
            .assert_problem(404, "not-found");
    }
}

/// Every member of a request that the document names is one that is read.
async fn what_the_document_names_is_read() {
    let system = System::builder().workers(0).start().await;
    let admin = system.client().with_key(KEYS[2]);
    let document = document(&admin, system.folder()).await;
    let session = admin.session("s").await;

    let mut asked = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
            let Some(reference) = schema.as_str() else {
                continue;
            };
            let schema = document.pointer(&reference[1..]).unwrap();
            // Nothing of a wrong type is accepted, so nothing is done.
            let names = schema["properties"].as_object().into_iter().flatten();
            let mut body = names
                .map(|(name, _)| (name.clone(), json!({"no": [1]})))
                .collect::<serde_json::Map<_, _>>();
            body.insert("zzz_unknown".to_owned(), json!(1));
            let address = path
                .replace("{name}", &session)
                .replace("{scope}", "global")
                .replace("{id}", "global");
            let method = method.to_ascii_uppercase().parse().unwrap();
            let answer = admin.send(admin.request(method, &address).json(&body)).await;
            if answer.status == 404 || answer.status == 409 {
                continue;
            }
            asked += 1;
            assert_eq!(answer.status, 422, "{path}: {}", answer.text);
            let unknown = answer.json["errors"].as_array().unwrap().iter();
            let unknown = unknown.filter(|fault| {
                fault["type"] == "extra_forbidden"
                    && fault["field"].as_str().unwrap().matches("->").count() == 1
            });
            let unknown = unknown
                .map(|fault| fault["field"].as_str().unwrap())
                .collect::<Vec<_>>();
            let mut expected = vec!["body -> zzz_unknown"];
            if path.starts_with("/api/v1/sessions/") {
                expected.extend(["body -> concurrency_key", "body -> session", "body -> template"]);
            }
            let unexpected = unknown
                .iter()
                .filter(|field| !expected.contains(*field))
                .collect::<Vec<_>>();
            assert!(
                unexpected.is_empty(),
                "{path}: {unexpected:?} in docs/schemas.rs isn't read"
            );
        }
    }
    assert!(asked >= 5, "{asked}");
}

/// Schemathesis sends what the document allows and what it doesn't, for a bounded time.
async fn nobody_finds_an_answer_that_is_not_in_the_document() {
    let system = System::builder()
        .env("WAIT_MAX_SECONDS", "0")
        .env("STREAM_MAX_SECONDS", "1")
        .env("RATE_LIMIT_REQUESTS", "100000")
        .env("RATE_LIMIT_READ_REQUESTS", "100000")
        .env("SECRET_KEY", "a-secret-key-of-this-test-alone-0123456789")
        .start()
        .await;
    let client = system.client();
    let job = client.accepted("Say hello.").await;
    client.finished(&job).await;
    client.session("s").await;
    let folder = system.folder();
    // What is made up would be found nowhere.
    let settings = format!(
        "[[operations]]\ninclude-path-regex = \"/jobs/\"\nparameters = {{ \"path.id\" = \"{job}\" }}\n\
         [[operations]]\ninclude-path-regex = \"/sessions/\"\nparameters = {{ \"path.name\" = \"s\" }}\n"
    );
    fs::write(folder.join("schemathesis.toml"), settings).unwrap();

    let mut command = python("schemathesis");
    command
        .current_dir(folder)
        .args(["--config-file", "schemathesis.toml", "run"])
        .arg(format!("{}/openapi.json", client.base()))
        .args(["--header", &format!("X-API-Key: {}", KEYS[2])])
        .args([
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ])
        // Fuzzing finds more, and takes as long as it is given: that is for a person to start.
        .args(["--phases", "examples,coverage"])
        .args([
            "--max-examples",
            "8",
            "--seed",
            "1",
            "--generation-deterministic",
            "--workers",
            "2",
        ])
        .args([
            "--suppress-health-check",
            "all",
            "--request-timeout",
            "30",
            "--max-failures",
            "5",
            "--max-time",
            "120",
        ])
        // The job must stay what it is, a stream is no answer that ends, and a chat whose run fails is a 502.
        .args([
            "--exclude-operation-id",
            "chat",
            "--exclude-operation-id",
            "deleteJobData",
            "--exclude-operation-id",
            "streamEvents",
        ]);
    done(command).await;
}

async fn a_python_client_made_from_the_document_runs_a_job() {
    let system = System::start(Db::Sqlite).await;
    let folder = system.folder();
    document(&system.client(), folder).await;

    let mut generate = python("openapi-python-client");
    generate
        .current_dir(folder)
        .args([
            "generate",
            "--path",
            "openapi.json",
            "--meta",
            "none",
            "--output-path",
            "generated",
        ])
        .arg("--fail-on-warning");
    done(generate).await;
    let mut run = python("python");
    run.arg(paths::repository().join("tools/python/client.py"))
        .arg(folder);
    let said = done(with_key(run, &system)).await;
    assert_eq!(said, "done Say hello.\nnot-found\n");
}

async fn a_typescript_client_made_from_the_document_compiles_and_runs_a_job() {
    let system = System::start(Db::Sqlite).await;
    let folder = system.folder();
    document(&system.client(), folder).await;
    let tools = paths::repository().join("tools/typescript");
    std::os::unix::fs::symlink(tools.join("node_modules"), folder.join("node_modules")).unwrap();
    fs::copy(tools.join("client.ts"), folder.join("client.ts")).unwrap();
    fs::write(folder.join("package.json"), "{\"type\": \"module\"}").unwrap();

    let mut generate = typescript("openapi-typescript");
    generate
        .current_dir(folder)
        .args(["openapi.json", "--output", "api.d.ts"]);
    done(generate).await;
    compile(folder, &["client.ts"]).await;
    let mut run = quiet("node");
    run.current_dir(folder).arg("client.js");
    let said = done(with_key(run, &system)).await;
    assert_eq!(said, "done Say hello.\nnot-found\n");
}

/// Compiles TypeScript files of a folder, strictly.
pub(crate) async fn compile(folder: &Path, files: &[&str]) {
    let mut compile = typescript("tsc");
    compile
        .current_dir(folder)
        .args([
            "--strict",
            "--module",
            "nodenext",
            "--target",
            "es2022",
            "--lib",
            "es2023,dom,dom.iterable",
        ])
        .args(["--types", "node", "--skipLibCheck"])
        .args(files);
    done(compile).await;
}

/// A program with the address of the service and a key.
pub(crate) fn with_key(mut command: Command, system: &System) -> Command {
    command
        .env("CLAUDE_QUEUE_URL", system.client().base())
        .env("CLAUDE_QUEUE_API_KEY", KEYS[0]);
    command
}
