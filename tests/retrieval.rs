//! Real documents, real questions: is the document that holds the answer among those cited?
//!
//! The documents are the Markdown read-mes and the licence texts that ship inside the crates that this
//! workspace depends on, so that every machine that builds it has them.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::{Stack, Tenant};

/// Questions, each answered in one document: `<crate>-<file>`.
const QUESTIONS: [(&str, &str); 20] = [
    ("Which crate offers pre-allocated storage for a uniform data type?", "slab-readme"),
    ("How are the literal characters { and } included in a static route?", "matchit-readme"),
    (
        "Which hash function performs badly on larger inputs and gives no protection against collision attacks?",
        "fnv-readme",
    ),
    ("How can up to a small number of items be stored on the stack?", "smallvec-readme"),
    ("How do I turn a sequential iterator into a parallel one?", "rayon-readme"),
    ("How can memory be zeroed securely without the compiler optimizing it away?", "zeroize-readme"),
    ("Which type is a wrapper around a u8 that holds a 0 or 1 for constant-time code?", "subtle-readme"),
    ("How many bytes of storage space do Mutex and Once require?", "parking_lot-readme"),
    ("What gives a fast conversion of integer primitives to decimal strings?", "itoa-readme"),
    ("Which routines search for 1, 2 or 3 bytes in the forward or reverse direction?", "memchr-readme"),
    ("How many bytes per iteration does the baseline CRC32 implementation process?", "crc32fast-readme"),
    ("Which version numbering do RubyGems, npm and Composer share with Cargo?", "semver-readme"),
    ("Which utility library is there for working with bytes?", "bytes-readme"),
    ("Which algorithm quickly converts floating point numbers to decimal strings?", "ryu-readme"),
    ("What does the Community Data License Agreement say about using Results?", "webpki-root-certs-license"),
    ("Which text dedicates software to the public domain, free and unencumbered?", "memchr-unlicense"),
    (
        "Must altered source versions be plainly marked, and may their origin be misrepresented?",
        "foldhash-license",
    ),
    ("When do patent licenses terminate if patent litigation is instituted?", "itoa-license-apache"),
    (
        "May the name of a copyright holder be used in advertising these Data Files or Software?",
        "unicode-ident-license-unicode",
    ),
    (
        "How does a service in tower represent an asynchronous function from a request to a response?",
        "tower-readme",
    ),
];

/// The files that the questions are about, and others to lose them among.
fn documents() -> BTreeMap<String, (PathBuf, &'static str)> {
    let output = local::cargo::command()
        // Not offline: some of the packages are of platforms that nobody builds for here, and so not there yet.
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let mut documents = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        if package["source"].is_null() {
            continue;
        }
        let name = package["name"].as_str().unwrap();
        let folder = PathBuf::from(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned();
        let add = &mut |file: &str, kind: &str, content_type| {
            let path = folder.join(file);
            if std::fs::read_to_string(&path).is_ok_and(|text| (600..60_000).contains(&text.len())) {
                documents.insert(format!("{name}-{kind}"), (path, content_type));
            }
        };
        add("README.md", "readme", "text/markdown");
        match name {
            "webpki-root-certs" | "foldhash" => add("LICENSE", "license", "text/plain"),
            "memchr" => add("UNLICENSE", "unlicense", "text/plain"),
            "itoa" => add("LICENSE-APACHE", "license-apache", "text/plain"),
            "unicode-ident" => add("LICENSE-UNICODE", "license-unicode", "text/plain"),
            "slab" => add("LICENSE", "license", "text/plain"),
            _ => {}
        }
    }
    documents
}

async fn ingest(tenant: &Tenant, documents: &[(&String, &(PathBuf, &'static str))]) {
    for batch in documents.chunks(20) {
        let batch: Vec<Value> = batch
            .iter()
            .map(|(id, (path, content_type))| {
                let content = std::fs::read_to_string(path).unwrap();
                json!({"id": id, "title": id, "content": content, "content_type": content_type})
            })
            .collect();
        let answer = tenant.post("/v1/documents", &json!({"documents": batch})).await;
        let answer = answer.expect_status(StatusCode::CREATED).json();
        for document in answer["documents"].as_array().unwrap() {
            assert_eq!(document["status"], "ready", "{document}");
        }
    }
}

#[tokio::test]
async fn the_document_that_holds_the_answer_is_cited_and_no_tenant_sees_anothers() {
    let documents = documents();
    let asked: Vec<&str> = QUESTIONS.iter().map(|(_, id)| *id).collect();
    for id in &asked {
        assert!(documents.contains_key(*id), "{id} is not among the documents");
    }
    let (mine, others): (Vec<_>, Vec<_>) = documents.iter().partition(|(id, _)| asked.contains(&id.as_str()));
    let (more, theirs) = others.split_at(others.len() / 2);
    let acme_documents: Vec<_> = mine.into_iter().chain(more.iter().copied().take(60)).collect();
    let globex_documents: Vec<_> = theirs.iter().copied().take(30).collect();
    assert!(acme_documents.len() >= 50 && globex_documents.len() >= 20);

    let stack = Stack::start().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    let started = std::time::Instant::now();
    ingest(&acme, &acme_documents).await;
    ingest(&globex, &globex_documents).await;
    println!(
        "{} documents for acme, {} for globex, ingested in {:.1} s",
        acme_documents.len(),
        globex_documents.len(),
        started.elapsed().as_secs_f64()
    );

    let ids = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|c| c["document_id"].as_str().unwrap().to_owned()).collect()
    };
    let owned = |documents: &[(&String, &(PathBuf, &'static str))], id: &str| {
        documents.iter().any(|(own, _)| *own == id)
    };
    let mut cited = 0;
    for (question, expected) in QUESTIONS {
        let answer = acme.ask(question).await;
        let citations = ids(&answer["citations"]);
        let found = citations.iter().any(|id| id == expected);
        cited += usize::from(found);
        println!("{} {question} {citations:?}", if found { "cited " } else { "MISSED" });
        assert!(citations.iter().all(|id| owned(&acme_documents, id)), "{citations:?}");
        let hits = Value::from(acme.search(question, 50).await);
        assert!(ids(&hits).iter().all(|id| owned(&acme_documents, id)));

        // The other tenant asks the same and is shown only its own.
        let answer = globex.ask(question).await;
        assert!(ids(&answer["citations"]).iter().all(|id| owned(&globex_documents, id)), "{answer}");
        let hits = Value::from(globex.search(question, 50).await);
        assert!(ids(&hits).iter().all(|id| owned(&globex_documents, id)));
    }
    println!("{cited} of {} answers cite the document that holds the answer", QUESTIONS.len());
    assert!(cited >= 18, "only {cited} of {}", QUESTIONS.len());
}
