//! Loading, adopting and attaching the data plane.

use super::{
    attach::{self, Attached},
    bpf,
    local::Local,
    maps::{Maps, NAMES},
    pins::{self, Contents, Layout, PinDir},
    tcx::{Direction, Tcx},
};
use crate::config::{AttachMode, Daemon, Limits};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Map, MapData, MapError},
    programs::{ProgramError, Xdp},
};
use lb_common::{
    abi::{ABI_VERSION, MAGIC, Settings},
    flow_table,
    local::LocalSettings,
    service::ClientLink,
};
use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// The kernel side, built with this program.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice.bpf.o"));

/// Name of the balancer's program in the object.
const PROGRAM: &str = "sluice_xdp";

/// The data plane in the kernel.
///
/// When this value goes, a pinned data plane stays and forwards on; one that is not pinned goes
/// with it.
#[derive(Debug)]
pub struct Dataplane {
    /// The maps.
    pub maps: Maps,
    program: OwnedFd,
    /// Links by the name of their interface.
    links: BTreeMap<String, OwnedFd>,
    /// The programs for the host's own packets.
    tcx: [Tcx; 2],
    /// The programs for clients on this host.
    local: Local,
    pins: Option<PinDir>,
    adopted: bool,
}

/// Why a veth gets generic mode.
const VETH_WITHOUT_XDP: &str =
    "it is a veth, and the other end, without an XDP program, takes nothing that the driver sends";

impl Dataplane {
    /// Brings up the data plane that `daemon` and `limits` describe: takes over what is pinned in
    /// `pin_path` if it is ours and of the same shape, or makes it anew.
    ///
    /// In a data plane that is taken over, links to interfaces that are not configured any more
    /// are removed, the others run this program's code from here on, and everything in the maps
    /// stays, including the seed of the port search. Of `settings` only what the operator
    /// configures is used; its mark and version are set here.
    pub fn open(daemon: &Daemon, limits: &Limits, settings: Settings) -> Result<Self> {
        check_capabilities()?;
        let object = Object::parse(limits)?;
        let pins = PinDir::open(&daemon.pin_path)?;
        let contents = pins.contents()?;
        if contents.maps.contains(&"settings") {
            pins.verify(&contents, &object.layouts, limits)?;
            Self::adopt(pins, &contents, &daemon.interfaces, limits, settings)
        } else {
            pins.remove_incomplete(&contents, &object.layouts)?;
            Self::create(pins, limits, settings)
        }
    }

    /// Loads a data plane that is not pinned, and goes with this value: for tests and
    /// measurements.
    pub fn load_unpinned(limits: &Limits, settings: Settings) -> Result<Self> {
        check_capabilities()?;
        Object::parse(limits)?;
        let Loaded {
            maps,
            program,
            tcx,
            local,
        } = load(limits, None)?;
        maps.settings.store(0, marked(settings, limits));
        Ok(Self {
            maps,
            program,
            links: BTreeMap::new(),
            tcx,
            local,
            pins: None,
            adopted: false,
        })
    }

