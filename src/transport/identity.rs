//! TLS: a certificate per migration, known by its fingerprint and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use ring::digest;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

/// The protocol that both ends must speak.
const ALPN: &[u8] = b"farfault/2";
/// Sent as SNI and ignored: the fingerprint identifies the receiver.
pub(super) const SERVER_NAME: &str = "farfault";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// A receiver's certificate and its private key.
pub(super) struct Identity {
    /// DER.
    pub(super) certificate: Vec<u8>,
    /// PKCS #8, DER.
    pub(super) key: Vec<u8>,
}

impl Identity {
    /// A fresh, self-signed one.
    pub(super) fn fresh() -> Result<Self, String> {
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])
            .map_err(|error| error.to_string())?;
        let certificate = made.cert.der().to_vec();
        Ok(Identity { certificate, key: made.signing_key.serialize_der() })
    }

    /// By which senders know it.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        sha256(&self.certificate)
    }

    /// The receiver's TLS side.
    pub(super) fn config(&self) -> Result<QuicServerConfig, String> {
        let key = PrivatePkcs8KeyDer::from(self.key.clone());
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .with_no_client_auth()
            .with_single_cert(vec![CertificateDer::from(self.certificate.clone())], key.into())
            .map_err(|error| error.to_string())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Nothing is resumed by TLS: a new connection proves the secret anew.
        config.send_tls13_tickets = 0;
        QuicServerConfig::try_from(config).map_err(|error| error.to_string())
    }
}

/// The sender's TLS side, which accepts the certificate of that fingerprint alone. The flag is set when
/// another certificate was shown.
pub(super) fn sender(fingerprint: [u8; 32]) -> (QuicClientConfig, Arc<AtomicBool>) {
    let mismatch = Arc::new(AtomicBool::new(false));
    let provider = provider();
    let verifier = PinnedCertificate {
        fingerprint,
        algorithms: provider.signature_verification_algorithms,
        mismatch: mismatch.clone(),
    };
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    (QuicClientConfig::try_from(config).expect("the provider has QUIC's initial suite"), mismatch)
}

/// Names, dates and chains say nothing here: the ticket says which certificate it must be. That the
/// peer holds its key is verified as always.
#[derive(Debug)]
struct PinnedCertificate {
    fingerprint: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
    mismatch: Arc<AtomicBool>,
}

impl ServerCertVerifier for PinnedCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if sha256(end_entity) == self.fingerprint {
            return Ok(ServerCertVerified::assertion());
        }
        self.mismatch.store(true, Relaxed);
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn no_certificate_goes_by_the_clock_of_a_host() {
        let identity = Identity::fresh().unwrap();
        let provider = provider();
        let verifier = PinnedCertificate {
            fingerprint: identity.fingerprint(),
            algorithms: provider.signature_verification_algorithms,
            mismatch: Arc::default(),
        };
        let certificate = CertificateDer::from(identity.certificate);
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        // A clock without a battery, and any other.
        for years in [0, 10, 56, 1_000, 100_000] {
            let now = UnixTime::since_unix_epoch(Duration::from_secs(years * 31_556_952));
            verifier.verify_server_cert(&certificate, &[], &name, &[], now).unwrap();
        }
    }
}
