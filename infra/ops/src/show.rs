//! `audit show`: the records that are asked for, for a person, a spreadsheet or a program.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::Write;

use shared::audit_filter::Filter;
use shared::audit_log::{self, Line, Unreadable, WireRecord};
use shared::audit_verify::position;
use shared::one_line::OneLine;
use shared::tenant::TenantId;
use shared::units::NanoUsd;

use crate::source::{Failure, Name, Source};

/// How records are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A line for a person
    #[default]
    Text,
    /// For a spreadsheet: what it would take for a formula begins with an apostrophe
    Csv,
    /// The lines of the log as they are
    Json,
}

/// Shows the records that `filter` asks for, of one tenant or of all, in the order of their logs.
/// `problem` is told of what cannot be read; the rest is shown all the same. Answers how much that was.
///
/// # Errors
/// If nothing can be read, or nothing shown.
pub fn run(
    source: &Source,
    tenant: Option<&TenantId>,
    filter: &Filter,
    format: Format,
    out: impl Write,
    problem: &mut impl FnMut(&dyn Display),
) -> Result<u64, Failure> {
    let mut writer = Writer::new(format, out)?;
    let mut unread = 0;
    let sieve = filter.sieve();
    for id in source.tenants()?.iter().filter(|id| tenant.is_none_or(|wanted| wanted == *id)) {
        let log = source.log(id)?;
        let asked = |name: &&Name| position(&name.key).is_some() && filter.may_be_in(&name.key);
        for (name, object) in source.objects(log.objects.iter().filter(asked)) {
            let (_, bytes) = object?;
            for (n, line) in audit_log::raw_lines(bytes).enumerate() {
                let line = line.and_then(|text| {
                    if !sieve.lets_through(&text) {
                        return Ok(None);
                    }
                    let wrong =
                        |e: serde_json::Error| Unreadable::Line { line: n + 1, problem: e.to_string() };
                    let line: Line = serde_json::from_str(&text).map_err(wrong)?;
                    Ok(filter.matches(&line.record).then_some((line, text)))
                });
                match line {
                    Ok(None) => {}
                    Ok(Some((line, text))) => writer.write(&line, &text)?,
                    Err(error) => {
                        unread += 1;
                        problem(&format_args!("{}: {}", OneLine(&name.key), OneLine(&error.to_string())));
                        if matches!(error, Unreadable::Gzip(_)) {
                            break;
                        }
                    }
                }
            }
        }
    }
    writer.finish()?;
    Ok(unread)
}

enum Writer<W: Write> {
    Text(W),
    Csv(Box<csv::Writer<W>>),
    Json(W),
}

impl<W: Write> Writer<W> {
    fn new(format: Format, out: W) -> Result<Self, Failure> {
        Ok(match format {
            Format::Text => Self::Text(out),
            Format::Json => Self::Json(out),
            Format::Csv => {
                let mut writer = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(out);
                writer.write_record(COLUMNS).map_err(output)?;
                Self::Csv(Box::new(writer))
            }
        })
    }