    fn create(pins: PinDir, limits: &Limits, settings: Settings) -> Result<Self> {
        let Loaded {
            maps,
            program,
            tcx,
            local,
        } = load(limits, None)?;
        maps.settings.store(0, marked(settings, limits));
        let pin = |name: &str, fd: BorrowedFd<'_>| {
            let path = pins.path().join(name);
            bpf::pin(fd, &path).with_context(|| path.display().to_string())
        };
        let (settings, others): (Vec<_>, Vec<_>) = maps
            .fds()
            .into_iter()
            .partition(|(name, _)| *name == "settings");
        for (name, fd) in others {
            pin(name, fd)?;
        }
        pin(pins::PROGRAM_PIN, program.as_fd())?;
        // Last: with it the set is whole. See `PinDir::remove_incomplete`.
        for (name, fd) in settings {
            pin(name, fd)?;
        }
        Ok(Self {
            maps,
            program,
            links: BTreeMap::new(),
            tcx,
            local,
            pins: Some(pins),
            adopted: false,
        })
    }

    fn adopt(
        pins: PinDir,
        contents: &Contents,
        interfaces: &[String],
        limits: &Limits,
        settings: Settings,
    ) -> Result<Self> {
        // Everything that can be refused comes before the first change.
        let mut alive = Vec::new();
        for pin in &contents.links {
            let (fd, info) = pins.open_link(pin)?;
            if info.ifindex != 0 {
                attach::mode_of(pin, info)?;
                alive.push((pin, fd, info));
            }
        }
        let Loaded {
            maps,
            program,
            mut tcx,
            mut local,
        } = load(limits, Some(pins.path()))?;

        let seed = maps.settings.read(0).nat_port_seed;
        maps.settings.store(
            0,
            Settings {
                nat_port_seed: seed,
                ..marked(settings, limits)
            },
        );
        let mut links = BTreeMap::new();
        for (pin, fd, info) in alive {
            // The interface may have been given another name since.
            let name = attach::interface_name(info.ifindex).unwrap_or_else(|| pin.clone());
            if interfaces.contains(&name) {
                bpf::link_update(fd.as_fd(), program.as_fd()).with_context(|| {
                    format!("interface {name}: cannot replace the running program")
                })?;
                links.insert(name, fd);
            } else {
                bpf::link_detach(fd.as_fd())
                    .with_context(|| format!("interface {name}: cannot detach"))?;
            }
        }
        // Our descriptors keep the links while their pins are put under the right names.
        for pin in contents
            .links
            .iter()
            .filter(|pin| !links.contains_key(*pin))
        {
            pins.remove(&pins::link_pin(pin))?;
        }
        for (name, fd) in &links {
            let (pin, is_there) = (pins::link_pin(name), contents.links.contains(name));
            let path = pins.path().join(&pin);
            if is_there && pins.open_link(name)?.1 == link_info(name, fd)? {
                continue;
            }
            pins.remove(&pin)?;
            bpf::pin(fd.as_fd(), &path).with_context(|| path.display().to_string())?;
        }

        for tcx in &mut tcx {
            tcx.adopt(&pins, contents, interfaces)?;
        }
        local.adopt(&pins, contents)?;
        pins.remove(pins::NEW_PROGRAM_PIN)?;
        let new = pins.path().join(pins::NEW_PROGRAM_PIN);
        bpf::pin(program.as_fd(), &new).with_context(|| new.display().to_string())?;
        fs::rename(&new, pins.path().join(pins::PROGRAM_PIN))
            .with_context(|| new.display().to_string())?;
        Ok(Self {
            maps,
            program,
            links,
            tcx,
            local,
            pins: Some(pins),
            adopted: true,
        })
    }

    /// Whether an earlier daemon's data plane was taken over.
    #[must_use]
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// Attaches the program to interface `name`, or leaves it where it is if it is attached there
    /// as `wanted` asks.
    ///
    /// Anew, `Auto` takes generic mode on a veth whose other end has no XDP program: in the driver
    /// every packet sent there would be lost.
    pub fn attach(&mut self, name: &str, wanted: AttachMode) -> Result<Attached> {
        let ifindex = attach::interface_index(name)?;
        let mut before = None;
        if let Some(link) = self.links.get(name) {
            let info = link_info(name, link)?;
            // A link to an interface that went, or was renamed while another took its name, is no
            // use for the one that has the name now.
            if info.ifindex == ifindex {
                let mode = attach::mode_of(name, info)?;
                if mode.satisfies(wanted) {
                    return Ok(Attached {
                        interface: name.to_owned(),
                        ifindex,
                        mode,
                        fallback: None,
                    });
                }
                before = Some(mode);
            }
            // The kernel allows one mode at a time.
            self.detach_xdp(name)?;
        }
        // What cannot be found out is not held against the driver.
        let lost = attach::sends_into_the_void(ifindex).unwrap_or(false);
        let result = if lost && wanted == AttachMode::Auto {
            self.attach_new(name, ifindex, AttachMode::Generic)
                .map(|attached| Attached {
                    fallback: Some(VETH_WITHOUT_XDP.to_owned()),
                    ..attached
                })
        } else {
            self.attach_new(name, ifindex, wanted)
        };
        if result.is_err()
            && let Some(mode) = before
        {
            // Refused: forward on as before rather than not at all.
            let mode = match mode {
                attach::Mode::Driver => AttachMode::Driver,
                attach::Mode::Generic => AttachMode::Generic,
            };
            self.attach_new(name, ifindex, mode)?;
        }
        result
    }

    fn attach_new(&mut self, name: &str, ifindex: u32, wanted: AttachMode) -> Result<Attached> {
        let (link, attached) = attach::attach(self.program.as_fd(), name, ifindex, wanted)?;
        if let Some(pins) = &self.pins {
            let pin = pins::link_pin(name);
            pins.remove(&pin)?;
            let path = pins.path().join(pin);
            // On failure the link goes with its descriptor: nothing is attached that would vanish
            // with the daemon.
            bpf::pin(link.as_fd(), &path).with_context(|| path.display().to_string())?;
        }
        self.links.insert(name.to_owned(), link);
        Ok(attached)
    }

    /// Puts the program for the host's own packets of a direction on interface `name`, or takes it
    /// away; `false` if nothing had to be done.
    pub fn set_tcx(&mut self, direction: Direction, name: &str, wanted: bool) -> Result<bool> {
        self.tcx[direction as usize].set(name, wanted, self.pins.as_ref())
    }

    /// Makes `mark`, whose low [`TARGET_BITS`] are zero, the beginning of the mark of packets of
    /// health checks.
    ///
    /// [`TARGET_BITS`]: lb_common::probe::TARGET_BITS
    pub fn set_probe_mark(&self, mark: u32) {
        let settings = self.maps.local_settings.read(0);
        self.maps.local_settings.store(
            0,
            LocalSettings {
                probe_mark: mark,
                ..settings
            },
        );
    }

    /// Leads clients on this host to backends: puts the programs for them on the cgroup at `path`,
    /// or takes them away; `false` if nothing had to be done.
    ///
    /// Only sockets of this thread's network namespace are led.
    pub fn set_local(&mut self, path: Option<&Path>) -> Result<bool> {
        self.local.set(path, self.pins.as_ref(), &self.maps)
    }

    /// Detaches the program from interface `name`; `false` if it was not attached.
    pub fn detach(&mut self, name: &str) -> Result<bool> {
        for direction in Direction::ALL {
            self.set_tcx(direction, name, false)?;
        }
        self.detach_xdp(name)
    }

    fn detach_xdp(&mut self, name: &str) -> Result<bool> {
        let Some(link) = self.links.remove(name) else {
            return Ok(false);
        };
        if let Some(pins) = &self.pins {
            pins.remove(&pins::link_pin(name))?;
        }
        // Of a link whose interface is gone there is nothing to detach.
        if link_info(name, &link)?.ifindex != 0 {
            bpf::link_detach(link.as_fd())
                .with_context(|| format!("interface {name}: cannot detach"))?;
        }
        Ok(true)
    }

    /// Where the program is attached now, by name; interfaces that are gone are left out.
    pub fn interfaces(&self) -> Result<Vec<Attached>> {
        let mut attached = Vec::new();
        for (name, link) in &self.links {
            let info = link_info(name, link)?;
            if info.ifindex == 0 {
                continue;
            }
            attached.push(Attached {
                interface: name.clone(),
                ifindex: info.ifindex,
                mode: attach::mode_of(name, info)?,
                fallback: None,
            });
        }
        Ok(attached)
    }

    /// The place of an interface in map `links`, which is given one if it has none.
    ///
    /// # Errors
    ///
    /// When all places belong to interfaces that are there.
    pub fn link(&self, ifindex: u32, mac: [u8; 6]) -> Result<u32> {
        let links = &self.maps.links;
        let find =
            |fits: &dyn Fn(u32) -> bool| (1..links.len()).find(|p| fits(links.read(*p).ifindex));
        let place = find(&|owner| owner == ifindex)
            .or_else(|| find(&|owner| owner == 0))
            .or_else(|| find(&|owner| attach::interface_name(owner).is_none()))
            .context("more interfaces than map links has places")?;
        let link = ClientLink::new(ifindex, mac);
        if links.read(place) != link {
            links.store(place, link);
        }
        Ok(place)
    }

    /// The programs in the kernel.
    pub fn programs(&self) -> io::Result<Vec<bpf::ProgramInfo>> {
        [&self.program]
            .into_iter()
            .chain(self.tcx.iter().map(Tcx::program))
            .chain(self.local.programs())
            .map(|program| bpf::program_info(program.as_fd()))
            .collect()
    }

    /// The balancer's program.
    #[must_use]
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Runs the balancer's program `repeat` times on `packet`, as if it had come in on interface
    /// `ifindex` (0: the loopback interface).
    pub fn test_run(&self, packet: &[u8], ifindex: u32, repeat: u32) -> io::Result<bpf::TestRun> {
        bpf::test_run(self.program.as_fd(), packet, ifindex, repeat)
    }
}

