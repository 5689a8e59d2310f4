//! Reading a stranger's file in a process of its own.
//!
//! A file that is made to can send its reader round in circles, have it ask for all memory there is, or bring it down.
//! So the reader is this very program, started once more: with bounds on its memory and its processor time that the
//! system keeps, without the environment, and therefore without credentials: the function's own, which it could read as
//! the same user, is closed to it ([`keep_to_itself`]). What becomes of it is what is wrong with the file; the function
//! goes on.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, set_dumpable_behavior, set_parent_process_death_signal,
    setrlimit,
};
use shared::chunk::Block;
use shared::document::ContentType;
use shared::error::{ApiError, Code};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::{Charset, MOST_TEXT_BYTES, Unreadable};

/// What makes this program a reader: its first argument. The second is the content's type, the third its charset.
const ASKED: &str = "read-document";
/// How long one document may take to read.
pub(crate) const MOST_TIME: Duration = Duration::from_secs(20);
/// How much memory one document may take to read, itself included, in bytes.
const MOST_MEMORY: u64 = 160 << 20;
/// How much is heard of a reader: JSON takes more than the text itself, and no more than twice as much of most.
const MOST_ANSWER: u64 = 4 * MOST_TEXT_BYTES as u64;
/// How much of a reader's last words is heard.
const MOST_LAST_WORDS: u64 = 4 << 10;

/// One reader at a time: the memory of several would add up.
static ONE: Semaphore = Semaphore::const_new(1);

/// Why there is no answer to what a document holds.
pub(crate) enum Failed {
    /// The document is what is wrong.
    Unreadable(Unreadable),
    /// No reader could be started, or spoken to, or there was no time to.
    Elsewhere(ApiError),
}

/// The blocks of a document, in reading order: at least one. Whoever is not through at `deadline` is broken off.
///
/// # Errors
/// [`Failed::Unreadable`] if nothing can be made of the content.
pub(crate) async fn blocks(
    content: Vec<u8>,
    content_type: ContentType,
    charset: Option<Charset>,
    deadline: Instant,
) -> Result<Vec<Block>, Failed> {
    let late = || {
        let message =
            "there was no time left to read the document; send it by itself, or by POST /v1/uploads";
        Failed::Elsewhere(ApiError::new(Code::DeadlineExceeded, message))
    };
    let elsewhere = |what: &'static str| {
        move |error: std::io::Error| {
            tracing::error!("A reader of documents could not be {what}: {error}");
            Failed::Elsewhere(ApiError::unavailable("the reader of documents"))
        }
    };
    let turn = timeout_at(deadline, ONE.acquire()).await.map_err(|_| late())?;
    let _turn = turn.map_err(|error| elsewhere("waited for")(std::io::Error::other(error)))?;
    // Nobody waits when it is free.
    let now = Instant::now();
    if now >= deadline {
        return Err(late());
    }
    let slow = now + MOST_TIME;
    let mut command = Command::new("/proc/self/exe");
    command
        .args([ASKED, content_type.media_type()])
        .args(charset.map(Charset::name))
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(elsewhere("started"))?;
    match timeout_at(slow.min(deadline), heard(&mut child, content)).await {
        Ok(heard) => match heard.map_err(elsewhere("heard"))? {
            Heard { answer: Some(answer), .. } => answer.map_err(Failed::Unreadable),
            Heard { status, last_words, .. } => Err(Failed::Unreadable(what_ended(status, &last_words))),
        },
        Err(_) if slow <= deadline => Err(Failed::Unreadable(Unreadable::TooSlow)),
        Err(_) => Err(late()),
    }
}

/// Closes this process to others of the same user, and so its environment to the readers that it starts: not theirs to
/// read, nor its memory. To be done before anything of value is there.
///
/// # Errors
/// If the system refuses.
pub fn keep_to_itself() -> std::io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// What a reader said, if it came to that, and how it ended.
struct Heard {
    answer: Option<Result<Vec<Block>, Unreadable>>,
    status: ExitStatus,
    last_words: Vec<u8>,
}

