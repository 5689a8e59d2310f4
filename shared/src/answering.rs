//! A service for tests of what is done with its answers.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::roots;

/// A service that takes as many connections as there are `answers`, and gives each its answer or breaks it: where it
/// is, and how many came.
pub(crate) async fn service(answers: Vec<Option<String>>) -> (String, JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let serve = async move {
        let mut came = 0;
        for answer in answers {
            let next = timeout(Duration::from_secs(3), listener.accept()).await;
            let Ok(Ok((mut connection, _))) = next else { break };
            came += 1;
            let mut request = [0; 4_096];
            let _ = connection.read(&mut request).await.unwrap();
            if let Some(answer) = answer {
                connection.write_all(answer.as_bytes()).await.unwrap();
            }
        }
        came
    };
    (address, tokio::spawn(serve))
}

/// A server for `localhost` that signs for itself.
pub(crate) struct Secure {
    pub(crate) port: u16,
    certificate: CertificateDer<'static>,
}

impl Secure {
    /// One that lets `serve` have each connection. Its clients may choose one of these protocols.
    pub(crate) async fn serving<F>(
        protocols: &[&str],
        serve: impl Fn(TlsStream<TcpStream>) -> F + Clone + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut server =
            server.with_no_client_auth().with_single_cert(vec![certificate.clone()], key).unwrap();
        server.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let (acceptor, serve) = (acceptor.clone(), serve.clone());
                tokio::spawn(async move {
                    if let Ok(connection) = acceptor.accept(connection).await {
                        serve(connection).await;
                    }
                });
            }
        });
        Self { port, certificate }
    }

    /// What a client says who trusts this server alone.
    pub(crate) fn trusted(&self) -> ClientConfig {
        let mut store = RootCertStore::empty();
        store.add(self.certificate.clone()).unwrap();
        roots::trusting(store.roots).unwrap()
    }
}
