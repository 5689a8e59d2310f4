//! Reading a stranger's file in a process of its own.
//!
//! A file that is made to can send its reader round in circles, have it ask for all memory there is, or bring it down.
//! So the reader is a program of its own, which has nothing but the readers in it: with bounds on its memory and its
//! processor time that the system keeps, without the environment, and therefore without credentials: the function's own,
//! which it could read as the same user, is closed to it ([`keep_to_itself`]). What becomes of it is what is wrong with
//! the file; the function goes on.
//!
//! They are deployed side by side, and for some seconds one may be of another version than the other: what they say to
//! each other has to be understood across one release. What is not is no document's fault.

use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
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

/// What the reader's program is called. Its first argument is the content's type, the second its charset.
const PROGRAM: &str = "document_reader";
/// Where Lambda puts what is in layers.
const LAYERS: &str = "/opt";
/// How long one document may take to read.
pub(crate) const MOST_TIME: Duration = Duration::from_secs(20);
/// How much memory one document may take to read, itself included, in bytes.
const MOST_MEMORY: u64 = 160 << 20;
/// How much is heard of a reader: JSON takes more than the text itself, and no more than twice as much of most.
const MOST_ANSWER: u64 = 4 * MOST_TEXT_BYTES as u64;
/// How a reader ends that panics, where panics do not abort: in what the tests run.
const PANICKED: i32 = 101;
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

/// Where the reader's program is.
pub(crate) struct Reader(PathBuf);

impl Reader {
    /// The one beside this program, or the one in a layer, as it is deployed.
    ///
    /// # Errors
    /// If there is neither.
    pub(crate) fn find() -> io::Result<Self> {
        let places = [std::env::current_exe()?.with_file_name(PROGRAM), Path::new(LAYERS).join(PROGRAM)];
        match places.iter().find(|place| place.is_file()) {
            Some(place) => Ok(Self(place.clone())),
            None => Err(io::Error::other(format!("there is no reader of documents in any of {places:?}"))),
        }
    }

    /// The blocks of a document, in reading order: at least one. Whoever is not through at `deadline` is broken off.
    ///
    /// # Errors
    /// [`Failed::Unreadable`] if nothing can be made of the content.
    pub(crate) async fn blocks(
        &self,
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
            move |error: io::Error| {
                tracing::error!("A reader of documents could not be {what}: {error}");
                Failed::Elsewhere(ApiError::unavailable("the reader of documents"))
            }
        };
        let turn = timeout_at(deadline, ONE.acquire()).await.map_err(|_| late())?;
        let _turn = turn.map_err(|error| elsewhere("waited for")(io::Error::other(error)))?;
        // Nobody waits when it is free.
        let now = Instant::now();
        if now >= deadline {
            return Err(late());
        }
        let slow = now + MOST_TIME;
        let mut command = Command::new(&self.0);
        command
            .arg(content_type.media_type())
            .args(charset.map(Charset::name))
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(elsewhere("started"))?;
        match timeout_at(slow.min(deadline), heard(&mut child, content)).await {
            Ok(heard) => match heard.map_err(elsewhere("heard"))?.understood() {
                Some(answer) => answer.map_err(Failed::Unreadable),
                None => Err(elsewhere("understood")(io::Error::other("it is of another version, or ill"))),
            },
            Err(_) if slow <= deadline => Err(Failed::Unreadable(Unreadable::TooSlow)),
            Err(_) => Err(late()),
        }
    }
}

/// Closes this process to others of the same user, and so its environment to the readers that it starts: not theirs to
/// read, nor its memory. To be done before anything of value is there.
///
/// # Errors
/// If the system refuses.
pub fn keep_to_itself() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// What a reader said, and how it ended.
struct Heard {
    answer: Vec<u8>,
    status: ExitStatus,
    last_words: Vec<u8>,
}

async fn heard(child: &mut Child, content: Vec<u8>) -> io::Result<Heard> {
    let missing = || io::Error::other("a pipe is missing");
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
    Ok(Heard { answer, status, last_words })
}

