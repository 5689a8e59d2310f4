//! The connections of all AWS clients.

use std::io;
use std::time::Duration;

use aws_smithy_runtime_api::client::connection::{CaptureSmithyConnection, ConnectionMetadata};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::retry::ErrorKind;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::ClientConfig;

use crate::cause;
use crate::connector::{self, Connector};
use crate::roots::{self, RootsError};

/// How long a connection may take to make: the name, the connection and the handshake.
const CONNECTS_WITHIN: Duration = Duration::from_secs(1);

/// One pool of connections for all clients. Whatever a client asks for, a connection takes no longer than
/// [`CONNECTS_WITHIN`], and a call no longer than its attempt may.
///
/// AWS's own makes a pool for each set of timeouts, and takes roots as text alone, which takes long to read.
#[derive(Debug)]
pub(super) struct Connections(SharedHttpConnector);

impl Connections {
    /// # Errors
    /// If the TLS library does not start.
    pub(super) fn new() -> Result<Self, RootsError> {
        Ok(Self::over(roots::trusting(roots::amazon())?))
    }

    fn over(tls: ClientConfig) -> Self {
        let mut client = legacy::Client::builder(TokioExecutor::new());
        let pool = client.pool_timer(TokioTimer::new()).build(Connector::http1(tls, CONNECTS_WITHIN));
        Self(SharedHttpConnector::new(Pool(pool)))
    }
}

impl HttpClient for Connections {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        self.0.clone()
    }
}

#[derive(Debug)]
struct Pool(legacy::Client<Connector, SdkBody>);

