//! The flow table: see [`lb_common::flow_table`].
//!
//! To find, add and remove are subprograms, which take their key from the CPU's [`Work`]. Only the first
//! look, where most flows are found, is in the way of every packet.

use super::{Work, change};
use crate::{atomic, family::Family, maps};
use lb_common::{
    abi::ticks_since,
    addr::Address,
    flow::{DIRECTION_CLIENT, Flow, FlowKey},
    flow_table::{
        self, CLAIMED, CROWDED, DISPLACED, Entry, Home, KeyWords, Tags, WAYS, expendable,
        ports_offset,
    },
    service::forward,
};

/// The key in `work.arrival.key`; what is added with it is `work.client`.
pub const ARRIVAL: u32 = 0;
/// The key in `work.reply_key`; what is added with it is `work.reply`.
pub const REPLY: u32 = 1;
/// The key in `work.other_key`.
pub const OTHER: u32 = 2;

/// The number of an entry: one more than its place in the map, so that 0 is none.
pub type Number = u64;
/// No entry.
pub const NONE: Number = 0;

/// What a first look shows.
pub enum Look<A: 'static> {
    /// The flow is there.
    Found(&'static mut Flow<A>),
    /// It may be elsewhere.
    Unknown,
    /// It is not recorded.
    Missing,
}

/// Looks where a flow is looked for first.
///
/// The tags tell where that is. Most often it is the key's own way: the processor expects that, and has
/// the entry on its way before the tags are there.
#[inline(always)]
pub fn look<F: Family>(words: KeyWords) -> Look<F::Addr> {
    let Some((home, sets)) = home::<F>(words) else {
        return Look::Missing;
    };
    let set = home.first(sets);
    let tags = tags::<F>(set);
    let way = if tags.of(home.way()) == home.tag() {
        home.way()
    } else {
        let marks = tags.marks(home.tag());
        if marks == 0 {
            return if tags.0 & DISPLACED == 0 {
                Look::Missing
            } else {
                Look::Unknown
            };
        }
        Tags::first(marks)
    };
    match entry::<F>(number(set, way)) {
        // SAFETY: a live map value; another flow may take its place while it is read, and the packet
        // then goes where that flow goes.
        Some(entry) if same(entry, words) => Look::Found(unsafe { &mut (*entry).flow }),
        _ => Look::Unknown,
    }
}

/// The flow of an entry.
#[inline(always)]
pub fn flow<F: Family>(number: Number) -> Option<&'static mut Flow<F::Addr>> {
    if number == NONE {
        return None;
    }
    let entry = F::flows().get_ptr_mut((number as u32).wrapping_sub(1))?;
    // SAFETY: as in `look`.
    Some(unsafe { &mut (*entry).flow })
}

/// Where flows of this key may be, and the number of sets.
#[inline(always)]
fn home<F: Family>(words: KeyWords) -> Option<(Home, u32)> {
    let settings = maps::SETTINGS.get(0)?;
    let home = Home::of::<F::Addr>(words, settings.nat_port_seed);
    Some((home, settings.flow_sets))
}

/// A key on a desk or in an entry, in double words.
#[inline(always)]
fn words<A: Address>(key: *const FlowKey<A>) -> KeyWords {
    let key = key.cast::<u64>();
    // SAFETY: within the key, which is aligned to 8 bytes.
    let word = |i| unsafe { key.add(i).read_volatile() };
    KeyWords(if A::WORDS == 1 {
        [word(0), 0, 0, 0, word(1)]
    } else {
        [word(0), word(1), word(2), word(3), word(4)]
    })
}

/// Whether an entry has this key.
#[inline(always)]
fn same<A: Address>(entry: *const Entry<A>, key: KeyWords) -> bool {
    let found = words::<A>(entry.cast());
    let mut differs = found.0[0] ^ key.0[0] | found.0[4] ^ key.0[4];
    if A::WORDS > 1 {
        differs |= found.0[1] ^ key.0[1] | found.0[2] ^ key.0[2] | found.0[3] ^ key.0[3];
    }
    differs == 0
}

/// An entry's word of ports and protocol.
#[inline(always)]
fn ports_of<A: Address>(entry: *mut Entry<A>) -> *mut u64 {
    // SAFETY: within the entry.
    unsafe { entry.byte_add(ports_offset::<A>()).cast() }
}

#[inline(always)]
fn ports<A: Address>(entry: *mut Entry<A>) -> u64 {
    // SAFETY: a word of a map value, aligned to 8 bytes.
    unsafe { ports_of(entry).read_volatile() }
}

#[inline(always)]
fn sought<A: Address>(work: &Work<A>, which: u32) -> KeyWords {
    words(match which {
        ARRIVAL => &raw const work.arrival.key,
        REPLY => &raw const work.reply_key,
        _ => &raw const work.other_key,
    })
}

