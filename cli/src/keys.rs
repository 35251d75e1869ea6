//! `keys`: creates, lists, rotates and revokes keys in the database itself, since the first administrator's key can't be
//! created over HTTP. Running services notice within seconds.

use std::fmt::Write as _;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use shared::clock;
use shared::env::{Error, Vars};
use shared::id::KeyId;
use shared::key::{
    ApiKey, Digest, KeyKind, KeyRights, KeyStatus, Kid, NewApiKey, Scope, Scopes, Secret, SecretKey,
};
use shared::storage::{AuditEntry, DatabaseUrl, KeyFilter, NewSecret, Store};

use crate::failure::Failure;
use crate::{output, show};

/// A page of keys.
const PAGE: i64 = 200;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a key and print its secret, which is shown only once
    Create(Create),
    /// List all keys, the newest first
    List,
    /// Issue a new secret and print it; the old one stays valid for a grace period
    Rotate(Rotate),
    /// Revoke a key; it stops working within seconds
    Revoke(Revoke),
}

#[derive(Debug, Args)]
struct Create {
    /// What the key is for
    #[arg(long, default_value = "created by claude-queue keys")]
    name: String,
    /// Grant every scope, including everybody's jobs
    #[arg(long, conflicts_with = "scope")]
    admin: bool,
    /// A scope, such as jobs:read; may be repeated. Without one it is an ordinary key
    #[arg(long)]
    scope: Vec<String>,
    /// Days until it expires; it doesn't expire by default
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=36_500))]
    expires_in_days: Option<u64>,
}

#[derive(Debug, Args)]
struct Rotate {
    /// The key, by its id as `keys list` shows it
    id: String,
    /// Seconds for which the old secret stays valid
    #[arg(long, default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(0..=604_800))]
    grace_seconds: u64,
}

#[derive(Debug, Args)]
struct Revoke {
    /// The key, by its id as `keys list` shows it
    id: String,
    /// Why, for the record
    #[arg(long)]
    reason: Option<String>,
    /// Cancel the key's jobs too
    #[arg(long)]
    cancel_jobs: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let url = DatabaseUrl::from_vars(vars)?;
    if !matches!(arguments.command, Command::Create(_)) {
        must_exist(&url)?;
    }
    let keys = Keys::open(vars, &url).await?;
    let done = match arguments.command {
        Command::Create(request) => keys.create(request).await,
        Command::List => keys.list().await,
        Command::Rotate(request) => keys.rotate(request).await,
        Command::Revoke(request) => keys.revoke(request).await,
    };
    keys.store.close().await;
    done
}

struct Keys {
    store: Store,
    config: api::Config,
}

impl Keys {
    async fn open(vars: &Vars, url: &DatabaseUrl) -> Result<Self, Failure> {
        let config = api::Config::from_vars(vars)?;
        let store = Store::open(url, 1).await?;
        Ok(Self { store, config })
    }

    async fn create(&self, request: Create) -> Result<(), Failure> {
        let mut rights = KeyRights::of(Scopes::ordinary());
        if request.admin {
            rights.scopes = Scopes::all();
        } else if !request.scope.is_empty() {
            rights.scopes = scopes(&request.scope)?;
        }
        shared::key::name(&request.name).map_err(|why| Failure::Other(format!("--name: {why}")))?;
        let kid = Kid::generate().map_err(|error| Failure::because(&error))?;
        let (secret, secret_digest) = self
            .secret(KeyKind::of(rights.scopes.contains(Scope::KeysAdmin)), &kid)
            .await?;
        let now = clock::now();
        let lifetime = request
            .expires_in_days
            .map(|days| Duration::from_hours(24 * days));
        let key = NewApiKey {
            key_id: kid.key_id(),
            name: request.name,
            secret_digest,
            last4: secret.last4().to_owned(),
            rights,
            metadata: "{}".to_owned(),
            expires_at: lifetime.map(|lifetime| now.plus(lifetime)),
            created_at: now,
            created_by: "cli".to_owned(),
        };
        output::note(format_args!("The secret of {}, shown only once:", key.key_id));
        output::result(secret.expose())
            .map_err(|failure| Failure::Other(format!("no key was created: {failure}")))?;
        self.insert(&key).await.map_err(|failure| {
            Failure::Other(format!(
                "{} wasn't created, its secret is worthless: {failure}",
                key.key_id
            ))
        })?;
        output::note(format_args!("It may: {}", key.rights.scopes));
        Ok(())
    }

    /// The secret has been shown by now: nobody could use a key whose secret nobody has seen.
    async fn insert(&self, key: &NewApiKey) -> Result<(), Failure> {
        let (now, budget) = (key.created_at, self.config.max_cost_per_user);
        let mut tx = self.store.begin().await?;
        tx.insert_api_key(key, self.config.key_max_running_jobs).await?;
        tx.put_default_budget(&key.key_id, budget, now).await?;
        let detail = json!({"name": key.name, "scopes": key.rights.scopes.to_string()});
        tx.audit(&entry("key.create", &key.key_id, detail)).await?;
        tx.commit().await?;
        Ok(())
    }

    async fn list(&self) -> Result<(), Failure> {
        let mut filter = KeyFilter::default();
        loop {
            let now = clock::now();
            let keys = self.store.api_keys(&filter, PAGE, now).await?;
            for key in &keys {
                let status = key.status(now).as_str();
                let name = show::short(&key.name);
                output::result(format_args!(
                    "{}  {status:<8} {}  {name}",
                    key.key_id,
                    key.shown()
                ))?;
            }
            match keys.last() {
                Some(last) => filter.before = Some(last.key_number),
                None => return Ok(()),
            }
        }
    }

