//! Rules that allow or forbid tools, in the grammar of the CLI: a name, or `Name(...)`.

/// The rules of a text that has commas between them. What is between brackets belongs to its rule; blanks around rules
/// and empty rules are dropped, and nothing else is changed.
pub fn split(text: &str) -> Vec<String> {
    let mut rules = Vec::new();
    let (mut depth, mut begin) = (0_usize, 0);
    for (at, char) in text.char_indices() {
        match char {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                rules.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    rules.push(&text[begin..]);
    rules
        .into_iter()
        .map(str::trim)
        .filter(|rule| !rule.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Refuses what can't be one rule of a list with commas: what could be taken for an option, and brackets that would
/// make the next rules a part of this one.
pub fn check(rule: &str) -> Result<(), &'static str> {
    if rule.starts_with('-') {
        return Err("A rule should not begin with a hyphen");
    }
    if rule.chars().any(char::is_control) {
        return Err("A rule should not hold control characters");
    }
    let mut depth = 0_i64;
    for char in rule.chars() {
        match char {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => return Err("A comma in a rule should be between its brackets"),
            _ => {}
        }
        if depth < 0 {
            break;
        }
    }
    if depth == 0 {
        Ok(())
    } else {
        Err("Each bracket of a rule should have its counterpart")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_keeps_what_is_between_its_brackets() {
        for (text, rules) in [
            ("Bash(touch one, two)", vec!["Bash(touch one, two)"]),
            (" Bash(git *), Read ,,Edit", vec!["Bash(git *)", "Read", "Edit"]),
            (
                "Bash(f(a,b), c),Read(/x,y)",
                vec!["Bash(f(a,b), c)", "Read(/x,y)"],
            ),
            ("Bash(  a  )", vec!["Bash(  a  )"]),
            ("", vec![]),
        ] {
            assert_eq!(split(text), rules, "{text}");
        }
    }

    #[test]
    fn what_would_swallow_the_next_rule_is_refused() {
        for rule in ["Bash", "Bash(touch one, two)", "mcp__a__b", "Bash(a (b) c)"] {
            assert_eq!(check(rule), Ok(()), "{rule}");
        }
        for rule in ["--x", "Bash(a", "Bash)", "a)(b", "Read,Edit", "Bash(a\n)"] {
            assert!(check(rule).is_err(), "{rule}");
        }
    }
}
