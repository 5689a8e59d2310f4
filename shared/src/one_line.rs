//! Text of others on a line of ours. Pure.

use std::fmt::{self, Write};

/// Shows a text so that it stays on its line and does nothing to a terminal: line breaks, control
/// characters and those that reorder or hide what stands beside them are written as escapes, and so
/// are `\` and `"`, so that no two texts are shown alike and a quoted one ends at its quote.
#[derive(Clone, Copy, Debug)]
pub struct OneLine<'a>(pub &'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                '\\' | '"' => {
                    f.write_char('\\')?;
                    f.write_char(c)?;
                }
                c if acts(c) => write!(f, "\\u{{{:x}}}", u32::from(c))?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Whether a character does something rather than show: Unicode's control and format characters, and
/// its separators of lines and paragraphs.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_acts_is_escaped_and_what_shows_is_not() {
        let shown = |text: &str| OneLine(text).to_string();
        assert_eq!(shown("a\r\nb\t\"c\" \\"), r#"a\r\nb\t\"c\" \\"#);
        assert_eq!(shown("\u{1b}[2J\u{9b}31m"), r"\u{1b}[2J\u{9b}31m");
        assert_eq!(shown("eve\u{202e}mada\u{2028}\u{7f}"), r"eve\u{202e}mada\u{2028}\u{7f}");
        assert_eq!(shown("Zoë 東京 🙂"), "Zoë 東京 🙂");
    }

    proptest! {
        #[test]
        fn no_two_texts_are_shown_alike(one in any::<String>(), other in any::<String>()) {
            let shown = OneLine(&one).to_string();
            prop_assert!(!shown.chars().any(acts));
            prop_assert_eq!(one == other, shown == OneLine(&other).to_string());
        }
    }
}
