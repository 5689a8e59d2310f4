//! The vector store: one Qdrant collection per tenant, dense and BM25 vectors fused by rank.
//!
//! A [`Collection`] is opened from a [`TenantScope`] and carries that tenant's own token, so the store
//! itself refuses every other collection. Connections are shared by all tenants of a cell; the token
//! goes with each call.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::str::FromStr;
use std::time::Duration;

use http::Uri;
use qdrant_client::qdrant::collections_client::CollectionsClient;
use qdrant_client::qdrant::points_client::PointsClient;
use qdrant_client::qdrant::{
    Condition, CountPointsBuilder, CreateCollectionBuilder, CreateFieldIndexCollectionBuilder,
    DeleteCollection, DeletePointsBuilder, Distance, Document as InferredText, FieldType, Filter,
    GetPointsBuilder, ListCollectionsRequest, Modifier, NamedVectors, OptimizersConfigDiffBuilder, PointId,
    PointStruct, PrefetchQueryBuilder, Query, QueryPointsBuilder, Range, RrfBuilder, ScoredPoint,
    ScrollPointsBuilder, SetPayloadPointsBuilder, SparseVectorParamsBuilder, SparseVectorsConfigBuilder,
    UpsertPointsBuilder, Value, Vector, VectorInput, VectorParamsBuilder, VectorsConfigBuilder,
    VectorsOutput, VectorsSelector, WalConfigDiffBuilder, vector_output, vectors_output,
};
use rustls::ClientConfig;
use sha2::{Digest, Sha256};
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Request, Status};

use crate::clock::Timestamp;
use crate::document::Editions;
use crate::env::{self, EnvError};
use crate::error::{ApiError, Code as ErrorCode};
use crate::groups::Groups;
use crate::grpc::Channel;
use crate::ids::DocumentId;
use crate::placement::{Offer, Terms};
use crate::random;
use crate::retry::Backoff;
use crate::scope::{Erasure, Expired, ForeignRecord, Operator, Subject, TenantScope, VectorToken};
use crate::secret::Secret;
use crate::tenant::{EmbeddingModel, TenantId};
use crate::trace::{self, Trace};

/// The named vectors of every collection.
const DENSE: &str = "dense";
const SPARSE: &str = "sparse";
/// Computed by the store itself, over all of a collection's texts; a collection is one tenant's, so
/// its statistics tell nobody of another's.
const BM25: &str = "qdrant/bm25";
/// Rank fusion's constant (Cormack, Clarke and Büttcher, 2009): how many ranks count about as much as the first. Theirs
/// was 60, for lists of a thousand; of forty candidates it lets whatever both methods place in the middle outrank what
/// one of them is sure of. The store's own default.
pub const RRF_K: u32 = 2;
/// Candidates of each method before fusion.
pub(crate) const CANDIDATES: u32 = 40;
/// When a passage's document was stored, in milliseconds: where its retention begins, and which edition of the
/// document the passage is of.
const STORED_AT: &str = "stored_at_ms";
/// Whose users find a passage: its document's groups, or everyone ([`Groups::readers`]).
const READERS: &str = "readers";
/// Whether the passage's edition may still be incomplete.
const PENDING: &str = "pending";
/// Whether another edition is about to take the place of the passage's.
const SUPERSEDED: &str = "superseded";
/// The hash of what the passage's vector was made of.
const EMBEDDED: &str = "embedded";
/// Points in one write.
const WRITE_BATCH: usize = 256;

/// How long a cell that is asked for room may take to answer. One that takes longer is not placed in.
const SURVEY_TIMEOUT: Duration = Duration::from_secs(3);
const BACKOFF: Backoff =
    Backoff { attempts: 3, base: Duration::from_millis(50), cap: Duration::from_secs(1) };

/// Why the vector store gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum VectorError {
    /// The tenant's cell is not among those configured.
    #[error("cell {0} is not configured")]
    UnknownCell(String),
    /// A collection that was to be removed as empty is not.
    #[error("the collection in cell {cell} holds {passages} passages")]
    NotEmpty {
        /// The cell.
        cell: String,
        /// The passages.
        passages: u64,
    },
    /// The key that was presented may not write documents.
    #[error("the scope holds no token to write with")]
    ReadOnly,
    /// The tenant's collection is made for another embedding model than this function's.
    #[error("the collection holds vectors of {collection}, not of {function}")]
    WrongModel {
        /// The collection's.
        collection: String,
        /// The function's.
        function: String,
    },
    /// The store failed or refused.
    #[error("the vector store answered {}: {}", .0.code(), .0.message())]
    Store(#[source] Box<Status>),
    /// The store answered something that its protocol does not allow.
    #[error("the vector store answered without {0}")]
    Malformed(&'static str),
}

impl From<Status> for VectorError {
    fn from(status: Status) -> Self {
        Self::Store(Box::new(status))
    }
}

impl From<VectorError> for ApiError {
    /// What the caller sees. The failure itself is logged here, once.
    fn from(error: VectorError) -> Self {
        if let VectorError::NotEmpty { cell, passages } = &error {
            let message = format!(
                "cell `{cell}` holds a collection of this tenant with {passages} passages; it is not touched"
            );
            return Self::new(ErrorCode::Conflict, message).with_param("cell");
        }
        tracing::error!("Vector store: {error}");
        Self::unavailable("the index")
    }
}

/// The vector clusters, by name.
#[derive(Clone, Debug)]
pub struct Cells {
    named: BTreeMap<String, Cell>,
    channel: Channel,
}

#[derive(Clone, Debug)]
struct Cell {
    address: Uri,
    terms: Terms,
}

/// What a list of clusters says: `name=url`, separated by commas. After a cell's address may come its
/// [`Terms`], as in `name=url;capacity=900;state=closed`.
struct Named(BTreeMap<String, Cell>);

/// Why a list names no clusters.
#[derive(Debug, thiserror::Error)]
#[error(
    "wanted name=url or name=url;capacity=900;state=closed;tenant=id, separated by commas; `{0}` is not that"
)]
struct Malformed(String);

