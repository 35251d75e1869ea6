//! A cancel, a timeout: final, paid for, and no process left, whatever the run does about it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::client::Client;
use tests::database::Db;
use tests::paths;
use tests::script::{Deaf, Script, Step, daemon, steps};
use tests::system::System;
use tests::{BUSY, both, once};

both!(
    a_queued_job_is_cancelled_at_once,
    a_running_job_is_cancelled_and_paid_for,
    a_finished_job_cannot_be_cancelled,
    a_run_ends_at_its_timeout,
);
once!(
    a_bad_reason_cancels_nothing,
    a_deaf_run_is_ended,
    a_deaf_run_is_ended_without_a_sandbox,
    a_run_that_answers_a_cancel_and_stays_is_ended,
    a_run_that_repeats_its_results_is_ended,
    a_frozen_run_is_ended,
    a_frozen_run_is_ended_without_a_sandbox,
    a_daemon_ends_with_a_cancelled_run,
    a_daemon_ends_with_a_cancelled_run_without_a_sandbox,
    a_daemon_ends_with_a_finished_run,
    a_daemon_ends_with_a_finished_run_without_a_sandbox,
    a_run_that_never_speaks_is_ended,
    a_run_that_falls_silent_is_ended,
    an_open_tool_call_is_no_silence,
);

async fn a_queued_job_is_cancelled_at_once(db: Db) {
    let system = System::builder().database(db).workers(0).start().await;
    let client = system.client();
    let id = client.accepted("never").await;

    let job = client.cancel(&id).await;

    let job = job.data(200);
    assert_eq!(
        (&job["status"], &job["cancel_reason"]),
        (&json!("cancelled"), &json!("user"))
    );
    assert_eq!((&job["started_at"], &job["cost"]), (&Value::Null, &json!(0.0)));
    assert!(job["completed_at"].is_string(), "{job:#}");
    assert_eq!(client.cancel(&id).await.data(200), job);
    assert_eq!(system.database().number("select count(*) from attempt").await, 0);
}

/// Submits a script, waits until it has said `ready`, and cancels it; the job at its end and how long that took.
async fn cancel_when_ready(client: &Client, script: &Script) -> (Value, Duration) {
    let id = client.play(script).await;
    cancel_ready(client, &id).await
}

/// The same for a job that was submitted.
async fn cancel_ready(client: &Client, id: &str) -> (Value, Duration) {
    client.event(id, "assistant").await;
    let begin = Instant::now();
    let answer = client.cancel(id).await;
    let job = answer.data(202);
    assert!(job["cancel_requested_at"].is_string(), "{job:#}");
    // Once more changes nothing.
    let again = client.cancel(id).await;
    assert!(matches!(again.status, 200 | 202), "{}", again.text);
    assert_eq!(
        again.json["data"]["cancel_requested_at"],
        job["cancel_requested_at"]
    );
    let job = client.finished(id).await;
    assert_eq!(
        (&job["status"], &job["cancel_reason"]),
        (&json!("cancelled"), &json!("user")),
        "{job:#}"
    );
    (job, begin.elapsed())
}

fn ready(then: impl IntoIterator<Item = Step>) -> Script {
    steps([Step::Spend(0.25)].into_iter().chain(then))
}

