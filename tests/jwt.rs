//! Tokens in the place of keys: whom a tenant's issuers vouch for is let in as that user; nobody else is.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::string_slice,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::clock::Clock;
use tests::tokens::{KeyServer, Publishing, Signer, claims, signed_with_public, unsigned};
use tests::{Answer, Options, Stack, Tenant};

const ISSUER: &str = "https://login.acme.example";
const AUDIENCE: &str = "acme-assistant";
/// Processes of the authorizer that requests one after another keep busy at most: one may still be ending the
/// last request when the next one comes. Each remembers what it has fetched.
const PROCESSES: usize = 6;

/// A stack that lets issuers publish their keys on this machine.
async fn stack() -> Stack {
    let parameters = vec![("IssuerReach", "private".to_owned())];
    Stack::start_with(Options { parameters, ..Options::default() }).await
}

fn at(server: &KeyServer) -> Value {
    json!({"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": server.url()})
}

fn with(mut value: Value, name: &str, field: impl Into<Value>) -> Value {
    value[name] = field.into();
    value
}

/// Registers an issuer and returns its id.
async fn register(tenant: &Tenant, body: &Value) -> String {
    let answer = tenant.post("/v1/issuers", body).await.expect_status(StatusCode::CREATED);
    answer.json()["issuer_id"].as_str().unwrap().to_owned()
}

/// Somebody who presents this token.
fn bearer(stack: &Stack, token: &str) -> Tenant {
    stack.tenant_with_key("", token)
}

async fn chat(stack: &Stack, token: &str) -> Answer {
    bearer(stack, token).chat(json!({"message": "How many days?"})).await
}

fn ann() -> Value {
    claims(ISSUER, AUDIENCE, "ann")
}

#[tokio::test]
async fn a_token_is_its_user_and_records_say_who_vouched() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    acme.store("handbook", "Handbook", "Every employee has 25 days of leave.").await;
    let signers = [Signer::rsa("r"), Signer::p256("p"), Signer::ed25519("e")];
    let server = KeyServer::start(signers.iter().map(Signer::public).collect()).await;
    let issuer = register(&acme, &at(&server)).await;
    let [rsa, p256, ed] = &signers;

    let hers = bearer(&stack, &rsa.token(&ann()));
    let answer = hers.chat(json!({"message": "How many days of leave?"})).await;
    let answer = answer.expect_status(StatusCode::OK).json();
    assert!(answer["response"].as_str().unwrap().contains("25 days"), "{answer}");
    // Her conversation goes on under whatever key her issuer signs with, and is nobody else's.
    let goes_on = json!({"message": "And?", "conversation_id": answer["conversation_id"]});
    for signer in [p256, ed] {
        let later = with(ann(), "jti", signer.alg());
        bearer(&stack, &signer.token(&later)).chat(goes_on.clone()).await.expect_status(StatusCode::OK);
    }
    let bob = bearer(&stack, &ed.token(&claims(ISSUER, AUDIENCE, "bob")));
    bob.chat(goes_on.clone()).await.expect_error(404, "not_found");
    acme.as_user("bob").chat(goes_on.clone()).await.expect_error(404, "not_found");
    acme.as_user("ann").chat(goes_on.clone()).await.expect_status(StatusCode::OK);

    // What is verified cannot be overridden by what is asserted.
    for user in ["bob", "Ann", "anna"] {
        let error = hers.as_user(user).chat(goes_on.clone()).await.expect_error(400, "invalid_request");
        assert_eq!(error["param"], "X-User-Id");
    }
    hers.as_user("ann").chat(goes_on.clone()).await.expect_status(StatusCode::OK);

    let records = stack.items("audit", "acme", "TICKET#").await;
    let calls: Vec<&Value> = records.iter().filter(|record| record["action"] == "llm_call").collect();
    let by = |user: &str, vouched: bool| {
        let is =
            |record: &&&Value| record["user_id"] == user && (record["key_id"] == issuer.as_str()) == vouched;
        calls.iter().filter(is).count()
    };
    assert_eq!((by("ann", true), by("ann", false)), (4, 1), "{calls:?}");
    // Three keys, one address: each process of the authorizer asks it once.
    assert!(server.asked() <= PROCESSES, "{}", server.asked());
    // Nothing of a token is logged.
    assert!(!stack.logs().contains(&hers.key[..40]));
    stack.stop().await;
}

