//! To speak to a table, or with a tenant's credentials, past the stores.
use shared::aws::Access;
use shared::aws::table::Table;
use shared::tenant::TenantId;

fn session(access: &Access, id: &TenantId) {
    access.of(id);
}

fn main() {}
