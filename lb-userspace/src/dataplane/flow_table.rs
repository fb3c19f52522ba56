//! The flow tables from the user side: see [`lb_common::flow_table`].
//!
//! Only pieces that are looked at are mapped, and no more than [`MAPPED`] at a time: a table for
//! millions of flows would otherwise count as memory of this process, and take more mappings than the
//! kernel allows one.

use super::map::{SharedArray, checked, map_words};
use bytemuck::{Pod, Zeroable};
use lb_common::{
    abi::Settings,
    addr::Address,
    flow::{Flow, FlowKey},
    flow_table::{CLAIMED, Entry, Home, KeyWords, Tags, WAYS, flows, ports_offset},
};
use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    rc::Rc,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Sets that are mapped at once: 64 KiB in IPv4 and 128 in IPv6, a whole number of pages of any size that Linux has.
const CHUNK_SETS: u32 = 128;
/// Chunks that a [`View`] keeps mapped.
const MAPPED: usize = 128;

/// Bytes of a chunk.
const fn chunk_bytes<A: Address>() -> usize {
    (CHUNK_SETS * WAYS) as usize * size_of::<Entry<A>>()
}

/// Map `flows4` or `flows6`, which [`FlowTable`] reads.
#[derive(Debug)]
pub struct FlowEntries<A> {
    fd: OwnedFd,
    places: u32,
    address: PhantomData<A>,
}

impl<A: Address> FlowEntries<A>
where
    Entry<A>: Pod,
{
    /// Takes the map `fd`, if its values have the right size.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let places = checked::<u32, Entry<A>>(&fd)?.max_entries;
        Ok(Self {
            fd,
            places,
            address: PhantomData,
        })
    }

    /// Flows that it is made for, each direction counted.
    #[must_use]
    pub const fn flows(&self) -> u32 {
        flows(self.places / WAYS)
    }
}

impl<A> AsFd for FlowEntries<A> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The flow table of one family, through descriptors of its own.
#[derive(Debug)]
pub struct FlowTable<A> {
    entries: FlowEntries<A>,
    tags: SharedArray<u64>,
    settings: SharedArray<Settings>,
    /// Entries that the last sweep could make nothing of.
    odd: Mutex<HashSet<Odd>>,
}

/// An entry that is in use without a flow, or has one whose key belongs elsewhere: set, way, tag,
/// and its word of ports and protocol. Some CPU may be about to fill it.
type Odd = (u32, u32, u64, u64);

