//! Which known word somebody meant.

/// The known word that is within two edits (a character added, left out or replaced) of this one, the nearest first.
pub fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    known
        .into_iter()
        .map(|known| (strsim::levenshtein(word, known), known))
        .filter(|(edits, known)| *edits <= 2 && *edits < known.chars().count())
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_is_found_and_another_is_not() {
        let known = ["status", "order", "limit", "API_KEYS"];
        for (word, expected) in [
            ("staus", Some("status")),
            ("status[]", Some("status")),
            ("Limit", Some("limit")),
            ("API_KEY", Some("API_KEYS")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, known), expected, "{word}");
        }
    }
}
