//! The programs that lead clients on this host to backends: they sit on a cgroup, where the kernel
//! asks them whenever a process in it connects a socket or sends a datagram.

use super::{
    bpf,
    load::program_error,
    maps::Maps,
    pins::{Contents, PinDir, cgroup_pin},
};
use anyhow::{Context as _, Result, anyhow, ensure};
use aya::{
    Ebpf,
    programs::{CgroupSockAddr, ProgramError},
};
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_UDP6_SENDMSG,
};
use lb_common::local::LocalSettings;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

/// Where the kernel asks. Each program is called after its hook, and so is the pin of its link; of
/// a program's name the kernel keeps 15 characters.
///
/// The ones that give names back come first, so that no socket is led to a backend without them.
const HOOKS: [(&str, bpf_attach_type); 8] = [
    ("getpeer4", BPF_CGROUP_INET4_GETPEERNAME),
    ("getpeer6", BPF_CGROUP_INET6_GETPEERNAME),
    ("recvmsg4", BPF_CGROUP_UDP4_RECVMSG),
    ("recvmsg6", BPF_CGROUP_UDP6_RECVMSG),
    ("connect4", BPF_CGROUP_INET4_CONNECT),
    ("connect6", BPF_CGROUP_INET6_CONNECT),
    ("sendmsg4", BPF_CGROUP_UDP4_SENDMSG),
    ("sendmsg6", BPF_CGROUP_UDP6_SENDMSG),
];

/// Whether a pin of this name is that of a link on a cgroup.
pub(super) fn is_hook(name: &str) -> bool {
    HOOKS.iter().any(|(hook, _)| *hook == name)
}

/// The programs, and where they are.
#[derive(Debug)]
pub(super) struct Local {
    /// In the order of [`HOOKS`], or why the kernel has none.
    programs: Result<Vec<OwnedFd>, String>,
    links: BTreeMap<&'static str, OwnedFd>,
}

impl Local {
    /// Has the kernel verify the programs. That it refuses them is told when they are wanted: they
    /// need more of it than the balancer itself.
    pub fn load(ebpf: &mut Ebpf) -> Result<Self> {
        let mut programs = Ok(Vec::new());
        for (hook, _) in HOOKS {
            let name = format!("sluice_{hook}");
            let program: &mut CgroupSockAddr = ebpf
                .program_mut(&name)
                .ok_or_else(|| anyhow!("the embedded BPF object has no program \"{name}\""))?
                .try_into()?;
            match (super::load::verified(|| program.load()), &mut programs) {
                (Ok(()), Ok(loaded)) => loaded.push(program.fd()?.as_fd().try_clone_to_owned()?),
                (Err(error @ ProgramError::LoadError { .. }), _) => {
                    programs = Err(format!(
                        "{:#} (Linux 6.1 or later)",
                        program_error(&name, error)
                    ));
                    break;
                }
                (Err(error), _) => return Err(error.into()),
                (_, Err(_)) => {}
            }
        }
        Ok(Self {
            programs,
            links: BTreeMap::new(),
        })
    }

    /// What is in the kernel.
    pub fn programs(&self) -> impl Iterator<Item = &OwnedFd> {
        self.programs.iter().flatten()
    }

    /// Takes over the links that an earlier daemon has pinned: they run these programs from here
    /// on. Where there are none to run they go.
    pub fn adopt(&mut self, pins: &PinDir, contents: &Contents) -> Result<()> {
        for (i, (hook, _)) in HOOKS.into_iter().enumerate() {
            if !contents.cgroup.iter().any(|pinned| pinned == hook) {
                continue;
            }
            let path = pins.path().join(cgroup_pin(hook));
            let fd = bpf::open_pin(&path).with_context(|| path.display().to_string())?;
            let cgroup = bpf::cgroup_link(fd.as_fd())?
                .ok_or_else(|| anyhow!("{}: not a cgroup link; remove it", path.display()))?;
            match &self.programs {
                // Of a link whose cgroup is gone there is nothing to replace.
                Ok(programs) if cgroup != 0 => {
                    bpf::link_update(fd.as_fd(), programs[i].as_fd()).with_context(|| {
                        format!("{}: cannot replace the running program", path.display())
                    })?;
                    self.links.insert(hook, fd);
                }
                _ => {
                    let _ = bpf::link_detach(fd.as_fd());
                    pins.remove(&cgroup_pin(hook))?;
                }
            }
        }
        Ok(())
    }

