//! To make somebody's books out of an id, the power over everybody's out of nothing, or an upload that was begun out of
//! one's own idea of it.
use shared::scope::{Bookkeeper, Ward};
use shared::tenant::TenantId;
use shared::upload::{Begun, Upload};

fn ward(id: TenantId) -> Ward {
    //~ E0423: cannot initialize a tuple struct which contains private fields
    Ward(id)
}

fn bookkeeper() -> Bookkeeper {
    //~ E0423: cannot initialize a tuple struct which contains private fields
    Bookkeeper(())
}

fn begun(upload: Upload) -> Begun {
    //~ E0423: cannot initialize a tuple struct which contains private fields
    Begun(upload)
}

fn main() {}
