//! `usage`: prints what the key has spent and may spend, or sums of its ledger.

use serde_json::Value;
use shared::env::Vars;

use crate::client::Client;
use crate::failure::Failure;
use crate::{output, show};

/// Maximum number of pages, which is 100,000 lines.
const PAGES: usize = 100;

/// What to print.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print sums of the ledger by day, key, model or session instead of a summary
    #[arg(long, value_parser = ["day", "key", "model", "session"])]
    by: Option<String>,
    /// Start time, such as 2026-05-01T00:00:00Z (default: 30 days before the end)
    #[arg(long, requires = "by")]
    from: Option<String>,
    /// End time, not included (default: now); at most 366 days after the start
    #[arg(long, requires = "by")]
    to: Option<String>,
    /// The id of another key; only for admins
    #[arg(long)]
    user: Option<String>,
    /// Print the response as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(vars: &Vars, arguments: Arguments) -> Result<(), Failure> {
    let client = Client::from_vars(vars)?;
    let mut query: Vec<(&str, String)> = Vec::new();
    query.extend(arguments.user.map(|user| ("user_id", user)));
    let Some(by) = arguments.by else {
        let usage = client.usage(&query).await?;
        if arguments.json {
            return output::json(&usage);
        }
        return output::result(summary(&usage));
    };
    query.extend(arguments.from.map(|from| ("from", from)));
    query.extend(arguments.to.map(|to| ("to", to)));
    query.push(("group_by", by.clone()));
    query.push(("limit", "1000".to_owned()));
    let mut rows = Vec::new();
    let mut cursor = None;
    for _ in 0..PAGES {
        let mut query = query.clone();
        query.extend(cursor.map(|cursor| ("cursor", cursor)));
        let mut page = client.ledger(&query).await?;
        rows.extend(
            page["data"]
                .as_array_mut()
                .map(std::mem::take)
                .unwrap_or_default(),
        );
        cursor = page["pagination"]["next_cursor"].as_str().map(str::to_owned);
        if cursor.is_none() {
            break;
        }
    }
    if arguments.json {
        return output::json(&Value::Array(rows));
    }
    output::result(table(&by, &rows))?;
    if cursor.is_some() {
        output::note("there are more lines; use a shorter span of time");
    }
    Ok(())
}

/// Formats the totals of a key.
fn summary(usage: &Value) -> String {
    let data = &usage["data"];
    let jobs = ["total", "completed", "running", "queued", "failed", "cancelled"]
        .map(|word| format!("{} {word}", data["jobs"][word].as_i64().unwrap_or(0)))
        .join(", ");
    let mut lines = vec![
        format!("key       {}", usage["user_id"].as_str().unwrap_or("?")),
        format!("spent     {}", show::money(&data["cost"])),
    ];
    let budget = &data["budget"];
    if budget.is_object() {
        let period = match budget["period"].as_str() {
            Some("total") | None => "in all".to_owned(),
            Some(period) => format!("a {period}"),
        };
        lines.push(format!(
            "budget    {} {period}: {} spent, {} reserved, {} left",
            show::money(&budget["limit_usd"]),
            show::money(&budget["spent_usd"]),
            show::money(&budget["reserved_usd"]),
            show::money(&budget["remaining_usd"]),
        ));
        if let Some(at) = budget["resets_at"].as_str() {
            lines.push(format!(
                "          resets at {}",
                at.get(..16).unwrap_or(at).replace('T', " ")
            ));
        }
    }
    lines.push(format!("jobs      {jobs}"));
    lines.push(format!(
        "sessions  {}, {} turns",
        data["sessions"].as_i64().unwrap_or(0),
        data["turns"].as_i64().unwrap_or(0)
    ));
    lines.join("\n")
}

/// Formats sums, one per line, and their total.
fn table(by: &str, rows: &[Value]) -> String {
    let column = if by == "key" { "key_id" } else { by };
    let name = |row: &Value| match row[column].as_str() {
        Some(name) => show::short(name),
        None => "(none)".to_owned(),
    };
    let width = rows
        .iter()
        .map(|row| name(row).chars().count())
        .max()
        .unwrap_or(0)
        .max(8);
    let tokens = |row: &Value, word: &str| row["usage"][word].as_i64().unwrap_or(0);
    let line = |name: &str, cost: f64, input: i64, output: i64| {
        format!("{name:<width$}  ${cost:>12.4}  {input:>12} in  {output:>12} out")
    };
    let mut lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let cost = row["cost"].as_f64().unwrap_or(0.0);
            line(&name(row), cost, read(row, &tokens), tokens(row, "output_tokens"))
        })
        .collect();
    lines.push(line(
        "in all",
        // An empty sum of floats is minus zero.
        rows.iter().filter_map(|row| row["cost"].as_f64()).sum::<f64>() + 0.0,
        rows.iter().map(|row| read(row, &tokens)).sum(),
        rows.iter().map(|row| tokens(row, "output_tokens")).sum(),
    ));
    lines.join("\n")
}

/// All input tokens, cached or not.
fn read(row: &Value, tokens: &impl Fn(&Value, &str) -> i64) -> i64 {
    [
        "input_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
    ]
    .into_iter()
    .map(|word| tokens(row, word))
    .sum()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_summary_says_what_is_left() {
        let usage = json!({
            "user_id": "env_12345678",
            "data": {
                "cost": 12.5, "sessions": 2, "turns": 31,
                "jobs": {"total": 5, "completed": 3, "running": 1, "failed": 1, "queued": 0, "cancelled": 0},
                "budget": {
                    "period": "month", "limit_usd": 50.0, "spent_usd": 10.0, "reserved_usd": 5.0,
                    "remaining_usd": 35.0, "resets_at": "2026-12-01T00:00:00.000000+00:00",
                },
            },
        });
        assert_eq!(
            summary(&usage),
            "key       env_12345678\n\
             spent     $12.5000\n\
             budget    $50.0000 a month: $10.0000 spent, $5.0000 reserved, $35.0000 left\n          \
             resets at 2026-12-01 00:00\n\
             jobs      5 total, 3 completed, 1 running, 0 queued, 1 failed, 0 cancelled\n\
             sessions  2, 31 turns"
        );
    }

    #[test]
    fn sums_stand_below_each_other_and_are_added_up() {
        let row = |model: Value, cost: f64| {
            let usage = json!({"input_tokens": 10, "output_tokens": 3, "cache_read_input_tokens": 5});
            json!({"model": model, "cost": cost, "usage": usage})
        };
        assert_eq!(
            table(
                "model",
                &[row(json!("claude-sonnet-5"), 1.25), row(Value::Null, -0.25)]
            ),
            "claude-sonnet-5  $      1.2500            15 in             3 out\n\
             (none)           $     -0.2500            15 in             3 out\n\
             in all           $      1.0000            30 in             6 out"
        );
    }
}
