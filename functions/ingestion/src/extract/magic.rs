//! What a file is by its bytes, where it is said to be something else.

use shared::document::ContentType;

use super::Unreadable;

/// Where files of each kind begin with something that no text begins with.
const KINDS: [(&[u8], &str); 15] = [
    (b"%PDF-", "a PDF file"),
    (b"PK\x03\x04", "a ZIP archive or an Office file"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (OLD_OFFICE, "an old or encrypted Office file"),
    (b"{\\rtf", "a Rich Text file"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x7fELF", "a program"),
];

/// A compound file (MS-CFB): what Word wrote before 2007, and what encrypted documents are packed in.
const OLD_OFFICE: &[u8] = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1";

/// The file's kind by its first bytes.
fn kind(content: &[u8]) -> Option<&'static str> {
    KINDS.iter().find(|(first, _)| content.starts_with(first)).map(|(_, kind)| *kind)
}

/// Looks at whether `content` may be what it is said to be.
///
/// # Errors
/// If it is something else.
pub(super) fn look(content: &[u8], claimed: ContentType) -> Result<(), Unreadable> {
    let not = |found: &str| {
        Err(Unreadable::NotItsType { claimed: claimed.media_type().to_owned(), found: found.to_owned() })
    };
    let blank = content.trim_ascii().is_empty();
    match claimed {
        _ if blank => Err(Unreadable::Empty),
        // Readers look for the header in the first kilobyte.
        ContentType::Pdf if find(content.get(..1024).unwrap_or(content), b"%PDF-") => Ok(()),
        ContentType::Docx if content.starts_with(b"PK\x03\x04") => Ok(()),
        ContentType::Docx
            if content.starts_with(OLD_OFFICE) && find(content, &utf_16("EncryptedPackage")) =>
        {
            Err(Unreadable::Encrypted)
        }
        ContentType::Pdf | ContentType::Docx => not(kind(content).unwrap_or("something else")),
        ContentType::Plain | ContentType::Markdown | ContentType::Html | ContentType::Csv => {
            kind(content).map_or(Ok(()), not)
        }
    }
}

/// What a ZIP archive with these names in it is.
pub(super) fn archive<'a>(mut names: impl Iterator<Item = &'a str>) -> &'static str {
    let first = names.find_map(|name| match name.split('/').next() {
        Some("xl") => Some("an Excel workbook"),
        Some("ppt") => Some("a PowerPoint presentation"),
        Some("mimetype") => Some("an OpenDocument file or an e-book"),
        _ => None,
    });
    first.unwrap_or("a ZIP archive")
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

fn utf_16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_what_it_is_said_to_be_is_told_from_one_that_is() {
        let found = |content: &[u8], claimed| match look(content, claimed) {
            Err(Unreadable::NotItsType { found, .. }) => found,
            other => format!("{other:?}"),
        };
        assert_eq!(found(b"%PDF-1.7 ...", ContentType::Plain), "a PDF file");
        assert_eq!(found(b"%PDF-1.7 ...", ContentType::Docx), "a PDF file");
        assert_eq!(found(b"\x89PNG\r\n\x1a\n", ContentType::Pdf), "a PNG image");
        assert_eq!(found(b"<p>Hello", ContentType::Pdf), "something else");
        assert_eq!(found(OLD_OFFICE, ContentType::Docx), "an old or encrypted Office file");
        assert!(look(b"junk\n%PDF-1.7", ContentType::Pdf).is_ok());
        let sealed = [OLD_OFFICE, &[0; 600], &utf_16("EncryptedPackage")].concat();
        assert_eq!(look(&sealed, ContentType::Docx), Err(Unreadable::Encrypted));
        for claimed in ContentType::ALL {
            assert_eq!(look(b" \r\n", claimed), Err(Unreadable::Empty), "{claimed:?}");
        }
    }
}
