//! The end of a tenant, and of what is past its retention.
//!
//! Two functions, so that what a request reaches can delete nothing: `deprovisioning` answers operators,
//! begins the saga and shows how far it is; `eraser` does what the saga says, whenever the table's stream
//! or a schedule wakes it, and once a day deletes what no reader is shown any more.

pub mod eraser;
pub mod routes;
