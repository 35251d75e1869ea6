//! What the CLI says that it has cost. It decides nothing, since a run may write anything: it is kept beside what the
//! gateway metered, for people.

use crate::claude::message::{Message, ResultLine};
use shared::money::MicroUsd;

/// Adds up the result lines of an attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reported(Option<MicroUsd>);

impl Reported {
    /// Takes note of a message.
    pub fn observe(&mut self, message: &Message) {
        let Message::Result(result) = message else {
            return;
        };
        self.0 = since_last_result(result)
            .map(|more| self.0.unwrap_or_default() + more)
            // Older releases: sums over this process alone.
            .or(result.total_cost)
            .or(self.0);
    }

    /// The sum, if there was a result line.
    pub fn cost(self) -> Option<MicroUsd> {
        self.0
    }

    /// Whether it differs from the metered cost by more than one per cent.
    pub fn differs(self, metered: MicroUsd) -> bool {
        self.0.is_some_and(|reported| {
            let difference = i128::from(reported.0) - i128::from(metered.0);
            difference.abs() * 100 > i128::from(metered.0.max(reported.0))
        })
    }
}

/// None if a part of it has no price.
fn since_last_result(result: &ResultLine) -> Option<MicroUsd> {
    let models = result.model_usage_since_last_result.as_ref()?;
    models.values().map(|usage| usage.cost).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claude::message::fixtures;

    #[test]
    fn the_result_lines_of_a_process_add_up() {
        let line = |dollars: f64| {
            let line = serde_json::json!({"type": "result", "total_cost_usd": 99,
                "model_usage_since_last_result": {"m": {"costUSD": dollars}}});
            Message::parse(line.to_string().as_bytes())
        };
        let mut reported = Reported::default();
        assert_eq!(reported.cost(), None);
        reported.observe(&line(0.25));
        reported.observe(&line(0.5));
        assert_eq!(reported.cost(), Some(MicroUsd(750_000)));
        assert!(!reported.differs(MicroUsd(750_000)) && !reported.differs(MicroUsd(743_000)));
        assert!(reported.differs(MicroUsd(742_000)) && reported.differs(MicroUsd(758_000)));
        assert!(reported.differs(MicroUsd(0)) && !Reported::default().differs(MicroUsd(1)));
    }

    #[test]
    fn a_recorded_run_reports_what_its_result_says() {
        for (name, fixture) in fixtures::all() {
            let mut reported = Reported::default();
            let messages = fixture.messages();
            messages.iter().for_each(|message| reported.observe(message));
            let result = messages.iter().rev().find_map(|message| match message {
                Message::Result(result) => Some(result),
                _ => None,
            });
            // In a resumed session the CLI's total holds the runs before.
            if !fixture.resumes {
                assert_eq!(
                    reported.cost(),
                    result.and_then(|result| result.total_cost),
                    "{name}"
                );
            }
        }
    }
}