#[tokio::test]
async fn a_token_may_do_what_its_issuer_was_given() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let signer = Signer::p256("p");
    let body = json!({"issuer": ISSUER, "audience": AUDIENCE, "keys": [signer.public()]});
    register(&acme, &with(body.clone(), "scopes", json!(["chat"]))).await;
    let all = with(body.clone(), "audience", "everything");
    register(&acme, &all).await;

    let hers = bearer(&stack, &signer.token(&ann()));
    hers.ask("Hello?").await;
    hers.get("/v1/documents").await.expect_error(403, "insufficient_scope");
    hers.post("/v1/documents", &json!({"title": "x", "content": "y"}))
        .await
        .expect_error(403, "insufficient_scope");
    // All that a key may do, but for keys and issuers.
    let more = bearer(&stack, &signer.token(&claims(ISSUER, "everything", "ann")));
    more.store("note", "Note", "A note.").await;
    more.get("/v1/usage").await.expect_status(StatusCode::OK);
    more.get("/v1/audit").await.expect_status(StatusCode::OK);
    for path in ["/v1/keys", "/v1/issuers"] {
        more.get(path).await.expect_error(403, "insufficient_scope");
    }
    more.post("/v1/issuers", &with(body, "audience", "mine")).await.expect_error(403, "insufficient_scope");
    stack.stop().await;
}

#[tokio::test]
async fn what_is_no_genuine_token_lets_nobody_in() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let (rsa, p256, ed) = (Signer::rsa("r"), Signer::p256("p"), Signer::ed25519("e"));
    let server = KeyServer::start(vec![rsa.public(), p256.public(), ed.public()]).await;
    let issuer = register(&acme, &at(&server)).await;
    let head = |alg: &str, kid: &str| json!({"alg": alg, "typ": "JWT", "kid": kid});
    let now_s = Clock::system().now().as_seconds();
    let stranger = Signer::rsa("r");
    let good = rsa.token(&ann());
    let (message, signature) = good.rsplit_once('.').unwrap();
    let mut without_exp = ann();
    without_exp.as_object_mut().unwrap().remove("exp");
    let bad = [
        ("unsigned", format!("{}.", unsigned(&head("none", "r"), &ann()))),
        ("unsigned, otherwise spelled", format!("{}.", unsigned(&head("nOnE", "r"), &ann()))),
        ("none, with a signature", rsa.token_with(&head("none", "r"), &ann())),
        ("the public key as a secret", signed_with_public(&rsa.public(), &ann())),
        ("ES256 with an RSA key", rsa.token_with(&head("ES256", "r"), &ann())),
        ("RS256 with an EC key", p256.token_with(&head("RS256", "p"), &ann())),
        ("another's name", p256.token_with(&head("ES256", "r"), &ann())),
        ("a stronger algorithm", rsa.token_with(&head("RS512", "r"), &ann())),
        ("no name, of several keys", rsa.token_with(&json!({"alg": "RS256"}), &ann())),
        ("a stranger's key", stranger.token(&ann())),
        (
            "a key that it brings along",
            stranger.token_with(&with(head("RS256", "r"), "jwk", stranger.public()), &ann()),
        ),
        ("another's audience", rsa.token(&with(ann(), "aud", "globex-assistant"))),
        ("no audience", rsa.token(&with(ann(), "aud", json!([])))),
        ("another issuer", rsa.token(&with(ann(), "iss", "https://login.acme.example/"))),
        ("no end", rsa.token(&without_exp)),
        ("an end as text", rsa.token(&with(ann(), "exp", (now_s + 300).to_string()))),
        ("past", rsa.token(&with(ann(), "exp", now_s - 60))),
        ("long past", rsa.token(&with(ann(), "exp", 1))),
        ("not yet", rsa.token(&with(ann(), "nbf", now_s + 90))),
        ("issued tomorrow", rsa.token(&with(ann(), "iat", now_s + 86_400))),
        ("no user", rsa.token(&with(ann(), "sub", ""))),
        ("a long user", rsa.token(&with(ann(), "sub", "x".repeat(257)))),
        ("a user that is no text", rsa.token(&with(ann(), "sub", json!({"$ne": ""})))),
        ("an extension", rsa.token_with(&with(head("RS256", "r"), "crit", json!(["exp"])), &ann())),
        ("a logout", rsa.token_with(&with(head("RS256", "r"), "typ", "logout+jwt"), &ann())),
        (
            "one letter",
            format!("{message}.{}{}", if signature.starts_with('A') { "B" } else { "A" }, &signature[1..]),
        ),
        ("cut", good[..good.len() - 10].to_owned()),
        ("no signature", format!("{message}.")),
        ("padded", format!("{good}=")),
        ("twice", format!("{good}.{good}")),
        ("20 KB", rsa.token(&with(ann(), "pad", "x".repeat(15_000)))),
        ("9 KB", rsa.token(&with(ann(), "pad", "x".repeat(6_500)))),
        ("dots", "..".to_owned()),
        ("many dots", ".".repeat(5_000)),
        ("garbage", "eyJ.eyJ.x".to_owned()),
        ("deep", format!("{}.{}.x", unsigned(&head("RS256", "r"), &json!({})), "W1tbW1tb".repeat(500))),
    ];
    let before = stack.meter_item("acme").await["seq"].clone();
    for (what, token) in &bad {
        let answer = chat(&stack, token).await;
        // A header that API Gateway does not take never reaches the authorizer.
        let status = answer.status.as_u16();
        assert!(
            status == 401 || (token.len() > 8_192 && (400..500).contains(&status)),
            "{what}: {}",
            answer.text
        );
    }
    assert_eq!(stack.meter_item("acme").await["seq"], before, "nothing was admitted");
    for (what, claims) in [
        ("just not past", with(ann(), "exp", now_s - 30)),
        ("about to begin", with(with(ann(), "nbf", now_s + 30), "iat", now_s + 30)),
        ("several audiences", with(ann(), "aud", json!(["other", AUDIENCE]))),
        ("plain", ann()),
    ] {
        let answer = chat(&stack, &rsa.token(&claims)).await;
        assert_eq!(answer.status, StatusCode::OK, "{what}: {}", answer.text);
    }
    // Those that name an issuer of the tenant are on its record.
    let denials = stack.items("audit", "acme", "EVENT#").await;
    let denied = denials.iter().find(|record| record["action"] == "auth_denied").unwrap();
    assert_eq!((&denied["error"], &denied["key_id"]), (&json!("invalid_key"), &json!(issuer)), "{denied}");
    // No token was worth a look at the keys of its own.
    assert!(server.asked() <= PROCESSES, "{}", server.asked());
    stack.stop().await;
}

