//! gRPC over connections of our own: the same TLS, the same roots and the same cryptography as all other calls.
//!
//! The client's own transport brings a second implementation of all cryptography, whatever it is asked for.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::USER_AGENT;
use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::capture_connection;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::ClientConfig;
use tonic::Status;
use tonic::body::Body;
use tower_service::Service;

use crate::cause;
use crate::connector::{self, Connector};

/// How long a connection may take to make.
const CONNECTS_WITHIN: Duration = Duration::from_secs(2);
/// How long the store may take until it begins to answer, a connection included.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// For how long a connection is kept that nobody uses: below the idle time of load balancers, so that a thawed function
/// does not write into one that is gone.
const KEPT: Duration = Duration::from_secs(30);

/// What calls go over, to whichever server they name: one connection to each, made when it is first needed.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    pool: legacy::Client<Connector, Body>,
    answers_within: Duration,
}

impl Channel {
    /// Connects to nobody yet.
    pub(crate) fn new(tls: ClientConfig) -> Self {
        let mut client = legacy::Client::builder(TokioExecutor::new());
        client.pool_timer(TokioTimer::new()).pool_idle_timeout(KEPT).http2_only(true);
        let pool = client.build(Connector::http2(tls, CONNECTS_WITHIN));
        Self { pool, answers_within: ANSWERS_WITHIN }
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static("bulkhead"));
        let connection = capture_connection(&mut request);
        let (answer, within) = (self.pool.request(request), self.answers_within);
        Box::pin(async move {
            match tokio::time::timeout(within, answer).await {
                Ok(answer) => answer.map_err(|error| Status::unavailable(cause::told(&error))),
                Err(_) => {
                    // Whoever was there may be gone, and every later call would wait for it as long.
                    connector::poison(&connection);
                    Err(Status::deadline_exceeded("no answer within the time allowed"))
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::SeqCst;

    use futures_util::future::join_all;
    use tokio::io::{AsyncRead, AsyncWrite};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tonic::Code;

    use super::*;
    use crate::answering::{self, Secure};
    use crate::roots;

    async fn ask(channel: &Channel, url: &str) -> Result<Response<Incoming>, Status> {
        channel.clone().call(Request::post(url).body(Body::empty()).unwrap()).await
    }

    /// Answers every request over a connection but those for `/silence`, and says which came.
    async fn answers(
        connection: impl AsyncRead + AsyncWrite + Unpin,
        came: mpsc::UnboundedSender<Request<h2::RecvStream>>,
    ) {
        let mut connection = h2::server::handshake(connection).await.unwrap();
        let mut unanswered = Vec::new();
        while let Some(Ok((request, mut answer))) = connection.accept().await {
            if request.uri().path() == "/silence" {
                unanswered.push(answer);
            } else {
                answer.send_response(Response::new(()), true).unwrap();
            }
            drop(came.send(request));
        }
    }

    #[tokio::test]
    async fn a_server_that_is_trusted_is_spoken_to_and_no_other() {
        let (came, mut comes) = mpsc::unbounded_channel();
        let secure = Secure::serving(&["http/1.1", "h2"], move |connection| {
            assert_eq!(connection.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            answers(connection, came.clone())
        })
        .await;
        let url = |host: &str| format!("https://{host}:{}/points", secure.port);
        let channel = Channel::new(secure.trusted());
        assert_eq!(ask(&channel, &url("localhost")).await.unwrap().status(), 200);
        let request = comes.recv().await.unwrap();
        assert_eq!(request.uri(), &*url("localhost"));
        assert_eq!(request.headers()["user-agent"], "bulkhead");
        for (channel, host) in
            [(channel, "127.0.0.1"), (Channel::new(roots::outbound().unwrap()), "localhost")]
        {
            let refused = ask(&channel, &url(host)).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable);
            assert!(refused.message().contains("invalid peer certificate"), "{refused}");
        }
        assert!(comes.try_recv().is_err());
    }

    #[tokio::test]
    async fn calls_share_a_connection_until_one_is_not_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                counted.fetch_add(1, SeqCst);
                tokio::spawn(answers(connection, mpsc::unbounded_channel().0));
            }
        });
        let mut channel = Channel::new(roots::outbound().unwrap());
        channel.answers_within = Duration::from_millis(300);
        let (points, silence) = (format!("{address}/points"), format!("{address}/silence"));
        for answer in join_all((0..20).map(|_| ask(&channel, &points))).await {
            answer.unwrap();
        }
        assert_eq!(connections.load(SeqCst), 1);
        assert_eq!(ask(&channel, &silence).await.unwrap_err().code(), Code::DeadlineExceeded);
        ask(&channel, &points).await.unwrap();
        assert_eq!(connections.load(SeqCst), 2);
    }

    #[tokio::test]
    async fn who_is_not_there_or_hangs_up_is_unavailable() {
        let channel = Channel::new(roots::outbound().unwrap());
        let (url, came) = answering::service(vec![None]).await;
        assert_eq!(ask(&channel, &url).await.unwrap_err().code(), Code::Unavailable);
        assert_eq!(came.await.unwrap(), 1);
        assert_eq!(ask(&channel, &url).await.unwrap_err().code(), Code::Unavailable);
    }
}
