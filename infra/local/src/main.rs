//! `cargo run -p local`: the whole of Bulkhead on this machine.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this program speaks to a person at a terminal"
)]

use std::collections::BTreeSet;
use std::fs::DirEntry;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use local::stack::{Config, Endpoint, Stack, StackError};
use local::template::binaries;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What is sent where a service of one's own wants no key; the protocols want a header all the same.
const NO_KEY: &str = "none";

/// Runs Bulkhead on this machine: the functions as they are deployed, and in place of the cloud's
/// services small servers that speak the same protocols.
#[derive(Debug, Parser)]
#[command(name = "local")]
struct Arguments {
    /// The port on 127.0.0.1; 0 for any that is free
    #[arg(long, default_value_t = 9000)]
    port: u16,
    /// Where everything is kept
    #[arg(long, default_value = ".bulkhead")]
    data: PathBuf,
    /// A file to write once the stack answers: its addresses and keys, as JSON
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Make no tenants
    #[arg(long)]
    no_seed: bool,
    /// A model's service of Anthropic's protocol, instead of the offline model. Its key is taken from
    /// ANTHROPIC_API_KEY; with that key alone, Anthropic's own service is called
    #[arg(long, env = "MODEL_URL")]
    model_url: Option<String>,
    /// The model service's key
    #[arg(long, env = "ANTHROPIC_API_KEY", hide_env_values = true)]
    model_key: Option<String>,
    /// An embeddings service of OpenAI's protocol, instead of the offline one
    #[arg(long, env = "EMBEDDINGS_URL")]
    embeddings_url: Option<String>,
    /// The embeddings service's key
    #[arg(long, env = "EMBEDDINGS_API_KEY", hide_env_values = true)]
    embeddings_key: Option<String>,
    /// The embeddings service's model
    #[arg(long, env = "EMBEDDINGS_MODEL", default_value = "text-embedding-3-small")]
    embeddings_model: String,
    /// The length of its vectors
    #[arg(long, env = "EMBEDDINGS_DIMENSIONS", default_value_t = 1536)]
    embeddings_dimensions: u32,
    /// A reranker of Cohere's and Jina's protocol; without it there is none
    #[arg(long, env = "RERANK_URL")]
    rerank_url: Option<String>,
    /// The reranker's key
    #[arg(long, env = "RERANK_API_KEY", hide_env_values = true)]
    rerank_key: Option<String>,
    /// The reranker's model
    #[arg(long, env = "RERANK_MODEL", default_value = "rerank-v3.5")]
    rerank_model: String,
    /// A folder with the functions' programs; without it they are built first
    #[arg(long)]
    functions: Option<PathBuf>,
    /// Milliseconds between two words of the offline model
    #[arg(long, default_value_t = 0)]
    model_delay_ms: u64,
    /// A parameter of the template, as NAME=VALUE; may be repeated
    #[arg(long = "parameter", value_parser = parameter)]
    parameters: Vec<(String, String)>,
    /// The functions' log level
    #[arg(long, default_value = "info")]
    log_level: String,
}

