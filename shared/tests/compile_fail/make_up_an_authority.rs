//! To make somebody's books out of an id, or the power over everybody's out of nothing.
use shared::scope::{Bookkeeper, Ward};
use shared::tenant::TenantId;

fn ward(id: TenantId) -> Ward {
    Ward(id)
}

fn bookkeeper() -> Bookkeeper {
    Bookkeeper(())
}

fn main() {}
