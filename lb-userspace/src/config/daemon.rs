//! Sections `[daemon]` and `[limits]`.

use super::{
    AttachMode, Daemon, EncapSource, Error, Limits, Timeouts,
    health::positive,
    read::{Entry, Section, quote},
    value,
};
use lb_common::{
    abi::NAT_SOURCES,
    probe::{TARGET_BITS, TARGET_MASK},
};
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

/// Least of `new_flows_per_cpu`: the data plane counts in windows of a fourteenth of a second.
const NEW_FLOWS_MIN: u32 = 100;

/// Longest path of a unix socket: `sun_path` of `sockaddr_un` without its closing zero.
const SOCKET_PATH_MAX: usize = 107;
/// Longest name of an interface: `IFNAMSIZ` without its closing zero.
const INTERFACE_NAME_MAX: usize = 15;
/// What map `interfaces` has room for.
const INTERFACES_MAX: usize = 256;

const MODES: [(&str, AttachMode); 3] = [
    ("auto", AttachMode::Auto),
    ("driver", AttachMode::Driver),
    ("generic", AttachMode::Generic),
];

/// Reads `[daemon]`.
pub(super) fn daemon(root: &Section<'_>) -> Result<Daemon, Error> {
    let section = root.table("daemon", "daemon")?.ok_or_else(|| {
        let message = "section [daemon] is missing; write [daemon] and interfaces = [\"eth0\"]";
        root.error(0, message)
    })?;
    section.only(&[
        "interfaces",
        "mode",
        "pin_path",
        "socket",
        "http",
        "answer_arp",
        "nat_ports",
        "nat_sources",
        "encap_source",
        "gue_port",
        "on_state_change",
        "local_clients",
        "cgroup",
        "probe_mark",
    ])?;
    let interfaces = interfaces(&section)?;
    let mode = match section.get("mode") {
        None => AttachMode::Auto,
        Some(entry) => mode(&entry)?,
    };
    let pin_path = match section.get("pin_path") {
        None => PathBuf::from(Daemon::PIN_PATH),
        Some(entry) => pin_path(&entry)?,
    };
    let socket = match section.get("socket") {
        None => PathBuf::from(Daemon::SOCKET),
        Some(entry) => socket(&entry)?,
    };
    let http = section.get("http").map(|entry| http(&entry)).transpose()?;
    let answer_arp = match section.get("answer_arp") {
        None => true,
        Some(entry) => entry.boolean()?,
    };
    let nat_ports = section
        .get("nat_ports")
        .map(|entry| {
            let text = entry.text("1024-32767")?;
            value::range(text, 1, u16::MAX).map_err(|message| entry.bad(text, message))
        })
        .transpose()?;
    let nat_sources = match section.get("nat_sources") {
        None => Vec::new(),
        Some(entry) => nat_sources(&section, &entry)?,
    };
    let encap_source = match section.get("encap_source") {
        None => EncapSource::default(),
        Some(entry) => encap_source(&section, &entry)?,
    };
    let gue_port = match section.get("gue_port") {
        None => Daemon::GUE_PORT,
        Some(entry) => entry.integer(1, u32::from(u16::MAX))? as u16,
    };
    let local_clients = section
        .get("local_clients")
        .map(|entry| entry.boolean())
        .transpose()?;
    let cgroup = section
        .get("cgroup")
        .map(|entry| absolute(&entry, "/sys/fs/cgroup"))
        .transpose()?;
    if local_clients == Some(false)
        && let Some(entry) = section.get("cgroup")
    {
        return Err(entry.error(
            "cgroup is for clients on this host, which local_clients = false leaves alone; remove one",
        ));
    }
    let probe_mark = match section.get("probe_mark") {
        None => Daemon::PROBE_MARK,
        Some(entry) => probe_mark(&entry)?,
    };
    let on_state_change = match section.get("on_state_change") {
        None => Vec::new(),
        Some(entry) => command(&entry)?,
    };
    Ok(Daemon {
        on_state_change,
        interfaces,
        mode,
        pin_path,
        socket,
        http,
        answer_arp,
        nat_ports,
        nat_sources,
        encap_source,
        gue_port,
        local_clients,
        cgroup,
        probe_mark,
    })
}

