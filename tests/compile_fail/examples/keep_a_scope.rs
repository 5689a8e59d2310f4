//! To keep a scope for another request.
use shared::scope::TenantScope;

fn keep(scope: &TenantScope) -> TenantScope {
    //~ E0308: mismatched types
    scope.clone()
}

fn main() {}
