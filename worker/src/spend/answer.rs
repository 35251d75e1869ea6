//! Reads the usage in an answer of the Messages API, from its bytes as they pass. Pure; holds a line of a stream, or
//! the whole of an answer that isn't one, and no more of either than a bound.

use super::meter::Reading;
use super::usage::Usage;
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;

/// A line of a stream that is longer isn't read, nor a larger answer that isn't a stream.
const MAX_HELD: usize = 16 * 1024 * 1024;

/// No text has more tokens than one for so many bytes. Ordinary text has one for three or four; what a run makes up
/// may have more, but only what is cut off is estimated.
const BYTES_PER_TOKEN: u64 = 2;

/// No fewer than the tokens of so many bytes of text.
pub const fn tokens_of(bytes: u64) -> u64 {
    bytes.div_ceil(BYTES_PER_TOKEN)
}

/// Reads one answer.
#[derive(Debug)]
pub struct AnswerReader {
    is_stream: bool,
    held: Vec<u8>,
    /// What is held has become too long.
    lost: bool,
    /// Bytes of text that the answer has had.
    text: u64,
    /// Searches that the answer has begun, and bytes of what they found, which the API reads.
    searches: u64,
    found: u64,
    /// Whether a block of thoughts is open that has shown none, or was.
    thoughts: Thoughts,
    /// What it has said of its usage.
    said: Usage,
    started: bool,
    reading: Reading,
}

/// Whether the answer shows what it thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thoughts {
    /// It hasn't thought, or has shown it all.
    Shown,
    /// It has begun to think and shown nothing of it yet.
    Begun,
    /// It has thought without showing it.
    Hidden,
}

/// An event of a stream, as far as it is read.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    message: Option<Value>,
    usage: Option<Value>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
    #[serde(borrow)]
    content_block: Option<Block<'a>>,
}

/// The beginning of a block.
#[derive(Deserialize)]
struct Block<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    name: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    thinking: Option<Cow<'a, str>>,
    #[serde(borrow)]
    partial_json: Option<Cow<'a, str>>,
    #[serde(borrow)]
    signature: Option<Cow<'a, str>>,
}

impl AnswerReader {
    /// Of a stream of events, or of one JSON object.
    pub fn new(is_stream: bool) -> Self {
        Self {
            is_stream,
            held: Vec::new(),
            lost: false,
            text: 0,
            searches: 0,
            found: 0,
            thoughts: Thoughts::Shown,
            said: Usage::default(),
            started: false,
            reading: Reading::default(),
        }
    }

