//! The pin directory: who may use it, what is in it, and whether it is ours.

use super::{
    bpf::{self, bpf_map_type},
    local,
    maps::NAMES,
    tcx::Direction,
};
use crate::config::Limits;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya_obj::generated::{BPF_F_NO_COMMON_LRU, BPF_F_RDONLY_PROG};
use lb_common::{
    abi::{ABI_VERSION, MAGIC},
    flow_table,
};
use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

/// Where the kernel makes room for the BPF file system.
const BPF_MOUNT: &str = "/sys/fs/bpf";

/// Name of the pin of the balancer's program.
pub(super) const PROGRAM_PIN: &str = "prog_sluice_xdp";
/// Under this name a new program is pinned before it takes the place of the old one.
pub(super) const NEW_PROGRAM_PIN: &str = "prog_sluice_xdp_new";

/// The pin of the link on interface `name`.
///
/// A BPF file system refuses dots in names, and interfaces of VLANs have them. No interface has a
/// colon.
pub(super) fn link_pin(name: &str) -> String {
    format!("link_{}", name.replace('.', ":"))
}

/// The inverse of [`link_pin`].
fn linked_interface(pin: &str) -> Option<String> {
    Some(pin.strip_prefix("link_")?.replace(':', "."))
}

/// The pin of a TCX program's link on interface `name`.
pub(super) fn tcx_pin(direction: Direction, name: &str) -> String {
    format!("{}_{}", direction.name(), name.replace('.', ":"))
}

/// The inverse of [`tcx_pin`].
fn tcx_interface(pin: &str) -> Option<(Direction, String)> {
    let (direction, name) = pin.split_once('_')?;
    let direction = Direction::ALL
        .into_iter()
        .find(|known| known.name() == direction)?;
    Some((direction, name.replace(':', ".")))
}

/// The pin of the link of the program at `hook` of a cgroup.
pub(super) fn cgroup_pin(hook: &str) -> String {
    format!("cgroup_{hook}")
}

/// The pin directory, locked: no other daemon uses it while this value lives.
#[derive(Debug)]
pub(super) struct PinDir {
    path: PathBuf,
    /// The kernel drops the lock with the last descriptor, also when the process is killed.
    lock: File,
}

impl Drop for PinDir {
    /// Unlocks at once. A child that was just forked and has not yet become another program would
    /// hold the lock through its copy of the descriptor.
    fn drop(&mut self) {
        // SAFETY: a plain system call on a descriptor that we hold.
        unsafe { libc::flock(self.lock.as_raw_fd(), libc::LOCK_UN) };
    }
}

/// What is pinned in a directory.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Maps of ours that are there.
    pub maps: Vec<&'static str>,
    /// Interfaces that links are named after.
    pub links: Vec<String>,
    /// Interfaces that links of the TCX programs are named after.
    pub tcx: Vec<(Direction, String)>,
    /// Hooks of a cgroup that links are named after.
    pub cgroup: Vec<String>,
    /// Programs.
    pub programs: Vec<String>,
}

