//! Attaching to interfaces, and what else is attached there.
//!
//! Only by BPF links: they can be pinned, so the program stays when the daemon goes, and replaced
//! without a packet seeing no program. There is no fallback to the older netlink way, whose
//! attachments can do neither.

use super::bpf;
use crate::config::AttachMode;
use anyhow::{Context as _, Result, anyhow, bail};
use aya_obj::generated::{
    IFLA_XDP_ATTACHED, IFLA_XDP_DRV_PROG_ID, IFLA_XDP_HW_PROG_ID, IFLA_XDP_PROG_ID,
    IFLA_XDP_SKB_PROG_ID, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
};
use std::{
    ffi::{CStr, CString},
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver, before a socket buffer is made.
    Driver,
    /// Behind the driver, on socket buffers.
    Generic,
}

impl Mode {
    /// `driver` or `generic`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::Generic => "generic",
        }
    }

    const fn flags(self) -> u32 {
        match self {
            Self::Driver => XDP_FLAGS_DRV_MODE,
            Self::Generic => XDP_FLAGS_SKB_MODE,
        }
    }

    /// Whether this is what `wanted` asks for.
    pub(super) fn satisfies(self, wanted: AttachMode) -> bool {
        match wanted {
            AttachMode::Auto => true,
            AttachMode::Driver => self == Self::Driver,
            AttachMode::Generic => self == Self::Generic,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An interface the balancer is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The interface's name.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
    /// How.
    pub mode: Mode,
    /// Why it is generic though `auto` prefers the driver.
    pub fallback: Option<String>,
}

/// The index of interface `name` in this network namespace.
pub fn interface_index(name: &str) -> Result<u32> {
    let missing =
        || anyhow!("interface {name}: no such interface; \"ip link\" lists what there is");
    let c_name = CString::new(name).map_err(|_| missing())?;
    // SAFETY: a valid C string.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(missing()),
        index => Ok(index),
    }
}

/// The name of interface `index` in this network namespace, if there is one.
#[must_use]
pub fn interface_name(index: u32) -> Option<String> {
    let mut name: [libc::c_char; libc::IF_NAMESIZE] = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size the function asks for, and is terminated by it.
    unsafe {
        let found = libc::if_indextoname(index, name.as_mut_ptr());
        (!found.is_null()).then(|| CStr::from_ptr(found).to_string_lossy().into_owned())
    }
}

/// The XDP programs on an interface, by the kernel's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpState {
    /// In the driver, or on the card.
    pub driver: Option<u32>,
    /// Behind the driver.
    pub generic: Option<u32>,
}

impl XdpState {
    /// How `program` is attached, if it is.
    #[must_use]
    pub fn mode_of(self, program: u32) -> Option<Mode> {
        if self.driver == Some(program) {
            Some(Mode::Driver)
        } else if self.generic == Some(program) {
            Some(Mode::Generic)
        } else {
            None
        }
    }
}

/// Asks the kernel what XDP programs are on interface `ifindex`.
///
/// By rtnetlink (`RTM_GETLINK`), since a BPF link does not tell its mode.
pub fn xdp_state(ifindex: u32) -> io::Result<XdpState> {
    Ok(xdp_of(&link_attributes(ifindex, None)?))
}

/// The XDP programs that the attributes of a link tell of.
fn xdp_of(link: &[u8]) -> XdpState {
    let mut state = XdpState::default();
    for (kind, payload) in attributes(link) {
        if kind != libc::IFLA_XDP {
            continue;
        }
        let mut attached = 0;
        let mut only = None;
        for (kind, payload) in attributes(payload) {
            let number = payload.first_chunk().map(|b| u32::from_ne_bytes(*b));
            match u32::from(kind) {
                IFLA_XDP_ATTACHED => attached = payload.first().copied().unwrap_or(0),
                IFLA_XDP_PROG_ID => only = number,
                IFLA_XDP_DRV_PROG_ID | IFLA_XDP_HW_PROG_ID => state.driver = number,
                IFLA_XDP_SKB_PROG_ID => state.generic = number,
                _ => {}
            }
        }
        // Kernels before 4.19 have only the one number.
        match attached {
            1 | 3 => state.driver = state.driver.or(only),
            2 => state.generic = state.generic.or(only),
            _ => {}
        }
    }
    state
}

