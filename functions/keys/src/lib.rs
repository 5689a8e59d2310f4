//! Who is let in to a tenant, in the tenant's own hands: its keys (`/v1/keys`) and the issuers of its users'
//! tokens (`/v1/issuers`).

mod create;
mod issuers;
mod list;
mod revoke;
mod rotate;

use http::{Method, Response, StatusCode};
use lambda_http::{Body, Error, Request};
use shared::api_key::{ApiKey, KeyId, KeyRecord, MOST_KEYS, Permission};
use shared::aws;
use shared::aws::idempotency::IdempotencyStore;
use shared::aws::issuers::IssuerStore;
use shared::aws::keys::{Added, Addition, KeyStore};
use shared::aws::ledger::Ledger;
use shared::aws::meters::MeterStore;
use shared::clock::{Clock, Timestamp};
use shared::error::{ApiError, Code};
use shared::gate::Gate;
use shared::idempotency::{IdempotencyKey, Stored};
use shared::issuer::Reach;
use shared::ledger::{Action, Record};
use shared::new_key::{CreatedKey, NewKey};
use shared::random::{Entropy, entropy};
use shared::scope::TenantScope;
use shared::{env, web};

use rotate::Replacement;

/// How often a key is made again on records that have moved on meanwhile.
const ROUNDS: u32 = 4;

/// What the function works with.
pub struct Context {
    gate: Gate,
    keys: KeyStore,
    issuers: IssuerStore,
    /// How far issuers' addresses may lie.
    issuer_reach: Reach,
    meters: MeterStore,
    ledger: Ledger,
    idempotency: IdempotencyStore,
    clock: Clock,
    entropy: Entropy,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let access = aws::Access::per_tenant(&aws::config()?)?;
        let clock = Clock::system();
        Ok(Self {
            gate: Gate::from_env(&access, clock.clone())?,
            keys: KeyStore::new(&access, env::table("TENANTS_TABLE")?),
            issuers: IssuerStore::new(&access, env::table("TENANTS_TABLE")?),
            issuer_reach: env::parsed("ISSUER_REACH")?,
            meters: MeterStore::new(&access, env::table("METERS_TABLE")?),
            ledger: Ledger::new(&access, env::table("AUDIT_TABLE")?),
            idempotency: IdempotencyStore::of_names(&access, env::table("CONVERSATIONS_TABLE")?),
            clock,
            entropy: entropy(),
        })
    }
}

impl Context {
    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        self.gate.close().await;
    }
}

/// Answers one request.
pub async fn handle(context: &Context, request: Request) -> Response<Body> {
    web::handle(request, &context.clock, async |request| match (request.method(), web::route(&request)) {
        (&Method::GET, "/v1/keys") => context.run(request, list::handle).await,
        (&Method::POST, "/v1/keys") => context.run(request, create::handle).await,
        (&Method::POST, "/v1/keys/{id}/rotate") => context.run(request, rotate::handle).await,
        (&Method::DELETE, "/v1/keys/{id}") => context.run(request, revoke::handle).await,
        (&Method::GET, "/v1/issuers") => context.run(request, issuers::list::handle).await,
        (&Method::POST, "/v1/issuers") => context.run(request, issuers::register::handle).await,
        (&Method::GET, "/v1/issuers/{id}") => context.run(request, issuers::read::handle).await,
        (&Method::DELETE, "/v1/issuers/{id}") => context.run(request, issuers::remove::handle).await,
        _ => Err(ApiError::not_found()),
    })
    .await
}

impl Context {
    async fn run(
        &self,
        request: Request,
        handler: impl AsyncFnOnce(&Self, &mut TenantScope, Request) -> Result<Response<Body>, ApiError>,
    ) -> Result<Response<Body>, ApiError> {
        let caller = web::caller(&request)?;
        let run = async |mut scope: TenantScope| handler(self, &mut scope, request).await;
        self.gate.enter(caller, Permission::KeysWrite, run).await
    }
}

/// What key is asked for.
enum Ask {
    New(NewKey),
    Replacement(Replacement),
}

impl Ask {
    /// What the key is to be, on the present records.
    async fn wanted(
        &self,
        context: &Context,
        scope: &TenantScope,
        now: Timestamp,
    ) -> Result<Wanted, ApiError> {
        match self {
            Self::New(body) => create::wanted(context, scope, body, now),
            Self::Replacement(replacement) => rotate::wanted(context, scope, replacement, now).await,
        }
    }
}

