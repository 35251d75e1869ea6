//! What may be said about a session: the bodies of requests, and names.

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;
use uuid::Uuid;

use super::Stored;
use crate::config::Config;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::request::fields::{Fields, metadata, text};
use crate::settings::Settings;

/// The names of the members of a request for a session, in the order in which they are read.
pub const MEMBERS: &[&str] = &[
    "name",
    "user_id",
    "system_prompt",
    "model",
    "max_turns",
    "permission_mode",
    "effort",
    "allowed_tools",
    "disallowed_tools",
    "max_cost_usd",
    "metadata",
    "template",
];

/// The body of a request for a session.
#[derive(Debug)]
pub(super) struct SessionRequest {
    pub(super) name: String,
    user_id: Option<String>,
    pub(super) stored: Stored,
    /// Fills what the request leaves open.
    pub(super) template: Option<String>,
}

impl SessionRequest {
    pub(super) fn read(mut body: Fields, config: &Config) -> Result<Self, Problem> {
        let wanted = Self::members(&mut body, config);
        let wanted = body.finish(wanted)?;
        if let Err(why) = check_name(&wanted.name) {
            return Err(Problem::BadRequest(why.into()));
        }
        Ok(wanted)
    }

    /// Reads the members. `None` means that the name was a fault.
    fn members(body: &mut Fields, config: &Config) -> Option<Self> {
        let name = body.required("name", text(1..=128));
        let user_id = body.optional("user_id", text(0..=128));
        let settings = Settings::read(body, "system_prompt", config);
        let metadata = body.optional("metadata", metadata).unwrap_or_default();
        let template = body.optional("template", text(1..=128));
        name.map(|name| Self {
            name: normal(&name),
            user_id,
            stored: Stored { settings, metadata },
            template,
        })
    }

    /// Refuses what the caller may not ask for.
    pub(super) fn allowed_to(&self, caller: &Caller, config: &Config) -> Result<(), Problem> {
        let own = |user: &String| user == "default" || user.as_str() == caller.key_id.as_str();
        if !self.user_id.as_ref().is_none_or(own) {
            return Err(Problem::AdminOnly("make sessions for others"));
        }
        self.stored.settings.allowed_to(caller, &config.aliases)
    }
}

/// The body of `PATCH /sessions/{s}`: what it names is set, or with null cleared; the rest stays.
pub(super) fn change(mut body: Fields, stored: &mut Stored, config: &Config) -> Result<(), Problem> {
    stored.settings.change(&mut body, "system_prompt", config);
    if let Some(pairs) = body.change("metadata", metadata) {
        stored.metadata = pairs.unwrap_or_default();
    }
    body.finish(Some(()))
}

/// The folder that `POST /sessions/{s}/repo` names.
pub(super) fn repo(mut body: Fields) -> Result<String, Problem> {
    let working_dir = body.required("working_dir", text(1..=1024));
    body.finish(working_dir)
}

/// The one spelling (NFC) of a name that can be typed in more than one way.
pub(super) fn normal(name: &str) -> String {
    name.nfc().collect()
}

/// Letters, marks and digits of any script, then also blanks and `._-`; no dots that lead anywhere. Nothing that a
/// session is found by beside its name.
fn check_name(name: &str) -> Result<(), &'static str> {
    let begins_well = name.chars().next().is_some_and(char::is_alphanumeric);
    let inside = |char: char| char.is_alphanumeric() || is_combining_mark(char) || " ._-".contains(char);
    if !begins_well || name.contains("..") || !name.chars().all(inside) {
        return Err(
            "Invalid project name: it should begin with a letter or digit and hold only letters, digits, blanks, \
             dots, hyphens and underscores",
        );
    }
    if name.chars().all(char::is_numeric) {
        return Err("Invalid project name: all digits are the number of a session; add a letter");
    }
    if Uuid::try_parse(name).is_ok() {
        return Err("Invalid project name: a UUID is the id of a Claude session; choose another name");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_members_that_are_read_are_those_that_are_listed() {
        let mut body = Fields::of("body", serde_json::json!({})).unwrap();
        SessionRequest::members(&mut body, &Config::default());
        assert_eq!(body.known(), MEMBERS);
    }

    #[test]
    fn names_are_plain_in_any_script() {
        for name in [
            "a",
            "Projekt 7",
            "café.v2",
            "データ",
            "हिन्दी",
            "தமிழ்",
            "cafe\u{301}",
            "a_b-c",
            "7a",
        ] {
            assert_eq!(check_name(&normal(name)), Ok(()), "{name}");
        }
        for name in [
            "",
            ".hidden",
            "a/b",
            "a..b",
            "-a",
            " a",
            "a\n",
            "a\0",
            "../x",
            "a:b",
            "\u{301}a",
            "3",
            "007",
            "٣",
            "5f0c1c3e-2b1f-4d0e-9a0e-0f7d6b1f2a3c",
            "5f0c1c3e2b1f4d0e9a0e0f7d6b1f2a3c",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert_eq!(normal("cafe\u{301}"), "café");
    }
}
