//! What a check over TLS needs: certificates, keys, and the name that is asked for.

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
};
use std::{fmt, sync::Arc};

/// A check over TLS, made ready: nothing is read again when it runs.
#[derive(Clone)]
pub struct Tls {
    /// The name that is asked for, and that the certificate must bear if it is verified; `None`:
    /// the backend's address, which goes without the extension.
    pub name: Option<String>,
    /// The client's side of TLS.
    pub client: Arc<ClientConfig>,
    /// What `client` was made of, so that a file that changed is noticed.
    sources: [Vec<u8>; 3],
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.sources == other.sources
    }
}

impl Eq for Tls {}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [ca, cert, _] = &self.sources;
        f.debug_struct("Tls")
            .field("name", &self.name)
            .field("verify", &!ca.is_empty())
            .field("client_certificate", &!cert.is_empty())
            .finish_non_exhaustive()
    }
}

/// Whether `text` can be asked for in a handshake.
pub(super) fn server_name(text: &str) -> Result<(), String> {
    ServerName::try_from(text)
        .map(drop)
        .map_err(|_| "is not the name of a server; write it like \"www.example.com\"".to_owned())
}

impl Tls {
    /// From the content of PEM files: the authorities to trust (none: any certificate will do),
    /// the client's certificate chain and its key. `alpn` is what will be spoken (RFC 7301).
    ///
    /// # Errors
    ///
    /// Which of `ca`, `cert` and `key` will not do, and why.
    pub(super) fn new(
        name: Option<String>,
        alpn: &[&str],
        ca: &[u8],
        cert: &[u8],
        key: &[u8],
    ) -> Result<Self, (&'static str, String)> {
        let certificates = |pem: &[u8], key: &'static str| {
            CertificateDer::pem_slice_iter(pem)
                .collect::<Result<Vec<_>, _>>()
                .ok()
                .filter(|found| !found.is_empty())
                .ok_or((
                    key,
                    "holds no certificate; it must be in PEM format".to_owned(),
                ))
        };
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| ("ca", error.to_string()))?;
        let builder = if ca.is_empty() {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        } else {
            let mut roots = RootCertStore::empty();
            let (good, _) = roots.add_parsable_certificates(certificates(ca, "ca")?);
            if good == 0 {
                return Err(("ca", "holds no certificate that can be used".to_owned()));
            }
            builder.with_root_certificates(roots)
        };
        let mut client = if cert.is_empty() {
            builder.with_no_client_auth()
        } else {
            let chain = certificates(cert, "cert")?;
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
                (
                    "key",
                    "holds no private key; it must be in PEM format".to_owned(),
                )
            })?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| ("key", format!("does not go with cert: {error}")))?
        };
        // Every check sees the certificate that is there now.
        client.resumption = Resumption::disabled();
        client.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(Self {
            name,
            client: Arc::new(client),
            sources: [ca.to_vec(), cert.to_vec(), key.to_vec()],
        })
    }
}

/// Takes any certificate, but still wants the handshake signed with its key.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
