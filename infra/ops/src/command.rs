//! What can be asked of the program: its commands and options.

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use serde_json::{Map, Value};
use shared::api_key::KeyId;
use shared::audit_verify::RETENTION_DAYS;
use shared::clock::Timestamp;
use shared::ids::{DocumentId, UserId};
use shared::ledger::Action;
use shared::meter::BillingMonth;
use shared::tenant::TenantId;

use crate::api::ENDPOINT;
use crate::show::Format;

/// How the program ends, for whoever calls it from a script.
const EXITS: &str = "\
Exit codes:
  0  done
  1  the API refused it, and the error says why; an audit log has a finding
  2  the command is not understood, or could not be carried out: no keys, no address, an unreadable log
  3  the API failed or did not answer; asking again may help

Commands that ask the API take AWS keys and a region as every AWS tool does: from the environment, a
profile, a program that the profile names, or the machine's role. Errors are one line, with the API's code
and the request's id.";

/// Bulkhead's operators' program.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", after_help = EXITS)]
pub enum Command {
    /// Read the audit log
    #[command(subcommand)]
    Audit(Audit),
    /// Make, show, change, suspend and delete tenants
    Tenants(Tenants),
    /// Make, list and revoke keys of tenants
    Keys(Keys),
    /// Show and free what tenants have claimed of issuers' tokens
    Issuers(Issuers),
    /// Show what every tenant used in a month, and what it cost
    Usage(Usage),
    /// Show how far the deletion of a tenant is
    Deprovisioning(Deprovisioning),
    /// Estimate what a deployment costs by AWS's list prices, and which limit it meets next
    Cost(Cost),
}

/// `audit`
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Tell whether the log is complete and unaltered: a line for each finding, and one for each tenant.
    /// Exits with 0 if all is well, 1 if something was found, 2 if something could not be checked
    Verify(Verify),
    /// Show records
    Show(Box<Show>),
}

/// `audit verify`
#[derive(Debug, Args)]
pub struct Verify {
    /// A copy of the bucket or of one tenant's prefix, or s3://<bucket>[/tenant=<id>]
    pub place: String,
    /// What a log was in an earlier run, as that run printed it after `head`, which this one must go on
    /// from; or @<file> with that run's output. May be repeated
    #[arg(long)]
    pub since: Vec<String>,
    /// For how many days after its last record an object must be kept
    #[arg(long, default_value_t = RETENTION_DAYS)]
    pub retention_days: u32,
}