impl FromStr for Named {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let mut cells = BTreeMap::new();
        for entry in text.split(',') {
            let invalid = || Malformed(entry.to_owned());
            let (place, terms) = match entry.trim().split_once(';') {
                Some((place, terms)) => (place, terms.parse().map_err(|_| invalid())?),
                None => (entry.trim(), Terms::default()),
            };
            let (name, url) = place.split_once('=').ok_or_else(invalid)?;
            let address: Uri = url.parse().map_err(|_| invalid())?;
            let is_server = matches!(address.scheme_str(), Some("http" | "https"))
                && address.path_and_query().is_none_or(|more| more == "/");
            if !is_server
                || !is_name(name)
                || cells.insert(name.to_owned(), Cell { address, terms }).is_some()
            {
                return Err(invalid());
            }
        }
        Ok(Self(cells))
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// A passage to store.
#[derive(Clone, Debug, PartialEq)]
pub struct NewPoint {
    /// The passage.
    pub chunk_id: String,
    /// Its place in its document.
    pub index: u32,
    /// The document's title.
    pub title: String,
    /// Where the document came from.
    pub source: String,
    /// The passage as it is shown.
    pub text: String,
    /// The passage as it is searched by words: its title and headings with it.
    pub searchable: String,
    /// The vector of `searchable`.
    pub vector: Vec<f32>,
}

/// A passage that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Hit {
    /// The passage.
    pub chunk_id: String,
    /// Its document.
    pub document_id: DocumentId,
    /// The document's title.
    pub title: String,
    /// Where the document came from.
    pub source: String,
    /// Its text.
    pub text: String,
    /// How well it matches: comparable within one search alone.
    pub score: f32,
    /// The edition of its document.
    pub edition: Timestamp,
    /// Whether that is, beyond doubt, the edition that the document has: nothing is about to take its place.
    pub settled: bool,
}

/// The documents of which `hits` do not tell the edition: one is just taking another's place.
pub fn doubtful(hits: &[Hit]) -> BTreeSet<DocumentId> {
    let mut seen: BTreeMap<&DocumentId, Timestamp> = BTreeMap::new();
    let mut doubtful = BTreeSet::new();
    for hit in hits {
        let first = *seen.entry(&hit.document_id).or_insert(hit.edition);
        if !hit.settled || first != hit.edition {
            doubtful.insert(hit.document_id.clone());
        }
    }
    doubtful
}

/// The passages that are stored of a document, by what their vectors were made of.
#[derive(Debug, Default)]
pub struct Stored(HashMap<String, PointId>);

impl Stored {
    /// Whether there is a passage whose vector was made of this.
    pub fn has(&self, searchable: &str) -> bool {
        self.0.contains_key(&embedded(searchable))
    }
}

/// Adds the bearer's token to each call, and its place in a trace.
#[derive(Clone)]
struct Bearer {
    token: AsciiMetadataValue,
    trace: Option<AsciiMetadataValue>,
}

impl Bearer {
    fn new(token: &str) -> Result<Self, VectorError> {
        let mut value =
            AsciiMetadataValue::try_from(token).map_err(|_| VectorError::Malformed("a usable token"))?;
        value.set_sensitive(true);
        Ok(Self { token: value, trace: None })
    }

    /// The same, in a trace.
    fn traced(self, trace: Option<&Trace>) -> Self {
        Self { trace: trace.and_then(|trace| trace.header().parse().ok()), ..self }
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("api-key", self.token.clone());
        if let Some(trace) = &self.trace {
            request.metadata_mut().insert(trace::HEADER, trace.clone());
        }
        Ok(request)
    }
}

type Points = PointsClient<InterceptedService<Channel, Bearer>>;
type Collections = CollectionsClient<InterceptedService<Channel, Bearer>>;

/// One tenant's collection, opened with that tenant's own token.
pub struct Collection<'a> {
    scope: &'a TenantScope,
    name: String,
    points: Points,
}

impl Cells {
    /// The clusters that the environment variable `name` names, those with TLS spoken to so. Connects to none of them
    /// yet.
    ///
    /// # Errors
    /// If the variable is unset, or malformed; the error names it.
    pub fn from_env(name: &'static str, tls: ClientConfig) -> Result<Self, EnvError> {
        Ok(Self::new(env::parsed(name)?, tls))
    }

