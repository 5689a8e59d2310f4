//! The calls.

use std::sync::Arc;
use std::time::Instant;

use ::qdrant_client::qdrant::points_selector::PointsSelectorOneOf;
use ::qdrant_client::qdrant::{
    collections_server::Collections, points_server::Points, qdrant_server::Qdrant, *,
};
use qdrant_edge::{
    CountRequest, CreateIndex, EdgeShard, FieldIndexOperations, PayloadFieldSchema, PayloadOps,
    PayloadSchemaType, PointInsertOperations, PointOperations, Record, ScrollRequest, SetPayloadOp,
    UpdateOperation,
};
use tonic::{Request, Response, Status};

use super::access::{Access, Keys, Needs};
use super::convert;
use super::store::Store;
use crate::serving::{TRACE_HEADER, Traces};

/// Points of a page of a scroll that names no size.
const DEFAULT_PAGE: u32 = 10;

/// The server.
pub(super) struct Service {
    store: Arc<Store>,
    keys: Keys,
    traces: Traces,
}

impl Service {
    pub(super) fn new(store: Store, keys: Keys, traces: Traces) -> Self {
        Self { store: Arc::new(store), keys, traces }
    }

    /// The request, once its bearer is known to be allowed what it needs. Every call that is served
    /// comes through here.
    fn admit<T>(&self, request: Request<T>, needs: impl FnOnce(&T) -> Needs<'_>) -> Result<T, Status> {
        let trace = request.metadata().get(TRACE_HEADER).and_then(|value| value.to_str().ok());
        self.traces.note(trace.unwrap_or_default());
        let access = self.keys.identify(request.metadata())?;
        access.require(needs(request.get_ref()))?;
        Ok(request.into_inner())
    }

    /// Runs on a thread of its own: the engine blocks.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .map_err(|error| Status::internal(format!("Service internal error: {error}")))?
    }

    async fn read<T: Send + 'static>(
        &self,
        name: String,
        read: impl FnOnce(&EdgeShard) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        self.blocking(move |store| store.get(&name)?.read(&name, read)).await
    }

    async fn update(
        &self,
        name: String,
        operation: UpdateOperation,
    ) -> Result<Response<PointsOperationResponse>, Status> {
        let started = Instant::now();
        self.blocking(move |store| {
            store.get(&name)?.write(&name, |shard| shard.update(operation).map_err(convert::status))
        })
        .await?;
        Ok(Response::new(PointsOperationResponse {
            result: Some(UpdateResult { operation_id: None, status: UpdateStatus::Completed.into() }),
            time: started.elapsed().as_secs_f64(),
            usage: None,
        }))
    }
}

/// Calls that are not served, each by its name.
macro_rules! unimplemented_calls {
    ($($call:ident($request:ty) -> $response:ty;)*) => {
        $(
            fn $call<'life0, 'async_trait>(
                &'life0 self,
                _request: Request<$request>,
            ) -> std::pin::Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'async_trait>>
            where
                'life0: 'async_trait,
                Self: 'async_trait,
            {
                Box::pin(async {
                    Err(Status::unimplemented(concat!("`", stringify!($call), "` is not served by the local store")))
                })
            }
        )*
    };
}

#[tonic::async_trait]
impl Qdrant for Service {
    async fn health_check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckReply>, Status> {
        Ok(Response::new(HealthCheckReply {
            title: "qdrant - vector search engine (local stack)".to_owned(),
            version: "1.17.1".to_owned(),
            commit: None,
        }))
    }
}

#[tonic::async_trait]
impl Collections for Service {
    async fn get(
        &self,
        request: Request<GetCollectionInfoRequest>,
    ) -> Result<Response<GetCollectionInfoResponse>, Status> {
        let started = Instant::now();
        let request = self.admit(request, |r| Needs::Read(&r.collection_name))?;
        let result = self
            .read(request.collection_name, |shard| {
                let info = shard.info();
                Ok(CollectionInfo {
                    status: CollectionStatus::Green.into(),
                    optimizer_status: Some(OptimizerStatus { ok: true, error: String::new() }),
                    segments_count: info.segments_count as u64,
                    config: Some(convert::described(&shard.config())),
                    points_count: Some(info.points_count as u64),
                    indexed_vectors_count: Some(info.indexed_vectors_count as u64),
                    ..Default::default()
                })
            })
            .await?;
        let time = started.elapsed().as_secs_f64();
        Ok(Response::new(GetCollectionInfoResponse { result: Some(result), time }))
    }