#[tokio::test]
async fn the_user_is_who_the_registered_claim_names() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let signer = Signer::ed25519("e");
    let named = "https://acme.example/employee";
    for (audience, claim) in [("by-number", named), ("by-address", "email")] {
        let body = json!({"issuer": ISSUER, "audience": audience, "keys": [signer.public()]});
        register(&acme, &with(body, "user_claim", claim)).await;
    }
    let of = |audience: &str| claims(ISSUER, audience, "sub-of-nobody");
    let number = signer.token(&with(of("by-number"), named, "E-7"));
    let address = with(of("by-address"), "email", "ann@acme.example");
    let address = signer.token(&with(address, "email_verified", true));
    for (token, user) in [(&number, "E-7"), (&address, "ann@acme.example")] {
        let hers = bearer(&stack, token);
        let answer = hers.chat(json!({"message": "Hello?"})).await.expect_status(StatusCode::OK).json();
        let goes_on = json!({"message": "And?", "conversation_id": answer["conversation_id"]});
        acme.as_user(user).chat(goes_on.clone()).await.expect_status(StatusCode::OK);
        acme.as_user("sub-of-nobody").chat(goes_on).await.expect_error(404, "not_found");
    }
    // Nobody is named where the claim is not there, is no text, or is an address that nobody has checked.
    for bad in [
        of("by-number"),
        with(of("by-number"), named, 7),
        with(of("by-number"), named, ""),
        with(of("by-address"), "email", "bob@acme.example"),
        with(with(of("by-address"), "email", "bob@acme.example"), "email_verified", "true"),
    ] {
        chat(&stack, &signer.token(&bad)).await.expect_error(401, "invalid_key");
    }
    stack.stop().await;
}

#[tokio::test]
async fn a_token_ends_though_its_decision_is_cached() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let signer = Signer::ed25519("e");
    register(&acme, &json!({"issuer": ISSUER, "audience": AUDIENCE, "keys": [signer.public()]})).await;
    // Clocks may differ by a minute: four seconds of it are left.
    let ends_s = Clock::system().now().as_seconds() + 4;
    let hers = bearer(&stack, &signer.token(&with(ann(), "exp", ends_s - 60)));
    hers.ask("Hello?").await;
    while Clock::system().now().as_seconds() < ends_s {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    hers.chat(json!({"message": "Hello?"})).await.expect_error(401, "invalid_key");
    stack.stop().await;
}

