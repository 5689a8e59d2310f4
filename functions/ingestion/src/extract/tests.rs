//! The formats together, on files that Debian's tools have made of one text (`tests/samples`), and on what becomes of
//! those when they are spoilt.

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use shared::chunk::Block;

use super::*;

const DOCX: &[u8] = include_bytes!("../../../../tests/samples/handbook.docx");
const PDF: &[u8] = include_bytes!("../../../../tests/samples/ghostscript.pdf");
const STREAMS: &[u8] = include_bytes!("../../../../tests/samples/object-streams.pdf");
const ENCRYPTED: &[u8] = include_bytes!("../../../../tests/samples/encrypted.pdf");
const OWNER_LOCKED: &[u8] = include_bytes!("../../../../tests/samples/owner-locked.pdf");
const HTML: &[u8] = include_bytes!("../../../../tests/samples/handbook.html");
const MARKDOWN: &[u8] = include_bytes!("../../../../tests/samples/handbook.md");
const CSV: &[u8] = include_bytes!("../../../../tests/samples/allowances.csv");

const SAMPLES: [(&[u8], ContentType); 8] = [
    (DOCX, ContentType::Docx),
    (PDF, ContentType::Pdf),
    (STREAMS, ContentType::Pdf),
    (OWNER_LOCKED, ContentType::Pdf),
    (HTML, ContentType::Html),
    (MARKDOWN, ContentType::Markdown),
    (MARKDOWN, ContentType::Plain),
    (CSV, ContentType::Csv),
];

fn read(content: &[u8], content_type: ContentType) -> Result<Vec<Block>, Unreadable> {
    blocks(content.to_vec(), content_type, None)
}

fn all_text(blocks: &[Block]) -> String {
    let text = |block: &Block| match block {
        Block::Heading { text, .. } | Block::Paragraph(text) | Block::Whole(text) => text.clone(),
        Block::Table { header, rows } => format!("{header}\n{}", rows.join("\n")),
    };
    blocks.iter().map(text).collect::<Vec<_>>().join("\n\n")
}

#[test]
fn every_format_says_the_same() {
    for (content, content_type) in SAMPLES {
        let blocks = read(content, content_type).unwrap();
        let text = all_text(&blocks);
        if std::env::var_os("SHOW").is_some() {
            println!("==== {content_type:?}\n{blocks:#?}");
        }
        for wanted in ["Norway", "180 euros", "31 euros"] {
            assert!(text.contains(wanted), "{content_type:?}: {wanted:?} is not in {text}");
        }
        if content_type == ContentType::Csv {
            continue;
        }
        let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for wanted in [
            "Every employee has 25 days of paid annual leave.",
            // Which a typesetter writes with a ligature.
            "An efficient offline workflow",
            "receipts are handed in within ten days",
            "A new key costs 35 euros.",
        ] {
            assert!(flat.contains(wanted), "{content_type:?}: {wanted:?} is not in {flat}");
        }
        if content_type != ContentType::Plain {
            for heading in ["Staff handbook", "Annual leave", "Travel", "Keys"] {
                let found = |block: &Block| matches!(block, Block::Heading { text, .. } if text == heading);
                assert!(
                    blocks.iter().any(found),
                    "{content_type:?}: {heading:?} is no heading in {blocks:?}"
                );
            }
        }
        if !matches!(content_type, ContentType::Plain | ContentType::Pdf) {
            let table = |block: &Block| {
                matches!(block, Block::Table { header, rows } if rows.len() == 3
                    && *header == "| Country | Daily allowance | Hotel limit |")
            };
            assert!(blocks.iter().any(table), "{content_type:?}: no table in {blocks:?}");
            assert!(flat.contains("Zofia Źdźbłowska"), "{content_type:?}");
        }
    }
}

