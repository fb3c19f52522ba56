//! What the kernel side and the user side of Sluice share.
//!
//! Everything that crosses the boundary of a BPF map is defined here once: the layout of keys and
//! values, the hashes that place a flow in a table, checksum arithmetic, and the names that
//! operators read. The crate is `no_std`, has no global state and takes no clock, so all of it runs
//! under plain `cargo test`.
//!
//! Byte order: a field whose documentation says *network order* holds the bytes as they stand in
//! a packet, loaded into a native integer without conversion. Everything else is native.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod addr;
pub mod backend;
pub mod bench;
pub mod client;
pub mod csum;
pub mod decap;
pub mod filter;
pub mod flow;
pub mod flow_table;
pub mod fragment;
pub mod hash;
pub mod local;
pub mod names;
pub mod probe;
pub mod service;
pub mod stats;
pub mod vlan;
