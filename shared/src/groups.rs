//! Groups of a tenant's users: who of them may find a document. Pure.
//!
//! A document with groups is found by a user of one of them, one without by every user. Both sides are
//! [`Groups`], so that a name is the same name wherever it comes from: compared byte by byte, never cleaned.
//! `Debug` hides names: who belongs where is the tenant's business, and in no log.

use std::collections::BTreeSet;
use std::fmt;

use http::HeaderValue;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The most groups of a document, and of a user. A user's travel in the authorizer's context, which API
/// Gateway bounds.
pub const MOST_GROUPS: usize = 50;
/// The longest name of a group, in bytes.
pub const LONGEST_GROUP: usize = 64;
/// In the vector store: every user of the tenant. No group has this name.
const EVERYONE: &str = "*";

/// A group's name: 1 to [`LONGEST_GROUP`] bytes of UTF-8 without commas, which separate names in a header,
/// without control characters, not beginning or ending with white space, and not `*` alone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Group(String);

/// A text that names no group. It does not repeat the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a group has 1 to {LONGEST_GROUP} bytes of UTF-8 without commas and control characters, \
     no white space at its ends, and is not `*`"
)]
pub struct InvalidGroup;

impl TryFrom<String> for Group {
    type Error = InvalidGroup;

    fn try_from(text: String) -> Result<Self, InvalidGroup> {
        // U+FFFD is what something on the way puts for bytes that are no text: two names must not become one.
        let forbidden = |c: char| c.is_control() || matches!(c, ',' | char::REPLACEMENT_CHARACTER);
        let well_formed = (1..=LONGEST_GROUP).contains(&text.len())
            && text.trim() == text
            && !text.contains(forbidden)
            && text != EVERYONE;
        if well_formed { Ok(Self(text)) } else { Err(InvalidGroup) }
    }
}

impl From<Group> for String {
    fn from(group: Group) -> Self {
        group.0
    }
}

/// The groups of a document, or of a user. None of a document: every user finds it. None of a user: no
/// document with groups is found.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Groups(BTreeSet<Group>);

impl fmt::Debug for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Groups({} …)", self.0.len())
    }
}

/// What is wrong with a document's list of groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGroups {
    /// It names none. Whoever means every user leaves the list out; nobody publishes by a list that came
    /// out empty.
    #[error("groups is empty; leave it out for a document that every user may find")]
    Empty,
    /// It names too many.
    #[error("groups holds more than {MOST_GROUPS}")]
    TooMany,
    /// The group in that place is none.
    #[error("{InvalidGroup}")]
    Name(usize),
}

