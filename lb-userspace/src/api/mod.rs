//! The HTTP API: one set of types, a server on the control socket and a client for the command
//! line.

pub mod types;
