//! Bytes to text, in whatever charset.

use std::borrow::Cow;

use chardetng::{EncodingDetector, Iso2022JpDetection, Utf8Detection};
use encoding_rs::{Encoding, ISO_2022_JP, UTF_16BE, UTF_16LE};

use super::Unreadable;

/// Of a text of unknown charset, how much is looked at to find it out, in bytes.
const SAMPLE: usize = 256 << 10;

/// A charset that can be read, by the names of the Encoding Standard.
///
/// <https://encoding.spec.whatwg.org/#names-and-labels>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Charset(&'static Encoding);

impl Charset {
    /// What a Rust string is in.
    pub(crate) const UTF_8: Self = Self(encoding_rs::UTF_8);

    /// The charset that a label names, in whatever case.
    pub(crate) fn parse(label: &str) -> Option<Self> {
        Encoding::for_label_no_replacement(label.as_bytes()).map(Self)
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        self.0.name()
    }
}

/// The text that `content` is: by its byte order mark; or else in the charset that it is said to be in; or else in
/// UTF-8, if it is that; or else in the one that it looks most like.
///
/// # Errors
/// If it is not in the charset that it is said to be in, or no text at all.
pub(super) fn of(content: &[u8], charset: Option<Charset>) -> Result<Cow<'_, str>, Unreadable> {
    if let Some(text) = utf_32(content) {
        return text.map(Cow::Owned);
    }
    if let Some((encoding, mark)) = Encoding::for_bom(content) {
        let text = strict(encoding, content.get(mark..).unwrap_or_default());
        return written(text.ok_or_else(|| Unreadable::NotItsCharset(encoding.name().to_owned()))?);
    }
    if let Some(charset) = charset {
        let text = strict(charset.0, content);
        return written(text.ok_or_else(|| Unreadable::NotItsCharset(charset.name().to_owned()))?);
    }
    // Its bytes are ASCII's, and its escapes nobody else's.
    if content.is_ascii()
        && content.windows(2).any(|escape| escape == b"\x1b$")
        && let Some(text) = strict(ISO_2022_JP, content)
    {
        return Ok(text);
    }
    if let Ok(text) = std::str::from_utf8(content) {
        return written(Cow::Borrowed(text));
    }
    if let Some(encoding) = utf_16(content) {
        return written(strict(encoding, content).ok_or_else(binary)?);
    }
    let mut detector = EncodingDetector::new(Iso2022JpDetection::Allow);
    detector.feed(content.get(..SAMPLE).unwrap_or(content), content.len() <= SAMPLE);
    let (text, _) = detector.guess(None, Utf8Detection::Allow).decode_without_bom_handling(content);
    written(text)
}

fn strict<'a>(encoding: &'static Encoding, content: &'a [u8]) -> Option<Cow<'a, str>> {
    encoding.decode_without_bom_handling_and_without_replacement(content)
}

fn binary() -> Unreadable {
    Unreadable::NotItsType { claimed: "a text".to_owned(), found: "binary data".to_owned() }
}

/// `text`, if somebody may have written it: there are control characters in it that no text has if it was made of
/// other bytes.
fn written(text: Cow<'_, str>) -> Result<Cow<'_, str>, Unreadable> {
    let strange = |c: &char| {
        (c.is_control()
            && !matches!(
                c,
                '\t' | '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1b}' | '\u{8}' | '\u{80}'..='\u{9f}' | '\u{1a}'
            ))
            || *c == '\u{fffd}'
    };
    let count = text.chars().filter(strange).count();
    if text.contains('\0') || count * 50 > text.len() { Err(binary()) } else { Ok(text) }
}

/// UTF-16 without a byte order mark: of what most scripts have in common, spaces, digits and line ends, every second
/// byte is zero.
fn utf_16(content: &[u8]) -> Option<&'static Encoding> {
    let sample = content.get(..SAMPLE).unwrap_or(content);
    let zeros = |from: usize| sample.iter().skip(from).step_by(2).filter(|byte| **byte == 0).count();
    let (even, odd) = (zeros(0), zeros(1));
    let enough = sample.len() / 20;
    match content.len() % 2 {
        0 if odd > enough && even * 20 < odd => Some(UTF_16LE),
        0 if even > enough && odd * 20 < even => Some(UTF_16BE),
        _ => None,
    }
}

