//! Bulkhead from Rust: store a document, ask, and read an answer as it is written.
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

    /// Sends JSON and returns the response. Comes again when a limit says when (429), and when the service is
    /// unavailable (503). The key makes that safe: what was done already is answered, and not done or paid for
    /// twice.
    async fn post(&self, path: &str, body: &Value, user: &str) -> Result<Response, Box<dyn Error>> {
        let key = format!("{:032x}", rand::random::<u128>());
        for attempt in 1.. {
            let request = self.http.post(format!("{}{path}", self.url)).bearer_auth(&self.key);
            let request = request.header("idempotency-key", &key).header("x-user-id", user).json(body);
            let response = request.send().await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let after =
                response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
            let problem: Value = response.json().await?;
            let (code, message) = (text(&problem["error"], "code"), text(&problem["error"], "message"));
            if !matches!(status.as_u16(), 429 | 503) || attempt == ATTEMPTS {
                return Err(format!("{status} {code}: {message}").into());
            }
            let wait_s: u64 = after.unwrap_or(1 << attempt);
            eprintln!("{} {code}: again in {wait_s} s", status.as_u16());
            tokio::time::sleep(Duration::from_secs(wait_s)).await;
        }
        Err("no attempt was made".into())
    }

    /// Stores a file, or a new version of it. The same file again changes nothing.
    async fn store(&self, path: &Path) -> Result<Value, Box<dyn Error>> {
        let name = path.file_stem().and_then(|stem| stem.to_str()).ok_or("the file has no name")?;
        let kind = match path.extension().and_then(|extension| extension.to_str()) {
            Some("md") => "text/markdown",
            Some("html") => "text/html",
            _ => "text/plain",
        };
        let content = std::fs::read_to_string(path)?;
        let document = json!({"id": name, "title": name, "content": content, "content_type": kind});
        let mut stored: Value = self.post("/v1/documents", &document, "ann").await?.json().await?;
        Ok(stored["documents"][0].take())
    }

    /// Asks, and returns the answer with its citations.
    async fn ask(&self, message: &str) -> Result<Value, Box<dyn Error>> {
        Ok(self.post("/v1/chat", &json!({"message": message}), "ann").await?.json().await?)
    }

    /// Asks, and shows events as they come, by name and data: `meta`, `delta`…, `done`.
    async fn stream(&self, message: &str, mut show: impl FnMut(&str, &Value)) -> Result<(), Box<dyn Error>> {
        let asked = json!({"message": message, "stream": true});
        let mut response = self.post("/v1/chat", &asked, "ann").await?;
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
