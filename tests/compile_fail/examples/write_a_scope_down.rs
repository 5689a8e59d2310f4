//! To write a scope down, or to read one from what a client sent.
use shared::scope::TenantScope;

fn write_down(scope: &TenantScope) -> String {
    //~ E0277: the trait bound `TenantScope: serde::Serialize` is not satisfied
    serde_json::to_string(scope).unwrap()
}

fn read_from(body: &str) -> TenantScope {
    //~ E0277: the trait bound `TenantScope: serde::Deserialize<'de>` is not satisfied
    serde_json::from_str(body).unwrap()
}

fn main() {}
