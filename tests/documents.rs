//! Documents of every format and in every charset: what is in them is found; what cannot be read says why, and neither
//! harms the others of its request nor the function.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs::Permissions;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::{Stack, Tenant, binaries};

const PDF: &str = "application/pdf";
const DOCX: &str = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";

fn sample(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/samples/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn file(id: &str, content_type: &str, content: &[u8]) -> Value {
    json!({"id": id, "title": format!("File {id}"), "content_type": content_type,
        "content_base64": STANDARD.encode(content)})
}

async fn store(tenant: &Tenant, documents: &[Value]) -> Vec<Value> {
    let answer = tenant.post("/v1/documents", &json!({"documents": documents})).await;
    answer.expect_status(StatusCode::CREATED).json()["documents"].as_array().unwrap().clone()
}

/// The passages of one document that a search finds.
async fn found(tenant: &Tenant, id: &str, query: &str) -> String {
    let hits = tenant.search(query, 100).await;
    let texts = hits.iter().filter(|hit| hit["document_id"] == id).map(|hit| hit["text"].as_str().unwrap());
    texts.collect::<Vec<_>>().join("\n").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn files_of_every_format_are_found_by_what_is_in_them() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let files = [
        ("pdf", PDF, "ghostscript.pdf"),
        ("pdf-1.5", PDF, "object-streams.pdf"),
        ("pdf-owner", PDF, "owner-locked.pdf"),
        ("docx", DOCX, "handbook.docx"),
        ("html", "text/html; charset=utf-8", "handbook.html"),
        ("markdown", "text/markdown", "handbook.md"),
        ("plain", "text/plain", "handbook.md"),
        ("csv", "text/csv", "allowances.csv"),
    ];
    let documents: Vec<Value> =
        files.iter().map(|(id, content_type, name)| file(id, content_type, &sample(name))).collect();
    let stored = store(&acme, &documents).await;
    for ((id, content_type, _), stored) in files.iter().zip(&stored) {
        assert_eq!(stored["status"], "ready", "{id}: {stored}");
        let shown = acme.get(&format!("/v1/documents/{id}")).await.expect_status(StatusCode::OK).json();
        assert_eq!(shown["content_type"], content_type.split(';').next().unwrap());
        let text = found(&acme, id, "What is the hotel limit in Norway?").await;
        for word in ["Norway", "64 euros", "180 euros", "Poland"] {
            assert!(text.contains(word), "{id}: {word:?} is not in {text:?}");
        }
    }
    // The same files again are the same versions.
    assert_eq!(store(&acme, &documents).await, stored);
    // The title is a document's; what is in it, its passages'.
    let answer = acme.ask("How many days of annual leave has every employee?").await;
    assert!(answer["response"].as_str().unwrap().contains("25 days"), "{answer}");
}

#[tokio::test]
async fn text_in_every_charset_is_found() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let utf_16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let files = [
        ("utf-8", "text/plain", "Übergabe der Schlüssel".as_bytes().to_vec(), "Übergabe der Schlüssel"),
        ("mark", "text/plain", b"\xef\xbb\xbfSchl\xc3\xbcssel".to_vec(), "Schlüssel"),
        ("latin", "text/plain; charset=ISO-8859-1", b"Schl\xfcssel".to_vec(), "Schlüssel"),
        (
            "unsaid",
            "text/plain",
            b"Die \xdcbergabe der Schl\xfcssel erfolgt am Montag.".to_vec(),
            "Übergabe der Schlüssel",
        ),
        ("koi8", "text/markdown; charset=koi8-r", b"\xeb\xcc\xc0\xde\xc9".to_vec(), "Ключи"),
        ("sjis", "text/csv; charset=\"Shift_JIS\"", b"\x8c\xae,1\n".to_vec(), "鍵"),
        ("utf-16", "text/plain", [b"\xff\xfe".to_vec(), utf_16("Schlüssel 🔑")].concat(), "Schlüssel 🔑"),
        ("utf-16le", "text/plain; charset=utf-16le", utf_16("Ключи"), "Ключи"),
        ("meta", "text/html", b"<meta charset=windows-1251><p>\xca\xeb\xfe\xf7\xe8".to_vec(), "Ключи"),
    ];
    let documents: Vec<Value> =
        files.iter().map(|(id, content_type, content, _)| file(id, content_type, content)).collect();
    for stored in store(&acme, &documents).await {
        assert_eq!(stored["status"], "ready", "{stored}");
    }
    for (id, _, _, text) in files {
        assert!(found(&acme, id, text).await.contains(text), "{id}");
    }
    // What JSON has decoded is text, whatever it says it was.
    let decoded = json!({"id": "json", "title": "t", "content": "Schlüssel", "content_type": "text/plain; charset=latin1"});
    assert_eq!(store(&acme, &[decoded]).await[0]["status"], "ready");
    assert!(found(&acme, "json", "Schlüssel").await.contains("Schlüssel"));
}

