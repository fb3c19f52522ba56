//! Typed maps over a descriptor.
//!
//! The types check the sizes of keys and values once, when they are made; after that an access is
//! one system call or, for [`SharedArray`], none.

use super::bpf;
use bytemuck::{Pod, Zeroable};
use std::{
    io,
    marker::PhantomData,
    ops::AddAssign,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering, fence},
    },
};

/// Entries asked for with one batch lookup, to begin with.
const BATCH: u32 = 4096;

/// The kernel's `ENOTSUPP`, which libc does not name: the map type has no such operation.
const ENOTSUPP: i32 = 524;

fn mismatch(what: &str, kernel: u32, ours: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what} of {kernel} bytes where {ours} are expected"),
    )
}

/// Checks that the map has keys of `K` and values of `V`.
pub(super) fn checked<K, V>(fd: &OwnedFd) -> io::Result<bpf::MapInfo> {
    let info = bpf::map_info(fd.as_fd())?;
    if info.key_size as usize != size_of::<K>() {
        return Err(mismatch("a key", info.key_size, size_of::<K>()));
    }
    if info.value_size as usize != size_of::<V>() {
        return Err(mismatch("a value", info.value_size, size_of::<V>()));
    }
    Ok(info)
}

/// A hash map of any kind that is not per CPU.
#[derive(Debug)]
pub struct HashMap<K, V> {
    fd: OwnedFd,
    max_entries: u32,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> HashMap<K, V> {
    /// Takes the map `fd`, if its keys and values have the right size.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let max_entries = checked::<K, V>(&fd)?.max_entries;
        Ok(Self {
            fd,
            max_entries,
            types: PhantomData,
        })
    }

    /// Entries it has room for.
    #[must_use]
    pub const fn max_entries(&self) -> u32 {
        self.max_entries
    }

    /// The value of `key`.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let found = bpf::lookup(
            self.fd.as_fd(),
            bytemuck::bytes_of(key),
            bytemuck::bytes_of_mut(&mut value),
        )?;
        Ok(found.then_some(value))
    }

    /// Sets the value of `key`, new or not.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        let (key, value) = (bytemuck::bytes_of(key), bytemuck::bytes_of(value));
        bpf::update(self.fd.as_fd(), key, value, 0)
    }

    /// Adds `key`; `false`, and nothing changed, if it is there already.
    pub fn insert_new(&self, key: &K, value: &V) -> io::Result<bool> {
        let (key, value) = (bytemuck::bytes_of(key), bytemuck::bytes_of(value));
        match bpf::update(self.fd.as_fd(), key, value, bpf::NOEXIST) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Removes `key`; `false` if it was not there.
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        bpf::delete(self.fd.as_fd(), bytemuck::bytes_of(key))
    }

    /// Removes `key` and returns the value it had at that moment.
    pub fn take(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let found = bpf::lookup_and_delete(
            self.fd.as_fd(),
            bytemuck::bytes_of(key),
            bytemuck::bytes_of_mut(&mut value),
        )?;
        Ok(found.then_some(value))
    }

    /// Shows `f` every entry, thousands for each system call.
    ///
    /// While the program adds and removes entries, one that stays all the time is seen; one that
    /// comes or goes may be. `f` may remove entries.
    pub fn iter_batches(&self, mut f: impl FnMut(&K, &V)) -> io::Result<()> {
        let mut room = BATCH.min(self.max_entries);
        let mut cursor = bpf::BatchCursor::new(size_of::<K>());
        let mut keys = vec![K::zeroed(); room as usize];
        let mut values = vec![V::zeroed(); room as usize];
        loop {
            let batch = bpf::lookup_batch(
                self.fd.as_fd(),
                &mut cursor,
                bytemuck::cast_slice_mut(&mut keys),
                bytemuck::cast_slice_mut(&mut values),
                room,
            );
            match batch {
                Ok((count, more)) => {
                    for (key, value) in keys.iter().zip(&values).take(count) {
                        f(key, value);
                    }
                    if !more {
                        return Ok(());
                    }
                }
                // One bucket holds more than there is room for; nothing was passed over.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    room = room.saturating_mul(2);
                    keys.resize(room as usize, K::zeroed());
                    values.resize(room as usize, V::zeroed());
                }
                // The device maps have no batch operations.
                Err(e) if e.raw_os_error() == Some(ENOTSUPP) => return self.iter_singly(f),
                Err(e) => return Err(e),
            }
        }
    }

    fn iter_singly(&self, mut f: impl FnMut(&K, &V)) -> io::Result<()> {
        // All keys first: an entry that `f` removes would send the walk back to the start.
        let mut keys: Vec<K> = Vec::new();
        let mut next = K::zeroed();
        while keys.len() <= self.max_entries as usize
            && bpf::next_key(
                self.fd.as_fd(),
                keys.last().map(bytemuck::bytes_of),
                bytemuck::bytes_of_mut(&mut next),
            )?
        {
            keys.push(next);
        }
        for key in &keys {
            if let Some(value) = self.get(key)? {
                f(key, &value);
            }
        }
        Ok(())
    }

    /// Number of entries, by counting them.
    pub fn len(&self) -> io::Result<u64> {
        let mut count = 0;
        self.iter_batches(|_, _| count += 1)?;
        Ok(count)
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> io::Result<bool> {
        let mut first = K::zeroed();
        bpf::next_key(self.fd.as_fd(), None, bytemuck::bytes_of_mut(&mut first)).map(|some| !some)
    }
}

