//! What a machine has of real files, in all formats at once: how fast they are ingested, and in how much memory.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::ZlibEncoder;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::{Stack, binaries};

const PDF: &str = "application/pdf";
const DOCX: &str = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";
/// The largest file that is sent, and the most of files that is sent at once, in bytes.
const MOST_FILE: usize = 2 << 20;
const MOST_AT_ONCE: usize = 3 << 20;

/// All files below a folder, in order of their names.
fn below(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort_unstable();
    for path in entries {
        if path.is_dir() && !path.is_symlink() {
            below(&path, files);
        } else if path.is_file() {
            files.push(path);
        }
    }
}

/// A file, unpacked if it is packed.
fn content(path: &Path) -> Vec<u8> {
    let packed = std::fs::read(path).unwrap_or_default();
    let mut content = Vec::new();
    match path.extension().is_some_and(|kind| kind == "gz") {
        true if GzDecoder::new(&packed[..]).read_to_end(&mut content).is_ok() => content,
        _ => packed,
    }
}

/// What a program makes of its input; nothing if it fails.
fn made(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; install groff and pandoc"));
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    drop(writer.join());
    output.stdout
}

/// A thousand files of all formats, with their media types: documentation of this machine's packages as it is, and
/// manual pages as PDF by groff and as DOCX by pandoc.
fn thousand() -> Vec<(&'static str, Vec<u8>)> {
    let (mut documentation, mut pages) = (Vec::new(), Vec::new());
    below(Path::new("/usr/share/doc"), &mut documentation);
    for section in ["man1", "man5", "man7", "man8"] {
        below(&Path::new("/usr/share/man").join(section), &mut pages);
    }
    let mut files: Vec<(&'static str, Vec<u8>)> = Vec::new();
    let mut add = |kind: &'static str, most: usize, from: &mut dyn Iterator<Item = Vec<u8>>| {
        let fitting = from.filter(|content| content.len() > 200 && content.len() < MOST_FILE);
        files.extend(fitting.take(most).map(|content| (kind, content)));
    };
    let named = |ends: &'static [&'static str]| {
        let fits = move |path: &&PathBuf| {
            let name = path.to_string_lossy().to_lowercase();
            ends.iter().any(|end| name.trim_end_matches(".gz").ends_with(end))
        };
        documentation.iter().filter(fits).map(|path| content(path))
    };
    add("text/html", 200, &mut named(&[".html", ".htm"]));
    add("text/markdown", 150, &mut named(&[".md"]));
    let page = |n: usize| pages.iter().skip(n).step_by(pages.len() / 250 + 1).map(|path| content(path));
    add(PDF, 150, &mut page(0).map(|page| made("groff", &["-k", "-t", "-mandoc", "-Tpdf"], &page)));
    add(DOCX, 100, &mut page(1).map(|page| made("pandoc", &["-f", "man", "-t", "docx", "-o", "-"], &page)));
    // The tables of installed packages, as spreadsheets have them.
    let list =
        made("dpkg-query", &["-W", "-f", "${Package};${Version};${Section};\"${binary:Summary}\"\n"], b"");
    let list = String::from_utf8_lossy(&list).into_owned();
    let rows: Vec<&str> = list.lines().collect();
    let tables =
        rows.chunks(20).map(|rows| format!("package;version;section;summary\n{}\n", rows.join("\n")));
    add("text/csv", 50, &mut tables.map(String::into_bytes));
    let rest = 1_000 - files.len();
    let mut add = |from: &mut dyn Iterator<Item = Vec<u8>>| {
        let fitting = from.filter(|content| content.len() > 200 && content.len() < MOST_FILE);
        files.extend(fitting.take(rest).map(|content| ("text/plain", content)));
    };
    let texts = |path: &&PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().to_lowercase();
        ["copyright", "readme", "changelog", "news", "todo", "authors"].iter().any(|word| name.contains(word))
            && !name.trim_end_matches(".gz").ends_with(".html")
    };
    add(&mut documentation.iter().filter(texts).map(|path| content(path)));
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes, and groff and pandoc; prints a table for the README"]
async fn a_thousand_mixed_files_are_ingested_without_a_crash() {
    let stack = Stack::start().await;
    let limits = json!({"requests_per_minute": 10_000, "max_concurrent": 50, "tokens_per_day": 1_000_000_000_u64,
        "monthly_token_budget": 1_000_000_000_u64, "max_documents": 2_000});
    let body =
        json!({"tenant_id": "library", "tier": "enterprise", "company_name": "Library", "limits": limits});
    let library = stack.provision(body).await;
    let files = thousand();
    println!("{} files", files.len());
    library.store("first", "First", "The first document starts the function.").await;
    let before = stack.processes("ingestion");
    let mut kinds: std::collections::BTreeMap<&str, (usize, usize, usize, Duration)> = Default::default();
    let (mut passages, began) = (0, Instant::now());
    let mut n = 0;
    while n < files.len() {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let kind = files[n].0;
        while let Some((next, content)) = files.get(n + batch.len())
            && *next == kind
            && batch.len() < 20
            && (bytes == 0 || bytes + content.len() < MOST_AT_ONCE)
        {
            bytes += content.len();
            batch.push(json!({"id": format!("file-{}", n + batch.len()), "title": format!("File {}", n + batch.len()),
                "content_type": kind, "content_base64": STANDARD.encode(content)}));
        }
        let started = Instant::now();
        let answer = library.post("/v1/documents", &json!({"documents": batch})).await;
        let outcomes = match answer.status {
            StatusCode::CREATED => answer.json()["documents"].as_array().unwrap().clone(),
            status => {
                assert!(status.is_client_error(), "{kind}, file {n}: {status} {}", answer.text);
                vec![answer.json(); batch.len()]
            }
        };
        let entry = kinds.entry(kind).or_default();
        entry.3 += started.elapsed();
        for (i, outcome) in outcomes.iter().enumerate() {
            entry.1 += files[n + i].1.len();
            if outcome["status"] == "ready" {
                entry.0 += 1;
                passages += outcome["chunks"].as_u64().unwrap();
            } else {
                entry.2 += 1;
                println!("{kind}, file {}: {}", n + i, outcome["error"]["message"]);
            }
        }
        n += batch.len();
    }
    let took = began.elapsed().as_secs_f64();
    let per_second = |number: usize, time: f64| number as f64 / time;
    let (mut stored, mut bytes) = (0, 0);
    for (kind, (ready, size, refused, time)) in &kinds {
        let time = time.as_secs_f64();
        let megabytes = *size as f64 / 1e6;
        println!(
            "{kind}: {ready} stored, {refused} refused, {megabytes:.1} MB, {:.1} documents/s, {:.2} MB/s",
            per_second(*ready, time),
            megabytes / time
        );
        stored += ready;
        bytes += size;
    }
    let most = stack.most_memory("ingestion").into_iter().max().unwrap_or_default();
    println!(
        "{stored} documents, {passages} passages, {:.1} MB in {took:.0} s: {:.1} documents/s, {:.2} MB/s; \
        at most {:.0} MB in the function",
        bytes as f64 / 1e6,
        per_second(stored, took),
        bytes as f64 / 1e6 / took,
        most as f64 / 1e3
    );
    // Real files are odd at times; few are so odd that nothing can be made of them.
    assert!(stored >= files.len() * 98 / 100, "{stored} of {}", files.len());
    let after = stack.processes("ingestion");
    assert!(before.keys().all(|pid| after.contains_key(pid)), "a function has died");
    let hits: Vec<Value> = library.search("Which option prints the version?", 10).await;
    assert!(!hits.is_empty());
}