#[tokio::test]
async fn tokens_of_an_issuer_for_an_audience_are_one_tenants() {
    let stack = stack().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    acme.store("handbook", "Handbook", "The word of acme is larkspur.").await;
    globex.store("handbook", "Handbook", "The word of globex is foxglove.").await;
    let signer = Signer::p256("p");
    let body = |audience: &str| json!({"issuer": ISSUER, "audience": audience, "keys": [signer.public()]});
    let id = register(&acme, &body(AUDIENCE)).await;
    let taken = globex.post("/v1/issuers", &body(AUDIENCE)).await.expect_error(409, "conflict");
    // The tenant itself learns no more of it.
    assert_eq!(acme.post("/v1/issuers", &body(AUDIENCE)).await.expect_error(409, "conflict"), taken);
    assert!(!taken.to_string().contains("acme"), "{taken}");
    // The same issuer may serve both, for audiences of their own.
    register(&globex, &body("globex-assistant")).await;
    for (audience, own, other) in
        [(AUDIENCE, "larkspur", "foxglove"), ("globex-assistant", "foxglove", "larkspur")]
    {
        let user = bearer(&stack, &signer.token(&claims(ISSUER, audience, "ann")));
        let hits = json!(user.search("The word of", 10).await).to_string();
        assert!(hits.contains(own) && !hits.contains(other), "{hits}");
    }
    // One that is for both is whose claim is the earlier, however it is written; the other learns of it.
    for (n, aud) in [[AUDIENCE, "globex-assistant"], ["globex-assistant", AUDIENCE]].iter().enumerate() {
        let both = with(with(ann(), "aud", json!(aud)), "jti", n);
        let hits = json!(bearer(&stack, &signer.token(&both)).search("The word of", 10).await).to_string();
        assert!(hits.contains("larkspur") && !hits.contains("foxglove"), "{hits}");
    }
    let denied = async |tenant: &str| {
        let events = stack.items("audit", tenant, "EVENT#").await;
        events.iter().filter(|event| event["action"] == "auth_denied").count()
    };
    assert!(denied("globex").await > 0);
    assert_eq!(denied("acme").await, 0);

    // What is another's is as if it were not.
    let path = format!("/v1/issuers/{id}");
    globex.get(&path).await.expect_error(404, "not_found");
    globex.delete(&path).await.expect_error(404, "not_found");
    assert_eq!(globex.get("/v1/issuers").await.json()["issuers"].as_array().unwrap().len(), 1);
    acme.get(&path).await.expect_status(StatusCode::OK);

    // Nobody inherits tokens that are still about; the tenant itself may come back.
    acme.delete(&path).await.expect_status(StatusCode::NO_CONTENT);
    globex.post("/v1/issuers", &body(AUDIENCE)).await.expect_error(409, "conflict");
    chat(&stack, &signer.token(&with(ann(), "jti", 1))).await.expect_error(401, "invalid_key");
    let again = register(&acme, &body(AUDIENCE)).await;
    assert_ne!(again, id);
    chat(&stack, &signer.token(&with(ann(), "jti", 2))).await.expect_status(StatusCode::OK);

    // The items that say whose they are are no tenants.
    let tenants = stack.admin(Method::GET, "/admin/tenants", None).await.json();
    assert_eq!(tenants["tenants"].as_array().unwrap().len(), 2, "{tenants}");
    stack.stop().await;
}

#[tokio::test]
async fn a_later_claim_takes_nothing_from_an_earlier_one() {
    let stack = stack().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    let (real, false_one) = (Signer::p256("p"), Signer::p256("p"));
    let body = |audience: &str, signer: &Signer| json!({"issuer": ISSUER, "audience": audience, "keys": [signer.public()]});
    register(&globex, &body("globex-assistant", &real)).await;
    // What identity providers put into every token beside the audience proper.
    let userinfo = format!("{ISSUER}/userinfo");
    let spoiler = register(&acme, &body(&userinfo, &false_one)).await;
    let token = |n: usize| {
        let claims = claims(ISSUER, "globex-assistant", "ann");
        real.token(&with(with(claims, "aud", json!([userinfo, "globex-assistant"])), "jti", n))
    };
    chat(&stack, &token(0)).await.expect_status(StatusCode::OK);
    // Nor does one that its holder has given up, or that is the same tenant's.
    acme.delete(&format!("/v1/issuers/{spoiler}")).await.expect_status(StatusCode::NO_CONTENT);
    chat(&stack, &token(1)).await.expect_status(StatusCode::OK);
    register(&acme, &body(&userinfo, &false_one)).await;
    register(&globex, &body("globex-other", &real)).await;
    let own = with(claims(ISSUER, "", "ann"), "aud", json!(["globex-other", "globex-assistant"]));
    chat(&stack, &real.token(&own)).await.expect_status(StatusCode::OK);
    let records = stack.items("audit", "globex", "TICKET#").await;
    assert_eq!(records.iter().filter(|record| record["action"] == "llm_call").count(), 3);

    // Who was first stays so: to remove an issuer and to register it again is no way to fall behind.
    let first = globex.get("/v1/issuers").await.json()["issuers"].as_array().unwrap().clone();
    let first = first.iter().find(|issuer| issuer["audience"] == "globex-assistant").unwrap().clone();
    let path = format!("/v1/issuers/{}", first["issuer_id"].as_str().unwrap());
    globex.delete(&path).await.expect_status(StatusCode::NO_CONTENT);
    register(&globex, &body("globex-assistant", &real)).await;
    chat(&stack, &token(2)).await.expect_status(StatusCode::OK);
    stack.stop().await;
}