impl<A: Address> FlowTable<A>
where
    Entry<A>: Pod,
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    /// From maps `flows4` or `flows6`, `flow_sets4` or `flow_sets6`, and `settings`.
    ///
    /// # Errors
    ///
    /// When the maps have other types, or the kernel refuses to map them.
    pub fn new(
        entries: BorrowedFd<'_>,
        tags: BorrowedFd<'_>,
        settings: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        Ok(Self {
            entries: FlowEntries::from_fd(entries.try_clone_to_owned()?)?,
            tags: SharedArray::from_fd(tags.try_clone_to_owned()?)?,
            settings: SharedArray::from_fd(settings.try_clone_to_owned()?)?,
            odd: Mutex::default(),
        })
    }

    /// Sets of the table.
    fn sets(&self) -> u32 {
        self.entries.places / WAYS
    }

    /// A look at the table.
    #[must_use]
    pub fn view(&self) -> View<'_, A> {
        View {
            table: self,
            chunks: RefCell::default(),
        }
    }

    /// The tags of a set.
    fn tags(&self, set: u32) -> &AtomicU64 {
        self.tags.atomic_u64(set, 0)
    }

    /// Shows `f` every entry, with its place. One that stays all the time is seen; one that comes or goes may be.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to map a part of the table.
    pub fn each(&self, mut f: impl FnMut(u32, &FlowKey<A>, &Flow<A>)) -> io::Result<()> {
        self.walk(|set, tags, chunk| {
            for (way, entry) in chunk.flows(set, tags) {
                if let Some(entry) = entry {
                    f(set * WAYS + way, &entry.key, &entry.flow);
                }
            }
        })
    }

    /// As [`FlowTable::each`], and frees what somebody has left behind half done: what is odd, and was
    /// so in the sweep before.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn sweep(&self, mut f: impl FnMut(&FlowKey<A>, &Flow<A>)) -> io::Result<()> {
        let seed = self.settings.read(0).nat_port_seed;
        let sets = self.sets();
        let mut odd = HashSet::new();
        self.walk(|set, tags, chunk| {
            for (way, entry) in chunk.flows(set, tags) {
                let tag = tags.of(way);
                if let Some(entry) = entry {
                    let home = Home::of::<A>(KeyWords::of(&entry.key), seed);
                    if tag == home.tag() && [home.first(sets), home.second(sets)].contains(&set) {
                        f(&entry.key, &entry.flow);
                        continue;
                    }
                }
                let ports = chunk.ports(set, way).load(Ordering::Acquire);
                odd.insert((set, way, tag, ports));
            }
        })?;
        let mut before = self.odd.lock().unwrap_or_else(PoisonError::into_inner);
        let view = self.view();
        let forgotten: Vec<Odd> = odd.intersection(&before).copied().collect();
        for (set, way, tag, ports) in forgotten {
            let chunk = view.chunk(set)?;
            let word = chunk.ports(set, way);
            let is_same = Tags(self.tags(set).load(Ordering::Acquire)).of(way) == tag;
            let order = Ordering::AcqRel;
            if is_same
                && word
                    .compare_exchange(ports, 0, order, Ordering::Acquire)
                    .is_ok()
            {
                self.tags(set).fetch_and(!Tags::at(way, 0x7f), order);
            }
            odd.remove(&(set, way, tag, ports));
        }
        *before = odd;
        Ok(())
    }

    /// Number of entries that are in use, by counting their tags.
    #[must_use]
    pub fn len(&self) -> u64 {
        let used = |set| WAYS - Tags(self.tags(set).load(Ordering::Relaxed)).free();
        (0..self.sets()).map(|set| u64::from(used(set))).sum()
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shows `f` the sets that are not empty.
    fn walk(&self, mut f: impl FnMut(u32, Tags, &Chunk<A>)) -> io::Result<()> {
        let sets = self.sets();
        for number in 0..sets.div_ceil(CHUNK_SETS) {
            let first = number * CHUNK_SETS;
            let mut chunk = None;
            for set in first..sets.min(first + CHUNK_SETS) {
                let tags = Tags(self.tags(set).load(Ordering::Acquire));
                if tags.is_empty() {
                    continue;
                }
                let chunk = match &mut chunk {
                    Some(chunk) => chunk,
                    none => none.insert(self.chunk(number)?),
                };
                f(set, tags, chunk);
            }
        }
        Ok(())
    }

    fn chunk(&self, number: u32) -> io::Result<Chunk<A>> {
        let bytes = self.entries.places as usize * size_of::<Entry<A>>();
        let offset = number as usize * chunk_bytes::<A>();
        Chunk::map(
            self.entries.as_fd(),
            number * CHUNK_SETS,
            offset,
            chunk_bytes::<A>().min(bytes - offset),
        )
    }
}

/// A look at a flow table.
#[derive(Debug)]
pub struct View<'a, A> {
    table: &'a FlowTable<A>,
    /// What is mapped, by number.
    chunks: RefCell<HashMap<u32, Rc<Chunk<A>>>>,
}

impl<A: Address> View<'_, A>
where
    Entry<A>: Pod,
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    /// The flow of `key`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to map a part of the table.
    pub fn get(&self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        Ok(self.find(key)?.map(|(_, _, flow)| flow))
    }

    /// Removes `key` and returns its flow as it was a moment before.
    ///
    /// Should another flow with the same ports take its place in that very moment, it is that one which
    /// goes.
    ///
    /// # Errors
    ///
    /// As for [`View::get`].
    pub fn remove(&self, key: &FlowKey<A>) -> io::Result<Option<Flow<A>>> {
        let ports = KeyWords::of(key).ports();
        while let Some((set, way, flow)) = self.find(key)? {
            let chunk = self.chunk(set)?;
            let taken = chunk.ports(set, way).compare_exchange(
                ports,
                0,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            if taken.is_ok() {
                let tags = self.table.tags(set);
                tags.fetch_and(!Tags::at(way, 0x7f), Ordering::AcqRel);
                return Ok(Some(flow));
            }
        }
        Ok(None)
    }

    /// Set, way and flow of `key`.
    fn find(&self, key: &FlowKey<A>) -> io::Result<Option<(u32, u32, Flow<A>)>> {
        let seed = self.table.settings.read(0).nat_port_seed;
        let sets = self.table.sets();
        let home = Home::of::<A>(KeyWords::of(key), seed);
        // Whether one is displaced matters only to those in a hurry.
        for set in [home.first(sets), home.second(sets)] {
            let mut marks = Tags(self.table.tags(set).load(Ordering::Acquire)).marks(home.tag());
            while marks != 0 {
                let way = Tags::first(marks);
                let entry = read::<A>(self.chunk(set)?.entry(set, way));
                if entry.key == *key {
                    return Ok(Some((set, way, entry.flow)));
                }
                marks &= marks - 1;
            }
        }
        Ok(None)
    }

    /// The chunk that has a set.
    fn chunk(&self, set: u32) -> io::Result<Rc<Chunk<A>>> {
        let number = set / CHUNK_SETS;
        let mut chunks = self.chunks.borrow_mut();
        if let Some(chunk) = chunks.get(&number) {
            return Ok(Rc::clone(chunk));
        }
        if chunks.len() >= MAPPED {
            chunks.clear();
        }
        let chunk = Rc::new(self.table.chunk(number)?);
        chunks.insert(number, Rc::clone(&chunk));
        Ok(chunk)
    }
}

