//! The state of the services: what is desired, and what is known of the backends.

pub mod check;
