//! Between the wire's types and the engine's. What the engine cannot express is refused by name.

use std::collections::HashMap;
use std::num::NonZeroUsize;

use qdrant_client::qdrant as wire;
use qdrant_client::qdrant::condition::ConditionOneOf;
use qdrant_client::qdrant::r#match::MatchValue;
use qdrant_client::qdrant::point_id::PointIdOptions;
use qdrant_edge::bm25_embed::{EdgeBm25, EdgeBm25Config};
use qdrant_edge::external::ordered_float::OrderedFloat;
use qdrant_edge::external::uuid::Uuid;
use qdrant_edge::{
    Distance, EdgeConfig, EdgeConfigBuilder, EdgeSparseVectorParamsBuilder, EdgeVectorParamsBuilder, Filter,
    Fusion, Modifier, NamedQuery, OperationError, Payload, PointId, PointStructPersisted, Prefetch,
    QueryEnum, QueryRequest, ScoringQuery, SearchParams, SparseVector, VectorInternal, VectorPersisted,
    VectorStructInternal, VectorStructPersisted, WalOptions, WithPayloadInterface, WithVector,
};
use serde_json::{Map, Value, json};
use tonic::Status;

/// The model that the server computes itself.
const BM25: &str = "qdrant/bm25";
/// The options it takes.
const BM25_OPTIONS: [&str; 11] = [
    "k",
    "b",
    "avg_len",
    "tokenizer",
    "language",
    "lowercase",
    "ascii_folding",
    "stopwords",
    "stemmer",
    "min_token_len",
    "max_token_len",
];
/// Rank fusion's constant where the query names none, as the real server has it.
const DEFAULT_RRF_K: u32 = 2;
/// Results of a query that names no limit.
const DEFAULT_LIMIT: u64 = 10;
const MEGABYTE: usize = 1 << 20;

/// The engine's error as the wire says it.
pub(super) fn status(error: OperationError) -> Status {
    match error {
        OperationError::ServiceError { .. }
        | OperationError::InconsistentStorage { .. }
        | OperationError::OutOfMemory { .. } => Status::internal(format!("Service internal error: {error}")),
        OperationError::Cancelled { .. } | OperationError::Timeout { .. } => {
            Status::cancelled(error.to_string())
        }
        _ => Status::invalid_argument(format!("Wrong input: {error}")),
    }
}

fn unsupported(what: &str) -> Status {
    Status::invalid_argument(format!("{what} is not served by the local store"))
}

fn missing(what: &str) -> Status {
    Status::invalid_argument(format!("{what} is missing"))
}

/// A new collection's configuration.
pub(super) fn config(request: &wire::CreateCollection) -> Result<EdgeConfig, Status> {
    use wire::vectors_config::Config;

    // Where vectors and payload live in memory is the engine's business here.
    let mut builder = EdgeConfigBuilder::new();
    match request.vectors_config.as_ref().and_then(|c| c.config.as_ref()) {
        Some(Config::ParamsMap(map)) => {
            for (name, params) in &map.map {
                let size = usize::try_from(params.size).unwrap_or(0);
                if !(1..=65_536).contains(&size) {
                    return Err(Status::invalid_argument("vectors: size must be between 1 and 65536"));
                }
                if params.quantization_config.is_some() || params.multivector_config.is_some() {
                    return Err(unsupported("quantization and multivectors"));
                }
                let params = EdgeVectorParamsBuilder::new(size, distance(params.distance)?);
                builder = builder.vector(name.clone(), params.build());
            }
        }
        Some(Config::Params(_)) => return Err(unsupported("a vector without a name")),
        None => {}
    }
    for (name, params) in request.sparse_vectors_config.iter().flat_map(|c| &c.map) {
        let mut sparse = EdgeSparseVectorParamsBuilder::new();
        if params.modifier == Some(wire::Modifier::Idf as i32) {
            sparse = sparse.modifier(Modifier::Idf);
        }
        builder = builder.sparse_vector(name.clone(), sparse.build());
    }
    if let Some(megabytes) = request.wal_config.as_ref().and_then(|wal| wal.wal_capacity_mb) {
        let segment_capacity = usize::try_from(megabytes).unwrap_or(32).saturating_mul(MEGABYTE);
        builder = builder.wal_options(WalOptions {
            segment_capacity,
            segment_queue_len: 0,
            retain_closed: NonZeroUsize::MIN,
        });
    }
    Ok(builder.build())
}

