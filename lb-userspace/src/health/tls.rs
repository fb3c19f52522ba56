//! `tls`, and what `https` begins with: a TLS handshake.

use crate::{config::Tls, model::check::Code};
use rustls::{AlertDescription, CertificateError, Error, pki_types::ServerName};
use std::{io, net::SocketAddr};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Makes the handshake; or what is wrong with the backend.
pub(super) async fn handshake(
    stream: TcpStream,
    tls: &Tls,
    address: SocketAddr,
    deadline: Instant,
) -> Result<TlsStream<TcpStream>, (Code, String)> {
    let name = match &tls.name {
        Some(name) => ServerName::try_from(name.clone()).map_err(|_| {
            (
                Code::L6Response,
                format!("health.sni {name:?} is not a name"),
            )
        })?,
        None => ServerName::IpAddress(address.ip().into()),
    };
    let handshake = TlsConnector::from(tls.client.clone()).connect(name, stream);
    match timeout_at(deadline, handshake).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err((Code::L6Response, explain(&error))),
        Err(_) => Err((Code::L6Response, "no TLS handshake in time".to_owned())),
    }
}

/// Ends a connection of which nothing more is wanted. Reset at once, the backend would not hear the
/// end of the handshake, and log an error for every check.
pub(super) async fn part(mut stream: TlsStream<TcpStream>, deadline: Instant) {
    let end = async {
        stream.shutdown().await?;
        stream.read(&mut [0; 64]).await
    };
    // The handshake was made; how the backend says goodbye is of no interest.
    let _ = timeout_at(deadline, end).await;
}

/// `TLSv1.3`, as operators write it.
pub(super) fn version(stream: &TlsStream<TcpStream>) -> String {
    let version = stream.get_ref().1.protocol_version();
    match version.and_then(|version| version.as_str()) {
        Some("TLSv1_2") => "TLSv1.2".to_owned(),
        Some("TLSv1_3") => "TLSv1.3".to_owned(),
        Some(other) => other.to_owned(),
        None => String::new(),
    }
}

fn explain(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(Error::InvalidCertificate(why)) => format!("the certificate {}", certificate(why)),
        Some(Error::InvalidMessage(_)) => "the answer is not TLS".to_owned(),
        Some(Error::AlertReceived(AlertDescription::CertificateRequired)) => {
            "the backend wants a client certificate; add cert and key".to_owned()
        }
        Some(Error::AlertReceived(alert)) => format!("the backend refuses: {alert:?}"),
        Some(other) => other.to_string(),
        None => match error.kind() {
            io::ErrorKind::ConnectionReset => "connection reset".to_owned(),
            io::ErrorKind::UnexpectedEof => "hung up in the handshake".to_owned(),
            _ => error.to_string(),
        },
    }
}

fn certificate(why: &CertificateError) -> String {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet".to_owned()
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "is of an authority that is not in ca".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "is for another name than sni".to_owned()
        }
        // What `openssl req -x509` makes unless told "basicConstraints=CA:FALSE".
        CertificateError::Other(other) if format!("{other:?}").contains("CaUsedAsEndEntity") => {
            "is an authority's, not a server's (CA:TRUE)".to_owned()
        }
        other => format!("will not do: {other:?}"),
    }
}
