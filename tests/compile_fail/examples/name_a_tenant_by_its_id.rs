//! To ask a store about a tenant by its id.
use shared::aws::documents::DocumentStore;
use shared::aws::meters::MeterStore;
use shared::clock::Timestamp;
use shared::ids::DocumentId;
use shared::scope::Ward;
use shared::tenant::TenantId;

async fn meter(store: &MeterStore, id: &TenantId) -> bool {
    //~ E0277: the trait bound `TenantId: Subject` is not satisfied
    store.read(id).await.is_ok()
}

async fn document(store: &DocumentStore, tenant: &TenantId, id: &DocumentId, now: Timestamp) -> bool {
    //~ E0308: mismatched types
    store.get(tenant, id, now).await.is_ok()
}

async fn without_a_request(store: &DocumentStore, books: &Ward, id: &DocumentId, now: Timestamp) -> bool {
    //~ E0308: mismatched types
    store.get(books, id, now).await.is_ok()
}

fn main() {}