impl<K, V> AsFd for HashMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Number of CPUs the kernel has made room for, which is the number of copies in a per-CPU map.
///
/// More than are there, on machines that allow CPUs to be added.
pub fn possible_cpus() -> io::Result<usize> {
    static CPUS: OnceLock<usize> = OnceLock::new();
    if let Some(cpus) = CPUS.get() {
        return Ok(*cpus);
    }
    let path = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(path)?;
    let cpus = count_cpus(text.trim()).ok_or_else(|| {
        let problem = format!("{path}: not a list of CPUs: {:?}", text.trim());
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })?;
    Ok(*CPUS.get_or_init(|| cpus))
}

/// How many CPUs are in a list like `0-3,8`. The kernel lays out one copy for each, without gaps.
fn count_cpus(list: &str) -> Option<usize> {
    list.split(',').try_fold(0, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some(count + last.checked_sub(first)? + 1)
    })
}

/// A per-CPU array of counters.
#[derive(Debug)]
pub struct PerCpuArray<V> {
    fd: OwnedFd,
    max_entries: u32,
    cpus: usize,
    types: PhantomData<V>,
}

impl<V: Pod + AddAssign> PerCpuArray<V> {
    /// Bytes of one CPU's copy.
    const STRIDE: usize = size_of::<V>().next_multiple_of(8);

    /// Takes the map `fd`, if its values have the right size.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let max_entries = checked::<u32, V>(&fd)?.max_entries;
        Ok(Self {
            fd,
            max_entries,
            cpus: possible_cpus()?,
            types: PhantomData,
        })
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.max_entries
    }

    /// Always `false`: the kernel makes no array without elements.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.max_entries == 0
    }

    fn add_up(copies: &[u8]) -> V {
        let mut sum = V::zeroed();
        for copy in copies.chunks_exact(Self::STRIDE) {
            sum += bytemuck::pod_read_unaligned(&copy[..size_of::<V>()]);
        }
        sum
    }

    /// The sum of element `index` over all CPUs.
    pub fn sum(&self, index: u32) -> io::Result<V> {
        let mut copies = vec![0u8; Self::STRIDE * self.cpus];
        if bpf::lookup(self.fd.as_fd(), &index.to_ne_bytes(), &mut copies)? {
            Ok(Self::add_up(&copies))
        } else {
            Err(out_of_range(index, self.max_entries))
        }
    }

    /// The sums of all elements, in order.
    pub fn sums(&self) -> io::Result<Vec<V>> {
        let element = Self::STRIDE * self.cpus;
        // About a megabyte at a time, whatever the number of CPUs.
        let room = (1usize << 20)
            .div_ceil(element)
            .min(self.max_entries as usize);
        let mut keys = vec![0u32; room];
        let mut values = vec![0u8; room * element];
        let mut cursor = bpf::BatchCursor::new(size_of::<u32>());
        let mut sums = Vec::with_capacity(self.max_entries as usize);
        loop {
            let (count, more) = bpf::lookup_batch(
                self.fd.as_fd(),
                &mut cursor,
                bytemuck::cast_slice_mut(&mut keys),
                &mut values,
                u32::try_from(room).map_err(io::Error::other)?,
            )?;
            // An array's keys come in order.
            sums.extend(values.chunks_exact(element).take(count).map(Self::add_up));
            if !more || sums.len() >= self.max_entries as usize {
                return Ok(sums);
            }
        }
    }

    /// Sets element `index` to zero on every CPU.
    ///
    /// A packet that is being counted at this moment may be lost or survive; use it only for
    /// elements that no packet is counted on.
    pub fn reset(&self, index: u32) -> io::Result<()> {
        let zeros = vec![0u8; Self::STRIDE * self.cpus];
        bpf::update(self.fd.as_fd(), &index.to_ne_bytes(), &zeros, 0)
    }
}

impl<V> AsFd for PerCpuArray<V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn out_of_range(index: u32, len: u32) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("element {index} of an array of {len}"),
    )
}

