//! Clients on the balancer's own host: their sockets connect straight to a backend.
//!
//! What a process here sends to a VIP never comes in by an interface, so XDP does not see it. The
//! kernel asks these programs before it connects a socket or sends a datagram, and they put a
//! backend's address in the place of the VIP. When the application asks whom it talks to, they put
//! the VIP back.
//!
//! They run in the context of the calling process, not of the network stack: XDP may interrupt them
//! on the same CPU. So they leave the per-CPU desk alone and count atomically.

use crate::{
    atomic,
    family::{Family, V4, V6},
    lookup, maps,
    parse::protocol,
    select::{self, ALL_FULL},
};
use aya_ebpf::{
    bindings::bpf_sock_addr,
    btf_maps::PerCpuArray,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval,
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use lb_common::{
    addr::Address,
    backend::{BACKEND_ALIVE, Backend, NO_BACKEND},
    filter::LANE_VIP,
    flow::FlowKey,
    local::{PEER_BACKEND, PEER_VIP, Peer, PeerKey},
    service::{Service, forward, on_no_backend},
    stats::{Counters, DropReason},
};

/// The kernel goes on with the address as it stands.
const PROCEED: i32 = 1;
/// The call of the application fails.
const REFUSE: i32 = 0;
/// `ECONNREFUSED`, as if the VIP had answered with a RST.
const CONNECTION_REFUSED: i32 = 111;

/// Slots that are tried before it is said that no backend is up: a backend may have died a moment
/// ago, with the table that no longer names it yet to be written.
const TRIES: u32 = 4;

/// TCP connects, or UDP is given a destination once and for all.
#[cgroup_sock_addr(connect4)]
pub fn sluice_connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(ctx.sock_addr, &Place::Ipv4)
}

/// As [`sluice_connect4`], for sockets of IPv6, which may connect to IPv4 addresses as well.
#[cgroup_sock_addr(connect6)]
pub fn sluice_connect6(ctx: SockAddrContext) -> i32 {
    if is_mapped(ctx.sock_addr) {
        connect::<V4>(ctx.sock_addr, &Place::Mapped)
    } else {
        connect::<V6>(ctx.sock_addr, &Place::Ipv6)
    }
}

/// A datagram is sent to a destination of its own.
#[cgroup_sock_addr(sendmsg4)]
pub fn sluice_sendmsg4(ctx: SockAddrContext) -> i32 {
    send::<V4>(ctx.sock_addr, &Place::Ipv4)
}

/// As [`sluice_sendmsg4`]. To an IPv4 address the kernel asks the other program.
#[cgroup_sock_addr(sendmsg6)]
pub fn sluice_sendmsg6(ctx: SockAddrContext) -> i32 {
    send::<V6>(ctx.sock_addr, &Place::Ipv6)
}

/// The application is told whom a datagram came from.
#[cgroup_sock_addr(recvmsg4)]
pub fn sluice_recvmsg4(ctx: SockAddrContext) -> i32 {
    name_peer::<V4>(ctx.sock_addr, &Place::Ipv4)
}

/// As [`sluice_recvmsg4`].
#[cgroup_sock_addr(recvmsg6)]
pub fn sluice_recvmsg6(ctx: SockAddrContext) -> i32 {
    name_peer6(ctx.sock_addr)
}

/// The application asks whom it is connected to.
#[cgroup_sock_addr(getpeername4)]
pub fn sluice_getpeer4(ctx: SockAddrContext) -> i32 {
    name_peer::<V4>(ctx.sock_addr, &Place::Ipv4)
}

/// As [`sluice_getpeer4`].
#[cgroup_sock_addr(getpeername6)]
pub fn sluice_getpeer6(ctx: SockAddrContext) -> i32 {
    name_peer6(ctx.sock_addr)
}

/// Where an address stands in the context.
enum Place {
    Ipv4,
    Ipv6,
    /// An IPv4 address in an IPv6 socket (RFC 4291 section 2.5.5.2).
    Mapped,
}

#[inline(always)]
fn is_mapped(ctx: *mut bpf_sock_addr) -> bool {
    word6(ctx, 0) == 0 && word6(ctx, 1) == 0 && word6(ctx, 2) == 0xffff_u32.to_be()
}

/// One word of the context's IPv6 address. The kernel wants each access by itself.
#[inline(always)]
fn word6(ctx: *mut bpf_sock_addr, i: usize) -> u32 {
    // SAFETY: a valid context; no caller asks for more than the four words there are.
    unsafe {
        (&raw const (*ctx).user_ip6)
            .cast::<u32>()
            .add(i)
            .read_volatile()
    }
}

#[inline(always)]
fn set_word6(ctx: *mut bpf_sock_addr, i: usize, word: u32) {
    // SAFETY: as in `word6`.
    unsafe {
        (&raw mut (*ctx).user_ip6)
            .cast::<u32>()
            .add(i)
            .write_volatile(word);
    }
}