    async fn list(
        &self,
        request: Request<ListCollectionsRequest>,
    ) -> Result<Response<ListCollectionsResponse>, Status> {
        let started = Instant::now();
        // Whoever has a valid key may ask; the answer holds what that key may see.
        let access: Access = self.keys.identify(request.metadata())?;
        let names = self.blocking(|store| store.names()).await?;
        let collections = names.into_iter().filter(|name| access.sees(name));
        Ok(Response::new(ListCollectionsResponse {
            collections: collections.map(|name| CollectionDescription { name }).collect(),
            time: started.elapsed().as_secs_f64(),
        }))
    }

    async fn create(
        &self,
        request: Request<CreateCollection>,
    ) -> Result<Response<CollectionOperationResponse>, Status> {
        let started = Instant::now();
        let request = self.admit(request, |_| Needs::Manage)?;
        let config = convert::config(&request)?;
        self.blocking(move |store| store.create(&request.collection_name, config)).await?;
        Ok(Response::new(CollectionOperationResponse { result: true, time: started.elapsed().as_secs_f64() }))
    }

    async fn delete(
        &self,
        request: Request<DeleteCollection>,
    ) -> Result<Response<CollectionOperationResponse>, Status> {
        let started = Instant::now();
        let request = self.admit(request, |_| Needs::Manage)?;
        let result = self.blocking(move |store| store.delete(&request.collection_name)).await?;
        Ok(Response::new(CollectionOperationResponse { result, time: started.elapsed().as_secs_f64() }))
    }

    async fn collection_exists(
        &self,
        request: Request<CollectionExistsRequest>,
    ) -> Result<Response<CollectionExistsResponse>, Status> {
        let started = Instant::now();
        let request = self.admit(request, |r| Needs::Read(&r.collection_name))?;
        let exists = self.blocking(move |store| store.exists(&request.collection_name)).await?;
        let time = started.elapsed().as_secs_f64();
        Ok(Response::new(CollectionExistsResponse { result: Some(CollectionExists { exists }), time }))
    }

    unimplemented_calls! {
        update(UpdateCollection) -> CollectionOperationResponse;
        update_aliases(ChangeAliases) -> CollectionOperationResponse;
        list_collection_aliases(ListCollectionAliasesRequest) -> ListAliasesResponse;
        list_aliases(ListAliasesRequest) -> ListAliasesResponse;
        collection_cluster_info(CollectionClusterInfoRequest) -> CollectionClusterInfoResponse;
        update_collection_cluster_setup(UpdateCollectionClusterSetupRequest) -> UpdateCollectionClusterSetupResponse;
        create_shard_key(CreateShardKeyRequest) -> CreateShardKeyResponse;
        delete_shard_key(DeleteShardKeyRequest) -> DeleteShardKeyResponse;
        list_shard_keys(ListShardKeysRequest) -> ListShardKeysResponse;
    }
}

#[tonic::async_trait]
impl Points for Service {
    async fn upsert(
        &self,
        request: Request<UpsertPoints>,
    ) -> Result<Response<PointsOperationResponse>, Status> {
        let request = self.admit(request, |r| Needs::Write(&r.collection_name))?;
        convert::one_shard(request.shard_key_selector.as_ref())?;
        if request.update_filter.is_some() || request.update_mode.is_some() {
            return Err(Status::invalid_argument("conditional upserts are not served by the local store"));
        }
        let points = request.points.into_iter().map(convert::point).collect::<Result<Vec<_>, _>>()?;
        let operation = PointOperations::UpsertPoints(PointInsertOperations::PointsList(points));
        self.update(request.collection_name, UpdateOperation::PointOperation(operation)).await
    }

    async fn delete(
        &self,
        request: Request<DeletePoints>,
    ) -> Result<Response<PointsOperationResponse>, Status> {
        let request = self.admit(request, |r| Needs::Write(&r.collection_name))?;
        convert::one_shard(request.shard_key_selector.as_ref())?;
        let operation = match request.points.and_then(|p| p.points_selector_one_of) {
            Some(PointsSelectorOneOf::Points(list)) => {
                let ids = list.ids.into_iter().map(|id| convert::point_id(Some(id)));
                PointOperations::DeletePoints { ids: ids.collect::<Result<_, _>>()? }
            }
            Some(PointsSelectorOneOf::Filter(filter)) => {
                PointOperations::DeletePointsByFilter(convert::filter(filter)?)
            }
            None => return Err(Status::invalid_argument("points: nothing is selected")),
        };
        self.update(request.collection_name, UpdateOperation::PointOperation(operation)).await
    }

