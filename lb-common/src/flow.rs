//! Flows: what the data plane remembers of a connection.

use crate::addr::Address;
use bytemuck::{Pod, Zeroable};

/// What a flow is found by: the 5-tuple of a packet as it arrives.
///
/// A connection in `nat` or `dnat` has two entries, one for each direction a packet may arrive
/// from. Each holds the tuple its packets are rewritten to, so either key can be had from the
/// other entry ([`Flow::opposite`]). In the other modes the balancer sees only the client's
/// packets, and there is only the client's entry.
///
/// Aligned to 8 bytes, so that it can be copied in double words on the BPF stack.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Zeroable)]
pub struct FlowKey<A> {
    /// Source address, network order.
    pub src: A,
    /// Destination address, network order.
    pub dst: A,
    /// Source port, network order.
    pub sport: u16,
    /// Destination port, network order.
    pub dport: u16,
    /// IP protocol number (6 TCP, 17 UDP).
    pub protocol: u32,
}

/// Direction: the entry matches packets from the client.
pub const DIRECTION_CLIENT: u8 = 0;
/// Direction: the entry matches packets from the backend.
pub const DIRECTION_BACKEND: u8 = 1;

/// In place of a link: the client came through its service's gateway ([`crate::service::Gateway`]), which
/// tells the way back whichever router that is by then.
pub const THROUGH_GATEWAY: u16 = 0;

/// Ticks after which a SYN that comes again is a repetition by its client, whom the backend has not
/// answered, and no duplicate that the network made: a fifth of a second. Clients wait for a second
/// (RFC 6298 section 2.1).
pub const SYN_REPEATED: u32 = crate::abi::TICKS_PER_SECOND / 5;
/// Ticks within which the next SYN of an unanswered client comes, for a while: 10 seconds.
pub const SYN_FORGOTTEN: u32 = 10 * crate::abi::TICKS_PER_SECOND;

/// Life of a flow; names in [`crate::names::STATE`]. Kept in the client's entry.
pub mod state {
    /// UDP: no states.
    pub const UDP: u8 = 0;
    /// The client's SYN went to the backend.
    pub const SYN_SENT: u8 = 1;
    /// The backend's SYN-ACK went to the client.
    pub const SYN_RECEIVED: u8 = 2;
    /// The client has acknowledged: an active connection.
    pub const ESTABLISHED: u8 = 3;
    /// The client has sent FIN.
    pub const FIN_CLIENT: u8 = 4;
    /// The backend has sent FIN.
    pub const FIN_BACKEND: u8 = 5;
    /// Both have sent FIN.
    pub const TIME_WAIT: u8 = 6;
    /// Ended by RST.
    pub const CLOSED: u8 = 7;

    /// Whether the connection counts as active, as IPVS counts: established TCP and any UDP.
    #[inline(always)]
    #[must_use]
    pub const fn is_active(state: u8) -> bool {
        state == ESTABLISHED || state == UDP
    }

    /// Whether the backend has to carry the connection: it is being opened, or established, and
    /// neither side has begun to close it.
    #[inline(always)]
    #[must_use]
    pub const fn is_held(state: u8) -> bool {
        state <= ESTABLISHED
    }

    /// The state of a TCP flow that is first seen in the middle, by the flags of a client's packet.
    #[inline(always)]
    #[must_use]
    pub const fn of_unknown(flags: u8) -> u8 {
        const FIN: u8 = 1 << 0;
        const RST: u8 = 1 << 2;
        if flags & RST != 0 {
            CLOSED
        } else if flags & FIN != 0 {
            FIN_CLIENT
        } else {
            ESTABLISHED
        }
    }

    /// Whether a new SYN may replace the flow. Where the backend's packets are not seen
    /// (`sees_replies` is false) the client's FIN is all there is to know of the end.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(state: u8, sees_replies: bool) -> bool {
        state >= TIME_WAIT || (state == FIN_CLIENT && !sees_replies)
    }
}

