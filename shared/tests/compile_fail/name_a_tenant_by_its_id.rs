//! To ask a store about a tenant by its id.
use shared::aws::documents::DocumentStore;
use shared::aws::meters::MeterStore;
use shared::ids::DocumentId;
use shared::scope::Ward;
use shared::tenant::TenantId;

async fn meter(store: &MeterStore, id: &TenantId) -> bool {
    store.read(id).await.is_ok()
}

async fn document(store: &DocumentStore, tenant: &TenantId, id: &DocumentId) -> bool {
    store.get(tenant, id).await.is_ok()
}

async fn without_a_request(store: &DocumentStore, books: &Ward, id: &DocumentId) -> bool {
    store.get(books, id).await.is_ok()
}

fn main() {}
