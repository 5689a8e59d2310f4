//! Text out of documents, as blocks that the chunker cuts along. Pure.

use html2text::render::TextDecorator;
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use shared::chunk::Block;
use shared::document::ContentType;
use shared::error::ApiError;

/// Wide enough that no line is broken: the chunker cuts, not the renderer.
const NO_WRAP: usize = 100_000;

/// Why no text can be had from a document. It has nothing to do with anything but the document: to try again would
/// change nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    /// There is no text in it.
    #[error("the document holds no text")]
    Empty,
    /// It is no text.
    #[error("the content is not UTF-8 text")]
    NotText,
}

impl From<Unreadable> for ApiError {
    fn from(reason: Unreadable) -> Self {
        Self::invalid("content", reason.to_string())
    }
}

/// The blocks of a document.
///
/// # Errors
/// If nothing can be made of the content.
pub(crate) fn blocks(content: &[u8], content_type: ContentType) -> Result<Vec<Block>, Unreadable> {
    let text = std::str::from_utf8(content).map_err(|_| Unreadable::NotText)?;
    Ok(match content_type {
        ContentType::Plain => paragraphs(text),
        ContentType::Markdown => markdown(text),
        ContentType::Html => html(text),
    })
}

/// Plain text: paragraphs are what blank lines separate.
fn paragraphs(text: &str) -> Vec<Block> {
    let unified = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut blocks = Vec::new();
    let mut open = String::new();
    for line in unified.lines() {
        if line.trim().is_empty() {
            flush(&mut blocks, &mut open);
        } else {
            open.push_str(line);
            open.push('\n');
        }
    }
    flush(&mut blocks, &mut open);
    blocks
}

fn flush(blocks: &mut Vec<Block>, open: &mut String) {
    let text = std::mem::take(open);
    if !text.trim().is_empty() {
        blocks.push(Block::Paragraph(text.trim().to_owned()));
    }
}

/// CommonMark with tables. Markup is taken away; what a reader sees stays.
fn markdown(text: &str) -> Vec<Block> {
    let mut reader = MarkdownReader::default();
    for event in Parser::new_ext(text, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH) {
        reader.take(event);
    }
    reader.flush();
    reader.blocks
}

#[derive(Default)]
struct MarkdownReader {
    blocks: Vec<Block>,
    open: String,
    heading: Option<u8>,
    /// How many lists, tables and listings are open: within one, everything is one block.
    whole: u32,
    list: u32,
}

impl MarkdownReader {
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
                self.open.push_str(&"  ".repeat(self.list.saturating_sub(1) as usize));
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
            Event::End(TagEnd::Table | TagEnd::CodeBlock) => {
                self.whole = self.whole.saturating_sub(1);
                if self.whole == 0 && self.list == 0 {
                    self.flush_as(Block::Whole);
                }
            }
            Event::End(TagEnd::List(_)) => {
                self.list = self.list.saturating_sub(1);
                if self.list == 0 {
                    self.flush();
                }
            }
            Event::Text(text) | Event::Code(text) => self.open.push_str(&text),
            Event::InlineHtml(html) | Event::Html(html) => self.open.push_str(&inline_html(&html)),
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

const fn rank(level: HeadingLevel) -> u8 {
    level as u8
}

/// What a reader sees of raw HTML within Markdown: comments and tags vanish, their text is kept.
fn inline_html(html: &str) -> String {
    rendered(html).unwrap_or_default().trim_end_matches('\n').to_owned()
}

/// HTML: rendered as a reader sees it (html5ever parses whatever a browser does); what a browser
/// hides is not read. Headings are found again by their mark.
fn html(text: &str) -> Vec<Block> {
    let Some(rendered) = rendered(text) else { return paragraphs(text) };
    let mut blocks = Vec::new();
    for block in paragraphs(&rendered) {
        let Block::Paragraph(text) = block else { continue };
        let level = text.bytes().take_while(|b| *b == b'#').count();
        let title = text.trim_start_matches('#');
        match u8::try_from(level) {
            Ok(level @ 1..=6) if title.starts_with(' ') && !title.contains('\n') => {
                blocks.push(Block::Heading { level, text: title.trim().to_owned() });
            }
            _ => blocks.push(Block::Paragraph(text)),
        }
    }
    blocks
}

fn rendered(html: &str) -> Option<String> {
    match html2text::config::with_decorator(Reader).string_from_read(html.as_bytes(), NO_WRAP) {
        Ok(text) => Some(text),
        Err(error) => {
            tracing::warn!("HTML could not be rendered: {error}");
            None
        }
    }
}

/// Renders the words alone; of the marks, only those of headings and list items.
#[derive(Clone)]
struct Reader;

impl TextDecorator for Reader {
    type Annotation = ();

