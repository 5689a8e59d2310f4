//! What models cost, as data with effective dates (`models`), in integer nano-dollars.
//!
//! A price per million tokens in dollars is a thousand times that in nano-dollars a token. A model
//! that is not in the tables has no price, and is therefore refused before it is called.

mod models;

use serde::{Deserialize, Serialize};
use time::Date;

use crate::clock::Timestamp;
use crate::units::{NanoUsd, Tokens};
use models::Named;

/// The tokens of one model call, by how they are charged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Input that no cache held.
    pub input_tokens: Tokens,
    /// Output.
    pub output_tokens: Tokens,
    /// Input read from the provider's cache.
    pub cache_read_input_tokens: Tokens,
    /// Input written to the provider's cache.
    pub cache_creation_input_tokens: Tokens,
}

impl Usage {
    /// Tokens of every kind.
    pub fn total(&self) -> Tokens {
        self.input_tokens
            + self.output_tokens
            + self.cache_read_input_tokens
            + self.cache_creation_input_tokens
    }
}

impl std::ops::Add for Usage {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens + other.input_tokens,
            output_tokens: self.output_tokens + other.output_tokens,
            cache_read_input_tokens: self.cache_read_input_tokens + other.cache_read_input_tokens,
            cache_creation_input_tokens: self.cache_creation_input_tokens + other.cache_creation_input_tokens,
        }
    }
}

/// How a model is given the passages it may cite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassageForm {
    /// As `search_result` content blocks: the provider keeps them apart from the text and cites them.
    SearchResults,
    /// As text between boundaries that nobody can guess; the model cites by marker.
    Boundaries,
}

/// A chat model.
#[derive(Debug)]
pub struct ChatModel {
    /// The most tokens that one answer may have.
    pub max_output_tokens: u64,
    /// How it is given passages.
    pub passages: PassageForm,
    prices: &'static Prices<ChatPrice>,
}

/// Prices by the day from which they hold, oldest first.
type Prices<T> = [(Date, T)];

/// Nano-dollars a token.
#[derive(Debug)]
struct ChatPrice {
    input: NanoUsd,
    output: NanoUsd,
    cache_write: NanoUsd,
    cache_read: NanoUsd,
}

/// An embedding model, in nano-dollars a token.
#[derive(Debug)]
pub struct EmbeddingPrices {
    prices: &'static Prices<NanoUsd>,
}

/// A reranker. It is paid by the call, whatever it reads: a question, and no more passages than one call takes.
#[derive(Debug)]
pub struct RerankPrices {
    prices: &'static Prices<NanoUsd>,
}

/// The chat model of that name, if it has a price.
pub fn chat_model(name: &str) -> Option<&'static ChatModel> {
    named(models::CHAT, name)
}

/// The embedding model of that name, if it has a price.
pub fn embedding_model(name: &str) -> Option<&'static EmbeddingPrices> {
    named(models::EMBEDDING, name)
}

/// The reranker of that name, if it has a price.
pub fn rerank_model(name: &str) -> Option<&'static RerankPrices> {
    named(models::RERANK, name)
}

fn named<T>(models: &'static Named<T>, name: &str) -> Option<&'static T> {
    models.iter().find(|(other, _)| *other == name).map(|(_, model)| model)
}

impl ChatModel {
    /// What `usage` costs at the price in force at `at`; the earliest price before there was any.
    pub fn cost(&self, usage: &Usage, at: Timestamp) -> NanoUsd {
        in_force(self.prices, at).map_or(NanoUsd(0), |price| {
            price.input.times(usage.input_tokens)
                + price.output.times(usage.output_tokens)
                + price.cache_write.times(usage.cache_creation_input_tokens)
                + price.cache_read.times(usage.cache_read_input_tokens)
        })
    }
}

impl ChatModel {
    /// The most that a call can cost at the price in force at `at`, whatever a cache makes of its
    /// input.
    pub fn most_cost(&self, input: Tokens, output: Tokens, at: Timestamp) -> NanoUsd {
        in_force(self.prices, at).map_or(NanoUsd(0), |price| {
            price.input.max(price.cache_write).times(input) + price.output.times(output)
        })
    }
}

impl ChatModel {
    /// The second from which on there is a price, in UTC.
    pub fn since_s(&self) -> i64 {
        self.prices.first().map_or(0, |(from, _)| from.midnight().assume_utc().unix_timestamp())
    }
}

impl EmbeddingPrices {
    /// What embedding `tokens` costs at the price in force at `at`.
    pub fn cost(&self, tokens: Tokens, at: Timestamp) -> NanoUsd {
        in_force(self.prices, at).map_or(NanoUsd(0), |price| price.times(tokens))
    }
}

impl RerankPrices {
    /// What a call costs at the price in force at `at`.
    pub fn cost(&self, at: Timestamp) -> NanoUsd {
        in_force(self.prices, at).copied().unwrap_or_default()
    }
}

fn in_force<T>(prices: &Prices<T>, at: Timestamp) -> Option<&T> {
    let day = at.to_datetime().date();
    prices.iter().rev().find(|(from, _)| *from <= day).or(prices.first()).map(|(_, price)| price)
}

#[cfg(test)]
mod tests {
    use time::macros::date;

    use super::*;

    #[test]
    fn every_model_is_named_once_and_has_prices_in_order_of_their_dates() {
        fn check<T, P: 'static>(models: &Named<T>, prices: fn(&T) -> &'static Prices<P>) {
            for (place, (name, model)) in models.iter().enumerate() {
                assert!(models.iter().skip(place + 1).all(|(other, _)| other != name), "{name}");
                let prices = prices(model);
                assert!(!prices.is_empty() && prices.is_sorted_by_key(|(from, _)| *from), "{name}");
            }
        }
        check(models::CHAT, |model| model.prices);
        check(models::EMBEDDING, |model| model.prices);
        check(models::RERANK, |model| model.prices);
    }

    #[test]
    fn cost_is_to_the_nano_dollar() {
        let at = Timestamp::parse("2026-11-01T00:00:00Z").unwrap();
        let usage = Usage {
            input_tokens: Tokens(1_001),
            output_tokens: Tokens(7),
            cache_read_input_tokens: Tokens(13),
            cache_creation_input_tokens: Tokens(17),
        };
        let cost = chat_model("claude-sonnet-4-6").unwrap().cost(&usage, at);
        assert_eq!(cost, NanoUsd(1_001 * 3_000 + 7 * 15_000 + 13 * 300 + 17 * 3_750));
        assert!(chat_model("gpt-2").is_none());
    }

    #[test]
    fn the_price_of_the_day_is_charged() {
        const fn of(input: u64) -> ChatPrice {
            let (free, input) = (NanoUsd(0), NanoUsd(input));
            ChatPrice { input, output: free, cache_write: free, cache_read: free }
        }
        let model = ChatModel {
            max_output_tokens: 1,
            passages: PassageForm::SearchResults,
            prices: &const { [(date!(2026 - 01 - 01), of(1)), (date!(2026 - 02 - 01), of(2))] },
        };
        let usage = Usage { input_tokens: Tokens(1), ..Default::default() };
        for (day, cost) in [("2025-06-01", 1), ("2026-01-31", 1), ("2026-02-01", 2), ("2027-01-01", 2)] {
            let at = Timestamp::parse(&format!("{day}T23:59:59Z")).unwrap();
            assert_eq!(model.cost(&usage, at), NanoUsd(cost), "{day}");
        }
    }
}
