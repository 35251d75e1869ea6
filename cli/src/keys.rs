//! `keys`: makes, lists, rotates and revokes keys, in the database itself: the first administrator's key has nobody to
//! ask. Running services notice within seconds.

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

/// A page of keys.
const PAGE: i64 = 200;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a key and print its secret, which is shown this once
    Create(Create),
    /// List all keys, the newest first
    List,
    /// Give a key another secret and print it; the present one opens for a while longer
    Rotate(Rotate),
    /// Take a key back: within seconds it opens nothing
    Revoke(Revoke),
}

#[derive(Debug, Args)]
struct Create {
    /// What the key is for
    #[arg(long, default_value = "made by claude-queue keys create")]
    name: String,
    /// May do everything and see everybody's jobs
    #[arg(long, conflicts_with = "scope")]
    admin: bool,
    /// What it may do, such as jobs:read; may be repeated. Without any it is an ordinary key
    #[arg(long)]
    scope: Vec<String>,
    /// In how many days it ends; never, unless told
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=36_500))]
    expires_in_days: Option<u64>,
}

#[derive(Debug, Args)]
struct Rotate {
    /// The key, by its id as `keys list` shows it
    id: String,
    /// For how many seconds the present secret opens too
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
    let keys = Keys::open(vars).await?;
    let done = match arguments.command {
        Command::Create(wish) => keys.create(wish).await,
        Command::List => keys.list().await,
        Command::Rotate(wish) => keys.rotate(wish).await,
        Command::Revoke(wish) => keys.revoke(wish).await,
    };
    keys.store.close().await;
    done
}

struct Keys {
    store: Store,
    config: api::Config,
}

impl Keys {
    async fn open(vars: &Vars) -> Result<Self, Failure> {
        let config = api::Config::from_vars(vars)?;
        let store = Store::open(&DatabaseUrl::from_vars(vars)?, 1).await?;
        Ok(Self { store, config })
    }

    async fn create(&self, wish: Create) -> Result<(), Failure> {
        let mut rights = KeyRights::of(Scopes::ordinary());
        if wish.admin {
            rights.scopes = Scopes::all();
        } else if !wish.scope.is_empty() {
            rights.scopes = scopes(&wish.scope)?;
        }
        shared::key::name(&wish.name).map_err(|why| Failure::Other(format!("--name: {why}")))?;
        let kid = Kid::generate().map_err(|error| Failure::because(&error))?;
        let (secret, secret_digest) = self
            .secret(KeyKind::of(rights.scopes.contains(Scope::KeysAdmin)), &kid)
            .await?;
        let now = clock::now();
        let lifetime = wish.expires_in_days.map(|days| Duration::from_hours(24 * days));
        let key = NewApiKey {
            key_id: kid.key_id(),
            name: wish.name,
            secret_digest,
            last4: secret.last4().to_owned(),
            rights,
            metadata: "{}".to_owned(),
            expires_at: lifetime.map(|lifetime| now.plus(lifetime)),
            created_at: now,
            created_by: "cli".to_owned(),
        };
        let budget = self.config.max_cost_per_user;
        let mut tx = self.store.begin().await?;
        tx.insert_api_key(&key, self.config.key_max_running_jobs).await?;
        tx.put_default_budget(&key.key_id, budget, now).await?;
        let detail = json!({"name": key.name, "scopes": key.rights.scopes.to_string()});
        tx.audit(&entry("key.create", &key.key_id, detail)).await?;
        tx.commit().await?;
        eprintln!(
            "{} may: {}\nIts secret is shown this once:",
            key.key_id, key.rights.scopes
        );
        println!("{}", secret.expose());
        Ok(())
    }

    async fn list(&self) -> Result<(), Failure> {
        let mut filter = KeyFilter::default();
        loop {
            let now = clock::now();
            let keys = self.store.api_keys(&filter, PAGE, now).await?;
            for key in &keys {
                let status = key.status(now).as_str();
                let shown = crate::show::printable(&key.name);
                println!("{}  {status:<8} {}  {shown}", key.key_id, key.shown());
            }
            match keys.last() {
                Some(last) => filter.before = Some(last.key_number),
                None => return Ok(()),
            }
        }
    }

    async fn rotate(&self, wish: Rotate) -> Result<(), Failure> {
        let (kid, key) = self.find(&wish.id).await?;
        if key.status(clock::now()) != KeyStatus::Active {
            return Err(Failure::Other(format!(
                "{} was revoked or has expired",
                key.key_id
            )));
        }
        let (secret, digest) = self.secret(KeyKind::of(key.is_admin()), &kid).await?;
        let grace = Duration::from_secs(wish.grace_seconds);
        let fresh = NewSecret::new((&secret, digest), grace, clock::now());
        let mut tx = self.store.begin().await?;
        let rotated = tx.rotate_api_key(&key.key_id, key.version, &fresh).await?;
        if rotated.is_none() {
            return Err(Failure::Other(format!(
                "{} was changed meanwhile; try again",
                key.key_id
            )));
        }
        let detail = json!({"grace_seconds": wish.grace_seconds});
        tx.audit(&entry("key.rotate", &key.key_id, detail)).await?;
        tx.commit().await?;
        eprintln!(
            "The former secret of {} opens for {} seconds more.\nThe new one is shown this once:",
            key.key_id, wish.grace_seconds
        );
        println!("{}", secret.expose());
        Ok(())
    }

    async fn revoke(&self, wish: Revoke) -> Result<(), Failure> {
        let (_, key) = self.find(&wish.id).await?;
        if wish
            .reason
            .as_ref()
            .is_some_and(|reason| reason.chars().count() > 200)
        {
            return Err(Failure::Other("--reason takes at most 200 characters".to_owned()));
        }
        let mut tx = self.store.begin().await?;
        let revoked = tx
            .revoke_api_key(&key.key_id, wish.reason.as_deref(), clock::now())
            .await?;
        // One that was revoked before stays as it was, and isn't a change.
        if revoked.is_some_and(|revoked| revoked.version != key.version) || wish.cancel_jobs {
            let detail = json!({"reason": wish.reason, "cancel_jobs": wish.cancel_jobs});
            tx.audit(&entry("key.revoke", &key.key_id, detail)).await?;
        }
        tx.commit().await?;
        println!("{} is revoked", key.key_id);
        if wish.cancel_jobs {
            let cancelled = self.store.cancel_jobs_of(&key.key_id).await?;
            println!("{cancelled} jobs are cancelled or told to end");
        }
        Ok(())
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