#[test]
fn what_cannot_be_read_says_why() {
    assert_eq!(read(ENCRYPTED, ContentType::Pdf), Err(Unreadable::Encrypted));
    for (content, content_type) in [(PDF, ContentType::Pdf), (DOCX, ContentType::Docx)] {
        for part in [2, 3, 10] {
            let cut = &content[..content.len() - content.len() / part];
            assert!(
                matches!(read(cut, content_type), Err(Unreadable::Damaged(_))),
                "{content_type:?} {part}"
            );
        }
    }
    let not = |content: &[u8], claimed| match read(content, claimed) {
        Err(Unreadable::NotItsType { claimed, found }) => (claimed, found),
        other => panic!("{other:?}"),
    };
    assert_eq!(not(DOCX, ContentType::Plain).1, "a ZIP archive or an Office file");
    assert_eq!(not(PDF, ContentType::Docx).1, "a PDF file");
    assert_eq!(not(MARKDOWN, ContentType::Docx).1, "something else");
    assert_eq!(not(DOCX, ContentType::Pdf).0, "application/pdf");
    let sheet = zip(&[("xl/workbook.xml", b"<x/>")]);
    assert_eq!(not(&sheet, ContentType::Docx).1, "an Excel workbook");
    for (content, content_type) in SAMPLES {
        assert_eq!(read(b"", content_type), Err(Unreadable::Empty));
        assert!(
            read(&content[..1], content_type).is_err()
                || content_type == ContentType::Markdown
                || content_type == ContentType::Plain
                || content_type == ContentType::Html
                || content_type == ContentType::Csv
        );
    }
    assert_eq!(read(&pdf(&[""]), ContentType::Pdf), Err(Unreadable::NoText));
}

#[test]
fn what_unpacks_to_more_than_is_read_is_left_there() {
    let head = "<w:document xmlns:w='w'><w:body><w:p><w:r><w:t>";
    // Text without end, and markup without text.
    let text = [head.as_bytes(), &vec![b'a'; MOST_TEXT_BYTES + 1_000]].concat();
    let bomb = zip(&[("word/document.xml", &text)]);
    assert!(bomb.len() < 100_000);
    assert_eq!(read(&bomb, ContentType::Docx), Err(Unreadable::TooLarge));
    // Text alone, in whatever format; rows that grow by their frame; and more pieces than are kept.
    let line = b"A line of a text that is far too long to be read.\n\n";
    let long = line.repeat(MOST_TEXT_BYTES / line.len() + 1);
    for content_type in [ContentType::Plain, ContentType::Markdown, ContentType::Html, ContentType::Csv] {
        assert_eq!(read(&long, content_type), Err(Unreadable::TooLarge), "{content_type:?}");
    }
    let wide = [b"1,".repeat(MOST_TEXT_BYTES / 4), b"\n".to_vec()].concat();
    assert_eq!(read(&wide, ContentType::Csv), Err(Unreadable::TooLarge));
    for (piece, content_type) in [(&b"a\n\n"[..], ContentType::Plain), (b"1\n", ContentType::Csv)] {
        let (fits, more) = (piece.repeat(MOST_PIECES - 1), piece.repeat(MOST_PIECES + 2));
        assert!(read(&fits, content_type).is_ok(), "{content_type:?}");
        assert_eq!(read(&more, content_type), Err(Unreadable::TooLarge), "{content_type:?}");
    }
    let pages = vec!["BT /F1 12 Tf 72 700 Td (A page.) Tj ET"; MOST_PAGES + 1];
    assert_eq!(read(&pdf(&pages), ContentType::Pdf), Err(Unreadable::TooManyPages { pages: MOST_PAGES + 1 }));
    // As many as are read.
    assert!(read(&pdf(&pages[..MOST_PAGES / 5]), ContentType::Pdf).is_ok());
}

#[test]
fn a_page_is_put_together_from_where_its_letters_stand() {
    let page = "BT /F1 24 Tf 72 750 Td (Leave) Tj ET \
        BT /F1 12 Tf 72 700 Td 14 TL (Every employee has twenty-five days of ho-) Tj T* (liday a year, which is a) Tj \
        T* [(W) 80 (ord) -400 (spaced.)] TJ ET \
        BT /F1 12 Tf 1 0 0 1 72 600 Tm (Another) Tj 60 0 Td (paragraph.) Tj ET";
    assert_eq!(
        read(&pdf(&[page]), ContentType::Pdf).unwrap(),
        [
            Block::Heading { level: 1, text: "Leave".into() },
            Block::Paragraph(
                "Every employee has twenty-five days of holiday a year, which is a Word spaced.".into()
            ),
            Block::Paragraph("Another paragraph.".into()),
        ]
    );
}