/// What becomes of the packets of a key: in maps `flows4` and `flows6` beside it, in `opening4` and
/// `opening6` the value. What every packet needs comes first.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable)]
pub struct Flow<A> {
    /// Source address the packet leaves with, network order.
    pub src: A,
    /// Destination address the packet leaves with, network order.
    pub dst: A,
    /// Source port the packet leaves with, network order.
    pub sport: u16,
    /// Destination port the packet leaves with, network order.
    pub dport: u16,
    /// The backend's number in map `backends`.
    pub backend: u32,
    /// The service's number in map `services`.
    pub service: u32,
    /// What to add (ones' complement) to the sum of the IPv4 header when the addresses change.
    pub l3_delta: u16,
    /// What to add (ones' complement) to the transport sum when addresses and ports change.
    pub l4_delta: u16,
    /// One of [`state`].
    pub state: u8,
    /// `DIRECTION_*`.
    pub direction: u8,
    /// One of [`crate::service::forward`].
    pub forward: u8,
    /// 1 in the backend's entry once the client has shown that it is there: a flow that others make
    /// room for. Zero in the client's, whose state tells.
    pub proven: u8,
    /// Tick of the last packet (coarse: see [`crate::abi::TICKS_PER_SECOND`]).
    pub last_seen: u32,
    /// [`crate::backend::Backend::generation`] at the time the flow was placed.
    pub generation: u16,
    /// By what the client's packets come: a place in map `links`, or [`THROUGH_GATEWAY`]. Used in the backend's entry.
    pub link: u16,
    /// The last two bytes of the Ethernet address that the client's packets come from, as they stand in the frame. Used in the
    /// backend's entry.
    pub hop_tail: u16,
    /// Bytes of the largest IP packet that the interface towards the client can send; 0 if that is
    /// not known. Used in the backend's entry.
    pub mtu: u16,
    /// The first four bytes of that Ethernet address.
    pub hop_head: u32,
    /// In the client's entry [`Flow::created`], in the backend's [`Flow::tags`].
    pub created_or_tags: u32,
}

// SAFETY: repr(C), and the assertions below show that there is no padding.
unsafe impl Pod for FlowKey<u32> {}
// SAFETY: as above.
unsafe impl Pod for FlowKey<[u32; 4]> {}
// SAFETY: as above.
unsafe impl Pod for Flow<u32> {}
// SAFETY: as above.
unsafe impl Pod for Flow<[u32; 4]> {}
const _: () = assert!(size_of::<FlowKey<u32>>() == 16);
const _: () = assert!(size_of::<FlowKey<[u32; 4]>>() == 40);
const _: () = assert!(size_of::<Flow<u32>>() == 48);
const _: () = assert!(size_of::<Flow<[u32; 4]>>() == 72);

impl<A> Flow<A> {
    /// Tick of the first packet; 0 in the backend's entry, which does not have it.
    #[inline(always)]
    #[must_use]
    pub const fn created(&self) -> u32 {
        if self.direction == DIRECTION_BACKEND {
            0
        } else {
            self.created_or_tags
        }
    }

    /// VLAN tags the client's packet came with, packed as in [`crate::vlan`]; the client's entry does not have them.
    #[inline(always)]
    #[must_use]
    pub const fn tags(&self) -> u32 {
        self.created_or_tags
    }
}

impl<A: Address> Flow<A> {
    /// The key of the other direction's entry.
    #[inline(always)]
    #[must_use]
    pub const fn opposite(&self, protocol: u32) -> FlowKey<A> {
        FlowKey {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            protocol,
        }
    }
}