    /// Puts the programs on the cgroup at `path`, or takes them away; `false` if nothing had to be
    /// done.
    pub fn set(&mut self, path: Option<&Path>, pins: Option<&PinDir>, maps: &Maps) -> Result<bool> {
        let Some(path) = path else {
            return self.detach(pins);
        };
        let programs = self.programs.as_ref().map_err(|e| anyhow!("{e}"))?;
        let name = path.display();
        let cgroup = File::open(path).with_context(|| format!("cgroup {name}"))?;
        // The kernel's number of a cgroup is that of its directory (kernfs_ino in
        // include/linux/kernfs.h).
        let id = cgroup
            .metadata()
            .with_context(|| format!("cgroup {name}"))?
            .ino();
        let settings = LocalSettings {
            netns_cookie: bpf::netns_cookie().context("this network namespace's cookie")?,
            ..maps.local_settings.read(0)
        };
        maps.local_settings.store(0, settings);
        let mut changed = false;
        for ((hook, attach_type), program) in HOOKS.into_iter().zip(programs) {
            if let Some(link) = self.links.get(hook)
                && bpf::cgroup_link(link.as_fd())? == Some(id)
            {
                continue;
            }
            let link = bpf::link_cgroup(program.as_fd(), cgroup.as_fd(), attach_type)
                .with_context(|| format!("cgroup {name}: cannot attach {hook}"))?;
            // The one on another cgroup goes with its pin and its descriptor.
            if let Some(pins) = pins {
                let pin = cgroup_pin(hook);
                pins.remove(&pin)?;
                let path = pins.path().join(pin);
                bpf::pin(link.as_fd(), &path).with_context(|| path.display().to_string())?;
            }
            self.links.insert(hook, link);
            changed = true;
        }
        Ok(changed)
    }

    fn detach(&mut self, pins: Option<&PinDir>) -> Result<bool> {
        let was = !self.links.is_empty();
        // In the opposite order, for the reason given at `HOOKS`.
        for (hook, _) in HOOKS.iter().rev() {
            let Some(link) = self.links.remove(hook) else {
                continue;
            };
            if let Some(pins) = pins {
                pins.remove(&cgroup_pin(hook))?;
            }
            // It fails if the cgroup is gone, which is as good.
            let _ = bpf::link_detach(link.as_fd());
        }
        Ok(was)
    }
}

/// Where the cgroup file system of version 2 is mounted, as `mounts` (`/proc/self/mounts`) tells;
/// `None` if it is not.
fn find_cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (_, path, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// The cgroup of every process on this host (in a container: of every process in it).
pub fn root_cgroup() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    find_cgroup2(&mounts).ok_or_else(|| {
        anyhow!("no cgroup2 file system is mounted; run \"mount -t cgroup2 none /sys/fs/cgroup\"")
    })
}

/// Checks that `path` is a directory of a cgroup file system of version 2.
pub fn check_cgroup(path: &Path) -> Result<()> {
    let name = path.display();
    let dir = File::open(path).with_context(|| format!("cgroup {name}"))?;
    // SAFETY: statfs is integers only, and the kernel fills it.
    let stat = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(std::os::fd::AsRawFd::as_raw_fd(&dir), &raw mut stat) != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("cgroup {name}"));
        }
        stat
    };
    ensure!(
        stat.f_type == libc::CGROUP2_SUPER_MAGIC,
        "cgroup {name} is not in a cgroup2 file system; \"grep cgroup2 /proc/mounts\" shows where \
         one is"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_file_system_is_found() {
        let hybrid = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        let found = find_cgroup2(hybrid);
        assert_eq!(found.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(
            find_cgroup2("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n"),
            None
        );
    }
}
