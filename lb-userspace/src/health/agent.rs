//! The line of a backend's agent: a connection, and what is said on it before a line break.

use crate::model::{agent::Report, check::Code};
use std::time::Duration;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    time::{Instant, timeout_at},
};

/// Longest line that is read.
const LINE: u64 = 1024;

/// What the agent says, and how that is called.
pub(super) async fn ask(
    stream: TcpStream,
    deadline: Instant,
    timeout: Duration,
) -> (Code, String, Option<Report>) {
    let line = match timeout_at(deadline, line(stream)).await {
        Ok(Ok(line)) => line,
        Ok(Err(error)) => return (Code::L7Response, error.to_string(), None),
        Err(_) => {
            let text = format!("no line within {timeout:?}");
            return (Code::L7Timeout, text, None);
        }
    };
    match line.parse::<Report>() {
        Ok(report) => {
            let code = match report.up {
                Some(false) => Code::L7Status,
                _ => Code::L7Ok,
            };
            let printable = line.chars().filter(|c| !c.is_control());
            (
                code,
                printable.collect::<String>().trim().to_owned(),
                Some(report),
            )
        }
        Err(wrong) => (Code::L7Response, wrong, None),
    }
}

async fn line(stream: TcpStream) -> std::io::Result<String> {
    let mut stream = stream.take(LINE);
    let mut bytes = Vec::new();
    loop {
        // Agents close behind the line, or leave the connection open: either will do.
        if stream.read_buf(&mut bytes).await? == 0 || bytes.contains(&b'\n') {
            let text = String::from_utf8_lossy(&bytes);
            return Ok(text.lines().next().unwrap_or_default().to_owned());
        }
    }
}