impl Groups {
    /// The groups that a document is sent with; none if it has no list.
    ///
    /// # Errors
    /// [`InvalidGroups`].
    pub fn of_document(names: Option<Vec<String>>) -> Result<Self, InvalidGroups> {
        let Some(names) = names else { return Ok(Self::default()) };
        if names.is_empty() {
            return Err(InvalidGroups::Empty);
        }
        if names.len() > MOST_GROUPS {
            return Err(InvalidGroups::TooMany);
        }
        let named = names.into_iter().enumerate();
        named
            .map(|(n, name)| Group::try_from(name).map_err(|InvalidGroup| InvalidGroups::Name(n)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The groups that a header names, separated by commas; several headers are one list. An empty one
    /// names none.
    ///
    /// # Errors
    /// [`InvalidGroup`] if a name is none, or there are more than [`MOST_GROUPS`].
    pub fn asserted<'a>(headers: impl IntoIterator<Item = &'a HeaderValue>) -> Result<Self, InvalidGroup> {
        let mut groups = BTreeSet::new();
        for header in headers {
            let text = std::str::from_utf8(header.as_bytes()).map_err(|_| InvalidGroup)?;
            if text.trim().is_empty() {
                continue;
            }
            for name in text.split(',') {
                groups.insert(Group::try_from(name.trim().to_owned())?);
            }
            if groups.len() > MOST_GROUPS {
                return Err(InvalidGroup);
            }
        }
        Ok(Self(groups))
    }

    /// The groups that a verified token's claim names: a list of texts, or one text. What can be no
    /// document's group is left out, since it finds nothing.
    ///
    /// # Errors
    /// [`InvalidGroup`] if it is something else, or names more than [`MOST_GROUPS`]: to choose among them
    /// would hide documents from a user for no reason that anybody sees.
    pub fn claimed(claim: Option<&Value>) -> Result<Self, InvalidGroup> {
        let texts = match claim {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(one)) => vec![one.as_str()],
            Some(Value::Array(all)) => {
                all.iter().map(Value::as_str).collect::<Option<_>>().ok_or(InvalidGroup)?
            }
            Some(_) => return Err(InvalidGroup),
        };
        let groups: BTreeSet<Group> =
            texts.into_iter().filter_map(|text| Group::try_from(text.to_owned()).ok()).collect();
        if groups.len() > MOST_GROUPS { Err(InvalidGroup) } else { Ok(Self(groups)) }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all of them are among `others`.
    pub fn are_among(&self, others: &Self) -> bool {
        self.0.is_subset(&others.0)
    }

    /// Of a document: whether a user of the groups `user` finds it.
    pub fn open_to(&self, user: &Self) -> bool {
        self.is_empty() || !self.0.is_disjoint(&user.0)
    }

    /// Of a document: whom its passages name as their readers in the vector store. Never empty, so that a
    /// passage that names nobody is found by nobody.
    pub fn readers(&self) -> Vec<String> {
        if self.is_empty() { vec![EVERYONE.to_owned()] } else { self.names() }
    }

    /// Of a user: the readers as which passages are found.
    pub fn reads_as(&self) -> Vec<String> {
        let mut readers = self.names();
        readers.push(EVERYONE.to_owned());
        readers
    }

    /// Of a user: whether a passage with these readers is found.
    pub fn finds<'a>(&self, readers: impl IntoIterator<Item = &'a str>) -> bool {
        readers.into_iter().any(|reader| reader == EVERYONE || self.0.iter().any(|group| group.0 == reader))
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|group| group.0.clone()).collect()
    }

