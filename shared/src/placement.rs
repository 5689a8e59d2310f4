//! Where a tenant's collection is to be: what a cell takes, and who is at work on it. Pure.
//!
//! A tenant's record names the cell of its collection. Before the record stands, or names another, a
//! collection is made, and whoever makes it may stop at any point. So it first takes the tenant's
//! [`Claim`], which nobody else can take for a while and which names each cell before anything is made
//! there. The record is written on the condition that the claim is still held. Whatever stopped, the
//! claim that is left says where to look for what remains, and the next to take it does.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use rand::CryptoRng;
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::random;
use crate::tenant::TenantId;

/// How long a claim holds. Whoever has it ends long before, done or not.
pub const CLAIM_MS: u64 = 30_000;

/// The collections that a cell takes where its operator does not say. A cluster bears about a thousand.
pub const CAPACITY: u32 = 900;
/// The most that can be said.
const MOST_CAPACITY: u32 = 100_000;

/// The right to make and remove a tenant's collections: item `CLAIM` of its partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The tenant.
    pub tenant_id: TenantId,
    /// Who holds it: a name made up for each attempt.
    pub attempt: String,
    /// Until when nobody else may take it.
    pub until: Timestamp,
    /// Cells where there may be a collection of the tenant beside the one that its record names.
    #[serde(default)]
    pub cells: BTreeSet<String>,
}

impl Claim {
    /// The claim of a new attempt, in the place of the one that an earlier attempt left. None if that one
    /// still holds.
    pub fn after(
        earlier: Option<&Self>,
        tenant_id: TenantId,
        now: Timestamp,
        rng: &mut impl CryptoRng,
    ) -> Option<Self> {
        if earlier.is_some_and(|claim| now < claim.until) {
            return None;
        }
        let cells = earlier.map(|claim| claim.cells.clone()).unwrap_or_default();
        let until = now.plus_millis(CLAIM_MS as i64);
        Some(Self { tenant_id, attempt: random::base62(22, rng), until, cells })
    }

    /// The same claim under another name: what was to be written under the old one no longer can be.
    #[must_use]
    pub fn renamed(&self, rng: &mut impl CryptoRng) -> Self {
        Self { attempt: random::base62(22, rng), ..self.clone() }
    }
}

/// What an operator says of a cell: `capacity=900;state=open;tenant=acme`, each at most once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The collections that it takes.
    pub capacity: u32,
    /// Whether new tenants are placed there.
    pub open: bool,
    /// The one tenant that it is kept for.
    pub kept_for: Option<TenantId>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { capacity: CAPACITY, open: true, kept_for: None }
    }
}

/// A text that says nothing of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wanted capacity=<number>, state=open or closed, tenant=<id>, each at most once")]
pub struct InvalidTerms;

impl FromStr for Terms {
    type Err = InvalidTerms;

    fn from_str(text: &str) -> Result<Self, InvalidTerms> {
        let mut terms = Self::default();
        let mut said = BTreeSet::new();
        for (name, value) in text.split(';').map(|term| term.split_once('=').unwrap_or((term, ""))) {
            match name {
                "capacity" if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) => {
                    let capacity = value.parse().ok().filter(|number| *number <= MOST_CAPACITY);
                    terms.capacity = capacity.ok_or(InvalidTerms)?;
                }
                "state" if value == "open" || value == "closed" => terms.open = value == "open",
                "tenant" => terms.kept_for = Some(value.parse().map_err(|_| InvalidTerms)?),
                _ => return Err(InvalidTerms),
            }
            if !said.insert(name) {
                return Err(InvalidTerms);
            }
        }
        Ok(terms)
    }
}

/// What a cell has to say to one more collection. Shown as what is said of the cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// There is room for so many.
    Room(u64),
    /// It holds as many as it takes.
    Full,
    /// Its operator has closed it.
    Closed,
    /// It is kept for another tenant.
    Kept,
    /// It does not answer.
    Silent,
}

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Room(room) => write!(f, "has room for {room}"),
            Self::Full => f.write_str("is full"),
            Self::Closed => f.write_str("is closed to new tenants"),
            Self::Kept => f.write_str("is kept for another tenant"),
            Self::Silent => f.write_str("does not answer"),
        }
    }
}

impl Offer {
    /// What a cell with these terms says to `tenant`, before it is asked how much it holds.
    pub fn unasked(terms: &Terms, tenant: &TenantId) -> Option<Self> {
        match &terms.kept_for {
            Some(other) if other != tenant => Some(Self::Kept),
            _ if !terms.open => Some(Self::Closed),
            _ => None,
        }
    }