/// The state that follows `state` when a TCP packet with these flags has been forwarded.
///
/// `from_backend` tells the direction. Where the backend answers the client itself
/// (`sees_replies` is false) the client's acknowledgement stands for the handshake. Follows RFC 9293 section 3.3.2 as far as an observer in
/// the middle can; the balancer never judges sequence numbers.
#[inline(always)]
#[must_use]
pub const fn next_state(
    state: u8,
    syn: bool,
    ack: bool,
    fin: bool,
    rst: bool,
    from_backend: bool,
    sees_replies: bool,
) -> u8 {
    use state::{
        CLOSED, ESTABLISHED, FIN_BACKEND, FIN_CLIENT, SYN_RECEIVED, SYN_SENT, TIME_WAIT, UDP,
    };
    if state == UDP || state == CLOSED {
        return state;
    }
    if rst {
        return CLOSED;
    }
    if fin {
        return match (state, from_backend) {
            (FIN_BACKEND, false) | (FIN_CLIENT, true) | (TIME_WAIT, _) => TIME_WAIT,
            (_, false) => FIN_CLIENT,
            (_, true) => FIN_BACKEND,
        };
    }
    match state {
        SYN_SENT if from_backend && syn && ack => SYN_RECEIVED,
        SYN_SENT if !sees_replies && ack && !syn => ESTABLISHED,
        SYN_RECEIVED if !from_backend && ack && !syn => ESTABLISHED,
        _ => state,
    }
}

#[cfg(test)]
mod tests {
    use super::state::*;
    use super::*;

    fn run(steps: &[(&str, bool)]) -> u8 {
        let mut state = SYN_SENT;
        for (flags, from_backend) in steps {
            let has = |c: char| flags.contains(c);
            state = next_state(
                state,
                has('S'),
                has('A'),
                has('F'),
                has('R'),
                *from_backend,
                true,
            );
        }
        state
    }

    #[test]
    fn handshake_establishes() {
        assert_eq!(run(&[("SA", true)]), SYN_RECEIVED);
        assert_eq!(run(&[("SA", true), ("A", false)]), ESTABLISHED);
    }

    #[test]
    fn an_ack_before_the_syn_ack_does_not_establish() {
        assert_eq!(run(&[("A", false)]), SYN_SENT);
        assert_eq!(run(&[("SA", true), ("S", false)]), SYN_RECEIVED);
    }

    #[test]
    fn both_fins_close_in_either_order() {
        let open = [("SA", true), ("A", false)];
        for (first, second) in [(true, false), (false, true)] {
            let steps = [
                open[0],
                open[1],
                ("FA", first),
                ("A", second),
                ("FA", second),
            ];
            assert_eq!(run(&steps), TIME_WAIT);
            let repeated = [open[0], open[1], ("FA", first), ("FA", first)];
            assert_ne!(
                run(&repeated),
                TIME_WAIT,
                "one side's FIN twice is half closed"
            );
        }
    }

    #[test]
    fn reset_ends_every_state_and_nothing_revives_it() {
        assert_eq!(run(&[("R", true)]), CLOSED);
        assert_eq!(run(&[("R", false), ("SA", true), ("A", false)]), CLOSED);
    }

    #[test]
    fn where_replies_are_not_seen_the_client_alone_establishes() {
        assert_eq!(
            next_state(SYN_SENT, false, true, false, false, false, false),
            ESTABLISHED
        );
        assert_eq!(
            next_state(SYN_SENT, true, false, false, false, false, false),
            SYN_SENT
        );
    }

    #[test]
    fn udp_has_no_states() {
        assert_eq!(next_state(UDP, true, true, true, true, true, true), UDP);
    }

    #[test]
    fn opposite_of_opposite_is_the_key() {
        let key = FlowKey {
            src: 1u32,
            dst: 2,
            sport: 3,
            dport: 4,
            protocol: 6,
        };
        let client = Flow {
            src: 5u32,
            dst: 6,
            sport: 7,
            dport: 8,
            ..Flow::zeroed()
        };
        let reply_key = client.opposite(6);
        let reply = Flow {
            src: key.dst,
            dst: key.src,
            sport: key.dport,
            dport: key.sport,
            ..Flow::zeroed()
        };
        assert_eq!(
            reply_key,
            FlowKey {
                src: 6,
                dst: 5,
                sport: 8,
                dport: 7,
                protocol: 6
            }
        );
        assert_eq!(reply.opposite(6), key);
    }
}
