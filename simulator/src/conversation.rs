//! What a Messages request says about itself: who asks, for which scenario, how far the conversation is.

use serde_json::Value;

/// A scenario by name, and the run that its counter belongs to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Choice {
    pub(crate) scenario: String,
    pub(crate) run: Option<String>,
}

impl Choice {
    /// Reads `NAME` or `NAME.RUN`; `None` when there's no name.
    fn parse(text: &str) -> Option<Self> {
        let (scenario, run) = match text.split_once('.') {
            Some((scenario, run)) => (scenario, Some(run)),
            None => (text, None),
        };
        let run = run.filter(|run| !run.is_empty()).map(str::to_owned);
        (!scenario.is_empty()).then(|| Self {
            scenario: scenario.to_owned(),
            run,
        })
    }

    /// From a credential: `sim-NAME` or `sim-NAME.RUN`.
    pub(crate) fn of_credential(credential: &str) -> Option<Self> {
        credential.strip_prefix("sim-").and_then(Self::parse)
    }

    /// From a path, with what is left of it: `/s/NAME/RUN/v1/messages` → `/v1/messages`.
    pub(crate) fn of_path(path: &str) -> (Option<Self>, &str) {
        let Some(rest) = path.strip_prefix("/s/") else {
            return (None, path);
        };
        let at = rest.find("/v1/").unwrap_or(rest.len());
        let (choice, rest) = rest.split_at(at);
        let (scenario, run) = choice.split_once('/').unwrap_or((choice, ""));
        let run = Some(run.trim_matches('/').to_owned()).filter(|run| !run.is_empty());
        (
            Some(Self {
                scenario: scenario.to_owned(),
                run,
            }),
            rest,
        )
    }

    /// From the newest prompt that has a marker `[[scenario:NAME]]` or `[[scenario:NAME.RUN]]`.
    pub(crate) fn of_prompt(body: &Value) -> Option<Self> {
        messages(body)
            .iter()
            .rev()
            .filter(|message| message["role"] == "user")
            .find_map(|message| {
                prompt_texts(message).find_map(|text| {
                    let (_, rest) = text.split_once("[[scenario:")?;
                    let (name, _) = rest.split_once("]]")?;
                    Self::parse(name.trim())
                })
            })
    }
}

/// What the newest prompt with a marker `[[tokens:IN:OUT]]` says that its answer uses.
pub(crate) fn tokens(body: &Value) -> Option<(u64, u64)> {
    let prompts = messages(body)
        .iter()
        .rev()
        .filter(|message| message["role"] == "user");
    prompts.flat_map(prompt_texts).find_map(|text| {
        let (tokens, _) = text.split_once("[[tokens:")?.1.split_once("]]")?;
        let (input, output) = tokens.split_once(':')?;
        Some((input.parse().ok()?, output.parse().ok()?))
    })
}

/// The conversation's messages.
pub(crate) fn messages(body: &Value) -> &[Value] {
    body["messages"].as_array().map_or(&[], Vec::as_slice)
}

/// The texts of a message that a person (or the job) wrote: not what a tool returned, and not what the CLI adds.
fn prompt_texts(message: &Value) -> impl Iterator<Item = &str> {
    let whole = message["content"].as_str();
    let blocks = message["content"]
        .as_array()
        .map_or(&[] as &[Value], Vec::as_slice);
    let blocks = blocks
        .iter()
        .filter(|block| block["type"] == "text")
        .filter_map(|block| block["text"].as_str());
    whole
        .into_iter()
        .chain(blocks)
        .filter(|text| !text.trim_start().starts_with("<system-reminder>"))
}

/// How many turns the model had since the last prompt.
pub(crate) fn turn(body: &Value) -> usize {
    let mut turns = 0;
    for message in messages(body).iter().rev() {
        if message["role"] == "assistant" {
            turns += 1;
        } else if message["role"] == "user"
            && !has_tool_result(message)
            && prompt_texts(message).next().is_some()
        {
            break;
        }
    }
    turns
}

fn has_tool_result(message: &Value) -> bool {
    message["content"]
        .as_array()
        .is_some_and(|blocks| blocks.iter().any(|block| block["type"] == "tool_result"))
}

/// The last prompt, its marker taken out.
pub(crate) fn prompt(body: &Value) -> String {
    let mut prompts = messages(body)
        .iter()
        .rev()
        .filter(|message| message["role"] == "user" && !has_tool_result(message));
    let Some(text) = prompts.find_map(|message| prompt_texts(message).last()) else {
        return String::new();
    };
    match text
        .split_once("[[scenario:")
        .and_then(|(before, rest)| Some((before, rest.split_once("]]")?.1)))
    {
        Some((before, after)) => format!("{before}{after}").trim().to_owned(),
        None => text.trim().to_owned(),
    }
}

