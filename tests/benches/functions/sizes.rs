//! How much a function is to carry: its program as `bootstrap` in a zip file, as Lambda takes it.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use local::template::Template;

use crate::EMPTY;

/// The most that one may be, in bytes.
const LIMIT: u64 = 6_000_000;
/// The program of the template's layer.
const READER: &str = "document_reader";
/// What a zip file with one entry has beside its data: a header, the entry in the list, the list's end, and
/// the name twice.
const AROUND: u64 = 30 + 46 + 22 + 2 * "bootstrap".len() as u64;

pub fn measure(programs: &Path, template: &Template) {
    let names: BTreeSet<&str> = template.functions.iter().map(|function| &*function.binary).collect();
    println!(
        "\nProgram as `bootstrap` in a zip file\n{:<20} {:>12} {:>12}   limit {LIMIT}",
        "", "bytes", "zipped"
    );
    for name in [EMPTY, READER].into_iter().chain(names) {
        let program = std::fs::read(programs.join(name)).unwrap();
        let mut zip = DeflateEncoder::new(Vec::new(), Compression::default());
        zip.write_all(&program).unwrap();
        let zipped = zip.finish().unwrap().len() as u64 + AROUND;
        let verdict = if zipped > LIMIT { "over" } else { "" };
        println!("{name:<20} {:>12} {zipped:>12}   {verdict}", program.len());
    }
}