#[inline(always)]
fn address<A: Address>(ctx: *mut bpf_sock_addr, place: &Place) -> A {
    let words = match place {
        // SAFETY: a valid context.
        Place::Ipv4 => [
            unsafe { (&raw const (*ctx).user_ip4).read_volatile() },
            0,
            0,
            0,
        ],
        Place::Mapped => [word6(ctx, 3), 0, 0, 0],
        Place::Ipv6 => [word6(ctx, 0), word6(ctx, 1), word6(ctx, 2), word6(ctx, 3)],
    };
    A::narrow(&words)
}

#[inline(always)]
fn port(ctx: *mut bpf_sock_addr) -> u16 {
    // SAFETY: a valid context. The port is in the two bytes that come first, in network order.
    unsafe { (&raw const (*ctx).user_port).read_volatile() as u16 }
}

#[inline(always)]
fn set_destination(ctx: *mut bpf_sock_addr, place: &Place, addr: &[u32; 4], port: u16) {
    match place {
        // SAFETY: a valid context.
        Place::Ipv4 => unsafe { (&raw mut (*ctx).user_ip4).write_volatile(addr[0]) },
        Place::Mapped => set_word6(ctx, 3, addr[0]),
        Place::Ipv6 => {
            set_word6(ctx, 0, addr[0]);
            set_word6(ctx, 1, addr[1]);
            set_word6(ctx, 2, addr[2]);
            set_word6(ctx, 3, addr[3]);
        }
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*ctx).user_port).write_volatile(port.into()) };
}

/// Whether the socket is of the network namespace whose VIPs these are.
#[inline(always)]
fn is_ours(ctx: *mut bpf_sock_addr) -> bool {
    let Some(settings) = maps::LOCAL_SETTINGS.get(0) else {
        return false;
    };
    // SAFETY: a valid context.
    settings.netns_cookie == unsafe { bpf_get_netns_cookie(ctx.cast()) }
}

/// A service that a socket here can be led to, with its number.
#[inline(always)]
fn service<F: Family>(
    ctx: *mut bpf_sock_addr,
    vip: F::Addr,
    port: u16,
) -> Option<(u32, &'static Service)> {
    let lane = lookup::lane_of::<F>(vip);
    if lane & LANE_VIP == 0 || !is_ours(ctx) {
        return None;
    }
    // SAFETY: a valid context.
    let protocol = unsafe { (&raw const (*ctx).protocol).read_volatile() };
    let found = lookup::service::<F>(vip, port, protocol as u8, lane)?;
    // In the other modes the backend takes only what is addressed to the VIP.
    forward::translates(found.1.forward).then_some(found)
}

/// A live backend, with its number, or why there is none.
#[inline(always)]
fn choose<F: Family>(
    number: u32,
    service: &Service,
    vip: F::Addr,
    dport: u16,
    udp: bool,
) -> Result<(u32, &'static Backend), DropReason> {
    let mut key = FlowKey::<F::Addr> {
        // The socket has no address yet, nor perhaps a port. To a scheduler that looks at the
        // client's address the host is one client.
        src: vip,
        dst: vip,
        sport: 0,
        dport,
        protocol: u32::from(if udp { protocol::UDP } else { protocol::TCP }),
    };
    for _ in 0..TRIES {
        // SAFETY: no arguments.
        key.sport = unsafe { bpf_get_prandom_u32() } as u16;
        let backend_number = match select::backend(number, service, &key) {
            NO_BACKEND => break,
            ALL_FULL => return Err(DropReason::BackendFull),
            backend => backend,
        };
        if let Some(backend) = maps::BACKENDS.get(backend_number)
            && backend.flags & BACKEND_ALIVE != 0
        {
            return Ok((backend_number, backend));
        }
    }
    Err(DropReason::NoBackend)
}

/// The address and port of a backend, for what was sent to `port`.
#[inline(always)]
fn peer(number: u32, backend: &Backend, port: u16) -> Peer {
    Peer {
        addr: lookup::address(&backend.addr),
        backend: number,
        generation: backend.generation,
        port: if backend.port == 0 {
            port
        } else {
            backend.port
        },
    }
}

#[inline(always)]
fn key<F: Family>(socket: u64, addr: [u32; 4], port: u16, whose: u8) -> PeerKey {
    PeerKey {
        socket,
        addr: lookup::word_by_word(addr),
        port,
        family: F::Addr::FAMILY,
        whose,
        reserved: 0,
    }
}

#[inline(always)]
fn connect<F: Family>(ctx: *mut bpf_sock_addr, place: &Place) -> i32 {
    let (vip, port) = (address::<F::Addr>(ctx, place), port(ctx));
    let Some((number, service)) = service::<F>(ctx, vip, port) else {
        return PROCEED;
    };
    // SAFETY: a valid context.
    let udp = unsafe { (&raw const (*ctx).protocol).read_volatile() } == protocol::UDP.into();
    let (backend_number, backend) = match choose::<F>(number, service, vip, port, udp) {
        Ok(chosen) => chosen,
        Err(reason) => return no_backend(reason, service, number),
    };
    let to = peer(backend_number, backend, port);
    // SAFETY: a valid context.
    let socket = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    remember_vip::<F>(socket, &to, vip, port);
    count(number, backend_number);
    set_destination(ctx, place, &to.addr, to.port);
    PROCEED
}