    fn new(Named(named): Named, tls: ClientConfig) -> Self {
        Self { named, channel: Channel::new(tls) }
    }

    /// Opens the collection of the scope's tenant to search it with vectors of `model`.
    ///
    /// # Errors
    /// If its cell is not configured, or it holds vectors of another model.
    pub fn read<'a>(
        &self,
        scope: &'a TenantScope,
        model: &EmbeddingModel,
    ) -> Result<Collection<'a>, VectorError> {
        self.open(scope, scope.vector_read(), model)
    }

    /// Opens the collection of the scope's tenant to write vectors of `model` to it.
    ///
    /// # Errors
    /// As [`Cells::read`], and if the scope may not write.
    pub fn write<'a>(
        &self,
        scope: &'a TenantScope,
        model: &EmbeddingModel,
    ) -> Result<Collection<'a>, VectorError> {
        self.open(scope, scope.vector_write().ok_or(VectorError::ReadOnly)?, model)
    }

    fn open<'a>(
        &self,
        scope: &'a TenantScope,
        token: &VectorToken,
        model: &EmbeddingModel,
    ) -> Result<Collection<'a>, VectorError> {
        let of = |m: &EmbeddingModel| format!("{}/{}", m.name, m.dimensions);
        if scope.embedding() != model {
            return Err(VectorError::WrongModel { collection: of(scope.embedding()), function: of(model) });
        }
        let bearer = Bearer::new(token.expose())?.traced(scope.note().trace().as_ref());
        let points = self.points(self.cell(scope.cell())?, bearer).max_decoding_message_size(64 << 20);
        Ok(Collection { scope, name: scope.tenant_id().collection(), points })
    }

    fn points(&self, cell: &Cell, bearer: Bearer) -> Points {
        PointsClient::with_origin(self.over(bearer), cell.address.clone())
    }

    fn collections(&self, cell: &Cell, bearer: Bearer) -> Collections {
        CollectionsClient::with_origin(self.over(bearer), cell.address.clone())
    }

    fn over(&self, bearer: Bearer) -> InterceptedService<Channel, Bearer> {
        InterceptedService::new(self.channel.clone(), bearer)
    }

    fn cell(&self, cell: &str) -> Result<&Cell, VectorError> {
        self.named.get(cell).ok_or_else(|| VectorError::UnknownCell(cell.to_owned()))
    }

    /// The names of all cells.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.named.keys().map(String::as_str)
    }

    /// What the cells have to say to one more tenant: the one that is `named`, or else the tenant's own
    /// where some are kept for it, or else all of them. Those that do not answer soon are silent.
    ///
    /// # Errors
    /// If the cell that is named is not configured.
    pub async fn survey(
        &self,
        operator: &Operator,
        root_key: &Secret,
        tenant: &TenantId,
        named: Option<&str>,
    ) -> Result<BTreeMap<String, Offer>, VectorError> {
        if let Some(name) = named {
            self.cell(name)?;
        }
        let own =
            named.is_none() && self.named.values().any(|cell| cell.terms.kept_for.as_ref() == Some(tenant));
        let mut offers = BTreeMap::new();
        let mut asked = tokio::task::JoinSet::new();
        for (name, cell) in &self.named {
            if named.is_some_and(|named| named != name) || (own && cell.terms.kept_for.is_none()) {
                continue;
            }
            match Offer::unasked(&cell.terms, tenant) {
                Some(_) if own && cell.terms.kept_for.as_ref() != Some(tenant) => {}
                Some(offer) => {
                    offers.insert(name.clone(), offer);
                }
                None => {
                    let held = self.held(operator, cell, root_key)?;
                    let (name, terms) = (name.clone(), cell.terms.clone());
                    asked.spawn(async move {
                        let held = tokio::time::timeout(SURVEY_TIMEOUT, held).await;
                        if let Ok(Err(status)) = &held {
                            tracing::warn!(cell = name, code = %status.code(), "A cell does not say how full it is");
                        }
                        (name, Offer::of(&terms, held.ok().and_then(Result::ok)))
                    });
                }
            }
        }
        offers.extend(asked.join_all().await);
        Ok(offers)
    }

    /// Whether a cell holds more collections than it takes.
    ///
    /// # Errors
    /// If the store does not answer.
    pub async fn overfull(
        &self,
        operator: &Operator,
        root_key: &Secret,
        cell: &str,
    ) -> Result<bool, VectorError> {
        let cell = self.cell(cell)?;
        let held = retried(|| async { self.held(operator, cell, root_key)?.await }).await?;
        Ok(held > u64::from(cell.terms.capacity))
    }

    /// The number of a cell's collections, once awaited.
    fn held(
        &self,
        operator: &Operator,
        cell: &Cell,
        root_key: &Secret,
    ) -> Result<impl Future<Output = Result<u64, Status>> + Send + use<>, Status> {
        let bearer = Bearer::new(root_key.expose()).map_err(|e| Status::internal(e.to_string()))?;
        let bearer = bearer.traced(operator.trace());
        let mut collections = self.collections(cell, bearer).max_decoding_message_size(16 << 20);
        Ok(async move {
            let answer = collections.list(ListCollectionsRequest {}).await?;
            Ok(answer.into_inner().collections.len() as u64)
        })
    }

    /// The number of passages in a tenant's collection; none if there is no collection.
    ///
    /// # Errors
    /// If the store does not answer.
    pub async fn passages(
        &self,
        operator: &Operator,
        root_key: &Secret,
        cell: &str,
        tenant: &TenantId,
    ) -> Result<Option<u64>, VectorError> {
        let bearer = Bearer::new(root_key.expose())?.traced(operator.trace());
        let points = self.points(self.cell(cell)?, bearer);
        let request = qdrant_client::qdrant::CountPoints::from(
            CountPointsBuilder::new(tenant.collection()).exact(true),
        );
        let counted = retried(|| {
            let (mut client, request) = (points.clone(), request.clone());
            async move { client.count(request).await }
        })
        .await;
        match counted {
            Ok(answer) => {
                let count = answer.into_inner().result.map(|result| result.count);
                count.map(Some).ok_or(VectorError::Malformed("a count"))
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    /// Removes a tenant's collection that holds nothing. If there is none, nothing is done.
    ///
    /// # Errors
    /// [`VectorError::NotEmpty`] if it holds passages, of whomever: then it stays. Otherwise if the store
    /// does not answer.
    pub async fn remove_empty(
        &self,
        operator: &Operator,
        root_key: &Secret,
        cell: &str,
        tenant: &TenantId,
    ) -> Result<(), VectorError> {
        match self.passages(operator, root_key, cell, tenant).await? {
            None => return Ok(()),
            Some(0) => {}
            Some(passages) => return Err(VectorError::NotEmpty { cell: cell.to_owned(), passages }),
        }
        let bearer = Bearer::new(root_key.expose())?.traced(operator.trace());
        let collections = self.collections(self.cell(cell)?, bearer);
        let request = DeleteCollection { collection_name: tenant.collection(), ..Default::default() };
        retried(|| {
            let (mut client, request) = (collections.clone(), request.clone());
            async move { client.delete(request).await }
        })
        .await?;
        Ok(())
    }

    /// Makes a tenant's collection. Making it again changes nothing.
    ///
    /// # Errors
    /// If the store does.
    pub async fn create_collection(
        &self,
        operator: &Operator,
        root_key: &Secret,
        cell: &str,
        tenant: &TenantId,
        model: &EmbeddingModel,
    ) -> Result<(), VectorError> {
        let bearer = Bearer::new(root_key.expose())?.traced(operator.trace());
        let cell = self.cell(cell)?;
        let (collections, points) = (self.collections(cell, bearer.clone()), self.points(cell, bearer));
        let mut dense = VectorsConfigBuilder::default();
        dense.add_named_vector_params(
            DENSE,
            VectorParamsBuilder::new(u64::from(model.dimensions), Distance::Cosine).on_disk(true),
        );
        let mut sparse = SparseVectorsConfigBuilder::default();
        sparse.add_named_vector_params(SPARSE, SparseVectorParamsBuilder::default().modifier(Modifier::Idf));
        let request = qdrant_client::qdrant::CreateCollection::from(
            CreateCollectionBuilder::new(tenant.collection())
                .vectors_config(dense)
                .sparse_vectors_config(sparse)
                .on_disk_payload(true)
                // A cell holds about a thousand collections, most of them small: one segment and a
                // short log make an empty one cost a megabyte instead of ten.
                .optimizers_config(OptimizersConfigDiffBuilder::default().default_segment_number(1))
                .wal_config(WalConfigDiffBuilder::default().wal_capacity_mb(1)),
        );
        let created = retried(|| {
            let (mut client, request) = (collections.clone(), request.clone());
            async move { client.create(request).await }
        })
        .await;
        match created {
            Ok(_) => {}
            Err(status) if already_exists(&status) => {}
            Err(status) => return Err(status.into()),
        }
        for (field, kind) in [
            ("document_id", FieldType::Keyword),
            (STORED_AT, FieldType::Integer),
            (READERS, FieldType::Keyword),
        ] {
            let index = qdrant_client::qdrant::CreateFieldIndexCollection::from(
                CreateFieldIndexCollectionBuilder::new(tenant.collection(), field, kind).wait(true),
            );
            retried(|| {
                let (mut client, index) = (points.clone(), index.clone());
                async move { client.create_field_index(index).await }
            })
            .await?;
        }
        Ok(())
    }

    /// How many passages a tenant's collection holds; none if there is no such collection.
    ///
    /// # Errors
    /// If the store does.
    pub async fn count(
        &self,
        erasure: &Erasure,
        root_key: &Secret,
        cell: &str,
    ) -> Result<Option<u64>, VectorError> {
        let bearer = Bearer::new(root_key.expose())?;
        let points = self.points(self.cell(cell)?, bearer);
        let request = qdrant_client::qdrant::CountPoints::from(
            CountPointsBuilder::new(erasure.tenant_id().collection()).exact(true),
        );
        let counted = retried(|| {
            let (mut points, request) = (points.clone(), request.clone());
            async move { points.count(request).await }
        })
        .await;
        match counted {
            Ok(answer) => {
                let count = answer.into_inner().result.ok_or(VectorError::Malformed("a count"))?;
                Ok(Some(count.count))
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    /// Drops a tenant's collection. What is written to it afterwards is refused: nothing makes it anew but
    /// provisioning.
    ///
    /// # Errors
    /// If the store does.
    pub async fn drop_collection(
        &self,
        erasure: &Erasure,
        root_key: &Secret,
        cell: &str,
    ) -> Result<(), VectorError> {
        let bearer = Bearer::new(root_key.expose())?;
        let collections = self.collections(self.cell(cell)?, bearer);
        let request = DeleteCollection {
            collection_name: erasure.tenant_id().collection(),
            ..DeleteCollection::default()
        };
        let dropped = retried(|| {
            let (mut client, request) = (collections.clone(), request.clone());
            async move { client.delete(request).await }
        })
        .await;
        match dropped {
            // Where it was not there, the store says that it deleted nothing.
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(status.into()),
        }
    }

    /// Deletes a tenant's passages that are past its retention. Answered once they are found no more.
    ///
    /// # Errors
    /// If the store does.
    pub async fn delete_expired(
        &self,
        expired: &Expired,
        root_key: &Secret,
        cell: &str,
    ) -> Result<(), VectorError> {
        let bearer = Bearer::new(root_key.expose())?;
        let points = self.points(self.cell(cell)?, bearer);
        let past = Range { lte: Some(millis(expired.until())), ..Range::default() };
        let request = qdrant_client::qdrant::DeletePoints::from(
            DeletePointsBuilder::new(expired.tenant_id().collection())
                .points(Filter::must([stored(past)]))
                .wait(true),
        );
        let deleted = retried(|| {
            let (mut points, request) = (points.clone(), request.clone());
            async move { points.delete(request).await }
        })
        .await;
        match deleted {
            Ok(_) => Ok(()),
            // Such as that of a tenant that is being deleted.
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(status.into()),
        }
    }
}

/// Older clusters answer `InvalidArgument`, newer ones `AlreadyExists`.
fn already_exists(status: &Status) -> bool {
    status.code() == Code::AlreadyExists
        || (status.code() == Code::InvalidArgument && status.message().contains("already exists"))
}

impl Collection<'_> {
    /// The passages that match `text` and its vector best, at most `top_k`, best first; none that is past
    /// the tenant's retention, as it is now, and none that is not for a group of the scope's user. Of the documents in
    /// `editions`, none of another edition.
    ///
    /// Documents change meanwhile: which edition is a document's, `crate::editions` finds out.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn search(
        &self,
        text: &str,
        vector: Vec<f32>,
        top_k: u32,
        now: Timestamp,
        editions: &Editions,
    ) -> Result<Vec<Hit>, VectorError> {
        let past = self.scope.limits().retained_since(now);
        let mut kept = Filter::must([
            stored(Range { gt: Some(millis(past)), ..Range::default() }),
            Condition::matches(READERS, self.scope.groups().reads_as()),
        ]);
        kept.must_not.extend(editions.iter().map(|(document, edition)| {
            let others = Filter {
                must_not: edition.iter().map(|edition| of_edition(*edition)).collect(),
                ..of_document(document)
            };
            Condition::from(others)
        }));
        let words = InferredText { text: text.to_owned(), model: BM25.to_owned(), ..Default::default() };
        let candidates = u64::from(CANDIDATES.max(top_k));
        let request = qdrant_client::qdrant::QueryPoints::from(
            QueryPointsBuilder::new(&self.name)
                .add_prefetch(
                    PrefetchQueryBuilder::default()
                        .query(Query::new_nearest(VectorInput::from(vector)))
                        .using(DENSE)
                        .filter(kept.clone())
                        .limit(candidates),
                )
                .add_prefetch(
                    PrefetchQueryBuilder::default()
                        .query(Query::new_nearest(VectorInput::from(words)))
                        .using(SPARSE)
                        .filter(kept)
                        .limit(candidates),
                )
                .query(Query::new_rrf(RrfBuilder::with_k(RRF_K)))
                .limit(u64::from(top_k))
                .with_payload(true),
        );
        let answer = retried(|| {
            let (mut points, request) = (self.points.clone(), request.clone());
            async move { points.query(request).await }
        })
        .await?;
        answer
            .into_inner()
            .result
            .into_iter()
            .filter_map(|point| self.second_look(point, past).transpose())
            .collect()
    }

    /// A hit, if it is the tenant's own; otherwise it is dropped and the alarm raised. One from before
    /// `past` is dropped too, and one that the user may not find, also with an alarm.
    fn second_look(&self, point: ScoredPoint, past: Timestamp) -> Result<Option<Hit>, VectorError> {
        let text = |name: &'static str| {
            point.payload.get(name).and_then(Value::as_str).cloned().ok_or(VectorError::Malformed(name))
        };
        if self.owns(&point.payload).is_err() {
            return Ok(None);
        }
        let stored_at = point.payload.get(STORED_AT).and_then(Value::as_integer);
        let edition = Timestamp::from_millis(stored_at.ok_or(VectorError::Malformed(STORED_AT))?);
        if edition <= past {
            return Ok(None);
        }
        let readers = point.payload.get(READERS).and_then(Value::as_list).unwrap_or_default();
        if !self.scope.finds(readers.iter().filter_map(|reader| reader.as_str().map(String::as_str))) {
            return Ok(None);
        }
        let says = |name: &str| point.payload.get(name).and_then(Value::as_bool).unwrap_or(false);
        let settled = !says(PENDING) && !says(SUPERSEDED);
        Ok(Some(Hit {
            chunk_id: text("chunk_id")?,
            document_id: text("document_id")?.parse().map_err(|_| VectorError::Malformed("document_id"))?,
            title: text("title")?,
            source: text("source")?,
            text: text("text")?,
            score: point.score,
            edition,
            settled,
        }))
    }

    /// The second look at a point. One that names no tenant is nobody's.
    fn owns(&self, payload: &HashMap<String, Value>) -> Result<(), ForeignRecord> {
        let tenant = payload.get("tenant_id").and_then(Value::as_str);
        self.scope.owns(tenant.map_or("", String::as_str), "the vector store")
    }

    /// The passages that are stored of a document, in whatever edition, as far as they are the tenant's.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn stored(&self, document: &DocumentId) -> Result<Stored, VectorError> {
        let mut stored = Stored::default();
        let mut offset: Option<PointId> = None;
        loop {
            let mut page = ScrollPointsBuilder::new(&self.name)
                .filter(of_document(document))
                .limit(1_000)
                .with_payload(qdrant_client::qdrant::with_payload_selector::SelectorOptions::Include(
                    vec![EMBEDDED.to_owned(), "tenant_id".to_owned()].into(),
                ))
                .with_vectors(false);
            if let Some(from) = offset.take() {
                page = page.offset(from);
            }
            let request = qdrant_client::qdrant::ScrollPoints::from(page);
            let answer = retried(|| {
                let (mut points, request) = (self.points.clone(), request.clone());
                async move { points.scroll(request).await }
            })
            .await?
            .into_inner();
            for point in answer.result {
                let embedded = point.payload.get(EMBEDDED).and_then(Value::as_str).cloned();
                if let (Ok(()), Some(embedded), Some(id)) = (self.owns(&point.payload), embedded, point.id) {
                    stored.0.insert(embedded, id);
                }
            }
            match answer.next_page_offset {
                Some(next) => offset = Some(next),
                None => return Ok(stored),
            }
        }
    }

    /// For each of `searchable`, its vector, where there is one among what is stored.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn vectors(
        &self,
        stored: &Stored,
        searchable: &[String],
    ) -> Result<Vec<Option<Vec<f32>>>, VectorError> {
        let wanted: Vec<Option<&PointId>> =
            searchable.iter().map(|text| stored.0.get(&embedded(text))).collect();
        let ids: Vec<PointId> = wanted.iter().flatten().map(|id| (*id).clone()).collect();
        if ids.is_empty() {
            return Ok(vec![None; searchable.len()]);
        }
        let request = qdrant_client::qdrant::GetPoints::from(
            GetPointsBuilder::new(&self.name, ids)
                .with_payload(qdrant_client::qdrant::with_payload_selector::SelectorOptions::Include(
                    vec!["tenant_id".to_owned()].into(),
                ))
                .with_vectors(VectorsSelector { names: vec![DENSE.to_owned()] }),
        );
        let answer = retried(|| {
            let (mut points, request) = (self.points.clone(), request.clone());
            async move { points.get(request).await }
        })
        .await?;
        let mut vectors: HashMap<PointId, Vec<f32>> = HashMap::new();
        for point in answer.into_inner().result {
            if let (Ok(()), Some(id), Some(vector)) =
                (self.owns(&point.payload), point.id, point.vectors.and_then(dense))
            {
                vectors.insert(id, vector);
            }
        }
        Ok(wanted.into_iter().map(|id| vectors.get(id?).cloned()).collect())
    }

    /// Stores passages of an edition of a document of these groups, which may be incomplete as yet. Their retention begins with
    /// it. Answered once they are found.
    ///
    /// # Errors
    /// If the store fails. Some may be stored then; storing them again mends it.
    pub async fn upsert(
        &self,
        document: &DocumentId,
        groups: &Groups,
        edition: Timestamp,
        passages: Vec<NewPoint>,
    ) -> Result<(), VectorError> {
        let mut points =
            passages.into_iter().map(|passage| self.point(document, groups, edition, passage)).peekable();
        while points.peek().is_some() {
            let batch: Vec<PointStruct> = points.by_ref().take(WRITE_BATCH).collect();
            let request = qdrant_client::qdrant::UpsertPoints::from(
                UpsertPointsBuilder::new(&self.name, batch).wait(true),
            );
            retried(|| {
                let (mut points, request) = (self.points.clone(), request.clone());
                async move { points.upsert(request).await }
            })
            .await?;
        }
        Ok(())
    }

    /// Gives the passages of an edition other groups, and changes nothing else of them. Answered once they are
    /// found by these alone.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn set_groups(
        &self,
        document: &DocumentId,
        edition: Timestamp,
        groups: &Groups,
    ) -> Result<(), VectorError> {
        self.say(READERS, groups.readers(), in_edition(document, edition)).await
    }

    fn point(
        &self,
        document: &DocumentId,
        groups: &Groups,
        edition: Timestamp,
        passage: NewPoint,
    ) -> PointStruct {
        let embedded = embedded(&passage.searchable);
        let words = InferredText { text: passage.searchable, model: BM25.to_owned(), ..Default::default() };
        let vectors =
            NamedVectors::default().add_vector(DENSE, passage.vector).add_vector(SPARSE, Vector::from(words));
        let payload: HashMap<String, Value> = [
            ("tenant_id", Value::from(self.scope.tenant_id().as_str())),
            ("document_id", Value::from(document.as_str())),
            ("chunk_index", Value::from(i64::from(passage.index))),
            ("title", Value::from(passage.title)),
            ("source", Value::from(passage.source)),
            ("text", Value::from(passage.text)),
            ("chunk_id", Value::from(passage.chunk_id.as_str())),
            (STORED_AT, Value::from(edition.as_millis())),
            (READERS, Value::from(groups.readers())),
            (PENDING, Value::from(true)),
            (EMBEDDED, Value::from(embedded)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        PointStruct { id: Some(point_id(&passage.chunk_id, edition)), payload, vectors: Some(vectors.into()) }
    }

    /// Says of all passages of earlier editions that they may be about to go.
    ///
    /// # Errors
    /// If the store fails. It may be said of some then.
    pub async fn supersede(&self, document: &DocumentId, edition: Timestamp) -> Result<(), VectorError> {
        self.say(SUPERSEDED, true, before_edition(document, edition)).await
    }

    /// Says of an edition's passages that they are all of it.
    ///
    /// # Errors
    /// If the store fails. It may be said of some then.
    pub async fn settle(&self, document: &DocumentId, edition: Timestamp) -> Result<(), VectorError> {
        self.say(PENDING, false, in_edition(document, edition)).await
    }

    async fn say(&self, name: &str, value: impl Into<Value>, of: Filter) -> Result<(), VectorError> {
        let payload: HashMap<String, Value> = [(name.to_owned(), value.into())].into();
        let request = qdrant_client::qdrant::SetPayloadPoints::from(
            SetPayloadPointsBuilder::new(&self.name, payload).points_selector(of).wait(true),
        );
        retried(|| {
            let (mut points, request) = (self.points.clone(), request.clone());
            async move { points.set_payload(request).await }
        })
        .await?;
        Ok(())
    }

    /// Deletes the passages of all earlier editions. Answered once they are found no more.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn delete_before(&self, document: &DocumentId, edition: Timestamp) -> Result<(), VectorError> {
        let earlier = before_edition(document, edition);
        self.delete(DeletePointsBuilder::new(&self.name).points(earlier)).await
    }

    /// Deletes the passages of one edition. Answered once they are found no more.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn delete_edition(&self, document: &DocumentId, edition: Timestamp) -> Result<(), VectorError> {
        self.delete(DeletePointsBuilder::new(&self.name).points(in_edition(document, edition))).await
    }

    async fn delete(&self, points: DeletePointsBuilder) -> Result<(), VectorError> {
        let request = qdrant_client::qdrant::DeletePoints::from(points.wait(true));
        retried(|| {
            let (mut points, request) = (self.points.clone(), request.clone());
            async move { points.delete(request).await }
        })
        .await?;
        Ok(())
    }
}

