//! Through the real client, over loopback.

use std::path::Path;

use jsonwebtoken::{EncodingKey, Header};
use qdrant_client::qdrant::{
    Condition, CountPoints, CountPointsBuilder, CreateCollectionBuilder, CreateFieldIndexCollectionBuilder,
    DeletePointsBuilder, Distance, Document, FieldType, Filter, GetPointsBuilder, IdfParamsBuilder, Modifier,
    NamedVectors, PointStruct, PrefetchQueryBuilder, Query, QueryPointsBuilder, Range, RrfBuilder,
    ScrollPointsBuilder, SearchParamsBuilder, SetPayloadPointsBuilder, ShardKeySelector,
    SparseVectorParamsBuilder, SparseVectorsConfigBuilder, UpsertPointsBuilder, Vector, VectorInput,
    VectorParamsBuilder, VectorsConfigBuilder, WalConfigDiffBuilder,
};
use qdrant_client::{Payload, Qdrant, QdrantError};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Code;

use crate::serving::Traces;

const ROOT: &str = "the-root-key";

struct Server {
    url: String,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(directory: &Path) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let serving = super::serve(listener, directory.to_owned(), ROOT.into(), Traces::default(), async {
            let _ = stopped.await;
        });
        Self { url, stop, task: tokio::spawn(async { serving.await.unwrap() }) }
    }

    fn client(&self, key: &str) -> Qdrant {
        Qdrant::from_url(&self.url).api_key(key).skip_compatibility_check().build().unwrap()
    }

    fn token(&self, claims: &Value) -> Qdrant {
        let key = EncodingKey::from_secret(ROOT.as_bytes());
        self.client(&jsonwebtoken::encode(&Header::default(), claims, &key).unwrap())
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, QdrantError>) -> Code {
    match result.unwrap_err() {
        QdrantError::ResponseError { status } => status.code(),
        other => panic!("{other:?}"),
    }
}

async fn create(client: &Qdrant, name: &str) {
    let mut dense = VectorsConfigBuilder::default();
    dense.add_named_vector_params("dense", VectorParamsBuilder::new(3, Distance::Cosine));
    let mut sparse = SparseVectorsConfigBuilder::default();
    sparse.add_named_vector_params("sparse", SparseVectorParamsBuilder::default().modifier(Modifier::Idf));
    let request = CreateCollectionBuilder::new(name)
        .vectors_config(dense)
        .sparse_vectors_config(sparse)
        .wal_config(WalConfigDiffBuilder::default().wal_capacity_mb(1));
    client.create_collection(request).await.unwrap();
    let index = CreateFieldIndexCollectionBuilder::new(name, "doc", FieldType::Keyword).wait(true);
    client.create_field_index(index).await.unwrap();
}

fn point(id: u64, vector: Vec<f32>, text: &str) -> PointStruct {
    let words = Document { text: text.into(), model: "qdrant/bm25".into(), ..Default::default() };
    let vectors =
        NamedVectors::default().add_vector("dense", vector).add_vector("sparse", Vector::from(words));
    let payload: Payload = json!({"doc": format!("d{}", id % 2), "n": id, "text": text}).try_into().unwrap();
    PointStruct::new(id, vectors, payload)
}

async fn fill(client: &Qdrant, name: &str) {
    let points = vec![
        point(1, vec![1.0, 0.0, 0.0], "annual leave is twenty five days"),
        point(2, vec![0.0, 1.0, 0.0], "the canteen serves soup"),
        point(3, vec![0.0, 0.9, 0.1], "trains are booked in second class"),
    ];
    client.upsert_points(UpsertPointsBuilder::new(name, points).wait(true)).await.unwrap();
}

fn hybrid(name: &str, vector: Vec<f32>, text: &str) -> QueryPointsBuilder {
    let words = Document { text: text.into(), model: "qdrant/bm25".into(), ..Default::default() };
    QueryPointsBuilder::new(name)
        .add_prefetch(
            PrefetchQueryBuilder::default().query(Query::new_nearest(vector)).using("dense").limit(10u64),
        )
        .add_prefetch(
            PrefetchQueryBuilder::default()
                .query(Query::new_nearest(VectorInput::from(words)))
                .using("sparse")
                .limit(10u64),
        )
        .query(Query::new_rrf(RrfBuilder::with_k(60)))
        .limit(3)
        .with_payload(true)
}

