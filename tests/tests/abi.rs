//! The layout of what crosses the kernel's boundary: the types of `lb-common` as the user side
//! compiles them, against those the BPF object says its maps have.

use lb_common::{
    abi::{Pressure, Settings},
    backend::{Backend, Load, Slot},
    client::{AccessKey, Affinity, ClientKey, Source},
    decap,
    flow::{Flow, FlowKey},
    flow_table::Entry,
    fragment::{Datagram, FragmentKey},
    local::{LocalSettings, Peer, PeerKey},
    probe::ProbeTarget,
    service::{Bucket4, Bucket6, ClientLink, Cursor, Gateway, Interface, Listener, Service, Vip},
    stats::Counters,
};
use sluice_tests::btf::{Btf, Struct, Type};
use std::mem::{offset_of, size_of};

/// A structure as Rust lays it out here: name, size, and name, offset and size of each field.
struct Layout {
    name: &'static str,
    size: usize,
    fields: Vec<(&'static str, usize, usize)>,
}

macro_rules! layout {
    ($name:literal, $type:ty { $($field:ident: $kind:ty),* $(,)? }) => {
        Layout {
            name: $name,
            size: size_of::<$type>(),
            fields: {
                // A field that is missing here or has another type does not compile.
                let _ = |value: $type| {
                    #[allow(dead_code)]
                    fn is<T>(_: T) {}
                    $(is::<$kind>(value.$field);)*
                };
                vec![$((stringify!($field), offset_of!($type, $field), size_of::<$kind>())),*]
            },
        }
    };
}

type Addr6 = [u32; 4];

/// Every structure a map holds, with the compiler's mangling of generic arguments in the name.
fn layouts() -> Vec<Layout> {
    vec![
        layout!(
            "Settings",
            Settings {
                magic: u64,
                abi_version: u32,
                nat_port_first: u16,
                nat_port_last: u16,
                nat_port_seed: u32,
                encap_source4: u32,
                encap_mask4: u32,
                encap_source6: [u32; 4],
                encap_mask6: u32,
                gue_port: u16,
                nat_sources4: u8,
                nat_sources6: u8,
                new_flows: u32,
                flow_sets: u32,
                reserved: u32,
            }
        ),
        layout!(
            "Settings",
            decap::Settings {
                magic: u64,
                abi_version: u32,
                port: u16,
                reserved: u16,
            }
        ),
        layout!(
            "Counter",
            decap::Counter {
                packets: u64,
                bytes: u64
            }
        ),
        layout!("Vip", Vip { flags: u32 }),
        layout!("Bucket4", Bucket4 { listeners: [Listener<u32>; 4] }),
        layout!("Bucket6", Bucket6 { listeners: [Listener<Addr6>; 2], reserved: [u32; 2] }),
        layout!(
            "Service",
            Service {
                table: u64,
                previous_table: u64,
                members: u64,
                affinity_mask: [u32; 4],
                affinity: u32,
                connect_timeout: u32,
                source_rate: u32,
                flags: u32,
                forward: u8,
                scheduler: u8,
                on_no_backend: u8,
                on_backend_down: u8,
                reserved: u32,
            }
        ),
        layout!(
            "Gateway",
            Gateway {
                vip: [u32; 4],
                l2: [u32; 3],
                ifindex: u32,
                tags: u32,
                port: u16,
                mtu: u16,
                flags: u32,
                reserved: [u32; 5],
            }
        ),
        layout!(
            "Backend",
            Backend {
                addr: [u32; 4],
                source: [u32; 4],
                l2: [u32; 3],
                ifindex: u32,
                service: u32,
                tags: u32,
                generation: u16,
                mtu: u16,
                port: u16,
                family: u8,
                flags: u8,
            }
        ),
        layout!(
            "Slot",
            Slot {
                backend: u32,
                previous: u32
            }
        ),
        layout!(
            "Cursor",
            Cursor {
                next: u64,
                recorded: u64,
                reserved: [u64; 6]
            }
        ),
        layout!("FlowKey_3C_u32_3E_", FlowKey<u32> {
            src: u32, dst: u32, sport: u16, dport: u16, protocol: u32,
        }),
        layout!("FlowKey_3C__5B_u32_3B__20_4_5D__3E_", FlowKey<Addr6> {
            src: Addr6, dst: Addr6, sport: u16, dport: u16, protocol: u32,
        }),
        layout!("Flow_3C_u32_3E_", Flow<u32> {
            src: u32, dst: u32, sport: u16, dport: u16, backend: u32, service: u32,
            l3_delta: u16, l4_delta: u16, state: u8, direction: u8, forward: u8, proven: u8, last_seen: u32,
            generation: u16, link: u16, hop_tail: u16, mtu: u16, hop_head: u32, created_or_tags: u32,
        }),
        layout!("Flow_3C__5B_u32_3B__20_4_5D__3E_", Flow<Addr6> {
            src: Addr6, dst: Addr6, sport: u16, dport: u16, backend: u32, service: u32,
            l3_delta: u16, l4_delta: u16, state: u8, direction: u8, forward: u8, proven: u8, last_seen: u32,
            generation: u16, link: u16, hop_tail: u16, mtu: u16, hop_head: u32, created_or_tags: u32,
        }),
        layout!("Entry_3C_u32_3E_", Entry<u32> {
            key: FlowKey<u32>, flow: Flow<u32>, reserved: [u32; 0],
        }),
        layout!("Entry_3C__5B_u32_3B__20_4_5D__3E_", Entry<Addr6> {
            key: FlowKey<Addr6>, flow: Flow<Addr6>, reserved: [u32; 4],
        }),
        layout!("FragmentKey_3C_u32_3E_", FragmentKey<u32> {
            src: u32, dst: u32, id: u32, protocol: u32,
        }),
        layout!("FragmentKey_3C__5B_u32_3B__20_4_5D__3E_", FragmentKey<Addr6> {
            src: Addr6, dst: Addr6, id: u32, protocol: u32,
        }),
        layout!("Datagram_3C_u32_3E_", Datagram<u32> {
            src: u32, dst: u32, backend: u32, generation: u32, service: u32, l2: [u32; 3], ifindex: u32,
            tags: u32, created: u32, l3_delta: u16, direction: u8, forward: u8, hash: u32, reserved: u32,
        }),
        layout!("Datagram_3C__5B_u32_3B__20_4_5D__3E_", Datagram<Addr6> {
            src: Addr6, dst: Addr6, backend: u32, generation: u32, service: u32, l2: [u32; 3],
            ifindex: u32, tags: u32, created: u32, l3_delta: u16, direction: u8, forward: u8, hash: u32, reserved: u32,
        }),
        layout!("ClientKey_3C_u32_3E_", ClientKey<u32> { service: u32, addr: u32 }),
        layout!("ClientKey_3C__5B_u32_3B__20_4_5D__3E_", ClientKey<Addr6> { service: u32, addr: Addr6 }),
        layout!(
            "Key_3C_lb_common_3A__3A_client_3A__3A_ClientKey_3C_u32_3E__3E_",
            AccessKey<u32> { prefix_len: u32, data: ClientKey<u32> }
        ),
        layout!(
            "Key_3C_lb_common_3A__3A_client_3A__3A_ClientKey_3C__5B_u32_3B__20_4_5D__3E__3E_",
            AccessKey<Addr6> { prefix_len: u32, data: ClientKey<Addr6> }
        ),
        layout!(
            "Pressure",
            Pressure {
                window: u32,
                begun: u32,
                flows: u64,
                displaced: u64
            }
        ),
        layout!(
            "Affinity",
            Affinity {
                backend: u32,
                generation: u32,
                last_seen: u32,
                reserved: u32
            }
        ),
        layout!("Source", Source { clear: u64 }),
        layout!(
            "Load",
            Load {
                begun: u64,
                ended: u64,
                opened: u64,
                closed: u64,
                released: u64,
                weight: u32,
                max_connections: u32,
                retries: u64,
                resets: u64
            }
        ),
        layout!(
            "Counters",
            Counters {
                connections: u64,
                packets_in: u64,
                bytes_in: u64,
                packets_out: u64,
                bytes_out: u64,
                drops: u64,
            }
        ),
        layout!(
            "LocalSettings",
            LocalSettings {
                netns_cookie: u64,
                probe_mark: u32,
                reserved: u32
            }
        ),
        layout!(
            "ProbeTarget",
            ProbeTarget {
                vip: [u32; 4],
                backend: [u32; 4],
                family: u8,
                forward: u8,
                reserved: u16
            }
        ),
        layout!(
            "PeerKey",
            PeerKey {
                socket: u64,
                addr: [u32; 4],
                port: u16,
                family: u8,
                whose: u8,
                reserved: u32,
            }
        ),
        layout!(
            "Peer",
            Peer {
                addr: [u32; 4],
                backend: u32,
                generation: u16,
                port: u16,
            }
        ),
        layout!(
            "Interface",
            Interface {
                mac: [u8; 6],
                mtu: u16,
                link: u32
            }
        ),
        layout!(
            "ClientLink",
            ClientLink {
                source: [u32; 2],
                ifindex: u32,
                reserved: u32
            }
        ),
    ]
}

/// Key and value of each map, as `docs/architecture.md` has them. Structures by their name,
/// others by size.
const MAPS: [(&str, &str, &str); 43] = [
    ("settings", "4", "Settings"),
    ("nat_sources4", "4", "4"),
    ("nat_sources6", "4", "16"),
    ("address_filter", "4", "8"),
    ("vips4", "4", "Vip"),
    ("vips6", "16", "Vip"),
    ("services4", "4", "Bucket4"),
    ("services6", "4", "Bucket6"),
    ("services", "4", "Service"),
    ("gateways", "4", "Gateway"),
    ("backends", "4", "Backend"),
    ("slots", "4", "Slot"),
    ("cursors", "4", "Cursor"),
    ("flows4", "4", "Entry_3C_u32_3E_"),
    ("flows6", "4", "Entry_3C__5B_u32_3B__20_4_5D__3E_"),
    ("flow_sets4", "4", "8"),
    ("flow_sets6", "4", "8"),
    ("opening4", "FlowKey_3C_u32_3E_", "Flow_3C_u32_3E_"),
    (
        "opening6",
        "FlowKey_3C__5B_u32_3B__20_4_5D__3E_",
        "Flow_3C__5B_u32_3B__20_4_5D__3E_",
    ),
    ("last_opening", "4", "4"),
    ("pressure", "4", "Pressure"),
    (
        "fragments4",
        "FragmentKey_3C_u32_3E_",
        "Datagram_3C_u32_3E_",
    ),
    (
        "fragments6",
        "FragmentKey_3C__5B_u32_3B__20_4_5D__3E_",
        "Datagram_3C__5B_u32_3B__20_4_5D__3E_",
    ),
    ("affinity4", "ClientKey_3C_u32_3E_", "Affinity"),
    (
        "affinity6",
        "ClientKey_3C__5B_u32_3B__20_4_5D__3E_",
        "Affinity",
    ),
    ("sources4", "ClientKey_3C_u32_3E_", "Source"),
    (
        "sources6",
        "ClientKey_3C__5B_u32_3B__20_4_5D__3E_",
        "Source",
    ),
    (
        "access4",
        "Key_3C_lb_common_3A__3A_client_3A__3A_ClientKey_3C_u32_3E__3E_",
        "4",
    ),
    (
        "access6",
        "Key_3C_lb_common_3A__3A_client_3A__3A_ClientKey_3C__5B_u32_3B__20_4_5D__3E__3E_",
        "4",
    ),
    ("backend_load", "4", "Load"),
    ("service_stats", "4", "Counters"),
    ("backend_stats", "4", "Counters"),
    ("drops", "4", "8"),
    ("interfaces", "4", "Interface"),
    ("links", "4", "ClientLink"),
    ("local_settings", "4", "LocalSettings"),
    ("local_peers", "PeerKey", "Peer"),
    ("probe_targets", "4", "ProbeTarget"),
    ("probes", "FlowKey_3C__5B_u32_3B__20_4_5D__3E_", "16"),
    ("decap_settings", "4", "Settings"),
    ("decap_addrs4", "4", "4"),
    ("decap_addrs6", "16", "4"),
    ("decap_stats", "4", "Counter"),
];

/// Maps whose values nobody but the kernel or the program itself reads.
const PRIVATE: [&str; 5] = ["recent_syns", "redirects", "scratch", "work4", "work6"];

fn object() -> Btf {
    Btf::of_object(sluice::dataplane::OBJECT)
}

#[test]
fn every_map_has_the_documented_key_and_value() {
    let btf = object();
    let told = |map: &str, part: &str| match btf.of_map(map, part) {
        Type::Struct(s) => s.name.clone(),
        other => btf.size(other).to_string(),
    };
    for (map, key, value) in MAPS {
        assert_eq!(told(map, "key"), key, "the key of map {map}");
        assert_eq!(told(map, "value"), value, "the value of map {map}");
    }
    let mut known: Vec<&str> = MAPS.iter().map(|(name, ..)| *name).chain(PRIVATE).collect();
    let mut there = btf.maps();
    known.sort_unstable();
    there.sort_unstable();
    assert_eq!(there, known, "the maps of the object");
}

#[test]
fn shared_structures_have_the_same_layout_on_both_sides() {
    let btf = object();
    let layouts = layouts();
    let mut compared = Vec::new();
    for (map, ..) in MAPS {
        for part in ["key", "value"] {
            let Type::Struct(theirs) = btf.of_map(map, part) else {
                continue;
            };
            // Both programs have a `Settings`.
            let ours = layouts
                .iter()
                .find(|l| l.name == theirs.name && l.size == theirs.size as usize)
                .unwrap_or_else(|| {
                    panic!(
                        "{} of map {map} is not listed here in this size",
                        theirs.name
                    )
                });
            compare(&btf, ours, theirs);
            compared.push(ours.name);
        }
    }
    for layout in &layouts {
        assert!(
            compared.contains(&layout.name),
            "no map of the object holds {}",
            layout.name
        );
    }
}

fn compare(btf: &Btf, ours: &Layout, theirs: &Struct) {
    assert_eq!(ours.size, theirs.size as usize, "the size of {}", ours.name);
    let fields: Vec<(&str, usize, usize)> = theirs
        .members
        .iter()
        .map(|m| {
            let size = btf.size(btf.get(m.kind)) as usize;
            (m.name.as_str(), m.offset as usize, size)
        })
        .collect();
    assert_eq!(
        ours.fields, fields,
        "name, offset and size of the fields of {}",
        ours.name
    );
    let sum: usize = fields.iter().map(|(_, _, size)| size).sum();
    assert_eq!(
        sum, ours.size,
        "{} has padding that nobody zeroes",
        ours.name
    );
}
