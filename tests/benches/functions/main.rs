//! What the functions take: to start, to carry, to remember, to answer.
//!
//! `cargo bench --profile dev --bench functions` builds the functions as they are deployed (`--release`),
//! and measures them. It measures and judges nothing: each limit is printed beside its figure. Names of
//! parts (`starts`, `sizes`, `memory`, `load`) after `--` measure those alone. What may be set:
//!
//! | variable | is |
//! | --- | --- |
//! | `FUNCTIONS` | a folder, on a disk, with functions that are built already |
//! | `STARTS` | starts of each function |
//! | `REQUESTS` | requests of each row |
//! | `TENANTS` | tenants in the tables of the second half of the rows |

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::panic,
    reason = "a measurement fails by panicking, and prints what it found"
)]

mod load;
mod services;
mod sizes;
mod starts;

use std::path::{Path, PathBuf};

use local::template::Template;

/// The parts, in the order in which they are measured.
const PARTS: [&str; 4] = ["starts", "sizes", "memory", "load"];
/// The least that a function can be, in a package of its own.
const EMPTY: &str = "empty_function";

/// A number from the environment.
fn setting(name: &str, default: usize) -> usize {
    std::env::var_os(name).map_or(default, |value| value.to_str().unwrap().parse().unwrap())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The template, with all services of the functions at this address but for the vector store, which none calls
/// before its first event: it is named as where it is deployed, over TLS.
fn template(services: &str) -> Template {
    let parameters = [
        ("QdrantCells", "default=https://cell.example:6334".to_owned()),
        ("ModelUrl", services.to_owned()),
        ("EmbeddingsUrl", services.to_owned()),
    ];
    let parameters = parameters.map(|(name, value)| (name.to_owned(), value)).into();
    Template::load(&root().join("infra/template.yaml"), &parameters).unwrap()
}

/// Builds the functions' programs as they are deployed, and says where they are.
fn build() -> PathBuf {
    if let Some(folder) = std::env::var_os("FUNCTIONS") {
        return std::path::absolute(folder).unwrap();
    }
    println!("Building the functions with --release, which takes a while …");
    let mut cargo = local::cargo::command();
    cargo.args(["build", "--quiet", "--release", "--bins"]).current_dir(root());
    for package in local::cargo::deployed(&local::cargo::metadata(root()).unwrap()) {
        cargo.args(["--package", package]);
    }
    assert!(cargo.status().unwrap().success(), "the functions do not build");
    // target/<profile>/deps/<benchmark>
    std::env::current_exe().unwrap().ancestors().nth(3).unwrap().join("release")
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` passes no `--bench`: nothing is measured then.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let named: Vec<&str> = PARTS.into_iter().filter(|part| arguments.iter().any(|a| a == part)).collect();
    let wanted = |part: &str| named.is_empty() || named.contains(&part);
    let template = template("http://127.0.0.1:1");
    let programs = build();
    if wanted("starts") {
        starts::measure(&programs);
    }
    if wanted("sizes") {
        sizes::measure(&programs, &template);
    }
    if wanted("memory") {
        load::memory(&programs, &template).await;
    }
    if wanted("load") {
        load::measure(&programs, &template).await;
    }
}
