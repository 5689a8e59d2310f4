//! How long a function takes from the start of its process until it asks for its first event, beside one
//! that does nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use local::template::Function;
use rustix::fs::{Advice, fadvise};

use crate::{EMPTY, setting, template};

/// A start that takes this long is none.
const PATIENCE: Duration = Duration::from_secs(20);
/// How many times as long as the empty function another may take.
const LIMIT: f64 = 2.0;

/// Where the AWS clients look for the addresses of their services.
const ENDPOINTS: [&str; 4] = [
    "AWS_ENDPOINT_URL_DYNAMODB",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_SECRETS_MANAGER",
    "AWS_ENDPOINT_URL_STS",
];

/// With what a function asks for an event.
const NEXT_INVOCATION: &str = "/2018-06-01/runtime/invocation/next";

/// All that a function asks before its first event: the Runtime API, and Secrets Manager, which is known by its header.
fn answer(path: &str, target: Option<&str>) -> Option<&'static str> {
    match (path, target) {
        ("/2020-01-01/extension/register", None) => {
            Some(r#"{"functionName":"f","functionVersion":"$LATEST","handler":"bootstrap"}"#)
        }
        ("/", Some("secretsmanager.GetSecretValue")) => {
            Some(r#"{"Name":"s","SecretString":"some-secret-that-is-long-enough"}"#)
        }
        // There is no event, for nobody.
        (NEXT_INVOCATION | "/2020-01-01/extension/event/next", None) => None,
        other => panic!("nobody answers {other:?}"),
    }
}

/// Answers what was read of a connection, if it is a whole request, and forgets it.
fn serve(connection: &mut TcpStream, read: &mut Vec<u8>, polled: &Sender<Instant>) {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(head) = request.parse(read).unwrap() else { return };
    let header = |name| {
        let found = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| std::str::from_utf8(header.value).unwrap())
    };
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    if read.len() < head + length {
        return;
    }
    let path = request.path.unwrap();
    if path == NEXT_INVOCATION {
        polled.send(Instant::now()).unwrap();
    }
    if let Some(body) = answer(path, header("x-amz-target")) {
        let length = body.len();
        let head = "HTTP/1.1 200 OK\r\nlambda-extension-identifier: e\r\ncontent-length: ";
        // In one piece, so that none waits for the other to arrive. The function may have ended.
        drop(connection.write_all(format!("{head}{length}\r\n\r\n{body}").as_bytes()));
    }
    read.clear();
}

/// Answers until it is to stop, and never sleeps: to be woken takes longer than to answer, and the kernel may wake
/// whoever answers where the function runs that is measured, which then waits. That is no time of the function's.
fn answer_all(listener: &TcpListener, polled: &Sender<Instant>, stop: &AtomicBool) {
    listener.set_nonblocking(true).unwrap();
    let mut connections: Vec<(TcpStream, Vec<u8>)> = Vec::new();
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((connection, _)) = listener.accept() {
            connection.set_nonblocking(true).unwrap();
            connections.push((connection, Vec::new()));
        }
        connections.retain_mut(|(connection, read)| match connection.read(&mut buffer) {
            Ok(0) => false,
            Ok(more) => {
                read.extend_from_slice(&buffer[..more]);
                serve(connection, read, polled);
                true
            }
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        });
    }
}

/// Has a program read from the disk anew. After a linker's own writes it lies in memory in pieces as small as those, and
/// a large one takes a tenth longer to start; what is deployed is read.
fn read_anew(program: &Path) {
    let mut file = File::open(program).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    std::io::copy(&mut file, &mut std::io::sink()).unwrap();
}

/// Starts a program once.
fn start(program: &Path, environment: &[(&str, String)], polls: &Receiver<Instant>) -> Duration {
    let mut command = Command::new(program);
    command.env_clear().envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().unwrap();
    let polled = polls.recv_timeout(PATIENCE);
    // It may have ended by itself.
    drop(child.kill());
    let output = child.wait_with_output().unwrap();
    let Ok(polled) = polled else {
        panic!("{}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    };
    polled - began
}

fn environment(function: Option<&Function>, address: &str) -> Vec<(&'static str, String)> {
    let name = function.map_or(EMPTY, |function| &function.name);
    let memory = function.map_or(256, |function| function.memory_mb);
    let mut all = vec![
        ("AWS_LAMBDA_RUNTIME_API", address.to_owned()),
        ("AWS_LAMBDA_FUNCTION_NAME", name.to_owned()),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", memory.to_string()),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST".to_owned()),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "ASIAEXAMPLE".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
        ("AWS_SESSION_TOKEN", "token".to_owned()),
    ];
    all.extend(ENDPOINTS.map(|name| (name, address.to_owned())));
    all
}

pub fn measure(programs: &Path) {
    let processors = std::thread::available_parallelism().unwrap().get();
    assert!(processors > 1, "one processor answers while another is measured, and here is one");
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (polled, polls) = mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    std::thread::spawn(move || answer_all(&listener, &polled, &stopped));

    let functions = template(&address).functions;
    let started: Vec<(&str, _, _)> = std::iter::once((EMPTY, EMPTY, environment(None, &address)))
        .chain(functions.iter().map(|function| {
            let mut variables = environment(Some(function), &address);
            let own = function.environment.iter();
            variables.extend(own.map(|(name, value)| (&*name.clone().leak(), value.clone())));
            (&*function.logical_id, &*function.binary, variables)
        }))
        .collect();
    for (_, program, _) in &started {
        read_anew(&programs.join(program));
    }
    let runs = setting("STARTS", 41);
    let mut took: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for _ in 0..runs {
        for (name, program, environment) in &started {
            let one = start(&programs.join(program), environment, &polls);
            took.entry(name).or_default().push(one);
        }
    }
    stop.store(true, Ordering::Relaxed);

    let median = |name: &str| {
        let mut all = took[name].clone();
        all.sort_unstable();
        let at = |q: f64| all[((all.len() - 1) as f64 * q).round() as usize].as_secs_f64() * 1_000.0;
        (at(0.5), at(0.1), at(0.9))
    };
    let (empty, ..) = median(EMPTY);
    println!(
        "\nStart of the process to its first poll of the Runtime API, {runs} times in turn; secrets are answered at once,
and programs lie in memory as they are read from a disk"
    );
    println!("{:<20} {:>10} {:>8} {:>8} {:>10}   limit {LIMIT:.1}", "", "median ms", "p10", "p90", "× empty");
    for (name, ..) in &started {
        let (middle, low, high) = median(name);
        let ratio = middle / empty;
        let verdict = if ratio > LIMIT { "over" } else { "" };
        println!("{name:<20} {middle:>10.2} {low:>8.2} {high:>8.2} {ratio:>10.2}   {verdict}");
    }
}
