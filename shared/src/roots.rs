//! Whom connections to AWS and to paid services trust: the roots that Mozilla trusts, as they were when the
//! program was built.
//!
//! To read the machine's own roots takes longer than all else that a function does before its first
//! event, and what they are is nobody's decision. These cost no file. What a company's own authority has
//! signed is trusted where `SSL_CERT_FILE` names a file with its certificate.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

/// All of them as PEM.
pub(crate) fn pem() -> Vec<u8> {
    let mut pem = String::new();
    for root in TLS_SERVER_ROOT_CERTS {
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        STANDARD.encode_string(root, &mut pem);
        pem.push_str("\n-----END CERTIFICATE-----\n");
    }
    pem.into_bytes()
}

/// All of them, and those of `SSL_CERT_FILE`, for outbound calls.
///
/// # Errors
/// If the file cannot be read, or holds something else.
#[cfg(feature = "outbound")]
pub fn certificates() -> Result<Vec<reqwest::Certificate>, RootsError> {
    let known = TLS_SERVER_ROOT_CERTS.iter().map(|root| reqwest::Certificate::from_der(root));
    let mut all = known.collect::<Result<Vec<_>, _>>()?;
    if let Ok(path) = crate::env::text("SSL_CERT_FILE") {
        let own = std::fs::read(path).map_err(RootsError::Unreadable)?;
        all.extend(reqwest::Certificate::from_pem_bundle(&own)?);
    }
    Ok(all)
}

/// Why calls cannot be made.
#[cfg(feature = "outbound")]
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("the file that SSL_CERT_FILE names cannot be read")]
    Unreadable(#[source] std::io::Error),
    /// It holds no certificates, or the TLS library does not start.
    #[error("the certificates, those of SSL_CERT_FILE among them, cannot be used")]
    Unusable(#[from] reqwest::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compiled_in_is_certificates() {
        let pem = String::from_utf8(pem()).unwrap();
        assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), TLS_SERVER_ROOT_CERTS.len());
        assert!(TLS_SERVER_ROOT_CERTS.len() > 100);
    }

    /// Both libraries read all of them: one that they do not would end a function at its start.
    #[cfg(feature = "outbound")]
    #[test]
    fn all_roots_are_read_by_who_is_given_them() {
        let all = certificates().unwrap();
        // Those of `SSL_CERT_FILE` come on top, where the machine that tests names some.
        assert!(all.len() >= reqwest::Certificate::from_pem_bundle(&pem()).unwrap().len());
        reqwest::Client::builder().tls_certs_only(all).build().unwrap();
    }
}
