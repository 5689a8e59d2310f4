//! Plain text: paragraphs are what blank lines separate.

use shared::chunk::Block;

pub(super) fn blocks(text: &str) -> Vec<Block> {
    let unified = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut blocks = Vec::new();
    let mut open = String::new();
    // A form feed ends a page, and with it a paragraph.
    for line in unified.split(['\n', '\u{c}']) {
        if line.trim().is_empty() {
            flush(&mut blocks, &mut open);
        } else {
            open.push_str(line);
            open.push('\n');
        }
    }
    flush(&mut blocks, &mut open);
    blocks
}

fn flush(blocks: &mut Vec<Block>, open: &mut String) {
    let text = std::mem::take(open);
    if !text.trim().is_empty() {
        blocks.push(Block::Paragraph(text.trim().to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_paragraphs_whatever_its_line_ends() {
        let paragraph = |text: &str| Block::Paragraph(text.into());
        assert_eq!(blocks("a\r\nb\r\n\r\nc\r\rd"), [paragraph("a\nb"), paragraph("c"), paragraph("d")]);
    }
}