#[tokio::test]
async fn what_cannot_be_read_says_why_and_harms_nothing_else() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("first", "First", "The first document.").await;
    let before = stack.processes("ingestion");
    let (pdf, docx) = (sample("ghostscript.pdf"), sample("handbook.docx"));
    let bomb = zip("word/document.xml", &vec![b' '; 300 << 20]);
    assert!(bomb.len() < 1 << 20);
    // code, a word of the message, and the file
    let cases = [
        ("invalid_request", "encrypted", PDF, sample("encrypted.pdf")),
        ("invalid_request", "cut off", PDF, pdf[..pdf.len() / 2].to_vec()),
        ("invalid_request", "cut off", DOCX, docx[..docx.len() / 2].to_vec()),
        ("unsupported_content_type", "a PDF file", DOCX, pdf.clone()),
        ("unsupported_content_type", "a ZIP archive", "text/plain", docx.clone()),
        ("unsupported_content_type", "something else", PDF, b"Just text.".to_vec()),
        ("unsupported_content_type", "binary data", "text/plain", vec![0; 1_000]),
        ("unsupported_content_type", "an Excel workbook", DOCX, zip("xl/workbook.xml", b"<x/>")),
        ("unsupported_content_type", "`klingon`", "text/plain; charset=klingon", b"nuqneH".to_vec()),
        ("too_large", "unpacks to more", DOCX, bomb),
        ("too_large", "unpacks to more", PDF, pdf_bomb()),
        ("too_large", "10000 pages", PDF, pages(10_000)),
        ("invalid_request", "is empty", PDF, Vec::new()),
        ("invalid_request", "is empty", "text/csv", b" \r\n ".to_vec()),
        ("invalid_request", "no text", PDF, pages(0)),
        ("invalid_request", "which letters", PDF, unmapped()),
        ("invalid_request", "is said to be in UTF-8", "text/plain; charset=utf-8", b"Schl\xfcssel".to_vec()),
    ];
    let mut documents: Vec<Value> = cases
        .iter()
        .enumerate()
        .map(|(n, (.., kind, content))| file(&format!("bad-{n}"), kind, content))
        .collect();
    documents.push(json!({"id": "last", "title": "Last", "content": "The last document."}));
    let outcomes = store(&acme, &documents).await;
    for (n, ((code, word, kind, _), outcome)) in cases.iter().zip(&outcomes).enumerate() {
        let error = &outcome["error"];
        assert_eq!(
            (&outcome["status"], &error["code"]),
            (&json!("failed"), &json!(code)),
            "{n}, {kind}: {outcome}"
        );
        assert!(error["message"].as_str().unwrap().contains(word), "{n}, {kind}: {error} lacks {word:?}");
        let param = error["param"].as_str().unwrap();
        assert!(param.starts_with(&format!("documents[{n}].content")), "{n}, {kind}: {param}");
    }
    assert_eq!(outcomes.last().unwrap()["status"], "ready");
    assert!(!found(&acme, "last", "last document").await.is_empty());
    // Nothing of the others is there, and the function is the same as before.
    let listed = acme.get("/v1/documents").await.json();
    let ids: Vec<&Value> = listed["documents"].as_array().unwrap().iter().map(|d| &d["id"]).collect();
    assert_eq!(ids, ["first", "last"]);
    let after = stack.processes("ingestion");
    assert!(before.keys().all(|pid| after.contains_key(pid)), "a function has died: {before:?} {after:?}");
}

