//! The path of a file in a workspace.

use std::fmt;

/// The longest path, in bytes.
const MAX_PATH: usize = 1_024;
/// The longest name of a file or directory, in bytes: what file systems take.
const MAX_NAME: usize = 255;
/// The deepest path.
pub(super) const MAX_DEPTH: usize = 64;

/// A path below a workspace: names with slashes between them, none of which leads up, is hidden, or can't be typed. It
/// has at most 1,024 bytes, 64 names, and 255 bytes a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePath(String);

impl FilePath {
    /// The path that is written so. The error says in a sentence why it isn't one.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("The path is empty");
        }
        if text.starts_with('/') {
            return Err(
                "Path outside session workspace: it should be relative, without a slash at its begin",
            );
        }
        if text.len() > MAX_PATH {
            return Err("The path is longer than 1024 bytes");
        }
        if text.split('/').count() > MAX_DEPTH {
            return Err("The path has more than 64 parts");
        }
        text.split('/').try_for_each(check_name)?;
        Ok(Self(text.to_owned()))
    }

    /// The path that is written so in an address: each name with its percent signs decoded once. What is a slash only
    /// after that separates nothing, and is refused.
    pub fn parse_encoded(text: &str) -> Result<Self, &'static str> {
        let mut decoded = Vec::new();
        for part in text.split('/') {
            let part =
                percent_decode(part).ok_or("The path should be UTF-8 with well-formed percent signs")?;
            if part.contains('/') {
                return Err("Path outside session workspace: a name holds no slash");
            }
            decoded.push(part);
        }
        Self::parse(&decoded.join("/"))
    }

    /// The path of `name` in this directory.
    pub fn join(&self, name: &str) -> Result<Self, &'static str> {
        Self::parse(&format!("{}/{name}", self.0))
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its last name.
    pub fn name(&self) -> &str {
        self.split().1
    }

    /// What stands before the last name, and the last name.
    pub(super) fn split(&self) -> (Option<&str>, &str) {
        match self.0.rsplit_once('/') {
            Some((above, name)) => (Some(above), name),
            None => (None, &self.0),
        }
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("A name in the path is empty");
    }
    if matches!(name, "." | "..") {
        return Err("Path outside session workspace: no part may be . or ..");
    }
    if name.starts_with('.') {
        return Err("Names that begin with a dot are hidden and can't be used");
    }
    if name.len() > MAX_NAME {
        return Err("A name in the path is longer than 255 bytes");
    }
    if name.contains('\\') || name.chars().any(char::is_control) {
        return Err("A name in the path holds a backslash or a control character");
    }
    Ok(())
}

/// Text with its percent signs decoded; `None` if a percent sign has no two hex digits after it, or it isn't UTF-8.
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let (high, low) = (digit(bytes.next()?)?, digit(bytes.next()?)?);
        decoded.push(u8::try_from(16 * high + low).ok()?);
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_nowhere_but_down_to_what_can_be_seen() {
        for text in [
            "a",
            "a/b.txt",
            "ä ö/ü",
            "%2e%2e",
            "a..b",
            "a/b/c-1_2",
            "🦀.rs",
            &"n".repeat(255),
        ] {
            assert_eq!(FilePath::parse(text).unwrap().as_str(), text);
        }
        for text in [
            "",
            "/",
            "/etc/passwd",
            "..",
            ".",
            "a/..",
            "a/../b",
            "../a",
            "a//b",
            "a/",
            "a/./b",
            ".env",
            "a/.git/config",
            "a\0",
            "a\nb",
            "a\\..\\b",
            "a\u{85}",
            &"n".repeat(256),
            &"n".repeat(300),
            &"é".repeat(128),
            &"a/".repeat(600),
            &vec!["a"; 65].join("/"),
        ] {
            assert!(FilePath::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_address_is_decoded_once_and_then_judged() {
        for (text, path) in [
            ("a/b%20c", "a/b c"),
            ("caf%C3%A9", "café"),
            ("%61", "a"),
            ("%252e%252e", "%2e%2e"),
            ("a+b", "a+b"),
        ] {
            assert_eq!(FilePath::parse_encoded(text).unwrap().as_str(), path);
        }
        for text in [
            "%2e%2e/a",
            "%2E%2e",
            "a/%2e%2e/b",
            "..%2fa",
            "a%2fb",
            "%2fetc/passwd",
            "a%5c..%5cb",
            "a%00",
            "a%0a",
            "%ff",
            "%c0%ae%c0%ae/a",
            "%",
            "%4",
            "%zz",
            "%2Egit",
        ] {
            assert!(FilePath::parse_encoded(text).is_err(), "{text}");
        }
    }
}
