//! Which known word somebody meant.

/// The known word that is within two edits (a character added, left out or replaced) of this one, the nearest first.
pub fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    known
        .into_iter()
        .map(|known| (edits(word, known), known))
        .filter(|(edits, known)| *edits <= 2 && *edits < known.chars().count())
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, known)| known)
}

/// How many edits make one word the other.
fn edits(one: &str, other: &str) -> usize {
    let other = other.chars().collect::<Vec<_>>();
    if one.chars().count().abs_diff(other.len()) > 2 {
        // More than anybody asks for.
        return usize::MAX;
    }
    let mut row = (0..=other.len()).collect::<Vec<_>>();
    for (index, char) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, against) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(char != *against);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
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
