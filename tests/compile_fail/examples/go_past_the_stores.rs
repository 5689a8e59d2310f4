//! To speak to a table, or with a tenant's credentials, past the stores.
use shared::aws::Access;
//~ E0603: module `table` is private
use shared::aws::table::Table;
use shared::tenant::TenantId;

fn session(access: &Access, id: &TenantId) {
    //~ E0624: method `of` is private
    access.of(id);
}

fn main() {}