fn link_info(interface: &str, link: &OwnedFd) -> Result<bpf::XdpLinkInfo> {
    bpf::xdp_link_info(link.as_fd())
        .with_context(|| format!("interface {interface}: link"))?
        .ok_or_else(|| anyhow!("interface {interface}: not an XDP link"))
}

fn marked(settings: Settings, limits: &Limits) -> Settings {
    Settings {
        magic: MAGIC,
        abi_version: ABI_VERSION,
        flow_sets: flow_table::sets(limits.flows),
        ..settings
    }
}

/// What the object asks for.
struct Object {
    layouts: BTreeMap<&'static str, Layout>,
}

impl Object {
    fn parse(limits: &Limits) -> Result<Self> {
        let object = aya_obj::Object::parse(OBJECT).context("the embedded BPF object")?;
        let mut layouts = BTreeMap::new();
        for name in NAMES {
            let map = object
                .maps
                .get(*name)
                .ok_or_else(|| anyhow!("the embedded BPF object has no map \"{name}\""))?;
            layouts.insert(*name, Layout::new(name, map, limits)?);
        }
        Ok(Self { layouts })
    }
}

/// Maps and programs in the kernel, attached to nothing yet.
struct Loaded {
    maps: Maps,
    program: OwnedFd,
    tcx: [Tcx; 2],
    local: Local,
}