/// Whether interface `ifindex` is one end of a veth whose other end has no XDP program in the
/// driver. Such an end takes nothing that XDP sends, and nobody is told (`veth_xdp_xmit` in the
/// kernel's `drivers/net/veth.c`).
pub(super) fn sends_into_the_void(ifindex: u32) -> io::Result<bool> {
    let link = link_attributes(ifindex, None)?;
    let number = |wanted| {
        let (_, payload) = attributes(&link).find(|(kind, _)| *kind == wanted)?;
        payload.first_chunk().map(|b| u32::from_ne_bytes(*b))
    };
    let is_veth = attributes(&link)
        .filter(|(kind, _)| *kind == libc::IFLA_LINKINFO)
        .flat_map(|(_, info)| attributes(info))
        .any(|(kind, name)| kind == libc::IFLA_INFO_KIND && name.starts_with(b"veth\0"));
    let (true, Some(peer)) = (is_veth, number(libc::IFLA_LINK)) else {
        return Ok(false);
    };
    let other = link_attributes(peer, number(libc::IFLA_LINK_NETNSID))?;
    Ok(xdp_of(&other).driver.is_none())
}

/// The attributes of interface `ifindex` (`RTM_GETLINK`), in this network namespace or the one
/// this one knows by the number `namespace`.
fn link_attributes(ifindex: u32, namespace: Option<u32>) -> io::Result<Vec<u8>> {
    const HEADER: usize = 16; // struct nlmsghdr
    const IFINFOMSG: usize = 16; // struct ifinfomsg
    // SAFETY: a plain system call; the descriptor is ours alone.
    let socket = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = vec![0u8; HEADER + IFINFOMSG];
    request[4..6].copy_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request[HEADER + 4..HEADER + 8].copy_from_slice(&ifindex.to_ne_bytes());
    if let Some(namespace) = namespace {
        request.extend(8_u16.to_ne_bytes());
        request.extend(libc::IFLA_TARGET_NETNSID.to_ne_bytes());
        request.extend(namespace.to_ne_bytes());
    }
    let length = request.len() as u32;
    request[0..4].copy_from_slice(&length.to_ne_bytes());
    let mut answer = vec![0u8; 1 << 16];
    // SAFETY: both buffers are valid for the lengths given.
    let received = unsafe {
        let fd = socket.as_raw_fd();
        if libc::send(fd, request.as_ptr().cast(), request.len(), 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let short = || io::Error::new(io::ErrorKind::UnexpectedEof, "short answer from rtnetlink");
    let message = answer.get(..received).ok_or_else(short)?;
    if message.len() < HEADER + IFINFOMSG {
        return Err(short());
    }
    if message[4..6] == (libc::NLMSG_ERROR as u16).to_ne_bytes() {
        let error = i32::from_ne_bytes([message[16], message[17], message[18], message[19]]);
        return Err(io::Error::from_raw_os_error(-error));
    }
    Ok(message[HEADER + IFINFOMSG..].to_vec())
}

/// Splits netlink attributes into their types and payloads.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header: [u8; 4] = *bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff; // NLA_TYPE_MASK
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, payload))
    })
}

/// Attaches `program` to interface `name` as `wanted` asks. Nothing of ours must be there.
pub(super) fn attach(
    program: BorrowedFd<'_>,
    name: &str,
    ifindex: u32,
    wanted: AttachMode,
) -> Result<(OwnedFd, Attached)> {
    let attached = |mode, fallback| Attached {
        interface: name.to_owned(),
        ifindex,
        mode,
        fallback,
    };
    let mut fallback = None;
    if wanted != AttachMode::Generic {
        match bpf::link_xdp(program, ifindex, Mode::Driver.flags()) {
            Ok(link) => return Ok((link, attached(Mode::Driver, None))),
            Err(error) if wanted == AttachMode::Driver || is_final(&error) => {
                return Err(refusal(name, ifindex, Mode::Driver, &error));
            }
            Err(error) => fallback = Some(reason(&error)),
        }
    }
    match bpf::link_xdp(program, ifindex, Mode::Generic.flags()) {
        Ok(link) => Ok((link, attached(Mode::Generic, fallback))),
        Err(error) => Err(refusal(name, ifindex, Mode::Generic, &error)),
    }
}

