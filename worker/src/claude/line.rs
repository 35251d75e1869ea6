//! Lines of the CLI's output that can't be read: whether such a line may be the `result` line, without which a run
//! would wait for its time-out.

/// A line of the CLI's standard output, without its line feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputLine {
    /// All of it.
    Whole(Vec<u8>),
    /// A line that was longer than a line may be, so its bytes weren't kept.
    TooLong {
        /// Whether it may be the `result` line.
        may_be_result: bool,
    },
}

/// Looks for `"type":"result"` in the outermost object of a line, which needn't be valid JSON and may come in parts.
/// It keeps no more than a short string, at any depth and length.
#[derive(Debug, Default)]
pub struct ResultScanner {
    depth: u64,
    string: Option<Text>,
    /// The last string of the outermost object: a key, if a colon follows.
    last: Vec<u8>,
    /// Whether a value for the key `type` comes next.
    wants_type: bool,
    found: bool,
}

#[derive(Debug, Default)]
struct Text {
    bytes: Vec<u8>,
    escaped: bool,
}

/// Longer strings aren't compared.
const MAX_TEXT: usize = 16;

impl ResultScanner {
    /// Takes the next bytes of the line.
    pub fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match &mut self.string {
                Some(text) if text.escaped => text.escaped = false,
                Some(text) if *byte == b'\\' => text.escaped = true,
                Some(_) if *byte == b'"' => self.end_of_string(),
                Some(text) => {
                    if text.bytes.len() <= MAX_TEXT {
                        text.bytes.push(*byte);
                    }
                }
                None => self.outside(*byte),
            }
        }
    }

    /// Whether the line may be the `result` line.
    pub fn may_be_result(&self) -> bool {
        self.found
    }

    fn outside(&mut self, byte: u8) {
        match byte {
            b'"' => self.string = Some(Text::default()),
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b':' if self.depth == 1 => self.wants_type = self.last == b"type",
            b',' if self.depth == 1 => self.wants_type = false,
            _ => {}
        }
    }

    fn end_of_string(&mut self) {
        let text = self.string.take().unwrap_or_default();
        if self.depth == 1 {
            self.found |= self.wants_type && text.bytes == b"result";
            self.last = text.bytes;
        }
    }
}

/// Whether these bytes may be the `result` line, or a part of it.
pub fn may_be_result(line: &[u8]) -> bool {
    let mut scanner = ResultScanner::default();
    scanner.feed(line);
    scanner.may_be_result()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_line_is_known_by_its_outermost_type_alone() {
        for (line, is_result, reason) in [
            (r#"{"type":"result"}"#, true, "as it is"),
            (
                r#"{"a":{"type":"user"},"type" : "result","b":NaN}"#,
                true,
                "members before and after",
            ),
            ("\u{feff}{\"type\":\"result\"}", true, "after a byte order mark"),
            (
                r#"{"a":"\"{","type":"result"#,
                false,
                "cut off in the middle of its type",
            ),
            (r#"{"a":"\"{[","type":"result""#, true, "brackets in a string"),
            (
                r#"{"type":"user","a":{"type":"result"}}"#,
                false,
                "a deeper member",
            ),
            (
                r#"{"type":"user","a":["type","result"]}"#,
                false,
                "strings of a list",
            ),
            (r#"{"type":"user","b":"result"}"#, false, "another member"),
            (
                r#"{"a":"type","b":"result"}"#,
                false,
                "a value that reads as the key",
            ),
            (r#""type":"result""#, false, "no object"),
            ("the type is: \"result\"", false, "no JSON at all"),
            ("", false, "nothing"),
        ] {
            assert_eq!(may_be_result(line.as_bytes()), is_result, "{reason}: {line}");
        }
    }

    #[test]
    fn parts_are_the_same_as_the_whole() {
        let line = br#"{"a":"\\","type":"result","b":[[[1]]]}"#;
        let mut scanner = ResultScanner::default();
        for byte in line {
            scanner.feed(&[*byte]);
        }
        assert!(scanner.may_be_result());
    }
}