impl Heard {
    /// The blocks, or what is wrong with the document; nothing where it is the reader that is at fault.
    fn understood(self) -> Option<Result<Vec<Block>, Unreadable>> {
        let Self { answer, status, last_words } = self;
        if answer.len() as u64 >= MOST_ANSWER {
            return Some(Err(Unreadable::TooLarge));
        }
        if status.success() {
            return serde_json::from_slice(&answer).ok();
        }
        let signal = status.signal();
        // By their beginnings, which the standard library says: the words may hold text of the document.
        let reason = if signal == Some(Signal::XCPU.as_raw()) || signal == Some(Signal::KILL.as_raw()) {
            Unreadable::TooSlow
        } else if last_words.starts_with(b"memory allocation of")
            || last_words.starts_with(b"\nmemory allocation of")
        {
            Unreadable::TooLarge
        } else if signal.is_some() || status.code() == Some(PANICKED) {
            Unreadable::damaged("its reader broke off")
        } else {
            return None;
        };
        tracing::warn!(signal, reason = %reason, "A reader of documents has not answered");
        Some(Err(reason))
    }
}

/// What the reader's program does: it reads a document, which is in its standard input, and answers on its standard
/// output.
pub fn read_document(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let mut read = || -> io::Result<()> {
        let limit = |most: u64| Rlimit { current: Some(most), maximum: Some(most) };
        set_parent_process_death_signal(Some(Signal::KILL))?;
        setrlimit(Resource::Data, limit(MOST_MEMORY))?;
        setrlimit(Resource::Cpu, limit(MOST_TIME.as_secs()))?;
        setrlimit(Resource::Core, limit(0))?;
        let content_type = arguments.nth(1).as_deref().and_then(ContentType::parse);
        let content_type = content_type.ok_or_else(|| io::Error::other("no content type"))?;
        let charset = arguments.next().as_deref().and_then(Charset::parse);
        let mut content = Vec::new();
        io::stdin().lock().read_to_end(&mut content)?;
        let answer = super::blocks(content, content_type, charset);
        let mut stdout = io::BufWriter::new(io::stdout().lock());
        serde_json::to_writer(&mut stdout, &answer)?;
        stdout.flush()
    };
    if read().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_reader_says_and_how_it_ends_says_what_is_wrong() {
        let signal = |signal: Signal| ExitStatus::from_raw(signal.as_raw());
        let code = |code: i32| ExitStatus::from_raw(code << 8);
        let broke_off = || Some(Unreadable::damaged("its reader broke off"));
        for (status, words, reason) in [
            (signal(Signal::XCPU), "", Some(Unreadable::TooSlow)),
            (signal(Signal::KILL), "", Some(Unreadable::TooSlow)),
            (signal(Signal::ABORT), "memory allocation of 9 bytes failed", Some(Unreadable::TooLarge)),
            (signal(Signal::ABORT), "\nmemory allocation of 9 bytes failed", Some(Unreadable::TooLarge)),
            (signal(Signal::ABORT), "thread 'main' panicked at memory allocation of", broke_off()),
            (code(PANICKED), "", broke_off()),
            // It was asked for what it does not know, or was not even loaded.
            (code(1), "", None),
            (code(127), "error while loading shared libraries", None),
            (code(0), "", None),
        ] {
            let heard = Heard { answer: b"{".to_vec(), status, last_words: words.as_bytes().to_vec() };
            assert_eq!(heard.understood(), reason.map(Err), "{status} {words}");
        }
        let answer = br#"{"Err":"Empty"}"#.to_vec();
        let heard = Heard { answer, status: code(0), last_words: Vec::new() };
        assert_eq!(heard.understood(), Some(Err(Unreadable::Empty)));
        let answer = vec![b' '; MOST_ANSWER as usize];
        let heard = Heard { answer, status: code(1), last_words: Vec::new() };
        assert_eq!(heard.understood(), Some(Err(Unreadable::TooLarge)));
    }

    #[tokio::test]
    async fn nobody_is_read_after_the_deadline() {
        let reader = Reader("/bin/false".into());
        let late = reader.blocks(b"A text.".to_vec(), ContentType::Plain, None, Instant::now()).await;
        assert!(matches!(late, Err(Failed::Elsewhere(error)) if error.code == Code::DeadlineExceeded));
    }
}