#[tokio::test]
async fn an_operator_frees_what_the_wrong_tenant_has_claimed() {
    let stack = stack().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    let signer = Signer::p256("p");
    let body = json!({"issuer": ISSUER, "audience": "globex-assistant", "keys": [signer.public()]});
    let squatter = register(&acme, &body).await;
    globex.post("/v1/issuers", &body).await.expect_error(409, "conflict");
    let token = |n: usize| signer.token(&with(claims(ISSUER, "globex-assistant", "ann"), "jti", n));
    let cached = token(0);
    chat(&stack, &cached).await.expect_status(StatusCode::OK);

    let escaped = ISSUER.replace(':', "%3A").replace('/', "%2F");
    let path = format!("/admin/issuer-claim?issuer={escaped}&audience=globex-assistant");
    let claim = stack.admin(Method::GET, &path, None).await.expect_status(StatusCode::OK).json();
    assert_eq!((&claim["tenant_id"], &claim["issuer_id"]), (&json!("acme"), &json!(squatter)), "{claim}");
    for (query, param) in [
        ("", "issuer"),
        ("?audience=x", "issuer"),
        ("?issuer=x", "audience"),
        (&*format!("?issuer={}&audience=x", "x".repeat(513)), "issuer"),
        ("?issuer=x&audience=x", "tenant_id"),
        ("?issuer=x&audience=x&tenant_id=NOBODY", "tenant_id"),
    ] {
        let answer = stack.admin(Method::DELETE, &format!("/admin/issuer-claim{query}"), None).await;
        assert_eq!(answer.expect_error(400, "invalid_request")["param"], param, "{query}");
    }
    // What is not as the operator believes stays as it is.
    for of in ["globex", "nobody"] {
        let answer = stack.admin(Method::DELETE, &format!("{path}&tenant_id={of}"), None).await;
        answer.expect_error(404, "not_found");
    }
    stack.admin(Method::GET, &format!("{path}x"), None).await.expect_error(404, "not_found");
    acme.delete(&path).await.expect_error(401, "invalid_key");
    chat(&stack, &token(1)).await.expect_status(StatusCode::OK);

    let release = format!("{path}&tenant_id=acme");
    // One that stops before the meter knows is finished by its repeat.
    stack
        .dynamodb_faults(
            json!({"rules": [{"mode": "kill_before", "operation": "UpdateItem", "table": "meters",
            "contains": "SET #s = :s, #e = :e", "times": 1, "function": "provisioning"}]}),
        )
        .await;
    let killed = stack.admin(Method::DELETE, &release, None).await;
    stack.clear_dynamodb_faults().await;
    assert!(killed.status.is_server_error(), "{}", killed.text);
    stack.admin(Method::DELETE, &release, None).await.expect_error(404, "not_found");
    chat(&stack, &cached).await.expect_error(401, "invalid_key");
    acme.get(&format!("/v1/issuers/{squatter}")).await.expect_error(404, "not_found");
    assert!(stack.items("tenants", "acme", "CLAIM#").await.is_empty());
    register(&globex, &body).await;
    acme.post("/v1/issuers", &body).await.expect_error(409, "conflict");
    chat(&stack, &token(2)).await.expect_status(StatusCode::OK);
    let events = stack.items("audit", "acme", "EVENT#").await;
    let released = events.iter().filter(|event| event["action"] == "issuer_removed");
    let released: Vec<&Value> = released.collect();
    assert_eq!(released.len(), 1, "{events:?}");
    assert!(released[0]["operator"].is_string() && released[0]["keys"] == json!([squatter]), "{released:?}");

    // A claim without an issuer, too.
    let id = globex.get("/v1/issuers").await.json()["issuers"][0]["issuer_id"].as_str().unwrap().to_owned();
    globex.delete(&format!("/v1/issuers/{id}")).await.expect_status(StatusCode::NO_CONTENT);
    let names = ["--issuer", ISSUER, "--audience", "globex-assistant"];
    let shown = stack.bulkhead(&[&["issuers", "show"][..], &names].concat()).await;
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("globex") && !shown.contains("issuer_id"), "{shown}");
    let freed = stack.bulkhead(&[&["issuers", "release", "globex"][..], &names].concat()).await;
    assert!(freed.status.success(), "{freed:?}");
    register(&acme, &body).await;
    stack.stop().await;
}