impl HttpConnector for Pool {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let mut request = match request.try_into_http1x() {
            Ok(request) => request,
            Err(error) => return HttpConnectorFuture::ready(Err(ConnectorError::user(error.into()))),
        };
        let connection = capture_connection(&mut request);
        // The runtime asks for it where an answer says that something is wrong over there.
        if let Some(asks) = request.extensions().get::<CaptureSmithyConnection>() {
            asks.set_connection_retriever(move || described(&connection));
        }
        let answer = self.0.request(request);
        HttpConnectorFuture::new(async move {
            let answer = answer.await.map_err(failure)?.map(SdkBody::from_body_1_x);
            HttpResponse::try_from(answer).map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}

/// A connection as the runtime knows one: it may say that no further call is to go over it.
fn described(connection: &CaptureConnection) -> Option<ConnectionMetadata> {
    connection.connection_metadata().as_ref()?;
    let connection = connection.clone();
    let poison = move || connector::poison(&connection);
    Some(ConnectionMetadata::builder().proxied(false).poison_fn(poison).build())
}

/// What kept a call from its answer, in the runtime's words: what is I/O or transient is tried again.
fn failure(error: legacy::Error) -> ConnectorError {
    let hyper = cause::find::<hyper::Error>(&error);
    let is = |what: fn(&hyper::Error) -> bool| hyper.is_some_and(what);
    if is(hyper::Error::is_user) {
        ConnectorError::user(error.into())
    } else if error.is_connect()
        || is(hyper::Error::is_closed)
        || is(hyper::Error::is_canceled)
        || cause::find::<io::Error>(&error).is_some()
    {
        ConnectorError::io(error.into())
    } else {
        // The connection ended within an answer; or before any, where it had been kept and the other side was about
        // to close it.
        let kind = is(hyper::Error::is_incomplete_message).then_some(ErrorKind::TransientError);
        ConnectorError::other(error.into(), kind)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::SeqCst;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::answering::Secure;

    const EMPTY: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

    async fn listening() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Answers each request so, over each connection.
    async fn answers(mut connection: impl AsyncReadExt + AsyncWriteExt + Unpin, with: &[u8]) {
        let mut request = [0; 4_096];
        while connection.read(&mut request).await.is_ok_and(|length| length > 0) {
            connection.write_all(with).await.unwrap();
        }
    }

    async fn ask(connections: &Connections, url: &str) -> Result<u16, ConnectorError> {
        let mut request = HttpRequest::empty();
        request.set_uri(url).unwrap();
        connections.0.call(request).await.map(|answer| answer.status().as_u16())
    }

    #[tokio::test]
    async fn only_who_is_signed_for_by_a_root_is_spoken_to() {
        let secure = Secure::serving(&[], |connection| answers(connection, EMPTY)).await;
        let (port, trusting) = (secure.port, Connections::over(secure.trusted()));
        assert_eq!(ask(&trusting, &format!("https://localhost:{port}/")).await.unwrap(), 204);
        let refused = async |connections: &Connections, name: &str| {
            let error = ask(connections, &format!("https://{name}:{port}/")).await.unwrap_err();
            assert!(error.is_io() && format!("{error:?}").contains("InvalidCertificate"), "{error:?}");
        };
        refused(&trusting, "127.0.0.1").await;
        refused(&Connections::new().unwrap(), "localhost").await;
    }

    #[tokio::test]
    async fn what_keeps_a_call_from_its_answer_is_told_apart() {
        let connections = Connections::new().unwrap();
        let (listener, address) = listening().await;
        let url = format!("http://{address}/");
        let broken = tokio::spawn(async move {
            let mut request = [0; 4_096];
            let (mut connection, _) = listener.accept().await.unwrap();
            assert!(connection.read(&mut request).await.unwrap() > 0);
            connection.write_all(b"HTTP/1.1 200").await.unwrap();
            drop(connection);
            // One that is kept, and closed when it is used again.
            let (mut connection, _) = listener.accept().await.unwrap();
            assert!(connection.read(&mut request).await.unwrap() > 0);
            connection.write_all(EMPTY).await.unwrap();
            assert!(connection.read(&mut request).await.unwrap() > 0);
        });
        let broke = ask(&connections, &url).await.unwrap_err();
        assert_eq!(broke.as_other(), Some(ErrorKind::TransientError), "{broke:?}");
        assert_eq!(ask(&connections, &url).await.unwrap(), 204);
        let closed = ask(&connections, &url).await.unwrap_err();
        assert_eq!(closed.as_other(), Some(ErrorKind::TransientError), "{closed:?}");
        broken.await.unwrap();
        let nobody = ask(&connections, &url).await.unwrap_err();
        assert!(nobody.is_io(), "{nobody:?}");
        let nonsense = ask(&connections, "/").await.unwrap_err();
        assert!(!nonsense.is_io() && nonsense.as_other().is_none(), "{nonsense:?}");
    }

    #[tokio::test]
    async fn a_handshake_is_not_waited_for_for_ever() {
        let (listener, address) = listening().await;
        let silent = tokio::spawn(async move {
            let _open = listener.accept().await.unwrap();
            std::future::pending::<()>().await;
        });
        let connections = Connections::new().unwrap();
        let url = format!("https://{address}/");
        let asked = tokio::time::timeout(CONNECTS_WITHIN * 10, ask(&connections, &url)).await;
        assert!(asked.unwrap().unwrap_err().is_io());
        silent.abort();
    }

    #[tokio::test]
    async fn a_connection_serves_until_it_is_said_to_be_bad() {
        let (listener, address) = listening().await;
        let (url, connections) = (format!("http://{address}/"), Connections::new().unwrap());
        let came = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&came);
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                counted.fetch_add(1, SeqCst);
                tokio::spawn(answers(connection, EMPTY));
            }
        });
        let connection = CaptureSmithyConnection::new();
        let mut request = HttpRequest::empty();
        request.set_uri(url.as_str()).unwrap();
        request.add_extension(connection.clone());
        connections.0.call(request).await.unwrap();
        ask(&connections, &url).await.unwrap();
        assert_eq!(came.load(SeqCst), 1);
        connection.get().unwrap().poison();
        ask(&connections, &url).await.unwrap();
        assert_eq!(came.load(SeqCst), 2);
    }
}