/// The working directory that the CLI told the model; `.` when it told none.
pub(crate) fn working_directory(body: &Value) -> String {
    let said = texts(&body["system"]).chain(
        messages(body)
            .iter()
            .flat_map(|message| texts(&message["content"])),
    );
    said.flat_map(str::lines)
        .find_map(|line| {
            let (name, path) = line.split_once(": ")?;
            name.to_lowercase()
                .ends_with("working directory")
                .then(|| path.trim().to_owned())
        })
        .unwrap_or_else(|| ".".to_owned())
}

/// A string, or the texts of a list of blocks.
fn texts(content: &Value) -> impl Iterator<Item = &str> {
    let blocks = content.as_array().map_or(&[] as &[Value], Vec::as_slice);
    content
        .as_str()
        .into_iter()
        .chain(blocks.iter().filter_map(|block| block["text"].as_str()))
}

/// Whether this is a side request of the CLI (a web search, a title, a probe) and not a turn of the conversation.
pub(crate) fn is_auxiliary(body: &Value) -> bool {
    let tools = body["tools"].as_array().map_or(&[] as &[Value], Vec::as_slice);
    // A tool that the API runs itself has a type of its own, such as web_search_20250305.
    let runs_at_api = |tool: &Value| tool["type"].as_str().is_some_and(|kind| kind != "custom");
    if !tools.is_empty() {
        return tools.iter().all(runs_at_api);
    }
    let small_model = body["model"]
        .as_str()
        .is_some_and(|model| model.contains("haiku"));
    body["max_tokens"] == 1 || (small_model && body["stream"] != true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn choice(scenario: &str, run: Option<&str>) -> Choice {
        Choice {
            scenario: scenario.to_owned(),
            run: run.map(str::to_owned),
        }
    }

    #[test]
    fn a_scenario_is_read_from_credential_path_and_prompt() {
        assert_eq!(Choice::of_credential("sim-write"), Some(choice("write", None)));
        assert_eq!(
            Choice::of_credential("sim-write.7"),
            Some(choice("write", Some("7")))
        );
        assert_eq!(Choice::of_credential("sim-"), None);
        assert_eq!(Choice::of_credential("sk-ant-x"), None);

        assert_eq!(Choice::of_path("/v1/messages"), (None, "/v1/messages"));
        assert_eq!(
            Choice::of_path("/s/bash/v1/messages"),
            (Some(choice("bash", None)), "/v1/messages")
        );
        assert_eq!(
            Choice::of_path("/s/bash/r1/v1/messages"),
            (Some(choice("bash", Some("r1"))), "/v1/messages")
        );

        let body = json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>[[scenario:no]]</system-reminder>"},
                                         {"type": "text", "text": "please [[scenario:e529.x]] do"}]},
            {"role": "assistant", "content": "[[scenario:no]]"},
            {"role": "user", "content": [{"type": "tool_result", "content": "[[scenario:no]]"}]},
        ]});
        assert_eq!(Choice::of_prompt(&body), Some(choice("e529", Some("x"))));
        assert_eq!(
            Choice::of_prompt(&json!({"messages": [{"role": "user", "content": "hello"}]})),
            None
        );
        assert_eq!(prompt(&body), "please  do");
        assert_eq!(tokens(&body), None);
        let body =
            json!({"messages": [{"role": "user", "content": "[[tokens:100:5000]] [[scenario:text]]"}]});
        assert_eq!(tokens(&body), Some((100, 5000)));
    }

    #[test]
    fn turns_are_counted_from_the_last_prompt() {
        let mut body = json!({"messages": [{"role": "user", "content": "one"}]});
        assert_eq!(turn(&body), 0);

        let more = [
            json!({"role": "assistant", "content": [{"type": "tool_use"}]}),
            json!({"role": "user", "content": [{"type": "tool_result"}, {"type": "text", "text": "note"}]}),
        ];
        body["messages"].as_array_mut().unwrap().extend(more.clone());
        assert_eq!(turn(&body), 1);

        body["messages"]
            .as_array_mut()
            .unwrap()
            .push(json!({"role": "user", "content": "two"}));
        assert_eq!(turn(&body), 0);
    }

    #[test]
    fn side_requests_are_told_from_turns() {
        assert!(!is_auxiliary(
            &json!({"tools": [{"name": "Bash"}], "stream": true})
        ));
        assert!(!is_auxiliary(&json!({"model": "claude-haiku", "stream": true})));
        assert!(!is_auxiliary(
            &json!({"tools": [{"name": "Bash"}, {"type": "web_search_20250305"}]})
        ));
        assert!(is_auxiliary(
            &json!({"tools": [{"type": "web_search_20250305"}], "stream": true})
        ));
        assert!(is_auxiliary(&json!({"model": "claude-haiku"})));
        assert!(is_auxiliary(&json!({"model": "claude-opus", "max_tokens": 1})));
    }

    #[test]
    fn the_working_directory_is_found_wherever_the_cli_writes_it() {
        let body =
            json!({"system": [{"text": "Env:\n - Primary working directory: /workspace\n"}], "messages": []});
        assert_eq!(working_directory(&body), "/workspace");
        assert_eq!(working_directory(&json!({})), ".");
    }
}