#[tokio::test]
async fn a_tenant_has_no_more_issuers_than_it_may_however_many_are_registered_at_once() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let signer = Signer::ed25519("e");
    let body = |n: usize| json!({"issuer": ISSUER, "audience": format!("a-{n}"), "keys": [signer.public()]});
    for n in 0..14 {
        register(&acme, &body(n)).await;
    }
    let registering = (14..34).map(|n| {
        let (acme, body) = (acme.clone(), body(n));
        tokio::spawn(async move { acme.post("/v1/issuers", &body).await.status.as_u16() })
    });
    let mut statuses = Vec::new();
    for registered in registering.collect::<Vec<_>>() {
        statuses.push(registered.await.unwrap());
    }
    assert!(statuses.iter().all(|status| [201, 409, 503].contains(status)), "{statuses:?}");
    let there = acme.get("/v1/issuers").await.json()["issuers"].as_array().unwrap().len();
    let created = statuses.iter().filter(|status| **status == 201).count();
    assert!(there <= 20 && there == 14 + created && created > 0, "{there} there, {statuses:?}");
    assert_eq!(stack.items("tenants", "acme", "ISSUER#").await.len(), there);
    stack.stop().await;
}

#[tokio::test]
async fn a_removed_issuers_tokens_die_with_the_next_request() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let signer = Signer::p256("p");
    let body = json!({"issuer": ISSUER, "audience": AUDIENCE, "keys": [signer.public()]});
    let id = register(&acme, &body).await;
    let other = register(&acme, &with(body.clone(), "audience", "other")).await;
    let (hers, others) = (
        bearer(&stack, &signer.token(&ann())),
        bearer(&stack, &signer.token(&claims(ISSUER, "other", "ann"))),
    );
    hers.ask("Hello?").await;
    others.ask("Hello?").await;
    acme.delete(&format!("/v1/issuers/{id}")).await.expect_status(StatusCode::NO_CONTENT);
    // The decision is still cached; it admits nothing.
    for _ in 0..3 {
        hers.chat(json!({"message": "Hello?"})).await.expect_error(401, "invalid_key");
        hers.post("/v1/search", &json!({"query": "x"})).await.expect_error(401, "invalid_key");
    }
    // The others are made anew, and go on.
    others.ask("Hello?").await;
    acme.ask("Hello?").await;
    // Where the meter could not be told, the answer says so, and a repeat finishes what was begun.
    let third = register(&acme, &with(body.clone(), "audience", "third")).await;
    let thirds = bearer(&stack, &signer.token(&claims(ISSUER, "third", "ann")));
    thirds.ask("Hello?").await;
    let rule = json!({"operation": "UpdateItem", "table": "meters", "contains": "#e <= :e", "mode": "error"});
    stack.dynamodb_faults(json!({"seed": 1, "rules": [rule]})).await;
    acme.delete(&format!("/v1/issuers/{third}")).await.expect_error(503, "unavailable");
    stack.clear_dynamodb_faults().await;
    acme.delete(&format!("/v1/issuers/{third}")).await.expect_error(404, "not_found");
    thirds.chat(json!({"message": "Hello?"})).await.expect_error(401, "invalid_key");
    acme.delete(&format!("/v1/issuers/{id}")).await.expect_error(404, "not_found");
    let listed = acme.get("/v1/issuers").await.json();
    assert_eq!(listed["issuers"][0]["issuer_id"], other.as_str());
    assert_eq!(listed["issuers"].as_array().unwrap().len(), 1);
    let events = stack.items("audit", "acme", "EVENT#").await;
    let count = |action: &str| events.iter().filter(|event| event["action"] == action).count();
    assert_eq!((count("issuer_registered"), count("issuer_removed")), (3, 2), "{events:?}");
    stack.stop().await;
}

