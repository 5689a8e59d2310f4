//! How well passages are found: questions whose answers are known, on documents of a company that does not exist, by
//! each method and by the product.
//!
//! `labelled/documents` and `labelled/questions.tsv` were written for this test, before anything was measured with
//! them, and are not to be fitted to a method. A question counts as answered by a passage of its document that holds the
//! answer's own words. Several styles: `exact` uses the document's terms; `paraphrase` avoids them; `number` asks for
//! one; `table` for a cell; of `none` there is no answer.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use qdrant_client::qdrant::{
    Document, PrefetchQueryBuilder, Query, QueryPointsBuilder, RrfBuilder, ScoredPoint, VectorInput,
};
use reqwest::StatusCode;
use serde_json::{Value, json};
use shared::env;
use shared::ranking::{MOST_OF_ONE, diverse};
use tests::{Embeddings, Options, Stack, Tenant};

/// Passages that are looked at.
const DEPTH: u32 = 10;
const STYLES: [&str; 4] = ["exact", "paraphrase", "number", "table"];
/// How an answer begins that says that there is none.
const NO_ANSWER: &str = "The documents I was given do not answer this question";

struct Question {
    style: String,
    document: String,
    answer: String,
    text: String,
}

struct Library {
    /// Title and content, by id.
    documents: BTreeMap<String, (String, String)>,
    questions: Vec<Question>,
}

/// White space as one space each, so that lines may be broken anywhere.
fn plain(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Library {
    fn read() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("labelled");
        let documents = std::fs::read_dir(folder.join("documents")).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            let content = std::fs::read_to_string(&path).unwrap();
            let title = content.lines().next().unwrap().trim_start_matches("# ").to_owned();
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), (title, content))
        });
        let questions = std::fs::read_to_string(folder.join("questions.tsv")).unwrap();
        let questions = questions.lines().skip(1).map(|line| {
            let mut cells = line.split('\t').map(str::to_owned);
            let mut cell = || cells.next().unwrap();
            Question { style: cell(), document: cell(), answer: cell(), text: cell() }
        });
        Self { documents: documents.collect(), questions: questions.collect() }
    }

    fn with_answers(&self) -> impl Iterator<Item = &Question> {
        self.questions.iter().filter(|question| question.style != "none")
    }

    async fn ingest(&self, tenant: &Tenant) {
        let documents: Vec<Value> = self
            .documents
            .iter()
            .map(|(id, (title, content))| {
                json!({"id": id, "title": title, "content": content, "content_type": "text/markdown"})
            })
            .collect();
        let answer = tenant.post("/v1/documents", &json!({"documents": documents})).await;
        let answer = answer.expect_status(StatusCode::CREATED).json();
        assert!(answer["documents"].as_array().unwrap().iter().all(|d| d["status"] == "ready"), "{answer}");
    }
}

/// The embeddings that the environment names: EMBEDDINGS_URL, EMBEDDINGS_API_KEY, EMBEDDINGS_MODEL and
/// EMBEDDINGS_DIMENSIONS; without an address there, the offline ones.
fn embeddings() -> Option<Embeddings> {
    let url = env::text("EMBEDDINGS_URL").ok()?;
    let text = |name| env::text(name).unwrap();
    let dimensions = env::parsed("EMBEDDINGS_DIMENSIONS").unwrap();
    Some(Embeddings { url, key: text("EMBEDDINGS_API_KEY"), model: text("EMBEDDINGS_MODEL"), dimensions })
}

/// A tenant whom no limit hinders.
async fn unhindered(stack: &Stack) -> Tenant {
    let limits = json!({"requests_per_minute": 20_000, "tokens_per_day": 100_000_000, "monthly_token_budget": 1_000_000_000});
    stack
        .provision(json!({"tenant_id": "kestrel", "tier": "enterprise", "company_name": "Kestrel Holdings",
            "limits": limits}))
        .await
}

#[derive(Clone, Debug)]
struct Passage {
    document: String,
    title: String,
    text: String,
}

/// The vector store, asked directly: what the methods find by themselves.
struct Bench {
    http: reqwest::Client,
    embeddings: Embeddings,
    store: qdrant_client::Qdrant,
    collection: String,
}

impl Bench {
    async fn vector(&self, text: &str) -> Vec<f32> {
        let Embeddings { url, key, model, dimensions } = &self.embeddings;
        let body =
            json!({"input": [text], "model": model, "dimensions": dimensions, "encoding_format": "float"});
        let request = self.http.post(format!("{url}/v1/embeddings")).bearer_auth(key);
        let answer: Value = request.json(&body).send().await.unwrap().json().await.unwrap();
        let vector = answer["data"][0]["embedding"].as_array().unwrap().iter();
        vector.map(|number| number.as_f64().unwrap() as f32).collect()
    }

