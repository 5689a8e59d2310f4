//! Over real HTTP, signed as a client signs.

use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation,
    SigningSettings, UriPathNormalizationMode, sign,
};
use aws_sigv4::sign::v4;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::iam::{Caller, Policy};
use crate::sigv4;

const KEY: &str = "LOCALKEY";
const ROLE: &str = "LOCALROLE";
const SECRET: &str = "local-secret";
/// What the server believes the time is when a test begins.
const START: i64 = 1_790_000_000;

struct Server {
    base: String,
    seconds: Arc<AtomicI64>,
    events: Mutex<mpsc::UnboundedReceiver<ObjectEvent>>,
    callers: Arc<Callers>,
    kms: Arc<Kms>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<(), Error>>,
    key: &'static str,
    secret: String,
}

type Pairs = Vec<(String, String)>;

struct Reply {
    status: u16,
    headers: reqwest::header::HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// All texts of an XML element.
    fn all(&self, tag: &str) -> Vec<String> {
        let text = self.text();
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        text.split(&open).skip(1).map(|rest| rest.split(&close).next().unwrap().to_owned()).collect()
    }

    #[track_caller]
    fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    #[track_caller]
    fn refused(self, status: u16, code: &str) -> Self {
        let reply = self.expect(status);
        assert_eq!(reply.all("Code"), [code]);
        reply
    }
}