#[tokio::test]
async fn keys_turn_over_and_made_up_names_set_off_nothing() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let (old, new) = (Signer::rsa("old"), Signer::p256("new"));
    let server = KeyServer::start(vec![old.public()]).await;
    register(&acme, &at(&server)).await;
    chat(&stack, &old.token(&ann())).await.expect_status(StatusCode::OK);
    server.publish(Publishing::Keys(vec![new.public()]));
    // A name that is not known is looked for at once.
    chat(&stack, &new.token(&ann())).await.expect_status(StatusCode::OK);
    let asked = server.asked();
    for n in 0..40 {
        let made_up = Signer::ed25519(&format!("made-up-{n}"));
        chat(&stack, &made_up.token(&ann())).await.expect_error(401, "invalid_key");
    }
    // A process that did not know the keys yet asks for them, and once more for a name.
    assert!(server.asked() <= asked + 2 * PROCESSES, "{} times", server.asked());
    chat(&stack, &new.token(&with(ann(), "jti", 2))).await.expect_status(StatusCode::OK);
    stack.stop().await;
}

#[tokio::test]
async fn an_address_that_misbehaves_lets_nobody_in_and_hinders_nobody_else() {
    let stack = stack().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    let signer = Signer::p256("p");
    let elsewhere = KeyServer::start(vec![signer.public()]).await;
    let good = json!({"issuer": ISSUER, "audience": "globex", "keys": [signer.public()]});
    register(&globex, &good).await;
    let set = json!({"keys": [signer.public()]}).to_string();
    let private = with(signer.public(), "d", "c2VjcmV0");
    let many = vec![signer.public(); 100];
    for (n, (publishing, status)) in [
        (Publishing::Silence, 503),
        (Publishing::Answer(302, format!("location: {}\r\n", elsewhere.url()), String::new()), 503),
        (Publishing::Answer(404, String::new(), set.clone()), 503),
        (Publishing::Answer(200, String::new(), "<html>".into()), 503),
        (Publishing::Answer(200, String::new(), format!("{set}{}", " ".repeat(100_000))), 503),
        (Publishing::Late(Duration::from_secs(20), vec![signer.public()]), 503),
        (Publishing::Keys(many), 503),
        // These are sets; but no key of them is one.
        (Publishing::Keys(vec![private]), 401),
        (Publishing::Keys(vec![json!({"kty": "oct", "kid": "p", "k": "c2VjcmV0"})]), 401),
        (Publishing::Keys(Vec::new()), 401),
    ]
    .into_iter()
    .enumerate()
    {
        let server = KeyServer::start(Vec::new()).await;
        server.publish(publishing.clone());
        let audience = format!("audience-{n}");
        register(&acme, &with(at(&server), "audience", audience.as_str())).await;
        let token = |user: &str| signer.token(&claims(ISSUER, &audience, user));
        let code = if status == 503 { "unavailable" } else { "invalid_key" };
        for user in ["ann", "bob", "cid"] {
            chat(&stack, &token(user)).await.expect_error(status, code);
        }
        assert!(server.asked() <= 2, "{publishing:?}: asked {} times", server.asked());
        let other = signer.token(&with(claims(ISSUER, "globex", "zoe"), "jti", n));
        chat(&stack, &other).await.expect_status(StatusCode::OK);
    }
    assert_eq!(elsewhere.asked(), 0);
    // Whoever has a key never waits for an issuer.
    acme.ask("Hello?").await;
    stack.stop().await;
}

#[tokio::test]
async fn one_tenants_silent_issuers_do_not_take_the_time_of_anothers() {
    const SILENT: usize = 12;
    let stack = stack().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    let signer = Signer::p256("p");
    let good = KeyServer::start(vec![signer.public()]).await;
    register(&globex, &with(at(&good), "audience", "globex")).await;
    let mut silent = Vec::new();
    for n in 0..SILENT {
        let server = KeyServer::start(Vec::new()).await;
        server.publish(Publishing::Late(Duration::from_secs(20), Vec::new()));
        register(&acme, &with(at(&server), "audience", format!("a-{n}"))).await;
        silent.push(server);
    }
    // Unsigned tokens do: they could be genuine, so their keys are asked for.
    let made_up = |n: usize, user: &str| {
        let head = json!({"alg": "ES256", "typ": "JWT", "kid": "p"});
        format!("{}.AAAA", unsigned(&head, &claims(ISSUER, &format!("a-{n}"), user)))
    };
    tokio::join!(
        async {
            for n in 0..SILENT {
                chat(&stack, &made_up(n, "eve")).await.expect_error(503, "unavailable");
            }
        },
        async {
            for n in 0..10 {
                let token = signer.token(&with(claims(ISSUER, "globex", "zoe"), "jti", n));
                chat(&stack, &token).await.expect_status(StatusCode::OK);
            }
        }
    );
    // One after the other they meet the same few processes, each of which waits for two or three of them.
    let asked: usize = silent.iter().map(KeyServer::asked).sum();
    assert!(asked <= 8, "{asked} of {SILENT} addresses were waited for");
    let denied = stack.items("audit", "acme", "EVENT#").await;
    let denied =
        denied.iter().filter(|event| event["action"] == "auth_denied" && event["error"] == "unavailable");
    assert!(denied.count() > 0, "it is on record whose issuers could not be asked");
    stack.stop().await;
}

