//! Whose Messages API it is: Anthropic's own, or that of a cloud, chosen by the variables of the Claude CLI. Runs never
//! see these: the gateway speaks to the provider.

use shared::env::{Error, Vars};
use std::collections::BTreeMap;
use std::path::PathBuf;

use super::address::Address;

/// Whose API it is, and what requests to it need.
#[derive(Clone, Debug, Default)]
pub struct Provider {
    /// Which one.
    pub kind: Kind,
    /// How it names models, where that isn't by rule. `PROVIDER_MODEL_IDS`, pairs as `claude-sonnet-5=my-deployment`.
    pub models: BTreeMap<String, String>,
}

/// The providers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Anthropic, or a gateway that speaks the same.
    #[default]
    Anthropic,
    /// Microsoft Foundry. `CLAUDE_CODE_USE_FOUNDRY`.
    Foundry,
    /// Amazon Bedrock's own Messages API. `CLAUDE_CODE_USE_BEDROCK` or `CLAUDE_CODE_USE_MANTLE`.
    Bedrock,
    /// Google Vertex AI. `CLAUDE_CODE_USE_VERTEX`.
    Vertex {
        /// `ANTHROPIC_VERTEX_PROJECT_ID`.
        project: String,
        /// `CLOUD_ML_REGION`.
        region: String,
    },
}

/// A provider that was chosen, its address, and the credential that it takes.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) provider: Provider,
    pub(super) address: Address,
    pub(super) credential: Given,
}

/// The credential of a provider.
#[derive(Clone)]
pub enum Given {
    /// A key of Foundry.
    FoundryKey(String),
    /// An API key of Bedrock.
    BedrockKey(String),
    /// A file that holds an access token of Google; it is read for each request.
    TokenFile(PathBuf),
}

impl std::fmt::Debug for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Given")
    }
}

/// The variables that choose a provider.
const CHOICES: [&str; 4] = [
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_MANTLE",
    "CLAUDE_CODE_USE_VERTEX",
];

/// The providers' own variables, and the choices with which they have an effect.
const OWN: [(&str, &[usize]); 8] = [
    ("ANTHROPIC_FOUNDRY_RESOURCE", &[0]),
    ("ANTHROPIC_FOUNDRY_BASE_URL", &[0]),
    ("ANTHROPIC_FOUNDRY_API_KEY", &[0]),
    ("ANTHROPIC_BEDROCK_BASE_URL", &[1, 2]),
    ("AWS_BEARER_TOKEN_BEDROCK", &[1, 2]),
    ("ANTHROPIC_VERTEX_PROJECT_ID", &[3]),
    ("ANTHROPIC_VERTEX_BASE_URL", &[3]),
    ("GOOGLE_ACCESS_TOKEN_FILE", &[3]),
];

/// Reads which provider was chosen; `None` is Anthropic. The error names the variable that is missing or too much.
pub(super) fn chosen(vars: &Vars) -> Result<Option<Chosen>, Error> {
    let mut choice = None;
    for (number, name) in CHOICES.iter().enumerate() {
        if !vars.flag(name, false)? {
            continue;
        }
        if let Some(other) = choice.replace(number) {
            let problem = format!("is set together with {}", CHOICES[other]);
            return Err(Error::new(name, problem, "one provider at a time"));
        }
    }
    for (name, choices) in OWN {
        if vars.text(name)?.is_some() && choice.is_none_or(|choice| !choices.contains(&choice)) {
            let needed = CHOICES[choices[0]];
            tracing::warn!("{name} has no effect: {needed}=1 would choose that provider");
        }
    }
    let Some(choice) = choice else {
        // Other programs use them too, so they may be set.
        for name in ["AWS_REGION", "CLOUD_ML_REGION"] {
            vars.text(name)?;
        }
        return Ok(None);
    };
    if vars.text("ANTHROPIC_BASE_URL")?.is_some() {
        let problem = format!("is set together with {}", CHOICES[choice]);
        let accepted = "the provider's own variable for its address";
        return Err(Error::new("ANTHROPIC_BASE_URL", problem, accepted));
    }
    let models = models(vars)?;
    let (kind, address, credential) = match choice {
        0 => foundry(vars)?,
        1 | 2 => bedrock(vars, choice == 2)?,
        _ => vertex(vars)?,
    };
    Ok(Some(Chosen {
        provider: Provider { kind, models },
        address,
        credential,
    }))
}

