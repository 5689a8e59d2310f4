//! DOCX (ECMA-376): a ZIP archive of XML. Its parts are unpacked and read as a stream, within bounds.

use std::collections::HashMap;
use std::io::{BufReader, Read, Take};

use flate2::bufread::DeflateDecoder;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use rawzip::{CompressionMethod, ZipArchive, ZipSliceArchive};
use shared::chunk::Block;
use shared::document::ContentType;

use super::csv::table;
use super::{MOST_TEXT_BYTES, MOST_UNPACKED_BYTES, Unreadable, magic};

/// The parts that are read, in this order.
const BODY: &str = "word/document.xml";
const NOTES: [&str; 2] = ["word/footnotes.xml", "word/endnotes.xml"];
const STYLES: &str = "word/styles.xml";

/// The most parts of a file. Word's own have a few dozen, and one for each picture.
const MOST_PARTS: u64 = 20_000;

pub(super) fn blocks(content: &[u8]) -> Result<Vec<Block>, Unreadable> {
    let archive = ZipArchive::from_slice(content).map_err(|_| cut_off())?;
    if archive.entries_hint() > MOST_PARTS {
        return Err(Unreadable::TooLarge);
    }
    let names = names(&archive)?;
    if !names.contains_key(BODY) {
        return Err(Unreadable::NotItsType {
            claimed: ContentType::Docx.media_type().to_owned(),
            found: magic::archive(names.keys().map(String::as_str)).to_owned(),
        });
    }
    let mut left = MOST_UNPACKED_BYTES;
    let styles = match part(&archive, &names, STYLES, left)? {
        Some(mut part) => headings(&mut part, &mut left)?,
        None => HashMap::new(),
    };
    let mut text = Text { styles, ..Text::default() };
    for name in std::iter::once(BODY).chain(NOTES) {
        if let Some(mut part) = part(&archive, &names, name, left)? {
            read(&mut part, &mut left, |event| text.take(event))?;
            text.end_paragraph();
        }
    }
    Ok(text.blocks)
}

fn cut_off() -> Unreadable {
    Unreadable::damaged("its ZIP archive is cut off or broken")
}

/// Where the archive's files are, by name; of several of one name, the first.
fn names(
    archive: &ZipSliceArchive<&[u8]>,
) -> Result<HashMap<String, (rawzip::ZipArchiveEntryWayfinder, CompressionMethod)>, Unreadable> {
    let mut names = HashMap::new();
    let mut entries = archive.entries();
    while let Some(entry) = entries.next_entry().map_err(|_| cut_off())? {
        let name = String::from_utf8_lossy(entry.file_path().as_ref()).into_owned();
        if entry.flags().is_encrypted() {
            return Err(Unreadable::Encrypted);
        }
        names.entry(name).or_insert((entry.wayfinder(), entry.compression_method()));
        if names.len() as u64 > MOST_PARTS {
            return Err(Unreadable::TooLarge);
        }
    }
    Ok(names)
}

type Part<'a> = Reader<BufReader<Take<Box<dyn Read + 'a>>>>;

/// A part of the document, unpacked as it is read: one byte more than `left` at most, so that it shows where there
/// is more.
fn part<'a>(
    archive: &'a ZipSliceArchive<&[u8]>,
    names: &HashMap<String, (rawzip::ZipArchiveEntryWayfinder, CompressionMethod)>,
    name: &str,
    left: u64,
) -> Result<Option<Part<'a>>, Unreadable> {
    let Some((wayfinder, method)) = names.get(name) else { return Ok(None) };
    let entry = archive.get_entry(*wayfinder).map_err(|_| cut_off())?;
    let unpacked: Box<dyn Read + 'a> = match *method {
        CompressionMethod::STORE => Box::new(entry.data()),
        CompressionMethod::DEFLATE => Box::new(DeflateDecoder::new(entry.data())),
        _ => return Err(Unreadable::damaged("it is packed in a way that Word does not use")),
    };
    let mut reader = Reader::from_reader(BufReader::new(unpacked.take(left + 1)));
    let config = reader.config_mut();
    config.check_end_names = false;
    config.expand_empty_elements = true;
    Ok(Some(reader))
}

/// Gives each event of a part to `take`, and what was unpacked for it off `left`.
fn read(
    part: &mut Part<'_>,
    left: &mut u64,
    mut take: impl FnMut(Event<'_>) -> Result<(), Unreadable>,
) -> Result<(), Unreadable> {
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        let event = part.read_event_into(&mut buffer);
        if part.buffer_position() > *left {
            return Err(Unreadable::TooLarge);
        }
        match event {
            Ok(Event::Eof) => break,
            Ok(event) => take(event)?,
            Err(_) => return Err(Unreadable::damaged("its text is cut off or broken")),
        }
    }
    *left = left.saturating_sub(part.buffer_position());
    Ok(())
}

/// An attribute's value, by its name without prefix.
fn attribute(tag: &BytesStart<'_>, name: &str) -> Option<String> {
    let found = tag.attributes().flatten().find(|a| a.key.local_name().as_ref() == name)?;
    Some(found.value.into_owned())
}

