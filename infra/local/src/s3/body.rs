//! Bodies on their way in and out: never in memory as a whole, digested while they pass.

use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _, stream};
use http::HeaderMap;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Crc32, Crc32c, Crc64Nvme, Md5, Sha1, Sha256};
use s3s::dto::StreamingBlob;
use s3s::{S3Error, S3ErrorCode, S3Result, TrailingHeaders, s3_error};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const CHUNK: usize = 64 * 1024;

/// The checksums S3 knows besides MD5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Algorithm {
    Crc32,
    Crc32c,
    Crc64nvme,
    Sha1,
    Sha256,
}

impl Algorithm {
    const ALL: [Self; 5] = [Self::Crc32, Self::Crc32c, Self::Crc64nvme, Self::Sha1, Self::Sha256];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Crc32 => "CRC32",
            Self::Crc32c => "CRC32C",
            Self::Crc64nvme => "CRC64NVME",
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == name)
    }

    fn header(self) -> &'static str {
        match self {
            Self::Crc32 => "x-amz-checksum-crc32",
            Self::Crc32c => "x-amz-checksum-crc32c",
            Self::Crc64nvme => "x-amz-checksum-crc64nvme",
            Self::Sha1 => "x-amz-checksum-sha1",
            Self::Sha256 => "x-amz-checksum-sha256",
        }
    }
}

/// A checksum as it is stored and returned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Checksum {
    pub(super) algorithm: Algorithm,
    /// Base64, with `-<parts>` behind it if it is a checksum of the parts' checksums.
    pub(super) value: String,
    pub(super) composite: bool,
}

/// What the sender says about the body.
#[derive(Debug, Default)]
pub(super) struct Expected {
    md5: Option<Vec<u8>>,
    algorithm: Option<Algorithm>,
    /// Absent while it is to come in a trailer.
    value: Option<String>,
    /// What to compute if the sender gives no checksum; CRC-64/NVME if this is absent too.
    fallback: Option<Algorithm>,
}

impl Expected {
    /// From the request's headers; a checksum that is announced as a trailer is still to come.
    pub(super) fn from_headers(headers: &HeaderMap) -> S3Result<Self> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
        let md5 =
            match text("content-md5") {
                Some(encoded) => {
                    Some(STANDARD.decode(encoded).ok().filter(|digest| digest.len() == 16).ok_or_else(
                        || s3_error!(InvalidDigest, "The Content-MD5 you specified was invalid."),
                    )?)
                }
                None => None,
            };
        let mut expected = Self { md5, ..Self::default() };
        let trailer = text("x-amz-trailer").unwrap_or_default().to_ascii_lowercase();
        for algorithm in Algorithm::ALL {
            let value = text(algorithm.header()).map(str::to_owned);
            let trails = trailer.split(',').any(|name| name.trim() == algorithm.header());
            if value.is_none() && !trails {
                continue;
            }
            if expected.algorithm.is_some() || (value.is_some() && trails) {
                return Err(s3_error!(
                    InvalidRequest,
                    "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed."
                ));
            }
            expected.algorithm = Some(algorithm);
            expected.value = value;
        }
        if let Some(name) = text("x-amz-sdk-checksum-algorithm")
            && expected.algorithm.is_none_or(|algorithm| !algorithm.as_str().eq_ignore_ascii_case(name))
        {
            return Err(s3_error!(
                InvalidRequest,
                "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* or x-amz-trailer headers were found."
            ));
        }
        Ok(expected)
    }

    /// Does the sender vouch for the body at all? Object Lock asks for it.
    pub(super) fn vouched(&self) -> bool {
        self.md5.is_some() || self.algorithm.is_some()
    }

    /// The checksum to compute where the sender gave none; another than the sender's is refused.
    pub(super) fn compute(&mut self, wanted: Option<Algorithm>) -> S3Result<()> {
        match (self.algorithm, wanted) {
            (Some(given), Some(wanted)) if given != wanted => Err(s3_error!(
                InvalidRequest,
                "Checksum Type mismatch occurred, expected checksum Type: {}, actual checksum Type: {}",
                wanted.as_str(),
                given.as_str()
            )),
            (Some(_), _) => Ok(()),
            (None, wanted) => {
                self.fallback = wanted;
                Ok(())
            }
        }
    }

    fn check(&self, md5: &[u8], checksum: &Checksum, trailers: Option<&TrailingHeaders>) -> S3Result<()> {
        if self.md5.as_deref().is_some_and(|expected| expected != md5) {
            return Err(s3_error!(
                BadDigest,
                "The Content-MD5 you specified did not match what we received."
            ));
        }
        let Some(algorithm) = self.algorithm else {
            return Ok(());
        };
        let trailing = || {
            trailers?.read(|headers| {
                let value = headers.get(algorithm.header())?;
                value.to_str().ok().map(|value| value.trim().to_owned())
            })?
        };
        let Some(expected) = self.value.clone().or_else(trailing) else {
            return Err(s3_error!(InvalidRequest, "The announced checksum trailer is missing."));
        };
        if expected != checksum.value {
            return Err(s3_error!(
                BadDigest,
                "The {} you specified did not match the calculated checksum.",
                algorithm.as_str()
            ));
        }
        Ok(())
    }
}

