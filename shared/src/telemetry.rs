//! Logging to stderr, as text or JSON.

use crate::env::{Error, Vars};
use tracing_subscriber::EnvFilter;

/// Starts logging as set by `LOG_LEVEL` and `LOG_FORMAT`. Call it once, first.
pub fn start(vars: &Vars) -> Result<(), Error> {
    let level = vars.or("LOG_LEVEL", "info")?;
    // The words of the Python service, and any filter of the tracing crate.
    let parts: Vec<String> = level
        .to_lowercase()
        .split(',')
        .map(|part| match part.trim() {
            "warning" => "warn".to_owned(),
            "critical" => "error".to_owned(),
            other => other.to_owned(),
        })
        .collect();
    let unknown = || {
        Error::new(
            "LOG_LEVEL",
            "isn't a level",
            "off, error, warn, info, debug, trace, or a filter such as info,worker=debug",
        )
    };
    // The library takes an unknown level for the name of a crate, and would then log nothing else.
    if !parts.iter().all(|part| is_directive(part)) {
        return Err(unknown());
    }
    // Errors of the connection pools and the queue library are logged once, by the code that handles them.
    let quiet = "sqlx=warn,sqlx::pool=error,sqlx_core::pool=error,sqlx::postgres::notice=error,\
                 apalis=off,apalis_core=off,apalis_postgres=off,apalis_sqlite=off,hyper=warn,reqwest=warn";
    let quiet = format!("{},{quiet}", parts.join(","));
    let filter = EnvFilter::try_new(quiet).map_err(|_| unknown())?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Nobody may read standard error any more; a log line that is lost must not end a service.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let format = vars.choice("LOG_FORMAT", "text", &["text", "json"])?;
    // A second start, as in tests, keeps the first logger.
    let _ = match format.as_str() {
        "json" => builder.json().flatten_event(true).try_init(),
        _ => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init(),
    };
    Ok(())
}

/// A level, or a level for one crate.
fn is_directive(text: &str) -> bool {
    ["", "off", "error", "warn", "info", "debug", "trace"].contains(&text) || text.contains(['=', '['])
}

/// An error with all its causes, as one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some errors repeat the text of their source.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
