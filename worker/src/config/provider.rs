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

impl Kind {
    /// Whether it serves what Anthropic calls experimental: some clouds refuse a request that names an unknown beta.
    pub fn takes_all_betas(&self) -> bool {
        matches!(self, Self::Anthropic | Self::Foundry)
    }
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

/// Variables of the CLI for what the gateway can't do: with each the worker doesn't start, rather than leave it without
/// effect. In brackets the choices with which it counts; none for always.
const UNSUPPORTED: [(&str, &[usize], &str); 18] = [
    ("CLAUDE_CODE_USE_ANTHROPIC_AWS", &[], OTHERS),
    ("CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD", &[], OTHERS),
    (
        "CLAUDE_CODE_USE_GATEWAY",
        &[],
        "ANTHROPIC_BASE_URL and ANTHROPIC_AUTH_TOKEN for a gateway",
    ),
    ("ANTHROPIC_CUSTOM_HEADERS", &[], NOTHING),
    ("ANTHROPIC_BETAS", &[], NOTHING),
    (
        "ANTHROPIC_IDENTITY_TOKEN",
        &[],
        "ANTHROPIC_IDENTITY_TOKEN_FILE, a file that the platform keeps fresh",
    ),
    (
        "ANTHROPIC_FOUNDRY_AUTH_TOKEN",
        &[0],
        "ANTHROPIC_FOUNDRY_API_KEY; Entra ID isn't supported",
    ),
    ("CLAUDE_CODE_SKIP_FOUNDRY_AUTH", &[0], NOTHING),
    ("CLAUDE_CODE_SKIP_BEDROCK_AUTH", &[1, 2], NOTHING),
    ("CLAUDE_CODE_SKIP_MANTLE_AUTH", &[1, 2], NOTHING),
    ("ANTHROPIC_BEDROCK_SERVICE_TIER", &[1, 2], NOTHING),
    (
        "ANTHROPIC_BEDROCK_REGION_PREFIX",
        &[1, 2],
        "PROVIDER_MODEL_IDS, the id of each model",
    ),
    (
        "ANTHROPIC_SMALL_FAST_MODEL_AWS_REGION",
        &[1, 2],
        "one region for all models",
    ),
    ("AWS_ENDPOINT_URL", &[1, 2], "ANTHROPIC_BEDROCK_BASE_URL"),
    (
        "AWS_ENDPOINT_URL_BEDROCK_RUNTIME",
        &[1, 2],
        "ANTHROPIC_BEDROCK_BASE_URL",
    ),
    ("AWS_USE_FIPS_ENDPOINT", &[1, 2], "ANTHROPIC_BEDROCK_BASE_URL"),
    ("CLAUDE_CODE_SKIP_VERTEX_AUTH", &[3], NOTHING),
    (
        "VERTEX_REGION_CLAUDE_",
        &[3],
        "CLOUD_ML_REGION, one region for all models",
    ),
];

const OTHERS: &str =
    "CLAUDE_CODE_USE_FOUNDRY, CLAUDE_CODE_USE_BEDROCK, CLAUDE_CODE_USE_MANTLE or CLAUDE_CODE_USE_VERTEX";
const NOTHING: &str = "nothing: leave it out";

/// Variables of the CLI whose place here is another setting. People have them in their shell for their own use of the CLI, so
/// they are only warned of.
const ELSEWHERE: [(&str, &str); 6] = [
    ("ANTHROPIC_MODEL", "CLAUDE_MODEL"),
    ("ANTHROPIC_SMALL_FAST_MODEL", "allowed_models of a key"),
    ("ANTHROPIC_DEFAULT_OPUS_MODEL", "PROVIDER_MODEL_IDS"),
    ("ANTHROPIC_DEFAULT_SONNET_MODEL", "PROVIDER_MODEL_IDS"),
    ("ANTHROPIC_DEFAULT_HAIKU_MODEL", "PROVIDER_MODEL_IDS"),
    ("ANTHROPIC_DEFAULT_FABLE_MODEL", "PROVIDER_MODEL_IDS"),
];

/// Refuses variables that would have no effect.
fn check_unsupported(vars: &Vars, choice: Option<usize>) -> Result<(), Error> {
    for (name, choices, accepted) in UNSUPPORTED {
        let counts = choices.is_empty() || choice.is_some_and(|choice| choices.contains(&choice));
        let is_set = if name.ends_with('_') {
            vars.named_like(name).is_some()
        } else {
            let value = vars
                .unlisted(name)
                .unwrap_or_default()
                .trim()
                .to_ascii_lowercase();
            !matches!(value.as_str(), "" | "0" | "false" | "no" | "off")
        };
        if counts && is_set {
            return Err(Error::new(
                name,
                "isn't supported and would have no effect",
                accepted,
            ));
        }
    }
    for (name, setting) in ELSEWHERE {
        if vars.unlisted(name).is_some() {
            tracing::warn!("{name} has no effect: the setting here is {setting}");
        }
    }
    Ok(())
}

/// The providers' own variables, and the choices with which they have an effect.
const OWN: [(&str, &[usize]); 9] = [
    ("ANTHROPIC_FOUNDRY_RESOURCE", &[0]),
    ("ANTHROPIC_FOUNDRY_BASE_URL", &[0]),
    ("ANTHROPIC_FOUNDRY_API_KEY", &[0]),
    ("ANTHROPIC_BEDROCK_BASE_URL", &[1, 2]),
    ("ANTHROPIC_BEDROCK_MANTLE_BASE_URL", &[2]),
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
    check_unsupported(vars, choice)?;
    for (name, choices) in OWN {
        if vars.text(name)?.is_some() && choice.is_none_or(|choice| !choices.contains(&choice)) {
            let needed = CHOICES[choices[0]];
            tracing::warn!("{name} has no effect: {needed}=1 would choose that provider");
        }
    }
    let Some(choice) = choice else {
        // Other programs use them too, so they may be set.
        for name in ["AWS_REGION", "AWS_DEFAULT_REGION", "CLOUD_ML_REGION"] {
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
    let own = vars.text("ANTHROPIC_BEDROCK_MANTLE_BASE_URL")?.filter(|_| mantle);
    let address = if let Some(address) = own.or(vars.text("ANTHROPIC_BEDROCK_BASE_URL")?) {
        address
    } else {
        let accepted = "a region such as us-east-1, or ANTHROPIC_BEDROCK_BASE_URL";
        let region = match vars.text("AWS_DEFAULT_REGION")? {
            Some(region) => vars.text("AWS_REGION")?.unwrap_or(region),
            None => needed(vars, "AWS_REGION", accepted)?,
        };
        let region = word(region, "AWS_REGION")?;
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
    let accepted = "a file that holds an access token, kept fresh by something else (gcloud auth print-access-token); \
         GOOGLE_APPLICATION_CREDENTIALS isn't supported";
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
    fn what_the_gateway_cant_do_stops_the_start() {
        let bedrock = [
            ("CLAUDE_CODE_USE_MANTLE", "1"),
            ("AWS_DEFAULT_REGION", "eu-west-1"),
            ("AWS_BEARER_TOKEN_BEDROCK", "k"),
        ];
        let with = |name: &str, value: &str| {
            let [one, two, three] = bedrock;
            chosen(&Vars::of([one, two, three, (name, value)]))
        };
        assert_eq!(
            chosen(&Vars::of(bedrock)).unwrap().unwrap().address.base,
            "https://bedrock-mantle.eu-west-1.api.aws/anthropic"
        );
        for name in [
            "CLAUDE_CODE_USE_ANTHROPIC_AWS",
            "CLAUDE_CODE_SKIP_BEDROCK_AUTH",
            "AWS_ENDPOINT_URL",
            "ANTHROPIC_CUSTOM_HEADERS",
        ] {
            let error = with(name, "1").unwrap_err();
            assert_eq!(error.variable, name);
            assert!(error.to_string().contains("would have no effect"), "{error}");
            assert!(with(name, "").is_ok() && with(name, "false").is_ok(), "{name}");
        }
        assert!(
            with("CLAUDE_CODE_SKIP_VERTEX_AUTH", "1").is_ok(),
            "it is of another provider"
        );
        assert!(chosen(&Vars::of([("ANTHROPIC_IDENTITY_TOKEN", "a.b.c")])).is_err());

        let foundry = Vars::of([
            ("CLAUDE_CODE_USE_FOUNDRY", "1"),
            ("ANTHROPIC_FOUNDRY_RESOURCE", "mine"),
            ("ANTHROPIC_FOUNDRY_AUTH_TOKEN", "entra"),
        ]);
        assert!(chosen(&foundry).unwrap_err().to_string().contains("Entra ID"));
        let vertex = Vars::of([
            ("CLAUDE_CODE_USE_VERTEX", "1"),
            ("VERTEX_REGION_CLAUDE_HAIKU_5_5", "us-east5"),
        ]);
        assert_eq!(chosen(&vertex).unwrap_err().variable, "VERTEX_REGION_CLAUDE_");
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
