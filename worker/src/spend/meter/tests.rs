use super::*;
use crate::claude::message::fixtures::{self, Fixture};
use crate::spend::Reported;
use crate::spend::answer::AnswerReader;
use proptest::prelude::*;
use std::time::Duration;

fn meter(dollars: f64) -> Arc<Meter> {
    Arc::new(Meter::new(Arc::default(), MicroUsd::from_usd(dollars).unwrap()))
}

/// A request for opus whose answer may have so many tokens: a fiftieth of a dollar for a thousand.
fn planned(output: u64) -> Planned {
    Planned {
        model: "opus".to_owned(),
        output,
        ..Planned::default()
    }
}

fn answered(output: u64) -> Reading {
    Reading {
        model: Some("claude-opus-5-5".to_owned()),
        usage: Usage {
            output,
            ..Usage::default()
        },
        is_final: true,
        ..Reading::default()
    }
}

/// Whether it has to wait.
async fn waits<T>(future: &mut (impl Future<Output = T> + Unpin)) -> bool {
    tokio::time::timeout(Duration::from_millis(20), future)
        .await
        .is_err()
}

#[tokio::test]
async fn each_model_has_its_own_row_and_its_own_price() {
    let meter = meter(1.0);
    for model in [
        "claude-opus-5-5",
        "claude-haiku-4-5-20251001",
        "claude-opus-5-5[1m]",
    ] {
        let mut metered = meter.admit(planned(0)).await.unwrap();
        metered.observe(&Reading {
            model: Some(model.to_owned()),
            ..answered(1_000)
        });
    }
    let spend = meter.spend();
    let rows: Vec<(&str, i64)> = spend
        .models
        .iter()
        .map(|row| (row.model.as_str(), row.cost.0))
        .collect();
    assert_eq!(rows, [("claude-haiku-4-5", 5_000), ("claude-opus-5-5", 40_000)]);
    assert_eq!(
        (spend.estimated, spend.price_version.as_deref()),
        (false, Some("2026-11-24"))
    );
}

#[tokio::test]
async fn a_cut_answer_counts_and_is_estimated() {
    let meter = meter(1.0);
    let mut metered = meter.admit(planned(1_000)).await.unwrap();
    metered.observe(&Reading {
        is_final: false,
        ..answered(100)
    });
    assert_eq!(
        (meter.spend().total(), meter.spend().estimated),
        (MicroUsd(2_000), true),
        "while it runs"
    );
    drop(metered);
    assert_eq!(
        (meter.spend().total(), meter.spend().estimated),
        (MicroUsd(2_000), true),
        "and after it"
    );
}

#[tokio::test]
async fn a_request_that_was_never_answered_costs_nothing_unless_it_was_presumed() {
    let meter = meter(1.0);
    drop(meter.admit(planned(1_000)).await.unwrap());
    assert_eq!(meter.spend(), Spend::default());
    let mut metered = meter
        .admit(Planned {
            prompt: 1_000,
            ..planned(1_000)
        })
        .await
        .unwrap();
    metered.presume(false);
    drop(metered);
    assert_eq!(
        meter.spend().total(),
        MicroUsd(8_000),
        "its prompt, written to a cache for an hour"
    );
}

#[tokio::test]
async fn thoughts_that_a_cut_answer_didnt_show_count_by_their_time() {
    let meter = meter(1.0);
    for (output, tokens) in [(128_000, 4 * 400), (1_000, 1_000)] {
        let before = meter.spend().total();
        let mut metered = meter.admit(planned(output)).await.unwrap();
        metered.observe(&Reading {
            is_final: false,
            ..answered(10)
        });
        metered.presume_thoughts(Duration::from_millis(3_500));
        drop(metered);
        let cost = meter.spend().total().0 - before.0;
        assert_eq!(cost, tokens * 20, "of at most {output}");
    }
    assert!(meter.spend().estimated);
}

#[tokio::test]
async fn a_request_whose_prompt_the_api_makes_longer_is_sent_alone() {
    let meter = meter(1.0);
    let fetches = || Planned {
        unseen: 1_000_000,
        ..planned(10)
    };
    let small = meter.admit(planned(10)).await.unwrap();
    let mut big = Box::pin(meter.admit(fetches()));
    assert!(waits(&mut big).await, "its document may cost eight dollars");
    drop(small);
    let big = big.await.expect("alone it may");
    drop(big);
    assert_eq!(meter.spend(), Spend::default());
}