/// A PDF file of about `bytes`, as one with pictures is: pages of text, and noise that does not pack.
fn large_pdf(bytes: usize) -> Vec<u8> {
    const PICTURE: usize = 500_000;
    let mut file = b"%PDF-1.5\n".to_vec();
    let mut places = Vec::new();
    let mut object = |file: &mut Vec<u8>, text: &str, stream: Option<&[u8]>| {
        places.push(file.len());
        writeln!(file, "{} 0 obj", places.len()).unwrap();
        match stream {
            None => writeln!(file, "{text}").unwrap(),
            Some(stream) => {
                write!(file, "<< {text} /Length {} >>\nstream\n", stream.len()).unwrap();
                file.extend(stream);
                file.extend(b"\nendstream\n");
            }
        }
        file.extend(b"endobj\n");
    };
    let count = bytes / PICTURE;
    object(&mut file, "<< /Type /Catalog /Pages 2 0 R >>", None);
    let kids: String = (0..count).map(|n| format!("{} 0 R ", 4 + 3 * n)).collect();
    object(&mut file, &format!("<< /Type /Pages /Kids [{kids}] /Count {count} >>"), None);
    object(&mut file, "<< /Type /Font /Subtype /Type1 /BaseFont /Times-Roman >>", None);
    let mut noise = vec![0; PICTURE];
    let mut state = 1u32;
    for page in 0..count {
        let (text, picture) = (5 + 3 * page, 6 + 3 * page);
        let resources = format!("<< /Font << /F1 3 0 R >> /XObject << /Im {picture} 0 R >> >>");
        object(
            &mut file,
            &format!("<< /Type /Page /Parent 2 0 R /Resources {resources} /Contents {text} 0 R >>"),
            None,
        );
        let mut drawing = b"/Im Do BT /F1 10 Tf 12 TL 72 760 Td\n".to_vec();
        for line in 0..55 {
            writeln!(drawing, "(Page {page}, line {line}: the cranes of the harbour are kept in order by the harbour office.) Tj T*").unwrap();
        }
        drawing.extend(b"ET");
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
        packed.write_all(&drawing).unwrap();
        object(&mut file, "/Filter /FlateDecode", Some(&packed.finish().unwrap()));
        for byte in &mut noise {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (state >> 24) as u8;
        }
        object(
            &mut file,
            "/Type /XObject /Subtype /Image /Width 500 /Height 1000 /BitsPerComponent 8 /ColorSpace /DeviceGray",
            Some(&noise),
        );
    }
    let table = file.len();
    write!(file, "xref\n0 {}\n0000000000 65535 f \n", places.len() + 1).unwrap();
    for place in &places {
        writeln!(file, "{place:010} 00000 n ").unwrap();
    }
    write!(file, "trailer\n<< /Size {} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n", places.len() + 1)
        .unwrap();
    file
}

