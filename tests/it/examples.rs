//! The examples do what they say.

use std::fs;
use std::path::Path;

use tests::client::PATIENCE;
use tests::script::{Step, steps};
use tests::system::System;
use tests::{once, paths};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use crate::openapi::{compile, done, quiet, with_key};

once!(
    the_examples_submit_jobs_run_a_csv_file_and_carry_files,
    the_page_of_the_example_chats,
);

/// Runs an example in a folder.
async fn example(system: &System, mut command: Command, folder: &Path, arguments: &[&str]) -> String {
    command.current_dir(folder).args(arguments);
    done(with_key(command, system)).await
}

async fn the_examples_submit_jobs_run_a_csv_file_and_carry_files() {
    let system = System::builder().env("RATE_LIMIT_REQUESTS", "1000").start().await;
    let examples = paths::repository().join("examples");
    let compiled = system.folder().join("typescript");
    fs::create_dir(&compiled).unwrap();
    for file in ["claude_queue.ts", "submit.ts", "batch.ts", "files.ts"] {
        fs::copy(examples.join("typescript").join(file), compiled.join(file)).unwrap();
    }
    fs::write(compiled.join("package.json"), "{\"type\": \"module\"}").unwrap();
    let modules = paths::repository().join("tools/typescript/node_modules");
    std::os::unix::fs::symlink(modules, compiled.join("node_modules")).unwrap();
    compile(&compiled, &["submit.ts", "batch.ts", "files.ts"]).await;
    let count = steps([Step::Shell(
        "wc -w < input.txt | tr -d ' ' > count.txt".to_owned(),
    )]);
    let count = count.answering("counted").prompt();

    for language in ["curl", "python", "typescript"] {
        let folder = system.folder().join(format!("{language}-files"));
        fs::create_dir(&folder).unwrap();
        let command = |name: &str| match language {
            "curl" => quiet(examples.join("curl").join(format!("{name}.sh"))),
            "python" => {
                let mut python = quiet("python3");
                python.arg(examples.join("python").join(format!("{name}.py")));
                python
            }
            _ => {
                let mut node = quiet("node");
                node.arg(compiled.join(format!("{name}.js")));
                node
            }
        };
        let said = example(&system, command("submit"), &folder, &["Say hello."]).await;
        assert!(
            said.contains("submitted job_") && said.contains("Say hello."),
            "{language}: {said}"
        );

        // The key of a submission is made of the name of the file, too.
        let prompts = format!("{language}.csv");
        fs::write(
            folder.join(&prompts),
            "prompt\none\n\"two, \"\"quoted\"\"\"\nthree\n",
        )
        .unwrap();
        for _ in 0..2 {
            // The second time it finds the jobs of the first.
            example(&system, command("batch"), &folder, &[&prompts, "results.csv"]).await;
        }
        let results = fs::read_to_string(folder.join("results.csv")).unwrap();
        assert_eq!(results.lines().count(), 4, "{language}: {results}");
        assert!(results.contains("two, \"\"quoted\"\""), "{language}: {results}");
        assert_eq!(results.matches("done").count(), 3, "{language}: {results}");

        fs::write(folder.join("input.txt"), "five words are in here\n").unwrap();
        let said = example(&system, command("files"), &folder, &["input.txt", &count, "out"]).await;
        assert!(said.contains("count.txt"), "{language}: {said}");
        assert_eq!(
            fs::read_to_string(folder.join("out/count.txt")).unwrap(),
            "5\n",
            "{language}"
        );
        let remove = system.client().request(
            reqwest::Method::DELETE,
            "/api/v1/sessions/files-example/files/count.txt",
        );
        assert_eq!(system.client().send(remove).await.status, 204);
    }
    // Each of the three prompts was run once in each language.
    let jobs = system.client().jobs("limit=100").await;
    assert_eq!(jobs.data(200).as_array().unwrap().len(), 3 * 5);
}

async fn the_page_of_the_example_chats() {
    let system = System::builder().start().await;
    let mut page = quiet("python3");
    page.arg(paths::repository().join("examples/python/chat_page.py"))
        .arg("0")
        .stdout(std::process::Stdio::piped());
    let mut page = with_key(page, &system).spawn().unwrap();
    let mut lines = BufReader::new(page.stdout.take().unwrap()).lines();
    let address = tokio::time::timeout(PATIENCE, lines.next_line()).await;
    let address = address.expect("it says where it listens").unwrap().unwrap();
    let ask = |arguments: &[&str]| {
        let mut curl = quiet("curl");
        curl.args(["--silent", "--show-error", "--no-buffer"])
            .args(arguments);
        done(curl)
    };

    assert!(ask(&[&address]).await.contains("<form"));
    for _ in 0..2 {
        let said = ask(&["--data", "Say hello.", &format!("{address}/chat")]).await;
        assert_eq!(said, "Claude: Say hello.\n");
    }
    // Another page can't spend this one's money.
    let elsewhere = ask(&[
        "--header",
        "Origin: http://elsewhere.example",
        "--data",
        "x",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
        &format!("{address}/chat"),
    ]);
    assert_eq!(elsewhere.await, "403");
    page.kill().await.unwrap();
    assert_eq!(
        system
            .client()
            .jobs("kind=chat")
            .await
            .data(200)
            .as_array()
            .unwrap()
            .len(),
        2
    );
}