/// `audit show`
#[derive(Debug, Args)]
pub struct Show {
    /// A copy of the bucket or of one tenant's prefix, or s3://<bucket>[/tenant=<id>]
    pub place: String,
    /// Of this tenant alone
    #[arg(long)]
    pub tenant: Option<TenantId>,
    /// Written at this instant or later: RFC 3339, or a day, which begins at midnight UTC
    #[arg(long, value_parser = instant)]
    pub from: Option<Timestamp>,
    /// Written before this instant
    #[arg(long, value_parser = instant)]
    pub to: Option<Timestamp>,
    /// Of this user
    #[arg(long)]
    pub user: Option<UserId>,
    /// Of this action, such as llm_call
    #[arg(long, value_parser = action)]
    pub action: Option<Action>,
    /// Showed or stored this document
    #[arg(long)]
    pub document: Option<DocumentId>,
    /// Showed this passage
    #[arg(long)]
    pub chunk: Option<String>,
    /// How to show them
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// Where the API is, and for whom the answer is.
#[derive(Debug, Args)]
pub struct At {
    /// The API's address: the stack's output ApiUrl, or http://127.0.0.1:9000
    #[arg(long, env = ENDPOINT, global = true)]
    pub endpoint: Option<String>,
    /// Print the API's objects as JSON instead of tables; a list is one object with all its pages
    #[arg(long, global = true)]
    pub json: bool,
}

/// `tenants`
#[derive(Debug, Args)]
pub struct Tenants {
    #[command(flatten)]
    #[expect(missing_docs, reason = "see the type")]
    pub at: At,
    #[command(subcommand)]
    #[expect(missing_docs, reason = "see the type")]
    pub command: TenantsCommand,
}

/// What can be done with tenants.
#[derive(Debug, Subcommand)]
pub enum TenantsCommand {
    /// List all tenants
    List,
    /// Show a tenant and the limits that hold for it
    Show {
        /// The tenant
        tenant: TenantId,
    },
    /// Make a tenant, and show its first key
    Create(Box<Create>),
    /// Change a tenant; what is not named stays. Holds for the next request
    Set(Box<Set>),
    /// Admit no more requests of a tenant. What is under way is finished
    Suspend {
        /// The tenant
        tenant: TenantId,
    },
    /// Admit a suspended tenant's requests again
    Restore {
        /// The tenant
        tenant: TenantId,
    },
    /// Show the key that a tenant checks the signatures of its webhooks with. That it was shown is on record
    WebhookSecret {
        /// The tenant
        tenant: TenantId,
    },
    /// Delete a tenant and everything that is its own, for good
    Delete {
        /// The tenant
        tenant: TenantId,
        /// Do not ask for the id again
        #[arg(long)]
        yes: bool,
        /// Show the steps as they are done, until the receipt
        #[arg(long)]
        watch: bool,
    },
}

/// `tenants create`
#[derive(Debug, Args)]
pub struct Create {
    /// The new tenant's id
    pub tenant: TenantId,
    /// What it pays for
    #[arg(long, value_enum)]
    pub tier: TierName,
    /// The customer's name
    #[arg(long)]
    pub company_name: String,
    #[command(flatten)]
    #[expect(missing_docs, reason = "see the type")]
    pub profile: Profile,
    /// Where the tenant is told of its budgets
    #[arg(long)]
    pub webhook_url: Option<String>,
    /// Give an id again that was a deleted tenant's. Refused as long as anything is kept under it
    #[arg(long)]
    pub reuse_deleted_id: bool,
    /// A KMS key of its own, by its ARN, that seals what its users write: of the tier `enterprise` alone
    #[arg(long)]
    pub kms_key_arn: Option<String>,
}

/// `tenants set`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("changes").multiple(true).required(true)
    .args(["tier", "company_name", "assistant_name", "instructions", "injection_policy", "model_account",
           "cell", "limits", "webhook_url", "no_webhook", "kms_key_arn", "no_kms_key"]))]
pub struct Set {
    /// The tenant
    pub tenant: TenantId,
    /// What it pays for. Limits that were set for the tenant stay
    #[arg(long, value_enum)]
    pub tier: Option<TierName>,
    /// The customer's name
    #[arg(long)]
    pub company_name: Option<String>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "see the type")]
    pub profile: Profile,
    /// Where the tenant is told of its budgets
    #[arg(long, conflicts_with = "no_webhook")]
    pub webhook_url: Option<String>,
    /// Tell the tenant nothing of its budgets
    #[arg(long)]
    pub no_webhook: bool,
    /// A KMS key of its own, by its ARN, that seals what its users write from now on
    #[arg(long, conflicts_with = "no_kms_key")]
    pub kms_key_arn: Option<String>,
    /// Seal with no key of the tenant's what its users write from now on
    #[arg(long)]
    pub no_kms_key: bool,
}

/// What a tenant is, beside its id and tier.
#[derive(Debug, Args)]
pub struct Profile {
    /// What the assistant calls itself
    #[arg(long)]
    pub assistant_name: Option<String>,
    /// What the assistant is told about its work
    #[arg(long)]
    pub instructions: Option<String>,
    /// What happens to documents that try to give the model orders
    #[arg(long, value_enum)]
    pub injection_policy: Option<InjectionPolicyName>,
    /// Whose account at the model's service answers: `own` needs the secret with its key first
    #[arg(long, value_enum)]
    pub model_account: Option<ModelAccountName>,
    /// The vector cluster; chosen if not named
    #[arg(long)]
    pub cell: Option<String>,
    /// A limit, as <name>=<value>: `max_concurrent=50`, `allowed_models=a,b`; <name>=tier takes the tier's own.
    /// May be repeated
    #[arg(long = "limit", id = "limits", value_parser = limit)]
    pub limits: Vec<(String, Value)>,
}

impl Profile {
    /// The fields of a body that it stands for.
    pub(crate) fn fields(&self) -> Map<String, Value> {
        let Self { assistant_name, instructions, injection_policy, model_account, cell, limits } = self;
        let mut fields = Map::new();
        put(&mut fields, "assistant_name", assistant_name.clone());
        put(&mut fields, "instructions", instructions.clone());
        put(&mut fields, "injection_policy", injection_policy.map(name));
        put(&mut fields, "model_account", model_account.map(name));
        put(&mut fields, "cell", cell.clone());
        if !limits.is_empty() {
            fields.insert("limits".into(), limits.iter().cloned().collect::<Map<_, _>>().into());
        }
        fields
    }
}

