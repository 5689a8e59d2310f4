//! The answer: sentences of the passages, quoted. Request in, answer out.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Value, json};

use super::request::{Block, Request};
use crate::lexis::{count_tokens, is_stop_word, stem, token_ends, words};

const MAX_SENTENCES: usize = 4;
const MAX_PASSAGES: usize = 3;
/// What one passage must hold of the question's words, by their rarity: with less it is about something else.
const ENOUGH: f64 = 0.34;
/// A further sentence must be about as good as the best one.
const WORTH_QUOTING: f64 = 0.6;
const LEAD: &str = "According to the documents: ";
const NEXT: &str = "\nThe documents also say: ";
const NO_ANSWER: &str = "The documents I was given do not answer this question.";
const NO_DOCUMENTS: &str = "I was given no documents, so I cannot answer this question.";

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Text blocks, in order.
    pub blocks: Vec<AnswerBlock>,
    /// `end_turn`, `max_tokens` or `stop_sequence`.
    pub stop_reason: &'static str,
    /// The sequence that ended it, if one did.
    pub stop_sequence: Option<String>,
    /// The tokens of all texts.
    pub output_tokens: u64,
}

/// A text block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerBlock {
    /// Its text.
    pub text: String,
    /// The passage it quotes.
    pub citation: Option<Citation>,
}

/// A `search_result_location`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Citation {
    /// The whole text block that was cited.
    pub cited_text: String,
    /// The search result's source.
    pub source: String,
    /// Its title.
    pub title: String,
    /// Its number among all search results of the request.
    pub search_result_index: usize,
    /// The number of the cited text block in it.
    pub block_index: usize,
}

impl Citation {
    pub(super) fn json(&self) -> Value {
        json!({
            "type": "search_result_location",
            "cited_text": self.cited_text,
            "source": self.source,
            "title": self.title,
            "search_result_index": self.search_result_index,
            "start_block_index": self.block_index,
            "end_block_index": self.block_index + 1,
        })
    }
}

/// How an answer refers to a passage.
enum Reference {
    /// As a search result, by its number.
    Location { index: usize, source: String, title: String },
    /// As text, by a marker.
    Marker(String),
    /// Not at all.
    Silent,
}

struct Passage {
    reference: Reference,
    title: String,
    texts: Vec<String>,
}

struct Sentence<'a> {
    passage: usize,
    block: usize,
    text: &'a str,
    stems: BTreeSet<String>,
}

/// Answers a request from the passages in it, and from nothing else.
#[must_use]
pub fn answer(request: &Request) -> Answer {
    let (passages, questions) = read(request);
    let blocks = if passages.is_empty() { vec![plain(NO_DOCUMENTS)] } else { quote(&passages, &questions) };
    finish(blocks, request)
}

fn plain(text: &str) -> AnswerBlock {
    AnswerBlock { text: text.to_owned(), citation: None }
}

fn quote(passages: &[Passage], questions: &[String]) -> Vec<AnswerBlock> {
    let sentences: Vec<Sentence<'_>> = passages
        .iter()
        .enumerate()
        .flat_map(|(passage, given)| {
            given.texts.iter().enumerate().map(move |(block, text)| (passage, block, text))
        })
        .flat_map(|(passage, block, text)| {
            split(text).into_iter().map(move |text| Sentence { passage, block, text, stems: stems(text) })
        })
        .collect();
    let last = questions.last().map(|question| stems(question)).unwrap_or_default();
    let mut chosen = choose(passages, &sentences, &last);
    if chosen.is_empty() {
        // "And who signed it?" may only make sense behind the question before.
        let before = questions.iter().rev().nth(1).map(|question| stems(question)).unwrap_or_default();
        chosen = choose(passages, &sentences, &last.union(&before).cloned().collect());
    }
    if chosen.is_empty() {
        return vec![plain(NO_ANSWER)];
    }
    let mut blocks: Vec<AnswerBlock> = Vec::new();
    // Text without a citation joins the text before it: a block is what one citation is for.
    let mut say = |text: &str, citation: Option<Citation>| match blocks.last_mut() {
        Some(block) if block.citation.is_none() && citation.is_none() => block.text.push_str(text),
        _ => blocks.push(AnswerBlock { text: text.to_owned(), citation }),
    };
    for (n, sentence) in chosen.iter().enumerate() {
        let Some(passage) = passages.get(sentence.passage) else { continue };
        match &passage.reference {
            Reference::Location { index, source, title } => {
                say(if n == 0 { LEAD } else { NEXT }, None);
                let citation = Citation {
                    cited_text: passage.texts.get(sentence.block).cloned().unwrap_or_default(),
                    source: source.clone(),
                    title: title.clone(),
                    search_result_index: *index,
                    block_index: sentence.block,
                };
                say(sentence.text, Some(citation));
            }
            Reference::Marker(marker) => {
                say(if n == 0 { LEAD } else { " " }, None);
                say(&format!("{} [[{marker}]]", sentence.text), None);
            }
            Reference::Silent => {
                say(if n == 0 { LEAD } else { " " }, None);
                say(sentence.text, None);
            }
        }
    }
    blocks
}