/// The condition that a passage was stored within a range of milliseconds.
fn stored(range: Range) -> Condition {
    Condition::range(STORED_AT, range)
}

/// An instant as the store compares it: exact for hundreds of thousands of years.
const fn millis(at: Timestamp) -> f64 {
    at.as_millis() as f64
}

fn of_document(document: &DocumentId) -> Filter {
    Filter::must([Condition::matches("document_id", document.to_string())])
}

fn of_edition(edition: Timestamp) -> Condition {
    stored(Range { gte: Some(millis(edition)), lte: Some(millis(edition)), ..Range::default() })
}

fn in_edition(document: &DocumentId, edition: Timestamp) -> Filter {
    let mut filter = of_document(document);
    filter.must.push(of_edition(edition));
    filter
}

fn before_edition(document: &DocumentId, edition: Timestamp) -> Filter {
    let mut filter = of_document(document);
    filter.must.push(stored(Range { lt: Some(millis(edition)), ..Range::default() }));
    filter
}

/// What tells whether a text has a vector already: a collection has one embedding model.
fn embedded(searchable: &str) -> String {
    hex::encode(Sha256::digest(searchable.as_bytes()))
}

/// The dense vector among those that were answered.
fn dense(vectors: VectorsOutput) -> Option<Vec<f32>> {
    let Some(vectors_output::VectorsOptions::Vectors(mut named)) = vectors.vectors_options else {
        return None;
    };
    let vector = named.vectors.remove(DENSE)?;
    match vector.vector {
        Some(vector_output::Vector::Dense(dense)) => Some(dense.data),
        #[expect(deprecated, reason = "older servers answer dense vectors this way")]
        None => Some(vector.data).filter(|data| !data.is_empty()),
        Some(_) => None,
    }
}

