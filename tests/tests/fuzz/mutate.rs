//! Changes to frames: blind ones, and ones that know where things stand.

use sluice_tests::packet::VIP;

/// A stream of numbers that a seed repeats: splitmix64 (Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    /// A stream of its own for each seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Longest frame.
const MAX: usize = 400;
/// Shortest that the kernel runs a program on: an Ethernet header.
const MIN: usize = 14;

const BYTES: [u8; 18] = [
    0, 1, 2, 4, 5, 6, 7, 8, 0x0f, 0x10, 0x11, 0x28, 0x2b, 0x2c, 0x3c, 0x7f, 0x80, 0xff,
];
const WORDS: [u16; 13] = [
    0, 1, 7, 8, 19, 20, 21, 40, 80, 0x2000, 0x7fff, 0x8000, 0xffff,
];

/// Where a frame's headers begin, as far as it has any.
struct Places {
    ip: usize,
    v4: bool,
    transport: usize,
}

fn places(frame: &[u8]) -> Option<Places> {
    let mut ip = 14;
    let ethertype = |at: usize| Some([*frame.get(at - 2)?, *frame.get(at - 1)?]);
    while matches!(ethertype(ip)?, [0x81, 0] | [0x88, 0xa8]) {
        ip += 4;
    }
    let v4 = match ethertype(ip)? {
        [8, 0] => true,
        [0x86, 0xdd] => false,
        _ => return None,
    };
    let transport = match v4 {
        true => ip + usize::from(frame.get(ip)? & 15) * 4,
        false => ip + 40,
    };
    Some(Places { ip, v4, transport })
}

/// A frame made from `frame`, sometimes with a piece of `other`.
pub fn mutate(random: &mut Random, frame: &[u8], other: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for _ in 0..=random.below(4) {
        change(random, &mut frame, other);
        frame.truncate(MAX);
        if frame.len() < MIN {
            frame.resize(MIN, 0);
        }
    }
    frame
}

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(there) = frame.get_mut(at..at + bytes.len()) {
        there.copy_from_slice(bytes);
    }
}

fn change(random: &mut Random, frame: &mut Vec<u8>, other: &[u8]) {
    let len = frame.len();
    let at = random.below(len);
    match random.below(16) {
        0 => frame[at] ^= 1 << random.below(8),
        1 => frame[at] = random.byte(),
        2 => frame[at] = random.pick(&BYTES),
        3 => put(frame, at, &random.pick(&WORDS).to_be_bytes()),
        4 => frame.truncate(at),
        5 => frame.extend(std::iter::repeat_n(0, random.below(16))),
        6 => {
            let end = (at + random.below(24)).min(len);
            frame.drain(at..end);
        }
        7 => {
            let end = (at + random.below(24)).min(len);
            let piece = frame[at..end].to_vec();
            frame.splice(at..at, piece);
        }
        8 => {
            let from = at.min(other.len());
            frame.truncate(from);
            frame.extend(&other[from..]);
        }
        9 => {
            let tag = random.pick(&[[0x81, 0], [0x88, 0xa8]]);
            let tci = [random.byte(), random.byte()];
            frame.splice(12..12, [tag[0], tag[1], tci[0], tci[1]]);
        }
        _ => {
            if let Some(places) = places(frame) {
                aim(random, frame, &places);
            }
        }
    }
}

/// Changes a field.
fn aim(random: &mut Random, frame: &mut Vec<u8>, places: &Places) {
    let Places { ip, v4, transport } = *places;
    let rest = frame.len().saturating_sub(ip);
    match (random.below(12), v4) {
        // The length that there is, or one beside it: what else a frame says is then looked at.
        (0..3, true) => {
            let len = (rest + random.pick(&[0, 0, 0, 1, 2])).saturating_sub(1);
            put(frame, ip + 2, &(len as u16).to_be_bytes());
        }
        (0..3, false) => {
            let len = (rest + random.pick(&[0, 0, 0, 1, 2])).saturating_sub(41);
            put(frame, ip + 4, &(len as u16).to_be_bytes());
        }
        (3, true) => put(frame, ip + 16, &VIP.v4.octets()),
        (3, false) => put(frame, ip + 24, &VIP.v6.octets()),
        (4, true) => put(frame, ip, &[0x40 | random.byte() & 15]),
        (5, true) => {
            let flags = random.pick(&[0x2000_u16, 0x4000, 0x8000, 1, 0x1fff, 0x3fff]);
            put(frame, ip + 6, &flags.to_be_bytes());
        }
        (6, _) => {
            let protocol = random.pick(&[6, 17, 1, 58, 0, 43, 44, 60, 4, 41, 59]);
            put(frame, ip + if v4 { 9 } else { 6 }, &[protocol]);
        }
        // Another extension header in front, which says of itself what it likes.
        (4 | 5, false) => {
            let number = random.pick(&[0, 43, 44, 60]);
            if let Some(next) = frame.get(ip + 6).copied() {
                let length = random.pick(&[0, 0, 0, 1, 2]);
                let mut header = vec![0; (length + 1) * 8];
                (header[0], header[1]) = (next, length as u8);
                if number == 44 {
                    header[3] = random.pick(&[0, 1, 8, 9]);
                }
                let at = (ip + 40).min(frame.len());
                frame.splice(at..at, header);
                frame[ip + 6] = number;
                let len = frame.len().saturating_sub(ip + 40) as u16;
                put(frame, ip + 4, &len.to_be_bytes());
            }
        }
        (7, _) => put(frame, transport + 2, &super::judge::PORT.to_be_bytes()),
        (8, _) => put(frame, transport + 12, &[random.byte() & 0xf0]),
        (9, _) => put(frame, transport + 13, &[random.byte()]),
        (10, _) => {
            let len = random.pick(&[0, 7, 8, 9, rest as u16]);
            put(frame, transport + 4, &len.to_be_bytes());
        }
        _ => put(frame, transport + 2, &random.pick(&WORDS).to_be_bytes()),
    }
}