/// The sentences worth quoting, passage by passage, the best passage first.
fn choose<'a, 'b>(
    passages: &[Passage],
    sentences: &'b [Sentence<'a>],
    question: &BTreeSet<String>,
) -> Vec<&'b Sentence<'a>> {
    let mut frequency: HashMap<&str, usize> = HashMap::new();
    for stem in sentences.iter().flat_map(|sentence| &sentence.stems) {
        *frequency.entry(stem).or_default() += 1;
    }
    let rarity = |stem: &String| {
        let frequency = frequency.get(stem.as_str()).copied().unwrap_or(1);
        (1.0 + sentences.len() as f64 / frequency as f64).ln()
    };
    // What a passage as a whole, with its title, has of the question.
    let context: Vec<f64> = passages
        .iter()
        .enumerate()
        .map(|(n, passage)| {
            let mut has = stems(&passage.title);
            has.extend(sentences.iter().filter(|s| s.passage == n).flat_map(|s| s.stems.iter().cloned()));
            question.intersection(&has).map(rarity).sum()
        })
        .collect();
    let whole: f64 = question.iter().map(rarity).sum();
    if !context.iter().any(|has: &f64| *has >= ENOUGH * whole) {
        return Vec::new();
    }
    let mut ranked: Vec<(f64, usize, &Sentence<'_>)> = sentences
        .iter()
        .enumerate()
        .filter_map(|(n, sentence)| {
            let own: f64 = question.intersection(&sentence.stems).map(rarity).sum();
            if own <= 0.0 {
                return None;
            }
            let length = sentence.stems.len().max(8) as f64 / 8.0;
            let around = context.get(sentence.passage).copied().unwrap_or_default();
            let score = own / length.sqrt() + 0.5 * around;
            let heading =
                sentence.text.split_whitespace().count() < 5 && !sentence.text.ends_with(['.', '!', '?']);
            Some((if heading { score * 0.3 } else { score }, n, sentence))
        })
        .collect();
    ranked.sort_by(|(left, n, _), (right, m, _)| right.total_cmp(left).then(n.cmp(m)));
    let least = ranked.first().map_or(0.0, |(best, ..)| best * WORTH_QUOTING);
    let mut order: Vec<usize> = Vec::new();
    let mut chosen: Vec<(usize, &Sentence<'_>)> = Vec::new();
    for (score, n, sentence) in ranked {
        if score < least || chosen.len() == MAX_SENTENCES {
            break;
        }
        let known = order.contains(&sentence.passage);
        let repeated = chosen.iter().any(|(_, other)| other.text == sentence.text);
        if repeated || (!known && order.len() == MAX_PASSAGES) {
            continue;
        }
        if !known {
            order.push(sentence.passage);
        }
        chosen.push((n, sentence));
    }
    chosen.sort_by_key(|(n, sentence)| (order.iter().position(|passage| *passage == sentence.passage), *n));
    chosen.into_iter().map(|(_, sentence)| sentence).collect()
}

/// Cuts the blocks at a stop sequence and at the token limit.
fn finish(mut blocks: Vec<AnswerBlock>, request: &Request) -> Answer {
    let whole: String = blocks.iter().map(|block| block.text.as_str()).collect();
    let stop = request
        .stop_sequences
        .iter()
        .filter_map(|sequence| whole.find(sequence.as_str()).map(|at| (at, sequence)))
        .min_by_key(|(at, _)| *at);
    let (mut stop_reason, mut stop_sequence) = ("end_turn", None);
    if let Some((at, sequence)) = stop {
        let mut left = at;
        for block in &mut blocks {
            let keep = left.min(block.text.len());
            cut(block, keep);
            left -= keep;
        }
        (stop_reason, stop_sequence) = ("stop_sequence", Some(sequence.clone()));
    }
    let mut output_tokens = 0;
    for block in &mut blocks {
        let left = request.max_tokens - output_tokens;
        let tokens = count_tokens(&block.text);
        if tokens > left {
            let ends = usize::try_from(left).unwrap_or(usize::MAX);
            let keep = ends.checked_sub(1).and_then(|last| token_ends(&block.text).nth(last)).unwrap_or(0);
            cut(block, keep);
            (stop_reason, stop_sequence) = ("max_tokens", None);
        }
        output_tokens += tokens.min(left);
    }
    blocks.retain(|block| !block.text.is_empty());
    Answer { blocks, stop_reason, stop_sequence, output_tokens }
}

/// Shortens a block to `keep` bytes, which end a character; what is not whole is not cited.
fn cut(block: &mut AnswerBlock, keep: usize) {
    if keep < block.text.len() {
        block.text.truncate(keep);
        block.citation = None;
    }
}

/// The passages of a request in the order of search results, and what the user asked, turn by turn.
fn read(request: &Request) -> (Vec<Passage>, Vec<String>) {
    let mut passages = Vec::new();
    let mut questions = Vec::new();
    let mut results = 0;
    for message in &request.messages {
        let mut question = String::new();
        for block in &message.blocks {
            match block {
                Block::SearchResult(result) => {
                    let reference = if result.citations {
                        Reference::Location {
                            index: results,
                            source: result.source.clone(),
                            title: result.title.clone(),
                        }
                    } else {
                        Reference::Silent
                    };
                    results += 1;
                    passages.push(Passage {
                        reference,
                        title: result.title.clone(),
                        texts: result.texts.clone(),
                    });
                }
                Block::Text(text) if message.from_user => {
                    let (rest, mut marked) = marked_passages(text);
                    passages.append(&mut marked);
                    if !rest.trim().is_empty() {
                        question = rest;
                    }
                }
                Block::Text(_) | Block::Other => {}
            }
        }
        if message.from_user && !question.is_empty() {
            questions.push(question);
        }
    }
    (passages, questions)
}

/// Takes passages in their plain form out of a text: between a line `<passage-NONCE id="P1" …>` and
/// the line `</passage-NONCE>`. A passage that is not closed is no passage.
fn marked_passages(text: &str) -> (String, Vec<Passage>) {
    let (mut rest, mut passages) = (String::new(), Vec::new());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let opened = line
            .trim()
            .strip_prefix("<passage-")
            .and_then(|tag| tag.strip_suffix('>'))
            .and_then(|tag| tag.split_once(char::is_whitespace))
            .and_then(|(nonce, attributes)| Some((nonce, attribute(attributes, "id")?, attributes)));
        let Some((nonce, id, attributes)) = opened else {
            rest.push_str(line);
            rest.push('\n');
            continue;
        };
        let close = format!("</passage-{nonce}>");
        let mut ahead = lines.clone();
        let mut body = String::new();
        let mut closed = false;
        for line in ahead.by_ref() {
            if line.trim() == close {
                closed = true;
                break;
            }
            body.push_str(line);
            body.push('\n');
        }
        if closed {
            lines = ahead;
            passages.push(Passage {
                reference: Reference::Marker(id.to_owned()),
                title: attribute(attributes, "title").unwrap_or_default().to_owned(),
                texts: vec![body],
            });
        } else {
            rest.push_str(line);
            rest.push('\n');
        }
    }
    (rest, passages)
}

fn attribute<'a>(attributes: &'a str, name: &str) -> Option<&'a str> {
    let (before, rest) = attributes.split_once(&format!("{name}=\""))?;
    if before.ends_with(|c: char| !c.is_whitespace()) {
        return None;
    }
    rest.split_once('"').map(|(value, _)| value)
}

