//! Templates: settings by name. They come from a file that may change while the service runs; a broken file changes
//! nothing.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;
use shared::env;
use shared::money::MicroUsd;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use warp::reply::Response;

use crate::config::Config;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply;
use crate::http::request::fields::{Fields, text};
use crate::http::request::{Request, Segment};
use crate::settings::Settings;

/// The templates that the program brings along.
const BUILT_IN: &str = include_str!("../templates.yml");
/// How often the file is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// A larger file isn't read.
const FILE_LIMIT: u64 = 4 * 1024 * 1024;

type Set = Arc<BTreeMap<String, Settings>>;

/// The templates that are in force.
#[derive(Debug)]
pub struct Templates {
    file: Option<PathBuf>,
    config: Config,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    set: Set,
    /// What the file was like when it was last read.
    seen: Option<(SystemTime, u64)>,
    checked: Instant,
}

impl Templates {
    /// Reads the file, or the templates that the program brings along. The error names the variable.
    pub fn open(config: &Config) -> Result<Self, env::Error> {
        let file = config.templates_file.clone();
        let unusable =
            |why: String| env::Error::new("TEMPLATES_FILE", why, "a YAML file of templates by name");
        let (set, seen) = match &file {
            Some(path) => (read(path, config).map_err(unusable)?, look(path)),
            None => (parse(BUILT_IN, config).map_err(unusable)?, None),
        };
        let state = State {
            set: Arc::new(set),
            seen,
            checked: Instant::now(),
        };
        Ok(Self {
            file,
            config: config.clone(),
            state: Mutex::new(state),
        })
    }

    /// The settings of a template; a problem if there is none of this name.
    pub fn settings(&self, name: &str) -> Result<Settings, Problem> {
        let found = self.current().get(name).cloned();
        found.ok_or_else(|| Problem::NoSuchTemplate(name.to_owned()))
    }

    /// All templates. A file that has changed is read again; if it is broken, the log says so once, and the templates stay
    /// as they were.
    fn current(&self) -> Set {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &self.file
            && state.checked.elapsed() >= CHECK_INTERVAL
        {
            state.checked = Instant::now();
            let seen = look(path);
            if seen != state.seen {
                state.seen = seen;
                match read(path, &self.config) {
                    Ok(set) => {
                        tracing::info!(templates = set.len(), "templates reloaded");
                        state.set = Arc::new(set);
                    }
                    Err(why) => {
                        tracing::warn!("TEMPLATES_FILE {why}; the templates stay as they were");
                    }
                }
            }
        }
        Arc::clone(&state.set)
    }

    /// Reads the file now.
    fn reload(&self) -> Result<Set, String> {
        let Some(path) = &self.file else {
            return Ok(self.current());
        };
        let seen = look(path);
        let set = Arc::new(read(path, &self.config)?);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.seen, state.set) = (seen, Arc::clone(&set));
        Ok(set)
    }
}

