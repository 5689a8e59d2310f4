//! Any bytes as a document of any type, said to be in any charset or none: the first two bytes say which, the rest is the
//! file. Good seeds are the files of `tests/samples` behind two such bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use shared::document::ContentType;

/// The labels of some that are read in ways of their own; the first is of none.
const CHARSETS: [&str; 12] = [
    "none", "utf-8", "utf-16le", "utf-16be", "windows-1252", "iso-2022-jp", "euc-jp", "shift_jis", "gb18030", "big5",
    "euc-kr", "x-user-defined",
];

fuzz_target!(|input: &[u8]| {
    let Some(([kind, charset], content)) = input.split_first_chunk() else { return };
    let kinds = ContentType::ALL;
    let charset = CHARSETS[usize::from(*charset) % CHARSETS.len()];
    ingestion::fuzz(kinds[usize::from(*kind) % kinds.len()], charset, content);
});
