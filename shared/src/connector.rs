//! How connections to other services are made: TCP, TLS where the address asks for it, all within a time.

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_rustls::builderstates::WantsProtocols1;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{CaptureConnection, HttpConnector};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tower_service::Service;

/// Makes connections for a pool of them.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    tls: HttpsConnector<HttpConnector>,
    /// How long a connection may take to make: the name, the connection and the handshake.
    within: Duration,
}

impl Connector {
    /// For HTTP/1.1.
    #[cfg(any(feature = "dynamodb", feature = "secrets"))]
    pub(crate) fn http1(tls: ClientConfig, within: Duration) -> Self {
        Self { tls: secure(tls).enable_http1().wrap_connector(tcp()), within }
    }

    /// For HTTP/2.
    #[cfg(feature = "vectors")]
    pub(crate) fn http2(tls: ClientConfig, within: Duration) -> Self {
        Self { tls: secure(tls).enable_http2().wrap_connector(tcp()), within }
    }
}

/// With TLS for addresses that ask for it; which protocols servers are offered is for the builder to say.
fn secure(mut tls: ClientConfig) -> HttpsConnectorBuilder<WantsProtocols1> {
    tls.alpn_protocols.clear();
    HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http()
}

/// Says of a call's connection, if it has come to one, that no further call is to go over it.
pub(crate) fn poison(connection: &CaptureConnection) {
    if let Some(connection) = connection.connection_metadata().as_ref() {
        connection.poison();
    }
}

fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    tcp.enforce_http(false);
    tcp
}

type Connecting<T> = Pin<Box<dyn Future<Output = Result<T, Box<dyn Error + Send + Sync>>> + Send>>;

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = Connecting<Self::Response>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tls.poll_ready(context)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let (connecting, within) = (self.tls.call(to), self.within);
        Box::pin(async move {
            let made = tokio::time::timeout(within, connecting).await;
            made.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
        })
    }
}
