//! Text out of documents, as blocks that the chunker cuts along. Pure: bytes in, blocks or a reason out. One format,
//! one file.
//!
//! Whoever has a stranger's file calls [`apart::Reader::blocks`], which has it read in a process of its own.

pub(crate) mod apart;
mod csv;
mod docx;
mod html;
mod magic;
mod markdown;
mod pdf;
mod plain;
#[cfg(test)]
mod tests;
mod text;

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use shared::chunk::Block;
use shared::document::ContentType;
use shared::error::{ApiError, Code};

pub(crate) use self::text::Charset;

/// The most text of one document, in bytes: some 20,000 passages.
const MOST_TEXT_BYTES: usize = 24 << 20;
/// The most that is unpacked of one document, in bytes. It is never held as a whole.
const MOST_UNPACKED_BYTES: u64 = 256 << 20;
/// The most pieces of one document, paragraphs and rows: what is kept of each beside its text adds up.
const MOST_PIECES: usize = 500_000;
/// The most pages of one document.
const MOST_PAGES: usize = 5_000;

/// Why no text can be had from a document. It has to do with nothing but the document: to try again would change
/// nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum Unreadable {
    /// There is nothing in it.
    #[error("the document holds no text")]
    Empty,
    /// There are pages in it, and no text: what a scanner made.
    #[error(
        "the document has pages but no text, as a scanned one has; send it with its text recognised (OCR)"
    )]
    NoText,
    /// There are letters in it, and nothing says which: what fonts of Chinese, Japanese and Korean at times leave out.
    #[error(
        "the document does not say which letters its text is of, as fonts without a map to Unicode do not; export it \
         anew with text that can be copied, or with its text recognised (OCR)"
    )]
    Unmapped,
    /// It opens with a password alone.
    #[error("the document is encrypted; send it without a password")]
    Encrypted,
    /// It is cut off, or broken beyond reading.
    #[error("the document is damaged: {0}")]
    Damaged(String),
    /// It is not what it is said to be.
    #[error("the document is said to be {claimed} and is {found}")]
    NotItsType {
        /// What it is said to be.
        claimed: String,
        /// What it is.
        found: String,
    },
    /// Its bytes are none of the charset that it is said to be in.
    #[error("the document is said to be in {0} and is not")]
    NotItsCharset(String),
    /// It has more pages than are read.
    #[error("the document has {pages} pages, more than {MOST_PAGES}")]
    TooManyPages {
        /// Its pages.
        pages: usize,
    },
    /// There is more in it than is read: it may be small, and be made to grow.
    #[error(
        "the document holds or unpacks to more than is read of one, {} MB of text and {MOST_PIECES} paragraphs or rows",
        MOST_TEXT_BYTES >> 20
    )]
    TooLarge,
    /// To read it takes too long.
    #[error("the document takes longer than {} s to read", apart::MOST_TIME.as_secs())]
    TooSlow,
}

impl Unreadable {
    fn damaged(how: &str) -> Self {
        Self::Damaged(how.to_owned())
    }
}

impl From<Unreadable> for ApiError {
    fn from(reason: Unreadable) -> Self {
        let code = match reason {
            Unreadable::NotItsType { .. } => Code::UnsupportedContentType,
            Unreadable::TooManyPages { .. } | Unreadable::TooLarge | Unreadable::TooSlow => Code::TooLarge,
            Unreadable::Empty
            | Unreadable::NoText
            | Unreadable::Unmapped
            | Unreadable::Encrypted
            | Unreadable::Damaged(_)
            | Unreadable::NotItsCharset(_) => Code::InvalidRequest,
        };
        Self::new(code, reason.to_string()).with_param("content")
    }
}

/// The labels of charsets that are read in ways of their own; the first is of none.
const FUZZED_CHARSETS: [&str; 12] = [
    "none",
    "utf-8",
    "utf-16le",
    "utf-16be",
    "windows-1252",
    "iso-2022-jp",
    "euc-jp",
    "shift_jis",
    "gb18030",
    "big5",
    "euc-kr",
    "x-user-defined",
];

/// Reads whatever it is given: what fuzzing calls. The first byte says as what type, the second in which charset, the
/// rest is the file. Nobody needs what comes out.
#[doc(hidden)]
pub fn fuzz(input: &[u8]) {
    let Some(([kind, charset], content)) = input.split_first_chunk() else { return };
    let Some(content_type) = ContentType::ALL.into_iter().cycle().nth((*kind).into()) else { return };
    let charset = FUZZED_CHARSETS.into_iter().cycle().nth((*charset).into()).and_then(Charset::parse);
    if let Ok(blocks) = blocks(content.to_vec(), content_type, charset) {
        assert!(!blocks.is_empty(), "a document without a block is an error");
    }
}

/// The blocks of a document, in reading order: at least one.
///
/// # Errors
/// If nothing can be made of the content.
fn blocks(
    content: Vec<u8>,
    content_type: ContentType,
    charset: Option<Charset>,
) -> Result<Vec<Block>, Unreadable> {
    magic::look(&content, content_type)?;
    let blocks = match content_type {
        ContentType::Plain => plain::blocks(&text(&content, charset)?)?,
        ContentType::Markdown => markdown::blocks(&text(&content, charset)?),
        ContentType::Csv => csv::blocks(&text(&content, charset)?)?,
        ContentType::Html => {
            let charset = charset.or_else(|| html::charset(&content));
            html::blocks(&text(&content, charset)?)
        }
        ContentType::Pdf => pdf::blocks(content)?,
        ContentType::Docx => docx::blocks(&content)?,
    };
    let pieces: usize = blocks.iter().map(pieces).sum();
    if pieces > MOST_PIECES {
        return Err(Unreadable::TooLarge);
    }
    if blocks.is_empty() { Err(Unreadable::Empty) } else { Ok(blocks) }
}

/// The text that `content` is, before anything is made of it.
fn text(content: &[u8], charset: Option<Charset>) -> Result<Cow<'_, str>, Unreadable> {
    let text = text::of(content, charset)?;
    if text.len() > MOST_TEXT_BYTES { Err(Unreadable::TooLarge) } else { Ok(text) }
}

fn pieces(block: &Block) -> usize {
    match block {
        Block::Heading { .. } | Block::Paragraph(_) | Block::Whole(_) => 1,
        Block::Table { rows, .. } => 1 + rows.len(),
    }
}