async fn a_running_job_is_cancelled_and_paid_for(db: Db) {
    let system = System::start(db).await;
    let client = system.client();

    let (job, took) = cancel_when_ready(&client, &ready([Step::Hang])).await;

    assert!(took < Duration::from_secs(6) + BUSY, "{took:?}");
    // It wasn't made to end: it was asked to, and gave its result.
    assert_eq!(job["result"]["subtype"], "error_during_execution", "{job:#}");
    assert_eq!(job["cost"], 0.25);
    let id = job["id"].as_str().unwrap();
    let types: Vec<String> = client
        .all_events(id)
        .await
        .iter()
        .map(|event| event["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(types.last().unwrap(), "cancelled");
    assert_eq!(types.iter().filter(|kind| *kind == "cancelling").count(), 1);
    assert_eq!(
        system
            .database()
            .number("select cast(sum(cost) as bigint) from ledger")
            .await,
        250_000
    );
    assert_eq!(
        system
            .database()
            .number("select count(*) from budget_period where reserved <> 0")
            .await,
        0
    );
    assert_eq!(system.run_processes(), []);
}

async fn a_finished_job_cannot_be_cancelled(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let done = client.accepted("hi").await;
    client.finished(&done).await;
    let failed = client.play(&steps([Step::Exit(3)])).await;
    client.finished(&failed).await;

    for (id, status) in [(done, "done"), (failed, "failed")] {
        let answer = client.cancel(&id).await;
        answer.assert_problem(409, "job-terminal");
        assert_eq!(answer.json["detail"], format!("Job already {status}"));
        assert_eq!(client.job(&id).await.data(200)["status"], status);
    }
}

async fn a_bad_reason_cancels_nothing() {
    let system = System::builder().workers(0).start().await;
    let client = system.client();
    let id = client.accepted("hi").await;
    let path = format!("/api/v1/jobs/{id}/cancel");

    let faults = [("body -> reason", "string_too_long")];
    client
        .post(&path, &json!({ "reason": "r".repeat(201) }))
        .await
        .assert_faults(&faults);
    client
        .post(&path, &json!({ "why": "x" }))
        .await
        .assert_faults(&[("body -> why", "extra_forbidden")]);
    assert_eq!(client.job(&id).await.data(200)["status"], "queued");

    client
        .post(&path, &json!({ "reason": "not needed any more" }))
        .await
        .data(200);
}

/// Cancels a run, which must be over and gone within six seconds, or soon after on a busy machine.
async fn is_ended(db: Db, sandbox: bool, script: &Script) {
    let system = System::builder().database(db).sandbox(sandbox).start().await;

    let (job, took) = cancel_when_ready(&system.client(), script).await;

    assert!(took < Duration::from_secs(6) + BUSY, "{took:?}");
    // Final means that nothing lives any more.
    assert_eq!(system.run_processes(), []);
    assert_eq!(job["cost"], 0.25, "{job:#}");
}

async fn a_deaf_run_is_ended() {
    is_ended(
        Db::Sqlite,
        true,
        &ready([Step::Hang])
            .deaf_to(Deaf::Interrupt)
            .deaf_to(Deaf::Signals),
    )
    .await;
}

async fn a_deaf_run_is_ended_without_a_sandbox() {
    let script = ready([Step::Hang])
        .deaf_to(Deaf::Interrupt)
        .deaf_to(Deaf::Signals)
        .deaf_to(Deaf::Stdin);
    is_ended(Db::Sqlite, false, &script).await;
}

/// Cancels a run of a CLI that gives its result when it is interrupted, and then does this. It hears no signal and no
/// end of its input.
async fn is_ended_after_its_answer(db: Db, then: &str) {
    let result = json!({
        "type": "result", "subtype": "error_during_execution", "is_error": true, "terminal_reason": "aborted_streaming",
    });
    let init = json!({ "type": "system", "subtype": "init", "apiKeySource": "ANTHROPIC_API_KEY" });
    let message =
        json!({ "id": "m1", "model": "claude-sonnet-5-5", "content": [{ "type": "text", "text": "ready" }] });
    let ready = json!({ "type": "assistant", "message": message });
    let script = format!(
        r#"case $1 in --version) echo '2.1.331 (Claude Code)'; exit ;; esac
trap '' TERM HUP INT
result() {{ echo '{result}'; }}
echo '{init}'
echo '{ready}'
while read -r line; do case $line in *'"interrupt"'*) break ;; esac; done
result
{then}"#
    );
    let cli = paths::program("answering", &script);
    let system = System::builder()
        .database(db)
        .env("CLAUDE_CLI_PATH", cli.to_str().unwrap())
        .start()
        .await;
    let client = system.client();
    let id = client.accepted("wait").await;

    let (_, took) = cancel_ready(&client, &id).await;

    // Two seconds after the answer.
    assert!(took < Duration::from_secs(2) + BUSY, "{took:?}");
    assert_eq!(system.run_processes(), []);
}

async fn a_run_that_answers_a_cancel_and_stays_is_ended() {
    is_ended_after_its_answer(Db::Sqlite, "exec sleep 600").await;
}

async fn a_run_that_repeats_its_results_is_ended() {
    is_ended_after_its_answer(Db::Sqlite, "while :; do result; sleep 0.2; done").await;
}

async fn a_frozen_run_is_ended() {
    is_ended(Db::Sqlite, true, &ready([Step::Freeze])).await;
}

async fn a_frozen_run_is_ended_without_a_sandbox() {
    is_ended(Db::Sqlite, false, &ready([Step::Freeze]).deaf_to(Deaf::Signals)).await;
}

async fn a_daemon_ends_with_a_cancelled_run() {
    is_ended(Db::Sqlite, true, &daemonic().then(Step::Hang)).await;
}

async fn a_daemon_ends_with_a_cancelled_run_without_a_sandbox() {
    is_ended(Db::Sqlite, false, &daemonic().then(Step::Hang)).await;
}

/// Says that it is ready only when its daemon runs; the daemon's call costs nothing to speak of.
fn daemonic() -> Script {
    steps([daemon(), Step::Spend(0.2496)])
}

async fn a_daemon_ends_with_a_finished_run() {
    a_daemon_ends(Db::Sqlite, true).await;
}

async fn a_daemon_ends_with_a_finished_run_without_a_sandbox() {
    a_daemon_ends(Db::Sqlite, false).await;
}

async fn a_daemon_ends(db: Db, sandbox: bool) {
    let system = System::builder().database(db).sandbox(sandbox).start().await;
    let client = system.client();

    let id = client.play(&steps([daemon()]).answering("left one behind")).await;

    let job = client.finished(&id).await;
    assert_eq!(job["result"]["content"], "left one behind", "{job:#}");
    assert_eq!(system.run_processes(), []);
}

async fn a_run_ends_at_its_timeout(db: Db) {
    let system = System::start(db).await;
    let client = system.client();
    let message = daemonic().then(Step::Hang).prompt();
    let begin = Instant::now();

    // Long enough for what it does before.
    let id = client
        .accepted_body(&json!({ "message": message, "timeout_seconds": 5 }))
        .await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("timeout")),
        "{job:#}"
    );
    assert!(job["error"].as_str().unwrap().contains("5 s"), "{}", job["error"]);
    assert_eq!(job["cost"], 0.25);
    let took = begin.elapsed();
    assert!(
        took > Duration::from_secs(5) && took < Duration::from_secs(5 + 6) + BUSY,
        "{took:?}"
    );
    assert_eq!(system.run_processes(), []);
    assert_eq!(client.all_events(&id).await.last().unwrap()["type"], "error");
}

