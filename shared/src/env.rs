//! The environment. Every setting is a variable that is read here. A value that is not valid stops the start, and the
//! error names the variable.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The value of a variable is not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable} {problem}; accepted: {accepted}")]
pub struct Error {
    /// The variable's name.
    pub variable: &'static str,
    /// What is wrong with the value. Never the value itself, because it may be a secret.
    pub problem: String,
    /// The accepted form.
    pub accepted: String,
}

impl Error {
    /// `problem` says what is wrong with the value of `variable`; `accepted` describes valid values.
    pub fn new(variable: &'static str, problem: impl Into<String>, accepted: impl Into<String>) -> Self {
        Self {
            variable,
            problem: problem.into(),
            accepted: accepted.into(),
        }
    }
}

/// The variables of a process. It records which were read and with which default, so that a test can compare
/// `.env.example` with the code.
#[derive(Default)]
pub struct Vars {
    values: HashMap<String, String>,
    /// Variables whose values aren't UTF-8.
    no_text: BTreeSet<String>,
    /// The folder of the `.env` file, unless it is the working directory.
    folder: Option<PathBuf>,
    /// Variables that the environment itself sets.
    own: BTreeSet<String>,
    asked: RefCell<BTreeMap<&'static str, String>>,
    warned: RefCell<BTreeSet<String>>,
}

