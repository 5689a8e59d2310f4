//! Words and tokens: what the offline model and the offline embeddings agree on about text.

/// The longest piece of a word that is one token, in characters.
const PIECE: usize = 4;

/// Words that say little about what a text is about.
const STOP_WORDS: &[&str] = &[
    "a", "about", "after", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be", "because",
    "been", "before", "being", "between", "both", "but", "by", "can", "could", "did", "do", "does", "doing",
    "during", "each", "for", "from", "further", "give", "had", "has", "have", "having", "he", "hello", "her",
    "here", "hers", "hi", "him", "his", "how", "i", "if", "in", "into", "is", "it", "its", "just", "kindly",
    "let", "may", "me", "might", "more", "most", "much", "must", "my", "no", "nor", "not", "now", "of",
    "off", "on", "once", "only", "or", "other", "our", "out", "over", "own", "please", "same", "shall",
    "she", "should", "so", "some", "such", "tell", "than", "thank", "thanks", "that", "the", "their", "them",
    "then", "there", "these", "they", "this", "those", "through", "to", "too", "under", "until", "up", "us",
    "very", "was", "we", "were", "what", "when", "where", "which", "while", "who", "whom", "whose", "why",
    "will", "with", "would", "you", "your", "yours",
];

/// Is this lower-case word one of those that say little?
#[must_use]
pub fn is_stop_word(word: &str) -> bool {
    STOP_WORDS.binary_search(&word).is_ok()
}

/// The words of a text, lower-cased: runs of letters and digits. An apostrophe's tail (`it's`) is
/// dropped.
pub fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !(c.is_alphanumeric() || c == '\'' || c == '’')).filter_map(|word| {
        let word = word.trim_start_matches(['\'', '’']);
        let word = word.split(['\'', '’']).next().unwrap_or_default();
        (!word.is_empty()).then(|| word.to_lowercase())
    })
}

/// A word without the commonest English endings, so that `signed`, `signs` and `signing` meet. Not
/// a linguist's stem: it only has to be the same for forms of the same word.
#[must_use]
pub fn stem(word: &str) -> String {
    let mut stem = word.to_owned();
    if !word.is_ascii() || word.len() < 4 || word.bytes().any(|byte| byte.is_ascii_digit()) {
        return stem;
    }
    let is = |stem: &str, ending: &str, least: usize| stem.len() >= least && stem.ends_with(ending);
    if is(&stem, "ies", 5) {
        stem.truncate(stem.len() - 3);
        stem.push('y');
    } else if is(&stem, "sses", 5) {
        stem.truncate(stem.len() - 2);
    } else if is(&stem, "s", 4) && !["ss", "us", "is"].iter().any(|ending| stem.ends_with(ending)) {
        stem.truncate(stem.len() - 1);
    }
    let has_vowel = |stem: &str| stem.bytes().any(|byte| b"aeiouy".contains(&byte));
    for ending in ["ing", "ed"] {
        if let Some(rest) = stem.strip_suffix(ending)
            && rest.len() >= 3
            && has_vowel(rest)
        {
            stem.truncate(stem.len() - ending.len());
            let mut last = stem.bytes().rev();
            if let (Some(one), Some(two)) = (last.next(), last.next())
                && one == two
                && !b"aeiouslz".contains(&one)
            {
                stem.pop();
            }
            break;
        }
    }
    if stem.len() > 3 && stem.ends_with('e') {
        stem.pop();
    }
    stem
}

/// Where each token of a text ends, in bytes.
///
/// The tokenizer of both offline servers: a run of letters and digits is cut into pieces of at most
/// four characters, any other character that is not white space is a token of its own, white space
/// belongs to no token. So a text of `n` bytes has at most `n` tokens, and the tokens of a text cut
/// behind a token are those before the cut.
pub fn token_ends(text: &str) -> impl Iterator<Item = usize> + '_ {
    let mut run = 0;
    let mut characters = text.char_indices().peekable();
    std::iter::from_fn(move || {
        loop {
            let (start, character) = characters.next()?;
            let end = start + character.len_utf8();
            if character.is_alphanumeric() {
                run += 1;
                let goes_on = characters.peek().is_some_and(|(_, next)| next.is_alphanumeric());
                if goes_on && run < PIECE {
                    continue;
                }
                run = 0;
                return Some(end);
            }
            if !character.is_whitespace() {
                return Some(end);
            }
        }
    })
}

/// How many tokens a text has. See [`token_ends`] for what a token is.
#[must_use]
pub fn count_tokens(text: &str) -> u64 {
    token_ends(text).map(|_| 1).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_a_word_meet() {
        for forms in [
            &["sign", "signs", "signed", "signing"][..],
            &["policy", "policies"],
            &["require", "requires", "required", "requiring"],
            &["stop", "stopped", "stopping"],
            &["process", "processes", "processed"],
            &["fill", "filled", "filling"],
        ] {
            for form in forms {
                assert_eq!(stem(form), stem(forms[0]), "{form}");
            }
        }
        assert_ne!(stem("bed"), stem("b"));
        assert!(STOP_WORDS.is_sorted());
    }

    #[test]
    fn tokens_are_pieces_of_four_and_punctuation() {
        let text = "Retention: 7 years, naïve\u{2014}ok";
        let mut start = 0;
        let pieces: Vec<&str> = token_ends(text)
            .map(|end| {
                let piece = text.get(start..end).unwrap().trim_start();
                start = end;
                piece
            })
            .collect();
        assert_eq!(pieces, ["Rete", "ntio", "n", ":", "7", "year", "s", ",", "naïv", "e", "\u{2014}", "ok"]);
        assert_eq!(count_tokens(" \n\t"), 0);
        for (n, end) in token_ends(text).enumerate() {
            assert_eq!(count_tokens(text.split_at(end).0), n as u64 + 1);
        }
    }

    #[test]
    fn words_are_lower_case_without_tails() {
        assert_eq!(
            words("The tenant's API-key, it’s 'new'!").collect::<Vec<_>>(),
            ["the", "tenant", "api", "key", "it", "new"]
        );
    }
}
