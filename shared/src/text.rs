//! Text from outside, made safe to print.

use std::borrow::Cow;
use std::fmt::Write as _;

/// The text with every character that steers a terminal, reorders the text around it or can't be seen written as
/// `\u{202e}`. Line ends and tabs stay, and so do the joiners and variation selectors that scripts and emoji need.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_hidden(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// The same for JSON: each such character becomes an escape, so that the value stays what it was.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    // Outside of strings JSON has none of them, and in strings it has escaped control characters itself.
    if !json.contains(is_hidden) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len() + 8);
    for c in json.chars() {
        if is_hidden(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Control characters, and those of Unicode's `Default_Ignorable_Code_Point` and `Bidi_Control`.
fn is_hidden(c: char) -> bool {
    if c.is_control() {
        return !matches!(c, '\n' | '\t');
    }
    matches!(
        c,
        '\u{ad}' // soft hyphen
        | '\u{34f}' // combining grapheme joiner
        | '\u{61c}' | '\u{200e}' | '\u{200f}' // marks of direction
        | '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' // Hangul fillers
        | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}' // zero width space
        | '\u{2028}'..='\u{202e}' // separators of lines; embeddings and overrides of direction
        | '\u{2060}'..='\u{206f}' // word joiner, invisible operators, isolates
        | '\u{feff}' | '\u{fff0}'..='\u{fffb}'
        | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}' // tags
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_or_hides_is_shown_and_what_is_written_stays() {
        for (text, shown) in [
            ("\u{1b}[2Jgone\u{7}\r", "\\u{1b}[2Jgone\\u{7}\\u{d}"),
            ("user\u{202e}gpj.exe", "user\\u{202e}gpj.exe"),
            ("a\u{2066}b\u{2069}", "a\\u{2066}b\\u{2069}"),
            ("zero\u{200b}width\u{feff}", "zero\\u{200b}width\\u{feff}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("\u{e0041}", "\\u{e0041}"),
        ] {
            assert_eq!(printable(text), shown);
        }
        for text in ["two\nlines\tand a tab", "नमस्ते می‌خواهم 👩‍👩‍👧 ❤️ café", ""]
        {
            assert_eq!(printable(text), text);
        }
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({"name": "a\u{202e}b \u{e0041} \u{1b} plain"});
        let text = value.to_string();

        let shown = printable_json(&text);

        assert!(!shown.contains(is_hidden), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