/// A body on disk that does not belong to an object yet. Dropped, it removes its file.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) md5: [u8; 16],
    pub(super) checksum: Checksum,
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Gone if the object took it over, and left over at worst: the store empties the directory
        // when it opens.
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Digests {
    size: u64,
    md5: Md5,
    algorithm: Algorithm,
    hasher: ChecksumHasher,
}

impl Digests {
    fn new(algorithm: Algorithm) -> Self {
        let mut hasher = ChecksumHasher::default();
        match algorithm {
            Algorithm::Crc32 => hasher.crc32 = Some(Crc32::new()),
            Algorithm::Crc32c => hasher.crc32c = Some(Crc32c::new()),
            Algorithm::Crc64nvme => hasher.crc64nvme = Some(Crc64Nvme::new()),
            Algorithm::Sha1 => hasher.sha1 = Some(Sha1::new()),
            Algorithm::Sha256 => hasher.sha256 = Some(Sha256::new()),
        }
        Self { size: 0, md5: Md5::new(), algorithm, hasher }
    }

    fn update(&mut self, data: &[u8]) {
        self.size += data.len() as u64;
        self.md5.update(data);
        self.hasher.update(data);
    }

    fn finish(self) -> (u64, [u8; 16], Checksum) {
        let sums = self.hasher.finalize();
        let value = sums
            .checksum_crc32
            .or(sums.checksum_crc32c)
            .or(sums.checksum_crc64nvme)
            .or(sums.checksum_sha1)
            .or(sums.checksum_sha256)
            .unwrap_or_default();
        (self.size, self.md5.finalize(), Checksum { algorithm: self.algorithm, value, composite: false })
    }
}

/// The checksum of checksums that a multipart object has, if its type is composite.
pub(super) fn composite(algorithm: Algorithm, parts: &[Checksum]) -> Option<Checksum> {
    let mut digests = Digests::new(algorithm);
    for part in parts {
        if part.algorithm != algorithm {
            return None;
        }
        digests.update(&STANDARD.decode(&part.value).ok()?);
    }
    let (_, _, checksum) = digests.finish();
    Some(Checksum { value: format!("{}-{}", checksum.value, parts.len()), composite: true, ..checksum })
}

/// The entity tag of a multipart object.
pub(super) fn multipart_etag<'a>(parts: impl ExactSizeIterator<Item = &'a str>) -> Option<String> {
    let count = parts.len();
    let mut md5 = Md5::new();
    for part in parts {
        md5.update(&hex::decode(part).ok()?);
    }
    Some(format!("{}-{count}", hex::encode(md5.finalize())))
}

