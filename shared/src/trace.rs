//! Where a request is in the trace that AWS X-Ray makes of it.
//!
//! Lambda tells a function with each invocation; the function tells the services that it calls for that
//! request. AWS's own are told by the SDK.
//!
//! <https://docs.aws.amazon.com/xray/latest/devguide/xray-concepts.html#xray-concepts-tracingheader>

use std::str::FromStr;

/// The header that carries it, for HTTP and gRPC alike.
pub const HEADER: &str = "x-amzn-trace-id";

/// A place in a trace, in the words of X-Ray's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    root: String,
    header: String,
}

/// A text that is no place in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a trace header of X-Ray")]
pub struct InvalidTrace;

impl Trace {
    /// The trace's id.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// What the header says.
    pub fn header(&self) -> &str {
        &self.header
    }
}

impl FromStr for Trace {
    type Err = InvalidTrace;

    /// Parses `Root=…;Parent=…;Sampled=…`. What else Lambda says is for AWS alone, and is not handed on.
    fn from_str(text: &str) -> Result<Self, InvalidTrace> {
        let mut header = String::with_capacity(text.len());
        let mut root = None;
        for part in text.split(';') {
            let (name, value) = part.trim().split_once('=').ok_or(InvalidTrace)?;
            let known = match name {
                "Root" => is_root(value) && root.replace(value.to_owned()).is_none(),
                "Parent" => is_hex(value, 16),
                "Sampled" => matches!(value, "0" | "1" | "?"),
                _ => continue,
            };
            if !known {
                return Err(InvalidTrace);
            }
            if !header.is_empty() {
                header.push(';');
            }
            header.push_str(name);
            header.push('=');
            header.push_str(value);
        }
        Ok(Self { root: root.ok_or(InvalidTrace)?, header })
    }
}

fn is_root(text: &str) -> bool {
    let mut parts = text.split('-');
    let wanted = [parts.next(), parts.next(), parts.next(), parts.next()];
    matches!(wanted, [Some("1"), Some(time), Some(id), None] if is_hex(time, 8) && is_hex(id, 24))
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "1-5759e988-bd862e3fe1be46a994272793";

    #[test]
    fn what_lambda_says_is_handed_on_but_for_what_is_aws_own() {
        let trace: Trace =
            format!("Root={ROOT};Parent=53995c3f42cd8ad8;Sampled=1;Lineage=a87bd80c:1").parse().unwrap();
        assert_eq!(trace.root(), ROOT);
        assert_eq!(trace.header(), format!("Root={ROOT};Parent=53995c3f42cd8ad8;Sampled=1"));
        assert_eq!(format!("Root={ROOT}").parse::<Trace>().unwrap().header(), format!("Root={ROOT}"));
    }

    #[test]
    fn anything_else_is_none() {
        for text in [
            "",
            "Parent=53995c3f42cd8ad8",
            "Root=1-5759e988-bd862e3fe1be46a99427279",
            "Root=2-5759e988-bd862e3fe1be46a994272793",
            "Root=1-5759e988-bd862e3fe1be46a994272793-1",
            "Root=1-5759e988-bd862e3fe1be46a994272793;Root=1-5759e988-bd862e3fe1be46a994272794",
            "Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=yes",
            "Root=1-5759e988-bd862e3fe1be46a994272793;Parent=x\r\nx-api-key: y",
        ] {
            assert_eq!(text.parse::<Trace>(), Err(InvalidTrace), "{text}");
        }
    }
}