fn needed(vars: &Vars, name: &'static str, accepted: &str) -> Result<String, Error> {
    vars.text(name)?
        .ok_or_else(|| Error::new(name, "is missing for the provider that was chosen", accepted))
}

fn foundry(vars: &Vars) -> Result<(Kind, Address, Given), Error> {
    let address = if let Some(address) = vars.text("ANTHROPIC_FOUNDRY_BASE_URL")? {
        address
    } else {
        let accepted = "the resource's name, or ANTHROPIC_FOUNDRY_BASE_URL";
        let resource = needed(vars, "ANTHROPIC_FOUNDRY_RESOURCE", accepted)?;
        let resource = word(resource, "ANTHROPIC_FOUNDRY_RESOURCE")?;
        format!("https://{resource}.services.ai.azure.com/anthropic")
    };
    let key = needed(
        vars,
        "ANTHROPIC_FOUNDRY_API_KEY",
        "the resource's key; Entra ID isn't supported",
    )?;
    Ok((Kind::Foundry, Address::parse(&address)?, Given::FoundryKey(key)))
}

fn bedrock(vars: &Vars, mantle: bool) -> Result<(Kind, Address, Given), Error> {
    let address = if let Some(address) = vars.text("ANTHROPIC_BEDROCK_BASE_URL")? {
        address
    } else {
        let accepted = "a region such as us-east-1, or ANTHROPIC_BEDROCK_BASE_URL";
        let region = word(needed(vars, "AWS_REGION", accepted)?, "AWS_REGION")?;
        if mantle {
            format!("https://bedrock-mantle.{region}.api.aws/anthropic")
        } else {
            format!("https://bedrock-runtime.{region}.amazonaws.com/anthropic")
        }
    };
    let accepted = "an API key of Amazon Bedrock; signed requests (IAM roles, access keys) aren't supported";
    let key = needed(vars, "AWS_BEARER_TOKEN_BEDROCK", accepted)?;
    Ok((Kind::Bedrock, Address::parse(&address)?, Given::BedrockKey(key)))
}

fn vertex(vars: &Vars) -> Result<(Kind, Address, Given), Error> {
    let project = needed(
        vars,
        "ANTHROPIC_VERTEX_PROJECT_ID",
        "the id of a Google Cloud project",
    )?;
    let project = word(project, "ANTHROPIC_VERTEX_PROJECT_ID")?;
    let region = needed(vars, "CLOUD_ML_REGION", "a region such as us-east5, or global")?;
    let region = word(region, "CLOUD_ML_REGION")?;
    let address = match (vars.text("ANTHROPIC_VERTEX_BASE_URL")?, region.as_str()) {
        (Some(address), _) => address,
        (None, "global") => "https://aiplatform.googleapis.com".to_owned(),
        (None, region) => format!("https://{region}-aiplatform.googleapis.com"),
    };
    let accepted =
        "a file that holds an access token, kept fresh by something else (gcloud auth print-access-token)";
    let file = needed(vars, "GOOGLE_ACCESS_TOKEN_FILE", accepted)?;
    Ok((
        Kind::Vertex { project, region },
        Address::parse(&address)?,
        Given::TokenFile(PathBuf::from(file)),
    ))
}

/// A part of an address: it mustn't lead elsewhere.
fn word(text: String, name: &'static str) -> Result<String, Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !text.is_empty() && text.chars().all(plain) {
        return Ok(text);
    }
    Err(Error::new(
        name,
        "isn't a plain name",
        "letters, digits, - and _ only",
    ))
}