    async fn set_payload(
        &self,
        request: Request<SetPayloadPoints>,
    ) -> Result<Response<PointsOperationResponse>, Status> {
        let request = self.admit(request, |r| Needs::Write(&r.collection_name))?;
        convert::one_shard(request.shard_key_selector.as_ref())?;
        if request.key.is_some() {
            return Err(Status::invalid_argument("key is not served by the local store"));
        }
        let (points, filter) = match request.points_selector.and_then(|p| p.points_selector_one_of) {
            Some(PointsSelectorOneOf::Points(list)) => {
                let ids = list.ids.into_iter().map(|id| convert::point_id(Some(id)));
                (Some(ids.collect::<Result<_, _>>()?), None)
            }
            Some(PointsSelectorOneOf::Filter(filter)) => (None, Some(convert::filter(filter)?)),
            None => return Err(Status::invalid_argument("points: nothing is selected")),
        };
        let payload = convert::payload(request.payload);
        let operation = PayloadOps::SetPayload(SetPayloadOp { payload, points, filter, key: None });
        self.update(request.collection_name, UpdateOperation::PayloadOperation(operation)).await
    }

    async fn get(&self, request: Request<GetPoints>) -> Result<Response<GetResponse>, Status> {
        let started = Instant::now();
        let request = self.admit(request, |r| Needs::Read(&r.collection_name))?;
        convert::one_shard(request.shard_key_selector.as_ref())?;
        let vectors = convert::with_vectors(request.with_vectors);
        let ids: Result<Vec<_>, _> = request.ids.into_iter().map(|id| convert::point_id(Some(id))).collect();
        let (ids, payload) = (ids?, convert::with_payload(request.with_payload, true)?);
        let records = self
            .read(request.collection_name, move |shard| {
                shard.retrieve(&ids, Some(payload), Some(vectors)).map_err(convert::status)
            })
            .await?;
        Ok(Response::new(GetResponse {
            result: records.into_iter().map(retrieved).collect(),
            time: started.elapsed().as_secs_f64(),
            usage: None,
        }))
    }

    async fn scroll(&self, request: Request<ScrollPoints>) -> Result<Response<ScrollResponse>, Status> {
        let started = Instant::now();
        let request = self.admit(request, |r| Needs::Read(&r.collection_name))?;
        convert::one_shard(request.shard_key_selector.as_ref())?;
        no_vectors(request.with_vectors)?;
        if request.order_by.is_some() {
            return Err(Status::invalid_argument("order_by is not served by the local store"));
        }
        let limit = request.limit.unwrap_or(DEFAULT_PAGE);
        if limit == 0 {
            return Err(Status::invalid_argument("limit: must be at least 1"));
        }
        let scroll = ScrollRequest {
            offset: request.offset.map(|id| convert::point_id(Some(id))).transpose()?,
            limit: Some(limit as usize),
            filter: request.filter.map(convert::filter).transpose()?,
            with_payload: Some(convert::with_payload(request.with_payload, true)?),
            with_vector: false.into(),
            order_by: None,
        };
        let (records, next) = self
            .read(request.collection_name, move |shard| shard.scroll(scroll).map_err(convert::status))
            .await?;
        Ok(Response::new(ScrollResponse {
            next_page_offset: next.map(convert::wire_id),
            result: records.into_iter().map(retrieved).collect(),
            time: started.elapsed().as_secs_f64(),
            usage: None,
        }))
    }

    async fn count(&self, request: Request<CountPoints>) -> Result<Response<CountResponse>, Status> {
        let started = Instant::now();
        let request = self.admit(request, |r| Needs::Read(&r.collection_name))?;
        convert::one_shard(request.shard_key_selector.as_ref())?;
        let count = CountRequest {
            filter: request.filter.map(convert::filter).transpose()?,
            exact: request.exact.unwrap_or(true),
        };
        let count = self
            .read(request.collection_name, move |shard| shard.count(count).map_err(convert::status))
            .await?;
        Ok(Response::new(CountResponse {
            result: Some(CountResult { count: count as u64 }),
            time: started.elapsed().as_secs_f64(),
            usage: None,
        }))
    }

