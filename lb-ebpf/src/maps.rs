//! The maps. `docs/architecture.md` lists who writes them; sizes here are replaced at load by
//! those of the configuration.

use crate::{flow::Work, icmp::answer::Allowance};
use aya_ebpf::{
    btf_maps::{Array, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use lb_common::{
    abi::{NAT_SOURCES, Pressure, Settings},
    backend::{Backend, Load, Slot},
    client::{Affinity, ClientKey, Source},
    filter,
    flow::{Flow, FlowKey},
    flow_table::Entry,
    fragment::{Datagram, FragmentKey},
    local::{LocalSettings, Peer, PeerKey},
    probe::ProbeTarget,
    service::{self, Bucket4, Bucket6, ClientLink, Cursor, Gateway, Interface, Service, Vip},
    stats::{Counters, DROP_SLOTS},
};

/// `BPF_F_MMAPABLE`: the daemon maps the array into its memory.
pub const MMAPABLE: usize = 1 << 10;

/// An IPv6 address in a map.
type Addr6 = [u32; 4];

#[btf_map(name = "settings")]
pub static SETTINGS: Array<Settings, 1, MMAPABLE> = Array::new();
#[btf_map(name = "nat_sources4")]
pub static NAT_SOURCES4: Array<u32, { NAT_SOURCES as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "nat_sources6")]
pub static NAT_SOURCES6: Array<Addr6, { NAT_SOURCES as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "address_filter")]
pub static ADDRESS_FILTER: Array<u64, { filter::ELEMENTS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "vips4")]
pub static VIPS4: HashMap<u32, Vip, 4096> = HashMap::new();
#[btf_map(name = "vips6")]
pub static VIPS6: HashMap<Addr6, Vip, 4096> = HashMap::new();
#[btf_map(name = "services4")]
pub static SERVICES4: Array<Bucket4, 65536, MMAPABLE> = Array::new();
#[btf_map(name = "services6")]
pub static SERVICES6: Array<Bucket6, 65536, MMAPABLE> = Array::new();
#[btf_map(name = "services")]
pub static SERVICES: Array<Service, 4097, MMAPABLE> = Array::new();
#[btf_map(name = "gateways")]
pub static GATEWAYS: Array<Gateway, 4097, MMAPABLE> = Array::new();
#[btf_map(name = "backends")]
pub static BACKENDS: Array<Backend, 16385, MMAPABLE> = Array::new();
#[btf_map(name = "slots")]
pub static SLOTS: Array<Slot, 65536, MMAPABLE> = Array::new();
#[btf_map(name = "cursors")]
pub static CURSORS: Array<Cursor, 4097, MMAPABLE> = Array::new();
#[btf_map(name = "flows4")]
pub static FLOWS4: Array<Entry<u32>, 98304, MMAPABLE> = Array::new();
#[btf_map(name = "flows6")]
pub static FLOWS6: Array<Entry<Addr6>, 98304, MMAPABLE> = Array::new();
#[btf_map(name = "flow_sets4")]
pub static FLOW_SETS4: Array<u64, 12288, MMAPABLE> = Array::new();
#[btf_map(name = "flow_sets6")]
pub static FLOW_SETS6: Array<u64, 12288, MMAPABLE> = Array::new();
#[btf_map(name = "opening4")]
pub static OPENING4: LruHashMap<FlowKey<u32>, Flow<u32>, 65536> = LruHashMap::new();
#[btf_map(name = "opening6")]
pub static OPENING6: LruHashMap<FlowKey<Addr6>, Flow<Addr6>, 65536> = LruHashMap::new();
#[btf_map(name = "last_opening")]
pub static LAST_OPENING: Array<u32, 1, MMAPABLE> = Array::new();
#[btf_map(name = "pressure")]
pub static PRESSURE: PerCpuArray<Pressure, 1> = PerCpuArray::new();
#[btf_map(name = "fragments4")]
pub static FRAGMENTS4: LruHashMap<FragmentKey<u32>, Datagram<u32>, 8192> = LruHashMap::new();
#[btf_map(name = "fragments6")]
pub static FRAGMENTS6: LruHashMap<FragmentKey<Addr6>, Datagram<Addr6>, 8192> = LruHashMap::new();
#[btf_map(name = "affinity4")]
pub static AFFINITY4: LruHashMap<ClientKey<u32>, Affinity, 65536> = LruHashMap::new();
#[btf_map(name = "affinity6")]
pub static AFFINITY6: LruHashMap<ClientKey<Addr6>, Affinity, 65536> = LruHashMap::new();
#[btf_map(name = "sources4")]
pub static SOURCES4: LruHashMap<ClientKey<u32>, Source, 65536> = LruHashMap::new();
#[btf_map(name = "sources6")]
pub static SOURCES6: LruHashMap<ClientKey<Addr6>, Source, 65536> = LruHashMap::new();
#[btf_map(name = "access4")]
pub static ACCESS4: LpmTrie<ClientKey<u32>, u32, 65536> = LpmTrie::new();
#[btf_map(name = "access6")]
pub static ACCESS6: LpmTrie<ClientKey<Addr6>, u32, 65536> = LpmTrie::new();
#[btf_map(name = "backend_load")]
pub static BACKEND_LOAD: Array<Load, 16385, MMAPABLE> = Array::new();
#[btf_map(name = "service_stats")]
pub static SERVICE_STATS: PerCpuArray<Counters, 4097> = PerCpuArray::new();
#[btf_map(name = "backend_stats")]
pub static BACKEND_STATS: PerCpuArray<Counters, 16385> = PerCpuArray::new();
#[btf_map(name = "drops")]
pub static DROPS: PerCpuArray<u64, { DROP_SLOTS as usize }> = PerCpuArray::new();
#[btf_map(name = "interfaces")]
pub static INTERFACES: HashMap<u32, Interface, 1024> = HashMap::new();
#[btf_map(name = "links")]
pub static LINKS: Array<ClientLink, { service::LINKS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "redirects")]
pub static REDIRECTS: DevMapHash<256> = DevMapHash::new();
#[btf_map(name = "local_settings")]
pub static LOCAL_SETTINGS: Array<LocalSettings, 1, MMAPABLE> = Array::new();
#[btf_map(name = "local_peers")]
pub static LOCAL_PEERS: LruHashMap<PeerKey, Peer, 32768> = LruHashMap::new();
#[btf_map(name = "probe_targets")]
pub static PROBE_TARGETS: Array<ProbeTarget, 16385, MMAPABLE> = Array::new();
#[btf_map(name = "probes")]
pub static PROBES: LruHashMap<FlowKey<Addr6>, Addr6, 32768> = LruHashMap::new();
#[btf_map(name = "recent_syns")]
pub static RECENT_SYNS: Array<u64, { RECENT as usize }> = Array::new();
#[btf_map(name = "scratch")]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();
#[btf_map(name = "work4")]
pub static WORK4: PerCpuArray<Work<u32>, 1> = PerCpuArray::new();
#[btf_map(name = "work6")]
pub static WORK6: PerCpuArray<Work<Addr6>, 1> = PerCpuArray::new();

/// SYNs of stateless services that are remembered, to know one that is repeated.
pub const RECENT: u32 = 16384;

/// Bytes of a packet that are summed at a time.
pub const CHUNK: usize = 512;

/// What a CPU keeps for itself beside the packet's own [`Work`].
#[repr(C)]
pub struct Scratch {
    /// A piece of a packet, and room to pad it to a whole word.
    pub bytes: [u8; CHUNK + 8],
    /// For answers that must not become too many.
    pub allowance: Allowance,
}