    fn decorate_link_start(&mut self, _url: &str) -> (String, ()) {
        (String::new(), ())
    }
    fn decorate_link_end(&mut self) -> String {
        String::new()
    }
    fn decorate_em_start(&self) -> (String, ()) {
        (String::new(), ())
    }
    fn decorate_em_end(&self) -> String {
        String::new()
    }
    fn decorate_strong_start(&self) -> (String, ()) {
        (String::new(), ())
    }
    fn decorate_strong_end(&self) -> String {
        String::new()
    }
    fn decorate_strikeout_start(&self) -> (String, ()) {
        (String::new(), ())
    }
    fn decorate_strikeout_end(&self) -> String {
        String::new()
    }
    fn decorate_code_start(&self) -> (String, ()) {
        (String::new(), ())
    }
    fn decorate_code_end(&self) -> String {
        String::new()
    }
    fn decorate_preformat_first(&self) {}
    fn decorate_preformat_cont(&self) {}
    fn decorate_image(&mut self, _src: &str, title: &str) -> (String, ()) {
        (title.to_owned(), ())
    }
    fn header_prefix(&self, level: usize) -> String {
        format!("{} ", "#".repeat(level))
    }
    fn quote_prefix(&self) -> String {
        "> ".to_owned()
    }
    fn unordered_item_prefix(&self) -> String {
        "- ".to_owned()
    }
    fn ordered_item_prefix(&self, i: i64) -> String {
        format!("{i}. ")
    }
    fn make_subblock_decorator(&self) -> Self {
        Self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(text: &str, content_type: ContentType) -> Vec<Block> {
        super::blocks(text.as_bytes(), content_type).unwrap()
    }

    fn paragraph(text: &str) -> Block {
        Block::Paragraph(text.into())
    }

    fn heading(level: u8, text: &str) -> Block {
        Block::Heading { level, text: text.into() }
    }

    #[test]
    fn plain_text_is_paragraphs_whatever_its_line_ends() {
        assert_eq!(
            blocks("a\r\nb\r\n\r\nc\r\rd", ContentType::Plain),
            [paragraph("a\nb"), paragraph("c"), paragraph("d")]
        );
    }

    #[test]
    fn markdown_is_read_as_it_looks() {
        let text = "# Leave *policy*\n\nYou have **25 days**\na year. [More](http://x)\n\n- one\n- two\n  - nested\n\n\
                    | Tier | Days |\n|---|---|\n| A | 25 |\n\n```rust\nfn main() {}\n```\n\n<!-- hidden -->\nEnd.";
        assert_eq!(
            blocks(text, ContentType::Markdown),
            [
                heading(1, "Leave policy"),
                paragraph("You have 25 days a year. More"),
                paragraph("- one\n- two\n  - nested"),
                Block::Whole("| Tier | Days |\n| A | 25 |".into()),
                Block::Whole("fn main() {}".into()),
                paragraph("End."),
            ]
        );
    }

    #[test]
    fn html_is_read_as_a_browser_shows_it() {
        let text = "<html><head><title>T</title><style>p{}</style><script>alert(1)</script></head>\
                    <body><h2>Leave</h2><p>You have <b>25</b> days &amp; more.</p><p>Ask<br><a href=/x>Ann</a>.<ul><li>one<li>two</ul></body>";
        assert_eq!(
            blocks(text, ContentType::Html),
            [
                heading(2, "Leave"),
                paragraph("You have 25 days & more."),
                paragraph("Ask\nAnn.\n- one\n- two")
            ]
        );
    }

    #[test]
    fn broken_markup_is_read_without_complaint() {
        for content_type in [ContentType::Markdown, ContentType::Html] {
            for text in
                ["<p><b>open", "<<<>>>", "&#x110000;", "| a |\n|--", "```", "\u{0}x", &"<div>".repeat(5_000)]
            {
                let _ = blocks(text, content_type);
            }
        }
    }
}
