//! Tables for people. Pure.

use std::io::{self, Write};

use serde_json::{Map, Value};
use shared::one_line::OneLine;

/// What a person wants to see first of an object.
const FIRST: [&str; 6] = ["deprovisioning_id", "tenant_id", "status", "tier", "key_id", "api_key"];

/// Rows under headings.
#[derive(Debug)]
pub(crate) struct Table {
    headings: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<const N: usize>(headings: [&str; N]) -> Self {
        Self { headings: headings.map(str::to_owned).into(), rows: Vec::new() }
    }

    /// One with as many columns as there are headings.
    pub(crate) fn of(headings: impl IntoIterator<Item = String>) -> Self {
        Self { headings: headings.into_iter().collect(), rows: Vec::new() }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.cells(cells.into());
    }

    /// A row of as many cells as there are columns.
    pub(crate) fn cells(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| OneLine(cell).to_string()).collect());
    }

    /// Writes it: columns of numbers to the right, others to the left.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let columns: Vec<(usize, bool)> = (0..self.headings.len())
            .map(|n| {
                let cells = || self.rows.iter().filter_map(move |row| row.get(n));
                let heading = self.headings.get(n).map_or(0, |text| text.chars().count());
                let width = cells().map(|cell| cell.chars().count()).fold(heading, usize::max);
                (width, !self.rows.is_empty() && cells().all(|cell| is_number(cell)))
            })
            .collect();
        for row in std::iter::once(&self.headings).chain(&self.rows) {
            let cells = row.iter().zip(&columns).map(|(cell, (width, number))| {
                if *number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

fn is_number(cell: &str) -> bool {
    !cell.is_empty() && cell.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'-'))
}

/// Writes an object, a line for each of its values.
pub(crate) fn write_object(object: &Map<String, Value>, out: &mut impl Write) -> io::Result<()> {
    let mut lines = Vec::new();
    let rank = |name: &str| FIRST.iter().position(|first| *first == name).unwrap_or(FIRST.len());
    let mut fields: Vec<_> = object.iter().collect();
    fields.sort_by_key(|(name, _)| (rank(name), (*name).clone()));
    for (name, value) in fields {
        flatten(name, value, &mut lines);
    }
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    for (name, value) in lines {
        writeln!(out, "{}", format!("{name:<width$}  {value}").trim_end())?;
    }
    Ok(())
}

fn flatten(name: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(object) => {
            let mut fields: Vec<_> = object.iter().collect();
            fields.sort_by_key(|(name, _)| *name);
            fields.into_iter().for_each(|(inner, value)| flatten(&format!("{name}.{inner}"), value, lines));
        }
        value => lines.push((OneLine(name).to_string(), OneLine(&text(value)).to_string())),
    }
}

/// A value as a person reads it.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// A field of an object as a person reads it.
pub(crate) fn field(object: &Value, name: &str) -> String {
    text(object.pointer(&format!("/{name}")).unwrap_or(&Value::Null))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_stand_below_each_other_and_nothing_leaves_its_line() {
        let mut table = Table::new(["tenant", "requests", "company"]);
        table.row(["acme".into(), "7".into(), "Acme\n\u{1b}[2J".into()]);
        table.row(["globex".into(), "1234567890".into(), String::new()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        let expected = "tenant    requests  company\n\
                        acme             7  Acme\\n\\u{1b}[2J\n\
                        globex  1234567890\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn an_object_is_a_line_for_each_value() {
        let object = json!({"limits": {"b": 2, "a": ["x", "y"]}, "tenant_id": "acme", "cell": null});
        let mut out = Vec::new();
        write_object(object.as_object().unwrap(), &mut out).unwrap();
        let expected = "tenant_id  acme\ncell\nlimits.a   x, y\nlimits.b   2\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
