//! Configurations, servers and clients for end-to-end tests.

use sluice_tests::topology::{Topology, VIP4, VIP6};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::FromRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Checks that notice a dead backend within half a second.
pub const QUICK_HEALTH: &str = "[service.health]\ntype = \"http\"\npath = \"/health\"\n\
     interval = \"200ms\"\ntimeout = \"200ms\"\nrise = 1\nfall = 2\n";

/// Both VIPs at a port.
pub fn vips(port: u16) -> [SocketAddr; 2] {
    [
        SocketAddr::new(VIP4.into(), port),
        SocketAddr::new(VIP6.into(), port),
    ]
}

/// One `[[service]]` with backends `b1` … `bN` of the VIP's family at `port`; `keys` and `health`
/// are lines of the service.
pub fn service(
    topology: &Topology,
    name: &str,
    protocol: &str,
    listen: SocketAddr,
    (backends, port): (u8, u16),
    keys: &str,
    health: &str,
) -> String {
    let mut text = format!(
        "[[service]]\nname = \"{name}\"\nlisten = \"{listen}\"\nprotocol = \"{protocol}\"\n\
         forward = \"nat\"\nscheduler = \"round-robin\"\n{keys}\n{health}"
    );
    for n in 1..=backends {
        let host = format!("b{n}");
        let ip: IpAddr = if listen.is_ipv4() {
            topology.v4(&host).into()
        } else {
            topology.v6(&host).into()
        };
        let address = SocketAddr::new(ip, port);
        let _ = write!(
            text,
            "[[service.backend]]\nname = \"{host}\"\naddress = \"{address}\"\n"
        );
    }
    text
}

/// Services `web` and `web6` at port 80 of the VIPs, with nginx behind them.
pub fn web(topology: &Topology, backends: u8, keys: &str) -> String {
    let [v4, v6] = vips(80);
    topology.daemon_section()
        + &service(
            topology,
            "web",
            "tcp",
            v4,
            (backends, 8080),
            keys,
            QUICK_HEALTH,
        )
        + &service(
            topology,
            "web6",
            "tcp",
            v6,
            (backends, 8080),
            keys,
            QUICK_HEALTH,
        )
}

/// A topology with nginx on every backend and the daemon running; all backends up.
pub fn web_topology(options: sluice_tests::topology::Options, keys: &str) -> (Topology, u32) {
    let topology = Topology::new(options);
    for n in 1..=options.backends {
        topology.nginx(&format!("b{n}"));
    }
    let config = topology.config("sluice.toml", &web(&topology, options.backends, keys));
    let daemon = topology.daemon(&config);
    topology.wait_backends_up(None, 2 * usize::from(options.backends));
    (topology, daemon)
}

/// One HTTP request on a connection of its own.
pub fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(io::Error::other(format!("not a good answer: {text:?}"))),
    }
}

/// A connection that stays open between requests.
pub struct KeptConnection(TcpStream);

impl KeptConnection {
    pub fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self(stream))
    }

    /// One request for `/`; its body.
    pub fn get(&mut self) -> io::Result<String> {
        self.0.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")?;
        let mut seen = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            let n = self.0.read(&mut buffer)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            seen.extend(&buffer[..n]);
            // The servers answer "b<n>\n".
            if let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n")
                && seen[end + 4..].ends_with(b"\n")
            {
                return Ok(String::from_utf8_lossy(&seen[end + 4..]).into_owned());
            }
        }
    }
}

/// A UDP server on a host that answers every datagram with the host's name and the datagram.
pub struct UdpEcho {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl UdpEcho {
    pub fn start(topology: &Topology, host: &str, port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (stop.clone(), host.to_owned());
        let thread = topology.background(host, move || {
            // Takes both families.
            let socket = UdpSocket::bind(("::", port)).expect("a free port in a namespace");
            socket
                .set_read_timeout(Some(Duration::from_millis(50)))
                .expect("a timeout on a socket");
            let mut buffer = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((n, from)) = socket.recv_from(&mut buffer) {
                    let answer = [name.as_bytes(), b" ", &buffer[..n]].concat();
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

/// Sends datagrams of these lengths to a VIP with [`UdpEcho`] behind it, from so many sockets, and checks what comes
/// back; how many sockets each host has answered.
pub fn echoes(vip: SocketAddr, sockets: u16, lengths: &[usize]) -> BTreeMap<String, u32> {
    let any: IpAddr = match vip {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut seen = BTreeMap::new();
    for n in 0..sockets {
        // A port drawn by the kernel may be drawn twice, and then is no new client.
        let socket = UdpSocket::bind((any, 20000 + n)).expect("a socket");
        socket.connect(vip).expect("a route to the VIP");
        let patience = Some(Duration::from_secs(5));
        socket.set_read_timeout(patience).expect("a timeout");
        let mut host = None;
        for len in lengths {
            let sent: Vec<u8> = (0..*len).map(|i| i as u8).collect();
            socket.send(&sent).expect("the datagram leaves");
            let mut buffer = [0; 8192];
            let got = socket
                .recv(&mut buffer)
                .unwrap_or_else(|e| panic!("{len} bytes to {vip}: {e}"));
            let (name, echo) = buffer[..got].split_at(3);
            assert_eq!(echo, sent, "the echo of {len} bytes");
            let name = String::from_utf8_lossy(name).into_owned();
            let first = host.get_or_insert_with(|| name.clone());
            assert_eq!(*first, name, "one client, one backend");
        }
        *seen.entry(host.expect("it answered")).or_default() += 1;
    }
    seen
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One echo request from the calling thread's namespace; whether it was answered.
pub fn ping(ip: IpAddr) -> io::Result<bool> {
    // Datagram sockets for ICMP are for groups the administrator names; here for all.
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    let (family, protocol, kind, reply) = match ip {
        IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP, 8, 0),
        IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128, 129),
    };
    // SAFETY: plain system call.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a datagram socket that nobody else owns; the standard library's type only sends and
    // receives on it.
    let socket = unsafe { UdpSocket::from_raw_fd(fd) };
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    // The kernel fills in identifier and checksum.
    let mut request = vec![kind, 0, 0, 0, 0, 0, 0, 1];
    request.extend(b"is anybody there?");
    socket.send_to(&request, SocketAddr::new(ip, 0))?;
    let mut buffer = [0; 256];
    let n = match socket.recv(&mut buffer) {
        Ok(n) => n,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            ) =>
        {
            return Ok(false);
        }
        Err(e) => return Err(e),
    };
    Ok(buffer[0] == reply && buffer[8..n] == request[8..])
}