/// Puts a text into a body, if there is one.
pub(crate) fn put(fields: &mut Map<String, Value>, field: &str, value: Option<String>) {
    if let Some(value) = value {
        fields.insert(field.to_owned(), value.into());
    }
}

/// A choice as the API writes it.
pub(crate) fn name(choice: impl ValueEnum) -> String {
    choice.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// A tier.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[expect(missing_docs, reason = "the contract's names")]
pub enum TierName {
    Free,
    Starter,
    Professional,
    Enterprise,
}

/// What happens to injected orders.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[expect(missing_docs, reason = "the contract's names")]
pub enum InjectionPolicyName {
    Flag,
    Redact,
    Refuse,
}

/// Whose model account it is.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[expect(missing_docs, reason = "the contract's names")]
pub enum ModelAccountName {
    Shared,
    Own,
}

/// `keys`
#[derive(Debug, Args)]
pub struct Keys {
    #[command(flatten)]
    #[expect(missing_docs, reason = "see the type")]
    pub at: At,
    #[command(subcommand)]
    #[expect(missing_docs, reason = "see the type")]
    pub command: KeysCommand,
}

/// What an operator can do with keys. Tenants make, list, replace and revoke their own.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key for a tenant, and show it this once
    Create(NewKey),
    /// List a tenant's keys
    List {
        /// The tenant
        tenant: TenantId,
    },
    /// Revoke a key. Holds for the next request
    Revoke {
        /// The tenant
        tenant: TenantId,
        /// The key's id, as lists and records have it
        key: KeyId,
    },
}

/// `issuers`
#[derive(Debug, Args)]
pub struct Issuers {
    #[command(flatten)]
    #[expect(missing_docs, reason = "see the type")]
    pub at: At,
    #[command(subcommand)]
    #[expect(missing_docs, reason = "see the type")]
    pub command: IssuersCommand,
}

/// What an operator can do with issuers. Tenants register and remove their own.
#[derive(Debug, Subcommand)]
pub enum IssuersCommand {
    /// Show whose the tokens of an issuer for an audience are
    Show(Names),
    /// Take them from a tenant, so that whoever registers them next has them. Its issuer is removed
    Release {
        /// The tenant that has them
        tenant: TenantId,
        #[command(flatten)]
        #[expect(missing_docs, reason = "see the type")]
        names: Names,
    },
}

/// Where tokens come from, and for whom they are.
#[derive(Debug, Args)]
pub struct Names {
    /// What they say in `iss`
    #[arg(long)]
    pub issuer: String,
    /// What they say in `aud`
    #[arg(long)]
    pub audience: String,
}

/// `keys create`
#[derive(Debug, Args)]
pub struct NewKey {
    /// The tenant
    pub tenant: TenantId,
    /// What it is called
    #[arg(long)]
    pub name: Option<String>,
    /// What it may do; everything if not said. May be repeated
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',',
          value_parser = ["chat", "documents:read", "documents:write", "usage:read", "audit:read", "keys:write"])]
    pub scopes: Vec<String>,
    /// From when on it is refused: RFC 3339, or a day; never if not said
    #[arg(long, value_parser = instant)]
    pub expires_at: Option<Timestamp>,
    /// A network that it may be used from, such as 203.0.113.0/24; any if not said. May be repeated
    #[arg(long = "cidr", value_name = "CIDR", value_delimiter = ',')]
    pub cidrs: Vec<String>,
}

/// `usage`
#[derive(Debug, Args)]
pub struct Usage {
    #[command(flatten)]
    #[expect(missing_docs, reason = "see the type")]
    pub at: At,
    /// The month, yyyy-mm; the present one if not said
    #[arg(long)]
    pub month: Option<BillingMonth>,
    /// Print the API's CSV: a line for each tenant and model
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
}

/// `deprovisioning`
#[derive(Debug, Args)]
pub struct Deprovisioning {
    #[command(flatten)]
    #[expect(missing_docs, reason = "see the type")]
    pub at: At,
    #[command(subcommand)]
    #[expect(missing_docs, reason = "see the type")]
    pub command: DeprovisioningCommand,
}

