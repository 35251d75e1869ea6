//! How Claude is run: the settings that a session has for its jobs and that a job may have for itself.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use shared::job::{EFFORTS, PERMISSION_MODES};
use shared::key::Scope;
use shared::model::{Aliases, AllowedModels};
use shared::money::MicroUsd;

use crate::config::Config;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::request::fields::{Fields, Reading, choice, dollars, integer, parsed, rules, text};

const BYPASS: &str = "bypassPermissions";

/// Settings; what is `None` is decided by the session, then by the service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Replaces the system prompt.
    pub system_prompt: Option<String>,
    /// The model, by name or alias.
    pub model: Option<String>,
    /// Turns at most, 1 to 1000.
    pub max_turns: Option<i64>,
    /// What the agent may do without asking.
    pub permission_mode: Option<String>,
    /// How hard the model thinks.
    pub effort: Option<String>,
    /// Rules that allow tools; an empty list: there are no tools.
    pub allowed_tools: Option<Vec<String>>,
    /// Rules that forbid tools.
    pub disallowed_tools: Option<Vec<String>>,
    /// What all attempts together may cost at most.
    pub max_cost_usd: Option<MicroUsd>,
}

impl Settings {
    /// Reads the settings from a body; `system` is what the system prompt is called there.
    pub fn read(body: &mut Fields, system: &str, config: &Config) -> Self {
        let mut settings = Self::default();
        settings.change(body, system, config);
        settings
    }

    /// Changes the settings that a body names; null leaves one to others again.
    pub fn change(&mut self, body: &mut Fields, system: &str, config: &Config) {
        #[expect(clippy::option_option, reason = "a member may be absent, null or a value")]
        fn put<T>(setting: &mut Option<T>, wanted: Option<Option<T>>) {
            if let Some(wanted) = wanted {
                *setting = wanted;
            }
        }
        let owned = |wanted: Option<Option<&'static str>>| wanted.map(|word| word.map(str::to_owned));
        put(&mut self.system_prompt, body.change(system, text(0..=50_000)));
        put(&mut self.model, body.change("model", model));
        put(&mut self.max_turns, body.change("max_turns", integer(1..=1_000)));
        let mode = body.change("permission_mode", choice(&PERMISSION_MODES));
        put(&mut self.permission_mode, owned(mode));
        put(&mut self.effort, owned(body.change("effort", choice(&EFFORTS))));
        let tools = |wanted: Option<Option<Option<Vec<String>>>>| wanted.map(Option::flatten);
        put(
            &mut self.allowed_tools,
            tools(body.change("allowed_tools", tool_rules)),
        );
        put(
            &mut self.disallowed_tools,
            tools(body.change("disallowed_tools", tool_rules)),
        );
        let cost = body.change("max_cost_usd", dollars(config.max_cost_per_request));
        put(&mut self.max_cost_usd, cost);
    }

    /// These settings, and where they say nothing, those.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            system_prompt: self.system_prompt.or(others.system_prompt),
            model: self.model.or(others.model),
            max_turns: self.max_turns.or(others.max_turns),
            permission_mode: self.permission_mode.or(others.permission_mode),
            effort: self.effort.or(others.effort),
            allowed_tools: self.allowed_tools.or(others.allowed_tools),
            disallowed_tools: self.disallowed_tools.or(others.disallowed_tools),
            max_cost_usd: self.max_cost_usd.or(others.max_cost_usd),
        }
    }

    /// Refuses what the caller may not ask for.
    pub fn allowed_to(&self, caller: &Caller, aliases: &Aliases) -> Result<(), Problem> {
        match &self.permission_mode {
            Some(mode) if mode == BYPASS && !caller.may(Scope::PermissionsBypass) => {
                return Err(Problem::PermissionModeNotAllowed(mode.clone()));
            }
            _ => {}
        }
        let allowed = AllowedModels::new(&caller.rights.allowed_models.0, aliases);
        match &self.model {
            Some(model) if !allowed.allow(model, aliases) => Err(Problem::ModelNotAllowed(model.clone())),
            _ => Ok(()),
        }
    }
}

