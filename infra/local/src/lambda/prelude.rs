//! How a streamed HTTP response begins: metadata as JSON, eight NULs, then the body.

use std::collections::BTreeMap;

use bytes::{Buf, BytesMut};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::{InvokeError, StreamingResponse};

const DELIMITER: [u8; 8] = [0; 8];
/// The delimiter must end within this many bytes.
const MAX_PRELUDE: usize = 16 * 1024;
pub(super) const NO_DELIMITER: &str = "its metadata do not end with 8 NULs within 16 KB";

/// Status and headers of a streamed response.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Prelude {
    /// The status.
    #[serde(default = "ok")]
    pub status_code: u16,
    /// Headers, one value each.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Headers with several values.
    #[serde(default)]
    pub multi_value_headers: BTreeMap<String, Vec<String>>,
    /// Values of `set-cookie`.
    #[serde(default)]
    pub cookies: Vec<String>,
}

fn ok() -> u16 {
    200
}

/// Takes the prelude and its delimiter off the front of `buffer`, if they are complete.
pub(super) fn split(buffer: &mut BytesMut) -> Result<Option<Prelude>, InvokeError> {
    let found = buffer.windows(DELIMITER.len()).position(|window| window == DELIMITER);
    let Some(at) = found.filter(|at| at + DELIMITER.len() <= MAX_PRELUDE) else {
        let hopeless = found.is_some() || buffer.len() >= MAX_PRELUDE;
        return if hopeless { Err(InvokeError::Malformed(NO_DELIMITER)) } else { Ok(None) };
    };
    let metadata = buffer.split_to(at);
    buffer.advance(DELIMITER.len());
    let parsed = serde_json::from_slice(&metadata)
        .map_err(|_| InvokeError::Malformed("its metadata are not valid"))?;
    Ok(Some(parsed))
}

/// Reads the prelude, and hands on the rest as it comes.
pub(super) async fn read(
    mut body: mpsc::Receiver<Result<bytes::Bytes, InvokeError>>,
) -> Result<StreamingResponse, InvokeError> {
    let mut buffer = BytesMut::new();
    let prelude = loop {
        match body.recv().await {
            Some(chunk) => buffer.extend_from_slice(&chunk?),
            None => return Err(InvokeError::Malformed(NO_DELIMITER)),
        }
        if let Some(prelude) = split(&mut buffer)? {
            break prelude;
        }
    };
    if buffer.is_empty() {
        return Ok(StreamingResponse { prelude, body });
    }
    // What came along with the delimiter goes first.
    let (sender, rest) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut next = Some(Ok(buffer.freeze()));
        while let Some(chunk) = next {
            // A caller that has gone away does not stop the function: the rest is read all the same.
            let _ = sender.send(chunk).await;
            next = body.recv().await;
        }
    });
    Ok(StreamingResponse { prelude, body: rest })
}

#[cfg(test)]
mod tests {
    use super::*;

    const METADATA: &str = r#"{"statusCode":201,"headers":{"a":"b"},"cookies":["c=d"]}"#;

    fn whole() -> Vec<u8> {
        [METADATA.as_bytes(), &DELIMITER, b"body\0\0\0\0\0\0\0\0more"].concat()
    }

    #[tokio::test]
    async fn the_prelude_may_be_cut_anywhere() {
        let whole = whole();
        for cut in 0..=whole.len() {
            let (sender, receiver) = mpsc::channel(8);
            let (head, tail) = whole.split_at(cut);
            for part in [head, tail] {
                sender.send(Ok(bytes::Bytes::copy_from_slice(part))).await.unwrap();
            }
            drop(sender);
            let mut response = read(receiver).await.unwrap();
            assert_eq!(response.prelude.status_code, 201);
            assert_eq!(response.prelude.headers["a"], "b");
            assert_eq!(response.prelude.cookies, ["c=d"]);
            let mut body = Vec::new();
            while let Some(chunk) = response.body.recv().await {
                body.extend_from_slice(&chunk.unwrap());
            }
            assert_eq!(body, b"body\0\0\0\0\0\0\0\0more", "cut at {cut}");
        }
    }

    #[test]
    fn a_prelude_ends_in_time_and_holds_what_it_may() {
        let with = |bytes: &[u8]| split(&mut BytesMut::from(bytes));
        assert_eq!(with(b"{}"), Ok(None));
        assert!(with(&[b"{}".as_slice(), &DELIMITER].concat()).unwrap().is_some());
        let padded = |n: usize| [b"{".as_slice(), &vec![b' '; n - 2], b"}", &DELIMITER].concat();
        assert!(with(&padded(MAX_PRELUDE - 8)).unwrap().is_some());
        assert!(with(&padded(MAX_PRELUDE - 7)).is_err());
        assert!(with(&vec![b' '; MAX_PRELUDE]).is_err());
        // Several values under one name, as `headers` cannot hold them.
        assert!(with(&[br#"{"headers":{"a":["b","c"]}}"#.as_slice(), &DELIMITER].concat()).is_err());
        assert!(with(&[br#"{"body":"x"}"#.as_slice(), &DELIMITER].concat()).is_err());
    }
}
