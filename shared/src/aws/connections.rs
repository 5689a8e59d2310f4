//! The connections of all AWS clients.

use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;

use crate::roots;

/// Why no AWS client can be made.
#[derive(Debug, thiserror::Error)]
#[error("connections to AWS cannot be made")]
pub struct NoConnections(#[source] Box<dyn std::error::Error + Send + Sync>);

/// One pool of connections, which is made with the first call.
///
/// The client below makes another with every AWS client, throws it away, and calls that a validation: there the
/// machine's roots would be found to be unreadable before a request is. These roots are compiled in, and to read
/// them once for each client, of each tenant's session, is time that a start or a first request waits for.
#[derive(Debug)]
pub(super) struct Connections(SharedHttpClient);

impl Connections {
    /// # Errors
    /// [`NoConnections`].
    pub(super) fn new() -> Result<Self, NoConnections> {
        let roots = TrustStore::empty().with_pem_certificate(roots::AMAZON);
        let tls = TlsContext::builder().with_trust_store(roots).build();
        let tls = tls.map_err(|error| NoConnections(Box::new(error)))?;
        let client = Builder::new().tls_provider(Provider::Rustls(CryptoMode::AwsLc)).tls_context(tls);
        Ok(Self(client.build_https()))
    }
}

impl HttpClient for Connections {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        self.0.http_connector(settings, components)
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.0.connector_metadata()
    }
}