/// The tags of a set; none of one that is not there.
#[inline(always)]
fn tags<F: Family>(set: u32) -> Tags {
    // SAFETY: an aligned word of a map value.
    Tags(tag_word::<F>(set).map_or(0, |word| unsafe { word.read_volatile() }))
}

#[inline(always)]
fn tag_word<F: Family>(set: u32) -> Option<*mut u64> {
    F::flow_sets().get_ptr_mut(set)
}

/// The number of an entry of a set.
#[inline(always)]
fn number(set: u32, way: u32) -> Number {
    Number::from(set * WAYS + way) + 1
}

/// The entry of a number.
#[inline(always)]
fn entry<F: Family>(number: Number) -> Option<*mut Entry<F::Addr>> {
    F::flows().get_ptr_mut((number as u32).wrapping_sub(1))
}

/// The entry of a key in a set, but for the one numbered `except`.
#[inline(always)]
fn in_set<F: Family>(set: u32, tags: Tags, tag: u64, key: KeyWords, except: Number) -> Number {
    let mut marks = tags.marks(tag);
    for _ in 0..WAYS {
        if marks == 0 {
            break;
        }
        let number = number(set, Tags::first(marks));
        if let Some(entry) = entry::<F>(number)
            && same(entry, key)
            && number != except
        {
            return number;
        }
        marks &= marks - 1;
    }
    NONE
}

/// The entry of a key, but for the one numbered `except`.
#[inline(always)]
fn anywhere<F: Family>(home: Home, sets: u32, key: KeyWords, except: Number) -> Number {
    let first = home.first(sets);
    let tags_of_first = tags::<F>(first);
    let number = in_set::<F>(first, tags_of_first, home.tag(), key, except);
    if number != NONE || tags_of_first.0 & DISPLACED == 0 {
        return number;
    }
    let second = home.second(sets);
    in_set::<F>(second, tags::<F>(second), home.tag(), key, except)
}

/// The number of a key's entry.
#[inline(always)]
pub fn find<F: Family>(which: u32) -> Number {
    let Some(work) = F::work() else {
        return NONE;
    };
    let key = sought(work, which);
    let Some((home, sets)) = home::<F>(key) else {
        return NONE;
    };
    anywhere::<F>(home, sets, key, NONE)
}

/// Has the processor fetch the entries that a new flow will have, in one direction or both, all at once: each is a
/// wait for memory, and as long a one when it is written to.
#[inline(always)]
pub fn expect<F: Family>(directions: u32) -> u64 {
    let Some(work) = F::work() else {
        return 0;
    };
    for which in [ARRIVAL, REPLY] {
        if which < directions
            && let Some((home, sets)) = home::<F>(sought(work, which))
        {
            let (set, tags) = roomier::<F>(home, sets);
            let way = free_way(tags, home).unwrap_or(home.way());
            fetch::<F>(number(set, way));
        }
    }
    0
}

/// Has the processor fetch both lines of an entry, while it waits for something else.
#[inline(always)]
fn fetch<F: Family>(number: Number) {
    if let Some(entry) = entry::<F>(number) {
        let first = entry.cast::<u64>();
        // SAFETY: words of the entry, aligned to 8 bytes.
        unsafe {
            first.read_volatile();
            first
                .byte_add(size_of::<Entry<F::Addr>>() / 2)
                .read_volatile();
        }
    }
}

/// Removes a key's entry; 1 if it was there, and nobody else has removed it.
#[inline(always)]
pub fn remove<F: Family>(which: u32) -> u64 {
    let Some(work) = F::work() else {
        return 0;
    };
    let key = sought(work, which);
    let Some((home, sets)) = home::<F>(key) else {
        return 0;
    };
    let number = anywhere::<F>(home, sets, key, NONE);
    match entry::<F>(number) {
        Some(entry) => vacate::<F>(entry, number, key),
        None => 0,
    }
}

/// Frees an entry that has this key; 1 if nobody else has done so.
#[inline(always)]
fn vacate<F: Family>(entry: *mut Entry<F::Addr>, number: Number, key: KeyWords) -> u64 {
    let place = (number as u32).wrapping_sub(1);
    // SAFETY: words of map values, aligned to 8 bytes.
    unsafe {
        if !atomic::replace_u64(ports_of(entry), key.ports(), 0) {
            return 0;
        }
        if let Some(word) = tag_word::<F>(place / WAYS) {
            atomic::and_u64(word, !Tags::at(place % WAYS, 0x7f));
        }
    }
    1
}

/// Whether an entry with this word of ports and protocol has a flow: nobody is about to free or to
/// fill it.
#[inline(always)]
const fn is_flow(ports: u64) -> bool {
    ports != 0 && ports != CLAIMED
}