    /// The names' bytes in their order, each a part of a fingerprint.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|group| group.0.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn document(names: &[&str]) -> Groups {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        Groups::of_document(Some(names)).unwrap()
    }

    fn asserted(lines: &[&[u8]]) -> Result<Groups, InvalidGroup> {
        let headers: Vec<HeaderValue> =
            lines.iter().map(|line| HeaderValue::from_bytes(line).unwrap()).collect();
        Groups::asserted(&headers)
    }

    #[test]
    fn a_document_without_groups_is_everyones_and_one_with_is_its_groups() {
        let (none, hr, both) = (Groups::default(), document(&["hr"]), document(&["hr", "legal"]));
        for user in [&none, &hr, &both] {
            assert!(none.open_to(user));
            assert!(user.finds(none.readers().iter().map(String::as_str)));
        }
        for (of_document, user, open) in [
            (&hr, &none, false),
            (&hr, &hr, true),
            (&hr, &both, true),
            (&both, &hr, true),
            (&hr, &document(&["HR", "h", "hr2", "legal"]), false),
        ] {
            assert_eq!(of_document.open_to(user), open, "{of_document:?} {user:?}");
            let readers = of_document.readers();
            assert_eq!(user.finds(readers.iter().map(String::as_str)), open);
            // What the store compares comes to the same.
            assert_eq!(user.reads_as().iter().any(|reader| readers.contains(reader)), open);
        }
        assert!(!both.finds([]), "who names no reader has none");
    }

    #[test]
    fn a_header_is_a_list() {
        let both = document(&["hr", "legal affairs"]);
        for same in [
            &[&b"hr,legal affairs"[..]][..],
            &[b" legal affairs , hr "],
            &[b"hr", b"legal affairs"],
            &[b"hr,hr", b"", b"legal affairs"],
        ] {
            assert_eq!(asserted(same).as_ref(), Ok(&both));
        }
        assert_eq!(asserted(&["büro".as_bytes()]), Ok(document(&["büro"])));
        for none in [&[][..], &[&b""[..]], &[&b"  "[..]]] {
            assert_eq!(asserted(none), Ok(Groups::default()));
        }
        let long = "x".repeat(LONGEST_GROUP + 1);
        let many: String = (0..=MOST_GROUPS).map(|n| format!("g{n},")).collect();
        for bad in [
            &b"hr,"[..],
            b",",
            b"hr,,legal",
            b"*",
            b"hr,*",
            b"\xff",
            long.as_bytes(),
            many.trim_end_matches(',').as_bytes(),
        ] {
            assert_eq!(asserted(&[bad]), Err(InvalidGroup), "{bad:?}");
        }
    }

    #[test]
    fn a_claim_is_a_list_or_one_text() {
        for (claim, groups) in [
            (json!(["hr", "legal"]), document(&["hr", "legal"])),
            (json!("hr"), document(&["hr"])),
            (json!([]), Groups::default()),
            (json!(null), Groups::default()),
            // These are no document's.
            (json!(["*", "", "a,b", " hr", "x".repeat(65), "hr"]), document(&["hr"])),
            (json!("a,b"), Groups::default()),
        ] {
            assert_eq!(Groups::claimed(Some(&claim)), Ok(groups), "{claim}");
        }
        assert_eq!(Groups::claimed(None), Ok(Groups::default()));
        let many: Vec<String> = (0..=MOST_GROUPS).map(|n| format!("g{n}")).collect();
        for bad in [json!(7), json!({"hr": true}), json!(["hr", 7]), json!([["hr"]]), json!(many)] {
            assert_eq!(Groups::claimed(Some(&bad)), Err(InvalidGroup), "{bad}");
        }
    }

    #[test]
    fn a_documents_list_is_bounded_and_its_bad_name_is_placed() {
        let of = |names: Vec<String>| Groups::of_document(Some(names));
        assert_eq!(Groups::of_document(None), Ok(Groups::default()));
        assert_eq!(of(vec![]), Err(InvalidGroups::Empty));
        assert_eq!(of(vec!["g".to_owned(); MOST_GROUPS + 1]), Err(InvalidGroups::TooMany));
        for bad in ["", "a,b", " a", "a\n", "*", "a\u{fffd}", &"x".repeat(LONGEST_GROUP + 1)] {
            assert_eq!(of(vec!["good".to_owned(), bad.to_owned()]), Err(InvalidGroups::Name(1)), "{bad:?}");
            assert!(serde_json::from_value::<Groups>(json!([bad])).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_in_no_debug_output_and_no_error() {
        assert!(!format!("{:?}", document(&["works-council"])).contains("works"));
        assert!(!asserted(&[b"works-council,*"]).unwrap_err().to_string().contains("works"));
    }

    proptest! {
        /// Whatever the two sides are, the store's comparison and the second look come to the same.
        #[test]
        fn the_two_looks_agree(
            document in proptest::collection::btree_set("[a-d*, ]{0,2}", 0..4),
            user in proptest::collection::btree_set("[a-d*, ]{0,2}", 0..4),
        ) {
            let groups = |names: BTreeSet<String>| {
                Groups(names.into_iter().filter_map(|name| Group::try_from(name).ok()).collect())
            };
            let (document, user) = (groups(document), groups(user));
            let (readers, reads_as) = (document.readers(), user.reads_as());
            let filtered = reads_as.iter().any(|reader| readers.contains(reader));
            prop_assert_eq!(filtered, document.open_to(&user));
            prop_assert_eq!(filtered, user.finds(readers.iter().map(String::as_str)));
        }
    }
}
