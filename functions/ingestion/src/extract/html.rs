//! HTML, as a browser shows it: tokenized as browsers do, read in one go, never held as a tree.

use html5gum::{DefaultEmitter, StartTag, Token, Tokenizer};
use shared::chunk::Block;

use super::Charset;
use super::csv::table;

/// The blocks of a page.
pub(super) fn blocks(text: &str) -> Vec<Block> {
    let mut emitter = DefaultEmitter::default();
    emitter.naively_switch_states(true);
    let mut reader = Reader::default();
    for token in Tokenizer::new_with_emitter(text, emitter) {
        match token {
            Ok(Token::StartTag(tag)) => reader.start(&tag),
            Ok(Token::EndTag(tag)) => reader.end(&tag.name),
            Ok(Token::String(text)) => reader.text(&String::from_utf8_lossy(&text)),
            // Comments, declarations, and what a browser passes over.
            Ok(_) | Err(_) => {}
        }
    }
    reader.finish()
}

/// What a reader sees of a piece of HTML within a line.
pub(super) fn inline(text: &str) -> String {
    let texts = blocks(text).into_iter().map(|block| match block {
        Block::Heading { text, .. } | Block::Paragraph(text) | Block::Whole(text) => text,
        Block::Table { header, rows } => [vec![header], rows].concat().join("\n"),
    });
    texts.collect::<Vec<_>>().join("\n")
}

/// The charset that a page names in its first kilobyte (`<meta charset=…>`).
pub(super) fn charset(content: &[u8]) -> Option<Charset> {
    let start = String::from_utf8_lossy(content.get(..1024).unwrap_or(content)).to_ascii_lowercase();
    let (_, named) = start.split_once("charset")?;
    let named = named.trim_start().strip_prefix('=')?.trim_start().trim_start_matches(['"', '\'']);
    let label = named.split(|c: char| !c.is_ascii_alphanumeric() && !"-_:.".contains(c)).next()?;
    // Whoever could read this far reads no UTF-16.
    Charset::parse(label).filter(|charset| !charset.name().starts_with("UTF-16"))
}

#[derive(Default)]
struct Reader {
    blocks: Vec<Block>,
    open: String,
    heading: Option<u8>,
    /// Of each list that is open, the number of its next item, if it counts them.
    lists: Vec<Option<u32>>,
    /// How many `<pre>` are open.
    pre: u32,
    table: Option<Table>,
    /// The element that nothing is shown of, and how often it is open within itself.
    hidden: Option<(Vec<u8>, u32)>,
}

/// A table that is open.
#[derive(Default)]
struct Table {
    rows: Vec<Vec<String>>,
    in_cell: bool,
}

impl Reader {
    fn start(&mut self, tag: &StartTag<()>) {
        let name = tag.name.as_slice();
        if let Some((hidden, depth)) = &mut self.hidden {
            if hidden.as_slice() == name {
                *depth += 1;
            }
            return;
        }
        match name {
            b"script" | b"style" | b"title" | b"template" | b"noscript" | b"iframe" | b"noembed"
            | b"noframes" | b"textarea" => self.hidden = Some((name.to_vec(), 1)),
            b"h1" | b"h2" | b"h3" | b"h4" | b"h5" | b"h6" => {
                self.no_table();
                self.lists.clear();
                self.flush();
                self.heading = name.get(1).map(|digit| digit - b'0');
            }
            b"table" => {
                // A table within a table, or within a list, is there to lay things out.
                if self.table.is_some() {
                    self.no_table();
                }
                if self.lists.is_empty() {
                    self.flush();
                    self.table = Some(Table::default());
                }
            }
            b"tr" => {
                self.end_cell();
                match &mut self.table {
                    Some(table) => table.rows.push(Vec::new()),
                    None => self.line(),
                }
            }
            b"td" | b"th" => {
                self.end_cell();
                match &mut self.table {
                    Some(table) => table.in_cell = true,
                    None => self.space(),
                }
            }
            b"ul" | b"menu" => self.list(None),
            b"ol" => self.list(Some(1)),
            b"li" => {
                self.line();
                let depth = self.lists.len().saturating_sub(1);
                self.open.push_str(&"  ".repeat(depth.min(8)));
                match self.lists.last_mut() {
                    Some(Some(number)) => {
                        self.open.push_str(&format!("{number}. "));
                        *number = number.saturating_add(1);
                    }
                    _ => self.open.push_str("- "),
                }
            }
            b"br" => self.line(),
            b"pre" | b"listing" => {
                self.block();
                self.pre += 1;
            }
            b"img" => {
                if let Some(text) = tag.attributes.get(b"alt".as_slice()) {
                    self.text(&String::from_utf8_lossy(text));
                }
            }
            name if is_block(name) => self.block(),
            _ => {}
        }
    }

