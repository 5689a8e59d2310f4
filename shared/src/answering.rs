//! A service for tests of what is done with its answers.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A service that takes as many connections as there are `answers`, and gives each its answer or breaks it: where it
/// is, and how many came.
pub(crate) async fn service(answers: Vec<Option<String>>) -> (String, JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let serve = async move {
        let mut came = 0;
        for answer in answers {
            let next = timeout(Duration::from_secs(3), listener.accept()).await;
            let Ok(Ok((mut connection, _))) = next else { break };
            came += 1;
            let mut request = [0; 4_096];
            let _ = connection.read(&mut request).await.unwrap();
            if let Some(answer) = answer {
                connection.write_all(answer.as_bytes()).await.unwrap();
            }
        }
        came
    };
    (address, tokio::spawn(serve))
}