/// UTF-32 with its byte order mark, which no browser reads and some programs write.
fn utf_32(content: &[u8]) -> Option<Result<String, Unreadable>> {
    let number: fn([u8; 4]) -> u32 = match content.get(..4)? {
        [0xff, 0xfe, 0, 0] => u32::from_le_bytes,
        [0, 0, 0xfe, 0xff] => u32::from_be_bytes,
        _ => return None,
    };
    let (characters, rest) = content.get(4..)?.as_chunks::<4>();
    let text: Option<String> = characters.iter().map(|bytes| char::from_u32(number(*bytes))).collect();
    Some(match text {
        Some(text) if rest.is_empty() => Ok(text),
        _ => Err(Unreadable::NotItsCharset("UTF-32".to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn charset(label: &str) -> Option<Charset> {
        Some(Charset::parse(label).unwrap())
    }

    /// All charsets of the Encoding Standard but `replacement`, which is none.
    const ALL: [&str; 39] = [
        "UTF-8",
        "IBM866",
        "ISO-8859-2",
        "ISO-8859-3",
        "ISO-8859-4",
        "ISO-8859-5",
        "ISO-8859-6",
        "ISO-8859-7",
        "ISO-8859-8",
        "ISO-8859-8-I",
        "ISO-8859-10",
        "ISO-8859-13",
        "ISO-8859-14",
        "ISO-8859-15",
        "ISO-8859-16",
        "KOI8-R",
        "KOI8-U",
        "macintosh",
        "windows-874",
        "windows-1250",
        "windows-1251",
        "windows-1252",
        "windows-1253",
        "windows-1254",
        "windows-1255",
        "windows-1256",
        "windows-1257",
        "windows-1258",
        "x-mac-cyrillic",
        "GBK",
        "gb18030",
        "Big5",
        "EUC-JP",
        "ISO-2022-JP",
        "Shift_JIS",
        "EUC-KR",
        "UTF-16BE",
        "UTF-16LE",
        "x-user-defined",
    ];

    /// Something of every script that one of them is for.
    const TEXTS: [&str; 16] = [
        "Straße 🙂",
        "Straße",
        "źdźbło",
        "договор",
        "договір",
        "Σύμβαση",
        "חוזה",
        "عقد",
        "สัญญา",
        "şartlar",
        "ŝanĝo",
        "līgums",
        "Ŵyneb ŷd",
        "契約書",
        "계약서",
        "\u{f780}\u{f7ff}",
    ];

    #[test]
    fn text_is_read_in_every_charset_that_it_is_said_to_be_in() {
        for label in ALL {
            let charset = charset(label);
            assert_eq!(charset.unwrap().name(), label);
            let mut read = 0;
            for text in TEXTS {
                let bytes = match label {
                    "UTF-16LE" => text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
                    "UTF-16BE" => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
                    _ => match charset.unwrap().0.encode(text) {
                        // It has no such letters.
                        (_, _, true) => continue,
                        (bytes, ..) => bytes.into_owned(),
                    },
                };
                assert_eq!(of(&bytes, charset).unwrap(), text, "{label}");
                read += 1;
            }
            assert!(read > 0, "{label}: none of the texts is in it");
        }
    }

    #[test]
    fn what_nobody_named_is_found_out() {
        let german =
            "Der Vertrag über die Nutzung der Räume endet mit der Übergabe der Schlüssel. ".repeat(4);
        let russian = "Договор вступает в силу с момента подписания обеими сторонами. ".repeat(4);
        let japanese = "本契約は、当事者双方が署名した日から効力を生じる。".repeat(4);
        for (label, text) in [
            ("windows-1252", &german),
            ("koi8-r", &russian),
            ("windows-1251", &russian),
            ("shift_jis", &japanese),
            ("euc-jp", &japanese),
            ("iso-2022-jp", &japanese),
            ("utf-8", &japanese),
        ] {
            let bytes = Charset::parse(label).unwrap().0.encode(text).0.into_owned();
            assert_eq!(of(&bytes, None).unwrap(), text.as_str(), "{label}");
        }
        let utf_16: Vec<u8> = german.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(of(&utf_16, None).unwrap(), german.as_str());
    }

    #[test]
    fn a_byte_order_mark_counts_more_than_what_is_said() {
        let marked = |mark: &[u8], text: Vec<u8>| [mark, &text].concat();
        let (le, be): (Vec<u8>, Vec<u8>) = (
            "Straße".encode_utf16().flat_map(u16::to_le_bytes).collect(),
            "Straße".encode_utf16().flat_map(u16::to_be_bytes).collect(),
        );
        let utf_32: Vec<u8> = "Straße".chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
        for bytes in [
            marked(b"\xef\xbb\xbf", "Straße".into()),
            marked(b"\xff\xfe", le),
            marked(b"\xfe\xff", be),
            marked(b"\xff\xfe\0\0", utf_32),
        ] {
            assert_eq!(of(&bytes, charset("latin1")).unwrap(), "Straße");
        }
    }

    #[test]
    fn what_is_no_text_is_refused() {
        assert_eq!(of(b"Stra\xdfe", charset("utf-8")), Err(Unreadable::NotItsCharset("UTF-8".to_owned())));
        let noise: Vec<u8> = (0..4_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for bytes in [&noise[..], b"a\0b", b"\xff\xfe\0\0\0\0\0\xff"] {
            assert!(of(bytes, None).is_err(), "{bytes:?}");
        }
    }
}
