//! Every state that a protocol can get into, breadth first, so that the first violation found is one
//! of the shortest.
//!
//! Of our own since the one maintained crate for this (`stateright`) brings its web explorer's HTTP
//! server, a second `rand` and some twenty crates along; what is needed of it is this.

use std::collections::{HashSet, VecDeque};
use std::fmt::{self, Debug};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Something with states, steps between them, and properties that hold in all of them.
pub trait Protocol {
    type State: Hash;
    type Step: Copy + PartialEq + Debug;
    type Property: Copy + PartialEq + Debug;

    fn initial(&self) -> Self::State;
    /// Every step that can be taken, with the state that it leads to.
    fn next(&self, state: &Self::State) -> Vec<(Self::Step, Self::State)>;
    /// The first property that does not hold, if any.
    fn violated(&self, state: &Self::State) -> Option<Self::Property>;
    fn describe(&self, state: &Self::State) -> String;
}

/// What exploring a protocol came to.
pub struct Explored<P: Protocol> {
    /// Different states seen.
    pub states: usize,
    /// Steps taken between them.
    pub steps: usize,
    /// The property that does not hold, and how to get there.
    pub found: Option<(P::Property, Trace)>,
}

/// Steps, each with the state that it led to.
pub struct Trace(Vec<(String, String)>);

impl Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(step, state)| write!(f, "\n  {step:<34} {state}"))
    }
}

/// Visits every state.
///
/// # Panics
/// If there are more than `most`: then the protocol's bounds do not bound it.
pub fn explore<P: Protocol>(protocol: &P, most: usize) -> Explored<P> {
    // States are told apart by 64 bits of hash: for a million of them, two share theirs by a chance of
    // one to 30 million. What came before a state is kept for all, the state itself until it is visited.
    let mut seen = HashSet::new();
    let mut origins: Vec<Option<(usize, P::Step)>> = vec![None];
    let mut queue = VecDeque::new();
    let (mut visited, mut steps) = (0, 0);

    let first = protocol.initial();
    seen.insert(fingerprint(&first));
    queue.push_back(first);
    while let Some(state) = queue.pop_front() {
        let place = visited;
        visited += 1;
        if let Some(property) = protocol.violated(&state) {
            let trace = trace(protocol, &origins, place);
            return Explored { states: origins.len(), steps, found: Some((property, trace)) };
        }
        for (step, next) in protocol.next(&state) {
            steps += 1;
            if seen.insert(fingerprint(&next)) {
                origins.push(Some((place, step)));
                queue.push_back(next);
                assert!(origins.len() <= most, "there are more than {most} states");
            }
        }
    }
    Explored { states: origins.len(), steps, found: None }
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Takes the steps to a state again.
fn trace<P: Protocol>(protocol: &P, origins: &[Option<(usize, P::Step)>], place: usize) -> Trace {
    let mut steps = Vec::new();
    let mut place = place;
    while let Some(Some((before, step))) = origins.get(place) {
        steps.push(*step);
        place = *before;
    }
    let mut state = protocol.initial();
    let mut shown = vec![("(at first)".to_owned(), protocol.describe(&state))];
    for step in steps.into_iter().rev() {
        let taken = protocol.next(&state).into_iter().find(|(other, _)| *other == step);
        if let Some((_, next)) = taken {
            state = next;
        }
        shown.push((format!("{step:?}"), protocol.describe(&state)));
    }
    Trace(shown)
}