/// Whether this processor shows its stores to others in the order in which they are made: the program's constant of that name.
pub const STORES_IN_ORDER: u32 = cfg!(target_arch = "x86_64") as u32;

/// Loads the programs, on the maps pinned in `adopt` or on new ones.
fn load(limits: &Limits, adopt: Option<&Path>) -> Result<Loaded> {
    let mut loader = EbpfLoader::new();
    for name in NAMES {
        if let Some(entries) = pins::max_entries(name, limits) {
            loader.map_max_entries(name, entries);
        }
        if let Some(pins) = adopt {
            loader.map_pin_path(name, pins.join(name));
        }
    }
    loader.override_global("BUCKETS", &limits.listeners, true);
    loader.override_global("STORES_IN_ORDER", &STORES_IN_ORDER, true);
    let mut ebpf = loader.load(OBJECT).map_err(|e| load_error(e, limits))?;
    let program = load_program(&mut ebpf, PROGRAM)?;
    // In the order of their numbers.
    let [ingress, egress] = Direction::ALL;
    let tcx = [
        Tcx::load(&mut ebpf, ingress)?,
        Tcx::load(&mut ebpf, egress)?,
    ];
    let local = Local::load(&mut ebpf)?;
    let maps = Maps::from_fds(|name| {
        let map = ebpf
            .take_map(name)
            .ok_or_else(|| anyhow!("the embedded BPF object has no map \"{name}\""))?;
        let fd = map_data(&map)?.fd().as_fd().try_clone_to_owned()?;
        Ok(fd)
    })?;
    Ok(Loaded {
        maps,
        program,
        tcx,
        local,
    })
}

/// Times that a program is handed to the kernel before its refusal counts.
const LOAD_TRIES: u32 = 10;

/// Hands a program to the kernel again if a signal came while it was being verified: then the kernel
/// gives up with `EAGAIN` (`do_check` in kernel/bpf/verifier.c). A check's process that ends is
/// such a signal.
pub(super) fn verified(
    mut load: impl FnMut() -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    for _ in 1..LOAD_TRIES {
        match load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(libc::EAGAIN) => {}
            result => return result,
        }
    }
    load()
}

/// Has the kernel verify program `name`.
pub(super) fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd> {
    let program: &mut Xdp = ebpf
        .program_mut(name)
        .ok_or_else(|| anyhow!("the embedded BPF object has no program \"{name}\""))?
        .try_into()?;
    verified(|| program.load()).map_err(|e| program_error(name, e))?;
    Ok(program.fd()?.as_fd().try_clone_to_owned()?)
}