/// However long the files of one request take: each is answered, in time, and what was read is stored.
#[tokio::test]
async fn slow_files_leave_time_to_answer_for_the_others() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("first", "First", "The first document.").await;
    let before = stack.processes("ingestion");
    let quick =
        |id: &str| json!({"id": id, "title": format!("File {id}"), "content": format!("It says {id}.")});
    // As many as are worked on at once, so that the slow ones come after them.
    let mut documents: Vec<Value> = (0..4).map(|n| quick(&format!("quick-{n}"))).collect();
    let endless = endless();
    documents.extend((4..10).map(|n| file(&format!("slow-{n}"), PDF, &endless)));
    documents.push(quick("late"));
    let outcomes = store(&acme, &documents).await;
    let mut had_all_its_time = false;
    for (n, outcome) in outcomes.iter().enumerate() {
        if n < 4 {
            assert_eq!(outcome["status"], "ready", "{n}: {outcome}");
            continue;
        }
        // One of the four that come first had all the time that one may take, unless the machine is slow; the last had none.
        let error = &outcome["error"];
        let first = n < 8 && !had_all_its_time;
        let codes: &[&str] = if first { &["too_large", "deadline_exceeded"] } else { &["deadline_exceeded"] };
        had_all_its_time |= error["code"] == "too_large";
        assert_eq!(outcome["status"], "failed", "{n}: {outcome}");
        assert!(codes.contains(&error["code"].as_str().unwrap()), "{n}: {outcome}");
        assert!(error["param"].as_str().unwrap().starts_with(&format!("documents[{n}]")), "{n}: {error}");
    }
    assert!(!found(&acme, "quick-0", "quick").await.is_empty());
    // By itself, there is time for it; and for nobody was the function ended.
    assert_eq!(store(&acme, &[quick("late")]).await[0]["status"], "ready");
    let after = stack.processes("ingestion");
    assert!(before.keys().all(|pid| after.contains_key(pid)), "a function has died: {before:?} {after:?}");
    stack.stop().await;
}

/// The program that reads documents, asked to read one: what it says, and how it ends.
fn reader(file: Vec<u8>) -> std::process::Output {
    let program = binaries().join("document_reader");
    let mut reader = Command::new(program)
        .arg(PDF)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = reader.stdin.take().unwrap();
    let writer = std::thread::spawn(move || drop(stdin.write_all(&file)));
    let output = reader.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// Whoever waits for a reader might not be there: the system ends one that goes on for ever, or wants all memory.
#[test]
fn the_system_bounds_a_readers_time_and_memory() {
    let output = reader(endless());
    assert_eq!(output.status.signal(), Some(9), "not SIGKILL: {output:?}");
    let output = reader(pdf_bomb());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.signal(), Some(6), "not SIGABRT: {said}");
    assert!(said.trim_start().starts_with("memory allocation of"), "{said}");
}

/// A reader is of the same user as its function, whose environment holds the function's keys.
#[tokio::test]
async fn a_reader_cannot_look_into_its_function() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.upload("warm", "text/plain", b"Warm.".to_vec()).await;
    acme.store("first", "First", "The first document.").await;
    let built = binaries();
    // Root looks wherever it likes, so nobody is who runs the function and looks.
    let root = Path::new("/proc/self").metadata().unwrap().uid() == 0;
    // Where nobody gets to, too: the folder that TMPDIR names may be its owner's alone.
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let nobody = |command: &mut Command| {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if root {
            command.uid(65_534).gid(65_534);
        }
    };
    let looked = |pid: u32| {
        let mut look = Command::new("cat");
        nobody(look.arg(format!("/proc/{pid}/environ")));
        let output = look.output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains("AWS_SECRET_ACCESS_KEY=")
    };
    // A function without its reader would end before anybody has looked.
    std::fs::copy(built.join("document_reader"), folder.path().join("document_reader")).unwrap();
    for (function, program) in [("ingestion", "ingestion"), ("upload-ingestion", "upload_ingestion")] {
        let copy = folder.path().join(program);
        std::fs::copy(built.join(program), &copy).unwrap();
        let environment = stack.processes(function).into_values().next().unwrap();
        for (what, seen) in [(Path::new("/bin/sleep"), true), (&copy, false)] {
            // It is up when it asks for its first event, which never comes.
            let events = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            let address = format!("http://{}", events.local_addr().unwrap());
            let mut command = Command::new(what);
            nobody(&mut command);
            command.env_clear().envs(&environment).env("AWS_LAMBDA_RUNTIME_API", address);
            if seen {
                command.arg("60");
            }
            let mut process = command.spawn().unwrap();
            // Whose connection is kept open: it would end without.
            let _connection = if seen { None } else { Some(accepted(events).await) };
            assert_eq!(looked(process.id()), seen, "{what:?}");
            assert!(process.try_wait().unwrap().is_none(), "{what:?} has ended");
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }
    stack.stop().await;
}