    async fn rotate(&self, request: Rotate) -> Result<(), Failure> {
        let (kid, key) = self.find(&request.id).await?;
        if key.status(clock::now()) != KeyStatus::Active {
            return Err(Failure::Other(format!(
                "{} was revoked or has expired",
                key.key_id
            )));
        }
        let (secret, digest) = self.secret(KeyKind::of(key.is_admin()), &kid).await?;
        let grace = Duration::from_secs(request.grace_seconds);
        let fresh = NewSecret::new((&secret, digest), grace, clock::now());
        output::note(format_args!("The new secret of {}, shown only once:", key.key_id));
        output::result(secret.expose())
            .map_err(|failure| Failure::Other(format!("{} keeps its old secret: {failure}", key.key_id)))?;
        self.replace(&key, &fresh, request.grace_seconds)
            .await
            .map_err(|failure| {
                Failure::Other(format!(
                    "{} keeps its old secret, the new one is worthless: {failure}",
                    key.key_id
                ))
            })?;
        output::note(format_args!(
            "The old secret stays valid for {} seconds.",
            request.grace_seconds
        ));
        Ok(())
    }

    /// As [`Keys::insert`]: the new secret has been shown.
    async fn replace(&self, key: &ApiKey, fresh: &NewSecret, grace_seconds: u64) -> Result<(), Failure> {
        let mut tx = self.store.begin().await?;
        let rotated = tx.rotate_api_key(&key.key_id, key.version, fresh).await?;
        if rotated.is_none() {
            return Err(Failure::Other(format!(
                "{} was changed meanwhile; try again",
                key.key_id
            )));
        }
        let detail = json!({ "grace_seconds": grace_seconds });
        tx.audit(&entry("key.rotate", &key.key_id, detail)).await?;
        tx.commit().await?;
        Ok(())
    }

    async fn revoke(&self, request: Revoke) -> Result<(), Failure> {
        let (_, key) = self.find(&request.id).await?;
        if request
            .reason
            .as_ref()
            .is_some_and(|reason| reason.chars().count() > 200)
        {
            return Err(Failure::Other("--reason takes at most 200 characters".to_owned()));
        }
        let mut tx = self.store.begin().await?;
        let revoked = tx
            .revoke_api_key(&key.key_id, request.reason.as_deref(), clock::now())
            .await?;
        // One that was revoked before stays as it was, and isn't a change.
        if revoked.is_some_and(|revoked| revoked.version != key.version) || request.cancel_jobs {
            let detail = json!({"reason": request.reason, "cancel_jobs": request.cancel_jobs});
            tx.audit(&entry("key.revoke", &key.key_id, detail)).await?;
        }
        tx.commit().await?;
        let mut done = format!("{} is revoked", key.key_id);
        if request.cancel_jobs {
            let cancelled = self.store.cancel_jobs_of(&key.key_id).await?;
            let _ = write!(done, "\n{cancelled} jobs are cancelled or told to end");
        }
        output::result(done)
    }

    async fn find(&self, id: &str) -> Result<(Kid, ApiKey), Failure> {
        let unknown = || {
            Failure::Other(format!(
                "there is no key {id} in the database; `keys list` shows them"
            ))
        };
        let kid = Kid::of(id).ok_or_else(unknown)?;
        let key = self.store.api_key(&kid.key_id()).await?.ok_or_else(unknown)?;
        Ok((kid, key))
    }

    /// A new secret and its digest, made with the `SECRET_KEY` that this database knows.
    async fn secret(&self, kind: KeyKind, kid: &Kid) -> Result<(Secret, Digest), Failure> {
        let refused = |problem: &str, accepted: &str| Error::new("SECRET_KEY", problem, accepted);
        let secret_key: &SecretKey = self.config.secret_key.as_ref().ok_or_else(|| {
            refused(
                "is empty",
                "the value that the services are started with; a new one can be made by `openssl rand -hex 32`",
            )
        })?;
        if !self.store.bind_secret(secret_key.check()).await? {
            return Err(refused(
                "isn't the one that this database was set up with",
                "the value that it had then",
            )
            .into());
        }
        secret_key
            .issue(kind, kid)
            .map_err(|error| Failure::because(&error))
    }
}

/// Only what makes a key may make a database.
fn must_exist(url: &DatabaseUrl) -> Result<(), Failure> {
    match url {
        DatabaseUrl::Sqlite(file) if !file.exists() => Err(Failure::Other(format!(
            "there is no database {} (DATABASE_URL); `claude-queue up` and `migrate` create it",
            file.display()
        ))),
        _ => Ok(()),
    }
}

fn scopes(words: &[String]) -> Result<Scopes, Failure> {
    words
        .iter()
        .map(|word| {
            word.parse::<Scope>().map_err(|_| {
                Failure::Other(format!(
                    "--scope {word} isn't a scope; these are: {}",
                    Scope::WORDS.join(" ")
                ))
            })
        })
        .collect()
}

fn entry(action: &'static str, key_id: &KeyId, detail: Value) -> AuditEntry {
    AuditEntry {
        at: clock::now(),
        actor: "cli".to_owned(),
        action,
        object_id: key_id.to_string(),
        address: String::new(),
        request_id: String::new(),
        detail,
    }
}
