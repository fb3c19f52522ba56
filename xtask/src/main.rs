//! Tasks.
#[allow(dead_code)]
mod bpf;
fn main() {}