#[inline(always)]
fn send<F: Family>(ctx: *mut bpf_sock_addr, place: &Place) -> i32 {
    let (vip, port) = (address::<F::Addr>(ctx, place), port(ctx));
    let Some((number, service)) = service::<F>(ctx, vip, port) else {
        return PROCEED;
    };
    // SAFETY: a valid context.
    let socket = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let asked = key::<F>(socket, vip.widen(), port, PEER_VIP);
    // As long as its backend lives, a socket's datagrams for one VIP are one flow.
    // SAFETY: a copy; the entry of one socket is written by its own calls.
    let known = unsafe { maps::LOCAL_PEERS.get(&asked) }.filter(|known| lives(known));
    let to = if let Some(known) = known {
        Peer {
            addr: lookup::address(&known.addr),
            ..*known
        }
    } else {
        let (backend_number, backend) = match choose::<F>(number, service, vip, port, true) {
            Ok(chosen) => chosen,
            Err(reason) => return no_backend(reason, service, number),
        };
        let to = peer(backend_number, backend, port);
        // Without the entry the next datagram may go elsewhere, which UDP allows.
        let _ = maps::LOCAL_PEERS.insert(&asked, &to, 0);
        count(number, backend_number);
        to
    };
    remember_vip::<F>(socket, &to, vip, port);
    set_destination(ctx, place, &to.addr, to.port);
    PROCEED
}

/// Whether a backend is still the one that was picked, and may keep its flows.
#[inline(always)]
fn lives(peer: &Peer) -> bool {
    maps::BACKENDS.get(peer.backend).is_some_and(|backend| {
        backend.generation == peer.generation && backend.flags & BACKEND_ALIVE != 0
    })
}

/// Sees to it that the application is told of the VIP, not of the backend.
#[inline(always)]
fn remember_vip<F: Family>(socket: u64, to: &Peer, vip: F::Addr, port: u16) {
    let known = key::<F>(socket, to.addr, to.port, PEER_BACKEND);
    let vip = vip.widen();
    // SAFETY: as in `send`.
    if let Some(peer) = unsafe { maps::LOCAL_PEERS.get(&known) }
        && peer.port == port
        && peer.addr == vip
    {
        return;
    }
    let peer = Peer {
        addr: lookup::word_by_word(vip),
        backend: to.backend,
        generation: to.generation,
        port,
    };
    // A table that is full gives its oldest entry away. To have none costs the application a name,
    // not the connection.
    let _ = maps::LOCAL_PEERS.insert(&known, &peer, 0);
}

#[inline(always)]
fn name_peer6(ctx: *mut bpf_sock_addr) -> i32 {
    if is_mapped(ctx) {
        name_peer::<V4>(ctx, &Place::Mapped)
    } else {
        name_peer::<V6>(ctx, &Place::Ipv6)
    }
}

#[inline(always)]
fn name_peer<F: Family>(ctx: *mut bpf_sock_addr, place: &Place) -> i32 {
    if !is_ours(ctx) {
        return PROCEED;
    }
    // SAFETY: a valid context.
    let socket = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let addr = address::<F::Addr>(ctx, place).widen();
    let known = key::<F>(socket, addr, port(ctx), PEER_BACKEND);
    // SAFETY: as in `send`.
    if let Some(vip) = unsafe { maps::LOCAL_PEERS.get(&known) } {
        let addr = lookup::address::<[u32; 4]>(&vip.addr);
        set_destination(ctx, place, &addr, vip.port);
    }
    PROCEED
}

#[inline(always)]
fn no_backend(reason: DropReason, service: &Service, number: u32) -> i32 {
    if service.on_no_backend == on_no_backend::PASS {
        return PROCEED;
    }
    if let Some(drops) = maps::DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: a map value, aligned to 8 bytes.
        unsafe { atomic::fetch_add(drops, 1) };
    }
    add(&maps::SERVICE_STATS, number, |counters| {
        // SAFETY: `counters` is a live map value.
        unsafe { &raw mut (*counters).drops }
    });
    // A call that fails cannot be silent: `drop` is told as `reset` is.
    // SAFETY: a plain number.
    unsafe { bpf_set_retval(-CONNECTION_REFUSED) };
    REFUSE
}

/// One connection, or one socket's datagrams.
#[inline(always)]
fn count(service: u32, backend: u32) {
    // SAFETY: `counters` is a live map value.
    let connections = |counters: *mut Counters| unsafe { &raw mut (*counters).connections };
    add(&maps::SERVICE_STATS, service, connections);
    add(&maps::BACKEND_STATS, backend, connections);
}

#[inline(always)]
fn add<const N: usize>(
    map: &PerCpuArray<Counters, N>,
    number: u32,
    which: impl Fn(*mut Counters) -> *mut u64,
) {
    if let Some(counters) = map.get_ptr_mut(number) {
        // SAFETY: a map value, aligned to 8 bytes.
        unsafe { atomic::fetch_add(which(counters), 1) };
    }
}