impl PinDir {
    /// Makes the directory if need be, and locks it.
    pub fn open(path: &Path) -> Result<Self> {
        check_file_system(path)?;
        loop {
            if !path.exists() {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(path)
                    .with_context(|| format!("pin_path {}: cannot be made", path.display()))?;
            }
            if let Some(lock) = lock(path)? {
                return Ok(Self {
                    path: path.to_owned(),
                    lock,
                });
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in the directory. Anything that is not ours is an error.
    pub fn contents(&self) -> Result<Contents> {
        let dir = self.path.display();
        let mut contents = Contents::default();
        for entry in fs::read_dir(&self.path).with_context(|| format!("pin_path {dir}"))? {
            let name = entry
                .with_context(|| format!("pin_path {dir}"))?
                .file_name();
            let name = name.to_string_lossy();
            if let Some(known) = NAMES.iter().find(|known| **known == name) {
                contents.maps.push(known);
            } else if let Some(interface) = linked_interface(&name) {
                contents.links.push(interface);
            } else if let Some(found) = tcx_interface(&name) {
                contents.tcx.push(found);
            } else if let Some(hook) = name.strip_prefix("cgroup_").filter(|h| local::is_hook(h)) {
                contents.cgroup.push(hook.to_owned());
            } else if name == PROGRAM_PIN || name == NEW_PROGRAM_PIN {
                contents.programs.push(name.into_owned());
            } else {
                bail!(
                    "pin_path {dir}: \"{name}\" in it is not Sluice's; choose another pin_path, \
                     or remove it"
                );
            }
        }
        contents.links.sort();
        Ok(contents)
    }

    /// Opens the pinned link of `interface`, with what the kernel says of it.
    pub fn open_link(&self, interface: &str) -> Result<(OwnedFd, bpf::XdpLinkInfo)> {
        let path = self.path.join(link_pin(interface));
        let fd = bpf::open_pin(&path).with_context(|| path.display().to_string())?;
        let info = bpf::xdp_link_info(fd.as_fd()).ok().flatten();
        let info = info.ok_or_else(|| anyhow!("{}: not an XDP link; remove it", path.display()))?;
        Ok((fd, info))
    }

    /// Removes a pin; that it is not there is no error.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| path.display().to_string())
            }
            _ => Ok(()),
        }
    }

    /// Opens the pinned map `name` and compares it with what the object asks for.
    fn open_map(&self, name: &str, expected: &Layout) -> Result<(OwnedFd, bpf::MapInfo)> {
        let path = self.path.join(name);
        let remedy = "another version's or not Sluice's; \"sluice detach\" removes it";
        let fd = bpf::open_pin(&path).with_context(|| path.display().to_string())?;
        let kind = bpf::object_kind(fd.as_fd())?;
        ensure!(
            kind == "bpf-map",
            "{}: a {kind} where a map is expected: {remedy}",
            path.display()
        );
        let info = bpf::map_info(fd.as_fd()).with_context(|| path.display().to_string())?;
        let differences: Vec<String> = [
            ("type", info.kind, expected.kind),
            ("key size", info.key_size, expected.key_size),
            ("value size", info.value_size, expected.value_size),
            ("flags", info.flags, expected.flags),
        ]
        .iter()
        .filter(|(_, is, should)| is != should)
        .map(|(what, is, should)| format!("{what} is {is}, not {should}"))
        .collect();
        ensure!(
            differences.is_empty(),
            "{}: {}: {remedy}",
            path.display(),
            differences.join(", ")
        );
        Ok((fd, info))
    }

    /// Removes what a daemon left that died before it had pinned everything. `settings` is pinned
    /// last of all maps, so a set with it is whole.
    pub fn remove_incomplete(
        &self,
        contents: &Contents,
        layouts: &BTreeMap<&'static str, Layout>,
    ) -> Result<()> {
        if let Some(link) = contents.links.first() {
            bail!(
                "pin_path {}: a link to {link} but no map \"settings\": somebody removed pins; \
                 \"sluice detach\" removes the rest",
                self.path.display()
            );
        }
        for name in &contents.maps {
            // A map of the same name with another layout was not left by us.
            self.open_map(name, &layouts[name])?;
        }
        for name in &contents.maps {
            self.remove(name)?;
        }
        for name in &contents.programs {
            self.remove(name)?;
        }
        Ok(())
    }

