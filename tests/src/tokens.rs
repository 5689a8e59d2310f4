//! Users' tokens, and who issues them: signing keys made for the occasion, and a server that publishes their
//! public halves, or does what a server should not.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
    RsaPublicKeyComponents,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use shared::clock::Clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// A key that signs tokens.
pub struct Signer {
    kid: String,
    pair: Pair,
}

enum Pair {
    Rsa(RsaKeyPair),
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Signer {
    /// A new RSA key of 2048 bits.
    pub fn rsa(kid: &str) -> Self {
        Self::new(kid, Pair::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).expect("a key")))
    }

    /// A new key on P-256.
    pub fn p256(kid: &str) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING);
        Self::new(kid, Pair::P256(pair.expect("a key")))
    }

    /// A new key on Ed25519.
    pub fn ed25519(kid: &str) -> Self {
        Self::new(kid, Pair::Ed25519(Ed25519KeyPair::generate().expect("a key")))
    }

    fn new(kid: &str, pair: Pair) -> Self {
        Self { kid: kid.to_owned(), pair }
    }

    /// Its algorithm's name.
    pub const fn alg(&self) -> &'static str {
        match self.pair {
            Pair::Rsa(_) => "RS256",
            Pair::P256(_) => "ES256",
            Pair::Ed25519(_) => "EdDSA",
        }
    }

    /// Its public half, as a JSON Web Key.
    pub fn public(&self) -> Value {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match &self.pair {
            Pair::Rsa(pair) => {
                let public = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
                json!({"kty": "RSA", "kid": self.kid, "use": "sig", "n": text(&public.n), "e": text(&public.e)})
            }
            Pair::P256(pair) => {
                let point = pair.public_key().as_ref();
                json!({"kty": "EC", "crv": "P-256", "kid": self.kid, "x": text(&point[1..33]), "y": text(&point[33..])})
            }
            Pair::Ed25519(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": self.kid, "x": text(pair.public_key().as_ref())})
            }
        }
    }

    /// A token with these claims, signed as it should be.
    pub fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({"alg": self.alg(), "typ": "JWT", "kid": self.kid}), claims)
    }

    /// A token with that header, whatever it says.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        let message = unsigned(header, claims);
        let (rng, bytes) = (SystemRandom::new(), message.as_bytes());
        let signature = match &self.pair {
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &rng, bytes, &mut signature).expect("a signature");
                signature
            }
            Pair::P256(pair) => pair.sign(&rng, bytes).expect("a signature").as_ref().to_vec(),
            Pair::Ed25519(pair) => pair.sign(bytes).as_ref().to_vec(),
        };
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// Header and claims, as they are signed.
pub fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// A token signed with a secret that everybody has: a key's public half.
pub fn signed_with_public(public: &Value, claims: &Value) -> String {
    let header = json!({"alg": "HS256", "typ": "JWT", "kid": public["kid"]});
    let message = unsigned(&header, claims);
    let secret = URL_SAFE_NO_PAD.decode(public["n"].as_str().expect("an RSA key")).expect("base64url");
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(tag))
}

/// Claims of a user that are good for five minutes.
pub fn claims(issuer: &str, audience: &str, user: &str) -> Value {
    let now_s = Clock::system().now().as_seconds();
    json!({"iss": issuer, "aud": audience, "sub": user, "iat": now_s, "exp": now_s + 300})
}

/// What a server answers with.
#[derive(Clone, Debug)]
pub enum Publishing {
    /// A set of keys.
    Keys(Vec<Value>),
    /// This status and body, and these lines of a header.
    Answer(u16, String, String),
    /// A set of keys, but only after a while.
    Late(Duration, Vec<Value>),
    /// Nothing: connections are closed.
    Silence,
}

/// A server at which an issuer publishes its keys.
pub struct KeyServer {
    url: String,
    publishing: Arc<Mutex<Publishing>>,
    asked: Arc<Mutex<usize>>,
    task: tokio::task::JoinHandle<()>,
}

impl KeyServer {
    /// One that publishes these keys.
    pub async fn start(keys: Vec<Value>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/keys", listener.local_addr().expect("an address"));
        let publishing = Arc::new(Mutex::new(Publishing::Keys(keys)));
        let asked = Arc::new(Mutex::new(0));
        let (now, count) = (Arc::clone(&publishing), Arc::clone(&asked));
        let task = tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                *count.lock().expect("a count") += 1;
                let publishing = now.lock().expect("what is published").clone();
                tokio::spawn(async move {
                    let mut request = [0; 8_192];
                    if connection.read(&mut request).await.is_err() {
                        return;
                    }
                    let set = |keys: Vec<Value>| json!({"keys": keys}).to_string();
                    let (status, head, body) = match publishing {
                        Publishing::Keys(keys) => (200, String::new(), set(keys)),
                        Publishing::Answer(status, head, body) => (status, head, body),
                        Publishing::Late(by, keys) => {
                            tokio::time::sleep(by).await;
                            (200, String::new(), set(keys))
                        }
                        Publishing::Silence => return,
                    };
                    let length = body.len();
                    let answer = format!(
                        "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {length}\r\n{head}\r\n{body}"
                    );
                    drop(connection.write_all(answer.as_bytes()).await);
                });
            }
        });
        Self { url, publishing, asked, task }
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Publishes something else from now on.
    pub fn publish(&self, publishing: Publishing) {
        *self.publishing.lock().expect("what is published") = publishing;
    }

    /// How often it has been asked.
    pub fn asked(&self) -> usize {
        *self.asked.lock().expect("a count")
    }
}

impl Drop for KeyServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
