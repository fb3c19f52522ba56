//! Maps `services4` and `services6`: which service listens on a port.
//!
//! Hash tables of our own in arrays, a cache line a bucket, because the data plane looks something up
//! here with most packets: `docs/performance.md` has what that is worth. Only the daemon writes.

use super::map::SharedArray;
use bytemuck::{Pod, Zeroable};
use lb_common::{
    addr::Address,
    service::{Bucket4, Bucket6, Listener, Places, ServiceKey},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// An address family's buckets.
pub trait Bucketed: Address {
    /// An element of the map.
    type Bucket: Pod;

    /// The listeners of a bucket.
    fn listeners(bucket: &mut Self::Bucket) -> &mut [Listener<Self>];
}

impl Bucketed for u32 {
    type Bucket = Bucket4;

    fn listeners(bucket: &mut Bucket4) -> &mut [Listener<u32>] {
        &mut bucket.listeners
    }
}

impl Bucketed for [u32; 4] {
    type Bucket = Bucket6;

    fn listeners(bucket: &mut Bucket6) -> &mut [Listener<[u32; 4]>] {
        &mut bucket.listeners
    }
}

/// The listeners of one address family.
#[derive(Debug)]
pub struct Listeners<A: Bucketed>(SharedArray<A::Bucket>);

/// How many others one listener may push aside for its place.
const MOVES: usize = 4;

impl<A: Bucketed> Listeners<A> {
    /// Takes the map `fd`, if its elements are buckets.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(SharedArray::from_fd(fd)?))
    }

    /// Number of buckets; it has room for at least as many listeners.
    #[must_use]
    pub const fn buckets(&self) -> u32 {
        self.0.len()
    }

    /// The number of the service that listens on `key`.
    #[must_use]
    pub fn get(&self, key: &ServiceKey<A>) -> Option<u32> {
        let (bucket, place) = self.find(key)?;
        let mut bucket = self.0.read(bucket);
        Some(A::listeners(&mut bucket)[place].service)
    }

    /// Lets packets for `key` find a service, whoever found it before.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn insert(&self, key: &ServiceKey<A>, service: u32) -> io::Result<()> {
        let (bucket, place) = match self.find(key) {
            Some(found) => found,
            None => self.make_room(key).ok_or_else(|| {
                io::Error::new(io::ErrorKind::StorageFull, "both its buckets are full")
            })?,
        };
        // A packet sees the key with no service, or with its own.
        let listener = Listener {
            key: *key,
            ..Listener::zeroed()
        };
        let current = self.listener(bucket, place);
        if current.service == 0 {
            self.write(bucket, place, listener);
        }
        self.write(
            bucket,
            place,
            Listener {
                service,
                ..listener
            },
        );
        Ok(())
    }

    /// Nobody listens on `key` any more; `false` if nobody did.
    pub fn remove(&self, key: &ServiceKey<A>) -> bool {
        let Some((bucket, place)) = self.find(key) else {
            return false;
        };
        self.write(bucket, place, Listener::zeroed());
        true
    }

    /// Shows `f` every listener.
    pub fn each(&self, mut f: impl FnMut(&ServiceKey<A>, u32)) {
        for bucket in 0..self.buckets() {
            let mut bucket = self.0.read(bucket);
            for listener in A::listeners(&mut bucket) {
                if listener.service != 0 {
                    f(&listener.key, listener.service);
                }
            }
        }
    }

    /// Bucket of a key, and its place there.
    fn find(&self, key: &ServiceKey<A>) -> Option<(u32, usize)> {
        self.homes(key).into_iter().find_map(|bucket| {
            let is_it = |l: &Listener<A>| l.service != 0 && l.key == *key;
            Some((bucket, self.place(bucket, is_it)?))
        })
    }

    /// A free place for a key; others move aside for it.
    fn make_room(&self, key: &ServiceKey<A>) -> Option<(u32, usize)> {
        let mut path = Vec::new();
        if !self.path(key, &mut Vec::new(), &mut path) {
            return None;
        }
        // From the free place backwards. Each is in both places for a moment, so that it is
        // always found.
        for step in path.windows(2).rev() {
            let ((bucket, place), (to, free)) = (step[0], step[1]);
            let listener = self.listener(bucket, place);
            self.write(
                to,
                free,
                Listener {
                    service: 0,
                    ..listener
                },
            );
            self.write(to, free, listener);
            self.write(bucket, place, Listener::zeroed());
        }
        path.first().copied()
    }

    /// Finds places from one of the key's own to a free one, each of whose listeners can move to the
    /// next.
    fn path(&self, key: &ServiceKey<A>, seen: &mut Vec<u32>, path: &mut Vec<(u32, usize)>) -> bool {
        let homes = self.homes(key);
        for bucket in homes {
            if !seen.contains(&bucket)
                && let Some(place) = self.place(bucket, |l| l.service == 0)
            {
                path.push((bucket, place));
                return true;
            }
        }
        for bucket in homes {
            if path.len() >= MOVES || seen.contains(&bucket) {
                continue;
            }
            seen.push(bucket);
            let mut content = self.0.read(bucket);
            for (place, listener) in A::listeners(&mut content).iter().enumerate() {
                path.push((bucket, place));
                if self.path(&listener.key, seen, path) {
                    return true;
                }
                path.pop();
            }
        }
        false
    }

    fn homes(&self, key: &ServiceKey<A>) -> [u32; 2] {
        let places = Places::of(key);
        [places.first(self.buckets()), places.second(self.buckets())]
    }

    fn place(&self, bucket: u32, is_it: impl Fn(&Listener<A>) -> bool) -> Option<usize> {
        let mut bucket = self.0.read(bucket);
        A::listeners(&mut bucket).iter().position(is_it)
    }

    fn listener(&self, bucket: u32, place: usize) -> Listener<A> {
        A::listeners(&mut self.0.read(bucket))[place]
    }

    fn write(&self, bucket: u32, place: usize, listener: Listener<A>) {
        let mut content = self.0.read(bucket);
        A::listeners(&mut content)[place] = listener;
        self.0.store(bucket, content);
    }
}