    fn write(&mut self, line: &Line, text: &str) -> Result<(), Failure> {
        match self {
            Self::Text(out) => writeln!(out, "{}", for_a_person(&line.record))?,
            Self::Json(out) => writeln!(out, "{}", text.trim_end_matches('\n'))?,
            Self::Csv(writer) => {
                let cells = cells(line);
                writer.write_record(cells.iter().map(|cell| cell.as_bytes())).map_err(output)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(), Failure> {
        match self {
            Self::Text(mut out) | Self::Json(mut out) => out.flush()?,
            Self::Csv(mut writer) => writer.flush()?,
        }
        Ok(())
    }
}

fn output(error: csv::Error) -> Failure {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error.into(),
        other => std::io::Error::other(format!("{other:?}")).into(),
    }
}

/// Dollars, exact to the nano.
pub(crate) fn dollars(money: NanoUsd) -> String {
    format!("{}.{:09}", money.0 / 1_000_000_000, money.0 % 1_000_000_000)
}

/// How serde writes a name.
fn named(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn tokens(record: &WireRecord) -> u64 {
    let kinds = [
        record.input_tokens,
        record.output_tokens,
        record.cache_read_input_tokens,
        record.cache_creation_input_tokens,
        record.embedding_tokens,
        record.unreported_tokens,
    ];
    kinds.into_iter().sum::<shared::units::Tokens>().0
}

fn for_a_person(record: &WireRecord) -> String {
    let mut text = format!("{}  {}  {}", record.time, record.tenant_id, named(&record.action));
    let mut add = |part: String| {
        text.push_str("  ");
        text.push_str(&part);
    };
    let mut outcome = named(&record.outcome);
    if let Some(error) = &record.error {
        outcome = format!("{outcome} {}", named(error));
    }
    if let Some(limit) = &record.limit {
        outcome = format!("{outcome} {}", OneLine(limit));
    }
    add(outcome);
    if record.count != 1 {
        add(format!("{} times", record.count));
    }
    if let Some(ticket) = record.ticket {
        add(format!("ticket {ticket}"));
    }
    if let Some(user) = &record.user_id {
        add(format!("user \"{}\"", OneLine(user.as_str())));
    }
    if let Some(operator) = &record.operator {
        add(format!("operator \"{}\"", OneLine(operator)));
    }
    if let Some(model) = record.model.as_ref().or(record.embedding_model.as_ref()) {
        add(format!("model \"{}\"", OneLine(model)));
    }
    if record.ticket.is_some() {
        let bound = if record.estimated { " at most" } else { "" };
        add(format!("{} tokens{bound}", tokens(record)));
        add(format!("${}", dollars(record.cost_nano_usd)));
    }
    if !record.documents.is_empty() {
        add(format!("documents {}", quoted(record.documents.iter().map(|id| id.as_str()))));
    }
    if !record.chunks.is_empty() {
        add(format!("chunks {}", quoted(record.chunks.iter().map(String::as_str))));
    }
    if let Some(subject) = &record.subject {
        add(format!("about \"{}\"", OneLine(subject)));
    }
    if let Some(receipt) = &record.receipt {
        let deleted: u64 = receipt.stores.iter().map(|store| store.deleted).sum();
        let found: u64 = receipt.stores.iter().map(|store| store.found).sum();
        add(format!("{deleted} deleted, {found} found since"));
        add(format!("receipt of \"{}\"", receipt.deprovisioning_id));
    }
    if !record.injection.is_empty() {
        add(format!("injection {}", quoted(record.injection.iter().map(String::as_str))));
    }
    if !record.keys.is_empty() {
        add(format!("keys {}", quoted(record.keys.iter().map(|id| id.as_str()))));
    }
    if !record.changed.is_empty() {
        add(format!("changed {}", quoted(record.changed.iter().map(String::as_str))));
    }
    text
}

fn quoted<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    texts.map(|text| format!("\"{}\"", OneLine(text))).collect::<Vec<_>>().join(",")
}

const COLUMNS: [&str; 43] = [
    "time",
    "tenant_id",
    "position",
    "id",
    "ticket",
    "user_id",
    "key_id",
    "operator",
    "request_id",
    "action",
    "outcome",
    "error",
    "limit",
    "count",
    "day",
    "month",
    "model",
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "embedding_model",
    "embedding_tokens",
    "rerank_model",
    "unreported_tokens",
    "estimated",
    "model_cost_nano_usd",
    "embedding_cost_nano_usd",
    "rerank_cost_nano_usd",
    "unreported_cost_nano_usd",
    "cost_nano_usd",
    "cost_usd",
    "documents",
    "chunks",
    "subject",
    "injection",
    "keys",
    "changed",
    "latency_ms",
    "receipt",
    "object",
    "previous",
    "retain_until",
];

fn cells(line: &Line) -> [String; 43] {
    let record = &line.record;
    let text = |text: Option<&str>| text.map_or_else(String::new, |text| safe(text).into_owned());
    let number = |number: Option<u64>| number.map_or_else(String::new, |number| number.to_string());
    let list = |texts: Vec<&str>| safe(&texts.join("\n")).into_owned();
    [
        record.time.to_string(),
        record.tenant_id.to_string(),
        line.position.to_string(),
        text(Some(&record.id)),
        number(record.ticket.map(|ticket| ticket.0)),
        text(record.user_id.as_ref().map(|user| user.as_str())),
        text(record.key_id.as_ref().map(|key| key.as_str())),
        text(record.operator.as_deref()),
        text(Some(&record.request_id.to_string())),
        named(&record.action),
        named(&record.outcome),
        record.error.as_ref().map(named).unwrap_or_default(),
        text(record.limit.as_deref()),
        record.count.to_string(),
        record.day.to_string(),
        record.month.to_string(),
        text(record.model.as_deref()),
        record.input_tokens.0.to_string(),
        record.output_tokens.0.to_string(),
        record.cache_read_input_tokens.0.to_string(),
        record.cache_creation_input_tokens.0.to_string(),
        text(record.embedding_model.as_deref()),
        record.embedding_tokens.0.to_string(),
        text(record.rerank_model.as_deref()),
        record.unreported_tokens.0.to_string(),
        record.estimated.to_string(),
        record.model_cost_nano_usd.0.to_string(),
        record.embedding_cost_nano_usd.0.to_string(),
        record.rerank_cost_nano_usd.0.to_string(),
        record.unreported_cost_nano_usd.0.to_string(),
        record.cost_nano_usd.0.to_string(),
        dollars(record.cost_nano_usd),
        list(record.documents.iter().map(|id| id.as_str()).collect()),
        list(record.chunks.iter().map(String::as_str).collect()),
        text(record.subject.as_deref()),
        list(record.injection.iter().map(String::as_str).collect()),
        list(record.keys.iter().map(|id| id.as_str()).collect()),
        list(record.changed.iter().map(String::as_str).collect()),
        number(record.latency_ms),
        record
            .receipt
            .as_ref()
            .map(|receipt| serde_json::to_string(receipt).unwrap_or_default())
            .unwrap_or_default(),
        line.object.to_string(),
        String::from(line.previous.clone()),
        line.retain_until.to_string(),
    ]
}

/// A text as a cell that no spreadsheet takes for a formula: an apostrophe goes before what begins as
/// one, and before an apostrophe, so that the text can be told again.
fn safe(text: &str) -> Cow<'_, str> {
    const FIRST: [char; 12] = ['=', '+', '-', '@', '\t', '\r', '\n', '\'', '＝', '＋', '－', '＠'];
    if text.starts_with(FIRST) { Cow::Owned(format!("'{text}")) } else { Cow::Borrowed(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_exact() {
        assert_eq!(dollars(NanoUsd(0)), "0.000000000");
        assert_eq!(dollars(NanoUsd(1)), "0.000000001");
        assert_eq!(dollars(NanoUsd(u64::MAX)), "18446744073.709551615");
    }

    #[test]
    fn no_cell_is_a_formula() {
        for text in ["=1+1", "+1", "-1", "@a", "\t=1", "\r", "\n=1", "＝1", "'x"] {
            assert_eq!(safe(text), format!("'{text}"));
        }
        assert_eq!(safe("a=1"), "a=1");
    }
}