/// Leaves in `work.number` the entry of a set whose flow will be missed least, but for `work.spared`.
///
/// The best so far stays in memory rather than in registers: the verifier would follow every order
/// in which the entries could be the best.
#[inline(always)]
fn least_missed<F: Family>(work: &mut Work<F::Addr>, set: u32) {
    // SAFETY: fields of this CPU's desk. Each by itself, or the compiler would call `memset`.
    unsafe {
        (&raw mut work.number).write_volatile(NONE);
        (&raw mut work.worth).write_volatile(0);
    }
    for way in 0..WAYS {
        // All on their way before the first is judged.
        if let Some(entry) = entry::<F>(number(set, way)) {
            // SAFETY: a word of the entry.
            unsafe { (&raw const (*entry).flow.last_seen).read_volatile() };
        }
    }
    for way in 0..WAYS {
        let number = number(set, way);
        if let Some(entry) = entry::<F>(number)
            && is_flow(ports(entry))
            && number != work.spared
        {
            // SAFETY: as in `look`.
            let flow = unsafe { &(*entry).flow };
            let worth = expendable(flow, ticks_since(work.arrival.now, flow.last_seen));
            // SAFETY: fields of this CPU's desk.
            unsafe {
                if worth > (&raw const work.worth).read_volatile() {
                    (&raw mut work.worth).write_volatile(worth);
                    (&raw mut work.number).write_volatile(number);
                }
            }
        }
    }
}

/// Another CPU has come in between: the same key or the same entry.
const LOST: u64 = 0;
/// The key has an entry, or has had one.
const ADDED: u64 = 1;

/// Adds a key that is not there, in a free entry or in that of a flow that will be missed least.
#[inline(always)]
pub fn add<F: Family>(which: u32) -> u64 {
    let Some(work) = F::work() else {
        return LOST;
    };
    let Some((home, sets)) = home::<F>(sought(work, which)) else {
        return LOST;
    };
    let first = home.first(sets);
    let claimed = claim::<F>(work, home, sets);
    let is_full = claimed == FULL;
    if is_full {
        least_missed::<F>(work, first);
    } else if claimed == OVERTAKEN {
        return LOST;
    }
    // SAFETY: a field of this CPU's desk. Read again, so that the verifier need not follow every
    // entry it could be.
    let number = unsafe { (&raw const work.number).read_volatile() };
    let Some(entry) = entry::<F>(number) else {
        return LOST;
    };
    let place = (number as u32).wrapping_sub(1);
    if is_full && !displace::<F>(work, entry, place, home.tag()) {
        return LOST;
    }
    if place / WAYS != first
        && let Some(word) = tag_word::<F>(first)
    {
        // SAFETY: as above.
        unsafe { atomic::or_u64(word, DISPLACED) };
    }
    // Read again: until here it would take up the stack.
    let key = sought(work, which);
    write::<F>(entry, key, which, work);
    if anywhere::<F>(home, sets, key, number) != NONE {
        // Who has pushed it out meanwhile has counted its end, so its begin is to be counted as well.
        let ended = vacate::<F>(entry, number, key) == 0 && which == ARRIVAL;
        return if ended { ADDED } else { LOST };
    }
    ADDED
}

/// How often a free entry is looked for again because another CPU has changed the set meanwhile.
const TRIES: u32 = 4;

/// There is no free entry.
const FULL: u64 = 0;
/// An entry has been taken.
const TAKEN: u64 = 1;
/// Other CPUs were faster, again and again.
const OVERTAKEN: u64 = 2;

/// The set that a new key goes into, and its tags.
#[inline(always)]
fn roomier<F: Family>(home: Home, sets: u32) -> (u32, Tags) {
    let first = home.first(sets);
    let tags_of_first = tags::<F>(first);
    if tags_of_first.free() <= WAYS - CROWDED {
        let second = home.second(sets);
        let tags = tags::<F>(second);
        if tags.free() > tags_of_first.free() {
            return (second, tags);
        }
    }
    (first, tags_of_first)
}

/// The free entry of a set that a new key takes.
#[inline(always)]
fn free_way(tags: Tags, home: Home) -> Option<u32> {
    let free = tags.marks(0);
    if free == 0 {
        return None;
    }
    let at_home = free & Tags::at(home.way(), 0x80) != 0;
    Some(if at_home {
        home.way()
    } else {
        Tags::first(free)
    })
}