fn parameter(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it is written NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[tokio::main]
async fn main() -> ExitCode {
    // The S3 server's crate logs every 404 and 412 as an error.
    let quiet = Targets::new().with_default(LevelFilter::WARN).with_target("s3s", LevelFilter::OFF);
    tracing_subscriber::registry()
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false))
        .with(quiet)
        .init();
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), String> {
    let workspace = workspace();
    let template = workspace.join("infra/template.yaml");
    let functions = match arguments.functions {
        Some(folder) => folder,
        None => {
            let packages = binaries(&template).map_err(|e| format!("the template cannot be used: {e}"))?;
            build(&workspace, &packages)?
        }
    };
    let started = Instant::now();
    println!("Starting the stack in {} …", arguments.data.display());
    let anthropic = || "https://api.anthropic.com".to_owned();
    let model = match (arguments.model_url, arguments.model_key) {
        (None, None) => None,
        (url, Some(key)) => Some(Endpoint { url: url.unwrap_or_else(anthropic), key }),
        (Some(url), None) => Some(Endpoint { url, key: NO_KEY.to_owned() }),
    };
    let embeddings = arguments.embeddings_url.map(|url| {
        let key = arguments.embeddings_key.unwrap_or_else(|| NO_KEY.to_owned());
        (Endpoint { url, key }, arguments.embeddings_model, arguments.embeddings_dimensions)
    });
    let reranker = arguments.rerank_url.map(|url| {
        let key = arguments.rerank_key.unwrap_or_else(|| NO_KEY.to_owned());
        (Endpoint { url, key }, arguments.rerank_model)
    });
    let offline = model.is_none();
    let config = Config {
        port: arguments.port,
        data: arguments.data,
        ready_file: arguments.ready_file,
        seed: !arguments.no_seed,
        functions,
        template,
        model,
        embeddings,
        reranker,
        model_delay_ms: arguments.model_delay_ms,
        parameters: arguments.parameters,
        log_level: arguments.log_level,
    };
    let (mut terminate, mut interrupt) = signals().map_err(|e| format!("signals cannot be received: {e}"))?;
    let mut stack = tokio::select! {
        stack = Stack::start(config) => stack.map_err(|e: StackError| e.to_string())?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    greet(&stack, started, offline);
    let failure = tokio::select! {
        failure = stack.failure() => Some(failure),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
    };
    println!("\nStopping …");
    stack.stop().await;
    failure.map_or(Ok(()), |failure| Err(failure.to_string()))
}

type Signals = (tokio::signal::unix::Signal, tokio::signal::unix::Signal);

fn signals() -> std::io::Result<Signals> {
    Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
}

/// The workspace that this program was built from.
fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// Builds the functions beside this program, with the same profile. Named together with this package,
/// they get the features that they were compiled with already.
fn build(workspace: &Path, functions: &[String]) -> Result<PathBuf, String> {
    let program =
        std::env::current_exe().map_err(|e| format!("this program does not know its own path: {e}"))?;
    let folder = program.parent().unwrap_or(workspace).to_owned();
    let mut cargo = local::cargo::command();
    cargo.arg("build").current_dir(workspace);
    cargo.args(["--package", "local"]);
    let packages: BTreeSet<String> = functions.iter().map(|program| package_of(workspace, program)).collect();
    for package in packages {
        cargo.args(["--package", &package]);
    }
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    println!("Building the functions …");
    match cargo.status() {
        Ok(status) if status.success() => Ok(folder),
        Ok(_) => Err("the functions do not build; cargo says above why".to_owned()),
        Err(error) => Err(format!("cargo cannot be run ({error}); it is needed to build the functions")),
    }
}

/// The package that a function's program is of: the one of its name, or the one that has it beside its own.
fn package_of(workspace: &Path, program: &str) -> String {
    let beside = |package: &DirEntry| package.path().join(format!("src/bin/{program}.rs")).is_file();
    let packages = std::fs::read_dir(workspace.join("functions")).into_iter().flatten().flatten();
    let found = { packages }.find(beside);
    found.map_or_else(|| program.to_owned(), |package| package.file_name().to_string_lossy().into_owned())
}

fn greet(stack: &Stack, started: Instant, offline: bool) {
    let ready = stack.ready();
    let seconds = started.elapsed().as_secs_f64();
    println!("Bulkhead answers on {} (started in {seconds:.1} s).", ready.url);
    if offline {
        println!("No model key is set, so the offline model answers: it quotes the passages it is given.");
    }
    for tenant in &ready.tenants {
        println!("  {:<8} {}", tenant.tenant_id, tenant.api_key);
    }
    let Some(tenant) = ready.tenants.first() else { return };
    let (url, key) = (&ready.url, &tenant.api_key);
    println!(
        "\nTry:\n\n\
         curl {url}/v1/documents -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n  \
         -d '{{\"title\":\"Staff handbook\",\"content\":\"Every employee has 25 days of paid annual leave.\"}}'\n\n\
         curl {url}/v1/chat -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n  \
         -d '{{\"message\":\"How many days of annual leave are there?\"}}'\n\n\
         curl -N {url}/v1/chat -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n  \
         -d '{{\"message\":\"How many days of annual leave are there?\",\"stream\":true}}'\n"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_of_the_template_is_of_a_package() {
        let workspace = workspace();
        let programs = binaries(&workspace.join("infra/template.yaml")).unwrap();
        assert!(programs.len() > 8, "{programs:?}");
        for program in programs {
            let manifest =
                workspace.join("functions").join(package_of(&workspace, &program)).join("Cargo.toml");
            assert!(manifest.is_file(), "{program}: {}", manifest.display());
        }
        assert_eq!(package_of(&workspace, "eraser"), "deprovisioning");
    }
}
