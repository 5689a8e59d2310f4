//! What is behind an error.

use std::error::Error;

/// An error, what it comes from, what that comes from, and so on.
fn all<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// The first of that kind among an error and all that it comes from.
pub fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    all(error).find_map(|error| error.downcast_ref())
}

/// An error with all that it comes from, in words. What the words before have in them is not said again.
pub fn told(error: &(dyn Error + 'static)) -> String {
    let mut told = String::new();
    for error in all(error) {
        let one = error.to_string();
        if told.is_empty() {
            told = one;
        } else if !told.contains(&one) {
            told.push_str(": ");
            told.push_str(&one);
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct One(&'static str, #[source] Option<Box<dyn Error + 'static>>);

    #[test]
    fn an_error_is_told_with_its_causes_and_nothing_twice() {
        let is = |said, of: One| One(said, Some(Box::new(of)));
        let error = is("no answer", is("cannot connect: refused", One("refused", None)));
        assert_eq!(told(&error), "no answer: cannot connect: refused");
        assert_eq!(find::<One>(&error).map(|one| one.0), Some("no answer"));
    }
}