/// The first who connects, and the listener.
async fn accepted(listener: TcpListener) -> (TcpStream, TcpListener) {
    let accept = move || (listener.accept().unwrap().0, listener);
    tokio::task::spawn_blocking(accept).await.unwrap()
}

/// A page of a list is as long as was asked for, and its cursor is of what the caller was shown.
#[tokio::test]
async fn a_list_shows_nothing_of_what_its_reader_may_not_read() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let documents: Vec<Value> = (0..9)
        .map(|n| {
            let groups = if n % 3 == 1 { json!(null) } else { json!(["board"]) };
            json!({"id": format!("doc-{n}"), "title": "T", "content": format!("Text {n}"), "groups": groups})
        })
        .collect();
    assert!(store(&acme, &documents).await.iter().all(|outcome| outcome["status"] == "ready"));
    let pages = async |reader: &Tenant, limit: usize| {
        let (mut pages, mut path) = (Vec::new(), format!("/v1/documents?limit={limit}"));
        loop {
            let page = reader.get(&path).await.expect_status(StatusCode::OK).json();
            let ids: Vec<String> = page["documents"]
                .as_array()
                .unwrap()
                .iter()
                .map(|document| document["id"].as_str().unwrap().to_owned())
                .collect();
            let cursor = page.get("cursor").map(|cursor| cursor.as_str().unwrap().to_owned());
            assert!(cursor.is_none() || cursor.as_ref() == ids.last(), "{page}");
            pages.push(ids);
            match cursor {
                Some(cursor) => path = format!("/v1/documents?limit={limit}&cursor={cursor}"),
                None => return pages,
            }
        }
    };
    let other = acme.in_groups("sales");
    assert_eq!(pages(&other, 1).await, [["doc-1"], ["doc-4"], ["doc-7"]]);
    assert_eq!(pages(&other, 2).await, [vec!["doc-1", "doc-4"], vec!["doc-7"]]);
    assert_eq!(pages(&other, 3).await, [["doc-1", "doc-4", "doc-7"]]);
    assert_eq!(pages(&acme, 4).await.concat().len(), 9);
    assert_eq!(pages(&acme.in_groups("board"), 1).await.len(), 9);
    stack.stop().await;
}

/// The one item that all of a tenant's documents are counted in is written by several at a time.
#[tokio::test]
async fn a_collision_at_the_count_is_tried_again_by_whoever_deletes() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    for id in ["one", "two"] {
        acme.store(id, id, "It is deleted.").await;
    }
    acme.begin_upload(&json!({"id": "never", "title": "N", "content_type": "text/plain", "size_bytes": 5}))
        .await;
    let collide = async |contains: &str| {
        let rule = json!({"mode": "cancel_conflict", "operation": "TransactWriteItems", "contains": contains,
            "times": 5});
        stack.dynamodb_faults(json!({"rules": [rule]})).await;
    };
    let count = async || stack.items("documents", "acme", "COUNT").await;
    collide("document_deleted").await;
    acme.delete("/v1/documents/one").await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(count().await[0]["documents"], 2);
    let old = json!({"N": "1"});
    let key = |sort: &str| json!({"tenant_id": {"S": "acme"}, "sk": {"S": sort}});
    let upload = stack.items("documents", "acme", "UPLOAD#").await[0]["sk"].as_str().unwrap().to_owned();
    stack.edit("documents", key(&upload), &["expires_at"], old.clone()).await;
    collide("document_expired").await;
    assert_eq!(stack.invoke("eraser", json!({"job": "uploads"})).await["unmade"], 1);
    assert_eq!(count().await[0]["documents"], 1);
    stack.edit("documents", key("DOC#two"), &["updated_at"], old).await;
    collide("document_expired").await;
    let report = stack.invoke("eraser", json!({"job": "retain"})).await;
    assert_eq!((&report["documents"], &report["left"]), (&json!(1), &json!(0)), "{report}");
    assert_eq!(count().await[0]["documents"], 0);
    stack.stop().await;
}

