//! The real data plane on single packets: a file per behaviour.

mod admission;
mod answers;
mod checksum;
mod concurrency;
mod counts;
mod decap;
mod decap_mutations;
mod flow_table;
mod fragments;
mod icmp;
mod listeners;
mod local;
mod malformed;
mod modes;
mod mutations;
mod nat;
mod neighbour;
mod passthrough;
mod pressure;
mod rare;
mod refusal;
mod retry;
mod scheduling;
mod stateless;
mod tcp_state;
mod vlan;
