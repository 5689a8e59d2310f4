//! Whom connections to AWS and to paid services trust: of the roots that Mozilla trusts, as they were when the
//! program was built, Amazon's own for AWS and all for others.
//!
//! To read the machine's own roots takes longer than all else that a function does before its first
//! event, and what they are is nobody's decision. These cost no file, and are not parsed. What a company's own
//! authority has signed is trusted by outbound calls where `SSL_CERT_FILE` names a file with its certificate.

use std::sync::Arc;

use rustls::pki_types::TrustAnchor;
#[cfg(feature = "roots")]
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use webpki_roots::TLS_SERVER_ROOTS;

/// How the names of the authorities end that sign for AWS's services.
/// <https://www.amazontrust.com/repository/>
const AMAZONS: [&str; 5] = [
    "Amazon Root CA 1",
    "Amazon Root CA 2",
    "Amazon Root CA 3",
    "Amazon Root CA 4",
    "Starfield Services Root Certificate Authority - G2",
];

/// The roots of the authorities that sign for AWS's services.
pub(crate) fn amazon() -> Vec<TrustAnchor<'static>> {
    let named = |root: &&TrustAnchor<'_>| AMAZONS.iter().any(|name| root.subject.ends_with(name.as_bytes()));
    TLS_SERVER_ROOTS.iter().filter(named).cloned().collect()
}

/// All roots, and those of `SSL_CERT_FILE`.
///
/// # Errors
/// If the file cannot be read, or holds something else.
#[cfg(feature = "roots")]
fn anchors() -> Result<Vec<TrustAnchor<'static>>, RootsError> {
    let mut roots = RootCertStore { roots: TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = crate::env::optional("SSL_CERT_FILE") {
        let own = std::fs::read(path).map_err(RootsError::Unreadable)?;
        for certificate in CertificateDer::pem_slice_iter(&own) {
            roots.add(certificate.map_err(|_| RootsError::Malformed)?).map_err(RootsError::Unusable)?;
        }
        if roots.len() == TLS_SERVER_ROOTS.len() {
            return Err(RootsError::Malformed);
        }
    }
    Ok(roots.roots)
}

/// Whom outbound calls trust, and how they are spoken to. A copy of it shares all that it has.
///
/// # Errors
/// If the file cannot be read, or holds something else.
#[cfg(feature = "roots")]
pub fn outbound() -> Result<ClientConfig, RootsError> {
    let mut tls = trusting(anchors()?)?;
    // What a server may choose from.
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

/// TLS with servers that one of these authorities has signed for.
///
/// # Errors
/// If the TLS library does not start.
pub(crate) fn trusting(roots: Vec<TrustAnchor<'static>>) -> Result<ClientConfig, RootsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().map_err(RootsError::Unusable)?;
    Ok(builder.with_root_certificates(RootCertStore { roots }).with_no_client_auth())
}

/// Why calls cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("the file that SSL_CERT_FILE names cannot be read")]
    Unreadable(#[source] std::io::Error),
    /// It holds no certificates.
    #[error("the file that SSL_CERT_FILE names holds no certificates in PEM")]
    Malformed,
    /// The TLS library refuses what it holds, or does not start.
    #[error("the certificates, those of SSL_CERT_FILE among them, cannot be used")]
    Unusable(#[source] rustls::Error),
    /// The HTTP client does not start.
    #[cfg(feature = "outbound")]
    #[error("outbound calls cannot be made")]
    Client(#[from] reqwest::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aws_is_known_by_amazons_roots_and_no_others() {
        let roots = amazon();
        assert_eq!(roots.len(), AMAZONS.len());
        for name in AMAZONS {
            assert!(roots.iter().any(|root| root.subject.ends_with(name.as_bytes())), "{name}");
        }
    }

    /// The HTTP client takes the library's types as they are; were they another version's, it would not start.
    #[cfg(feature = "outbound")]
    #[test]
    fn the_http_client_takes_the_roots() {
        assert!(TLS_SERVER_ROOTS.len() > 100);
        reqwest::Client::builder().tls_backend_preconfigured(outbound().unwrap()).build().unwrap();
    }
}