/// What tells whether the file was changed.
fn look(path: &Path) -> Option<(SystemTime, u64)> {
    let metadata = path.metadata().ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

fn read(path: &Path, config: &Config) -> Result<BTreeMap<String, Settings>, String> {
    let unreadable = |error: std::io::Error| format!("({}) can't be read: {error}", path.display());
    let length = path.metadata().map_err(unreadable)?.len();
    if length > FILE_LIMIT {
        return Err(format!("({}) has more than {FILE_LIMIT} bytes", path.display()));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    parse(&text, config).map_err(|why| format!("({}) {why}", path.display()))
}

/// The templates of a file, or what is wrong with the first that can't be used.
fn parse(text: &str, config: &Config) -> Result<BTreeMap<String, Settings>, String> {
    let named = serde_saphyr::from_str::<BTreeMap<String, Value>>(text)
        .map_err(|error| format!("isn't YAML of templates by name: {error}"))?;
    named
        .into_iter()
        .map(|(name, value)| {
            let settings = template(&name, value, config);
            let wrong = |problem: Problem| format!("has a template that can't be used: {}", problem.detail());
            settings.map(|settings| (name, settings)).map_err(wrong)
        })
        .collect()
}

fn template(name: &str, value: Value, config: &Config) -> Result<Settings, Problem> {
    let mut fields = Fields::of(&format!("templates -> {name}"), value)?;
    let settings = Settings::read(&mut fields, "system_prompt", config);
    // For people who read the file.
    fields.optional("description", text(0..=1_000));
    fields.finish(Some(settings))
}

/// A template as clients see it.
#[derive(Debug, Serialize)]
pub struct TemplateView {
    name: String,
    system_prompt: Option<String>,
    effort: Option<String>,
    model: Option<String>,
    max_turns: Option<i64>,
    permission_mode: Option<String>,
    allowed_tools: Option<String>,
    disallowed_tools: Option<String>,
    max_cost_usd: Option<MicroUsd>,
}

impl TemplateView {
    fn of(name: &str, settings: &Settings) -> Self {
        let settings = settings.clone();
        Self {
            name: name.to_owned(),
            system_prompt: settings.system_prompt,
            effort: settings.effort,
            model: settings.model,
            max_turns: settings.max_turns,
            permission_mode: settings.permission_mode,
            allowed_tools: settings.allowed_tools.map(|rules| rules.join(",")),
            disallowed_tools: settings.disallowed_tools.map(|rules| rules.join(",")),
            max_cost_usd: settings.max_cost_usd,
        }
    }
}

/// `GET /templates`: all of them, by name.
pub async fn list(context: &Context, request: &Request, _caller: &Caller) -> Result<Response, Problem> {
    let set = context.templates.current();
    let shown = set
        .iter()
        .map(|(name, settings)| (name, TemplateView::of(name, settings)));
    reply::data(request, StatusCode::OK, shown.collect::<BTreeMap<_, _>>())
}

/// `GET /templates/{name}`.
pub async fn item(
    context: &Context,
    request: &Request,
    _caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let set = context.templates.current();
    let settings = set.get(name.as_ref());
    let settings = settings.ok_or_else(|| Problem::UnknownTemplate(name.as_ref().to_owned()))?;
    reply::data(request, StatusCode::OK, TemplateView::of(name.as_ref(), settings))
}

/// What was read again.
#[derive(Debug, Serialize)]
pub struct Reloaded {
    count: usize,
    names: Vec<String>,
}

/// `POST /templates/reload`: reads the file now, instead of within a second, and says what is wrong with it. Other
/// processes see the change by themselves.
pub async fn reload(context: &Context, request: &Request, _caller: &Caller) -> Result<Response, Problem> {
    request.json_or_nothing().await?.fields()?.finish(Some(()))?;
    let set = context.templates.reload().map_err(Problem::BrokenTemplates)?;
    let names = set.keys().cloned().collect::<Vec<_>>();
    let count = names.len();
    reply::data(request, StatusCode::OK, Reloaded { count, names })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_brings_twelve_templates() {
        let set = parse(BUILT_IN, &Config::default()).unwrap();
        let names = set.keys().map(String::as_str).collect::<Vec<_>>();
        assert_eq!(
            names,
            [
                "api-designer",
                "architect",
                "code-reviewer",
                "data-engineer",
                "debug",
                "devops",
                "docs",
                "frontend",
                "performance",
                "refactor",
                "security",
                "test-writer",
            ]
        );
        for settings in set.values() {
            assert!(settings.system_prompt.is_some() && settings.effort.is_some());
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_place() {
        for (text, why) in [
            ("a: [1", "isn't YAML"),
            ("- a", "isn't YAML"),
            ("a: {effort: huge}", "templates -> a -> effort"),
            ("a: {sistem_prompt: x}", "did you mean `system_prompt`?"),
            ("a: text", "templates -> a"),
            ("a: {max_turns: 0}", "templates -> a -> max_turns"),
        ] {
            let error = parse(text, &Config::default()).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        assert!(parse("a: {description: d, model: opus}", &Config::default()).is_ok());
        assert!(parse("{}", &Config::default()).unwrap().is_empty());
    }

    #[test]
    fn a_file_is_read_again_when_it_changes_and_a_broken_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("templates.yml");
        std::fs::write(&file, "a: {effort: low}").unwrap();
        let config = Config {
            templates_file: Some(file.clone()),
            ..Config::default()
        };
        let templates = Templates::open(&config).unwrap();
        let due = || {
            let mut state = templates.state.lock().unwrap();
            state.checked = Instant::now().checked_sub(CHECK_INTERVAL).unwrap();
        };
        let names = || templates.current().keys().cloned().collect::<Vec<_>>();

        std::fs::write(&file, "a: {effort: low}\nb: {effort: high}").unwrap();
        due();
        assert_eq!(names(), ["a", "b"]);
        std::fs::write(&file, "a: {effort: low}\nb: {effort: huge!}").unwrap();
        due();
        assert_eq!(names(), ["a", "b"]);
        assert!(templates.reload().unwrap_err().contains("effort"));
        std::fs::remove_file(&file).unwrap();
        due();
        assert_eq!(names(), ["a", "b"]);
        std::fs::write(&file, "c: {}").unwrap();
        assert_eq!(templates.reload().unwrap().len(), 1);
        assert_eq!(names(), ["c"]);
        std::fs::write(&file, "x: [").unwrap();
        assert_eq!(Templates::open(&config).unwrap_err().variable, "TEMPLATES_FILE");
    }
}
