//! Lookup: is this address ours, and which service is it?

use crate::{family::Family, maps};
use lb_common::{
    addr::Address,
    filter::{self, LANE_ANY_PORT},
    service::{ANY_PORT, Places, Service, ServiceKey, Vip},
};

/// An address out of a map value.
///
/// Word by word: copied as a whole from one map value to another, the compiler would call
/// `memmove`, which the kernel has none of.
#[inline(always)]
pub fn address<A: Address>(words: &[u32; 4]) -> A {
    let first = words.as_ptr();
    let mut copy = [0; 4];
    for (i, word) in copy.iter_mut().enumerate().take(A::WORDS) {
        // SAFETY: no family has more than the four words there are.
        *word = unsafe { first.add(i).read_volatile() };
    }
    A::narrow(&copy)
}

/// As [`address`], of an address that is stored as one.
#[inline(always)]
pub fn load<A: Address>(address: &A) -> A {
    let first = core::ptr::from_ref(address).cast::<u32>();
    let mut copy = [0; 4];
    for (i, word) in copy.iter_mut().enumerate().take(A::WORDS) {
        // SAFETY: an address consists of that many words.
        *word = unsafe { first.add(i).read_volatile() };
    }
    A::narrow(&copy)
}

/// Has the words of an address written to the stack one by one: the compiler would join them to
/// double words, and the verifier wants those aligned there.
#[inline(always)]
pub fn word_by_word(addr: [u32; 4]) -> [u32; 4] {
    [
        core::hint::black_box(addr[0]),
        core::hint::black_box(addr[1]),
        core::hint::black_box(addr[2]),
        core::hint::black_box(addr[3]),
    ]
}

/// What the filter knows of a packet's addresses: zero proves that the packet is not ours.
#[inline(always)]
pub fn lane<F: Family>(dst: F::Addr, src: impl FnOnce() -> F::Addr) -> u8 {
    match lane_of::<F>(dst) & !filter::LANES_OF_OTHERS {
        // Perhaps for no address of ours, but from a backend that answers a client. A client may
        // share its lane with an address that NAT sends from.
        lane @ (0 | filter::LANE_NAT_SOURCE) => {
            lane | lane_of::<F>(src()) & (filter::LANE_BACKEND | filter::LANE_ORIGIN)
        }
        lane => lane,
    }
}

/// What the filter knows of one address.
#[inline(always)]
pub fn lane_of<F: Family>(address: F::Addr) -> u8 {
    let (element, shift) = filter::place(filter::lane_of(address));
    maps::ADDRESS_FILTER
        .get(element)
        .map_or(0, |lanes| (*lanes >> shift) as u8)
}

/// The VIP record of an address.
#[inline(always)]
pub fn vip<F: Family>(address: &F::Addr) -> Option<Vip> {
    // The compiler may write it to the stack in double words, and the verifier wants those aligned.
    #[repr(C, align(8))]
    struct Key<A>(A);
    let key = Key(*address);
    // SAFETY: a copy of one word; a concurrent removal at worst shows the value of a moment ago.
    unsafe { F::vips().get(&key.0) }.copied()
}

/// The service a packet is for: its number and record. A service that names the port goes before
/// one that takes every port; the lane says whether there may be one.
#[inline(always)]
pub fn service<F: Family>(
    vip: F::Addr,
    port: u16,
    protocol: u8,
    lane: u8,
) -> Option<(u32, &'static Service)> {
    // Port 0 is reserved (RFC 6335 section 6); such a packet must not meet the key of all ports.
    if port == ANY_PORT {
        return None;
    }
    let mut key = ServiceKey::new(vip, port, protocol);
    let mut number = listener::<F>(&key);
    if number == 0 && lane & LANE_ANY_PORT != 0 {
        key.port = ANY_PORT;
        number = listener::<F>(&key);
    }
    if number == 0 {
        return None;
    }
    Some((number, maps::SERVICES.get(number)?))
}

/// The number of the service that listens on `key`, or of the backend that is this origin; 0 if there is none.
#[inline(always)]
pub fn listener<F: Family>(key: &ServiceKey<F::Addr>) -> u32 {
    // SAFETY: never written; volatile, because the loader sets it.
    let buckets = unsafe { (&raw const BUCKETS).read_volatile() };
    let places = Places::of(key);
    match F::listener(places.first(buckets), key) {
        0 => F::listener(places.second(buckets), key),
        number => number,
    }
}

/// Buckets of maps `services4` and `services6`. The loader says how many there are; to the kernel it is
/// a constant.
#[unsafe(no_mangle)]
static BUCKETS: u32 = 0;
