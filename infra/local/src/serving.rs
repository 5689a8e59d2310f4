//! What the small servers share: how they stop, what time it is, names that must not repeat, and where in
//! traces they were called.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

/// How long requests that are still running may go on after the stop signal. A client that keeps a
/// stream open must not keep the whole stack alive.
const GRACE: Duration = Duration::from_secs(2);

/// The header by which a caller says where in a trace of X-Ray it is.
pub(crate) const TRACE_HEADER: &str = "x-amzn-trace-id";
/// How many of the latest calls are remembered.
const REMEMBERED: usize = 64;

/// Where in traces a server was called of late, for tests to look at.
#[derive(Clone, Debug, Default)]
pub struct Traces(Arc<Mutex<VecDeque<String>>>);

impl Traces {
    /// Notes a call; `header` is empty if it is in no trace.
    pub(crate) fn note(&self, header: &str) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() == REMEMBERED {
            seen.pop_front();
        }
        seen.push_back(header.to_owned());
    }

    /// The latest calls, oldest first.
    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// A connection on which nothing waits for company: what is written goes out at once, and what is read is
/// acknowledged at once. Otherwise a short body that follows its head, in either direction, waits 40 ms for
/// the head to be acknowledged.
pub(crate) struct PromptStream(TcpStream);

impl PromptStream {
    pub(crate) fn new(stream: TcpStream) -> Self {
        // Only a hint, as the other one.
        let _ = stream.set_nodelay(true);
        Self(stream)
    }
}

impl AsyncRead for PromptStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.0).poll_read(context, buffer);
        // It does not last: Linux falls back to waiting as the connection goes on.
        #[cfg(target_os = "linux")]
        if read.is_ready() {
            let _ = self.0.set_quickack(true);
        }
        read
    }
}

impl AsyncWrite for PromptStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

struct Prompt(TcpListener);

impl Listener for Prompt {
    type Io = PromptStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (PromptStream, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        (PromptStream::new(stream), address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Whoever is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

impl Connected<IncomingStream<'_, Prompt>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Prompt>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// Serves until `shutdown` resolves, then lets running requests finish for a short while.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let service = router.into_make_service_with_connect_info::<Peer>();
    let server = axum::serve(Prompt(listener), service).with_graceful_shutdown(async move {
        shutdown.await;
        // The receiver is gone only if the server has ended by itself.
        let _ = stop.send(());
    });
    let deadline = async {
        match stopped.await {
            Ok(()) => tokio::time::sleep(GRACE).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        result = server => result,
        () = deadline => Ok(()),
    }
}

/// The machine's clock: what the local stack hands to its servers. Tests hand them their own.
#[must_use]
pub fn system_clock() -> OffsetDateTime {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where the local stack reads the clock; everything else takes it as a parameter"
    )]
    OffsetDateTime::now_utc()
}

/// An identifier that has not been handed out before: 128 random bits in hexadecimal.
pub(crate) fn unique_id() -> String {
    #[expect(
        clippy::disallowed_methods,
        reason = "names of versions and requests only have to be unique; nothing is secret about them"
    )]
    let bits = rand::random::<u128>();
    format!("{bits:032x}")
}

/// Replaces `path` by a file with these contents, in one step: readers see the old file or the new.
/// `mode` is the permission of the new file, on systems that have it.
pub(crate) fn replace_file(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    use std::io::Write as _;

    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", unique_id()));
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    let written = options
        .open(&temporary)
        .and_then(|mut file| file.write_all(contents))
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // Best effort: the caller gets the error that matters.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}
