//! What must become of a frame, whatever its bytes: the parser written a second time, from the
//! documents, for one balancer: IPv4 and IPv6, TCP and UDP at port 80 of the VIP, no backend.
//!
//! Without a backend nothing is remembered, so a frame is judged by its bytes alone.

use sluice_tests::packet::{Family, Packet, VIP, reset_for, tcp};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Port of the services.
pub const PORT: u16 = 80;

/// What must become of a frame.
#[derive(Clone, Debug)]
pub enum Sentence {
    /// The kernel gets it as it is.
    Pass,
    /// Dropped for the reason of this name.
    Drop(&'static str),
    /// Answered with this RST, and counted as `no_flow`.
    Reset(Box<Packet>),
    /// ARP, ICMP and neighbour discovery, which others judge; it may be answered.
    Open,
}

/// A sentence, and the way to it: what was asked of the frame and found.
pub struct Judged {
    /// The sentence.
    pub sentence: Sentence,
    /// A word for each question.
    pub way: Vec<u32>,
}

/// Ethernet and VLAN tags (IEEE 802.1Q, 802.1ad).
struct Link<'a> {
    frame: &'a [u8],
    tags: Vec<(u16, u16)>,
}

struct Judge<'a> {
    link: Link<'a>,
    way: Vec<u32>,
}

const MALFORMED: Sentence = Sentence::Drop("malformed");
const FRAGMENT: Sentence = Sentence::Drop("fragment");

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Less, equal or more: answers are told apart no finer, or every frame would be a new way.
fn against(value: usize, other: usize) -> usize {
    value.cmp(&other) as usize & 3
}

/// Judges a frame.
pub fn judge(frame: &[u8]) -> Judged {
    let mut judge = Judge {
        link: Link {
            frame,
            tags: Vec::new(),
        },
        way: Vec::new(),
    };
    let sentence = judge.ethernet();
    Judged {
        sentence,
        way: judge.way,
    }
}

