//! What operators do through the API.

mod deprovisioning;
mod issuers;
mod keys;
mod tenants;
mod usage;

use std::io::{self, BufRead, Write};

use serde_json::{Map, Value};

use crate::api::{Api, CallError, Reply};
use crate::command::{Command, DeprovisioningCommand};
use crate::table;

/// The terminal or the script that asks.
#[derive(Debug)]
pub struct Console<I, O, E> {
    /// What is typed.
    pub input: I,
    /// What was asked for.
    pub out: O,
    /// What is said beside it.
    pub beside: E,
    /// Whether the API's objects are wanted rather than tables.
    pub json: bool,
}

/// Carries out a command that asks the API.
///
/// # Errors
/// [`CallError`]
pub async fn run(
    command: Command,
    input: impl BufRead,
    out: impl Write,
    beside: impl Write,
) -> Result<(), CallError> {
    let at = match &command {
        Command::Tenants(tenants) => &tenants.at,
        Command::Keys(keys) => &keys.at,
        Command::Issuers(issuers) => &issuers.at,
        Command::Usage(usage) => &usage.at,
        Command::Deprovisioning(deprovisioning) => &deprovisioning.at,
        Command::Audit(_) => return Err(CallError::Setup("the audit log is read where it is stored".into())),
        Command::Cost(_) => return Err(CallError::Setup("costs are worked out without the API".into())),
    };
    let api = Api::open(at.endpoint.as_deref()).await?;
    let mut console = Console { input, out, beside, json: at.json };
    match command {
        Command::Tenants(tenants) => tenants::run(&api, tenants.command, &mut console).await?,
        Command::Keys(keys) => keys::run(&api, keys.command, &mut console).await?,
        Command::Issuers(issuers) => issuers::run(&api, issuers.command, &mut console).await?,
        Command::Usage(wanted) => usage::run(&api, &wanted, &mut console).await?,
        Command::Deprovisioning(deprovisioning) => match deprovisioning.command {
            DeprovisioningCommand::Show { id } => deprovisioning::show(&api, &id, &mut console).await?,
            DeprovisioningCommand::Watch { id } => deprovisioning::watch(&api, &id, &mut console).await?,
        },
        Command::Audit(_) | Command::Cost(_) => {}
    }
    Ok(console.out.flush()?)
}

impl<I: BufRead, O: Write, E: Write> Console<I, O, E> {
    /// Shows an object of the API.
    fn object(&mut self, reply: &Reply) -> Result<(), CallError> {
        if self.json {
            return self.json(reply.text.trim());
        }
        Ok(table::write_object(&reply.object()?, &mut self.out)?)
    }

    /// Shows an object that has a key in it, which is seen this once.
    fn object_with_key(&mut self, reply: &Reply) -> Result<(), CallError> {
        self.object(reply)?;
        self.out.flush()?;
        self.say("The API key is shown this once and is kept nowhere: store it now.")
    }

    /// Writes JSON as it is.
    fn json(&mut self, text: &str) -> Result<(), CallError> {
        Ok(writeln!(self.out, "{text}")?)
    }

    /// Writes a list as one object, as the API would if it had no pages.
    fn list_json(&mut self, plural: &str, items: Vec<Value>) -> Result<(), CallError> {
        let object: Map<String, Value> = std::iter::once((plural.to_owned(), items.into())).collect();
        self.json(&Value::from(object).to_string())
    }

    /// Tells the person something that is no part of what was asked for.
    fn say(&mut self, text: &str) -> Result<(), CallError> {
        Ok(writeln!(self.beside, "{text}")?)
    }

    /// Reads a line that is typed; the empty one if nobody does.
    fn ask(&mut self, question: &str) -> io::Result<String> {
        write!(self.beside, "{question} ")?;
        self.beside.flush()?;
        let mut line = String::new();
        self.input.read_line(&mut line)?;
        Ok(line.trim_end_matches(['\n', '\r']).to_owned())
    }
}