async fn a_run_that_never_speaks_is_ended() {
    let cli = paths::program(
        "mute",
        "case $1 in --version) echo '2.1.331 (Claude Code)' ;; *) exec sleep 600 ;; esac",
    );
    let system = System::builder()
        .env("CLAUDE_CLI_PATH", cli.to_str().unwrap())
        .env("JOB_FIRST_OUTPUT_SECONDS", "1")
        .start()
        .await;
    let client = system.client();

    let id = client
        .accepted_body(&json!({ "message": "anybody there?", "max_attempts": 1 }))
        .await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("timeout")),
        "{job:#}"
    );
    assert_eq!(system.run_processes(), []);
}

async fn a_run_that_falls_silent_is_ended() {
    let system = System::builder()
        // Longer than it takes a busy machine to get from one line to the next.
        .env("JOB_IDLE_SECONDS", "4")
        .start()
        .await;
    let client = system.client();

    let id = client
        .accepted_body(&json!({ "message": ready([Step::Hang]).prompt(), "max_attempts": 1 }))
        .await;

    let job = client.finished(&id).await;
    assert_eq!(
        (&job["status"], &job["error_code"]),
        (&json!("failed"), &json!("timeout")),
        "{job:#}"
    );
    assert_eq!(job["cost"], 0.25);
    assert_eq!(system.run_processes(), []);
}

async fn an_open_tool_call_is_no_silence() {
    let system = System::builder().env("JOB_IDLE_SECONDS", "4").start().await;
    let client = system.client();

    // A tool has three times as long.
    let id = client
        .play(&steps([Step::Tool(6_000)]).answering("patience"))
        .await;

    let job = client.finished(&id).await;
    assert_eq!(job["result"]["content"], "patience", "{job:#}");
}
