//! The library behind the `sluice` binary.

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod decap;
pub mod demo;
pub mod flows;
pub mod health;
pub mod metrics;
pub mod model;
pub mod neigh;
pub mod reconcile;
pub mod scheduler;
