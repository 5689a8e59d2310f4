//! CommonMark with tables. Markup is taken away; what a reader sees stays.

use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use shared::chunk::Block;

use super::html;

pub(super) fn blocks(text: &str) -> Vec<Block> {
    let mut reader = Reader::default();
    for event in Parser::new_ext(text, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH) {
        reader.take(event);
    }
    reader.flush();
    reader.blocks
}

#[derive(Default)]
struct Reader {
    blocks: Vec<Block>,
    open: String,
    heading: Option<u8>,
    /// How many lists, tables and listings are open: within one, everything is one block.
    whole: u32,
    list: u32,
    /// The HTML between two blocks, which is read as a whole.
    html: String,
}

impl Reader {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start(Tag::Heading { level, .. }) => {
                self.flush();
                self.heading = Some(rank(level));
            }
            Event::Start(Tag::Table(_) | Tag::CodeBlock(_)) => self.begin_whole(),
            Event::Start(Tag::List(_)) => {
                if self.list == 0 {
                    self.flush();
                }
                self.list += 1;
            }
            Event::Start(Tag::Item) => {
                self.new_line();
                self.open.push_str(&"  ".repeat(self.list.saturating_sub(1).min(8) as usize));
                self.open.push_str("- ");
            }
            Event::Start(Tag::TableHead | Tag::TableRow) => {
                self.new_line();
                self.open.push('|');
            }
            Event::Start(Tag::TableCell) => self.open.push(' '),
            Event::Start(Tag::Paragraph) if self.list == 0 && self.whole == 0 => self.flush(),
            Event::Start(Tag::Paragraph) if !self.open.ends_with("- ") => self.new_line(),
            Event::End(TagEnd::TableCell) => self.open.push_str(" |"),
            Event::End(TagEnd::Heading(_) | TagEnd::Paragraph) if self.list == 0 && self.whole == 0 => {
                self.flush();
            }
            Event::End(end @ (TagEnd::Table | TagEnd::CodeBlock)) => {
                self.whole = self.whole.saturating_sub(1);
                if self.whole == 0 && self.list == 0 {
                    self.flush_as(if end == TagEnd::Table { table } else { Block::Whole });
                }
            }
            Event::End(TagEnd::List(_)) => {
                self.list = self.list.saturating_sub(1);
                if self.list == 0 {
                    self.flush();
                }
            }
            Event::Text(text) | Event::Code(text) => self.open.push_str(&text),
            Event::InlineHtml(html) => self.open.push_str(&html::inline(&html)),
            Event::Html(html) => self.html.push_str(&html),
            Event::End(TagEnd::HtmlBlock) => {
                let html = std::mem::take(&mut self.html);
                if self.list == 0 && self.whole == 0 {
                    self.flush();
                    self.blocks.extend(html::blocks(&html));
                } else {
                    self.open.push_str(&html::inline(&html));
                }
            }
            Event::SoftBreak => self.open.push(' '),
            Event::HardBreak => self.open.push('\n'),
            Event::Rule => self.flush(),
            _ => {}
        }
    }

    fn begin_whole(&mut self) {
        if self.whole == 0 && self.list == 0 {
            self.flush();
        } else {
            self.new_line();
        }
        self.whole += 1;
    }

    fn new_line(&mut self) {
        if !self.open.is_empty() && !self.open.ends_with('\n') {
            self.open.push('\n');
        }
    }

    fn flush(&mut self) {
        self.flush_as(Block::Paragraph);
    }

    fn flush_as(&mut self, block: fn(String) -> Block) {
        let text = std::mem::take(&mut self.open).trim().to_owned();
        let heading = self.heading.take();
        if !text.is_empty() {
            self.blocks.push(match heading {
                Some(level) => Block::Heading { level, text },
                None => block(text),
            });
        }
    }
}

/// A table, of its lines.
fn table(text: String) -> Block {
    let mut lines = text.lines().map(str::to_owned);
    Block::Table { header: lines.next().unwrap_or_default(), rows: lines.collect() }
}

const fn rank(level: HeadingLevel) -> u8 {
    level as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_is_read_as_it_looks() {
        let paragraph = |text: &str| Block::Paragraph(text.into());
        let text = "# Leave *policy*\n\nYou have **25 days**\na year. [More](http://x) <b>now</b>\n\n\
                    - one\n- two\n  - nested\n\n| Tier | Days |\n|---|---|\n| A | 25 |\n\n\
                    ```rust\nfn main() {}\n```\n\n<!-- hidden -->\n<script>\nhidden\n</script>\n\nEnd.";
        assert_eq!(
            blocks(text),
            [
                Block::Heading { level: 1, text: "Leave policy".into() },
                paragraph("You have 25 days a year. More now"),
                paragraph("- one\n- two\n  - nested"),
                Block::Table { header: "| Tier | Days |".into(), rows: vec!["| A | 25 |".into()] },
                Block::Whole("fn main() {}".into()),
                paragraph("End."),
            ]
        );
    }
}