fn ids(result: Vec<qdrant_client::qdrant::ScoredPoint>) -> Vec<i64> {
    result.iter().map(|p| p.payload["n"].as_integer().unwrap()).collect()
}

#[tokio::test]
async fn dense_and_words_are_fused_by_rank() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    create(&client, "c").await;
    fill(&client, "c").await;
    let found = client.query(hybrid("c", vec![0.0, 1.0, 0.0], "soup in the canteen")).await.unwrap().result;
    assert_eq!(found[0].payload["n"].as_integer(), Some(2));
    // First in both lists: 2 / (60 + 1), with ranks counted from 0 as the real server does.
    assert!((found[0].score - 2.0 / 60.0).abs() < 2e-3, "{}", found[0].score);
    // Words alone find what the vector does not.
    let found = client.query(hybrid("c", vec![0.0, 1.0, 0.0], "annual leave")).await.unwrap().result;
    assert!(ids(found).contains(&1));
    let only = hybrid("c", vec![0.0, 1.0, 0.0], "soup")
        .filter(Filter::must([Condition::matches("doc", "d1".to_owned())]));
    let found = ids(client.query(only).await.unwrap().result);
    assert!(found.iter().all(|n| n % 2 == 1), "{found:?}");
}

#[tokio::test]
async fn a_payload_is_set_where_a_filter_says_and_a_list_matches_by_any_of_its_values() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    create(&client, "c").await;
    fill(&client, "c").await;
    let index = CreateFieldIndexCollectionBuilder::new("c", "readers", FieldType::Keyword).wait(true);
    client.create_field_index(index).await.unwrap();
    let found = async |readers: &[&str]| {
        let any: Vec<String> = readers.iter().map(|reader| (*reader).to_owned()).collect();
        let filter = Filter::must([Condition::matches("readers", any)]);
        let page = client.scroll(ScrollPointsBuilder::new("c").filter(filter)).await.unwrap().result;
        page.iter().map(|point| point.payload["n"].as_integer().unwrap()).collect::<Vec<_>>()
    };
    for (doc, readers) in
        [("d0", json!(["*"])), ("d1", json!(["hr", "legal"])), ("d1", json!(["board", "hr"]))]
    {
        let payload: Payload = json!({"readers": readers}).try_into().unwrap();
        let of = Filter::must([Condition::matches("doc", doc.to_owned())]);
        let set = SetPayloadPointsBuilder::new("c", payload).points_selector(of).wait(true);
        client.set_payload(set).await.unwrap();
    }
    assert_eq!(found(&["*"]).await, [2]);
    assert_eq!(found(&["hr", "*"]).await, [1, 2, 3]);
    assert_eq!(found(&["legal"]).await, Vec::<i64>::new(), "what was there before is replaced");
    assert_eq!(found(&["board", "nobody"]).await, [1, 3]);
    // The rest of the payload, and the vectors, are as they were.
    let hits = client.query(hybrid("c", vec![0.0, 1.0, 0.0], "soup in the canteen")).await.unwrap().result;
    assert_eq!(hits[0].payload["text"].as_str().unwrap(), "the canteen serves soup");
    let reader =
        server.token(&json!({"access": [{"collection": "c", "access": "r"}], "exp": 4_000_000_000_u64}));
    let payload: Payload = json!({"readers": ["*"]}).try_into().unwrap();
    let set = SetPayloadPointsBuilder::new("c", payload).points_selector(Filter::default());
    assert_eq!(code(reader.set_payload(set).await), Code::PermissionDenied);
}

