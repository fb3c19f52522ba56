//! The maps of `sluice_decap`. The balancer's program uses none of them, and this one none of the
//! balancer's but its work space.
//!
//! Names are at most 15 characters, so that the kernel keeps them whole: `sluice decap` finds the maps
//! of a running program by them.

use aya_ebpf::{
    btf_maps::{Array, HashMap, PerCpuArray},
    macros::btf_map,
};
use lb_common::decap::{Counter, OUTCOME_SLOTS, Settings};

/// The map of addresses of one family.
pub type Addresses<A> = HashMap<A, u32, 4096>;

/// `BPF_F_MMAPABLE`: the user side maps the array into its memory.
const MMAPABLE: usize = 1 << 10;

#[btf_map(name = "decap_settings")]
pub static SETTINGS: Array<Settings, 1, MMAPABLE> = Array::new();
#[btf_map(name = "decap_addrs4")]
pub static ADDRESSES4: Addresses<u32> = HashMap::new();
#[btf_map(name = "decap_addrs6")]
pub static ADDRESSES6: Addresses<[u32; 4]> = HashMap::new();
#[btf_map(name = "decap_stats")]
pub static STATS: PerCpuArray<Counter, { OUTCOME_SLOTS as usize }> = PerCpuArray::new();