/// A tenant whose count is gone already is being deleted: whoever is still at a document makes none anew.
#[tokio::test]
async fn a_count_that_is_gone_stays_gone() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("last", "last", "It is the last.").await;
    let count = json!({"Key": {"tenant_id": {"S": "acme"}, "sk": {"S": "COUNT"}}});
    stack.dynamodb("DeleteItem", "documents", count).await;
    acme.delete("/v1/documents/last").await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(stack.items("documents", "acme", "").await, Vec::<Value>::new());
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_no_more_documents_than_its_limit_however_many_clients_store() {
    let stack = Stack::start().await;
    let limits = json!({"max_documents": 25, "requests_per_minute": 10_000, "max_concurrent": 100});
    let body = json!({"tenant_id": "small", "tier": "enterprise", "company_name": "Small", "limits": limits});
    let small = stack.provision(body).await;
    let store_new = async || {
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..20 {
            let small = small.clone();
            clients.spawn(async move {
                let documents: Vec<Value> = (0..3)
                    .map(|n| json!({"id": format!("{client}-{n}"), "title": "T", "content": format!("Text {client} {n}")}))
                    .collect();
                small.post("/v1/documents", &json!({"documents": documents})).await
            });
        }
        let (mut stored, mut refused) = (0, 0);
        for answer in clients.join_all().await {
            let errors: Vec<Value> = match answer.status {
                StatusCode::CREATED => {
                    let outcomes = answer.json()["documents"].as_array().unwrap().clone();
                    stored += outcomes.iter().filter(|outcome| outcome["status"] == "ready").count();
                    outcomes.into_iter().filter_map(|outcome| outcome.get("error").cloned()).collect()
                }
                _ => vec![answer.expect_error(409, "conflict"); 3],
            };
            for error in errors {
                assert_eq!(
                    (&error["code"], &error["limit"]),
                    (&json!("conflict"), &json!("max_documents")),
                    "{error}"
                );
                refused += 1;
            }
        }
        (stored, refused)
    };
    assert_eq!(store_new().await, (25, 35));
    let count = async || {
        let mut ids = Vec::new();
        let mut path = "/v1/documents?limit=10".to_owned();
        loop {
            let page = small.get(&path).await.expect_status(StatusCode::OK).json();
            ids.extend(
                page["documents"].as_array().unwrap().iter().map(|d| d["id"].as_str().unwrap().to_owned()),
            );
            match page["cursor"].as_str() {
                Some(cursor) => path = format!("/v1/documents?limit=10&cursor={cursor}"),
                None => return ids,
            }
        }
    };
    let ids = count().await;
    assert_eq!(ids.len(), 25);
    // What is there can be replaced; what is deleted makes room, once.
    small.store(&ids[0], "T", "Another text").await;
    for id in &ids[..4] {
        small.delete(&format!("/v1/documents/{id}")).await.expect_status(StatusCode::NO_CONTENT);
        small.delete(&format!("/v1/documents/{id}")).await.expect_error(404, "not_found");
    }
    let (stored, refused) = store_new().await;
    // Those that were there are the same as before.
    assert_eq!((stored - 21, refused), (4, 60 - 25));
    assert_eq!(count().await.len(), 25);
}

/// A ZIP archive of one file.
fn zip(name: &str, content: &[u8]) -> Vec<u8> {
    let mut deflated = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    deflated.write_all(content).unwrap();
    let deflated = deflated.finish().unwrap();
    let u32_of = |n: usize| u32::try_from(n).unwrap().to_le_bytes();
    let mut header = vec![20, 0, 0, 0, 8, 0, 0, 0, 0, 0];
    header.extend(crc32fast::hash(content).to_le_bytes());
    header.extend(u32_of(deflated.len()));
    header.extend(u32_of(content.len()));
    header.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
    header.extend([0, 0]);
    let mut archive = [b"PK\x03\x04", &header[..], name.as_bytes(), &deflated].concat();
    let directory = archive.len();
    archive.extend([b"PK\x01\x02\x14\0", &header[..], &[0; 14], name.as_bytes()].concat());
    let size = archive.len() - directory;
    archive
        .extend([b"PK\x05\x06\0\0\0\0\x01\0\x01\0", &u32_of(size)[..], &u32_of(directory), &[0, 0]].concat());
    archive
}

