//! Plain text: paragraphs are what blank lines separate.

use shared::chunk::Block;

use super::{MOST_PIECES, Unreadable};

pub(super) fn blocks(text: &str) -> Result<Vec<Block>, Unreadable> {
    let mut blocks = Vec::new();
    let mut open = String::new();
    // A form feed ends a page, and with it a paragraph.
    for page in text.split('\u{c}') {
        // A line ends with a line feed, a carriage return, or both.
        let lines = page.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r'));
        for line in lines {
            if line.trim().is_empty() {
                flush(&mut blocks, &mut open)?;
            } else {
                open.push_str(line);
                open.push('\n');
            }
        }
        flush(&mut blocks, &mut open)?;
    }
    Ok(blocks)
}

fn flush(blocks: &mut Vec<Block>, open: &mut String) -> Result<(), Unreadable> {
    let text = open.trim();
    if !text.is_empty() {
        if blocks.len() >= MOST_PIECES {
            return Err(Unreadable::TooLarge);
        }
        blocks.push(Block::Paragraph(text.to_owned()));
    }
    open.clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_paragraphs_whatever_its_line_ends() {
        let paragraph = |text: &str| Block::Paragraph(text.into());
        let text = "a\r\nb\r\n\r\nc\r\rd\u{c}e\r";
        let paragraphs = ["a\nb", "c", "d", "e"].map(paragraph);
        assert_eq!(blocks(text).unwrap(), paragraphs);
    }
}
