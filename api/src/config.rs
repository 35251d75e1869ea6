//! The settings of the API: each a variable of the environment, its default here and nowhere else.

use shared::approved;
use shared::env::{Error, Vars};
use shared::key::SecretKey;
use shared::model::Aliases;
use shared::money::MicroUsd;
use shared::storage::Rate;
use shared::webhook::address::Guard;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::gate::caller::{Exposure, Keys};
use crate::gate::limits::Rates;
use crate::http::address::Proxies;
use crate::http::cors::Cors;

/// How the API is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens. `API_HOST`, 127.0.0.1, and `API_PORT`, 8000; port 0 picks a free one.
    pub address: SocketAddr,
    /// Who may call: the keys of ordinary callers, `API_KEYS`, and of those who see everything, `ADMIN_API_KEYS`,
    /// with commas between them. None by default.
    pub keys: Keys,
    /// What the keys of the database are checked with. `SECRET_KEY`; needed as soon as there are such keys.
    pub secret_key: Option<SecretKey>,
    /// Where events may be sent. `WEBHOOK_ALLOW_HTTP`, false; `WEBHOOK_ALLOWED_SUBNETS`, none.
    pub webhook_guard: Guard,
    /// The proxies whose `X-Forwarded-For` is believed: addresses and networks. `TRUSTED_PROXIES`, none by default.
    pub proxies: Proxies,
    /// How often a key may ask that has no limits of its own. `RATE_LIMIT_REQUESTS`, 30 submissions in
    /// `RATE_LIMIT_WINDOW`, 60 seconds; `RATE_LIMIT_READ_REQUESTS`, 6,000 other requests a minute.
    pub rates: Rates,
    /// Whether everybody who can connect may ask when there's no key. `ALLOW_ANONYMOUS`, false; without it only
    /// programs on this machine may.
    pub allow_anonymous: bool,
    /// The web pages that may call. `CORS_ORIGINS`, `*`.
    pub cors: Cors,
    /// Where the workers keep the workspaces. `DATA_DIR`, default `./data`.
    pub data_dir: PathBuf,
    /// Whether the API describes itself, at `/openapi.json` and `/docs`. `ENABLE_DOCS`, true.
    pub enable_docs: bool,
    /// What stands before the code in a problem's `type`. `PROBLEM_TYPE_BASE`, `urn:problem:`.
    pub problem_type_base: String,
    /// How long a request may ask to wait. `WAIT_MAX_SECONDS`, 50, at most 300.
    pub wait_max: Duration,
    /// How long a client may take to send the head of a request. `API_HEAD_SECONDS`, 10.
    pub head_timeout: Duration,
    /// How long a client may take to send the body of a request. `API_BODY_SECONDS`, 30.
    pub body_timeout: Duration,
    /// How long an event stream stays open. `STREAM_MAX_SECONDS`, 3600.
    pub stream_max: Duration,
    /// How many attempts a job gets that doesn't say. `JOB_MAX_ATTEMPTS`, 3, at most 5.
    pub job_max_attempts: i64,
    /// The longest attempt that a job may ask for, in seconds. `JOB_TIMEOUT_MAX_SECONDS`, 86400.
    pub job_timeout_max_seconds: i64,
    /// What an attempt of a chat may take at most, in seconds. `CLAUDE_TIMEOUT_SECONDS`, 300; the workers have the same.
    pub chat_timeout_seconds: i64,
    /// Settings by name, for sessions and jobs. `TEMPLATES_FILE`, those that the program brings along.
    pub templates_file: Option<PathBuf>,
    /// What all attempts of a job together may cost at most. `CLAUDE_MAX_COST_PER_REQUEST`, 5.0 dollars.
    pub max_cost_per_request: MicroUsd,
    /// What a key may spend in all, unless it has a budget of its own. `CLAUDE_MAX_COST_PER_USER`, 50.0 dollars.
    pub max_cost_per_user: MicroUsd,
    /// How many jobs of one key run at once. `KEY_MAX_RUNNING_JOBS`, 16.
    pub key_max_running_jobs: i64,
    /// The folder in which a session may be given one to work in. `APPROVED_DIRECTORY`, none.
    pub approved_directory: Option<PathBuf>,
    /// A session that is created again goes on with its conversation if it was used within this time.
    /// `SESSION_TIMEOUT_HOURS`, 24.
    pub session_timeout: Duration,
    /// How many sessions a key may have: for another one the least recently used is deleted. `MAX_SESSIONS_PER_USER`, 10.
    pub max_sessions_per_user: i64,
    /// How long an idempotency key is remembered. `IDEMPOTENCY_TTL_HOURS`, 24.
    pub idempotency_ttl: Duration,
    /// How long the data of an ended job is kept: shown as `expires_at`; the workers remove it.
    /// `JOB_RETENTION_DAYS`, 30.
    pub retention: Duration,
    /// How long open requests get at shutdown. `DRAIN_SECONDS`, 30.
    pub drain: Duration,
    /// What short names of models stand for: those of `PRICES_FILE`, which the workers count with.
    pub aliases: Aliases,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 8000)),
            keys: Keys::default(),
            secret_key: None,
            webhook_guard: Guard::default(),
            proxies: Proxies::default(),
            rates: Rates::default(),
            allow_anonymous: false,
            cors: Cors::any(),
            data_dir: PathBuf::from("./data"),
            enable_docs: true,
            problem_type_base: "urn:problem:".to_owned(),
            wait_max: Duration::from_secs(50),
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            stream_max: Duration::from_hours(1),
            job_max_attempts: 3,
            job_timeout_max_seconds: 86_400,
            chat_timeout_seconds: 300,
            templates_file: None,
            max_cost_per_request: MicroUsd(5_000_000),
            max_cost_per_user: MicroUsd(50_000_000),
            key_max_running_jobs: 16,
            approved_directory: None,
            session_timeout: Duration::from_hours(24),
            max_sessions_per_user: 10,
            idempotency_ttl: Duration::from_hours(24),
            retention: Duration::from_hours(30 * 24),
            drain: Duration::from_secs(30),
            aliases: Aliases::default(),
        }
    }
}