    /// What a cell says that holds `collections`, or did not answer.
    pub fn of(terms: &Terms, collections: Option<u64>) -> Self {
        match collections.map(|held| u64::from(terms.capacity).saturating_sub(held)) {
            None => Self::Silent,
            Some(0) => Self::Full,
            Some(room) => Self::Room(room),
        }
    }
}

/// The cells with room, the one with the most first.
pub fn by_room(offers: &BTreeMap<String, Offer>) -> Vec<String> {
    let mut cells: Vec<(u64, &String)> = offers
        .iter()
        .filter_map(|(cell, offer)| match offer {
            Offer::Room(room) => Some((*room, cell)),
            _ => None,
        })
        .collect();
    cells.sort_by(|(room, cell), (other_room, other)| other_room.cmp(room).then(cell.cmp(other)));
    cells.into_iter().map(|(_, cell)| cell.clone()).collect()
}

/// What each cell said, as one sentence.
pub fn said(offers: &BTreeMap<String, Offer>) -> String {
    let said: Vec<String> = offers.iter().map(|(cell, offer)| format!("`{cell}` {offer}")).collect();
    said.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::entropy;

    const NOW: Timestamp = Timestamp::from_millis(1_790_000_000_000);

    fn id(text: &str) -> TenantId {
        text.parse().unwrap()
    }

    #[test]
    fn a_claim_is_one_attempts_until_it_ends_and_hands_on_where_to_look() {
        let first = Claim::after(None, id("acme"), NOW, &mut entropy()).unwrap();
        assert!(first.cells.is_empty());
        let left = Claim { cells: BTreeSet::from(["a".to_owned()]), ..first.clone() };
        let end = NOW.plus_millis(CLAIM_MS as i64);
        assert_eq!(Claim::after(Some(&left), id("acme"), end.plus_millis(-1), &mut entropy()), None);
        let second = Claim::after(Some(&left), id("acme"), end, &mut entropy()).unwrap();
        assert_eq!(second.cells, left.cells);
        assert_ne!(second.attempt, left.attempt);
    }

    #[test]
    fn terms_are_what_an_operator_said_and_nothing_else() {
        let terms = |text: &str| text.parse::<Terms>();
        let all = Terms { capacity: 0, open: false, kept_for: Some(id("acme")) };
        assert_eq!(terms("tenant=acme;state=closed;capacity=0"), Ok(all));
        assert_eq!(terms("state=open"), Ok(Terms::default()));
        for bad in [
            "",
            "capacity",
            "capacity=",
            "capacity=-1",
            "capacity=+1",
            "capacity=1.5",
            "capacity=100001",
            "capacity=99999999999",
            "capacity=1;capacity=1",
            "state=full",
            "tenant=ac--me",
            "tenant=",
            "colour=red",
            "capacity=1;",
        ] {
            assert_eq!(terms(bad), Err(InvalidTerms), "{bad:?}");
        }
    }

    #[test]
    fn the_cell_with_the_most_room_comes_first_and_a_full_one_never() {
        let terms = |capacity| Terms { capacity, ..Terms::default() };
        let offers = BTreeMap::from([
            ("a".to_owned(), Offer::of(&terms(10), Some(7))),
            ("b".to_owned(), Offer::of(&terms(10), Some(2))),
            ("c".to_owned(), Offer::of(&terms(10), Some(10))),
            ("d".to_owned(), Offer::of(&terms(10), Some(11))),
            ("e".to_owned(), Offer::of(&terms(10), None)),
            ("f".to_owned(), Offer::of(&terms(3), Some(0))),
            ("g".to_owned(), Offer::of(&terms(0), Some(0))),
        ]);
        assert_eq!(by_room(&offers), ["b", "a", "f"]);
        assert!(said(&offers).contains("`c` is full, `d` is full, `e` does not answer"), "{}", said(&offers));
    }

    #[test]
    fn a_closed_cell_and_anothers_are_not_even_asked() {
        let kept = Terms { kept_for: Some(id("acme")), ..Terms::default() };
        assert_eq!(Offer::unasked(&kept, &id("acme")), None);
        assert_eq!(Offer::unasked(&kept, &id("acme1")), Some(Offer::Kept));
        let closed = Terms { open: false, ..Terms::default() };
        assert_eq!(Offer::unasked(&closed, &id("acme")), Some(Offer::Closed));
    }
}