    fn end(&mut self, name: &[u8]) {
        if let Some((hidden, depth)) = &mut self.hidden {
            if hidden.as_slice() == name {
                *depth -= 1;
                if *depth == 0 {
                    self.hidden = None;
                }
            }
            return;
        }
        match name {
            b"h1" | b"h2" | b"h3" | b"h4" | b"h5" | b"h6" => self.block(),
            b"td" | b"th" => self.end_cell(),
            b"tr" => self.end_cell(),
            b"table" => self.end_table(),
            b"ul" | b"ol" | b"menu" => {
                self.lists.pop();
                if self.lists.is_empty() {
                    self.block();
                }
            }
            b"pre" | b"listing" if self.pre > 0 => {
                self.pre -= 1;
                if self.pre == 0 && self.lists.is_empty() && self.table.is_none() {
                    self.flush_as(Block::Whole);
                }
            }
            name if is_block(name) => self.block(),
            _ => {}
        }
    }

    fn text(&mut self, text: &str) {
        if self.hidden.is_some() {
            return;
        }
        if self.table.as_ref().is_some_and(|table| !table.in_cell) {
            // What stands between cells is shown before the table.
            if !text.trim().is_empty() {
                self.blocks.push(Block::Paragraph(text.trim().to_owned()));
            }
            return;
        }
        if self.pre > 0 {
            self.open.push_str(text);
            return;
        }
        for c in text.chars() {
            if matches!(c, ' ' | '\t' | '\n' | '\r' | '\u{c}') {
                self.space();
            } else {
                self.open.push(c);
            }
        }
    }

    fn space(&mut self) {
        if !self.open.is_empty() && !self.open.ends_with([' ', '\n']) {
            self.open.push(' ');
        }
    }

    fn line(&mut self) {
        if !self.open.is_empty() && !self.open.ends_with('\n') {
            self.open.truncate(self.open.trim_end_matches(' ').len());
            self.open.push('\n');
        }
    }

    /// A block begins or ends: a paragraph, or, within a cell or an item, a line.
    fn block(&mut self) {
        if self.table.is_some() {
            self.space();
        } else if self.lists.is_empty() {
            self.flush();
        } else if !self.open.ends_with("- ") && !self.open.ends_with(". ") {
            self.line();
        }
    }

    fn list(&mut self, first: Option<u32>) {
        if self.lists.is_empty() && self.table.is_none() {
            self.flush();
        }
        self.lists.push(first);
    }

    fn end_cell(&mut self) {
        let Some(table) = &mut self.table else { return };
        if table.in_cell {
            table.in_cell = false;
            let cell = std::mem::take(&mut self.open);
            if table.rows.is_empty() {
                table.rows.push(Vec::new());
            }
            if let Some(row) = table.rows.last_mut() {
                row.push(cell);
            }
        }
    }

    fn end_table(&mut self) {
        self.end_cell();
        let Some(Table { rows, .. }) = self.table.take() else { return self.block() };
        self.lists.clear();
        self.blocks.extend(table(rows));
    }