/// Whether `error` would be the same in another mode.
fn is_final(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::EEXIST | libc::EPERM | libc::ENODEV | libc::ENXIO)
    )
}

/// What an error of the attachment means.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "its driver has no XDP".to_owned(),
        Some(libc::EINVAL | libc::ERANGE) => format!(
            "its driver refuses XDP with the present settings, often the MTU or LRO ({error}); \
             the kernel log says which"
        ),
        Some(libc::ENOMEM | libc::ENOSPC) => {
            format!("its driver has not enough queues or memory for XDP ({error})")
        }
        _ => error.to_string(),
    }
}

fn refusal(name: &str, ifindex: u32, mode: Mode, error: &io::Error) -> anyhow::Error {
    if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
        && let Some(holder) = holder(name, ifindex)
    {
        return anyhow!("interface {name}: {holder}");
    }
    if error.raw_os_error() == Some(libc::EPERM) {
        return anyhow!("interface {name}: no permission to attach XDP; run as root");
    }
    let reason = reason(error);
    match mode {
        Mode::Driver => anyhow!(
            "interface {name}: cannot attach in driver mode: {reason}; mode = \"auto\" or \
             \"generic\" works without the driver"
        ),
        Mode::Generic => anyhow!("interface {name}: cannot attach in generic mode: {reason}"),
    }
}

/// Who holds an interface, and how to take it off.
fn holder(name: &str, ifindex: u32) -> Option<String> {
    let state = xdp_state(ifindex).ok()?;
    let (program, keyword) = match (state.driver, state.generic) {
        (Some(program), _) => (program, "xdpdrv"),
        (None, Some(program)) => (program, "xdpgeneric"),
        (None, None) => return None,
    };
    let program_name = bpf::program_by_id(program)
        .and_then(|fd| bpf::program_info(fd.as_fd()))
        .map(|info| format!(" ({})", info.name))
        .unwrap_or_default();
    let remedy = match bpf::find_xdp_link(ifindex, program) {
        Some(link) => format!("bpftool link detach id {}", link.id),
        None => format!("ip link set dev {name} {keyword} off"),
    };
    Some(format!(
        "XDP program {program}{program_name} is attached already; \"{remedy}\" takes it off"
    ))
}

/// An XDP attachment that ends with this value.
#[derive(Debug)]
pub struct OwnedLink {
    link: OwnedFd,
}

impl Drop for OwnedLink {
    /// Detaches at once. A child that was just forked and has not yet become another program
    /// would hold the link through its copy of the descriptor.
    fn drop(&mut self) {
        // An interface that is gone has nothing to detach from.
        let _ = bpf::link_detach(self.link.as_fd());
    }
}

/// Attaches a program to interface `name`, in the driver, that passes every packet.
///
/// A veth hands packets that XDP sent on the other end only to a program: without one here, what
/// the balancer forwards by `XDP_TX` or redirect is lost silently.
pub fn attach_stub(name: &str) -> Result<OwnedLink> {
    let ifindex = interface_index(name)?;
    let program = bpf::load_xdp_pass().context("cannot load a program that passes packets")?;
    let (link, _) = attach(program.as_fd(), name, ifindex, AttachMode::Driver)?;
    Ok(OwnedLink { link })
}

/// How the program of `link` is attached; an error if the interface is not where it should be.
pub(super) fn mode_of(name: &str, link: bpf::XdpLinkInfo) -> Result<Mode> {
    let state = xdp_state(link.ifindex).with_context(|| format!("interface {name}"))?;
    match state.mode_of(link.program) {
        Some(mode) => Ok(mode),
        None => bail!(
            "interface {name}: the pinned link {} is on an interface of another network \
             namespace; use another pin_path for each namespace",
            link.id
        ),
    }
}