#[cfg(test)]
impl<A: Address> View<'_, A>
where
    Entry<A>: Pod,
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    /// Adds an entry. `false`: its set is full.
    pub fn add(&self, key: &FlowKey<A>, flow: &Flow<A>) -> io::Result<bool> {
        let seed = self.table.settings.read(0).nat_port_seed;
        let home = Home::of::<A>(KeyWords::of(key), seed);
        let set = home.first(self.table.sets());
        let tags = self.table.tags(set);
        let free = Tags(tags.load(Ordering::Acquire)).marks(0);
        if free == 0 {
            return Ok(false);
        }
        let way = Tags::first(free);
        let mut entry = Entry::<A>::zeroed();
        (entry.key, entry.flow) = (*key, *flow);
        let chunk = self.chunk(set)?;
        let words = chunk.entry(set, way);
        for (word, bytes) in words.iter().zip(bytemuck::bytes_of(&entry).chunks(8)) {
            let bytes = bytes.try_into().expect("entries consist of whole words");
            word.store(u64::from_ne_bytes(bytes), Ordering::Release);
        }
        tags.fetch_or(Tags::at(way, home.tag()), Ordering::AcqRel);
        Ok(true)
    }
}

/// A mapped part of the table.
#[derive(Debug)]
struct Chunk<A> {
    words: NonNull<AtomicU64>,
    bytes: usize,
    /// Its first set.
    first: u32,
    address: PhantomData<A>,
}

impl<A: Address> Chunk<A>
where
    Entry<A>: Pod,
{
    fn map(fd: BorrowedFd<'_>, first: u32, offset: usize, bytes: usize) -> io::Result<Self> {
        Ok(Self {
            words: map_words(fd, offset, bytes)?,
            bytes,
            first,
            address: PhantomData,
        })
    }

    /// The words of an entry.
    ///
    /// # Panics
    /// If the set is not in this chunk.
    fn entry(&self, set: u32, way: u32) -> &[AtomicU64] {
        let entry_words = size_of::<Entry<A>>() / 8;
        let start = ((set - self.first) * WAYS + way) as usize * entry_words;
        assert!(
            (start + entry_words) * 8 <= self.bytes,
            "set {set} is not in the chunk of set {}",
            self.first
        );
        // SAFETY: within the mapping, as asserted; others change the words only while we look at them
        // atomically.
        unsafe { std::slice::from_raw_parts(self.words.add(start).as_ptr(), entry_words) }
    }

    /// An entry's word of ports and protocol.
    fn ports(&self, set: u32, way: u32) -> &AtomicU64 {
        &self.entry(set, way)[ports_offset::<A>() / 8]
    }

    /// The entries of a set that are in use; `None` where there is no flow, or not yet.
    fn flows(&self, set: u32, tags: Tags) -> impl Iterator<Item = (u32, Option<Entry<A>>)> {
        (0..WAYS)
            .filter(move |way| tags.of(*way) != 0)
            .map(move |way| {
                let words = self.entry(set, way);
                let ports = || self.ports(set, way).load(Ordering::Acquire);
                let before = ports();
                if before == 0 || before == CLAIMED {
                    return (way, None);
                }
                let entry = read::<A>(words);
                // Another flow may have taken its place meanwhile.
                (way, (ports() == before).then_some(entry))
            })
    }
}

impl<A> Drop for Chunk<A> {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`; references into it borrow `self` and have ended.
        unsafe {
            libc::munmap(self.words.as_ptr().cast(), self.bytes);
        }
    }
}

/// An entry, word by word.
fn read<A: Address>(words: &[AtomicU64]) -> Entry<A>
where
    Entry<A>: Pod,
{
    let mut entry = Entry::zeroed();
    for (bytes, word) in bytemuck::bytes_of_mut(&mut entry).chunks_mut(8).zip(words) {
        bytes.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
    }
    entry
}
