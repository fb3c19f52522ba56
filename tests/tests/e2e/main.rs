//! The whole balancer, end to end: the real daemon in a network of namespaces, real servers behind
//! it and real clients before it.

mod checks;
mod commands;
mod daemon;
mod failover;
mod flows;
mod gateway;
mod listeners;
mod local;
mod local_clients;
mod maintenance;
mod modes;
mod nexthops;
mod path_mtu;
mod placement;
mod probes;
mod support;
mod timeouts;
mod traffic;
