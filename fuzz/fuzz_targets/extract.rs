//! Any bytes as a document of any type, said to be in any charset or none. Good seeds are the files of `tests/samples`
//! behind two bytes, which say as what they are read (`ingestion::fuzz`).

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| ingestion::fuzz(input));
