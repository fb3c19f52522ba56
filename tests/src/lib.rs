//! Support for the tests of Sluice: packets and their judgement, a harness around the real
//! programs, a reference model, and networks of namespaces.

pub mod backends;
pub mod btf;
pub mod harness;
pub mod model;
pub mod oracle;
pub mod packet;
mod read;
pub mod topology;
