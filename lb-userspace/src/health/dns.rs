//! `dns`: a question to a name server, over UDP (RFC 1035).

use super::{Via, connect, probe::Outcome, udp};
use crate::{
    config::{Dns, rcode_name},
    model::check::Code,
};
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    net::SocketAddr,
    time::Duration,
};
use tokio::time::{Instant, timeout_at};

pub(super) async fn ask(
    question: &Dns,
    (address, via): (SocketAddr, Option<Via>),
    deadline: Instant,
    timeout: Duration,
) -> Outcome {
    Ok(
        match timeout_at(deadline, exchange(question, address, via)).await {
            Ok(Ok(Some(answer))) => {
                let code = answer.metadata.response_code;
                let name = rcode_name(code);
                let records = answer.answers.len();
                let text = match records {
                    1 => format!("{name}, 1 record"),
                    _ => format!("{name}, {records} records"),
                };
                if question.rcodes.contains(&code) {
                    (Code::L7Ok, text)
                } else {
                    (Code::L7Status, name)
                }
            }
            Ok(Ok(None)) => (Code::L7Response, "the answer is not DNS".to_owned()),
            Ok(Err(error)) => return udp::unreachable(error),
            Err(_) => (Code::L7Timeout, format!("no answer within {timeout:?}")),
        },
    )
}

/// The answer to the question; `None`: what came is none.
async fn exchange(
    question: &Dns,
    address: SocketAddr,
    via: Option<Via>,
) -> io::Result<Option<Message>> {
    // Every state is seeded anew, and what it makes of nothing cannot be guessed from outside.
    let id = RandomState::new().hash_one(()) as u16;
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(question.name.clone(), question.record));
    let bytes = message.to_vec().map_err(io::Error::other)?;
    let socket = connect::udp(address, via).await?;
    socket.send(&bytes).await?;
    loop {
        let datagram = udp::receive(&socket).await?;
        let Ok(answer) = Message::from_vec(&datagram) else {
            return Ok(None);
        };
        // Not ours: the late answer to the question of another check.
        if answer.metadata.id == id && answer.metadata.message_type == MessageType::Response {
            return Ok(Some(answer));
        }
    }
}