/// Values may be secrets, so only names are shown.
impl fmt::Debug for Vars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Vars {
    /// Reads the process's environment and the file `.env` in the working directory or a parent. The environment takes
    /// precedence, and an empty variable in it counts as unset. In the file the last line of a name wins, so that a line
    /// can be appended.
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the environment"
    )]
    pub fn from_process() -> Result<Self, Error> {
        let own: Vec<_> = std::env::vars_os().collect();
        // Also loaded into the environment, for libraries and the CLI, which read variables such as HTTPS_PROXY.
        let read =
            dotenvy::dotenv().and_then(|path| Ok((path, dotenvy::dotenv_iter()?.collect::<Result<_, _>>()?)));
        let (path, file) = match read {
            Ok((path, file)) => (Some(path), file),
            Err(error) if error.not_found() => (None, Vec::new()),
            Err(dotenvy::Error::LineParse(_, column)) => {
                let problem = format!("has a line that can't be read (at character {column} of the line)");
                return Err(Error::new(
                    ".env",
                    problem,
                    "NAME=value, one a line; quote values with spaces",
                ));
            }
            Err(error) => {
                return Err(Error::new(
                    ".env",
                    format!("can't be read: {error}"),
                    "a readable file",
                ));
            }
        };
        let working = std::env::current_dir().ok();
        let folder = path.and_then(|mut path| path.pop().then_some(path));
        Ok(Self {
            folder: folder.filter(|folder| working.as_ref() != Some(folder)),
            ..Self::from_os(file, own)
        })
    }

    /// Merges the file and the environment, which takes precedence. In the file the last value of a name wins. An empty
    /// variable in the environment doesn't hide the one in the file.
    fn from_os(file: Vec<(String, String)>, own: Vec<(OsString, OsString)>) -> Self {
        let mut vars = Self {
            values: file.into_iter().collect(),
            ..Self::default()
        };
        for (name, value) in own {
            // A name that isn't UTF-8 isn't one of ours.
            let Ok(name) = name.into_string() else { continue };
            match value.into_string() {
                Ok(value) if value.trim().is_empty() && vars.values.contains_key(&name) => {}
                Ok(value) => {
                    vars.own.insert(name.clone());
                    vars.values.insert(name, value);
                }
                Err(_) => drop(vars.no_text.insert(name)),
            }
        }
        vars
    }

    /// These variables and no others.
    pub fn of<const N: usize>(values: [(&str, &str); N]) -> Self {
        let values = values
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Self {
            values,
            ..Self::default()
        }
    }

    /// Gives a variable another value than the environment does.
    pub fn replace(&mut self, name: &str, value: &str) {
        self.values.insert(name.to_owned(), value.to_owned());
    }

    /// Every variable read so far, with its default ("" = none).
    pub fn asked(&self) -> BTreeMap<&'static str, String> {
        self.asked.borrow().clone()
    }

    /// The value of `name`; `None` if it is unset, empty or blank.
    pub fn text(&self, name: &'static str) -> Result<Option<String>, Error> {
        self.asked.borrow_mut().entry(name).or_default();
        if self.no_text.contains(name) {
            return Err(Error::new(name, "isn't text", "text in UTF-8"));
        }
        let value = self.values.get(name).map(|value| value.trim().to_owned());
        Ok(value.filter(|value| !value.is_empty()))
    }

    /// The value of a variable of the system (`HOME`, `PATH`), which isn't a setting of this service.
    pub fn unlisted(&self, name: &str) -> Option<String> {
        self.values.get(name).filter(|value| !value.is_empty()).cloned()
    }

    /// A variable that is set and whose name begins so; for settings of other programs that have no effect here.
    pub fn named_like(&self, prefix: &str) -> Option<&str> {
        let set = self
            .values
            .iter()
            .filter(|(name, value)| name.starts_with(prefix) && !value.trim().is_empty());
        set.map(|(name, _)| name.as_str()).min()
    }

    /// Resolves the relative path that is the value or the default of `name`. A value of the environment counts from
    /// the working directory; all others count from the folder of the `.env` file, so that a service and its commands
    /// use the same files from every folder below it.
    pub fn resolve(&self, name: &str, path: PathBuf) -> PathBuf {
        match &self.folder {
            Some(folder) if !self.own.contains(name) => folder.join(path),
            _ => path,
        }
    }

    /// The resolved path in `name`; `None` if it is unset, empty or blank.
    pub fn path(&self, name: &'static str) -> Result<Option<PathBuf>, Error> {
        Ok(self.text(name)?.map(|path| self.resolve(name, path.into())))
    }

    /// The value of `name`, or `default`.
    pub fn or(&self, name: &'static str, default: &str) -> Result<String, Error> {
        self.asked.borrow_mut().insert(name, default.to_owned());
        Ok(self.text(name)?.unwrap_or_else(|| default.to_owned()))
    }

    /// One of `choices`, in lower case, or `default`.
    pub fn choice(&self, name: &'static str, default: &str, choices: &[&str]) -> Result<String, Error> {
        let value = self.or(name, default)?;
        match choices.iter().find(|choice| choice.eq_ignore_ascii_case(&value)) {
            Some(choice) => Ok((*choice).to_owned()),
            None => Err(Error::new(name, "has an unknown value", choices.join(" | "))),
        }
    }

    /// `true` or `false` (also 1, 0, yes, no, on, off), or `default`.
    pub fn flag(&self, name: &'static str, default: bool) -> Result<bool, Error> {
        match self
            .or(name, if default { "true" } else { "false" })?
            .to_lowercase()
            .as_str()
        {
            "true" | "1" | "yes" | "on" => Ok(true),
            "false" | "0" | "no" | "off" => Ok(false),
            _ => Err(Error::new(name, "isn't a truth value", "true or false")),
        }
    }

    /// A number from `low` to `high`, or `default`.
    pub fn number<T>(&self, name: &'static str, default: T, low: T, high: T) -> Result<T, Error>
    where
        T: FromStr + PartialOrd + fmt::Display + Copy,
    {
        let accepted = format!("a number from {low} to {high}");
        let text = self.or(name, &default.to_string())?;
        let number = text
            .parse::<T>()
            .map_err(|_| Error::new(name, "isn't such a number", accepted.clone()))?;
        if number < low || number > high {
            return Err(Error::new(name, format!("is out of range ({number})"), accepted));
        }
        Ok(number)
    }

    /// How long open requests and running jobs may take after a stop signal: `DRAIN_SECONDS`, 30.
    pub fn drain(&self) -> Result<Duration, Error> {
        self.number("DRAIN_SECONDS", 30, 0, 86_400)
            .map(Duration::from_secs)
    }

    /// How long an ended job keeps its data: `JOB_RETENTION_DAYS`, 30.
    pub fn retention(&self) -> Result<Duration, Error> {
        self.number("JOB_RETENTION_DAYS", 30, 1, 36_500)
            .map(|days: u64| Duration::from_secs(86_400 * days))
    }

    /// How long an `Idempotency-Key` stays valid: `IDEMPOTENCY_TTL_HOURS`, 24.
    pub fn idempotency_ttl(&self) -> Result<Duration, Error> {
        self.number("IDEMPOTENCY_TTL_HOURS", 24, 1, 8_760)
            .map(|hours: u64| Duration::from_secs(3_600 * hours))
    }

    /// Rules for tools with commas between them, as [`crate::rule`] reads them.
    pub fn rules(&self, name: &'static str, default: &str) -> Result<Vec<String>, Error> {
        let rules = crate::rule::split(&self.or(name, default)?);
        for rule in &rules {
            if let Err(why) = crate::rule::check(rule) {
                return Err(Error::new(
                    name,
                    format!("has a rule that can't be used: {why}"),
                    "rules such as Bash(git *), with commas between them",
                ));
            }
        }
        Ok(rules)
    }

    /// Variables that nobody has asked for, each with the one that was asked for and is spelled nearly so.
    pub fn misspelt(&self) -> Vec<(String, &'static str)> {
        let asked = self.asked.borrow();
        let mut misspelt = self
            .values
            .iter()
            .filter(|(name, value)| !asked.contains_key(name.as_str()) && !value.trim().is_empty())
            .filter_map(|(name, _)| {
                // Short names of others are too often near one of ours.
                let known = asked.keys().copied().filter(|known| known.len() > 6);
                Some((name.clone(), crate::spelling::nearest(name, known)?))
            })
            .collect::<Vec<_>>();
        misspelt.sort();
        misspelt
    }

    /// Warns of variables that are probably misspelt, of each once. Call it when all settings have been read.
    pub fn warn_misspelt(&self) {
        for (name, known) in self.misspelt() {
            if self.warned.borrow_mut().insert(name.clone()) {
                tracing::warn!("{name} is not a setting and has no effect; did you mean {known}?");
            }
        }
    }

    /// A comma-separated list. Spaces around members and empty members are dropped.
    pub fn list(&self, name: &'static str, default: &str) -> Result<Vec<String>, Error> {
        let text = self.or(name, default)?;
        Ok(text
            .split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
            .map(str::to_owned)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_value_names_the_variable_and_the_accepted_form() {
        let vars = Vars::of([
            ("LEASE_SECONDS", "soon"),
            ("API_PORT", "70000"),
            ("ENABLE", "perhaps"),
            ("MODE", "x"),
        ]);

        let soon = vars.number("LEASE_SECONDS", 30, 1, 3600).unwrap_err();
        assert_eq!(
            soon.to_string(),
            "LEASE_SECONDS isn't such a number; accepted: a number from 1 to 3600"
        );
        let port = vars.number::<u32>("API_PORT", 8000, 0, 65_535).unwrap_err();
        assert_eq!(
            port.to_string(),
            "API_PORT is out of range (70000); accepted: a number from 0 to 65535"
        );
        assert_eq!(vars.flag("ENABLE", true).unwrap_err().variable, "ENABLE");
        assert_eq!(
            vars.choice("MODE", "a", &["a", "b"]).unwrap_err().accepted,
            "a | b"
        );
    }

    #[test]
    fn what_is_no_text_matters_only_where_it_is_asked_for() {
        use std::os::unix::ffi::OsStringExt;
        let bad = || OsString::from_vec(vec![b'x', 0xff]);
        let own = vec![
            (bad(), "foreign".into()),
            ("FOREIGN".into(), bad()),
            ("API_KEYS".into(), bad()),
            ("API_PORT".into(), "80".into()),
        ];
        let vars = Vars::from_os(Vec::new(), own);

        assert_eq!(vars.number("API_PORT", 8000, 0, 65_535), Ok(80));
        let error = vars.list("API_KEYS", "").unwrap_err();
        assert_eq!(error.to_string(), "API_KEYS isn't text; accepted: text in UTF-8");
    }

    #[test]
    fn the_last_line_of_a_file_counts_unless_the_environment_says_something() {
        let file = [("A", "first"), ("B", "file"), ("C", "file"), ("A", "last")];
        let file = file
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec();
        let own = [("B", "own"), ("C", " "), ("D", "")];
        let own = own.map(|(name, value)| (name.into(), value.into())).to_vec();

        let vars = Vars::from_os(file, own);

        assert_eq!(
            ["A", "B", "C", "D", "E"].map(|name| vars.text(name).unwrap()),
            [
                Some("last".to_owned()),
                Some("own".to_owned()),
                Some("file".to_owned()),
                None,
                None
            ]
        );
    }

    #[test]
    fn relative_paths_count_from_the_file_that_names_them() {
        let text = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let file = vec![text("A", "data"), text("B", "b")];
        let own = vec![("B".into(), "b".into()), ("C".into(), "/c".into())];
        let vars = Vars {
            folder: Some("/srv".into()),
            ..Vars::from_os(file, own)
        };
        let path = |name| vars.path(name).unwrap();

        assert_eq!(path("A"), Some("/srv/data".into()));
        assert_eq!(path("B"), Some("b".into()));
        assert_eq!(path("C"), Some("/c".into()));
        assert_eq!(path("D"), None);
        assert_eq!(vars.resolve("D", "data".into()), PathBuf::from("/srv/data"));
    }

    #[test]
    fn a_misspelt_variable_is_found_once_its_neighbour_was_asked_for() {
        let vars = Vars::of([
            ("WORKER_CONCURENCY", "4"),
            ("API_KEY", "k"),
            ("HOME", "/root"),
            ("LEASE_SECONDS", "30"),
        ]);
        for name in ["WORKER_CONCURRENCY", "API_KEYS", "LEASE_SECONDS"] {
            vars.text(name).unwrap();
        }
        assert_eq!(
            vars.misspelt(),
            [
                ("API_KEY".to_owned(), "API_KEYS"),
                ("WORKER_CONCURENCY".to_owned(), "WORKER_CONCURRENCY")
            ]
        );
    }

    #[test]
    fn a_comma_between_the_brackets_of_a_rule_belongs_to_it() {
        let vars = Vars::of([("RULES", "Bash(touch one, two), Read"), ("BAD", "Bash(x")]);
        assert_eq!(vars.rules("RULES", "").unwrap(), ["Bash(touch one, two)", "Read"]);
        assert_eq!(vars.rules("BAD", "").unwrap_err().variable, "BAD");
    }

    #[test]
    fn unset_empty_and_blank_mean_the_default() {
        let vars = Vars::of([("EMPTY", ""), ("BLANK", "  ")]);
        for name in ["EMPTY", "BLANK", "UNSET"] {
            assert_eq!(vars.number(name, 7, 0, 9), Ok(7));
        }
    }
}
