use super::*;
use crate::claude::message::fixtures;
use serde_json::{Value, json};

const SONNET: &str = "claude-sonnet-5-5";

fn metered(resumes: bool, messages: &[Message]) -> Spend {
    let mut meter = Meter::new(resumes);
    for message in messages {
        meter.observe(message);
    }
    meter.spend()
}

fn read(lines: &[Value]) -> Vec<Message> {
    lines
        .iter()
        .map(|line| Message::parse(line.to_string().as_bytes()))
        .collect()
}

fn start(id: &str, input: u64) -> Value {
    json!({"type": "stream_event", "event": {"type": "message_start",
        "message": {"id": id, "model": SONNET, "usage": {"input_tokens": input, "output_tokens": 1}}}})
}

fn delta(id: Option<&str>, output: u64) -> Value {
    json!({"type": "stream_event", "api_message_id": id,
        "event": {"type": "message_delta", "usage": {"output_tokens": output}}})
}

fn reported(input: u64, dollars: f64) -> Value {
    json!({"type": "control_response", "response": {"subtype": "success", "request_id": "u", "response":
        {"session": {"model_usage": {SONNET: {"inputTokens": input, "costUSD": dollars}}}}}})
}

fn result(members: &Value) -> Value {
    let mut line = json!({"type": "result", "subtype": "success", "is_error": false});
    line.as_object_mut()
        .unwrap()
        .extend(members.as_object().unwrap().clone());
    line
}

#[test]
fn a_run_costs_what_its_result_says() {
    let mut paid = 0;
    for (name, fixture) in fixtures::all() {
        let messages = fixture.messages();
        let result = messages.iter().rev().find_map(|message| match message {
            Message::Result(result) => Some(result),
            _ => None,
        });
        let Some(result) = result else { continue };

        let spend = metered(fixture.resumes, &messages);

        // In a resumed session the CLI's total holds the runs before.
        if !fixture.resumes {
            assert_eq!(spend.total(), result.total_cost.unwrap(), "{name}");
        }
        assert_eq!(
            (spend.estimated, spend.price_version.as_deref()),
            (false, None),
            "{name}"
        );
        paid += i32::from(spend.total() > MicroUsd::ZERO);
    }
    assert!(paid > 20, "{paid} runs cost something");
}

/// The same runs, as if the CLI had been killed a moment before its result line.
#[test]
fn a_killed_run_is_rebuilt_from_its_stream() {
    for (name, reason) in [
        ("text", "one request"),
        ("write", "two requests"),
        ("bash", "two requests"),
        ("thinking", "thinking is output"),
        ("max-turns", "many requests"),
        ("max-cost", "dear requests"),
        ("max-cost-text", "with writes to and reads from a cache"),
        ("structured-bad", "refused tool calls are paid"),
        ("refusal", "refusals are paid"),
        ("e529-twice", "failed requests cost nothing"),
    ] {
        let mut messages = fixtures::named(name).messages();
        let paid = metered(false, &messages);
        messages.retain(|message| !matches!(message, Message::Result(_)));

        let spend = metered(false, &messages);

        assert_eq!(
            (spend.total(), spend.usage()),
            (paid.total(), paid.usage()),
            "{name}: {reason}"
        );
        assert_eq!(
            (spend.estimated, spend.price_version.as_deref()),
            (true, Some(PRICES.version())),
            "{name}: {reason}"
        );
    }
}

#[test]
fn a_killed_run_never_costs_nothing() {
    for name in [
        "sigkill-streaming",
        "sigkill-tool",
        "sigterm-streaming",
        "sigterm-tool",
    ] {
        let spend = metered(false, &fixtures::named(name).messages());
        assert!(
            spend.estimated && spend.total() > MicroUsd::ZERO,
            "{name}: {spend:?}"
        );
    }
}

#[test]
fn a_resumed_run_costs_its_own_part() {
    let fixture = fixtures::named("resume");
    let mut messages = fixture.messages();
    assert!(fixture.resumes);

    // Two runs, each of one request of 100 tokens in and 20 out.
    let Some(Message::Result(result)) = messages
        .iter()
        .find(|message| matches!(message, Message::Result(_)))
    else {
        panic!()
    };
    assert_eq!(result.total_cost, Some(MicroUsd(800)));
    assert_eq!(metered(true, &messages).total(), MicroUsd(400));
    messages.retain(|message| !matches!(message, Message::Result(_)));
    assert_eq!(
        metered(true, &messages).total(),
        MicroUsd(400),
        "killed before its result"
    );
}

