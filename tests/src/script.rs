//! What the scripted CLI (`fake-claude`) is to do, written into the prompt. A prompt without a script is answered with
//! itself, exactly as it came. The simulator and the real CLI are for what a model would do; this is for what the real CLI is
//! too slow or too well behaved for.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The course of one run. Steps are played in order, then the answer ends it as a success.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    /// What happens before the answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// The text of the result; the message itself, as the CLI got it, when empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub answer: String,
    /// What the answer's message costs, in USD; else that of 100 tokens in and 20 out. The steps' messages cost extra.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// The value of `structured_output`, when a schema was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub structured: Option<Value>,
    /// What the CLI is deaf to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deaf: Vec<Deaf>,
    /// A word under which the run writes when it lives into `trace.log` in its working directory; see
    /// [`crate::trace`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Other scripts for the first, second ... run in the same home; the last one for all further runs. When given,
    /// everything else here is ignored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<Script>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// A message of the assistant.
    Say(String),
    /// Silence, in milliseconds; ends early when interrupted.
    Sleep(u64),
    /// Silence for ever; only an interrupt or a signal ends it.
    Hang,
    /// Silence until there is such a file, its path relative to the working directory; ends early when interrupted.
    Until(String),
    /// A message of this price, in USD.
    Spend(f64),
    /// A request through the gateway, which the simulator answers with this scenario; tried again twice when it fails,
    /// and then the end, as the real CLI does it.
    Request(String),
    /// Requests through the gateway that the CLI knows nothing of, as a program of the agent makes them. A line for each
    /// in [`REQUESTS`] says what came back.
    Direct {
        /// For which model.
        model: String,
        /// Tokens of the prompt, and of the answer.
        tokens: (u64, u64),
        /// How many there are.
        count: usize,
        /// How many of them at once.
        at_once: usize,
    },
    /// The same for so many seconds, however many they are.
    DirectFor {
        /// For which model.
        model: String,
        /// Tokens of the prompt, and of the answer.
        tokens: (u64, u64),
        /// How many of them at once.
        at_once: usize,
        /// For how long new ones begin.
        seconds: u64,
    },
    /// A call of the Bash tool that really runs, in a session of its own as the real tool does it.
    Shell(String),
    /// A call of the Write tool that really writes, relative to the working directory.
    Write {
        /// The path.
        file: String,
        /// The whole content.
        content: String,
    },
    /// A call of the Bash tool that stays open for so many milliseconds without running anything.
    Tool(u64),
    /// Many messages of the assistant, as fast as the reader takes them.
    Flood {
        /// How many.
        lines: u32,
        /// How many bytes of text each has.
        bytes: usize,
    },
    /// A line on standard output, as it is.
    Raw(String),
    /// A control request of this subtype to the client, and what it answered as a message of the assistant. Without an
    /// answer it waits for ever, as the real CLI does.
    Ask(String),
    /// Text on standard error.
    Stderr(String),
    /// The end, with this exit code and without a result.
    Exit(i32),
    /// The end by a signal to itself, by number.
    Die(i32),
    /// Nothing is written any more, but the process lives on without reading, hearing or speaking.
    Freeze,
    /// A failure of the Messages API, after the CLI's two retries (without their delays).
    ApiError {
        /// The HTTP status; none for a network error.
        status: Option<u16>,
        /// The word in the assistant's message: `rate_limit`, `server_error` ...
        error: String,
        /// What the person reads.
        text: String,
    },
    /// The usage limit of a subscription, reset at this time (seconds since the epoch).
    UsageLimit(i64),
}

/// What the CLI doesn't react to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deaf {
    /// `interrupt` control requests: read, but without any effect.
    Interrupt,
    /// SIGTERM, SIGINT and SIGHUP.
    Signals,
    /// Standard input: not read any more after the first message.
    Stdin,
    /// The end of standard input: the process stays after its result.
    End,
}

/// A step that holds its run until there is this file. Runs without a sandbox see it wherever it is.
pub fn until(file: impl AsRef<Path>) -> Step {
    Step::Until(file.as_ref().to_string_lossy().into_owned())
}

/// The file that [`Step::Direct`] writes.
pub const REQUESTS: &str = "requests.log";

/// The file that [`until_told`] waits for.
pub const GO_ON: &str = "go-on";

/// A step that holds its run until [`System::tell_to_go_on`](crate::system::System::tell_to_go_on).
pub fn until_told() -> Step {
    until(GO_ON)
}

/// A script that answers this.
pub fn answer(text: &str) -> Script {
    Script {
        answer: text.to_owned(),
        ..Script::default()
    }
}

/// A script that begins with these steps.
pub fn steps(steps: impl IntoIterator<Item = Step>) -> Script {
    Script {
        steps: steps.into_iter().collect(),
        ..Script::default()
    }
}

/// A step that leaves a daemon behind: detached from everything, deaf to every signal that can be ignored.
pub fn daemon() -> Step {
    Step::Shell(
        "setsid nohup sh -c 'trap \"\" TERM HUP INT; while :; do sleep 1; done' >/dev/null 2>&1 </dev/null & echo started"
            .to_owned(),
    )
}

impl Script {
    /// With one more step at the end.
    #[must_use]
    pub fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// With this text as the result.
    #[must_use]
    pub fn answering(mut self, text: &str) -> Self {
        text.clone_into(&mut self.answer);
        self
    }

    /// With this price for the answer, in USD.
    #[must_use]
    pub fn costing(mut self, usd: f64) -> Self {
        self.cost = Some(usd);
        self
    }

    /// Deaf to this as well.
    #[must_use]
    pub fn deaf_to(mut self, what: Deaf) -> Self {
        self.deaf.push(what);
        self
    }

    /// With a trace under this word.
    #[must_use]
    pub fn traced(mut self, tag: &str) -> Self {
        self.trace = Some(tag.to_owned());
        self
    }

    /// The prompt that plays this script.
    pub fn prompt(&self) -> String {
        serde_json::json!({ "fake": self }).to_string()
    }

    /// The script in a text, wherever it begins; what comes before and after it is ignored.
    pub fn find(text: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Outer {
            fake: Script,
        }
        let begin = text.find(r#"{"fake":"#)?;
        let outer = serde_json::Deserializer::from_str(&text[begin..])
            .into_iter::<Outer>()
            .next()?;
        Some(outer.expect("the script in the prompt is well formed").fake)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_found_within_other_text() {
        let script = steps([Step::Say("hi \"you\"".to_owned()), Step::Sleep(5), Step::Hang])
            .costing(0.5)
            .traced("a");

        assert_eq!(
            Script::find(&format!(" before {} after", script.prompt())),
            Some(script)
        );
        assert_eq!(Script::find("nothing here"), None);
    }
}