#[tokio::test]
async fn bad_issuers() {
    let stack = stack().await;
    let acme = stack.tenant("acme");
    let signer = Signer::ed25519("e");
    let server = KeyServer::start(vec![signer.public()]).await;
    let good = || at(&server);
    let fixed = |keys: Value| json!({"issuer": ISSUER, "audience": AUDIENCE, "keys": keys});
    for (body, param) in [
        (json!({"audience": AUDIENCE, "jwks_url": server.url()}), "issuer"),
        (json!({"issuer": ISSUER, "jwks_url": server.url()}), "audience"),
        (json!({"issuer": ISSUER, "audience": AUDIENCE}), "jwks_url"),
        (with(good(), "keys", json!([signer.public()])), "jwks_url"),
        (with(good(), "issuer", ""), "issuer"),
        (with(good(), "issuer", 7), "issuer"),
        (with(good(), "audience", "x".repeat(513)), "audience"),
        (with(good(), "user_claim", ""), "user_claim"),
        (with(good(), "groups_claim", ""), "groups_claim"),
        (with(good(), "colour", "red"), "colour"),
        (with(good(), "jwks_url", "https://user@example.com/keys"), "jwks_url"),
        (with(good(), "jwks_url", "http://login.acme.example/keys"), "jwks_url"),
        (with(good(), "scopes", json!([])), "scopes"),
        (with(good(), "scopes", json!(["admin"])), "scopes[0]"),
        (with(good(), "scopes", json!(["chat", "keys:write"])), "scopes[1]"),
        (fixed(json!([])), "keys"),
        (fixed(json!("x")), "keys"),
        (fixed(json!([with(signer.public(), "d", "c2VjcmV0")])), "keys[0]"),
        (fixed(json!([signer.public(), {"kty": "oct", "k": "c2VjcmV0"}])), "keys[1]"),
        (fixed(json!([signer.public(), signer.public()])), "keys[1]"),
    ] {
        let error = acme.post("/v1/issuers", &body).await.expect_error(400, "invalid_request");
        assert_eq!(error["param"], param, "{body}: {error}");
    }
    assert_eq!(acme.get("/v1/issuers").await.json(), json!({"issuers": []}));
    assert!(stack.items("tenants", "acme", "ISSUER#").await.is_empty());
    assert!(!stack.logs().contains("c2VjcmV0"));

    // A repeat answers the first result, and registers nothing.
    let send = async || {
        let request =
            acme.request(Method::POST, "/v1/issuers").header("idempotency-key", "once").json(&good());
        Answer::read(request.send().await.unwrap()).await.expect_status(StatusCode::CREATED).json()
    };
    let first = send().await;
    assert_eq!(send().await, first);
    let id = first["issuer_id"].as_str().unwrap();
    assert_eq!(acme.get(&format!("/v1/issuers/{id}")).await.json(), first);
    assert_eq!(
        first["scopes"],
        json!(["chat", "documents:read", "documents:write", "usage:read", "audit:read"])
    );
    for id in ["iss_000000000000", "nonsense", "..%2fCONFIG", "iss_%23CONFIG"] {
        acme.get(&format!("/v1/issuers/{id}")).await.expect_error(404, "not_found");
        acme.delete(&format!("/v1/issuers/{id}")).await.expect_error(404, "not_found");
    }
    for n in 1..20 {
        register(&acme, &with(good(), "audience", format!("audience-{n}"))).await;
    }
    let more = acme.post("/v1/issuers", &with(good(), "audience", "one-more")).await;
    more.expect_error(409, "conflict");
    stack.stop().await;

    // Unless it is configured otherwise, an issuer is on the internet.
    let stack = Stack::start().await;
    let near = stack.tenant("acme").post("/v1/issuers", &good()).await.expect_error(400, "invalid_request");
    assert_eq!(near["param"], "jwks_url");
    stack.stop().await;
}