fn distance(wire: i32) -> Result<Distance, Status> {
    match wire::Distance::try_from(wire) {
        Ok(wire::Distance::Cosine) => Ok(Distance::Cosine),
        Ok(wire::Distance::Euclid) => Ok(Distance::Euclid),
        Ok(wire::Distance::Dot) => Ok(Distance::Dot),
        Ok(wire::Distance::Manhattan) => Ok(Distance::Manhattan),
        Ok(wire::Distance::UnknownDistance) | Err(_) => Err(missing("vectors: distance")),
    }
}

/// What a collection was made with, as the wire describes it.
pub(super) fn described(config: &EdgeConfig) -> wire::CollectionConfig {
    let vectors = config
        .vectors
        .iter()
        .map(|(name, params)| {
            let distance = match params.distance {
                Distance::Cosine => wire::Distance::Cosine,
                Distance::Euclid => wire::Distance::Euclid,
                Distance::Dot => wire::Distance::Dot,
                Distance::Manhattan => wire::Distance::Manhattan,
            };
            let params = wire::VectorParams {
                size: params.size as u64,
                distance: distance.into(),
                ..Default::default()
            };
            (name.clone(), params)
        })
        .collect();
    let sparse = config
        .sparse_vectors
        .iter()
        .map(|(name, params)| {
            let modifier = match params.modifier {
                Some(Modifier::Idf) => Some(wire::Modifier::Idf.into()),
                _ => None,
            };
            (name.clone(), wire::SparseVectorParams { modifier, ..Default::default() })
        })
        .collect();
    wire::CollectionConfig {
        params: Some(wire::CollectionParams {
            shard_number: 1,
            vectors_config: Some(wire::VectorsConfig {
                config: Some(wire::vectors_config::Config::ParamsMap(wire::VectorParamsMap { map: vectors })),
            }),
            sparse_vectors_config: Some(wire::SparseVectorConfig { map: sparse }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A point's id.
pub(super) fn point_id(id: Option<wire::PointId>) -> Result<PointId, Status> {
    match id.and_then(|id| id.point_id_options).ok_or_else(|| missing("a point's id"))? {
        PointIdOptions::Num(n) => Ok(PointId::NumId(n)),
        PointIdOptions::Uuid(text) => Uuid::parse_str(&text)
            .map(PointId::Uuid)
            .map_err(|_| Status::invalid_argument(format!("Unable to parse UUID: {text}"))),
    }
}

/// A point's id on the wire.
pub(super) fn wire_id(id: PointId) -> wire::PointId {
    wire::PointId {
        point_id_options: Some(match id {
            PointId::NumId(n) => PointIdOptions::Num(n),
            PointId::Uuid(uuid) => PointIdOptions::Uuid(uuid.to_string()),
        }),
    }
}

/// A point to store; texts are turned into BM25 vectors here, as the server does.
pub(super) fn point(point: wire::PointStruct) -> Result<PointStructPersisted, Status> {
    use wire::vectors::VectorsOptions;

    let id = point_id(point.id)?;
    let vectors = match point.vectors.and_then(|v| v.vectors_options) {
        Some(VectorsOptions::Vectors(named)) => named.vectors,
        Some(VectorsOptions::Vector(_)) => return Err(unsupported("a vector without a name")),
        None => HashMap::new(),
    };
    let named: Result<HashMap<String, VectorPersisted>, Status> =
        vectors.into_iter().map(|(name, vector)| Ok((name, stored_vector(vector)?))).collect();
    Ok(PointStructPersisted {
        id,
        vector: VectorStructPersisted::Named(named?),
        payload: Some(payload(point.payload)),
    })
}

/// A payload to store.
pub(super) fn payload(wire: HashMap<String, wire::Value>) -> Payload {
    Payload(wire.into_iter().map(|(name, value)| (name, value.into_json())).collect())
}

fn stored_vector(vector: wire::Vector) -> Result<VectorPersisted, Status> {
    use wire::vector::Vector;

    #[expect(deprecated, reason = "older clients send dense and sparse vectors this way")]
    let (data, indices) = (vector.data, vector.indices);
    match vector.vector {
        Some(Vector::Dense(dense)) => Ok(VectorPersisted::Dense(dense.data)),
        Some(Vector::Sparse(sparse)) => {
            sparse_vector(sparse.indices, sparse.values).map(VectorPersisted::Sparse)
        }
        Some(Vector::Document(document)) => {
            bm25(&document).map(|model| VectorPersisted::Sparse(model.embed_document(&document.text)))
        }
        Some(_) => Err(unsupported("this kind of vector")),
        None => match indices {
            Some(indices) => sparse_vector(indices.data, data).map(VectorPersisted::Sparse),
            None => Ok(VectorPersisted::Dense(data)),
        },
    }
}

fn sparse_vector(indices: Vec<u32>, values: Vec<f32>) -> Result<SparseVector, Status> {
    SparseVector::new(indices, values).map_err(|e| Status::invalid_argument(format!("sparse vector: {e}")))
}

/// The model that turns a document's text into a sparse vector.
fn bm25(document: &wire::Document) -> Result<EdgeBm25, Status> {
    if !document.model.eq_ignore_ascii_case(BM25) {
        return Err(unsupported(&format!("the model `{}`", document.model)));
    }
    let options: Map<String, Value> =
        document.options.iter().map(|(name, value)| (name.clone(), value.clone().into_json())).collect();
    // The engine passes over names that it does not know, and a misspelt option would seem to work.
    if let Some(unknown) = options.keys().find(|name| !BM25_OPTIONS.contains(&name.as_str())) {
        return Err(Status::invalid_argument(format!("options of {BM25}: unknown option `{unknown}`")));
    }
    let config: EdgeBm25Config = serde_json::from_value(Value::Object(options))
        .map_err(|e| Status::invalid_argument(format!("options of {BM25}: {e}")))?;
    EdgeBm25::new(config).map_err(|e| Status::invalid_argument(format!("options of {BM25}: {e}")))
}

/// A query.
pub(super) fn query(request: wire::QueryPoints) -> Result<QueryRequest, Status> {
    if request.lookup_from.is_some() || request.shard_key_selector.is_some() {
        return Err(unsupported("lookup_from and shard keys"));
    }
    if wants_vectors(request.with_vectors) {
        return Err(unsupported("with_vectors"));
    }
    let limit = at_least_one(request.limit)?;
    let offset = size(request.offset.unwrap_or(0));
    // The engine adds the two without a check.
    if limit.checked_add(offset).is_none() {
        return Err(Status::invalid_argument("limit and offset: too large together"));
    }
    let using = request.using;
    Ok(QueryRequest {
        prefetches: request.prefetch.into_iter().map(prefetch).collect::<Result<_, _>>()?,
        query: request.query.map(|query| scoring(query, using)).transpose()?,
        filter: request.filter.map(filter).transpose()?,
        score_threshold: request.score_threshold.map(OrderedFloat),
        limit,
        offset,
        params: request.params.map(params).transpose()?,
        with_vector: false.into(),
        with_payload: with_payload(request.with_payload, false)?,
    })
}

fn prefetch(wire: wire::PrefetchQuery) -> Result<Prefetch, Status> {
    if wire.lookup_from.is_some() {
        return Err(unsupported("lookup_from"));
    }
    let using = wire.using;
    Ok(Prefetch {
        prefetches: wire.prefetch.into_iter().map(prefetch).collect::<Result<_, _>>()?,
        query: wire.query.map(|query| scoring(query, using)).transpose()?,
        limit: at_least_one(wire.limit)?,
        params: wire.params.map(params).transpose()?,
        filter: wire.filter.map(filter).transpose()?,
        score_threshold: wire.score_threshold.map(OrderedFloat),
    })
}

fn scoring(query: wire::Query, using: Option<String>) -> Result<ScoringQuery, Status> {
    use wire::query::Variant;
    use wire::vector_input::Variant as Input;

    let fusion = |k: u32| ScoringQuery::Fusion(Fusion::Rrf { k: k as usize, weights: None });
    match query.variant.ok_or_else(|| missing("query"))? {
        Variant::Nearest(input) => {
            let query = match input.variant.ok_or_else(|| missing("query.nearest"))? {
                Input::Dense(dense) => VectorInternal::Dense(dense.data),
                Input::Sparse(sparse) => {
                    VectorInternal::Sparse(sparse_vector(sparse.indices, sparse.values)?)
                }
                Input::Document(document) => {
                    VectorInternal::Sparse(bm25(&document)?.embed_query(&document.text))
                }
                _ => return Err(unsupported("this kind of query vector")),
            };
            Ok(ScoringQuery::Vector(QueryEnum::Nearest(NamedQuery { query, using })))
        }
        Variant::Rrf(rrf) if rrf.weights.is_empty() => Ok(fusion(rrf.k.unwrap_or(DEFAULT_RRF_K))),
        Variant::Fusion(kind) if kind == wire::Fusion::Rrf as i32 => Ok(fusion(DEFAULT_RRF_K)),
        _ => Err(unsupported("this kind of query")),
    }
}

fn at_least_one(limit: Option<u64>) -> Result<usize, Status> {
    match limit.unwrap_or(DEFAULT_LIMIT) {
        0 => Err(Status::invalid_argument("limit: must be at least 1")),
        limit => Ok(size(limit)),
    }
}

fn params(wire: wire::SearchParams) -> Result<SearchParams, Status> {
    if wire.quantization.is_some() || wire.acorn.is_some() || wire.idf.is_some() {
        return Err(unsupported("params.quantization, params.acorn and params.idf"));
    }
    Ok(SearchParams {
        hnsw_ef: wire.hnsw_ef.map(size),
        exact: wire.exact.unwrap_or(false),
        indexed_only: wire.indexed_only.unwrap_or(false),
        ..Default::default()
    })
}

/// Refuses a choice of shards: a collection has one here.
pub(super) fn one_shard(selector: Option<&wire::ShardKeySelector>) -> Result<(), Status> {
    match selector {
        Some(_) => Err(unsupported("shard_key_selector")),
        None => Ok(()),
    }
}

pub(super) fn size(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

pub(super) fn wants_vectors(selector: Option<wire::WithVectorsSelector>) -> bool {
    use wire::with_vectors_selector::SelectorOptions;
    match selector.and_then(|s| s.selector_options) {
        None | Some(SelectorOptions::Enable(false)) => false,
        Some(SelectorOptions::Enable(true) | SelectorOptions::Include(_)) => true,
    }
}

/// Which of the vectors are answered.
pub(super) fn with_vectors(selector: Option<wire::WithVectorsSelector>) -> WithVector {
    use wire::with_vectors_selector::SelectorOptions;
    match selector.and_then(|s| s.selector_options) {
        None => WithVector::Bool(false),
        Some(SelectorOptions::Enable(enable)) => WithVector::Bool(enable),
        Some(SelectorOptions::Include(include)) => WithVector::Selector(include.names),
    }
}

/// Vectors on the wire. All have names here.
pub(super) fn wire_vectors(vectors: VectorStructInternal) -> wire::VectorsOutput {
    use wire::vector_output::Vector;
    use wire::vectors_output::VectorsOptions;

    let named = match vectors {
        VectorStructInternal::Named(named) => named,
        VectorStructInternal::Single(_) | VectorStructInternal::MultiDense(_) => HashMap::new(),
    };
    let vectors = named.into_iter().filter_map(|(name, vector)| {
        let vector = match vector {
            VectorInternal::Dense(data) => Vector::Dense(wire::DenseVector { data }),
            VectorInternal::Sparse(SparseVector { indices, values }) => {
                Vector::Sparse(wire::SparseVector { indices, values })
            }
            VectorInternal::MultiDense(_) => return None,
        };
        Some((name, wire::VectorOutput { vector: Some(vector), ..Default::default() }))
    });
    let named = wire::NamedVectorsOutput { vectors: vectors.collect() };
    wire::VectorsOutput { vectors_options: Some(VectorsOptions::Vectors(named)) }
}

/// Which of the payload is answered.
pub(super) fn with_payload(
    selector: Option<wire::WithPayloadSelector>,
    default: bool,
) -> Result<WithPayloadInterface, Status> {
    use wire::with_payload_selector::SelectorOptions;
    Ok(match selector.and_then(|s| s.selector_options) {
        None => WithPayloadInterface::Bool(default),
        Some(SelectorOptions::Enable(enable)) => WithPayloadInterface::Bool(enable),
        Some(SelectorOptions::Include(include)) => {
            let paths = include.fields.iter().map(|field| field.parse());
            WithPayloadInterface::Fields(
                paths
                    .collect::<Result<_, _>>()
                    .map_err(|()| Status::invalid_argument("with_payload: bad path"))?,
            )
        }
        Some(SelectorOptions::Exclude(_)) => return Err(unsupported("with_payload.exclude")),
    })
}

/// A payload on the wire.
pub(super) fn wire_payload(payload: Option<Payload>) -> HashMap<String, wire::Value> {
    payload.map(|p| p.0.into_iter().map(|(name, value)| (name, value.into())).collect()).unwrap_or_default()
}

/// A filter. The engine reads the JSON form of the REST interface, so that is what it is turned into.
pub(super) fn filter(wire: wire::Filter) -> Result<Filter, Status> {
    let json = filter_json(wire)?;
    serde_json::from_value(json).map_err(|e| Status::invalid_argument(format!("filter: {e}")))
}

fn filter_json(filter: wire::Filter) -> Result<Value, Status> {
    let all = |conditions: Vec<wire::Condition>| {
        conditions.into_iter().map(condition).collect::<Result<Vec<_>, _>>()
    };
    let mut json = Map::new();
    for (name, conditions) in
        [("must", filter.must), ("should", filter.should), ("must_not", filter.must_not)]
    {
        if !conditions.is_empty() {
            json.insert(name.to_owned(), all(conditions)?.into());
        }
    }
    if let Some(min_should) = filter.min_should {
        let conditions = all(min_should.conditions)?;
        json.insert(
            "min_should".to_owned(),
            json!({"conditions": conditions, "min_count": min_should.min_count}),
        );
    }
    Ok(Value::Object(json))
}

fn condition(condition: wire::Condition) -> Result<Value, Status> {
    Ok(match condition.condition_one_of.ok_or_else(|| missing("a condition"))? {
        ConditionOneOf::Field(field) => field_condition(field)?,
        ConditionOneOf::IsEmpty(empty) => json!({"is_empty": {"key": empty.key}}),
        ConditionOneOf::IsNull(condition) => json!({"is_null": {"key": condition.key}}),
        ConditionOneOf::HasVector(vector) => json!({"has_vector": vector.has_vector}),
        ConditionOneOf::HasId(ids) => {
            let ids: Result<Vec<Value>, Status> = ids
                .has_id
                .into_iter()
                .map(|id| {
                    Ok(match point_id(Some(id))? {
                        PointId::NumId(n) => n.into(),
                        PointId::Uuid(uuid) => uuid.to_string().into(),
                    })
                })
                .collect();
            json!({"has_id": ids?})
        }
        ConditionOneOf::Filter(filter) => filter_json(filter)?,
        ConditionOneOf::Nested(nested) => {
            let filter = filter_json(nested.filter.ok_or_else(|| missing("nested.filter"))?)?;
            json!({"nested": {"key": nested.key, "filter": filter}})
        }
        ConditionOneOf::Slice(_) => return Err(unsupported("a slice condition")),
    })
}

fn field_condition(field: wire::FieldCondition) -> Result<Value, Status> {
    let mut json = Map::from_iter([("key".to_owned(), Value::from(field.key))]);
    if field.geo_bounding_box.is_some() || field.geo_radius.is_some() || field.geo_polygon.is_some() {
        return Err(unsupported("a geographic condition"));
    }
    if field.datetime_range.is_some() || field.values_count.is_some() {
        return Err(unsupported("datetime_range and values_count"));
    }
    if let Some(value) = field.r#match.and_then(|m| m.match_value) {
        let wanted = match value {
            MatchValue::Keyword(keyword) => json!({"value": keyword}),
            MatchValue::Integer(integer) => json!({"value": integer}),
            MatchValue::Boolean(boolean) => json!({"value": boolean}),
            MatchValue::Text(text) => json!({"text": text}),
            MatchValue::Keywords(any) => json!({"any": any.strings}),
            MatchValue::Integers(any) => json!({"any": any.integers}),
            MatchValue::ExceptKeywords(except) => json!({"except": except.strings}),
            MatchValue::ExceptIntegers(except) => json!({"except": except.integers}),
            _ => return Err(unsupported("this kind of match")),
        };
        json.insert("match".to_owned(), wanted);
    }
    if let Some(range) = field.range {
        // JSON knows no infinity: the bound would turn into none at all.
        if [range.lt, range.gt, range.gte, range.lte].into_iter().flatten().any(|bound| !bound.is_finite()) {
            return Err(Status::invalid_argument("range: a bound is not a finite number"));
        }
        let range = json!({"lt": range.lt, "gt": range.gt, "gte": range.gte, "lte": range.lte});
        json.insert("range".to_owned(), range);
    }
    if let Some(empty) = field.is_empty {
        json.insert("is_empty".to_owned(), empty.into());
    }
    if let Some(null) = field.is_null {
        json.insert("is_null".to_owned(), null.into());
    }
    Ok(Value::Object(json))
}
