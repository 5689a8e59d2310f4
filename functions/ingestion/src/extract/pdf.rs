//! PDF: the glyphs of its pages by `hayro`, put together to lines and paragraphs here.
//!
//! A page says where each glyph stands and nothing of words: they are told by the gaps, lines by the steps down, and
//! headings by the size and weight of their letters.

use std::sync::Arc;

use hayro_font::hayro_cmap::BfString;
use hayro_font::hayro_syntax::content::TypedIter;
use hayro_font::hayro_syntax::content::ops::TypedInstruction;
use hayro_font::hayro_syntax::object::dict::keys::{BASE_FONT, CONTENTS, MATRIX, RESOURCES, SUBTYPE};
use hayro_font::hayro_syntax::object::{Array, Dict, Name, Number, Object, Stream};
use hayro_font::hayro_syntax::page::{Page, Resources};
use hayro_font::hayro_syntax::{LoadPdfError, Pdf};
use hayro_font::kurbo::{Affine, Point, Vec2};
use hayro_font::{CMapResolverFn, Font, FontCache, FontGlyph, FontResolverFn, StandardFont, UNITS_PER_EM};
use shared::chunk::Block;

use super::{MOST_PAGES, MOST_TEXT_BYTES, MOST_UNPACKED_BYTES, Unreadable};

/// A file ends with this; the end of one that was cut off does not.
const END: &[u8] = b"%%EOF";
/// Where the end is looked for, from the file's last byte: some programs write something after it.
const TAIL: usize = 4 << 10;
/// How deep forms may be drawn within forms.
const MOST_DEPTH: u32 = 12;
/// How many sizes of letters are told apart.
const MOST_SIZES: usize = 1_000;
/// How often graphics states may be saved within each other.
const MOST_STATES: usize = 256;

pub(super) fn blocks(content: Vec<u8>) -> Result<Vec<Block>, Unreadable> {
    let tail = content.get(content.len().saturating_sub(TAIL)..).unwrap_or_default();
    if !tail.windows(END.len()).any(|window| window == END) {
        return Err(Unreadable::damaged("it is cut off before its end"));
    }
    let pdf = Pdf::new(content).map_err(|error| match error {
        LoadPdfError::Decryption(_) => Unreadable::Encrypted,
        LoadPdfError::Invalid => Unreadable::damaged("its pages are not found"),
    })?;
    let pages = pdf.pages();
    match pages.len() {
        0 => return Err(Unreadable::damaged("it has no pages")),
        1..=MOST_PAGES => {}
        pages => return Err(Unreadable::TooManyPages { pages }),
    }
    let mut reader = Reader::new();
    for page in pages.iter() {
        reader.page(page)?;
    }
    let unmapped = reader.unmapped;
    let blocks = headed(reader.layout.paragraphs);
    match blocks.is_empty() {
        true if unmapped => Err(Unreadable::Unmapped),
        true => Err(Unreadable::NoText),
        false => Ok(blocks),
    }
}

/// What is drawn with, until something else is said.
#[derive(Clone)]
struct State<'a> {
    /// From the drawing to the page.
    matrix: Affine,
    font: Option<Font<'a>>,
    bold: bool,
    size: f64,
    character_spacing: f64,
    word_spacing: f64,
    /// 1 for letters as wide as they are.
    scaling: f64,
    leading: f64,
    rise: f64,
}

struct Reader<'a> {
    fonts: FontCache<'a>,
    programs: FontResolverFn,
    maps: CMapResolverFn,
    /// How much may still be unpacked, in bytes.
    left: u64,
    /// Whether there were glyphs of which nobody says what they are.
    unmapped: bool,
    layout: Layout,
}

impl<'a> Reader<'a> {
    fn new() -> Self {
        // No glyph is drawn, so any font will do for one that a file names and does not hold.
        let any = StandardFont::Helvetica.get_font_data();
        Self {
            fonts: FontCache::new(),
            programs: Arc::new(move |_| Some(any.clone())),
            maps: Arc::new(|_| None),
            left: MOST_UNPACKED_BYTES,
            unmapped: false,
            layout: Layout::default(),
        }
    }

