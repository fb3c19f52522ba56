//! The usual packet: TCP or UDP without VLAN tags, IP options or extension headers, not in
//! fragments, of a flow in which nothing changes.
//!
//! It takes the same steps as any other, with all that is unusual left out: what it meets on its
//! way fits in a few cache lines of code. `None` means that something is unusual; then nothing has
//! been changed, and the packet goes the long way from its first byte.

use crate::{
    family::{Family, V4, V6},
    flow::{
        self, FOLLOW, Outgoing,
        table::{self, Look},
    },
    forward,
    frame::{Cursor, Frame},
    lookup, maps,
    parse::{Link, Network, Packet, TcpFlags, ethernet, protocol},
    rewrite, stateless,
    verdict::Verdict,
};
use core::mem::offset_of;
use lb_common::{
    filter::{LANE_NAT_SOURCE, LANE_ORIGIN, LANE_STATELESS},
    flow::{DIRECTION_BACKEND, Flow, THROUGH_GATEWAY},
    flow_table::KeyWords,
};
use network_types::{eth::EthHdr, tcp::TcpHdr, udp::UdpHdr};

/// What becomes of a usual packet.
#[inline(always)]
pub fn balance(frame: &Frame) -> Option<Verdict> {
    let header = frame.start(EthHdr::LEN)?;
    let link = Link {
        header,
        ethertype: header.read(offset_of!(EthHdr, ether_type)),
        payload: header.skip(EthHdr::LEN),
        tags: 0,
    };
    match link.ethertype {
        ethernet::IPV4 => balance_ip::<V4>(frame, link),
        ethernet::IPV6 => balance_ip::<V6>(frame, link),
        _ => None,
    }
}

#[inline(always)]
fn balance_ip<F: Family>(frame: &Frame, link: Link) -> Option<Verdict> {
    let header = frame.check(link.payload, F::HEADER_LEN)?;
    let protocol = F::plain_protocol(header)?;
    let lane = lookup::lane::<F>(F::dst(header), || F::src(header));
    if lane == 0 {
        let may_be_ours = protocol != protocol::TCP && protocol != protocol::UDP
            || F::is_loopback(F::dst(header));
        return (!may_be_ours).then_some(Verdict::PASS);
    }
    let packet = parse::<F>(frame, header, protocol)?;
    if lane == LANE_NAT_SOURCE && !flow::is_nat_port(packet.dport) {
        return Some(Verdict::PASS);
    }
    if lane & LANE_STATELESS != 0
        && let Some(verdict) = stateless::forward(frame, &link, &packet, lane)
    {
        return Some(verdict);
    }
    let packet = packet.afresh();
    let outgoing = follow(frame, &packet, lane)?;
    let sent = rewrite::rewrite(frame, &link, &packet, &outgoing)
        .and_then(|()| forward::send(frame, &packet, &outgoing));
    Some(Verdict::of(sent))
}

/// Offset of data offset and flags in the TCP header.
const TCP_OFFSET_FLAGS: usize = 12;

/// Reads the transport header.
#[inline(always)]
fn parse<F: Family>(frame: &Frame, header: Cursor, protocol: u8) -> Option<Packet<F>> {
    let packet_len = F::packet_len(header);
    let transport = header.skip(F::HEADER_LEN);
    if packet_len as usize > frame.reach(header) {
        return None;
    }
    let mut flags = 0;
    let (min, len) = if protocol == protocol::TCP {
        frame.check(transport, TcpHdr::LEN)?;
        let offset_flags: u16 = transport.read(TCP_OFFSET_FLAGS);
        flags = (offset_flags >> 8) as u8;
        (TcpHdr::LEN as u32, u32::from(offset_flags as u8 >> 4) * 4)
    } else if protocol == protocol::UDP {
        frame.check(transport, UdpHdr::LEN)?;
        let len = u32::from(u16::from_be(transport.read(offset_of!(UdpHdr, len))));
        // Bytes behind the datagram (RFC 9868) are not in its checksum.
        if F::HEADER_LEN as u32 + len != packet_len {
            return None;
        }
        (UdpHdr::LEN as u32, len)
    } else {
        return None;
    };
    if len < min || F::HEADER_LEN as u32 + len > packet_len {
        return None;
    }
    Some(Packet {
        sport: transport.read(0),
        dport: transport.read(2),
        network: Network {
            header,
            src: F::src(header),
            dst: F::dst(header),
        },
        transport,
        protocol,
        flags: TcpFlags(flags),
        packet_len,
        transport_len: packet_len - F::HEADER_LEN as u32,
        first_fragment: false,
    })
}

/// The packet's flow, if it is recorded.
#[inline(always)]
fn find<F: Family>(packet: &Packet<F>) -> Option<&'static mut Flow<F::Addr>> {
    let key = packet.key();
    match table::look::<F>(KeyWords::of(&key)) {
        Look::Found(flow) => Some(flow),
        Look::Missing => None,
        Look::Unknown => {
            let work = F::work()?;
            work.arrival.key = key;
            table::flow::<F>(F::find(table::ARRIVAL))
        }
    }
}

/// The packet's flow, if it is recorded and this packet leaves it as it is.
#[inline(always)]
fn follow<F: Family>(frame: &Frame, packet: &Packet<F>, lane: u8) -> Option<Outgoing<F::Addr>> {
    if packet.flags.any(TcpFlags::CHANGES) || F::hops(packet.network.header) <= 1 {
        return None;
    }
    let Some(flow) = find(packet) else {
        return answer(frame, packet, lane);
    };
    let (mtu, tags) = if flow.direction == DIRECTION_BACKEND {
        if flow.link == THROUGH_GATEWAY {
            return None;
        }
        (flow.mtu, flow.tags())
    } else {
        let backend = maps::BACKENDS.get(flow.backend)?;
        if !flow::is_steady(flow, backend) {
            return None;
        }
        (backend.mtu, backend.tags)
    };
    if tags != 0 || flow::exceeds(packet.packet_len, mtu.into(), frame.ingress()) {
        return None;
    }
    flow::touch(flow, flow::now());
    let (l2, ifindex) = if flow.direction == DIRECTION_BACKEND {
        let way = &mut F::work()?.way;
        way.set_back(flow)?;
        (&way.l2, way.ifindex)
    } else {
        let backend = maps::BACKENDS.get(flow.backend)?;
        (&backend.l2, backend.ifindex)
    };
    Some(Outgoing {
        flow,
        l2,
        ifindex,
        tags,
    })
}

/// What becomes of a backend's answer of a flow that is not recorded.
#[inline(always)]
fn answer<F: Family>(frame: &Frame, packet: &Packet<F>, lane: u8) -> Option<Outgoing<F::Addr>> {
    if lane & LANE_ORIGIN == 0 {
        return None;
    }
    let work = F::work()?;
    work.arrival.key = packet.key();
    work.arrival.packet_len = packet.packet_len;
    work.arrival.ifindex = frame.ingress();
    work.arrival.can_travel = 1;
    let found = F::answer() == FOLLOW && work.unsure == 0 && work.way.tags == 0;
    found.then_some(Outgoing {
        flow: &work.client,
        l2: &work.way.l2,
        ifindex: work.way.ifindex,
        tags: 0,
    })
}