/// [`Daemon::probe_mark`].
fn probe_mark(entry: &Entry<'_, '_>) -> Result<u32, Error> {
    let mark = entry.integer(1 << TARGET_BITS, u32::MAX)?;
    if mark & TARGET_MASK != 0 {
        return Err(entry.error(format!(
            "probe_mark {mark:#x} has one of its low {TARGET_BITS} bits set, which number the \
             checks; write it like {:#x}",
            Daemon::PROBE_MARK
        )));
    }
    Ok(mark)
}

/// Addresses of [`Daemon::nat_sources`].
fn nat_sources(section: &Section<'_>, entry: &Entry<'_, '_>) -> Result<Vec<IpAddr>, Error> {
    let mut found: Vec<IpAddr> = Vec::new();
    for text in entry.texts("10.0.0.2")? {
        let quoted = quote(text.value);
        let refuse = |why: &str| {
            let message = format!(
                "nat_sources {quoted} {why}; name addresses that the balancer holds, see \"ip address\""
            );
            section.error(text.offset, message)
        };
        let address: IpAddr = text
            .value
            .parse()
            .map_err(|_| refuse("is not an IP address"))?;
        let broadcast = address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() || broadcast
        {
            return Err(refuse("is not the address of one host"));
        }
        if found.contains(&address) {
            return Err(refuse("is named twice"));
        }
        found.push(address);
        let family = found.iter().filter(|a| a.is_ipv4() == address.is_ipv4());
        if family.count() > NAT_SOURCES as usize {
            return Err(refuse(&format!(
                "is one more than the {NAT_SOURCES} there is room for in its family"
            )));
        }
    }
    Ok(found)
}

/// Networks of [`Daemon::encap_source`], at most one of each family.
fn encap_source(section: &Section<'_>, entry: &Entry<'_, '_>) -> Result<EncapSource, Error> {
    let mut found = EncapSource::default();
    for text in entry.texts("10.99.0.0/16")? {
        let quoted = quote(text.value);
        let refuse = |why: &str| {
            let message = format!(
                "encap_source {quoted} {why}; write one network of each family, such as \
                 [\"10.99.0.0/16\", \"2001:db8:99::/96\"]"
            );
            section.error(text.offset, message)
        };
        let (address, bits) = text
            .value
            .split_once('/')
            .ok_or_else(|| refuse("is not a network"))?;
        let bits: u8 = bits.parse().map_err(|_| refuse("is not a network"))?;
        match address.parse() {
            Ok(IpAddr::V4(address)) if (8..=31).contains(&bits) => {
                let host = u32::MAX >> bits;
                if address.to_bits() & host != 0 {
                    return Err(refuse("has bits set behind its prefix"));
                }
                if found.v4.replace((address, bits)).is_some() {
                    return Err(refuse("is a second IPv4 network"));
                }
            }
            Ok(IpAddr::V6(address)) if (32..=127).contains(&bits) => {
                let host = u128::MAX >> bits;
                if address.to_bits() & host != 0 {
                    return Err(refuse("has bits set behind its prefix"));
                }
                if found.v6.replace((address, bits)).is_some() {
                    return Err(refuse("is a second IPv6 network"));
                }
            }
            Ok(_) => return Err(refuse("has a prefix that leaves too few or too many bits")),
            Err(_) => return Err(refuse("is not a network")),
        }
    }
    Ok(found)
}

fn interfaces(section: &Section<'_>) -> Result<Vec<String>, Error> {
    let entry = section.require("interfaces", "write interfaces = [\"eth0\"]")?;
    let names = entry.texts("eth0")?;
    if names.is_empty() {
        return Err(entry.error("interfaces is empty; name at least one, see \"ip link\""));
    }
    if names.len() > INTERFACES_MAX {
        let message = format!("interfaces has more than {INTERFACES_MAX} names; remove some");
        return Err(entry.error(message));
    }
    let mut known: Vec<String> = Vec::with_capacity(names.len());
    for name in names {
        if let Some(message) = interface_name(name.value) {
            let quoted = quote(name.value);
            return Err(section.error(name.offset, format!("interface {quoted} {message}")));
        }
        if known.iter().any(|other| other == name.value) {
            let message = format!("interface \"{}\" is named twice; remove one", name.value);
            return Err(section.error(name.offset, message));
        }
        known.push(name.value.to_owned());
    }
    Ok(known)
}