/// What can be seen of a deprovisioning.
#[derive(Debug, Subcommand)]
pub enum DeprovisioningCommand {
    /// Show its steps, and the receipt once there is one
    Show {
        /// Its id, as `tenants delete` printed it
        #[arg(value_parser = deprovisioning_id)]
        id: String,
    },
    /// Show its steps as they are done, until the receipt
    Watch {
        /// Its id, as `tenants delete` printed it
        #[arg(value_parser = deprovisioning_id)]
        id: String,
    },
}

/// `cost`
#[derive(Debug, Args)]
pub struct Cost {
    /// The numbers of tenants
    #[arg(long, value_delimiter = ',', default_value = "10,400,10000,100000",
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub tenants: Vec<u64>,
    /// Chats of a tenant in a month
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=100_000))]
    pub chats: Option<u64>,
    /// How long a model writes at an answer, in milliseconds
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=900_000))]
    pub model_ms: Option<u64>,
    /// Print every line as JSON, in nano-dollars
    #[arg(long)]
    pub json: bool,
}

fn instant(text: &str) -> Result<Timestamp, String> {
    let day = format!("{text}T00:00:00Z");
    let parsed = Timestamp::parse(text).or_else(|_| Timestamp::parse(&day));
    parsed.map_err(|_| "an instant is written 2026-03-01T00:00:00Z, or 2026-03-01".to_owned())
}

fn action(text: &str) -> Result<Action, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

fn deprovisioning_id(text: &str) -> Result<String, String> {
    let parts = text.strip_prefix("dep_").and_then(|rest| rest.split_once('_'));
    let known = parts.is_some_and(|(tenant, tail)| {
        tenant.parse::<TenantId>().is_ok()
            && !tail.is_empty()
            && tail.bytes().all(|b| b.is_ascii_alphanumeric())
    });
    if known { Ok(text.to_owned()) } else { Err("it is written dep_<tenant>_<letters and digits>".into()) }
}

/// The limits that are whole numbers.
const NUMBERS: [&str; 7] = [
    "requests_per_minute",
    "tokens_per_day",
    "monthly_token_budget",
    "max_context_tokens",
    "max_concurrent",
    "data_retention_days",
    "max_documents",
];

fn limit(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("it is written <name>=<value>")?;
    let value = match (name, value) {
        (_, "tier") => Value::Null,
        ("allowed_models", models) => models.split(',').map(str::to_owned).collect(),
        ("default_model", model) => model.into(),
        (name, number) if NUMBERS.contains(&name) => {
            let number: u64 = number.parse().map_err(|_| format!("{name} is a whole number, or `tier`"))?;
            number.into()
        }
        _ => {
            let numbers = NUMBERS.join(", ");
            return Err(format!("the limits are {numbers}, allowed_models and default_model"));
        }
    };
    let known = NUMBERS.contains(&name) || ["allowed_models", "default_model"].contains(&name);
    if known { Ok((name.to_owned(), value)) } else { Err(format!("there is no limit {name:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use serde_json::json;

    #[test]
    fn the_commands_are_well_formed() {
        Command::command().debug_assert();
    }

    #[test]
    fn a_limit_is_named_and_typed() {
        assert_eq!(limit("max_concurrent=50").unwrap().1, json!(50));
        assert_eq!(limit("max_concurrent=0").unwrap().1, json!(0));
        assert_eq!(limit("allowed_models=a,b").unwrap().1, json!(["a", "b"]));
        assert_eq!(limit("default_model=a").unwrap().1, json!("a"));
        assert_eq!(limit("tokens_per_day=tier").unwrap().1, json!(null));
        for wrong in ["max_concurrent", "max_concurrent=", "max_concurrent=-1", "max_concurrent=1.5", "x=1"] {
            assert!(limit(wrong).is_err(), "{wrong}");
        }
        assert!(limit("x=tier").is_err());
    }

    #[test]
    fn an_id_of_a_deprovisioning_is_one_segment_of_a_path() {
        assert!(deprovisioning_id("dep_acme_4QlpSq9SaJqwRCNWzOX9xw").is_ok());
        for wrong in ["", "acme", "dep_acme", "dep_acme_", "dep_Acme_1", "dep_acme_1/..", "dep_acme_1?x"] {
            assert!(deprovisioning_id(wrong).is_err(), "{wrong}");
        }
    }
}