/// Rules for tools. An empty text is no rule of its own, as in the Python service; an empty list is: no tool at all.
fn tool_rules(value: Value) -> Reading<Option<Vec<String>>> {
    let blank = value.as_str().is_some_and(|text| text.trim().is_empty());
    if blank { Ok(None) } else { rules(value).map(Some) }
}

/// The name of a model becomes an argument of the CLI, so it can't look like an option or hold blanks.
pub fn model(value: Value) -> Reading<String> {
    parsed(1..=100, |name| {
        let fits = !name.starts_with('-')
            && name
                .chars()
                .all(|char| !char.is_whitespace() && !char.is_control());
        if fits {
            Ok(name)
        } else {
            Err("Model should be a name without blanks that does not begin with a hyphen")
        }
    })(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use shared::id::KeyId;
    use shared::key::{KeyRights, Scopes, TextList};

    fn read(value: Value) -> Result<Settings, Problem> {
        let mut body = Fields::of("body", value).unwrap();
        let settings = Settings::read(&mut body, "system", &Config::default());
        body.finish(Some(settings))
    }

    #[test]
    fn a_jobs_own_settings_come_before_its_sessions() {
        let own = read(json!({"model": "opus", "allowed_tools": "Bash,Read"})).unwrap();
        let sessions = read(json!({"model": "haiku", "max_turns": 3})).unwrap();
        let both = own.or(sessions);
        assert_eq!(both.model.as_deref(), Some("opus"));
        assert_eq!(both.max_turns, Some(3));
        assert_eq!(
            both.allowed_tools,
            Some(vec!["Bash".to_owned(), "Read".to_owned()])
        );
    }

    #[test]
    fn what_could_be_taken_for_an_option_is_refused() {
        for value in [
            json!({"model": "--dangerously-skip-permissions"}),
            json!({"model": "a b"}),
            json!({"model": ""}),
            json!({"allowed_tools": ["--mcp-config"]}),
            json!({"disallowed_tools": "Read,--x"}),
        ] {
            assert!(read(value.clone()).is_err(), "{value}");
        }
    }

    #[test]
    fn only_an_admin_may_skip_permission_checks() {
        let settings = read(json!({"permission_mode": "bypassPermissions"})).unwrap();
        let ordinary = Caller::ordinary(KeyId::anonymous());
        assert_eq!(
            settings
                .allowed_to(&ordinary, &Aliases::default())
                .unwrap_err()
                .code(),
            "permission-mode-not-allowed"
        );
        let admin = Caller::administrator(KeyId::anonymous());
        assert!(settings.allowed_to(&admin, &Aliases::default()).is_ok());
    }

    #[test]
    fn a_key_may_be_bound_to_models() {
        let mut rights = KeyRights::of(Scopes::all());
        rights.allowed_models = TextList(vec!["sonnet".to_owned()]);
        let caller = Caller::of(KeyId::anonymous(), rights);
        let allowed = |model: Value| {
            let settings = read(json!({ "model": model })).unwrap();
            let allowed = settings.allowed_to(&caller, &Aliases::default());
            allowed.map_err(|problem| problem.code())
        };
        for model in [
            "sonnet",
            "sonnet[1m]",
            "claude-sonnet-5-5",
            "us.anthropic.claude-sonnet-5-5-v1:0",
        ] {
            assert_eq!(allowed(json!(model)), Ok(()), "{model}");
        }
        assert_eq!(allowed(json!(null)), Ok(()));
        for model in ["opus", "claude-sonnet-4-5", "opusplan"] {
            assert_eq!(allowed(json!(model)), Err("model-not-allowed"), "{model}");
        }
    }

    #[test]
    fn settings_survive_the_table() {
        let settings = read(json!({"system": "x", "max_cost_usd": 1.25, "effort": "max"})).unwrap();
        let text = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), settings);
    }
}