impl Config {
    /// Reads the settings. The error names the variable, what is wrong with it, and the accepted form.
    pub fn from_vars(vars: &Vars) -> Result<Self, Error> {
        let default = Self::default();
        check_api_key(vars)?;
        Ok(Self {
            address: address(vars, default.address)?,
            keys: Keys::of(&keys(vars, "API_KEYS")?, &keys(vars, "ADMIN_API_KEYS")?),
            secret_key: SecretKey::from_vars(vars)?,
            webhook_guard: Guard::from_vars(vars)?,
            proxies: proxies(vars)?,
            rates: rates(vars)?,
            allow_anonymous: vars.flag("ALLOW_ANONYMOUS", default.allow_anonymous)?,
            cors: cors(vars)?,
            data_dir: vars.resolve("DATA_DIR", vars.or("DATA_DIR", "./data")?.into()),
            enable_docs: vars.flag("ENABLE_DOCS", default.enable_docs)?,
            problem_type_base: vars.or("PROBLEM_TYPE_BASE", &default.problem_type_base)?,
            wait_max: seconds(vars, "WAIT_MAX_SECONDS", default.wait_max, 0, 300)?,
            head_timeout: seconds(vars, "API_HEAD_SECONDS", default.head_timeout, 1, 300)?,
            body_timeout: seconds(vars, "API_BODY_SECONDS", default.body_timeout, 1, 3_600)?,
            stream_max: seconds(vars, "STREAM_MAX_SECONDS", default.stream_max, 1, 86_400)?,
            job_max_attempts: vars.number("JOB_MAX_ATTEMPTS", default.job_max_attempts, 1, 5)?,
            job_timeout_max_seconds: vars.number(
                "JOB_TIMEOUT_MAX_SECONDS",
                default.job_timeout_max_seconds,
                1,
                86_400,
            )?,
            chat_timeout_seconds: vars.number(
                "CLAUDE_TIMEOUT_SECONDS",
                default.chat_timeout_seconds,
                1,
                86_400,
            )?,
            templates_file: vars.path("TEMPLATES_FILE")?,
            max_cost_per_request: dollars(vars, "CLAUDE_MAX_COST_PER_REQUEST", default.max_cost_per_request)?,
            max_cost_per_user: dollars(vars, "CLAUDE_MAX_COST_PER_USER", default.max_cost_per_user)?,
            key_max_running_jobs: vars.number(
                "KEY_MAX_RUNNING_JOBS",
                default.key_max_running_jobs,
                1,
                1_000,
            )?,
            approved_directory: approved::from_vars(vars)?,
            session_timeout: Duration::from_hours(vars.number("SESSION_TIMEOUT_HOURS", 24, 1, 876_000)?),
            max_sessions_per_user: vars.number(
                "MAX_SESSIONS_PER_USER",
                default.max_sessions_per_user,
                1,
                100_000,
            )?,
            idempotency_ttl: vars.idempotency_ttl()?,
            retention: vars.retention()?,
            drain: vars.drain()?,
            aliases: Aliases::from_vars(vars)?,
        })
    }