/// A PDF file of that many pages, each with a line; with none, of one page without any.
fn pages(count: usize) -> Vec<u8> {
    let line = if count == 0 { "" } else { "BT /F1 12 Tf 72 700 Td (A page of a long document.) Tj ET" };
    let count = count.max(1);
    let kids: String = (0..count).map(|n| format!("{} 0 R ", n + 5)).collect();
    let mut objects = vec![
        plain("/Type /Catalog /Pages 2 0 R"),
        plain(&format!("/Type /Pages /Kids [{kids}] /Count {count}")),
        plain("/Type /Font /Subtype /Type1 /BaseFont /Helvetica"),
        stream("", line.as_bytes()),
    ];
    let resources = "/Resources << /Font << /F1 3 0 R >> >>";
    let page = plain(&format!("/Type /Page /Parent 2 0 R {resources} /Contents 4 0 R"));
    objects.extend(vec![page; count]);
    pdf(&objects)
}

/// A PDF file of one page, with these resources, this drawing and these other objects, from the fifth on.
fn page(resources: &str, drawing: Vec<u8>, others: Vec<Vec<u8>>) -> Vec<u8> {
    let objects = vec![
        plain("/Type /Catalog /Pages 2 0 R"),
        plain("/Type /Pages /Kids [3 0 R] /Count 1"),
        plain(&format!("/Type /Page /Parent 2 0 R /Resources << {resources} >> /Contents 4 0 R")),
        drawing,
    ];
    pdf(&[objects, others].concat())
}

/// A form that draws one ten times that draws one ten times, and so on: a page without end.
fn endless() -> Vec<u8> {
    let drawing = b"/F Do ".repeat(10);
    let form = |n: usize| {
        let head = "/Type /XObject /Subtype /Form /BBox [0 0 1 1]";
        match n {
            // Nothing is unpacked of the last, so what bounds that does not count.
            16 => stream(head, b""),
            n => stream(&format!("{head} /Resources << /XObject << /F {} 0 R >> >>", n + 1), &drawing),
        }
    };
    page("/XObject << /F 5 0 R >>", stream("", &drawing), (5..=16).map(form).collect())
}

/// A page whose drawing is 300 MB of zeros.
fn pdf_bomb() -> Vec<u8> {
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    for _ in 0..300 {
        packed.write_all(&vec![0; 1 << 20]).unwrap();
    }
    let bomb = page("", stream("/Filter /FlateDecode", &packed.finish().unwrap()), Vec::new());
    assert!(bomb.len() < 4 << 20);
    bomb
}

/// A page in a Chinese font that names Adobe's character map, and brings no map to Unicode.
fn unmapped() -> Vec<u8> {
    let font = plain(
        "/Type /Font /Subtype /Type0 /BaseFont /STSong-Light /Encoding /UniGB-UCS2-H /DescendantFonts [6 0 R]",
    );
    let descendant = plain(
        "/Type /Font /Subtype /CIDFontType0 /BaseFont /STSong-Light \
         /CIDSystemInfo << /Registry (Adobe) /Ordering (GB1) /Supplement 2 >>",
    );
    let drawing = stream("", b"BT /F1 12 Tf 72 700 Td <5408540C4E66> Tj ET");
    page("/Font << /F1 5 0 R >>", drawing, vec![font, descendant])
}

fn plain(dictionary: &str) -> Vec<u8> {
    format!("<< {dictionary} >>").into_bytes()
}

fn stream(dictionary: &str, content: &[u8]) -> Vec<u8> {
    let head = format!("<< {dictionary} /Length {} >>\nstream\n", content.len());
    [head.as_bytes(), content, b"\nendstream"].concat()
}

/// A PDF file of these objects, numbered from 1, of which the first is its catalog.
fn pdf(objects: &[Vec<u8>]) -> Vec<u8> {
    let mut file = b"%PDF-1.4\n".to_vec();
    let mut places = Vec::new();
    for (n, object) in objects.iter().enumerate() {
        places.push(file.len());
        writeln!(file, "{} 0 obj", n + 1).unwrap();
        file.extend(object);
        file.extend(b"\nendobj\n");
    }
    let (table, size) = (file.len(), places.len() + 1);
    write!(file, "xref\n0 {size}\n0000000000 65535 f \n").unwrap();
    for place in &places {
        writeln!(file, "{place:010} 00000 n ").unwrap();
    }
    write!(file, "trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n").unwrap();
    file
}
