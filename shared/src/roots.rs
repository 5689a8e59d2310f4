//! Whom connections to AWS and to paid services trust: of the roots that Mozilla trusts, as they were when the
//! program was built, Amazon's own for AWS and all for others.
//!
//! To read the machine's own roots takes longer than all else that a function does before its first
//! event, and what they are is nobody's decision. These cost no file, and are not parsed. What a company's own
//! authority has signed is trusted by outbound calls where `SSL_CERT_FILE` names a file with its certificate.

#[cfg(feature = "outbound")]
use std::sync::Arc;

#[cfg(feature = "outbound")]
use rustls::ClientConfig;
#[cfg(feature = "roots")]
use rustls::RootCertStore;
#[cfg(feature = "roots")]
use rustls::pki_types::pem::PemObject;
#[cfg(feature = "roots")]
use rustls::pki_types::{CertificateDer, TrustAnchor};
#[cfg(feature = "roots")]
use webpki_roots::TLS_SERVER_ROOTS;

/// The roots of the authorities that sign for AWS's services, as PEM, the one form that the AWS clients take.
/// <https://www.amazontrust.com/repository/>
pub(crate) const AMAZON: &str = include_str!("amazon_roots.pem");

/// The protocols that a server may choose from.
#[cfg(feature = "outbound")]
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// All roots, and those of `SSL_CERT_FILE`.
///
/// # Errors
/// If the file cannot be read, or holds something else.
#[cfg(feature = "roots")]
pub(crate) fn anchors() -> Result<Vec<TrustAnchor<'static>>, RootsError> {
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

/// What outbound calls ask of a server.
///
/// # Errors
/// As of [`anchors`].
#[cfg(feature = "outbound")]
pub fn tls() -> Result<ClientConfig, RootsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().map_err(RootsError::Unusable)?;
    let roots = RootCertStore { roots: anchors()? };
    let mut tls = builder.with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
    Ok(tls)
}

/// Why calls cannot be made.
#[cfg(feature = "roots")]
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
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

    use super::*;

    /// What Amazon's roots are called in their first bytes, where a root's issuer, which is itself, stands.
    const AMAZONS: [&[u8]; 2] = [b"Amazon Root CA ", b"Starfield Services Root Certificate Authority - G2"];

    #[test]
    fn amazons_roots_are_those_that_mozilla_trusts() {
        let mut pem = String::new();
        for root in TLS_SERVER_ROOT_CERTS {
            if !AMAZONS.iter().any(|name| root[..300].windows(name.len()).any(|part| part == *name)) {
                continue;
            }
            pem.push_str("-----BEGIN CERTIFICATE-----\n");
            for line in STANDARD.encode(root).as_bytes().chunks(64) {
                pem.push_str(std::str::from_utf8(line).unwrap());
                pem.push('\n');
            }
            pem.push_str("-----END CERTIFICATE-----\n");
        }
        assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), 5);
        assert_eq!(AMAZON, pem, "amazon_roots.pem must be:\n{pem}");
    }

    /// The HTTP client takes the library's types as they are; were they another version's, it would not start.
    #[cfg(feature = "outbound")]
    #[test]
    fn the_http_client_takes_the_roots() {
        assert!(TLS_SERVER_ROOTS.len() > 100);
        reqwest::Client::builder().tls_backend_preconfigured(tls().unwrap()).build().unwrap();
    }
}