#[tokio::test]
async fn points_are_counted_scrolled_read_and_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    create(&client, "c").await;
    fill(&client, "c").await;
    let count =
        async || client.count(CountPointsBuilder::new("c").exact(true)).await.unwrap().result.unwrap().count;
    assert_eq!(count().await, 3);
    let page = client.scroll(ScrollPointsBuilder::new("c").limit(2)).await.unwrap();
    assert_eq!(page.result.len(), 2);
    let rest = ScrollPointsBuilder::new("c").limit(2).offset(page.next_page_offset.unwrap());
    assert_eq!(client.scroll(rest).await.unwrap().result.len(), 1);
    let one = client.get_points(GetPointsBuilder::new("c", vec![2.into()]).with_payload(true)).await.unwrap();
    assert_eq!(one.result[0].payload["text"].as_str().unwrap(), "the canteen serves soup");
    let by_filter = Filter::must([Condition::matches("doc", "d1".to_owned())]);
    client.delete_points(DeletePointsBuilder::new("c").points(by_filter).wait(true)).await.unwrap();
    assert_eq!(count().await, 1);
    let info = client.collection_info("c").await.unwrap().result.unwrap();
    assert_eq!(info.points_count, Some(1));
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    for name in ["tenant_acme-1", "tenant_acme1", "odd/../name é"] {
        create(&client, name).await;
    }
    fill(&client, "tenant_acme-1").await;
    drop(client);
    server.stop().await;
    std::fs::create_dir(directory.path().join(".unfinished-left-by-a-crash")).unwrap();

    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    let names: Vec<String> =
        client.list_collections().await.unwrap().collections.into_iter().map(|c| c.name).collect();
    assert_eq!(names, ["odd/../name é", "tenant_acme-1", "tenant_acme1"]);
    let found = |name| client.query(hybrid(name, vec![0.0, 1.0, 0.0], "soup"));
    assert_eq!(ids(found("tenant_acme-1").await.unwrap().result)[0], 2);
    assert!(found("tenant_acme1").await.unwrap().result.is_empty());
    client.delete_collection("tenant_acme-1").await.unwrap();
    assert_eq!(code(found("tenant_acme-1").await), Code::NotFound);
    assert!(!client.delete_collection("tenant_acme-1").await.unwrap().result);
    assert!(found("tenant_acme1").await.is_ok());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
}

#[tokio::test]
async fn tokens_open_what_they_name() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let root = server.client(ROOT);
    create(&root, "own").await;
    create(&root, "other").await;
    let soon = 4_000_000_000_i64;
    let list =
        |name: &str, access: &str| json!({"exp": soon, "access": [{"collection": name, "access": access}]});
    let search =
        async |client: &Qdrant, name: &str| client.query(hybrid(name, vec![1.0, 0.0, 0.0], "x")).await;
    let write = async |client: &Qdrant, name: &str| {
        client.upsert_points(UpsertPointsBuilder::new(name, vec![point(1, vec![1.0, 0.0, 0.0], "x")])).await
    };

    let reader = server.token(&list("own", "r"));
    assert!(search(&reader, "own").await.is_ok());
    assert_eq!(code(search(&reader, "other").await), Code::PermissionDenied);
    assert_eq!(code(search(&reader, "none").await), Code::PermissionDenied);
    assert_eq!(code(write(&reader, "own").await), Code::PermissionDenied);
    let seen = reader.list_collections().await.unwrap().collections;
    assert_eq!(seen.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["own"]);

    let writer = server.token(&list("own", "rw"));
    assert!(write(&writer, "own").await.is_ok());
    assert_eq!(code(write(&writer, "other").await), Code::PermissionDenied);
    assert_eq!(code(writer.delete_collection("own").await), Code::PermissionDenied);
    let index = |name: &str| CreateFieldIndexCollectionBuilder::new(name, "n", FieldType::Integer);
    assert!(writer.create_field_index(index("own")).await.is_ok());
    assert_eq!(code(writer.create_field_index(index("other")).await), Code::PermissionDenied);
    assert_eq!(code(reader.create_field_index(index("own")).await), Code::PermissionDenied);

    let refused = async |client: Qdrant| code(search(&client, "own").await);
    assert_eq!(refused(server.token(&json!({"exp": 1, "access": "m"}))).await, Code::Unauthenticated);
    assert_eq!(refused(server.token(&json!({"exp": soon, "access": []}))).await, Code::PermissionDenied);
    let old = json!({"access": [{"collection": "own", "access": "r", "payload": {"x": 1}}]});
    assert_eq!(refused(server.token(&old)).await, Code::Unauthenticated);
    // Null is not absent: it must not open everything.
    assert_eq!(refused(server.token(&json!({"access": null}))).await, Code::Unauthenticated);
    let twice =
        json!({"access": [{"collection": "own", "access": "r"}, {"collection": "own", "access": "rw"}]});
    assert_eq!(refused(server.token(&twice)).await, Code::Unauthenticated);
    assert_eq!(refused(server.client("wrong")).await, Code::Unauthenticated);
    assert_eq!(refused(server.client("")).await, Code::Unauthenticated);
    // As the real server: a token without `access` may do everything.
    let everything = server.token(&json!({"exp": soon}));
    assert!(everything.delete_collection("other").await.is_ok());
    let reads = server.token(&json!({"access": "r"}));
    assert!(search(&reads, "own").await.is_ok());
    assert_eq!(code(write(&reads, "own").await), Code::PermissionDenied);
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    create(&client, "c").await;
    let again = CreateCollectionBuilder::new("c");
    assert_eq!(code(client.create_collection(again).await), Code::AlreadyExists);
    let short = vec![point(1, vec![1.0], "x")];
    assert_eq!(code(client.upsert_points(UpsertPointsBuilder::new("c", short)).await), Code::InvalidArgument);
    let long = hybrid("c", vec![1.0; 9], "x");
    assert_eq!(code(client.query(long).await), Code::InvalidArgument);
    let words = Document { text: "x".into(), model: "other/model".into(), ..Default::default() };
    let unknown =
        QueryPointsBuilder::new("c").query(Query::new_nearest(VectorInput::from(words))).using("sparse");
    assert_eq!(code(client.query(unknown).await), Code::InvalidArgument);
    assert_eq!(code(client.query(hybrid("none", vec![1.0, 0.0, 0.0], "x")).await), Code::NotFound);
    let fused = client
        .query(QueryPointsBuilder::new("c").query(Query::new_sample(qdrant_client::qdrant::Sample::Random)));
    assert_eq!(code(fused.await), Code::InvalidArgument);
}