impl<A: Bucketed> AsFd for Listeners<A> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Limits, dataplane::Dataplane};
    use proptest::test_runner::TestRunner;
    use std::collections::HashMap;

    fn dataplane(listeners: u32) -> Dataplane {
        let limits = Limits {
            flows: 64,
            services: 4,
            listeners,
            backends: 4,
            slots: 64,
            ..Limits::DEFAULT
        };
        Dataplane::load_unpinned(&limits, Zeroable::zeroed()).expect("root, and a kernel with XDP")
    }

    /// Does the same with the map and with one that is known to be right.
    fn check<A: Bucketed>(listeners: &Listeners<A>, vip: A, steps: &[(u16, u32)]) {
        let mut model = HashMap::new();
        for (port, service) in steps {
            let key = ServiceKey::new(vip, *port, 6);
            if *service == 0 {
                assert_eq!(listeners.remove(&key), model.remove(port).is_some());
            } else {
                listeners.insert(&key, *service).unwrap();
                model.insert(*port, *service);
            }
            assert_eq!(listeners.get(&key), model.get(port).copied());
        }
        let mut seen = HashMap::new();
        listeners.each(|key, service| assert_eq!(seen.insert(key.port, service), None));
        assert_eq!(seen, model);
        for port in model.into_keys() {
            assert!(listeners.remove(&ServiceKey::new(vip, port, 6)));
        }
    }

    #[test]
    fn all_that_is_put_in_is_found() {
        let maps = dataplane(256).maps;
        let steps = proptest::collection::vec((0_u16..256, 0_u32..4), 1..600);
        TestRunner::default()
            .run(&steps, |steps| {
                check(&maps.services4, 0x0a00_0001_u32, &steps);
                check(&maps.services6, [1, 2, 3, 4], &steps);
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn there_is_room_for_as_many_as_there_are_buckets() {
        let maps = dataplane(4096).maps;
        let v4 = |n: u32| ServiceKey::new(n % 7, n as u16, 6);
        let v6 = |n: u32| ServiceKey::new([n % 7, 2, 3, n], 80, 6);
        for n in 1..=4096 {
            maps.services4.insert(&v4(n), n).unwrap();
            maps.services6.insert(&v6(n), n).unwrap();
        }
        for n in 1..=4096 {
            assert_eq!(maps.services4.get(&v4(n)), Some(n));
            assert_eq!(maps.services6.get(&v6(n)), Some(n));
        }
    }
}