#[test]
fn each_request_counts_once() {
    let block = |output: u64| {
        json!({"type": "assistant", "message": {"id": "a", "model": SONNET, "content": [],
            "usage": {"input_tokens": 1_000, "output_tokens": output}}})
    };
    for (lines, micros, reason) in [
        (vec![start("a", 1_000)], 2_010, "cut off at its start"),
        (
            vec![start("a", 1_000), delta(Some("a"), 100)],
            3_000,
            "to its end",
        ),
        (
            vec![start("a", 1_000), delta(None, 100)],
            3_000,
            "an older release names the message only once",
        ),
        (
            vec![start("a", 1_000), block(1), block(1), delta(Some("a"), 100)],
            3_000,
            "blocks repeat what is known",
        ),
        (vec![block(1), block(1)], 2_010, "blocks alone, without a stream"),
        (
            vec![
                start("a", 1_000),
                delta(Some("a"), 100),
                start("b", 1_000),
                delta(Some("b"), 100),
            ],
            6_000,
            "two",
        ),
        (vec![delta(None, 100)], 0, "an end without a start"),
        (
            vec![
                json!({"type": "assistant", "message": {"id": "a", "model": "<synthetic>", "usage": {"input_tokens": 9}}}),
            ],
            0,
            "the CLI's own words are free",
        ),
    ] {
        assert_eq!(
            metered(false, &read(&lines)).total(),
            MicroUsd(micros),
            "{reason}"
        );
    }
}

#[test]
fn what_the_cli_reports_counts_when_it_is_more() {
    for (resumes, lines, micros, reason) in [
        (
            false,
            vec![start("a", 1_000), reported(9_000, 0.5)],
            500_000,
            "it also knows subagents",
        ),
        (
            false,
            vec![reported(0, 0.0), start("a", 1_000)],
            2_010,
            "it was asked too early",
        ),
        (
            true,
            vec![reported(9_000, 0.5), start("a", 1_000)],
            2_010,
            "before the first message: the runs before",
        ),
        (
            true,
            vec![reported(9_000, 0.5), start("a", 1_000), reported(9_500, 0.75)],
            250_000,
            "without the runs before",
        ),
        (
            true,
            vec![start("a", 1_000), reported(9_000, 0.5)],
            2_010,
            "a sum with an unknown part isn't used",
        ),
        (
            false,
            vec![
                start("a", 1_000),
                result(
                    &json!({"model_usage_since_last_result": {SONNET: {"inputTokens": 1_000, "costUSD": 0.002}}}),
                ),
                reported(9_000, 0.5),
            ],
            500_000,
            "without what a result settled, and with it once",
        ),
    ] {
        assert_eq!(
            metered(resumes, &read(&lines)).total(),
            MicroUsd(micros),
            "{reason}"
        );
    }
}

#[test]
fn results_add_up() {
    let since = |dollars: f64| {
        result(
            &json!({"model_usage_since_last_result": {SONNET: {"costUSD": dollars}}, "modelUsage": {SONNET: {"costUSD": 99}}}),
        )
    };
    let older = |dollars: f64| result(&json!({"modelUsage": {SONNET: {"costUSD": dollars}}}));

    assert_eq!(
        metered(false, &read(&[since(0.5), since(0.25)])).total(),
        MicroUsd(750_000)
    );
    assert_eq!(metered(true, &read(&[since(0.5)])).total(), MicroUsd(500_000));
    assert_eq!(
        metered(false, &read(&[older(0.5), older(0.75)])).total(),
        MicroUsd(750_000),
        "a sum over the process"
    );
}

#[test]
fn each_model_has_its_own_row() {
    let spend = metered(
        false,
        &read(&[result(&json!({"model_usage_since_last_result": {
            "b": {"inputTokens": 7, "cacheReadInputTokens": 3, "costUSD": 0.5}, "a": {"outputTokens": 2, "costUSD": 0.000_000_4}
        }}))]),
    );

    let rows: Vec<_> = spend
        .models
        .iter()
        .map(|row| (row.model.as_str(), row.cost))
        .collect();
    assert_eq!(
        rows,
        [("a", MicroUsd(0)), ("b", MicroUsd(500_000))],
        "rounded to the nearest micro-dollar"
    );
    assert_eq!((spend.usage().input_tokens, spend.usage().output_tokens), (7, 2));
}

#[test]
fn a_result_without_prices_is_estimated() {
    let spend = metered(
        false,
        &read(&[result(
            &json!({"model_usage_since_last_result": {SONNET: {"inputTokens": 1_000}}}),
        )]),
    );

    assert_eq!((spend.total(), spend.estimated), (MicroUsd(2_000), true));
}

#[test]
fn a_run_without_a_request_costs_nothing_for_sure() {
    assert_eq!(metered(false, &[]), Spend::default());
}
