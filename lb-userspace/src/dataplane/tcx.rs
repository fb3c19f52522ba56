//! The programs in front of and behind the host's own network stack, on its packets that come in
//! and go out by an interface.

use super::{
    attach, bpf,
    load::program_error,
    pins::{Contents, PinDir, tcx_pin},
};
use anyhow::{Context as _, Result, anyhow};
use aya::{Ebpf, programs::SchedClassifier};
use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
};

/// Which packets a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Those that XDP has passed to the kernel.
    Ingress,
    /// Those that the host sends.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// `ingress` or `egress`: what programs and pins are called after.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// One of the programs, and where it is.
#[derive(Debug)]
pub(super) struct Tcx {
    direction: Direction,
    program: OwnedFd,
    /// Links by the name of their interface.
    links: BTreeMap<String, OwnedFd>,
}

impl Tcx {
    /// Has the kernel verify the program.
    pub fn load(ebpf: &mut Ebpf, direction: Direction) -> Result<Self> {
        let name = format!("sluice_{}", direction.name());
        let program: &mut SchedClassifier = ebpf
            .program_mut(&name)
            .ok_or_else(|| anyhow!("the embedded BPF object has no program \"{name}\""))?
            .try_into()?;
        super::load::verified(|| program.load()).map_err(|e| program_error(&name, e))?;
        Ok(Self {
            direction,
            program: program.fd()?.as_fd().try_clone_to_owned()?,
            links: BTreeMap::new(),
        })
    }

    /// The program.
    pub const fn program(&self) -> &OwnedFd {
        &self.program
    }

    /// Takes over the links that an earlier daemon has pinned: those on interfaces that are still
    /// configured run this program from here on, the others go.
    pub fn adopt(
        &mut self,
        pins: &PinDir,
        contents: &Contents,
        interfaces: &[String],
    ) -> Result<()> {
        let direction = self.direction.name();
        let pinned = contents.tcx.iter().filter(|(d, _)| *d == self.direction);
        for (_, name) in pinned {
            let pin = tcx_pin(self.direction, name);
            let path = pins.path().join(&pin);
            let fd = bpf::open_pin(&path).with_context(|| path.display().to_string())?;
            let ifindex = bpf::tcx_link_interface(fd.as_fd())?
                .ok_or_else(|| anyhow!("{}: not a TCX link; remove it", path.display()))?;
            let there = attach::interface_name(ifindex).as_ref() == Some(name);
            if there && interfaces.contains(name) {
                bpf::link_update(fd.as_fd(), self.program.as_fd()).with_context(|| {
                    format!("interface {name}: cannot replace the {direction} program")
                })?;
                self.links.insert(name.clone(), fd);
                continue;
            }
            if ifindex != 0 {
                bpf::link_detach(fd.as_fd())
                    .with_context(|| format!("interface {name}: cannot detach"))?;
            }
            pins.remove(&pin)?;
        }
        Ok(())
    }

    /// Puts the program on interface `name`, or takes it away; `false` if nothing had to be done.
    pub fn set(&mut self, name: &str, wanted: bool, pins: Option<&PinDir>) -> Result<bool> {
        let pin = tcx_pin(self.direction, name);
        if let Some(link) = self.links.get(name) {
            let on = bpf::tcx_link_interface(link.as_fd())?.unwrap_or(0);
            if wanted && attach::interface_name(on).as_deref() == Some(name) {
                return Ok(false);
            }
            if let Some(pins) = pins {
                pins.remove(&pin)?;
            }
            // Of a link whose interface is gone there is nothing to detach.
            if on != 0 {
                bpf::link_detach(link.as_fd())
                    .with_context(|| format!("interface {name}: cannot detach"))?;
            }
            self.links.remove(name);
            if !wanted {
                return Ok(true);
            }
        }
        if !wanted {
            return Ok(false);
        }
        let ifindex = attach::interface_index(name)?;
        let link =
            bpf::link_tcx(self.program.as_fd(), ifindex, self.direction).with_context(|| {
                let direction = self.direction.name();
                format!(
                    "interface {name}: cannot attach the {direction} program (Linux 6.6 or later)"
                )
            })?;
        if let Some(pins) = pins {
            pins.remove(&pin)?;
            let path = pins.path().join(pin);
            bpf::pin(link.as_fd(), &path).with_context(|| path.display().to_string())?;
        }
        self.links.insert(name.to_owned(), link);
        Ok(true)
    }
}