    fn page(&mut self, page: &Page<'a>) -> Result<(), Unreadable> {
        // Not by the page itself, which would keep what it has unpacked.
        let mut content = Vec::new();
        let dict = page.raw();
        if let Some(stream) = dict.get::<Stream<'a>>(CONTENTS) {
            self.unpack(&stream, &mut content)?;
        } else if let Some(streams) = dict.get::<Array<'a>>(CONTENTS) {
            for stream in streams.iter::<Stream<'a>>() {
                self.unpack(&stream, &mut content)?;
                content.push(b' ');
            }
        }
        let state = State {
            matrix: Affine::IDENTITY,
            font: None,
            bold: false,
            size: 1.0,
            character_spacing: 0.0,
            word_spacing: 0.0,
            scaling: 1.0,
            leading: 0.0,
            rise: 0.0,
        };
        self.draw(&content, page.resources(), state, 0)?;
        self.layout.end_paragraph();
        Ok(())
    }

    /// Appends what `stream` holds; nothing, if it does not unpack.
    fn unpack(&mut self, stream: &Stream<'a>, content: &mut Vec<u8>) -> Result<(), Unreadable> {
        let Ok(data) = stream.decoded_data() else { return Ok(()) };
        self.left = self.left.checked_sub(data.len() as u64).ok_or(Unreadable::TooLarge)?;
        content.extend_from_slice(&data);
        Ok(())
    }

    /// Goes through a page's or a form's drawing.
    fn draw(
        &mut self,
        content: &[u8],
        resources: &Resources<'a>,
        mut state: State<'a>,
        depth: u32,
    ) -> Result<(), Unreadable> {
        let mut saved: Vec<State<'a>> = Vec::new();
        let (mut text, mut line) = (Affine::IDENTITY, Affine::IDENTITY);
        let mut drawing = TypedIter::new(content);
        while let Some(instruction) = drawing.next() {
            match instruction {
                TypedInstruction::SaveState(_) if saved.len() < MOST_STATES => saved.push(state.clone()),
                TypedInstruction::RestoreState(_) => state = saved.pop().unwrap_or(state),
                TypedInstruction::Transform(m) => {
                    state.matrix *= matrix([&m.0, &m.1, &m.2, &m.3, &m.4, &m.5]);
                }
                TypedInstruction::BeginText(_) => (text, line) = (Affine::IDENTITY, Affine::IDENTITY),
                TypedInstruction::TextFont(font) => {
                    let dict = resources.get_font(font.0);
                    state.bold = dict.as_ref().is_some_and(is_bold);
                    state.font = dict.and_then(|dict| self.fonts.font(&dict, &self.programs, &self.maps));
                    state.size = font.1.as_f64();
                }
                TypedInstruction::CharacterSpacing(n) => state.character_spacing = n.0.as_f64(),
                TypedInstruction::WordSpacing(n) => state.word_spacing = n.0.as_f64(),
                TypedInstruction::HorizontalScaling(n) => state.scaling = n.0.as_f64() / 100.0,
                TypedInstruction::TextLeading(n) => state.leading = n.0.as_f64(),
                TypedInstruction::TextRise(n) => state.rise = n.0.as_f64(),
                TypedInstruction::SetTextMatrix(m) => {
                    line = matrix([&m.0, &m.1, &m.2, &m.3, &m.4, &m.5]);
                    text = line;
                }
                TypedInstruction::NextLine(by) => {
                    line *= Affine::translate((by.0.as_f64(), by.1.as_f64()));
                    text = line;
                }
                TypedInstruction::NextLineAndSetLeading(by) => {
                    state.leading = -by.1.as_f64();
                    line *= Affine::translate((by.0.as_f64(), by.1.as_f64()));
                    text = line;
                }
                TypedInstruction::NextLineUsingLeading(_) => {
                    line *= Affine::translate((0.0, -state.leading));
                    text = line;
                }
                TypedInstruction::ShowText(shown) => self.show(shown.0.as_bytes(), &state, &mut text)?,
                TypedInstruction::NextLineAndShowText(shown) => {
                    line *= Affine::translate((0.0, -state.leading));
                    text = line;
                    self.show(shown.0.as_bytes(), &state, &mut text)?;
                }
                TypedInstruction::ShowTextWithParameters(shown) => {
                    state.word_spacing = shown.0.as_f64();
                    state.character_spacing = shown.1.as_f64();
                    line *= Affine::translate((0.0, -state.leading));
                    text = line;
                    self.show(shown.2.as_bytes(), &state, &mut text)?;
                }
                TypedInstruction::ShowTexts(shown) => {
                    for part in shown.0.iter::<Object<'_>>() {
                        match part {
                            Object::String(shown) => self.show(shown.as_bytes(), &state, &mut text)?,
                            Object::Number(back) => {
                                let by = -back.as_f64() / 1000.0 * state.size;
                                text *= if state.font.as_ref().is_none_or(Font::is_horizontal) {
                                    Affine::translate((by * state.scaling, 0.0))
                                } else {
                                    Affine::translate((0.0, by))
                                };
                            }
                            _ => {}
                        }
                    }
                }
                TypedInstruction::XObject(name) if depth < MOST_DEPTH => {
                    if let Some(form) = resources.get_x_object(name.0) {
                        self.form(&form, resources, &state, depth)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Draws what a page only names: a form, if it is one.
    fn form(
        &mut self,
        form: &Stream<'a>,
        around: &Resources<'a>,
        state: &State<'a>,
        depth: u32,
    ) -> Result<(), Unreadable> {
        let dict = form.dict();
        if dict.get::<Name<'_>>(SUBTYPE).is_none_or(|kind| kind.as_ref() != b"Form") {
            return Ok(());
        }
        let mut content = Vec::new();
        self.unpack(form, &mut content)?;
        let own = dict.get::<Dict<'a>>(RESOURCES).map(Resources::new);
        let mut state = state.clone();
        if let Some(matrix) = dict.get::<[f64; 6]>(MATRIX) {
            state.matrix *= Affine::new(matrix);
        }
        self.draw(&content, own.as_ref().unwrap_or(around), state, depth + 1)
    }

    /// Takes up the glyphs of a text, and moves on behind them.
    fn show(&mut self, shown: &[u8], state: &State<'a>, text: &mut Affine) -> Result<(), Unreadable> {
        let Some(font) = &state.font else {
            self.unmapped |= !shown.is_empty();
            return Ok(());
        };
        let mut at = 0;
        while at < shown.len() {
            let (code, length) = font.read_code(shown, at);
            let length = length.max(1);
            at += length;
            let written = match font.glyph(font.map_code(code), code) {
                FontGlyph::Outline(glyph) => glyph.as_unicode(),
                FontGlyph::Type3(glyph) => glyph.as_unicode(),
            };
            let advance = font.code_advance(code) / f64::from(UNITS_PER_EM);
            let place = state.matrix
                * *text
                * Affine::new([state.size * state.scaling, 0.0, 0.0, state.size, 0.0, state.rise]);
            let (start, end) = (place * Point::ORIGIN, place * advance.to_point());
            let up = place * Point::new(0.0, 1.0) - start;
            let along = place * Point::new(1.0, 0.0) - start;
            if let Some(written) = written {
                let mut one = [0; 4];
                let written = match &written {
                    BfString::Char(c) => c.encode_utf8(&mut one),
                    BfString::String(text) => text.as_str(),
                };
                let place = Place { start, end, along, size: up.hypot(), bold: state.bold };
                self.layout.glyph(written, place);
                if self.layout.bytes > MOST_TEXT_BYTES {
                    return Err(Unreadable::TooLarge);
                }
            } else {
                self.unmapped = true;
            }
            let spacing = state.character_spacing
                + if length == 1 && code == u32::from(b' ') { state.word_spacing } else { 0.0 };
            *text *= if font.is_horizontal() {
                Affine::translate(((advance.x * state.size + spacing) * state.scaling, 0.0))
            } else {
                Affine::translate((0.0, advance.y * state.size + spacing))
            };
        }
        Ok(())
    }
}

/// Whether a font is a heavier cut, by its name.
fn is_bold(font: &Dict<'_>) -> bool {
    let name = font.get::<Name<'_>>(BASE_FONT).map(|name| name.as_str().to_ascii_lowercase());
    name.is_some_and(|name| ["bold", "black", "heavy"].iter().any(|weight| name.contains(weight)))
}

fn matrix(numbers: [&Number; 6]) -> Affine {
    Affine::new(numbers.map(Number::as_f64))
}

/// Of the height of a line's letters: a gap this wide is a space.
const SPACE: f64 = 0.17;
/// A step this far up or down is another line.
const STEP: f64 = 0.5;
/// A step this far down is another paragraph, if nothing is known of the paragraph's lines.
const PARAGRAPH: f64 = 1.75;

/// A paragraph, and how it is set.
struct Paragraph {
    text: String,
    /// The height of its letters, in points.
    size: f64,
    bold: bool,
}

/// Puts glyphs together.
#[derive(Default)]
struct Layout {
    paragraphs: Vec<Paragraph>,
    open: String,
    size: f64,
    bold: bool,
    last: Option<Place>,
    /// How far apart the open paragraph's lines are.
    pitch: Option<f64>,
    /// Where its widest line ends, and where the last whole line did, along the line.
    widest: f64,
    /// How much was read.
    bytes: usize,
}

/// Where a glyph stands, and how.
#[derive(Clone, Copy)]
struct Place {
    start: Point,
    end: Point,
    /// The way that its line goes.
    along: Vec2,
    size: f64,
    bold: bool,
}

impl Layout {
    fn glyph(&mut self, text: &str, place: Place) {
        let Place { start, end, along, size, bold } = place;
        let along = if along.hypot() > 0.0 { along / along.hypot() } else { Vec2::new(1.0, 0.0) };
        if !(start.is_finite() && end.is_finite() && along.is_finite() && size.is_finite()) {
            return;
        }
        if let Some(last) = self.last {
            let moved = start - last.end;
            let forward = moved.dot(along);
            let down = -along.cross(moved);
            let height = size.max(last.size);
            if along.dot(last.along) < 0.9 {
                self.end_paragraph();
            } else if down.abs() > STEP * height {
                let same = (size - self.size).abs() <= 0.1 * self.size && bold == last.bold;
                let near = self.pitch.map_or(down < PARAGRAPH * height, |pitch| down < 1.25 * pitch);
                if same && down > 0.0 && near {
                    self.pitch.get_or_insert(down);
                    self.end_line(last.end.to_vec2().dot(along), text);
                } else {
                    self.end_paragraph();
                }
            } else if forward > SPACE * height || forward < -height {
                self.space();
            }
        }
        if self.open.is_empty() {
            (self.size, self.bold) = (size, bold);
        }
        self.bold &= bold;
        for c in text.chars() {
            match c {
                // Ligatures are for the eye.
                '\u{fb00}' => self.push("ff"),
                '\u{fb01}' => self.push("fi"),
                '\u{fb02}' => self.push("fl"),
                '\u{fb03}' => self.push("ffi"),
                '\u{fb04}' => self.push("ffl"),
                '\u{fb05}' | '\u{fb06}' => self.push("st"),
                c if c.is_whitespace() => self.space(),
                c if c.is_control() => {}
                c => self.push(c.encode_utf8(&mut [0; 4])),
            }
        }
        self.last = Some(Place { along, ..place });
    }

    fn push(&mut self, text: &str) {
        self.bytes += text.len();
        self.open.push_str(text);
    }

    fn space(&mut self) {
        if !self.open.is_empty() && !self.open.ends_with([' ', '\n']) {
            self.open.push(' ');
        }
    }

    /// A line has ended at `end`, and `next` begins the next one.
    fn end_line(&mut self, end: f64, next: &str) {
        let cut = ['-', '\u{2010}', '\u{ad}'];
        if let Some(word) = self.open.strip_suffix(cut)
            && word.ends_with(char::is_alphabetic)
            && next.starts_with(char::is_lowercase)
        {
            // A word that was cut for the line's end.
            self.open.truncate(word.len());
            return;
        }
        // A line that ends early was meant to.
        self.widest = self.widest.max(end);
        let item = next.starts_with(['\u{2022}', '\u{25aa}', '\u{25e6}', '\u{2013}', '\u{b7}']);
        if item || end < 0.7 * self.widest && !self.open.ends_with('\n') {
            self.open.push('\n');
        } else {
            self.space();
        }
    }

    fn end_paragraph(&mut self) {
        let text = std::mem::take(&mut self.open);
        if !text.trim().is_empty() {
            let (size, bold) = (self.size, self.bold);
            self.paragraphs.push(Paragraph { text: text.trim().to_owned(), size, bold });
        }
        (self.last, self.pitch, self.widest) = (None, None, 0.0);
    }
}

/// Paragraphs as blocks: what is set larger than most of the text, or bolder, and short, is a heading.
fn headed(paragraphs: Vec<Paragraph>) -> Vec<Block> {
    let halves = |size: f64| (size * 2.0).round();
    let mut sizes: Vec<(f64, usize)> = Vec::new();
    let (mut bytes, mut bold) = (0, 0);
    for paragraph in &paragraphs {
        let (size, length) = (halves(paragraph.size), paragraph.text.len());
        bytes += length;
        bold += if paragraph.bold { length } else { 0 };
        if let Some((_, bytes)) = sizes.iter_mut().find(|(known, _)| *known == size) {
            *bytes += length;
        } else if sizes.len() < MOST_SIZES {
            sizes.push((size, length));
        }
    }
    let body = sizes.iter().max_by_key(|(_, bytes)| *bytes).map_or(0.0, |(size, _)| *size);
    let mut larger: Vec<f64> =
        sizes.into_iter().map(|(size, _)| size).filter(|size| *size > 1.12 * body).collect();
    larger.sort_unstable_by(|a, b| b.total_cmp(a));
    let blocks = paragraphs.into_iter().map(|Paragraph { text, size, bold: is_bold }| {
        let by_size = larger.iter().position(|known| *known == halves(size));
        let ends = text.ends_with(['.', ',', ';', ':']);
        let by_weight = (is_bold && 2 * bold < bytes && !ends && text.len() <= 120).then_some(larger.len());
        match by_size.or(by_weight).and_then(|level| u8::try_from(level.min(5) + 1).ok()) {
            Some(level) if text.len() <= 200 => Block::Heading { level, text: text.replace('\n', " ") },
            _ => Block::Paragraph(text),
        }
    });
    blocks.collect()
}