pub(super) fn map_data(map: &Map) -> Result<&MapData> {
    match map {
        Map::Array(map)
        | Map::PerCpuArray(map)
        | Map::HashMap(map)
        | Map::LruHashMap(map)
        | Map::LpmTrie(map)
        | Map::DevMapHash(map) => Ok(map),
        other => bail!("the embedded BPF object has a map of an unexpected type: {other:?}"),
    }
}

/// One line for a failure to make maps.
fn load_error(error: EbpfError, limits: &Limits) -> anyhow::Error {
    match error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => {
            let entries = pins::max_entries(&name, limits)
                .map(|n| format!(" with {n} entries"))
                .unwrap_or_default();
            let remedy = match (io_error.raw_os_error(), pins::limit_name(&name)) {
                (Some(libc::ENOMEM | libc::E2BIG), Some(limit)) => {
                    format!("; lower limits.{limit}")
                }
                _ => kernel_hint(),
            };
            anyhow!("map {name}: the kernel refuses to make it{entries}: {io_error}{remedy}")
        }
        other => anyhow::Error::new(other).context(format!("cannot load{}", kernel_hint())),
    }
}

/// One line for a program that the kernel refuses; the verifier's whole log goes to the trace.
pub(super) fn program_error(name: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return anyhow::Error::new(error).context(format!("cannot load {name}"));
    };
    let log = verifier_log.to_string();
    tracing::debug!(log, "the verifier's log");
    // The last lines are statistics, the one before them says what was wrong.
    let statistics = |line: &str| {
        let words = ["processed ", "stack depth ", "verification time "];
        words.iter().any(|word| line.starts_with(word))
    };
    let verdict = log
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty() && !statistics(line))
        .map(|line| format!(": {}", line.trim()))
        .unwrap_or_default();
    anyhow!(
        "program {name}: the kernel refuses it: {io_error}{verdict}{}",
        kernel_hint()
    )
}

/// What to add to an error on a kernel that is older than any we know to work.
fn kernel_hint() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    // The helper bpf_xdp_load_bytes.
    if is_older(release, (5, 18)) {
        format!(" (kernel {release}; Sluice needs 5.18 or its features)")
    } else {
        String::new()
    }
}

fn is_older(release: &str, than: (u32, u32)) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) < than,
        _ => false,
    }
}

/// Checks the capabilities of this process, since the kernel's own "permission denied" does not
/// say which is missing.
pub(super) fn check_capabilities() -> Result<()> {
    // linux/capability.h
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let Some(effective) = effective_capabilities(&status) else {
        return Ok(()); // the kernel will say
    };
    let has = |capability: u32| effective & (1 << capability) != 0;
    let missing: Vec<&str> = [
        (NET_ADMIN, "CAP_NET_ADMIN"),
        (PERFMON, "CAP_PERFMON"),
        (BPF, "CAP_BPF"),
    ]
    .into_iter()
    .filter(|(capability, _)| {
        // CAP_SYS_ADMIN includes the two that were split from it.
        !has(*capability) && (*capability == NET_ADMIN || !has(SYS_ADMIN))
    })
    .map(|(_, name)| name)
    .collect();
    ensure!(
        missing.is_empty(),
        "no permission to load BPF programs: {} missing; run as root",
        missing.join(", ")
    );
    Ok(())
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        assert!(is_older("5.4.0-generic", (5, 15)));
        assert!(is_older("4.19.1", (5, 15)));
        assert!(!is_older("5.15.0", (5, 15)));
        assert!(!is_older("6.1.0-18-amd64", (5, 15)));
        assert!(!is_older("something else", (5, 15)));
    }

    #[test]
    fn capabilities_are_read() {
        let status = "Name:\tx\nCapEff:\t000001ffffffffff\n";
        assert_eq!(effective_capabilities(status), Some(0x1ff_ffff_ffff));
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }

    #[test]
    fn every_map_of_the_object_is_known() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        // Work space belongs to one loaded program; names with a dot are the compiler's.
        let private = ["recent_syns", "scratch", "work4", "work6"];
        for name in object.maps.keys().map(String::as_str) {
            // Those of the program beside the balancer: see `dataplane::decap`.
            let decap = name.starts_with("decap_");
            assert!(
                NAMES.contains(&name) || private.contains(&name) || decap || name.starts_with('.'),
                "map {name} would not be pinned"
            );
        }
        for name in NAMES {
            assert!(object.maps.contains_key(*name), "no map {name}");
        }
    }
}