    /// Takes the next bytes.
    pub fn read(&mut self, bytes: &[u8]) {
        if !self.is_stream {
            self.hold(bytes);
            return;
        }
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
            if self.held.is_empty() && !self.lost {
                self.line(&rest[..at]);
            } else {
                self.hold(&rest[..at]);
                let line = std::mem::take(&mut self.held);
                if !std::mem::take(&mut self.lost) {
                    self.line(&line);
                }
            }
            rest = &rest[at + 1..];
        }
        self.hold(rest);
    }

    /// There is no more of it.
    pub fn end(&mut self) {
        if !self.is_stream && !self.lost {
            let whole: Value = serde_json::from_slice(&self.held).unwrap_or_default();
            self.start(&whole);
            self.reading.is_final = whole["usage"]["output_tokens"].is_u64();
        }
        self.held = Vec::new();
    }

    /// Whether the answer has said what its prompt was.
    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Whether a part of the answer so far can't be counted by its text: thoughts that it doesn't show.
    pub fn has_hidden_thoughts(&self) -> bool {
        self.thoughts != Thoughts::Shown && !self.reading.is_final
    }

    /// Whether the answer was too long to be read.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// What is known so far. Output that the answer hasn't counted yet is counted by its text.
    pub fn reading(&self) -> &Reading {
        &self.reading
    }

    fn hold(&mut self, bytes: &[u8]) {
        if self.held.len() + bytes.len() > MAX_HELD {
            self.lost = true;
            self.held = Vec::new();
        }
        if !self.lost {
            self.held.extend_from_slice(bytes);
        }
    }

    fn line(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data:") else {
            return;
        };
        let Ok(event) = serde_json::from_slice::<Event<'_>>(data) else {
            return;
        };
        match event.kind.as_ref() {
            "message_start" => self.start(&event.message.unwrap_or_default()),
            "message_delta" => {
                let usage = event.usage.unwrap_or_default();
                self.count(&usage);
                self.reading.is_final = self.started && usage["output_tokens"].is_u64();
            }
            "content_block_start" => match event.content_block {
                Some(block) => self.block(&block, line.len()),
                None => return,
            },
            "content_block_delta" => {
                let delta = event.delta.map_or(0, |delta| {
                    if delta
                        .thinking
                        .as_ref()
                        .is_some_and(|thinking| !thinking.is_empty())
                        && self.thoughts == Thoughts::Begun
                    {
                        self.thoughts = Thoughts::Shown;
                    }
                    [delta.text, delta.thinking, delta.partial_json, delta.signature]
                        .iter()
                        .flatten()
                        .map(|text| text.len())
                        .sum::<usize>()
                });
                self.text = self.text.saturating_add(delta as u64);
            }
            "content_block_stop" => {
                if self.thoughts == Thoughts::Begun {
                    self.thoughts = Thoughts::Hidden;
                }
                return;
            }
            _ => return,
        }
        self.reading.usage = self.said;
        if !self.reading.is_final {
            let usage = &mut self.reading.usage;
            usage.output = usage.output.max(tokens_of(self.text));
            usage.web_searches = usage.web_searches.max(self.searches);
            usage.input = usage.input.saturating_add(tokens_of(self.found));
        }
    }

    /// A block begins, in a line of so many bytes.
    fn block(&mut self, block: &Block<'_>, bytes: usize) {
        match block.kind.as_ref() {
            "thinking" | "redacted_thinking" if self.thoughts == Thoughts::Shown => {
                self.thoughts = Thoughts::Begun;
            }
            "server_tool_use" if block.name.as_deref() == Some("web_search") => self.searches += 1,
            "web_search_tool_result" => self.found = self.found.saturating_add(bytes as u64),
            _ => {}
        }
    }

    fn start(&mut self, message: &Value) {
        if let Some(model) = message["model"].as_str() {
            self.reading.model = Some(model.to_owned());
        }
        self.count(&message["usage"]);
        self.started = message["usage"].is_object();
        self.reading.usage = self.said;
    }

    fn count(&mut self, usage: &Value) {
        let read = Usage::read(usage);
        let written = |usage: Usage| usage.cache_write_5m.saturating_add(usage.cache_write_1h);
        let writes = if written(read) >= written(self.said) {
            read
        } else {
            self.said
        };
        self.said = Usage {
            // The later of two readings may split the same sum.
            cache_write_5m: writes.cache_write_5m,
            cache_write_1h: writes.cache_write_1h,
            ..self.said.max(read)
        };
        if let Some(speed) = usage["speed"].as_str() {
            self.reading.fast = Some(speed == "fast");
        }
        if let Some(region) = usage["inference_geo"].as_str() {
            self.reading.region = Some(region.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "event: message_start\n",
        r#"data: {"type":"message_start","message":{"model":"claude-opus-5-5","usage":{"input_tokens":100,"output_tokens":1,"cache_read_input_tokens":7}}}"#,
        "\n\nevent: content_block_delta\n",
        r#"data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"0123456789"}}"#,
        "\n\nevent: ping\ndata: {\"type\": \"ping\"}\n\nevent: message_delta\n",
        r#"data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":20,"server_tool_use":{"web_search_requests":2}}}"#,
        "\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
    );

    fn whole() -> Usage {
        Usage {
            input: 100,
            output: 20,
            cache_read: 7,
            web_searches: 2,
            ..Usage::default()
        }
    }

    #[test]
    fn a_stream_is_read_however_it_is_cut_into_pieces() {
        for size in [1, 2, 3, 7, 64, STREAM.len()] {
            let mut reader = AnswerReader::new(true);
            for piece in STREAM.as_bytes().chunks(size) {
                reader.read(piece);
            }
            reader.end();
            let reading = reader.reading();
            assert_eq!((reading.usage, reading.is_final), (whole(), true), "{size}");
            assert_eq!(reading.model.as_deref(), Some("claude-opus-5-5"));
        }
    }

    #[test]
    fn what_was_sent_before_a_cut_counts() {
        let mut reader = AnswerReader::new(true);
        assert!(!reader.has_started());
        let cut = STREAM.find("event: ping").unwrap();
        reader.read(&STREAM.as_bytes()[..cut]);
        reader.end();
        assert!(reader.has_started() && !reader.reading().is_final);
        assert_eq!(reader.reading().usage.input, 100);
        assert_eq!(
            reader.reading().usage.output,
            5,
            "ten bytes are no more than five tokens"
        );
    }

    #[test]
    fn what_a_cut_answer_has_searched_counts() {
        let mut reader = AnswerReader::new(true);
        reader.read(&STREAM.as_bytes()[..STREAM.find("event: content_block_delta").unwrap()]);
        let result = r#"data: {"type":"content_block_start","index":1,"content_block":{"type":"web_search_tool_result","content":[]}}"#;
        for line in [
            r#"data: {"type":"content_block_start","index":0,"content_block":{"type":"server_tool_use","id":"s","name":"web_search","input":{}}}"#,
            result,
        ] {
            reader.read(format!("{line}\n\n").as_bytes());
        }
        let usage = reader.reading().usage;
        assert_eq!(
            (usage.web_searches, usage.input),
            (1, 100 + tokens_of(result.len() as u64))
        );

        reader.read(&STREAM.as_bytes()[STREAM.find("event: message_delta").unwrap()..]);
        assert_eq!(
            reader.reading().usage,
            whole(),
            "the API's own figures count in the end"
        );
    }

    #[test]
    fn thoughts_that_arent_shown_are_known() {
        let hidden = |events: &[&str]| {
            let mut reader = AnswerReader::new(true);
            for event in events {
                reader.read(format!("data: {event}\n").as_bytes());
            }
            reader.has_hidden_thoughts()
        };
        let begin =
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":""}}"#;
        let shown =
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Hm."}}"#;
        let signed =
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"x"}}"#;
        let stop = r#"{"type":"content_block_stop","index":0}"#;
        let text = r#"{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}"#;
        for (events, expected, reason) in [
            (&[text][..], false, "no thoughts"),
            (&[begin], true, "they have just begun"),
            (&[begin, shown], false, "they are shown"),
            (&[begin, signed, stop, text], true, "they never were"),
            (&[begin, shown, signed, stop, text], false, "they were"),
        ] {
            assert_eq!(hidden(events), expected, "{reason}");
        }
    }

    #[test]
    fn an_answer_that_is_no_stream_is_read_at_its_end() {
        let mut reader = AnswerReader::new(false);
        let body = r#"{"model":"m","usage":{"input_tokens":3,"output_tokens":4,"speed":"fast","inference_geo":"us"}}"#;
        reader.read(&body.as_bytes()[..20]);
        reader.read(&body.as_bytes()[20..]);
        assert_eq!(reader.reading().usage, Usage::default());
        reader.end();
        let reading = reader.reading();
        assert_eq!(
            (reading.usage.input, reading.usage.output, reading.is_final),
            (3, 4, true)
        );
        assert_eq!(
            (reading.fast, reading.region.as_deref()),
            (Some(true), Some("us"))
        );
    }

    #[test]
    fn what_isnt_an_answer_counts_nothing_and_is_not_final() {
        for (is_stream, body) in [
            (false, "<html>"),
            (false, "{}"),
            (true, "data: {\"type\":\"message_delta\"}\n"),
            (true, "data: [1\n"),
        ] {
            let mut reader = AnswerReader::new(is_stream);
            reader.read(body.as_bytes());
            reader.end();
            assert_eq!(reader.reading(), &Reading::default(), "{body}");
            assert!(!reader.has_started());
        }
    }
}
