//! The library behind the `sluice` binary.