    /// Checks that the pinned maps are those this program would make, before any is used: the
    /// kernel would let a program use a map with another layout, and corrupt memory.
    pub fn verify(
        &self,
        contents: &Contents,
        layouts: &BTreeMap<&'static str, Layout>,
        limits: &Limits,
    ) -> Result<()> {
        let dir = self.path.display();
        verify_abi(&self.path)?;
        for name in NAMES {
            ensure!(
                contents.maps.contains(name),
                "pin_path {dir}: map \"{name}\" is missing; \"sluice detach\" removes the rest"
            );
            let expected = &layouts[name];
            let (_fd, info) = self.open_map(name, expected)?;
            if info.max_entries != expected.max_entries {
                let (is, should) = (info.max_entries, expected.max_entries);
                let Some((limit, _)) = limit_of(name) else {
                    bail!(
                        "{dir}/{name}: has {is} entries, not {should}: another version's; \
                         \"sluice detach\" removes it"
                    );
                };
                bail!(
                    "limits.{limit} is {} but the running map {name} was made for {}: maps keep \
                     their size; put it back, or run \"sluice detach\" (which ends all flows) and \
                     start again",
                    limit_value(limits, limit),
                    limit_for(name, is),
                );
            }
        }
        Ok(())
    }
}

/// Checks the mark and the ABI version in the pinned map `settings`, which stand first in it
/// whatever its layout.
pub(super) fn verify_abi(dir: &Path) -> Result<()> {
    let path = dir.join("settings");
    let foreign = || {
        anyhow!(
            "{}: not Sluice's; choose another pin_path, or remove it",
            path.display()
        )
    };
    let fd = bpf::open_pin(&path).with_context(|| path.display().to_string())?;
    ensure!(bpf::object_kind(fd.as_fd())? == "bpf-map", foreign());
    let info = bpf::map_info(fd.as_fd()).with_context(|| path.display().to_string())?;
    let is_array = info.kind == bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    ensure!(is_array && info.value_size >= 16, foreign());
    let mut value = vec![0; info.value_size.next_multiple_of(8) as usize];
    bpf::lookup(fd.as_fd(), &0u32.to_ne_bytes(), &mut value)
        .with_context(|| path.display().to_string())?;
    let magic: u64 = bytemuck::pod_read_unaligned(&value[..8]);
    let version: u32 = bytemuck::pod_read_unaligned(&value[8..12]);
    ensure!(magic == MAGIC, foreign());
    ensure!(
        version == ABI_VERSION,
        "pin_path {}: the running data plane has ABI version {version}, this program has \
         {ABI_VERSION}; start the version that made it, or run \"sluice detach\" (which ends all \
         flows) and start again",
        dir.display()
    );
    Ok(())
}

/// Removes the pins in `path`, and with them every program, link and map of this data plane.
/// Returns what was removed: nothing if nothing was there.
///
/// Refused while a daemon holds the directory.
pub fn detach(path: &Path) -> Result<Vec<String>> {
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("pin_path {}", path.display())),
        Ok(_) => {}
    }
    ensure!(
        is_bpf_fs(path)?,
        "pin_path {} is not on a BPF file system: nothing of Sluice's can be there",
        path.display()
    );
    let Some(lock) = lock(path)? else {
        return Ok(Vec::new()); // somebody else has just removed it
    };
    let dir = PinDir {
        path: path.to_owned(),
        lock,
    };
    let contents = dir.contents()?;
    let mut removed = Vec::new();
    for interface in &contents.links {
        // Somebody may hold the link open; without this it would stay until they let go. A link
        // whose interface is gone cannot be detached, which is as good.
        if let Ok(fd) = bpf::open_pin(&path.join(link_pin(interface))) {
            let _ = bpf::link_detach(fd.as_fd());
        }
        dir.remove(&link_pin(interface))?;
        removed.push(format!("link on {interface}"));
    }
    for (direction, interface) in &contents.tcx {
        let pin = tcx_pin(*direction, interface);
        if let Ok(fd) = bpf::open_pin(&path.join(&pin)) {
            let _ = bpf::link_detach(fd.as_fd());
        }
        dir.remove(&pin)?;
        removed.push(format!("{} link on {interface}", direction.name()));
    }
    for hook in &contents.cgroup {
        let pin = cgroup_pin(hook);
        if let Ok(fd) = bpf::open_pin(&path.join(&pin)) {
            let _ = bpf::link_detach(fd.as_fd());
        }
        dir.remove(&pin)?;
        removed.push(format!("cgroup link at {hook}"));
    }
    for name in &contents.programs {
        dir.remove(name)?;
        removed.push(format!("program {}", name.trim_start_matches("prog_")));
    }
    // `settings` first: what remains after a crash in here is an incomplete set, not a bad one.
    let settings = contents.maps.iter().filter(|name| **name == "settings");
    let others = contents.maps.iter().filter(|name| **name != "settings");
    for name in settings.chain(others) {
        dir.remove(name)?;
        removed.push(format!("map {name}"));
    }
    fs::remove_dir(path).with_context(|| format!("pin_path {}", path.display()))?;
    Ok(removed)
}