    async fn query(&self, request: Request<QueryPoints>) -> Result<Response<QueryResponse>, Status> {
        let started = Instant::now();
        let mut request = self.admit(request, |r| Needs::Read(&r.collection_name))?;
        let name = std::mem::take(&mut request.collection_name);
        let query = convert::query(request)?;
        // The engine looks `offset` further and leaves the cut to its caller.
        let offset = query.offset;
        let found = self.read(name, move |shard| shard.query(query).map_err(convert::status)).await?;
        let result = found.into_iter().skip(offset).map(|point| ScoredPoint {
            id: Some(convert::wire_id(point.id)),
            payload: convert::wire_payload(point.payload),
            score: point.score,
            version: point.version,
            ..Default::default()
        });
        Ok(Response::new(QueryResponse {
            result: result.collect(),
            time: started.elapsed().as_secs_f64(),
            usage: None,
        }))
    }

    async fn create_field_index(
        &self,
        request: Request<CreateFieldIndexCollection>,
    ) -> Result<Response<PointsOperationResponse>, Status> {
        // To the real server an index of the payload is part of the points, not of the collection.
        let request = self.admit(request, |r| Needs::Write(&r.collection_name))?;
        let kind = match FieldType::try_from(request.field_type.unwrap_or_default()) {
            Ok(FieldType::Keyword) => PayloadSchemaType::Keyword,
            Ok(FieldType::Integer) => PayloadSchemaType::Integer,
            Ok(FieldType::Bool) => PayloadSchemaType::Bool,
            _ => return Err(Status::invalid_argument("this kind of index is not served by the local store")),
        };
        let index = CreateIndex {
            field_name: request
                .field_name
                .parse()
                .map_err(|()| Status::invalid_argument("field_name: not a path into the payload"))?,
            field_schema: Some(PayloadFieldSchema::FieldType(kind)),
        };
        let operation = UpdateOperation::FieldIndexOperation(FieldIndexOperations::CreateIndex(index));
        self.update(request.collection_name, operation).await
    }

    unimplemented_calls! {
        update_vectors(UpdatePointVectors) -> PointsOperationResponse;
        delete_vectors(DeletePointVectors) -> PointsOperationResponse;
        overwrite_payload(SetPayloadPoints) -> PointsOperationResponse;
        delete_payload(DeletePayloadPoints) -> PointsOperationResponse;
        clear_payload(ClearPayloadPoints) -> PointsOperationResponse;
        delete_field_index(DeleteFieldIndexCollection) -> PointsOperationResponse;
        create_vector_name(CreateVectorNameRequest) -> PointsOperationResponse;
        delete_vector_name(DeleteVectorNameRequest) -> PointsOperationResponse;
        search(SearchPoints) -> SearchResponse;
        search_batch(SearchBatchPoints) -> SearchBatchResponse;
        search_groups(SearchPointGroups) -> SearchGroupsResponse;
        recommend(RecommendPoints) -> RecommendResponse;
        recommend_batch(RecommendBatchPoints) -> RecommendBatchResponse;
        recommend_groups(RecommendPointGroups) -> RecommendGroupsResponse;
        discover(DiscoverPoints) -> DiscoverResponse;
        discover_batch(DiscoverBatchPoints) -> DiscoverBatchResponse;
        update_batch(UpdateBatchPoints) -> UpdateBatchResponse;
        query_batch(QueryBatchPoints) -> QueryBatchResponse;
        query_groups(QueryPointGroups) -> QueryGroupsResponse;
        facet(FacetCounts) -> FacetResponse;
        search_matrix_pairs(SearchMatrixPoints) -> SearchMatrixPairsResponse;
        search_matrix_offsets(SearchMatrixPoints) -> SearchMatrixOffsetsResponse;
    }
}

fn no_vectors(selector: Option<WithVectorsSelector>) -> Result<(), Status> {
    if convert::wants_vectors(selector) {
        return Err(Status::invalid_argument("with_vectors is not served by the local store"));
    }
    Ok(())
}

fn retrieved(record: Record) -> RetrievedPoint {
    RetrievedPoint {
        id: Some(convert::wire_id(record.id)),
        payload: convert::wire_payload(record.payload),
        vectors: record.vector.map(convert::wire_vectors),
        ..Default::default()
    }
}
