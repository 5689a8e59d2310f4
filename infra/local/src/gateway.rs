//! API Gateway: routes of the template's REST API, checked, turned into events, and answered.
//!
//! What it refuses, caches, limits and says by itself follows the real one, through the template's
//! own `x-amazon-apigateway-gateway-responses`. It listens where a custom domain would: paths have no
//! stage in front.

mod authorizer;
mod event;
mod respond;

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::net::TcpListener;
use tokio::time::Instant;

use self::authorizer::Authorizers;
use self::event::{Caller, Exchange};
use self::respond::{Failure, Kind};
use crate::lambda::{InvokeError, Lambda};
use crate::serving::{self, Peer};
use crate::sigv4::{self, Credentials};
use crate::template::{Api, Route, RouteAuth, Throttle};

/// The most that a request's body may have.
const MAX_BODY: usize = 10 * 1024 * 1024;
/// How much of a body that is too large is still read, so that its sender gets to see the answer.
const MAX_DRAINED: usize = 64 * 1024 * 1024;

/// The gateway in front of the functions.
#[derive(Debug)]
pub struct Gateway {
    api: Api,
    lambda: Arc<Lambda>,
    credentials: Vec<Credentials>,
    authorizers: Arc<Authorizers>,
    bucket: Option<Mutex<TokenBucket>>,
}

/// Lets the control address put wrong decisions into the cache of a gateway's authorizers.
#[derive(Clone, Debug, Default)]
pub struct Poison(Arc<Authorizers>);

impl Poison {
    /// From now on whoever presents `for_identity` gets the decision that is kept for `as_identity`,
    /// until it lapses. Says whether there was one.
    #[must_use]
    pub fn put(&self, for_identity: &str, as_identity: &str) -> bool {
        self.0.poison(for_identity.as_bytes(), as_identity.as_bytes())
    }
}

impl Gateway {
    /// Serves the API until `shutdown` resolves. `credentials` are the operators' access keys.
    ///
    /// # Errors
    /// If the listener fails.
    pub async fn serve(
        listener: TcpListener,
        api: Api,
        lambda: Arc<Lambda>,
        credentials: Vec<Credentials>,
        poison: Poison,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let bucket = api.throttle.map(|throttle| Mutex::new(TokenBucket::new(throttle)));
        let gateway = Arc::new(Self { api, lambda, credentials, authorizers: poison.0, bucket });
        let router = Router::new().fallback(handle).with_state(gateway);
        serving::serve(listener, router, shutdown).await
    }

    async fn answer(&self, exchange: &mut Exchange, body: Body) -> Result<Response, Failure> {
        if self.bucket.as_ref().is_some_and(|bucket| !take(bucket)) {
            return Err(Kind::Throttled.into());
        }
        let route = self.route(exchange)?;
        exchange.body = read(body).await?;
        let caller = self.caller(exchange, route).await?;
        let payload = Bytes::from(exchange.proxy_event(&self.api, route, &caller).to_string());
        let deadline = Instant::now() + route.timeout;
        // Of what the authorizer said, not of what the client sent.
        let tenant = route.tenant.as_ref().and_then(|name| caller.says(name));
        let (function, wait) = (&route.function, route.timeout);
        if route.streaming {
            let streaming = self.lambda.invoke_streaming(function, tenant, payload, wait).await;
            return respond::streamed(streaming.map_err(failed)?, deadline);
        }
        let response = self.lambda.invoke(function, tenant, payload, wait).await.map_err(failed)?;
        respond::buffered(&response)
    }

    fn route(&self, exchange: &mut Exchange) -> Result<&Route, Failure> {
        let path = exchange.uri.path();
        let candidates = self.api.routes.iter().filter(|route| route.method == exchange.method);
        let matched = candidates.filter_map(|route| Some((event::match_path(&route.path, path)?, route)));
        // A literal segment wins over a parameter.
        let (parameters, route) = matched
            .min_by_key(|(parameters, _)| parameters.len())
            .ok_or(Failure::from(Kind::MissingAuthenticationToken))?;
        exchange.path_parameters = parameters
            .into_iter()
            .map(|(name, raw)| Some((name, event::decode(raw)?)))
            .collect::<Option<_>>()
            .ok_or(Failure::new(Kind::BadRequest, "The path is not valid UTF-8."))?;
        exchange.host().ok_or(Failure::new(Kind::BadRequest, "The Host header is missing or not valid."))?;
        Ok(route)
    }