/// The level of each style that is a heading's, by the style's id. Word names the built-in ones the same in every
/// language; others say which level they outline.
fn headings(part: &mut Part<'_>, left: &mut u64) -> Result<HashMap<String, u8>, Unreadable> {
    let mut levels = HashMap::new();
    let mut style = String::new();
    read(part, left, |event| {
        if let Event::Start(tag) = event {
            match tag.local_name().as_ref() {
                "style" => style = attribute(&tag, "styleId").unwrap_or_default(),
                "name" => {
                    let name = attribute(&tag, "val").unwrap_or_default().to_ascii_lowercase();
                    let level = match name.strip_prefix("heading ") {
                        Some(level) => level.trim().parse().ok(),
                        None => (name == "title").then_some(1),
                    };
                    if let Some(level @ 1..=9) = level {
                        levels.insert(style.clone(), level);
                    }
                }
                "outlineLvl" => {
                    let level = attribute(&tag, "val").and_then(|level| level.parse::<u8>().ok());
                    if let Some(level @ 0..=8) = level {
                        levels.entry(style.clone()).or_insert(level + 1);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    })?;
    Ok(levels)
}

#[derive(Default)]
struct Text {
    styles: HashMap<String, u8>,
    blocks: Vec<Block>,
    /// How much was read.
    bytes: usize,
    open: String,
    level: Option<u8>,
    in_list: bool,
    /// Whether the characters are text (`w:t`).
    in_text: bool,
    /// How many elements are open whose content is said elsewhere.
    hidden: u32,
    /// Rows of the table that is open, and how many are open within each other.
    table: Vec<Vec<String>>,
    tables: u32,
}

impl Text {
    fn take(&mut self, event: Event<'_>) -> Result<(), Unreadable> {
        match event {
            Event::Start(tag) => self.start(&tag),
            Event::End(tag) => self.end(tag.local_name().as_ref()),
            Event::Text(text) if self.in_text && self.hidden == 0 => self.push(&text),
            Event::CData(text) if self.in_text && self.hidden == 0 => self.push(&text),
            Event::GeneralRef(name) if self.in_text && self.hidden == 0 => {
                let named = match &*name {
                    "amp" => Some('&'),
                    "lt" => Some('<'),
                    "gt" => Some('>'),
                    "quot" => Some('"'),
                    "apos" => Some('\''),
                    _ => name.resolve_char_ref().ok().flatten(),
                };
                if let Some(c) = named {
                    self.push(c.encode_utf8(&mut [0; 4]));
                }
            }
            _ => {}
        }
        if self.bytes > MOST_TEXT_BYTES { Err(Unreadable::TooLarge) } else { Ok(()) }
    }

    fn push(&mut self, text: &str) {
        self.bytes += text.len();
        self.open.push_str(text);
    }

    fn start(&mut self, tag: &BytesStart<'_>) {
        match tag.local_name().as_ref() {
            // What older programs are shown instead, and deleted text that is still on record.
            "Fallback" | "del" | "moveFrom" => self.hidden += 1,
            "p" => self.end_paragraph(),
            "pStyle" => {
                let style = attribute(tag, "val").unwrap_or_default();
                self.level = self.styles.get(&style).copied().or(self.level);
            }
            "outlineLvl" => {
                let level = attribute(tag, "val").and_then(|level| level.parse::<u8>().ok());
                if let Some(level @ 0..=8) = level {
                    self.level = Some(level + 1);
                }
            }
            "numPr" => self.in_list = true,
            "t" => self.in_text = true,
            "tab" if !self.open.is_empty() => self.push("\t"),
            "br" | "cr" => self.push("\n"),
            "noBreakHyphen" => self.push("-"),
            "tbl" => {
                if self.tables == 0 {
                    self.end_paragraph();
                }
                self.tables += 1;
            }
            "tr" if self.tables == 1 => self.table.push(Vec::new()),
            _ => {}
        }
    }

    fn end(&mut self, name: &str) {
        match name {
            "Fallback" | "del" | "moveFrom" => self.hidden = self.hidden.saturating_sub(1),
            "p" => self.end_paragraph(),
            "t" => self.in_text = false,
            "tc" if self.tables == 1 => {
                let cell = std::mem::take(&mut self.open);
                if let Some(row) = self.table.last_mut() {
                    row.push(cell);
                }
            }
            "tbl" => {
                self.tables = self.tables.saturating_sub(1);
                if self.tables == 0 {
                    self.end_table();
                }
            }
            _ => {}
        }
    }

    fn end_paragraph(&mut self) {
        let (level, in_list) = (self.level.take(), std::mem::take(&mut self.in_list));
        if self.tables > 0 {
            // A cell is one line, whatever is in it.
            self.open.push(' ');
            return;
        }
        let text = std::mem::take(&mut self.open);
        let text = text.trim();
        if text.is_empty() {
            return;
        }
        match (level, self.blocks.last_mut()) {
            (Some(level), _) => {
                self.blocks
                    .push(Block::Heading { level: level.min(6), text: text.replace(['\n', '\t'], " ") });
            }
            // Items that follow each other are one list.
            (None, Some(Block::Paragraph(list))) if in_list && list.starts_with("- ") => {
                list.push_str("\n- ");
                list.push_str(text);
            }
            (None, _) if in_list => self.blocks.push(Block::Paragraph(format!("- {text}"))),
            (None, _) => self.blocks.push(Block::Paragraph(text.to_owned())),
        }
    }

    fn end_table(&mut self) {
        self.blocks.extend(table(std::mem::take(&mut self.table)));
    }
}
