//! Any bytes as a document of any type: its first byte says which, the rest is the file. Good seeds are the files of
//! `tests/samples` behind such a byte.

#![no_main]

use libfuzzer_sys::fuzz_target;
use shared::document::ContentType;

fuzz_target!(|input: &[u8]| {
    let Some((first, content)) = input.split_first() else { return };
    let kinds = ContentType::ALL;
    ingestion::fuzz(kinds[usize::from(*first) % kinds.len()], content);
});
