//! Bulkhead from Rust: upload a file, ask, and read an answer as it is written.
//!
//! ```text
//! BULKHEAD_URL=http://127.0.0.1:9000 BULKHEAD_KEY=ten_… cargo run -p rust-client handbook.md
//! ```

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that speaks to whoever started it")]
#![expect(clippy::indexing_slicing, reason = "of JSON, what is not there is null")]
#![expect(
    clippy::disallowed_methods,
    reason = "an example stands by itself: it reads its environment and draws its keys"
)]

use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use reqwest::{Client, Response};
use serde_json::{Value, json};

const ATTEMPTS: u32 = 10;
/// A budget of a day or a month says when it has room again, too. Nobody waits for that.
const LONGEST_WAIT_S: u64 = 60;

struct Bulkhead {
    http: Client,
    url: String,
    key: String,
}

impl Bulkhead {
    fn from_env() -> Result<Self, Box<dyn Error>> {
        let setting = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
        let http = Client::builder().timeout(Duration::from_secs(120)).build()?;
        Ok(Self { http, url: setting("BULKHEAD_URL")?, key: setting("BULKHEAD_KEY")? })
    }

    /// Sends JSON, or asks for what is there, and returns the response. Comes again when a limit says when (429), and when
    /// the service is unavailable (503). The key makes that safe: what was done already is answered, and not done or paid
    /// for twice.
    async fn send(&self, path: &str, body: Option<&Value>, user: &str) -> Result<Response, Box<dyn Error>> {
        let (url, key) = (format!("{}{path}", self.url), format!("{:032x}", rand::random::<u128>()));
        for attempt in 1.. {
            let request = match body {
                Some(body) => self.http.post(&url).header("idempotency-key", &key).json(body),
                None => self.http.get(&url),
            };
            let request = request.bearer_auth(&self.key).header("x-user-id", user);
            let response = request.send().await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            let wait_s = header("retry-after").and_then(|value| value.parse().ok()).unwrap_or(1 << attempt);
            let again = matches!(status.as_u16(), 429 | 503) && header("x-should-retry") != Some("false");
            let problem: Value = response.json().await?;
            let (code, message) = (text(&problem["error"], "code"), text(&problem["error"], "message"));
            if !again || attempt == ATTEMPTS || wait_s > LONGEST_WAIT_S {
                return Err(format!("{status} {code}: {message}").into());
            }
            eprintln!("{} {code}: again in {wait_s} s", status.as_u16());
            tokio::time::sleep(Duration::from_secs(wait_s)).await;
        }
        Err("no attempt was made".into())
    }

    /// Uploads a file as a document, or as a new version of it, and waits until it is found.
    async fn store(&self, path: &Path) -> Result<Value, Box<dyn Error>> {
        let name = path.file_stem().and_then(|stem| stem.to_str()).ok_or("the file has no name")?;
        let kind = match path.extension().and_then(|extension| extension.to_str()) {
            Some("md") => "text/markdown",
            Some("html") => "text/html",
            Some("csv") => "text/csv",
            Some("pdf") => "application/pdf",
            Some("docx") => "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
            _ => "text/plain",
        };
        let content = std::fs::read(path)?;
        let upload = json!({"id": name, "title": name, "content_type": kind, "size_bytes": content.len()});
        let begun: Value = self.send("/v1/uploads", Some(&upload), "ann").await?.json().await?;
        // Past the API, to the address that is signed for this one file; with its headers, and no key.
        let put = self.http.put(text(&begun, "url")).body(content);
        let headers = begun["headers"].as_object().into_iter().flatten();
        let put =
            headers.fold(put, |put, (name, value)| put.header(name, value.as_str().unwrap_or_default()));
        put.send().await?.error_for_status()?;
        let shown = format!("/v1/documents/{}", text(&begun, "document_id"));
        loop {
            let document: Value = self.send(&shown, None, "ann").await?.json().await?;
            match text(&document, "status") {
                "ready" => return Ok(document),
                "failed" => return Err(format!("it cannot be read: {}", document["reason"]).into()),
                _ => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    }

    /// Asks, and returns the answer with its citations.
    async fn ask(&self, message: &str) -> Result<Value, Box<dyn Error>> {
        Ok(self.send("/v1/chat", Some(&json!({"message": message})), "ann").await?.json().await?)
    }

    /// Asks, and shows events as they come, by name and data: `meta`, `delta`…, `done`.
    async fn stream(&self, message: &str, mut show: impl FnMut(&str, &Value)) -> Result<(), Box<dyn Error>> {
        let asked = json!({"message": message, "stream": true});
        let mut response = self.send("/v1/chat", Some(&asked), "ann").await?;
        let mut buffer = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            buffer.extend(chunk);
            while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                let frame: Vec<u8> = buffer.drain(..end + 2).collect();
                let frame = String::from_utf8(frame)?;
                let field = |name| frame.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
                show(field("event: "), &serde_json::from_str(field("data: "))?);
            }
        }
        Ok(())
    }
}

/// A text of an object; nothing if it is none.
fn text<'a>(of: &'a Value, name: &str) -> &'a str {
    of[name].as_str().unwrap_or_default()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let bulkhead = Bulkhead::from_env()?;
    let file = std::env::args_os().nth(1).ok_or("which file is to be stored?")?;

    let document = bulkhead.store(Path::new(&file)).await?;
    let (id, status) = (text(&document, "id"), text(&document, "status"));
    println!("stored {id} version {}: {status}", document["version"]);

    let answer = bulkhead.ask("How many days of annual leave are there?").await?;
    println!("answer: {}", text(&answer, "response"));
    let cited = answer["citations"].as_array().into_iter().flatten();
    println!("cited: {}", cited.map(|citation| text(citation, "document_id")).collect::<Vec<_>>().join(", "));

    print!("stream: ");
    let mut failed = None;
    let show = |name: &str, data: &Value| match name {
        "delta" => {
            print!("{}", text(data, "text"));
            // What cannot be shown now is shown with the next line.
            drop(std::io::stdout().flush());
        }
        "done" => println!("\ncost: {} nano-dollars", data["usage"]["cost_nano_usd"]),
        "error" => failed = Some(text(&data["error"], "message").to_owned()),
        _ => {}
    };
    bulkhead.stream("How many days may be carried over?", show).await?;
    failed.map_or(Ok(()), |message| Err(message.into()))
}