/// What is wrong with the name of an interface, by the rules of the kernel's `dev_valid_name`.
fn interface_name(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("is empty; see \"ip link\" for the names".to_owned());
    }
    if name.len() > INTERFACE_NAME_MAX {
        return Some(format!(
            "is longer than {INTERFACE_NAME_MAX} bytes, the kernel's limit; see \"ip link\" for the names"
        ));
    }
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':');
    if name.contains(bad) || name == "." || name == ".." {
        return Some("is not a name of an interface; see \"ip link\" for the names".to_owned());
    }
    None
}

/// A program and its arguments.
fn command(entry: &Entry<'_, '_>) -> Result<Vec<String>, Error> {
    let words = entry.texts("/usr/local/bin/tell")?;
    let program = words.first().map(|at| at.value).unwrap_or_default();
    if !program.starts_with('/') {
        let message =
            "begins with the absolute path of a program, such as [\"/usr/local/bin/tell\"]";
        return Err(entry.error(format!("on_state_change {message}")));
    }
    if words.iter().any(|at| at.value.contains('\0')) {
        return Err(entry.error("on_state_change holds a zero byte; remove it"));
    }
    Ok(words.into_iter().map(|at| at.value.to_owned()).collect())
}

fn mode(entry: &Entry<'_, '_>) -> Result<AttachMode, Error> {
    let text = entry.text("auto")?;
    MODES
        .iter()
        .find(|(word, _)| *word == text)
        .map(|(_, mode)| *mode)
        .ok_or_else(|| entry.bad(text, "is unknown; use auto, driver or generic"))
}

fn absolute(entry: &Entry<'_, '_>, example: &str) -> Result<PathBuf, Error> {
    let text = entry.text(example)?;
    if !text.starts_with('/') {
        let message = format!("is not an absolute path; begin with \"/\", such as \"{example}\"");
        return Err(entry.bad(text, message));
    }
    if text.contains('\0') {
        return Err(entry.bad(text, "holds a zero byte; remove it"));
    }
    Ok(PathBuf::from(text))
}

fn pin_path(entry: &Entry<'_, '_>) -> Result<PathBuf, Error> {
    let path = absolute(entry, Daemon::PIN_PATH)?;
    // The BPF file system refuses to make names with dots in them (bpf_lookup in
    // kernel/bpf/inode.c); so the error would come only when the daemon starts.
    let last = path.file_name().map(|name| name.to_string_lossy());
    match last {
        Some(name) if !name.contains('.') => Ok(path),
        _ => {
            let message = format!(
                "cannot be made on a BPF file system; use a directory whose name has no dot, such as \"{}\"",
                Daemon::PIN_PATH
            );
            Err(entry.bad(&path.to_string_lossy(), message))
        }
    }
}

fn socket(entry: &Entry<'_, '_>) -> Result<PathBuf, Error> {
    let path = absolute(entry, Daemon::SOCKET)?;
    let text = path.to_string_lossy();
    if text.len() > SOCKET_PATH_MAX {
        let message = format!(
            "is longer than {SOCKET_PATH_MAX} bytes, the limit of a socket's path; shorten it"
        );
        return Err(entry.bad(&text, message));
    }
    if text.ends_with('/') || path.file_name().is_none() {
        return Err(entry.bad(&text, "is a directory; name a file in it"));
    }
    Ok(path)
}

fn http(entry: &Entry<'_, '_>) -> Result<SocketAddr, Error> {
    const WRITE: &str = "write it like \"127.0.0.1:9099\" or \"[::1]:9099\"";
    let text = entry.text("127.0.0.1:9099")?;
    let address: SocketAddr = text
        .parse()
        .map_err(|_| entry.bad(text, format!("is not an address and port; {WRITE}")))?;
    if address.port() == 0 {
        return Err(entry.bad(text, "has port 0; choose 1 to 65535"));
    }
    Ok(address)
}

