//! Whom connections to AWS and to paid services trust: of the roots that Mozilla trusts, as they were when the
//! program was built, Amazon's own for AWS and all for others.
//!
//! To read the machine's own roots takes longer than all else that a function does before its first
//! event, and what they are is nobody's decision. These cost no file. What a company's own authority has
//! signed is trusted by outbound calls where `SSL_CERT_FILE` names a file with its certificate.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use memchr::memmem::Finder;
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

/// What the authorities are called that sign for AWS's services.
/// <https://www.amazontrust.com/repository/>
const AMAZONS: [&[u8]; 2] = [b"Amazon Root CA ", b"Starfield Services Root Certificate Authority - G2"];
/// A root's issuer, which is itself, stands within its first bytes.
const NAMED_WITHIN: usize = 300;

/// Amazon's roots as PEM, which is read before a function's first call: a hundred roots took most of a start.
pub(crate) fn amazon() -> Vec<u8> {
    let (names, mut pem) = (AMAZONS.map(Finder::new), String::new());
    for root in TLS_SERVER_ROOT_CERTS {
        let head = root.get(..NAMED_WITHIN).unwrap_or(root);
        if !names.iter().any(|name| name.find(head).is_some()) {
            continue;
        }
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        STANDARD.encode_string(root, &mut pem);
        pem.push_str("\n-----END CERTIFICATE-----\n");
    }
    pem.into_bytes()
}

/// All roots, and those of `SSL_CERT_FILE`, for outbound calls.
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
    fn amazon_has_five_roots() {
        let pem = String::from_utf8(amazon()).unwrap();
        assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), 5);
    }

    /// A root that the library does not read would end a function at its start.
    #[cfg(feature = "outbound")]
    #[test]
    fn all_roots_are_read() {
        let (all, amazons) =
            (certificates().unwrap(), reqwest::Certificate::from_pem_bundle(&amazon()).unwrap());
        // Those of `SSL_CERT_FILE` come on top, where the machine that tests names some.
        assert!(all.len() >= TLS_SERVER_ROOT_CERTS.len() && amazons.len() == 5);
        reqwest::Client::builder().tls_certs_only(all).build().unwrap();
        reqwest::Client::builder().tls_certs_only(amazons).build().unwrap();
    }
}