/// The words of a text that say something, by their stems.
fn stems(text: &str) -> BTreeSet<String> {
    words(text).filter(|word| !is_stop_word(word)).map(|word| stem(&word)).collect()
}

/// The sentences of a text, as they stand there. A sentence ends with its line, or with a full stop
/// before white space if what follows can begin a sentence.
fn split(text: &str) -> Vec<&str> {
    let mut sentences = Vec::new();
    for line in text.lines() {
        let mut start = 0;
        let mut characters = line.char_indices().peekable();
        while let Some((at, character)) = characters.next() {
            let ends = matches!(character, '.' | '!' | '?' | '。')
                && characters.peek().is_none_or(|(_, next)| next.is_whitespace());
            if !ends {
                continue;
            }
            let (done, rest) = line.split_at(at + character.len_utf8());
            let follows = rest.trim_start().chars().next();
            let sentence = done.split_at(start).1.trim();
            if follows.is_some_and(char::is_lowercase) || abbreviated(sentence) {
                continue;
            }
            sentences.push(sentence);
            start = done.len();
        }
        sentences.push(line.split_at(start).1.trim());
    }
    sentences.retain(|sentence| sentence.chars().any(char::is_alphanumeric));
    sentences
}

/// Does this end in an abbreviation rather than in a full stop?
fn abbreviated(sentence: &str) -> bool {
    const KNOWN: &[&str] =
        &["mr.", "mrs.", "ms.", "dr.", "no.", "st.", "vs.", "e.g.", "i.e.", "cf.", "approx."];
    let last = sentence.split_whitespace().next_back().unwrap_or_default().to_lowercase();
    KNOWN.contains(&last.trim_start_matches('('))
}