    async fn caller(&self, exchange: &Exchange, route: &Route) -> Result<Caller<'_>, Failure> {
        match &route.auth {
            RouteAuth::Open => Ok(Caller::Anyone),
            RouteAuth::Iam => {
                let uri = exchange.uri.path_and_query().map_or("/", |uri| uri.as_str());
                let (method, headers) = (&exchange.method, &exchange.headers);
                let now = serving::system_clock();
                sigv4::verify(sigv4::GATEWAY, &self.credentials, method, uri, headers, &exchange.body, now)
                    .map(Caller::Operator)
                    .map_err(|refusal| match refusal {
                        sigv4::Refusal::Missing => Kind::MissingAuthenticationToken.into(),
                        other => Failure::new(Kind::InvalidSignature, other.to_string()),
                    })
            }
            RouteAuth::Authorizer(name) => {
                let declared = self.api.authorizers.get(name).ok_or(Kind::AuthorizerConfigurationError)?;
                self.authorizers
                    .decide(&self.lambda, &self.api, declared, exchange, route)
                    .await
                    .map(Caller::Tenant)
            }
        }
    }
}

async fn handle(
    State(gateway): State<Arc<Gateway>>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let mut exchange = Exchange::new(parts, peer.ip());
    let answer = gateway.answer(&mut exchange, body).await;
    let response = answer.unwrap_or_else(|failure| failure.render(&gateway.api, &exchange));
    respond::identified(response, &exchange.request_id)
}

fn failed(error: InvokeError) -> Failure {
    let kind = match &error {
        InvokeError::RequestTooLarge => Kind::RequestTooLarge,
        // API Gateway itself answers with its DEFAULT_5XX where the function's own limit ends it first; to the
        // caller both are the same thing, and no route of ours waits that long.
        InvokeError::Waited | InvokeError::TimedOut(_) => Kind::IntegrationTimeout,
        InvokeError::Malformed(_) => Kind::MalformedStream,
        InvokeError::TenantId(_) => Kind::ApiConfigurationError,
        InvokeError::Closing => Kind::Unavailable,
        InvokeError::UnknownFunction(_)
        | InvokeError::ResponseTooLarge
        | InvokeError::Init(_)
        | InvokeError::Crashed(_)
        | InvokeError::Function { .. } => Kind::FunctionFailure,
    };
    tracing::warn!("Request failed in the function: {error}");
    kind.into()
}

async fn read(mut body: Body) -> Result<Bytes, Failure> {
    let mut collected = BytesMut::new();
    let mut seen = 0_usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Failure::new(Kind::BadRequest, "The body is incomplete."))?;
        let Ok(data) = frame.into_data() else { continue };
        seen = seen.saturating_add(data.len());
        if seen <= MAX_BODY {
            collected.extend_from_slice(&data);
        } else if seen > MAX_DRAINED {
            break;
        }
    }
    if seen > MAX_BODY { Err(Kind::RequestTooLarge.into()) } else { Ok(collected.freeze()) }
}

#[derive(Debug)]
struct TokenBucket {
    throttle: Throttle,
    tokens: f64,
    filled: Instant,
}

impl TokenBucket {
    fn new(throttle: Throttle) -> Self {
        Self { throttle, tokens: throttle.burst, filled: Instant::now() }
    }
}

fn take(bucket: &Mutex<TokenBucket>) -> bool {
    let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let earned = (now - bucket.filled).as_secs_f64() * bucket.throttle.rate;
    bucket.tokens = (bucket.tokens + earned).min(bucket.throttle.burst);
    bucket.filled = now;
    let enough = bucket.tokens >= 1.0;
    if enough {
        bucket.tokens -= 1.0;
    }
    enough
}

#[cfg(test)]
mod tests;
