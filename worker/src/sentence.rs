//! Messages for people: what was wrong, what was said about it, what to do.

/// The longest part of somebody else's words that is repeated, in characters.
const LONGEST: usize = 300;

/// `Problem (what was said). Advice.`
pub(crate) fn sentence(problem: &str, said: &str, advice: &str) -> String {
    if said.is_empty() {
        format!("{problem}. {advice}")
    } else {
        format!("{problem} ({said}). {advice}")
    }
}

/// Somebody else's words in one line: no control characters, no final full stop, and not too long.
pub(crate) fn excerpt(text: &str) -> String {
    let words = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.trim_end_matches('.').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_one_clean_line() {
        for (text, line, reason) in [
            (
                "  Invalid key.\n",
                "Invalid key",
                "trimmed, without the full stop that the sentence gives",
            ),
            (
                "a\n\tb\u{0}c\u{1b}[31m",
                "a b c [31m",
                "no control characters, so no NUL for the database",
            ),
            ("", "", "nothing"),
            ("...", "", "nothing but full stops"),
        ] {
            assert_eq!(excerpt(text), line, "{reason}");
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(excerpt(&"é".repeat(1_000)), format!("{}…", "é".repeat(LONGEST)));
    }

    #[test]
    fn a_sentence_has_room_for_what_was_said() {
        assert_eq!(
            sentence("It failed", "why", "Do this."),
            "It failed (why). Do this."
        );
        assert_eq!(sentence("It failed", "", "Do this."), "It failed. Do this.");
    }
}
