//! Cutting a document into passages.
//!
//! Along its structure: a passage does not cross into another section unless both are short, never
//! splits a table or a listing that fits, and splits text between sentences. Sizes are in estimated
//! tokens. Pure: the same document gives the same passages with the same ids.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use unicode_segmentation::UnicodeSegmentation;

use crate::ids::DocumentId;
use crate::units::Tokens;

/// A passage is closed once it holds this many tokens.
const TARGET: Tokens = Tokens(350);
/// No passage holds more than this, and a table up to this is kept whole.
const MOST: Tokens = Tokens(500);
/// The same in bytes: a token is estimated at three.
const MOST_BYTES: usize = MOST.0 as usize * 3;
/// A section that starts when the passage holds less than this continues it.
const SHORT: Tokens = Tokens(80);
/// How much of a passage's end is repeated at the start of the next one of the same section.
const OVERLAP: Tokens = Tokens(50);

/// A piece of a document's structure, in reading order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Block {
    /// A heading; 1 is the highest level.
    Heading {
        /// Its level.
        level: u8,
        /// Its text.
        text: String,
    },
    /// Running text.
    Paragraph(String),
    /// A listing: kept whole where it fits, and cut between lines where it does not.
    Whole(String),
    /// A table: kept whole where it fits; where it does not, cut between rows, each part with the columns' names.
    Table {
        /// The row that names the columns.
        header: String,
        /// The rows under it, one line each.
        rows: Vec<String>,
    },
}

/// A passage of a document: what is searched, shown and cited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// `<document>:<hash of its text>`, so that it stays the same while its text does, whatever
    /// changes elsewhere in the document. A text that occurs again gets `-2`, `-3` and so on.
    pub id: String,
    /// Its place in the document, from 0.
    pub index: u32,
    /// The headings above its start, outermost first, joined by ` > `.
    pub heading: String,
    /// Its text.
    pub text: String,
}

/// Cuts a document into passages.
pub fn chunk(document: &DocumentId, blocks: &[Block]) -> Vec<Chunk> {
    let mut cutter = Cutter::default();
    for block in blocks {
        match block {
            Block::Heading { level, text } => cutter.heading(*level, text),
            Block::Paragraph(text) => cutter.add(text, "\n\n", sentences),
            Block::Whole(text) => cutter.add(text, "\n\n", lines),
            Block::Table { header, rows } => cutter.table(header, rows),
        }
    }
    cutter.close();
    number(document, cutter.done)
}

#[derive(Default)]
struct Cutter {
    done: Vec<(String, String)>,
    headings: Vec<(u8, String)>,
    /// The headings above the open passage's start.
    heading: String,
    open: String,
    /// Whether the open passage holds more than headings and the end of the one before.
    has_own: bool,
}

impl Cutter {
    fn heading(&mut self, level: u8, text: &str) {
        if Tokens::estimate(&self.open) >= SHORT {
            self.close();
        }
        self.headings.retain(|(above, _)| *above < level);
        self.headings.push((level, text.trim().to_owned()));
        self.append(text.trim(), "\n\n");
        // A heading alone is no passage, but is one's beginning.
        self.has_own = self.has_own || self.headings.is_empty();
    }

    /// Adds `text`, which follows what is there after `glue`; `cut` splits it where it does not fit.
    fn add(&mut self, text: &str, glue: &str, cut: fn(&str) -> Vec<&str>) {
        let text = text.trim();
        if text.is_empty() {
            return;
        }
        let together = Tokens::estimate(&self.open) + Tokens::estimate(text);
        if self.has_own && (together > MOST || Tokens::estimate(&self.open) >= TARGET) {
            self.close_and_overlap();
        }
        if Tokens::estimate(&self.open) + Tokens::estimate(text) <= MOST {
            self.append(text, glue);
            self.has_own = true;
            return;
        }
        let mut glue = glue;
        for piece in cut(text).into_iter().flat_map(fitting) {
            if self.has_own && Tokens::estimate(&self.open) + Tokens::estimate(piece) > MOST {
                self.close_and_overlap();
            }
            self.append(piece, glue);
            self.has_own = true;
            glue = "";
        }
    }

    /// Adds a table.
    fn table(&mut self, header: &str, rows: &[String]) {
        let bytes = header.len() + rows.iter().map(|row| row.len() + 1).sum::<usize>();
        if bytes <= MOST_BYTES {
            let whole = std::iter::once(header).chain(rows.iter().map(String::as_str)).collect::<Vec<_>>();
            return self.add(&whole.join("\n"), "\n\n", lines);
        }
        if self.has_own {
            self.close();
        }
        // One that leaves no room for rows is a row itself.
        let (header, first) =
            if header.len() <= MOST_BYTES / 2 { (header, None) } else { ("", Some(header)) };
        self.append(header, "\n\n");
        for row in first.into_iter().chain(rows.iter().map(String::as_str)) {
            let mut glue = "\n";
            for piece in fitting(row) {
                if self.has_own && Tokens::estimate(&self.open) + Tokens::estimate(piece) > MOST {
                    self.close();
                    self.append(header, "");
                    glue = "\n";
                }
                self.append(piece, glue);
                self.has_own = true;
                glue = "";
            }
        }
    }