/// An array that lies in the memory of this process and of the kernel at once.
///
/// All accesses are by whole 64-bit words, each atomic, since the program may read or write the
/// same element at the same time. A record of several words is not atomic as a whole; where that
/// matters, publish it with [`SharedArray::atomic_u64`].
#[derive(Debug)]
pub struct SharedArray<T> {
    fd: OwnedFd,
    words: NonNull<AtomicU64>,
    bytes: usize,
    len: u32,
    types: PhantomData<T>,
}

// SAFETY: the mapping stays where it is until the drop, and every access to it is atomic.
unsafe impl<T: Send> Send for SharedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for SharedArray<T> {}

impl<T: Pod> SharedArray<T> {
    /// Words of one element: the kernel rounds values up to eight bytes.
    const STRIDE: usize = size_of::<T>().div_ceil(8);

    /// Maps `fd`, an array made with `BPF_F_MMAPABLE`, if its values have the right size.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let info = checked::<u32, T>(&fd)?;
        if info.kind != bpf::bpf_map_type::BPF_MAP_TYPE_ARRAY as u32 {
            let problem = format!("a map of type {} where an array is expected", info.kind);
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        let bytes = info.max_entries as usize * Self::STRIDE * 8;
        let words = map_words(fd.as_fd(), 0, bytes)?;
        Ok(Self {
            fd,
            words,
            bytes,
            len: info.max_entries,
            types: PhantomData,
        })
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Always `false`: the kernel makes no array without elements.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The words of element `index`.
    ///
    /// # Panics
    /// If there is no such element, as a slice would.
    fn element(&self, index: u32) -> &[AtomicU64] {
        assert!(
            index < self.len,
            "element {index} of an array of {}",
            self.len
        );
        // SAFETY: `from_fd` mapped `len` elements of `STRIDE` words, page-aligned, and `index`
        // is below `len`. Others change the words only while we look at them atomically.
        unsafe {
            let first = self.words.add(index as usize * Self::STRIDE);
            std::slice::from_raw_parts(first.as_ptr(), Self::STRIDE)
        }
    }

    /// Reads element `index`.
    ///
    /// # Panics
    /// If there is no such element.
    #[must_use]
    pub fn read(&self, index: u32) -> T {
        let mut value = T::zeroed();
        let words = self.element(index);
        for (bytes, word) in bytemuck::bytes_of_mut(&mut value).chunks_mut(8).zip(words) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes()[..bytes.len()]);
        }
        value
    }

    /// Writes element `index`. Nothing written before can be seen later than this.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn store(&self, index: u32, value: T) {
        fence(Ordering::Release);
        for (bytes, word) in bytemuck::bytes_of(&value)
            .chunks(8)
            .zip(self.element(index))
        {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(padded), Ordering::Relaxed);
        }
    }

    /// Writes `values` to the elements from `start` on.
    ///
    /// # Panics
    /// If there are not that many elements.
    pub fn write_slice(&self, start: u32, values: &[T]) {
        for (index, value) in (start..).zip(values) {
            self.store(index, *value);
        }
    }

    /// The 64-bit word at byte `offset` of element `index`.
    ///
    /// # Panics
    /// If there is no such element, or no word begins there.
    #[must_use]
    pub fn atomic_u64(&self, index: u32, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "no word begins at byte {offset}");
        &self.element(index)[offset / 8]
    }
}

impl<T> AsFd for SharedArray<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<T> Drop for SharedArray<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping of `from_fd`; references into it borrow `self` and have ended.
        unsafe {
            libc::munmap(self.words.as_ptr().cast(), self.bytes);
        }
    }
}

/// Maps a piece of an array made with `BPF_F_MMAPABLE`; whoever asks for it unmaps it. `offset` is a
/// whole number of pages.
pub(super) fn map_words(
    fd: BorrowedFd<'_>,
    offset: usize,
    bytes: usize,
) -> io::Result<NonNull<AtomicU64>> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            offset,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(io::Error::last_os_error)
}

/// Whether every byte of `value` is zero.
pub(super) fn is_zero<T: Pod>(value: &T) -> bool {
    bytemuck::bytes_of(value).iter().all(|b| *b == 0)
}

/// Value of map `redirects`: the kernel's `struct bpf_devmap_val`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Redirect {
    /// The interface to send on.
    pub ifindex: u32,
    /// Written: descriptor of a program to run before sending, 0 for none. Read: its number.
    pub program: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(count_cpus("0"), Some(1));
        assert_eq!(count_cpus("0-127"), Some(128));
        assert_eq!(count_cpus("0-1,4-7,9"), Some(7));
        assert_eq!(count_cpus(""), None);
        assert_eq!(count_cpus("0-x"), None);
    }
}