    async fn ask(&self, query: QueryPointsBuilder) -> Vec<Passage> {
        let found = self.store.query(query.with_payload(true)).await.unwrap().result;
        let text = |point: &ScoredPoint, name: &str| point.payload[name].as_str().unwrap().clone();
        let passage = |point: &ScoredPoint| Passage {
            document: text(point, "document_id"),
            title: text(point, "title"),
            text: text(point, "text"),
        };
        found.iter().map(passage).collect()
    }

    async fn dense(&self, question: &str) -> Vec<Passage> {
        let query =
            QueryPointsBuilder::new(&self.collection).query(self.vector(question).await).using("dense");
        self.ask(query.limit(u64::from(DEPTH))).await
    }

    async fn bm25(&self, question: &str) -> Vec<Passage> {
        let query = QueryPointsBuilder::new(&self.collection).query(words(question)).using("sparse");
        self.ask(query.limit(u64::from(DEPTH))).await
    }

    /// As the product asks, before anything is done to the order.
    async fn hybrid(&self, question: &str, limit: u64) -> Vec<Passage> {
        let vector = self.vector(question).await;
        let prefetch = |query: Query, using: &str| {
            PrefetchQueryBuilder::default().query(query).using(using).limit(40_u64)
        };
        let query = QueryPointsBuilder::new(&self.collection)
            .add_prefetch(prefetch(Query::new_nearest(VectorInput::from(vector)), "dense"))
            .add_prefetch(prefetch(words(question), "sparse"))
            .query(Query::new_rrf(RrfBuilder::with_k(60)));
        self.ask(query.limit(limit)).await
    }
}

fn words(question: &str) -> Query {
    let document = Document { text: question.into(), model: "qdrant/bm25".into(), ..Default::default() };
    Query::new_nearest(VectorInput::from(document))
}

/// A real reranker, if the environment names one: RERANK_URL, RERANK_API_KEY and RERANK_MODEL.
async fn reranked(http: &reqwest::Client, question: &str, passages: Vec<Passage>) -> Option<Vec<Passage>> {
    let url = env::text("RERANK_URL").ok()?;
    let documents: Vec<String> = passages.iter().map(|p| format!("{}\n\n{}", p.title, p.text)).collect();
    let body = json!({"model": env::text("RERANK_MODEL").unwrap(), "query": question, "documents": documents,
        "top_n": documents.len()});
    let request = http.post(format!("{url}/v1/rerank")).bearer_auth(env::text("RERANK_API_KEY").unwrap());
    let answer: Value = request.json(&body).send().await.unwrap().json().await.unwrap();
    let order = answer["results"].as_array().unwrap().iter().map(|result| result["index"].as_u64().unwrap());
    let ordered = order.map(|place| passages[usize::try_from(place).unwrap()].clone()).collect();
    Some(diverse(ordered, |p: &Passage| p.document.clone(), MOST_OF_ONE, DEPTH as usize))
}

/// The place, from 1, of the first passage that holds the answer.
fn place(question: &Question, found: &[Passage]) -> Option<usize> {
    let holds = |passage: &Passage| {
        passage.document == question.document && plain(&passage.text).contains(&question.answer)
    };
    found.iter().position(holds).map(|place| place + 1)
}

/// What a method reached, by style.
#[derive(Default)]
struct Score(BTreeMap<String, Vec<Option<usize>>>);

impl Score {
    fn note(&mut self, question: &Question, found: &[Passage]) {
        self.0.entry(question.style.clone()).or_default().push(place(question, found));
    }

    /// Recall at 5 and the mean reciprocal rank, in percent.
    fn of(&self, styles: &[&str]) -> (f64, f64) {
        let places: Vec<Option<usize>> = styles.iter().flat_map(|style| self.0[*style].clone()).collect();
        let share = |sum: f64| 100.0 * sum / places.len() as f64;
        let within = places.iter().filter(|place| place.is_some_and(|place| place <= 5)).count();
        let reciprocal: f64 = places.iter().flatten().map(|place| 1.0 / *place as f64).sum();
        (share(within as f64), share(reciprocal))
    }
}

#[test]
fn every_question_has_its_answer_in_its_document() {
    let library = Library::read();
    assert!(library.documents.len() >= 40 && library.with_answers().count() >= 200);
    for style in STYLES {
        let count = library.questions.iter().filter(|question| question.style == style).count();
        assert!(count >= 25, "{count} of style {style}");
    }
    let texts: BTreeSet<&str> = library.questions.iter().map(|question| question.text.as_str()).collect();
    assert_eq!(texts.len(), library.questions.len());
    for question in library.with_answers() {
        assert!(STYLES.contains(&question.style.as_str()), "{}", question.style);
        let (_, content) = &library.documents[&question.document];
        assert!(plain(content).contains(&question.answer), "{}: {}", question.document, question.answer);
    }
    for question in library.questions.iter().filter(|question| question.style == "none") {
        assert_eq!((question.document.as_str(), question.answer.as_str()), ("-", "-"), "{}", question.text);
    }
    let asked: BTreeSet<&str> = library.with_answers().map(|question| question.document.as_str()).collect();
    assert_eq!(asked.len(), library.documents.len(), "every document is asked about");
}