#[tokio::test]
async fn pages_of_a_query_do_not_overlap() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    create(&client, "c").await;
    fill(&client, "c").await;
    let dense = || {
        QueryPointsBuilder::new("c")
            .query(Query::new_nearest(vec![0.0f32, 1.0, 0.0]))
            .using("dense")
            .with_payload(true)
    };
    let fused = || hybrid("c", vec![0.0, 1.0, 0.0], "soup");
    for query in [dense, fused] {
        let all = ids(client.query(query().limit(3)).await.unwrap().result);
        assert_eq!(all.len(), 3);
        for (offset, wanted) in all.iter().enumerate() {
            let page = client.query(query().limit(1).offset(offset as u64)).await.unwrap().result;
            assert_eq!(ids(page), [*wanted]);
        }
        assert!(client.query(query().limit(1).offset(3u64)).await.unwrap().result.is_empty());
    }
    for query in [fused().limit(0), fused().limit(u64::MAX).offset(1u64)] {
        assert_eq!(code(client.query(query).await), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn nothing_asked_for_is_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    let client = server.client(ROOT);
    create(&client, "c").await;
    fill(&client, "c").await;
    let words = |option: &str| {
        let mut words = Document { text: "soup".into(), model: "qdrant/bm25".into(), ..Default::default() };
        words.options.insert(option.into(), "english".into());
        let query = Query::new_nearest(VectorInput::from(words));
        client.query(QueryPointsBuilder::new("c").query(query).using("sparse"))
    };
    assert!(words("language").await.is_ok());
    assert_eq!(code(words("languag").await), Code::InvalidArgument);
    let dense = |params: SearchParamsBuilder| {
        let query = Query::new_nearest(vec![0.0f32, 1.0, 0.0]);
        client.query(QueryPointsBuilder::new("c").query(query).using("dense").params(params))
    };
    assert!(dense(SearchParamsBuilder::default().exact(true)).await.is_ok());
    let idf = SearchParamsBuilder::default().idf(IdfParamsBuilder::default());
    assert_eq!(code(dense(idf).await), Code::InvalidArgument);
    let endless = Range { gte: Some(f64::INFINITY), ..Default::default() };
    let endless = CountPointsBuilder::new("c").filter(Filter::must([Condition::range("n", endless)]));
    assert_eq!(code(client.count(endless).await), Code::InvalidArgument);
    let shard = CountPoints {
        collection_name: "c".into(),
        shard_key_selector: Some(ShardKeySelector::from("elsewhere".to_owned())),
        ..Default::default()
    };
    assert_eq!(code(client.count(shard).await), Code::InvalidArgument);
}
