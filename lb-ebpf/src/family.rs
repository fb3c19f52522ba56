//! What differs between IPv4 and IPv6; everything else is written once over [`Family`].

use crate::rewrite::encap;
use crate::{
    admit,
    flow::{self, Work, table::Number},
    fragment,
    frame::{Cursor, Frame},
    icmp::{self, error::Quoted},
    lookup,
    maps::{self, MMAPABLE},
    neighbour,
    parse::{self, Link, Network, protocol},
    pressure,
    verdict::Verdict,
};
use aya_ebpf::{
    bindings::xdp_md,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap},
};
use core::mem::offset_of;
use lb_common::{
    abi::Settings,
    addr::Address,
    backend::Backend,
    client::{Affinity, ClientKey, Source},
    csum,
    flow::{Flow, FlowKey},
    flow_table::Entry,
    fragment::{Datagram, FragmentKey},
    hash,
    service::{ServiceKey, Vip},
};
use network_types::{
    icmp::Icmpv4Hdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

/// The flow table of one family.
pub type Flows<A> = Array<Entry<A>, 98304, MMAPABLE>;
/// The tags of its sets.
pub type FlowSets = Array<u64, 12288, MMAPABLE>;
/// The map of half-open flows of one family.
pub type Opening<A> = LruHashMap<FlowKey<A>, Flow<A>, 65536>;
/// The map of VIPs of one family.
pub type Vips<A> = HashMap<A, Vip, 4096>;

/// The map of clients' backends of one family.
pub type Affinities<A> = LruHashMap<ClientKey<A>, Affinity, 65536>;
/// The map of clients' rates of one family.
pub type Sources<A> = LruHashMap<ClientKey<A>, Source, 65536>;
/// The map of allowed and denied prefixes of one family.
pub type Access<A> = LpmTrie<ClientKey<A>, u32, 65536>;

/// The map of fragmented datagrams of one family.
pub type Fragments<A> = LruHashMap<FragmentKey<A>, Datagram<A>, 8192>;

/// An IP version.
pub trait Family: Sized {
    /// Its addresses.
    type Addr: Address;
    /// Bytes of a network header without options or extensions.
    const HEADER_LEN: usize;
    /// Offset of the source address.
    const SRC: usize;
    /// Offset of the destination address.
    const DST: usize;
    /// IP protocol number of its ICMP.
    const ICMP: u8;
    /// ICMP type of an echo request.
    const ECHO_REQUEST: u8;
    /// ICMP type of an echo reply.
    const ECHO_REPLY: u8;
    /// Type and code of the error about a packet that is too large, as they stand in the message.
    const TOO_BIG: u16;
    /// Type and code of the error about a packet that has no hop left.
    const TIME_EXCEEDED: u16;
    /// Most bytes of a packet that an error quotes.
    const QUOTE: u32;

    /// Its ethertype, as it stands in the frame.
    const ETHERTYPE: u16;
    /// IP protocol number of a packet of this family inside another.
    const INSIDE: u8;
    /// Whether UDP must carry a checksum (RFC 8200 section 8.1).
    const UDP_NEEDS_CHECKSUM: bool;

    /// Its flow table.
    fn flows() -> &'static Flows<Self::Addr>;
    /// The tags of the flow table's sets.
    fn flow_sets() -> &'static FlowSets;
    /// Its half-open flows that are not in the flow table.
    fn opening() -> &'static Opening<Self::Addr>;
    /// [`crate::flow::table`]'s subprogram that finds a flow.
    fn find(which: u32) -> Number;
    /// [`crate::flow::table`]'s subprogram that tells a port for a new flow in `nat`.
    fn port_beside() -> u32;
    /// [`crate::flow::table`]'s subprogram that reserves an entry for a flow.
    fn reserve(which: u32) -> u64;
    /// [`crate::flow::table`]'s subprogram that fills the reserved entries.
    fn publish() -> u64;
    /// [`crate::flow::table`]'s subprogram that removes the other half of a flow that had to go.
    fn bury() -> u64;
    /// [`crate::flow::table`]'s subprogram that removes a flow.
    fn remove(which: u32) -> u64;
    /// The number of the service that listens on `key`, if bucket `place` has it; else 0.
    fn listener(place: u32, key: &ServiceKey<Self::Addr>) -> u32;
    /// Its VIPs.
    fn vips() -> &'static Vips<Self::Addr>;
    /// Its clients' backends.
    fn affinity() -> &'static Affinities<Self::Addr>;
    /// Its clients' rates.
    fn sources() -> &'static Sources<Self::Addr>;
    /// Its allowed and denied prefixes.
    fn access() -> &'static Access<Self::Addr>;

    /// This CPU's desk.
    fn work() -> Option<&'static mut Work<Self::Addr>>;
    /// [`crate::pressure`]'s subprogram for a packet that may belong to a half-open flow.
    fn resume() -> u64;
    /// [`crate::pressure`]'s subprogram that moves such a flow to the flow table.
    fn settle() -> u64;
    /// [`crate::pressure`]'s subprogram that frees a source port.
    fn recycle(any: u32) -> u64;
    /// [`crate::admit`]'s subprogram.
    fn admit(service: u32) -> u64;
    /// [`crate::flow`]'s subprogram that picks a backend for a new flow and
    /// prepares its entry.
    fn choose() -> u64;
    /// [`crate::flow`]'s subprogram that records the backend's entry of a new flow.
    fn record_reply() -> u64;
    /// [`crate::flow`]'s subprogram that records the client's entry of a new flow.
    fn record_client() -> u64;
    /// [`crate::flow`]'s subprogram for a client's packet that changes something.
    fn revise() -> u64;
    /// [`crate::flow`]'s subprogram for a backend's packet that changes something.
    fn note_reply() -> u64;
    /// [`crate::stateless`]'s subprogram for what may be an answer of a flow that is not recorded.
    fn answer() -> u64;
    /// [`crate::stateless`]'s subprogram that tells of a flow that is not recorded.
    fn describe() -> u64;
    /// [`crate::stateless`]'s subprogram that tells whether answers need no record to find the arrival's client.
    fn returns() -> u64;
    /// [`crate::stateless`]'s subprogram for an answer that goes through a gateway although its flow is recorded.
    fn through_gateway() -> u64;

    /// One of the addresses that `nat` sends from, for a flow with this hash; `None` if each
    /// backend has its own.
    fn nat_source(settings: &Settings, hash: u32) -> Option<Self::Addr>;

    /// Source address.
    #[inline(always)]
    fn src(header: Cursor) -> Self::Addr {
        header.read_address(Self::SRC)
    }
    /// Destination address.
    #[inline(always)]
    fn dst(header: Cursor) -> Self::Addr {
        header.read_address(Self::DST)
    }
    /// The protocol of a packet whose transport header follows directly behind this header;
    /// `None` of one with options or extension headers, or of a fragment.
    fn plain_protocol(header: Cursor) -> Option<u8>;
    /// Reads the addresses; nothing is judged yet.
    fn network(frame: &Frame, link: &Link) -> Option<Network<Self>>;
    /// Finds the transport header and judges the network header; of fragments, it takes the first.
    fn locate_first(frame: &Frame, network: &Network<Self>)
    -> Result<parse::Located, parse::Fault>;
    /// As [`Family::locate_first`], but takes no fragment.
    #[inline(always)]
    fn locate(frame: &Frame, network: &Network<Self>) -> Result<parse::Located, parse::Fault> {
        let located = Self::locate_first(frame, network)?;
        if located.first_fragment {
            return Err(parse::Fault::Fragment);
        }
        Ok(located)
    }
    /// The identification of a fragment, as it stands in the header, and the IP protocol number
    /// where that belongs to it.
    fn identification(frame: &Frame, network: &Network<Self>) -> Option<(u32, u32)>;
    /// Its fragmented datagrams.
    fn fragments() -> &'static Fragments<Self::Addr>;
    /// [`crate::fragment`]'s subprogram that remembers where a first fragment goes.
    fn open_fragment(ctx: *mut xdp_md) -> u64;
    /// [`crate::fragment`]'s subprogram for a later fragment.
    fn follow_fragment(ctx: *mut xdp_md) -> u64;
    /// TTL or hop limit.
    fn hops(header: Cursor) -> u8;
    /// Writes addresses and TTL or hop limit; `l3_delta` is what the addresses add to the header's
    /// sum.
    fn readdress(header: Cursor, src: Self::Addr, dst: Self::Addr, l3_delta: u16, hops: u8);
    /// DSCP and ECN.
    fn class(header: Cursor) -> u8;
    /// Bytes of the IP packet, as its header says.
    fn packet_len(header: Cursor) -> u32;
    /// Takes one hop away.
    fn age(header: Cursor);
    /// The sum of the header's words, without options.
    fn header_sum(header: Cursor) -> u64;
    /// [`crate::rewrite`]'s subprogram that puts a packet of this family into another.
    fn encapsulate(ctx: *mut xdp_md, backend: u32, hash: u32, gue: u32) -> u32;
    /// The source of a packet of this family around another.
    fn encap_source(settings: &Settings, backend: &Backend, hash: u32) -> Self::Addr;
    /// Writes a whole header without options in front of `payload_len` bytes; `class` is DSCP and
    /// ECN.
    fn write_header(
        header: Cursor,
        src: Self::Addr,
        dst: Self::Addr,
        protocol: u8,
        class: u8,
        payload_len: u16,
    );

    /// A packet whose destination is neither a VIP nor a NAT source.
    fn not_for_us(frame: &Frame, link: &Link, network: &Network<Self>) -> Result<Verdict, Verdict>;
    /// Whether no packet from another host may be for an address (RFC 1122 section 3.2.1.3).
    fn is_loopback(address: Self::Addr) -> bool;
    /// Whether an address may be a single host's, so that it can be told of an error.
    fn is_host(address: Self::Addr) -> bool;
    /// Bytes 4 to 7 of the error about a packet that is too large.
    fn mtu_word(mtu: u32) -> u32;
    /// Whether an ICMP message of this type reports what happened to a packet it quotes.
    fn is_icmp_error(kind: u8) -> bool;
    /// [`crate::icmp::error`]'s subprogram that reads what an error quotes.
    fn read_quote(ctx: *mut xdp_md) -> u64;
    /// [`crate::icmp::error`]'s subprogram that carries it on.
    fn carry_error(ctx: *mut xdp_md) -> u64;
    /// Reads the header of a packet quoted at `quote`; `None` if it is cut short or is a fragment
    /// without ports.
    fn quoted(frame: &Frame, quote: Cursor) -> Option<Quoted<Self::Addr>>;
    /// Writes the addresses of a quoted header, and returns what mending its own checksum adds to
    /// the sum of the message.
    fn readdress_quoted(quote: Cursor, src: Self::Addr, dst: Self::Addr, l3_delta: u16) -> u16;
    /// An ICMP message for a VIP that is not an echo request.
    fn answer_icmp(frame: &Frame, link: &Link, network: &Network<Self>) -> Verdict;
}

/// TTL and hop limit of packets the balancer originates.
pub const HOPS: u8 = 64;

/// IPv4.
pub struct V4;
/// IPv6.
pub struct V6;

impl Family for V4 {
    type Addr = u32;
    const HEADER_LEN: usize = Ipv4Hdr::LEN;
    const SRC: usize = offset_of!(Ipv4Hdr, src_addr);
    const DST: usize = offset_of!(Ipv4Hdr, dst_addr);
    const ICMP: u8 = protocol::ICMP;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const ETHERTYPE: u16 = parse::ethernet::IPV4;
    const INSIDE: u8 = 4;
    const UDP_NEEDS_CHECKSUM: bool = false;
    const TOO_BIG: u16 = u16::from_ne_bytes([3, 4]);
    const TIME_EXCEEDED: u16 = u16::from_ne_bytes([11, 0]);
    // No more than 576 bytes in all: RFC 1812 section 4.3.2.3.
    const QUOTE: u32 = 576 - (Ipv4Hdr::LEN + Icmpv4Hdr::LEN) as u32;

    #[inline(always)]
    fn flows() -> &'static Flows<u32> {
        &maps::FLOWS4
    }

    #[inline(always)]
    fn flow_sets() -> &'static FlowSets {
        &maps::FLOW_SETS4
    }

    #[inline(always)]
    fn opening() -> &'static Opening<u32> {
        &maps::OPENING4
    }

    #[inline(always)]
    fn find(which: u32) -> Number {
        flow::find4(which)
    }

    #[inline(always)]
    fn port_beside() -> u32 {
        flow::port_beside4()
    }

    #[inline(always)]
    fn reserve(which: u32) -> u64 {
        flow::reserve4(which)
    }

    #[inline(always)]
    fn publish() -> u64 {
        flow::publish4()
    }

    #[inline(always)]
    fn bury() -> u64 {
        flow::bury4()
    }

    #[inline(always)]
    fn remove(which: u32) -> u64 {
        flow::remove4(which)
    }

    #[inline(always)]
    fn resume() -> u64 {
        pressure::resume4()
    }

    #[inline(always)]
    fn settle() -> u64 {
        pressure::settle4()
    }

    #[inline(always)]
    fn recycle(any: u32) -> u64 {
        pressure::recycle4(any)
    }

    #[inline(always)]
    fn listener(place: u32, key: &ServiceKey<u32>) -> u32 {
        let word = |key: &ServiceKey<u32>| {
            u64::from(key.vip) | u64::from(key.port) << 32 | u64::from(key.protocol) << 48
        };
        let Some(bucket) = maps::SERVICES4.get(place) else {
            return 0;
        };
        for listener in &bucket.listeners {
            if word(&listener.key) == word(key) {
                return listener.service;
            }
        }
        0
    }

    #[inline(always)]
    fn vips() -> &'static Vips<u32> {
        &maps::VIPS4
    }

    #[inline(always)]
    fn affinity() -> &'static Affinities<u32> {
        &maps::AFFINITY4
    }

    #[inline(always)]
    fn sources() -> &'static Sources<u32> {
        &maps::SOURCES4
    }

    #[inline(always)]
    fn access() -> &'static Access<u32> {
        &maps::ACCESS4
    }

    #[inline(always)]
    fn admit(service: u32) -> u64 {
        admit::may_begin4(service)
    }

    #[inline(always)]
    fn work() -> Option<&'static mut Work<u32>> {
        let work = maps::WORK4.get_ptr_mut(0)?;
        // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
        Some(unsafe { &mut *work })
    }

    #[inline(always)]
    fn choose() -> u64 {
        flow::choose4()
    }

    #[inline(always)]
    fn record_reply() -> u64 {
        flow::record_reply4()
    }

    #[inline(always)]
    fn record_client() -> u64 {
        flow::record_client4()
    }

    #[inline(always)]
    fn revise() -> u64 {
        flow::revise4()
    }

    #[inline(always)]
    fn note_reply() -> u64 {
        flow::note_reply4()
    }

    #[inline(always)]
    fn answer() -> u64 {
        flow::answer4()
    }

    #[inline(always)]
    fn describe() -> u64 {
        flow::describe4()
    }

    #[inline(always)]
    fn returns() -> u64 {
        flow::returns4()
    }

    #[inline(always)]
    fn through_gateway() -> u64 {
        flow::through_gateway4()
    }

    #[inline(always)]
    fn nat_source(settings: &Settings, hash: u32) -> Option<u32> {
        let place = hash::slot_of(hash, u32::from(settings.nat_sources4));
        if settings.nat_sources4 == 0 {
            return None;
        }
        maps::NAT_SOURCES4.get(place).map(lookup::load)
    }

    #[inline(always)]
    fn plain_protocol(header: Cursor) -> Option<u8> {
        let version_ihl: u8 = header.read(offset_of!(Ipv4Hdr, vihl));
        let fragment = header.read::<u16>(offset_of!(Ipv4Hdr, frags)) & parse::ipv4::FRAGMENT_BITS;
        (version_ihl == 0x45 && fragment == 0).then(|| header.read(offset_of!(Ipv4Hdr, proto)))
    }

    #[inline(always)]
    fn network(frame: &Frame, link: &Link) -> Option<Network<Self>> {
        parse::ipv4::network(frame, link)
    }

    #[inline(always)]
    fn locate_first(
        frame: &Frame,
        network: &Network<Self>,
    ) -> Result<parse::Located, parse::Fault> {
        parse::ipv4::locate_first(frame, network)
    }

    #[inline(always)]
    fn identification(_: &Frame, network: &Network<Self>) -> Option<(u32, u32)> {
        let id: u16 = network.header.read(offset_of!(Ipv4Hdr, id));
        let protocol: u8 = network.header.read(offset_of!(Ipv4Hdr, proto));
        Some((u32::from(id), u32::from(protocol)))
    }

    #[inline(always)]
    fn fragments() -> &'static Fragments<Self::Addr> {
        &maps::FRAGMENTS4
    }

    #[inline(always)]
    fn open_fragment(ctx: *mut xdp_md) -> u64 {
        fragment::open_fragment4(ctx)
    }

    #[inline(always)]
    fn follow_fragment(ctx: *mut xdp_md) -> u64 {
        fragment::follow_fragment4(ctx)
    }

    #[inline(always)]
    fn hops(header: Cursor) -> u8 {
        header.read(offset_of!(Ipv4Hdr, ttl))
    }

    #[inline(always)]
    fn readdress(header: Cursor, src: u32, dst: u32, l3_delta: u16, hops: u8) {
        // TTL, protocol and checksum, read and written as one word: a read of two bytes one of which has just been written
        // waits until memory has that byte, and with it all that was written before, such as a new flow.
        let [ttl, protocol, sum @ ..] = header.read::<u32>(offset_of!(Ipv4Hdr, ttl)).to_ne_bytes();
        let before = u16::from_ne_bytes([ttl, protocol]);
        let after = u16::from_ne_bytes([hops, protocol]);
        let delta = csum::fold(u64::from(l3_delta) + u64::from(!before) + u64::from(after));
        let [c0, c1] = csum::update(u16::from_ne_bytes(sum), delta).to_ne_bytes();
        header.write(
            offset_of!(Ipv4Hdr, ttl),
            u32::from_ne_bytes([hops, protocol, c0, c1]),
        );
        header.write_address(offset_of!(Ipv4Hdr, src_addr), src);
        header.write_address(offset_of!(Ipv4Hdr, dst_addr), dst);
    }

    #[inline(always)]
    fn class(header: Cursor) -> u8 {
        header.read(offset_of!(Ipv4Hdr, tos))
    }

    #[inline(always)]
    fn packet_len(header: Cursor) -> u32 {
        u32::from(u16::from_be(header.read(offset_of!(Ipv4Hdr, tot_len))))
    }

    #[inline(always)]
    fn age(header: Cursor) {
        // TTL, protocol and checksum as one word, lowest byte first. TTL is the first byte of its
        // 16-bit word, so the checksum is raised by one, and by another if that carries or makes it
        // negative zero: RFC 1141's case, with what RFC 1624's equation gives.
        let word: u32 = header.read(offset_of!(Ipv4Hdr, ttl));
        let carry = if word >= 0xfffe_0000 { 0x1_0000 } else { 0 };
        let word = word.wrapping_add(0x1_0000 - 1).wrapping_add(carry);
        header.write(offset_of!(Ipv4Hdr, ttl), word);
    }

    /// The header's checksum makes its sum a known one.
    #[inline(always)]
    fn header_sum(_: Cursor) -> u64 {
        0xffff
    }

    #[inline(always)]
    fn encapsulate(ctx: *mut xdp_md, backend: u32, hash: u32, gue: u32) -> u32 {
        encap::encapsulate4(ctx, backend, hash, gue)
    }

    #[inline(always)]
    fn encap_source(settings: &Settings, backend: &Backend, hash: u32) -> u32 {
        encap::source4(settings, backend, hash)
    }

    #[inline(always)]
    fn write_header(header: Cursor, src: u32, dst: u32, protocol: u8, class: u8, payload_len: u16) {
        // Version 4, five words.
        let first = u16::from_ne_bytes([0x45, class]);
        let len = (payload_len + Ipv4Hdr::LEN as u16).to_be();
        // Identification 0 with DF set: RFC 6864 section 4.1.
        let fragment = 0x4000_u16.to_be();
        let ttl_protocol = u16::from_ne_bytes([HOPS, protocol]);
        let sum = u64::from(first)
            + u64::from(len)
            + u64::from(fragment)
            + u64::from(ttl_protocol)
            + csum::word(src)
            + csum::word(dst);
        let check = !csum::fold(sum);
        // Whole words, lowest half first.
        header.write(0, u32::from(first) | u32::from(len) << 16);
        header.write(offset_of!(Ipv4Hdr, id), u32::from(fragment) << 16);
        header.write(
            offset_of!(Ipv4Hdr, ttl),
            u32::from(ttl_protocol) | u32::from(check) << 16,
        );
        header.write_address(offset_of!(Ipv4Hdr, src_addr), src);
        header.write_address(offset_of!(Ipv4Hdr, dst_addr), dst);
    }

    #[inline(always)]
    fn not_for_us(frame: &Frame, link: &Link, network: &Network<Self>) -> Result<Verdict, Verdict> {
        if network.header.read::<u8>(offset_of!(Ipv4Hdr, proto)) == protocol::ICMP {
            // In `dnat`, routers tell the client of packets that went to the backend.
            return Ok(icmp::error::carry_on::<Self>(frame, link));
        }
        Ok(Verdict::PASS)
    }

    #[inline(always)]
    fn is_loopback(address: u32) -> bool {
        address.to_ne_bytes()[0] == 127
    }

    /// RFC 1122 section 3.2.2.
    #[inline(always)]
    fn is_host(address: u32) -> bool {
        let [first, ..] = address.to_ne_bytes();
        first != 0 && first != 127 && first < 224
    }

    /// RFC 1191 section 4.
    #[inline(always)]
    fn mtu_word(mtu: u32) -> u32 {
        (mtu & 0xffff).to_be()
    }

    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        // Destination unreachable, time exceeded, parameter problem.
        kind == 3 || kind == 11 || kind == 12
    }

    #[inline(always)]
    fn read_quote(ctx: *mut xdp_md) -> u64 {
        icmp::error::read_quote4(ctx)
    }

    #[inline(always)]
    fn carry_error(ctx: *mut xdp_md) -> u64 {
        icmp::error::carry_error4(ctx)
    }

    #[inline(always)]
    fn quoted(frame: &Frame, quote: Cursor) -> Option<Quoted<u32>> {
        let header = frame.check(quote, Ipv4Hdr::LEN)?;
        let version_ihl: u8 = header.read(offset_of!(Ipv4Hdr, vihl));
        let header_len = u32::from(version_ihl & 0xf) * 4;
        let offset = header.read::<u16>(offset_of!(Ipv4Hdr, frags)) & parse::ipv4::OFFSET;
        if version_ihl >> 4 != 4 || header_len < Ipv4Hdr::LEN as u32 || offset != 0 {
            return None;
        }
        Some(Quoted {
            src: header.read_address(offset_of!(Ipv4Hdr, src_addr)),
            dst: header.read_address(offset_of!(Ipv4Hdr, dst_addr)),
            protocol: header.read(offset_of!(Ipv4Hdr, proto)),
            header_len,
        })
    }

    #[inline(always)]
    fn readdress_quoted(quote: Cursor, src: u32, dst: u32, l3_delta: u16) -> u16 {
        let check: u16 = quote.read(offset_of!(Ipv4Hdr, check));
        let mended = csum::update(check, l3_delta);
        quote.write(offset_of!(Ipv4Hdr, check), mended);
        quote.write_address(offset_of!(Ipv4Hdr, src_addr), src);
        quote.write_address(offset_of!(Ipv4Hdr, dst_addr), dst);
        csum::fold(u64::from(!check) + u64::from(mended))
    }

    #[inline(always)]
    fn answer_icmp(_: &Frame, _: &Link, _: &Network<Self>) -> Verdict {
        Verdict::PASS
    }
}