/// A key that is wanted: its record, and the key that it replaces with that one's end.
struct Wanted {
    key: ApiKey,
    record: KeyRecord,
    replaces: Option<(KeyId, Timestamp)>,
}

impl Context {
    /// Makes a key once, however often the request is repeated.
    async fn make(
        &self,
        scope: &mut TenantScope,
        request: &Request,
        ask: &Ask,
    ) -> Result<Response<Body>, ApiError> {
        let key = web::idempotency_key(request, scope)?;
        let ends_at_s = web::ends_at_s(request);
        if let Some(first) = self.gate.first_result(scope, &self.idempotency, key.as_ref(), ends_at_s).await?
        {
            if matches!(ask, Ask::Replacement(_)) {
                // Whoever made the replacement may have stopped before this.
                self.reach(scope).await?;
            }
            return Err(made_before(&first));
        }
        let made = Box::pin(self.make_first(scope, key.as_ref(), ask)).await;
        if made.is_err() {
            self.idempotency.give_back(scope, key.as_ref()).await;
        }
        made
    }

    async fn make_first(
        &self,
        scope: &mut TenantScope,
        key: Option<&IdempotencyKey>,
        ask: &Ask,
    ) -> Result<Response<Body>, ApiError> {
        self.gate.admit_read(scope).await?;
        for _ in 0..ROUNDS {
            // What a key may hand on is what it may do now, not what it could when a decision was kept.
            self.gate.renew(scope).await?;
            let now = self.clock.now();
            let Wanted { key: made, record, replaces } = ask.wanted(self, scope, now).await?;
            let (action, about) = match &replaces {
                None => (Action::KeyCreated, vec![made.key_id().clone()]),
                Some((old, _)) => (Action::KeyRotated, vec![old.clone(), made.key_id().clone()]),
            };
            let note = Record::event(scope, action, Vec::new(), now).about(about);
            // The secret is in no store, and so not in what is kept for repeats.
            let stored = Stored { status: StatusCode::CONFLICT.as_u16(), body: made.key_id().to_string() };
            let addition = Addition {
                key: &record,
                epoch: scope.epoch(),
                replaces: replaces.as_ref().map(|(old, until)| (old, *until)),
                note: (&self.ledger, &note),
                finished: key.map(|key| (&*scope, self.idempotency.finished(key, &stored, now))),
                once: None,
            };
            let added = Box::pin(self.keys.add(scope, &addition)).await?;
            if replaces.is_some() && matches!(added, Added::Yes | Added::Replaced) {
                self.reach(scope).await?;
            }
            match added {
                Added::Yes => {
                    tracing::info!(key.made = %made.key_id(), "Key made");
                    return Ok(web::reply(StatusCode::CREATED, &CreatedKey::new(&made, record)));
                }
                Added::Stale => {}
                Added::Full => return Err(full()),
                Added::Nothing => return Err(ApiError::not_found()),
                Added::Replaced => return Err(replaced()),
                Added::Superseded | Added::Before(_) => return Err(ApiError::superseded()),
            }
        }
        Err(ApiError::unavailable("the tenant's present state"))
    }

    /// Lets what the tenant's record says now reach its next admission: from here on, no decision from
    /// before admits anything.
    async fn reach(&self, scope: &TenantScope) -> Result<(), ApiError> {
        let reached = async {
            let now = self.keys.standing(scope).await?;
            self.meters.set_standing(scope, now.status, now.epoch).await
        };
        reached.await.map_err(|error| {
            tracing::error!("A change of keys has not reached the meter: {error}");
            let message = "the change is made, but it may not hold everywhere yet; repeat the request";
            ApiError::new(Code::Unavailable, message)
        })
    }
}

/// The answer to a repeat: which key was made, and not its secret, which nobody has kept.
fn made_before(first: &Stored) -> ApiError {
    let message = format!(
        "this request has made the key `{}` already; its secret was shown once and is kept nowhere. If the \
         answer was lost, delete that key and make another",
        first.body
    );
    ApiError::new(Code::Conflict, message).with_param("Idempotency-Key")
}

fn full() -> ApiError {
    let message = format!("the tenant has {MOST_KEYS} keys, which is the most; delete one first");
    ApiError::new(Code::Conflict, message)
}

fn replaced() -> ApiError {
    ApiError::new(Code::Conflict, "this key has been replaced already; replace the one that took its place")
}
