//! Standard output and standard error. Somebody else holds their other ends: either may be closed or full, and what is
//! printed may come from a model. So every line is made printable, and no failure to print panics or ends a service.

use std::fmt::Display;
use std::io::{self, Write};

use serde_json::Value;
use shared::text::{printable, printable_json};

use crate::failure::Failure;

/// Prints what the command was asked for, and flushes it.
pub(crate) fn result(text: impl Display) -> Result<(), Failure> {
    write(io::stdout(), &printable(&text.to_string())).map_err(Failure::Output)
}

/// The same as JSON, indented.
pub(crate) fn json(value: &Value) -> Result<(), Failure> {
    json_text(&format!("{value:#}"))
}

/// The same as one line.
pub(crate) fn json_line(value: &Value) -> Result<(), Failure> {
    json_text(&value.to_string())
}

/// Prints what a service says about itself. It goes on when nobody reads that.
pub(crate) fn progress(text: impl Display) {
    let _ = write(io::stdout(), &printable(&text.to_string()));
}

/// Prints what doesn't belong to the result, on standard error.
pub(crate) fn note(text: impl Display) {
    let _ = write(io::stderr(), &printable(&text.to_string()));
}

fn json_text(text: &str) -> Result<(), Failure> {
    write(io::stdout(), &printable_json(text)).map_err(Failure::Output)
}

fn write(mut to: impl Write, text: &str) -> io::Result<()> {
    writeln!(to, "{text}")?;
    to.flush()
}
