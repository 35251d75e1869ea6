//! JSON that a strict parser refuses and the CLI nevertheless writes.

use super::value::{self, Read};
use std::borrow::Cow;

/// Parses a line, after mending it when it doesn't parse as it is. None when it is no JSON object.
pub(super) fn json(line: &[u8]) -> Option<Read> {
    let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
    // Most lines are right, and the mending reads every byte.
    let read = value::read(line).or_else(|_| {
        let text = String::from_utf8_lossy(line);
        value::read(without_lone_surrogates(&text).as_bytes())
    });
    read.ok().filter(|read| read.value.is_object())
}

/// Replaces each `\ud800` … `\udfff` escape that isn't part of a pair by `\ufffd`. The CLI is JavaScript, whose strings
/// may hold halves of characters where a text was cut, and which it writes as such escapes.
fn without_lone_surrogates(text: &str) -> Cow<'_, str> {
    let mut mended = String::new();
    let mut kept = 0;
    let mut at = 0;
    while let Some(found) = text[at..].find('\\') {
        at += found;
        match (unit(text, at), unit(text, at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => at += 12,
            (Some(0xd800..=0xdfff), _) => {
                mended.push_str(&text[kept..at]);
                mended.push_str("\\ufffd");
                at += 6;
                kept = at;
            }
            (Some(_), _) => at += 6,
            // Another escape: the character after the backslash may be a backslash too.
            (None, _) => at += 1 + text[at + 1..].chars().next().map_or(0, char::len_utf8),
        }
    }
    if kept == 0 {
        return Cow::Borrowed(text);
    }
    mended.push_str(&text[kept..]);
    Cow::Owned(mended)
}

/// The UTF-16 unit whose `\uXXXX` escape starts at this byte.
fn unit(text: &str, at: usize) -> Option<u16> {
    let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
    // `from_str_radix` would take a sign.
    let all_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    all_hex.then(|| u16::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    fn json(line: &[u8]) -> Option<Value> {
        super::json(line).map(|read| read.value)
    }

    #[test]
    fn halves_of_characters_are_replaced_and_whole_ones_kept() {
        for (line, value, reason) in [
            (r#"{"a":"x\ud83d"}"#, "x\u{fffd}", "cut after the first half"),
            (r#"{"a":"\ude00x"}"#, "\u{fffd}x", "cut before the second half"),
            (
                r#"{"a":"\ud83d\ud83d\ude00"}"#,
                "\u{fffd}😀",
                "half a character before a whole one",
            ),
            (
                r#"{"a":"\ud83d\u0041"}"#,
                "\u{fffd}A",
                "a half before another escape",
            ),
            (
                r#"{"a":"\\ud83d\ud83d"}"#,
                "\\ud83d\u{fffd}",
                "an escaped backslash isn't the start of an escape",
            ),
            (
                r#"{"a":"\ud83d\n"}"#,
                "\u{fffd}\n",
                "a half before a short escape",
            ),
            (
                r#"{"a":"é\ud83dé"}"#,
                "é\u{fffd}é",
                "between characters of two bytes",
            ),
        ] {
            assert_eq!(json(line.as_bytes()), Some(json!({ "a": value })), "{reason}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_replaced() {
        assert_eq!(json(b"{\"a\":\"\xff\"}"), Some(json!({"a": "\u{fffd}"})));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_line() {
        assert_eq!(json("\u{feff}{\"a\":1}".as_bytes()), Some(json!({"a": 1})));
    }

    #[test]
    fn what_is_no_json_object_is_nothing() {
        for line in [
            "",
            " ",
            "null",
            "[]",
            "\"result\"",
            "{",
            "{\"a\":1} x",
            "{\"a\":\"\\u12\"}",
            "{\"a\":\"\\ud83d",
            "\\",
            "\\u",
        ] {
            assert_eq!(json(line.as_bytes()), None, "{line}");
        }
    }
}
