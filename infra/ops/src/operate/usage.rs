//! `usage`

use std::io::{BufRead, Write};

use serde_json::Value;
use shared::units::NanoUsd;

use super::Console;
use crate::api::{Api, CallError, page};
use crate::command::Usage;
use crate::show::dollars;
use crate::table::{Table, field};

const USAGE: [&str; 2] = ["admin", "usage"];
/// The columns whose values stand in the answer by these names.
const COUNTS: [&str; 9] = [
    "requests",
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "embedding_tokens",
    "unreported_tokens",
    "remaining/monthly_token_budget",
    "in_flight",
];

pub(super) async fn run<I: BufRead, O: Write, E: Write>(
    api: &Api,
    wanted: &Usage,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let query: Vec<_> = wanted.month.iter().map(|month| ("month", month.to_string())).collect();
    if wanted.csv {
        return csv(api, &query, console).await;
    }
    let usage = api.all(&USAGE, &query, "usage").await?;
    if console.json {
        return console.list_json("usage", usage);
    }
    let mut table = Table::new([
        "tenant",
        "month",
        "requests",
        "input",
        "output",
        "cache read",
        "cache write",
        "embedding",
        "unreported",
        "cost $",
        "month's left",
        "in flight",
    ]);
    for tenant in &usage {
        let [requests, input, output, read, written, embedding, unreported, left, in_flight] =
            COUNTS.map(|name| field(tenant, name));
        let cost = tenant.get("cost_nano_usd").and_then(Value::as_u64).map(|cost| dollars(NanoUsd(cost)));
        let (id, month) = (field(tenant, "tenant_id"), field(tenant, "month"));
        let cost = cost.unwrap_or_default();
        table.row([
            id, month, requests, input, output, read, written, embedding, unreported, cost, left, in_flight,
        ]);
    }
    Ok(table.write(&mut console.out)?)
}

/// The API's table as it is; of its pages, the first alone brings the headings.
async fn csv<I: BufRead, O: Write, E: Write>(
    api: &Api,
    query: &[(&str, String)],
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let mut cursor = None;
    loop {
        let first = cursor.is_none();
        let reply = api.get_csv(&USAGE, &page(query, cursor)).await?;
        let rows = reply.text.split_once('\n').map_or("", |(_, rows)| rows);
        console.out.write_all(if first { &reply.text } else { rows }.as_bytes())?;
        cursor = reply.next_cursor;
        if cursor.is_none() {
            return Ok(());
        }
    }
}
