//! The real data plane on single packets: a file per behaviour.

mod checksum;
mod icmp;
mod listeners;
mod malformed;
mod nat;
mod neighbour;
mod passthrough;
mod refusal;
mod scheduling;
mod tcp_state;