    fn append(&mut self, text: &str, glue: &str) {
        if self.open.is_empty() {
            let path: Vec<&str> = self.headings.iter().map(|(_, text)| text.as_str()).collect();
            self.heading = path.join(" > ");
        } else {
            self.open.push_str(glue);
        }
        self.open.push_str(text);
    }

    fn close(&mut self) {
        let text = std::mem::take(&mut self.open);
        if self.has_own {
            self.done.push((std::mem::take(&mut self.heading), text.trim().to_owned()));
        } else if !text.trim().is_empty() {
            // Headings with nothing under them: they lead the next passage.
            self.open = text;
        }
        self.has_own = false;
    }

    fn close_and_overlap(&mut self) {
        let tail = tail(&self.open).to_owned();
        self.close();
        if !tail.trim().is_empty() {
            self.append(tail.trim_start(), "");
            self.open.push(' ');
        }
    }
}

fn lines(text: &str) -> Vec<&str> {
    text.split_inclusive('\n').collect()
}

/// The sentences of `text`, each with the white space after it (Unicode Standard Annex 29).
fn sentences(text: &str) -> Vec<&str> {
    text.split_sentence_bounds().collect()
}

/// `piece` itself, or, if no passage could hold it, its parts, cut between words or, where there are
/// none, anywhere between characters.
fn fitting(piece: &str) -> Vec<&str> {
    // Half leaves room for an overlap, or a table's header.
    const MOST_PIECE: usize = MOST_BYTES / 2;
    let mut parts = Vec::new();
    let mut rest = piece;
    while rest.len() > MOST_PIECE {
        let mut at = rest.floor_char_boundary(MOST_PIECE);
        if let Some((head, _)) = rest.split_at_checked(at)
            && let Some(space) = head.rfind(char::is_whitespace)
            && space > 0
        {
            at = rest.ceil_char_boundary(space + 1);
        }
        let Some((head, tail)) = rest.split_at_checked(at) else { break };
        parts.push(head);
        rest = tail;
    }
    parts.push(rest);
    parts
}

/// The last whole sentences of `text` that the next passage repeats; empty if even one is too long.
fn tail(text: &str) -> &str {
    let mut start = text.len();
    for (at, sentence) in text.split_sentence_bound_indices().collect::<Vec<_>>().into_iter().rev() {
        let longer = text.get(at..).unwrap_or_default();
        if sentence.trim().is_empty() {
            continue;
        }
        if Tokens::estimate(longer) > OVERLAP {
            break;
        }
        start = at;
    }
    text.get(start..).unwrap_or_default()
}

