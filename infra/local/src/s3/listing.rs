//! Pages of a sorted listing, with common prefixes rolled up.

/// One page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Page<K, V> {
    pub(super) rows: Vec<(K, V)>,
    pub(super) prefixes: Vec<String>,
    pub(super) truncated: bool,
    /// The key or common prefix after which the next page starts.
    pub(super) last: Option<String>,
    /// Whether the last entry was a row and not a common prefix.
    pub(super) last_is_row: bool,
}

/// The common prefix a key is rolled up into, if there is a delimiter behind the prefix.
pub(super) fn group(key: &str, prefix: &str, delimiter: Option<&str>) -> Option<String> {
    let delimiter = delimiter.filter(|delimiter| !delimiter.is_empty())?;
    let (head, _) = key.strip_prefix(prefix)?.split_once(delimiter)?;
    Some(format!("{prefix}{head}{delimiter}"))
}

/// Fills a page of at most `max` entries. The rows come sorted by key, all with the prefix, and
/// start behind the marker; several rows may have the same key.
pub(super) fn page<K: AsRef<str>, V>(
    rows: impl Iterator<Item = (K, V)>,
    prefix: &str,
    delimiter: Option<&str>,
    max: usize,
) -> Page<K, V> {
    let mut page =
        Page { rows: Vec::new(), prefixes: Vec::new(), truncated: false, last: None, last_is_row: false };
    if max == 0 {
        return page;
    }
    for (key, row) in rows {
        let group = group(key.as_ref(), prefix, delimiter);
        if group.is_some() && group.as_ref() == page.prefixes.last() {
            continue;
        }
        if page.rows.len() + page.prefixes.len() == max {
            page.truncated = true;
            break;
        }
        page.last_is_row = group.is_none();
        match group {
            Some(group) => {
                page.last = Some(group.clone());
                page.prefixes.push(group);
            }
            None => {
                page.last = Some(key.as_ref().to_owned());
                page.rows.push((key, row));
            }
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_count_once_and_do_not_split_over_pages() {
        let keys = ["a", "b/1", "b/2", "c"];
        let first = page(keys.iter().map(|key| (*key, ())), "", Some("/"), 2);
        assert_eq!(first.rows, [("a", ())]);
        assert_eq!(first.prefixes, ["b/"]);
        assert!(first.truncated);
        assert_eq!(first.last.as_deref(), Some("b/"));
        let exact = page(keys.iter().map(|key| (*key, ())), "", Some("/"), 3);
        assert!(!exact.truncated);
    }
}
