//! What the small servers share: how they stop, what time it is, and names that must not repeat.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::serve::ListenerExt;
use time::OffsetDateTime;
use tokio::net::TcpListener;

/// How long requests that are still running may go on after the stop signal. A client that keeps a
/// stream open must not keep the whole stack alive.
const GRACE: Duration = Duration::from_secs(2);

/// Serves until `shutdown` resolves, then lets running requests finish for a short while.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // Otherwise a short body that follows its head waits 40 ms for the client to acknowledge that.
    let listener = listener.tap_io(|connection| {
        let _ = connection.set_nodelay(true);
    });
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let server = axum::serve(listener, service).with_graceful_shutdown(async move {
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
