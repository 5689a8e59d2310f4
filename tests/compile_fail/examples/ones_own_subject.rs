//! To let a type of one's own name a tenant's data.
use shared::scope::Subject;
use shared::tenant::TenantId;

struct Mine(TenantId);

//~ E0277: the trait bound `Mine: scope::sealed::Sealed` is not satisfied
impl Subject for Mine {
    fn tenant_id(&self) -> &TenantId {
        &self.0
    }
}

fn main() {}