/// By a link, into a queue and through the function that reads it: what it holds itself, beside its reader's memory.
#[tokio::test]
async fn a_pdf_of_50_mb_is_uploaded_and_found() {
    let stack = Stack::start().await;
    let limits = json!({"tokens_per_day": 1_000_000_000_u64, "monthly_token_budget": 10_000_000_000_u64,
        "requests_per_minute": 10_000});
    let body = json!({"tenant_id": "port", "tier": "enterprise", "company_name": "Port", "limits": limits});
    let port = stack.provision(body).await;
    let file = large_pdf(50_000_000);
    let (bytes, began) = (file.len(), Instant::now());
    assert!(bytes > 49_000_000);
    let ready = port.upload("harbour", PDF, file).await;
    assert_eq!(ready["status"], "ready", "{ready}");
    let hits = port.search("Who keeps the cranes in order?", 5).await;
    assert!(!hits.is_empty() && hits.iter().all(|hit| hit["document_id"] == "harbour"));
    // Names of processes are cut off after 15 bytes.
    let most = stack.most_memory("upload_ingestio").into_iter().max().unwrap();
    println!(
        "a PDF file of 50 MB uploaded: {:.1} s, {} passages, {:.0} MB in the function",
        began.elapsed().as_secs_f64(),
        ready["chunks"],
        most as f64 / 1e3
    );
    // With its reader's bound of 160 MiB that is less than 256 MB.
    assert!(most < 88_000, "{most} kB");
    stack.stop().await;
}

/// Text is bounded like everything else: by how much there is of it and in how many pieces, and so is the memory of the
/// function that hands it to its reader.
#[tokio::test]
async fn text_in_ever_so_many_pieces_takes_bounded_memory() {
    let stack = Stack::start().await;
    let limits = json!({"tokens_per_day": 1_000_000_000_u64, "monthly_token_budget": 10_000_000_000_u64,
        "requests_per_minute": 10_000});
    let body = json!({"tenant_id": "port", "tier": "enterprise", "company_name": "Port", "limits": limits});
    let port = stack.provision(body).await;
    const MOST: usize = 50_000_000;
    for (id, kind, piece, times, ready) in [
        ("paragraphs", "text/plain", "a\n\n", MOST / 3, false),
        ("rows", "text/csv", "1\n", MOST / 2, false),
        ("short-paragraphs", "text/plain", "a\n\n", 24_000_000 / 3, false),
        ("short-rows", "text/csv", "1\n", 24_000_000 / 2, false),
        ("latin", "text/plain; charset=latin1", "\u{e4}", MOST / 2, false),
        ("most-paragraphs", "text/plain", "a\n\n", 499_000, true),
        ("most-rows", "text/csv", "1\n", 499_000, true),
    ] {
        let began = Instant::now();
        let uploaded = port.upload(id, kind, piece.repeat(times).into_bytes()).await;
        println!("{id}: {:.1} s, {}", began.elapsed().as_secs_f64(), uploaded["chunks"]);
        if ready {
            assert_eq!(uploaded["status"], "ready", "{id}: {uploaded}");
            continue;
        }
        assert_eq!(uploaded["status"], "failed", "{id}: {uploaded}");
        assert!(uploaded["reason"].as_str().unwrap().contains("than is read of one"), "{id}: {uploaded}");
    }
    let most = stack.most_memory("upload_ingestio").into_iter().max().unwrap();
    println!("text in ever so many pieces: {:.0} MB in the function", most as f64 / 1e3);
    assert!(most < 130_000, "{most} kB");
    stack.stop().await;
}

/// As the function does.
#[test]
fn a_pdf_of_50_mb_is_read_in_far_less_than_256_mb() {
    let program = binaries().join("document_reader");
    let file = large_pdf(50_000_000);
    assert!(file.len() > 49_000_000);
    let began = Instant::now();
    let mut reader = Command::new(program)
        .arg(PDF)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, pid) = (reader.stdin.take().unwrap(), reader.id());
    let writer = std::thread::spawn(move || stdin.write_all(&file));
    let watcher = std::thread::spawn(move || {
        let mut most = 0;
        while let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status"))
            && let Some(line) = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))
        {
            most = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap().max(most);
            std::thread::sleep(Duration::from_millis(5));
        }
        most
    });
    let output = reader.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    let most = watcher.join().unwrap();
    println!("a PDF file of 50 MB: {:.1} s, {:.0} MB", began.elapsed().as_secs_f64(), most as f64 / 1e3);
    let answer = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && answer.starts_with("{\"Ok\":"),
        "{}",
        answer.chars().take(300).collect::<String>()
    );
    for page in [0, 50, 99] {
        assert!(answer.contains(&format!("Page {page}, line 54")), "page {page} is missing");
    }
    // What the function itself takes besides is below 30 MB, and the file's 50 where it holds it.
    assert!(most < 170_000, "{most} kB");
}
