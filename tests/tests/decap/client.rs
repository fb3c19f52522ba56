//! A client that encapsulates its own packets, independently of the balancer.

use sluice_tests::topology::{Topology, VIP4, VIP6};
use std::{
    fs::File,
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// The outer packet of an encapsulation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Encapsulation {
    Ipip,
    /// Version 1 of GUE, to this port.
    Gue(u16),
}

/// Makes a TUN device `tun0` in the network namespace of this thread. With `partial`, packets come
/// out of it without finished checksums, as a veth carries them.
fn open_tun(partial: bool) -> io::Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
    const TUN_F_CSUM: libc::c_ulong = 1;
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // struct ifreq: name and flags.
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tun0");
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI;
    if partial {
        flags |= libc::IFF_VNET_HDR;
    }
    request[16..18].copy_from_slice(&(flags as u16).to_ne_bytes());
    // SAFETY: the record is as long as the kernel reads and writes.
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes a plain number.
    if partial && unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETOFFLOAD, TUN_F_CSUM) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun)
}

/// Bytes of `struct virtio_net_hdr` in front of each packet of a TUN with `IFF_VNET_HDR`.
const VNET_HEADER: usize = 10;

fn socket(to: IpAddr, kind: i32, protocol: i32) -> OwnedFd {
    let domain = if to.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // SAFETY: a plain system call; the descriptor is ours alone.
    unsafe {
        let fd = libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol);
        assert!(fd >= 0, "socket: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

fn connect(socket: &OwnedFd, to: SocketAddr) {
    let result = match to {
        SocketAddr::V4(to) => {
            let address = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: to.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(to.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: the address is valid for the length given.
            unsafe {
                libc::connect(
                    socket.as_raw_fd(),
                    (&raw const address).cast(),
                    size_of_val(&address) as u32,
                )
            }
        }
        SocketAddr::V6(to) => {
            let address = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: to.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: to.ip().octets(),
                },
                sin6_scope_id: 0,
            };
            // SAFETY: as above.
            unsafe {
                libc::connect(
                    socket.as_raw_fd(),
                    (&raw const address).cast(),
                    size_of_val(&address) as u32,
                )
            }
        }
    };
    assert_eq!(result, 0, "connect: {}", io::Error::last_os_error());
}

/// Lets the client's packets for the VIPs go to the backend at `outer`, encapsulated.
pub fn encapsulate(net: &Topology, outer: IpAddr, how: Encapsulation, partial: bool) {
    let (sender, opened) = std::sync::mpsc::channel();
    net.background("client", move || {
        let mut tun = open_tun(partial).expect("a TUN device");
        // The kernel writes the outer IP header, and the UDP header.
        let sockets = match how {
            Encapsulation::Ipip => [libc::IPPROTO_IPIP, libc::IPPROTO_IPV6].map(|protocol| {
                let socket = socket(outer, libc::SOCK_RAW, protocol);
                connect(&socket, SocketAddr::new(outer, 0));
                socket
            }),
            Encapsulation::Gue(port) => [(); 2].map(|()| {
                let socket = socket(outer, libc::SOCK_DGRAM, 0);
                connect(&socket, SocketAddr::new(outer, port));
                socket
            }),
        };
        sender.send(()).expect("the test waits");
        let mut packet = vec![0; 65536];
        // Ends when the namespace goes, and the device with it.
        while let Ok(len) = tun.read(&mut packet) {
            let inner = &packet[if partial { VNET_HEADER } else { 0 }..len];
            let socket = &sockets[usize::from(inner[0] >> 4 == 6)];
            // SAFETY: the buffer is valid for the length given.
            unsafe {
                libc::send(socket.as_raw_fd(), inner.as_ptr().cast(), inner.len(), 0);
            }
        }
    });
    opened.recv().expect("the TUN device was made");
    let ip = |args: &[&str]| net.run("client", "ip", args).ok();
    // Leaves room for the outer headers.
    ip(&["link", "set", "tun0", "mtu", "1400", "up"]);
    let (v4, v6) = (net.v4("client").to_string(), net.v6("client").to_string());
    let (vip4, vip6) = (VIP4.to_string(), VIP6.to_string());
    ip(&["route", "add", &vip4, "dev", "tun0", "src", &v4]);
    ip(&["route", "add", &vip6, "dev", "tun0", "src", &v6]);
}