/// Spoils the samples in every way that a file gets spoilt. The seed is printed; `SEED` and `ROUNDS` choose others.
#[test]
fn whatever_becomes_of_a_file_it_is_read_or_refused() {
    #[expect(clippy::disallowed_methods, reason = "how long a test goes on")]
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("SEED").unwrap_or(20_261_129);
    let rounds = number("ROUNDS").unwrap_or(60);
    println!("SEED={seed} ROUNDS={rounds}");
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..rounds {
        for (content, content_type) in SAMPLES {
            let mut spoilt = content.to_vec();
            for _ in 0..random.random_range(1..6) {
                spoil(&mut spoilt, &mut random);
            }
            if content_type == ContentType::Docx && random.random_bool(0.8) {
                // Within the archive, or hardly anything gets as far as the XML.
                let mut body = unzipped(content, "word/document.xml");
                spoil(&mut body, &mut random);
                spoilt = zip(&[
                    ("word/document.xml", &body),
                    ("word/styles.xml", &unzipped(content, "word/styles.xml")),
                ]);
            }
            let kind = ContentType::ALL.iter().position(|kind| *kind == content_type).unwrap();
            let charset = random.random_range(0..FUZZED_CHARSETS.len());
            spoilt.splice(..0, [kind as u8, charset as u8]);
            let read = std::panic::catch_unwind(|| fuzz(&spoilt));
            let what =
                format!("SEED={seed}, round {round}: {content_type:?} in {}", FUZZED_CHARSETS[charset]);
            assert!(read.is_ok(), "{what} brings its reader down");
        }
    }
}

fn spoil(content: &mut Vec<u8>, random: &mut impl Rng) {
    if content.is_empty() {
        return;
    }
    let length = content.len();
    let at = random.random_range(0..length);
    let end = random.random_range(at..length.min(at + 200));
    match random.random_range(0..7) {
        0 => content[at] ^= 1 << random.random_range(0..8),
        1 => content[at] = random.random(),
        2 => content.truncate(at),
        3 => drop(content.drain(at..end)),
        4 => {
            let again = content[at..end].to_vec();
            content.splice(at..at, again.repeat(random.random_range(1..20)));
        }
        5 => content[at..end].fill(random.random()),
        // A number that says how long, how deep or where.
        _ => {
            if let Some(digit) = content[at..].iter().position(u8::is_ascii_digit) {
                content.splice(at + digit..=at + digit, *b"99999999");
            }
        }
    }
}

/// A PDF file with these drawings as its pages, in a font that it does not hold.
fn pdf(pages: &[&str]) -> Vec<u8> {
    let mut file = b"%PDF-1.4\n".to_vec();
    let mut places = Vec::new();
    let mut object = |file: &mut Vec<u8>, text: String| {
        places.push(file.len());
        file.extend(format!("{} 0 obj\n{text}\nendobj\n", places.len()).bytes());
    };
    object(&mut file, "<< /Type /Catalog /Pages 2 0 R >>".to_owned());
    let kids: String = (0..pages.len()).map(|n| format!("{} 0 R ", 4 + 2 * n)).collect();
    object(&mut file, format!("<< /Type /Pages /Kids [{kids}] /Count {} >>", pages.len()));
    object(&mut file, "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>".to_owned());
    for (n, page) in pages.iter().enumerate() {
        let contents = 5 + 2 * n;
        let resources = "/MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>";
        object(&mut file, format!("<< /Type /Page /Parent 2 0 R {resources} /Contents {contents} 0 R >>"));
        object(&mut file, format!("<< /Length {} >>\nstream\n{page}\nendstream", page.len()));
    }
    let table = file.len();
    file.extend(format!("xref\n0 {}\n0000000000 65535 f \n", places.len() + 1).bytes());
    for place in &places {
        file.extend(format!("{place:010} 00000 n \n").bytes());
    }
    file.extend(
        format!("trailer\n<< /Size {} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n", places.len() + 1).bytes(),
    );
    file
}

/// A ZIP archive of these files.
fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut output = Vec::new();
    let mut archive = rawzip::ZipArchiveWriter::new(&mut output);
    for (name, content) in files {
        let file = archive.new_file(name).compression_method(rawzip::CompressionMethod::DEFLATE);
        let (mut entry, config) = file.start().unwrap();
        let encoder = flate2::write::DeflateEncoder::new(&mut entry, flate2::Compression::default());
        let mut writer = config.wrap(encoder);
        std::io::Write::write_all(&mut writer, content).unwrap();
        let (encoder, descriptor) = writer.finish().unwrap();
        encoder.finish().unwrap();
        entry.finish(descriptor).unwrap();
    }
    archive.finish().unwrap();
    output
}

fn unzipped(archive: &[u8], name: &str) -> Vec<u8> {
    let archive = rawzip::ZipArchive::from_slice(archive).unwrap();
    let mut entries = archive.entries();
    while let Some(entry) = entries.next_entry().unwrap() {
        if entry.file_path().as_ref() == name.as_bytes() {
            let entry = archive.get_entry(entry.wayfinder()).unwrap();
            let mut content = Vec::new();
            let mut reader = flate2::bufread::DeflateDecoder::new(entry.data());
            std::io::Read::read_to_end(&mut reader, &mut content).unwrap();
            return content;
        }
    }
    panic!("{name} is not there");
}
