//! Pressure on the model account that tenants share: the lower tiers make room first.

#![expect(clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;
use tests::{Options, Stack, Tenant};

const TIERS: [&str; 4] = ["free", "starter", "professional", "enterprise"];

async fn tenants(stack: &Stack) -> Vec<Tenant> {
    let mut tenants = Vec::new();
    for tier in TIERS {
        let limits = json!({"requests_per_minute": 5_000, "max_concurrent": 100, "tokens_per_day": 100_000_000,
            "monthly_token_budget": 100_000_000});
        let body =
            json!({"tenant_id": format!("t-{tier}"), "tier": tier, "company_name": tier, "limits": limits});
        tenants.push(stack.provision(body).await);
    }
    tenants
}

/// How many of a tenant's answers were answers, and how many were refused to make room.
fn tally(answers: &[tests::Answer]) -> (usize, usize) {
    let ok = answers.iter().filter(|a| a.status == StatusCode::OK).count();
    let shed = answers.iter().filter(|a| a.status == StatusCode::SERVICE_UNAVAILABLE).count();
    assert_eq!(ok + shed, answers.len(), "{:?}", answers.iter().map(|a| &a.text).collect::<Vec<_>>());
    for answer in answers.iter().filter(|a| a.status == StatusCode::SERVICE_UNAVAILABLE) {
        let error = answer.expect_error(503, "unavailable");
        assert_eq!(error["limit"], "model_account", "{error}");
        assert!(error["retry_after_ms"].as_u64().is_some_and(|ms| (1..=60_000).contains(&ms)), "{error}");
        assert!(answer.headers.contains_key("retry-after"));
    }
    (ok, shed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_account_serves_enterprise_and_refuses_the_lowest_tier_first() {
    let parameters = vec![("ModelMaxInFlight", "10".to_owned())];
    let stack =
        Stack::start_with(Options { parameters, model_delay_ms: 400, no_seed: true, ..Options::default() })
            .await;
    let tenants = tenants(&stack).await;
    for tenant in &tenants {
        tenant.store("d", "Doc", "The answer is forty-two and nothing else at all.").await;
    }
    // The account fills with professional and enterprise questions that take seconds …
    let ask = json!({"message": "What is the answer?"});
    let mut filling = tokio::task::JoinSet::new();
    for n in 0..10 {
        let (tenant, ask) = (tenants[2 + n % 2].clone(), ask.clone());
        filling.spawn(async move { tenant.chat(ask).await });
    }
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    // … and now all tiers ask at once.
    let mut asking = tokio::task::JoinSet::new();
    for (place, tenant) in tenants.iter().enumerate() {
        for _ in 0..if place == 3 { 4 } else { 2 } {
            let (tenant, ask) = (tenant.clone(), ask.clone());
            asking.spawn(async move { (place, tenant.chat(ask).await) });
        }
    }
    let mut answers: Vec<Vec<tests::Answer>> = vec![Vec::new(); 4];
    while let Some(Ok((place, answer))) = asking.join_next().await {
        answers[place].push(answer);
    }
    let tallies: Vec<(usize, usize)> = answers.iter().map(|answers| tally(answers)).collect();
    println!("answered and refused, lowest tier first: {tallies:?}");
    let refused = |place: usize| tallies[place].1 as f64 / answers[place].len() as f64;
    assert!(
        (0..3).all(|place| refused(place) >= refused(place + 1)),
        "no tier before a lower one: {tallies:?}"
    );
    assert_eq!(tallies[3].1, 0, "enterprise is never refused for room");
    assert_eq!(tallies[0].0, 0, "free makes room first");
    while let Some(answer) = filling.join_next().await {
        assert!(matches!(answer.unwrap().status, StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE));
    }
    // Its end is seen within 5 s.
    let ended = Instant::now();
    loop {
        if tenants[0].chat(ask.clone()).await.status == StatusCode::OK {
            break;
        }
        assert!(ended.elapsed() < Duration::from_secs(5), "the pressure outlives its cause");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_overloaded_is_left_to_the_higher_tiers() {
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    let tenants = tenants(&stack).await;
    let ask = json!({"message": "What is the answer?"});
    stack.model_fault(json!({"mode": "status", "status": 529, "retry_after": 1})).await;
    let failed = tenants[3].chat(ask.clone()).await;
    failed.expect_error(502, "model_unavailable");
    let refused = tenants[0].chat(ask.clone()).await;
    assert_eq!(refused.expect_error(503, "unavailable")["limit"], "model_account");
    stack.model_fault(json!({"mode": "none"})).await;
    // It makes way for the higher tier at once, and is over for all within 5 s.
    tenants[3].chat(ask.clone()).await.expect_status(StatusCode::OK);
    let ended = Instant::now();
    while tenants[0].chat(ask.clone()).await.status != StatusCode::OK {
        assert!(ended.elapsed() < Duration::from_secs(5), "the pressure outlives its cause");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stack.stop().await;
}

/// Its own account answers a tenant, whatever becomes of the one that the others share, and the other way
/// round.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_an_account_of_its_own_is_not_touched() {
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    let own = |id: &str| json!({"tenant_id": id, "tier": "free", "company_name": id, "model_account": "own"});
    let answer = stack.admin(reqwest::Method::POST, "/admin/tenants", Some(&own("own"))).await;
    let error = answer.expect_error(400, "invalid_request");
    assert_eq!(error["param"], "model_account", "there is no key yet: {error}");
    stack.create_secret("bulkhead/model/tenants/own", "offline-own").await;
    let own = stack.provision(own("own")).await;
    let (shared, ask) = (tenants(&stack).await, json!({"message": "What is the answer?"}));

    // The shared account is overloaded: its free tenant makes room, and that of its own account does not.
    stack.model_fault(json!({"mode": "status", "status": 529, "retry_after": 30})).await;
    shared[3].chat(ask.clone()).await.expect_error(502, "model_unavailable");
    assert_ne!(stack.last_model_key().await, "offline-own");
    stack.model_fault(json!({"mode": "none"})).await;
    shared[0].chat(ask.clone()).await.expect_error(503, "unavailable");
    own.chat(ask.clone()).await.expect_status(StatusCode::OK);
    assert_eq!(stack.last_model_key().await, "offline-own");
    shared[3].chat(ask.clone()).await.expect_status(StatusCode::OK);
    assert_ne!(stack.last_model_key().await, "offline-own");
    stack.stop().await;

    // And its own account's trouble is nobody else's.
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    stack.create_secret("bulkhead/model/tenants/own", "offline-own").await;
    let body =
        json!({"tenant_id": "own", "tier": "enterprise", "company_name": "own", "model_account": "own"});
    let (own, shared) = (stack.provision(body).await, tenants(&stack).await);
    stack.model_fault(json!({"mode": "status", "status": 529, "retry_after": 30})).await;
    own.chat(ask.clone()).await.expect_error(502, "model_unavailable");
    stack.model_fault(json!({"mode": "none"})).await;
    shared[0].chat(ask.clone()).await.expect_status(StatusCode::OK);
    own.chat(ask).await.expect_status(StatusCode::OK);
    stack.stop().await;
}