#[tokio::test]
async fn a_lone_request_is_admitted_while_anything_is_left_and_none_after() {
    let meter = meter(0.01);
    let mut metered = meter.admit(planned(128_000)).await.unwrap();
    metered.observe(&answered(499));
    drop(metered);
    let mut metered = meter
        .admit(planned(128_000))
        .await
        .expect("0.00002 dollars are left");
    metered.observe(&answered(1));
    drop(metered);
    assert!(meter.admit(planned(1)).await.is_err());
}

#[tokio::test]
async fn a_request_that_may_not_fit_waits_for_those_under_way() {
    let meter = meter(0.05);
    let first = meter.admit(planned(1_000)).await.unwrap();
    let second = meter.admit(planned(1_000)).await.unwrap();
    let third = meter.admit(planned(1_000));
    tokio::pin!(third);
    assert!(waits(&mut third).await, "0.06 dollars don't fit");
    drop(first);
    let third = third.await.expect("0.04 do");
    let mut big = Box::pin(meter.admit(planned(128_000)));
    assert!(waits(&mut big).await);
    drop(second);
    assert!(waits(&mut big).await, "another one is under way");
    drop(third);
    let mut big = big.await.expect("now it is alone");
    let mut last = Box::pin(meter.admit(planned(1)));
    assert!(waits(&mut last).await);
    big.observe(&answered(3_000));
    drop(big);
    assert!(last.await.is_err(), "nothing is left");
}

#[tokio::test]
async fn a_change_is_told() {
    let meter = meter(1.0);
    let mut changes = meter.changes();
    let mut metered = meter.admit(planned(1)).await.unwrap();
    assert!(!changes.has_changed().unwrap());
    metered.observe(&answered(1));
    changes.changed().await.unwrap();
    drop(metered);
    changes.changed().await.unwrap();
}

#[tokio::test]
async fn a_run_that_invents_models_fills_no_ledger() {
    let meter = meter(100_000.0);
    for number in 0..200 {
        let asked = Planned {
            model: format!("m{number}-{}", "x".repeat(1_000)),
            ..planned(1)
        };
        let mut metered = meter.admit(asked).await.unwrap();
        metered.observe(&Reading {
            model: None,
            ..answered(1_000)
        });
    }
    let spend = meter.spend();
    assert_eq!(spend.models.len(), MAX_MODELS + 1);
    assert!(spend.models.iter().all(|row| row.model.chars().count() <= 100));
    assert_eq!(
        spend.total(),
        MicroUsd(200 * 75_000),
        "each costs the dearest row"
    );
}

/// The answers of a recorded run, as the API sent them: the CLI repeats each event of its streams.
fn answers(fixture: &Fixture) -> Vec<AnswerReader> {
    let mut answers: Vec<AnswerReader> = Vec::new();
    for line in fixture.lines().filter(|line| line["type"] == "stream_event") {
        let event = &line["event"];
        if event["type"] == "message_start" {
            answers.push(AnswerReader::new(true));
        }
        if let Some(answer) = answers.last_mut() {
            answer.read(format!("event: x\ndata: {event}\n\n").as_bytes());
        }
    }
    answers.iter_mut().for_each(AnswerReader::end);
    answers
}

#[tokio::test]
async fn recorded_runs_cost_what_the_cli_says() {
    let (mut compared, mut differ) = (Vec::new(), Vec::new());
    for (name, fixture) in fixtures::all() {
        let mut reported = Reported::default();
        fixture
            .messages()
            .iter()
            .for_each(|message| reported.observe(message));
        // What the stream doesn't show: subagents, side requests, and the rest of a request that was cut.
        let events = |kind: &str| {
            fixture
                .lines()
                .filter(|line| line["event"]["type"] == kind)
                .count()
        };
        let is_complete = name != "subagent"
            && ![
                "interrupt",
                "reset",
                "sigint",
                "sigkill",
                "sigterm",
                "stream-error",
            ]
            .iter()
            .any(|cut| name.starts_with(cut))
            && events("message_start") == events("message_stop");
        let Some(reported) = reported.cost().filter(|_| is_complete) else {
            continue;
        };
        let meter = meter(100.0);
        for answer in answers(&fixture) {
            let mut metered = meter.admit(planned(1)).await.unwrap();
            metered.observe(answer.reading());
        }
        let metered = meter.spend();
        if metered.total() != reported || metered.estimated {
            differ.push(format!(
                "{name}: metered {}, reported {reported}",
                metered.total()
            ));
        }
        if reported > MicroUsd::ZERO {
            compared.push(name);
        }
    }
    assert_eq!(differ, [""; 0]);
    assert!(compared.len() >= 30, "{}: {compared:?}", compared.len());
    let varied = compared.iter().filter(|name| name.starts_with("cost-")).count();
    assert!(varied >= 15, "{compared:?}");
}

