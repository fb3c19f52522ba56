//! Sockets to a backend, and what their errors mean.

use super::{Via, probe::Outcome};
use crate::model::check::Code;
use lb_common::{
    names::{FORWARD, name_of},
    service::forward,
};
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

/// Connects so that closing sends RST: neither side is left with TIME_WAIT, nor the backend with a
/// finished connection in its accept queue.
pub(super) async fn tcp(address: SocketAddr, via: Option<Via>) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_zero_linger()?;
    if let Some(via) = via {
        mark(&socket, via)?;
        if forward::encapsulates(via.forward) {
            option(
                &socket,
                libc::IPPROTO_TCP,
                libc::TCP_MAXSEG,
                ENCAPSULATED_SEGMENT,
            )?;
        }
    }
    socket.connect(address).await
}

/// A socket that hears from nobody but `address`, and of every ICMP error on the way there.
pub(super) async fn udp(address: SocketAddr, via: Option<Via>) -> io::Result<UdpSocket> {
    let (any, level, name) = match address {
        SocketAddr::V4(_) => (
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            libc::IPPROTO_IP,
            libc::IP_RECVERR,
        ),
        SocketAddr::V6(_) => (
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            libc::IPPROTO_IPV6,
            libc::IPV6_RECVERR,
        ),
    };
    let socket = UdpSocket::bind(any).await?;
    // Without it the kernel tells only of closed ports, not of hosts and networks out of reach
    // (udp(7), ip(7)).
    option(&socket, level, name, 1)?;
    if let Some(via) = via {
        mark(&socket, via)?;
    }
    socket.connect(address).await?;
    Ok(socket)
}

/// Bytes of a segment that leave room for any encapsulation in the smallest MTU of IPv6.
const ENCAPSULATED_SEGMENT: libc::c_int = 1152;

/// Has the packets of a socket led to the VIP.
fn mark(socket: &impl AsRawFd, via: Via) -> io::Result<()> {
    let mark = via.mark.cast_signed();
    option(socket, libc::SOL_SOCKET, libc::SO_MARK, mark)
}

fn option(socket: &impl AsRawFd, level: i32, name: i32, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the option's value is a live int of the length that is told.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What no connection means for a check that was led to the VIP.
pub(super) fn led((code, text): (Code, String), via: Option<Via>) -> (Code, String) {
    let Some(via) = via else {
        return (code, text);
    };
    let mode = name_of(FORWARD, via.forward);
    let question = match code {
        Code::L4Timeout if forward::encapsulates(via.forward) => {
            "does the backend take the encapsulation off and hold the VIP?"
        }
        Code::L4Timeout => "does the backend hold the VIP?",
        _ => "does the server listen on the VIP?",
    };
    (code, format!("{text} through {mode}: {question}"))
}

/// What an error of a socket says about the backend.
pub(super) fn failed(error: io::Error) -> Outcome {
    let text = match error.raw_os_error() {
        // This host is out of files, ports or memory.
        Some(
            libc::EMFILE
            | libc::ENFILE
            | libc::EADDRNOTAVAIL
            | libc::EAGAIN
            | libc::ENOBUFS
            | libc::ENOMEM,
        ) => return Err(error),
        Some(libc::ETIMEDOUT) => return Ok((Code::L4Timeout, String::new())),
        Some(libc::ECONNREFUSED) => "connection refused".to_owned(),
        Some(libc::ECONNRESET) => "connection reset".to_owned(),
        Some(libc::EHOSTUNREACH) => "no route to host".to_owned(),
        Some(libc::ENETUNREACH) => "network is unreachable".to_owned(),
        _ => error.to_string(),
    };
    Ok((Code::L4Connection, text))
}