/// Locks the directory `path`; `None` if it has been removed in the meantime.
fn lock(path: &Path) -> Result<Option<File>> {
    let name = path.display();
    let dir = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(|| format!("pin_path {name}"))?,
    };
    let ours = dir.metadata().with_context(|| format!("pin_path {name}"))?;
    ensure!(ours.is_dir(), "pin_path {name} is not a directory");
    // SAFETY: a plain system call on a descriptor that we hold.
    if unsafe { libc::flock(dir.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(error).with_context(|| format!("pin_path {name}: cannot be locked"));
        }
        let pid = lock_holder(ours.dev(), ours.ino())
            .map(|pid| format!(" (process {pid})"))
            .unwrap_or_default();
        bail!("another daemon{pid} holds {name}; \"sluice stop\" stops it");
    }
    // Between opening and locking, the one who held it may have removed the directory.
    let current = fs::metadata(path).map(|now| (now.dev(), now.ino())).ok();
    Ok((current == Some((ours.dev(), ours.ino()))).then_some(dir))
}

/// The process that holds the lock on a file, as /proc/locks tells, which is best effort.
fn lock_holder(dev: u64, inode: u64) -> Option<u32> {
    let file = format!("{:02x}:{:02x}:{inode}", libc::major(dev), libc::minor(dev));
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 1234 00:1c:5678 0 EOF"
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, _, pid, place, ..] if place == file => pid.parse().ok(),
            _ => None,
        }
    })
}

/// Checks that `path` is or can be a directory on a BPF file system; mounts one at the usual
/// place if there is none yet.
pub(super) fn check_file_system(path: &Path) -> Result<()> {
    let name = path.display();
    let existing = path
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .ok_or_else(|| anyhow!("pin_path {name}: no such directory"))?;
    if !is_bpf_fs(existing)? && existing == Path::new(BPF_MOUNT) {
        // SAFETY: all arguments are C strings that live over the call.
        let result = unsafe {
            libc::mount(
                c"bpf".as_ptr(),
                c"/sys/fs/bpf".as_ptr(),
                c"bpf".as_ptr(),
                0,
                c"mode=0700".as_ptr().cast(),
            )
        };
        if result != 0 {
            let error = io::Error::last_os_error();
            bail!(
                "pin_path {name}: no BPF file system, and mounting one failed ({error}); run \
                 \"mount -t bpf bpf {BPF_MOUNT}\""
            );
        }
    }
    ensure!(
        is_bpf_fs(existing)?,
        "pin_path {name} is not on a BPF file system; choose a directory below {BPF_MOUNT}, or \
         run \"mount -t bpf bpf {}\"",
        path.parent().unwrap_or(path).display()
    );
    let new = path.strip_prefix(existing).unwrap_or(path);
    ensure!(
        !new.as_os_str().as_bytes().contains(&b'.'),
        "pin_path {name}: a BPF file system allows no dots in names; choose another"
    );
    Ok(())
}

fn is_bpf_fs(path: &Path) -> Result<bool> {
    let c_path = CString::new(path.as_os_str().as_bytes())
        .with_context(|| format!("pin_path {}", path.display()))?;
    // SAFETY: statfs is integers only, and the kernel fills it; the path is a C string.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        if libc::statfs(c_path.as_ptr(), &raw mut stat) != 0 {
            let error = io::Error::last_os_error();
            return Err(error).with_context(|| format!("pin_path {}", path.display()));
        }
        Ok(stat.f_type == libc::BPF_FS_MAGIC)
    }
}