    /// There is no table after all: what was taken for one lays a page out.
    fn no_table(&mut self) {
        let Some(Table { rows, .. }) = self.table.take() else { return };
        for cell in rows.into_iter().flatten() {
            if !cell.trim().is_empty() {
                self.blocks.push(Block::Paragraph(cell.trim().to_owned()));
            }
        }
        self.flush();
    }

    fn flush(&mut self) {
        self.flush_as(Block::Paragraph);
    }

    fn flush_as(&mut self, block: fn(String) -> Block) {
        let text = std::mem::take(&mut self.open);
        let heading = self.heading.take();
        let text = text.trim_matches(['\n', '\r']).trim_end();
        if !text.trim().is_empty() {
            self.blocks.push(match heading {
                Some(level) => {
                    Block::Heading { level, text: text.split_whitespace().collect::<Vec<_>>().join(" ") }
                }
                None => block(text.to_owned()),
            });
        }
    }

    fn finish(mut self) -> Vec<Block> {
        self.end_table();
        if self.pre > 0 {
            self.flush_as(Block::Whole)
        } else {
            self.flush()
        }
        self.blocks
    }
}

/// The elements that begin a line of their own.
fn is_block(name: &[u8]) -> bool {
    matches!(
        name,
        b"address"
            | b"article"
            | b"aside"
            | b"blockquote"
            | b"body"
            | b"caption"
            | b"center"
            | b"dd"
            | b"details"
            | b"dir"
            | b"div"
            | b"dl"
            | b"dt"
            | b"fieldset"
            | b"figcaption"
            | b"figure"
            | b"footer"
            | b"form"
            | b"header"
            | b"hr"
            | b"html"
            | b"legend"
            | b"main"
            | b"nav"
            | b"option"
            | b"p"
            | b"section"
            | b"summary"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paragraph(text: &str) -> Block {
        Block::Paragraph(text.into())
    }

    #[test]
    fn html_is_read_as_a_browser_shows_it() {
        let text = "<html><head><title>T</title><style>p{}</style><script>alert(1)</script></head>\
                    <body><h2>Leave</h2><p>You have <b>25</b> days &amp; more.</p><p>Ask<br><a href=/x>Ann</a>.\
                    <ul><li>one<li>two<ol><li>deep</ol></ul><pre>\n a\n  b\n</pre><!-- no --></body>";
        assert_eq!(
            blocks(text),
            [
                Block::Heading { level: 2, text: "Leave".into() },
                paragraph("You have 25 days & more."),
                paragraph("Ask\nAnn."),
                paragraph("- one\n- two\n  1. deep"),
                Block::Whole(" a\n  b".into()),
            ]
        );
    }

    #[test]
    fn a_table_is_its_columns_and_its_rows_and_one_that_lays_a_page_out_is_none() {
        let text = "<table><tr><th>Tier</th><th>Days</th></tr>\n<tr><td><p>A</p><td>25</table>after";
        let table = Block::Table { header: "| Tier | Days |".into(), rows: vec!["| A | 25 |".into()] };
        assert_eq!(blocks(text), [table, paragraph("after")]);
        let text = "<table><tr><td>Menu</td><td><h1>Title</h1><p>Text</p></td></tr></table>";
        let title = Block::Heading { level: 1, text: "Title".into() };
        assert_eq!(blocks(text), [paragraph("Menu"), title, paragraph("Text")]);
    }

    #[test]
    fn a_page_names_its_charset() {
        assert_eq!(
            charset(b"<META http-equiv=x content='text/html; charset=Latin1'>").unwrap().name(),
            "windows-1252"
        );
        assert_eq!(charset(b"<meta charset=\"koi8-r\">").unwrap().name(), "KOI8-R");
        for none in [&b"<p>charset"[..], b"charset=nonsense", b"charset=utf-16"] {
            assert!(charset(none).is_none());
        }
    }
}
