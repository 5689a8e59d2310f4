//! The models that there are, each with its prices by the day from which they hold, oldest first.
//!
//! Tables of the program and no text that it parses: a function looks into them before its first event. That names are
//! unique and days in order, a test of `pricing` holds.

use time::macros::date;

use super::{ChatModel, ChatPrice, EmbeddingPrices, NanoUsd, PassageForm, RerankPrices};

/// Models by their names.
pub(super) type Named<T> = [(&'static str, T)];

/// Chat models, in nano-dollars a token.
pub(super) static CHAT: &Named<ChatModel> = &[
    (
        "claude-haiku-4-5-20251001",
        ChatModel {
            max_output_tokens: 64_000,
            passages: PassageForm::SearchResults,
            prices: &[(
                date!(2025 - 10 - 15),
                ChatPrice {
                    input: NanoUsd(1_000),
                    output: NanoUsd(5_000),
                    cache_write: NanoUsd(1_250),
                    cache_read: NanoUsd(100),
                },
            )],
        },
    ),
    (
        "claude-sonnet-4-6",
        ChatModel {
            max_output_tokens: 64_000,
            passages: PassageForm::SearchResults,
            prices: &[(
                date!(2026 - 02 - 17),
                ChatPrice {
                    input: NanoUsd(3_000),
                    output: NanoUsd(15_000),
                    cache_write: NanoUsd(3_750),
                    cache_read: NanoUsd(300),
                },
            )],
        },
    ),
    (
        "claude-opus-4-6",
        ChatModel {
            max_output_tokens: 128_000,
            passages: PassageForm::SearchResults,
            prices: &[(
                date!(2026 - 02 - 05),
                ChatPrice {
                    input: NanoUsd(5_000),
                    output: NanoUsd(25_000),
                    cache_write: NanoUsd(6_250),
                    cache_read: NanoUsd(500),
                },
            )],
        },
    ),
];

/// Embedding models, in nano-dollars a token.
pub(super) static EMBEDDING: &Named<EmbeddingPrices> = &[
    ("text-embedding-3-small", EmbeddingPrices { prices: &[(date!(2024 - 01 - 25), NanoUsd(20))] }),
    ("offline-embeddings", EmbeddingPrices { prices: &[(date!(2024 - 01 - 25), NanoUsd(20))] }),
    ("text-embedding-3-large", EmbeddingPrices { prices: &[(date!(2024 - 01 - 25), NanoUsd(130))] }),
];

/// Rerankers, in nano-dollars a call.
pub(super) static RERANK: &Named<RerankPrices> = &[
    ("rerank-v3.5", RerankPrices { prices: &[(date!(2024 - 12 - 02), NanoUsd(2_000_000))] }),
    ("BAAI/bge-reranker-v2-m3", RerankPrices { prices: &[(date!(2024 - 03 - 18), NanoUsd(0))] }),
];
