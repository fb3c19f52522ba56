//! The flow table: see [`lb_common::flow_table`].
//!
//! To find, reserve, fill and remove are subprograms, which take their key from the CPU's [`Work`]. Only the first
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

/// The key in `work.arrival.key`; what is recorded under it is `work.client`.
pub const ARRIVAL: u32 = 0;
/// The key in `work.reply_key`; what is recorded under it is `work.reply`.
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

/// The port of `work.reply_key`, but for multiples of [`ROUND`](flow_table::ROUND), with which it belongs into the set beside that of the
/// client's key: where a new flow's two keys are looked for, and written, memory is then waited for once. Beside it and not in it, so that
/// sets fill as evenly as if both were strewn by chance.
#[inline(always)]
pub fn port_beside<F: Family>() -> u32 {
    let Some(work) = F::work() else {
        return 0;
    };
    let Some((client, sets)) = home::<F>(sought(work, ARRIVAL)) else {
        return 0;
    };
    let Some((reply, _)) = home::<F>(sought(work, REPLY)) else {
        return 0;
    };
    let next = client.first(sets) + 1;
    reply.port_to(if next < sets { next } else { 0 }, sets)
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
    words::<A>(entry.cast()).is(key)
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

/// [`ports`], read before anything that is read afterwards.
#[inline(always)]
fn ports_before_key<A: Address>(entry: *mut Entry<A>) -> u64 {
    let ports = ports(entry);
    // SAFETY: a word of a map value, aligned to 8 bytes, and a constant.
    unsafe {
        if (&raw const STORES_IN_ORDER).read_volatile() == 0 {
            atomic::fetch_or_u64(ports_of(entry), 0);
        }
    }
    ports
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

/// The entry of a key in a set.
#[inline(always)]
fn in_set<F: Family>(set: u32, tags: Tags, tag: u64, key: KeyWords) -> Number {
    let mut marks = tags.marks(tag);
    for _ in 0..WAYS {
        if marks == 0 {
            break;
        }
        let number = number(set, Tags::first(marks));
        if let Some(entry) = entry::<F>(number)
            && same(entry, key)
        {
            return number;
        }
        marks &= marks - 1;
    }
    NONE
}

/// The entry of a key.
#[inline(always)]
fn anywhere<F: Family>(home: Home, sets: u32, key: KeyWords) -> Number {
    let first = home.first(sets);
    let tags_of_first = tags::<F>(first);
    let number = in_set::<F>(first, tags_of_first, home.tag(), key);
    if number != NONE || tags_of_first.0 & DISPLACED == 0 {
        return number;
    }
    let second = home.second(sets);
    in_set::<F>(second, tags::<F>(second), home.tag(), key)
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
    anywhere::<F>(home, sets, key)
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
    let number = anywhere::<F>(home, sets, key);
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

/// Leaves in `work.number` the entry of a set whose flow will be missed least.
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
/// The key has an entry, which is yet to be filled.
const RESERVED: u64 = 1;

/// Reserves an entry for a key that is not there, a free one or that of a flow that will be missed least, and leaves its
/// number in `work.number`.
///
/// Of CPUs that reserve one for the same key, no more than one does not give way. What tells them who that is are the words of
/// tags, on whose changes all CPUs agree: whoever meets the key's tag in a set, or cannot rule out that it is in the
/// other one, looks at the entries, and takes one that is not filled yet for the same key's.
#[inline(always)]
pub fn reserve<F: Family>(which: u32) -> u64 {
    let Some(work) = F::work() else {
        return LOST;
    };
    let Some((home, sets)) = home::<F>(sought(work, which)) else {
        return LOST;
    };
    let first = home.first(sets);
    let claimed = claim::<F>(work, home, sets);
    if claimed == TAKEN {
        return RESERVED;
    }
    if claimed == OVERTAKEN {
        return LOST;
    }
    let is_full = claimed == FULL;
    if is_full {
        least_missed::<F>(work, first);
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
        unsafe { atomic::fetch_or_u64(word, DISPLACED) };
    }
    // Read again: until here it would take up the stack.
    let key = sought(work, which);
    // A backend that is its own client, at the address that `nat` sends from: the key is its answers' as well.
    let is_own = work.reply_number != NONE && key.is(sought(work, REPLY));
    if is_own || is_contested::<F>(home, sets, key, [number, work.reply_number]) {
        release::<F>(number);
        return LOST;
    }
    RESERVED
}

/// Whether another entry than `ours` has this key, or may be about to.
#[inline(always)]
fn is_contested<F: Family>(home: Home, sets: u32, key: KeyWords, ours: [Number; 2]) -> bool {
    let first = home.first(sets);
    let tags_of_first = tags::<F>(first);
    if contested_in::<F>(first, tags_of_first, home.tag(), key, ours) {
        return true;
    }
    if tags_of_first.0 & DISPLACED == 0 {
        return false;
    }
    let second = home.second(sets);
    contested_in::<F>(second, tags::<F>(second), home.tag(), key, ours)
}

#[inline(always)]
fn contested_in<F: Family>(
    set: u32,
    tags: Tags,
    tag: u64,
    key: KeyWords,
    ours: [Number; 2],
) -> bool {
    let mut marks = tags.marks(tag);
    for _ in 0..WAYS {
        if marks == 0 {
            break;
        }
        let number = number(set, Tags::first(marks));
        if number != ours[0]
            && number != ours[1]
            && let Some(entry) = entry::<F>(number)
            && (!is_flow(ports_before_key(entry)) || same(entry, key))
        {
            return true;
        }
        marks &= marks - 1;
    }
    false
}

/// Frees an entry that is reserved.
#[inline(always)]
pub fn release<F: Family>(number: Number) {
    let place = (number as u32).wrapping_sub(1);
    if let Some(entry) = entry::<F>(number)
        && let Some(word) = tag_word::<F>(place / WAYS)
    {
        // SAFETY: words of map values, aligned to 8 bytes.
        unsafe {
            atomic::exchange_u64(ports_of(entry), 0);
            atomic::and_u64(word, !Tags::at(place % WAYS, 0x7f));
        }
    }
}

/// How often a free entry is looked for again because another CPU has changed the set meanwhile.
const TRIES: u32 = 4;

/// There is no free entry.
const FULL: u64 = 0;
/// An entry has been taken, and nobody else can have the key.
const TAKEN: u64 = 1;
/// An entry has been taken, but somebody else may have the key.
const DOUBTFUL: u64 = 2;
/// Other CPUs were faster, again and again.
const OVERTAKEN: u64 = 3;

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
                let is_alone = set == home.first(sets)
                    && before.0 & DISPLACED == 0
                    && before.marks(home.tag()) == 0;
                return if is_alone { TAKEN } else { DOUBTFUL };
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
        atomic::fetch_xor_u64(word, Tags::at(way, change));
        if forward::translates(flow.forward) {
            work.other_key = flow.opposite((ports >> 32) as u32);
            work.replaced = 1;
        }
    }
    true
}

/// The end of a flow one of whose entries has gone: with the client's, its backend has one less.
#[inline(always)]
fn count_end(direction: u8, backend: u32, generation: u16, state: u8) {
    let counted = direction == DIRECTION_CLIENT
        && maps::BACKENDS
            .get(backend)
            .is_some_and(|backend| backend.generation == generation);
    if counted {
        change::count_end(backend, state);
    }
}

/// [`reserve`]; `true` if the key has an entry, which [`publish`] is to fill, or [`release`] to free.
#[inline(always)]
pub fn reserved<F: Family>(which: u32) -> bool {
    let Some(work) = F::work() else {
        return false;
    };
    work.replaced = 0;
    let done = F::reserve(which);
    if work.replaced != 0 {
        F::bury();
    }
    done == RESERVED
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
    let number = anywhere::<F>(home, sets, key);
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

/// Fills the reserved entries of a new flow, `work.number` and, if there are two of them, `work.reply_number`: from then on
/// it is found.
///
/// This is the last thing a CPU does for a new flow, and has no atomic operation where stores are seen in the order in
/// which they are made: such an operation would wait until memory has taken all of them, which otherwise happens while
/// the CPU goes on.
#[inline(always)]
pub fn publish<F: Family>() -> u64 {
    let Some(work) = F::work() else {
        return 0;
    };
    write::<F>(
        work.reply_number,
        &raw const work.reply_key,
        &raw const work.reply,
    );
    write::<F>(
        work.number,
        &raw const work.arrival.key,
        &raw const work.client,
    );
    0
}

/// Writes an entry that is ours, its word of ports and protocol last.
#[inline(always)]
fn write<F: Family>(number: Number, key: *const FlowKey<F::Addr>, flow: *const Flow<F::Addr>) {
    let Some(entry) = entry::<F>(number) else {
        return;
    };
    let (from, to) = (key.cast::<u64>(), entry.cast::<u64>());
    let last = size_of::<FlowKey<F::Addr>>() / 8 - 1;
    // SAFETY: all words are within the entry and the desk, and aligned.
    unsafe {
        for i in 0..last {
            to.add(i).write_volatile(from.add(i).read_volatile());
        }
        copy(&raw mut (*entry).flow, flow);
        let ports = from.add(last).read_volatile();
        if (&raw const STORES_IN_ORDER).read_volatile() == 0 {
            atomic::exchange_u64(to.add(last), ports);
        } else {
            to.add(last).write_volatile(ports);
        }
    }
}

/// 1 where all CPUs see stores in the order in which one of them made them (Intel SDM volume 3 section 9.2, AMD64 APM volume 2 section
/// 7.2). Set when the program is loaded.
#[unsafe(no_mangle)]
static STORES_IN_ORDER: u32 = 0;

/// Copies a flow word by word: as a whole, the compiler would call `memmove`.
#[inline(always)]
pub fn copy<A>(to: *mut Flow<A>, from: *const Flow<A>) {
    let (to, from) = (to.cast::<u64>(), from.cast::<u64>());
    for i in 0..size_of::<Flow<A>>() / 8 {
        // SAFETY: words of two flows, which are aligned to 8 bytes.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) }
    }
}
