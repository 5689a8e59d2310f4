//! The body of an answer: whole, or as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A response's body.
#[derive(Debug)]
pub enum ChatBody {
    /// All of it at once.
    Whole(Option<Bytes>),
    /// Piece by piece.
    Events(UnboundedReceiver<Bytes>),
}

/// The writing end of a stream of events. Unbounded, so that a slow client never holds up the reading
/// of the model's answer; an answer is bounded by its `max_tokens`.
#[derive(Debug)]
pub struct Events(UnboundedSender<Bytes>);

impl ChatBody {
    /// A body of events, and its writing end.
    pub fn stream() -> (Events, Self) {
        let (sender, receiver) = unbounded_channel();
        (Events(sender), Self::Events(receiver))
    }
}

impl Events {
    /// Sends an event whose data is JSON already.
    pub fn send_json(&self, event: &str, json: &str) {
        drop(self.0.send(format!("event: {event}\ndata: {json}\n\n").into()));
    }

    /// Sends an event without a name.
    pub fn send_line(&self, data: &str) {
        drop(self.0.send(format!("data: {data}\n\n").into()));
    }

    /// Sends an event without a name, whose data is JSON.
    pub fn send_data(&self, data: &Value) {
        self.send_line(&data.to_string());
    }

    /// Sends an event. A client that has gone is not an error.
    ///
    /// <https://html.spec.whatwg.org/multipage/server-sent-events.html>
    pub fn send(&self, event: &str, data: &impl Serialize) {
        match serde_json::to_string(data) {
            // JSON has no line breaks of its own, so one `data` line holds it.
            Ok(json) => self.send_json(event, &json),
            Err(error) => tracing::error!("An event does not serialise: {error}"),
        }
    }
}

impl From<String> for ChatBody {
    fn from(text: String) -> Self {
        Self::Whole(Some(text.into()))
    }
}

impl Body for ChatBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = match self.get_mut() {
            Self::Whole(bytes) => bytes.take(),
            Self::Events(receiver) => ready!(receiver.poll_recv(cx)),
        };
        Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}
