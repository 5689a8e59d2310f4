//! What is a table in one of our libraries, as one that needs no address put in order when a program starts.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "prompt")]
    confusables::write();
}

/// Which characters look like others (UTS 39).
#[cfg(feature = "prompt")]
mod confusables {
    use std::collections::HashMap;
    use std::path::Path;

    use unicode_normalization::UnicodeNormalization;
    use unicode_security::confusable_detection::skeleton;

    /// Writes a table of the characters that do not stand for themselves in a skeleton: each with the place and the
    /// length of what does, in one text. Those that are decomposed first are never looked for.
    #[expect(clippy::unwrap_used, reason = "a build fails by panicking")]
    pub(super) fn write() {
        let (mut table, mut text, mut known) = (String::new(), String::new(), HashMap::new());
        let mut count = 0;
        for c in '\0'..=char::MAX {
            let alone = c.encode_utf8(&mut [0; 4]).to_owned();
            let stands: String = skeleton(&alone).collect();
            if stands == alone || !alone.nfd().eq([c]) {
                continue;
            }
            let length = u8::try_from(stands.len()).unwrap();
            let at = *known.entry(stands.clone()).or_insert_with(|| {
                let at = u16::try_from(text.len()).unwrap();
                text.push_str(&stands);
                at
            });
            table.push_str(&format!("({c:?},{at},{length}),"));
            count += 1;
        }
        let code = format!(
            "static STANDS: &str = {text:?};\nstatic CONFUSABLES: [(char, u16, u8); {count}] = [{table}];\n"
        );
        let folder = std::env::var_os("OUT_DIR").unwrap();
        std::fs::write(Path::new(&folder).join("confusables.rs"), code).unwrap();
    }
}
