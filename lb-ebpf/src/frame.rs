//! The frame in memory: the only place with packet-pointer arithmetic.

use crate::bounds;
use aya_ebpf::{bindings::xdp_md, helpers::generated::bpf_xdp_get_buff_len};
use lb_common::addr::Address;

/// The bytes of a packet between the context's `data` and `data_end`.
pub struct Frame {
    /// The context, for helpers.
    pub ctx: *mut xdp_md,
    data: usize,
    end: usize,
}

/// A place in the frame; offsets from it must have been checked with [`Frame::check`].
#[derive(Clone, Copy)]
pub struct Cursor(usize);

impl Frame {
    /// The frame as it is now. To be taken anew after a helper has moved its ends.
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Self {
        // SAFETY: the kernel passes a valid context for as long as the program runs.
        let (data, end) = unsafe { ((*ctx).data as usize, (*ctx).data_end as usize) };
        Self { ctx, data, end }
    }

    /// The first byte, if at least `len` follow.
    #[inline(always)]
    pub fn start(&self, len: usize) -> Option<Cursor> {
        self.check(Cursor(self.data), len)
    }

    /// `cursor`, if at least `len` bytes of the frame follow it.
    #[inline(always)]
    pub fn check(&self, cursor: Cursor, len: usize) -> Option<Cursor> {
        (cursor.0 + len <= self.end).then_some(cursor)
    }

    /// `cursor`, if it lies within `limit` bytes of the start, with nothing said of where: what the
    /// verifier has learned on several ways to it becomes the same, and it goes on with one of them.
    #[inline(always)]
    pub fn anywhere(&self, cursor: Cursor, limit: u32) -> Option<Cursor> {
        let offset = bounds::within(self.offset(cursor) as u32, 0, limit)?;
        Some(Cursor(self.data + offset as usize))
    }

    /// Bytes from `cursor` to the end of what direct access reaches.
    #[inline(always)]
    pub fn reach(&self, cursor: Cursor) -> usize {
        self.end.wrapping_sub(cursor.0)
    }

    /// Bytes of the packet.
    ///
    /// A large one continues in pages that direct access does not reach; the helper counts those
    /// too. Off the way of most packets.
    #[inline(always)]
    pub fn len(&self) -> usize {
        // SAFETY: a valid context.
        unsafe { bpf_xdp_get_buff_len(self.ctx) as usize }
    }

    /// Whether at least `len` bytes of the packet follow `cursor`, within direct reach or not.
    #[inline(always)]
    pub fn holds(&self, cursor: Cursor, len: usize) -> bool {
        len <= self.reach(cursor) || self.offset(cursor) + len <= self.len()
    }

    /// Bytes from the start of the frame to `cursor`.
    #[inline(always)]
    pub fn offset(&self, cursor: Cursor) -> usize {
        bounds::whole(cursor.0.wrapping_sub(self.data))
    }

    /// The interface the packet came from.
    #[inline(always)]
    pub fn ingress(&self) -> u32 {
        // SAFETY: as in `new`.
        unsafe { (*self.ctx).ingress_ifindex }
    }
}

/// An Ethernet address in two registers; as an array the compiler would copy it byte by byte.
#[derive(Clone, Copy)]
pub struct Mac {
    /// Its first four bytes, as they stand in the frame.
    pub head: u32,
    /// Its last two.
    pub tail: u16,
}

impl Cursor {
    /// The place `bytes` further on; nothing there is checked yet.
    #[inline(always)]
    pub const fn skip(self, bytes: usize) -> Self {
        Self(self.0 + bytes)
    }

    /// Reads a value at `offset`.
    #[inline(always)]
    pub fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the verifier proves that the bytes lie in the frame, or refuses the program.
        unsafe { ((self.0 + offset) as *const T).read_unaligned() }
    }

    /// Writes a value at `offset`.
    #[inline(always)]
    pub fn write<T: Copy>(self, offset: usize, value: T) {
        // SAFETY: as in `read`.
        unsafe { ((self.0 + offset) as *mut T).write_unaligned(value) }
    }

    /// Reads the Ethernet address at `offset`.
    #[inline(always)]
    pub fn read_mac(self, offset: usize) -> Mac {
        Mac {
            head: self.read(offset),
            tail: self.read(offset + 4),
        }
    }

    /// Writes an Ethernet address at `offset`.
    #[inline(always)]
    pub fn write_mac(self, offset: usize, mac: Mac) {
        self.write(offset, mac.head);
        self.write(offset + 4, mac.tail);
    }

    /// Writes three words at `offset`.
    #[inline(always)]
    pub fn write_words(self, offset: usize, words: &[u32; 3]) {
        let first = words.as_ptr();
        for i in 0..3 {
            // SAFETY: one of the three words. Volatile, or the compiler would make one call of
            // the three copies.
            self.write(offset + 4 * i, unsafe { first.add(i).read_volatile() });
        }
    }

    /// Reads an IP address at `offset`.
    #[inline(always)]
    pub fn read_address<A: Address>(self, offset: usize) -> A {
        let mut words = [0; 4];
        let mut i = 0;
        while i < A::WORDS {
            words[i] = self.read(offset + 4 * i);
            i += 1;
        }
        A::narrow(&words)
    }

    /// Writes an IP address at `offset`.
    #[inline(always)]
    pub fn write_address<A: Address>(self, offset: usize, address: A) {
        let words = address.widen();
        let mut i = 0;
        while i < A::WORDS {
            self.write(offset + 4 * i, words[i]);
            i += 1;
        }
    }
}