#[tokio::test]
async fn passages_are_found_by_each_method() {
    let (library, own) = (Library::read(), embeddings());
    let stack = Stack::start_with(Options { embeddings: own.clone(), ..Options::default() }).await;
    let kestrel = unhindered(&stack).await;
    library.ingest(&kestrel).await;
    let offline = || Embeddings {
        url: stack.ready()["embeddings_url"].as_str().unwrap().to_owned(),
        key: "offline".to_owned(),
        model: "offline-embeddings".to_owned(),
        dimensions: 512,
    };
    let bench = Bench {
        http: tests::client(),
        embeddings: own.unwrap_or_else(offline),
        store: stack.qdrant(),
        collection: "tenant_kestrel".to_owned(),
    };
    let mut scores: BTreeMap<&str, Score> = BTreeMap::new();
    for question in library.with_answers() {
        let text = &question.text;
        let mut note = |method, found: &[Passage]| scores.entry(method).or_default().note(question, found);
        note("1 dense alone", &bench.dense(text).await);
        note("2 BM25 alone", &bench.bm25(text).await);
        note("3 fused (RRF)", &bench.hybrid(text, u64::from(DEPTH)).await);
        // What a client gets: fused, and not all of one document.
        let hits = kestrel.search(text, DEPTH).await;
        let field = |hit: &Value, name: &str| hit[name].as_str().unwrap().to_owned();
        let shown: Vec<Passage> = hits
            .iter()
            .map(|hit| Passage {
                document: field(hit, "document_id"),
                title: field(hit, "title"),
                text: field(hit, "text"),
            })
            .collect();
        note("4 `POST /v1/search`", &shown);
        if let Some(found) = reranked(&bench.http, text, bench.hybrid(text, 40).await).await {
            note("5 the same, reranked", &found);
        }
    }
    println!("| recall@5, MRR in % | all | {} |", STYLES.join(" | "));
    println!("| --- | --- {}|", "| --- ".repeat(STYLES.len()));
    for (method, score) in &scores {
        let cells: Vec<String> = std::iter::once(&STYLES[..])
            .chain(STYLES.iter().map(std::slice::from_ref))
            .map(|styles| score.of(styles))
            .map(|(recall, rank)| format!("{recall:.1}, {rank:.1}"))
            .collect();
        // Without the number that keeps them in order.
        println!(
            "| {} | {} |",
            method.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' '),
            cells.join(" | ")
        );
    }
    for (method, score) in &scores {
        for style in STYLES {
            println!("{method} {style}: {} questions", score.0[style].len());
        }
    }
    let recall = |method: &str| scores[method].of(&STYLES).0;
    let product = recall("4 `POST /v1/search`");
    assert!(product >= LEAST_RECALL, "{product}");
    // Neither fusing nor spreading costs what one method finds by itself.
    let alone = recall("1 dense alone").min(recall("2 BM25 alone"));
    assert!(product >= alone, "{product} {alone}");
    stack.stop().await;
}

/// Of the questions without an answer, how many the offline model, which compares words, must answer so.
const LEAST_SAID: usize = 8;
/// What must be found among the first five, in percent.
const LEAST_RECALL: f64 = 72.0;

#[tokio::test]
async fn what_the_documents_do_not_say_is_said_to_be_missing() {
    let library = Library::read();
    let stack = Stack::start().await;
    let kestrel = unhindered(&stack).await;
    library.ingest(&kestrel).await;
    let (mut said, mut none, mut wrongly, mut asked) = (0, 0, 0, 0);
    for question in &library.questions {
        let answer = kestrel.ask(&question.text).await;
        let response = answer["response"].as_str().unwrap();
        let missing = response.contains(NO_ANSWER);
        // An answer that says that there is none cites nothing; any other cites what it was made of.
        assert_eq!(missing, answer["citations"].as_array().unwrap().is_empty(), "{answer}");
        if question.style == "none" {
            none += 1;
            said += usize::from(missing);
        } else {
            asked += 1;
            wrongly += usize::from(missing);
            // Only where the words are others, which the offline embeddings cannot see through.
            assert!(!missing || question.style == "paraphrase", "{}", question.text);
        }
        // The model is told so with every question.
        let told = stack.last_model_request().await["system"].to_string();
        assert!(told.contains("If they do not hold the answer, say so plainly"), "{told}");
    }
    println!("{said} of {none} questions without an answer are answered so, and {wrongly} of {asked} others");
    assert!(said >= LEAST_SAID, "{said}");
    stack.stop().await;
}
