//! Searching while documents change: every search finds each document in exactly one edition, whole.
//!
//! A document's passages lie in the vector store, which has no transactions; which edition a document has is one
//! attribute of its record (`current`), and changes in one write. Whoever replaces a document stores the new edition's
//! passages as *pending*; says of the earlier ones that they are *superseded*; makes the new one current; and only then
//! deletes the earlier ones and says that the new one is settled. So a passage that is neither pending nor superseded is
//! of the current edition, and a search that sees no other costs nothing more. Where one does, the records are asked,
//! and the search is made again for what they say, until it was the case both before and after.
//!
//! It rests on single points alone: that each is seen as it was at some instant of the search, and that what the store
//! has confirmed is seen by every search that begins later; and on that no search lasts longer than a whole replacement,
//! of which it could see the earlier passages when they are gone and the later ones when they are not there yet.
//! Whatever crashes at whatever step, the records are right.

use crate::aws::documents::DocumentStore;
use crate::clock::Timestamp;
use crate::document::Editions;
use crate::error::ApiError;
use crate::scope::TenantScope;
use crate::vectors::{Collection, Hit, doubtful};

/// How often a search is made anew because documents have changed meanwhile. Each time takes a whole replacement, so
/// that more than two are rare.
const MOST_ROUNDS: u32 = 10;

/// The passages that match `text` and its vector best, at most `top_k`, best first.
///
/// # Errors
/// If a store does not answer, or documents change faster than they are searched.
pub async fn search(
    collection: &Collection<'_>,
    documents: &DocumentStore,
    scope: &TenantScope,
    (text, vector): (&str, Vec<f32>),
    top_k: u32,
    now: Timestamp,
) -> Result<Vec<Hit>, ApiError> {
    let mut editions = Editions::new();
    for _ in 0..MOST_ROUNDS {
        let hits = collection.search(text, vector.clone(), top_k, now, &editions).await?;
        let mut asked = doubtful(&hits);
        if asked.is_empty() && editions.is_empty() {
            return Ok(hits);
        }
        asked.extend(editions.keys().cloned());
        let current = documents.editions(scope, asked).await?;
        if current == editions {
            return Ok(hits);
        }
        editions = current;
    }
    tracing::warn!("Documents change faster than they are searched");
    Err(ApiError::unavailable("the index"))
}
