//! `udp`: a datagram, and what comes back.

use super::{Via, connect, probe::Outcome};
use crate::{config::Udp, model::check::Code};
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

/// The longest datagram there is.
const DATAGRAM: usize = 65_536;

pub(super) async fn ask(
    question: &Udp,
    (address, via): (SocketAddr, Option<Via>),
    deadline: Instant,
    timeout: Duration,
) -> Outcome {
    let answer = timeout_at(deadline, exchange(question, address, via)).await;
    Ok(match (answer, &question.answer) {
        (Ok(Ok(answer)), Some(pattern)) if !pattern.is_in(&answer) => (
            Code::L7Response,
            format!("the answer does not match \"{}\"", pattern.as_str()),
        ),
        (Ok(Ok(answer)), _) => (Code::L7Ok, format!("{} bytes", answer.len())),
        (Ok(Err(error)), _) => return unreachable(error),
        (Err(_), _) if question.must_answer => {
            (Code::L7Timeout, format!("no answer within {timeout:?}"))
        }
        (Err(_), _) => (Code::L4Ok, "silent, and nobody refused".to_owned()),
    })
}

async fn exchange(question: &Udp, address: SocketAddr, via: Option<Via>) -> io::Result<Vec<u8>> {
    let socket = connect::udp(address, via).await?;
    socket.send(&question.payload).await?;
    receive(&socket).await
}

/// The next datagram of the backend.
pub(super) async fn receive(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    let mut datagram = vec![0; DATAGRAM];
    let length = socket.recv(&mut datagram).await?;
    datagram.truncate(length);
    Ok(datagram)
}

/// What an error of a datagram socket says: ICMP errors come this way.
pub(super) fn unreachable(error: io::Error) -> Outcome {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => Ok((Code::L4Connection, "port unreachable".to_owned())),
        Some(libc::EHOSTUNREACH) => Ok((Code::L4Connection, "host unreachable".to_owned())),
        Some(libc::ENETUNREACH) => Ok((Code::L4Connection, "network unreachable".to_owned())),
        _ => connect::failed(error),
    }
}
