//! `up`: runs the service, API and worker in one process.

use std::io::{IsTerminal, stdout};
use std::path::PathBuf;

use shared::env::Vars;
use shared::shutdown::Shutdown;
use shared::storage::DatabaseUrl;
use shared::telemetry;

use crate::failure::Failure;
use crate::output;
use crate::service::Service;

pub(crate) async fn run(vars: &Vars) -> Result<(), Failure> {
    telemetry::start(vars)?;
    let shutdown =
        Shutdown::on_signals().map_err(|error| Failure::Other(format!("no signal handler: {error}")))?;
    let service = Service::start(vars, shutdown).await?;
    let url = format!("http://{}", service.address());
    output::progress(format_args!("listening on {url}"));
    let stored = service.store().has_api_keys().await?;
    output::progress(welcome(vars, &url, stored, stdout().is_terminal())?);
    service.ended().await
}

/// The text that a new user needs. The key is shown only if `to_a_person`, because a file or a supervisor's journal
/// would keep it.
/// `stored`: there are keys in the database.
fn welcome(vars: &Vars, url: &str, stored: bool, to_a_person: bool) -> Result<String, Failure> {
    let first = |name| Ok::<_, Failure>(vars.list(name, "")?.into_iter().next());
    let (key, admin) = (first("API_KEYS")?, first("ADMIN_API_KEYS")?);
    let with_key = "-H \"X-API-Key: $KEY\" ".to_owned();
    let (key_line, header) = match (&key, admin) {
        (Some(key), _) if to_a_person => (key.as_str(), format!("-H 'X-API-Key: {key}' ")),
        (Some(_), _) => ("the first of API_KEYS, in .env or the environment", with_key),
        (None, Some(_)) => (
            "the first of ADMIN_API_KEYS, in .env or the environment",
            with_key,
        ),
        (None, None) if stored => (
            "one of the database's; `claude-queue keys list` shows them, `keys create` makes one",
            with_key,
        ),
        (None, None) => ("none is needed on this machine; API_KEYS sets one", String::new()),
    };
    let database = match DatabaseUrl::from_vars(vars)? {
        DatabaseUrl::Sqlite(file) => file,
        DatabaseUrl::Postgres(_) => PathBuf::from("PostgreSQL"),
    };
    let database = database.display();
    Ok(format!(
        "
  URL       {url}
  key       {key_line}
  database  {database}

Submit a job and wait for its result:

  curl -s {header}-H 'Prefer: wait=50' \\
    -H 'Content-Type: application/json' -d '{{\"message\": \"Write a haiku about queues.\"}}' {url}/api/v1/jobs

Stop with Ctrl-C. Running jobs get DRAIN_SECONDS to finish; the others continue at the next start.
"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curl_has_the_key_only_where_there_is_one() {
        let url = "http://127.0.0.1:8000";

        let keys = Vars::of([("API_KEYS", "cq_1,cq_2")]);
        let with_key = welcome(&keys, url, false, true).unwrap();
        let kept = welcome(&keys, url, false, false).unwrap();
        let without = welcome(&Vars::of([]), url, false, true).unwrap();
        let stored = welcome(&Vars::of([]), url, true, true).unwrap();
        let admin = welcome(&Vars::of([("ADMIN_API_KEYS", "cq_3")]), url, false, true).unwrap();

        assert!(
            with_key.contains("-H 'X-API-Key: cq_1' ") && !with_key.contains("cq_2"),
            "{with_key}"
        );
        assert!(!kept.contains("cq_") && kept.contains("API_KEYS"), "{kept}");
        assert!(!without.contains("X-API-Key"), "{without}");
        for needed in [stored, admin] {
            assert!(
                needed.contains("X-API-Key: $KEY") && !needed.contains("none is needed"),
                "{needed}"
            );
        }
    }
}
