//! The data plane seen from the user side: loads, pins, adopts and attaches it, and gives its maps
//! types.
//!
//! The only user of aya and of the `bpf` system call. `docs/pins.md` and `docs/attach.md` say what
//! it promises.

mod attach;
pub mod bpf;
mod decap;
mod dump;
mod flow_table;
mod listeners;
mod load;
mod local;
mod map;
mod maps;
mod pins;
mod tcx;

pub use attach::{
    Attached, Mode, OwnedLink, XdpState, attach_stub, interface_index, interface_name, xdp_state,
};
pub use decap::{Decap, Running};
pub use dump::{dump, list};
pub use flow_table::{FlowTable, View};
pub use load::{Dataplane, OBJECT, STORES_IN_ORDER};
pub use local::{check_cgroup, root_cgroup};
pub use map::{HashMap, PerCpuArray, Redirect, SharedArray, possible_cpus};
pub use maps::{Flowing, Maps, NAMES};
pub use pins::detach;
pub use tcx::Direction;

#[cfg(test)]
mod tests;