/// Takes a free entry for a key and leaves its number in `work.number`.
#[inline(always)]
fn claim<F: Family>(work: &mut Work<F::Addr>, home: Home, sets: u32) -> u64 {
    for _ in 0..TRIES {
        let (set, before) = roomier::<F>(home, sets);
        let Some(way) = free_way(before, home) else {
            return FULL;
        };
        let after = before.0 | Tags::at(way, home.tag());
        // SAFETY: a word of a map value, aligned to 8 bytes, and a field of this CPU's desk.
        unsafe {
            if let Some(word) = tag_word::<F>(set)
                && atomic::replace_u64(word, before.0, after)
            {
                (&raw mut work.number).write_volatile(number(set, way));
                return TAKEN;
            }
        }
    }
    OVERTAKEN
}

/// Takes the entry of a flow that has to go. Where that has another one, `work.other_key` and
/// `work.replaced` are left for [`bury`]. `false`: somebody else has taken it.
#[inline(always)]
fn displace<F: Family>(
    work: &mut Work<F::Addr>,
    entry: *mut Entry<F::Addr>,
    place: u32,
    tag: u64,
) -> bool {
    let Some(word) = tag_word::<F>(place / WAYS) else {
        return false;
    };
    let ports = ports(entry);
    if !is_flow(ports) {
        return false;
    }
    // SAFETY: words of map values, aligned to 8 bytes; the flow as in `look`.
    unsafe {
        if !atomic::replace_u64(ports_of(entry), ports, CLAIMED) {
            return false;
        }
        let flow = &(*entry).flow;
        if flow_table::is_live(flow)
            && let Some(pressure) = maps::PRESSURE.get_ptr_mut(0)
        {
            (*pressure).displaced += 1;
        }
        count_end(flow.direction, flow.backend, flow.generation, flow.state);
        // Whoever has an entry is alone in changing its tag, but for a daemon that takes it for forgotten.
        let way = place % WAYS;
        let change = Tags(word.read_volatile()).of(way) ^ tag;
        atomic::xor_u64(word, Tags::at(way, change));
        if forward::translates(flow.forward) {
            work.other_key = flow.opposite((ports >> 32) as u32);
            work.replaced = 1;
        }
    }
    true
}

/// The end of a flow one of whose entries has gone: with the client's, its backend has one less.
#[inline(always)]
fn count_end(direction: u8, backend: u32, generation: u32, state: u8) {
    let counted = direction == DIRECTION_CLIENT
        && maps::BACKENDS
            .get(backend)
            .is_some_and(|backend| u32::from(backend.generation) == generation);
    if counted {
        change::count_end(backend, state);
    }
}

/// [`add`]; `true` if the key has an entry.
#[inline(always)]
pub fn insert<F: Family>(which: u32) -> bool {
    let Some(work) = F::work() else {
        return false;
    };
    work.replaced = 0;
    let done = F::add(which);
    if work.replaced != 0 {
        F::bury();
    }
    done == ADDED
}

/// Removes the other half of a flow that had to go: `work.other_key`.
#[inline(always)]
pub fn bury<F: Family>() -> u64 {
    let Some(work) = F::work() else {
        return 0;
    };
    let key = sought(work, OTHER);
    let Some((home, sets)) = home::<F>(key) else {
        return 0;
    };
    let number = anywhere::<F>(home, sets, key, NONE);
    let Some(entry) = entry::<F>(number) else {
        return 0;
    };
    // SAFETY: as in `look`. Read before it is given away.
    let (direction, backend, generation, state) = unsafe {
        let flow = &raw const (*entry).flow;
        (
            (&raw const (*flow).direction).read_volatile(),
            (&raw const (*flow).backend).read_volatile(),
            (&raw const (*flow).generation).read_volatile(),
            (&raw const (*flow).state).read_volatile(),
        )
    };
    if vacate::<F>(entry, number, key) == 1 {
        count_end(direction, backend, generation, state);
    }
    0
}

/// Writes an entry that is ours, its word of ports and protocol last.
#[inline(always)]
fn write<F: Family>(entry: *mut Entry<F::Addr>, key: KeyWords, which: u32, work: &Work<F::Addr>) {
    let from = if which == REPLY {
        &raw const work.reply
    } else {
        &raw const work.client
    };
    let to = entry.cast::<u64>();
    // SAFETY: all words are within the entry and the desk, and aligned.
    unsafe {
        let last = size_of::<FlowKey<F::Addr>>() / 8 - 1;
        for (i, word) in key.0.iter().enumerate().take(last) {
            to.add(i).write_volatile(*word);
        }
        copy(&raw mut (*entry).flow, from);
        atomic::exchange_u64(ports_of(entry), key.ports());
    }
}

/// Copies a flow word by word: as a whole, the compiler would call `memmove`.
#[inline(always)]
pub fn copy<A>(to: *mut Flow<A>, from: *const Flow<A>) {
    let (to, from) = (to.cast::<u64>(), from.cast::<u64>());
    for i in 0..size_of::<Flow<A>>() / 8 {
        // SAFETY: words of two flows, which are aligned to 8 bytes.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) }
    }
}