fn number(document: &DocumentId, texts: Vec<(String, String)>) -> Vec<Chunk> {
    let mut seen: HashMap<String, u32> = HashMap::new();
    (0..)
        .zip(texts)
        .map(|(index, (heading, text))| {
            let mut digest = hex::encode(Sha256::digest(text.as_bytes()));
            digest.truncate(16);
            let times = seen.entry(digest.clone()).or_default();
            *times += 1;
            let again = if *times > 1 { format!("-{times}") } else { String::new() };
            Chunk { id: format!("{document}:{digest}{again}"), index, heading, text }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn document() -> DocumentId {
        "d".parse().unwrap()
    }

    fn paragraph(words: usize) -> Block {
        let text = (0..words).map(|i| format!("Sentence number {i} says it.")).collect::<Vec<_>>().join(" ");
        Block::Paragraph(text)
    }

    fn heading(level: u8, text: &str) -> Block {
        Block::Heading { level, text: text.into() }
    }

    #[test]
    fn a_long_section_is_cut_between_sentences_and_overlaps() {
        let chunks = chunk(&document(), &[heading(1, "Title"), heading(2, "Part"), paragraph(200)]);
        assert!(chunks.len() > 2);
        assert!(chunks[0].text.starts_with("Title\n\nPart\n\nSentence number 0"));
        assert!(chunks.iter().all(|c| c.heading == "Title > Part" || c.heading == "Title"));
        for pair in chunks.windows(2) {
            assert!(pair[0].text.ends_with("says it."), "{:?}", pair[0].text);
            let first = pair[1].text.split_inclusive('.').next().unwrap();
            assert!(pair[0].text.contains(first), "{first:?} is repeated");
        }
    }

    #[test]
    fn short_sections_stay_together_and_long_ones_do_not() {
        let short = [
            heading(1, "A"),
            Block::Paragraph("One.".into()),
            heading(1, "B"),
            Block::Paragraph("Two.".into()),
        ];
        assert_eq!(chunk(&document(), &short).len(), 1);
        let long = [heading(1, "A"), paragraph(20), heading(1, "B"), paragraph(20)];
        let chunks = chunk(&document(), &long);
        assert_eq!(chunks.iter().map(|c| c.heading.as_str()).collect::<Vec<_>>(), ["A", "B"]);
    }

    #[test]
    fn a_table_that_fits_is_kept_whole() {
        let table = "| a | b |\n".repeat(60);
        let chunks = chunk(&document(), &[paragraph(40), Block::Whole(table.clone())]);
        assert!(chunks.iter().any(|c| c.text.contains(table.trim())));
    }

    #[test]
    fn a_table_that_does_not_fit_names_its_columns_in_every_part() {
        let rows: Vec<String> = (0..300).map(|n| format!("| tier {n} | {} |", n * 7)).collect();
        let header = "| Tier | Days |".to_owned();
        let chunks = chunk(
            &document(),
            &[heading(1, "Leave"), paragraph(5), Block::Table { header: header.clone(), rows: rows.clone() }],
        );
        let parts: Vec<&Chunk> = chunks.iter().filter(|c| c.text.contains("| tier")).collect();
        assert!(parts.len() > 3);
        for part in &parts {
            assert!(part.text.starts_with(&header), "{}", part.text);
            assert_eq!(part.heading, "Leave");
        }
        let all: Vec<&str> =
            parts.iter().flat_map(|c| c.text.lines()).filter(|line| line.starts_with("| tier")).collect();
        assert_eq!(all, rows);
        // A row that changes changes its passage, and no other.
        let mut changed = rows.clone();
        changed[150] = "| tier 150 | 9999 |".to_owned();
        let blocks = [heading(1, "Leave"), paragraph(5), Block::Table { header, rows: changed }];
        let after = chunk(&document(), &blocks);
        assert_eq!(after.iter().filter(|c| !chunks.iter().any(|d| d.id == c.id)).count(), 1);
    }

    #[test]
    fn ids_stay_while_the_text_does() {
        let before = chunk(&document(), &[heading(1, "A"), paragraph(30), heading(1, "B"), paragraph(40)]);
        let after = chunk(&document(), &[heading(1, "New"), paragraph(25), heading(1, "B"), paragraph(40)]);
        assert_ne!(before[0].id, after[0].id);
        assert!(before[1..].iter().all(|c| after.iter().any(|d| d.id == c.id)));
        let twice = chunk(&document(), &[heading(1, "A"), paragraph(30), heading(1, "A"), paragraph(30)]);
        assert_eq!(twice[1].id, format!("{}-2", twice[0].id));
    }

    #[test]
    fn nothing_gives_nothing() {
        assert!(chunk(&document(), &[]).is_empty());
        assert!(chunk(&document(), &[Block::Paragraph(" \n ".into())]).is_empty());
    }

    proptest! {
        #[test]
        fn every_word_is_in_a_passage_of_bounded_size(
            blocks in prop::collection::vec((0u8..4, "\\PC{0,400}|[a-z .\n]{0,4000}"), 0..12)
        ) {
            let blocks: Vec<Block> = blocks.into_iter().map(|(kind, text)| match kind {
                0 => Block::Heading { level: 1, text: text.chars().take(40).collect() },
                1 => Block::Paragraph(text),
                2 => Block::Whole(text),
                _ => {
                    let mut rows: Vec<String> = text.lines().map(str::to_owned).collect();
                    Block::Table { header: rows.pop().unwrap_or_default(), rows }
                }
            }).collect();
            let chunks = chunk(&document(), &blocks);
            let all: String = chunks.iter().map(|c| c.text.as_str()).collect::<Vec<_>>().join("\n");
            for block in &blocks {
                let texts = match block {
                    Block::Heading { .. } => Vec::new(),
                    Block::Paragraph(text) | Block::Whole(text) => vec![text],
                    Block::Table { header, rows } => std::iter::once(header).chain(rows).collect(),
                };
                for text in texts {
                    for word in text.split_whitespace().filter(|w| w.len() < 700) {
                        prop_assert!(all.contains(word), "{word:?} is missing");
                    }
                }
            }
            for c in &chunks {
                prop_assert!(!c.text.trim().is_empty());
                prop_assert!(Tokens::estimate(&c.text) <= Tokens(MOST.0 * 2), "{} bytes", c.text.len());
            }
        }
    }
}
