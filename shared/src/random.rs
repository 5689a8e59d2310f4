//! Randomness as a parameter, and the alphabet that random identifiers are written in.

use rand::rngs::SysRng;
use rand::{CryptoRng, RngExt, rand_core::UnwrapErr};

/// The operating system's generator: what a function's `main` hands to the domain.
///
/// It keeps no state, so it is copied freely. It panics only where the system has no entropy to
/// give, in which case nothing secret may be made at all.
pub type Entropy = UnwrapErr<SysRng>;

/// The operating system's generator.
pub const fn entropy() -> Entropy {
    UnwrapErr(SysRng)
}

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// The base-62 digit of `value`, which is taken modulo 62.
#[expect(clippy::indexing_slicing, reason = "a number modulo 62 is an index of 62 digits")]
const fn digit(value: u32) -> char {
    BASE62[(value % 62) as usize] as char
}

/// `len` base-62 characters, each drawn uniformly: 5.95 bits a character.
pub fn base62(len: usize, rng: &mut impl CryptoRng) -> String {
    (0..len).map(|_| digit(rng.random_range(0..62))).collect()
}

/// `value` in base 62, most significant digit first, padded to six digits (which hold any `u32`).
pub fn base62_u32(mut value: u32) -> String {
    let mut digits = ['0'; 6];
    for slot in digits.iter_mut().rev() {
        *slot = digit(value);
        value /= 62;
    }
    digits.iter().collect()
}

/// Whether `text` is made of base-62 characters alone and has exactly `len` of them.
pub fn is_base62(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_u32_keeps_its_order_and_width() {
        assert_eq!(base62_u32(0), "000000");
        assert_eq!(base62_u32(61), "00000z");
        assert_eq!(base62_u32(u32::MAX), "4gfFC3");
    }

    #[test]
    fn random_text_uses_the_whole_alphabet() {
        let text = base62(20_000, &mut entropy());
        assert!(is_base62(&text, 20_000));
        let distinct: std::collections::BTreeSet<char> = text.chars().collect();
        assert_eq!(distinct.len(), 62);
    }
}