async fn heard(child: &mut Child, content: Vec<u8>) -> std::io::Result<Heard> {
    let missing = || std::io::Error::other("a pipe is missing");
    let mut stdin = child.stdin.take().ok_or_else(missing)?;
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    let told = async move {
        // A reader that knows enough hangs up.
        let _ = stdin.write_all(&content).await;
        drop((stdin, content));
        Ok(())
    };
    let (mut answer, mut last_words) = (Vec::new(), Vec::new());
    let (mut answers, mut words) = (stdout.take(MOST_ANSWER), stderr.take(MOST_LAST_WORDS));
    tokio::try_join!(told, answers.read_to_end(&mut answer), words.read_to_end(&mut last_words))?;
    drop((answers, words));
    let status = child.wait().await?;
    let answer = if status.success() { serde_json::from_slice(&answer).ok() } else { None };
    Ok(Heard { answer, status, last_words })
}

/// What is wrong with a document whose reader has not answered.
fn what_ended(status: ExitStatus, last_words: &[u8]) -> Unreadable {
    let signal = status.signal();
    // By their beginnings, which the standard library says: the words may hold text of the document.
    let reason = if signal == Some(Signal::XCPU.as_raw()) || signal == Some(Signal::KILL.as_raw()) {
        Unreadable::TooSlow
    } else if last_words.starts_with(b"memory allocation of")
        || last_words.starts_with(b"\nmemory allocation of")
    {
        Unreadable::TooLarge
    } else {
        Unreadable::damaged("its reader broke off")
    };
    tracing::warn!(signal, reason = %reason, "A reader of documents has not answered");
    reason
}

/// What this program does if it was started to read a document, which is then in its standard input: the answer goes
/// to its standard output. Otherwise nothing, and `None`. To be asked first of all, before anything is set up.
pub fn asked(mut arguments: impl Iterator<Item = String>) -> Option<ExitCode> {
    if arguments.nth(1)? != ASKED {
        return None;
    }
    let mut read = || -> std::io::Result<()> {
        let limit = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
        set_parent_process_death_signal(Some(Signal::KILL))?;
        setrlimit(Resource::Data, limit(MOST_MEMORY))?;
        setrlimit(Resource::Cpu, limit(MOST_TIME.as_secs()))?;
        setrlimit(Resource::Core, limit(0))?;
        let content_type = arguments.next().as_deref().and_then(ContentType::parse);
        let content_type = content_type.ok_or_else(|| std::io::Error::other("no content type"))?;
        let charset = arguments.next().as_deref().and_then(Charset::parse);
        let mut content = Vec::new();
        std::io::stdin().lock().read_to_end(&mut content)?;
        let answer = super::blocks(content, content_type, charset);
        let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
        serde_json::to_writer(&mut stdout, &answer)?;
        stdout.flush()
    };
    Some(if read().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_reader_ends_says_what_is_wrong_with_its_document() {
        let signal = |signal: Signal| ExitStatus::from_raw(signal.as_raw());
        for (status, words, reason) in [
            (signal(Signal::XCPU), "", Unreadable::TooSlow),
            (signal(Signal::KILL), "", Unreadable::TooSlow),
            (signal(Signal::ABORT), "memory allocation of 9 bytes failed", Unreadable::TooLarge),
            (signal(Signal::ABORT), "\nmemory allocation of 9 bytes failed", Unreadable::TooLarge),
            (
                signal(Signal::ABORT),
                "thread 'main' panicked at memory allocation of",
                Unreadable::damaged("its reader broke off"),
            ),
            (ExitStatus::from_raw(1 << 8), "", Unreadable::damaged("its reader broke off")),
        ] {
            assert_eq!(what_ended(status, words.as_bytes()), reason, "{status} {words}");
        }
    }

    #[tokio::test]
    async fn nobody_is_read_after_the_deadline() {
        let late = blocks(b"A text.".to_vec(), ContentType::Plain, None, Instant::now()).await;
        assert!(matches!(late, Err(Failed::Elsewhere(error)) if error.code == Code::DeadlineExceeded));
    }
}