/// A passage's point: a UUID made of the SHA-256 of its id and edition, so that the same passage is the same point.
fn point_id(chunk_id: &str, edition: Timestamp) -> PointId {
    let digest = hex::encode(Sha256::digest(format!("{chunk_id}@{}", edition.as_millis())));
    let part = |from: usize, to: usize| digest.get(from..to).unwrap_or_default();
    // Version 8: a UUID of the application's own making (RFC 9562).
    let uuid = format!("{}-{}-8{}-8{}-{}", part(0, 8), part(8, 12), part(13, 16), part(17, 20), part(20, 32));
    PointId::from(uuid)
}

/// Repeats a call while the store cannot be reached. All calls here may be repeated: each names what
/// it wants to be the case.
async fn retried<T, F>(call: impl Fn() -> F) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut failed = 0;
    loop {
        let status = match call().await {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        failed += 1;
        // A connection that was cut while the function was frozen shows as `Unknown` or `Unavailable`.
        let passing = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Aborted | Code::ResourceExhausted
        );
        match BACKOFF.wait(failed, None, &mut random::entropy()) {
            Some(wait) if passing => {
                tracing::warn!(attempt = failed, code = %status.code(), "Vector store call failed, trying again");
                tokio::time::sleep(wait).await;
            }
            _ => return Err(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roots;

    fn cells(list: &str) -> Cells {
        Cells::new(list.parse().unwrap(), roots::outbound().unwrap())
    }

    #[tokio::test]
    async fn cells_are_named_urls() {
        let cells = cells("b=http://127.0.0.1:1;state=closed;capacity=7, a=https://host:6334");
        assert_eq!(cells.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(cells.named["a"].terms, Terms::default());
        assert_eq!(cells.named["b"].terms, Terms { capacity: 7, open: false, kept_for: None });
        for bad in [
            "",
            "a",
            "=http://h",
            "a=",
            "a=not a url",
            "a=http://h,a=http://i",
            "a=/only/a/path",
            "a=http://h/path",
            "a=http://h?query",
            "a=ftp://h",
            "A=http://h",
            "a=http://h;",
            "a=http://h;capacity=x",
            "a=http://h,",
        ] {
            assert!(bad.parse::<Named>().is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_hit_that_the_user_may_not_find_is_dropped_whatever_the_store_says() {
        let scope = crate::scope::tests::in_groups("hr");
        let cells = cells("default=http://127.0.0.1:1");
        let collection = cells.read(&scope, scope.embedding()).unwrap();
        let shown = |readers: Option<Vec<&str>>| {
            let text = |name: &str| (name.to_owned(), Value::from("d"));
            let mut payload: HashMap<String, Value> =
                ["chunk_id", "document_id", "title", "source", "text"].map(text).into();
            payload.insert("tenant_id".to_owned(), Value::from("acme"));
            payload.insert(STORED_AT.to_owned(), Value::from(1));
            if let Some(readers) = readers {
                let readers: Vec<String> = readers.into_iter().map(str::to_owned).collect();
                payload.insert(READERS.to_owned(), Value::from(readers));
            }
            let point = ScoredPoint { payload, ..ScoredPoint::default() };
            collection.second_look(point, Timestamp::from_millis(0)).unwrap().is_some()
        };
        assert!(shown(Some(vec!["*"])) && shown(Some(vec!["board", "hr"])));
        for readers in [Some(vec!["board"]), Some(vec!["HR", "h"]), Some(vec![]), None] {
            assert!(!shown(readers.clone()), "{readers:?}");
        }
    }

    #[test]
    fn a_passage_is_always_the_same_point_and_never_anothers() {
        let at = Timestamp::from_millis;
        assert_eq!(point_id("d:00", at(1)), point_id("d:00", at(1)));
        assert_ne!(point_id("d:00", at(1)), point_id("d:01", at(1)));
        assert_ne!(point_id("d:00", at(1)), point_id("d:00", at(2)));
    }

    #[test]
    fn a_document_is_in_doubt_where_one_edition_is_taking_anothers_place() {
        let hit = |document: &str, edition: i64, settled: bool| Hit {
            chunk_id: String::new(),
            document_id: document.parse().unwrap(),
            title: String::new(),
            source: String::new(),
            text: String::new(),
            score: 1.0,
            edition: Timestamp::from_millis(edition),
            settled,
        };
        let names = |hits: &[Hit]| doubtful(hits).iter().map(DocumentId::to_string).collect::<Vec<_>>();
        assert!(names(&[hit("a", 1, true), hit("b", 2, true), hit("a", 1, true)]).is_empty());
        // Both settled: one was seen before, the other after.
        assert_eq!(names(&[hit("a", 1, true), hit("b", 2, true), hit("a", 2, true)]), ["a"]);
        assert_eq!(names(&[hit("a", 1, true), hit("b", 2, false)]), ["b"]);
    }
}