    /// To whom the service is exposed when there is no key.
    pub fn exposure(&self) -> Exposure<'_> {
        Exposure {
            allow_anonymous: self.allow_anonymous,
            loopback: self.address.ip().is_loopback(),
            cors: &self.cors,
        }
    }

    /// Refuses to serve strangers by accident. `stored`: the database holds keys.
    pub fn check_exposure(&self, stored: bool) -> Result<(), Error> {
        if stored || !self.keys.is_empty() || self.allow_anonymous || self.address.ip().is_loopback() {
            return Ok(());
        }
        Err(Error::new(
            "API_KEYS",
            "is empty, and API_HOST isn't a loopback address",
            "at least one key, or API_HOST=127.0.0.1, or ALLOW_ANONYMOUS=true to serve everybody who can connect",
        ))
    }
}

fn address(vars: &Vars, default: SocketAddr) -> Result<SocketAddr, Error> {
    let host = vars.or("API_HOST", &default.ip().to_string())?;
    let host = match host.as_str() {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        other => other.trim_matches(['[', ']']).parse().map_err(|_| {
            Error::new(
                "API_HOST",
                "isn't an address",
                "an IP address such as 127.0.0.1 or 0.0.0.0",
            )
        })?,
    };
    let port = vars.number("API_PORT", default.port(), 0, u16::MAX)?;
    Ok(SocketAddr::new(host, port))
}

/// Who sets the wrong one of two names would serve without a key.
fn check_api_key(vars: &Vars) -> Result<(), Error> {
    let set = |name| vars.unlisted(name).is_some_and(|value| !value.trim().is_empty());
    if !set("API_KEY") || set("API_KEYS") {
        return Ok(());
    }
    Err(Error::new(
        "API_KEYS",
        "isn't set, but API_KEY is, which has no effect",
        "the keys in API_KEYS, with commas between them",
    ))
}

fn keys(vars: &Vars, name: &'static str) -> Result<Vec<String>, Error> {
    let keys = vars.list(name, "")?;
    if keys
        .iter()
        .any(|key| !key.bytes().all(|byte| byte.is_ascii_graphic()) || key.len() > 512)
    {
        return Err(Error::new(
            name,
            "has a key that no header can carry",
            "keys of 1 to 512 visible ASCII characters, with commas between them",
        ));
    }
    Ok(keys)
}

fn proxies(vars: &Vars) -> Result<Proxies, Error> {
    Proxies::of(&vars.list("TRUSTED_PROXIES", "")?).ok_or_else(|| {
        Error::new(
            "TRUSTED_PROXIES",
            "has a member that is neither an address nor a network",
            "such as 10.0.0.7 or 10.0.0.0/8, with commas between them",
        )
    })
}

fn rates(vars: &Vars) -> Result<Rates, Error> {
    let window = vars.number("RATE_LIMIT_WINDOW", 60, 1, 86_400)?;
    Ok(Rates {
        submit: Rate::new(vars.number("RATE_LIMIT_REQUESTS", 30, 1, 1_000_000)?, window),
        read: Rate::new(vars.number("RATE_LIMIT_READ_REQUESTS", 6_000, 1, 1_000_000)?, 60),
    })
}

