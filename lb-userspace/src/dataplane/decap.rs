//! The program that takes encapsulation off, beside the balancer's in the same object.
//!
//! It has its own few maps. Nothing but its link is ever pinned: a running program is found by the
//! interface it is on, and its maps by the program.

use super::{
    attach::{self, Attached, Mode},
    bpf::{self, bpf_map_type},
    load::{self, OBJECT},
    map::{HashMap, PerCpuArray, SharedArray},
    pins::{check_file_system, link_pin},
};
use crate::config::AttachMode;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::EbpfLoader;
use lb_common::{
    abi::MAGIC,
    addr::{FAMILY_V4, FAMILY_V6, from_ipv4, from_ipv6, to_ip},
    decap::{ABI_VERSION, Counter, Outcome, Settings},
};
use std::{
    collections::{BTreeMap, HashMap as StdHashMap},
    fs::{self, DirBuilder},
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

/// Name of the program in the object and in the kernel.
const PROGRAM: &str = "sluice_decap";

/// Names of its maps begin with this.
const PREFIX: &str = "decap_";

/// Room for the addresses of a family, unless more are asked for.
const ADDRESSES: u32 = 4096;

/// The program in the kernel, with its maps.
#[derive(Debug)]
pub struct Decap {
    program: OwnedFd,
    settings: SharedArray<Settings>,
    addresses4: HashMap<u32, u32>,
    addresses6: HashMap<[u32; 4], u32>,
    stats: PerCpuArray<Counter>,
}

/// The program on an interface.
#[derive(Debug)]
pub struct Running {
    /// The program and its maps.
    pub decap: Decap,
    /// Where and how it is attached.
    pub attached: Attached,
    link: OwnedFd,
    link_id: u32,
}

impl Decap {
    /// Loads the program, with room for `addresses` addresses.
    pub fn load(port: u16, addresses: usize) -> Result<Self> {
        load::check_capabilities()?;
        let object = aya_obj::Object::parse(OBJECT).context("the embedded BPF object")?;
        let mut loader = EbpfLoader::new();
        for (name, map) in &object.maps {
            if name.starts_with("decap_addrs") {
                let room = u32::try_from(addresses.saturating_mul(2)).unwrap_or(u32::MAX);
                loader.map_max_entries(name, room.max(ADDRESSES));
            } else if !name.starts_with(PREFIX) && is_table(map.map_type()) {
                // The balancer's: made along with the others and let go again, so as small as can be.
                loader.map_max_entries(name, 1);
            }
        }
        let mut ebpf = loader.load(OBJECT).context("cannot load")?;
        let program = load::load_program(&mut ebpf, PROGRAM)?;
        let decap = Self::new(program, |name| {
            let map = ebpf
                .take_map(name)
                .ok_or_else(|| anyhow!("the embedded BPF object has no map \"{name}\""))?;
            Ok(load::map_data(&map)?.fd().as_fd().try_clone_to_owned()?)
        })?;
        decap.settings.store(
            0,
            Settings {
                magic: MAGIC,
                abi_version: ABI_VERSION,
                port: port.to_be(),
                reserved: 0,
            },
        );
        Ok(decap)
    }

    fn new(program: OwnedFd, mut map: impl FnMut(&str) -> Result<OwnedFd>) -> Result<Self> {
        Ok(Self {
            program,
            settings: SharedArray::from_fd(map("decap_settings")?)?,
            addresses4: HashMap::from_fd(map("decap_addrs4")?)?,
            addresses6: HashMap::from_fd(map("decap_addrs6")?)?,
            stats: PerCpuArray::from_fd(map("decap_stats")?)?,
        })
    }

    /// Attaches it to interface `name`, where no XDP program is.
    pub fn attach(self, name: &str, mode: AttachMode) -> Result<Running> {
        let ifindex = attach::interface_index(name)?;
        let (link, attached) = attach::attach(self.program.as_fd(), name, ifindex, mode)?;
        let link_id = link_info(name, &link)?.id;
        Ok(Running {
            decap: self,
            attached,
            link,
            link_id,
        })
    }

    /// What stands in the maps: each address with its bits (see [`lb_common::decap`]).
    pub fn addresses(&self) -> io::Result<BTreeMap<IpAddr, u32>> {
        let mut all = BTreeMap::new();
        self.addresses4.iter_batches(|address, bits| {
            all.insert(to_ip(FAMILY_V4, &[*address, 0, 0, 0]), *bits);
        })?;
        self.addresses6.iter_batches(|address, bits| {
            all.insert(to_ip(FAMILY_V6, address), *bits);
        })?;
        Ok(all)
    }

    /// Makes the maps hold exactly `wanted`; says whether anything changed.
    pub fn set_addresses(&self, wanted: &BTreeMap<IpAddr, u32>) -> Result<bool> {
        let present = self.addresses().context("cannot read the addresses")?;
        let gone: Vec<_> = present
            .keys()
            .filter(|address| !wanted.contains_key(address))
            .collect();
        let new: Vec<_> = wanted
            .iter()
            .filter(|(address, bits)| present.get(address) != Some(bits))
            .collect();
        // Those that go make room.
        for address in &gone {
            match address {
                IpAddr::V4(ip) => self.addresses4.remove(&from_ipv4(*ip)),
                IpAddr::V6(ip) => self.addresses6.remove(&from_ipv6(*ip)),
            }
            .with_context(|| format!("address {address}: cannot be removed"))?;
        }
        for (address, bits) in &new {
            match address {
                IpAddr::V4(ip) => self.addresses4.insert(&from_ipv4(*ip), bits),
                IpAddr::V6(ip) => self.addresses6.insert(&from_ipv6(*ip), bits),
            }
            .with_context(|| format!("address {address}: no room for it; start decap again"))?;
        }
        Ok(!gone.is_empty() || !new.is_empty())
    }

    /// The UDP port of GUE.
    #[must_use]
    pub fn port(&self) -> u16 {
        u16::from_be(self.settings.read(0).port)
    }

    /// What was counted since the program was loaded.
    pub fn counters(&self) -> io::Result<Vec<(Outcome, Counter)>> {
        let counter = |outcome: Outcome| self.stats.sum(outcome as u32).map(|sum| (outcome, sum));
        Outcome::ALL.into_iter().map(counter).collect()
    }

    /// What the kernel says of the program.
    pub fn program_info(&self) -> io::Result<bpf::ProgramInfo> {
        bpf::program_info(self.program.as_fd())
    }

    /// Runs the program once on `packet`.
    pub fn test_run(&self, packet: &[u8]) -> io::Result<bpf::TestRun> {
        bpf::test_run(self.program.as_fd(), packet, 0, 1)
    }
}

impl Running {
    /// The program that runs on interface `name`, if it is ours.
    pub fn find(name: &str) -> Result<Option<Self>> {
        let ifindex = attach::interface_index(name)?;
        load::check_capabilities()?;
        let state = attach::xdp_state(ifindex).with_context(|| format!("interface {name}"))?;
        let Some((id, mode)) = (state.driver.map(|id| (id, Mode::Driver)))
            .or(state.generic.map(|id| (id, Mode::Generic)))
        else {
            return Ok(None);
        };
        let failed = || format!("interface {name}: XDP program {id}");
        let program = bpf::program_by_id(id).with_context(failed)?;
        if bpf::program_info(program.as_fd())
            .with_context(failed)?
            .name
            != PROGRAM
        {
            return Ok(None);
        }
        let mut maps = StdHashMap::new();
        for id in bpf::program_maps(program.as_fd(), 64).with_context(failed)? {
            let map = bpf::map_by_id(id).with_context(failed)?;
            let info = bpf::map_info(map.as_fd()).with_context(failed)?;
            maps.insert(info.name, map);
        }
        let decap = Decap::new(program, |name| {
            maps.remove(name).ok_or_else(|| {
                anyhow!(
                    "no map {name}: another version's; that version's \"sluice decap\" knows it"
                )
            })
        })
        .with_context(failed)?;
        let settings = decap.settings.read(0);
        ensure!(
            settings.magic == MAGIC && settings.abi_version == ABI_VERSION,
            "interface {name}: XDP program {id} is another version's; that version's \"sluice \
             decap\" knows it"
        );
        let info = bpf::find_xdp_link(ifindex, id)
            .ok_or_else(|| anyhow!("interface {name}: XDP program {id} is on no link"))?;
        Ok(Some(Self {
            decap,
            attached: Attached {
                interface: name.to_owned(),
                ifindex,
                mode,
                fallback: None,
            },
            link: bpf::link_by_id(info.id).with_context(failed)?,
            link_id: info.id,
        }))
    }

    /// Puts another program in the place of this one, without a packet that sees neither.
    pub fn replace(self, decap: Decap) -> Result<Self> {
        let name = &self.attached.interface;
        bpf::link_update(self.link.as_fd(), decap.program.as_fd())
            .with_context(|| format!("interface {name}: cannot replace the running program"))?;
        Ok(Self { decap, ..self })
    }

    /// Whether it is attached as `mode` asks.
    #[must_use]
    pub fn satisfies(&self, mode: AttachMode) -> bool {
        self.attached.mode.satisfies(mode)
    }

    /// Whether it still runs on its interface: neither was the interface removed nor the program taken
    /// off or replaced.
    pub fn is_attached(&self) -> bool {
        let info = bpf::xdp_link_info(self.link.as_fd()).ok().flatten();
        let program = bpf::program_info(self.decap.program.as_fd()).ok();
        info.zip(program).is_some_and(|(info, program)| {
            info.ifindex == self.attached.ifindex && info.program == program.id
        })
    }

    /// Whether its link is pinned in `dir`, so that it needs no process.
    #[must_use]
    pub fn is_pinned(&self, dir: &Path) -> bool {
        pinned(&self.pin(dir)).is_some_and(|info| info.id == self.link_id)
    }

    fn pin(&self, dir: &Path) -> PathBuf {
        dir.join(link_pin(&self.attached.interface))
    }

    /// Pins the link in `dir`, so that the program stays when this process ends.
    pub fn persist(&self, dir: &Path) -> Result<()> {
        if self.is_pinned(dir) {
            return Ok(());
        }
        let pin = self.pin(dir);
        check_file_system(dir)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("{}: cannot be made", dir.display()))?;
        match pinned(&pin) {
            // Its interface is gone.
            Some(info) if info.ifindex == 0 => fs::remove_file(&pin)?,
            Some(_) => bail!(
                "{}: the link of an interface in another network namespace; use another \
                 --pin-path for each namespace",
                pin.display()
            ),
            None => {}
        }
        bpf::pin(self.link.as_fd(), &pin).with_context(|| pin.display().to_string())
    }

    /// Removes the pin, if there is one: the program now ends with this value.
    pub fn own(&self, dir: &Path) -> Result<()> {
        if !self.is_pinned(dir) {
            return Ok(());
        }
        let pin = self.pin(dir);
        fs::remove_file(&pin).with_context(|| pin.display().to_string())?;
        // Others may have theirs in it.
        let _ = fs::remove_dir(dir);
        Ok(())
    }

    /// Takes the program off the interface, whoever else holds the link.
    pub fn detach(self, dir: &Path) -> Result<()> {
        self.own(dir)?;
        // Of a link whose interface is gone there is nothing to detach.
        if link_info(&self.attached.interface, &self.link)?.ifindex != 0 {
            bpf::link_detach(self.link.as_fd())
                .with_context(|| format!("interface {}: cannot detach", self.attached.interface))?;
        }
        Ok(())
    }
}

/// The link that is pinned at `pin`.
fn pinned(pin: &Path) -> Option<bpf::XdpLinkInfo> {
    let link = bpf::open_pin(pin).ok()?;
    bpf::xdp_link_info(link.as_fd()).ok()?
}

fn link_info(name: &str, link: &OwnedFd) -> Result<bpf::XdpLinkInfo> {
    bpf::xdp_link_info(link.as_fd())
        .with_context(|| format!("interface {name}: link"))?
        .ok_or_else(|| anyhow!("interface {name}: not an XDP link"))
}

/// Whether a map is one of entries whose number may be chosen freely.
fn is_table(kind: u32) -> bool {
    [
        bpf_map_type::BPF_MAP_TYPE_HASH,
        bpf_map_type::BPF_MAP_TYPE_ARRAY,
        bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH,
        bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY,
        bpf_map_type::BPF_MAP_TYPE_LRU_HASH,
        bpf_map_type::BPF_MAP_TYPE_LPM_TRIE,
    ]
    .iter()
    .any(|table| *table as u32 == kind)
}
