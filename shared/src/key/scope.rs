//! Scopes: the permissions of a key.

use std::fmt;
use std::str::FromStr;

macro_rules! scopes {
    ($($(#[$doc:meta])* $name:ident = $word:literal),+ $(,)?) => {
        /// One permission of a key.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Scope {
            $($(#[$doc])* $name),+
        }

        impl Scope {
            /// All scopes.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The words of all scopes, in the same order.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word in JSON and in the table.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $word),+
                }
            }
        }
    };
}

scopes! {
    /// Read jobs, their results and events.
    JobsRead = "jobs:read",
    /// Submit and cancel jobs.
    JobsWrite = "jobs:write",
    /// Read sessions.
    SessionsRead = "sessions:read",
    /// Create, change and delete sessions.
    SessionsWrite = "sessions:write",
    /// Read files of a workspace.
    FilesRead = "files:read",
    /// Write files of a workspace.
    FilesWrite = "files:write",
    /// Read webhooks and their deliveries.
    WebhooksRead = "webhooks:read",
    /// Create, change and delete webhooks.
    WebhooksWrite = "webhooks:write",
    /// Read what was spent.
    UsageRead = "usage:read",
    /// Reload the templates.
    TemplatesWrite = "templates:write",
    /// Run jobs without permission checks.
    PermissionsBypass = "permissions:bypass",
    /// Create and change keys, and see the objects of all keys.
    KeysAdmin = "keys:admin",
    /// Set budgets.
    BudgetsAdmin = "budgets:admin",
    /// See, pause and resume the queue.
    QueueAdmin = "queue:admin",
}

impl Scope {
    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text isn't a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a scope")]
pub struct NotAScope;

impl FromStr for Scope {
    type Err = NotAScope;
    fn from_str(text: &str) -> Result<Self, NotAScope> {
        let mut scopes = Self::ALL.iter().copied();
        scopes.find(|scope| scope.as_str() == text).ok_or(NotAScope)
    }
}

/// A set of scopes. In a column it is stored as words separated by spaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes(u32);

impl Scopes {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// Every scope. Keys from `ADMIN_API_KEYS` have it.
    pub fn all() -> Self {
        Scope::ALL.iter().copied().collect()
    }

    /// The default of a key: all scopes except `…:admin` and `permissions:bypass`.
    pub fn ordinary() -> Self {
        let privileged = |scope: &Scope| {
            matches!(
                scope,
                Scope::PermissionsBypass | Scope::KeysAdmin | Scope::BudgetsAdmin | Scope::QueueAdmin
            )
        };
        Scope::ALL
            .iter()
            .copied()
            .filter(|scope| !privileged(scope))
            .collect()
    }

    /// Whether the set contains the scope.
    pub const fn contains(self, scope: Scope) -> bool {
        self.0 & scope.bit() != 0
    }

    /// A scope that is in this set and not in `others`, if there is one.
    pub fn beyond(self, others: Self) -> Option<Scope> {
        self.iter().find(|scope| !others.contains(*scope))
    }

    /// The scopes of the set, in the order of [`Scope::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL
            .iter()
            .copied()
            .filter(move |scope| self.contains(*scope))
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |bits, scope| bits | scope.bit()))
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.iter().map(Scope::as_str).collect::<Vec<_>>();
        f.write_str(&words.join(" "))
    }
}

/// An unknown word grants nothing: an older process may read what a newer one has written.
impl From<String> for Scopes {
    fn from(text: String) -> Self {
        text.split_whitespace()
            .filter_map(|word| word.parse::<Scope>().ok())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_comes_back_from_its_column() {
        for set in [Scopes::NONE, Scopes::ordinary(), Scopes::all()] {
            assert_eq!(Scopes::from(set.to_string()), set);
        }
        assert_eq!(
            Scopes::from("jobs:read future:thing".to_owned()).to_string(),
            "jobs:read"
        );
    }

    #[test]
    fn ordinary_keys_have_no_administrators_right() {
        let words = Scopes::ordinary().to_string();
        assert!(!words.contains("admin") && !words.contains("bypass"), "{words}");
        assert_eq!(Scopes::ordinary().iter().count(), 10);
        assert_eq!(Scopes::ordinary().beyond(Scopes::all()), None);
        assert_eq!(
            Scopes::all().beyond(Scopes::ordinary()),
            Some(Scope::PermissionsBypass)
        );
    }
}