impl Daemon {
    /// Default of `pin_path`.
    pub const PIN_PATH: &str = "/sys/fs/bpf/sluice";
    /// Default of `socket`.
    pub const SOCKET: &str = "/run/sluice/control.sock";
    /// Default of `gue_port`, the one of Linux' `fou` and of Katran.
    pub const GUE_PORT: u16 = 6080;
    /// Default of `probe_mark`.
    pub const PROBE_MARK: u32 = 0x51c0_0000;

    /// Whether the operator asks for clients on this host, so that not to serve them is an error.
    #[must_use]
    pub fn asks_for_local_clients(&self) -> bool {
        self.local_clients == Some(true) || self.cgroup.is_some()
    }
}

impl Limits {
    /// What `[limits]` has without being told.
    pub const DEFAULT: Self = Self {
        flows: 1 << 20,
        services: 4096,
        listeners: 65536,
        backends: 16384,
        slots: 1 << 22,
        fragments: 8192,
        clients: 65536,
        prefixes: 65536,
        opening: 131_072,
        new_flows_per_cpu: 125_000,
    };
    // Map sizes and numbers in the maps are 32 bits wide; above these the memory is no longer
    // that of one machine.
    const LARGEST: Self = Self {
        flows: 1 << 28,
        services: 1 << 20,
        listeners: 1 << 26,
        backends: 1 << 24,
        slots: 1 << 30,
        fragments: 1 << 24,
        clients: 1 << 28,
        prefixes: 1 << 24,
        opening: 1 << 28,
        new_flows_per_cpu: 1 << 30,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Reads `[limits]`; the offset is where an error about them belongs.
pub(super) fn timeouts(root: &Section<'_>) -> Result<Timeouts, Error> {
    let Some(section) = root.table("timeouts", "timeouts")? else {
        return Ok(Timeouts::default());
    };
    section.only(&["opening", "closing", "time_wait", "closed"])?;
    let timeout = |key, default, example| match section.get(key) {
        None => Ok(default),
        Some(entry) => positive(&entry, example).map(|at| at.value),
    };
    let default = Timeouts::default();
    Ok(Timeouts {
        opening: timeout("opening", default.opening, "1m")?,
        closing: timeout("closing", default.closing, "2m")?,
        time_wait: timeout("time_wait", default.time_wait, "20s")?,
        closed: timeout("closed", default.closed, "10s")?,
    })
}

/// Reads `[limits]`; returns its place in the file too.
pub(super) fn limits(root: &Section<'_>) -> Result<(Limits, usize), Error> {
    let Some(section) = root.table("limits", "limits")? else {
        return Ok((Limits::DEFAULT, 0));
    };
    section.only(&[
        "flows",
        "services",
        "listeners",
        "backends",
        "slots",
        "fragments",
        "clients",
        "prefixes",
        "opening",
        "new_flows_per_cpu",
    ])?;
    let limit = |key, default, largest| match section.get(key) {
        None => Ok(default),
        Some(entry) => entry.integer(1, largest),
    };
    let (default, largest) = (Limits::DEFAULT, Limits::LARGEST);
    let services = limit("services", default.services, largest.services)?;
    let limits = Limits {
        flows: limit("flows", default.flows, largest.flows)?,
        services,
        // Every service has one at least.
        listeners: limit(
            "listeners",
            default.listeners.max(services),
            largest.listeners,
        )?,
        backends: limit("backends", default.backends, largest.backends)?,
        slots: limit("slots", default.slots, largest.slots)?,
        fragments: limit("fragments", default.fragments, largest.fragments)?,
        clients: limit("clients", default.clients, largest.clients)?,
        prefixes: limit("prefixes", default.prefixes, largest.prefixes)?,
        opening: limit("opening", default.opening, largest.opening)?,
        new_flows_per_cpu: match section.get("new_flows_per_cpu") {
            None => default.new_flows_per_cpu,
            Some(entry) => match entry.integer(0, largest.new_flows_per_cpu)? {
                1..NEW_FLOWS_MIN => {
                    return Err(entry.error(format!(
                        "new_flows_per_cpu is too small; choose {NEW_FLOWS_MIN} or more, or 0 for no limit"
                    )));
                }
                rate => rate,
            },
        },
    };
    Ok((limits, section.offset))
}