impl Judge<'_> {
    fn note(&mut self, question: u32, found: usize) {
        self.way.push(question << 16 | found.min(0xffff) as u32);
    }

    fn ethernet(&mut self) -> Sentence {
        let frame = self.link.frame;
        let (mut ethertype, mut at) = (be16(frame, 12), 14);
        for _ in 0..2 {
            if !matches!(ethertype, 0x8100 | 0x88a8) {
                break;
            }
            if frame.len() < at + 4 {
                self.note(1, 0);
                return Sentence::Pass;
            }
            self.link.tags.push((ethertype, be16(frame, at)));
            ethertype = be16(frame, at + 2);
            at += 4;
        }
        self.note(2, self.link.tags.len());
        match ethertype {
            0x0800 => self.ipv4(&frame[at..]),
            0x86dd => self.ipv6(&frame[at..]),
            0x0806 => Sentence::Open,
            _ => Sentence::Pass,
        }
    }

    /// RFC 791.
    fn ipv4(&mut self, bytes: &[u8]) -> Sentence {
        let Some(header) = bytes.first_chunk::<20>() else {
            self.note(3, 0);
            return Sentence::Pass;
        };
        let address = |at: usize| {
            let octets: [u8; 4] = header[at..at + 4].try_into().expect("four bytes");
            Ipv4Addr::from(octets)
        };
        let (src, dst) = (address(12), address(16));
        if dst.is_loopback() {
            return Sentence::Drop("martian");
        }
        if dst != VIP.v4 {
            self.note(3, 1);
            return Sentence::Pass;
        }
        let header_len = usize::from(header[0] & 15) * 4;
        let len = usize::from(be16(header, 2));
        let sound =
            header[0] >> 4 == 4 && header_len >= 20 && len >= header_len && len <= bytes.len();
        self.note(4, usize::from(sound) << 2 | against(header_len, 20));
        self.note(5, against(len, bytes.len()));
        if !sound {
            return MALFORMED;
        }
        let fragment = be16(header, 6) & 0x3fff;
        self.note(
            6,
            usize::from(fragment & 0x1fff != 0) << 1 | usize::from(fragment != 0),
        );
        if fragment & 0x1fff != 0 {
            return FRAGMENT;
        }
        self.transport(
            (src.into(), dst.into()),
            header[9],
            &bytes[header_len..len],
            fragment != 0,
        )
    }

    /// RFC 8200; at most four extension headers before the transport header or a fragment header.
    fn ipv6(&mut self, bytes: &[u8]) -> Sentence {
        const EXTENSIONS: [u8; 4] = [0, 43, 44, 60];
        let Some(header) = bytes.first_chunk::<40>() else {
            self.note(7, 0);
            return Sentence::Pass;
        };
        let address = |at: usize| {
            let octets: [u8; 16] = header[at..at + 16].try_into().expect("sixteen bytes");
            Ipv6Addr::from(octets)
        };
        let (src, dst) = (address(8), address(24));
        if dst.is_multicast() {
            return Sentence::Open;
        }
        if dst != VIP.v6 {
            self.note(7, 1);
            return Sentence::Pass;
        }
        let len = 40 + usize::from(be16(header, 4));
        let sound = header[0] >> 4 == 6 && len <= bytes.len();
        self.note(8, usize::from(sound) << 2 | against(len, bytes.len()));
        if !sound {
            return MALFORMED;
        }
        let (mut next, mut rest) = (header[6], &bytes[40..len]);
        for _ in 0..4 {
            let known = EXTENSIONS.iter().position(|known| *known == next);
            self.note(9, known.unwrap_or(EXTENSIONS.len()));
            if next == 44 || !EXTENSIONS.contains(&next) {
                break;
            }
            let length = rest.get(1).map(|n| (usize::from(*n) + 1) * 8);
            let Some(length) = length.filter(|length| *length <= rest.len()) else {
                return MALFORMED;
            };
            next = rest[0];
            rest = &rest[length..];
        }
        let mut first = false;
        if next == 44 {
            let Some(fragment) = rest.first_chunk::<8>() else {
                return MALFORMED;
            };
            let place = be16(fragment, 2);
            self.note(
                10,
                usize::from(place & 0xfff8 != 0) << 1 | usize::from(place & 1),
            );
            if place & 0xfff8 != 0 {
                return FRAGMENT;
            }
            first = place & 1 != 0;
            (next, rest) = (fragment[0], &rest[8..]);
            // Nobody sends options there.
            if EXTENSIONS.contains(&next) {
                return FRAGMENT;
            }
        } else if EXTENSIONS.contains(&next) {
            return MALFORMED;
        }
        self.transport((src.into(), dst.into()), next, rest, first)
    }

    /// RFC 9293 and RFC 768.
    fn transport(
        &mut self,
        (src, dst): (IpAddr, IpAddr),
        protocol: u8,
        bytes: &[u8],
        first_fragment: bool,
    ) -> Sentence {
        let icmp = if src.is_ipv4() { 1 } else { 58 };
        let known = [6, 17, icmp].iter().position(|known| *known == protocol);
        self.note(11, known.unwrap_or(3) << 1 | usize::from(first_fragment));
        match protocol {
            6 => {
                let Some(header) = bytes.first_chunk::<20>() else {
                    return MALFORMED;
                };
                let header_len = usize::from(header[12] >> 4) * 4;
                self.note(
                    12,
                    against(header_len, 20) << 2 | against(header_len, bytes.len()),
                );
                if header_len < 20 || header_len > bytes.len() {
                    return MALFORMED;
                }
                let flags = header[13];
                self.note(13, usize::from(flags & 0x17));
                let (syn, rst) = (flags & 2 != 0, flags & 4 != 0);
                let opens = syn && flags & 0b1_0101 == 0;
                match (be16(header, 2), opens) {
                    (PORT, true) => Sentence::Drop("no_backend"),
                    (PORT, false) if rst || first_fragment => Sentence::Drop("no_flow"),
                    (PORT, false) => self.reset((src, dst), header, bytes.len() - header_len),
                    _ => Sentence::Pass,
                }
            }
            17 => {
                let Some(header) = bytes.first_chunk::<8>() else {
                    return MALFORMED;
                };
                let len = usize::from(be16(header, 4));
                self.note(14, against(len, 8) << 2 | against(len, bytes.len()));
                if len < 8 || (len > bytes.len() && !first_fragment) {
                    return MALFORMED;
                }
                match be16(header, 2) {
                    PORT => Sentence::Drop("no_backend"),
                    _ => Sentence::Pass,
                }
            }
            _ if protocol == icmp => Sentence::Open,
            _ => Sentence::Pass,
        }
    }

    fn reset(
        &self,
        (src, dst): (IpAddr, IpAddr),
        header: &[u8; 20],
        payload_len: usize,
    ) -> Sentence {
        let frame = self.link.frame;
        let mac = |at: usize| frame[at..at + 6].try_into().expect("six bytes");
        let number =
            |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let mut segment = tcp(if src.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        })
        .macs(mac(6), mac(0))
        .payload(vec![0; payload_len]);
        (segment.src, segment.sport) = (src, be16(header, 0));
        (segment.dst, segment.dport) = (dst, be16(header, 2));
        segment.vlans.clone_from(&self.link.tags);
        let received = segment.tcp_mut();
        received.sequence_number = number(4);
        received.acknowledgment_number = number(8);
        received.fin = header[13] & 1 != 0;
        received.syn = header[13] & 2 != 0;
        received.ack = header[13] & 16 != 0;
        Sentence::Reset(Box::new(reset_for(&segment)))
    }
}