/// The provider's names of models.
pub(super) fn models(vars: &Vars) -> Result<BTreeMap<String, String>, Error> {
    let pairs = vars.list("PROVIDER_MODEL_IDS", "")?;
    let pairs = pairs.iter().map(|pair| {
        let (model, id) = pair.split_once('=').unwrap_or_default();
        let (model, id) = (model.trim(), id.trim());
        if model.is_empty() || id.is_empty() {
            let accepted = "pairs as claude-sonnet-5=us.anthropic.claude-sonnet-5, separated by commas";
            return Err(Error::new(
                "PROVIDER_MODEL_IDS",
                "isn't a list of pairs",
                accepted,
            ));
        }
        Ok((model.to_owned(), id.to_owned()))
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_of_the_cli_choose_the_provider() {
        let vars = Vars::of([
            ("CLAUDE_CODE_USE_BEDROCK", "1"),
            ("AWS_REGION", "eu-west-1"),
            ("AWS_BEARER_TOKEN_BEDROCK", "k"),
            (
                "PROVIDER_MODEL_IDS",
                "claude-sonnet-5=eu.anthropic.claude-sonnet-5",
            ),
        ]);
        let bedrock = chosen(&vars).unwrap().unwrap();
        assert_eq!(bedrock.provider.kind, Kind::Bedrock);
        assert_eq!(
            bedrock.address.base,
            "https://bedrock-runtime.eu-west-1.amazonaws.com/anthropic"
        );
        assert_eq!(
            bedrock.provider.models["claude-sonnet-5"],
            "eu.anthropic.claude-sonnet-5"
        );

        let vars = Vars::of([
            ("CLAUDE_CODE_USE_FOUNDRY", "1"),
            ("ANTHROPIC_FOUNDRY_RESOURCE", "mine"),
            ("ANTHROPIC_FOUNDRY_API_KEY", "k"),
        ]);
        assert_eq!(
            chosen(&vars).unwrap().unwrap().address.base,
            "https://mine.services.ai.azure.com/anthropic"
        );
        let vars = Vars::of([
            ("CLAUDE_CODE_USE_VERTEX", "1"),
            ("ANTHROPIC_VERTEX_PROJECT_ID", "p-1"),
            ("CLOUD_ML_REGION", "global"),
            ("GOOGLE_ACCESS_TOKEN_FILE", "/run/token"),
        ]);
        assert_eq!(
            chosen(&vars).unwrap().unwrap().address.base,
            "https://aiplatform.googleapis.com"
        );
        assert!(chosen(&Vars::of([])).unwrap().is_none());
    }

    #[test]
    fn a_choice_never_has_no_effect_in_silence() {
        let refused = |vars: Vars| chosen(&vars).unwrap_err().variable;
        let bedrock = ("CLAUDE_CODE_USE_BEDROCK", "1");
        let foundry = ("CLAUDE_CODE_USE_FOUNDRY", "1");
        let vertex = ("CLAUDE_CODE_USE_VERTEX", "1");

        assert_eq!(refused(Vars::of([bedrock])), "AWS_REGION");
        assert_eq!(
            refused(Vars::of([bedrock, ("AWS_REGION", "us-east-1")])),
            "AWS_BEARER_TOKEN_BEDROCK"
        );
        assert_eq!(
            refused(Vars::of([bedrock, ("AWS_REGION", "evil.example/")])),
            "AWS_REGION"
        );
        assert_eq!(refused(Vars::of([foundry])), "ANTHROPIC_FOUNDRY_RESOURCE");
        assert_eq!(refused(Vars::of([vertex])), "ANTHROPIC_VERTEX_PROJECT_ID");
        assert_eq!(refused(Vars::of([vertex, bedrock])), "CLAUDE_CODE_USE_VERTEX");
        assert_eq!(
            refused(Vars::of([foundry, ("ANTHROPIC_BASE_URL", "https://x")])),
            "ANTHROPIC_BASE_URL"
        );
    }
}