/// Writes a request's body to `path` and checks it against what the sender says. Without a
/// checksum from the sender the object gets S3's own, CRC-64/NVME.
pub(super) async fn receive(
    path: PathBuf,
    body: Option<StreamingBlob>,
    announced_size: Option<i64>,
    expected: &Expected,
    trailers: Option<&TrailingHeaders>,
) -> S3Result<Staged> {
    let mut file = tokio::fs::File::create_new(&path).await.map_err(S3Error::internal_error)?;
    let mut digests = Digests::new(expected.algorithm.or(expected.fallback).unwrap_or(Algorithm::Crc64nvme));
    // From here on the file has an owner, whatever happens.
    let mut staged = Staged {
        path,
        size: 0,
        md5: [0; 16],
        checksum: Checksum { algorithm: Algorithm::Crc64nvme, value: String::new(), composite: false },
    };
    if let Some(mut body) = body {
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| broken_body(&*error))?;
            digests.update(&chunk);
            file.write_all(&chunk).await.map_err(S3Error::internal_error)?;
        }
    }
    file.flush().await.map_err(S3Error::internal_error)?;
    (staged.size, staged.md5, staged.checksum) = digests.finish();
    if announced_size.is_some_and(|size| u64::try_from(size) != Ok(staged.size)) {
        return Err(s3_error!(
            IncompleteBody,
            "You did not provide the number of bytes specified by the Content-Length HTTP header."
        ));
    }
    expected.check(&staged.md5, &staged.checksum, trailers)?;
    Ok(staged)
}

/// The protocol layer verifies signed bodies while they are read, and reports by error; its error
/// types are private, their text is not.
fn broken_body(error: &(dyn std::error::Error + 'static)) -> S3Error {
    let text = error.to_string();
    if text.contains("Sha256Mismatch") {
        let mut error = S3Error::with_message(
            S3ErrorCode::Custom("XAmzContentSHA256Mismatch".into()),
            "The provided 'x-amz-content-sha256' header does not match what was computed.",
        );
        error.set_status_code(http::StatusCode::BAD_REQUEST);
        error
    } else if text.contains("SignatureMismatch") {
        s3_error!(SignatureDoesNotMatch, "The signature of a chunk does not match.")
    } else {
        s3_error!(IncompleteBody, "The body ended early or is malformed: {text}")
    }
}

/// Copies files behind one another into `path`: for copies and completed uploads.
pub(super) fn concatenate(path: PathBuf, sources: &[PathBuf], algorithm: Algorithm) -> io::Result<Staged> {
    let mut target = std::fs::File::create_new(&path)?;
    let mut staged = Staged {
        path,
        size: 0,
        md5: [0; 16],
        checksum: Checksum { algorithm, value: String::new(), composite: false },
    };
    let mut digests = Digests::new(algorithm);
    let mut buffer = vec![0; CHUNK];
    for source in sources {
        let mut source = std::fs::File::open(source)?;
        loop {
            let read = source.read(&mut buffer)?;
            let Some(data) = buffer.get(..read).filter(|data| !data.is_empty()) else {
                break;
            };
            digests.update(data);
            target.write_all(data)?;
        }
    }
    (staged.size, staged.md5, staged.checksum) = digests.finish();
    Ok(staged)
}

/// `length` bytes of a file from `start`.
pub(super) async fn send(path: &Path, start: u64, length: u64) -> io::Result<StreamingBlob> {
    use tokio::io::AsyncSeekExt as _;

    let mut file = tokio::fs::File::open(path).await?;
    if start > 0 {
        file.seek(io::SeekFrom::Start(start)).await?;
    }
    Ok(StreamingBlob::wrap(chunks(file, length)))
}

fn chunks(
    file: tokio::fs::File,
    length: u64,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Sync + 'static {
    stream::try_unfold((file, length), |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let mut buffer = BytesMut::with_capacity(CHUNK.min(usize::try_from(left).unwrap_or(CHUNK)));
        let read = (&mut file).take(left).read_buf(&mut buffer).await? as u64;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some((buffer.freeze(), (file, left - read))))
    })
}