fn cors(vars: &Vars) -> Result<Cors, Error> {
    let origins = vars.list("CORS_ORIGINS", "*")?;
    Cors::of(&origins).ok_or_else(|| {
        Error::new(
            "CORS_ORIGINS",
            "has a member that isn't an origin",
            "* or origins such as https://app.example.com, with commas between them",
        )
    })
}

fn seconds(
    vars: &Vars,
    name: &'static str,
    default: Duration,
    low: u64,
    high: u64,
) -> Result<Duration, Error> {
    Ok(Duration::from_secs(vars.number(
        name,
        default.as_secs(),
        low,
        high,
    )?))
}

fn dollars(vars: &Vars, name: &'static str, default: MicroUsd) -> Result<MicroUsd, Error> {
    let number = vars.number(name, default.usd(), 0.01, 1_000_000.0)?;
    MicroUsd::exact(number).ok_or_else(|| {
        Error::new(
            name,
            "isn't an amount of money",
            "US dollars with at most six decimals, such as 5.0",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_variables_give_the_defaults() {
        let config = Config::from_vars(&Vars::of([])).unwrap();
        assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn without_a_key_only_this_machine_is_served_unless_asked_for() {
        let check = |vars: Vars, stored| Config::from_vars(&vars).unwrap().check_exposure(stored);
        let refused = check(Vars::of([("API_HOST", "0.0.0.0")]), false).unwrap_err();
        assert_eq!(refused.variable, "API_KEYS");
        assert!(check(Vars::of([("API_HOST", "0.0.0.0")]), true).is_ok());
        assert!(check(Vars::of([("API_HOST", "::1")]), false).is_ok());
        for (name, value) in [
            ("API_KEYS", "k"),
            ("ADMIN_API_KEYS", "k"),
            ("ALLOW_ANONYMOUS", "true"),
        ] {
            assert!(check(Vars::of([("API_HOST", "0.0.0.0"), (name, value)]), false).is_ok());
        }
    }

    #[test]
    fn a_key_in_the_wrong_variable_stops_the_start() {
        let error = Config::from_vars(&Vars::of([("API_KEY", "secret")])).unwrap_err();
        assert_eq!(error.variable, "API_KEYS");
        assert!(!error.to_string().contains("secret"), "{error}");
        assert!(Config::from_vars(&Vars::of([("API_KEY", "secret"), ("API_KEYS", "k")])).is_ok());
    }

    #[test]
    fn a_bad_value_names_its_variable_and_hides_secrets() {
        for (name, value) in [
            ("API_HOST", "example.com"),
            ("API_PORT", "65536"),
            ("API_KEYS", "good,bäd"),
            ("ADMIN_API_KEYS", "a b"),
            ("SECRET_KEY", "bad,"),
            ("TRUSTED_PROXIES", "10.0.0.0/8, nonsense"),
            ("RATE_LIMIT_REQUESTS", "0"),
            ("RATE_LIMIT_WINDOW", "-60"),
            ("RATE_LIMIT_READ_REQUESTS", "many"),
            ("ALLOW_ANONYMOUS", "perhaps"),
            ("CORS_ORIGINS", "https://a.example/path"),
            ("WAIT_MAX_SECONDS", "301"),
            ("STREAM_MAX_SECONDS", "0"),
            ("JOB_MAX_ATTEMPTS", "6"),
            ("JOB_TIMEOUT_MAX_SECONDS", "x"),
            ("CLAUDE_MAX_COST_PER_REQUEST", "-1"),
            ("CLAUDE_MAX_COST_PER_REQUEST", "NaN"),
            ("CLAUDE_MAX_COST_PER_REQUEST", "1.0000001"),
            ("KEY_MAX_RUNNING_JOBS", "0"),
            ("IDEMPOTENCY_TTL_HOURS", "0"),
            ("DRAIN_SECONDS", "-1"),
        ] {
            let error = Config::from_vars(&Vars::of([(name, value)])).unwrap_err();
            assert_eq!(error.variable, name, "{value}");
            assert!(
                !name.ends_with("KEYS") || !error.to_string().contains("d,"),
                "{error}"
            );
        }
    }
}
