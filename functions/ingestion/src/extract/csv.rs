//! CSV (RFC 4180) and what is like it: one table, whose first row names its columns.

use csv::StringRecord;
use shared::chunk::Block;

use super::{MOST_PIECES, MOST_TEXT_BYTES, Unreadable};

/// What may separate values, the most usual first.
const SEPARATORS: [u8; 4] = [b',', b';', b'\t', b'|'];

pub(super) fn blocks(text: &str) -> Result<Vec<Block>, Unreadable> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(separator(text))
        .from_reader(text.as_bytes());
    let (mut header, mut rows, mut bytes) = (None, Vec::new(), 0);
    let mut record = StringRecord::new();
    while reader.read_record(&mut record).map_err(|error| Unreadable::Damaged(error.to_string()))? {
        if record.iter().all(|value| value.trim().is_empty()) {
            continue;
        }
        let row = row(record.iter());
        bytes += row.len();
        if rows.len() >= MOST_PIECES || bytes > MOST_TEXT_BYTES {
            return Err(Unreadable::TooLarge);
        }
        match header {
            None => header = Some(row),
            Some(_) => rows.push(row),
        }
    }
    Ok(header.map(|header| Block::Table { header, rows }).into_iter().collect())
}

/// The table that rows of cells make, the first of which names its columns. One of a single column is a frame around
/// text.
pub(super) fn table(mut rows: Vec<Vec<String>>) -> Vec<Block> {
    rows.retain(|row| row.iter().any(|cell| !cell.trim().is_empty()));
    if rows.iter().all(|row| row.len() < 2) {
        return rows.into_iter().flatten().map(|text| Block::Paragraph(text.trim().to_owned())).collect();
    }
    let mut rows = rows.iter().map(|cells| row(cells.iter().map(String::as_str)));
    rows.next().map(|header| Block::Table { header, rows: rows.collect() }).into_iter().collect()
}

/// A table's row, as Markdown writes it.
fn row<'a>(values: impl Iterator<Item = &'a str> + Clone) -> String {
    let most = 1 + values.clone().map(|value| value.len() + 3).sum::<usize>();
    let mut row = String::with_capacity(most);
    row.push('|');
    for value in values {
        row.push(' ');
        for (n, word) in value.split_whitespace().enumerate() {
            if n > 0 {
                row.push(' ');
            }
            row.push_str(word);
        }
        row.push_str(" |");
    }
    row
}

/// What occurs most often in the first line, quoted values aside.
fn separator(text: &str) -> u8 {
    let mut counts = [0u32; SEPARATORS.len()];
    let mut quoted = false;
    for byte in text.bytes() {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' if !quoted => break,
            _ if quoted => {}
            byte => {
                for (separator, count) in SEPARATORS.iter().zip(&mut counts) {
                    *count += u32::from(*separator == byte);
                }
            }
        }
    }
    let mut best = (b',', 0);
    for (separator, count) in SEPARATORS.into_iter().zip(counts) {
        if count > best.1 {
            best = (separator, count);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_its_columns_and_its_rows_whatever_separates_them() {
        for text in [
            "tier,days\r\n\"A, B\",25\r\n\r\nC,\"30\n31\"\r\n",
            "tier;days\n\"A, B\";25\nC;30 31",
            "tier\tdays\n\"A, B\"\t25\nC\t30  31\n",
        ] {
            let table = Block::Table {
                header: "| tier | days |".into(),
                rows: vec!["| A, B | 25 |".into(), "| C | 30 31 |".into()],
            };
            assert_eq!(blocks(text).unwrap(), [table], "{text:?}");
        }
    }

    #[test]
    fn whatever_is_sent_is_read() {
        for text in ["", "\n\n", "\"open", "a,b\n1\n1,2,3", "\"a\"b,\"c\n", ",,,\n,,,"] {
            assert!(blocks(text).is_ok(), "{text:?}");
        }
    }
}