/// An operator, and a function that may read and list what is its own.
fn callers() -> Arc<Callers> {
    let key = |id: &str, arn: &str| sigv4::Credentials {
        access_key_id: id.into(),
        secret_access_key: SECRET.into(),
        region: "us-east-1".into(),
        user_arn: arn.into(),
    };
    let policy = serde_json::json!({"Version": "2012-10-17", "Statement": [
        {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject"], "Resource": "arn:aws:s3:::notes/mine/*"},
        {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::notes",
            "Condition": {"StringLike": {"s3:prefix": "mine/*"}}}]});
    let role = key(ROLE, "arn:aws:sts::0:assumed-role/notes");
    let policies = vec![Policy::parse(&policy).unwrap()];
    let role = Caller::in_role(role, "arn:aws:iam::0:role/function".into(), policies);
    Arc::new(Callers::new(vec![Caller::operator(key(KEY, "arn:aws:iam::0:user/operator")), role]))
}

impl Server {
    async fn start(directory: &Path) -> Self {
        Self::with(directory, vec![]).await
    }

    async fn with(directory: &Path, buckets: Vec<template::Bucket>) -> Self {
        let callers = callers();
        let kms = Kms::open(&directory.join("kms.json"), Arc::clone(&callers)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (events, received) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let seconds = Arc::new(AtomicI64::new(START));
        let options = Options {
            directory: directory.to_owned(),
            callers: Arc::clone(&callers),
            kms: Arc::clone(&kms),
            buckets,
            events: Some(events),
        };
        let clock = Arc::clone(&seconds);
        let now = move || OffsetDateTime::from_unix_timestamp(clock.load(Ordering::SeqCst)).unwrap();
        let task = tokio::spawn(serve(listener, options, now, async {
            let _ = stopped.await;
        }));
        let (events, secret) = (Mutex::new(received), SECRET.to_owned());
        Self { base, seconds, events, callers, kms, stop, task, key: KEY, secret }
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }

    fn sign(
        &self,
        method: &Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        at: SignatureLocation,
    ) -> (Pairs, Pairs) {
        let identity = Credentials::new(self.key, self.secret.clone(), None, None, "test").into();
        let mut settings = SigningSettings::default();
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        let mut signable = SignableBody::Bytes(body);
        if at == SignatureLocation::QueryParams {
            settings.expires_in = Some(Duration::from_secs(60));
            signable = SignableBody::UnsignedPayload;
        } else {
            settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        }
        if headers.iter().any(|(name, _)| *name == "x-amz-trailer") {
            signable = SignableBody::StreamingUnsignedPayloadTrailer;
        }
        settings.signature_location = at;
        #[expect(
            clippy::disallowed_methods,
            reason = "the server checks signatures against the machine's clock"
        )]
        let time = SystemTime::now();
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region("eu-central-1")
            .name("s3")
            .time(time)
            .settings(settings)
            .build()
            .unwrap()
            .into();
        let request = SignableRequest::new(method.as_str(), url, headers.iter().copied(), signable).unwrap();
        let (instructions, _) = sign(request, &params).unwrap().into_parts();
        let (signed, query) = instructions.into_parts();
        (
            signed.iter().map(|header| (header.name().to_owned(), header.value().to_owned())).collect(),
            query.iter().map(|(name, value)| ((*name).to_owned(), value.to_string())).collect(),
        )
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Vec<u8>>,
    ) -> Reply {
        let (method, body) = (method.parse::<Method>().unwrap(), body.into());
        let url = format!("{}{path}", self.base);
        let (signed, _) = self.sign(&method, &url, headers, &body, SignatureLocation::Headers);
        let mut request = reqwest::Client::new().request(method, url).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        for (name, value) in signed {
            request = request.header(name, value);
        }
        reply(request).await
    }

    /// A call of KMS as an operator.
    fn kms(&self, operation: &str, input: serde_json::Value) -> serde_json::Value {
        let operator = self.callers.by_key(KEY).unwrap();
        self.kms.ask(&operator, operation, input.to_string().as_bytes()).unwrap()
    }

    async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], "").await
    }

    async fn put(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Reply {
        self.send("PUT", path, headers, body).await
    }

    async fn delete(&self, path: &str) -> Reply {
        self.send("DELETE", path, &[], "").await
    }

    /// Puts an object with a checksum, which retention asks for, and returns its version.
    async fn version(&self, path: &str, body: &str, headers: &[(&str, &str)]) -> String {
        let sum = sha256(body);
        let mut all = vec![("x-amz-checksum-sha256", sum.as_str())];
        all.extend_from_slice(headers);
        let reply = self.put(path, &all, body).await.expect(200);
        reply.header("x-amz-version-id").unwrap().to_owned()
    }

    async fn locked_bucket(&self, name: &str) {
        self.put(&format!("/{name}"), &[("x-amz-bucket-object-lock-enabled", "true")], "").await.expect(200);
    }

    fn later(&self, seconds: i64) -> String {
        let time = OffsetDateTime::from_unix_timestamp(START + seconds).unwrap();
        time.format(&time::format_description::well_known::Rfc3339).unwrap()
    }
}

async fn reply(request: reqwest::RequestBuilder) -> Reply {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Reply { status, headers, body: response.bytes().await.unwrap().to_vec() }
}

fn sha256(body: &str) -> String {
    STANDARD.encode(Sha256::digest(body))
}

fn retention(mode: &str, until: &str) -> String {
    format!("<Retention><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>")
}

#[tokio::test]
async fn objects_come_back_as_they_were_put() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.put("/plain", &[], "").await.expect(200);
    let sum = sha256("hello world");
    let headers =
        [("content-type", "text/plain"), ("x-amz-meta-colour", "red"), ("x-amz-checksum-sha256", &sum)];
    let put = server.put("/plain/a%2Fb%20c/%C3%A4+..", &headers, "hello world").await.expect(200);
    assert_eq!(put.header("etag"), Some("\"5eb63bbbe01eeed093cb22bb8f5acdc3\""));
    assert_eq!(put.header("x-amz-checksum-sha256"), Some(sum.as_str()));
    assert_eq!(put.header("x-amz-version-id"), None);

    let get = server
        .send("GET", "/plain/a%2Fb%20c/%C3%A4+..", &[("x-amz-checksum-mode", "ENABLED")], "")
        .await
        .expect(200);
    assert_eq!(get.text(), "hello world");
    assert_eq!(get.header("content-type"), Some("text/plain"));
    assert_eq!(get.header("content-length"), Some("11"));
    assert_eq!(get.header("x-amz-meta-colour"), Some("red"));
    assert_eq!(get.header("x-amz-checksum-sha256"), Some(sum.as_str()));

    let range =
        server.send("GET", "/plain/a%2Fb%20c/%C3%A4+..", &[("range", "bytes=6-8")], "").await.expect(206);
    assert_eq!((range.text().as_str(), range.header("content-range")), ("wor", Some("bytes 6-8/11")));
    server
        .send("GET", "/plain/a%2Fb%20c/%C3%A4+..", &[("range", "bytes=11-")], "")
        .await
        .refused(416, "InvalidRange");
    let head = server.send("HEAD", "/plain/a%2Fb%20c/%C3%A4+..", &[], "").await.expect(200);
    assert_eq!(head.header("content-length"), Some("11"));
    let tag = put.header("etag").unwrap();
    server.send("GET", "/plain/a%2Fb%20c/%C3%A4+..", &[("if-none-match", tag)], "").await.expect(304);
    server
        .send("GET", "/plain/a%2Fb%20c/%C3%A4+..", &[("if-match", "\"other\"")], "")
        .await
        .refused(412, "PreconditionFailed");

    server.get("/plain/nothing").await.refused(404, "NoSuchKey");
    server.get("/missing/nothing").await.refused(404, "NoSuchBucket");
    server.delete("/plain").await.refused(409, "BucketNotEmpty");
    server.delete("/plain/a%2Fb%20c/%C3%A4+..").await.expect(204);
    server.get("/plain/a%2Fb%20c/%C3%A4+..").await.refused(404, "NoSuchKey");
    server.delete("/plain").await.expect(204);

    let mut events = server.events.lock().unwrap();
    let created = events.try_recv().unwrap();
    assert_eq!((created.name, created.key.as_str(), created.size), ("ObjectCreated:Put", "a/b c/ä+..", 11));
    assert_eq!(events.try_recv().unwrap().name, "ObjectRemoved:Delete");
}

#[tokio::test]
async fn wrong_digests_store_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.put("/plain", &[], "").await.expect(200);
    let other = sha256("other");
    for headers in [
        [("x-amz-checksum-sha256", other.as_str())],
        [("x-amz-checksum-crc32", "AAAAAA==")],
        [("content-md5", "1B2M2Y8AsgTpgAmY7PhCfg==")],
    ] {
        server.put("/plain/key", &headers, "body").await.refused(400, "BadDigest");
    }
    server.put("/plain/key", &[("content-md5", "nonsense")], "body").await.refused(400, "InvalidDigest");
    server.put("/plain/key", &[("x-amz-tagging", "a=b")], "body").await.refused(501, "NotImplemented");
    server.get("/plain/key").await.refused(404, "NoSuchKey");
    let crc = STANDARD.encode(0x363a_3020_u32.to_be_bytes());
    server.put("/plain/key", &[("x-amz-checksum-crc32", &crc)], "hello").await.refused(400, "BadDigest");
    let crc = STANDARD.encode(0x3610_a686_u32.to_be_bytes());
    server.put("/plain/key", &[("x-amz-checksum-crc32", &crc)], "hello").await.expect(200);

    // How the AWS SDKs send by default: in chunks, with the checksum behind the body.
    let headers = [
        ("content-encoding", "aws-chunked"),
        ("x-amz-decoded-content-length", "5"),
        ("x-amz-sdk-checksum-algorithm", "CRC32"),
        ("x-amz-trailer", "x-amz-checksum-crc32"),
    ];
    let chunked = |sum: &str| format!("5\r\nhello\r\n0\r\nx-amz-checksum-crc32:{sum}\r\n\r\n");
    server.put("/plain/trailed", &headers, chunked("AAAAAA==")).await.refused(400, "BadDigest");
    let put = server.put("/plain/trailed", &headers, chunked(&crc)).await.expect(200);
    assert_eq!(put.header("x-amz-checksum-crc32"), Some(crc.as_str()));
    let get = server.get("/plain/trailed").await.expect(200);
    assert_eq!((get.text().as_str(), get.header("content-encoding")), ("hello", None));

    assert_eq!(std::fs::read_dir(directory.path().join("staging")).unwrap().count(), 0);
    server.get("/plain?acl").await.refused(501, "NotImplemented");
}

#[tokio::test]
async fn policies_decide() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start(directory.path()).await;
    server.put("/notes", &[], "").await.expect(200);
    server.put("/notes/mine/a", &[], "a").await.expect(200);
    server.put("/notes/other/b", &[], "b").await.expect(200);
    server.key = ROLE;
    assert_eq!(server.get("/notes/mine/a").await.expect(200).text(), "a");
    server.put("/notes/mine/c", &[], "c").await.expect(200);
    server.get("/notes?list-type=2&prefix=mine%2F").await.expect(200);
    let lock = [
        ("x-amz-object-lock-mode", "GOVERNANCE"),
        ("x-amz-object-lock-retain-until-date", "2030-01-01T00:00:00Z"),
    ];
    server.put("/notes/mine/d", &lock, "d").await.refused(403, "AccessDenied");
    for (method, path) in [
        ("GET", "/notes/other/b"),
        ("GET", "/notes/mine/a?versionId=null"),
        ("GET", "/notes?list-type=2"),
        ("GET", "/notes?list-type=2&prefix=other%2F"),
        ("GET", "/notes?versions&prefix=mine%2F"),
        ("GET", "/"),
        ("PUT", "/notes/other/b"),
        ("DELETE", "/notes/mine/a"),
        ("GET", "/notes/mine/a?retention"),
    ] {
        server.send(method, path, &[], "").await.refused(403, "AccessDenied");
    }
    server.key = KEY;
    assert_eq!(server.get("/notes/other/b").await.expect(200).text(), "b");
    assert_eq!(server.get("/notes/mine/a").await.expect(200).text(), "a");
    server.get("/notes/mine/d").await.expect(404);
}

#[tokio::test]
async fn only_known_keys_may_enter() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start(directory.path()).await;
    server.put("/plain", &[], "").await.expect(200);
    server.put("/plain/key", &[], "body").await.expect(200);

    // Presigned: the URL alone is enough, once it is signed by a known key.
    for (method, body) in [(Method::PUT, "uploaded"), (Method::GET, "")] {
        let mut url = reqwest::Url::parse(&format!("{}/plain/signed%20url", server.base)).unwrap();
        let (_, query) =
            server.sign(&method, url.as_str(), &[], body.as_bytes(), SignatureLocation::QueryParams);
        for (name, value) in &query {
            url.query_pairs_mut().append_pair(name, value);
        }
        let answer =
            reply(reqwest::Client::new().request(method.clone(), url.clone()).body(body)).await.expect(200);
        assert_eq!(answer.text(), if method == Method::GET { "uploaded" } else { "" });
        // Whoever has it adds nothing of S3's to it.
        let more = reqwest::Client::new().request(method.clone(), url.clone()).header("x-amz-meta-a", "b");
        reply(more.body(body)).await.refused(403, "AccessDenied");
        let broken = url.as_str().replace("signed", "signet");
        reply(reqwest::Client::new().request(method, broken)).await.refused(403, "SignatureDoesNotMatch");
    }
    reply(reqwest::Client::new().get(format!("{}/plain/key", server.base)))
        .await
        .refused(403, "AccessDenied");
    server.secret = "wrong".to_owned();
    server.get("/plain/key").await.refused(403, "SignatureDoesNotMatch");
}

#[tokio::test]
async fn versions_stay_until_they_are_deleted_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.put("/kept", &[], "").await.expect(200);
    let enable = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
    server.put("/kept/key", &[], "zero").await.expect(200);
    server.put("/kept?versioning", &[], enable).await.expect(200);
    assert_eq!(server.get("/kept?versioning").await.all("Status"), ["Enabled"]);
    let one = server.version("/kept/key", "one", &[]).await;
    let two = server.version("/kept/key", "two", &[]).await;
    assert_eq!(server.get("/kept/key").await.text(), "two");
    assert_eq!(server.get(&format!("/kept/key?versionId={one}")).await.text(), "one");
    assert_eq!(server.get("/kept/key?versionId=null").await.text(), "zero");

    let deleted = server.delete("/kept/key").await.expect(204);
    assert_eq!(deleted.header("x-amz-delete-marker"), Some("true"));
    let marker = deleted.header("x-amz-version-id").unwrap().to_owned();
    let gone = server.get("/kept/key").await.refused(404, "NoSuchKey");
    assert_eq!(gone.header("x-amz-delete-marker"), Some("true"));
    server.get(&format!("/kept/key?versionId={marker}")).await.refused(405, "MethodNotAllowed");
    assert!(server.get("/kept?list-type=2").await.all("Key").is_empty());

    let list = server.get("/kept?versions").await.expect(200);
    let mut ids = list.all("VersionId");
    ids.sort();
    let mut all = vec![one.clone(), two.clone(), marker.clone(), "null".to_owned()];
    all.sort();
    assert_eq!(ids, all);

    server.delete(&format!("/kept/key?versionId={marker}")).await.expect(204);
    assert_eq!(server.get("/kept/key").await.text(), "two");
    server.delete(&format!("/kept/key?versionId={two}")).await.expect(204);
    assert_eq!(server.get("/kept/key").await.text(), "one");
    server.get(&format!("/kept/key?versionId={two}")).await.refused(404, "NoSuchVersion");

    let body = format!(
        "<Delete><Object><Key>key</Key><VersionId>{one}</VersionId></Object><Object><Key>new</Key></Object></Delete>"
    );
    let md5 = STANDARD.encode(<s3s::crypto::Md5 as s3s::crypto::Checksum>::checksum(body.as_bytes()));
    let reply = server.send("POST", "/kept?delete", &[("content-md5", &md5)], body).await.expect(200);
    assert_eq!(reply.all("Key"), ["key", "new"]);
    assert_eq!(reply.all("DeleteMarker"), ["true"], "{}", reply.text());
    assert_eq!(server.get("/kept/key").await.text(), "zero");
}

#[tokio::test]
async fn listings_page_through_everything_once() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.locked_bucket("pages").await;
    let keys = ["a", "b/1", "b/2", "b/3/x", "c d", "e/", "f"];
    for key in keys {
        let path = format!("/pages/{}", key.replace(' ', "%20"));
        for _ in 0..2 {
            server.put(&path, &[], key).await.expect(200);
        }
    }
    for size in 1..4 {
        let (mut found, mut token) = (Vec::new(), String::new());
        let (mut rolled, mut prefixes) = (Vec::new(), Vec::new());
        loop {
            let page = server.get(&format!("/pages?list-type=2&max-keys={size}{token}")).await.expect(200);
            assert!(page.all("Key").len() <= size);
            found.extend(page.all("Key"));
            match page.all("NextContinuationToken").first() {
                Some(next) => token = format!("&continuation-token={next}"),
                None => break,
            }
        }
        assert_eq!(found, keys);
        token.clear();
        loop {
            let page = server
                .get(&format!("/pages?delimiter=%2F&list-type=2&max-keys={size}{token}"))
                .await
                .expect(200);
            rolled.extend(page.all("Key"));
            prefixes.extend(page.all("CommonPrefixes"));
            match page.all("NextContinuationToken").first() {
                Some(next) => token = format!("&continuation-token={next}"),
                None => break,
            }
        }
        assert_eq!(rolled, ["a", "c d", "f"]);
        assert_eq!(prefixes, ["<Prefix>b/</Prefix>", "<Prefix>e/</Prefix>"]);

        let (mut versions, mut marker) = (Vec::new(), String::new());
        loop {
            let page = server
                .get(&format!("/pages?encoding-type=url&{marker}max-keys={size}&versions"))
                .await
                .expect(200);
            versions.extend(page.all("VersionId"));
            let next = page.all("NextKeyMarker");
            let Some(key) = next.first() else { break };
            marker = format!("key-marker={key}&");
            if let Some(version) = page.all("NextVersionIdMarker").first() {
                // Query parameters are signed in their order.
                marker = format!("key-marker={key}&version-id-marker={version}&");
            }
        }
        assert_eq!(versions.len(), keys.len() * 2);
        versions.sort();
        versions.dedup();
        assert_eq!(versions.len(), keys.len() * 2);
    }
    let inner = server.get("/pages?delimiter=%2F&list-type=2&prefix=b%2F").await.expect(200);
    assert_eq!(inner.all("Key"), ["b/1", "b/2"]);
    assert!(inner.text().contains("<CommonPrefixes><Prefix>b/3/</Prefix></CommonPrefixes>"));
}

#[tokio::test]
async fn object_lock_holds() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.locked_bucket("audit").await;
    let (soon, late) = (server.later(100), server.later(200));
    let bypass = [("x-amz-bypass-governance-retention", "true")];
    let lock = |mode: &'static str| {
        [("x-amz-object-lock-mode", mode), ("x-amz-object-lock-retain-until-date", soon.as_str())]
    };

    // Retention asks for a digest, both parameters, a bucket with Object Lock, and the future.
    server.put("/audit/c", &lock("COMPLIANCE"), "c").await.refused(400, "InvalidRequest");
    server.put("/audit/c", &lock("COMPLIANCE")[..1], "c").await.refused(400, "InvalidArgument");
    let sum = sha256("c");
    let past = server.later(-1);
    let late_put = [
        ("x-amz-checksum-sha256", sum.as_str()),
        ("x-amz-object-lock-mode", "COMPLIANCE"),
        ("x-amz-object-lock-retain-until-date", &past),
    ];
    server.put("/audit/c", &late_put, "c").await.refused(400, "InvalidArgument");
    server.put("/plain", &[], "").await.expect(200);
    server.put("/plain/c", &lock("COMPLIANCE"), "c").await.refused(400, "InvalidRequest");
    server
        .put(
            "/audit?versioning",
            &[],
            "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>",
        )
        .await
        .refused(409, "InvalidBucketState");

    // Compliance: nobody, and only longer.
    let id = server.version("/audit/c", "c", &lock("COMPLIANCE")).await;
    let version = format!("/audit/c?versionId={id}");
    let path = format!("/audit/c?retention&versionId={id}");
    assert_eq!(server.get(&path).await.expect(200).all("Mode"), ["COMPLIANCE"]);
    let head = server.send("HEAD", &version, &[], "").await.expect(200);
    assert_eq!(head.header("x-amz-object-lock-mode"), Some("COMPLIANCE"));
    for headers in [&[][..], &bypass[..]] {
        server.send("DELETE", &version, headers, "").await.refused(403, "AccessDenied");
        server
            .put(&path, headers, retention("COMPLIANCE", &server.later(50)))
            .await
            .refused(403, "AccessDenied");
        server.put(&path, headers, retention("GOVERNANCE", &late)).await.refused(403, "AccessDenied");
    }
    server.put(&path, &[], retention("COMPLIANCE", &late)).await.expect(200);
    server.put(&path, &[], retention("COMPLIANCE", &soon)).await.refused(403, "AccessDenied");

    // A deletion without a version and a new version both leave it where it is.
    server.delete("/audit/c").await.expect(204);
    server.version("/audit/c", "other", &[]).await;
    assert_eq!(server.get(&version).await.expect(200).text(), "c");
    let several = format!("<Delete><Object><Key>c</Key><VersionId>{id}</VersionId></Object></Delete>");
    let reply = server.send("POST", "/audit?delete", &bypass, several).await.expect(200);
    assert_eq!(reply.all("Code"), ["AccessDenied"]);
    server.delete("/audit").await.refused(409, "BucketNotEmpty");

    // Governance yields to the header, and to nothing less.
    let id = server.version("/audit/g", "g", &lock("GOVERNANCE")).await;
    let governed = format!("/audit/g?versionId={id}");
    let path = format!("/audit/g?retention&versionId={id}");
    server.delete(&governed).await.refused(403, "AccessDenied");
    server.put(&path, &[], retention("GOVERNANCE", &server.later(50))).await.refused(403, "AccessDenied");
    server.put(&path, &bypass, retention("GOVERNANCE", &server.later(50))).await.expect(200);

    // A legal hold is lifted before anything else helps.
    let hold = format!("/audit/g?legal-hold&versionId={id}");
    server.get(&hold).await.refused(404, "NoSuchObjectLockConfiguration");
    server.put(&hold, &[], "<LegalHold><Status>ON</Status></LegalHold>").await.expect(200);
    assert_eq!(server.get(&hold).await.expect(200).all("Status"), ["ON"]);
    server.send("DELETE", &governed, &bypass, "").await.refused(403, "AccessDenied");
    server.put(&hold, &[], "<LegalHold><Status>OFF</Status></LegalHold>").await.expect(200);
    server.send("DELETE", &governed, &bypass, "").await.expect(204);

    // Time frees.
    server.seconds.store(START + 199, Ordering::SeqCst);
    server.delete(&version).await.refused(403, "AccessDenied");
    server.seconds.store(START + 200, Ordering::SeqCst);
    server.delete(&version).await.expect(204);
    server.get(&version).await.refused(404, "NoSuchVersion");
}

#[tokio::test]
async fn default_retention_applies_to_new_objects() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.put("/late", &[], "").await.expect(200);
    server.get("/late?object-lock").await.refused(404, "ObjectLockConfigurationNotFoundError");
    let rule = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention><Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>";
    server.put("/late?object-lock", &[], rule).await.refused(409, "InvalidBucketState");
    server
        .put(
            "/late?versioning",
            &[],
            "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>",
        )
        .await
        .expect(200);
    let before = server.version("/late/key", "before", &[]).await;
    server
        .put("/late?object-lock", &[], rule.replace("<Days>1</Days>", "<Days>1</Days><Years>1</Years>"))
        .await
        .refused(400, "MalformedXML");
    server.put("/late?object-lock", &[], rule).await.expect(200);
    assert_eq!(server.get("/late?object-lock").await.expect(200).all("Days"), ["1"]);
    server.put("/late/key", &[], "unvouched").await.refused(400, "InvalidRequest");
    let after = server.version("/late/key", "after", &[]).await;
    server.delete(&format!("/late/key?versionId={before}")).await.expect(204);
    server.delete(&format!("/late/key?versionId={after}")).await.refused(403, "AccessDenied");
    server.seconds.store(START + 86_400, Ordering::SeqCst);
    server.delete(&format!("/late/key?versionId={after}")).await.expect(204);
}

#[tokio::test]
async fn one_of_sixteen_first_writers_wins() {
    let directory = tempfile::tempdir().unwrap();
    let server = Arc::new(Server::start(directory.path()).await);
    server.locked_bucket("race").await;
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                let headers = [("if-none-match", "*")];
                (writer, server.put("/race/key", &headers, format!("writer {writer}")).await.status)
            })
        })
        .collect();
    let mut winners = Vec::new();
    for writer in writers {
        match writer.await.unwrap() {
            (writer, 200) => winners.push(writer),
            (_, status) => assert_eq!(status, 412),
        }
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(server.get("/race/key").await.text(), format!("writer {}", winners[0]));
    assert_eq!(server.get("/race?versions").await.all("VersionId").len(), 1);
    // Behind a delete marker the key is free again.
    server.delete("/race/key").await.expect(204);
    server.put("/race/key", &[("if-none-match", "*")], "again").await.expect(200);
}

#[tokio::test]
async fn a_lock_is_shown_to_those_who_may_ask_for_it() {
    const LOCK: [&str; 2] = ["x-amz-object-lock-mode", "x-amz-object-lock-retain-until-date"];
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start(directory.path()).await;
    server.locked_bucket("notes").await;
    let until = server.later(1000);
    server.version("/notes/mine/a", "a", &[(LOCK[0], "COMPLIANCE"), (LOCK[1], &until)]).await;
    for (key, shown) in [(KEY, true), (ROLE, false)] {
        server.key = key;
        for method in ["GET", "HEAD"] {
            let reply = server.send(method, "/notes/mine/a", &[], "").await.expect(200);
            assert!(LOCK.iter().all(|header| reply.header(header).is_some() == shown), "{method} by {key}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_restart_keeps_everything() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.locked_bucket("audit").await;
    let until = server.later(1000);
    let lock = [
        ("x-amz-object-lock-mode", "COMPLIANCE"),
        ("x-amz-object-lock-retain-until-date", until.as_str()),
        ("x-amz-meta-n", "1"),
    ];
    let id = server.version("/audit/tenant=a/1.ndjson", "first", &lock).await;
    server.delete("/audit/tenant=a/1.ndjson").await.expect(204);
    let before = server.get("/audit?versions").await.text();
    server.stop().await;

    // What a crash leaves: a body on its way, and one that never got its entry.
    std::fs::write(directory.path().join("staging/half"), "half").unwrap();
    let key = std::fs::read_dir(directory.path().join("buckets/audit/keys"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    std::fs::write(key.join("orphan.body"), "orphan").unwrap();

    let server = Server::start(directory.path()).await;
    assert_eq!(server.get("/audit?versions").await.text(), before);
    let version = format!("/audit/tenant=a/1.ndjson?versionId={id}");
    let get = server.get(&version).await.expect(200);
    assert_eq!((get.text().as_str(), get.header("x-amz-meta-n")), ("first", Some("1")));
    server.delete(&version).await.refused(403, "AccessDenied");
    assert!(!key.join("orphan.body").exists());
    assert!(!directory.path().join("staging/half").exists());
    assert_eq!(server.get("/").await.all("Name"), ["audit"]);
}

#[tokio::test]
async fn parts_become_one_object() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path()).await;
    server.put("/large", &[], "").await.expect(200);
    let begun =
        server.send("POST", "/large/key?uploads", &[("content-type", "text/x")], "").await.expect(200);
    let id = begun.all("UploadId").remove(0);
    let first = vec![b'a'; 5 * 1024 * 1024];
    let mut tags = Vec::new();
    for (number, body) in [(1, first.clone()), (2, b"tail".to_vec())] {
        let put =
            server.put(&format!("/large/key?partNumber={number}&uploadId={id}"), &[], body).await.expect(200);
        tags.push(put.header("etag").unwrap().to_owned());
    }
    assert_eq!(server.get("/large?uploads").await.expect(200).all("UploadId"), std::slice::from_ref(&id));
    let complete = |order: [usize; 2]| {
        let parts: String = order
            .iter()
            .map(|n| format!("<Part><PartNumber>{}</PartNumber><ETag>{}</ETag></Part>", n + 1, tags[*n]))
            .collect();
        format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>")
    };
    let path = format!("/large/key?uploadId={id}");
    server.send("POST", &path, &[], complete([1, 0])).await.refused(400, "InvalidPartOrder");
    let done = server.send("POST", &path, &[], complete([0, 1])).await.expect(200);
    assert!(done.all("ETag")[0].contains("-2"), "{}", done.text());
    let get = server.get("/large/key").await.expect(200);
    assert_eq!(get.body.len(), first.len() + 4);
    assert!(get.body.ends_with(b"aatail"));
    assert_eq!(get.header("content-type"), Some("text/x"));
    server.send("POST", &path, &[], complete([0, 1])).await.refused(404, "NoSuchUpload");

    let begun = server.send("POST", "/large/other?uploads", &[], "").await.expect(200);
    let id = begun.all("UploadId").remove(0);
    server.delete(&format!("/large/other?uploadId={id}")).await.expect(204);
    server
        .put(&format!("/large/other?partNumber=1&uploadId={id}"), &[], "x")
        .await
        .refused(404, "NoSuchUpload");
    server
        .put("/large/other?partNumber=1&uploadId=..%2F..%2Fkeys", &[], "x")
        .await
        .refused(404, "NoSuchUpload");

    let copy = [("x-amz-copy-source", "large/key"), ("x-amz-metadata-directive", "COPY")];
    server.put("/large/copy", &copy, "").await.expect(200);
    assert_eq!(server.get("/large/copy").await.expect(200).body.len(), first.len() + 4);
}

/// Whether a file below a directory holds a text.
fn rests(directory: &Path, text: &str) -> bool {
    std::fs::read_dir(directory).unwrap().flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            return rests(&path, text);
        }
        std::fs::read(path).unwrap().windows(text.len()).any(|window| window == text.as_bytes())
    })
}

#[tokio::test]
async fn what_a_key_of_kms_encrypts_is_read_while_the_key_is_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start(directory.path()).await;
    server.put("/notes", &[], "").await.expect(200);
    let made = server.kms("CreateKey", serde_json::json!({}));
    let key = made["KeyMetadata"]["Arn"].as_str().unwrap().to_owned();
    let context = STANDARD.encode(r#"{"colour":"red"}"#);
    let kms = ("x-amz-server-side-encryption", "aws:kms");
    let named = ("x-amz-server-side-encryption-aws-kms-key-id", key.as_str());
    let bound = ("x-amz-server-side-encryption-context", context.as_str());
    let text = "five words that are secret";
    let put = server.put("/notes/mine/a", &[kms, named, bound], text).await.expect(200);
    let said = |reply: &Reply| {
        assert_eq!(reply.header(kms.0), Some("aws:kms"));
        assert_eq!(reply.header(named.0), Some(key.as_str()));
    };
    said(&put);
    let plain = server.put("/notes/mine/plain", &[], "as it is").await.expect(200);
    assert_eq!(plain.header(kms.0), None);
    assert!(rests(directory.path(), "as it is") && !rests(directory.path(), "words that"));
    let get = server.get("/notes/mine/a").await.expect(200);
    assert_eq!((get.text().as_str(), get.header("content-length")), (text, Some("26")));
    said(&get);
    let range = server.send("GET", "/notes/mine/a", &[("range", "bytes=5-9")], "").await.expect(206);
    assert_eq!(range.text(), "words");
    for call in server.kms.steering().calls.iter().skip(1) {
        let own = ("aws:s3:arn".to_owned(), "arn:aws:s3:::notes/mine/a".to_owned());
        assert_eq!(call.context, [own, ("colour".to_owned(), "red".to_owned())].into());
    }
    let copy = [("x-amz-copy-source", "notes/mine/a")];
    server.put("/notes/mine/copy", &copy, "").await.refused(501, "NotImplemented");

    // In the name of whoever asks: one that S3 lets in, and KMS does not.
    server.key = ROLE;
    server.get("/notes/mine/plain").await.expect(200);
    let refused = server.get("/notes/mine/a").await;
    assert!(refused.text().contains("kms:Decrypt"), "{}", refused.text());
    refused.refused(403, "AccessDenied");
    server.put("/notes/mine/b", &[kms, named], text).await.refused(403, "AccessDenied");
    server.key = KEY;

    let unknown = format!("{key}0");
    for (headers, status, code) in [
        (vec![kms, (named.0, unknown.as_str())], 400, "KMS.NotFoundException"),
        (vec![kms, named, (bound.0, "red")], 400, "InvalidArgument"),
        (vec![named], 400, "InvalidArgument"),
        (vec![bound], 400, "InvalidArgument"),
        (vec![kms], 501, "NotImplemented"),
        (vec![(kms.0, "AES256")], 501, "NotImplemented"),
        (
            vec![kms, named, ("x-amz-server-side-encryption-bucket-key-enabled", "true")],
            501,
            "NotImplemented",
        ),
    ] {
        server.put("/notes/mine/b", &headers, text).await.refused(status, code);
    }
    for (operation, code) in
        [("DisableKey", "KMS.DisabledException"), ("ScheduleKeyDeletion", "KMS.KMSInvalidStateException")]
    {
        server.kms(operation, serde_json::json!({"KeyId": key}));
        server.get("/notes/mine/a").await.refused(400, code);
        server.put("/notes/mine/b", &[kms, named], text).await.refused(400, code);
        // What says nothing of the content takes no key.
        said(&server.send("HEAD", "/notes/mine/a", &[], "").await.expect(200));
    }
    server.get("/notes/mine/b").await.refused(404, "NoSuchKey");
    server.kms("CancelKeyDeletion", serde_json::json!({"KeyId": key}));
    server.kms("EnableKey", serde_json::json!({"KeyId": key}));
    server.kms.steer(crate::kms::Steering { outage: true, ..Default::default() });
    server.get("/notes/mine/a").await.refused(503, "ServiceUnavailable");
    server.kms.steer(crate::kms::Steering::default());
    assert_eq!(server.get("/notes/mine/a").await.expect(200).text(), text);
    server.stop().await;
}

#[tokio::test]
async fn browsers_are_told_which_pages_may_put() {
    let directory = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml");
    let origins = "https://app.acme.example,https://globex.example:8443".to_owned();
    let given = [("QdrantCells".to_owned(), "default=https://x.example".to_owned())];
    let buckets = |origins: Option<String>| {
        let origins = origins.map(|origins| ("UploadOrigins".to_owned(), origins));
        let parameters = given.clone().into_iter().chain(origins).collect();
        template::Template::load(&path, &parameters).unwrap().buckets
    };
    assert!(buckets(None).iter().all(|bucket| bucket.cors.is_empty()));
    let server = Server::with(directory.path(), buckets(Some(origins))).await;
    let ask = async |bucket: &str, origin: &str, method: &str, headers: &str| {
        let url = format!("{}/bulkhead-{bucket}-000000000000/tenant%3Dacme/uploads/x", server.base);
        let asked = reqwest::Client::new().request(Method::OPTIONS, url).header("origin", origin);
        let asked = asked.header("access-control-request-method", method);
        reply(asked.header("access-control-request-headers", headers)).await
    };
    let sent = "content-type,if-none-match,x-amz-server-side-encryption,\
                x-amz-server-side-encryption-aws-kms-key-id,x-amz-server-side-encryption-context";
    for origin in ["https://app.acme.example", "https://globex.example:8443"] {
        let told = ask("documents", origin, "PUT", sent).await.expect(200);
        assert_eq!(told.header("access-control-allow-origin"), Some(origin));
        assert_eq!(told.header("access-control-allow-methods"), Some("PUT"));
        assert_eq!(
            told.header("access-control-allow-headers").map(|names| names.replace(", ", ",")).as_deref(),
            Some(sent)
        );
    }
    let own = "https://app.acme.example";
    for (bucket, origin, method, headers) in [
        ("documents", "https://evil.example", "PUT", sent),
        ("documents", "https://app.acme.example.evil.example", "PUT", sent),
        ("documents", "http://app.acme.example", "PUT", sent),
        ("documents", own, "GET", ""),
        ("documents", own, "DELETE", ""),
        ("documents", own, "PUT", "x-amz-acl"),
        ("audit", own, "PUT", sent),
    ] {
        ask(bucket, origin, method, headers).await.refused(403, "AccessForbidden");
    }
    // What is answered to the page itself is shown to it, also a refusal.
    let url = format!("{}/bulkhead-documents-000000000000/x", server.base);
    for (origin, shown) in [(own, Some(own)), ("https://evil.example", None)] {
        let put = reply(reqwest::Client::new().put(&url).header("origin", origin)).await;
        assert_eq!((put.status, put.header("access-control-allow-origin")), (403, shown));
    }
    server.stop().await;
}