/// What happens to one of the requests.
#[derive(Clone, Debug)]
enum Happens {
    Asked { output: u64, prompt: u64 },
    Streamed { which: usize, output: u64 },
    Finished { which: usize, output: u64 },
    Cut { which: usize },
    Presumed { which: usize },
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        (0..4_000_u64, 0..4_000_u64).prop_map(|(output, prompt)| Happens::Asked { output, prompt }),
        (0..8_usize, 0..4_000_u64).prop_map(|(which, output)| Happens::Streamed { which, output }),
        (0..8_usize, 0..4_000_u64).prop_map(|(which, output)| Happens::Finished { which, output }),
        (0..8_usize).prop_map(|which| Happens::Cut { which }),
        (0..8_usize).prop_map(|which| Happens::Presumed { which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Against a slow and obvious sum: opus costs 20 billionths of a dollar times a thousand for each token of output,
    /// and 8 for each of a prompt that is presumed.
    #[test]
    fn whatever_happens_the_sum_is_that_of_the_answers(course in prop::collection::vec(happens(), 1..60), cap in 1..400_u64) {
        const OUTPUT: u64 = 20_000;
        const PROMPT: u64 = 8_000;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let reserved = cap * 1_000_000;
            let meter = Arc::new(Meter::new(Arc::default(), NanoUsd(reserved).to_micros()));
            // Request, its worst case, what it has cost so far.
            let mut open: Vec<(Metered, u64, u64)> = Vec::new();
            let (mut settled, mut largest) = (0_u64, 0_u64);
            for happens in course {
                let count = open.len();
                match happens {
                    Happens::Asked { output, prompt } => {
                        let worst = output * OUTPUT + prompt * PROMPT;
                        let asked = Planned { prompt, ..planned(output) };
                        let spent = settled + open.iter().map(|(.., so_far)| so_far).sum::<u64>();
                        let committed = settled + open.iter().map(|(_, worst, so_far)| worst.max(so_far)).sum::<u64>();
                        let admitted = tokio::time::timeout(Duration::ZERO, meter.admit(asked)).await;
                        if spent >= reserved {
                            assert!(matches!(admitted, Ok(Err(NothingLeft))));
                        } else if open.is_empty() || committed + worst <= reserved {
                            largest = largest.max(worst);
                            open.push((admitted.unwrap().unwrap(), worst, 0));
                        } else {
                            assert!(admitted.is_err(), "it has to wait");
                        }
                    }
                    Happens::Streamed { which, output } if which < count => {
                        let (metered, worst, so_far) = &mut open[which];
                        // No answer is longer than was asked for.
                        let output = output.min(*worst / OUTPUT);
                        metered.observe(&Reading { is_final: false, ..answered(output) });
                        *so_far = output * OUTPUT;
                    }
                    Happens::Finished { which, output } if which < count => {
                        let (mut metered, worst, _) = open.remove(which);
                        let output = output.min(worst / OUTPUT);
                        metered.observe(&answered(output));
                        settled += output * OUTPUT;
                    }
                    Happens::Cut { which } if which < count => settled += open.remove(which).2,
                    Happens::Presumed { which } if which < count => {
                        let (mut metered, ..) = open.remove(which);
                        metered.presume(false);
                        settled += metered.planned.prompt * PROMPT;
                    }
                    _ => {}
                }
                let spent = settled + open.iter().map(|(.., so_far)| so_far).sum::<u64>();
                assert_eq!(meter.spend().total(), NanoUsd(spent).to_micros());
                assert!(spent <= reserved.max(1) + largest, "more than the reservation and one answer");
            }
            drop(open);
        });
    }
}
