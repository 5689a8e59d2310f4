//! Which passages are shown of those that were found: not all of one document, and in a reranker's order where there
//! is one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::reranker::{Behaviour, Reranker};
use tests::{Options, Stack, Tenant};

/// What one call of the reranker costs, in nano-dollars (`shared/src/pricing/models.rs`).
const CALL: u64 = 2_000_000;
const QUESTION: &str = "Where does the heron nest?";

async fn library(acme: &Tenant) {
    for (id, content) in [
        ("heron", "Where does the heron nest? The heron nests where herons nest, says the heron."),
        ("pond", "At the pond the heron hides in the reeds. It is seldom seen."),
        ("canteen", "The canteen serves soup on Mondays."),
    ] {
        acme.store(id, id, content).await;
    }
}

async fn found(acme: &Tenant) -> Vec<String> {
    let hits = acme.search(QUESTION, 2).await;
    hits.iter().map(|hit| hit["document_id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_reranker_orders_what_is_shown_and_is_on_the_bill() {
    let (reranker, url) = Reranker::start().await;
    let parameters = vec![("RerankUrl", url)];
    let stack = Stack::start_with(Options { parameters, ..Options::default() }).await;
    let acme = stack.tenant("acme");
    library(&acme).await;
    assert_eq!(reranker.take_asked(), Vec::<Value>::new(), "storing asks nobody");

    assert_eq!(found(&acme).await, ["pond", "heron"]);
    let asked = reranker.take_asked();
    assert_eq!(asked.len(), 1);
    assert_eq!((&asked[0]["query"], &asked[0]["model"]), (&json!(QUESTION), &json!("rerank-v3.5")));
    let documents = asked[0]["documents"].as_array().unwrap();
    assert_eq!(asked[0]["top_n"], documents.len());
    assert!(documents.len() > 2, "more than are wanted: {documents:?}");
    let answer = acme.ask(QUESTION).await;
    assert_eq!(reranker.take_asked().len(), 1);
    let passages = stack.last_model_request().await.to_string();
    assert!(passages.find("reeds").unwrap() < passages.find("herons nest").unwrap(), "{passages}");

    // To the nano-dollar: in the answer, in the ledger and on the bill.
    let usage = &answer["usage"];
    let cost = usage["input_tokens"].as_u64().unwrap() * 3_000
        + usage["output_tokens"].as_u64().unwrap() * 15_000
        + usage["cache_creation_input_tokens"].as_u64().unwrap() * 3_750
        + usage["cache_read_input_tokens"].as_u64().unwrap() * 300
        + usage["embedding_tokens"].as_u64().unwrap() * 20
        + CALL;
    assert_eq!(usage["cost_nano_usd"], cost);
    let records = stack.items("audit", "acme", "TICKET#").await;
    let reranked: Vec<&Value> =
        records.iter().filter(|record| record["rerank_model"] == "rerank-v3.5").collect();
    assert_eq!(reranked.len(), 2, "{records:?}");
    assert!(reranked.iter().all(|record| record["rerank_cost_nano_usd"] == CALL));
    assert!(reranked.iter().all(|record| record.get("estimated").is_none()));
    // And on the wire, as the contract has it.
    let log = acme.get("/v1/audit?action=document_access").await.expect_status(StatusCode::OK).json();
    assert_eq!(log["records"][0]["rerank_cost_nano_usd"], CALL, "{log}");
    let bill = async {
        loop {
            let usage = acme.get("/v1/usage").await.json();
            let line = &usage["models"]["rerank-v3.5"];
            if line["cost_nano_usd"] == 2 * CALL {
                return usage;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), bill).await.expect("the bill has both calls");
    stack.stop().await;
}

#[tokio::test]
async fn without_its_answer_the_searchs_own_order_holds() {
    let (reranker, url) = Reranker::start().await;
    let parameters = vec![("RerankUrl", url)];
    let stack = Stack::start_with(Options { parameters, ..Options::default() }).await;
    let acme = stack.tenant("acme");
    library(&acme).await;
    let bad = json!({"results": [{"index": 7, "relevance_score": 0.5}]});
    // What it did; how often it was asked; whether it may want to be paid.
    for (behaviour, asked, charged) in [
        (Behaviour::Answers(400, json!({"message": "no such model"})), 1, false),
        (Behaviour::Answers(503, json!({})), 3, false),
        (Behaviour::Answers(200, bad), 1, true),
        (Behaviour::Answers(200, json!("what?")), 1, true),
        (Behaviour::Sleeps, 1, true),
    ] {
        reranker.behave(behaviour.clone());
        let started = std::time::Instant::now();
        assert_eq!(found(&acme).await[0], "heron", "{behaviour:?}");
        assert!(started.elapsed() < Duration::from_secs(9), "{behaviour:?}: {:?}", started.elapsed());
        assert_eq!(reranker.take_asked().len(), asked, "{behaviour:?}");
        let record = stack.items("audit", "acme", "TICKET#").await.pop().unwrap();
        let cost = record["rerank_cost_nano_usd"].as_u64().unwrap_or(0);
        assert_eq!(cost, if charged { CALL } else { 0 }, "{behaviour:?}: {record}");
        assert_eq!(record["estimated"] == true, charged, "{behaviour:?}: {record}");
    }
    let logs = stack.logs();
    assert_eq!(logs.matches("\"RerankFailures\":1").count(), 5);
    assert!(!logs.contains("reeds"), "no passage is in a log");
    stack.stop().await;
}

#[tokio::test]
async fn one_document_does_not_take_all_places() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    // Ten passages that all match better than the other documents' one each.
    let sections: Vec<String> = (0..10)
        .map(|n| {
            let filler = format!("Pass {n} of the survey found the heron again. ").repeat(12);
            format!("# The heron, part {n}\n\nThe heron of pond {n} nests in the reeds. {filler}")
        })
        .collect();
    let long = json!({"id": "survey", "title": "The heron survey", "content": sections.join("\n\n"),
        "content_type": "text/markdown"});
    let stored = acme.post("/v1/documents", &long).await.json();
    assert!(stored["documents"][0]["chunks"].as_u64().unwrap() >= 8, "{stored}");
    acme.store("letter", "A letter", "A neighbour writes that a heron was near the canteen.").await;
    acme.store("menu", "The menu", "Soup, fish, and no heron.").await;
    let of = async |top_k: u32| {
        let hits = acme.search("Where does the heron of the pond nest?", top_k).await;
        hits.iter().map(|hit| hit["document_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let hits = of(5).await;
    let count = |hits: &[String], id: &str| hits.iter().filter(|hit| *hit == id).count();
    assert_eq!((count(&hits, "survey"), hits.len()), (3, 5), "{hits:?}");
    assert_eq!(hits[0], "survey", "the best stays the best");
    // Where the others have no more to show, nothing is left out.
    let hits = of(8).await;
    assert_eq!((count(&hits, "survey"), hits.len()), (6, 8), "{hits:?}");
    stack.stop().await;
}
