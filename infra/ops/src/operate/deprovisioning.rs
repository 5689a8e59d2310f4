//! `deprovisioning`

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::time::Duration;

use serde_json::{Map, Value};

use super::Console;
use crate::api::{Api, CallError, Reply};
use crate::table::{Table, field};

/// How long between two looks, and how many in a row may fail: a minute of trouble ends no watch.
const PAUSE: Duration = Duration::from_millis(500);
const FAILURES: u32 = 120;

pub(super) async fn show<I: BufRead, O: Write, E: Write>(
    api: &Api,
    id: &str,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let reply = look(api, id).await?;
    if console.json {
        return console.object(&reply);
    }
    let view = Value::from(reply.object()?);
    for name in ["deprovisioning_id", "tenant_id", "status", "started_at", "completed_at", "watched_until"] {
        let value = field(&view, name);
        if !value.is_empty() {
            writeln!(console.out, "{name:<17}  {}", shared::one_line::OneLine(&value))?;
        }
    }
    let mut steps = Table::new(["step", "state", "ended", "deleted"]);
    for step in items(&view, "/steps") {
        let [name, state, ended] = ["step", "state", "ended_at"].map(|name| field(step, name));
        steps.row([name, state, ended, counts(step)]);
    }
    writeln!(console.out)?;
    steps.write(&mut console.out)?;
    receipt(&view, console)
}

/// Shows each change of a step, until the receipt. It goes on whether or not somebody watches.
pub(super) async fn watch<I: BufRead, O: Write, E: Write>(
    api: &Api,
    id: &str,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let mut shown = BTreeMap::new();
    let mut failures = 0;
    loop {
        match look(api, id).await {
            Ok(reply) => {
                failures = 0;
                let view = Value::from(reply.object()?);
                if !console.json {
                    progress(&view, &mut shown, console)?;
                }
                if view.get("status").and_then(Value::as_str) == Some("completed") {
                    return if console.json { console.object(&reply) } else { receipt(&view, console) };
                }
            }
            Err(error) if error.passes() && failures < FAILURES => {
                if failures == 0 {
                    console.say(&format!("It goes on; for now it cannot be seen: {error}"))?;
                }
                failures += 1;
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn look(api: &Api, id: &str) -> Result<Reply, CallError> {
    api.get(&["admin", "deprovisionings", id], &[]).await
}

/// A line for each step that is not as it was last shown.
fn progress<I: BufRead, O: Write, E: Write>(
    view: &Value,
    shown: &mut BTreeMap<String, String>,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    for step in items(view, "/steps") {
        let (name, state) = (field(step, "step"), field(step, "state"));
        if state == "pending" && !shown.contains_key(&name) {
            continue;
        }
        let line = format!("{name:<13}  {state:<7}  {}", counts(step));
        if shown.get(&name) != Some(&line) {
            writeln!(console.out, "{}", shared::one_line::OneLine(line.trim_end()))?;
            console.out.flush()?;
            shown.insert(name, line);
        }
    }
    Ok(())
}

/// What was deleted, what a fresh look found, and what is kept.
fn receipt<I: BufRead, O: Write, E: Write>(
    view: &Value,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let Some(receipt) = view.get("receipt") else { return Ok(()) };
    writeln!(console.out, "\nreceipt of {}", field(receipt, "verified_at"))?;
    let mut stores = Table::new(["store", "deleted", "found since"]);
    for store in items(receipt, "/stores") {
        stores.row(["store", "deleted", "found"].map(|name| field(store, name)));
    }
    stores.write(&mut console.out)?;
    writeln!(console.out)?;
    let mut kept = Table::new(["kept", "count", "until"]);
    for what in items(receipt, "/kept") {
        let [name, count, until] = ["what", "count", "until"].map(|name| field(what, name));
        kept.row([name, count, if until.is_empty() { "the id is used again".into() } else { until }]);
    }
    Ok(kept.write(&mut console.out)?)
}

fn items<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// What a step deletes, by store.
fn counts(step: &Value) -> String {
    let none = Map::new();
    let deleted = step.get("deleted").and_then(Value::as_object).unwrap_or(&none);
    let mut counts: Vec<String> = deleted.iter().map(|(store, count)| format!("{store} {count}")).collect();
    counts.sort();
    counts.join(", ")
}
