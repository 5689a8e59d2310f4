//! Units that must not be confused, each a type.

use std::iter::Sum;
use std::ops::Add;

use serde::{Deserialize, Serialize};

/// A number of a model's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tokens(pub u64);

impl Tokens {
    /// What `text` is likely to need, rounded up: three bytes a token, which errs on the high side for
    /// the languages and markup seen in documents. Used to pack a prompt, never to charge.
    pub const fn estimate(text: &str) -> Self {
        Self((text.len() as u64).div_ceil(3))
    }

    /// The least that `text` is likely to need: six bytes a token, where English prose has four to five. What has no
    /// room for that is refused before it is begun.
    pub const fn least(text: &str) -> Self {
        Self((text.len() as u64).div_ceil(6))
    }

    /// The most that `text` can need: a token is at least a byte.
    pub const fn most(text: &str) -> Self {
        Self(text.len() as u64)
    }

    /// The difference, or zero.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for Tokens {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sum for Tokens {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self(0), Add::add)
    }
}

/// Money: billionths of a US dollar. Integers, because bills must add up to the last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NanoUsd(pub u64);

impl NanoUsd {
    /// Whether it is nothing.
    pub const fn is_zero(&self) -> bool {
        self.0 == 0
    }

    /// The price of `count` tokens at this price a token, saturating.
    pub const fn times(self, count: Tokens) -> Self {
        Self(self.0.saturating_mul(count.0))
    }
}

impl Add for NanoUsd {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}