impl Family for V6 {
    type Addr = [u32; 4];
    const HEADER_LEN: usize = Ipv6Hdr::LEN;
    const SRC: usize = offset_of!(Ipv6Hdr, src_addr);
    const DST: usize = offset_of!(Ipv6Hdr, dst_addr);
    const ICMP: u8 = protocol::ICMPV6;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const ETHERTYPE: u16 = parse::ethernet::IPV6;
    const INSIDE: u8 = 41;
    const UDP_NEEDS_CHECKSUM: bool = true;
    const TOO_BIG: u16 = u16::from_ne_bytes([2, 0]);
    const TIME_EXCEEDED: u16 = u16::from_ne_bytes([3, 0]);
    // No more than the minimum MTU in all: RFC 4443 section 2.4 (c).
    const QUOTE: u32 = 1280 - (Ipv6Hdr::LEN + Icmpv4Hdr::LEN) as u32;

    /// The kernel refuses them itself, whatever it has been told.
    #[inline(always)]
    fn is_loopback(_: [u32; 4]) -> bool {
        false
    }

    #[inline(always)]
    fn flows() -> &'static Flows<[u32; 4]> {
        &maps::FLOWS6
    }

    #[inline(always)]
    fn flow_sets() -> &'static FlowSets {
        &maps::FLOW_SETS6
    }

    #[inline(always)]
    fn opening() -> &'static Opening<[u32; 4]> {
        &maps::OPENING6
    }

    #[inline(always)]
    fn find(which: u32) -> Number {
        flow::find6(which)
    }

    #[inline(always)]
    fn port_beside() -> u32 {
        flow::port_beside6()
    }

    #[inline(always)]
    fn reserve(which: u32) -> u64 {
        flow::reserve6(which)
    }

    #[inline(always)]
    fn publish() -> u64 {
        flow::publish6()
    }

    #[inline(always)]
    fn bury() -> u64 {
        flow::bury6()
    }

    #[inline(always)]
    fn remove(which: u32) -> u64 {
        flow::remove6(which)
    }

    #[inline(always)]
    fn resume() -> u64 {
        pressure::resume6()
    }

    #[inline(always)]
    fn settle() -> u64 {
        pressure::settle6()
    }

    #[inline(always)]
    fn recycle(any: u32) -> u64 {
        pressure::recycle6(any)
    }

    #[inline(always)]
    fn listener(place: u32, key: &ServiceKey<[u32; 4]>) -> u32 {
        // One comparison rather than six, of two words at a time.
        let differs = |a: &ServiceKey<[u32; 4]>, b: &ServiceKey<[u32; 4]>| {
            let port = |key: &ServiceKey<_>| u32::from(key.port) | u32::from(key.protocol) << 16;
            (hash::pair(a.vip[0], a.vip[1]) ^ hash::pair(b.vip[0], b.vip[1]))
                | (hash::pair(a.vip[2], a.vip[3]) ^ hash::pair(b.vip[2], b.vip[3]))
                | u64::from(port(a) ^ port(b))
        };
        let Some(bucket) = maps::SERVICES6.get(place) else {
            return 0;
        };
        for listener in &bucket.listeners {
            if differs(&listener.key, key) == 0 {
                return listener.service;
            }
        }
        0
    }

    #[inline(always)]
    fn vips() -> &'static Vips<[u32; 4]> {
        &maps::VIPS6
    }

    #[inline(always)]
    fn affinity() -> &'static Affinities<[u32; 4]> {
        &maps::AFFINITY6
    }

    #[inline(always)]
    fn sources() -> &'static Sources<[u32; 4]> {
        &maps::SOURCES6
    }

    #[inline(always)]
    fn access() -> &'static Access<[u32; 4]> {
        &maps::ACCESS6
    }

    #[inline(always)]
    fn admit(service: u32) -> u64 {
        admit::may_begin6(service)
    }

    #[inline(always)]
    fn work() -> Option<&'static mut Work<[u32; 4]>> {
        let work = maps::WORK6.get_ptr_mut(0)?;
        // SAFETY: per-CPU memory, and XDP is not re-entered on a CPU.
        Some(unsafe { &mut *work })
    }

    #[inline(always)]
    fn choose() -> u64 {
        flow::choose6()
    }

    #[inline(always)]
    fn record_reply() -> u64 {
        flow::record_reply6()
    }

    #[inline(always)]
    fn record_client() -> u64 {
        flow::record_client6()
    }

    #[inline(always)]
    fn revise() -> u64 {
        flow::revise6()
    }

    #[inline(always)]
    fn note_reply() -> u64 {
        flow::note_reply6()
    }

    #[inline(always)]
    fn answer() -> u64 {
        flow::answer6()
    }

    #[inline(always)]
    fn describe() -> u64 {
        flow::describe6()
    }

    #[inline(always)]
    fn returns() -> u64 {
        flow::returns6()
    }

    #[inline(always)]
    fn through_gateway() -> u64 {
        flow::through_gateway6()
    }

    #[inline(always)]
    fn nat_source(settings: &Settings, hash: u32) -> Option<[u32; 4]> {
        let place = hash::slot_of(hash, u32::from(settings.nat_sources6));
        if settings.nat_sources6 == 0 {
            return None;
        }
        maps::NAT_SOURCES6.get(place).map(lookup::load)
    }

    #[inline(always)]
    fn plain_protocol(header: Cursor) -> Option<u8> {
        let version: u8 = header.read(0);
        (version >> 4 == 6).then(|| header.read(offset_of!(Ipv6Hdr, next_hdr)))
    }

    #[inline(always)]
    fn network(frame: &Frame, link: &Link) -> Option<Network<Self>> {
        parse::ipv6::network(frame, link)
    }

    #[inline(always)]
    fn locate_first(
        frame: &Frame,
        network: &Network<Self>,
    ) -> Result<parse::Located, parse::Fault> {
        parse::ipv6::locate_first(frame, network)
    }

    #[inline(always)]
    fn identification(frame: &Frame, network: &Network<Self>) -> Option<(u32, u32)> {
        Some((parse::ipv6::identification(frame, network)?, 0))
    }

    #[inline(always)]
    fn fragments() -> &'static Fragments<Self::Addr> {
        &maps::FRAGMENTS6
    }

    #[inline(always)]
    fn open_fragment(ctx: *mut xdp_md) -> u64 {
        fragment::open_fragment6(ctx)
    }

    #[inline(always)]
    fn follow_fragment(ctx: *mut xdp_md) -> u64 {
        fragment::follow_fragment6(ctx)
    }

    #[inline(always)]
    fn hops(header: Cursor) -> u8 {
        header.read(offset_of!(Ipv6Hdr, hop_limit))
    }

    #[inline(always)]
    fn readdress(header: Cursor, src: [u32; 4], dst: [u32; 4], _l3_delta: u16, hops: u8) {
        header.write(offset_of!(Ipv6Hdr, hop_limit), hops);
        header.write_address(offset_of!(Ipv6Hdr, src_addr), src);
        header.write_address(offset_of!(Ipv6Hdr, dst_addr), dst);
    }

    #[inline(always)]
    fn class(header: Cursor) -> u8 {
        (u16::from_be(header.read(0)) >> 4) as u8
    }

    #[inline(always)]
    fn packet_len(header: Cursor) -> u32 {
        let payload: u16 = header.read(offset_of!(Ipv6Hdr, payload_len));
        u32::from(u16::from_be(payload)) + Ipv6Hdr::LEN as u32
    }

    #[inline(always)]
    fn age(header: Cursor) {
        let hops = Self::hops(header) - 1;
        header.write(offset_of!(Ipv6Hdr, hop_limit), hops);
    }

    #[inline(always)]
    fn header_sum(header: Cursor) -> u64 {
        let mut sum = 0;
        for word in 0..Ipv6Hdr::LEN / 4 {
            sum += csum::word(header.read(4 * word));
        }
        sum
    }

    #[inline(always)]
    fn encapsulate(ctx: *mut xdp_md, backend: u32, hash: u32, gue: u32) -> u32 {
        encap::encapsulate6(ctx, backend, hash, gue)
    }

    #[inline(always)]
    fn encap_source(settings: &Settings, backend: &Backend, hash: u32) -> [u32; 4] {
        encap::source6(settings, backend, hash)
    }

    #[inline(always)]
    fn write_header(
        header: Cursor,
        src: [u32; 4],
        dst: [u32; 4],
        protocol: u8,
        class: u8,
        payload_len: u16,
    ) {
        // Version 6; no flow label.
        let first = 0x6000_0000_u32 | u32::from(class) << 20;
        header.write(0, first.to_be());
        let next_hops = u16::from_ne_bytes([protocol, HOPS]);
        header.write(
            offset_of!(Ipv6Hdr, payload_len),
            u32::from(payload_len.to_be()) | u32::from(next_hops) << 16,
        );
        header.write_address(offset_of!(Ipv6Hdr, src_addr), src);
        header.write_address(offset_of!(Ipv6Hdr, dst_addr), dst);
    }

    /// Solicitations go to a multicast address, which no filter lane stands for.
    #[inline(always)]
    fn not_for_us(frame: &Frame, link: &Link, network: &Network<Self>) -> Result<Verdict, Verdict> {
        const MULTICAST: u32 = 0xff00_0000_u32.to_be();
        if network.dst[0] & MULTICAST == MULTICAST {
            return Ok(neighbour::answer_solicitation(frame, link, network));
        }
        if network.header.read::<u8>(offset_of!(Ipv6Hdr, next_hdr)) == protocol::ICMPV6 {
            // As in IPv4.
            return Ok(icmp::error::carry_on::<Self>(frame, link));
        }
        Ok(Verdict::PASS)
    }

    /// RFC 4443 section 2.4 (e).
    #[inline(always)]
    fn is_host(address: [u32; 4]) -> bool {
        let [first, ..] = address[0].to_ne_bytes();
        let low = address[0] | address[1] | address[2];
        first != 0xff && !(low == 0 && u32::from_be(address[3]) <= 1)
    }

    /// RFC 4443 section 3.2.
    #[inline(always)]
    fn mtu_word(mtu: u32) -> u32 {
        mtu.to_be()
    }

    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        (1..=4).contains(&kind)
    }

    #[inline(always)]
    fn read_quote(ctx: *mut xdp_md) -> u64 {
        icmp::error::read_quote6(ctx)
    }

    #[inline(always)]
    fn carry_error(ctx: *mut xdp_md) -> u64 {
        icmp::error::carry_error6(ctx)
    }

    #[inline(always)]
    fn quoted(frame: &Frame, quote: Cursor) -> Option<Quoted<[u32; 4]>> {
        let header = frame.check(quote, Ipv6Hdr::LEN)?;
        if header.read::<u8>(0) >> 4 != 6 {
            return None;
        }
        let mut quoted = Quoted {
            src: header.read_address(offset_of!(Ipv6Hdr, src_addr)),
            dst: header.read_address(offset_of!(Ipv6Hdr, dst_addr)),
            protocol: header.read(offset_of!(Ipv6Hdr, next_hdr)),
            header_len: Ipv6Hdr::LEN as u32,
        };
        if quoted.protocol == parse::ipv6::FRAGMENT {
            let fragment = frame.check(quote.skip(Ipv6Hdr::LEN), parse::ipv6::FRAGMENT_LEN)?;
            if fragment.read::<u16>(2) & parse::ipv6::OFFSET != 0 {
                return None;
            }
            quoted.protocol = fragment.read(0);
            quoted.header_len += parse::ipv6::FRAGMENT_LEN as u32;
        }
        Some(quoted)
    }

    #[inline(always)]
    fn readdress_quoted(quote: Cursor, src: [u32; 4], dst: [u32; 4], _l3_delta: u16) -> u16 {
        quote.write_address(offset_of!(Ipv6Hdr, src_addr), src);
        quote.write_address(offset_of!(Ipv6Hdr, dst_addr), dst);
        0
    }

    /// A known neighbour is confirmed with a solicitation to the address itself (RFC 4861
    /// section 7.3.3).
    #[inline(always)]
    fn answer_icmp(frame: &Frame, link: &Link, network: &Network<Self>) -> Verdict {
        neighbour::answer_solicitation(frame, link, network)
    }
}
