//! `/admin/tenants/{id}/keys`: a tenant's keys in an operator's hands, for a tenant that cannot help itself.

pub(crate) mod create;
pub(crate) mod list;
pub(crate) mod revoke;
