//! Reconcile: what the maps hold becomes what the model wants.
//!
//! [`Reconciler::plan`] compares the two and returns an ordered list of operations, or an error
//! that leaves everything as it is; [`apply::apply`] carries the list out and reads it back. The
//! same way serves the first start, a restart over adopted maps, a reload and a health check's
//! result.
//!
//! Order makes every moment in between sound: a backend is written before the table that names
//! it, the table before the service that points to it, the service before the key that finds it;
//! what is taken away goes in the opposite order.

pub mod apply;
mod delta;
mod filter;
mod keys;
mod origins;
pub mod plan;
mod slots;

pub use plan::{Backend, Hop, Op, Reconciler, Service, Settling, Table};
