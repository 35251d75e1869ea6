//! `prices`: the table of list prices that a worker with these settings uses.

use shared::clock;
use shared::env::Vars;
use worker::spend::price::Tokens;

use crate::failure::Failure;
use crate::output;

pub(crate) fn run(vars: &Vars) -> Result<(), Failure> {
    let prices = worker::config::prices(vars).map_err(|error| Failure::Other(error.to_string()))?;
    output::result(format_args!(
        "Version {}. US dollars per million tokens.\n",
        prices.version()
    ))?;
    output::result(line(
        "model",
        ["input", "output", "write 5m", "write 1h", "read"].map(str::to_owned),
    ))?;
    for row in prices.in_force(clock::now()) {
        output::result(line(&row.model, of(&row.standard)))?;
        if let Some((above, long)) = &row.long_prompt {
            output::result(line(&format!("  prompt over {above}"), of(long)))?;
        }
        if let Some(fast) = &row.fast {
            output::result(line("  fast mode", of(fast)))?;
        }
    }
    for (region, factor) in prices.regions() {
        output::result(format_args!(
            "\nRequests that have to run in {region} cost {} times as much.",
            decimal(factor)
        ))?;
    }
    let mut searches: Vec<u64> = prices.in_force(clock::now()).map(|row| row.web_search).collect();
    searches.sort_unstable();
    searches.dedup();
    let searches: Vec<String> = searches.iter().map(|price| decimal(price / 1_000_000)).collect();
    output::result(format_args!(
        "A search of the web costs ${}.",
        searches.join(" or ")
    ))?;
    for (alias, models) in prices.aliases().all() {
        output::result(format_args!("{alias} is {}.", models.join(" or ")))?;
    }
    output::result("A model that isn't listed costs as much as the dearest one.")
}

fn of(tokens: &Tokens) -> [String; 5] {
    [
        tokens.input,
        tokens.output,
        tokens.cache_write_5m,
        tokens.cache_write_1h,
        tokens.cache_read,
    ]
    .map(decimal)
}

fn line(name: &str, [input, output, write_5m, write_1h, read]: [String; 5]) -> String {
    format!("{name:<24} {input:>9} {output:>9} {write_5m:>9} {write_1h:>9} {read:>9}")
}

/// Thousandths as a decimal number: 1250 is `1.25`.
fn decimal(thousandths: u64) -> String {
    let decimals = format!("{:03}", thousandths % 1_000);
    match decimals.trim_end_matches('0') {
        "" => (thousandths / 1_000).to_string(),
        decimals => format!("{}.{decimals}", thousandths / 1_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousandths_are_shown_as_decimals() {
        for (thousandths, shown) in [
            (0, "0"),
            (10, "0.01"),
            (125, "0.125"),
            (1_250, "1.25"),
            (40_000, "40"),
        ] {
            assert_eq!(decimal(thousandths), shown);
        }
    }
}
