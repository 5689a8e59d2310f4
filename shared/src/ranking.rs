//! Which of the passages that were found are shown. Pure.

use std::collections::HashMap;
use std::hash::Hash;

/// The most passages of one document among those that are shown, while others have any.
pub const MOST_OF_ONE: usize = 3;

/// The best `top` of `ranked`, which are in their order, with at most `most_of_one` of the same document until no
/// other document has one left; then the places that are free go to the best that were passed over. What is
/// shown keeps its order, so the best is always first.
pub fn diverse<T, D: Eq + Hash>(
    ranked: Vec<T>,
    document: impl Fn(&T) -> D,
    most_of_one: usize,
    top: usize,
) -> Vec<T> {
    let mut of_document: HashMap<D, usize> = HashMap::new();
    let within: Vec<bool> = ranked
        .iter()
        .map(|passage| {
            let count = of_document.entry(document(passage)).or_default();
            *count += 1;
            *count <= most_of_one
        })
        .collect();
    let mut free = top.saturating_sub(within.iter().filter(|within| **within).count());
    let mut shown = 0;
    ranked
        .into_iter()
        .zip(within)
        .filter(|(_, within)| {
            let place = if *within { shown < top } else { free > 0 };
            free -= usize::from(place && !*within);
            shown += usize::from(place && *within);
            place
        })
        .map(|(passage, _)| passage)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Passages by their document's letter and their rank.
    fn shown(documents: &str, most_of_one: usize, top: usize) -> String {
        let ranked = documents.chars().enumerate().collect();
        let shown = diverse(ranked, |(_, document)| *document, most_of_one, top);
        assert!(shown.is_sorted(), "{shown:?}");
        shown.into_iter().map(|(_, document)| document).collect()
    }

    #[test]
    fn one_document_does_not_take_all_places() {
        assert_eq!(shown("aaaabc", 2, 4), "aabc");
        assert_eq!(shown("aaaabc", 1, 3), "abc");
        assert_eq!(shown("abcabc", 2, 4), "abca");
    }

    #[test]
    fn places_that_nobody_else_wants_are_not_left_empty() {
        assert_eq!(shown("aaaa", 2, 3), "aaa");
        // The best that were passed over take them, in their order.
        assert_eq!(shown("aaabab", 1, 4), "aaab");
        assert_eq!(shown("aaaabc", 2, 5), "aaabc");
        assert_eq!(shown("ab", 2, 5), "ab");
        assert_eq!(shown("", 2, 5), "");
        assert_eq!(shown("ab", 2, 0), "");
    }

    proptest! {
        #[test]
        fn as_many_as_there_are_and_none_beyond_its_share_while_others_wait(
            documents in "[a-d]{0,20}", most_of_one in 1_usize..5, top in 0_usize..12,
        ) {
            let shown = shown(&documents, most_of_one, top);
            prop_assert_eq!(shown.len(), top.min(documents.len()));
            let count = |text: &str, document| text.chars().filter(|d| *d == document).count();
            for document in 'a'..='d' {
                let waits = count(&documents, document).min(most_of_one) > count(&shown, document);
                let beyond = ('a'..='d').any(|other| count(&shown, other) > most_of_one);
                prop_assert!(!(waits && beyond), "{} of {}", shown, documents);
            }
            // Where every document keeps to its share, nothing changes.
            if ('a'..='d').all(|document| count(&documents, document) <= most_of_one) {
                prop_assert_eq!(shown, documents.chars().take(top).collect::<String>());
            }
        }
    }
}
