//! To keep a scope for another request.
use shared::scope::TenantScope;

fn keep(scope: &TenantScope) -> TenantScope {
    scope.clone()
}

fn main() {}