/// What a map must be like to be used by our program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

impl Layout {
    /// The layout of map `name` as the object defines it and `limits` size it, in the kernel's
    /// words.
    pub fn new(name: &str, map: &aya_obj::Map, limits: &Limits) -> Result<Self> {
        let mut layout = Self {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: max_entries(name, limits).unwrap_or(map.max_entries()),
            flags: map.map_flags(),
        };
        // The kernel adds this flag itself: kernel/bpf/devmap.c, dev_map_init_map.
        if layout.kind == bpf_map_type::BPF_MAP_TYPE_DEVMAP_HASH as u32 {
            layout.flags |= BPF_F_RDONLY_PROG;
        }
        // A list for each CPU, all of one length: kernel/bpf/hashtab.c, htab_map_alloc.
        if layout.flags & BPF_F_NO_COMMON_LRU != 0 {
            let cpus = u32::try_from(super::map::possible_cpus()?)?;
            layout.max_entries = layout.max_entries.next_multiple_of(cpus);
        }
        Ok(layout)
    }
}

/// The key of `[limits]` that sizes map `name`, and how many more entries than that it has, unless
/// [`max_entries`] knows better.
///
/// Number 0 is never used where a map is indexed by number, hence one more there.
fn limit_of(name: &str) -> Option<(&'static str, u32)> {
    match name {
        "vips4" | "vips6" => Some(("services", 0)),
        "services4" | "services6" => Some(("listeners", 0)),
        "services" | "gateways" | "cursors" | "service_stats" => Some(("services", 1)),
        "backends" | "backend_load" | "backend_stats" | "probe_targets" => Some(("backends", 1)),
        "slots" => Some(("slots", 0)),
        "flows4" | "flows6" | "flow_sets4" | "flow_sets6" => Some(("flows", 0)),
        "opening4" | "opening6" => Some(("opening", 0)),
        "fragments4" | "fragments6" => Some(("fragments", 0)),
        "affinity4" | "affinity6" | "sources4" | "sources6" => Some(("clients", 0)),
        "access4" | "access6" => Some(("prefixes", 0)),
        _ => None,
    }
}

fn limit_value(limits: &Limits, limit: &str) -> u32 {
    match limit {
        "services" => limits.services,
        "listeners" => limits.listeners,
        "backends" => limits.backends,
        "slots" => limits.slots,
        "opening" => limits.opening,
        "fragments" => limits.fragments,
        "clients" => limits.clients,
        "prefixes" => limits.prefixes,
        _ => limits.flows,
    }
}

/// The size of map `name` under `limits`, if they say one.
pub(super) fn max_entries(name: &str, limits: &Limits) -> Option<u32> {
    let (limit, extra) = limit_of(name)?;
    let sets = flow_table::sets(limits.flows);
    Some(match name {
        "flows4" | "flows6" => sets.saturating_mul(flow_table::WAYS),
        "flow_sets4" | "flow_sets6" => sets,
        _ => limit_value(limits, limit).saturating_add(extra),
    })
}

/// The limit under which map `name` would have so many entries.
fn limit_for(name: &str, entries: u32) -> u32 {
    match name {
        "flows4" | "flows6" => flow_table::flows(entries / flow_table::WAYS),
        "flow_sets4" | "flow_sets6" => flow_table::flows(entries),
        _ => entries.saturating_sub(limit_of(name).map_or(0, |(_, extra)| extra)),
    }
}

/// The limit to lower when map `name` cannot be made.
pub(super) fn limit_name(name: &str) -> Option<&'static str> {
    limit_of(name).map(|(limit, _)| limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_pins_survive_the_round_trip() {
        for name in ["eth0", "bond0.100", "br-lan", "a.b.c"] {
            let pin = link_pin(name);
            assert!(!pin.contains('.'), "{pin}");
            assert_eq!(linked_interface(&pin).as_deref(), Some(name));
        }
        assert_eq!(linked_interface("settings"), None);
    }
}
